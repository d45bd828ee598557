"""What packed sequences look like on the host."""

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
