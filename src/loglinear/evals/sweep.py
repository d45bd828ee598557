"""Many small trainings described by one file: every model, width, number of pairs, learning rate and seed of it, each
one row of a CSV. What they come to: `loglinear.evals.sweep_summary`.

The task is multi-query associative recall (`loglinear.data.recall`). Models of one seed see the same sequences in the
same order and start from the same weights where their parameters agree in name and shape
(`loglinear.models.initialization`), so that a linear model and its log-linear twin differ in the levels alone.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from loglinear.bench.rows import environment
from loglinear.data.recall import RecallBatch, RecallTask
from loglinear.evals import inspection, rowfile
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.train.checkpoints import choose_device
from loglinear.train.config import TrainConfig, distinct_numbers, read_mapping
from loglinear.train.recall import Progress, RecallRun, examination, mean_accuracy, new_model
from loglinear.train.recall_together import RunsTogether

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
ROWS_FILE = "sweep.csv"
LEVEL_SEQUENCES = 8  # that the use of levels is measured on
UNFINISHED_FOLDER = "unfinished"  # states of runs that were stopped when the time was over

# What the file says elsewhere than under `train`, or does not say at all.
_NOT_COMMON = ("task", "model", "model_options", "learning_rate", "seed", "output", "resume", "stop_after")


@dataclass(frozen=True)
class SweepModel:
    """A model by name: fields of `LogLinearConfig`, and fields that are a multiple of the width."""

    name: str
    options: dict[str, Any]
    times_width: dict[str, float] = field(default_factory=dict)

    def config(self, width: int, task: RecallTask) -> LogLinearConfig:
        """The configuration at a width: with the vocabulary and length of the task and two layers, where the options
        do not say otherwise.
        """
        scaled = {}
        for name, times in self.times_width.items():
            size = times * width
            if size != round(size):
                raise ValueError(f"models.{self.name}: {name} is {times} x {width} = {size:g}, wanted a whole number")
            scaled[name] = round(size)
        sizes = {"vocab_size": task.vocabulary, "max_position_embeddings": task.length, "num_hidden_layers": 2}
        try:
            return LogLinearConfig(**{**sizes, **scaled, **self.options, "hidden_size": width})
        except (ValueError, TypeError) as error:
            raise type(error)(f"models.{self.name} at width {width}: {error}") from error


@dataclass(frozen=True)
class SweepConfig:
    """What is trained. Checked as a whole when it is made, models included.

    Args:
        models: name -> fields of `LogLinearConfig`; under `times_width` those that are a multiple of the width.
        widths: model widths (`hidden_size`).
        pairs: the training tasks: a number of pairs, or a list of numbers for a mixture, each.
        learning_rates: of which the best is chosen.
        seeds: of initial weights and training sequences.
        train: options of `loglinear train` that all runs share, such as `sequence_length`, `steps` and `rows`;
            `task_options` are those of the task but for the pairs.
        validation_sequences, test_sequences: of each number of pairs.
        workers: trainings side by side on each device, each a process of its own (1 on one device: none but this).
        together: runs of one model, width and task, which differ in learning rate and seed, that are computed together
            at most (`loglinear.train.recall_together`); each of them is what it is alone.
        title, about, conclusion: what the page of results says of it.
        paper: figures of a paper to be shown beside: model -> width -> text.

    Raises:
        ValueError, TypeError: a key that is unknown or missing, a value that cannot be, or a model that cannot be made.
    """

    models: dict[str, Any]
    widths: list[int]
    pairs: list[Any]
    learning_rates: list[float]
    seeds: list[int]
    train: dict[str, Any]
    validation_sequences: int = 500
    test_sequences: int = 1000
    workers: int = 1
    together: int = 1
    title: str = ""
    about: str = ""
    conclusion: str = ""
    paper: dict[str, dict[int, str]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("models", "train"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted names with values")
        if not self.models:
            raise ValueError("models: got none, wanted at least one")
        for name, kind in (("widths", int), ("seeds", int), ("learning_rates", float)):
            object.__setattr__(self, name, distinct_numbers(name, getattr(self, name), kind))
        if not isinstance(self.pairs, list) or not self.pairs:
            raise ValueError(f"pairs: got {self.pairs!r}, wanted a list of numbers, or of lists for mixtures")
        for name in ("validation_sequences", "test_sequences", "workers", "together"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least 1")
        for name in _NOT_COMMON:
            if name in self.train:
                raise ValueError(f"train: got {name}, which is not for all runs; wanted options that they share")
        if "pairs" in self.train.get("task_options", {}):
            raise ValueError("train: got task_options.pairs, wanted the pairs of the sweep")
        unknown = [name for name in self.paper if name not in self.models]
        if unknown:
            raise ValueError(f"paper: got {unknown[0]!r}, wanted names of models: {', '.join(map(str, self.models))}")
        named = [str(model) for model in self.models]
        object.__setattr__(self, "models", dict(zip(named, self.models.values(), strict=True)))
        for run in self.runs():
            run.model_config()

    @classmethod
    def from_file(cls, path: str | Path) -> "SweepConfig":
        """Reads a `.yaml`, `.yml`, `.toml` or `.json` file.

        Raises:
            FileNotFoundError: no such file.
            ValueError, TypeError: as the class.
        """
        values = read_mapping(path)
        known = {one.name: one for one in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
        wanted = ("models", "widths", "pairs", "learning_rates", "seeds", "train")
        missing = [name for name in wanted if name not in values]
        if missing:
            raise ValueError(f"{path}: got no {', '.join(missing)}, wanted {'it' if len(missing) == 1 else 'them'}")
        return cls(**values)

    def sweep_models(self) -> list[SweepModel]:
        found = []
        for name, options in self.models.items():
            if not isinstance(options, dict):
                raise TypeError(f"models.{name}: got {options!r}, wanted fields of a model with values")
            options = dict(options)
            times = options.pop("times_width", {})
            if not isinstance(times, dict) or not all(isinstance(value, (int, float)) for value in times.values()):
                raise TypeError(f"models.{name}.times_width: got {times!r}, wanted fields with numbers")
            found.append(SweepModel(name, options, times))
        return found

    def runs(self) -> "list[SweepRun]":
        """All trainings. Those that are compared come one after the other: models innermost but for learning rates and
        seeds, so that a sweep that is stopped early has whole comparisons.
        """
        return [
            SweepRun(model, width, self._training(pairs, rate, seed), self.validation_sequences, self.test_sequences)
            for pairs in self.pairs
            for width in self.widths
            for model in self.sweep_models()
            for rate in self.learning_rates
            for seed in self.seeds
        ]

    def _training(self, pairs: Any, rate: float, seed: int) -> TrainConfig:
        options = {**self.train.get("task_options", {}), "pairs": pairs}
        common = {"log_every": 100, **self.train, "task": "mqar", "task_options": options}
        return TrainConfig.from_mapping({**common, "learning_rate": rate, "seed": seed})


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep."""

    model: SweepModel
    width: int
    training: TrainConfig
    validation_sequences: int
    test_sequences: int

    @property
    def task(self) -> RecallTask:
        return RecallTask.from_options(self.training.task_options, length=self.training.sequence_length)

    def model_config(self) -> LogLinearConfig:
        return self.model.config(self.width, self.task)

    def settings(self) -> dict[str, Any]:
        """The cells of a row that say which run it is: what may differ without making it another run is left out."""
        left_out = {"model", "model_options", "learning_rate", "seed", "task_options", "task", "device", "compile"}
        common = {
            one.name: getattr(self.training, one.name)
            for one in fields(TrainConfig)
            if (one.name == "steps" or not one.metadata["resumable"])
            and one.name not in left_out
            and one.metadata["panel"] != "Data"
        }
        task = self.task
        common |= {"vocabulary": task.vocabulary, "power": task.power}
        if task.begins is not None:
            common["begins"] = list(task.begins)
        options = {**self.model.options, "times_width": self.model.times_width}
        return {
            "model": self.model.name,
            "width": self.width,
            "pairs": " ".join(map(str, task.pairs)),
            "learning_rate": self.training.learning_rate,
            "seed": self.training.seed,
            "options": json.dumps(options, sort_keys=True),
            "training": json.dumps(common, sort_keys=True),
            "validation_sequences": self.validation_sequences,
            "test_sequences": self.test_sequences,
        }

    @property
    def key(self) -> tuple:
        return tuple(self.settings().values())


