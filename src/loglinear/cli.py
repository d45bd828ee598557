"""The `loglinear` command: thin commands over the Python API.

Every command imports what it needs inside its own body, so that `--help` answers at once.
A user's mistake (`ValueError`, `TypeError`, a missing file or a missing optional package) becomes one line on
stderr and exit code 2; `loglinear --debug COMMAND` shows the traceback instead.
"""

import sys

import typer

app = typer.Typer(
    name="loglinear",
    help="Log-linear attention: train, generate from, look into and measure models whose state grows with "
    "the logarithm of the length.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluation = typer.Typer(help="Evaluate checkpoints.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")

# Set by `--debug`, read by `main`: the one place that turns exceptions into exit codes.
_settings = {"debug": False}

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


@app.callback()
def root(
    debug: bool = typer.Option(
        False, "--debug", help="Show the full traceback of an error instead of one line."
    ),
) -> None:
    _settings["debug"] = debug


@app.command()
def bench(
    cpu: bool = typer.Option(False, "--cpu", help="Measure the processor even where there is a GPU."),
    operator: list[str] = typer.Option(
        [], "--operator", "-o", help="Only these operators (repeat; see --list). Default: all that suit the device."
    ),
    shape: list[str] = typer.Option([], "--shape", help="Only these shapes (repeat; see --list)."),
    lengths: list[str] = typer.Option(
        [], "--lengths", help="Sequence lengths, such as 1K,4K,64K,1M. Default: 1K to 64K (CPU) or to 1M (GPU)."
    ),
    batches: list[str] = typer.Option(
        [],
        "--batch",
        help="'one' sequence a call, or as many as make a constant number of 'tokens' (repeat for both). "
        "Default: one (CPU), both (GPU).",
    ),
    forward_only: bool = typer.Option(False, "--forward-only", help="Leave the backward pass out."),
    dtype: str | None = typer.Option(
        None, help="float32, bfloat16 or float16. Default: float32 (CPU), bfloat16 (GPU)."
    ),
    tokens: int | None = typer.Option(
        None, min=1, help="Tokens in a call with --batch tokens, and in a training step. Default: 65536."
    ),
    model: list[str] = typer.Option(
        [], "--model", help="Measure training steps of these presets instead of operators (repeat)."
    ),
    budget: float | None = typer.Option(None, help="Seconds spent on repeating one call. Default: 1 (CPU), 0.2 (GPU)."),
    cap: float | None = typer.Option(
        None, help="Seconds after which a case is given up, compiling included. Default: 180 (CPU), 60 (GPU)."
    ),
    output: str = typer.Option("benchmarks", help="Folder for the CSV, the report and the plots."),
    name: str | None = typer.Option(None, help="Name of those files. Default: cpu or cuda."),
    list_choices: bool = typer.Option(False, "--list", help="List operators and shapes, and stop."),
) -> None:
    """Measure time and memory of log-linear attention beside other attention.

    Every operator is compared with an fp64 reference before it is timed.
    What cannot run becomes a row that says why.

    `loglinear bench --cpu` takes about ten minutes on two cores.
    A GPU run of a few operators takes one or two:
    `loglinear bench -o log-linear -o softmax-flash --lengths 4K,16K,64K`
    """
    from rich.console import Console

    from loglinear.bench import command

    if list_choices:
        Console().print(command.describe())
        return
    chosen = command.parse_lengths(lengths) if lengths else None
    suite = command.choose_suite(
        cpu,
        operators=tuple(operator) or None,
        shapes=tuple(shape) or None,
        lengths=chosen,
        batches=tuple(batches) or None,
        directions=("forward",) if forward_only else None,
        dtype=dtype,
        tokens_per_call=tokens,
        budget_s=budget,
        cap_s=cap,
    )
    if model:
        suite = command.only_models(suite, model, chosen or command.MODEL_LENGTHS)
    command.run(suite, output, name)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 for a mistake of the user."""
    _settings["debug"] = False
    try:
        app(args=arguments, prog_name="loglinear")
    except USER_ERRORS as error:
        if _settings["debug"]:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"loglinear: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error
