"""Language models compared: one file says which models, seeds and training, one command trains and examines them, and
every run is rows of a CSV.

The models of one seed see the same tokens in the same order under the same recipe, and start from the same weights
where their parameters agree in name and shape (`loglinear.models.initialization`). The learning rate may be tuned: with
the first seed every model is trained at every rate, the file says at which of them all its seeds are, and of several
the one with the lowest loss counts. A run is

    train (`loglinear.train`)          on real documents, and on a share of texts with needles in them
    held-out loss, loss by position    on real documents that no model was trained on (`position_loss`)
    needles                            by length and depth: exact answers, and the loss of the right ones (`needle`)
    levels                             what they are used for, on a held-out document (`inspection`)
    cost                               tokens per second and memory of the training, bytes of state

Where there are several GPUs, each has a run. Its rows are written when it is done. Called again, the command goes on
with the runs that are missing, also on another machine: nothing but the CSV has to survive.
"""

import dataclasses
import gc
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
from transformers import PreTrainedTokenizerBase

from loglinear.bench.rows import environment
from loglinear.data import load_tokenizer
from loglinear.data.needles import NEEDLE_TASKS, NeedleSample, training_documents, training_drills
from loglinear.evals import inspection, needle, position_loss, rowfile
from loglinear.evals.needle import DEPTHS
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.initialization import initialize_by_name
from loglinear.train import NonFiniteError, TrainConfig, load_checkpoint, train
from loglinear.train.checkpoints import choose_device, load_corpora, newest_checkpoint
from loglinear.train.config import distinct_numbers, read_mapping
from loglinear.train.reporting import METRICS_FILE, quiet_transformers, read_metrics

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
ROWS_FILE = "comparison.csv"
NEEDLES_FILE = "needles.jsonl"

logger = logging.getLogger(__name__)

# What the file says elsewhere than under `train`, or does not say at all.
_NOT_COMMON = ("model", "model_options", "seed", "output", "resume", "stop_after", "task", "task_options")
_HELD_OUT_DOCUMENTS = 256  # for the held-out loss


