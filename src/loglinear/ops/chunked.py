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

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear import fenwick
from loglinear.fenwick import Index, Plan, Reads
from loglinear.ops.families import ChannelDecay, Factors, Matrix, factors
from loglinear.ops.packing import sequence_bounds


def log_linear_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, *, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, initial_state, return_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The torch backend. Shapes as in `log_linear_attention`; returns o, buckets and positions (None unless asked for).

    Lengths and positions are read on the host (they decide the shapes of everything), which waits for the device when
    `cu_seqlens` or the state's positions live there. Under `torch.compile` the call is one opaque operator.
    """
    state = (None, None) if initial_state is None else initial_state
    run = tree_attention_opaque if torch.compiler.is_compiling() else tree_attention
    return run(q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, *state, return_state)


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
    chunk = chunk or fenwick.chunk_for(max(lengths))
    plan = fenwick.plan(lengths, None if positions is None else positions.tolist(), chunk, num_levels, v.device)

    # heads that share q and k are multiplied together where their decays are mere row weights
    groups = q.shape[2]
    per_head = beta is not None or (log_decay is not None and log_decay.ndim == 4)
    if per_head and groups != heads:
        q, k = (x.repeat_interleave(heads // groups, dim=2) for x in (q, k))
    shared = 1 if per_head else heads // groups
    q, k = (to_chunks(x.to(work), plan) for x in (q * scale, k))
    v, level_scales, beta = (
        None if x is None else to_chunks(x.to(work).unflatten(2, (-1, shared)), plan) for x in (v, level_scales, beta)
    )
    if log_decay is not None:
        log_decay = to_chunks(log_decay.to(torch.float64).unflatten(2, (-1, shared)), plan)
    if buckets is not None:  # [S, L, H, K, V] to [A, S, L, K, R·V]
        buckets = buckets.to(work).unflatten(2, (-1, shared)).permute(2, 0, 1, 4, 3, 5).flatten(-2)
        used = fenwick.occupied(positions, num_levels)
        buckets = torch.where(used[None, :, :, None, None], buckets, 0)

    chunks = factors(q, k, shared, log_decay, beta)
    o = inside_chunks(chunks, v, level_scales)
    final = across_chunks(o, chunks, v, level_scales, buckets, plan, return_state)
    o = from_chunks(o, plan, batch, tokens).flatten(2, 3).to(dtype)
    if not return_state:
        return o, None, None
    final = final.unflatten(-1, (shared, value_dim)).permute(1, 2, 0, 4, 3, 5).flatten(2, 3)
    start = torch.zeros(len(lengths), dtype=torch.int64, device=v.device) if positions is None else positions
    return o, final.contiguous(), start + torch.tensor(lengths, device=v.device)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and chunks
# ---------------------------------------------------------------------------------------------------------------------


def to_chunks(x: Tensor, plan: Plan) -> Tensor:
    """[B, T, A, …] to [A, N, C, …]; rows that do not exist are zero."""
    if plan.row_of_slot is None:
        # packed sequences of equal length are the rows of a batch, too
        x = x.reshape(plan.num_chunks // plan.chunks_per_sequence, -1, *x.shape[2:])
        missing = plan.chunks_per_sequence * plan.chunk - x.shape[1]
        if missing:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        rows = x.flatten(0, 1)
    else:
        rows = x.flatten(0, 1).index_select(0, plan.row_of_slot)
        rows = rows.masked_fill(~plan.row_valid.view(-1, *(1,) * (rows.ndim - 1)), 0)
    return rows.unflatten(0, (-1, plan.chunk)).movedim(2, 0).contiguous()


def from_chunks(x: Tensor, plan: Plan, batch: int, tokens: int) -> Tensor:
    """[A, N, C, …] to [B, T, A, …]."""
    rows = x.movedim(0, 2).flatten(0, 1)
    if plan.row_of_slot is None:
        sequences = plan.num_chunks // plan.chunks_per_sequence
        rows = rows.unflatten(0, (sequences, -1))[:, : batch * tokens // sequences]
        return rows.reshape(batch, tokens, *rows.shape[2:])
    return rows.index_select(0, plan.slot_of_row).unflatten(0, (batch, tokens))


def pick(x: Tensor, index: Index) -> Tensor:
    """Entries along dimension 1."""
    return x[:, index] if isinstance(index, slice) else x.index_select(1, index)


# ---------------------------------------------------------------------------------------------------------------------
# Inside a chunk
# ---------------------------------------------------------------------------------------------------------------------


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
    def backward(ctx, grad):
        scores, level_scales, table = ctx.saved_tensors
        by_level = F.one_hot(table, level_scales.shape[-1]).to(grad.dtype)  # what is not causal has a score of zero
        grad_scales = torch.einsum("anrts,tsl->anrtl", grad * scores, by_level)
        return grad * level_scales.gather(-1, table.expand(scores.shape)), grad_scales, None


# ---------------------------------------------------------------------------------------------------------------------
# The tree
# ---------------------------------------------------------------------------------------------------------------------


def across_chunks(
    o: Tensor, chunks: Factors, v: Tensor, level_scales: Tensor | None, buckets: Tensor | None, plan: Plan,
    return_state: bool,
) -> Tensor | None:  # fmt: skip
    """Adds to o [A, N, C, R, V] what is read of earlier chunks and of the state carried in; returns the final buckets.

    buckets and the result: [A, S, L, K, R·V].
    """
    if not (plan.reads or plan.has_last or return_state):
        return None
    first_level = plan.chunk_height + 1  # level of tree height 0
    last = plan.num_levels - 1
    added = chunks.written(v)  # U of every chunk

    near = None
    if buckets is not None and fenwick.num_near_buckets(plan.num_levels, plan.chunk_height):
        near = NearBuckets(buckets, plan)
        near.read(o, chunks, level_scales)
        added = near.fold(added, chunks.transition)

    # up the tree: states and transitions of the nodes of every height, then the buckets that are carried in
    kind = type(chunks.transition)
    states, transition = pick(added, plan.leaves), kind(pick(chunks.transition.data, plan.leaves))
    heights = []
    for height in range(len(plan.merges) + 1):
        if buckets is not None and height < plan.tree_heights:
            states = torch.cat([states, buckets[:, :, first_level + height]], dim=1)
            transition = kind(torch.cat([transition.data, transition.identity(buckets.shape[1]).data], dim=1))
        heights.append((states, transition))
        if height < len(plan.merges):
            merge = plan.merges[height]
            left, right = ((pick(states, side), kind(pick(transition.data, side))) for side in (merge.left, merge.right))
            states, transition = right[1].act(left[0]) + right[0], right[1].after(left[1])

    # down to the leaves: the chunks read, on a level of its own for each height, what is on their left
    reader = Reader(chunks, o)
    for height, (tables, (states, transition)) in enumerate(zip(plan.reads, heights, strict=False)):
        for table in tables:
            reader.read(table, states, level_scales[..., first_level + height])
            reader.advance(table, transition)

    # the last level: the state that enters each block of the cap height
    entering = None
    if plan.has_last:
        firsts = added.new_zeros(added.shape[0], 1, *added.shape[2:]) if buckets is None else buckets[:, :, last]
        entering = scan(firsts, *heights[-1], plan)
        for table in plan.last_reads:
            reader.read(table, entering, None if level_scales is None else level_scales[..., last])

    return final_buckets(chunks, v, near, heights, entering, plan) if return_state else None


class Reader:
    """The queries on their way down the tree: they read nodes, and pass them."""

    def __init__(self, chunks: Factors, o: Tensor):
        self.o = o
        self.row_log = chunks.query_log
        self.by_channel = isinstance(chunks.transition, ChannelDecay)
        if isinstance(chunks.transition, Matrix):
            self.passed = None
            self.queries = chunks.queries.clone()  # overwritten as nodes are passed
        else:
            self.passed = torch.zeros_like(chunks.transition.data)  # log of what was passed, [A, N, R or K]
            self.queries = chunks.queries

    def read(self, table: Reads, states: Tensor, scales: Tensor | None) -> None:
        """o += scales ⊙ (queries · state) for the chunks of `table`; scales [A, N, C, R], None for 1."""
        queries = self.queries.index_select(1, table.chunks)
        weights = None if scales is None else scales.index_select(1, table.chunks)
        if self.by_channel:
            queries = queries * self.passed.index_select(1, table.chunks).exp().to(queries.dtype)[:, :, None]
        elif self.row_log is not None:
            logs = self.row_log.index_select(1, table.chunks) + self.passed.index_select(1, table.chunks)[:, :, None]
            decays = logs.exp().to(queries.dtype)
            weights = decays if weights is None else weights * decays
        self.o.index_add_(1, table.chunks, _Read.apply(queries, states, weights, table, self.o.shape[-1]))

    def advance(self, table: Reads, transition) -> None:
        data = _Take.apply(transition.data, table.nodes.repeat_interleave(table.size))
        if self.passed is not None:
            self.passed = self.passed.index_add(1, table.chunks, data)
        else:
            moved = self.queries.index_select(1, table.chunks) @ data
            self.queries.index_copy_(1, table.chunks, moved)


class _Read(torch.autograd.Function):
    """queries [A, M, C, K] times states [A, nodes, K, R·V], the rows weighted by [A, M, C, R]: [A, M, C, R, V].

    Its own rule: the products are cheaper to make again than to keep for every height, and nodes that are read many
    times need a sum in a fixed order.
    """

    @staticmethod
    def forward(ctx, queries, states, weights, table, value_dim):
        ctx.save_for_backward(queries, states, weights)
        ctx.table = table
        read = _by_group(queries, table) @ states.index_select(1, table.nodes)
        read = read.view(*queries.shape[:-1], -1, value_dim)
        return read if weights is None else read * weights[..., None]

    @staticmethod
    def backward(ctx, grad):
        queries, states, weights = ctx.saved_tensors
        table, picked = ctx.table, states.index_select(1, ctx.table.nodes)
        grouped = _by_group(queries, table)
        weighted = grad if weights is None else grad * weights[..., None]
        grad_states = grouped.transpose(-1, -2) @ _by_group(weighted.flatten(-2), table)
        grad_states = sum_at(table.nodes, grad_states, states.shape[1])
        if weights is None or weights.shape[-1] > 1:
            grad_queries = (_by_group(weighted.flatten(-2), table) @ picked.transpose(-1, -2)).view_as(queries)
            grad_weights = None if weights is None else ((grouped @ picked).view_as(grad) * grad).sum(-1)
        else:  # one head: the same product serves both
            product = (_by_group(grad.flatten(-2), table) @ picked.transpose(-1, -2)).view_as(queries)
            grad_queries, grad_weights = product * weights, (product * queries).sum(-1, keepdim=True)
        return grad_queries, grad_states, grad_weights, None, None


def _by_group(x: Tensor, table: Reads) -> Tensor:
    """[A, groups · size, C, …] to [A, groups, size · C, …]."""
    return x.reshape(x.shape[0], -1, table.size * x.shape[2], x.shape[-1])


class _Take(torch.autograd.Function):
    """Entries along dimension 1, some taken several times; the gradients are summed in a fixed order."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.count = x.shape[1]
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, grad):
        return sum_at(*ctx.saved_tensors, grad, ctx.count), None


