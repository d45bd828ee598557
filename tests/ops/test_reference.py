"""The two specifications against each other, and against a case worked out by hand."""

import pytest
import torch

from loglinear import log_linear_attention
from loglinear.ops.reference import log_linear_attention_dense, recurrence
from operator_cases import MIXERS, Shape, assert_close, gradients, make_inputs


def test_by_hand():
    """Four tokens with q = k = 1: o_t = Σ_s λ[t, level(t, s)] v_s, with the levels of the paper's figure."""
    ones, values = torch.ones(4, 1, 1), torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(4, 1, 1)
    scales = torch.tensor([[2.0, 3.0, 5.0]]).expand(4, 1, 3)
    o, buckets = recurrence(ones, ones, values, scales, None, None, 1.0, None, 0)
    assert o.flatten().tolist() == [
        2 * 1,
        2 * 10 + 3 * 1,
        2 * 100 + 5 * (1 + 10),
        2 * 1000 + 3 * 100 + 5 * (1 + 10),
    ]
    assert buckets.flatten().tolist() == [0, 0, 1111]  # four tokens: one full block


@pytest.mark.parametrize("L", [None, 1, 3, 9])
@pytest.mark.parametrize("mixer", MIXERS)
def test_recurrence_equals_dense_form(mixer, L):
    inputs = make_inputs(mixer, Shape(B=2, T=21, G=2, H=4, K=3, V=5, L=L)).leaves()
    arguments = inputs.arguments()
    o, _ = log_linear_attention(**arguments, scale=0.7, backend="reference")
    positional = [arguments.pop(name) for name in ("q", "k", "v", "level_scales")]
    dense = log_linear_attention_dense(*positional, **arguments, scale=0.7)
    assert_close(o, dense, 1e-13, "o")
    cotangent = [torch.randn_like(o)]
    found, expected = (gradients([x], cotangent, inputs.present()) for x in (o, dense))
    for name in expected:
        assert_close(found[name], expected[name], 1e-12, f"gradient of {name}")
