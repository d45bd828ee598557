"""What a run tells: a progress bar or lines on the terminal, metrics as JSONL, and TensorBoard."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Rows of metrics, one JSON object per line, each with its step; numbers go to TensorBoard, too.

    A resumed run drops the rows of steps it is about to do again, so that every step stands in the file once.

    Args:
        output: the run's folder.
        first_step: steps done before.
        tensorboard: also write event files to `output/tensorboard`.
    """

    def __init__(self, output: Path, first_step: int, tensorboard: bool):
        self.path = output / METRICS_FILE
        kept = []
        if first_step and self.path.is_file():
            kept = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file. A last line that was cut off while it was written is left out."""
    lines = Path(path).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Clock:
    """Seconds spent training: what runs inside `paused()` (evaluation, checkpoints) is not counted."""

    def __init__(self):
        self._started = time.perf_counter()
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin


class Tokenizing:
    """Says every few seconds how far tokenizing is; given to `Corpus.load` as `on_progress`."""

    def __init__(self, enabled: bool, every_seconds: float = 5.0):
        self.console = Console(stderr=True, quiet=not enabled)
        self.every_seconds = every_seconds
        self._last = time.perf_counter()

    def __call__(self, documents: int, tokens: int) -> None:
        now = time.perf_counter()
        if now - self._last >= self.every_seconds:
            self._last = now
            self.console.print(f"tokenizing: {documents:,} documents, {tokens:,} tokens", highlight=False)


def say(message: str, enabled: bool = True) -> None:
    """Print one line to stderr, where a run tells what it does."""
    Console(stderr=True, quiet=not enabled).print(message, markup=False, highlight=False, soft_wrap=True)


class Display:
    """The run on the terminal (stderr): a bar where it is one, a line per report where it is a file or a
    pipe.
    """

    def __init__(self, steps: int, first_step: int, enabled: bool):
        self.console = Console(stderr=True, quiet=not enabled)
        self.steps = steps
        self.bar = None
        if enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[report]}"),
                TimeElapsedColumn(),
                console=self.console,
                refresh_per_second=2,
            )
            self.task = self.bar.add_task("training", total=steps, completed=first_step, report="")
            self.bar.start()

    def step(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.task)

    def training(self, row: dict[str, Any], seconds_left: float) -> None:
        """Show a row of training metrics."""
        report = f"loss {row['loss']:.4f} · {row['tokens_per_second']:,.0f} tokens/s"
        left = f"{duration(seconds_left)} left"
        if self.bar is not None:
            self.bar.update(self.task, report=f"{report} · {left}")
        else:
            self.say(f"step {row['step']:,}/{self.steps:,} · {report} · {left}")

    def evaluation(self, row: dict[str, Any]) -> None:
        """Show a row of held-out metrics."""
        accuracy = f" · accuracy {row['held_out_accuracy']:.1%}" if "held_out_accuracy" in row else ""
        self.say(f"step {row['step']:,}/{self.steps:,} · held-out loss {row['held_out_loss']:.4f}{accuracy}")

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> duration(75), duration(3675)
    ('1:15', '1:01:15')
    """
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's own progress bars and notes, which would break ours, and restore them."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
