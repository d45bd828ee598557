"""The quickstart in a shortened form leaves everything it promises, and its twins differ in their levels
alone.
"""

import csv
import itertools
import json
import time
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from loglinear import quickstart
from loglinear.cli import main
from loglinear.evals.position_loss import LossDifference
from loglinear.layers import MIXERS
from loglinear.train import TrainConfig


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    config = quickstart.choose(
        "cpu",
        "tiny-gated-deltanet",
        output=str(folder / "out"),
        steps=2,
        sequence_length=64,
        rows=2,
        max_documents=40,
        evaluation_documents=2,
        sample_tokens=8,
        cache=str(folder / "cache"),
    )
    return quickstart.run(config)


def test_everything_is_in_the_folder(result):
    folder = result.files["report"].parent
    assert {path.name for path in folder.iterdir()} == {
        "linear",
        "log-linear",
        "level_scales.csv",
        "level_scales.png",
        "memory.csv",
        "memory.png",
        "partition.png",
        "position_loss.csv",
        "position_loss.png",
        "position_loss_differences.csv",
        "report.md",
        "training.png",
    }
    assert all((folder / name / "checkpoint-2" / "model.safetensors").is_file() for name in ("linear", "log-linear"))


def test_the_report_shows_what_was_made(result):
    folder = result.files["report"].parent
    text = result.files["report"].read_text()
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(pictures) == 5 and all((folder / picture).is_file() for picture in pictures)
    assert quickstart.verdict(result.overall) in text
    assert quickstart.PROMPT + result.samples["log-linear"].text.rstrip() in text
    assert "| 1M |" in text and "other seeds" in text
    assert "Two Gated DeltaNet models" in text
    assert result.whole_documents and "as far as they go" not in text


def test_the_twins_were_trained_alike(result):
    saved = {name: TrainConfig.from_file(run.checkpoint / "train_config.yaml") for name, run in result.runs.items()}
    differing = {key for key, value in saved["linear"].to_dict().items() if saved["log-linear"].to_dict()[key] != value}
    assert differing == {"output", "model_options"}
    assert {run.steps for run in result.runs.values()} == {2}
    levels = {
        name: json.loads((run.checkpoint / "config.json").read_text())["num_levels"]
        for name, run in result.runs.items()
    }
    assert levels == {"linear": 1, "log-linear": 7}


