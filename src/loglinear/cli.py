"""The `loglinear` command: thin commands over the Python API.

Every command imports what it needs inside its own body, so that `--help` answers at once.
A user's mistake (`ValueError`, `TypeError`, a missing file or a missing optional package) becomes one line on
stderr and exit code 2; `loglinear --debug COMMAND` shows the traceback instead.
"""

import dataclasses
import inspect
import io
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from loglinear.train.config import CONFIG_FILE, TrainConfig, parse_yaml

app = typer.Typer(
    name="loglinear",
    help="Log-linear attention: train, generate from, look into and measure models whose state grows with "
    "the logarithm of the length.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which lets paragraphs flow: a terminal is narrower than a source file
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluation = typer.Typer(help="Evaluate checkpoints.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")

# Set by `--debug`, read by `main`: the one place that turns exceptions into exit codes.
_settings = {"debug": False}

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the full traceback of an error instead of one line."),
) -> None:
    _settings["debug"] = debug


def _train_flags() -> list[inspect.Parameter]:
    """A flag for every field of `TrainConfig`, with the field's help and default. A flag that is not given is None."""
    hints = get_type_hints(TrainConfig)
    flags = []
    for one in dataclasses.fields(TrainConfig):
        flag = "--" + one.name.replace("_", "-")
        names, kind = [flag], hints[one.name]
        default: Any = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        shown = "" if default in (None, {}) else f" (default: {default})"
        metavar = None
        if get_origin(kind) is Literal:
            metavar = "|".join(get_args(kind))
            kind = str
        elif kind is bool:
            names = [f"{flag}/--no-{one.name.replace('_', '-')}"]
            shown = f" (default: {'on' if default else 'off'})"
        elif get_origin(kind) is list:
            kind, shown = list[str], f" (default: {', '.join(default or [])})"
        elif get_origin(kind) is dict:
            kind, metavar = list[str], "KEY=VALUE"
        option = typer.Option(
            None,
            *names,
            help=one.metadata["help"] + shown,
            rich_help_panel=one.metadata["panel"],
            show_default=False,
            metavar=metavar,
        )
        keyword = inspect.Parameter.KEYWORD_ONLY
        flags.append(inspect.Parameter(one.name, keyword, default=option, annotation=kind | None))
    return flags


