"""The tree algorithm in plain torch: O(T log T) time, on any device, differentiable in every tensor argument.

The sequence is cut into chunks; chunks are the leaves of a binary tree of affine maps (P, U); *the right half of every
block reads the state of its left half*. `fenwick.plan` says which nodes merge and which chunks read them, `families`
what a chunk is; this file multiplies. One batched product per height; no loop over chunks, tokens, heads or sequences.

Legend
    B batch, T tokens, G groups, H heads, K key width, V value width, L levels, S sequences, C tokens in a chunk
    N chunks of all sequences together
    A, R: heads multiplied separately, and heads that share a product (see `families`); A · R = H
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from loglinear import fenwick
from loglinear.fenwick import Index, Merge, Part, Plan, Reads
from loglinear.ops import autocast, stacked
from loglinear.ops.families import ChannelDecay, Factors, Matrix, Transition, factors, pick
from loglinear.ops.packing import sequence_bounds, start_positions


def log_linear_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, *, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, initial_state, return_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The torch backend. Shapes as in `log_linear_attention`; returns o, buckets and positions (None unless asked for).

    Lengths and positions are read on the host (they decide the shapes of everything), which waits for the device when
    `cu_seqlens` or the state's positions live there. Under `torch.compile` and `vmap` the call is one opaque operator.
    """
    buckets, positions = (None, None) if initial_state is None else initial_state[:2]  # settled at the door
    # where shapes are all there is: no plan is needed, and none may be cached that is made of such tensors
    opaque = torch.compiler.is_compiling() or isinstance(v, FakeTensor) or v.is_meta
    opaque = opaque or stacked.is_mapped(q, k, v, level_scales, log_decay, beta)
    run = tree_attention_opaque if opaque else tree_attention
    return run(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, buckets, positions, return_state)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, buckets: Tensor | None, positions: Tensor | None, return_state: bool,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The algorithm from end to end; `chunk` overrides the chunk length (a power of two)."""
    (batch, tokens, heads, value_dim), dtype = v.shape, v.dtype
    work = torch.promote_types(dtype, torch.float32)
    if cu_seqlens is None:
        lengths = (tokens,) * batch
    else:
        bounds = sequence_bounds(cu_seqlens, tokens)
        lengths = tuple(hi - lo for lo, hi in zip(bounds, bounds[1:], strict=False))
    num_levels = 1 if level_scales is None else level_scales.shape[-1]
    chunk = chunk or fenwick.chunk_for(lengths)
    starts = None if positions is None else start_positions(positions)
    plan = fenwick.plan(lengths, starts, chunk, num_levels, v.device)

    # heads that share q and k are multiplied together where their decays are mere row weights
    groups = q.shape[2]
    per_head = beta is not None or (log_decay is not None and log_decay.ndim == 4)
    shared = 1 if per_head else heads // groups
    q, k = to_chunks(q, plan).to(work) * scale, to_chunks(k, plan).to(work)
    if per_head and groups != heads:
        q, k = (x.repeat_interleave(heads // groups, dim=0) for x in (q, k))
    v = to_chunks(v.unflatten(2, (-1, shared)), plan).to(work)
    if level_scales is not None:
        level_scales = to_chunks(level_scales.to(work).unflatten(2, (-1, shared)), plan)
    if beta is not None:
        beta = to_chunks(beta.to(work).unflatten(2, (-1, shared)), plan)
    if log_decay is not None:
        # a reset (-inf, or a huge number) is a zero long before -1000, and would drown what is summed after it
        many_and_coarse = log_decay.ndim == 4 and dtype.itemsize == 2
        log_decay = log_decay.to(torch.float32 if many_and_coarse else torch.float64).clamp(min=-1e3)
        log_decay = to_chunks(log_decay.unflatten(2, (-1, shared)), plan)
    if buckets is not None and positions is not None:  # [S, L, H, K, V] to [A, S, L, K, R·V]
        buckets = buckets.to(work).unflatten(2, (-1, shared)).permute(2, 0, 1, 4, 3, 5).flatten(-2)
        used = fenwick.occupied(positions, num_levels)
        buckets = torch.where(used[None, :, :, None, None], buckets, 0)

    chunks = factors(q, k, shared, log_decay, beta)
    o = inside_chunks(chunks, v, level_scales)
    o, final = across_chunks(o, chunks, v, level_scales, buckets, plan, return_state)
    o = from_chunks(o, plan, batch, tokens).flatten(2, 3).to(dtype)
    if final is None:
        return o, None, None
    final = final.unflatten(-1, (shared, value_dim)).permute(1, 2, 0, 4, 3, 5).flatten(2, 3)
    start = torch.zeros(len(lengths), dtype=torch.int64, device=v.device) if positions is None else positions
    return o, final.contiguous(), start + torch.tensor(lengths, device=v.device)


# ----------------------------------------------------------------------------------------------------
# Rows and chunks
# ----------------------------------------------------------------------------------------------------


def to_chunks(x: Tensor, plan: Plan) -> Tensor:
    """[B, T, A, …] to [A, N, C, …]; rows that do not exist are zero."""
    if plan.rows is None:
        # packed sequences of equal length are the rows of a batch, too
        x = x.reshape(plan.num_sequences, -1, *x.shape[2:])
        missing = plan.num_chunks // plan.num_sequences * plan.chunk - x.shape[1]
        if missing:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        rows = x.flatten(0, 1)
    else:
        rows = x.flatten(0, 1).index_select(0, plan.rows.of_slot)
        rows = rows.masked_fill(~plan.rows.valid.view(-1, *(1,) * (rows.ndim - 1)), 0)
    return rows.unflatten(0, (-1, plan.chunk)).movedim(2, 0).contiguous()


def from_chunks(x: Tensor, plan: Plan, batch: int, tokens: int) -> Tensor:
    """[A, N, C, …] to [B, T, A, …]."""
    rows = x.movedim(0, 2).flatten(0, 1)
    if plan.rows is None:
        rows = rows.unflatten(0, (plan.num_sequences, -1))[:, : batch * tokens // plan.num_sequences]
        return rows.reshape(batch, tokens, *rows.shape[2:])
    return rows.index_select(0, plan.rows.slot).unflatten(0, (batch, tokens))


# ----------------------------------------------------------------------------------------------------
# Inside a chunk
# ----------------------------------------------------------------------------------------------------


def inside_chunks(chunks: Factors, v: Tensor, level_scales: Tensor | None) -> Tensor:
    """What the rows of a chunk read of each other: [A, N, C, R, V]."""
    scores = chunks.scores
    if level_scales is not None:
        chunk, num_levels = scores.shape[-1], level_scales.shape[-1]
        table = fenwick.chunk_levels(chunk, num_levels, scores.device)
        scores = _ScaleByLevel.apply(scores, level_scales.transpose(2, 3), table)
    return (scores @ v.transpose(2, 3)).transpose(2, 3).contiguous()


class _ScaleByLevel(torch.autograd.Function):
    """scores [A, N, R, C, C] times level_scales [A, N, R, C, L] looked up in table [C, C].

    Its own rule because the gradient of a gather is a scatter, whose order of additions is not fixed on a GPU.
    """

    @staticmethod
    def forward(ctx, scores, level_scales, table):
        ctx.save_for_backward(scores, level_scales, table)
        return scores * level_scales.gather(-1, table.expand(scores.shape))

    @staticmethod
    @once_differentiable
    @autocast.outside
    def backward(ctx, grad):
        scores, level_scales, table = ctx.saved_tensors
        by_level = F.one_hot(table, level_scales.shape[-1]).to(grad.dtype)  # what is not causal has a score of zero
        grad_scales = torch.einsum("anrts,tsl->anrtl", grad * scores, by_level)
        return grad * level_scales.gather(-1, table.expand(scores.shape)), grad_scales, None


# ----------------------------------------------------------------------------------------------------
# The tree
# ----------------------------------------------------------------------------------------------------


def across_chunks(
    o: Tensor, chunks: Factors, v: Tensor, level_scales: Tensor | None, buckets: Tensor | None, plan: Plan,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Adds to o [A, N, C, R, V] what is read of earlier chunks and of the state carried in.

    buckets [A, S, L, K, R·V]. Returns o and the final buckets, the same shape (None unless `return_state`).
    """
    if not (plan.tree_heights or plan.has_last or return_state):
        return o, None
    first_level = plan.chunk_height + 1  # level of tree height 0
    last = plan.num_levels - 1
    added = chunks.written(v)  # U of every chunk

    near, num_near = None, fenwick.num_near_buckets(plan.num_levels, plan.chunk_height)
    if buckets is not None and level_scales is not None and num_near:
        near = NearBuckets(buckets, plan)
        near.read(o, chunks, level_scales)
        added = near.fold(added, chunks.transition)

    # up the tree: states and transitions of the nodes of every height, then the buckets that are carried in
    states, transition = pick(added, plan.leaves), chunks.transition.at(plan.leaves)
    heights = []
    for height in range(len(plan.merges) + 1):
        if buckets is not None and height < plan.tree_heights:
            states = torch.cat([states, buckets[:, :, first_level + height]], dim=1)
            unchanged = transition.identity(buckets.shape[1])
            transition = replace(transition, data=torch.cat([transition.data, unchanged.data], dim=1))
        heights.append((states, transition))
        if height < len(plan.merges):
            states, transition = merged(states, transition, plan.merges[height])

    # the last level: the state that enters each block of the cap height
    entering = None
    if plan.has_last:
        firsts = added.new_zeros(added.shape[0], 1, *added.shape[2:]) if buckets is None else buckets[:, :, last]
        states, transition = heights[-1]
        entering = scan(firsts, states, transition, plan)

    # down to the leaves: the chunks read what is on their left, on a level of its own for each height
    stages = [(states, transition, first_level + height)
              for height, (states, transition) in enumerate(heights[: plan.tree_heights])]  # fmt: skip
    if entering is not None:
        stages.append((entering, None, last))
    o = descend(o, chunks, level_scales, stages, plan)
    final = final_buckets(chunks, v, near, heights, entering, plan) if return_state else None
    return o, final


