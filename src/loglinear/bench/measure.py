"""Measuring one call: time (medians with quartiles, after warm-up) and the peak of memory beyond what was
there before.

On a GPU, times are between CUDA events, the L2 cache is overwritten before each call, and the peak is the
allocator's. On a processor, times are wall-clock, and the peak is the process's resident memory: the
kernel's high-water mark, which Linux lets a process reset. Where it cannot be reset the mark of the whole
process is used, so measure in a fresh process, small cases first.
"""

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# A call that takes longer than this many seconds is not repeated: its own run is the measurement.
LONG_CALL_S = 12.0
_MOST_REPEATS = 50
_FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, first and third quartile over `repeats` calls."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int


def summarize(samples_ms: list[float]) -> Timing:
    """Median and quartiles; fewer than three samples have no quartiles, so their extremes are given."""
    if len(samples_ms) < 3:
        return Timing(statistics.median(samples_ms), min(samples_ms), max(samples_ms), len(samples_ms))
    low, median, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
    return Timing(median, low, high, len(samples_ms))


def time_call(call: Callable[[], object], device: torch.device, budget_s: float, first_s: float) -> Timing:
    """Times `call` for about `budget_s` seconds, at least three times.

    `call` must have run already, and `first_s` is how long that took: where it was longer than
    `LONG_CALL_S`, it is the measurement.
    """
    if first_s > LONG_CALL_S:
        return summarize([first_s * 1000])
    repeats = min(_MOST_REPEATS, max(_FEWEST_REPEATS, int(budget_s / first_s)))
    if device.type == "cuda":
        return summarize(_cuda_times(call, device, repeats))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1000)
    return summarize(samples)


def _cuda_times(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    # Twice the L2 cache is overwritten before each call, so that nothing is timed with inputs already in the
    # cache.
    cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    stops = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for start, stop in zip(starts, stops, strict=True):
        cache.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) for start, stop in zip(starts, stops, strict=True)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory of what runs inside the `with` block, beyond what is in use at its start: `.bytes`
    afterwards.

    What the block leaves allocated counts, what was allocated before does not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            _return_freed_memory()
            self._before = _resident_now() if _reset_high_water() else _high_water()
        return self

    def restart(self) -> None:
        """Forgets the peak so far, but not what was in use at the start."""
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _return_freed_memory()
            _reset_high_water()

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _high_water()
        self.bytes = max(0, peak - self._before)


def _return_freed_memory() -> None:
    """Gives freed memory back to the system: kept for reuse, it would hide what the next call takes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # only glibc has it


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _resident_now() -> int:
    return _status_bytes("VmRSS:") or _high_water()


def _high_water() -> int:
    peak = _status_bytes("VmHWM:")
    if peak is not None:
        return peak
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.8 * (_free_memory() or 2**62))


def _free_memory() -> int | None:
    """Bytes of memory that processes may still take, as the system sees it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def limit_memory(fraction: float = 0.85) -> None:
    """Lets this process take at most `fraction` of the memory that is free now, so that too much is an error
    and not a killed machine.
    """
    free = _free_memory()
    try:
        import resource
    except ImportError:
        return
    if free is None:
        return
    in_use = _status_bytes("VmSize:") or 0
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (in_use + int(free * fraction), hard))
