"""Training real models on real text: what is learned, written, stopped and resumed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loglinear.data import ByteTokenizer, PackedRows
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.train import NonFiniteError, TrainConfig, held_out_corpus, load_checkpoint, resolve_checkpoint, train
from loglinear.train.checkpoints import load_corpora, newest_checkpoint
from loglinear.train.reporting import Tokenizing, read_metrics
from loglinear.train.schedule import learning_rate_factor
from loglinear.train.trainer import PackedTrainer, build_model, length_line


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Tokenized text, shared by the runs of this module."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def settings(cache, tmp_path):
    """A run of a tiny model on a few files of the standard library, of a few seconds."""
    return TrainConfig(
        model="tiny-gated-deltanet",
        max_documents=30,
        held_out_fraction=0.2,
        sequence_length=64,
        rows=2,
        steps=6,
        learning_rate=3e-3,
        log_every=1,
        evaluate_every=3,
        evaluation_rows=3,
        save_every=0,
        tensorboard=False,
        progress=False,
        device="cpu",
        cache=cache,
        output=str(tmp_path / "run"),
    )


def weights(checkpoint):
    return load_file(Path(checkpoint) / "model.safetensors")


def assert_same_checkpoint(one, other):
    """Weights, moments, schedule, random state and position in the data are equal, bit for bit."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    mine, theirs = (torch.load(Path(path) / "optimizer.pt", weights_only=True) for path in (one, other))
    assert mine["param_groups"] == theirs["param_groups"]
    for index, moments in mine["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, theirs["state"][index][name]), (index, name)
    mine, theirs = (torch.load(Path(path) / "scheduler.pt", weights_only=True) for path in (one, other))
    assert mine == theirs
    mine, theirs = (torch.load(Path(path) / "rng_state.pth", weights_only=False) for path in (one, other))
    assert torch.equal(mine["cpu"], theirs["cpu"]) and mine["python"] == theirs["python"]
    assert (Path(one) / "data_position.json").read_text() == (Path(other) / "data_position.json").read_text()


def curve(output):
    """What the metrics say of every step, without times."""
    timed = ("seconds", "tokens_per_second")
    rows = read_metrics(Path(output) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# What a run learns and writes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """A run of 40 steps with everything that can be written."""
    config = TrainConfig(
        model="tiny-mamba2",
        max_documents=30,
        held_out_fraction=0.2,
        sequence_length=96,
        rows=2,
        accumulation=2,
        steps=40,
        learning_rate=5e-3,
        weight_decay=0.3,
        log_every=5,
        evaluate_every=20,
        evaluation_rows=0,
        save_every=10,
        keep_checkpoints=2,
        progress=False,
        device="cpu",
        cache=cache,
        output=str(tmp_path_factory.mktemp("finished") / "run"),
    )
    return config, train(config)


def test_loss_falls_on_real_text(finished):
    config, result = finished
    losses = [row["loss"] for row in read_metrics(result.output / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(math.log(259), abs=0.7), "an untrained model knows nothing"
    assert losses[-1] < 3.7 and result.loss == losses[-1]
    assert result.held_out_loss < 3.8
    assert result.finished and result.steps == 40 and result.tokens == 40 * 4 * 96


def test_metrics_hold_every_report(finished):
    config, result = finished
    rows = read_metrics(result.output / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in training] == list(range(5, 41, 5))
    assert [row["step"] for row in held_out] == [20, 40]
    assert held_out[-1]["held_out_loss"] == result.held_out_loss
    for row in training:
        assert row.keys() == {
            "step",
            "tokens",
            "loss",
            "gradient_norm",
            "learning_rate",
            "tokens_per_second",
            "seconds",
        }
        assert row["tokens"] == row["step"] * 4 * 96 and row["gradient_norm"] > 0 and row["tokens_per_second"] > 0
        factor = learning_rate_factor(
            row["step"] - 1, steps=40, schedule="cosine", warmup_fraction=0.05, final_fraction=0.1
        )
        assert row["learning_rate"] == pytest.approx(5e-3 * factor)
    seconds = [row["seconds"] for row in training]
    assert seconds == sorted(seconds)


def test_held_out_loss_is_the_mean_over_every_held_out_token(finished):
    config, result = finished
    model, tokenizer = load_checkpoint(result.output)
    _, held_out = load_corpora(config, tokenizer)
    # Rows cut elsewhere see other contexts: these are the run's own.
    rows = PackedRows(held_out, 96, seed=0, epochs=1)
    total, count = 0.0, 0
    with torch.no_grad():
        for number in range(rows.num_rows):
            row = rows[number]
            for begin, end in zip(row.starts, [*row.starts[1:], len(row.tokens)], strict=True):
                ids = torch.from_numpy(row.tokens[begin:end])[None]
                if ids.shape[1] > 1:
                    logits = model(ids).logits[0, :-1]
                    total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                    count += ids.shape[1] - 1
    row = [row for row in read_metrics(result.output / "metrics.jsonl") if "held_out_loss" in row][-1]
    assert row["held_out_tokens"] == count
    assert row["held_out_loss"] == pytest.approx(total / count, rel=1e-4)


def test_tensorboard_holds_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = finished
    events = EventAccumulator(str(result.output / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    rows = [row for row in read_metrics(result.output / "metrics.jsonl") if "loss" in row]
    assert logged == pytest.approx({row["step"]: row["loss"] for row in rows}, rel=1e-6)
    assert {"held_out_loss", "learning_rate", "gradient_norm", "tokens_per_second"} <= set(events.Tags()["scalars"])


def test_checkpoints_are_whole_and_the_newest_are_kept(finished):
    config, result = finished
    assert sorted(path.name for path in result.output.glob("checkpoint-*")) == ["checkpoint-30", "checkpoint-40"]
    assert result.checkpoint == result.output / "checkpoint-40" == resolve_checkpoint(result.output)
    assert resolve_checkpoint(result.checkpoint) == result.checkpoint
    model, tokenizer = load_checkpoint(result.output)
    assert isinstance(model, LogLinearForCausalLM) and not model.training and isinstance(tokenizer, ByteTokenizer)
    assert model.config.vocab_size == 259 and model.config.eos_token_id == 257 and model.config.use_cache
    for folder in (result.output, result.checkpoint):
        assert TrainConfig.from_file(folder / "train_config.yaml") == config


def test_held_out_documents_are_found_again_and_were_not_trained_on(finished):
    config, result = finished
    training, held_out = load_corpora(config, ByteTokenizer())
    again = held_out_corpus(result.checkpoint)
    assert again.identity == held_out.identity and len(again) > 1
    assert not {tokens.tobytes() for tokens in training}.intersection(tokens.tobytes() for tokens in again)


def test_weight_decay_is_used_as_the_model_says(finished):
    config, result = finished
    groups = torch.load(result.checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    model, _ = load_checkpoint(result.output)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    for name, value in decay.items():
        spared = any(part in name for part in ("norm", "A_log", "dt_bias", "level_scales", "bias"))
        assert value == (0.0 if spared or name.endswith(".D") else 0.3), name
    for part in ("A_log", "dt_bias", ".D", "level_scales", "norm"):
        assert any(part in name for name in names), f"the model has {part}"
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.9, 0.95), 1e-8)}


# ---------------------------------------------------------------------------------------------------------------------
# Stop and resume
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "accumulation", "length"),
    [("tiny-gated-deltanet", 1, 64), ("tiny-mamba2", 2, 50), ("tiny-attention", 1, 33)],
)
def test_stop_and_resume_equals_train(settings, tmp_path, model, accumulation, length):
    """Twice interrupted, on so little text that epochs end on the way: nothing differs from an unbroken run."""
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} and so on, " * (2 + number % 3))
    config = settings.replace(
        data=[str(tmp_path / "texts")], model=model, accumulation=accumulation, sequence_length=length, steps=7
    )
    whole = train(config.replace(output=str(tmp_path / "whole")))
    first = train(config.replace(stop_after=3))
    assert not first.finished and first.steps == 3 and first.checkpoint.name == "checkpoint-3"
    second = train(config.replace(stop_after=1, resume=True))
    assert not second.finished and second.steps == 4
    third = train(config.replace(resume=True))
    assert third.finished and third.steps == 7
    assert_same_checkpoint(whole.checkpoint, third.checkpoint)
    assert curve(whole.output) == curve(third.output)
    assert whole.tokens > 2 * load_corpora(config, ByteTokenizer())[0].num_tokens, "epochs ended on the way"


def test_resuming_from_an_older_checkpoint_writes_each_step_once(settings):
    config = settings.replace(save_every=2)
    first = train(config)
    before = curve(first.output)
    shutil.rmtree(first.output / "checkpoint-6")
    # A checkpoint that was cut off while it was written is not taken.
    (first.output / "checkpoint-5").mkdir()
    (first.output / "checkpoint-5" / "config.json").write_text("{}")
    assert newest_checkpoint(first.output).name == "checkpoint-4"
    second = train(config.replace(resume=True))
    assert second.checkpoint.name == "checkpoint-6"
    assert curve(second.output) == before


def test_resume_starts_where_there_is_nothing_and_ends_where_all_is_done(settings, capsys):
    first = train(settings.replace(resume=True))
    assert first.finished and first.steps == 6
    assert f"resume: no checkpoint in {settings.output}, so the run starts" in capsys.readouterr().err
    again = train(settings.replace(resume=True))
    assert capsys.readouterr().err == "already at step 6 of 6: nothing to do; --steps above 6 goes on\n"
    assert (again.checkpoint, again.steps, again.loss) == (first.checkpoint, 6, first.loss)
    assert again.held_out_loss == first.held_out_loss and again.seconds == 0
    shorter = train(settings.replace(resume=True, steps=4))
    assert shorter.steps == 6 and "already at step 6 of 4" in capsys.readouterr().err
    assert TrainConfig.from_file(first.output / "train_config.yaml").steps == 6, "what did nothing leaves no trace"
    longer = train(settings.replace(resume=True, steps=8))
    assert longer.steps == 8 and longer.checkpoint.name == "checkpoint-8"


@pytest.mark.parametrize("done", [3, 6], ids=["stopped", "finished"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_with_more_steps_takes_the_rates_of_the_longer_schedule(settings, monkeypatch, capsys, schedule, done):
    config = settings.replace(schedule=schedule, held_out_fraction=0)
    train(config.replace(stop_after=done))
    assert "schedule:" not in capsys.readouterr().err
    step, taken = torch.optim.AdamW.step, []

    def watched(self, *arguments, **options):
        taken.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    longer = train(config.replace(steps=12, resume=True))

    def rate(number, steps):
        shape = {"schedule": schedule, "warmup_fraction": 0.05, "final_fraction": 0.1}
        return 3e-3 * learning_rate_factor(number, steps=steps, **shape)

    wanted = [rate(number, 12) for number in range(done, 12)]
    assert [rates[0] for rates in taken] == pytest.approx(wanted)
    assert all(len(set(rates)) == 1 for rates in taken), "every group has the rate"
    assert [row["learning_rate"] for row in curve(longer.output)[done:]] == pytest.approx(wanted)
    said = capsys.readouterr().err
    assert f"schedule: {schedule} over 12 steps now (was 6)" in said
    assert f"from {rate(done - 1, 6):.3g} at step {done} to {rate(done, 12):.3g} at step {done + 1}." in said


def test_a_run_with_more_steps_at_a_constant_rate_is_the_longer_run(settings, tmp_path, capsys):
    config = settings.replace(schedule="constant", evaluate_every=0, held_out_fraction=0)
    whole = train(config.replace(steps=8, output=str(tmp_path / "whole")))
    train(config.replace(steps=5))
    longer = train(config.replace(steps=8, resume=True))
    assert capsys.readouterr().err == "", "nothing is otherwise, so nothing is said"
    assert_same_checkpoint(whole.checkpoint, longer.checkpoint)


def test_the_length_of_a_run_may_be_given_in_another_way(settings, capsys):
    """Epochs that come to the same number of steps are the same run."""
    config = settings.replace(held_out_fraction=0)
    tokens = load_corpora(config, ByteTokenizer())[0].num_tokens
    train(config.replace(stop_after=2))
    train(config.replace(epochs=6 * 128 / tokens, stop_after=1, resume=True))
    assert capsys.readouterr().err == ""
    train(config.replace(epochs=9 * 128 / tokens, stop_after=1, resume=True))
    assert "schedule: cosine over 9 steps now (was 6)" in capsys.readouterr().err


def test_what_goes_on_otherwise_is_said(settings, tmp_path, capsys):
    config = settings.replace(stop_after=2)
    train(config)
    position = tmp_path / "run" / "checkpoint-2" / "data_position.json"
    saved = json.loads(position.read_text())
    assert (saved["device"], saved["precision"]) == ("cpu", "fp32")
    position.write_text(json.dumps(saved | {"device": "cuda", "precision": "bf16"}))
    train(config.replace(resume=True, evaluation_rows=2, log_every=2, cache=config.cache))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("machine: cpu in fp32 now (was cuda in bf16): steps from 3 on are")
    assert second == "options: log_every: 2 (was 1), evaluation_rows: 2 (was 3)"


def test_a_model_file_that_changed_is_not_resumed(settings, tmp_path, capsys):
    file = tmp_path / "model.yaml"
    file.write_text("{mixer: linear_attention, hidden_size: 32, num_hidden_layers: 1, num_heads: 2}")
    config = settings.replace(model=str(file), held_out_fraction=0)
    train(config.replace(stop_after=2))
    file.write_text("{mixer: linear_attention, hidden_size: 32, num_hidden_layers: 2, num_heads: 2, norm_eps: 1e-3}")
    wanted = r"cannot resume .*checkpoint-2: its model is another \(num_hidden_layers: saved 1, now 2; norm_eps: saved"
    with pytest.raises(ValueError, match=wanted):
        train(config.replace(resume=True))
    # What counts is the model, not how it was named.
    same = {"num_hidden_layers": 1, "norm_eps": 1e-5}
    train(config.replace(resume=True, model_options=same, stop_after=1))
    assert capsys.readouterr().err == f"options: model_options: {same} (was {{}})\n"


def test_a_run_is_not_overwritten_and_not_resumed_as_another(settings, tmp_path, monkeypatch):
    train(settings)
    with pytest.raises(FileExistsError, match="holds a run up to step 6; resume it"):
        train(settings)
    again = settings.replace(resume=True, steps=8)
    with pytest.raises(ValueError, match=r"cannot resume.*learning_rate: saved 0\.003, now 0\.1"):
        train(again.replace(learning_rate=0.1))
    with pytest.raises(ValueError, match="cannot resume.*data: saved"):
        train(again.replace(data=[str(tmp_path)]))
    # The same sources, but what they hold has changed.
    position = tmp_path / "run" / "checkpoint-6" / "data_position.json"
    saved = json.loads(position.read_text())
    position.write_text(json.dumps(saved | {"corpus": "another"}))
    with pytest.raises(ValueError, match="does not fit the data of this run.*corpus: saved another"):
        train(again)
    position.write_text(json.dumps(saved | {"rows_per_step": 8}))
    with pytest.raises(ValueError, match="a step took 8 rows, and would take 2 now"):
        train(again)


@pytest.mark.parametrize("part", ["optimizer.pt", "scheduler.pt", "train_config.yaml", "data_position.json"])
def test_a_checkpoint_that_has_lost_a_part_is_not_resumed(finished, tmp_path, part):
    """The Trainer would go on from new moments without a word."""
    run = shutil.copytree(finished[1].output, tmp_path / "run")
    (run / "checkpoint-40" / part).unlink()
    config = TrainConfig.from_file(run / "train_config.yaml").replace(output=str(run), steps=42, resume=True)
    with pytest.raises((FileNotFoundError, ValueError), match=rf"cannot resume .*checkpoint-40: .*{part}"):
        train(config)


def test_interrupt_saves_and_resumes_exactly(settings, tmp_path, monkeypatch):
    config = settings.replace(evaluate_every=0)
    whole = train(config.replace(output=str(tmp_path / "whole")))
    forward, calls = LogLinearForCausalLM.forward, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *arguments, **options)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(LogLinearForCausalLM, "forward", interrupted)
        stopped = train(config)
    assert not stopped.finished and stopped.steps == 3
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = train(config.replace(resume=True))
    assert_same_checkpoint(whole.checkpoint, resumed.checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite
# ---------------------------------------------------------------------------------------------------------------------


def break_at(monkeypatch, call, how):
    """Break the model's `call`-th forward pass: its loss, or only the gradient of its head."""
    forward, calls = LogLinearForCausalLM.forward, []

    def broken(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        calls.append(1)
        if len(calls) == call and how == "loss":
            output.loss = output.loss * float("nan")
        if len(calls) == call and how == "gradient":
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    monkeypatch.setattr(LogLinearForCausalLM, "forward", broken)


@pytest.mark.parametrize(("ahead", "log_every"), [(False, 1), (True, 1), (True, 3)])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_non_finite_stops_with_the_last_good_step(settings, tmp_path, monkeypatch, how, ahead, log_every):
    """Also where the optimiser has to refuse the step by itself, for the host looks at it after the next one."""
    monkeypatch.setattr(PackedTrainer, "runs_ahead", ahead)
    config = settings.replace(evaluate_every=0, log_every=log_every)
    whole = train(config.replace(output=str(tmp_path / "whole"), save_every=1, keep_checkpoints=0))
    with monkeypatch.context() as patch:
        break_at(patch, 5, how)
        with pytest.raises(
            NonFiniteError, match=r"step 5 was not finite .*the last good step, 4, is saved in"
        ) as caught:
            train(config)
    assert caught.value.checkpoint == tmp_path / "run" / "checkpoint-4"
    good = weights(whole.output / "checkpoint-4")
    model, _ = load_checkpoint(caught.value.checkpoint)
    for name, value in model.state_dict().items():
        assert torch.equal(value, good[name]) and torch.isfinite(value).all(), name
    mine, theirs = (
        json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
        for folder in (tmp_path / "run", whole.output)
    )
    assert all(mine[name] == theirs[name] for name in ("global_step", "epoch"))
    resumed = train(config.replace(resume=True))
    assert_same_checkpoint(whole.checkpoint, resumed.checkpoint)


@pytest.mark.parametrize("ahead", [False, True])
def test_broken_weights_are_never_saved_as_good(settings, monkeypatch, ahead):
    monkeypatch.setattr(PackedTrainer, "runs_ahead", ahead)
    step = torch.optim.AdamW.step

    def overshoot(self, *arguments, **options):
        step(self, *arguments, **options)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overshoot)
        with pytest.raises(NonFiniteError, match="there is no checkpoint before it") as caught:
            train(settings.replace(evaluate_every=0))
    assert caught.value.checkpoint is None
    assert newest_checkpoint(settings.output) is None


# ---------------------------------------------------------------------------------------------------------------------
# Ways to run
# ---------------------------------------------------------------------------------------------------------------------


def test_accumulated_passes_equal_one_pass(settings, tmp_path):
    one = train(settings.replace(rows=4, output=str(tmp_path / "one")))
    four = train(settings.replace(rows=1, accumulation=4))
    for mine, theirs in zip(curve(one.output), curve(four.output), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_recomputing_activations_changes_nothing(settings, tmp_path):
    plain = train(settings.replace(steps=3, output=str(tmp_path / "plain")))
    recomputed = train(settings.replace(steps=3, recompute=True))
    for mine, theirs in zip(curve(plain.output), curve(recomputed.output), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for the CPU")
def test_compiled_is_the_same_run(settings, tmp_path):
    config = settings.replace(steps=2, held_out_fraction=0, model_options={"num_hidden_layers": 1})
    plain = train(config.replace(output=str(tmp_path / "plain")))
    compiled = train(config.replace(compile=True))
    for mine, theirs in zip(curve(plain.output), curve(compiled.output), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert weights(plain.checkpoint).keys() == weights(compiled.checkpoint).keys()


def test_tokenizing_says_how_far_it_is(settings, tmp_path, capsys):
    loud = Tokenizing(enabled=True, every_seconds=0)
    load_corpora(settings.replace(cache=str(tmp_path / "new")), ByteTokenizer(), loud)
    assert "tokenizing: 30 documents, " in capsys.readouterr().err


def test_bf16_and_workers_and_no_held_out(settings):
    result = train(
        settings.replace(precision="bf16", workers=1, held_out_fraction=0, steps=3, gradient_clip=0, schedule="linear")
    )
    assert result.held_out_loss is None and math.isfinite(result.loss)
    assert all(value.dtype == torch.float32 for value in weights(result.checkpoint).values())
    with pytest.raises(ValueError, match="held out no documents"):
        held_out_corpus(result.checkpoint)


def test_epochs_count_the_training_text(settings, tmp_path):
    (tmp_path / "t.txt").write_text("ab" * 500)
    config = settings.replace(data=[str(tmp_path / "t.txt")], held_out_fraction=0, epochs=1.5)
    result = train(config)
    assert result.steps == math.ceil(1.5 * 1002 / 128)


def test_hugging_face_tokenizer_and_model_file(settings, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["?", "<end>", "import", "def", "self", "return", "("])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="<end>").save_pretrained(
        tmp_path / "tok"
    )
    (tmp_path / "model.yaml").write_text(
        "mixer: linear_attention\nhidden_size: 32\nnum_hidden_layers: 1\nnum_heads: 2\n"
    )
    result = train(
        settings.replace(
            tokenizer=str(tmp_path / "tok"), model=str(tmp_path / "model.yaml"), model_options={"num_levels": 3}
        )
    )
    model, tokenizer = load_checkpoint(result.output)
    assert len(tokenizer) == model.config.vocab_size == 7
    assert model.config.mixer == "linear_attention" and model.config.num_levels == 3
    assert model.config.eos_token_id == 1 and model.config.bos_token_id is None


@pytest.mark.parametrize("preset", ["tiny-gated-deltanet", "tiny-attention"])
def test_a_saved_configuration_makes_the_same_model(settings, tmp_path, preset):
    saved = LogLinearForCausalLM(LogLinearConfig.preset(preset, norm_eps=1e-5))
    saved.save_pretrained(tmp_path)
    assert "1e-05" in (tmp_path / "config.json").read_text()
    model = build_model(settings.replace(model=str(tmp_path / "config.json")), ByteTokenizer())
    assert model.config.norm_eps == 1e-5
    written_by_saving = {"architectures": ["LogLinearForCausalLM"], "dtype": "float32"}
    assert model.config.to_dict() | written_by_saving == saved.config.to_dict() | written_by_saving


def test_a_model_file_keeps_its_own_special_tokens(settings, tmp_path):
    (tmp_path / "model.yaml").write_text(
        "{mixer: gla, hidden_size: 32, num_hidden_layers: 1, num_heads: 2, vocab_size: 512, use_cache: false, "
        "eos_token_id: [300, 301], pad_token_id: 302, bos_token_id: null}"
    )
    config = settings.replace(model=str(tmp_path / "model.yaml"), steps=2, held_out_fraction=0)
    train(config.replace(stop_after=1))
    checkpoint = train(config.replace(resume=True)).checkpoint
    assert checkpoint.name == "checkpoint-2"
    saved = json.loads((checkpoint / "config.json").read_text())
    # The one that the file leaves out is the tokenizer's.
    wanted = {"eos_token_id": [300, 301], "pad_token_id": 302, "bos_token_id": 256}
    assert {name: saved[name] for name in wanted} == wanted and saved["use_cache"] is False
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert {name: generation[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("model", "options", "length", "meant", "levels", "line"),
    [
        ("small-log-linear-mamba2", {}, 1024, 1024, 11, "model for 1,024 tokens: 11 levels"),
        ("tiny-gla", {}, 65, 65, 8, "model for 65 tokens: 8 levels"),
        ("small-mamba2", {}, 64, 64, 1, "model for 64 tokens"),
        ("tiny-attention", {}, 64, 64, None, "model for 64 tokens"),
        ("tiny-gla", {"max_position_embeddings": 256}, 64, 256, 9,
         "model for 256 tokens, trained on rows of 64: they reach 7 of its 9 levels, the others stay untrained"),
        ("tiny-gla", {"max_position_embeddings": 32}, 64, 32, 6,
         "model for 32 tokens, trained on rows of 64: the last of its 6 levels takes in what is older than the "
         "others reach"),
        ("tiny-gla", {"num_levels": 9}, 64, 64, 9,
         "model for 64 tokens: they reach 7 of its 9 levels, the others stay untrained"),
        ("tiny-gla", {"num_levels": 3}, 64, 64, 3,
         "model for 64 tokens: the last of its 3 levels takes in what is older than the others reach"),
    ],
    ids=lambda value: "" if str(value).startswith("model for") else str(value),
)  # fmt: skip
def test_the_model_is_as_long_as_the_rows(settings, model, options, length, meant, levels, line):
    if model.startswith("small"):
        options = {**options, "num_hidden_layers": 1, "hidden_size": 64}
    config = settings.replace(model=model, model_options=options, sequence_length=length)
    built = build_model(config, ByteTokenizer()).config
    assert (built.max_position_embeddings, built.num_levels) == (meant, levels)
    assert length_line(built, length) == line


def test_a_model_file_may_say_its_own_length(settings, tmp_path, capsys):
    file = tmp_path / "model.yaml"
    sizes = "mixer: linear_attention, hidden_size: 32, num_hidden_layers: 1, num_heads: 2"
    file.write_text(f"{{{sizes}}}")
    config = settings.replace(model=str(file), steps=1, held_out_fraction=0, progress=True)
    assert build_model(config, ByteTokenizer()).config.max_position_embeddings == 64
    file.write_text(f"{{{sizes}, max_position_embeddings: 16}}")
    model, _ = load_checkpoint(train(config).checkpoint)
    assert (model.config.max_position_embeddings, model.config.num_levels) == (16, 5)
    assert "model for 16 tokens, trained on rows of 64: the last of its 5 levels" in capsys.readouterr().err


def test_a_model_file_keeps_its_own_vocabulary(settings, tmp_path):
    LogLinearConfig.preset("tiny-gated-deltanet", vocab_size=512, pad_token_id=300).save_pretrained(tmp_path)
    file = settings.replace(model=str(tmp_path / "config.json"))
    config = build_model(file, ByteTokenizer()).config
    assert (config.vocab_size, config.pad_token_id) == (512, 300)
    assert build_model(file.replace(model_options={"vocab_size": 400}), ByteTokenizer()).config.vocab_size == 400
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    with pytest.raises(ValueError, match="vocab_size: got 100, wanted at least the tokenizer's 259"):
        build_model(file, ByteTokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tiny-gated-deltanett"}, "unknown preset.*did you mean 'tiny-gated-deltanet'"),
        ({"model": "absent.yaml"}, "no configuration file absent.yaml"),
        ({"model_options": {"num_level": 3}}, "unknown configuration key 'num_level'; did you mean 'num_levels'"),
        ({"model_options": {"vocab_size": 100}}, "vocab_size: got 100, wanted at least the tokenizer's 259"),
        ({"data": ["absent.txt"]}, "wanted an existing file"),
        ({"held_out_fraction": 0.2, "max_documents": 1}, "wanted at least 2 different documents"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(settings, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(settings.replace(**changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(settings):
    with pytest.raises(ValueError, match="device: got 'cuda', but PyTorch finds no GPU"):
        train(settings.replace(device="cuda"))


def test_weights_are_by_the_seed(settings):
    def first_weights(seed):
        from transformers import set_seed

        set_seed(seed)
        return build_model(settings, ByteTokenizer()).lm_head.weight

    assert torch.equal(first_weights(1), first_weights(1)) and not torch.equal(first_weights(1), first_weights(2))


def test_missing_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted the folder of a checkpoint"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no model in"):
        resolve_checkpoint(tmp_path)


def test_two_processes_equal_one(settings, tmp_path):
    """Under torchrun each process takes its share of the rows: the same losses and weights as one process."""
    # AdamW moves a weight by its rate however small the gradient is, and of one near zero rounding decides the sign
    settings = settings.replace(steps=3, epsilon=1e-4)
    one = train(settings.replace(output=str(tmp_path / "one")))
    two = settings.replace(rows=1, output=str(tmp_path / "two"))
    two.save(tmp_path / "two.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "loglinear", "train", "--config", str(tmp_path / "two.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(curve(one.output), curve(tmp_path / "two"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    mine, theirs = weights(one.checkpoint), weights(tmp_path / "two" / "checkpoint-3")
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_checkpoints_that_are_not_ours_or_not_whole_are_refused(finished, tmp_path):
    def changed(name, **fields):
        folder = shutil.copytree(finished[1].checkpoint, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    with pytest.raises(ValueError, match="got a model of type 'llama', wanted 'loglinear'"):
        load_checkpoint(changed("llama", model_type="llama", attention_bias=False))
    with pytest.raises(ValueError, match=r"not those of its config.json: missing model\.layers\.2\..*, …"):
        load_checkpoint(changed("deeper", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"not those of its config.json: unexpected model\.layers\.1\."):
        load_checkpoint(changed("shallower", num_hidden_layers=1))
    cut = changed("cut off")
    os.truncate(cut / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="cut off: got weights that are damaged, or not all of them"):
        load_checkpoint(cut)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny-gated-deltanet", "tiny-mamba2"])
def test_steps_do_not_wait_for_the_device(settings, monkeypatch, model):
    """The host prepares a step while the one before is computed: nothing in between may ask for a result."""
    step = PackedTrainer.training_step

    def watched(self, *arguments, **options):
        torch.cuda.set_sync_debug_mode("error" if 4 <= self.state.global_step < 10 else "default")
        return step(self, *arguments, **options)

    monkeypatch.setattr(PackedTrainer, "training_step", watched)
    try:
        result = train(settings.replace(model=model, device="cuda", steps=12, log_every=12, evaluate_every=0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.finished and math.isfinite(result.loss)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_non_finite_stops_on_a_gpu(settings, monkeypatch, how):
    with monkeypatch.context() as patch:
        break_at(patch, 5, how)
        with pytest.raises(NonFiniteError, match="step 5 was not finite .*the last good step, 4, is saved in"):
            train(settings.replace(device="cuda", evaluate_every=0, log_every=6))
    assert all(torch.isfinite(x).all() for x in weights(newest_checkpoint(settings.output)).values())
    assert train(settings.replace(device="cuda", evaluate_every=0, resume=True)).finished
