"""Accuracy at multi-query associative recall (MQAR, see `loglinear.data.recall`): by number of pairs, and by distance
between a pair and its query.

Test sequences depend on the task alone, so that every model answers the same queries, whatever seed it was trained
with; their seeds are neither those of training nor those of validation. Errors are standard errors over sequences,
because the queries of one sequence are not independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loglinear import plots
from loglinear.data.recall import RecallBatch, RecallTask
from loglinear.evals.position_loss import labels_of, mean_and_error, write_table
from loglinear.models import LogLinearForCausalLM
from loglinear.train import resolve_checkpoint
from loglinear.train.checkpoints import load_model, train_config_of
from loglinear.train.recall import answer, examination, recall_task

FIRST_DISTANCE = 4


@dataclass(frozen=True)
class RecallAccuracy:
    """Share of queries that one model answers right.

    `pairs` None: all numbers of pairs together. `distance_start` and `distance_end` (tokens from a key in its pair to
    its query, the end not included) None: all distances. `standard_error` is None with one sequence.
    """

    model: str
    length: int
    pairs: int | None
    distance_start: int | None
    distance_end: int | None
    accuracy: float
    standard_error: float | None
    queries: int
    sequences: int


def distance_edges(length: int) -> list[int]:
    """Edges of the buckets of distances, doubling, from 0 to the length.

    >>> distance_edges(20)
    [0, 4, 8, 16, 20]
    """
    edges, edge = [0], FIRST_DISTANCE
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def tabulate(
    model: str, length: int, right: Mapping[int, np.ndarray], distances: Mapping[int, np.ndarray]
) -> list[RecallAccuracy]:
    """Rows of one model: for each number of pairs over all distances, then by distance, then all numbers together by
    distance.

    Args:
        right: number of pairs -> bool `[N, P]`, which queries were answered right.
        distances: the same -> int `[N, P]`.
    """
    edges = distance_edges(length)
    buckets = list(zip(edges[:-1], edges[1:], strict=True))
    rows = []
    for pairs in right:
        rows.append(_row(model, length, pairs, None, [(right[pairs], np.ones_like(right[pairs]))]))
    for chosen in (*((pairs,) for pairs in right), tuple(right)):
        for start, end in buckets:
            parts = [
                (right[pairs], np.logical_and(distances[pairs] >= start, distances[pairs] < end)) for pairs in chosen
            ]
            if any(inside.any() for _, inside in parts):
                name = chosen[0] if len(chosen) == 1 else None
                rows.append(_row(model, length, name, (start, end), parts))
        if len(right) == 1:
            break
    return rows


def _row(
    model: str,
    length: int,
    pairs: int | None,
    bucket: tuple[int, int] | None,
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
) -> RecallAccuracy:
    sums = np.concatenate([np.logical_and(right, inside).sum(1) for right, inside in parts]).astype(float)
    counts = np.concatenate([inside.sum(1) for _, inside in parts]).astype(float)
    kept = counts > 0
    mean, error = mean_and_error(sums[kept], counts[kept])
    start, end = (None, None) if bucket is None else bucket
    return RecallAccuracy(model, length, pairs, start, end, mean, error, int(counts.sum()), int(kept.sum()))


def evaluate(
    models: Mapping[str, LogLinearForCausalLM],
    batches: Mapping[int, RecallBatch],
    length: int,
    dtype: torch.dtype = torch.float32,
) -> list[RecallAccuracy]:
    """Accuracy of models by name on the same sequences, `batches` by number of pairs.

    Raises:
        ValueError: no models, or one whose vocabulary is too small for the sequences.
    """
    if not models:
        raise ValueError("recall needs at least one model, got none")
    distances = {pairs: batch.distances.numpy() for pairs, batch in batches.items()}
    largest = max(int(batch.inputs.max()) for batch in batches.values())
    rows = []
    for name, model in models.items():
        if model.config.vocab_size <= largest:
            raise ValueError(
                f"{name}: got a vocabulary of {model.config.vocab_size}, wanted more than {largest}, the largest token"
            )
        right = {pairs: answer(model, batch, dtype)[0].numpy() for pairs, batch in batches.items()}
        rows += tabulate(name, length, right, distances)
    return rows


def evaluate_checkpoints(
    checkpoints: Sequence[str | Path],
    sequences: int = 1000,
    length: int | None = None,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    labels: Sequence[str] = (),
) -> list[RecallAccuracy]:
    """Accuracy of trained models on test sequences.

    Args:
        checkpoints: folders of checkpoints or runs of `loglinear train --task mqar`.
        sequences: of each number of pairs.
        length: tokens of a sequence; default: that of the first model's training.
        options: `pairs`, `vocabulary` and `power` of the task, where they are not those of the first model's training.
        device, dtype: where to compute, and float32 or bfloat16.
        labels: names of the models, as many; default: from their paths.

    Raises:
        ValueError: nothing to evaluate, labels that do not fit, a task that cannot be or is not that of a model.
        FileNotFoundError: no checkpoint there.
    """
    if not checkpoints:
        raise ValueError("recall needs at least one checkpoint, got none")
    if labels and len(labels) != len(checkpoints):
        raise ValueError(f"got {len(labels)} labels for {len(checkpoints)} checkpoints")
    if len(set(labels)) != len(labels):
        raise ValueError(f"every checkpoint needs a label of its own, got {', '.join(labels)}")
    if sequences < 1:
        raise ValueError(f"sequences: got {sequences}, wanted at least 1")
    paths = [resolve_checkpoint(path) for path in checkpoints]
    tasks = [_trained_task(path) for path in paths]
    for path, task in zip(paths, tasks, strict=True):
        if task.vocabulary != tasks[0].vocabulary:
            raise ValueError(
                f"{path} was trained on a vocabulary of {task.vocabulary}, {paths[0]} on one of {tasks[0].vocabulary}: "
                "they do not know the same keys"
            )
    trained = {name: getattr(tasks[0], name) for name in ("pairs", "vocabulary", "power")}
    task = RecallTask.from_options({**trained, **(options or {})}, length=length or tasks[0].length)
    if task.vocabulary != tasks[0].vocabulary:
        raise ValueError(
            f"vocabulary: got {task.vocabulary}, wanted {tasks[0].vocabulary}, which the models were trained on"
        )
    models = {}
    for name, path in zip(labels or labels_of(paths), paths, strict=True):
        model = load_model(path, dtype=torch.float32)
        torch.nn.Module.to(model, device)
        models[name] = model.eval()
    return evaluate(models, examination(task, "test", sequences), task.length, dtype)


def _trained_task(path: Path) -> RecallTask:
    config = train_config_of(path)
    if config.task != "mqar":
        raise ValueError(f"{path} was trained on text, wanted a model of `loglinear train --task mqar`")
    return recall_task(config)


def accuracy_table(rows: Sequence[RecallAccuracy]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for the terminal: accuracy ± standard error in per cent, by model and number of pairs."""
    whole = [row for row in rows if row.distance_start is None]
    pairs = sorted({row.pairs for row in whole if row.pairs is not None})
    cells = {(row.model, row.pairs): row for row in whole}
    lines = []
    for name in dict.fromkeys(row.model for row in whole):
        line = [name]
        for number in pairs:
            row = cells[name, number]
            line.append(percent(row.accuracy, row.standard_error))
        lines.append(line)
    return ["model", *(f"{number} pairs" for number in pairs)], lines


