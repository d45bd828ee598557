"""Where sequences begin and end: read on the host and checked there, once per tensor."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FURTHEST = 2**62  # positions below this, and the lengths of sequences, add up in 64 bits


class _Checked:
    """Tensors that the host has looked at, for as long as they live and are not written to.

    Layers of a model are given the same `cu_seqlens` one after the other: the host waits for the device once.
    """

    def __init__(self):
        self._versions = WeakIdKeyDictionary()

    def __contains__(self, x: Tensor) -> bool:
        return not x.is_inference() and x in self._versions and self._versions[x] == x._version

    def add(self, x: Tensor) -> None:
        if not x.is_inference():  # which counts no writes
            self._versions[x] = x._version


_checked = _Checked()


class _Known:
    """Values of tensors that the host has sent to a device, for as long as they live and are not written to."""

    def __init__(self):
        self._values = WeakIdKeyDictionary()

    def get(self, x: Tensor) -> list[int] | None:
        if x.is_inference() or capturing(x) or x not in self._values:
            return None
        version, values = self._values[x]
        return list(values) if version == x._version else None

    def add(self, x: Tensor, values: Sequence[int]) -> None:
        if not x.is_inference():
            self._values[x] = x._version, tuple(values)


_known = _Known()


def remember_bounds(cu_seqlens: Tensor, bounds: Sequence[int]) -> None:
    """Tells the host the values of a `cu_seqlens` on a device, so that it does not wait for them to come back.

    They are believed until torch sees that the tensor is written to: for who sends them there and lets nobody change
    them behind torch's back. What is computed depends on them: nothing is launched for sequences longer than these.
    """
    _known.add(cu_seqlens, bounds)


def told_bounds(cu_seqlens: Tensor) -> list[int] | None:
    """The values, if `remember_bounds` was told them and they still hold; the host never waits."""
    return _known.get(cu_seqlens)


class _Plans:
    """What the last call on a tensor of bounds has computed from it, for the layers of a model and their backward: see
    `unchanging_bounds`."""

    def __init__(self):
        self._plans = WeakIdKeyDictionary()
        self._local = threading.local()

    @property
    def scope(self) -> object | None:
        """Which `unchanging_bounds` this thread is in."""
        return getattr(self._local, "scope", None)

    @scope.setter
    def scope(self, scope: object | None) -> None:
        self._local.scope = scope

    def get(self, cu_seqlens: Tensor, what: tuple, compute: Callable[[], Any], backward: bool = False) -> Any:
        """`compute()`, or what it gave before for this tensor and `what`: in the same scope, or, in a `backward`,
        whenever the forward was (also for a forward that a backward runs again: a checkpoint)."""
        if cu_seqlens.is_inference() or capturing(cu_seqlens):
            return compute()
        backward = backward or (self.scope is None and torch._C._current_graph_task_id() >= 0)
        if cu_seqlens.is_cuda:  # another stream would not wait for what this one computes
            what = (*what, torch.cuda.current_stream(cu_seqlens.device).cuda_stream)
        plan = self._plans[cu_seqlens] if cu_seqlens in self._plans else None
        version, scope = cu_seqlens._version, self.scope
        if not backward and scope is None:
            self._plans.pop(cu_seqlens, None)  # it may have been written to since
            return compute()
        if plan is None or plan[0] != version or not (backward or plan[1] is scope):
            plan = version, scope, {}
            if not backward:
                self._plans[cu_seqlens] = plan
        if what not in plan[2]:
            with torch.inference_mode(False), torch.no_grad():  # a training may be given it later
                plan[2][what] = compute()
        return plan[2][what]


plans = _Plans()


@contextlib.contextmanager
def unchanging_bounds() -> Iterator[None]:
    """Within it nobody writes to a `cu_seqlens`, also not in ways that torch does not see (a broadcast, a replayed
    graph): what layer after layer would compute from it, some hundred small kernels, is computed once."""
    before, plans.scope = plans.scope, object()
    try:
        yield
    finally:
        plans.scope = before


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
    known = _known.get(cu_seqlens)
    bounds = cu_seqlens.tolist() if known is None else known
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

    The host waits for tensors that it sees for the first time, unless it was told their values (`remember_bounds`),
    which it checks then. Others (and all of them while a CUDA graph is captured, where it cannot wait) are checked by
    the device, which stops if they were changed behind torch's back.
    """
    plans.get(cu_seqlens, ("checked", tokens), lambda: _check_bounds(cu_seqlens, tokens))


def _check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    if _known.get(cu_seqlens) is None and (cu_seqlens in _checked or capturing(cu_seqlens)):
        rising = (cu_seqlens[0] == 0).logical_and(cu_seqlens[-1] == tokens).logical_and((cu_seqlens.diff() >= 0).all())
        torch._assert_async(rising, f"cu_seqlens must rise from 0 to the {tokens} tokens")
    else:
        sequence_bounds(cu_seqlens, tokens)
        _checked.add(cu_seqlens)


def check_positions(positions: Tensor) -> None:
    """`start_positions`, in the same way."""
    if positions in _checked or capturing(positions):
        right = (positions >= 0).logical_and(positions < FURTHEST).all()
        torch._assert_async(right, f"the state's positions must be at least 0 and below {FURTHEST}")
    else:
        start_positions(positions)
        _checked.add(positions)
