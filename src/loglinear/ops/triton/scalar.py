"""The operator for one decay per head, or none (linear attention, RetNet, Mamba-2), on Triton kernels.

Forward: `nodes.py`, then `read.py`. Backward: `backward.py`, which makes the nodes again rather than keep them. States
that are carried in and out: `carried.py` for their near buckets, the kernels for the others.

Legend
    B batch, T tokens, G groups, H heads, K key width, V value width, L levels, S sequences (B, or the packed ones)
    F far buckets of a state, those of whole chunks and the last one
"""

from __future__ import annotations

import functools
import os
import weakref
from itertools import pairwise

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.fenwick import Slots
from loglinear.ops import autocast, stacked
from loglinear.ops.packing import check_bounds, check_positions, plans, told_bounds
from loglinear.ops.triton import carried
from loglinear.ops.triton.backward import gradients
from loglinear.ops.triton.launch import compiled_first
from loglinear.ops.triton.nodes import Carried, decay_offsets, leaving, make_nodes, subtree_height
from loglinear.ops.triton.read import read

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 16 if INTERPRETED else 64  # the interpreter pays by the product, and small chunks make more of a tree
WIDEST_KEY = 128  # wider states are taken apart: every tile of a state is a state of its own
WIDEST_VALUE = {torch.bfloat16: 128, torch.float16: 64, torch.float32: 64}  # float16 is computed in float32
MOST_PROGRAMS = 2**31 - 1  # of a launch
MOST_LEVELS = 32  # of carried states: blocks of 2^26 chunks still count in 32 bits
FEW_NUMBERS = 2**20  # of states that run from chunk to chunk: so few leave most of a GPU idle
MANY_CHUNKS = 64  # for a state to run over one after the other
GROUP_HEIGHT = 3  # 2^3 chunks are nodes then, and states run from node to node


