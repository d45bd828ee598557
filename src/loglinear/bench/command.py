"""What `loglinear bench` does: choose a suite, run it with progress on the terminal, keep rows, table and
plots.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loglinear import plots
from loglinear.bench import report
from loglinear.bench.decoding import PLAIN, Kept
from loglinear.bench.drift import DRIFT, run_drift
from loglinear.bench.inputs import SHAPES
from loglinear.bench.operators import OPERATORS
from loglinear.bench.rows import Row, merge_rows, read_rows, write_rows
from loglinear.bench.runner import Suite, cpu_suite, gpu_suite, run_decoding, run_models, run_operators
from loglinear.folders import check_output_folder
from loglinear.models import LogLinearConfig

# Training lengths of `--model`, where none are given.
MODEL_LENGTHS = tuple(1024 * scale for scale in (2, 4, 8, 16, 32, 64))

# What `--decode` and `--step` measure, where nothing else is asked for: (names, contexts, batches) by device.
DECODING = {
    "cuda": (
        (
            "log-linear-mamba2-825m",
            "mamba2-802m",
            "log-linear-gated-deltanet-796m",
            "gated-deltanet-793m",
            "transformer-778m",
        ),
        tuple(1024 * scale for scale in (1, 4, 16, 64, 256, 1024)),
        (1, 32),
    ),
    "cpu": (
        ("tiny-mamba2", "tiny-gated-deltanet", "tiny-attention"),
        tuple(1024 * scale for scale in (1, 4, 16, 64)),
        (1, 4),
    ),
}
STEPPING = {
    "cuda": (
        ("mamba2", "gated-deltanet-128", "gated-deltanet"),
        tuple(1024 * scale for scale in (4, 64, 1024)),
        (1, 8, 64),
    ),
    "cpu": (
        ("mamba2-2-heads", "gated-deltanet-2-heads"),
        tuple(1024 * scale for scale in (4, 64)),
        (1, 8),
    ),
}

# Tokens of `--drift`, where none are given.
DRIFT_LENGTHS = (1_000, 10_000, 100_000)

_LENGTH = re.compile(r"(\d+)([kKmM]?)")
_SCALES = {"": 1, "k": 1024, "m": 1024**2}


def parse_lengths(texts: Sequence[str]) -> tuple[int, ...]:
    """Lengths as people write them, separated by commas or given one by one: "1K,4K,64K,1M" (K is 1024).

    Raises:
        ValueError: something that is not a positive length.
    """
    lengths = []
    for text in ",".join(texts).split(","):
        match = _LENGTH.fullmatch(text.strip())
        if match is None or int(match.group(1)) < 1:
            raise ValueError(f"a length is a number of tokens such as 512, 4K or 1M; got {text.strip()!r}")
        lengths.append(int(match.group(1)) * _SCALES[match.group(2).lower()])
    return tuple(sorted(set(lengths)))


def choose_suite(cpu: bool, **changes) -> Suite:
    """The suite of this machine's GPU, or of its processor if `cpu` or if there is no GPU; None changes
    nothing.
    """
    make = cpu_suite if cpu or not torch.cuda.is_available() else gpu_suite
    return make(**{name: value for name, value in changes.items() if value is not None})


def describe() -> Table:
    """Every operator and shape that can be asked for."""
    table = Table("name", "mechanism or sizes", "what it is")
    for operator in OPERATORS.values():
        table.add_row(operator.name, operator.mechanism, operator.note)
    table.add_section()
    for shape in SHAPES.values():
        sizes = f"H={shape.num_heads} G={shape.num_groups} K={shape.key_dim} V={shape.value_dim}"
        softmax = f"softmax {shape.attention_heads} x {shape.attention_head_dim}"
        table.add_row(shape.name, sizes, f"{shape.note}; {softmax}")
    return table


def run(suite: Suite, output: str | Path, name: str | None = None, console: Console | None = None) -> list[Row]:
    """Runs a suite; keeps its rows in `output/NAME.csv` (replacing older rows of the same measurements), and
    draws.

    Args:
        suite: what to run; its operators part if it has lengths, its model part if it has presets, its decoding part
            if it has contexts, errors of steps if it has lengths for these.
        output: folder for the CSV, the Markdown report and the plots.
        name: of the files; default "cpu" or "cuda".
        console: where progress and tables go.

    Returns:
        The rows of this run.

    Raises:
        FileExistsError, PermissionError: the folder cannot be written.
        ValueError: there is nothing to run.
    """
    check_output_folder(output)
    console = console or Console()
    name = name or suite.device.split(":")[0]
    path = Path(output) / f"{name}.csv"
    old = read_rows(path) if path.is_file() else []
    rows: list[Row] = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("benchmark", total=None)

        def on_row(row: Row) -> None:
            rows.append(row)
            write_rows(path, merge_rows(old, rows))

        def on_case(number: int, total: int, what: str) -> None:
            progress.update(task, completed=number, total=total, description=what)

        if suite.lengths:
            run_operators(suite, on_row, on_case)
        if suite.presets:
            run_models(suite, on_row, on_case)
        if suite.contexts:
            run_decoding(suite, on_row, on_case)
        if suite.drifted:
            run_drift(suite.drifted, on_row, on_case)
        done = progress.tasks[0].total or 0
        progress.update(task, completed=done, total=done, description="done")
    if not rows:
        raise ValueError("nothing to run: no operator takes the chosen shapes, and no presets were given")
    same_machine = [row for row in merge_rows(old, rows) if row.device == rows[0].device]
    show(rows, console)
    for file in (path, *report.write_report(same_machine, output, name)):
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the comparison of each group, and the model table."""
    groups = report.groups_of(rows)
    titles = report.titles_of(groups)
    for place, group in groups.items():
        header, lines = report.comparison_table(group)
        lengths = (len(header) - 4) // 2
        # The operator names its mechanism; time and memory side by side would not fit into a terminal.
        for name, growth, first in (("time", 2, 4), ("memory", 3, 4 + lengths)):
            columns = [1, growth, *range(first, first + lengths)]
            _print_table(
                console,
                f"{titles[place]}: {name}",
                [header[column].removesuffix(f" {name}") for column in columns],
                [[line[column] for column in columns] for line in lines],
            )
        ratios = report.ratio_table(group)
        if ratios is not None:
            _print_table(console, "", *ratios)
    models = [row for row in rows if row.suite == "models"]
    if models:
        _print_table(console, "training, tokens per second", *report.model_table(models))
    for batch in sorted({row.batch for row in rows if row.suite == "decode"}):
        of_batch = [row for row in rows if row.suite == "decode" and row.batch == batch]
        title = f"decoding, batch {batch}: "
        _print_table(console, f"{title}tokens per second (time of a step)", *report.decoding_table(of_batch))
        _print_table(console, f"{title}state or cache (occupied buckets)", *report.cache_table(of_batch))
    steps = [row for row in rows if row.suite == "steps"]
    if steps:
        _print_table(console, "step of the operator: time (share of the rate of copying)", *report.step_table(steps))
    drifted = [row for row in rows if row.suite == DRIFT]
    if drifted:
        _print_table(console, "error of steps after so many tokens", *report.drift_table(drifted))
    if not groups:
        return
    console.print(
        "Times and memory are per sequence; memory is what a call takes beyond its inputs; growth is fitted "
        f"from {plots.format_tokens(report.FIT_FROM)} tokens up.",
        highlight=False,
    )


