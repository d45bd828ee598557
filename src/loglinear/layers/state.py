"""What a mixer carries from one call to the next.

    B rows (or packed sequences) · W convolution taps · C convolution channels · S cache columns · H heads · D
    head width

A mixer *consumes* the state it is given: it may update the tensors in place (decoding does) and the caller
goes on with the state that it returns. `clone()` a state to keep it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.state import FenwickState


@dataclass
class MixerState:
    """Tensors whose first dimension is the row; the operations that every mixer's state shares."""

    def _apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, FenwickState):
                changed[field.name] = value.map(function)
        return replace(self, **changed)

    def tensors(self) -> list[Tensor]:
        """All tensors of the state, in a fixed order."""
        found: list[Tensor] = []
        self._apply(lambda tensor: found.append(tensor) or tensor)
        return found

    def select(self, rows: Tensor) -> Self:
        """A new state with the given rows (`[R]` int64; repeats allowed): reordering for beam search,
        repeating, dropping."""
        return self._apply(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """A new state with the rows of `states`, one after the other.

        Raises:
            ValueError: states of different kinds, widths, dtypes or devices.
        """
        cls._check_kinds(states)
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(state, field.name) for state in states]
            if isinstance(values[0], Tensor):
                joined[field.name] = _cat(values, field.name)
            elif isinstance(values[0], FenwickState):
                joined[field.name] = FenwickState.cat(values)
        return replace(states[0], **joined)

    @classmethod
    def _check_kinds(cls, states: Sequence["MixerState"]) -> None:
        """Refuses states of other kinds than this one."""
        kinds = sorted({type(state).__name__ for state in states} | {cls.__name__})
        if len(kinds) > 1:
            raise ValueError(f"states to be joined must be of one kind, got {' and '.join(kinds)}")

    def clone(self) -> Self:
        return self._apply(torch.clone)

    def detach(self) -> Self:
        return self._apply(torch.Tensor.detach)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The state on another device (dtypes are kept)."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def copy_(self, other: Self) -> Self:
        """Overwrites the tensors of this state with those of `other`, which must have the same shapes; the
        addresses stay."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)
        return self

    @property
    def positions(self) -> Tensor:
        """`[B]` int64: tokens that each row has seen."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its positions are")

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, including places that are allocated and not yet occupied."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def _cat(tensors: Sequence[Tensor], name: str) -> Tensor:
    """The rows of all tensors; refuses those that differ in more than their rows, calling them `name`."""
    kinds = [None if tensor is None else (tuple(tensor.shape[1:]), tensor.dtype, tensor.device) for tensor in tensors]
    for kind in kinds:
        if kind != kinds[0]:
            raise ValueError(f"{name} of states to be joined must be alike but for its rows: got {kinds[0]} and {kind}")
    return torch.cat(list(tensors))


@dataclass
class RecurrentState(MixerState):
    """State of a recurrent mixer; every shape is fixed.

    Attributes:
        convolution: `[B, W-1, C]` last inputs of the short convolution, or None for a mixer without one.
        fenwick: the operator's state, buckets `[B, L, H, K, V]`, positions `[B]` and what steps keep beside them: the
            buckets' pending decays, or a window of the newest tokens.
    """

    convolution: Tensor | None
    fenwick: FenwickState

    def copy_(self, other: Self) -> Self:
        """As every state's, also where the two keep different things beside their buckets."""
        return super().copy_(replace(other, fenwick=other.fenwick.like(self.fenwick)))

    @property
    def positions(self) -> Tensor:
        return self.fenwick.positions


def overfull(wanted: int, capacity: int, filled: int) -> ValueError:
    """The error for `wanted` more tokens of a row that has `filled` of the `capacity` columns of a static cache."""
    return ValueError(
        f"{wanted} tokens do not fit into a static cache of {capacity} tokens that holds {filled} already: "
        "allocate it for the whole sequence"
    )


