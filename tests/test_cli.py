"""The command line: what it prints, what it refuses, and every flag being a field of the configuration."""

import dataclasses
import io
import itertools
import json
import re
import subprocess
import sys

import pytest

from loglinear.cli import main
from loglinear.train import TrainConfig


def run(capsys, *arguments):
    """Run a command in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(8):
        lines = [f"line {line} of text {number}: some words to learn from" for line in range(10)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def small(texts, output):
    """Flags of a run that takes a second."""
    flags = (
        f"--steps 4 --rows 2 --sequence-length 48 --model tiny-gated-deltanet --held-out-fraction 0.3 --cache {texts}-c"
    )
    return ["train", "--data", texts, "--output", output, "--no-tensorboard", "--device", "cpu", *flags.split()]


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in small(texts, output)])
    assert not ended.value.code
    return output


def test_help_is_quick_and_names_the_commands():
    """In a process of its own: help must not wait for torch."""
    code = (
        "import sys\nfrom loglinear.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'numpy'}.intersection(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "heavy: []" in shown
    for command in ("train", "generate", "eval"):
        assert command in shown


def test_module_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "loglinear", "generate", "-h"], capture_output=True, text=True, check=True
    )
    assert "Usage: loglinear generate" in shown.stdout


@pytest.mark.parametrize("command", ["train", "generate", "serve", "quickstart", "bench", "eval needle"])
def test_help_flows_in_a_narrow_terminal(capsys, monkeypatch, command):
    """No line of a paragraph ends before it has to."""
    monkeypatch.setenv("COLUMNS", "72")
    code, shown, _ = run(capsys, *command.split(), "--help")
    assert code == 0 and "\\" not in shown
    prose = shown.partition("╭")[0].splitlines()
    for line, following in itertools.pairwise(prose):
        if line.strip() and following.strip():
            assert len(line.rstrip()) + 1 + len(following.split()[0]) > 70, f"{line!r} ends early"


def test_every_field_of_the_configuration_is_a_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    code, shown, _ = run(capsys, "train", "--help")
    assert code == 0
    for one in dataclasses.fields(TrainConfig):
        assert f"--{one.name.replace('_', '-')}" in shown, one.name


def test_train_writes_and_reports(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [4]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [4]
    assert (trained / "checkpoint-4" / "model.safetensors").is_file()
    config = TrainConfig.from_file(trained / "train_config.yaml")
    assert (config.steps, config.rows, config.tensorboard, config.model) == (4, 2, False, "tiny-gated-deltanet")


def test_flags_win_over_the_file_and_resume_finds_its_own(capsys, texts, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        f'data = "{texts}"\nmodel = "tiny-mamba2"\nsteps = 50\nrows = 1\nsequence_length = 32\n'
        f'held_out_fraction = 0.3\ntensorboard = false\ndevice = "cpu"\nlog_every = 1\n'
        f'output = "{tmp_path / "unused"}"\ncache = "{texts}-c"\n'
        "model_options = {num_levels = 3, num_hidden_layers = 1}\n"
    )
    output = tmp_path / "run"
    code, _, told = run(
        capsys,
        "train",
        "-c",
        file,
        "--output",
        output,
        "--steps",
        4,
        "--stop-after",
        2,
        "--model-options",
        "num_levels=2",
    )
    assert code == 0 and "stopped at step 2 of 4" in told and "step 2/4" in told
    model = json.loads((output / "checkpoint-2" / "config.json").read_text())
    assert (model["mixer"], model["num_levels"], model["num_hidden_layers"]) == ("mamba2", 2, 1)
    code, _, told = run(capsys, "train", "--output", output, "--resume")
    assert code == 0 and "from step 2" in told and "checkpoint-4" in told
    assert not (tmp_path / "unused").exists()


def test_generate_from_argument_file_and_pipe(capsys, trained, tmp_path, monkeypatch):
    flags = ["--greedy", "--max-new-tokens", 12, "--device", "cpu"]
    code, shown, told = run(capsys, "generate", trained, "line 7 é", *flags)
    assert code == 0 and shown.startswith("line 7 é")
    assert "12 tokens at" in told and "tokens/s" in told and "state" in told and "bytes" in told
    (tmp_path / "prompt.txt").write_text("line 7 é", encoding="utf-8")
    assert (
        run(capsys, "generate", trained / "checkpoint-4", "--prompt-file", tmp_path / "prompt.txt", *flags)[1] == shown
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("line 7 é"))
    assert run(capsys, "generate", trained, *flags)[1] == shown
    drawn = ["--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--seed", 3, "-n", 12, "--precision", "fp32"]
    first = run(capsys, "generate", trained, "x", *drawn)[1]
    assert first == run(capsys, "generate", trained, "x", *drawn)[1]


def test_states_are_kept_as_asked_for(capsys, trained):
    sizes = []
    for dtype in ("float32", "bfloat16"):
        flags = ["--greedy", "-n", 12, "--device", "cpu", "--state-dtype", dtype]
        code, _, told = run(capsys, "generate", trained, "line 7", *flags)
        assert code == 0
        sizes.append(int(re.search(r"state ([\d,]+) bytes", told)[1].replace(",", "")))
    assert 0.5 <= sizes[1] / sizes[0] < 0.6
    code, _, told = run(capsys, "generate", trained, "line 7", "--device", "cpu", "--state-dtype", "float16")
    assert code == 2 and "state_dtype must be 'float32' or 'bfloat16', got 'float16'" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--data", "absent.txt", "--output", "o"],
            "got the data source 'absent.txt', wanted an existing file",
        ),
        (["train", "--config", "absent.yaml"], "no configuration file absent.yaml"),
        (["train", "--schedule", "cosin"], "schedule: got 'cosin', wanted one of 'cosine', 'linear', 'constant'"),
        (["train", "--model-options", "num_levels"], "--model-options: got 'num_levels', wanted KEY=VALUE"),
        (["train", "--steps", "1", "--epochs", "1"], "got steps=1 and epochs=1.0, wanted one of them"),
        (["generate", "absent", "x"], "got absent, wanted the folder of a checkpoint or of a training run"),
        (["generate", "absent", "x", "--prompt-file", "f"], "got a prompt and --prompt-file, wanted one of them"),
        (["generate", "absent", "--prompt-file", "absent.txt"], "no prompt file absent.txt"),
        (["train", "--epochs", "inf"], "epochs: got inf, wanted a finite number"),
        (["train", "--gradient-clip", "nan"], "gradient_clip: got nan, wanted a finite number"),
        (
            ["train", "--text-field", "x"],
            "got text_field='x', but no source has fields; wanted JSONL, Parquet or a hub",
        ),
        (["inspect", "tiny-gla", "--text-file", "absent.txt"], "no text file absent.txt"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, shown, told = run(capsys, *arguments)
    assert code == 2 and shown == ""
    assert told.startswith(f"loglinear: error: {message}") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", 0], "max_new_tokens: got 0, wanted at least 1"),
        (["--temperature", -1], "temperature: got -1.0, wanted a finite number, more than 0"),
        (["--temperature", "nan"], "temperature: got nan, wanted a finite number, more than 0"),
        (["--top-p", "nan"], "top_p: got nan, wanted more than 0 and at most 1"),
        (["--greedy", "--top-k", 3], "got greedy together with top_k"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_generate_checks_its_options_before_it_shows_the_prompt(capsys, trained, flags, message):
    code, shown, told = run(capsys, "generate", trained, "the prompt", "--device", "cpu", *flags)
    assert code == 2 and shown == "" and told.startswith(f"loglinear: error: {message}")


def test_text_that_is_not_utf8_is_refused_by_name(capsys, tmp_path, monkeypatch):
    file, output = tmp_path / "latin.txt", tmp_path / "out"
    file.write_bytes("un café".encode("latin-1"))
    for what, arguments in (
        ("prompt", ["generate", tmp_path, "-f", file]),
        ("text", ["inspect", "tiny-gla", "-f", file, "-o", output]),
    ):
        code, shown, told = run(capsys, *arguments)
        assert code == 2 and shown == "" and not output.exists()
        assert f"got the {what} file {file}, wanted it in utf-8: unexpected end of data at byte 6" in told
    for errors in ("strict", "surrogateescape"):  # the second is Python's choice in the C locale
        piped = io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", piped)
        code, shown, told = run(capsys, "generate", tmp_path)
        assert code == 2 and shown == "" and "got standard input, wanted it in utf-8" in told


def test_unknown_key_in_a_file_is_named_with_its_nearest(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rat: 1\n")
    code, _, told = run(capsys, "train", "--config", tmp_path / "c.yaml")
    assert code == 2 and "unknown training option 'learning_rat'; did you mean 'learning_rate'?" in told


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted the folder of a checkpoint"):
        main(["--debug", "generate", str(tmp_path / "absent"), "x"])


def test_a_run_that_is_not_finite_exits_with_1(capsys, texts, tmp_path, monkeypatch):
    from loglinear.models import LogLinearForCausalLM

    forward = LogLinearForCausalLM.forward

    def broken(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(LogLinearForCausalLM, "forward", broken)
    code, _, told = run(capsys, *small(texts, tmp_path / "run"))
    assert code == 1 and "step 1 was not finite (loss nan" in told
    assert str(tmp_path / "run" / "checkpoint-0") in told.replace("\n", "")
