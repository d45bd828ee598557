"""Operators under `vmap`: several calls at once are those calls one by one, with all gradients, on every backend."""

import pytest
import torch
from torch.func import vmap

from loglinear import log_linear_attention
from loglinear.ops import stacked
from operator_cases import MIXERS, TOLERANCES, Inputs, Shape, assert_close, gradients, make_inputs

MODELS = 3
SHAPE = Shape(B=2, T=37, G=1, H=2, K=5, V=6, L=7)


def at_once(inputs: Inputs, dims: dict[str, int | None], backend: str) -> torch.Tensor:
    """`inputs` with MODELS entries along the dimension `dims` says (0 where it does not), None: one for all."""
    names = list(inputs.present())
    scale = 0.7

    def call(*values):
        return log_linear_attention(**dict(zip(names, values, strict=True)), scale=scale, backend=backend)[0]

    return vmap(call, in_dims=tuple(dims.get(name, 0) for name in names))(*inputs.present().values())


def compare(mixer: str, shape: Shape, dtype: torch.dtype, backend: str) -> None:
    models = [make_inputs(mixer, shape, dtype) for _ in range(MODELS)]
    together = Inputs(
        *(None if one[0] is None else torch.stack(one) for one in zip(*(m.values() for m in models), strict=True))
    ).leaves()
    dims = {"k": None, "v": 2}  # keys are the same for all, and values lie in another order
    keys = models[0].k
    mapped = Inputs(together.q, keys.clone().requires_grad_(), *together.values()[2:])
    mapped.v = together.v.movedim(0, 2).detach().requires_grad_()
    o = at_once(mapped, dims, backend)
    cotangent = torch.randn_like(o)
    found = gradients([o], [cotangent], mapped.present())
    found["v"] = found["v"].movedim(2, 0)
    tolerance, total = TOLERANCES[dtype], torch.zeros_like(keys, dtype=torch.float64)
    for number, model in enumerate(models):
        alone = Inputs(model.q, keys, *model.values()[2:]).leaves()
        wanted, _ = log_linear_attention(**alone.arguments(), scale=0.7, backend=backend)
        assert_close(o[number], wanted, tolerance.forward, "o")
        for name, gradient in gradients([wanted], [cotangent[number]], alone.present()).items():
            if name == "k":
                total += gradient
            else:
                assert_close(found[name][number], gradient, tolerance.gradient, f"gradient of {name}")
    assert_close(found["k"], total, tolerance.gradient, "gradient of k")


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("levels", [None, 7])
def test_torch(mixer, levels):
    compare(mixer, SHAPE._replace(L=levels), torch.float64, "torch")


@pytest.mark.parametrize("mixer", ["linear_attention", "mamba2", "delta_net", "gated_deltanet"])
def test_kernels(mixer):
    scalar = pytest.importorskip("loglinear.ops.triton.scalar")
    if not scalar.INTERPRETED:
        pytest.skip("kernels are not interpreted here")
    compare(mixer, SHAPE._replace(T=19, K=16, V=16), torch.float32, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["linear_attention", "mamba2", "delta_net", "gated_deltanet"])
def test_kernels_on_a_gpu(mixer):
    inputs = [make_inputs(mixer, Shape(B=3, T=200, G=1, H=2, K=64, V=128, L=9), torch.float32, "cuda") for _ in "ab"]
    together = Inputs(
        *(None if one[0] is None else torch.stack(one) for one in zip(*(x.values() for x in inputs), strict=True))
    )
    o = at_once(together, {}, "triton")
    for number, one in enumerate(inputs):
        assert_close(o[number], log_linear_attention(**one.arguments(), scale=0.7)[0], 2e-6, "o")


def test_what_is_not_covered_is_refused():
    inputs = make_inputs("mamba2", SHAPE)
    bounds = torch.tensor([0, 30, 37])

    def packed(q):
        one = Inputs(q, *inputs.rows(0, 1).values()[1:])
        return log_linear_attention(**one.arguments(), cu_seqlens=bounds, backend="torch")[0]

    with pytest.raises(ValueError, match="under vmap: got cu_seqlens, wanted whole sequences"):
        vmap(packed)(inputs.q[:, None])

    def returning(q):
        one = Inputs(q, *inputs.values()[1:])
        return log_linear_attention(**one.arguments(), return_state=True, backend="torch")[1].buckets

    with pytest.raises(ValueError, match="under vmap: got return_state"):
        vmap(returning)(inputs.q[None])
    assert not stacked.is_mapped(inputs.q, None)
