"""Training on recall: it learns, goes on exactly where it stopped, and takes no step that is not finite."""

import json

import pytest
import torch
import torch.nn.functional as F

from loglinear.data.recall import NO_ANSWER, RecallTask, recall_batch
from loglinear.models import LogLinearForCausalLM
from loglinear.train import TrainConfig, train
from loglinear.train.recall import (
    RecallRun,
    answer,
    answer_logits,
    answer_loss,
    examination,
    mean_accuracy,
    new_model,
    recall_model,
    recall_task,
)
from loglinear.train.trainer import NonFiniteError


def config_of(output="unused", **options) -> TrainConfig:
    values = {
        "output": str(output), "task": "mqar", "task_options": {"pairs": [1, 2], "vocabulary": 16},
        "sequence_length": 12, "rows": 8, "steps": 6, "model": "tiny-gated-deltanet", "device": "cpu",
        "model_options": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32},
        "tensorboard": False, "progress": False, "evaluation_rows": 16, "log_every": 2,
    }  # fmt: skip
    return TrainConfig(**{**values, **options})


def run_of(config: TrainConfig) -> RecallRun:
    task = recall_task(config)
    return RecallRun(config, task, new_model(recall_model(config, task), config.seed), torch.device("cpu"))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_the_loss_is_that_of_the_answers():
    run = run_of(config_of())
    batch = recall_batch(run.task, 8, seed=0)
    logits, answers = answer_logits(run.model, batch)
    everywhere = run.model(input_ids=batch.inputs).logits
    wanted = [
        (everywhere[row, batch.queries[row, pair]], batch.answers[row, pair])
        for row in range(8)
        for pair in range(int(batch.pairs[row]))
    ]
    torch.testing.assert_close(logits, torch.stack([one for one, _ in wanted]))
    assert answers.tolist() == [int(one) for _, one in wanted]