def merged(states: Tensor, transition: Transition, merge: Merge) -> tuple[Tensor, Transition]:
    """The nodes of the next height: the right half's map after the left half's."""
    (left, added), right = _Pair.apply(states, merge.left, merge.right), transition.at(merge.right)
    return right.act(left) + added, right.after(transition.at(merge.left))


class _Pair(torch.autograd.Function):
    """Entries of x at two indices, whose gradients are put into one buffer."""

    @staticmethod
    def forward(ctx, x, first, second):
        ctx.indices, ctx.shape = (first, second), x.shape
        return pick(x, first), pick(x, second)

    @staticmethod
    @once_differentiable
    @autocast.outside
    def backward(ctx, *grads):
        total = grads[0].new_zeros(ctx.shape)
        for index, grad in zip(ctx.indices, grads, strict=True):
            if isinstance(index, slice):
                total[:, index].add_(grad)
            else:
                sum_at(index, grad, total)
        return total, None, None


def descend(
    o: Tensor, chunks: Factors, level_scales: Tensor | None,
    stages: list[tuple[Tensor, Transition | None, int]], plan: Plan,
) -> Tensor:  # fmt: skip
    """Adds to o what the chunks read: at each stage states (by their nodes) on a level; then they pass the nodes."""
    if not stages:
        return o
    states, levels = [states for states, _, _ in stages], [level for _, _, level in stages]
    passing = [transition.data for _, transition, _ in stages[:-1] if transition is not None]  # not the last nodes
    arguments = (o, chunks.queries, chunks.query_log, level_scales, *states, *passing)
    return _Descent.apply(plan, type(chunks.transition), levels, *arguments)


