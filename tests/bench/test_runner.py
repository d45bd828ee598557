"""Cases run, are checked before they are timed, and become rows whatever happens to them."""

import logging
from dataclasses import replace

import pytest
import torch

from loglinear.bench import worker as worker_module
from loglinear.bench.command import only_models, parse_lengths
from loglinear.bench.inputs import make_inputs
from loglinear.bench.measure import PeakMemory, summarize, time_call
from loglinear.bench.models import ModelCase, run_model_case
from loglinear.bench.operators import OPERATORS, NotSupported
from loglinear.bench.rows import read_rows
from loglinear.bench.runner import Worker, cpu_suite, gpu_suite, operator_cases, run_models, run_operators
from loglinear.bench.worker import BOTH, FORWARD, Case, Result, check_operator, guarded, run_case
from loglinear.cli import main
from loglinear.models import LogLinearForCausalLM


def tiny(**changes):
    values = {
        "shapes": ("mamba2-2-heads",),
        "operators": ("log-linear-torch", "softmax-flash"),
        "lengths": (64,),
        "budget_s": 0.01,
    }
    return cpu_suite(**{**values, **changes})


def case_of(operator: str, **changes) -> Case:
    case = Case(operator, "gated-deltanet-2-heads", 1, 96, "float32", (FORWARD, BOTH), "cpu", 0.01)
    return replace(case, **changes)


def test_a_suite_checks_before_it_times_and_goes_from_short_to_long():
    cases = operator_cases(tiny(lengths=(128, 64), batches=("one", "tokens"), tokens_per_call=128))
    assert [(c.operator, c.check, c.batch, c.length) for c in cases[:4]] == [
        ("log-linear-torch", True, 1, 0),
        ("log-linear-torch", False, 1, 64),
        ("log-linear-torch", False, 1, 128),
        ("log-linear-torch", False, 2, 64),
    ]
    assert cases[4].check and cases[4].operator == "softmax-flash"


def test_families_that_an_operator_does_not_know_are_left_out():
    names = {case.operator for case in operator_cases(tiny(operators=("fla-gated-deltanet", "linear-torch")))}
    assert names == {"linear-torch"}


@pytest.mark.parametrize("name", ["log-linear-torch", "linear-torch", "softmax-flash", "softmax-math"])
def test_a_case_yields_times_and_memory_for_each_direction(name):
    results = list(run_case(case_of(name)))
    assert [(result.direction, result.status) for result in results] == [(FORWARD, "ok"), (BOTH, "ok")]
    for result in results:
        assert result.time_ms and result.time_ms > 0 and result.repeats and result.repeats >= 3
        assert result.time_low_ms <= result.time_ms <= result.time_high_ms
        assert result.peak_memory_bytes is not None and result.peak_memory_bytes >= 0


def test_a_check_passes_for_a_right_operator_and_fails_for_a_wrong_one(monkeypatch):
    shape = worker_module.SHAPES["mamba2-2-heads"]
    right = check_operator(OPERATORS["softmax-flash"], shape, "float32", "cpu")
    assert right.status == "ok" and right.error is not None and right.error < 1e-4
    wrong = replace(
        OPERATORS["softmax-flash"],
        prepare=lambda inputs: lambda: OPERATORS["softmax-flash"].prepare(inputs)() * 1.01,
    )
    status = check_operator(wrong, shape, "float32", "cpu").status
    assert status.startswith("wrong: error 0.01 > 0.0001 in the output")


def test_a_wrong_row_at_the_timed_length_is_not_timed(monkeypatch):
    def late_mistake(inputs):
        right = OPERATORS["softmax-math"].prepare(inputs)

        def call():
            output = right()
            return torch.cat([output[:, :, :-1], output[:, :, -1:] + 1], dim=2)

        return call

    monkeypatch.setitem(
        worker_module.OPERATORS, "softmax-flash", replace(OPERATORS["softmax-flash"], prepare=late_mistake)
    )
    results = list(run_case(case_of("softmax-flash")))
    assert len(results) == 1 and results[0].direction == "" and results[0].time_ms is None
    assert results[0].status.startswith("wrong: error") and results[0].status.endswith("at this length")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotSupported("head width 7"), "not supported: head width 7"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "out of memory"),
        (RuntimeError("no kernel\n  for this"), "not supported: no kernel for this"),
    ],
)
def test_failures_become_results_after_what_was_measured(error, status):
    def results():
        yield Result(FORWARD, "ok", 1.0)
        raise error

    assert [result.status for result in guarded(results())] == ["ok", status]


def test_a_broken_device_ends_the_process():
    def results():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(guarded(results()))