def test_a_step_is_adamw_on_the_clipped_gradient():
    config = config_of(gradient_clip=0.1, warmup_fraction=0.5)
    run = run_of(config)
    plain = LogLinearForCausalLM(run.model.config)
    plain.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameter_groups(config.weight_decay), betas=(0.9, 0.95))
    for step in range(3):
        logits, answers = answer_logits(plain, run._rows_of(step))
        optimizer.zero_grad()
        F.cross_entropy(logits, answers).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (step + 1) / 3
        optimizer.step()
        run.advance()
    for (name, weight), other in zip(run.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(dtype):
    hidden, weight = torch.randn(9, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    answers = torch.tensor([3, NO_ANSWER, 0, 6, NO_ANSWER, 6, 2, 2, NO_ANSWER])
    found = []
    for loss_of in (
        lambda hidden, weight: answer_loss(hidden, weight, answers, dtype),
        lambda hidden, weight: F.cross_entropy(hidden @ weight.T, answers, ignore_index=NO_ANSWER),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        loss = loss_of(*leaves)
        found.append([loss, *torch.autograd.grad(3 * loss, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_places_of_fixed_number_have_the_same_answers():
    """What a graph is captured with: as many places in every step, those that are left without an answer."""
    config = config_of(rows=5, steps=300)
    loose, fixed = run_of(config), run_of(config)
    fixed.fixed_shapes = True
    counts = set()
    for step in (0, 1, 203, 299):
        one, other = loose.questions_of(step), fixed.questions_of(step)
        assert len(other.answers) == fixed.most_answers <= 10
        counts.add(len(one.answers))
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.places, other.places[: len(one.places)])
        assert torch.equal(one.answers, other.answers[: len(one.answers)])
        assert (other.answers[len(one.answers) :] == NO_ANSWER).all()
        batch = loose._rows_of(step)
        keys = batch.inputs.gather(1, batch.queries)[batch.answers != NO_ANSWER]
        assert torch.equal(batch.inputs.flatten()[one.places], keys)
    assert len(counts) > 1
    assert fixed.most_answers == max(int(loose._rows_of(step).pairs.sum()) for step in range(300))
    for run in (loose, fixed):
        for _ in range(3):
            run.advance()
    assert loose.progress().loss == pytest.approx(fixed.progress().loss, rel=1e-6)
    for one, other in zip(loose.weights, fixed.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_learns():
    options = {"mixer": "attention", "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 1}
    config = config_of(
        steps=150, rows=64, learning_rate=1e-2, model_options=options, model="tiny-attention",
        task_options={"pairs": 1, "vocabulary": 4}, sequence_length=4,
    )  # fmt: skip
    run = run_of(config)
    before, _ = mean_accuracy(run.model, examination(run.task, "validation", 200))
    for _ in range(150):
        run.advance()
    after, loss = mean_accuracy(run.model, examination(run.task, "validation", 200))
    assert before[1] < 0.8 and after[1] > 0.95 and loss < 0.2 and run.progress().finite


def test_all_models_of_a_seed_see_the_same_sequences():
    one, other = run_of(config_of()), run_of(config_of(model="tiny-mamba2", learning_rate=1.0))
    another = run_of(config_of(seed=1))
    for step in (0, 5, 200):
        assert torch.equal(one._rows_of(step).inputs, other._rows_of(step).inputs)
        assert not torch.equal(one._rows_of(step).inputs, another._rows_of(step).inputs)


def test_pairs_that_begin_later_come_later_and_are_examined_all_the_same():
    options = {"pairs": "1,4", "vocabulary": 16, "begins": "0,0.5"}
    run = run_of(config_of(steps=96, rows=64, sequence_length=16, task_options=options))
    run.fixed_shapes = True  # as many places for answers in each step
    assert [set(run._rows_of(step).pairs.tolist()) for step in (0, 47, 48, 95)] == [{1}, {1}, {1, 4}, {1, 4}]
    answers = [run.questions_of(step).answers for step in (0, 95)]
    assert answers[0].shape == answers[1].shape and int((answers[0] != NO_ANSWER).sum()) == 64
    assert list(examination(run.task, "test", 3)) == [1, 4]


def test_examinations_are_the_same_for_all_and_share_nothing():
    task = RecallTask(length=64, pairs=(2, 8), vocabulary=64)
    validation, test = (examination(task, stream, 50) for stream in ("validation", "test"))
    assert list(test) == [2, 8] and (test[8].answers != NO_ANSWER).all()
    rows = {tuple(row) for row in validation[8].inputs.tolist()}
    assert not rows.intersection(map(tuple, test[8].inputs.tolist()))


def test_answers_are_counted_one_by_one(monkeypatch):
    run = run_of(config_of())
    batch = examination(run.task, "test", 30)[2]
    right, losses = answer(run.model, batch)
    logits = run.model(input_ids=batch.inputs).logits
    for row in range(30):
        for pair in range(2):
            at = logits[row, batch.queries[row, pair]]
            assert right[row, pair] == (at.argmax() == batch.answers[row, pair])
            torch.testing.assert_close(losses[row, pair], F.cross_entropy(at, batch.answers[row, pair]))
    monkeypatch.setattr("loglinear.train.recall._ANSWERS_AT_ONCE", 14)
    assert torch.equal(answer(run.model, batch)[0], right) and run.model.training


def test_a_run_leaves_metrics_and_a_checkpoint(tmp_path):
    result = train(config_of(tmp_path / "run", evaluate_every=4, keep_checkpoints=1, save_every=3))
    assert result.finished and result.steps == 6 and result.checkpoint == tmp_path / "run" / "checkpoint-6"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 6]
    held_out = [row for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in held_out] == [4, 6] and result.held_out_loss == held_out[-1]["held_out_loss"]
    accuracies = [held_out[-1][f"held_out_accuracy_{pairs}_pairs"] for pairs in (1, 2)]
    assert held_out[-1]["held_out_accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-6"]
    assert LogLinearForCausalLM.from_pretrained(result.checkpoint).config.vocab_size == 16
    with pytest.raises(FileExistsError, match="holds a run up to step 6"):
        train(config_of(tmp_path / "run"))


@pytest.mark.parametrize("rows", [8, 600])
def test_a_run_that_stopped_goes_on_exactly(tmp_path, rows):
    whole = train(config_of(tmp_path / "whole", rows=rows))
    part = config_of(tmp_path / "parts", rows=rows, stop_after=2)
    assert not train(part).finished
    assert train(part.replace(resume=True)).steps == 4
    ended = train(part.replace(resume=True, stop_after=None))
    one, other = (weights_of(LogLinearForCausalLM.from_pretrained(r.checkpoint)) for r in (whole, ended))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert train(part.replace(resume=True)).seconds == 0
    with pytest.raises(ValueError, match="cannot resume: .*task_options"):
        train(part.replace(resume=True, task_options={"pairs": 1, "vocabulary": 16}))


def test_a_step_that_is_not_finite_is_not_taken(tmp_path, monkeypatch):
    config = config_of(tmp_path / "run", log_every=5)
    good = run_of(config)
    for _ in range(3):
        good.advance()
    questions_of = RecallRun.questions_of

    def poisoned(self, step):
        if step == 3:
            with torch.no_grad():
                self.gradients[0].fill_(0)
            self.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
        return questions_of(self, step)

    monkeypatch.setattr(RecallRun, "questions_of", poisoned)
    with pytest.raises(NonFiniteError, match="step 4 was not finite.*the last good step, 3, is saved"):
        train(config)
    saved = weights_of(LogLinearForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3"))
    for name, weight in weights_of(good.model).items():
        assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "wanted steps, got none"),
        ({"data": ["text.txt"]}, "got data, which task 'mqar' has no use for"),
        ({"held_out_fraction": 0.1, "accumulation": 2}, "got held_out_fraction, accumulation, which"),
        ({"evaluation_rows": 0}, "evaluation_rows: got 0"),
        ({"task": "text"}, "got task_options .* with task 'text'"),
        ({"task": "copy"}, "task: got 'copy', wanted one of 'text', 'mqar'"),
    ],
)
def test_options_of_the_other_task_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config_of(**options)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="got 4 in 12 tokens, wanted at most 3"):
        train(config_of(tmp_path / "run", task_options={"pairs": 4}))
    with pytest.raises(ValueError, match="vocab_size: got 15, wanted at least the task's 16"):
        train(config_of(tmp_path / "run", model_options={"vocab_size": 15}))
    assert not (tmp_path / "run").exists()


def test_the_model_can_be_prepared(tmp_path):
    def zero(model):
        with torch.no_grad():
            model.lm_head.weight.zero_()

    result = train(config_of(tmp_path / "run", steps=1, learning_rate=1e-9), prepare=zero)
    assert LogLinearForCausalLM.from_pretrained(result.checkpoint).lm_head.weight.abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("model", ["tiny-attention", "tiny-mamba2", "tiny-gated-deltanet"])
@pytest.mark.parametrize("levels", [1, None])
def test_steps_of_a_graph_are_those_launched_one_by_one(model, levels, compiled, monkeypatch):
    """The same weights after some steps, whether the step was captured or not; prints which it was."""
    if model == "tiny-attention" and levels == 1:
        pytest.skip("attention has no levels")
    sizes = {} if levels is None else {"num_levels": levels}
    config = config_of(
        model=model, model_options=sizes, sequence_length=64, rows=16, steps=8, compile=compiled,
        task_options={"pairs": [2, 8], "vocabulary": 64},
    )  # fmt: skip
    task = recall_task(config)
    found = []
    for capture in (True, False):
        if not capture:
            monkeypatch.setattr(RecallRun, "_capture", lambda self: None)
        run = RecallRun(config, task, new_model(recall_model(config, task), 0), torch.device("cuda"))
        for _ in range(8):
            run.advance()
        progress = run.progress()
        assert progress.finite and progress.steps == 8
        found.append((run.how, progress.loss, weights_of(run.model)))
    (how, loss, graph), (eager, other_loss, plain) = found
    print(f"{model}, levels {levels}, compiled {compiled}: {how}")
    assert eager == "eager" and loss == pytest.approx(other_loss, rel=1e-4)
    for name, weight in graph.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.gpu
def test_sequences_and_examinations_on_a_gpu():
    task = RecallTask(length=64, pairs=(2, 16), vocabulary=64)
    batch = recall_batch(task, 100, 0, "cuda").to("cpu")
    for row in range(100):
        pairs = int(batch.pairs[row])
        assert torch.equal(batch.inputs[row, batch.queries[row, :pairs]], batch.inputs[row, : 2 * pairs : 2])
    run = run_of(config_of())
    examined = examination(run.task, "test", 20)
    on_cpu = mean_accuracy(run.model, examined)
    torch.nn.Module.to(run.model, "cuda")
    accuracies, loss = mean_accuracy(run.model, examined)
    assert loss == pytest.approx(on_cpu[1], rel=1e-3) and accuracies.keys() == on_cpu[0].keys()
