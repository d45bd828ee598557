"""The delta rule with one decay per head, or none (DeltaNet, Gated DeltaNet), on Triton kernels.

Forward: `delta_inverse.py` and `delta_halves.py` (chunks: see `delta_chunks.py`), `delta_nodes.py`, `delta_read.py`.
Backward: `delta_backward.py`, and `delta_backward_halves.py` for the chunks. Where gradients are wanted, the inverses
of chunks, their scores before λ and the nodes are kept for it, and all else is made again: with 16 bits 384 bytes a
token and head of inverses, 192 of scores, and (K V + 2 K²) / 64 of nodes, with K = V = 128 as much as q, k and v have.
On Hopper `delta_hopper_*.py` take the place of most kernels, where they take the call: see `delta_hopper.py`.
States that are carried in and out: `delta_carried.py` for the chunks at both ends, the kernels for what is whole.

Legend
    B batch, T tokens, G groups, H heads, K key width, V value width, L levels, S sequences (B, or the packed ones)
    F far buckets of a state, those of whole chunks and the last one
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.ops import autocast, stacked
from loglinear.ops.packing import check_bounds, check_positions
from loglinear.ops.triton import delta_carried
from loglinear.ops.triton.carried import near_buckets
from loglinear.ops.triton.common import sums_dtype
from loglinear.ops.triton.delta_backward import Remade, gradients
from loglinear.ops.triton.delta_chunks import Chunks, inverse_shape, parts_of, walks
from loglinear.ops.triton.delta_halves import make_chunks
from loglinear.ops.triton.delta_nodes import Carried, Kept, Leaving, Nodes, has_running, leaving, make_nodes
from loglinear.ops.triton.delta_read import descend, read, walk
from loglinear.ops.triton.launch import compiled_first
from loglinear.ops.triton.scalar import (
    INTERPRETED,
    MOST_LEVELS,
    MOST_PROGRAMS,
    as_rows,
    count_slots,
    levels_of_tree,
    precision_of,
    slots_of,
)

WIDEST_KEY = 256
CHUNK = 32 if INTERPRETED else 64  # a program has half of the rows, and a product 16 at least
LONG_CHUNK = 32 if INTERPRETED else 128  # of bfloat16: half as many nodes, each of which moves more than its chunk


def unsupported(
    q: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, carried: bool
) -> str | None:
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
    if carried and level_scales is not None and level_scales.shape[-1] > MOST_LEVELS:
        return f"a state of more than {MOST_LEVELS} levels carried in or out"
    return None


def log_linear_attention_delta(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, *, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, initial_state, return_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """o [B, T, H, V], buckets and positions; shapes as in `log_linear_attention`.

    Nothing is read back by the host but bounds and positions that it has not seen before (`packing.check_bounds`).
    """
    assert beta is not None  # see `unsupported`
    if initial_state is None and not return_state:
        o, *_ = _forward_op(
            q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, None, None, None, return_state,
            _wants_gradients(q, k, v, level_scales, log_decay, beta),
        )  # fmt: skip
        return o, None, None
    buckets, positions = (None, None) if initial_state is None else initial_state[:2]  # settled at the door
    bounds = torch.arange(v.shape[0] + 1, device=v.device) * v.shape[1] if cu_seqlens is None else cu_seqlens
    chunk, num_levels = _chunk_of(v), 1 if level_scales is None else level_scales.shape[-1]
    edges = fenwick.edges(bounds, positions, chunk, num_levels)
    near = first = far = written = None
    if buckets is not None:
        buckets = buckets.float()
        far = buckets[:, -fenwick.num_far_buckets(num_levels, chunk) :]
        if edges.has_bucket.shape[1] > 0:
            near = near_buckets(buckets, edges)
            first = delta_carried.chunk_factors(q, k, log_decay, beta, edges.first_rows, edges.first_exist, scale)
            written = delta_carried.written_by_near(near, first)
    o, added, maps, *_ = _forward_op(
        q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, positions, far, written, return_state,
        _wants_gradients(q, k, v, level_scales, log_decay, beta, far, written),
    )  # fmt: skip
    if near is not None and first is not None and level_scales is not None:
        o = delta_carried.add_near_reads(o, level_scales, near, first, edges)
    if not return_state:
        return o, None, None
    last = delta_carried.chunk_factors(q, k, log_decay, beta, edges.last_rows, edges.last_exist, scale)
    return o, delta_carried.final_buckets(v, last, near, added, maps, edges, num_levels), edges.end


def _wants_gradients(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _chunk_of(v: Tensor) -> int:
    """Rows of a chunk, for the inputs of a call."""
    return LONG_CHUNK if v.dtype == torch.bfloat16 else CHUNK


# ----------------------------------------------------------------------------------------------------
# Two operators, for autograd and the compiler
# ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("loglinear::delta", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor, scale: float,
    cu_seqlens: Tensor | None, positions: Tensor | None, far: Tensor | None, near: Tensor | None, return_state: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o; `Leaving`: the nodes that far buckets of the final state are (none of them unless `return_state`); and for the
    backward inverse and gamma of the chunks, and what it `keeps`: `mixed` of the chunks, and `Kept` of the nodes
    (nothing else)."""
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v.shape[1])
    if positions is not None:
        check_positions(positions)
    with torch.cuda.device_of(v):  # kernels are launched on the current device
        call = _prepare(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, positions, far, near, return_state)
        run = functools.partial(_forward, call, return_state, keeps)
        o, left, chunks, kept = compiled_first(run, "delta", *call.kind, return_state, keeps)
    mixed = v.new_empty(0, dtype=chunks.inverse.dtype) if chunks.mixed is None else chunks.mixed
    return o.view(v.shape).to(v.dtype), *left, chunks.inverse, chunks.gamma, mixed, *kept