def test_the_command_runs_cases_in_worker_processes_and_keeps_rows(tmp_path, capsys):
    """One real run, through the command line, processes and files: softmax runs, a GPU operator says that it
    cannot.
    """
    arguments = [
        "bench",
        "--cpu",
        "--lengths",
        "64,96",
        "--shape",
        "mamba2-2-heads",
        "--budget",
        "0.01",
        "--name",
        "small",
    ]
    with pytest.raises(SystemExit) as exit_code:
        main([*arguments, "-o", "softmax-flash", "-o", "sliding-window", "--output", str(tmp_path)])
    assert not exit_code.value.code
    rows = read_rows(tmp_path / "small.csv")
    assert sorted((row.length, row.operator, row.direction, row.status) for row in rows) == sorted(
        (length, operator, direction, status)
        for length in (64, 96)
        for operator, status in (("softmax-flash", "ok"), ("sliding-window", "not supported: runs on cuda only"))
        for direction in (FORWARD, BOTH)
    )
    assert rows[0].error is not None and rows[0].tolerance is not None and rows[0].error < rows[0].tolerance
    assert (rows[0].heads, rows[0].value_dim, rows[0].levels, rows[0].dtype) == (2, 64, None, "float32")
    assert {path.name for path in tmp_path.iterdir()} == {
        "small.csv",
        "small.md",
        "small-mamba2-2-heads-forward-one.png",
        "small-mamba2-2-heads-backward-one.png",
    }
    assert "softmax-flash" in capsys.readouterr().out


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--cpu", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--operator", "linear-torch"],
        ["--shape", "mamba2"],
        ["--batch", "one"],
        ["--dtype", "float16"],
        ["--forward-only"],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_of_operators_are_refused_for_models(capsys, monkeypatch, flags):
    monkeypatch.setattr("loglinear.bench.command.run", lambda *arguments: pytest.fail("ran"))
    said = refusal(capsys, "--model", "tiny-mamba2", *flags)
    assert f"got {flags[0]} with --model, wanted none of these" in said


def test_flags_that_models_know_are_taken(monkeypatch):
    suites = []
    monkeypatch.setattr("loglinear.bench.command.run", lambda suite, *names: suites.append(suite))
    with pytest.raises(SystemExit):
        main(["bench", "--cpu", "--model", "tiny-mamba2", "--tokens", "128", "--lengths", "64", "--budget", "2"])
    (suite,) = suites
    assert (suite.presets, suite.model_lengths, suite.lengths) == (("tiny-mamba2",), (64,), ())
    assert (suite.tokens_per_call, suite.budget_s) == (128, 2.0)


def test_a_number_of_tokens_is_refused_where_a_call_is_one_sequence(capsys, monkeypatch):
    suites = []
    monkeypatch.setattr("loglinear.bench.command.run", lambda suite, *names: suites.append(suite))
    assert "got --tokens, wanted --batch tokens with it" in refusal(capsys, "--tokens", "128")
    assert suites == []
    with pytest.raises(SystemExit):
        main(["bench", "--cpu", "--tokens", "128", "--batch", "tokens"])
    assert suites[0].tokens_per_call == 128


@pytest.mark.parametrize("flag", ["--budget", "--cap"])
def test_seconds_that_are_no_number_are_refused_before_anything_runs(capsys, monkeypatch, flag):
    monkeypatch.setattr("loglinear.bench.command.run", lambda *arguments: pytest.fail("ran"))
    assert "must be a finite number of seconds, more than 0, got nan" in refusal(capsys, flag, "nan")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("loglinear.bench.command.run_operators", lambda *arguments: pytest.fail("ran"))
    (tmp_path / "file").write_text("precious")
    assert f"output: got {tmp_path / 'file'}" in refusal(capsys, "--output", str(tmp_path / "file"))


def test_the_command_lists_what_can_be_measured(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--list"])
    shown = capsys.readouterr().out
    assert "log-linear" in shown and "sliding-window" in shown


def test_training_steps_of_a_preset_are_measured():
    results = list(run_model_case(ModelCase("tiny-gated-deltanet", 64, 128, "cpu", 0.01)))
    assert [(result.direction, result.status, result.batch) for result in results] == [("training step", "ok", 2)]
    assert results[0].time_ms and results[0].repeats


def test_activations_are_recomputed_where_one_sequence_does_not_fit(monkeypatch):
    forward = LogLinearForCausalLM.forward

    def full(self, *args, **kwargs):
        if not self.model.gradient_checkpointing:
            raise torch.OutOfMemoryError
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LogLinearForCausalLM, "forward", full)
    (result,) = run_model_case(ModelCase("tiny-gated-deltanet", 64, 128, "cpu", 0.01))
    assert (result.direction, result.status, result.batch) == ("training step, activations recomputed", "ok", 1)