@dataclass(frozen=True)
class SweepRow:
    """One training and what came of it.

    `options` and `training` are JSON: the fields of the model, and of the training what all runs of a sweep share.
    States are bytes per sequence in float32: `state_bytes` of all levels as allocated, `state_bytes_one_level` of one
    (what the linear twin has), `occupied_state_bytes` of the buckets in use on average over the positions;
    `kv_cache_bytes` is the cache of attention layers at the task's length. `status` is "finished", "diverged" (a step
    was not finite; `steps` counts those before) or "failed" (`message` says how; it is tried again). Accuracies are
    shares of queries: the mean over numbers of pairs, and by number as `pairs:accuracy`. `level_shares` and
    `level_scales` are what the levels are used for on the first test sequences with the most pairs, as `level:share`
    of the output and `level:λ` (means over layers, heads and tokens; nothing with one level). `step_runs` says whether
    a step was a CUDA "graph" or "eager", and "compiled" where it was; `together` how many runs were computed at once:
    `seconds` and `steps_per_second` are those of all of them.
    """

    model: str
    width: int
    pairs: str
    learning_rate: float
    seed: int
    options: str
    training: str
    validation_sequences: int
    test_sequences: int
    mixer: str = ""
    layers: int = 0
    num_levels: int = 0
    parameters: int = 0
    state_bytes: int = 0
    state_bytes_one_level: int = 0
    occupied_state_bytes: int = 0
    conv_bytes: int = 0
    kv_cache_bytes: int = 0
    status: str = FINISHED
    message: str = ""
    steps: int = 0
    loss: float | None = None
    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    validation_by_pairs: str = ""
    test_by_pairs: str = ""
    level_shares: str = ""
    level_scales: str = ""
    seconds: float = 0.0
    steps_per_second: float = 0.0
    step_runs: str = ""
    together: int = 1
    device: str = ""
    torch: str = ""
    loglinear: str = ""
    date: str = ""

    @property
    def key(self) -> tuple:
        return tuple(getattr(self, one.name) for one in fields(self)[:9])

    def accuracies(self, which: str) -> dict[int, float]:
        """Test or validation accuracy by number of pairs; zeros where the run diverged."""
        if self.status == DIVERGED:
            return dict.fromkeys(map(int, self.pairs.split()), 0.0)
        return _by_number(getattr(self, f"{which}_by_pairs"))

    def levels(self, which: str) -> dict[int, float]:
        """What is measured of levels ("shares" or "scales"), by level; nothing where it was not."""
        return _by_number(getattr(self, f"level_{which}"))


