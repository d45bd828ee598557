"""The delta rule with one decay per head, or none (DeltaNet, Gated DeltaNet), on Triton kernels.

Forward: `delta_chunks.py`, `delta_nodes.py`, `delta_read.py`. Backward: `delta_backward.py`, for which all of that is
made again rather than kept.

Legend
    B batch, T tokens, G groups, H heads, K key width, V value width, L levels
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.ops import stacked
from loglinear.ops.packing import check_bounds
from loglinear.ops.triton import delta_chunks, delta_halves, delta_nodes
from loglinear.ops.triton.delta_backward import Remade, gradients
from loglinear.ops.triton.delta_chunks import Chunks
from loglinear.ops.triton.delta_nodes import Nodes, make_nodes
from loglinear.ops.triton.delta_read import descend, read
from loglinear.ops.triton.scalar import CHUNK, INTERPRETED, MOST_PROGRAMS, as_rows, slots_of

WIDEST_KEY = 256
# Half a chunk's rows a program. No GPU has compared that with float64 yet: there, a program has all of them.
HALVES = INTERPRETED
LONG_CHUNK = 16 if INTERPRETED else 128  # of bfloat16: half as many nodes, each of which moves more than its chunk


def unsupported(q: Tensor, v: Tensor, log_decay: Tensor | None, carried: bool) -> str | None:
    """Why these kernels do not cover a call, or None."""
    if log_decay is not None and log_decay.ndim == 4:
        return "a decay per channel"
    if q.dtype == torch.float64:
        return "float64"
    if q.numel() == 0 or v.numel() == 0:
        return "an empty batch"
    if q.shape[-1] > WIDEST_KEY:
        return f"the delta rule with keys wider than {WIDEST_KEY}"  # a program has all rows of a map
    if v.shape[0] * v.shape[1] > MOST_PROGRAMS:
        return f"more than {MOST_PROGRAMS} tokens in a call"
    if carried:
        return "a state of the delta rule carried in or out"
    return None


def log_linear_attention_delta(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, *, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, initial_state, return_state: bool,
) -> tuple[Tensor, None, None]:  # fmt: skip
    """o [B, T, H, V]; shapes as in `log_linear_attention`."""
    assert beta is not None and initial_state is None and not return_state  # see `unsupported`
    return _forward_op(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens), None, None


@torch.library.custom_op("loglinear::delta", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor, scale: float,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v.shape[1])
    with torch.cuda.device_of(v):  # kernels are launched on the current device
        call = _prepare(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens)
        chunks, nodes, _ = _tree(call, backward=False)
        _, _, values, scales, _, _ = call.rows
        o = read(values, scales, chunks, nodes, call.slots, call.places, call.chunk, call.height, call.precision)
    return o.view(v.shape).to(v.dtype)


class _Call(NamedTuple):
    """A call as the kernels take it."""

    rows: list[Tensor]  # q, k, v, level scales, log decays and beta, [B · T, …]
    slots: fenwick.Slots
    places: Tensor
    chunk: int
    height: int
    scale: float
    precision: str


def _prepare(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens) -> _Call:
    batch, tokens, heads, _ = v.shape
    if log_decay is None:
        log_decay = torch.zeros(batch, tokens, heads, dtype=torch.float32, device=v.device)
    inputs = [q, k, v, level_scales, log_decay, beta]
    # states overflow 16 bits with a short exponent; the interpreter multiplies bfloat16 wrongly
    if q.dtype == torch.float16 or INTERPRETED:
        inputs[:3] = [x.float() for x in inputs[:3]]
    rows = [None if x is None else as_rows(x) for x in inputs]
    # products of float32 in single tf32 parts, which the hardware cuts off and does not round, err by 9e-3
    exact = v.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    wide = rows[2].dtype == torch.float32
    precision = "ieee" if exact else "tf32x3" if wide else "tf32"
    chunk = CHUNK if wide else LONG_CHUNK
    num_levels = 1 if level_scales is None else level_scales.shape[-1]
    slots = slots_of(batch, tokens, chunk, num_levels, v.device, cu_seqlens, None, False)
    places = slots.reads.cumsum(0, dtype=torch.int32) - slots.reads
    return _Call(rows, slots, places, chunk, fenwick.chunk_height(chunk), scale, precision)


def _tree(call: _Call, backward: bool) -> tuple[Chunks, Nodes, Tensor | None]:
    """Chunks, nodes and the queries on their way down; and P of right siblings for the backward."""
    queries, keys, values, scales, decays, strengths = call.rows
    slots = call.slots
    num_reads = fenwick.most_reads(len(slots.token), slots.cap)
    halves = HALVES and call.chunk >= 32  # products and the inverse's blocks have 16 rows at least
    make_chunks = delta_halves.make_chunks if halves else delta_chunks.make_chunks
    make_leaves = delta_halves.make_leaves if halves else delta_nodes.make_leaves
    chunks = make_chunks(
        queries, keys, values, scales, decays, strengths, slots, call.places, num_reads, call.chunk, call.height,
        call.scale, call.precision, backward,
    )  # fmt: skip
    rights = None
    if backward:
        rights = values.new_empty(len(slots.token), values.shape[1], keys.shape[-1], keys.shape[-1])
    nodes = make_nodes(keys, values, strengths, chunks, slots, call.chunk, call.precision, rights, make_leaves)
    descend(chunks, nodes, slots, call.places, call.chunk, call.precision)
    return chunks, nodes, rights


@_forward_op.register_fake
def _(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("loglinear::delta_backward", mutates_args=())
def _backward_op(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None,
    beta: Tensor, scale: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(v):
        call = _prepare(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens)
        queries, keys, values, scales, _, strengths = call.rows
        found = gradients(
            queries, keys, values, scales, strengths, as_rows(grad_o.to(values.dtype)),
            Remade(*_tree(call, backward=True)), call.slots, call.places, call.chunk, call.height, scale,
            call.precision,
        )  # fmt: skip
    inputs = (q, k, v, level_scales, log_decay, beta)
    return tuple(
        v.new_empty(0) if x is None or g is None else g.view(x.shape).to(x.dtype)
        for g, x in zip(found, inputs, strict=True)
    )


@_backward_op.register_fake
def _(grad_o, q, k, v, level_scales, log_decay, beta, scale, cu_seqlens):
    inputs = (q, k, v, level_scales, log_decay, beta)
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
stacked.register(_forward_op)
