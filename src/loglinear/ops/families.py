"""What one chunk does, by family of mixer: the only place that knows how the families differ.

Every chunk is an affine map of the state that enters it, S ↦ P S + U, and every mixer of the table in
`log_linear_attention` becomes, chunk by chunk, linear attention with other queries, keys and scores:

    U = writesᵀ v                what the chunk adds to the state at its end
    scores                       how its rows see each other (before the level scales)
    queries                      its rows as seen from the state that enters it
    P                            what it does to that state: a number, a diagonal, or a matrix per head

Legend
    A heads that are multiplied separately: the G groups for scalar decay, the H heads else
    R heads that share one such product: H / G for scalar decay (their decays are row weights), 1 else
    N chunks, C tokens in a chunk, K key width, V value width
    γ log decay summed over the rows of the chunk up to and including a row; Γ its last entry

Precision: logs of decays are float64 until they are exponentiated, so that sums and their differences lose nothing.
Those per channel, of which there are many, are float32 beside 16-bit values: inside a chunk they are summed and never
subtracted, and e^γ is off by γ roundings of float32. Only e^x with x ≤ 0 is ever formed.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loglinear.fenwick import Index
from loglinear.ops import autocast

FEW = 2  # rows of blocks whose products take longer in a library of matrix products than element by element


@dataclass(frozen=True)
class Transition(ABC):
    """P of a set of nodes; `data` [A, nodes, …] says what a family keeps of it."""

    data: Tensor

    @abstractmethod
    def act(self, states: Tensor) -> Tensor:
        """P S for states [A, nodes, K, R·V]."""

    @abstractmethod
    def after(self, earlier: Self) -> Self:
        """The composition: first `earlier`, then this one."""

    @abstractmethod
    def identity(self, nodes: int) -> Self:
        """The transition of `nodes` nodes that change nothing."""

    def at(self, index: Index) -> Self:
        """The transitions of some of the nodes."""
        return replace(self, data=pick(self.data, index))


class _Logs(Transition):
    """Composed by addition: `data` holds logs, float64."""

    def after(self, earlier: Self) -> Self:
        return replace(self, data=self.data + earlier.data)

    def identity(self, nodes: int) -> Self:
        return replace(self, data=self.data.new_zeros(self.data.shape[0], nodes, self.data.shape[2]))


class ScalarDecay(_Logs):
    """P is a number per head: `data` [A, nodes, R] holds its log."""

    def act(self, states: Tensor) -> Tensor:
        grouped = states.unflatten(-1, (self.data.shape[-1], -1))
        return (grouped * self.data.exp().to(states.dtype)[:, :, None, :, None]).flatten(-2)


class ChannelDecay(_Logs):
    """P is diagonal: `data` [A, nodes, K] holds the log of the diagonal."""

    def act(self, states: Tensor) -> Tensor:
        return states * self.data.exp().to(states.dtype)[..., None]


class Matrix(Transition):
    """P is a matrix: `data` [A, nodes, K, K]."""

    def act(self, states: Tensor) -> Tensor:
        return self.data @ states

    def after(self, earlier: Self) -> Self:
        return replace(self, data=self.data @ earlier.data)

    def identity(self, nodes: int) -> Self:
        heads, _, key_dim, _ = self.data.shape
        eye = torch.eye(key_dim, dtype=self.data.dtype, device=self.data.device)
        return replace(self, data=eye.expand(heads, nodes, -1, -1))


def pick(x: Tensor, index: Index) -> Tensor:
    """Entries along dimension 1."""
    return x[:, index] if isinstance(index, slice) else x.index_select(1, index)


class Factors(NamedTuple):
    """One chunk map per chunk, and how its rows read and write. See the head of this file."""

    queries: Tensor  # [A, N, C, K]
    query_log: Tensor | None  # [A, N, C, R] log weight of each row's query, or None
    writes: Tensor  # [A, N, C, K]
    write_weight: Tensor | None  # [A, N, C, R] weight of each row's write, or None
    scores: Tensor  # [A, N, R, C, C], causal
    transition: Transition

    def written(self, v: Tensor) -> Tensor:
        """U = writesᵀ v for values v [A, N', C, R, V] of the same chunks: [A, N', K, R·V]."""
        if self.write_weight is not None:
            v = v * self.write_weight[..., None]
        return self.writes.transpose(-1, -2) @ v.flatten(-2)

    def at(self, chunks: Tensor) -> Factors:
        """The factors of some of the chunks."""
        return Factors(
            queries=pick(self.queries, chunks),
            query_log=None if self.query_log is None else pick(self.query_log, chunks),
            writes=pick(self.writes, chunks),
            write_weight=None if self.write_weight is None else pick(self.write_weight, chunks),
            scores=pick(self.scores, chunks),
            transition=self.transition.at(chunks),
        )


def factors(q: Tensor, k: Tensor, heads: int, log_decay: Tensor | None, beta: Tensor | None) -> Factors:
    """Factors of every chunk.

    Args:
        q, k: [A, N, C, K]; rows that do not exist are zero.
        heads: R.
        log_decay: [A, N, C, R], float64, or per channel [A, N, C, 1, K], float32 or float64.
        beta: [A, N, C, R]. With beta, and with channel decay, A is H and R is 1.
    """
    if log_decay is None and beta is None:
        return _without_decay(q, k, heads)
    if log_decay is None:
        log_decay = q.new_zeros(1, dtype=torch.float64).expand(*q.shape[:-1], 1)
    if log_decay.ndim == 5:
        log_decay = log_decay[:, :, :, 0]
        return _channel(q, k, log_decay) if beta is None else _channel_delta(q, k, log_decay, beta)
    total = log_decay.cumsum(2)
    return _scalar(q, k, total) if beta is None else _scalar_delta(q, k, total, beta)


def _without_decay(q: Tensor, k: Tensor, heads: int) -> Factors:
    scores = (q @ k.transpose(-1, -2)).tril()[:, :, None]
    none = ScalarDecay(q.new_zeros(*q.shape[:2], heads, dtype=torch.float64))
    return Factors(q, None, k, None, scores.expand(-1, -1, heads, -1, -1), none)


def _scalar(q: Tensor, k: Tensor, total: Tensor) -> Factors:
    end = total[:, :, -1]
    scores = (q @ k.transpose(-1, -2))[:, :, None] * decay_matrix(total.transpose(-1, -2), q.dtype)
    return Factors(q, total, k, (end[:, :, None] - total).exp().to(q.dtype), scores, ScalarDecay(end))


def _channel(q: Tensor, k: Tensor, log_decay: Tensor) -> Factors:
    since, until, scores = _ChannelScores.apply(log_decay, k, q)
    end = ChannelDecay(since[:, :, -1].to(torch.float64))
    entering, leaving = since.exp().to(q.dtype), until.exp().to(q.dtype)
    return Factors(q * entering, None, k * leaving, None, scores[:, :, None], end)


def _scalar_delta(q: Tensor, k: Tensor, total: Tensor, beta: Tensor) -> Factors:
    decay = decay_matrix(total[..., 0], q.dtype)
    scores, overlap = (q @ k.transpose(-1, -2)) * decay, (k @ k.transpose(-1, -2)) * decay
    entering, leaving = total.exp().to(q.dtype), (total[:, :, -1:] - total).exp().to(q.dtype)
    return _delta(q, k, scores, overlap, entering, leaving, beta)


def _channel_delta(q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor) -> Factors:
    since, until, scores, overlap = _ChannelScores.apply(log_decay, k, q, k)
    return _delta(q, k, scores, overlap, since.exp().to(q.dtype), until.exp().to(q.dtype), beta)


def _delta(
    q: Tensor, k: Tensor, scores: Tensor, overlap: Tensor, entering: Tensor, leaving: Tensor, beta: Tensor
) -> Factors:
    """The chunk of the delta rule in the WY form (arXiv 2406.06484; gated: 2412.06464).

    scores and overlap [A, N, C, C] are how queries and keys see earlier keys; entering and leaving, [A, N, C, K] or for
    one decay per head [A, N, C, 1], the decays from the start of the chunk to a row, and from there to the end. With
    T = (I + tril(diag(β) overlap, -1))⁻¹ diag(β), what the rows write is T (v − keys-as-seen-from-the-start · S), which
    gives all four factors below.
    """
    system = torch.eye(q.shape[2], dtype=q.dtype, device=q.device) + (beta * overlap).tril(-1)
    strengths = torch.diag_embed(beta[..., 0])
    solved = torch.linalg.solve_triangular(system, strengths, upper=False, unitriangular=True)
    scores = scores @ solved
    keys = k * entering  # the keys as they meet the state that enters the chunk
    writes = solved.transpose(-1, -2) @ (k * leaving)
    kept = torch.diag_embed(entering[:, :, -1].expand(*q.shape[:2], q.shape[-1]))
    transition = Matrix(kept - writes.transpose(-1, -2) @ keys)
    return Factors(q * entering - scores @ keys, None, writes, None, scores[:, :, None], transition)


def decay_matrix(total: Tensor, dtype: torch.dtype) -> Tensor:
    """e^{γ_t - γ_s} for s ≤ t, else 0: [..., C] float64 to [..., C, C]."""
    return _DecayMatrix.apply(total, dtype)


class _DecayMatrix(torch.autograd.Function):
    """Its own rule: nothing but the result is kept for the backward.

    The differences are exact enough as those of two float32 numbers for each sum, and twice as fast as in float64.
    """

    @staticmethod
    def forward(ctx, total, dtype):
        high = total.to(dtype)
        matrix = high[..., :, None] - high[..., None, :]
        if dtype != total.dtype:
            low = (total - high).to(dtype)
            matrix.add_(low[..., :, None]).sub_(low[..., None, :])
        # not in place to the end: compiled by torch 2.11, what is saved would be as it was before
        matrix = matrix.clamp_(max=0).exp_().tril()
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    @once_differentiable
    @autocast.outside
    def backward(ctx, grad):
        (matrix,) = ctx.saved_tensors
        weighted = grad * matrix
        return weighted.sum(-1, dtype=torch.float64) - weighted.sum(-2, dtype=torch.float64), None


class _ChannelScores(torch.autograd.Function):
    """How rows see each other with a decay per channel: Σ_k q_tk k_sk e^{γ_tk - γ_sk} for s ≤ t, else 0.

    By halves: the right half of a block sees the left one through the end of the left one, so that both exponents are
    ≤ 0 however strong the decay is; e^{-γ} would overflow. Both are sums of logs, from the end of the left half on and
    up to it, and those of a block are made of those of its halves: nothing is subtracted.

    Its own rule: the halves of every size are cheaper to make again than to keep.
    """

    @staticmethod
    def forward(ctx, log_decay, k, *queries):
        """log_decay, in a dtype of its own, and all others [A, N, C, K].

        Returns γ and Γ - γ, in that dtype, and for all of the queries [A, N, C, C].
        """
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(log_decay, k, *queries)
        scores = [torch.diag_embed((q * k).sum(-1)) for q in queries]
        since, until = log_decay.clone(memory_format=torch.contiguous_format), log_decay.new_zeros(k.shape)
        for size, read_decay, write_decay in _halves(since, until, k.dtype):
            writes = _half(k, size, 0) * write_decay
            for q, target in zip(queries, scores, strict=True):
                read = _dot(_half(q, size, 1) * read_decay, writes)
                _left_of_blocks(target, size).copy_(read.movedim(2, -1))
        return since, until, *scores

    @staticmethod
    @once_differentiable
    @autocast.outside
    def backward(ctx, d_since, d_until, *d_scores):
        log_decay, k, *queries = ctx.saved_tensors
        seen = [(q, grad) for q, grad in zip(queries, d_scores, strict=True) if grad is not None]
        d_k, d_log = k.new_zeros(k.shape), log_decay.new_zeros(k.shape)
        d_seen = []
        for q, grad in seen:
            diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]
            d_seen.append(diagonal * k)
            d_k.addcmul_(diagonal, q)
        since, until = log_decay.clone(memory_format=torch.contiguous_format), log_decay.new_zeros(k.shape)
        for size, read_decay, write_decay in _halves(since, until, k.dtype) if seen else ():
            writes = _half(k, size, 0) * write_decay
            reads = [_half(q, size, 1) * read_decay for q, _ in seen]
            weights = [_left_of_blocks(grad, size).movedim(-1, 2) for _, grad in seen]
            d_reads = [_mix(each, writes) for each in weights]
            d_writes = _total(_mix(each.mT, read) for each, read in zip(weights, reads, strict=True))
            for d_q, d_read in zip(d_seen, d_reads, strict=True):
                _half(d_q, size, 1).addcmul_(d_read, read_decay)
            _half(d_k, size, 0).addcmul_(d_writes, write_decay)
            d_since_middle = _total(d_read * read for d_read, read in zip(d_reads, reads, strict=True))
            _add_since_gradient(_half(d_log, size, 1), d_since_middle)
            _add_until_gradient(_half(d_log, size, 0), d_writes * writes)
        if d_since is not None:
            _add_since_gradient(d_log, d_since)
        if d_until is not None:
            _add_until_gradient(d_log, d_until)
        found = iter(d_seen)
        return d_log, d_k, *(None if grad is None else next(found) for grad in d_scores)


def _halves(since: Tensor, until: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The halves of all blocks of a chunk, from one row up to half of the chunk.

    Args:
        since: [A, N, C, K] the log decays; in the end γ.
        until: as many zeros; in the end Γ - γ.
        dtype: of the decays.

    Yields:
        The number of rows of a half; how queries of right halves and keys of left ones have decayed where they meet.
    """
    size = 1
    while size < since.shape[2]:
        of_left, to_read, to_write = _half(since, size, 0), _half(since, size, 1), _half(until, size, 0)
        yield size, to_read.exp().to(dtype), to_write.exp().to(dtype)
        to_write.add_(to_read[..., -1:, :])
        to_read.add_(of_left[..., -1:, :])
        size *= 2