def percent(value: float, error: float | None) -> str:
    """A share in per cent, with its error: 93.1 ± 0.4."""
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}"


def plot(rows: Sequence[RecallAccuracy]) -> Figure:
    """Accuracy against the number of pairs, and beside it against the distance, all numbers of pairs together."""
    names = list(dict.fromkeys(row.model for row in rows))
    numbers = {row.pairs for row in rows if row.pairs is not None}
    together = None if len(numbers) > 1 else next(iter(numbers))
    with plots.style():
        figure, (left, right) = plots.new_figure(1, 2, width=5.0, height=3.8)
        by_pairs, by_distance = [], []
        for name in names:
            own = [row for row in rows if row.model == name]
            whole = [row for row in own if row.distance_start is None]
            by_pairs.append(_line(name, [float(row.pairs or 0) for row in whole], whole))
            near = [row for row in own if row.distance_start is not None and row.pairs == together]
            by_distance.append(
                _line(name, [((row.distance_start or 0) + (row.distance_end or 0)) / 2 for row in near], near)
            )
        plots.draw_series(left, by_pairs)
        plots.token_axis(left, sorted(numbers), "key-value pairs")
        plots.draw_series(right, by_distance)
        plots.token_axis(
            right, distance_edges(rows[0].length)[1:], "distance from pair to query (tokens; bars: ± 1 standard error)"
        )
        for axis, title in ((left, f"Recall in {rows[0].length:,} tokens"), (right, "By distance")):
            _share_axis(axis)
            axis.set_title(title)
        plots.legend_below(figure, left)
    return figure


def _line(name: str, x: list[float], rows: Sequence[RecallAccuracy]) -> plots.Series:
    return plots.Series(
        name, x, [100 * row.accuracy for row in rows], error=[100 * (row.standard_error or 0.0) for row in rows]
    )


def _share_axis(axis: Axes) -> None:
    axis.set_ylim(-3, 103)
    axis.set_ylabel("queries answered right (%)")


def write_result(rows: Sequence[RecallAccuracy], folder: str | Path) -> list[Path]:
    """Writes `mqar.csv` and `mqar.png`."""
    folder = Path(folder)
    return [write_table(folder / "mqar.csv", rows, RecallAccuracy), plots.save(plot(rows), folder / "mqar.png")]