def _by_number(cell: str) -> dict[int, float]:
    return {int(name): float(value) for name, value in (part.split(":") for part in cell.split())}


def read_rows(path: str | Path) -> list[SweepRow]:
    """The rows of a sweep so far; a last line that was cut off while it was written is left out.

    Raises:
        ValueError: the file has other columns.
    """
    return rowfile.read_rows(path, SweepRow)


def state_file(output: str | Path, runs: Sequence[SweepRun]) -> Path:
    """Where the state of runs that are computed together is kept while they are not finished."""
    digest = hashlib.blake2b(repr([run.key for run in runs]).encode(), digest_size=8).hexdigest()
    return Path(output) / UNFINISHED_FOLDER / f"{digest}.pt"


def train_together(
    runs: Sequence[SweepRun],
    device: str = "auto",
    deadline: float = math.inf,
    on_progress: Callable[[Progress], None] | None = None,
    kept: Path | None = None,
) -> list[SweepRow]:
    """Trains and examines runs that differ in learning rate and seed alone. What goes wrong in them becomes rows that
    say so.

    Args:
        runs: computed together; a single one as it is.
        device: "auto", "cpu" or "cuda".
        deadline: on the monotonic clock. Runs whose training is not over by then are stopped at the last report before
            it: no rows.
        on_progress: called with the progress of the first run at its reports.
        kept: a file. Runs that are stopped leave their state there, and go on from one that is there.
    """
    place, dtype = choose_device(device, runs[0].training.precision)
    config = runs[0].model_config()
    cost = config.cost(runs[0].task.length, torch.float32)
    where = environment(place)
    levels = config.num_levels or 0
    rows = [
        SweepRow(
            **run.settings(),
            mixer=config.mixer,
            layers=config.num_hidden_layers,
            num_levels=levels,
            parameters=cost.parameters,
            state_bytes=cost.state_bytes,
            state_bytes_one_level=cost.state_bytes // levels if levels else 0,
            occupied_state_bytes=cost.occupied_state_bytes,
            conv_bytes=cost.conv_bytes,
            kv_cache_bytes=cost.kv_cache_bytes if "attention" in config.mixers else 0,
            together=len(runs),
            device=where.device,
            torch=where.torch,
            loglinear=where.loglinear,
            date=where.date,
        )
        for run in runs
    ]
    try:
        return _trained(runs, rows, config, place, dtype, deadline, on_progress, kept)
    except Exception as error:  # these runs must not end the others: their rows say what happened
        logging.getLogger(__name__).debug("runs failed", exc_info=True)
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return [dataclasses.replace(row, status=FAILED, message=message) for row in rows]