def _train_config(file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """The configuration of a file (or, when resuming without one, that of the run), overridden by the given flags."""
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    for name in ("model_options", "task_options"):
        if name in given:
            given[name] = _assignments("--" + name.replace("_", "-"), given[name])
    base = TrainConfig() if file is None else TrainConfig.from_file(file)
    output = Path(given.get("output", base.output))
    if file is None and given.get("resume") and (output / CONFIG_FILE).is_file():
        base = TrainConfig.from_file(output / CONFIG_FILE)
    for name in ("model_options", "task_options"):
        if name in given:
            given[name] = {**getattr(base, name), **given[name]}
    return base.replace(**given)


def _assignments(flag: str, values: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as a mapping; values are read as YAML, so that 4, true and [0, 2] are what they look like."""
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise ValueError(f"{flag}: got {value!r}, wanted KEY=VALUE")
        try:
            found[key.strip().replace("-", "_")] = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"{flag} {key}: {error}") from error
    return found


def train(
    config: Path | None = typer.Option(
        None,
        "--config",
        "-c",
        help="YAML or TOML file of these options, written with underscores; flags win.",
    ),
    **flags: Any,
) -> None:
    """Train a model on text, or on a task.

    Documents are packed into rows with their boundaries kept; some are held out for evaluation. The output folder gets
    checkpoints, train_config.yaml and metrics.jsonl. Ctrl-C stops with a checkpoint, and --resume goes on from the
    newest one. For several GPUs: torchrun --nproc-per-node=GPUS -m loglinear train …

    Example: loglinear train --data my-texts/ --model small-log-linear-gated-deltanet --steps 2000 --output runs/first
    """
    settings = _train_config(config, flags)
    from loglinear.train import train as run

    run(settings)
    _end_process_group()


def _end_process_group() -> None:
    """Under torchrun a process that exits with its group open may take the others' last exchange with it."""
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


# typer reads a command's options from its signature: the fields of the configuration are the options.
_config_option = inspect.signature(train).parameters["config"].replace(kind=inspect.Parameter.KEYWORD_ONLY)
train.__signature__ = inspect.Signature([_config_option, *_train_flags()])  # type: ignore[attr-defined]
train.__annotations__ = {name: one.annotation for name, one in train.__signature__.parameters.items()}  # type: ignore[attr-defined]
app.command()(train)


def _data_option(name: str) -> Any:
    """An option of `--data` elsewhere, as `train` has it; None where it is not given."""
    one = next(one for one in dataclasses.fields(TrainConfig) if one.name == name)
    shown = "" if one.default is None else f" (default: {one.default})"
    return typer.Option(None, "--" + name.replace("_", "-"), help=one.metadata["help"] + shown, show_default=False)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _read_text(file: Path, what: str) -> str:
    """The text of a file that a flag names; `what` says in an error what it was to be."""
    if not file.is_file():
        raise FileNotFoundError(f"no {what} file {file}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(f"the {what} file {file}", error)) from error


def _read_standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable("standard input", error)) from error


def _undecodable(source: str, error: UnicodeDecodeError) -> str:
    return f"got {source}, wanted it in {error.encoding}: {error.reason} at byte {error.start}"


@app.command()
def sweep(
    file: Path = typer.Argument(help="YAML, TOML or JSON file of the trainings: see experiments/mqar-tiny.yaml."),
    output: str = typer.Option("runs/sweep", "--output", "-o", help="Folder for the CSV, the summary and the plot."),
    workers: int | None = typer.Option(
        None,
        min=1,
        help="Trainings side by side on each device, a process each. (default: what the file says, or 1)",
    ),
    together: int | None = typer.Option(
        None,
        min=1,
        help="Trainings of one model and width that are computed together, as one larger model; each is what it would "
        "be alone. (default: what the file says, or 1)",
    ),
    seconds: float | None = typer.Option(
        None,
        help="All training is over after so many seconds: the next call goes on where it stopped. (default: all of it)",
    ),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to train: auto takes the GPUs that there are, if any."
    ),
) -> None:
    """Train many small models on associative recall, and compare them.

    Every training is one row of sweep.csv as soon as it ends. Called again, those that are there are not run again, and
    those that were stopped go on.
    The learning rate is chosen on sequences that are neither trained on nor reported.

    Example: loglinear sweep experiments/mqar-tiny.yaml --output runs/mqar-tiny --workers 2
    """
    from loglinear.evals.command import run_sweep

    run_sweep(file, output, device, workers, seconds, together)


@app.command()
def compare(
    file: Path = typer.Argument(help="YAML, TOML or JSON file of the comparison: see experiments/language-tiny.yaml."),
    output: str = typer.Option("runs/comparison", "--output", "-o", help="Folder for the CSV."),
    work: str | None = typer.Option(
        None,
        "--work",
        help="Folder for checkpoints, which are not needed afterwards. (default: runs/ and the name of the file)",
    ),
    seconds: float | None = typer.Option(
        None,
        help="Begin no run that would not be done after so many seconds, as far as those before it tell. "
        "(default: all of them)",
    ),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to train: auto takes the GPUs when there are any."
    ),
    workers: int | None = typer.Option(None, min=1, help="Runs side by side. (default: one on each GPU)"),
) -> None:
    """Train language models on the same tokens, and compare them.

    Every run is trained, examined (held-out loss, loss by position, needles, use of levels, cost) and written to
    comparison.csv as rows. Called again, also elsewhere with that file, those that are there are not run again.

    Example: loglinear compare experiments/language-tiny.yaml --output runs/language-tiny
    """
    from loglinear.evals.command import run_comparison

    run_comparison(file, output, work, device, seconds, workers)


@app.command()
def results(
    experiments: str = typer.Option("experiments", help="Folder with the files of experiments."),
    benchmarks: str = typer.Option("benchmarks", help="Folder with their rows, each in a folder of its name."),
    output: str = typer.Option(
        "docs/results.md", "--output", "-o", help="The page; plots go into figures/results/ beside it."
    ),
) -> None:
    """Draw the page of results from the rows of sweeps and comparisons.

    Tables of means and standard deviations over seeds, plots, and for twins whether they differ by more than seeds do.

    Example: loglinear results
    """
    from loglinear.evals.command import run_results

    run_results(experiments, benchmarks, output)


