"""Kernels, and what the first call that launches them does: it compiles all of them side by side.

One after the other, as they are launched, those of the delta rule with its backward take the better part of a minute.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MOST_THREADS = 16  # compiling lets go of the interpreter's lock nearly all the time

MOST_KINDS = 1024  # of launches of a kernel that are remembered
NUMBERS = frozenset((int, float, bool, type(None)))  # arguments that are no tensors
RUN = JITFunction.run  # who puts another in its place later is asked every time

T = TypeVar("T")
_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)
_seen: set[tuple] = set()


class Kernel:
    """What `triton.jit` makes of a function, launched as usual: `name[programs](arguments, options)`.

    Triton looks at every argument for what it compiles a kernel for, which takes the host longer than small kernels
    run. A launch that is like an earlier one in all of that gets the kernel of that one.
    """

    def __init__(self, jitted: Any, do_not_specialize: Sequence[str] = ()):
        self.jitted = jitted
        self._compiled: dict[tuple, tuple[Any, tuple]] = {}  # kernels, and the values of their constants in order
        self._unspecialized = [jitted.arg_names.index(name) for name in do_not_specialize]  # whole numbers
        # on AMD they are compiled for the sizes of tensors too
        self._reuses = isinstance(jitted, JITFunction) and torch.version.hip is None

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if _compiles_only.get():
            return functools.partial(self.jitted.warmup, grid=grid)
        if self._reuses and JITFunction.run is RUN:
            return functools.partial(self._launch, grid)
        return self.jitted[grid]

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        values, kind, odd = [], [], [driver.active.get_current_device()]
        for x in arguments:
            if x.__class__ in NUMBERS:
                kind.append((x, float) if x.__class__ is float else x)
            else:
                kind.append(x.dtype)
                if not x.is_cuda:  # which Triton refuses
                    odd.append(-1 - len(values))
                x = x.data_ptr()
                if x % 16:
                    odd.append(len(values))
            values.append(x)
        for at in self._unspecialized:
            kind[at] = values[at] // 2**31
        key = (*kind, *odd, *options, *options.values())
        known = self._compiled.get(key)
        if known is not None:
            compiled, constants = known
            launch_again = compiled[(*grid, 1, 1)]
            launch_again(*values, *constants)
            return
        launch = self.jitted[grid]
        compiled = launch(*arguments, **options)
        constants = self.jitted.arg_names[len(arguments) :]
        if compiled is not None and all(name in options for name in constants):
            if len(self._compiled) >= MOST_KINDS:
                self._compiled.clear()
            self._compiled[key] = compiled, tuple(options[name] for name in constants)


def kernel(jit: Callable = triton.jit, **options: Any) -> Callable[[Callable], Kernel]:
    """Makes a kernel of a function, with the options of `triton.jit`, or of another `jit`."""
    return lambda function: Kernel(jit(function, **options), options.get("do_not_specialize", ()))


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