def sum_at(index: Tensor, x: Tensor, count: int) -> Tensor:
    """[A, count, …] with x [A, M, …] added at `index` [M], always in the same order."""
    total = x.new_zeros(x.shape[0], count, *x.shape[2:])
    if x.is_cuda:  # sorts; index_add_ would add with atomics there, as index_put_ does with threads on the CPU
        total.transpose(0, 1).index_put_((index,), x.transpose(0, 1), accumulate=True)
        return total
    return total.index_add_(1, index, x)


def scan(firsts: Tensor, states: Tensor, transition, plan: Plan) -> Tensor:
    """States that enter the blocks of the cap height, given those that enter the sequences; ordered as `ScanStep` says."""
    kind, levels = type(transition), [(states, transition)]
    for merge in plan.scan_merges:
        left, right = ((pick(states, side), kind(pick(transition.data, side))) for side in (merge.left, merge.right))
        states, transition = right[1].act(left[0]) + right[0], right[1].after(left[1])
        levels.append((states, transition))
    entering = firsts
    for step, (states, transition) in zip(plan.scan_steps, reversed(levels), strict=False):
        even, odd = entering.index_select(1, step.even_parent), entering.index_select(1, step.odd_parent)
        left = kind(transition.data.index_select(1, step.odd_left))
        entering = torch.cat([firsts, even, left.act(odd) + states.index_select(1, step.odd_left)], dim=1)
    return entering


