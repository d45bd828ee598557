"""Tasks of EleutherAI's evaluation harness (lm_eval, an optional dependency) on our checkpoints and other causal
models.

The model and its tokenizer are handed to the harness's own wrapper for models of transformers, so that every tokenizer
works, bytes included; a text begins with the tokenizer's beginning token, as it does in training.
"""

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from loglinear import plots
from loglinear.evals.needle import load_any
from loglinear.evals.position_loss import write_table
from loglinear.train.checkpoints import resolve_checkpoint

RESULTS_FILE, TABLE_FILE, SAMPLES_FILE, PLOT_FILE = (
    "harness.json", "harness.csv", "harness_samples.jsonl", "harness.png",
)  # fmt: skip


@dataclass(frozen=True)
class HarnessRow:
    """One metric of one task. `filter` is the harness's name of how answers were cut out of the text; `standard_error`
    is None where the harness gives none.
    """

    model: str
    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    samples: int
    fewshot: int
    version: str


def require_harness() -> Any:
    """The package lm_eval.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        importlib.import_module("lm_eval.models.huggingface")
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise ImportError(
            "the evaluation harness is not installed: pip install 'log-linear-attention[harness]' "
            f"(or pip install lm_eval); {error}"
        ) from error


def evaluate_model(
    path: str | Path,
    tasks: Sequence[str],
    include_path: Sequence[str | Path] = (),
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    chat: bool = False,
    metadata: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """What the harness finds: its results as it gives them, with the answers to each question under "samples".

    Args:
        path: folder of a checkpoint or run, or any causal model of transformers by folder or hub name.
        tasks: by name.
        include_path: folders with task files of one's own.
        fewshot: examples before a question; default: what the task says.
        limit: questions of each task; default: all.
        batch_size: questions at once.
        max_length: tokens of a text; longer ones lose their beginning. Default: what the model is meant for
            (`max_position_embeddings`); models whose state does not grow can be given more.
        chat: put questions into the tokenizer's chat template.
        metadata: what tasks want to know that make their own texts, such as `max_seq_lengths` of those of RULER. They
            measure lengths with the model's tokenizer unless `tokenizer` names another.
        seed: of the choice of examples.
        device, dtype: where to compute, and the type of the weights.

    Raises:
        ImportError: the harness is not installed.
        ValueError: no task, an unknown one, or numbers below 1.
        FileNotFoundError: no model, or no folder of task files there.
    """
    if not tasks:
        raise ValueError("tasks: got none, wanted at least one name")
    for name, value in (("limit", limit), ("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, wanted at least 1")
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot: got {fewshot}, wanted at least 0")
    for folder in include_path:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"include path: got {folder}, wanted a folder with task files")
    harness = require_harness()
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    with _quiet("lm_eval"):
        home = Path(path).expanduser()
        tokenizer_of = resolve_checkpoint(home) if home.is_dir() else path
        manager = TaskManager(
            include_path=[str(folder) for folder in include_path] or None,
            metadata={"tokenizer": str(tokenizer_of), **(metadata or {})},
        )
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise ValueError(
                f"tasks: the harness knows no {', '.join(unknown)}; own task files are found with an include path"
            )
        model, tokenizer = load_any(path, device, dtype)
        wrap: Any = HFLM  # a decorator hides its signature from type checkers
        wrapped = wrap(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            add_bos_token=tokenizer.bos_token_id is not None,
        )
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        return harness.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=fewshot,
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=True,
            **dict.fromkeys(seeds, seed),
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only warnings of a package that tells each step."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def rows_of(model: str, results: Mapping[str, Any]) -> list[HarnessRow]:
    """The numbers of all tasks and groups, one row for each metric."""
    rows = []
    for task, metrics in results["results"].items():
        counted = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{how}")
            rows.append(
                HarnessRow(
                    model=model,
                    task=task,
                    metric=metric,
                    filter=how,
                    value=float(value),
                    standard_error=float(error) if isinstance(error, (int, float)) else None,
                    higher_is_better=better.get(metric),
                    samples=int(counted),
                    fewshot=int(results.get("n-shot", {}).get(task, 0)),
                    version=str(results.get("versions", {}).get(task, "")),
                )
            )
    return rows


def harness_table(rows: Sequence[HarnessRow]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for the terminal: a line for each task and metric, a column for each model."""
    models = list(dict.fromkeys(row.model for row in rows))
    cells = {(row.model, row.task, row.metric, row.filter): row for row in rows}
    lines = []
    for task, metric, how in dict.fromkeys((row.task, row.metric, row.filter) for row in rows):
        line = [task, metric if how == "none" else f"{metric} ({how})"]
        for model in models:
            row = cells.get((model, task, metric, how))
            text = "–"
            if row is not None:
                text = f"{row.value:.4f}" + ("" if row.standard_error is None else f" ± {row.standard_error:.4f}")
            line.append(text)
        lines.append(line)
    return ["task", "metric", *models], lines


def plot(rows: Sequence[HarnessRow]) -> Figure:
    """A panel for each metric: a point for each task and model, and bars of one standard error where there is one."""
    metrics = list(dict.fromkeys((row.metric, row.filter) for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    most = max(len({row.task for row in rows if (row.metric, row.filter) == one}) for one in metrics)
    columns = min(4, len(metrics))
    with plots.style():
        figure, axes = plots.new_figure(-(-len(metrics) // columns), columns, width=2.6 + 0.5 * most, height=3.4)
        for axis, (metric, how) in zip(axes, metrics, strict=False):
            own = [row for row in rows if (row.metric, row.filter) == (metric, how)]
            tasks = list(dict.fromkeys(row.task for row in own))
            for number, model in enumerate(models):
                found = [row for row in own if row.model == model]
                shift = 0.15 * (number - (len(models) - 1) / 2)
                axis.errorbar(
                    [tasks.index(row.task) + shift for row in found],
                    [row.value for row in found],
                    yerr=[row.standard_error or 0.0 for row in found],
                    fmt=plots.MARKERS[number % len(plots.MARKERS)],
                    color=plots.PALETTE[number % len(plots.PALETTE)],
                    capsize=3,
                    label=model,
                )
            axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
            axis.set_xlim(-0.5, len(tasks) - 0.5)
            higher = own[0].higher_is_better
            better = "" if higher is None else f", {'higher' if higher else 'lower'} is better"
            axis.set_title((metric if how == "none" else f"{metric} ({how})") + better)
        for axis in axes[len(metrics) :]:
            axis.set_visible(False)
        plots.legend_below(figure, axes[0])
    return figure


def write_result(
    results: Mapping[str, Mapping[str, Any]], rows: Sequence[HarnessRow], folder: str | Path
) -> list[Path]:
    """Writes `harness.csv`, `harness.png`, `harness.json` (the harness's results by model, without samples) and
    `harness_samples.jsonl` (each question and answer).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = write_table(folder / TABLE_FILE, rows, HarnessRow)
    whole = {
        model: {key: value for key, value in found.items() if key != "samples"} for model, found in results.items()
    }
    (folder / RESULTS_FILE).write_text(json.dumps(whole, indent=2, default=str, ensure_ascii=False), encoding="utf-8")
    with (folder / SAMPLES_FILE).open("w", encoding="utf-8") as file:
        for model, found in results.items():
            for task, samples in found.get("samples", {}).items():
                for sample in samples:
                    line = {"model": model, "task": task, **sample}
                    file.write(json.dumps(line, default=str, ensure_ascii=False) + "\n")
    drawn = [plots.save(plot(rows), folder / PLOT_FILE)] if rows else []
    return [table, *drawn, folder / RESULTS_FILE, folder / SAMPLES_FILE]