def _half(x: Tensor, size: int, side: int) -> Tensor:
    """Left (0) or right (1) halves [A, N, blocks, size, K] of the blocks of twice `size` rows, as a view."""
    return x.unflatten(2, (-1, 2, size))[:, :, :, side]


def _left_of_blocks(scores: Tensor, size: int) -> Tensor:
    """Where right halves see left ones, [A, N, size, size, blocks], as a view of scores [A, N, C, C]."""
    blocks = scores.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ for [..., rows, K]."""
    return (x * y).sum(-1, keepdim=True) if x.shape[-2] == 1 else x @ y.mT


def _mix(weights: Tensor, x: Tensor) -> Tensor:
    """weights [..., rows, rows] times x [..., rows, K]."""
    if x.shape[-2] > FEW:
        return weights @ x
    mixed = weights[..., :1] * x[..., :1, :]
    for row in range(1, x.shape[-2]):
        mixed.addcmul_(weights[..., row : row + 1], x[..., row : row + 1, :])
    return mixed


def _add_since_gradient(total: Tensor, grad: Tensor) -> None:
    """Adds to `total` the gradient of log decays of whose sums, up to every row of [..., rows, K], `grad` is that."""
    rows = grad.shape[-2]
    if rows > FEW:
        _add_product(total, total.new_ones(rows, rows).triu(), grad)
        return
    total.add_(grad)
    for later in range(1, rows):
        total[..., :-later, :].add_(grad[..., later:, :])


def _add_until_gradient(total: Tensor, grad: Tensor) -> None:
    """The same for sums over all later rows."""
    rows = grad.shape[-2]
    if rows > FEW:
        _add_product(total, total.new_ones(rows, rows).tril(-1), grad)
        return
    for earlier in range(1, rows):
        total[..., earlier:, :].add_(grad[..., :-earlier, :])


def _add_product(total: Tensor, matrix: Tensor, grad: Tensor) -> None:
    """total += matrix @ grad."""
    batch = total.shape[:-2].numel()
    rows = total.view(batch, *total.shape[-2:])
    rows.baddbmm_(matrix.expand(batch, -1, -1), grad.to(total.dtype).reshape(rows.shape))