# ---------------------------------------------------------------------------------------------------------------------
# States in the middle of a chunk
# ---------------------------------------------------------------------------------------------------------------------


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

    def fold(self, added: Tensor, transition) -> Tensor:
        passed = type(transition)(transition.data.index_select(1, self.plan.first_chunk)).act(self.buckets.sum(2))
        return added.index_add(1, self.plan.first_chunk, _where(self.plan.has_tokens, passed))

    def at_end(self, transition) -> Tensor:
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
    kind, nothing = type(partial.transition), partial.transition.identity(len(plan.partial_chunk))
    passed = kind(_where(plan.has_partial, partial.transition.data, nothing.data))

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
        further = passed.after(kind(transition.data.index_select(1, node)))
        passed = kind(_where(used, further.data, passed.data))
    if entering is not None:
        buckets[-1] = buckets[-1] + passed.act(entering.index_select(1, plan.end_last))
    return torch.stack(buckets, dim=2)


def _where_rows(mask: Tensor, v: Tensor) -> Tensor:
    """Rows of v [A, S, C, R, V] in `mask` [S, C], zero elsewhere."""
    return torch.where(mask[:, :, None, None], v, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Under torch.compile: one opaque operator forward, one backward that runs the forward again
# ---------------------------------------------------------------------------------------------------------------------


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
    if not return_state:
        return torch.empty_like(v, memory_format=torch.contiguous_format), _tensor(None, v), _tensor(None, v, torch.int64)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    levels = 1 if level_scales is None else level_scales.shape[-1]
    work = torch.promote_types(v.dtype, torch.float32)
    final = v.new_empty(sequences, levels, v.shape[2], q.shape[3], v.shape[3], dtype=work)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, final, v.new_empty(sequences, dtype=torch.int64)


@torch.library.custom_op("loglinear::tree_attention_backward", mutates_args=())
def _backward_op(
    grad_o: Tensor, grad_final: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    scale: float, cu_seqlens: Tensor | None, buckets: Tensor | None, positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = [q, k, v, level_scales, log_decay, beta, buckets]
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        o, final, _ = tree_attention(
            *inputs[:6], scale, cu_seqlens, inputs[6], positions, grad_final is not None)  # fmt: skip
    outputs, grads = ([o], [grad_o]) if grad_final is None else ([o, final], [grad_o, grad_final])
    wanted = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    gradients = [None if x is None else next(found) for x in inputs]
    return tuple(
        _tensor(None, v) if x is None else torch.zeros_like(x) if g is None else g.contiguous()
        for x, g in zip(inputs, gradients, strict=True)
    )  # fmt: skip


@_backward_op.register_fake
def _(grad_o, grad_final, q, k, v, level_scales, log_decay, beta, scale, cu_seqlens, buckets, positions):
    inputs = (q, k, v, level_scales, log_decay, beta, buckets)
    return tuple(
        _tensor(None, v) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
    )


def _keep_inputs(ctx, inputs, output):
    *tensors, scale, cu_seqlens, buckets, positions, ctx.return_state = inputs
    ctx.scale = scale
    ctx.save_for_backward(*tensors, cu_seqlens, buckets, positions)


def _run_backward(ctx, grad_o, grad_final, _):
    *tensors, cu_seqlens, buckets, positions = ctx.saved_tensors
    grads = _backward_op(
        grad_o, grad_final if ctx.return_state else None, *tensors, ctx.scale, cu_seqlens, buckets, positions
    )
    present = [g if x is not None else None for g, x in zip(grads, (*tensors, buckets), strict=True)]
    return (*present[:6], None, None, present[6], None, None)


_forward_op.register_autograd(_run_backward, setup_context=_keep_inputs)
