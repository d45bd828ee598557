"""The quickstart: train a small log-linear model and its plain linear twin on the Python standard library,
and compare them.

Nothing is downloaded. The twins see the same data in the same order, start from the same weights wherever
they have the same ones, and are trained for the same number of steps: as many as fit into a time budget on
this machine. Everything that comes out is in one folder, with a `report.md` that shows it.
"""

import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from loglinear import fenwick, plots
from loglinear.bench.report import markdown
from loglinear.bench.rows import environment
from loglinear.data import PackedRows, join_rows, load_tokenizer
from loglinear.evals import inspection, position_loss
from loglinear.evals.command import default_text, print_table
from loglinear.folders import check_output_folder
from loglinear.generate import Generation, generate_text
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.initialization import initialize_by_name
from loglinear.train import TrainConfig, TrainResult, load_checkpoint, train
from loglinear.train.checkpoints import choose_device, load_corpora
from loglinear.train.reporting import quiet_transformers, read_metrics
from loglinear.train.trainer import build_model

LINEAR, LOG_LINEAR = "linear", "log-linear"
MIXER_NAMES = {
    "mamba2": "Mamba-2",
    "gated_deltanet": "Gated DeltaNet",
    "linear_attention": "linear attention",
    "retention": "RetNet",
    "gla": "GLA",
    "delta_net": "DeltaNet",
    "kda": "KDA",
}
PROMPT = "import os\n\n\ndef read_lines(path):\n"
_CALIBRATION_STEPS, _CALIBRATION_SHARE = 6, 0.06  # for each twin at least so many, and so much of the time


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart does. `choose` fills in what suits the machine.

    Attributes:
        output: folder for everything; it must not hold an earlier quickstart.
        log_linear_model, linear_model: presets of the twins; they differ in the number of levels alone.
        data: sources of documents, as for training.
        text_field, hub_subset, hub_split: how to read them, as for training.
        sequence_length, rows: tokens per row, rows per step.
        steps: optimiser steps of each twin; None: as many as fit into `training_seconds` for both together.
        training_seconds: see steps.
        learning_rate, seed: of both.
        evaluation_documents: held-out documents that are read for the comparison.
        sample_tokens: tokens of the generated samples.
        device: "cpu" or "cuda".
        max_documents: read at most so many documents of the data (None: all).
        cache: folder for tokenized data (None: the user's cache folder).
    """

    output: str = "quickstart"
    log_linear_model: str = "quickstart-log-linear-gated-deltanet"
    linear_model: str = "quickstart-gated-deltanet"
    data: tuple[str, ...] = ("stdlib",)
    text_field: str = "text"
    hub_subset: str | None = None
    hub_split: str = "train"
    sequence_length: int = 1024
    rows: int = 4
    steps: int | None = None
    training_seconds: float = 200.0
    learning_rate: float = 3e-3
    seed: int = 0
    evaluation_documents: int = 48
    sample_tokens: int = 200
    device: str = "cpu"
    max_documents: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("sequence_length", "rows", "steps", "evaluation_documents", "sample_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("training_seconds", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number, more than 0, got {value}")
        for name in dict.fromkeys((self.log_linear_model, self.linear_model)):
            if name in LogLinearConfig.presets() and LogLinearConfig.preset(name).mixer == "attention":
                raise ValueError(
                    f"got the preset {name!r}, a softmax model, wanted one with a linear mixer: the quickstart "
                    "compares a log-linear model with its linear twin, and a softmax model has none"
                )


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart found. `runs` and `samples` are by twin, "linear" and "log-linear". `whole_documents` says
    that every document of the comparison reaches the last position.
    """

    config: QuickstartConfig
    steps: int
    runs: dict[str, TrainResult]
    losses: position_loss.PositionLossResult
    overall: position_loss.LossDifference
    samples: dict[str, Generation]
    memory: dict[str, list[inspection.CostRow]]
    files: dict[str, Path]
    whole_documents: bool
    seconds: float


def choose(device: str = "auto", preset: str | None = None, **changes) -> QuickstartConfig:
    """The quickstart for a machine: the small twins on a processor, twins of about 30M parameters on a GPU.

    Args:
        device: "auto", "cpu" or "cuda".
        preset: another preset to train; its linear twin is the same with one level.
        changes: fields of `QuickstartConfig`; None leaves a field as it is.

    Raises:
        ValueError: a field out of its range, a softmax preset, options of data without data, or both steps
            and training_seconds.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if "steps" in changes and "training_seconds" in changes:
        raise ValueError(
            f"got steps={changes['steps']} and training_seconds={changes['training_seconds']} (--seconds), wanted one "
            "of them"
        )
    data_options = [name for name in ("text_field", "hub_subset", "hub_split") if name in changes]
    if data_options and "data" not in changes:
        raise ValueError(f"got {', '.join(data_options)} without data, wanted the documents that they are for")
    place = choose_device(device, "auto")[0].type
    config = QuickstartConfig(device=place)
    if place == "cuda":
        config = replace(
            config,
            log_linear_model="small-log-linear-gated-deltanet",
            linear_model="small-gated-deltanet",
            sequence_length=8192,
            rows=4,
            training_seconds=240.0,
            learning_rate=1e-3,
            evaluation_documents=64,
            sample_tokens=400,
        )
    if preset is not None:
        config = replace(config, log_linear_model=preset, linear_model=preset)
    return replace(config, **changes)


def run(config: QuickstartConfig, console: Console | None = None) -> QuickstartResult:
    """Runs the whole quickstart.

    Raises:
        FileExistsError: the output folder already holds one, or is none.
        PermissionError: it cannot be written.
        ValueError: data or presets that do not fit.
    """
    console = console or Console()
    started = time.perf_counter()
    folder = Path(config.output)
    check_output_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"the folder {folder} is not empty: name another one with --output, or remove it")
    configs = {name: _train_config(config, name, config.steps or 1) for name in (LINEAR, LOG_LINEAR)}
    with quiet_transformers():  # and what does not fit is refused before anything is read
        model_config = build_model(configs[LOG_LINEAR], load_tokenizer(configs[LOG_LINEAR].tokenizer)).config
    mixer = MIXER_NAMES[model_config.mixer]
    console.print(f"Reading {_corpus_name(config)} …", highlight=False, soft_wrap=True)
    documents, whole = _documents_to_compare(config, configs[LINEAR])
    folder.mkdir(parents=True, exist_ok=True)
    if not whole:
        console.print(_short_documents(config), highlight=False)
    steps = config.steps
    if steps is None:
        calibration = _CALIBRATION_SHARE * config.training_seconds
        speeds = {name: seconds_per_step(configs[name], calibration) for name in configs}
        steps = whole_reports(max(2, int(config.training_seconds / sum(speeds.values()))))
        console.print(
            f"One step takes {speeds[LINEAR]:.2f} s (linear) and {speeds[LOG_LINEAR]:.2f} s (log-linear) here: "
            f"{steps} steps each.",
            highlight=False,
        )
    runs = {}
    for name in configs:
        console.print(f"Training the {name} twin ({mixer}), {steps} steps …", highlight=False)
        configs[name] = _train_config(config, name, steps)
        runs[name] = train(configs[name], prepare=lambda model: initialize_by_name(model, config.seed))
    console.print("Comparing them on held-out documents …", highlight=False)
    models = {name: load_checkpoint(run.checkpoint, device=config.device)[0] for name, run in runs.items()}
    losses = position_loss.evaluate(models, documents, config.sequence_length)
    overall = position_loss.compare(
        LOG_LINEAR,
        losses.losses[LOG_LINEAR],
        LINEAR,
        losses.losses[LINEAR],
        [0, config.sequence_length],
    )[0]
    tokenizer = load_tokenizer(configs[LINEAR].tokenizer)
    samples = {
        name: generate_text(
            model, tokenizer, PROMPT, max_new_tokens=config.sample_tokens, temperature=0.7, seed=config.seed
        )
        for name, model in models.items()
    }
    memory = {name: inspection.cost_rows(model.config) for name, model in models.items()}
    files = _write_files(folder, runs, losses, memory, models[LOG_LINEAR], tokenizer, config)
    result = QuickstartResult(
        config, steps, runs, losses, overall, samples, memory, files, whole, time.perf_counter() - started
    )
    files["report"] = folder / "report.md"
    files["report"].write_text(report(result), encoding="utf-8")
    _show(result, console)
    return result


def _corpus_name(config: QuickstartConfig) -> str:
    return "the source of Python's standard library" if config.data == ("stdlib",) else ", ".join(config.data)


def _documents_to_compare(config: QuickstartConfig, training: TrainConfig) -> tuple[list[np.ndarray], bool]:
    """Held-out documents, and whether all reach the last position; where none does, all as far as they go.

    Raises:
        ValueError: nothing can be held out, or what is held out has no token to predict.
    """
    with quiet_transformers():
        _, held_out = load_corpora(training, load_tokenizer(training.tokenizer))
    assert held_out is not None, "the quickstart holds documents out"
    whole = bool((held_out.lengths > config.sequence_length).any())
    return position_loss.choose_documents(held_out, config.sequence_length, whole, config.evaluation_documents), whole


def _short_documents(config: QuickstartConfig) -> str:
    return (
        f"No held-out document has more than {config.sequence_length} tokens: all are compared as far as they go, and "
        "late positions may rest on fewer of them."
    )


def whole_reports(steps: int) -> int:
    """As many steps or a few less, so that the last loss reported is a mean over as many steps as the others.

    >>> whole_reports(281)
    280
    """
    return steps - steps % _log_every(steps)


def _log_every(steps: int) -> int:
    """Steps that a reported loss is the mean of."""
    return max(1, min(10, steps // 10))


def _train_config(config: QuickstartConfig, name: str, steps: int) -> TrainConfig:
    options: dict[str, int] = {"max_position_embeddings": config.sequence_length}
    options["num_levels"] = fenwick.full_num_levels(config.sequence_length) if name == LOG_LINEAR else 1
    return TrainConfig(
        output=str(Path(config.output) / name),
        data=list(config.data),
        text_field=config.text_field,
        hub_subset=config.hub_subset,
        hub_split=config.hub_split,
        max_documents=config.max_documents,
        cache=config.cache,
        model=config.log_linear_model if name == LOG_LINEAR else config.linear_model,
        model_options=options,
        sequence_length=config.sequence_length,
        rows=config.rows,
        steps=steps,
        seed=config.seed,
        learning_rate=config.learning_rate,
        device="cuda" if config.device.startswith("cuda") else "cpu",
        log_every=_log_every(steps),
        evaluate_every=0,
        evaluation_rows=4,
        save_every=0,
        tensorboard=False,
    )


def seconds_per_step(config: TrainConfig, seconds: float = 0.0) -> float:
    """How long a training step takes here, from steps on the run's own first rows for at least so many seconds;
    nothing is kept."""
    device, dtype = choose_device(config.device, config.precision)
    with quiet_transformers():
        tokenizer = load_tokenizer(config.tokenizer)
        training, _ = load_corpora(config, tokenizer)
        model = build_model(config, tokenizer).train()
    torch.nn.Module.to(model, device)  # in place
    rows = PackedRows(training, config.sequence_length, config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    times = []
    while len(times) < _CALIBRATION_STEPS or sum(times) < seconds:
        step = len(times)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        batch = join_rows([rows[step * config.rows + number] for number in range(config.rows)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())
        times.append(time.perf_counter() - began)
    # The first steps start threads, fill caches, and find a cool processor; a median is not fooled by one interruption.
    return statistics.median(times[len(times) // 2 :])


def _write_files(
    folder: Path,
    runs: dict[str, TrainResult],
    losses: position_loss.PositionLossResult,
    memory: dict[str, list[inspection.CostRow]],
    model: LogLinearForCausalLM,
    tokenizer,
    config: QuickstartConfig,
) -> dict[str, Path]:
    written = position_loss.write_result(losses, folder, "nats per byte")
    files = {path.stem + path.suffix.replace(".", "_"): path for path in written}
    files["training_png"] = plots.save(plot_training(runs), folder / "training.png")
    files["memory_png"] = plots.save(
        inspection.plot_memory(
            {"linear state": memory[LINEAR], "log-linear state": memory[LOG_LINEAR]}, memory[LINEAR]
        ),
        folder / "memory.png",
    )
    files["memory_csv"] = _write_memory(folder / "memory.csv", memory)
    shown = min(64, config.sequence_length)
    files["partition_png"] = plots.save(inspection.plot_partition(shown), folder / "partition.png")
    ids = tokenizer(default_text())["input_ids"][: min(1024, config.sequence_length)]
    scales = inspection.level_scales_on(model, ids)
    files["level_scales_csv"] = inspection.write_level_scales(
        folder / "level_scales.csv", inspection.summarize_level_scales(scales)
    )
    files["level_scales_png"] = plots.save(inspection.plot_level_scales(scales), folder / "level_scales.png")
    return files


def _write_memory(path: Path, memory: dict[str, list[inspection.CostRow]]) -> Path:
    rows = ["tokens,linear_state_bytes,log_linear_state_bytes,log_linear_state_in_use_bytes,softmax_kv_cache_bytes"]
    for linear, log_linear in zip(memory[LINEAR], memory[LOG_LINEAR], strict=True):
        numbers = (
            linear.length,
            linear.state_bytes + linear.conv_bytes,
            log_linear.state_bytes + log_linear.conv_bytes,
            log_linear.occupied_state_bytes + log_linear.conv_bytes,
            linear.kv_cache_bytes,
        )
        rows.append(",".join(str(number) for number in numbers))
    path.write_text("\n".join(rows) + "\n")
    return path


def plot_training(runs: dict[str, TrainResult]) -> Figure:
    """Training loss of both twins against tokens."""
    with plots.style():
        figure, (axis,) = plots.new_figure()
        series = []
        for name, run in runs.items():
            points = [row for row in read_metrics(run.output / "metrics.jsonl") if "loss" in row]
            tokens, values = [row["tokens"] for row in points], [row["loss"] for row in points]
            series.append(plots.Series(name, tokens, values, dashed=name == LINEAR))
        plots.draw_series(axis, series)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_xlabel("training tokens (bytes)")
        axis.set_ylabel("training loss (nats per byte)")
        axis.set_title("Training")
        plots.legend_outside(axis)
    return figure


def verdict(difference: position_loss.LossDifference) -> str:
    """One honest sentence about the difference between the twins."""
    size = position_loss.plus_minus(difference.difference, difference.standard_error, sign=True)
    measured = (
        f"Over all positions the log-linear model's loss minus the linear one's is {size} nats per byte on "
        f"{difference.documents} held-out documents: "
    )
    if not difference.clear:
        return measured + "within the noise (paired t-test over documents, 5 % level), so this run shows no difference."
    better = "lower" if difference.difference < 0 else "higher"
    return measured + f"{better}, and more than noise between documents (paired t-test, 5 % level)."


_CAUTION = (
    "The bands say how much the difference varies between documents. They do not say how much it would vary "
    "between training runs with other seeds: there is one run of each model here, and both are small and trained "
    "for minutes."
)


def memory_table(memory: dict[str, list[inspection.CostRow]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: what each model keeps of its context, at each length."""
    header = ["context", "linear state", "log-linear state", "of it in use", "softmax KV cache, same shape"]
    lines = []
    for linear, log_linear in zip(memory[LINEAR], memory[LOG_LINEAR], strict=True):
        lines.append(
            [
                plots.format_tokens(linear.length),
                plots.format_bytes(linear.state_bytes + linear.conv_bytes),
                plots.format_bytes(log_linear.state_bytes + log_linear.conv_bytes),
                plots.format_bytes(log_linear.occupied_state_bytes + log_linear.conv_bytes),
                plots.format_bytes(linear.kv_cache_bytes),
            ]
        )
    return header, lines


def run_table(runs: dict[str, TrainResult]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: what was trained, for how long."""
    header = ["model", "parameters", "steps", "tokens", "training time", "tokens/s", "last training loss"]
    lines = []
    for name, run in runs.items():
        configuration = json.loads((run.checkpoint / "config.json").read_text())
        lines.append(
            [
                f"{name} ({configuration['num_levels']} level{'s' if configuration['num_levels'] > 1 else ''})",
                f"{_parameters(run.checkpoint):,}",
                f"{run.steps:,}",
                f"{run.tokens:,}",
                f"{run.seconds:.0f} s",
                f"{run.tokens_per_second:,.0f}",
                f"{run.loss:.3f}",
            ]
        )
    return header, lines


def _parameters(checkpoint: Path) -> int:
    return LogLinearConfig.from_pretrained(checkpoint).cost().parameters


def report(result: QuickstartResult) -> str:
    """The Markdown report."""
    config, runs = result.config, result.runs
    mixer = MIXER_NAMES[LogLinearConfig.from_pretrained(runs[LOG_LINEAR].checkpoint).mixer]
    parts = [
        "# Quickstart: log-linear attention beside its linear twin",
        f"Two {mixer} models, trained on {_corpus_name(config)} (as bytes) for the same {result.steps} steps, with "
        "the same data in the same order and from the same initial weights (those of the level scales, which only one "
        "of them has, excepted). The linear one keeps one state per head; the log-linear one keeps one per level of "
        "its Fenwick tree, and reads them with scales λ that it computes from the input. "
        f"All of this took {result.seconds:.0f} s on {environment(config.device).device}.",
        markdown(*run_table(runs)),
        "![training loss](training.png)",
        "## Loss by position on held-out documents",
        verdict(result.overall) + " " + _CAUTION,
        *([] if result.whole_documents else [_short_documents(config)]),
        markdown(*position_loss.table_text(result.losses)),
        f"Nats per byte, {position_loss.TABLE_NOTE}.",
        "![loss by position](position_loss.png)",
        "## Memory while decoding",
        "Per sequence of a bfloat16 model on a GPU: the states (a full partition at each length; bfloat16 where there "
        "are several levels and no decay per channel, else float32) and the cache. The log-linear "
        f"model trained here has {fenwick.full_num_levels(config.sequence_length)} levels, as many as "
        f"{config.sequence_length} tokens need; beyond that its last level absorbs what is older, and its state "
        "does not grow any more.",
        markdown(*memory_table(result.memory)),
        "![memory](memory.png)",
        "## What the models write",
        f"Continuations of a prompt at temperature 0.7, {config.sample_tokens} tokens at most.",
    ]
    for name, sample in result.samples.items():
        parts.append(f"### {name}")
        parts.append(_fenced(PROMPT + sample.text))
    parts += [
        "## Inside the log-linear model",
        "How the past is cut into buckets, and the level scales λ on a piece of the standard library's source.",
        "![partition](partition.png)",
        "![level scales](level_scales.png)",
        "## Go on",
        "\n".join(
            [
                "```",
                f'loglinear generate {runs[LOG_LINEAR].output} "def main("',
                f"loglinear eval position-loss {runs[LINEAR].output} {runs[LOG_LINEAR].output}",
                f"loglinear inspect {runs[LOG_LINEAR].output}",
                "loglinear train --help",
                "```",
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _show(result: QuickstartResult, console: Console) -> None:
    print_table(console, "Training", *run_table(result.runs))
    header, lines = position_loss.table_text(result.losses)
    print_table(console, "Loss by position on held-out documents (nats per byte)", header, lines)
    console.print(position_loss.TABLE_NOTE, highlight=False)
    console.print(verdict(result.overall), highlight=False)
    console.print(_CAUTION, highlight=False)
    print_table(console, "Memory per sequence while decoding", *memory_table(result.memory))
    for name, sample in result.samples.items():
        console.rule(f"sample of the {name} model")
        console.print(PROMPT + sample.text, markup=False, highlight=False)
    console.rule()
    where = f"{result.seconds:.0f} s in all. Everything is in {result.files['report']}"
    console.print(where, highlight=False, soft_wrap=True)  # a path that is wrapped cannot be copied