def _trained(
    runs: Sequence[SweepRun],
    rows: Sequence[SweepRow],
    config: LogLinearConfig,
    place: torch.device,
    dtype: torch.dtype,
    deadline: float,
    on_progress: Callable[[Progress], None] | None,
    kept: Path | None,
) -> list[SweepRow]:
    task, steps, every = runs[0].task, runs[0].training.steps, runs[0].training.log_every
    assert steps is not None
    torch.compiler.reset()  # a function is compiled eight times, for what differs between runs too, and then no more
    learners = [RecallRun(run.training, task, new_model(config, run.training.seed), place, dtype) for run in runs]
    progress, before = [Progress(0, math.nan, math.nan, True) for _ in runs], 0.0
    if kept is not None and kept.is_file():
        state = torch.load(kept, map_location=place, weights_only=True)
        for learner, own in zip(learners, state["runs"], strict=True):
            learner.restore(own)
        progress, before = [Progress(**values) for values in state["progress"]], state["seconds"]
    together = learners[0] if len(learners) == 1 else RunsTogether(learners)
    begin, last_report = time.perf_counter(), None
    while together.step < steps and any(one.finite for one in progress):
        together.advance()
        if together.step % every and together.step < steps:
            continue
        progress = [
            learner.progress(last.steps) if last.finite else last
            for learner, last in zip(learners, progress, strict=True)
        ]
        if on_progress is not None:
            on_progress(progress[0])
        now = time.monotonic()
        until_next = 0.0 if last_report is None else now - last_report  # kernels and graphs are made before the first
        last_report = now
        if together.step < steps and now + until_next > deadline:
            if kept is not None:
                seconds = before + time.perf_counter() - begin
                _keep(kept, learners, progress, seconds)
            return []
    seconds = before + time.perf_counter() - begin
    shared = {
        "seconds": round(seconds, 3),
        "steps_per_second": round(together.step / seconds, 2),
        "step_runs": together.how,
    }
    examinations = {
        "validation": examination(task, "validation", runs[0].validation_sequences),
        "test": examination(task, "test", runs[0].test_sequences),
    }
    found = []
    for row, learner, last in zip(rows, learners, progress, strict=True):
        done = {**shared, "steps": last.steps, "loss": last.loss if math.isfinite(last.loss) else None}
        if not last.finite:
            what = f"step {last.steps + 1} was not finite"
            found.append(dataclasses.replace(row, **done, status=DIVERGED, message=what))
            continue
        for stream, batches in examinations.items():
            by_pairs, _ = mean_accuracy(learner.model, batches, dtype)
            done[f"{stream}_accuracy"] = round(statistics.fmean(by_pairs.values()), 6)
            done[f"{stream}_by_pairs"] = " ".join(f"{pairs}:{share:.6f}" for pairs, share in by_pairs.items())
        done |= _use_of_levels(learner.model, examinations["test"][max(task.pairs)])
        found.append(dataclasses.replace(row, **done))
    return found


def _use_of_levels(model: LogLinearForCausalLM, batch: RecallBatch) -> dict[str, str]:
    """Two cells of a row."""
    if set(model.config.mixers) == {"attention"} or (model.config.num_levels or 1) == 1:
        return {}
    texts = batch.inputs[:LEVEL_SEQUENCES].tolist()
    try:
        by_level = inspection.mean_by_level([row for text in texts for row in inspection.level_shares_on(model, text)])
    except RuntimeError as error:  # of memory, maybe: what was trained is not to be lost with it
        logging.getLogger(__name__).warning("the use of levels could not be measured: %s", error)
        return {}
    scales = {level: scale for level, (_, scale) in enumerate(by_level) if scale is not None}
    return {
        "level_shares": " ".join(f"{level}:{share:.6f}" for level, (share, _) in enumerate(by_level)),
        "level_scales": " ".join(f"{level}:{scale:.6f}" for level, scale in scales.items()),
    }


def _keep(path: Path, learners: Sequence[RecallRun], progress: Sequence[Progress], seconds: float) -> None:
    """Writes the state of runs; a file is whole or is not there."""
    runs, reports = [learner.state() for learner in learners], [dataclasses.asdict(one) for one in progress]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"runs": runs, "progress": reports, "seconds": seconds}, partial)
    partial.replace(path)


