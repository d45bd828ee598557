"""Results of benchmarks: one row per measurement, with everything needed to judge it, kept as CSV; growth
fitted from rows.

A row says what ran (operator, shape, direction, batch, length, dtype), whether it ran (`status`), what came
out (median, spread, peak memory, error against the fp64 reference) and where (device, versions, date). A
case that could not run is a row too: its `status` says why, and its numbers are empty.
"""

import csv
import dataclasses
import datetime
import math
import platform
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import loglinear

OK = "ok"


@dataclass(frozen=True)
class Environment:
    """Where a measurement was made."""

    device: str
    threads: int
    torch: str
    triton: str
    python: str
    loglinear: str
    date: str


@dataclass(frozen=True)
class Row:
    """One measurement. Times are milliseconds per call, memory is bytes beyond the inputs; both are None
    where nothing was measured.

    `batch` sequences of `length` tokens make one call. `time_low_ms` and `time_high_ms` are the first and
    third quartile over `repeats` calls. `error` is the relative Frobenius error against the fp64 reference
    (the largest over output and gradients) of the check that went before the timing, and `tolerance` what it
    had to stay under.

    Of decoding, `length` is the context and a call one step of `batch` rows. `cache_bytes` are allocated for the state
    or cache of all rows, and `occupied_bytes` are those of occupied buckets (on average). `moved_bytes` are the fewest
    that a step of the operator must move, and `bandwidth_share` is their rate over that of copying.
    """

    suite: str
    operator: str
    mechanism: str
    shape: str
    direction: str
    batch: int
    length: int
    heads: int | None
    groups: int | None
    key_dim: int | None
    value_dim: int | None
    levels: int | None
    dtype: str
    status: str
    time_ms: float | None = None
    time_low_ms: float | None = None
    time_high_ms: float | None = None
    repeats: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    error: float | None = None
    tolerance: float | None = None
    device: str = ""
    threads: int = 0
    torch: str = ""
    triton: str = ""
    python: str = ""
    loglinear: str = ""
    date: str = ""
    cache_bytes: int | None = None
    occupied_bytes: int | None = None
    moved_bytes: int | None = None
    bandwidth_share: float | None = None

    @property
    def key(self) -> tuple:
        """What makes two rows measurements of the same thing: a newer one then replaces the older one."""
        return (
            self.suite,
            self.operator,
            self.shape,
            self.direction,
            self.batch,
            self.length,
            self.dtype,
            self.device,
        )

    @property
    def time_per_sequence_ms(self) -> float | None:
        return None if self.time_ms is None else self.time_ms / self.batch

    @property
    def memory_per_sequence_bytes(self) -> float | None:
        return None if self.peak_memory_bytes is None else self.peak_memory_bytes / self.batch


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
# Columns that files written before there was decoding do not have; they read as None.
ADDED = ("cache_bytes", "occupied_bytes", "moved_bytes", "bandwidth_share")


def _triton_version() -> str:
    """Of what is imported, which need not be what is installed first."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: str | torch.device) -> Environment:
    """Describes this machine for measurements on `device` ("cpu" or a CUDA device)."""
    device = torch.device(device)
    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor_name()}, {threads} thread{'' if threads == 1 else 's'}"
    return Environment(
        device=name,
        threads=threads,
        torch=torch.__version__,
        triton=_triton_version(),
        python=platform.python_version(),
        loglinear=loglinear.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def write_rows(path: str | Path, rows: Iterable[Row]) -> Path:
    """Writes `rows` as CSV with the columns of `Row`; None becomes an empty cell. The file is replaced as a
    whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            values = dataclasses.astuple(row)
            writer.writerow(["" if value is None else _cell(value) for value in values])
    partial.replace(path)
    return path


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_rows(path: str | Path) -> list[Row]:
    """Reads what `write_rows` wrote.

    Raises:
        ValueError: the file's columns are not those of `Row` (with or without the newest, `ADDED`).
    """
    kinds = {field.name: _cell_type(field.type) for field in dataclasses.fields(Row)}
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) not in (COLUMNS, COLUMNS[: -len(ADDED)]):
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return [
            Row(**{name: _parse(text, *kinds[name]) for name, text in record.items()})  # type: ignore[arg-type]
            for record in reader
        ]


def _cell_type(annotation: object) -> tuple[type, bool]:
    """The plain type of a column, and whether an empty cell means None."""
    if isinstance(annotation, types.UnionType):
        plain = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        return plain[0], True
    return typing.cast(type, annotation), False


def _parse(text: str, kind: type, optional: bool) -> object:
    return None if optional and text == "" else kind(text)


def merge_rows(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """`old` with rows of the same `key` replaced by those of `new`, and the rest of `new` at the end."""
    merged = {row.key: row for row in old}
    merged.update({row.key: row for row in new})
    return list(merged.values())


@dataclass(frozen=True)
class Growth:
    """`value ~ length ** exponent`, fitted over `points` lengths; `standard_error` is None with fewer than
    three points.
    """

    exponent: float
    standard_error: float | None
    points: int

    def __str__(self) -> str:
        spread = "" if self.standard_error is None else f" ± {self.standard_error:.2f}"
        return f"T^{self.exponent:.2f}{spread}"


def fit_growth(lengths: Sequence[float], values: Sequence[float]) -> Growth | None:
    """Least squares of log(value) on log(length): the exponent with which `values` grow. None with fewer
    than two distinct lengths.

    Raises:
        ValueError: the sequences differ in length, or a number is not positive.
    """
    if len(lengths) != len(values):
        raise ValueError(f"fit_growth needs one value per length, got {len(lengths)} and {len(values)}")
    if any(number <= 0 for number in (*lengths, *values)):
        raise ValueError("fit_growth needs positive lengths and values, because it takes their logarithms")
    if len(set(lengths)) < 2:
        return None
    x = [math.log(length) for length in lengths]
    y = [math.log(value) for value in values]
    count = len(x)
    x_mean, y_mean = math.fsum(x) / count, math.fsum(y) / count
    x_spread = math.fsum((a - x_mean) ** 2 for a in x)
    exponent = math.fsum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / x_spread
    if count < 3:
        return Growth(exponent, None, count)
    residual = math.fsum((b - y_mean - exponent * (a - x_mean)) ** 2 for a, b in zip(x, y, strict=True))
    return Growth(exponent, math.sqrt(residual / (count - 2) / x_spread), count)


def t_log_t_exponent(lengths: Sequence[float]) -> float | None:
    """The exponent that `fit_growth` finds for exact `T log T` growth over these lengths: what a measured
    exponent is to be held against.
    """
    growth = fit_growth(lengths, [length * math.log(length) for length in lengths])
    return None if growth is None else growth.exponent