def _forward(call: _Call, return_state: bool, keeps: bool) -> tuple[Tensor, Leaving, Chunks, Kept]:
    queries, keys, values, scales, _, strengths = call.rows
    walking = _walks(call)
    chunks = _chunks(call, descends=not walking, keeps=keeps)
    nodes, kept = _nodes(call, chunks, keeps)
    if walking:
        o = walk(
            queries, keys, values, scales, strengths, chunks, nodes, call.slots, call.chunk, call.height, call.scale,
            call.precision,
        )  # fmt: skip
    else:
        descend(chunks, nodes, call.slots, call.variants, call.places, call.chunk, call.precision)
        o = read(
            values, scales, chunks, nodes, call.slots, call.variants, call.places, call.chunk, call.height,
            call.precision,
        )  # fmt: skip
    left = Leaving(*(values.new_empty(0, dtype=torch.float32) for _ in range(2)))
    if return_state:
        left = leaving(nodes, call.state, call.slots)
    if kept is None:
        kept = Kept(*(values.new_empty(0) for _ in Kept._fields))
    return o, left, chunks, kept


class _Call(NamedTuple):
    """A call as the kernels take it."""

    rows: list[Tensor]  # q, k, v, level scales, log decays and beta, [B · T, …]
    state: Carried | None
    slots: fenwick.Slots
    variants: Tensor
    places: Tensor
    chunk: int
    height: int
    scale: float
    precision: str

    @property
    def kind(self) -> tuple:
        """What decides which kernels a call has, nearly: see `compiled_first`."""
        tree = self.slots.longest > 1, self.slots.cap > 0, has_running(self.slots)
        return *self.rows, self.precision, self.state is None, self.slots.first is None, *tree