def _forget(path: Path) -> None:
    """Removes a state, and the folder with the last one."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def run_sweep(
    config: SweepConfig,
    output: str | Path,
    device: str = "auto",
    workers: int | None = None,
    on_row: Callable[[SweepRow, int, int], None] | None = None,
    seconds: float | None = None,
    together: int | None = None,
    on_progress: Callable[[Sequence[SweepRun], Progress], None] | None = None,
) -> list[SweepRow]:
    """Trains what is not in the CSV of `output` yet; failed runs are tried again.

    Args:
        config: what is trained.
        output: folder of `sweep.csv`. Rows of other runs in it are left alone.
        device: "auto", "cpu" or "cuda", which is every GPU that there is.
        workers: trainings side by side on each device; default: `config.workers`.
        on_row: called with each new row, how many of the runs are done, and how many there are.
        seconds: all training is over by then. Runs that are under way leave their state in `output`, and the next call
            goes on from it. Examining those that are done comes on top. Default: all runs.
        together: runs that are computed together; default: `config.together`.
        on_progress: called at reports with the runs that are under way and the progress of the first of them; with
            several workers, which are processes of their own, it is not.

    Returns:
        The rows of all runs of `config` that are done, in their order; the newest where there are several.

    Raises:
        ValueError: a CSV with other columns, or fewer than one worker or run together.
        RuntimeError: a worker process died; the rows so far are kept.
    """
    workers = config.workers if workers is None else workers
    together = config.together if together is None else together
    for name, value in (("workers", workers), ("together", together)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, wanted at least 1")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds: got {seconds}, wanted more than 0")
    choose_device(device)
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    runs, path = config.runs(), Path(output) / ROWS_FILE
    file = rowfile.RowFile(path, SweepRow)
    done = {row.key: row for row in read_rows(path) if row.status != FAILED}
    waiting = groups_of([run for run in runs if run.key not in done], together)
    finished = len(runs) - sum(map(len, waiting))
    newest = {row.key: row for row in read_rows(path)}
    for group, rows in _rows_of(waiting, output, device, workers, deadline, on_progress):
        finished += len(rows)
        for row in rows:
            file.append([row])
            newest[row.key] = row
            if on_row is not None:
                on_row(row, finished, len(runs))
        if rows:
            _forget(state_file(output, group))
    return [newest[run.key] for run in runs if run.key in newest]


def groups_of(runs: Sequence[SweepRun], most: int) -> list[list[SweepRun]]:
    """Runs in their order, those of one model, width and task together, at most so many."""
    groups: list[list[SweepRun]] = []
    for run in runs:
        last = groups[-1] if groups else []
        alike = last and (run.model, run.width, run.task) == (last[0].model, last[0].width, last[0].task)
        if alike and len(last) < most:
            last.append(run)
        else:
            groups.append([run])
    return groups


def _rows_of(
    groups: Sequence[Sequence[SweepRun]],
    output: str | Path,
    device: str,
    workers: int,
    deadline: float,
    on_progress: Callable[[Sequence[SweepRun], Progress], None] | None = None,
) -> Iterator[tuple[Sequence[SweepRun], list[SweepRow]]]:
    """Groups and their rows as they end; none begins after the deadline (on the monotonic clock)."""
    gpus = torch.cuda.device_count() if choose_device(device)[0].type == "cuda" else 0
    workers = min(workers * max(1, gpus), len(groups))
    if workers <= 1:
        for group in groups:
            if time.monotonic() > deadline:
                return
            tell = None if on_progress is None else functools.partial(on_progress, group)
            yield group, train_together(group, device, deadline, tell, state_file(output, group))
        return
    # A fresh interpreter each: a process that has used CUDA cannot be forked.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,))
    waiting = iter(groups)
    free = [number % gpus if gpus else None for number in range(workers)]  # GPUs, each as often as it has room
    under_way: dict[Future, tuple[Sequence[SweepRun], int | None]] = {}
    try:
        while True:
            for group in itertools.islice(waiting, len(free)) if time.monotonic() <= deadline else ():
                gpu = free.pop(0)
                future = pool.submit(_train_on, gpu, group, device, deadline, None, state_file(output, group))
                under_way[future] = group, gpu
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                group, gpu = under_way.pop(future)
                free.append(gpu)
                yield group, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a worker process died (of memory?); the rows so far are kept and the sweep goes on from them: "
            f"try fewer than {workers} workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _train_on(gpu: int | None, *arguments: Any) -> list[SweepRow]:
    """`train_together` in a worker, on a GPU by its number."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    return train_together(*arguments)