@dataclass(frozen=True)
class Needles:
    """Needles of a comparison.

    Args:
        share: of the training tokens that are texts with needles.
        train_tasks, train_lengths: of these texts, which ask what is asked afterwards.
        drill_share, drill_lengths: share of the tokens of these texts that are drills instead, and their lengths
            (`training_drills`).
        tasks, lengths, depths, samples: what is asked afterwards (`loglinear eval needle`); samples are of each task,
            length and depth.
    """

    share: float = 0.0
    train_tasks: list[str] = field(default_factory=list)
    train_lengths: list[int] = field(default_factory=list)
    drill_share: float = 0.0
    drill_lengths: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    depths: list[float] = field(default_factory=lambda: list(DEPTHS))
    samples: int = 10

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(f"needles.share: got {self.share}, wanted 0 to less than 1")
        if not 0 <= self.drill_share <= 1:
            raise ValueError(f"needles.drill_share: got {self.drill_share}, wanted 0 to 1")
        for name in ("train_tasks", "tasks"):
            unknown = [task for task in getattr(self, name) if task not in NEEDLE_TASKS]
            if unknown:
                raise ValueError(f"needles.{name}: unknown task {unknown[0]!r}; known: {', '.join(NEEDLE_TASKS)}")
        if self.share and self.drill_share < 1 and not (self.train_tasks and self.train_lengths):
            raise ValueError("needles: got a share without train_tasks and train_lengths, wanted both")
        if bool(self.drill_share) != bool(self.drill_lengths):
            raise ValueError("needles: got one of drill_share and drill_lengths, wanted both or none")
        if self.drill_share and not self.share:
            raise ValueError("needles: got drill_share without a share, of which it is a part; wanted both")
        if bool(self.tasks) != bool(self.lengths):
            raise ValueError("needles: got one of tasks and lengths, wanted both or none")
        if self.samples < 1:
            raise ValueError(f"needles.samples: got {self.samples}, wanted at least 1")


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared. Checked as a whole when it is made, models included.

    Args:
        models: name -> fields of `LogLinearConfig`. Vocabulary and special tokens are the tokenizer's.
        seeds: of initial weights and order of the data.
        train: options of `loglinear train` that all runs share; `steps` among them.
        needles: see `Needles`.
        learning_rates: that every model is trained at with the first seed, to choose from. Default: that of `train`
            alone.
        chosen_rates: model -> the one of them, or the list of those, that all its seeds are trained at. The page of
            results is about the one with the lowest mean held-out loss over seeds. Default: that of `train`.
        longest: positions that the loss is measured at; default: four times `sequence_length`.
        documents: held-out documents that reach the last position, at most so many.
        level_tokens: what is read for the use of levels; default: `sequence_length`.
        cost_only: the page of results shows loss and cost, and leaves out what runs that are too short say.
        title, about, conclusion: what the page of results says of it.

    Raises:
        ValueError, TypeError: a key that is unknown or missing, a value that cannot be, or a model that cannot be made.
    """

    models: dict[str, Any]
    seeds: list[int]
    train: dict[str, Any]
    needles: Needles = field(default_factory=Needles)
    learning_rates: list[float] = field(default_factory=list)
    chosen_rates: dict[str, float | list[float]] = field(default_factory=dict)
    longest: int | None = None
    documents: int = 64
    level_tokens: int | None = None
    cost_only: bool = False
    title: str = ""
    about: str = ""
    conclusion: str = ""

    def __post_init__(self):
        for name in ("models", "train"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not value:
                raise TypeError(f"{name}: got {value!r}, wanted names with values")
        if not isinstance(self.seeds, list) or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds!r}, wanted a list of whole numbers, each once")
        for name in _NOT_COMMON:
            if name in self.train:
                raise ValueError(f"train: got {name}, which is not for all runs; wanted options that they share")
        if not isinstance(self.cost_only, bool):
            raise TypeError(f"cost_only: got {self.cost_only!r}, wanted true or false")
        if self.train.get("steps") is None:
            raise ValueError("train: got no steps, wanted them: all models see as many tokens")
        for name in ("longest", "documents", "level_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least 1")
        self._check_rates()
        for run in self.runs():
            run.model_config()

    def _check_rates(self) -> None:
        rates, common = self.learning_rates, self.training(0).learning_rate
        if rates != []:
            rates = distinct_numbers("learning_rates", rates, float)
            object.__setattr__(self, "learning_rates", rates)
        if not all(rate > 0 for rate in rates):
            raise ValueError(f"learning_rates: got {rates}, wanted numbers above 0")
        if not isinstance(self.chosen_rates, dict):
            raise TypeError(f"chosen_rates: got {self.chosen_rates!r}, wanted names of models with a rate each")
        for name, chosen in self.chosen_rates.items():
            if name not in self.models:
                raise ValueError(f"chosen_rates: got {name!r}, wanted names of models: {', '.join(self.models)}")
            several = chosen if isinstance(chosen, list) else [chosen]
            if not several or any(isinstance(rate, bool) or rate not in rates for rate in several):
                raise ValueError(f"chosen_rates.{name}: got {chosen!r}, wanted one or more of learning_rates: {rates}")
            if len(set(several)) < len(several):
                raise ValueError(f"chosen_rates.{name}: got {chosen!r}, wanted each rate once")
        if rates and common not in rates and set(self.models) - set(self.chosen_rates):
            raise ValueError(f"learning_rates: got {rates} without {common:g}, the rate of models without another")

    @classmethod
    def from_file(cls, path: str | Path) -> "ComparisonConfig":
        """Reads a `.yaml`, `.yml`, `.toml` or `.json` file.

        Raises:
            FileNotFoundError: no such file.
            ValueError, TypeError: as the class.
        """
        values = dict(read_mapping(path))
        for kind, found, where in ((cls, values, ""), (Needles, values.get("needles", {}), "needles.")):
            known = [one.name for one in fields(kind)]
            unknown = [name for name in found if name not in known]
            if unknown:
                raise ValueError(f"{path}: unknown key {where + unknown[0]!r}; known: {', '.join(known)}")
        missing = [name for name in ("models", "seeds", "train") if name not in values]
        if missing:
            raise ValueError(f"{path}: got no {', '.join(missing)}, wanted {'it' if len(missing) == 1 else 'them'}")
        if "needles" in values:
            values["needles"] = Needles(**values["needles"])
        return cls(**values)

    @property
    def positions(self) -> int:
        return self.longest or 4 * self.training(0).sequence_length

    def training(self, seed: int) -> TrainConfig:
        """What all models of a seed share."""
        common = {"evaluate_every": 0, "save_every": 0, "keep_checkpoints": 1, "tensorboard": False, **self.train}
        return TrainConfig.from_mapping({**common, "seed": seed})

    def rates_of(self, model: str) -> list[float]:
        """The learning rates that all seeds of a model are trained at."""
        chosen = self.chosen_rates.get(model, self.training(0).learning_rate)
        return chosen if isinstance(chosen, list) else [chosen]

    def chosen_runs(self) -> "list[ComparisonRun]":
        """All seeds of each model at its rates, seed by seed, so that a comparison that is stopped early has whole
        ones."""
        return [
            ComparisonRun(self, name, seed, rate)
            for seed in self.seeds
            for name in self.models
            for rate in self.rates_of(name)
        ]

    def best_rate(self, model: str, rows: "Sequence[ComparisonRow]") -> float:
        """Of the rates that all seeds of a model are trained at the one with the lowest mean held-out loss.

        A run without a loss counts as infinitely bad. A rate with fewer runs that have ended comes after others, unless
        one of these has no loss.
        """
        ended = {row.key for row in rows if row.metric == "run" and row.status != FAILED}
        losses = {row.key: row.value for row in rows if row.metric == "held_out_loss" and row.value is not None}

        def rank(rate: float) -> tuple[bool, int, float]:
            keys = [ComparisonRun(self, model, seed, rate).key for seed in self.seeds]
            found = [losses.get(key, math.inf) for key in keys if key in ended]
            mean = statistics.fmean(found) if found else math.inf
            return math.isinf(mean), -len(found), mean

        return min(self.rates_of(model), key=rank)

    def runs(self) -> "list[ComparisonRun]":
        """All runs: those at rates for the first seed alone come last."""
        chosen, first = self.chosen_runs(), self.seeds[0]
        tried = [ComparisonRun(self, name, first, rate) for rate in self.learning_rates for name in self.models]
        return chosen + [run for run in tried if run not in chosen]


@dataclass(frozen=True)
class ComparisonRun:
    """One model, seed and learning rate of a comparison."""

    comparison: ComparisonConfig
    model: str
    seed: int
    learning_rate: float

    @property
    def training(self) -> TrainConfig:
        return self.comparison.training(self.seed).replace(learning_rate=self.learning_rate)

    @property
    def options(self) -> dict[str, Any]:
        options = self.comparison.models[self.model]
        if not isinstance(options, dict):
            raise TypeError(f"models.{self.model}: got {options!r}, wanted fields of a model with values")
        return options

    def model_config(self) -> LogLinearConfig:
        """The configuration, with the vocabulary and special tokens of the tokenizer and the trained length where the
        options do not say otherwise.
        """
        training = self.training
        tokenizer = load_tokenizer(training.tokenizer)
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": training.sequence_length, **tokens}
        try:
            return LogLinearConfig(**{**sizes, **self.options})
        except (ValueError, TypeError) as error:
            raise type(error)(f"models.{self.model}: {error}") from error

    def settings(self) -> str:
        """Everything that makes the run what it is, as JSON; what may differ without that is left out, and so are
        drills where there are none: rows that know nothing of them are of such runs.
        """
        comparison, training = self.comparison, self.training
        left_out = {"model", "model_options", "seed", "output", "device", "compile", "cache"}
        shared = {
            one.name: getattr(training, one.name)
            for one in fields(TrainConfig)
            if (one.name == "steps" or not one.metadata["resumable"]) and one.name not in left_out
        }
        needles = dataclasses.asdict(comparison.needles)
        if not comparison.needles.drill_share:
            needles = {name: value for name, value in needles.items() if not name.startswith("drill_")}
        whole = {
            "model": self.options,
            "train": shared,
            "needles": needles,
            "positions": comparison.positions,
            "documents": comparison.documents,
            "level_tokens": comparison.level_tokens,
        }
        return json.dumps(whole, sort_keys=True)

    @property
    def key(self) -> tuple[str, int, str]:
        return self.model, self.seed, hashlib.blake2b(self.settings().encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class ComparisonRow:
    """One number of one run.

    `settings` is a short hash of everything that makes the run what it is; the row of metric "run", which comes last,
    has it in full in `detail`, and in `status` whether the run is "finished", "diverged" (a step was not finite: there
    are no other rows but of cost) or "failed" (`detail` says how; it is tried again).

    | metric | value | count | position, until |
    |---|---|---|---|
    | `run` | seconds, training and examination | steps | |
    | `parameters`, `tokens`, `memory_bytes`, `training_loss` | of the training | | |
    | `tokens_per_second` | of the training | at most so many runs shared the device, this one included | |
    | `state_bytes` (and `_one_level`), `kv_cache_bytes`, … | of a sequence of the trained length | | |
    | `corpus_tokens`, `held_out_tokens` | real documents; `detail`: their identity | documents | |
    | `held_out_loss` | nats per token up to the trained length | documents | |
    | `position_loss` | nats per token | documents | positions, end not included |
    | `needle` | share of exact answers; `depth` empty: of all depths | samples | length |
    | `needle_loss` | nats per token of the right answer | samples | length |
    | `level_share`, `level_scale` | mean over layers and heads | | level |

    `standard_error` is over documents or samples.
    """

    model: str
    seed: int
    settings: str
    metric: str
    task: str = ""
    position: int | None = None
    until: int | None = None
    depth: float | None = None
    value: float | None = None
    standard_error: float | None = None
    count: int | None = None
    status: str = FINISHED
    detail: str = ""
    device: str = ""
    torch: str = ""
    loglinear: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, int, str]:
        return self.model, self.seed, self.settings


def read_rows(path: str | Path) -> list[ComparisonRow]:
    """The rows of whole runs: those whose last row is there; of a run that was tried again the last try.

    Raises:
        ValueError: the file has other columns.
    """
    whole: dict[tuple[str, int, str], list[ComparisonRow]] = {}
    tries: dict[tuple[tuple[str, int, str], str], dict[tuple, ComparisonRow]] = {}  # of a run, by when
    for row in rowfile.read_rows(path, ComparisonRow):
        rows = tries.setdefault((row.key, row.date), {})
        # the same number twice: what was cut off, and tried again within the second
        rows[row.metric, row.task, row.position, row.until, row.depth] = row
        if row.metric == "run":
            whole[row.key] = list(tries.pop((row.key, row.date)).values())
    return [row for rows in whole.values() for row in rows]


def run_comparison(
    config: ComparisonConfig,
    output: str | Path,
    work: str | Path,
    device: str = "auto",
    seconds: float | None = None,
    on_begin: Callable[[ComparisonRun, int, int], None] | None = None,
    on_rows: Callable[[list[ComparisonRow], int, int], None] | None = None,
    workers: int | None = None,
) -> list[ComparisonRow]:
    """Trains and examines what is not in the CSV of `output` yet; failed runs are tried again.

    Args:
        config: what is compared.
        output: folder of `comparison.csv`. Rows of other runs in it are left alone.
        work: folder for checkpoints and texts with needles, which are not needed afterwards.
        device: "auto", "cpu" or "cuda".
        seconds: begin no run that would not be done by then, as far as the runs before it tell. Default: all runs.
        on_begin: called with a run, how many are done, and how many there are.
        on_rows: called with the rows of a run that is done, how many are, and how many there are.
        workers: runs side by side, each in a process of its own if there are several. Default: one on each GPU.

    Returns:
        The rows of all runs of `config` that are done.

    Raises:
        ValueError: a CSV with other columns, data that cannot be read, or fewer than one worker.
        RuntimeError: a worker process died; the rows so far are kept.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds: got {seconds}, wanted more than 0")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: got {workers}, wanted at least 1")
    place, _ = choose_device(device)
    begin, path, runs = time.monotonic(), Path(output) / ROWS_FILE, config.runs()
    file = rowfile.RowFile(path, ComparisonRow)
    keys = {run.key for run in runs}
    done = keys.intersection(row.key for row in read_rows(path) if row.metric == "run" and row.status != FAILED)
    where = environment(place).device
    waiting = [run for run in runs if run.key not in done]
    gpus = torch.cuda.device_count() if place.type == "cuda" else 0
    workers = min(max(1, gpus) if workers is None else workers, len(waiting))
    examiner: _Examiner | None = None

    def begins(run: ComparisonRun) -> "_Examiner | None":
        """What examines a run, if it would be done in time."""
        nonlocal examiner
        if seconds is not None:
            left = seconds - (time.monotonic() - begin)
            if left < _expected_seconds(read_rows(path), run, where):
                return None
        if examiner is None:
            examiner = _Examiner(config, Path(work), place)
        if on_begin is not None:
            on_begin(run, len(done), len(runs))
        return examiner

    ended = _in_turn(waiting, begins) if workers <= 1 else _side_by_side(waiting, begins, workers, gpus)
    for run, rows in ended:
        file.append(rows)
        if rows[-1].status != FAILED:
            done.add(run.key)
        if on_rows is not None:
            on_rows(rows, len(done), len(runs))
    return [row for row in read_rows(path) if row.key in keys]


