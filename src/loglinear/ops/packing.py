"""Where sequences begin and end: read on the host and checked there, once per tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class _Seen:
    """What the host has read of a tensor, for as long as that lives and is not written to.

    Layers of a model are given the same `cu_seqlens` one after the other: the host waits for the device once.
    """

    def __init__(self):
        self._read = WeakIdKeyDictionary()

    def values(self, x: Tensor) -> list[int]:
        if x.is_inference():  # counts no writes
            return x.tolist()
        if x not in self._read or self._read[x][0] != x._version:
            self._read[x] = x._version, x.tolist()
        return self._read[x][1]


_seen = _Seen()


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def sequence_bounds(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The bounds as ints, after checking that they start at 0, never fall, and end at `tokens`.

    Raises:
        ValueError: they do not.
    """
    bounds = _seen.values(cu_seqlens)
    if bounds[0] != 0 or bounds[-1] != tokens or any(lo > hi for lo, hi in zip(bounds, bounds[1:], strict=False)):
        shown = bounds if len(bounds) <= 12 else [*bounds[:6], "…", *bounds[-5:]]
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of q, got [{', '.join(map(str, shown))}]")
    return bounds


def start_positions(positions: Tensor) -> list[int]:
    """The positions of a state as ints, after checking that none is negative.

    Raises:
        ValueError: one is.
    """
    starts = _seen.values(positions)
    if any(start < 0 for start in starts):
        raise ValueError(f"the state's positions must be at least 0, got {starts}")
    return starts


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """`sequence_bounds`, for who needs no more than that they are right.

    While a CUDA graph is captured the host cannot wait: wrong bounds then stop the device, when the graph is run.
    """
    if _capturing(cu_seqlens):
        rising = (cu_seqlens[0] == 0).logical_and(cu_seqlens[-1] == tokens).logical_and((cu_seqlens.diff() >= 0).all())
        torch._assert_async(rising, f"cu_seqlens must rise from 0 to the {tokens} tokens of q")
    else:
        sequence_bounds(cu_seqlens, tokens)


def check_positions(positions: Tensor) -> None:
    """`start_positions`, in the same way."""
    if _capturing(positions):
        torch._assert_async((positions >= 0).all(), "the state's positions must be at least 0")
    else:
        start_positions(positions)