def _print_table(console: Console, title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def given_options(flags: Mapping[str, object]) -> list[str]:
    """Names of the flags that were given; None, [] and False were not."""
    return [flag for flag, value in flags.items() if value not in (None, [], False)]


def refuse_operator_options(given: Mapping[str, object]) -> None:
    """Refuses flags by name that a training step of a whole model has no use for; None, [] and False were not given.

    Raises:
        ValueError: one of them was given.
    """
    names = given_options(given)
    if names:
        raise ValueError(
            f"got {', '.join(names)} with --model, wanted none of these: a training step takes its mixers and sizes "
            "from the preset, is forward and backward, in float32 on a processor and in bfloat16 autocast on a GPU, "
            "and --tokens says how many sequences it has"
        )


def only_models(suite: Suite, presets: Sequence[str], lengths: Sequence[int], compile: bool = False) -> Suite:
    """The same suite with whole models in place of operators."""
    return replace(suite, lengths=(), presets=tuple(presets), model_lengths=tuple(lengths), compile=compile)


def only_drift(suite: Suite, lengths: Sequence[int] | None) -> Suite:
    """The same suite with errors of steps in place of operators, after `lengths` tokens."""
    return replace(suite, device="cpu", lengths=(), drifted=tuple(lengths or DRIFT_LENGTHS))


def parse_rows(texts: Sequence[str]) -> tuple[int, ...]:
    """Numbers of sequences, as `--batch` gives them with `--decode` and `--step`: "1,32", or one by one.

    Raises:
        ValueError: something that is not a positive number.
    """
    numbers = []
    for text in ",".join(texts).split(","):
        if not text.strip().isdecimal() or int(text) < 1:
            raise ValueError(f"--batch: got {text.strip()!r}, wanted a number of sequences such as 1 or 32")
        numbers.append(int(text))
    return tuple(sorted(set(numbers)))


def only_decoding(
    suite: Suite,
    *,
    models: Sequence[str] | None,
    shapes: Sequence[str] | None,
    contexts: Sequence[int] | None,
    rows: Sequence[int] | None,
    kept: Kept = PLAIN,
) -> Suite:
    """The same suite with decoding in place of operators: of `models` (None: not of models), or the step of the
    operator on `shapes` (None: not that). What is empty or None besides is chosen for the device.

    Raises:
        ValueError: states that cannot be kept as `kept` says, or a model that has none.
    """
    kind = suite.device.split(":")[0]
    names, default_contexts, default_rows = (DECODING if shapes is None else STEPPING)[kind]
    if shapes is None and kept != PLAIN:
        names = tuple(name for name in names if LogLinearConfig.preset(name).mixer != "attention")
    return replace(
        suite,
        lengths=(),
        decoded=() if models is None else tuple(models or names),
        stepped=() if shapes is None else tuple(shapes or names),
        contexts=tuple(contexts or default_contexts),
        rows=tuple(rows or default_rows),
        kept=kept,
    )