def _in_turn(
    runs: Sequence[ComparisonRun], begins: "Callable[[ComparisonRun], _Examiner | None]"
) -> Iterator[tuple[ComparisonRun, list[ComparisonRow]]]:
    for run in runs:
        examiner = begins(run)
        if examiner is None:
            return
        yield run, _rows_of(run, examiner)


def _side_by_side(
    runs: Sequence[ComparisonRun], begins: "Callable[[ComparisonRun], _Examiner | None]", workers: int, gpus: int
) -> Iterator[tuple[ComparisonRun, list[ComparisonRow]]]:
    """Runs and their rows as they end, in processes that each have a GPU of their own, or share what there is."""
    waiting = iter(runs)
    first = next(waiting)
    examiner = begins(first)  # finds out what is missing, and writes what the workers read
    if examiner is None:
        return
    # A fresh interpreter each: a process that has used CUDA cannot be forked.
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for number in range(workers):
        places.put(_visible_device(number % gpus) if gpus else None)
    threads = max(1, (os.cpu_count() or 1) // workers)
    sharing = -(-workers // max(1, gpus))
    shared = (places, threads, examiner.config, examiner.work, examiner.device, sharing)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=shared)
    under_way: dict[Future, ComparisonRun] = {pool.submit(_rows_in_worker, first): first}
    try:
        while under_way:
            for run in itertools.islice(waiting, workers - len(under_way)):
                if begins(run) is None:
                    waiting = iter(())
                    break
                under_way[pool.submit(_rows_in_worker, run)] = run
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a worker process died (of memory?); the rows so far are kept and the comparison goes on from them: try "
            f"fewer than {workers} workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _visible_device(number: int) -> str:
    """What a process sees as its only GPU, if it is this one of those that are seen here."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[number] if seen else str(number)


def _begin_worker(
    places: Any, threads: int, config: ComparisonConfig, work: Path, device: torch.device, sharing: int
) -> None:
    """Of a process that has not used CUDA yet."""
    global _examiner
    place = places.get()
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place
    torch.set_num_threads(threads)
    choose_device(device.type)  # sets how this process computes
    _examiner = _Examiner(config, work, device, sharing, in_worker=True)


_examiner: "_Examiner | None" = None  # of a worker


def _rows_in_worker(run: ComparisonRun) -> list[ComparisonRow]:
    assert _examiner is not None
    return _rows_of(run, _examiner)


def _expected_seconds(rows: Sequence[ComparisonRow], run: ComparisonRun, device: str) -> float:
    """What a run takes: as much as another seed or rate of the model on this kind of device, or as the longest of the
    others; nothing is known before the first.
    """
    known = [row for row in rows if row.metric == "run" and row.status == FINISHED and row.device == device]
    alike = {one.key[2] for one in run.comparison.runs() if one.model == run.model}
    same = [row.value or 0.0 for row in known if row.model == run.model and row.settings in alike]
    return max(same or [row.value or 0.0 for row in known], default=0.0)


def _rows_of(run: ComparisonRun, examiner: "_Examiner") -> list[ComparisonRow]:
    """The rows of one run. What goes wrong in it becomes rows that say so."""
    begin, where = time.perf_counter(), environment(examiner.device)
    model, seed, settings = run.key
    steps, status, detail, found = 0, FINISHED, run.settings(), []
    training = examiner.training(run)
    torch.compiler.reset()  # a function is compiled eight times, for what differs between runs too, and then no more
    if examiner.device.type == "cuda":  # what the run before it had is neither its memory nor its peak
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found += _costs(run, training)
        result = train(training, prepare=lambda network: initialize_by_name(network, seed))
        steps = result.steps
        found += [_number("training_loss", result.loss), _number("tokens", result.tokens)]
        found += _speed(Path(training.output), examiner.sharing)
        found += list(examiner.examine(Path(training.output)))
    except NonFiniteError as error:
        status, detail = DIVERGED, " ".join(str(error).split())
    except Exception as error:  # one run must not end the others: its rows say what happened
        logger.debug("a run failed", exc_info=True)
        status, detail = FAILED, " ".join(f"{type(error).__name__}: {error}".split())[:500]
    seconds = round(time.perf_counter() - begin, 1)
    found.append({"metric": "run", "value": seconds, "count": steps, "detail": detail})
    shared: dict[str, Any] = {"model": model, "seed": seed, "settings": settings, "status": status}
    shared |= {"device": where.device, "torch": where.torch, "loglinear": where.loglinear, "date": where.date}
    return [ComparisonRow(**{**shared, **row}) for row in found]


def _number(metric: str, value: float | None, **more: Any) -> dict[str, Any]:
    return {"metric": metric, "value": value if value is None or math.isfinite(value) else None, **more}


def _costs(run: ComparisonRun, training: TrainConfig) -> Iterator[dict[str, Any]]:
    config = run.model_config()
    cost = config.cost(training.sequence_length, device="cpu")  # states of all models in float32
    softmax = set(config.mixers) == {"attention"}
    levels = 0 if softmax else config.num_levels or 1
    yield _number("parameters", cost.parameters)
    yield _number("state_bytes", cost.state_bytes)
    yield _number("state_bytes_one_level", cost.state_bytes // levels if levels else 0)
    yield _number("occupied_state_bytes", cost.occupied_state_bytes)
    yield _number("kv_cache_bytes", cost.kv_cache_bytes if "attention" in config.mixers else 0)


def _speed(output: Path, sharing: int) -> Iterator[dict[str, Any]]:
    """Of a training, from its metrics: the median over its reports, the first ones aside, which begin everything.
    At most `sharing` runs were on the device."""
    reports = [row for row in read_metrics(output / METRICS_FILE) if "tokens_per_second" in row]
    later = reports[len(reports) // 4 :] if len(reports) > 1 else reports
    speed = statistics.median(row["tokens_per_second"] for row in later)
    yield _number("tokens_per_second", speed, count=sharing)
    if "memory_bytes" in reports[-1]:
        yield _number("memory_bytes", reports[-1]["memory_bytes"])


class _Examiner:
    """What all runs of a comparison share: the data, and what is asked of a trained model."""

    def __init__(
        self, config: ComparisonConfig, work: Path, device: torch.device, sharing: int = 1, in_worker: bool = False
    ):
        self.config, self.work, self.device = config, work, device
        self.sharing, self.in_worker = sharing, in_worker
        self.base = config.training(config.seeds[0])
        with quiet_transformers():
            self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.base.tokenizer)
        training, held_out = load_corpora(self.base, self.tokenizer)
        if held_out is None:
            raise ValueError("held_out_fraction: got 0, wanted documents to compare on")
        self.real, self.held_out = training, held_out
        # Documents and samples are chosen before anything is trained: what is missing is found out now.
        trained, longest = self.base.sequence_length, config.positions
        self.any_documents = position_loss.choose_documents(held_out, trained, False, _HELD_OUT_DOCUMENTS)
        self.long_documents = position_loss.choose_documents(held_out, longest, True, config.documents)
        tokens = config.level_tokens or trained
        (document,) = position_loss.choose_documents(held_out, tokens, True, 1)
        self.level_document = [int(token) for token in document[:tokens]]
        self.samples: list[NeedleSample] = []
        if config.needles.tasks:
            needles, haystack = config.needles, needle.haystack_for(self.tokenizer)
            self.samples = needle.samples_of(haystack, needles.tasks, needles.lengths, needles.depths, needles.samples)
        self.data = list(self.base.data)
        if config.needles.share:
            self.data.append(str(self._write_needles()))
        self.tokens_per_batch = 65_536 if device.type == "cuda" else 16_384

    def _write_needles(self) -> Path:
        """Texts with needles, as many that they are the wanted share of all tokens. The same for all runs; no value
        that is asked for afterwards is in them.
        """
        needles, path = self.config.needles, self.work / NEEDLES_FILE
        if self.in_worker:  # it is there already
            return path
        tokens = round(self.real.num_tokens * needles.share / (1 - needles.share))
        haystack = needle.haystack_for(self.tokenizer)
        asked = [value for sample in self.samples for value in sample.expected]
        drilled, made = round(tokens * needles.drill_share), []
        if tokens > drilled:
            rest = tokens - drilled
            made += training_documents(haystack, needles.train_tasks, needles.train_lengths, rest, unseen=asked)
        if drilled:
            made += training_drills(haystack, needles.drill_lengths, drilled, unseen=asked)
        text = "".join(json.dumps({"text": text}) + "\n" for text in made)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return path

    def training(self, run: ComparisonRun) -> TrainConfig:
        """The training of a run, with its model in a file; one that was stopped there goes on."""
        folder = self.work / f"{run.model}-seed{run.seed}-{run.key[2]}"
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "model.json"
        model.write_text(json.dumps(run.options, indent=2), encoding="utf-8")
        resume = newest_checkpoint(folder) is not None
        changes = {"data": self.data, "model": str(model), "output": str(folder), "resume": resume}
        progress = run.training.progress and not self.in_worker
        return run.training.replace(**changes, device=self.device.type, progress=progress)

    def examine(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Everything that is asked of a trained model."""
        yield from self._data()
        model, _ = load_checkpoint(folder, device=self.device)
        yield from self._losses(model)
        yield from self._levels(model)
        yield from self._needles(model, folder)

    def _data(self) -> Iterator[dict[str, Any]]:
        for metric, corpus in (("corpus_tokens", self.real), ("held_out_tokens", self.held_out)):
            yield _number(metric, corpus.num_tokens, count=len(corpus), detail=corpus.identity)

    def _losses(self, model: LogLinearForCausalLM) -> Iterator[dict[str, Any]]:
        trained, longest = self.base.sequence_length, self.config.positions
        losses = position_loss.document_losses(model, self.any_documents, trained, self.tokens_per_batch)
        (row,) = position_loss.tabulate("", losses, [0, trained])
        yield _number("held_out_loss", row.loss, standard_error=row.standard_error, count=row.documents)
        losses = position_loss.document_losses(model, self.long_documents, longest, self.tokens_per_batch)
        for row in position_loss.tabulate("", losses, position_edges(trained, longest)):
            place = {"position": row.position_start, "until": row.position_end}
            yield _number("position_loss", row.loss, standard_error=row.standard_error, count=row.documents, **place)

    def _levels(self, model: LogLinearForCausalLM) -> Iterator[dict[str, Any]]:
        if set(model.config.mixers) == {"attention"} or (model.config.num_levels or 1) == 1:
            return
        shares = inspection.level_shares_on(model, self.level_document)
        for level, (share, scale) in enumerate(inspection.mean_by_level(shares)):
            yield _number("level_share", share, position=level)
            if scale is not None:
                yield _number("level_scale", scale, position=level)

    def _needles(self, model: LogLinearForCausalLM, folder: Path) -> Iterator[dict[str, Any]]:
        needles = self.config.needles
        if not needles.tasks:
            return
        losses = needle.answer_losses(model, self.tokenizer, self.samples, self.tokens_per_batch)
        for task in needles.tasks:
            for length in needles.lengths:
                own = [
                    loss
                    for loss, sample in zip(losses, self.samples, strict=True)
                    if (sample.task, sample.length) == (task, length)
                ]
                error = statistics.stdev(own) / math.sqrt(len(own)) if len(own) > 1 else None
                place = {"task": task, "position": length, "count": len(own)}
                yield _number("needle_loss", statistics.fmean(own), standard_error=error, **place)
        dtype = choose_device(self.device.type, self.base.precision)[1]
        asked, _ = load_checkpoint(folder, device=self.device, dtype=dtype)
        answers = needle.answers(asked, self.tokenizer, self.samples, self.tokens_per_batch)
        for cell in needle.tabulate(needle.rows_of("", self.samples, answers)):
            place = {"task": cell.task, "position": cell.length, "depth": cell.depth, "count": cell.samples}
            yield _number("needle", cell.accuracy, standard_error=cell.standard_error, **place)


def position_edges(trained: int, longest: int) -> list[int]:
    """Edges of buckets of positions: doubling, with an edge at the trained length.

    >>> position_edges(100, 300)
    [0, 16, 32, 64, 100, 128, 256, 300]
    """
    edges = set(position_loss.bucket_edges(longest))
    return sorted(edges | ({trained} if trained < longest else set()))