@app.command()
def generate(
    checkpoint: Path = typer.Argument(
        help="Folder of a checkpoint, or of a training run (its newest checkpoint is taken)."
    ),
    prompt: str | None = typer.Argument(
        None, help="The text to go on from. Without it and --prompt-file: standard input."
    ),
    prompt_file: Path | None = typer.Option(None, "--prompt-file", "-f", help="Read the prompt from this file."),
    interactive: bool = typer.Option(
        False,
        "--interactive",
        "-i",
        help="Take turns: a chat if the tokenizer has a template for one, else a text that both go on with. The prompt "
        "is the first turn, lines of standard input are the others; /help lists commands.",
    ),
    max_new_tokens: int = typer.Option(
        256, "--max-new-tokens", "-n", help="Stop after this many tokens at the latest."
    ),
    greedy: bool = typer.Option(False, "--greedy", help="Take the likeliest token each time instead of drawing one."),
    temperature: float | None = typer.Option(
        None, help="Divides the logits before drawing; below 1 is more cautious. (default: 1)"
    ),
    top_k: int | None = typer.Option(None, help="Draw from the k likeliest tokens only. (default: all)"),
    top_p: float | None = typer.Option(
        None, help="Draw from the likeliest tokens that together have this probability. (default: 1)"
    ),
    seed: int | None = typer.Option(None, help="Makes the draws repeatable."),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to run: auto takes the GPU when there is one."
    ),
    precision: str = typer.Option(
        "auto", metavar="auto|bf16|fp32", help="Type of the weights; auto takes bf16 on GPUs that have it."
    ),
    state_dtype: str | None = typer.Option(
        None,
        metavar="float32|bfloat16",
        help="Type in which the model's states are kept: bfloat16 takes half the memory and is less exact. "
        "(default: what the checkpoint's configuration says; else bfloat16 for a log-linear model in bf16 on a GPU, "
        "if it has all levels of the length that it is made for and no decay per channel, and float32 for all others)",
    ),
) -> None:
    """Continue a text with a trained model.

    The text goes to standard output as it is produced (the prompt first); speed and the size of the model's state go to
    standard error.

    With --interactive the model's state is kept from turn to turn, so that a turn costs what is new in it. Ctrl-C stops
    an answer; at the prompt it ends the program.

    Example: loglinear generate runs/first "def main(" --temperature 0.8 --max-new-tokens 500
    """
    if prompt is not None and prompt_file is not None:
        raise ValueError("got a prompt and --prompt-file, wanted one of them")
    if prompt_file is not None:
        prompt = _read_text(prompt_file, "prompt")
    from loglinear.generate import check_sampling, generate_text
    from loglinear.train.checkpoints import choose_device, load_checkpoint

    check_sampling(max_new_tokens, greedy, temperature, top_k, top_p, seed)
    # In the C locale Python takes bytes that are no text as half characters, and says nothing.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")
    text = prompt if interactive or prompt is not None else _read_standard_input()
    place, dtype = choose_device(device, precision)
    model, tokenizer = load_checkpoint(checkpoint, device=place, dtype=dtype, state_dtype=state_dtype)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    # What was generated can hold characters that a narrow terminal encoding cannot show.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if interactive:
        sampling = {"greedy": greedy, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        _converse(model, tokenizer, text, seed, max_new_tokens=max_new_tokens, **sampling)
        return
    assert text is not None
    show(text)
    result = generate_text(
        model,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=show,
    )
    show("\n")
    print(
        f"{len(result.tokens):,} tokens at {result.tokens_per_second:,.1f} tokens/s after a prompt of "
        f"{result.prompt_tokens:,} (first token in {result.first_token_seconds:.2f} s); "
        f"state {result.state_bytes:,} bytes",
        file=sys.stderr,
    )


@app.command()
def serve(
    checkpoint: Path = typer.Argument(
        help="Folder of a checkpoint, or of a training run (its newest checkpoint is taken). Requests call the "
        "model by this path."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; nobody is asked for a password."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 takes a free one."),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to run: auto takes the GPU when there is one."
    ),
    precision: str = typer.Option(
        "auto", metavar="auto|bf16|fp32", help="Type of the weights; auto takes bf16 on GPUs that have it."
    ),
    state_dtype: str | None = typer.Option(
        None,
        metavar="float32|bfloat16",
        help="Type in which the model's states are kept: bfloat16 takes half the memory and is less exact. "
        "(default: what the checkpoint's configuration says; else bfloat16 for a log-linear model in bf16 on a GPU, "
        "if it has all levels of the length that it is made for and no decay per channel, and float32 for all others)",
    ),
) -> None:
    """Answer OpenAI-compatible requests with a trained model.

    Chat completions and completions, streamed or whole, one at a time, until Ctrl-C.
    Needs pip install 'log-linear-attention\\[serve]'.

    Example: loglinear serve runs/first --port 8000
    """
    from loglinear.serve import serve as run

    run(checkpoint, host=host, port=port, device=device, precision=precision, state_dtype=state_dtype)


