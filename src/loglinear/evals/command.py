"""What the commands of `loglinear eval`, `sweep`, `compare`, `results` and `inspect` do: choose, compute, print, and
leave files.
"""

import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from loglinear import fenwick, plots
from loglinear.data import ByteTokenizer, load_tokenizer
from loglinear.data.tokenizers import encode_prompt
from loglinear.evals import (
    comparison,
    harness,
    inspection,
    needle,
    position_loss,
    recall,
    results,
    sweep,
    sweep_summary,
)
from loglinear.folders import check_output_folder
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.train import load_checkpoint, resolve_checkpoint
from loglinear.train.checkpoints import choose_device
from loglinear.train.recall import Progress
from loglinear.train.reporting import Clock, duration


def print_table(console: Console, title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column is text and whose others are numbers."""
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)  # as wide as it is, not the table
    table = Table()
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*line)
    if not console.is_terminal:  # a file or a pipe has room for the whole of it
        unlimited = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)


def loss_unit(checkpoint: str | Path) -> str:
    """What one token is in the loss of a checkpoint: a byte for the byte tokenizer."""
    tokenizer = load_tokenizer(resolve_checkpoint(checkpoint))
    return "nats per byte" if isinstance(tokenizer, ByteTokenizer) else "nats per token"


def run_position_loss(
    checkpoints: Sequence[str],
    output: str | Path,
    device: str = "auto",
    console: Console | None = None,
    **options,
) -> position_loss.PositionLossResult:
    """Evaluates checkpoints (see `position_loss.evaluate_checkpoints` for the options), prints the table,
    writes CSV and plot.

    Raises:
        FileExistsError, PermissionError: the output folder cannot be written.
    """
    check_output_folder(output)
    console = console or Console()
    result = position_loss.evaluate_checkpoints(checkpoints, device=choose_device(device, "fp32")[0], **options)
    unit = loss_unit(checkpoints[0])
    print_table(console, f"Loss by position ({unit})", *position_loss.table_text(result))
    console.print(position_loss.TABLE_NOTE, highlight=False)
    for line in position_loss.beyond_training(result):
        console.print(line, highlight=False)
    for path in position_loss.write_result(result, output, unit):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return result


def run_mqar(
    checkpoints: Sequence[str],
    output: str | Path,
    device: str = "auto",
    precision: str = "fp32",
    console: Console | None = None,
    **options,
) -> list[recall.RecallAccuracy]:
    """Evaluates checkpoints at associative recall (see `recall.evaluate_checkpoints` for the options), prints the
    table, writes CSV and plot.

    Raises:
        FileExistsError, PermissionError: the output folder cannot be written.
    """
    check_output_folder(output)
    console = console or Console()
    place, dtype = choose_device(device, precision)
    rows = recall.evaluate_checkpoints(checkpoints, device=place, dtype=dtype, **options)
    title = f"Queries answered right (%), {rows[0].length:,} tokens, {rows[0].sequences:,} sequences of each"
    print_table(console, title, *recall.accuracy_table(rows))
    console.print("± one standard error over sequences", highlight=False)
    for path in recall.write_result(rows, output):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return rows


def run_needle(
    models: Sequence[str],
    output: str | Path,
    device: str = "auto",
    precision: str = "auto",
    harness_task: str | Path | None = None,
    console: Console | None = None,
    **options,
) -> list[needle.NeedleCell]:
    """Asks models for needles (see `needle.evaluate_checkpoints` for the options), prints the table, writes CSV and
    plot, and with `harness_task` the samples of the first model as a task of the evaluation harness into that folder.

    Raises:
        FileExistsError, PermissionError: the output folder cannot be written.
    """
    check_output_folder(output)
    if harness_task is not None:
        check_output_folder(harness_task)
    console = console or Console()
    place, dtype = choose_device(device, precision)
    written: list[Path] = []
    clock, told = Clock(), [0.0]

    def keep(_: str, samples: list[needle.NeedleSample]) -> None:
        if harness_task is not None and not written:
            written.extend(needle.write_harness_task(samples, harness_task))

    def tell(name: str, done: int, of: int) -> None:
        if clock.seconds - told[0] > 10:
            told[0] = clock.seconds
            console.print(f"{name}: {done:,} of {of:,} answers", highlight=False, markup=False)

    rows = needle.evaluate_checkpoints(models, device=place, dtype=dtype, on_progress=tell, on_samples=keep, **options)
    cells = needle.tabulate(rows)
    print_table(console, "Needles found (%), all depths together", *needle.summary_table(cells))
    console.print("exact answers; ± one standard error over samples", highlight=False)
    for path in [*needle.write_result(rows, cells, output), *written]:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return cells


def run_harness(
    models: Sequence[str],
    output: str | Path,
    device: str = "auto",
    precision: str = "auto",
    labels: Sequence[str] = (),
    console: Console | None = None,
    **options,
) -> list[harness.HarnessRow]:
    """Runs tasks of the evaluation harness on models (see `harness.evaluate_model` for the options), prints the table,
    writes JSON, CSV and samples.

    Raises:
        ImportError: the harness is not installed.
        ValueError: labels that do not fit.
        FileExistsError, PermissionError: the output folder cannot be written.
    """
    check_output_folder(output)
    harness.require_harness()
    names = list(labels) or position_loss.labels_of(models)
    if len(names) != len(models) or len(set(names)) != len(names):
        raise ValueError(f"got the labels {', '.join(names)} for {len(models)} models, wanted one of its own for each")
    console = console or Console()
    place, dtype = choose_device(device, precision)
    found, rows = {}, []
    for name, path in zip(names, models, strict=True):
        found[name] = harness.evaluate_model(path, device=place, dtype=dtype, **options)
        rows += harness.rows_of(name, found[name])
    print_table(console, "Evaluation harness (± the harness's standard error)", *harness.harness_table(rows))
    for path in harness.write_result(found, rows, output):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return rows


def run_sweep(
    file: str | Path,
    output: str | Path,
    device: str = "auto",
    workers: int | None = None,
    seconds: float | None = None,
    together: int | None = None,
    console: Console | None = None,
) -> list[sweep_summary.SweepSummary]:
    """Trains what a file describes (see `sweep.run_sweep`), says each run as it ends, prints the table, writes CSV and
    plot.

    Raises:
        FileExistsError, PermissionError: the output folder cannot be written.
    """
    config = sweep.SweepConfig.from_file(file)
    check_output_folder(output)
    console, output = console or Console(), Path(output)
    clock, first = Clock(), dict[str, int]()

    def tell(row: sweep.SweepRow, done: int, runs: int) -> None:
        first.setdefault("before", done - row.together)
        seconds = clock.seconds
        left = (runs - done) * seconds / (done - first["before"])
        what = f"{row.status}: {row.message}"
        if row.validation_accuracy is not None:
            what = f"validation {row.validation_accuracy:.1%}, {row.steps_per_second:.1f} steps/s ({row.step_runs})"
            what += f" of {row.together} together" if row.together > 1 else ""
        console.print(
            f"{done}/{runs} · {row.model}, width {row.width}, pairs {row.pairs}, rate {row.learning_rate:g}, "
            f"seed {row.seed} · {what} · {duration(left)} left",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    told = [0.0]

    def tell_progress(runs: Sequence[sweep.SweepRun], progress: Progress) -> None:
        if clock.seconds - told[0] < 15:
            return
        told[0] = clock.seconds
        first, several = runs[0], f", {len(runs)} together" if len(runs) > 1 else ""
        console.print(
            f"{first.model.name}, width {first.width}{several}: step {progress.steps:,} of {first.training.steps:,}, "
            f"loss {progress.loss:.3f}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    rows = sweep.run_sweep(config, output, device, workers, tell, seconds, together, tell_progress)
    summaries = sweep_summary.summarize(rows)
    failed = [row for row in rows if row.status == sweep.FAILED]
    written = [output / sweep.ROWS_FILE]
    if summaries:
        print_table(console, f"Queries answered right (%), {Path(file).name}", *sweep_summary.summary_table(summaries))
        console.print(sweep_summary.SUMMARY_NOTE, highlight=False)
        written.append(
            position_loss.write_table(output / sweep_summary.SUMMARY_FILE, summaries, sweep_summary.SweepSummary)
        )
        written.append(plots.save(sweep_summary.plot(summaries), output / sweep_summary.PLOT_FILE))
    if left := len(config.runs()) - len(rows):
        console.print(f"{left} runs are left: the same command goes on with them", highlight=False)
    if failed:
        console.print(f"{len(failed)} of {len(rows)} runs failed: {failed[0].message}", highlight=False, markup=False)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return summaries


def run_comparison(
    file: str | Path,
    output: str | Path,
    work: str | Path | None = None,
    device: str = "auto",
    seconds: float | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> list[comparison.ComparisonRow]:
    """Trains and examines the models that a file describes (see `comparison.run_comparison`), says each run as it ends,
    and prints the table.

    Raises:
        FileExistsError, PermissionError: a folder cannot be written.
    """
    config = comparison.ComparisonConfig.from_file(file)
    work = Path("runs") / Path(file).stem if work is None else Path(work)
    for folder in (output, work):
        check_output_folder(folder)
    console, output, clock = console or Console(), Path(output), Clock()

    rates = {run.key: f", rate {run.learning_rate:g}" if config.learning_rates else "" for run in config.runs()}

    def named(row: comparison.ComparisonRun | comparison.ComparisonRow) -> str:
        return f"{row.model}, seed {row.seed}{rates[row.key]}"

    def begin(run: comparison.ComparisonRun, done: int, runs: int) -> None:
        console.print(f"{done + 1}/{runs} · {named(run)} …", highlight=False, markup=False)

    def tell(rows: list[comparison.ComparisonRow], done: int, runs: int) -> None:
        end = rows[-1]
        what = f"{end.status}: {end.detail}"
        if end.status == comparison.FINISHED:
            loss = next(row.value for row in rows if row.metric == "held_out_loss")
            what = f"held-out loss {loss:.4f}, {duration(end.value or 0.0)}"
        console.print(
            f"{done}/{runs} · {named(end)} · {what} · {duration(clock.seconds)} so far",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    rows = comparison.run_comparison(config, output, work, device, seconds, begin, tell, workers)
    if any(row.metric == "held_out_loss" for row in rows):
        print_table(console, f"{config.title or Path(file).name}", *results.comparison_table(config, rows))
        console.print("± one standard deviation over seeds", highlight=False)
    ends = [row for row in rows if row.metric == "run"]
    if left := len(config.runs()) - sum(row.status != comparison.FAILED for row in ends):
        console.print(f"{left} runs are left: the same command goes on with them", highlight=False)
    for row in ends:
        if row.status == comparison.FAILED:
            console.print(f"{named(row)} failed: {row.detail}", highlight=False, markup=False)
    console.print(f"wrote {output / comparison.ROWS_FILE}", highlight=False, soft_wrap=True)
    return rows


def run_results(
    experiments: str | Path, benchmarks: str | Path, output: str | Path, console: Console | None = None
) -> list[Path]:
    """Draws the page of results (see `results.write_page`) and says what was written.

    Raises:
        FileExistsError, PermissionError: the folder cannot be written.
    """
    check_output_folder(Path(output).parent)
    console = console or Console()
    written = results.write_page(experiments, benchmarks, output)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return written


def default_text() -> str:
    """The text that λ is shown on where none is given: the source of a module of the standard library."""
    return inspect.getsource(textwrap)


def run_inspect(
    target: str,
    output: str | Path,
    text: str | None = None,
    lengths: Sequence[int] = inspection.COST_LENGTHS,
    most_tokens: int | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> list[Path]:
    """Prints and draws what a model is.

    Args:
        target: a checkpoint's or run's folder, or the name of a preset.
        output: folder for the plots and the CSVs of λ and of what the levels contribute.
        text: what λ is shown on; default: some Python source. For a preset, whose weights are random, λ is
            only shown if it is given.
        lengths: of the cost table.
        most_tokens: how many tokens of the text are read; default: what the model is meant for, at most 1024.
        device: where to compute.
        console: where the tables go.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: neither a model's folder nor a preset.
        FileExistsError, PermissionError: the output folder cannot be written.
        ValueError: a text, a number of its tokens or a device, where no λ is computed.
    """
    check_output_folder(output)
    console = console or Console()
    output = Path(output)
    preset = target in LogLinearConfig.presets() and not Path(target).exists()
    config = LogLinearConfig.preset(target) if preset else LogLinearConfig.from_pretrained(_model_folder(target))
    softmax = set(config.mixers) == {"attention"}
    levels = 1 if softmax else config.num_levels or 1
    shows_scales = levels > 1 and (text is not None or not preset)
    if not shows_scales:
        _refuse_scale_options(target, softmax, levels, {"text": text, "max-tokens": most_tokens, "device": device})
    _print_model(console, target, config)
    rows = inspection.cost_rows(config, lengths)
    title = "Cost by length, full partition of that length, bfloat16 model on a GPU"
    print_table(console, title, *inspection.cost_table(rows))
    name = "log-linear state" if levels > 1 else "state"
    written = [plots.save(inspection.plot_memory({name: rows}, rows), output / "memory.png")]
    if levels > 1:
        shown = min(64, config.max_position_embeddings)
        for position in sorted({shown // 2 - 1, (shown * 5) // 8, shown - 1}):
            console.print(inspection.partition_text(position, levels), highlight=False)
        figure = inspection.plot_partition(shown, min(levels, fenwick.full_num_levels(shown)))
        written.append(plots.save(figure, output / "partition.png"))
    if shows_scales:
        written += _inspect_level_scales(console, target, config, preset, text, most_tokens, device, output)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return written


def _refuse_scale_options(target: str, softmax: bool, levels: int, options: dict[str, str | int | None]) -> None:
    """Refuses what is only of use where level scales are computed."""
    given = [name for name, value in options.items() if value not in (None, "auto")]
    if not given:
        return
    if softmax:
        why = f"{target} has no level scales to show: it is a softmax model"
    elif levels == 1:
        why = f"{target} has no level scales to show: with one level (num_levels=1) its mixer is the plain linear one"
    else:
        why = f"the preset {target} has no trained weights, so its level scales are only shown on a text that is given"
    raise ValueError(f"got {', '.join(given)}, but {why}")


def _model_folder(target: str) -> Path:
    try:
        return resolve_checkpoint(target)
    except FileNotFoundError as error:
        names = ", ".join(LogLinearConfig.presets())
        raise FileNotFoundError(f"{error}; nor is {target!r} a preset ({names})") from error


def _print_model(console: Console, target: str, config: LogLinearConfig) -> None:
    found = config.cost(config.max_position_embeddings)
    mixers = ", ".join(f"{config.mixers.count(name)} x {name}" for name in dict.fromkeys(config.mixers))
    lines = [
        ["layers", mixers],
        ["width", f"{config.hidden_size}, MLP {config.intermediate_size}, vocabulary {config.vocab_size}"],
        ["parameters", f"{found.parameters:,} ({found.parameters_non_embedding:,} without embedding and head)"],
    ]
    if config.mixer != "attention":
        state = plots.format_bytes(found.state_bytes + found.conv_bytes)
        lines += [
            ["heads", f"{config.num_heads}, state {config.state_size} x {config.head_dim} each"],
            ["levels", str(config.num_levels)],
            ["state as configured", f"{state} per sequence at any length, bfloat16 model on a GPU"],
        ]
    table = Table(title=target, title_justify="left", title_style="bold", show_header=False)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _inspect_level_scales(
    console: Console,
    target: str,
    config: LogLinearConfig,
    preset: bool,
    text: str | None,
    most_tokens: int | None,
    device: str,
    output: Path,
) -> list[Path]:
    place = choose_device(device, "fp32")[0]
    if preset:
        torch.manual_seed(0)
        model, tokenizer = LogLinearForCausalLM(config).eval(), ByteTokenizer()
        torch.nn.Module.to(model, place)  # in place
        console.print("A preset has no trained weights: the level scales below are those of random ones.")
    else:
        model, tokenizer = load_checkpoint(target, device=place)
    if most_tokens is None:
        most_tokens = min(1024, config.max_position_embeddings)
    ids = encode_prompt(tokenizer, default_text() if text is None else text)[:most_tokens]
    scales = inspection.level_scales_on(model, ids)
    summaries = inspection.summarize_level_scales(scales)
    title = f"Level scales λ on {len(ids)} tokens, mean over heads and over tokens with a filled bucket"
    print_table(console, title, *inspection.level_scale_table(summaries))
    shares = inspection.level_shares_on(model, ids)
    title = "Share of the output (%) by level, mean over heads and tokens"
    print_table(console, title, *inspection.level_share_table(shares))
    return [
        inspection.write_level_scales(output / "level_scales.csv", summaries),
        plots.save(inspection.plot_level_scales(scales), output / "level_scales.png"),
        inspection.write_level_shares(output / "level_shares.csv", shares),
        plots.save(inspection.plot_level_shares(shares), output / "level_shares.png"),
    ]