class _Descent(torch.autograd.Function):
    """The whole descent, part by part of the chunks.

    Its own rule: keeping the queries of every height would take O(T log T) memory, so the backward makes them again,
    one part at a time; and what is read many times gets its gradient in a fixed order.
    """

    @staticmethod
    def forward(ctx, plan, kind, levels, o, queries, query_log, level_scales, *nodes):
        ctx.save_for_backward(queries, query_log, level_scales, *nodes)
        ctx.plan, ctx.kind, ctx.levels = plan, kind, levels
        ctx.mark_dirty(o)
        states, passing = nodes[: len(levels)], nodes[len(levels) :]
        for part in plan.parts:
            target, scales = o[:, part.chunks], _of(level_scales, part.chunks)
            for stage, table, rows, decays in _walk(part, kind, queries, query_log, passing):
                read = _by_group(rows, table) @ states[stage].index_select(1, table.nodes)
                read = read.view(*rows.shape[:-1], *o.shape[-2:])
                weights = _weights(kind, scales, levels[stage], table, decays)
                add_at(target, table.chunks, read if weights is None else read.mul_(weights[..., None]))
        return o

    @staticmethod
    @once_differentiable
    @autocast.outside
    def backward(ctx, grad):
        queries, query_log, level_scales, *nodes = ctx.saved_tensors
        d_queries, d_nodes = torch.zeros_like(queries), [x.new_zeros(x.shape) for x in nodes]
        d_log, d_scales = (None if x is None else torch.zeros_like(x) for x in (query_log, level_scales))
        count, kind = len(ctx.levels), ctx.kind
        states, passing, d_states, d_passing = nodes[:count], nodes[count:], d_nodes[:count], d_nodes[count:]
        for part in ctx.plan.parts:
            grads, scales = grad[:, part.chunks], _of(level_scales, part.chunks)
            d_queries_here, d_log_here, d_scales_here = (
                d_queries[:, part.chunks], _of(d_log, part.chunks), _of(d_scales, part.chunks))  # fmt: skip
            d_passed = _nothing_passed(kind, queries, query_log, part)
            for stage, table, rows, decays in reversed(list(_walk(part, kind, queries, query_log, passing))):
                later = 0
                if stage < len(passing):
                    if kind is Matrix:
                        moved = _by_group(pick(d_queries_here, table.chunks), table)
                        sum_at(table.nodes, _by_group(rows, table).mT @ moved, d_passing[stage])
                        later = (moved @ passing[stage].index_select(1, table.nodes).mT).view_as(rows)
                    elif d_passed is not None:
                        by_group = pick(d_passed, table.chunks).unflatten(1, (-1, table.size)).sum(2)
                        sum_at(table.nodes, by_group, d_passing[stage])
                weights = _weights(kind, scales, ctx.levels[stage], table, decays)
                d_rows, d_read_states, d_weights = _read_gradient(
                    pick(grads, table.chunks), rows, states[stage].index_select(1, table.nodes), weights, table
                )
                sum_at(table.nodes, d_read_states, d_states[stage])
                if kind is Matrix:
                    put_at(d_queries_here, table.chunks, later + d_rows)
                elif decays is None or d_passed is None:
                    add_at(d_queries_here, table.chunks, d_rows)
                elif kind is ChannelDecay:
                    add_at(d_queries_here, table.chunks, d_rows * decays)
                    add_at(d_passed, table.chunks, (d_rows * rows).sum(2, dtype=torch.float64))
                elif d_log_here is not None:
                    add_at(d_queries_here, table.chunks, d_rows)
                    d_row_log = (d_weights * weights).to(torch.float64)
                    add_at(d_log_here, table.chunks, d_row_log)
                    add_at(d_passed, table.chunks, d_row_log.sum(2))
                    d_weights = d_weights * decays
                if d_scales_here is not None:
                    put_at(d_scales_here[..., ctx.levels[stage]], table.chunks, d_weights)
        return None, None, None, grad, d_queries, d_log, d_scales, *d_nodes


