"""Kernels, and what the first call that launches them does: it compiles all of them side by side.

One after the other, as they are launched, those of the delta rule with its backward take the better part of a minute.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

MOST_THREADS = 16  # compiling lets go of the interpreter's lock nearly all the time

T = TypeVar("T")
_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)
_seen: set[tuple] = set()


class Kernel:
    """What `triton.jit` makes of a function, launched as usual: `name[programs](arguments, options)`."""

    def __init__(self, jitted: Any):
        self.jitted = jitted

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if _compiles_only.get():
            return functools.partial(self.jitted.warmup, grid=grid)
        return self.jitted[grid]


def kernel(**options: Any) -> Callable[[Callable], Kernel]:
    """Makes a kernel of a function, with the options of `triton.jit`."""
    return lambda function: Kernel(triton.jit(function, **options))


def compiled_first(run: Callable[[], T], *what: object) -> T:
    """`run()`, whose kernels are compiled side by side before, if there was no call of the same `what` yet.

    Args:
        run: launches kernels, of which the host reads nothing; for compiling it is called once without launching any.
            It must neither write to what it was given nor take kernels from elsewhere.
        what: decides which kernels there are; what it leaves out is compiled as it is launched. Tensors stand for their
            device, dtype and widths.
    """
    kind = tuple((x.device, x.dtype, x.shape[1:]) if isinstance(x, Tensor) else x for x in what)
    if kind not in _seen:
        _seen.add(kind)
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in what)
        # what is allocated while a graph is captured belongs to the graph
        if on_gpu and not torch.cuda.is_current_stream_capturing():
            _compile_kernels_of(run)
    return run()


def _compile_kernels_of(run: Callable[[], object]) -> None:
    """Compiles, in threads, the kernels that `run` would launch; errors are left to the launch."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    token = _compiles_only.set(True)
    try:
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            run()
    finally:
        _compiles_only.reset(token)
