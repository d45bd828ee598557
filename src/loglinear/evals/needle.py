"""Needle in a haystack (see `loglinear.data.needles`) for our checkpoints and for any causal model of transformers.

Answers are greedy. Samples of a length are read in batches, padded on the left. Errors are standard errors over
samples.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from loglinear import plots
from loglinear.data import encode_prompt
from loglinear.data.needles import NEEDLE_TASKS, Haystack, NeedleSample, read_haystack, right_answer, score
from loglinear.evals.position_loss import document_losses, labels_of, write_table
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.train import load_checkpoint, resolve_checkpoint
from loglinear.train.reporting import quiet_transformers

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_TASKS = ("niah_single_1", "niah_single_2", "niah_single_3")
SAMPLES_FILE, CELLS_FILE, PLOT_FILE = "needle_samples.csv", "needle.csv", "needle.png"


@dataclass(frozen=True)
class NeedleRow:
    """One answer. `exact` and `contained` as in `NeedleScore`; `expected` are the values, with spaces between."""

    model: str
    task: str
    length: int
    depth: float
    sample: int
    prompt_tokens: int
    exact: int
    contained: float
    expected: str
    answer: str


@dataclass(frozen=True)
class NeedleCell:
    """One model, task, length and depth: share of exact answers over `samples`, its standard error (None with one
    sample), and the mean share of values contained. A `depth` of None is the mean over all of them.
    """

    model: str
    task: str
    length: int
    depth: float | None
    accuracy: float
    standard_error: float | None
    contained: float
    samples: int


def load_any(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A causal model in evaluation mode and its tokenizer: of this library by the folder of a checkpoint or run, any
    other by a folder or by its name on the Hugging Face hub.

    Raises:
        FileNotFoundError: no model there.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        checkpoint = resolve_checkpoint(folder)
        kind = json.loads((checkpoint / "config.json").read_text()).get("model_type")
        if kind == LogLinearConfig.model_type:
            return load_checkpoint(checkpoint, device=device, dtype=dtype)
        folder = checkpoint
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(str(folder if folder.is_dir() else path), dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(str(folder if folder.is_dir() else path))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"got {str(path)!r}, wanted the folder of a causal language model with its tokenizer, or a name on the "
            f"Hugging Face hub: {error}"
        ) from error
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer


def haystack_for(tokenizer: PreTrainedTokenizerBase, text: Sequence[str] | None = None, chat: bool = False) -> Haystack:
    """Samples for a tokenizer; with `chat` the text is the user's turn and the answer is begun in the model's.

    Raises:
        ValueError: `chat` with a tokenizer that has no chat template.
    """
    if not chat:
        return Haystack(lambda text: encode_prompt(tokenizer, text) if text else [], text)
    if not tokenizer.chat_template:
        raise ValueError("chat: got a tokenizer without a chat template, wanted one that has it")

    def wrap(text: str, answer: str) -> str:
        turn = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) + answer

    # The template has written the beginning itself.
    return Haystack(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], text, wrap)


def samples_of(
    haystack: Haystack, tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], count: int, seed: int = 0
) -> list[NeedleSample]:
    """`count` samples of each task, length and depth.

    Raises:
        ValueError: nothing to make, or as `Haystack.sample`.
    """
    for name, values in (("tasks", tasks), ("lengths", lengths), ("depths", depths)):
        if not values:
            raise ValueError(f"{name}: got none, wanted at least one")
        if len(set(values)) != len(values):
            raise ValueError(f"{name}: got {', '.join(map(str, values))}, wanted each once")
    if count < 1:
        raise ValueError(f"samples: got {count}, wanted at least 1")
    return [
        haystack.sample(task, length, depth, number, seed)
        for task in tasks
        for length in lengths
        for depth in depths
        for number in range(count)
    ]


@torch.no_grad()
def answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[NeedleSample],
    tokens_per_batch: int = 65_536,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """What a model answers, greedily, without special tokens. `on_batch` hears the number of answers so far."""
    device = next(model.parameters()).device
    pad = cast(Any, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    found: list[str] = []
    for batch in _batches(samples, tokens_per_batch):
        width = max(len(sample.tokens) for sample in batch)
        ids = torch.full((len(batch), width), 0 if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(batch):
            ids[row, width - len(sample.tokens) :] = torch.tensor(sample.tokens)
            mask[row, width - len(sample.tokens) :] = 1
        settings = GenerationConfig(
            max_new_tokens=max(sample.answer_tokens for sample in batch),
            do_sample=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        inputs, seen = ids.to(device), mask.to(device)
        with quiet_transformers():  # which warns of texts beyond the model's length: they are meant
            output = cast(Any, model).generate(inputs, attention_mask=seen, generation_config=settings)[:, width:].cpu()
        for row, sample in zip(output, batch, strict=True):
            # Rows of a batch end together; each is judged by what its own sample has room for.
            found.append(str(tokenizer.decode(row[: sample.answer_tokens].tolist(), skip_special_tokens=True)))
        if on_batch is not None:
            on_batch(len(found))
    return found


@torch.no_grad()
def answer_losses(
    model: LogLinearForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[NeedleSample],
    tokens_per_batch: int = 65_536,
) -> list[float]:
    """Mean loss of the tokens of the right answer, in nats per token, where a model is told it: says more than exact
    answers while there are few of them. For models of this library, in evaluation mode.
    """
    texts = [sample.prompt + right_answer(sample) for sample in samples]
    documents = [np.asarray(encode_prompt(tokenizer, text)) for text in texts]
    longest = max(len(document) for document in documents)
    losses = document_losses(model, documents, longest, tokens_per_batch)
    return [float(loss[len(sample.tokens) - 1 :].mean()) for loss, sample in zip(losses, samples, strict=True)]


def _batches(samples: Sequence[NeedleSample], tokens_per_batch: int) -> Iterator[list[NeedleSample]]:
    """Samples in their order, those of one task and length together, as many as the tokens allow."""
    batch: list[NeedleSample] = []
    for sample in samples:
        full = batch and (len(batch) + 1) * sample.length > tokens_per_batch
        if batch and (full or (sample.task, sample.length) != (batch[0].task, batch[0].length)):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def rows_of(model: str, samples: Sequence[NeedleSample], texts: Sequence[str]) -> list[NeedleRow]:
    """Samples with the answers of a model, judged."""
    rows = []
    for sample, text in zip(samples, texts, strict=True):
        judged = score(sample.task, text, sample.expected)
        rows.append(
            NeedleRow(
                model, sample.task, sample.length, sample.depth, sample.number, len(sample.tokens),
                int(judged.exact), judged.contained, " ".join(sample.expected), text,
            )
        )  # fmt: skip
    return rows


def tabulate(rows: Sequence[NeedleRow]) -> list[NeedleCell]:
    """Cells by model, task, length and depth; after the depths of a length their mean."""
    groups: dict[tuple[str, str, int, float | None], list[NeedleRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.task, row.length, row.depth), []).append(row)
    for row in rows:
        groups.setdefault((row.model, row.task, row.length, None), []).append(row)
    order = {key: number for number, key in enumerate(dict.fromkeys(key[:3] for key in groups))}
    cells = []
    for key in sorted(groups, key=lambda key: (order[key[:3]], key[3] is None, key[3] or 0.0)):
        group = groups[key]
        exact = [float(row.exact) for row in group]
        error = statistics.stdev(exact) / math.sqrt(len(exact)) if len(exact) > 1 else None
        contained = statistics.fmean(row.contained for row in group)
        cells.append(NeedleCell(*key, statistics.fmean(exact), error, contained, len(group)))
    return cells


def summary_table(cells: Sequence[NeedleCell]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: exact answers in per cent, mean over depths, by model and task, and by length."""
    whole = {(cell.model, cell.task, cell.length): cell for cell in cells if cell.depth is None}
    lengths = sorted({length for _, _, length in whole})
    lines = []
    for model, task in dict.fromkeys((model, task) for model, task, _ in whole):
        line = [model, task]
        for length in lengths:
            cell = whole.get((model, task, length))
            text = "–"
            if cell is not None:
                text = f"{100 * cell.accuracy:.0f}"
                text += "" if cell.standard_error is None else f" ± {100 * cell.standard_error:.0f}"
            line.append(text)
        lines.append(line)
    return ["model", "task", *(plots.format_tokens(length) for length in lengths)], lines


