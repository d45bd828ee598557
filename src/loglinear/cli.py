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