def _prepare(
    q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, positions, far, near, return_state, backward=False
) -> _Call:  # fmt: skip
    batch, tokens, heads, _ = v.shape
    if log_decay is None:
        log_decay = torch.zeros(batch, tokens, heads, dtype=torch.float32, device=v.device)
    inputs = [q, k, v, level_scales, log_decay, beta]
    # states overflow 16 bits with a short exponent; the interpreter multiplies bfloat16 wrongly
    if q.dtype == torch.float16 or INTERPRETED:
        inputs[:3] = [x.float() for x in inputs[:3]]
    if inputs[1].dtype == torch.float32:  # a product of float64 is not compiled where 16 bits went into it
        inputs[5] = beta.float()
    rows = [None if x is None else as_rows(x) for x in inputs]
    precision = precision_of(v)
    if precision == "tf32" and rows[2].dtype == torch.float32:
        precision = "tf32x3"  # single tf32 parts, which the hardware cuts off and does not round, err by 9e-3
    chunk, num_levels = _chunk_of(v), 1 if level_scales is None else level_scales.shape[-1]
    if positions is None and not return_state:
        num_levels = levels_of_tree(num_levels, chunk, q, v, cu_seqlens)
    slots = slots_of(batch, tokens, chunk, num_levels, v.device, cu_seqlens, positions, return_state, backward)
    variants = fenwick.variants(slots)
    places = variants.cumsum(0, dtype=torch.int32) - variants if slots.places is None else slots.places
    state = None if far is None else Carried(far, near)
    return _Call(rows, state, slots, variants, places, chunk, fenwick.chunk_height(chunk), scale, precision)


def _walks(call: _Call) -> bool:
    _, keys, values, *_ = call.rows
    return walks(keys, values.shape[-1])


def _chunks(
    call: _Call, descends: bool, keeps: bool = False, kept: tuple[Tensor, Tensor, Tensor] | None = None
) -> Chunks:
    """With room for the queries on their way down if the call `descends`; the backward has `kept` inverse, gamma and
    mixed, if the forward `keeps` that."""
    queries, keys, _, scales, decays, strengths = call.rows
    slots, places, room = call.slots, call.places, 0
    if not descends:
        places = None  # `walk` makes scores and queries
    elif slots.origin is None:
        room = fenwick.most_reads(len(slots.token), slots.cap)
    else:
        room = fenwick.most_variants(len(slots.token) - slots.ends.bucket.numel(), slots.cap, len(slots.base))
    return make_chunks(
        queries, keys, scales, decays, strengths, slots, places, room, call.chunk, call.height, call.scale,
        call.precision, keeps, kept,
    )  # fmt: skip


def _nodes(call: _Call, chunks: Chunks, keeps: bool) -> tuple[Nodes, Kept | None]:
    _, keys, values, _, _, strengths = call.rows
    return make_nodes(keys, values, strengths, chunks, call.slots, call.chunk, call.precision, call.state, keeps)


@_forward_op.register_fake
def _(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, positions, far, near, return_state, keeps):
    (batch, tokens, heads, value_dim), key_dim, chunk = v.shape, q.shape[-1], _chunk_of(v)
    num_levels = 1 if level_scales is None else level_scales.shape[-1]
    count = count_slots(batch, tokens, chunk, num_levels, cu_seqlens, positions, return_state)
    dtype = torch.float32 if parts_of(v) == 1 else v.dtype
    inverse = v.new_empty(inverse_shape(v, count, heads, chunk), dtype=dtype)
    gamma = v.new_empty(heads, count, chunk, dtype=sums_dtype(v))
    left = [v.new_empty(0, dtype=torch.float32) for _ in range(2)]
    if return_state:
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        num_far = fenwick.num_far_buckets(num_levels, chunk)
        left[0] = left[0].new_empty(sequences, num_far, heads, key_dim, value_dim)
        left[1] = left[1].new_empty(sequences, num_far - 1, heads, key_dim, key_dim)
    kept = [v.new_empty(0, dtype=dtype) for _ in range(4)]
    if keeps:
        kept = [v.new_empty(count, heads, key_dim, width, dtype=dtype) for width in (value_dim, key_dim, key_dim)]
        kept = [v.new_empty(inverse.shape[1:], dtype=dtype), *kept]
    return torch.empty_like(v, memory_format=torch.contiguous_format), *left, inverse, gamma, *kept