def test_memory_is_tabulated_to_a_million_tokens(result):
    with result.files["memory_csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["tokens"]) for row in rows] == [1024, 4096, 16384, 65536, 262144, 1048576]
    assert len({row["linear_state_bytes"] for row in rows}) == 1
    assert int(rows[-1]["log_linear_state_bytes"]) > int(rows[0]["log_linear_state_bytes"])
    assert int(rows[-1]["softmax_kv_cache_bytes"]) == 1024 * int(rows[0]["softmax_kv_cache_bytes"])


def test_twins_start_from_the_same_weights(tmp_path, monkeypatch):
    started = []

    def begin(config, prepare):
        torch.manual_seed(len(started))
        model = quickstart.build_model(config, quickstart.load_tokenizer("bytes"))
        prepare(model)
        started.append(model.state_dict())
        if len(started) == 2:
            raise InterruptedError("both were begun")

    monkeypatch.setattr(quickstart, "train", begin)
    config = quickstart.choose(
        "cpu", "tiny-gated-deltanet", output=str(tmp_path / "out"), steps=2, sequence_length=64, max_documents=40
    )
    with pytest.raises(InterruptedError):
        quickstart.run(quickstart.replace(config, cache=str(tmp_path / "cache")))
    linear, log_linear = started
    for name, weight in linear.items():
        assert torch.equal(weight, log_linear[name]), name
    assert log_linear.keys() - linear.keys() == {
        f"model.layers.{layer}.mixer.level_scales.{part}" for layer in (0, 1) for part in ("weight", "proj.weight")
    }


def test_the_verdict_says_when_there_is_only_noise():
    clear = LossDifference("log-linear", "linear", 0, 64, -0.1, 0.01, 40, 2560)
    assert "-0.100 ± 0.010" in quickstart.verdict(clear) and "lower" in quickstart.verdict(clear)
    worse = LossDifference("log-linear", "linear", 0, 64, 0.1, 0.01, 40, 2560)
    assert "higher" in quickstart.verdict(worse)
    noise = LossDifference("log-linear", "linear", 0, 64, -0.01, 0.01, 40, 2560)
    assert "no difference" in quickstart.verdict(noise) and "lower" not in quickstart.verdict(noise)


def test_the_time_of_a_step_is_measured(tmp_path):
    config = quickstart.choose(
        "cpu", "tiny-gated-deltanet", output=str(tmp_path / "out"), sequence_length=32, rows=1, max_documents=20,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    training = quickstart._train_config(config, "log-linear", 1)
    assert 0 < quickstart.seconds_per_step(training) < 60
    began = time.perf_counter()
    assert 0 < quickstart.seconds_per_step(training, seconds=1.0) < 60
    assert time.perf_counter() - began > 1
    assert not (tmp_path / "out").exists()


def test_a_processor_that_tires_is_taken_as_it_is_in_the_end(tmp_path, monkeypatch):
    """Ten steps of a second, then as many of two as there is time for."""
    config = quickstart.choose(
        "cpu", "tiny-gated-deltanet", output=str(tmp_path / "out"), sequence_length=32, rows=1, max_documents=20,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    lengths = itertools.chain([1.0] * 10, itertools.repeat(2.0))
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, length) for length in lengths))
    monkeypatch.setattr(quickstart, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    training = quickstart._train_config(config, "log-linear", 1)
    assert quickstart.seconds_per_step(training, seconds=40.0) == 2.0


def test_the_commands_from_quickstart_to_inspect(tmp_path, capsys):
    """Each command once, on what the one before it left."""

    def command(*arguments):
        with pytest.raises(SystemExit) as exit_code:
            main([str(argument) for argument in arguments])
        assert not exit_code.value.code
        return capsys.readouterr().out

    with (tmp_path / "text.jsonl").open("w") as file:
        for number in range(8):
            file.write(json.dumps({"body": f"words of document {number}. " * 20}) + "\n")
    run = tmp_path / "run"
    shown = command(
        "quickstart", "--preset", "tiny-gated-deltanet", "--steps", 1, "--data", tmp_path / "text.jsonl",
        "--text-field", "body", "--output", run, "--sequence-length", 32, "--rows", 1, "--sample-tokens", 4,
        "--device", "cpu",
    )  # fmt: skip
    assert "report.md" in shown and (run / "report.md").is_file()
    evaluated = tmp_path / "evaluated"
    shown = command("eval", "position-loss", run / "linear", run / "log-linear", "--length", 64, "-o", evaluated)
    assert "log-linear" in shown and (evaluated / "position_loss.csv").is_file()
    inspected = tmp_path / "inspected"
    shown = command("inspect", run / "log-linear", "--text", "a text to look at", "--lengths", "1K,2K", "-o", inspected)
    assert "2K" in shown and (inspected / "level_scales.png").is_file()


def test_documents_that_are_too_short_are_told_of_before_training_and_in_the_report(tmp_path, monkeypatch):
    """With another mixer, so that its name is seen to be that of the preset."""
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text(f"words of document {number}. " * (1 + number % 2))
    config = quickstart.choose(
        "cpu", "tiny-mamba2", output=str(tmp_path / "out"), steps=1, sequence_length=64, rows=1, sample_tokens=4,
        data=(str(tmp_path / "text"),), cache=str(tmp_path / "cache"),
    )  # fmt: skip
    told = StringIO()
    console = Console(file=told, width=200)
    train, told_before = quickstart.train, []

    def training(*arguments, **options):
        told_before.append(told.getvalue())
        return train(*arguments, **options)

    monkeypatch.setattr(quickstart, "train", training)
    result = quickstart.run(config, console)
    sentence = "No held-out document has more than 64 tokens: all are compared as far as they go"
    assert not result.whole_documents and len(told_before) == 2 and all(sentence in text for text in told_before)
    text = result.files["report"].read_text()
    assert sentence in text
    assert "Training the linear twin (Mamba-2), 1 steps" in told.getvalue()
    assert "Two Mamba-2 models" in text and "DeltaNet" not in text


def test_every_mixer_with_levels_has_a_name():
    assert {*quickstart.MIXER_NAMES, "attention"} == set(MIXERS)


def test_options_of_data_need_data(tmp_path):
    with pytest.raises(ValueError, match="got text_field, hub_split without data"):
        quickstart.choose("cpu", output=str(tmp_path), text_field="body", hub_split="test")


def test_data_is_read_as_training_reads_it():
    options = {"text_field": "body", "hub_subset": "small", "hub_split": "test"}
    config = quickstart._train_config(quickstart.choose("cpu", data=("hub:some/data",), **options), "linear", 1)
    assert {name: getattr(config, name) for name in options} == options


def test_an_earlier_quickstart_is_not_overwritten(tmp_path):
    (tmp_path / "report.md").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty"):
        quickstart.run(quickstart.choose("cpu", output=str(tmp_path)))
    with pytest.raises(FileExistsError, match="wanted a folder that is there or can be made"):
        quickstart.run(quickstart.choose("cpu", output=str(tmp_path / "report.md")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "tiny-gdn"], "unknown preset 'tiny-gdn'"),
        (["--data", "stdlib", "--text-field", "body"], "got text_field='body', but no source has fields"),
        (["--steps", "3", "--seconds", "5"], "got steps=3 and training_seconds=5.0 (--seconds)"),
        (["--seconds", "nan"], "training_seconds must be a finite number"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_refused_leaves_no_folder(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        main(["quickstart", "--device", "cpu", "--output", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"training_seconds": 0.0}, "training_seconds must be a finite number, more than 0, got 0"),
        ({"training_seconds": float("nan")}, "training_seconds must be a finite number, more than 0, got nan"),
        ({"training_seconds": float("inf")}, "training_seconds must be a finite number, more than 0, got inf"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, more than 0, got inf"),
        ({"steps": 3, "training_seconds": 5.0}, r"got steps=3 and training_seconds=5.0 \(--seconds\), wanted one of"),
        (
            {"preset": "tiny-attention"},
            "got the preset 'tiny-attention', a softmax model, wanted one with a linear mixer",
        ),
        ({"linear_model": "small-transformer"}, "got the preset 'small-transformer', a softmax model"),
    ],
)
def test_wrong_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        quickstart.choose("cpu", **changes)


@pytest.mark.parametrize("steps", [2, 9, 10, 39, 83, 100, 281])
def test_the_last_loss_is_a_mean_like_the_others(steps):
    """A single step at the end of a curve of means looks like a jump."""
    whole = quickstart.whole_reports(steps)
    log_every = quickstart._train_config(quickstart.QuickstartConfig(), "linear", whole).log_every
    assert whole % log_every == 0 and 0 <= steps - whole < 10 and whole >= 2