def _converse(model: Any, tokenizer: Any, first: str | None, seed: int | None, **sampling: Any) -> None:
    """The turns of `generate --interactive`; `seed` makes the whole conversation repeatable."""
    import torch

    from loglinear.conversation import Conversation
    from loglinear.interactive import converse

    if seed is not None:
        torch.manual_seed(seed)
    try:
        converse(Conversation(model, tokenizer), first, **sampling)
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable("standard input", error)) from error


@evaluation.command("position-loss")
def position_loss(
    checkpoints: list[str] = typer.Argument(
        help="Folders of checkpoints or of training runs. With several, the others are compared with the first."
    ),
    output: str = typer.Option("position-loss", "--output", "-o", help="Folder for the CSV and the plot."),
    length: int | None = typer.Option(
        None, min=1, help="Positions to evaluate. (default: the length that the first model is meant for)"
    ),
    data: list[str] = typer.Option(
        [], help="Documents to evaluate on, as in training. (default: those held out from the training of the first)"
    ),
    text_field: str | None = _data_option("text_field"),
    hub_subset: str | None = _data_option("hub_subset"),
    hub_split: str | None = _data_option("hub_split"),
    all_documents: bool = typer.Option(
        False, "--all-documents", help="Also take documents that end before the last position."
    ),
    max_documents: int = typer.Option(128, min=1, help="Evaluate at most this many documents, drawn at random."),
    bucket: int | None = typer.Option(
        None, min=1, help="Width of a bucket of positions. (default: doubling, 16, 16, 32, 64 ...)"
    ),
    label: list[str] = typer.Option([], help="Name of a checkpoint in table and plot, one for each."),
    seed: int = typer.Option(0, help="Seed of the choice of documents."),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to run: auto takes the GPU when there is one."
    ),
) -> None:
    """Loss against position in held-out documents.

    How well does a model predict a token, by how much of the document it has read?
    All checkpoints read the same documents, so their differences are paired.

    Example: loglinear eval position-loss runs/linear runs/log-linear
    """
    from loglinear.evals.command import run_position_loss

    run_position_loss(
        checkpoints,
        output,
        device=device,
        length=length,
        data=data,
        data_options=_given(text_field=text_field, hub_subset=hub_subset, hub_split=hub_split),
        whole=not all_documents,
        maximum=max_documents,
        width=bucket,
        labels=label,
        seed=seed,
    )


