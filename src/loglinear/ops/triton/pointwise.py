"""What layers do to rows between their matrix products, forward only.

One program takes a few rows (or a stretch of numbers). Everything is computed in float32; where a layer rounds to its
own dtype on the way, so does the kernel.

Legend
    N rows, W width of a row, H heads, G groups, K, V widths of a head, D width of a rotated head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.ops.triton.common import cdiv, next_power_of_2
from loglinear.ops.triton.launch import kernel

WIDEST = 16_384  # a row is in registers
STRETCH = 1024  # numbers of a program that goes by numbers


@triton.jit
def _softplus(x):
    """log(1 + e^x), also where e^x is small: the rounding of 1 + e^x is divided out again."""
    small = tl.exp(-tl.abs(x))
    one_more = 1.0 + small
    rounded = one_more - 1.0
    log1p = tl.where(rounded == 0.0, small, tl.log(one_more) * (small / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _rows_of(N, W, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows and columns of this program, and which exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    return row[:, None], column[None, :], (row < N)[:, None] & (column < W)[None, :]


@triton.jit
def _normed(x, weight, column, W, eps):
    mean = tl.sum(x * x, 1) / W
    factor = tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)
    return x * tl.rsqrt(mean + eps)[:, None] * factor


@kernel(do_not_specialize=["N"])
def _rms_norm_kernel(x, added, weight, y, total, N, W, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column, mask = _rows_of(N, W, ROWS, WIDTH)
    place = row * W + column
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if added is not None:
        values += tl.load(added + place, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        values = rounded.to(tl.float32)
    tl.store(y + place, _normed(values, weight, column, W, eps).to(y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["N"])
def _gated_rms_norm_kernel(x, gate, values, factor, weight, y, N, W, V, stride_v, eps, SILU: tl.constexpr,
                           GATE_FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row, column, mask = _rows_of(N, W, ROWS, WIDTH)
    place = row * W + column
    mixed = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if values is not None:
        skipped = tl.load(values + row * stride_v + column, mask=mask, other=0.0).to(tl.float32)
        mixed += tl.load(factor + column // V, mask=column < W, other=0.0).to(tl.float32) * skipped
        mixed = mixed.to(y.dtype.element_ty).to(tl.float32)
    raw = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    opened = _sigmoid(raw)
    if SILU:
        opened *= raw
    if GATE_FIRST:
        result = _normed(mixed * opened, weight, column, W, eps)
    else:
        result = _normed(mixed, weight, column, W, eps) * opened
    tl.store(y + place, result.to(y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["N", "G"])
def _unit_length_kernel(x, y, N, G, K, stride_n, stride_g, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column, mask = _rows_of(N * G, K, ROWS, WIDTH)
    values = tl.load(x + row // G * stride_n + row % G * stride_g + column, mask=mask, other=0.0).to(tl.float32)
    unit = values * tl.rsqrt(tl.sum(values * values, 1) + eps)[:, None]
    tl.store(y + row * K + column, unit.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _stretch(count, BLOCK: tl.constexpr):
    """Places of this program's numbers, and which exist."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return place, place < count


@kernel(do_not_specialize=["count"])
def _level_scales_kernel(raw, weight, y, count, W, BLOCK: tl.constexpr):
    place, mask = _stretch(count, BLOCK)
    factor = tl.load(weight + place % W, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, _softplus(factor * tl.load(raw + place, mask=mask, other=0.0).to(tl.float32)), mask=mask)