def _walk(
    part: Part, kind: type[Transition], queries: Tensor, query_log: Tensor | None, passing: Sequence[Tensor]
) -> Iterator[tuple[int, Reads, Tensor, Tensor | None]]:
    """The queries of a part on their way down.

    Yields, for every table of every stage: the stage, the table, what reads [A, M, C, K], and how the nodes passed so
    far have decayed it: per head [A, M, C, R], per channel [A, M, 1, K] (already in what reads), or None.
    """
    dtype, queries, query_log = queries.dtype, queries[:, part.chunks], _of(query_log, part.chunks)
    if kind is Matrix:
        queries = queries.clone()  # overwritten as nodes are passed
    passed = _nothing_passed(kind, queries, query_log, part)
    for stage, tables in enumerate(part.stages):
        for table in tables:
            rows, decays = pick(queries, table.chunks), None
            if kind is Matrix and isinstance(table.chunks, slice):
                rows = rows.clone()  # not a view of what is overwritten
            elif kind is ChannelDecay and passed is not None:
                decays = pick(passed, table.chunks).exp().to(dtype)[:, :, None]
                rows = rows * decays
            elif query_log is not None and passed is not None:
                decays = (pick(query_log, table.chunks) + pick(passed, table.chunks)[:, :, None]).exp().to(dtype)
            yield stage, table, rows, decays
            if stage == len(passing):
                continue
            if passed is not None:
                data = passing[stage].index_select(1, table.nodes)
                add_at(passed, table.chunks, data.repeat_interleave(table.size, 1))
            elif kind is Matrix:
                moved = _by_group(rows, table) @ passing[stage].index_select(1, table.nodes)
                put_at(queries, table.chunks, moved.view_as(rows))


