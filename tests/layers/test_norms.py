import torch
import torch.nn.functional as F

from loglinear.layers import GatedRMSNorm, RMSNorm
from loglinear.layers.norms import unit_length
from loglinear.layers.rotary import rotate


def test_rms_norm_equals_torchs():
    norm = RMSNorm(6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.allclose(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-3))


def test_gate_before_or_after():
    x, gate = torch.randn(2, 3, 6, dtype=torch.float64).unbind(0)
    after, before = GatedRMSNorm(6, "sigmoid").double(), GatedRMSNorm(6, gate_first=True).double()
    assert torch.allclose(after(x, gate), after.norm(x) * torch.sigmoid(gate))
    assert torch.allclose(before(x, gate), before.norm(x * F.silu(gate)))


def test_sixteen_bits_are_widened_inside():
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square overflows fp16
    assert torch.equal(RMSNorm(8).half()(x), torch.ones(1, 8, dtype=torch.float16))
    assert torch.allclose(unit_length(x).float().norm(), torch.tensor(1.0), atol=1e-3)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)

    def score(t: int, s: int) -> torch.Tensor:
        return (rotate(q, torch.tensor([[t]]), 10_000.0) * rotate(k, torch.tensor([[s]]), 10_000.0)).sum()

    assert torch.allclose(rotate(q, torch.tensor([[123]]), 10_000.0).norm(), q.norm())
    assert torch.allclose(score(5, 3), score(1_000_005, 1_000_003), atol=1e-7)
    assert not torch.allclose(score(5, 3), score(5, 4))