def test_blocks_are_compiled_if_asked(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    (result,) = run_model_case(ModelCase("tiny-gated-deltanet", 64, 64, "cpu", 0.01, compile=True))
    assert result.direction == "training step, compiled"
    assert set(compiled) == {"LogLinearBlock"}


def test_compiling_is_refused_without_models():
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--cpu", "--compile"])
    assert stop.value.code == 2


def test_a_preset_becomes_a_row_with_its_speed(monkeypatch):
    monkeypatch.setattr(Worker, "run", lambda self, request, cap_s: [Result("training step", "ok", 500.0, batch=1)])
    suite = only_models(tiny(), ["tiny-mamba2"], [64])
    (row,) = run_models(suite)
    assert (row.suite, row.operator, row.batch, row.length, row.tokens_per_second) == (
        "models",
        "tiny-mamba2",
        1,
        64,
        128.0,
    )


def test_a_case_that_takes_too_long_is_given_up_and_longer_ones_are_skipped(monkeypatch):
    asked = []

    def answer(self, request, cap_s):
        asked.append(request["length"])
        if request["check"]:
            return [Result("", "ok", error=0.0)]
        if request["length"] >= 128:
            return [Result(FORWARD, "ok", 1.0, 1.0, 1.0, 3, 10), Result("", f"given up after {cap_s:.0f} s")]
        return [Result(FORWARD, "ok", 1.0, 1.0, 1.0, 3, 10), Result(BOTH, "ok", 1.0, 1.0, 1.0, 3, 10)]

    monkeypatch.setattr(Worker, "run", answer)
    rows = run_operators(tiny(operators=("softmax-flash",), lengths=(64, 128, 256), directions=(BOTH,), cap_s=7))
    assert asked == [0, 64, 128]
    assert [row.status for row in rows] == [
        "ok",
        "given up after 7 s",
        "skipped: given up after 7 s at 128 tokens already",
    ]


def test_a_wrong_gradient_leaves_the_forward_to_be_timed(monkeypatch):
    def answer(self, request, cap_s):
        if request["check"]:
            return [Result(BOTH, "wrong: error 0.5 > 0.01 in the gradient of q", error=0.5)]
        return [Result(FORWARD, "ok", 1.0, 1.0, 1.0, 3, 10), Result(BOTH, "ok", 1.0, 1.0, 1.0, 3, 10)]

    monkeypatch.setattr(Worker, "run", answer)
    forward, both = run_operators(tiny(operators=("softmax-flash",)))
    assert (forward.status, forward.time_ms) == ("ok", 1.0)
    assert (both.status, both.time_ms) == ("wrong: error 0.5 > 0.01 in the gradient of q", None)


def test_attention_of_the_same_heads_is_measured_once(monkeypatch):
    asked = []

    def answer(self, request, cap_s):
        asked.append((request["shape"], request["length"]))
        return [Result("" if request["check"] else FORWARD, "ok", 1.0)]

    monkeypatch.setattr(Worker, "run", answer)
    suite = tiny(
        shapes=("mamba2-2-heads", "gated-deltanet-2-heads"), operators=("softmax-flash",), directions=(FORWARD,)
    )
    assert [(row.shape, row.status) for row in run_operators(suite)] == [
        ("mamba2-2-heads", "ok"),
        ("gated-deltanet-2-heads", "ok"),
    ]
    assert asked == [("mamba2-2-heads", 0), ("mamba2-2-heads", 64)]


def test_the_worker_is_stopped_at_its_cap():
    worker = Worker()
    try:
        results = worker.run({"kind": "operators", **vars(case_of("softmax-flash"))}, cap_s=0.05)
        assert [result.status for result in results] == ["given up after 0 s"]
    finally:
        worker.stop()


def test_a_worker_that_ends_says_why():
    worker = Worker()
    try:
        results = worker.run({"kind": "operators", "device": "cpu", "directions": [], "nonsense": 1}, cap_s=120)
        assert len(results) == 1 and results[0].status.startswith("crashed: the process ended with code 1 (TypeError")
    finally:
        worker.stop()


def test_peak_memory_is_what_the_block_takes_beyond_what_was_there():
    before = torch.ones(8 * 2**20)
    with PeakMemory(torch.device("cpu")) as peak:
        taken = torch.ones(16 * 2**20)
        del taken
    assert 60 * 2**20 < peak.bytes < 90 * 2**20
    del before


def test_times_are_medians_with_quartiles():
    assert vars(summarize([5.0, 1.0, 3.0, 2.0, 4.0])) == {"median_ms": 3.0, "low_ms": 2.0, "high_ms": 4.0, "repeats": 5}
    assert vars(summarize([2.0, 1.0])) == {"median_ms": 1.5, "low_ms": 1.0, "high_ms": 2.0, "repeats": 2}


def test_a_slow_call_is_not_repeated():
    timing = time_call(lambda: pytest.fail("called again"), torch.device("cpu"), 1.0, first_s=13.0)
    assert (timing.median_ms, timing.repeats) == (13000.0, 1)


def test_lengths_are_read_as_people_write_them():
    assert parse_lengths(["64K,1K", "1m", "300"]) == (300, 1024, 65536, 1048576)
    with pytest.raises(ValueError, match="got '4X'"):
        parse_lengths(["4X"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operators": ("softmax",)}, "unknown operator softmax"),
        ({"shapes": ("round",)}, "unknown shape round; known are mamba2"),
        ({"batches": ("two",)}, "batches must be among one, tokens, got two"),
        ({"dtype": "float8"}, "dtype must be among float32"),
        ({"lengths": (0,)}, "lengths must be at least 1"),
        ({"budget_s": float("inf")}, "budget_s must be a finite number of seconds, more than 0, got inf"),
        ({"budget_s": -1.0}, "budget_s must be a finite number of seconds, more than 0, got -1"),
        ({"cap_s": float("inf")}, "cap_s must be a finite number of seconds, more than 0, got inf"),
        ({"cap_s": float("nan")}, "cap_s must be a finite number of seconds, more than 0, got nan"),
    ],
)
def test_wrong_suites_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cpu_suite(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_suite_needs_a_gpu():
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        gpu_suite()


@pytest.mark.parametrize("operator", ["log-linear-triton", "linear-triton"])
@pytest.mark.parametrize("check", [True, False], ids=["check", "timing"])
def test_the_torch_backend_is_not_timed_as_kernels(monkeypatch, operator, check):
    """An explicit backend="triton" falls back without an error; the row must say so, check and timing alike.

    With its interpreter said to be on, the operator chooses among kernels and torch as on a GPU.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr("loglinear.ops.interface.scalar.INTERPRETED", True)
    monkeypatch.setattr("loglinear.ops.interface.delta.unsupported", lambda *_: "what this test asks for")
    monkeypatch.setattr(
        "loglinear.ops.interface.chunked.log_linear_attention_chunked", lambda *_, **__: pytest.fail("torch ran")
    )
    logger = logging.getLogger("loglinear.ops.interface")
    before = logger.level, list(logger.handlers)
    case = case_of(operator, shape="gated-deltanet-128", dtype="bfloat16", length=16, check=check)
    (result,) = guarded(run_case(case))
    assert result.status == "not supported: no Triton kernel for what this test asks for" and result.time_ms is None
    assert (logger.level, list(logger.handlers)) == before


def test_kernels_are_timed_where_they_cover_the_call(monkeypatch):
    levels = []

    def covered(q, k, v, *_, **__):
        logger = logging.getLogger("loglinear.ops.interface")
        logger.debug("something else")
        levels.append(logger.getEffectiveLevel())
        return v, None

    monkeypatch.setattr("loglinear.bench.operators.log_linear_attention", covered)
    shape = worker_module.SHAPES["mamba2-2-heads"]
    inputs = make_inputs(shape, "log-linear", 1, 16, torch.bfloat16, "cpu")
    call = OPERATORS["log-linear-triton"].prepare(inputs)
    assert call() is inputs.v and call() is inputs.v
    assert levels[0] == logging.DEBUG < levels[1], "only the first call, which is not timed, listens"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["log-linear", "linear", "softmax-flash", "softmax-cudnn", "sliding-window", "block-sparse"]
)
def test_gpu_operators_run_and_are_right(name):
    shape = "mamba2-8-heads"
    case = case_of(name, shape=shape, length=2048, dtype="bfloat16", device="cuda")
    check = check_operator(OPERATORS[name], worker_module.SHAPES[shape], "bfloat16", "cuda")
    assert check.status == "ok"
    assert [result.status for result in run_case(case)] == ["ok", "ok"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["gated-deltanet", "gated-deltanet-128"])
@pytest.mark.parametrize("name", ["log-linear", "linear"])
def test_gpu_operators_of_the_delta_rule_are_right(name, shape):
    """Gates in float32 beside keys and values in bfloat16, as models have them."""
    check = check_operator(OPERATORS[name], worker_module.SHAPES[shape], "bfloat16", "cuda")
    assert check.status == "ok"


def test_a_preset_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="unknown preset.*did you mean 'small-mamba2'"):
        cpu_suite(presets=("small-mamba",))