def _read_gradient(grad: Tensor, rows: Tensor, picked: Tensor, weights: Tensor | None, table: Reads) -> Any:
    """Gradients of weights ⊙ (rows · picked) with respect to rows, picked and weights (None if those are None).

    grad [A, M, C, R, V], rows [A, M, C, K], picked [A, groups, K, R·V], weights [A, M, C, R].
    """
    grouped = _by_group(rows, table)
    weighted = grad if weights is None else grad * weights[..., None]
    d_picked = grouped.mT @ _by_group(weighted.flatten(-2), table)
    if weights is not None and weights.shape[-1] == 1:  # one head: the same product serves both
        product = (_by_group(grad.flatten(-2), table) @ picked.mT).view_as(rows)
        return product * weights, d_picked, (product * rows).sum(-1, keepdim=True)
    d_rows = (_by_group(weighted.flatten(-2), table) @ picked.mT).view_as(rows)
    d_weights = None if weights is None else ((grouped @ picked).view_as(grad) * grad).sum(-1)
    return d_rows, d_picked, d_weights


def _weights(
    kind: type[Transition], scales: Tensor | None, level: int, table: Reads, decays: Tensor | None
) -> Tensor | None:
    """[A, M, C, R]: the level scales of the rows of `table`, times the decays where these are per head."""
    by_head = None if kind is ChannelDecay else decays
    if scales is None:
        return by_head
    picked = pick(scales[..., level], table.chunks)
    return picked if by_head is None else picked * by_head


def _nothing_passed(kind: type[Transition], queries: Tensor, query_log: Tensor | None, part: Part) -> Tensor | None:
    """Logs of what was passed at the start, [A, chunks of the part, R or K]; None where nothing decays by logs."""
    if kind is not ChannelDecay and query_log is None:
        return None
    width = queries.shape[-1] if query_log is None else query_log.shape[-1]
    return queries.new_zeros(queries.shape[0], part.chunks.stop - part.chunks.start, width, dtype=torch.float64)


def _by_group(x: Tensor, table: Reads) -> Tensor:
    """[A, groups · size, C, …] to [A, groups, size · C, …]."""
    return x.reshape(x.shape[0], -1, table.size * x.shape[2], x.shape[-1])


def _of(x: Tensor | None, chunks: slice) -> Tensor | None:
    return None if x is None else x[:, chunks]


def put_at(target: Tensor, index: Index, x: Tensor) -> None:
    """target[:, index] = x."""
    if isinstance(index, slice):
        target[:, index] = x
    else:
        target.index_copy_(1, index, x)


def add_at(target: Tensor, index: Index, x: Tensor) -> None:
    """target[:, index] += x, for an index without repetitions."""
    put_at(target, index, pick(target, index) + x)


def sum_at(index: Tensor, x: Tensor, total: Tensor) -> None:
    """Adds x [A, M, …] to total [A, count, …] at `index` [M], which may repeat, always in the same order.

    `total` is contiguous.
    """
    if x.is_cuda:  # sorts; index_add_ would add with atomics there, as index_put_ does with threads on the CPU
        heads, count = total.shape[:2]
        index = (torch.arange(heads, device=x.device)[:, None] * count + index).flatten()
        # head by head in one dimension: of a transposed `total` it would make a copy, and copy that back
        total.view(-1, *total.shape[2:]).index_put_((index,), x.flatten(0, 1), accumulate=True)
    else:
        total.index_add_(1, index, x)


