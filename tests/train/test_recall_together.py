"""Runs that are computed together do what each does alone, and leave each other alone."""

import functools

import pytest
import torch

from loglinear.models import LogLinearConfig
from loglinear.train import TrainConfig
from loglinear.train.recall import RecallRun, examination, mean_accuracy, new_model, recall_model, recall_task
from loglinear.train.recall_together import RunsTogether

MODELS = {
    "attention": {"mixer": "attention", "num_heads": 2},
    "mamba2": {"mixer": "mamba2", "num_levels": 1, "num_heads": 2, "state_size": 8},
    "log-linear-mamba2": {"mixer": "mamba2", "num_heads": 2, "state_size": 8},
    "gated-deltanet": {"mixer": "gated_deltanet", "num_levels": 1, "num_heads": 2},
    "log-linear-gated-deltanet": {"mixer": "gated_deltanet", "num_heads": 2},
    "kda": {"mixer": "kda", "num_heads": 2},
}  # fmt: skip


def config_of(model: dict, **options) -> TrainConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "tie_word_embeddings": True}
    values = {
        "task": "mqar", "task_options": {"pairs": [1, 3], "vocabulary": 16}, "sequence_length": 21, "rows": 6,
        "steps": 5, "model": "tiny-mamba2", "device": "cpu", "gradient_clip": 0.5, "warmup_fraction": 0.4,
        "model_options": {"num_heads": None, "head_dim": None, "state_size": None, **sizes, **model},
    }  # fmt: skip
    return TrainConfig(**{**values, **options})


def run_of(config: TrainConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> RecallRun:
    task = recall_task(config)
    model = new_model(recall_model(config, task), config.seed)
    return RecallRun(config, task, model, torch.device(device), dtype)


def runs_of(model: dict, device: str = "cpu", dtype: torch.dtype = torch.float32, **options) -> list[RecallRun]:
    settings = [(0, 1e-2), (0, 1e-3), (1, 1e-2)]
    return [
        run_of(config_of(model, seed=seed, learning_rate=rate, **options), device, dtype) for seed, rate in settings
    ]


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed shapes"])
@pytest.mark.parametrize("name", MODELS)
def test_together_is_as_alone(name, fixed):
    tied = {"tie_word_embeddings": name != "mamba2"}
    together, alone = (runs_of({**MODELS[name], **tied}) for _ in range(2))
    for run in together + alone:
        run.fixed_shapes = fixed
    joint = RunsTogether(together)
    for _ in range(5):
        joint.advance()
        for run in alone:
            run.advance()
    assert joint.step == 5 and joint.how == "eager"
    for one, other in zip(together, alone, strict=True):
        ours, theirs = one.progress(), other.progress()
        assert ours.steps == theirs.steps == 5 and ours.finite
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3)
        for (weight_name, weight), wanted in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(weight, wanted, rtol=2e-3, atol=2e-5, msg=weight_name)
    # each model is an ordinary one afterwards
    test = examination(together[0].task, "test", 20)
    for one, other in zip(together, alone, strict=True):
        assert mean_accuracy(one.model, test)[1] == pytest.approx(mean_accuracy(other.model, test)[1], rel=1e-4)


def test_the_gradients_are_those_of_each_model():
    """Before the optimiser, which hides their size."""
    model = {**MODELS["log-linear-gated-deltanet"]}
    together, alone = (runs_of(model, gradient_clip=0) for _ in range(2))
    RunsTogether(together).advance()
    for one, other in zip(together, alone, strict=True):
        other.advance()
        for (name, weight), wanted in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
            assert weight.grad is not None and wanted.grad is not None
            torch.testing.assert_close(weight.grad, wanted.grad, rtol=1e-4, atol=1e-8, msg=name)


