"""The kernels between the matrix products give what the modules give in PyTorch, and are used where they may be."""

import pytest
import torch
from torch import Tensor, nn

from loglinear.layers import GatedRMSNorm, LevelScales, RMSNorm, TimeStep, fused
from loglinear.layers.norms import unit_length
from loglinear.layers.rotary import rotate
from loglinear.models.model import SwiGLU
from loglinear.ops.triton import scalar
from small_models import relative_error, small_mixer

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not scalar.INTERPRETED, reason="kernels are not interpreted here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Relative to PyTorch in the same dtype: float32 differs in exp and log, 16 bits now and then by one rounding.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}
INTERPRETED = {**TOLERANCES, torch.bfloat16: 1e-2}  # the interpreter cuts bfloat16 off
DTYPES = list(TOLERANCES)


def drawn(*shape: int, dtype: torch.dtype, device: str, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * spread).to(device, dtype)


@torch.no_grad()
def compare(monkeypatch, call, dtype: torch.dtype, device: str) -> None:
    """`call()` with the kernels against `call()` without them: dtypes, shapes and numbers."""
    with monkeypatch.context() as patch:
        patch.setattr(fused, "covers", lambda *tensors: False)
        wanted = call()
    called = []
    with monkeypatch.context() as patch:
        if device == "cpu":
            patch.setattr(fused, "covers", lambda *tensors: called.append(True) or True)
        got = call()
    assert called or device == "cuda"
    for mine, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.isfinite(mine).all()
        assert relative_error(mine.double(), theirs.double()) < (INTERPRETED if device == "cpu" else TOLERANCES)[dtype]


def weighted(module: nn.Module, device: str) -> nn.Module:
    """A module whose weights are no longer ones."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 3, 5, 33), (1, 1, 1)])
def test_rms_norm(monkeypatch, shape, dtype, device):
    norm = weighted(RMSNorm(shape[-1]), device)
    x = drawn(*shape, dtype=dtype, device=device, spread=3)
    compare(monkeypatch, lambda: norm(x), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm_of_many_rows(monkeypatch, device):
    """From some number on, a program takes several."""
    norm = weighted(RMSNorm(19), device)
    x = drawn(4099, 19, dtype=torch.float32, device=device)
    compare(monkeypatch, lambda: norm(x), torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum(monkeypatch, dtype, device):
    norm = weighted(RMSNorm(40), device)
    x, added = drawn(2, 2, 3, 40, dtype=dtype, device=device).unbind(0)
    compare(monkeypatch, lambda: norm.of_sum(x, added), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_gated_norm(monkeypatch, gate, gate_first, skips, dtype, device):
    heads, width = 3, 11
    norm = weighted(GatedRMSNorm(heads * width, gate, gate_first), device)
    x, z = drawn(2, 2, 2, heads * width, dtype=dtype, device=device).unbind(0)
    projected = drawn(2, 2, 7 + heads * width, dtype=dtype, device=device)  # v is the end of a wider row
    v = projected[..., 7:].unflatten(-1, (heads, width))
    skip = (v, drawn(heads, dtype=torch.float32, device=device)) if skips else None
    compare(monkeypatch, lambda: norm(x, z, skip), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_length_of_heads_in_wider_rows(monkeypatch, dtype, device):
    groups, width = 3, 10
    projected = drawn(2, 2, 5 + groups * width, dtype=dtype, device=device)
    q = projected[..., 5:].unflatten(-1, (groups, width))
    compare(monkeypatch, lambda: unit_length(q), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_level_scales(monkeypatch, dtype, device):
    scales = weighted(LevelScales(24, 5, 7), device)
    scales.proj.to(dtype)
    x = drawn(2, 3, 24, dtype=dtype, device=device)
    compare(monkeypatch, lambda: scales(x), torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 4])
def test_decay(monkeypatch, channels, device):
    """Also where the time step is tiny: the error is that of each number, not of the largest."""
    step = TimeStep(6, channels).to(device)
    z = torch.linspace(-30, 30, 2 * 5 * 6 * channels).view(2, 5, -1).to(device)
    compare(monkeypatch, lambda: step.log_decay(z), torch.float32, device)
    compare(monkeypatch, lambda: (-step.log_decay(z)).log(), torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_time_steps_scale_values(monkeypatch, dtype, device):
    step = TimeStep(6).to(device)
    z = drawn(2, 3, 6, dtype=dtype, device=device, spread=4)
    v = drawn(2, 3, 8 + 6 * 9, dtype=dtype, device=device)[..., 8:].unflatten(-1, (6, 9))

    def scaled() -> tuple[Tensor, Tensor]:
        product, log_decay = step.scale(v, z)
        return product.to(v.dtype), log_decay

    compare(monkeypatch, scaled, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(monkeypatch, dtype, device):
    mlp = SwiGLU(20, 27).to(device, dtype)
    x = drawn(2, 3, 20, dtype=dtype, device=device, spread=3)
    compare(monkeypatch, lambda: mlp(x), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(monkeypatch, dtype, device):
    """Angles of a million radians are still those of PyTorch."""
    heads, width = 5, 14
    q = drawn(2, 3, 4 + heads * width, dtype=dtype, device=device)[..., 4:].unflatten(-1, (heads, width))
    positions = torch.tensor([[0, 1, 2], [1_048_573, 1_048_574, 1_048_575]], device=device)
    compare(monkeypatch, lambda: rotate(q, positions, 10_000.0), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_not_finite_stays_not_finite(monkeypatch, device):
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(fused, "covers", lambda *tensors: True)
        x = torch.ones(3, 8, device=device)
        x[1, 2] = torch.nan
        assert RMSNorm(8).to(device)(x).isnan().any(-1).tolist() == [False, True, False]
        z = torch.tensor([[0.0, torch.nan]], device=device)
        assert TimeStep(2).to(device).log_decay(z).isnan().tolist() == [[False, True]]


def test_covered_are_float_tensors_on_cuda_without_gradients():
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert not fused.covers(x)


@pytest.mark.gpu
def test_covered_on_a_gpu():
    x = torch.ones(2, 3, device="cuda")
    assert not fused.covers(x)  # gradients are on
    with torch.no_grad():
        assert fused.covers(x, x.half(), x.bfloat16())
        assert not fused.covers(x, x.double())
        assert not fused.covers(x, x[:0])
        assert not torch.compile(lambda y: y + float(fused.covers(y)), backend="eager")(x).gt(1).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fixed", [True, False])
def test_attention_decodes_through_the_kernel(monkeypatch, fixed, device):
    """A layer with a cache, growing or static, whose rows stand at different positions."""
    attention = small_mixer("attention").float().to(device)
    x = torch.randn(2, 9, 28, device=device)

    def decoded() -> Tensor:
        state = attention.zero_state(2, capacity=16 if fixed else None)
        _, state = attention(x[:, :6], state, return_state=True)
        state.seen[1] = 3
        outputs = []
        for token in range(6, 9):
            y, state = attention(x[:, token : token + 1], state, return_state=True)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    compare(monkeypatch, decoded, torch.float32, device)
