"""One token of a short causal convolution, in one kernel: the window moves by one, is weighed, and goes through silu.

Legend: B rows, W taps, C channels.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from loglinear.ops.triton.common import cdiv, next_power_of_2, program_place, programs
from loglinear.ops.triton.launch import kernel

CHANNELS = 256  # of a program


def unsupported(x: Tensor, state: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not cover a call, or None."""
    if any(tensor.dtype == torch.float64 for tensor in (x, state, weight)):
        return "float64"
    if x.numel() == 0:
        return "an empty batch"
    if not state.is_contiguous():
        return "a state that is not contiguous"
    return None


@kernel(do_not_specialize=["B"])
def _convolution_kernel(x, state, weight, bias, y, B, stride, C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
                        BC: tl.constexpr):  # fmt: skip
    """BW: W or more, a power of two. The window [BW, BC] has the state's W - 1 inputs, then the new one."""
    block, row = program_place()
    if row >= B:
        return
    row = row.to(tl.int64)
    tap, channel = tl.arange(0, BW)[:, None], block * BC + tl.arange(0, BC)[None, :]
    inside = channel < C
    held = state + row * (W - 1) * C + tap * C + channel
    newest = tl.load(x + row * stride + channel, mask=inside, other=0.0).to(tl.float32)
    window = tl.load(held, mask=inside & (tap < W - 1), other=0.0).to(tl.float32)
    window = tl.where(tap == W - 1, newest, window)
    # weights as the other tokens of the sequence see them
    taps = tl.load(weight + channel * W + tap, mask=inside & (tap < W), other=0.0).to(x.dtype.element_ty)
    out = tl.sum(window * taps.to(tl.float32), 0)[None, :]
    if bias is not None:
        out += tl.load(bias + channel, mask=inside, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    tl.debug_barrier()  # several warps may have loaded the same numbers
    tl.store(held - C, window.to(state.dtype.element_ty), mask=inside & (tap > 0) & (tap < W))
    tl.store(y + row * C + channel, (out * tl.sigmoid(out)).to(y.dtype.element_ty), mask=inside)


def _launch(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (rows, _, channels), width = x.shape, weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    block = min(CHANNELS, next_power_of_2(channels))
    with torch.cuda.device_of(x):  # kernels are launched on the current device
        _convolution_kernel[programs(cdiv(channels, block), rows)](
            x, state, weight, bias, y, rows, x.stride(0), channels, width, BW=next_power_of_2(width), BC=block,
            num_warps=4,
        )  # fmt: skip
    return y


_convolution_op = torch.library.custom_op("loglinear::convolution_step", _launch, mutates_args=("state",))


@_convolution_op.register_fake
def _(x, state, weight, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def convolution_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [B, 1, C]` to `[B, 1, C]`, for weights `[C, W]` and a bias `[C]`; the state `[B, W-1, C]` moves by one."""
    if torch.compiler.is_compiling():
        return _convolution_op(x, state, weight, bias)
    y = _launch(x, state, weight, bias)  # without torch's dispatcher, as in `step`
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return y