@evaluation.command("mqar")
def mqar(
    checkpoints: list[str] = typer.Argument(help="Folders of runs of `loglinear train --task mqar`, or checkpoints."),
    output: str = typer.Option("mqar", "--output", "-o", help="Folder for the CSV and the plot."),
    length: int | None = typer.Option(
        None, min=1, help="Tokens of a sequence. (default: that of the first one's training; it may be longer)"
    ),
    pairs: str | None = typer.Option(
        None, help="Numbers of key-value pairs, such as 4,8,16. (default: those of the first one's training)"
    ),
    power: float | None = typer.Option(
        None, help="Of the query positions: 1 spreads them evenly, less puts more of them early. (default: as trained)"
    ),
    sequences: int = typer.Option(1000, min=1, help="Test sequences of each number of pairs."),
    label: list[str] = typer.Option([], help="Name of a checkpoint in table and plot, one for each."),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to run: auto takes the GPU when there is one."
    ),
    precision: str = typer.Option("fp32", metavar="auto|bf16|fp32", help="bf16 is autocast with fp32 weights."),
) -> None:
    """Multi-query associative recall, by number of pairs and by distance.

    The test sequences are the same for every model and were in no training.

    Example: loglinear eval mqar runs/mamba2 runs/log-linear-mamba2
    """
    from loglinear.evals.command import run_mqar

    run_mqar(
        checkpoints,
        output,
        device=device,
        precision=precision,
        length=length,
        options=_given(pairs=pairs, power=power),
        sequences=sequences,
        labels=label,
    )


@evaluation.command("needle")
def needle(
    models: list[str] = typer.Argument(
        help="Folders of checkpoints or training runs, or any causal language models of transformers by folder or name."
    ),
    output: str = typer.Option("needle", "--output", "-o", help="Folder for the CSVs and the plot."),
    task: list[str] = typer.Option(
        [],
        "--task",
        "-t",
        help="A task of RULER by name, or all (repeat, or separate by commas). (default: niah_single_1, a passkey in "
        "repeated sentences; niah_single_2, a number in running text; niah_single_3, a uuid in it)",
    ),
    lengths: list[str] = typer.Option([], help="Tokens of prompt and answer, such as 512,1K,4K. (default: 1K)"),
    depths: str = typer.Option("0,25,50,75,100", help="Where the needle is, in per cent of the haystack."),
    samples: int = typer.Option(10, min=1, help="Samples of each task, length and depth."),
    haystack: Path | None = typer.Option(
        None, help="File of running text. (default: Python's language reference, as its help() shows it)"
    ),
    chat: bool = typer.Option(False, "--chat", help="Ask in the user's turn of the tokenizer's chat template."),
    seed: int = typer.Option(0, help="Another seed makes other samples."),
    label: list[str] = typer.Option([], help="Name of a model in table and plot, one for each."),
    batch_tokens: int = typer.Option(65_536, min=1, help="Samples that are read at once, in tokens."),
    harness_task: Path | None = typer.Option(
        None, help="Also write the samples as a task of the evaluation harness into this folder."
    ),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to run: auto takes the GPU when there is one."
    ),
    precision: str = typer.Option(
        "auto", metavar="auto|bf16|fp32", help="Type of the weights; auto takes bf16 on GPUs that have it."
    ),
) -> None:
    """Needle in a haystack, by length and depth.

    A fact is hidden in a long text, and the model is asked for it: tasks of RULER (niah_single_1 to 3,
    niah_multikey_1 to 3, niah_multivalue, niah_multiquery), answered greedily, judged exactly.

    Example: loglinear eval needle runs/linear runs/log-linear --lengths 512,1K,2K
    """
    from loglinear.bench.command import parse_lengths
    from loglinear.evals.command import run_needle
    from loglinear.evals.needle import DEFAULT_TASKS

    run_needle(
        models,
        output,
        device=device,
        precision=precision,
        harness_task=harness_task,
        tasks=[name for entry in task for name in entry.split(",") if name] or list(DEFAULT_TASKS),
        lengths=parse_lengths(lengths) if lengths else (1024,),
        depths=_depths(depths),
        samples=samples,
        haystack=haystack,
        chat=chat,
        seed=seed,
        labels=label,
        tokens_per_batch=batch_tokens,
    )


