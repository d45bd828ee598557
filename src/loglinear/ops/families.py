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

Precision: logs of decays are float64 until they are exponentiated, so that differences of sums lose nothing; only
e^x with x ≤ 0 is ever formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loglinear.fenwick import Index


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
        log_decay: [A, N, C, R], or per channel [A, N, C, 1, K], float64.
        beta: [A, N, C, R]. With beta, and with channel decay, A is H and R is 1.
    """
    if log_decay is None and beta is None:
        return _without_decay(q, k, heads)
    if log_decay is None:
        log_decay = q.new_zeros(1, dtype=torch.float64).expand(*q.shape[:-1], 1)
    total = log_decay.cumsum(2)
    if total.ndim == 5:
        return _channel(q, k, total[:, :, :, 0]) if beta is None else _delta(q, k, total[:, :, :, 0], beta)
    return _scalar(q, k, total) if beta is None else _delta(q, k, total, beta)


def _without_decay(q: Tensor, k: Tensor, heads: int) -> Factors:
    scores = (q @ k.transpose(-1, -2)).tril()[:, :, None]
    none = ScalarDecay(q.new_zeros(*q.shape[:2], heads, dtype=torch.float64))
    return Factors(q, None, k, None, scores.expand(-1, -1, heads, -1, -1), none)


def _scalar(q: Tensor, k: Tensor, total: Tensor) -> Factors:
    end = total[:, :, -1]
    scores = (q @ k.transpose(-1, -2))[:, :, None] * decay_matrix(total.transpose(-1, -2), q.dtype)
    return Factors(q, total, k, (end[:, :, None] - total).exp().to(q.dtype), scores, ScalarDecay(end))


def _channel(q: Tensor, k: Tensor, total: Tensor) -> Factors:
    end = total[:, :, -1]
    reads, writes = q * total.exp().to(q.dtype), k * (end[:, :, None] - total).exp().to(q.dtype)
    return Factors(reads, None, writes, None, channel_scores(q, k, total)[:, :, None], ChannelDecay(end))


def _delta(q: Tensor, k: Tensor, total: Tensor, beta: Tensor) -> Factors:
    """The chunk of the delta rule in the WY form (arXiv 2406.06484; gated: 2412.06464).

    total [A, N, C, 1] for one decay per head, or [A, N, C, K]. With T = (I + tril(diag(β) overlap, -1))⁻¹ diag(β), what
    the rows write is T (v − keys-as-seen-from-the-start · S), which gives all four factors below.
    """
    dtype, chunk, end = q.dtype, q.shape[2], total[:, :, -1:]
    if total.shape[-1] == 1:
        decay = decay_matrix(total[..., 0], dtype)
        scores, overlap = (q @ k.transpose(-1, -2)) * decay, (k @ k.transpose(-1, -2)) * decay
    else:
        scores, overlap = channel_scores(q, k, total), channel_scores(k, k, total)
    system = torch.eye(chunk, dtype=dtype, device=q.device) + (beta * overlap).tril(-1)
    strengths = torch.diag_embed(beta[..., 0])
    solved = torch.linalg.solve_triangular(system, strengths, upper=False, unitriangular=True)
    scores = scores @ solved
    entering = total.exp().to(dtype)
    keys = k * entering  # the keys as they meet the state that enters the chunk
    writes = solved.transpose(-1, -2) @ (k * (end - total).exp().to(dtype))
    kept = torch.diag_embed(end[:, :, 0].exp().to(dtype).expand(*q.shape[:2], q.shape[-1]))
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
    def backward(ctx, grad):
        (matrix,) = ctx.saved_tensors
        weighted = grad * matrix
        return weighted.sum(-1, dtype=torch.float64) - weighted.sum(-2, dtype=torch.float64), None


def channel_scores(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """Σ_k q_tk k_sk e^{γ_tk - γ_sk} for s ≤ t, else 0: [A, N, C, K] to [A, N, C, C].

    By halves: the right half of a block sees the left one through the end of the left one, so that both exponents are
    ≤ 0 however strong the decay is; e^{-γ} would overflow.
    """
    return _ChannelScores.apply(q, k, total)


class _ChannelScores(torch.autograd.Function):
    """Its own rule: the halves of every size are cheaper to make again than to keep."""

    @staticmethod
    def forward(ctx, q, k, total):
        ctx.save_for_backward(q, k, total)
        scores = torch.diag_embed((q * k).sum(-1))
        for size in _halves(q):
            reads, writes, _, _ = _between_halves(q, k, total, size)
            _left_of_blocks(scores, size).copy_((reads @ writes.mT).movedim(2, -1))
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, total = ctx.saved_tensors
        diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]
        d_q, d_k, d_total = diagonal * k, diagonal * q, torch.zeros_like(total)
        for size in _halves(q):
            reads, writes, read_decay, write_decay = _between_halves(q, k, total, size)
            d_scores = _left_of_blocks(grad, size).movedim(-1, 2)
            d_reads, d_writes = d_scores @ writes, d_scores.mT @ reads
            _half(d_q, size, 1).add_(d_reads * read_decay)
            _half(d_k, size, 0).add_(d_writes * write_decay)
            d_read_log, d_write_log = (d_reads * reads).to(total.dtype), (d_writes * writes).to(total.dtype)
            _half(d_total, size, 1).add_(d_read_log)
            _half(d_total, size, 0).sub_(d_write_log)
            _half(d_total, size, 0)[..., -1, :].add_(d_write_log.sum(-2) - d_read_log.sum(-2))
        return d_q, d_k, d_total


def _halves(q: Tensor) -> list[int]:
    """Lengths of the halves: 1, 2, 4 … up to half a chunk."""
    sizes = [1]
    while sizes[-1] < q.shape[2]:
        sizes.append(2 * sizes[-1])
    return sizes[:-1]


def _half(x: Tensor, size: int, side: int) -> Tensor:
    """Left (0) or right (1) halves [A, N, blocks, size, K] of the blocks of twice `size` rows, as a view."""
    return x.unflatten(2, (-1, 2, size))[:, :, :, side]


def _left_of_blocks(scores: Tensor, size: int) -> Tensor:
    """Where right halves see left ones, [A, N, size, size, blocks], as a view of scores [A, N, C, C]."""
    blocks = scores.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)


def _between_halves(q: Tensor, k: Tensor, total: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of right halves and keys of left ones as they meet at the end of the left one; and their decays."""
    left, right = _half(total, size, 0), _half(total, size, 1)
    middle = left[..., -1:, :]
    read_decay, write_decay = (right - middle).exp().to(q.dtype), (middle - left).exp().to(q.dtype)
    return _half(q, size, 1) * read_decay, _half(k, size, 0) * write_decay, read_decay, write_decay
