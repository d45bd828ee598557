"""Where each token of a packed or padded batch belongs.

    B rows · T tokens a row · S packed sequences · N packed tokens

A packed batch is `[1, N, ...]` with `cu_seqlens [S+1]`: sequence `s` holds the tokens from `cu_seqlens[s]` up
to `cu_seqlens[s+1]`. A padded batch is brought to the same form by dropping its padding (`pack_padded`), so
that a layer knows one kind of raggedness only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.ops.packing import check_packing, sequence_bounds


def token_rows(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Index of the sequence that each packed token belongs to, `[N]` int64. No device sync; empty sequences
    are skipped over."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, tokens, right=True) - 1


def token_positions(
    batch: int, length: int, start: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Position of every token in its own sequence, `[B, T]` int64.

    Args:
        batch, length: shape of the batch (`1, N` when packed).
        start: `[B]` (`[S]` when packed) tokens that each row has seen before, or None for 0.
        cu_seqlens: `[S+1]`, or None when every row is one sequence.
        device: where to make the result.
    """
    offsets = torch.arange(length, device=device)
    if cu_seqlens is None:
        positions = offsets.expand(batch, length)
        return positions if start is None else positions + start[:, None]
    rows = token_rows(cu_seqlens, length)
    positions = offsets - cu_seqlens.to(torch.int64)[rows]
    if start is not None:
        positions = positions + start[rows]
    return positions[None]


class _TakeOnce(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, places: Tensor) -> Tensor:
        return x.index_select(1, places)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, places = inputs
        ctx.save_for_backward(places)
        ctx.length = x.shape[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        empty = grad.new_zeros(grad.shape[0], ctx.length, *grad.shape[2:])
        return empty.index_copy(1, places, grad), None


def take_once(x: Tensor, places: Tensor) -> Tensor:
    """`x[:, places]` of `places [N]` that are all different: the gradient is copied to them, and not, as that of an
    index, sorted and added up."""
    return _TakeOnce.apply(x, places)


class PaddedBatch(NamedTuple):
    """A padded batch `[B, T]` in packed form.

    Attributes:
        cu_seqlens: `[B+1]` int32, one sequence per row (empty for a row of padding only).
        token_indices: `[N]` int64, index of each real token in the flattened `[B*T]` batch.
        source: `[B, T]` int64, for each place of the batch the packed token whose output it shows: its own,
            or for padding that of the last real token before it. Where this call has none before it, it is
            `N + row`, which stands for what the row gave before this call.
    """

    cu_seqlens: Tensor
    token_indices: Tensor
    source: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[1, N, ...]`."""
        return x.flatten(0, 1).index_select(0, self.token_indices)[None]

    def unpack(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """`[1, N, ...]` to `[B, T, ...]`. Padding repeats the last output of its row before it, so that the last
        column is every row's newest output whichever side the padding is on. `before [B, ...]` are the rows'
        newest outputs before this call; None for zeros."""
        if before is None:
            before = x.new_zeros(self.source.shape[0], *x.shape[2:])
        return torch.cat((x[0], before))[self.source]


def pack_padded(attention_mask: Tensor) -> PaddedBatch | None:
    """The packed form of a padded batch, or None when there is no padding.

    One device sync (the number of real tokens decides shapes); the check for holes rides on it.

    Args:
        attention_mask: `[B, T]`, bool or numbers, nonzero at real tokens.
    Raises:
        ValueError: the real tokens of a row are not contiguous.
    """
    real = attention_mask.ne(0)
    batch, length = real.shape
    previous = torch.nn.functional.pad(real[:, :-1], (1, 0), value=False)
    starts = torch.logical_and(real, torch.logical_not(previous)).sum(1)
    most_pieces, num_tokens = torch.stack((starts.max(), real.sum())).tolist()
    if most_pieces > 1:
        row = int(starts.argmax())
        raise ValueError(
            "attention_mask must mark one contiguous run of real tokens in every row, but row "
            f"{row} has {int(starts[row])} runs: remove the masked tokens from the input instead"
        )
    if num_tokens == batch * length:
        return None
    counts = real.sum(1)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    token_indices = real.flatten().nonzero().squeeze(1)
    seen = real.cumsum(1)
    before = num_tokens + torch.arange(batch, device=real.device)[:, None]
    source = torch.where(seen > 0, cu_seqlens[:-1, None].to(torch.int64) + seen - 1, before)
    return PaddedBatch(cu_seqlens, token_indices, source)


class SequenceRows(NamedTuple):
    """Some of the sequences of a packed batch, laid out as rows of one length.

    Attributes:
        sequences: `[R]` int64, which sequences.
        indices: `[R, M]` int64, packed token of each place (0 where there is none).
        valid: `[R, M]` bool, whether the place holds a token.
    """

    sequences: Tensor
    indices: Tensor
    valid: Tensor


class PackedLayout:
    """A host-side plan for operators that know no packing (softmax attention): the sequences of a packed
    batch as padded rows.

    Reads `cu_seqlens` back to the host once; make it once for all layers of a forward pass.

    Args:
        cu_seqlens: `[S+1]` int32 or int64, from 0 up to `num_tokens`, never falling.
        num_tokens: N.

    Raises:
        TypeError, ValueError: `cu_seqlens` is not that.
    """

    def __init__(self, cu_seqlens: Tensor, num_tokens: int) -> None:
        check_packing(cu_seqlens)
        self.device = cu_seqlens.device
        self.bounds = sequence_bounds(cu_seqlens, num_tokens)
        self.lengths = [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]
        self._buckets: list[SequenceRows] | None = None

    def _rows(self, sequences: list[int]) -> SequenceRows:
        begins = torch.tensor([self.bounds[s] for s in sequences])
        lengths = torch.tensor([self.lengths[s] for s in sequences])
        offsets = torch.arange(int(lengths.max()))
        valid = offsets < lengths[:, None]
        indices = torch.where(valid, begins[:, None] + offsets, 0)
        rows = SequenceRows(torch.tensor(sequences), indices, valid)
        return SequenceRows(*(part.to(self.device) for part in rows))

    def all_rows(self) -> SequenceRows:
        """Every sequence, in order, as one block of rows as long as the longest."""
        return self._rows(list(range(len(self.lengths))))

    def buckets(self) -> list[SequenceRows]:
        """The non-empty sequences in blocks of similar lengths (within a factor of two), so that padding at
        most doubles the work and the number of blocks grows with the logarithm of the longest."""
        if self._buckets is None:
            filled = [sequence for sequence, length in enumerate(self.lengths) if length > 0]
            by_length = sorted(filled, key=lambda sequence: -self.lengths[sequence])
            groups: list[list[int]] = []
            for sequence in by_length:
                if groups and 2 * self.lengths[sequence] > self.lengths[groups[-1][0]]:
                    groups[-1].append(sequence)
                else:
                    groups.append([sequence])
            self._buckets = [self._rows(group) for group in groups]
        return self._buckets