@evaluation.command("harness")
def harness(
    models: list[str] = typer.Argument(
        help="Folders of checkpoints or training runs, or any causal language models of transformers by folder or name."
    ),
    task: list[str] = typer.Option(..., "--task", "-t", help="Name of a task (repeat, or separate by commas)."),
    output: str = typer.Option(
        "harness", "--output", "-o", help="Folder for the CSV, the plot, the JSON and the samples."
    ),
    include_path: list[Path] = typer.Option([], help="Folder with task files of your own. Repeat for several."),
    fewshot: int | None = typer.Option(None, min=0, help="Examples before a question. (default: what the task says)"),
    limit: int | None = typer.Option(None, min=1, help="Questions of each task. (default: all)"),
    batch_size: int = typer.Option(1, min=1, help="Questions at once."),
    max_length: int | None = typer.Option(
        None,
        min=1,
        help="Tokens of a text; longer ones lose their beginning. (default: the length that the model is meant for)",
    ),
    chat: bool = typer.Option(False, "--chat", help="Put questions into the tokenizer's chat template."),
    metadata: list[str] = typer.Option(
        [], metavar="KEY=VALUE", help="For tasks that make their own texts: max_seq_lengths=[4096,8192] for RULER's."
    ),
    seed: int = typer.Option(0, help="Seed of the choice of examples."),
    label: list[str] = typer.Option([], help="Name of a model in table and CSV, one for each."),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to run: auto takes the GPU when there is one."
    ),
    precision: str = typer.Option(
        "auto", metavar="auto|bf16|fp32", help="Type of the weights; auto takes bf16 on GPUs that have it."
    ),
) -> None:
    """Tasks of EleutherAI's evaluation harness.

    By name, or from task files of your own. Needs pip install 'log-linear-attention\\[harness]'.

    Example: loglinear eval harness runs/first --task lambada_openai --task hellaswag --batch-size 16
    """
    from loglinear.evals.command import run_harness

    run_harness(
        models,
        output,
        device=device,
        precision=precision,
        labels=label,
        tasks=[name for entry in task for name in entry.split(",") if name],
        include_path=include_path,
        fewshot=fewshot,
        limit=limit,
        batch_size=batch_size,
        max_length=max_length,
        chat=chat,
        metadata=_assignments("--metadata", metadata),
        seed=seed,
    )


def _depths(text: str) -> list[float]:
    """Shares from per cents with commas between."""
    try:
        found = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--depths: got {text!r}, wanted per cents such as 0,50,100") from None
    if not all(0 <= depth <= 1 for depth in found):
        raise ValueError(f"--depths: got {text!r}, wanted per cents from 0 to 100")
    return found


@app.command("inspect")
def inspect_model(
    target: str = typer.Argument(help="Folder of a checkpoint or training run, or the name of a preset."),
    output: str = typer.Option("inspect", "--output", "-o", help="Folder for the plots and the CSV."),
    text: str | None = typer.Option(
        None,
        help="Show the level scales on this text. (default: some Python source; for a preset, which has no trained "
        "weights, they are shown only if a text is given)",
    ),
    text_file: Path | None = typer.Option(None, "--text-file", "-f", help="Read the text from this file."),
    lengths: list[str] = typer.Option([], help="Lengths of the cost table. (default: 1K,4K,16K,64K,256K,1M)"),
    max_tokens: int | None = typer.Option(
        None, min=1, help="Read this much of the text. (default: the model's length, at most 1024)"
    ),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to run: auto takes the GPU when there is one."
    ),
) -> None:
    """Look into a model: parameters, cost by length, partition, level scales, and what each level contributes.

    Example: loglinear inspect log-linear-mamba2-825m

    Example: loglinear inspect runs/first --text-file README.md
    """
    if text is not None and text_file is not None:
        raise ValueError("got --text and --text-file, wanted one of them")
    if text_file is not None:
        text = _read_text(text_file, "text")
    from loglinear.bench.command import parse_lengths
    from loglinear.evals.command import run_inspect
    from loglinear.evals.inspection import COST_LENGTHS

    chosen = parse_lengths(lengths) if lengths else COST_LENGTHS
    run_inspect(target, output, text, chosen, max_tokens, device)