def unsupported(
    q: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, num_sequences: int, carried: bool
) -> str | None:
    """Why these kernels do not cover a call, or None."""
    if log_decay is not None and log_decay.ndim == 4:
        return "a decay per channel"
    if q.dtype == torch.float64:
        return "float64"
    if q.numel() == 0 or v.numel() == 0:
        return "an empty batch"
    if carried and level_scales is not None and level_scales.shape[-1] > MOST_LEVELS:
        return f"a state of more than {MOST_LEVELS} levels carried in or out"
    tiles = -(-WIDEST_KEY * WIDEST_VALUE[q.dtype] // 1024)
    chunks = v.shape[0] * v.shape[1] // CHUNK + 64 * num_sequences  # with the slots of far buckets
    if v.shape[0] * v.shape[1] > MOST_PROGRAMS:
        return f"more than {MOST_PROGRAMS} tokens in a call"
    if chunks * v.shape[2] * tiles > MOST_PROGRAMS:
        return f"more than {MOST_PROGRAMS} programs in a launch"
    return None


def log_linear_attention_scalar(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, *, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, initial_state, return_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """o [B, T, H, V], buckets and positions; shapes as in `log_linear_attention`.

    Nothing is read back by the host but bounds and positions that it has not seen before (`packing.check_bounds`).
    """
    assert beta is None  # see `unsupported`
    buckets, positions = (None, None) if initial_state is None else initial_state[:2]  # settled at the door
    if cu_seqlens is None:
        bounds = torch.arange(v.shape[0] + 1, device=v.device) * v.shape[1]
    else:
        bounds = cu_seqlens
    num_levels = 1 if level_scales is None else level_scales.shape[-1]
    edges = fenwick.edges(bounds, positions, CHUNK, num_levels) if buckets is not None or return_state else None

    # columns of q and k are summed over, those of v are independent of each other
    o, final = [], []
    widest = WIDEST_VALUE[v.dtype]
    for columns, values in enumerate(v.split(widest, -1)):
        partial, states = None, []
        for rows, (queries, keys) in enumerate(zip(q.split(WIDEST_KEY, -1), k.split(WIDEST_KEY, -1), strict=True)):
            state = None
            if buckets is not None:
                state = buckets.split(WIDEST_KEY, -2)[rows].split(widest, -1)[columns].float()
            found, left = _one_tile(
                queries, keys, values, level_scales, log_decay, scale, cu_seqlens, positions, state, edges, return_state
            )
            partial = found if partial is None else partial + found
            states.append(left)
        o.append(partial)
        final.append(torch.cat(states, -2) if return_state and len(states) > 1 else states[0])
    o = torch.cat(o, -1) if len(o) > 1 else o[0]
    if not return_state:
        return o, None, None
    return o, torch.cat(final, -1) if len(final) > 1 else final[0], edges.end


def _one_tile(q, k, v, level_scales, log_decay, scale, cu_seqlens, positions, buckets, edges, return_state):
    near = far = entering = None
    if buckets is not None:
        num_far = fenwick.num_far_buckets(buckets.shape[1], CHUNK)
        far = buckets[:, -num_far:]
        near = carried.near_buckets(buckets, edges)
        entering = near.sum(1)
    o, left = _forward_op(q, k, v, level_scales, log_decay, scale, cu_seqlens, positions, far, entering, return_state)
    if near is not None and near.shape[1] > 0:
        o = carried.add_near_reads(o, q, level_scales, log_decay, near, edges, scale)
    if not return_state:
        return o, None
    num_levels = 1 if level_scales is None else level_scales.shape[-1]
    return o, carried.final_buckets(k, v, log_decay, near, left, edges, num_levels)


# ----------------------------------------------------------------------------------------------------
# Two operators, for autograd and the compiler
# ----------------------------------------------------------------------------------------------------


def _prepare(q, k, v, level_scales, log_decay, cu_seqlens, positions, return_state, backward=False):
    """Rows [B · T, …] of all inputs, slots, and the precision of products of float32."""
    batch, tokens, heads, _ = v.shape
    if log_decay is None:
        log_decay = torch.zeros(batch, tokens, heads, dtype=torch.float32, device=v.device)
    inputs = [q, k, v, level_scales, log_decay]
    # sums over a sequence overflow 16 bits with a short exponent; the interpreter multiplies bfloat16 wrongly
    if q.dtype == torch.float16 or INTERPRETED:
        inputs[:3] = [x.float() for x in inputs[:3]]
    rows = [None if x is None else as_rows(x) for x in inputs]
    num_levels = 1 if level_scales is None else level_scales.shape[-1]
    if positions is None and not return_state:
        num_levels = levels_of_tree(num_levels, CHUNK, q, v, cu_seqlens)
    slots = slots_of(batch, tokens, CHUNK, num_levels, v.device, cu_seqlens, positions, return_state, backward)
    return rows, slots, precision_of(v)


def precision_of(v: Tensor) -> str:
    """How products of float32 are multiplied in a call with values v.

    float32 as torch is told to (`torch.backends.cuda.matmul.fp32_precision`), and where it is told nothing as three
    products of tf32 parts, off by 2^-21. As plain float32 ("ieee") tiles of 64 do not fit into registers, and a kernel
    takes up to 30 times as long.
    """
    if v.dtype != torch.float32:
        return "tf32"
    told = torch.backends.cuda.matmul.fp32_precision
    return told if told in ("ieee", "tf32") else "tf32x3"


_known: weakref.WeakValueDictionary[tuple, Slots] = weakref.WeakValueDictionary()
_held: dict[tuple, Slots] = {}


def slots_of(
    batch, tokens, chunk, num_levels, device, cu_seqlens, positions, return_state, backward: bool = False
) -> Slots:
    """`backward`: of a call whose forward was given the same."""
    has_ends = positions is not None or return_state
    if cu_seqlens is None and positions is None:
        sizes = (batch, tokens, chunk, num_levels, device, has_ends)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            slots = _known[sizes] = fenwick.uniform_slots(*sizes)
            return slots
        # What is made while a graph is captured belongs to that graph, and every replay makes it again: hundreds of
        # small kernels. What is there from a call before that is held for good: the graph has its address.
        slots = _known.get(sizes)
        if slots is None:
            return fenwick.uniform_slots.__wrapped__(*sizes)
        _held[sizes] = slots
        return slots
    bounds = torch.arange(batch + 1, device=device) * tokens if cu_seqlens is None else cu_seqlens
    count = count_slots(batch, tokens, chunk, num_levels, cu_seqlens, positions, return_state)

    def make() -> Slots:
        longest, told = None, None if cu_seqlens is None else told_bounds(cu_seqlens)
        if told is not None and positions is None:
            longest = fenwick.chunks_of(max(end - start for start, end in pairwise(told)), chunk, has_ends)
        return fenwick.slots(bounds, count, chunk, num_levels, positions, has_ends, longest)

    if positions is not None:
        return make()
    return plans.get(bounds, ("slots", batch * tokens, chunk, num_levels, has_ends), make, backward)


def levels_of_tree(num_levels: int, chunk: int, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Levels that nodes are made for, at least as many as λ has: beyond those, nodes are read with its last level.

    With few levels states run from chunk to chunk. Where there are few of them, and many chunks, small nodes come
    first, which are made side by side: a chunk then reads up to four instead of one. Not for calls with a state in or
    out, whose far buckets are those of λ's levels.
    """
    (batch, tokens, heads, value_dim), key_dim = v.shape, q.shape[-1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    few = sequences * heads * key_dim * value_dim <= FEW_NUMBERS
    if not few or batch * tokens <= MANY_CHUNKS * chunk * sequences:
        return num_levels
    return max(num_levels, 2 + fenwick.chunk_height(chunk) + GROUP_HEIGHT)


def count_slots(batch, tokens, chunk, num_levels, cu_seqlens, positions, return_state) -> int:
    """How many `slots_of` has."""
    if cu_seqlens is None and positions is None:
        return batch * (tokens // chunk + 1 if return_state else (tokens + chunk - 1) // chunk)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return fenwick.num_slots(batch * tokens, sequences, chunk, num_levels, positions is not None)


def as_rows(x: Tensor) -> Tensor:
    """[B, T, …] as [B · T, …], a view where the strides allow it; the last dimension is contiguous."""
    return (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1)


@torch.library.custom_op("loglinear::scalar", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, scale: float,
    cu_seqlens: Tensor | None, positions: Tensor | None, far: Tensor | None, near: Tensor | None, return_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, and the far buckets of the final state [S, F, H, K, V] (none of them unless `return_state`)."""
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v.shape[1])
    if positions is not None:
        check_positions(positions)
    with torch.cuda.device_of(v):  # kernels are launched on the current device
        rows, slots, precision = _prepare(q, k, v, level_scales, log_decay, cu_seqlens, positions, return_state)
        state = None if far is None or near is None else Carried(far, near)
        run = functools.partial(_forward, *rows, state, slots, scale, precision, return_state)
        kind = *rows, precision, state is None, slots.first is None, return_state, subtree_height(slots, state)
        o, left = compiled_first(run, "scalar", *kind)
    return o.view(v.shape).to(v.dtype), v.new_empty(0, dtype=torch.float32) if left is None else left


def _forward(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor, state: Carried | None,
    slots: Slots, scale: float, precision: str, return_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    nodes, logs, gamma = make_nodes(k, v, log_decay, slots, CHUNK, precision, state)
    height = fenwick.chunk_height(CHUNK)
    o = read(q, k, v, level_scales, nodes, logs, gamma, slots, CHUNK, height, scale, precision)
    return o, leaving(nodes, decay_offsets(gamma, slots), slots).far if return_state else None


@_forward_op.register_fake
def _(q, k, v, level_scales, log_decay, scale, cu_seqlens, positions, far, near, return_state):
    left = v.new_empty(0, dtype=torch.float32)
    if return_state:
        sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        num_far = fenwick.num_far_buckets(1 if level_scales is None else level_scales.shape[-1], CHUNK)
        left = v.new_empty(sequences, num_far, v.shape[2], q.shape[-1], v.shape[-1], dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), left


@torch.library.custom_op("loglinear::scalar_backward", mutates_args=())
def _backward_op(
    grad_o: Tensor, grad_left: Tensor, q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None,
    log_decay: Tensor | None, cu_seqlens: Tensor | None, positions: Tensor | None, far: Tensor | None,
    near: Tensor | None, scale: float, return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(v):
        rows, slots, precision = _prepare(
            q, k, v, level_scales, log_decay, cu_seqlens, positions, return_state, backward=True
        )
        state = None if far is None or near is None else Carried(far, near)
        grad_o = as_rows(grad_o.to(rows[2].dtype))
        run = functools.partial(
            gradients, *rows, state, grad_o, grad_left if return_state else None, slots, CHUNK,
            fenwick.chunk_height(CHUNK), scale, precision,
        )  # fmt: skip
        kind = *rows, precision, state is None, slots.first is None, return_state, subtree_height(slots, state)
        found = compiled_first(run, "scalar backward", *kind)
    inputs = (q, k, v, level_scales, log_decay, far, near)
    return tuple(
        v.new_empty(0) if x is None or g is None else g.view(x.shape).to(x.dtype)
        for g, x in zip(found, inputs, strict=True)
    )  # fmt: skip


@_backward_op.register_fake
def _(grad_o, grad_left, q, k, v, level_scales, log_decay, cu_seqlens, positions, far, near, scale, return_state):
    inputs = (q, k, v, level_scales, log_decay, far, near)
    return tuple(
        v.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
    )


def _keep_inputs(ctx, inputs, output):
    q, k, v, level_scales, log_decay, ctx.scale, cu_seqlens, positions, far, near, ctx.return_state = inputs
    ctx.save_for_backward(q, k, v, level_scales, log_decay, cu_seqlens, positions, far, near)


@autocast.outside
def _run_backward(ctx, grad_o, grad_left):
    q, k, v, level_scales, log_decay, cu_seqlens, positions, far, near = ctx.saved_tensors
    inputs = (q, k, v, level_scales, log_decay, far, near)
    found = _backward_op(
        grad_o, grad_left, q, k, v, level_scales, log_decay, cu_seqlens, positions, far, near, ctx.scale,
        ctx.return_state,
    )  # fmt: skip
    *grads, grad_far, grad_near = (g if x is not None else None for g, x in zip(found, inputs, strict=True))
    return *grads, None, None, None, grad_far, grad_near, None


_forward_op.register_autograd(_run_backward, setup_context=_keep_inputs)
stacked.register(_forward_op)