def plot(cells: Sequence[NeedleCell], most_annotated: int = 12) -> Figure:
    """Exact answers as colour and number: depth (down) against length (across), a panel for each task (row) and model
    (column).
    """
    models = list(dict.fromkeys(cell.model for cell in cells))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    found = {(cell.model, cell.task, cell.length, cell.depth): cell.accuracy for cell in cells}
    with plots.style():
        width, height = max(2.6, 0.55 * len(lengths) + 1.4), max(2.0, 0.3 * len(depths) + 1.3)
        figure, axes = plots.new_figure(len(tasks), len(models), width, height)
        image = None
        for number, axis in enumerate(axes):
            task, model = tasks[number // len(models)], models[number % len(models)]
            grid = [[100 * found.get((model, task, length, depth), math.nan) for length in lengths] for depth in depths]
            image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
            if max(len(lengths), len(depths)) <= most_annotated:
                for row, line in enumerate(grid):
                    for column, value in enumerate(line):
                        if not math.isnan(value):
                            ink = "white" if value < 60 else "black"
                            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=8)
            axis.grid(False)
            axis.set_title(f"{model}\n{task}", fontsize=9)
            axis.set_xticks(range(len(lengths)), [plots.format_tokens(length) for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
            if number % len(models) == 0:
                axis.set_ylabel("depth (%)")
            if number // len(models) == len(tasks) - 1:
                axis.set_xlabel("length (tokens)")
        assert image is not None
        figure.colorbar(image, ax=axes, label="exact answers (%)", shrink=0.8)
    return figure


def evaluate_checkpoints(
    models: Sequence[str | Path],
    tasks: Sequence[str] = DEFAULT_TASKS,
    lengths: Sequence[int] = (1024,),
    depths: Sequence[float] = DEPTHS,
    samples: int = 10,
    haystack: str | Path | None = None,
    chat: bool = False,
    seed: int = 0,
    labels: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens_per_batch: int = 65_536,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_samples: Callable[[str, list[NeedleSample]], None] | None = None,
) -> list[NeedleRow]:
    """Asks models for needles.

    Args:
        models: folders of checkpoints or runs, or of any causal model; or names on the hub.
        tasks: of `NEEDLE_TASKS`; "all" is all of them.
        lengths: tokens of prompt and answer together.
        depths: from 0 to 1.
        samples: of each task, length and depth.
        haystack: file of running text; default: Python's language reference.
        chat: put the text into the user's turn of the tokenizer's chat template.
        seed: another seed makes other samples.
        labels: names of the models, as many; default: from their paths.
        device, dtype: where to compute, and the type of the weights.
        tokens_per_batch: samples that are read at once, in tokens.
        on_progress: called with a model's name, answers so far and answers in all.
        on_samples: called with a model's name and its samples, before it answers.

    Returns:
        A row for each answer. Samples of models with other tokenizers differ in how much haystack fits.

    Raises:
        ValueError: nothing to evaluate, labels that do not fit, or as `samples_of`.
        FileNotFoundError: no model or haystack there.
    """
    if not models:
        raise ValueError("needles need at least one model, got none")
    if labels and len(labels) != len(models):
        raise ValueError(f"got {len(labels)} labels for {len(models)} models")
    if len(set(labels)) != len(labels):
        raise ValueError(f"every model needs a label of its own, got {', '.join(labels)}")
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch: got {tokens_per_batch}, wanted at least 1")
    chosen = list(NEEDLE_TASKS) if list(tasks) == ["all"] else list(tasks)
    text = None if haystack is None else read_haystack(haystack)
    rows = []
    for name, path in zip(labels or labels_of(models), models, strict=True):
        model, tokenizer = load_any(path, device, dtype)
        made = samples_of(haystack_for(tokenizer, text, chat), chosen, lengths, depths, samples, seed)
        if on_samples is not None:
            on_samples(name, made)

        def tell(done: int, name: str = name, of: int = len(made)) -> None:
            if on_progress is not None:
                on_progress(name, done, of)

        rows += rows_of(name, made, answers(model, tokenizer, made, tokens_per_batch, tell))
        del model
    return rows


def write_result(rows: Sequence[NeedleRow], cells: Sequence[NeedleCell], folder: str | Path) -> list[Path]:
    """Writes `needle_samples.csv`, `needle.csv` and `needle.png`."""
    folder = Path(folder)
    return [
        write_table(folder / SAMPLES_FILE, rows, NeedleRow),
        write_table(folder / CELLS_FILE, cells, NeedleCell),
        plots.save(plot(cells), folder / PLOT_FILE),
    ]


# ----------------------------------------------------------------------------------------------------
# The same samples as a task of the evaluation harness
# ----------------------------------------------------------------------------------------------------


def write_harness_task(
    samples: Sequence[NeedleSample], folder: str | Path, name: str = "loglinear_needle"
) -> list[Path]:
    """Writes samples as a task of EleutherAI's evaluation harness: prompts as JSON lines, the task, and its scoring.
    `loglinear eval harness --tasks NAME --include-path FOLDER` then asks the same questions.

    Raises:
        ValueError: samples with answers of different room; the harness has one limit for a task.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rooms = sorted({sample.answer_tokens for sample in samples})
    if len(rooms) != 1:
        raise ValueError(
            f"a task of the harness has one limit for all answers, got {', '.join(map(str, rooms))} tokens of room: "
            "write the samples of one needle task at a time"
        )
    prompts, task, scoring = folder / f"{name}.jsonl", folder / f"{name}.yaml", folder / f"{name}_scoring.py"
    with prompts.open("w", encoding="utf-8") as file:
        for sample in samples:
            line = {"prompt": sample.prompt, "expected": list(sample.expected), "task": sample.task}
            line |= {"length": sample.length, "depth": sample.depth, "sample": sample.number}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    lines = [
        f"task: {name}",
        "dataset_path: json",
        "dataset_kwargs:",
        f"  data_files: {json.dumps({'test': str(prompts.resolve())})}",
        "test_split: test",
        "output_type: generate_until",
        'doc_to_text: "{{prompt}}"',
        "doc_to_target: \"{{expected|join(' ')}}\"",
        f"process_results: !function {name}_scoring.process_results",
        "generation_kwargs:",
        "  until: []",
        "  do_sample: false",
        f"  max_gen_toks: {rooms[0]}",
        "metric_list:",
        *(f"  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}" for metric in ("exact", "contained")),
        "metadata: {version: 1.0}",
    ]
    task.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scoring.write_text(
        "from loglinear.data.needles import score\n\n\n"
        "def process_results(doc, results):\n"
        '    judged = score(doc["task"], results[0], doc["expected"])\n'
        '    return {"exact": float(judged.exact), "contained": judged.contained}\n',
        encoding="utf-8",
    )
    return [prompts, task, scoring]