def scan(firsts: Tensor, states: Tensor, transition: Transition, plan: Plan) -> Tensor:
    """States that enter the blocks of the cap height, given those that enter the sequences; in `ScanStep`'s order."""
    levels = [(states, transition)]
    for merge in plan.scan_merges:
        states, transition = merged(states, transition, merge)
        levels.append((states, transition))
    entering = firsts
    for step, (states, transition) in zip(plan.scan_steps, reversed(levels), strict=False):
        even, odd = _Pair.apply(entering, step.even_parent, step.odd_parent)
        left = transition.at(step.odd_left)
        entering = torch.cat([firsts, even, left.act(odd) + states.index_select(1, step.odd_left)], dim=1)
    return entering


# ----------------------------------------------------------------------------------------------------
# States in the middle of a chunk
# ----------------------------------------------------------------------------------------------------


def _where(mask: Tensor, x: Tensor, other: Tensor | float = 0.0) -> Tensor:
    """x [A, S, …] for the sequences in `mask` [S], `other` elsewhere."""
    return torch.where(mask.view(-1, *(1,) * (x.ndim - 2)), x, other)


class NearBuckets:
    """Buckets carried in that lie in the chunk of the first token: its rows read them, and they end up in its U."""

    def __init__(self, buckets: Tensor, plan: Plan):
        count = fenwick.num_near_buckets(plan.num_levels, plan.chunk_height)
        self.buckets = buckets[:, :, 1 : count + 1]  # [A, S, near, K, R·V], zero where there is none
        self.plan = plan

    def read(self, o: Tensor, chunks: Factors, level_scales: Tensor) -> None:
        plan = self.plan
        queries = chunks.queries.index_select(1, plan.first_chunk)
        by_level = F.one_hot(plan.near_start_level, plan.num_levels).to(o.dtype)  # [S, C, near, L]
        weights = torch.einsum("ascrl,scil->aicsr", level_scales.index_select(1, plan.first_chunk), by_level)
        weights = weights.permute(0, 3, 1, 2, 4)  # [A, S, near, C, R]
        if chunks.query_log is not None:
            weights = weights * chunks.query_log.index_select(1, plan.first_chunk).exp().to(o.dtype)[:, :, None]
        read = (queries[:, :, None] @ self.buckets).unflatten(-1, (-1, o.shape[-1]))  # [A, S, near, C, R, V]
        read = (read * weights[..., None]).sum(2)
        o.index_add_(1, plan.first_chunk, _where(plan.has_tokens, read))

    def fold(self, added: Tensor, transition: Transition) -> Tensor:
        passed = transition.at(self.plan.first_chunk).act(self.buckets.sum(2))
        return added.index_add(1, self.plan.first_chunk, _where(self.plan.has_tokens, passed))

    def at_end(self, transition: Transition) -> Tensor:
        """[A, S, L, K, R·V]: where they are at the end of a sequence that stays in its chunk."""
        plan = self.plan
        moved = [transition.act(bucket) for bucket in self.buckets.unbind(2)]
        by_level = F.one_hot(plan.near_end_level, plan.num_levels).to(moved[0].dtype)  # [S, near, L]
        return _where(plan.stays_in_chunk, torch.einsum("asikv,sil->aslkv", torch.stack(moved, dim=2), by_level))


def final_buckets(
    chunks: Factors, v: Tensor, near: NearBuckets | None, heights: list, entering: Tensor | None, plan: Plan
) -> Tensor:
    """The same reading at the position after the last token, by the identity instead of queries: [A, S, L, K, R·V]."""
    partial = chunks.at(plan.partial_chunk)
    nothing = partial.transition.identity(len(plan.partial_chunk))
    passed = replace(nothing, data=_where(plan.has_partial, partial.transition.data, nothing.data))

    # the rows of the incomplete chunk, split along the binary digits of where it ends
    rows = v.index_select(1, plan.partial_chunk)
    levels = range(min(plan.num_levels - 1, plan.chunk_height) + 1)
    masks = [torch.logical_and(plan.has_partial[:, None], plan.end_row_level == level) for level in levels]
    buckets = [partial.written(_where_rows(mask, rows)) for mask in masks]
    empty = torch.zeros_like(buckets[0])
    buckets += [empty] * (plan.num_levels - len(buckets))
    if near is not None:
        buckets = [a + b for a, b in zip(buckets, near.at_end(passed).unbind(2), strict=True)]

    for height, (states, transition) in enumerate(heights[: plan.tree_heights]):
        node, used, level = plan.end_nodes[height], plan.end_used[height], plan.chunk_height + 1 + height
        buckets[level] = _where(used, passed.act(states.index_select(1, node)))
        further = passed.after(transition.at(node))
        passed = replace(passed, data=_where(used, further.data, passed.data))
    if entering is not None:
        buckets[-1] = buckets[-1] + passed.act(entering.index_select(1, plan.end_last))
    return torch.stack(buckets, dim=2)


