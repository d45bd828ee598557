"""What stands between the matrix products of a layer, one kernel each: norms, gates, activations, rotations.

A decoding step is bound by the number of kernels, so what PyTorch does in three to ten of them is done in one here.
There are no gradients: `covers` says where these functions may be called, everything else is computed by the modules in
PyTorch. Numbers are rounded where the modules round them, and computed in float32 between.

    N rows (tokens) · W width of a row · H heads · G groups · K, V widths of a head · L levels
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

try:
    from loglinear.ops.triton import one_query, pointwise
except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.split(".")[0] != "triton":
        raise
    one_query = pointwise = None  # Triton is not installed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def covers(*tensors: Tensor) -> bool:
    """Whether the functions of this module take these inputs: float tensors on CUDA devices where no gradient is
    wanted, and not while `torch.compile` looks on, which fuses by itself.
    """
    if pointwise is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(
        type(x) in (Tensor, nn.Parameter)  # no fake or distributed ones
        and x.is_cuda
        and x.dtype in DTYPES
        and x.numel() > 0
        and x.shape[-1] <= pointwise.WIDEST
        for x in tensors
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension: `[..., W]`, `weight [W]`, to `[..., W]`."""
    assert pointwise is not None
    return pointwise.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)[0].view(x.shape)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + added` and its `rms_norm`, `x` and `added` `[..., W]` of one dtype."""
    assert pointwise is not None
    width = x.shape[-1]
    y, total = pointwise.rms_norm(x.reshape(-1, width), weight, eps, added.reshape(-1, width))
    return total.view(x.shape), y.view(x.shape)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    skip: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`norm(x) * act(gate)` or, with `gate_first`, `norm(x * act(gate))`, over the last dimension: `x, gate [..., W]`.

    Args:
        activation: "silu" or "sigmoid".
        skip: `(v [..., H, V], factor [H])` with H V = W: `factor * v` is added to x first.
    """
    assert pointwise is not None
    width = x.shape[-1]
    values, factor = (None, None) if skip is None else (skip[0].flatten(-2).flatten(0, -2), skip[1])
    y = pointwise.gated_rms_norm(
        x.reshape(-1, width), gate.reshape(-1, width), weight, eps, activation, gate_first, values, factor
    )
    return y.view(x.shape)


def level_scales(raw: Tensor, weight: Tensor) -> Tensor:
    """`softplus(weight * raw)`: `raw [..., H L]` and `weight [H, L]` to `[..., H, L]` in float32."""
    assert pointwise is not None
    return pointwise.level_scales(raw, weight).view(*raw.shape[:-1], *weight.shape)


def log_decay(z: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    """`-exp(A_log) * softplus(z + dt_bias)` in float32, of the shape of `z [..., H]` (`[..., H K]`, K channels of each
    of the H heads of `A_log`)."""
    assert pointwise is not None
    return pointwise.log_decay(z, dt_bias, A_log)


def log_decay_and_values(z: Tensor, dt_bias: Tensor, A_log: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`log_decay(z)`, and `dt * v` with `dt = softplus(z + dt_bias)`: `z [..., H]`, `v [..., H, V]`."""
    assert pointwise is not None
    logs, scaled = pointwise.log_decay_and_values(z.reshape(-1, z.shape[-1]), dt_bias, A_log, v.flatten(0, -3))
    return logs.view(z.shape), scaled.view(v.shape)


def unit_length(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dimension of `x [..., G, K]`."""
    assert pointwise is not None
    return pointwise.unit_length(x.flatten(0, -3), eps).view(x.shape)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of one shape and dtype."""
    assert pointwise is not None
    return pointwise.silu_product(gate.contiguous(), up.contiguous())


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """`layers.rotary.rotate`: `x [B, T, H, D]` by `positions [B, T]`."""
    assert pointwise is not None
    turns = _turns(x.shape[-1] // 2, theta, x.device)
    return pointwise.rotate(x.flatten(0, 1), positions.reshape(-1), turns).view(x.shape)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor | None:
    """Softmax attention of one query a head, `q [B, 1, H, D]`, to the first `lengths [B]` columns of `keys, values
    [B, S, J, D]`: `[B, 1, H, D]`; None where no kernel covers it."""
    if not covers(q, keys, values) or q.shape[1] != 1 or keys.stride() != values.stride():
        return None
    assert one_query is not None
    dense = keys.stride(-1) == 1 and keys.stride(-2) == keys.shape[-1]
    if not dense or q.shape[-1] > one_query.WIDEST or q.shape[2] // keys.shape[2] > one_query.MOST_QUERIES:
        return None
    return one_query.attend_one(q[:, 0], keys, values, lengths, q.shape[-1] ** -0.5)[:, None]


@functools.cache
def _turns(half: int, theta: float, device: torch.device) -> Tensor:
    """Radians per token of each channel pair: `[D/2]` float32. Kept for good: a recorded step holds its address."""
    with torch.inference_mode(False):
        return theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