@torch.library.custom_op("loglinear::delta_backward", mutates_args=())
def _backward_op(
    grad_o: Tensor, grad_added: Tensor, grad_maps: Tensor, q: Tensor, k: Tensor, v: Tensor,
    level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor, cu_seqlens: Tensor | None,
    positions: Tensor | None, far: Tensor | None, near: Tensor | None, inverse: Tensor, gamma: Tensor, mixed: Tensor,
    added: Tensor, maps: Tensor, rights: Tensor, scale: float, return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(v):
        call = _prepare(
            q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, positions, far, near, return_state, backward=True
        )  # fmt: skip
        left = Leaving(grad_added, grad_maps) if return_state else None
        kept = None if maps.numel() == 0 else Kept(added, maps, rights)  # they were not asked for, or they were
        of_chunks = inverse, gamma, mixed
        run = functools.partial(_backward, call, as_rows(grad_o.to(call.rows[2].dtype)), left, of_chunks, kept)
        found = compiled_first(run, "delta backward", *call.kind, return_state, kept is None)
    inputs = (q, k, v, level_scales, log_decay, beta, far, near)
    return tuple(
        v.new_empty(0) if x is None or g is None else g.view(x.shape).to(x.dtype)
        for g, x in zip(found, inputs, strict=True)
    )


def _backward(
    call: _Call, grad_o: Tensor, left: Leaving | None, of_chunks: tuple[Tensor, Tensor, Tensor], kept: Kept | None
) -> tuple[Tensor | None, ...]:
    queries, keys, values, scales, _, strengths = call.rows
    chunks = _chunks(call, descends=True, kept=of_chunks)
    if kept is None:
        _, kept = _nodes(call, chunks, keeps=True)
        assert kept is not None
    descend(chunks, kept, call.slots, call.variants, call.places, call.chunk, call.precision)
    remade = Remade(chunks, kept)
    del chunks, kept
    return gradients(
        queries, keys, values, scales, strengths, grad_o, left, remade, call.slots, call.variants, call.places,
        call.chunk, call.height, call.scale, call.precision,
    )  # fmt: skip


@_backward_op.register_fake
def _(
    grad_o, grad_added, grad_maps, q, k, v, level_scales, log_decay, beta, cu_seqlens, positions, far, near, inverse,
    gamma, mixed, added, maps, rights, scale, return_state,
):  # fmt: skip
    inputs = (q, k, v, level_scales, log_decay, beta, far, near)
    return tuple(
        v.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
    )


def _keep_inputs(ctx, inputs, output):
    *tensors, ctx.scale, cu_seqlens, positions, far, near, ctx.return_state, _ = inputs
    o, added, maps, *kept = output
    ctx.save_for_backward(*tensors, cu_seqlens, positions, far, near, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # of what is kept, whose gradients nobody wants
    ctx.shapes = [x.shape for x in (o, added, maps)]


@autocast.outside
def _run_backward(ctx, grad_o, grad_added, grad_maps, *_):
    saved = ctx.saved_tensors
    (*tensors, _, _, far, near), inverse = saved[:10], saved[10]
    given = [
        inverse.new_zeros(shape) if grad is None else grad
        for grad, shape in zip((grad_o, grad_added, grad_maps), ctx.shapes, strict=True)
    ]
    found = _backward_op(*given, *saved, ctx.scale, ctx.return_state)
    *grads, grad_far, grad_near = (
        g if x is not None else None for g, x in zip(found, (*tensors, far, near), strict=True)
    )
    return *grads, None, None, None, grad_far, grad_near, None, None


_forward_op.register_autograd(_run_backward, setup_context=_keep_inputs)
stacked.register(_forward_op)