@app.command()
def quickstart(
    output: str = typer.Option("quickstart", "--output", "-o", help="Folder for everything; it must be new or empty."),
    preset: str | None = typer.Option(
        None,
        help="Train this preset; its twin is the same with one level. "
        "(default: Gated DeltaNet, 1M parameters on a processor, 30M on a GPU)",
    ),
    steps: int | None = typer.Option(None, min=1, help="Steps of each model. (default: as many as the time allows)"),
    seconds: float | None = typer.Option(
        None, help="Training time of both together, without --steps. (default: 200 on a processor, 240 on a GPU)"
    ),
    data: list[str] = typer.Option([], help="Other documents to train on, as for train. (default: stdlib)"),
    text_field: str | None = _data_option("text_field"),
    hub_subset: str | None = _data_option("hub_subset"),
    hub_split: str | None = _data_option("hub_split"),
    max_documents: int | None = typer.Option(None, min=1, help="Read at most this many documents."),
    sequence_length: int | None = typer.Option(
        None, min=2, help="Tokens per row. (default: 1024 on a processor, 8192 on a GPU)"
    ),
    rows: int | None = typer.Option(None, min=1, help="Rows per step. (default: 4)"),
    evaluation_documents: int | None = typer.Option(
        None, min=1, help="Held-out documents to compare on. (default: 48 on a processor, 64 on a GPU)"
    ),
    sample_tokens: int | None = typer.Option(
        None, min=1, help="Tokens of each sample. (default: 200 on a processor, 400 on a GPU)"
    ),
    seed: int | None = typer.Option(None, help="Seed of weights, data order and samples. (default: 0)"),
    device: str = typer.Option(
        "auto", metavar="auto|cpu|cuda", help="Where to run: auto takes the GPU when there is one."
    ),
) -> None:
    """Train a small log-linear model and its plain linear twin, and compare.

    Needs no download: the corpus is the source of Python's standard library.
    Takes less than 6 minutes on two processor cores.
    Checkpoints, tables, plots and a report.md are left in one folder.
    """
    from loglinear import quickstart as implementation

    config = implementation.choose(
        device,
        preset,
        output=output,
        steps=steps,
        training_seconds=seconds,
        data=tuple(data) or None,
        text_field=text_field,
        hub_subset=hub_subset,
        hub_split=hub_split,
        max_documents=max_documents,
        sequence_length=sequence_length,
        rows=rows,
        evaluation_documents=evaluation_documents,
        sample_tokens=sample_tokens,
        seed=seed,
    )
    implementation.run(config)


