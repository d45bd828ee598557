"""The state of log-linear attention: a set of buckets and, for every row, how many tokens it has seen.

Legend: B rows (sequences), L levels, H heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.window import Window


class FenwickState(NamedTuple):
    """What the token at `positions` finds: matrix-valued states by level, after the carry.

    For L > 1 bucket 0 is empty, and bucket l ≥ 1 is occupied iff bit l - 1 of the position is set (the last one: iff
    any bit from L - 2 up is). Buckets that are not occupied are zero. Every row has its own position, so rows of a
    ragged batch each have their own partition.

    A state may owe its buckets their decays: a step with one decay per head then adds to a number per bucket instead of
    multiplying the bucket, and writes only what merges. In such a state empty buckets hold anything that is finite.
    `settled` gives the plain state that it stands for, `with_pending` begins one.

    Or a state has a window: its newest tokens are kept as they are, and its buckets are those of the position where the
    window starts (see `loglinear.window`). A step then writes buckets only where a window ends. Empty buckets hold
    anything here, too, and `settled` gives the plain state; `with_window` begins one.

    Attributes:
        buckets: [B, L, H, K, V], float32 (float64 for float64 inputs) unless the caller chose otherwise.
        positions: [B] int64, tokens seen so far.
        log_decays: [B, L, H] float32, natural log of what each bucket is still to be multiplied by, zero for empty
            buckets; or None: nothing is pending.
        window: the newest tokens, or None. Not together with `log_decays`.

    Example:
        >>> state = FenwickState.zeros(batch=2, num_levels=5, num_heads=4, key_dim=16, value_dim=32)
        >>> state.num_levels, state.nbytes
        (5, 81936)
    """

    buckets: Tensor
    positions: Tensor
    log_decays: Tensor | None = None
    window: Window | None = None

    @classmethod
    def zeros(
        cls,
        batch: int,
        num_levels: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> FenwickState:
        """The state before the first token.

        Raises:
            ValueError: a size is smaller than 1 (the batch may be 0).
        """
        sizes = {"num_levels": num_levels, "num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if batch < 0:
            raise ValueError(f"batch must be at least 0, got {batch}")
        return cls(
            torch.zeros(batch, num_levels, num_heads, key_dim, value_dim, dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @property
    def num_levels(self) -> int:
        return self.buckets.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are allocated (empty buckets included)."""
        return sum(x.nbytes for _, x in self.named_tensors())

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """All tensors that there are, by name, those of a window as "window.keys"."""
        own = {name: x for name, x in self._asdict().items() if name != "window" and x is not None}
        kept = {} if self.window is None else {f"window.{name}": x for name, x in self.window.named_tensors()}
        return list({**own, **kept}.items())

    def base(self) -> Tensor:
        """Positions of which the buckets are, [B]: those of the rows, or where their windows start."""
        return self.positions if self.window is None else self.window.base(self.positions)

    def occupied(self) -> Tensor:
        """Which buckets hold tokens: bool [B, L]."""
        return fenwick.occupied(self.base(), self.num_levels)

    def settled(self) -> FenwickState:
        """The plain state, a copy: pending decays applied, the tokens of a window in buckets, empty buckets zero.
        Itself if it is plain.

        Example:
            >>> owed = torch.tensor([0, -0.6931472, 0]).view(1, 3, 1)
            >>> state = FenwickState(torch.ones(1, 3, 1, 1, 1), torch.tensor([3]), owed)
            >>> state.settled().buckets.flatten().tolist()
            [0.0, 0.5, 1.0]
        """
        if self.window is not None:
            buckets = self.window.into(self.buckets, self.base(), self.positions)
            return FenwickState(buckets.to(self.buckets.dtype), self.positions.clone())
        if self.log_decays is None:
            return self
        owed = self.log_decays.to(torch.promote_types(self.buckets.dtype, torch.float32)).exp()
        decayed = (self.buckets * owed[..., None, None]).to(self.buckets.dtype)
        held = torch.where(self.occupied()[:, :, None, None, None], decayed, 0)
        return FenwickState(held, self.positions.clone())

    def with_pending(self) -> FenwickState:
        """The same state, memory and all, with room for decays to be owed: `log_decays` of zeros.

        Itself if it has them, or one level only: that bucket takes in every token and is written at every step anyway.
        A window comes to its end first.
        """
        if self.window is not None:
            return self.settled().with_pending()
        if self.log_decays is not None or self.num_levels == 1:
            return self
        owed = torch.zeros(self.buckets.shape[:3], dtype=torch.float32, device=self.buckets.device)
        return self._replace(log_decays=owed)

    def with_window(
        self, length: int, *, num_groups: int, decay: Literal["head", "channel"] | None = None, delta: bool = False
    ) -> FenwickState:
        """The same state, memory and all, with room for its next tokens, up to every multiple of `length`.

        What is pending is applied first, and a window that there is comes to its end. The room is for the tokens of one
        kind of mixer:

        Args:
            length: tokens of a window, a power of two (the kernel has 16, 32 and 64).
            num_groups: groups G of keys.
            decay: whether a token has a decay per "head", per "channel", or None.
            delta: whether it has a `beta`.

        Raises:
            ValueError: a length that is no power of two, or groups that do not divide the heads.

        Example:
            >>> state = FenwickState.zeros(batch=2, num_levels=5, num_heads=4, key_dim=16, value_dim=32)
            >>> state.with_window(16, num_groups=4, decay="head", delta=True).window.keys.shape
            torch.Size([2, 4, 16, 16])
        """
        plain = self.settled()
        return plain._replace(window=Window.at(plain.positions, plain.buckets, length, num_groups, decay, delta))

    def like(self, other: FenwickState) -> FenwickState:
        """This state in the form of `other`, which may have other rows: with a window of the same kind, with pending
        decays, or plain. Itself where it has that form.
        """
        if other.window is not None:
            if self.window is not None and self.window.kind == other.window.kind:
                return self
            plain = self.settled()
            return plain._replace(window=other.window.emptied(plain.positions))
        return self.settled() if other.log_decays is None or self.num_levels == 1 else self.with_pending()

    def map(self, function: Callable[[Tensor], Tensor]) -> FenwickState:
        """A state of what `function` makes of each tensor."""
        owed = None if self.log_decays is None else function(self.log_decays)
        window = None if self.window is None else self.window.map(function)
        return FenwickState(function(self.buckets), function(self.positions), owed, window)

    def select(self, indices: Tensor) -> FenwickState:
        """The rows `indices` [M] int64 as a new state (for example the beams that survive)."""
        return self.map(lambda x: x.index_select(0, indices))

    @classmethod
    def cat(cls, states: Sequence[FenwickState]) -> FenwickState:
        """The rows of several states, one after the other, as a new state: the opposite of `select`. Each row keeps
        its position.

        Raises:
            ValueError: no states, or states that differ in more than their rows.

        Example:
            >>> first, second = (FenwickState.zeros(batch, 5, 4, 16, 32) for batch in (2, 1))
            >>> FenwickState.cat([first, second]).positions.tolist()
            [0, 0, 0]
        """
        if not states:
            raise ValueError("got no states, wanted at least one")
        kinds = [(tuple(state.buckets.shape[1:]), state.buckets.dtype, state.buckets.device) for state in states]
        for row, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ValueError(
                    "states to be joined must have the same levels, heads, widths, dtype and device: got "
                    f"{', '.join(map(str, kinds[0]))} and, at index {row}, {', '.join(map(str, kind))}"
                )
        keeping = [state for state in states if state.window is not None]
        keeping = keeping or [state for state in states if state.log_decays is not None]
        if keeping:
            states = [state.like(keeping[0]) for state in states]
        owed = [state.log_decays for state in states if state.log_decays is not None]
        windows = [state.window for state in states if state.window is not None]
        return cls(
            torch.cat([state.buckets for state in states]),
            torch.cat([state.positions for state in states]),
            torch.cat(owed) if owed else None,
            Window.cat(windows) if windows else None,
        )

    def clone(self) -> FenwickState:
        return self.map(torch.clone)

    def detach(self) -> FenwickState:
        """The same memory without its history (as torch's `detach`)."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FenwickState:
        """Moved to `device`, buckets converted to `dtype`; positions stay int64, pending decays float32, windows what
        they are."""
        moved = self.map(lambda x: x.to(device=device))
        return moved._replace(buckets=moved.buckets.to(dtype=dtype))
