"""Loss against position: how well a model predicts a token, by how many tokens of the document it has read.

A model that uses its context predicts late tokens better than early ones; one that forgets stops improving.
The same documents and positions are used for every checkpoint, so that differences are paired: what makes a
document hard is hard for all.

Position i means: the model has just read token i of a document (counted from 0, the beginning token
included) and predicts token i + 1. Errors are standard errors over documents, because tokens of one document
are not independent.
"""

import contextlib
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from loglinear import plots
from loglinear.data import Corpus, Documents
from loglinear.data.tokenizers import fingerprint
from loglinear.models import LogLinearForCausalLM
from loglinear.train import held_out_corpus, load_checkpoint, resolve_checkpoint
from loglinear.train.checkpoints import train_config_of

FIRST_BUCKET = 16
_LOGITS_AT_ONCE = 4096


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of one model in one bucket of positions: nats per token over `tokens` tokens of `documents`
    documents. `confidence_low` to `confidence_high` is the 95 % interval over documents (Student's t; None with one).
    """

    model: str
    position_start: int
    position_end: int
    loss: float
    standard_error: float | None
    documents: int
    tokens: int
    confidence_low: float | None = field(init=False)
    confidence_high: float | None = field(init=False)

    def __post_init__(self):
        _set_confidence(self, self.loss)


@dataclass(frozen=True)
class LossDifference:
    """Loss of `model` minus that of `baseline` on the same tokens of one bucket, with the paired standard
    error and 95 % interval over documents.
    """

    model: str
    baseline: str
    position_start: int
    position_end: int
    difference: float
    standard_error: float | None
    documents: int
    tokens: int
    confidence_low: float | None = field(init=False)
    confidence_high: float | None = field(init=False)

    def __post_init__(self):
        _set_confidence(self, self.difference)

    @property
    def clear(self) -> bool:
        """Whether the difference is clearly not zero: paired t-test over documents, two-sided, 5 % level."""
        if self.standard_error is None:
            return False
        return abs(self.difference) > student_quantile(self.documents - 1) * self.standard_error


def _set_confidence(row: PositionLoss | LossDifference, mean: float) -> None:
    """The 95 % interval round a mean over documents."""
    low = high = None
    if row.standard_error is not None:
        reach = student_quantile(row.documents - 1) * row.standard_error
        low, high = mean - reach, mean + reach
    object.__setattr__(row, "confidence_low", low)
    object.__setattr__(row, "confidence_high", high)


@dataclass(frozen=True)
class PositionLossResult:
    """What `evaluate` found: a table per model, differences to the first one, and the losses themselves by
    model and document. `trained_lengths` are tokens per row of the training, for the models of which it is known.
    """

    table: list[PositionLoss]
    differences: list[LossDifference]
    losses: dict[str, list[np.ndarray]]
    length: int
    trained_lengths: dict[str, int] = field(default_factory=dict)


def student_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution with `degrees` of freedom (to within 0.01)."""
    few = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    return few[degrees - 1] if degrees <= len(few) else 1.96 + 2.4 / degrees + 3.2 / degrees**2


def bucket_edges(length: int, width: int | None = None) -> list[int]:
    """Edges of position buckets from 0 to `length`: 0, 16, 32, 64 … doubling, or every `width` positions.

    >>> bucket_edges(100)
    [0, 16, 32, 64, 100]

    Raises:
        ValueError: a length or width below 1.
    """
    if length < 1 or (width is not None and width < 1):
        raise ValueError(f"position buckets need a length and a width of at least 1, got {length} and {width}")
    if width is not None:
        return [*range(0, length, width), length]
    edges, edge = [0], FIRST_BUCKET
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


@torch.no_grad()
def document_losses(
    model: LogLinearForCausalLM,
    documents: Sequence[np.ndarray],
    length: int,
    tokens_per_batch: int = 16_384,
) -> list[np.ndarray]:
    """Loss of every token of some documents, each read from its beginning.

    Args:
        model: in evaluation mode.
        documents: token ids; a document longer than `length` + 1 tokens is cut there, one of fewer than 2 has
            no token to predict.
        length: the most positions of a document.
        tokens_per_batch: documents are packed into batches of about this many tokens (a longer one is a
        batch of its own).

    Returns:
        Per document float64 [min(length, tokens - 1)]: entry i is the loss in nats of predicting token i + 1.
    """
    device = next(model.parameters()).device
    losses: list[np.ndarray] = []
    for batch in _batches([np.asarray(document[: length + 1]) for document in documents], tokens_per_batch):
        read = [tokens[:-1] for tokens in batch if len(tokens) > 1]
        if read:
            inputs = torch.from_numpy(np.concatenate(read).astype(np.int64)).to(device)
            following = np.concatenate([tokens[1:] for tokens in batch if len(tokens) > 1]).astype(np.int64)
            ends = np.cumsum([0, *(len(tokens) for tokens in read)]).astype(np.int32)
            targets = torch.from_numpy(following).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = model.model(
                    input_ids=inputs[None], cu_seqlens=torch.from_numpy(ends).to(device), use_cache=False
                ).last_hidden_state[0]
                flat = torch.cat(
                    [
                        F.cross_entropy(model.lm_head(part).float(), target, reduction="none")
                        for part, target in zip(
                            hidden.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True
                        )
                    ]
                )
            values = iter(np.split(flat.double().cpu().numpy(), ends[1:-1]))
        else:
            values = iter(())
        losses.extend(next(values) if len(tokens) > 1 else np.zeros(0) for tokens in batch)
    return losses


def _batches(documents: list[np.ndarray], tokens_per_batch: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    size = 0
    for tokens in documents:
        if batch and size + len(tokens) > tokens_per_batch:
            yield batch
            batch, size = [], 0
        batch.append(tokens)
        size += len(tokens)
    if batch:
        yield batch


def mean_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """Mean per token and its standard error over documents, from sums and token counts of each document.

    The mean is a ratio of two random sums, so its error is that of the ratio estimator; None with a single
    document.
    """
    total = counts.sum()
    mean = float(sums.sum() / total)
    number = len(counts)
    if number < 2:
        return mean, None
    squares = float(((sums - mean * counts) ** 2).sum())
    return mean, math.sqrt(number / (number - 1) * squares) / float(total)


def _sums(losses: Sequence[np.ndarray], start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = [document[start:end] for document in losses]
    kept = [piece for piece in pieces if len(piece)]
    return np.array([piece.sum() for piece in kept]), np.array([len(piece) for piece in kept])


def tabulate(model: str, losses: Sequence[np.ndarray], edges: Sequence[int]) -> list[PositionLoss]:
    """Loss by bucket of positions; buckets that no document reaches are left out."""
    table = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        sums, counts = _sums(losses, start, end)
        if len(counts):
            mean, error = mean_and_error(sums, counts)
            table.append(PositionLoss(model, start, end, mean, error, len(counts), int(counts.sum())))
    return table


def compare(
    model: str,
    losses: Sequence[np.ndarray],
    baseline: str,
    baseline_losses: Sequence[np.ndarray],
    edges: Sequence[int],
) -> list[LossDifference]:
    """Paired differences by bucket; both models must have read the same tokens.

    Raises:
        ValueError: the documents differ in number or length.
    """
    if [len(one) for one in losses] != [len(one) for one in baseline_losses]:
        raise ValueError(f"{model} and {baseline} were not evaluated on the same tokens")
    paired = [one - other for one, other in zip(losses, baseline_losses, strict=True)]
    return [
        LossDifference(
            model,
            baseline,
            row.position_start,
            row.position_end,
            row.loss,
            row.standard_error,
            row.documents,
            row.tokens,
        )
        for row in tabulate(model, paired, edges)
    ]


def choose_documents(
    corpus: Corpus, length: int, whole: bool = True, maximum: int | None = 128, seed: int = 0
) -> list[np.ndarray]:
    """Documents to evaluate on: a random selection that depends on the seed alone.

    Args:
        corpus: where they are taken from.
        length: positions that are evaluated.
        whole: only documents that reach the last position, so that every bucket has the same documents; False: all.
        maximum: at most so many; None: all.

    Raises:
        ValueError: no document is long enough.
    """
    long_enough = np.flatnonzero(corpus.lengths > (length if whole else 1))
    if not len(long_enough):
        longest = int(corpus.lengths.max(initial=0))
        raise ValueError(
            f"no document has more than {length} tokens (the longest has {longest}): "
            "choose a smaller length (--length), or take documents of all lengths (--all-documents)"
        )
    order = np.random.default_rng(seed).permutation(long_enough)
    return [corpus[int(index)] for index in (order if maximum is None else order[:maximum])]


def evaluate(
    models: dict[str, LogLinearForCausalLM],
    documents: Sequence[np.ndarray],
    length: int,
    width: int | None = None,
    tokens_per_batch: int = 16_384,
) -> PositionLossResult:
    """Losses by position of models by name, on the same documents; the first is the one the others are
    compared with.

    Raises:
        ValueError: no model, or no token to predict.
    """
    if not models:
        raise ValueError("position loss needs at least one model, got none")
    edges = bucket_edges(length, width)
    losses = {name: document_losses(model, documents, length, tokens_per_batch) for name, model in models.items()}
    first, *others = losses
    table = [row for name in losses for row in tabulate(name, losses[name], edges)]
    if not table:
        raise ValueError(f"the {len(documents)} documents hold no token to predict")
    differences = [row for name in others for row in compare(name, losses[name], first, losses[first], edges)]
    return PositionLossResult(table, differences, losses, length)


def write_table(path: str | Path, rows: Sequence[Any], kind: type) -> Path:
    """Writes rows of one `kind` (a dataclass) as CSV."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.name for column in fields(kind)])
        for row in rows:
            writer.writerow(["" if cell is None else _text(cell) for cell in astuple(row)])
    return path


def _text(cell: object) -> object:
    return f"{cell:.6f}" if isinstance(cell, float) else cell


def plot(result: PositionLossResult, unit: str = "nats per token") -> Figure:
    """Loss against position with 95 % confidence bands over documents, and beside it the paired differences to the
    first model where there are several.
    """
    names = list(result.losses)
    documents = max(row.documents for row in result.table)
    with plots.style():
        figure, axes = plots.new_figure(1, 2 if result.differences else 1, width=5.2, height=3.8)
        lines = [
            _line([row for row in result.table if row.model == name], name, lambda row: row.loss, index)
            for index, name in enumerate(names)
        ]
        plots.draw_series(axes[0], lines)
        plots.follow_lines(axes[0], lines)
        axes[0].set_ylabel(f"loss ({unit})")
        axes[0].set_title(f"Loss by position, {documents} documents")
        _position_axis(axes[0], result)
        _mark_trained_length(axes[0], result)
        if result.differences:
            lines = [
                _line([row for row in result.differences if row.model == name], name, lambda row: row.difference, index)
                for index, name in enumerate(names)
                if index > 0
            ]
            axes[1].axhline(0, color="#555555", linewidth=1)
            plots.draw_series(axes[1], lines)
            plots.follow_lines(axes[1], lines)
            axes[1].set_ylabel(f"difference ({unit})")
            axes[1].set_title(f"Difference from {names[0]} on the same tokens")
            _position_axis(axes[1], result)
            _mark_trained_length(axes[1], result)
        plots.legend_below(figure, axes[0])
    return figure


def _mark_trained_length(axis, result: PositionLossResult) -> None:
    """A vertical line where positions begin that no model was trained on, where it is the same for all."""
    lengths = {result.trained_lengths.get(name) for name in result.losses}
    length = lengths.pop()
    if not lengths and length is not None and length < result.length:
        axis.axvline(length, color="#555555", linewidth=1, linestyle=":", label=f"trained on rows of {length:,} tokens")


def _line(rows: Sequence, name: str, value, index: int) -> plots.Series:
    return plots.Series(
        name,
        [(row.position_start + row.position_end) / 2 for row in rows],
        [value(row) for row in rows],
        low=[value(row) if row.confidence_low is None else row.confidence_low for row in rows],
        high=[value(row) if row.confidence_high is None else row.confidence_high for row in rows],
        colour=index,
        marker=index,
    )


def _position_axis(axis, result: PositionLossResult) -> None:
    edges = sorted({row.position_end for row in result.table})
    plots.token_axis(axis, edges, "position in the document (tokens; bands: 95 % confidence)")
    axis.set_xlim(edges[0] / 3, edges[-1] * 1.1)


TABLE_NOTE = (
    "± one standard error over documents; * a difference from zero at the 5 % level (paired t-test over documents)"
)


def table_text(result: PositionLossResult) -> tuple[list[str], list[list[str]]]:
    """Header and lines for the terminal and for Markdown: loss ± standard error of each model by bucket,
    then the differences.
    """
    names = list(result.losses)
    header = ["positions", "documents", "tokens", *names]
    header += [f"{name} − {names[0]}" for name in names[1:]]
    cells = {(row.model, row.position_start): row for row in result.table}
    paired = {(row.model, row.position_start): row for row in result.differences}
    lines = []
    for row in (row for row in result.table if row.model == names[0]):
        start = row.position_start
        line = [f"{start} … {row.position_end - 1}", str(row.documents), f"{row.tokens:,}"]
        line += [plus_minus(cells[name, start].loss, cells[name, start].standard_error) for name in names]
        for name in names[1:]:
            difference = paired[name, start]
            mark = " *" if difference.clear else ""
            line.append(plus_minus(difference.difference, difference.standard_error, sign=True) + mark)
        lines.append(line)
    return header, lines


def beyond_training(result: PositionLossResult) -> list[str]:
    """A line for each trained length that the evaluated positions go beyond, with the models that have it."""
    names: dict[int, list[str]] = {}
    for name, length in result.trained_lengths.items():
        if length < result.length:
            names.setdefault(length, []).append(name)
    return [
        f"Trained on rows of {length:,} tokens: {', '.join(names[length])}. Positions from {length:,} on are longer "
        "than anything in training."
        for length in sorted(names)
    ]


def plus_minus(value: float, error: float | None, sign: bool = False) -> str:
    """A number with its standard error: 1.234 ± 0.012."""
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text if error is None else f"{text} ± {error:.3f}"


def labels_of(paths: Sequence[str | Path]) -> list[str]:
    """A short name for each checkpoint: its folder's (the run's for `checkpoint-STEP`), with more of the
    path where that is not unique.
    """
    parts = []
    for path in paths:
        names = [name for name in Path(path).resolve().parts if name != "/"]
        whole = names[-1:] and names[-1].startswith("checkpoint-") and len(names) > 1
        parts.append((names[:-1], [names[-1]]) if whole else (names, []))
    for with_step in (False, True):
        for depth in range(1, max(len(names) for names, _ in parts) + 1):
            labels = ["/".join([*names[-depth:], *(step if with_step else [])]) for names, step in parts]
            if len(set(labels)) == len(labels):
                return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, start=1)]


def evaluate_checkpoints(
    checkpoints: Sequence[str | Path],
    length: int | None = None,
    data: Sequence[str] = (),
    data_options: Mapping[str, Any] | None = None,
    whole: bool = True,
    maximum: int | None = 128,
    width: int | None = None,
    device: torch.device | str = "cpu",
    labels: Sequence[str] = (),
    seed: int = 0,
    tokens_per_batch: int = 16_384,
) -> PositionLossResult:
    """Loss by position of checkpoints on the documents that were held out from their training, or on other
    `data`.

    Args:
        checkpoints: folders of checkpoints or of runs; the first is the one the others are compared with.
        length: positions to evaluate; default: what the first model is meant for (`max_position_embeddings`).
        data: sources of documents as for training; default: the held-out documents of the first checkpoint, which
            the others must have held out, too.
        data_options: how to read `data`: `text_field`, `hub_subset` and `hub_split` of `Documents`.
        whole, maximum, seed: see `choose_documents`.
        width, tokens_per_batch: see `evaluate`.
        device: where to compute.
        labels: names of the checkpoints, as many; default: from their paths.

    Raises:
        ValueError: nothing to evaluate, tokenizers that differ, held-out documents that differ, or options of data
            without data, or that this data does not heed.
        FileNotFoundError: no checkpoint there.
    """
    if not checkpoints:
        raise ValueError("position loss needs at least one checkpoint, got none")
    if labels and len(labels) != len(checkpoints):
        raise ValueError(f"got {len(labels)} labels for {len(checkpoints)} checkpoints")
    if len(set(labels)) != len(labels):
        raise ValueError(f"every checkpoint needs a label of its own, got {', '.join(labels)}")
    if data_options and not data:
        raise ValueError(f"got {', '.join(data_options)} without data, wanted the documents that they are for")
    paths = [resolve_checkpoint(path) for path in checkpoints]
    named = Documents(list(data), **(data_options or {})) if data else None
    loaded = [load_checkpoint(path, device=device) for path in paths]
    tokenizer = loaded[0][1]
    for path, (_, other) in zip(paths, loaded, strict=True):
        if fingerprint(other) != fingerprint(tokenizer):
            raise ValueError(f"{path} has another tokenizer than {paths[0]}: their losses per token do not compare")
    if named is not None:
        corpus = Corpus.load(named, tokenizer)
    else:
        corpus = held_out_corpus(paths[0])
        for path in paths[1:]:
            if held_out_corpus(path).identity != corpus.identity:
                raise ValueError(
                    f"{path} did not hold out the same documents as {paths[0]}: "
                    "name documents that none of them saw (data)"
                )
    names = list(labels) or labels_of(paths)
    models = {name: model for name, (model, _) in zip(names, loaded, strict=True)}
    positions = int(loaded[0][0].config.max_position_embeddings) if length is None else length
    documents = choose_documents(corpus, positions, whole, maximum, seed)
    trained_lengths = _trained_lengths(dict(zip(names, paths, strict=True)))
    return replace(evaluate(models, documents, positions, width, tokens_per_batch), trained_lengths=trained_lengths)


def _trained_lengths(paths: Mapping[str, Path]) -> dict[str, int]:
    """Tokens per row of each training; models that were not trained by this library are left out."""
    lengths = {}
    for name, path in paths.items():
        with contextlib.suppress(FileNotFoundError):
            lengths[name] = train_config_of(path).sequence_length
    return lengths


def write_result(result: PositionLossResult, folder: str | Path, unit: str = "nats per token") -> list[Path]:
    """Writes `position_loss.csv`, `position_loss.png` and, with several models,
    `position_loss_differences.csv`.
    """
    folder = Path(folder)
    written = [write_table(folder / "position_loss.csv", result.table, PositionLoss)]
    if result.differences:
        written.append(write_table(folder / "position_loss_differences.csv", result.differences, LossDifference))
    written.append(plots.save(plot(result, unit), folder / "position_loss.png"))
    return written
