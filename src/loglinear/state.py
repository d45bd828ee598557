"""The state of log-linear attention: a set of buckets and, for every row, how many tokens it has seen.

Legend: B rows (sequences), L levels, H heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear import fenwick


class FenwickState(NamedTuple):
    """What the token at `positions` finds: matrix-valued states by level, after the carry.

    For L > 1 bucket 0 is empty, and bucket l ≥ 1 is occupied iff bit l - 1 of the position is set (the last one: iff
    any bit from L - 2 up is). Buckets that are not occupied are zero. Every row has its own position, so rows of a
    ragged batch each have their own partition.

    Attributes:
        buckets: [B, L, H, K, V], float32 (float64 for float64 inputs) unless the caller chose otherwise.
        positions: [B] int64, tokens seen so far.

    Example:
        >>> state = FenwickState.zeros(batch=2, num_levels=5, num_heads=4, key_dim=16, value_dim=32)
        >>> state.num_levels, state.nbytes
        (5, 81936)
    """

    buckets: Tensor
    positions: Tensor

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
        """Bytes of buckets and positions as they are allocated (empty buckets included)."""
        return self.buckets.nbytes + self.positions.nbytes

    def occupied(self) -> Tensor:
        """Which buckets hold tokens: bool [B, L]."""
        return fenwick.occupied(self.positions, self.num_levels)

    def select(self, indices: Tensor) -> FenwickState:
        """The rows `indices` [M] int64 as a new state (for example the beams that survive)."""
        return FenwickState(self.buckets.index_select(0, indices), self.positions.index_select(0, indices))

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
        return cls(torch.cat([state.buckets for state in states]), torch.cat([state.positions for state in states]))

    def clone(self) -> FenwickState:
        return FenwickState(self.buckets.clone(), self.positions.clone())

    def detach(self) -> FenwickState:
        """The same memory without its history (as torch's `detach`)."""
        return FenwickState(self.buckets.detach(), self.positions)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FenwickState:
        """Moved to `device`, buckets converted to `dtype`; positions stay int64."""
        return FenwickState(self.buckets.to(device=device, dtype=dtype), self.positions.to(device=device))
