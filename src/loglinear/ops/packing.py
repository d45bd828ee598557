"""Where sequences begin and end, read on the host and checked there."""

from __future__ import annotations

from torch import Tensor


def sequence_bounds(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The bounds as ints, after checking that they start at 0, never fall, and end at `tokens`.

    Raises:
        ValueError: they do not.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(lo > hi for lo, hi in zip(bounds, bounds[1:], strict=False)):
        shown = bounds if len(bounds) <= 12 else [*bounds[:6], "…", *bounds[-5:]]
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of q, got [{', '.join(map(str, shown))}]")
    return bounds


def start_positions(positions: Tensor) -> list[int]:
    """The positions of a state as ints, after checking that none is negative.

    Raises:
        ValueError: one is.
    """
    starts = positions.tolist()
    if any(start < 0 for start in starts):
        raise ValueError(f"the state's positions must be at least 0, got {starts}")
    return starts