def _where_rows(mask: Tensor, v: Tensor) -> Tensor:
    """Rows of v [A, S, C, R, V] in `mask` [S, C], zero elsewhere."""
    return torch.where(mask[:, :, None, None], v, 0)


# ----------------------------------------------------------------------------------------------------
# Under torch.compile: one opaque operator forward, one backward that runs the forward again
# ----------------------------------------------------------------------------------------------------


def tree_attention_opaque(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, buckets: Tensor | None, positions: Tensor | None, return_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`tree_attention` as an operator that a compiler does not look into; keeps nothing but its inputs."""
    o, final, ends = _forward_op(
        q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, buckets, positions, return_state)  # fmt: skip
    return (o, final, ends) if return_state else (o, None, None)


@torch.library.custom_op("loglinear::tree_attention", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, buckets: Tensor | None, positions: Tensor | None, return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    o, final, ends = tree_attention(
        q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, buckets, positions, return_state)  # fmt: skip
    return o.contiguous(), _tensor(final, v), _tensor(ends, v, torch.int64)


def _tensor(x: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Operators return tensors: an empty one stands for None."""
    return like.new_empty(0, dtype=dtype) if x is None else x.contiguous()


@_forward_op.register_fake
def _(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, buckets, positions, return_state):
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if not return_state:
        return o, _tensor(None, v), _tensor(None, v, torch.int64)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    levels = 1 if level_scales is None else level_scales.shape[-1]
    work = torch.promote_types(v.dtype, torch.float32)
    final = v.new_empty(sequences, levels, v.shape[2], q.shape[3], v.shape[3], dtype=work)
    return o, final, v.new_empty(sequences, dtype=torch.int64)


@torch.library.custom_op("loglinear::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    grad_o: Tensor, grad_final: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, buckets: Tensor | None, positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    level_scales, log_decay, beta, buckets = (
        None if x is None else x.detach().requires_grad_() for x in (level_scales, log_decay, beta, buckets)
    )
    # A custom operator runs below autograd: it is let in again for the forward pass that is made anew here.
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(autograd, False):
        o, final, _ = tree_attention(
            q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, buckets, positions, grad_final is not None
        )
    outputs, grads = ([o], [grad_o]) if final is None else ([o, final], [grad_o, grad_final])
    inputs = (q, k, v, level_scales, log_decay, beta, buckets)
    found = iter(torch.autograd.grad(outputs, [x for x in inputs if x is not None], grads, materialize_grads=True))
    dq, dk, dv, *rest = (_tensor(None if x is None else next(found), v) for x in inputs)
    d_scales, d_decay, d_beta, d_buckets = rest
    return dq, dk, dv, d_scales, d_decay, d_beta, d_buckets


@tree_attention_backward.register_fake
def _(grad_o, grad_final, q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, buckets, positions):
    inputs = (q, k, v, level_scales, log_decay, beta, buckets)
    return tuple(
        _tensor(None, v) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
    )


def _keep_inputs(ctx, inputs, output):
    *tensors, scale, cu_seqlens, buckets, positions, ctx.return_state = inputs
    ctx.scale = scale
    ctx.save_for_backward(*tensors, cu_seqlens, buckets, positions)


@autocast.outside
def _run_backward(ctx, grad_o, grad_final, _):
    *tensors, cu_seqlens, buckets, positions = ctx.saved_tensors
    grads = tree_attention_backward(
        grad_o, grad_final if ctx.return_state else None, *tensors, ctx.scale, cu_seqlens, buckets, positions
    )
    present = [g if x is not None else None for g, x in zip(grads, (*tensors, buckets), strict=True)]
    return (*present[:6], None, None, present[6], None, None)


_forward_op.register_autograd(_run_backward, setup_context=_keep_inputs)
stacked.register(_forward_op)
