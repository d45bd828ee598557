"""The operator for one decay per head, or none (linear attention, RetNet, Mamba-2), on Triton kernels.

Forward: `nodes.py`, then `read.py`. Backward: `backward.py`, which makes the nodes again rather than keep them.

Legend
    B batch, T tokens, G groups, H heads, K key width, V value width, L levels
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.ops.triton.backward import gradients
from loglinear.ops.triton.nodes import make_nodes
from loglinear.ops.triton.read import read

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 16 if INTERPRETED else 64  # the interpreter pays by the product, and small chunks make more of a tree
LARGEST_WIDTH = 128
LARGEST_GRID = 65_535  # programs along the second dimension of a launch


def num_slots(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Slots of a call: exact for a batch, enough for packed sequences, whose lengths the host does not know."""
    batch, tokens = v.shape[:2]
    return batch * -(-tokens // CHUNK) if cu_seqlens is None else tokens // CHUNK + len(cu_seqlens) - 1


def unsupported(
    q: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, cu_seqlens: Tensor | None, initial_state,
    return_state: bool,
) -> str | None:  # fmt: skip
    """Why these kernels do not cover a call, or None."""
    if num_slots(v, cu_seqlens) > LARGEST_GRID:
        return f"more than {LARGEST_GRID} chunks of {CHUNK} tokens in a call"
    if beta is not None:
        return "the delta rule (beta)"
    if log_decay is not None and log_decay.ndim == 4:
        return "a decay per channel"
    if q.dtype == torch.float64:
        return "float64"
    if max(q.shape[-1], v.shape[-1]) > LARGEST_WIDTH:
        return f"a key or value width above {LARGEST_WIDTH}"
    if q.dtype != torch.bfloat16 and v.shape[-1] > LARGEST_WIDTH // 2:  # computed in float32: twice the shared memory
        return f"a value width above {LARGEST_WIDTH // 2} in {q.dtype}"
    if initial_state is not None or return_state:
        return "a state carried in or out"
    if q.numel() == 0 or v.numel() == 0:
        return "an empty batch"
    return None


def log_linear_attention_scalar(q, k, v, level_scales, *, log_decay, scale: float, cu_seqlens) -> Tensor:
    """o [B, T, H, V]; shapes as in `log_linear_attention`. Nothing is read back by the host."""
    return _forward_op(q, k, v, level_scales, log_decay, scale, cu_seqlens)


def _prepare(q, k, v, level_scales, log_decay, cu_seqlens):
    """Rows [B · T, …] of all inputs, slots, and the precision of products of float32."""
    (batch, tokens, heads, _), num_levels = v.shape, 1 if level_scales is None else level_scales.shape[-1]
    if log_decay is None:
        log_decay = torch.zeros(batch, tokens, heads, dtype=torch.float32, device=v.device)
    inputs = [q, k, v, level_scales, log_decay]
    # sums over a sequence overflow 16 bits with a short exponent; the interpreter multiplies bfloat16 wrongly
    if q.dtype == torch.float16 or INTERPRETED:
        inputs[:3] = [x.float() for x in inputs[:3]]
    rows = [None if x is None else _rows(x) for x in inputs]
    if cu_seqlens is None:
        slots = fenwick.uniform_slots(batch, tokens, CHUNK, num_levels, v.device)
    else:
        _assert_bounds(cu_seqlens, tokens)
        slots = fenwick.slots(cu_seqlens, num_slots(v, cu_seqlens), CHUNK, num_levels)
    exact = v.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return rows, slots, "ieee" if exact else "tf32"


def _rows(x: Tensor) -> Tensor:
    """[B, T, …] as [B · T, …], a view where the strides allow it; the last dimension is contiguous."""
    return (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1)


def _assert_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Checked where the bounds are, so that the host need not wait: wrong ones stop the device with this message."""
    right = (cu_seqlens[0] == 0).logical_and(cu_seqlens[-1] == tokens).logical_and((cu_seqlens.diff() >= 0).all())
    torch._assert_async(right, f"cu_seqlens must rise from 0 to the {tokens} tokens of q")


@torch.library.custom_op("loglinear::scalar", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    with torch.cuda.device_of(v):  # kernels are launched on the current device
        rows, slots, precision = _prepare(q, k, v, level_scales, log_decay, cu_seqlens)
        queries, keys, values, scales, decays = rows
        nodes, logs, gamma = make_nodes(keys, values, decays, slots, CHUNK, precision)
        height = fenwick.chunk_height(CHUNK)
        o = read(queries, keys, values, scales, nodes, logs, gamma, slots, CHUNK, height, scale, precision)
    return o.view(v.shape).to(v.dtype)


@_forward_op.register_fake
def _(q, k, v, level_scales, log_decay, scale, cu_seqlens):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("loglinear::scalar_backward", mutates_args=())
def _backward_op(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None,
    scale: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(v):
        rows, slots, precision = _prepare(q, k, v, level_scales, log_decay, cu_seqlens)
        grad_o = _rows(grad_o.to(rows[2].dtype))
        found = gradients(*rows, grad_o, slots, CHUNK, fenwick.chunk_height(CHUNK), scale, precision)
    inputs = (q, k, v, level_scales, log_decay)
    return tuple(
        v.new_empty(0) if x is None or g is None else g.view(x.shape).to(x.dtype)
        for g, x in zip(found, inputs, strict=True)
    )  # fmt: skip


@_backward_op.register_fake
def _(grad_o, q, k, v, level_scales, log_decay, scale, cu_seqlens):
    inputs = (q, k, v, level_scales, log_decay)
    return tuple(
        v.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
    )


def _keep_inputs(ctx, inputs, output):
    *tensors, ctx.scale, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)


def _run_backward(ctx, grad_o):
    *tensors, cu_seqlens = ctx.saved_tensors
    grads = _backward_op(grad_o, *tensors, ctx.scale, cu_seqlens)
    return *(g if x is not None else None for g, x in zip(grads, tensors, strict=True)), None, None


_forward_op.register_autograd(_run_backward, setup_context=_keep_inputs)