@kernel(do_not_specialize=["count"])
def _log_decay_kernel(z, dt_bias, A_log, y, count, W, channels, BLOCK: tl.constexpr):
    place, mask = _stretch(count, BLOCK)
    column = place % W
    bias = tl.load(dt_bias + column, mask=mask, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + column // channels, mask=mask, other=0.0).to(tl.float32))
    dt = _softplus(tl.load(z + place, mask=mask, other=0.0).to(tl.float32) + bias)
    tl.store(y + place, -rate * dt, mask=mask)


@kernel()
def _log_decay_and_values_kernel(z, dt_bias, A_log, v, logs, scaled, H, V, stride_v, stride_vh, HEADS: tl.constexpr,
                                 WIDTH: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    exists = head < H
    bias = tl.load(dt_bias + head, mask=exists, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + head, mask=exists, other=0.0).to(tl.float32))
    dt = _softplus(tl.load(z + token * H + head, mask=exists, other=0.0).to(tl.float32) + bias)
    tl.store(logs + token * H + head, -rate * dt, mask=exists)
    mask = exists[:, None] & (column < V)[None, :]
    at = token * stride_v + head[:, None] * stride_vh + column[None, :]
    values = tl.load(v + at, mask=mask, other=0.0).to(tl.float32) * dt[:, None]
    place = (token * H + head[:, None]) * V + column[None, :]
    tl.store(scaled + place, values.to(scaled.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["count"])
def _silu_product_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    place, mask = _stretch(count, BLOCK)
    raw = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    opened = (raw * _sigmoid(raw)).to(y.dtype.element_ty).to(tl.float32)
    product = opened * tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, product.to(y.dtype.element_ty), mask=mask)


@kernel()
def _rotate_kernel(x, positions, turns, y, H, half, stride_n, stride_h, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(turns + column, mask=column < half, other=0.0)
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    mask = (head < H)[:, None] & (column < half)[None, :]
    at = token * stride_n + head[:, None] * stride_h + column[None, :]
    first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, mask=mask, other=0.0).to(tl.float32)
    place = (token * H + head[:, None]) * (2 * half) + column[None, :]
    tl.store(y + place, (first * cosine - second * sine).to(y.dtype.element_ty), mask=mask)
    tl.store(y + place + half, (second * cosine + first * sine).to(y.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------
# Launches
# ----------------------------------------------------------------------------------------------------


def _tile(rows: int, width: int) -> dict[str, int]:
    """Rows of a program and their padded width: few rows get a program each."""
    padded = next_power_of_2(width)
    several = max(1, 4096 // padded) if rows >= 4096 else 1
    return {"ROWS": several, "WIDTH": padded, "num_warps": 8 if several * padded > 2048 else 4}


def _heads(heads: int, width: int) -> dict[str, int]:
    """Heads of a program and their padded width."""
    padded = next_power_of_2(width)
    return {"HEADS": min(next_power_of_2(heads), max(1, 1024 // padded)), "WIDTH": padded}


def rms_norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(normed, x + added)`, each `[N, W]`, from contiguous `x, added [N, W]`; without `added` the second is x."""
    rows, width = x.shape
    y = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    tile = _tile(rows, width)
    with torch.cuda.device_of(x):
        grid = (cdiv(rows, tile["ROWS"]),)
        _rms_norm_kernel[grid](x, added, weight, y, total, rows, width, eps, **tile)
    return y, total


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str, gate_first: bool,
    values: Tensor | None = None, factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`[N, W]` from contiguous `x, gate [N, W]`; `values [N, W]` in rows of any stride, `factor [H]`."""
    rows, width = x.shape
    y = torch.empty_like(x)
    tile = _tile(rows, width)
    head_width, stride = (1, 0) if values is None or factor is None else (width // factor.numel(), values.stride(0))
    with torch.cuda.device_of(x):
        _gated_rms_norm_kernel[cdiv(rows, tile["ROWS"]),](
            x, gate, values, factor, weight, y, rows, width, head_width, stride, eps, activation == "silu", gate_first,
            **tile,
        )  # fmt: skip
    return y


def unit_length(x: Tensor, eps: float) -> Tensor:
    """Contiguous `[N, G, K]` from `x [N, G, K]` with dense heads."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, groups, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(rows * groups, width)
    with torch.cuda.device_of(x):
        grid = (cdiv(rows * groups, tile["ROWS"]),)
        _unit_length_kernel[grid](x, y, rows, groups, width, x.stride(0), x.stride(1), eps, **tile)
    return y


def level_scales(raw: Tensor, weight: Tensor) -> Tensor:
    """float32, of the shape of `raw [..., W]`; `weight` has W numbers."""
    raw, y = raw.contiguous(), torch.empty(raw.shape, dtype=torch.float32, device=raw.device)
    with torch.cuda.device_of(raw):
        grid = (cdiv(raw.numel(), STRETCH),)
        _level_scales_kernel[grid](raw, weight, y, raw.numel(), weight.numel(), STRETCH)
    return y


def log_decay(z: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    """float32, of the shape of `z [..., W]`; `dt_bias [W]`, `A_log [H]`."""
    z, y = z.contiguous(), torch.empty(z.shape, dtype=torch.float32, device=z.device)
    width = dt_bias.numel()
    with torch.cuda.device_of(z):
        grid = (cdiv(z.numel(), STRETCH),)
        _log_decay_kernel[grid](z, dt_bias, A_log, y, z.numel(), width, width // A_log.numel(), STRETCH)
    return y


def log_decay_and_values(z: Tensor, dt_bias: Tensor, A_log: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, H]` float32 and contiguous `[N, H, V]` from contiguous `z [N, H]` and `v [N, H, V]` with dense heads."""
    v = v if v.stride(-1) == 1 else v.contiguous()
    rows, heads, width = v.shape
    logs = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    scaled = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tile = _heads(heads, width)
    with torch.cuda.device_of(v):
        grid = (rows, cdiv(heads, tile["HEADS"]))
        _log_decay_and_values_kernel[grid](
            z, dt_bias, A_log, v, logs, scaled, heads, width, v.stride(0), v.stride(1), **tile
        )
    return logs, scaled


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of contiguous tensors."""
    y = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _silu_product_kernel[cdiv(gate.numel(), STRETCH),](gate, up, y, gate.numel(), STRETCH)
    return y


def rotate(x: Tensor, positions: Tensor, turns: Tensor) -> Tensor:
    """Contiguous `[N, H, D]` from `x [N, H, D]` with dense heads, `positions [N]` and `turns [D/2]`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, heads, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _heads(heads, width // 2)
    with torch.cuda.device_of(x):
        grid = (rows, cdiv(heads, tile["HEADS"]))
        _rotate_kernel[grid](x, positions, turns, y, heads, width // 2, x.stride(0), x.stride(1), **tile)
    return y
