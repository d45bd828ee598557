"""Where sequences begin and end: read on the host and checked there, once per tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FURTHEST = 2**62  # positions below this, and the lengths of sequences, add up in 64 bits


class Known:
    """What is known of the values of tensors, for as long as these live and are not written to, as far as torch knows.

    Layers of a model are given the same `cu_seqlens` one after the other: what takes the host's time, or its wait for
    the device, is done once.
    """

    def __init__(self):
        self._facts = WeakIdKeyDictionary()

    def of(self, x: Tensor) -> dict:
        """To read from, and to write to."""
        if x.is_inference():  # which counts no writes
            return {}
        known = self._facts[x] if x in self._facts else None
        if known is None or known[0] != x._version:
            known = self._facts[x] = x._version, {}
        return known[1]


_checked = Known()  # a copy of them, by the number of tokens


def check_packing(cu_seqlens: Tensor) -> None:
    """Its dtype and shape, before anybody reads its values.

    Raises:
        TypeError, ValueError: they are wrong.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [number of sequences + 1], got shape {list(cu_seqlens.shape)}")


def capturing(x: Tensor) -> bool:
    """Whether what is done to a tensor now is done again at every replay of a CUDA graph, with other values maybe."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def sequence_bounds(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The bounds as ints, after checking that they start at 0, never fall, and end at `tokens`.

    Raises:
        ValueError: they do not.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(lo > hi for lo, hi in zip(bounds, bounds[1:], strict=False)):
        shown = bounds if len(bounds) <= 12 else [*bounds[:6], "…", *bounds[-5:]]
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens, got [{', '.join(map(str, shown))}]")
    return bounds


def start_positions(positions: Tensor) -> list[int]:
    """The positions of a state as ints, after checking that none is negative or too large to count from.

    Raises:
        ValueError: one is.
    """
    starts = positions.tolist()
    if any(not 0 <= start < FURTHEST for start in starts):
        raise ValueError(f"the state's positions must be at least 0 and below {FURTHEST}, got {starts}")
    return starts


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """`sequence_bounds`, for who needs no more than that they are right.

    The host waits for tensors that it sees for the first time. Of others the device checks that they are what they
    were, and stops if they were changed behind torch's back; while a CUDA graph is captured, where nobody can wait, it
    checks what they are.
    """
    if capturing(cu_seqlens):
        rising = (cu_seqlens[0] == 0).logical_and(cu_seqlens[-1] == tokens).logical_and((cu_seqlens.diff() >= 0).all())
        torch._assert_async(rising, f"cu_seqlens must rise from 0 to the {tokens} tokens")
        return
    checked = _checked.of(cu_seqlens)
    if tokens in checked:
        torch._assert_async((cu_seqlens == checked[tokens]).all(), "cu_seqlens was changed, and torch was not told")
    else:
        sequence_bounds(cu_seqlens, tokens)
        checked[tokens] = cu_seqlens.clone()


def check_positions(positions: Tensor) -> None:
    """`start_positions`; the device checks those that the host knows."""
    checked = {} if capturing(positions) else _checked.of(positions)
    if checked or capturing(positions):
        right = (positions >= 0).logical_and(positions < FURTHEST).all()
        torch._assert_async(right, f"the state's positions must be at least 0 and below {FURTHEST}")
    else:
        start_positions(positions)
        checked["positions"] = True