@dataclass
class AttentionState(MixerState):
    """Keys and values of a softmax attention layer. Each row is packed to the left, whatever padding it came
    with: token `p` of a row is in column `p`, so that the row's position alone says which columns are real
    and where the next token goes.

    Attributes:
        keys, values: `[B, S, H, D]`.
        seen: `[B]` int64, tokens of each row.
        columns: how many columns may hold tokens of some row, known to the host (all of them if `fixed`).
        fixed: whether S is fixed (a static cache); else S grows as needed.
        filled: of a fixed state, at most how many tokens its fullest row holds, known to the host; None when
            compiled or captured calls, which count nothing on the host, may have added some.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    columns: int = 0
    fixed: bool = False
    filled: int | None = 0

    def copy_(self, other: Self) -> Self:
        self.columns, self.filled = other.columns, other.filled
        return super().copy_(other)

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """As every state's; growing states become as wide as the widest.

        Raises:
            ValueError: also for fixed states of different widths, or fixed and growing ones.
        """
        cls._check_kinds(states)
        widths = {(state.fixed, state.capacity if state.fixed else None) for state in states}
        if len(widths) > 1:
            sizes = sorted({str(state.capacity) if state.fixed else "growing" for state in states})
            raise ValueError(f"attention caches to be joined must have one capacity, got {' and '.join(sizes)}")
        widest = max(state.capacity for state in states)
        joined = super().cat([state.widened(widest) for state in states])
        joined.columns = max(state.columns for state in states)
        counts = [state.filled for state in states]
        joined.filled = None if None in counts else max(count for count in counts if count is not None)
        return joined

    def widened(self, capacity: int) -> Self:
        """This state with at least `capacity` columns, new ones zero."""
        extra = (0, 0, 0, 0, 0, max(0, capacity - self.capacity))
        return replace(self, keys=F.pad(self.keys, extra), values=F.pad(self.values, extra))

    @property
    def positions(self) -> Tensor:
        return self.seen

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def filled_after(self, counts: Tensor | int, most: int) -> int:
        """What `filled` of a fixed state becomes with `counts` (`[B]`, or one number for all rows) more tokens, at
        most `most` in a row. Reads the device only where the host's own count leaves it open whether they fit.

        Raises:
            ValueError: they do not fit.
        """
        if self.filled is not None and self.filled + most <= self.capacity:
            return self.filled + most
        wanted = self.seen + (counts.to(self.seen.device) if isinstance(counts, Tensor) else counts)
        fullest = int(wanted.argmax())
        total, filled = int(wanted[fullest]), int(self.seen[fullest])
        if total > self.capacity:
            raise overfull(total - filled, self.capacity, filled)
        return total

    def reserve(self, counts: Tensor | int, most: int) -> None:
        """Makes room for `counts` (`[B]`, or one number for all rows) more tokens, at most `most` in a row.

        Raises:
            ValueError: they do not fit into a fixed state. Not under `torch.compile` or the capture of a CUDA
                graph: a number that changes with every step would be compiled in.
        """
        if self.fixed:
            captured = torch.compiler.is_compiling() or (self.seen.is_cuda and torch.cuda.is_current_stream_capturing())
            self.filled = None if captured else self.filled_after(counts, most)
            self.columns = self.capacity
            return
        self.columns += most
        missing = self.columns - self.capacity
        if missing > 0:
            # Growing by a quarter keeps the cost of copying per token constant; the first fill is exact.
            extra = missing if self.capacity == 0 else max(missing, 16, self.capacity // 4)
            wider = self.widened(self.capacity + extra)
            self.keys, self.values = wider.keys, wider.values

    def store(self, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Puts `keys`, `values` `[..., H, D]` at (`rows`, `positions`), both broadcastable to `[...]`."""
        if torch.is_grad_enabled() and (keys.requires_grad or self.keys.requires_grad):
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self.keys[rows, positions] = keys.to(self.keys.dtype)
        self.values[rows, positions] = values.to(self.values.dtype)