@app.command()
def bench(
    cpu: bool = typer.Option(False, "--cpu", help="Measure the processor even where there is a GPU."),
    operator: list[str] = typer.Option(
        [], "--operator", "-o", help="Only these operators (repeat; see --list). Default: all that suit the device."
    ),
    shape: list[str] = typer.Option([], "--shape", help="Only these shapes (repeat; see --list)."),
    lengths: list[str] = typer.Option(
        [],
        "--lengths",
        help="Sequence lengths (with --decode and --step: contexts), such as 1K,4K,64K,1M. "
        "Default: 1K to 64K (CPU) or to 1M (GPU).",
    ),
    batches: list[str] = typer.Option(
        [],
        "--batch",
        help="'one' sequence a call, or as many as make a constant number of 'tokens' (repeat for both). "
        "Default: one (CPU), both (GPU). With --decode and --step: numbers of sequences, such as 1,32.",
    ),
    forward_only: bool = typer.Option(False, "--forward-only", help="Leave the backward pass out."),
    dtype: str | None = typer.Option(
        None, help="float32, bfloat16 or float16. Default: float32 (CPU), bfloat16 (GPU)."
    ),
    tokens: int | None = typer.Option(
        None, min=1, help="Tokens in a call with --batch tokens, and in a training step. Default: 65536."
    ),
    model: list[str] = typer.Option(
        [],
        "--model",
        help="Measure training steps of these presets instead of operators (repeat). With --decode: decode them.",
    ),
    decode: bool = typer.Option(
        False, "--decode", help="Measure decoding: tokens per second and memory of whole models by context."
    ),
    step: bool = typer.Option(False, "--step", help="Measure the operator's decoding step alone, by position."),
    drift: bool = typer.Option(
        False,
        "--drift",
        help="Measure how far decoding steps are from float64 after 1,000, 10,000 and 100,000 tokens (or --lengths), "
        "by how states are kept (float32 where nothing is said): on a processor, about half an hour.",
    ),
    window: int | None = typer.Option(
        None,
        help="With --decode and --step: keep this many tokens (a power of two) beside the states, which are then "
        "written once in so many. 0: states are written at every token. Default: 16 (GPU), 0 (CPU).",
    ),
    state_dtype: str | None = typer.Option(
        None,
        help="With --decode and --step: keep states in float32 or bfloat16. Default: what each model keeps them in "
        "(--decode), float32 (--step).",
    ),
    compile_blocks: bool = typer.Option(False, "--compile", help="With --model: compile the blocks of the models."),
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

    Decoding contexts are not read but set up: states and caches of that position hold random numbers.

    `loglinear bench --cpu` takes about ten minutes on two cores.
    A GPU run of a few operators takes one or two:
    `loglinear bench -o log-linear -o softmax-flash --lengths 4K,16K,64K`
    """
    from rich.console import Console

    from loglinear.bench import command
    from loglinear.bench.decoding import Kept

    if list_choices:
        Console().print(command.describe())
        return
    if drift:
        useless = {
            "--decode": decode,
            "--step": step,
            "--model": model,
            "--operator": operator,
            "--shape": shape,
            "--batch": batches,
            "--forward-only": forward_only,
            "--dtype": dtype,
            "--tokens": tokens,
            "--window": window,
            "--state-dtype": state_dtype,
            "--compile": compile_blocks,
            "--budget": budget,
            "--cap": cap,
        }
        wrong = command.given_options(useless)
        if wrong:
            raise ValueError(f"got {', '.join(wrong)} with --drift, wanted none of these")
        at = command.parse_lengths(lengths) if lengths else None
        command.run(command.only_drift(command.choose_suite(cpu=True), at), output, name or "drift")
        return
    if decode or step:
        _bench_decoding(
            decode,
            step,
            {
                "--operator": operator,
                "--forward-only": forward_only,
                "--tokens": tokens,
                "--compile": compile_blocks,
                "--shape": shape if decode else [],
                "--model": model if step else [],
            },
            cpu,
            {"dtype": dtype, "budget_s": budget, "cap_s": cap},
            {"models": model if decode else None, "shapes": shape if step else None, "kept": Kept(state_dtype, window)},
            (lengths, batches),
            (output, name),
        )
        return
    kept = command.given_options({"--window": window, "--state-dtype": state_dtype})
    if kept:
        raise ValueError(f"got {', '.join(kept)}, wanted --decode or --step with it: nothing else steps from states")
    if model:
        command.refuse_operator_options(
            {
                "--operator": operator,
                "--shape": shape,
                "--batch": batches,
                "--dtype": dtype,
                "--forward-only": forward_only,
            }
        )
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
        suite = command.only_models(suite, model, chosen or command.MODEL_LENGTHS, compile_blocks)
    elif compile_blocks:
        raise ValueError("got --compile, wanted --model with it: operators are measured as they are")
    elif tokens is not None and "tokens" not in suite.batches:
        raise ValueError("got --tokens, wanted --batch tokens with it: one sequence a call has its own length")
    command.run(suite, output, name)


def _bench_decoding(
    decode: bool,
    step: bool,
    useless: dict[str, object],
    cpu: bool,
    changes: dict[str, Any],
    what: dict[str, Any],
    where: tuple[list[str], list[str]],
    files: tuple[str, str | None],
) -> None:
    """`bench --decode` and `bench --step`."""
    from loglinear.bench import command

    if decode and step:
        raise ValueError("got --decode and --step, wanted one of them: they have contexts and batches of their own")
    flag, wrong = "--decode" if decode else "--step", command.given_options(useless)
    if wrong:
        raise ValueError(f"got {', '.join(wrong)} with {flag}, wanted none of these")
    lengths, batches = where
    contexts = command.parse_lengths(lengths) if lengths else None
    rows = command.parse_rows(batches) if batches else None
    suite = command.only_decoding(command.choose_suite(cpu, **changes), contexts=contexts, rows=rows, **what)
    command.run(suite, *files)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 for a run whose numbers were not finite, 2 for a mistake of the user."""
    _settings["debug"] = False
    try:
        app(args=arguments, prog_name="loglinear")
    except USER_ERRORS as error:
        if _settings["debug"]:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"loglinear: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error
    except FloatingPointError as error:
        # The run went wrong, not the call.
        if _settings["debug"]:
            raise
        print(f"loglinear: {error}", file=sys.stderr)
        raise SystemExit(1) from error