def test_a_run_that_is_not_finite_leaves_the_others_alone():
    together, alone = (runs_of(MODELS["log-linear-mamba2"]) for _ in range(2))
    with torch.no_grad():
        together[1].model.model.norm.weight[3] = torch.nan
    joint = RunsTogether(together)
    before = [weight.detach().clone() for weight in together[1].weights]
    for _ in range(3):
        joint.advance()
        for run in alone:
            run.advance()
    assert [run.progress().steps for run in together] == [3, 0, 3]
    for weight, kept in zip(together[1].weights, before, strict=True):
        assert torch.equal(weight.nan_to_num(7.0), kept.nan_to_num(7.0))
    for place in (0, 2):
        for weight, wanted in zip(together[place].weights, alone[place].weights, strict=True):
            torch.testing.assert_close(weight, wanted, rtol=2e-3, atol=2e-5)


def test_bfloat16_together():
    together, alone = (runs_of(MODELS["log-linear-mamba2"], dtype=torch.bfloat16) for _ in range(2))
    joint = RunsTogether(together)
    joint.advance()
    for one, other in zip(together, alone, strict=True):
        other.advance()
        assert one.progress().loss == pytest.approx(other.progress().loss, rel=1e-3)
        for name, weight in one.model.named_parameters():
            assert weight.dtype == torch.float32 and torch.isfinite(weight).all(), name


def test_what_cannot_go_together_is_refused():
    runs = runs_of(MODELS["mamba2"])
    with pytest.raises(ValueError, match="got none"):
        RunsTogether([])
    with pytest.raises(ValueError, match="differ in more than seed and learning rate"):
        RunsTogether([runs[0], run_of(config_of(MODELS["mamba2"], rows=7))])
    with pytest.raises(ValueError, match="got models of different shapes"):
        other = recall_model(config_of(MODELS["mamba2"]), runs[0].task)
        model = new_model(LogLinearConfig(**{**other.to_diff_dict(), "intermediate_size": 8}), 0)
        RunsTogether([runs[0], RecallRun(runs[0].config, runs[0].task, model, torch.device("cpu"))])
    runs[0].advance()
    with pytest.raises(ValueError, match="got one at step 0 and one at 1"):
        RunsTogether(runs)


def test_a_compiled_pass_is_the_same(monkeypatch, caplog):
    sizes = {**MODELS["log-linear-mamba2"], "num_hidden_layers": 1}
    # what the compiler makes of the graph is the compiler's; without its backend for the CPU, which takes half a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    together, alone = runs_of(sizes, compile=True), runs_of(sizes)
    joint = RunsTogether(together)
    for _ in range(2):
        joint.advance()
        for run in alone:
            run.advance()
    assert joint.how == "compiled eager"
    for one, other in zip(together, alone, strict=True):
        ours, theirs = one.progress(), other.progress()
        assert (ours.steps, ours.finite) == (2, True) and ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        for name, weight in other.model.named_parameters():
            torch.testing.assert_close(dict(one.model.named_parameters())[name], weight, rtol=5e-3, atol=1e-4, msg=name)

    def broken(function, **_):
        def call(*arguments):
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    joint = RunsTogether(runs_of(sizes, compile=True))
    joint.advance()
    assert joint.how == "eager" and "cannot be compiled, so it is launched as it is: no compiler here" in caplog.text
    assert [run.progress().steps for run in joint.runs] == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "kda"])
def test_a_graph_of_runs_together(name, dtype, compiled):
    """Prints whether the step was compiled and captured."""
    together = runs_of(MODELS[name], "cuda", dtype, sequence_length=100, compile=compiled)
    alone = runs_of(MODELS[name], "cuda", dtype, sequence_length=100)
    joint = RunsTogether(together)
    for _ in range(5):
        joint.advance()
        for run in alone:
            run.advance()
    print(f"{name}, {dtype}: {joint.how}")
    for one, other in zip(together, alone, strict=True):
        ours, theirs = one.progress(), other.progress()
        assert ours.finite and ours.steps == 5
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3 if dtype == torch.float32 else 2e-2)
