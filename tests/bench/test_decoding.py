"""Decoding is measured at the positions that it claims, with the bytes that it claims, and becomes rows and plots."""

from dataclasses import replace

import pytest
import torch

from bench.synthetic import make_row
from loglinear import fenwick
from loglinear.bench import decoding, read_rows
from loglinear.bench.command import only_decoding, parse_rows
from loglinear.bench.decoding import (
    PLAIN,
    STEPS,
    DecodeCase,
    Kept,
    StepCase,
    build_model,
    cache_bytes,
    filled_cache,
    mean_occupied,
    moved_bytes,
    occupied_bytes,
    refill,
    run_decode_case,
    run_step_case,
    start_of,
    zero_state,
)
from loglinear.bench.inputs import SHAPES
from loglinear.bench.report import to_markdown, write_report
from loglinear.bench.runner import Worker, cpu_suite, run_decoding
from loglinear.bench.worker import Result
from loglinear.cli import main
from loglinear.models import cache_nbytes

CPU = torch.device("cpu")
PRESETS = ["tiny-mamba2", "tiny-gated-deltanet", "tiny-attention"]


def decode_case(preset: str, **changes) -> DecodeCase:
    return replace(DecodeCase(preset, (40, 64), (1, 2), "cpu", "float32", 0.01), **changes)


@pytest.mark.parametrize("context", [1024, 65_536, 2**20])
def test_a_pass_has_the_average_number_of_occupied_buckets(context):
    levels = fenwick.full_num_levels(context)
    everywhere = fenwick.occupied(torch.arange(context), levels).sum(-1).double().mean().item()
    assert mean_occupied(start_of(context), levels) == pytest.approx(everywhere, abs=0.51)


@pytest.mark.parametrize("kept", [PLAIN, Kept("bfloat16", 8)], ids=["plain", "kept"])
@pytest.mark.parametrize("preset", PRESETS)
def test_caches_stand_at_their_context(preset, kept):
    if preset == "tiny-attention":
        kept = PLAIN
    model = build_model(preset, 64, torch.float32, CPU, kept)
    cache = filled_cache(model, 40, 3)
    assert cache_nbytes(cache) == cache_bytes(model, 40, 3)[0]
    for _ in range(2):
        assert int(cache.get_seq_length()) == start_of(40) == 24
        for layer in cache.layers:
            assert layer.state.positions.tolist() == [24] * 3
            assert all(torch.isfinite(tensor).all() for tensor in layer.state.tensors())
            if preset == "tiny-attention":
                assert layer.state.keys.any() and layer.state.values.any()
                assert layer.state.filled == 24 and layer.state.capacity == 24 + STEPS
            else:
                state = layer.state.fenwick
                assert layer.state.convolution.any()
                used = state.buckets.ne(0).flatten(2).any(-1)
                assert torch.equal(used, state.occupied())
        with torch.no_grad():
            model(torch.zeros(3, 1, dtype=torch.int64), past_key_values=cache)
        refill(cache, 40)
        cache.layers[0].cumulative_length.fill_(24)


def test_a_recurrent_state_is_as_large_at_every_context_and_a_cache_grows():
    recurrent, attention = (build_model(name, 4096, torch.float32, CPU) for name in ("tiny-mamba2", "tiny-attention"))
    sizes = [cache_bytes(recurrent, context, 2) for context in (256, 4096)]
    assert sizes[0] == sizes[1] and sizes[0][0] == sizes[0][1]
    (small, none), (large, _) = (cache_bytes(attention, context, 2) for context in (256, 4096))
    assert large > 10 * small and none == 0
    buckets = [occupied_bytes(recurrent, context, 2) for context in (256, 4096)]
    assert buckets[0] is not None and buckets[1] is not None and 0 < buckets[0] < buckets[1] < sizes[0][0]
    assert occupied_bytes(attention, 256, 2) is None


def test_models_are_made_in_the_dtype_they_are_loaded_in():
    model = build_model("tiny-mamba2", 64, torch.bfloat16, CPU)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert wide and all("time_step" in name or "level_scales.weight" in name for name in wide)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_is_decoded_at_every_context_and_batch(preset):
    results = list(run_decode_case(decode_case(preset)))
    assert [(r.length, r.batch, r.status) for r in results] == [
        (40, 1, "ok"),
        (40, 2, "ok"),
        (64, 1, "ok"),
        (64, 2, "ok"),
    ]
    for result in results:
        assert result.time_low_ms <= result.time_ms <= result.time_high_ms
        assert result.repeats >= 3 and result.peak_memory_bytes >= 0
        assert result.cache_bytes > 0
    assert results[0].error == 0.0  # without a GPU both are the plain step


def test_what_does_not_fit_is_not_tried(monkeypatch):
    model = build_model("tiny-attention", 64, torch.float32, CPU)
    room = cache_bytes(model, 40, 2)[0]
    monkeypatch.setattr(decoding, "available_memory", lambda device: room)
    tried = []
    monkeypatch.setattr(decoding, "_timed", lambda model, *place: tried.append(place[:2]) or Result("", "ok"))
    results = list(run_decode_case(decode_case("tiny-attention")))
    assert tried == [(40, 1), (40, 2), (64, 1)]
    assert results[3].status == "skipped: the cache needs 160 KiB, free are 112 KiB"


def test_running_out_of_memory_costs_one_row(monkeypatch):
    real = decoding._timed

    def timed(model, context, batch, *rest):
        if (context, batch) == (40, 2):
            raise torch.OutOfMemoryError
        return real(model, context, batch, *rest)

    monkeypatch.setattr(decoding, "_timed", timed)
    statuses = [result.status for result in run_decode_case(decode_case("tiny-mamba2"))]
    assert statuses == ["ok", "out of memory", "ok", "ok"]


def test_a_recorded_step_that_differs_is_not_timed(monkeypatch):
    plain = decoding._plain_step
    monkeypatch.setattr(decoding, "_stepper", lambda model, cache: lambda ids: plain(model, cache, ids) * 1.01)
    (result,) = run_decode_case(decode_case("tiny-mamba2"))
    assert result.status.startswith("wrong: error 0.01 > 2e-06") and result.length is None


@pytest.mark.parametrize("shape", ["mamba2-2-heads", "gated-deltanet-2-heads", "gla-2-heads", "kda-2-heads"])
def test_the_step_alone(shape):
    results = list(run_step_case(StepCase(shape, (64, 256), (1, 3), "cpu", "float32", 0.01)))
    assert [(r.length, r.batch, r.status) for r in results] == [
        (64, 1, "ok"),
        (64, 3, "ok"),
        (256, 1, "ok"),
        (256, 3, "ok"),
    ]
    for result in results:
        assert 0 < result.error < result.tolerance
        assert result.levels == 9 and result.bandwidth_share > 0
    assert results[1].moved_bytes == 3 * results[0].moved_bytes
    assert results[0].moved_bytes < results[2].moved_bytes


def test_moved_bytes_are_what_the_recurrence_touches():
    """Scalar decay writes the one bucket that takes in others, the delta rule every occupied one."""
    scalar, delta = SHAPES["mamba2"], SHAPES["gated-deltanet"]
    levels, start = 13, start_of(4096)
    occupied = [sum(fenwick.occupied(position, levels)) for position in range(start, start + STEPS + 1)]
    read, written = sum(occupied[:-1]) / STEPS, sum(occupied[1:]) / STEPS
    one = 48 * 128 * 64 * 4
    assert moved_bytes(scalar, start, 2, levels, torch.bfloat16) == pytest.approx(2 * (read + 1) * one, rel=0.01)
    one = 6 * 192 * 384 * 4
    assert moved_bytes(delta, start, 2, levels, torch.bfloat16) == pytest.approx(2 * (read + written) * one, rel=0.01)


def test_moved_bytes_of_a_window_are_what_the_recurrence_touches():
    """It reads the buckets of the window's start and writes them at its end: the changed ones, or the merged one."""
    scalar, delta, levels, start, window = SHAPES["mamba2"], SHAPES["gated-deltanet"], 13, start_of(4096), 16
    bases = [position - position % window for position in range(start, start + STEPS)]
    read = sum(sum(fenwick.occupied(base, levels)) for base in bases) / STEPS
    changed = sum(
        sum(fenwick.occupied(base, levels)[fenwick.carry_level(base + window, levels) + 1 :]) for base in bases
    ) / STEPS  # fmt: skip
    for kept, itemsize in ((Kept(None, window), 4), (Kept("bfloat16", window), 2)):
        bucket = 48 * 128 * 64 * itemsize
        assert moved_bytes(scalar, start, 2, levels, torch.bfloat16, kept) == pytest.approx(
            2 * (read + 1 / window) * bucket, rel=0.09 / itemsize * 4
        )
        bucket = 6 * 192 * 384 * itemsize
        assert moved_bytes(delta, start, 2, levels, torch.bfloat16, kept) == pytest.approx(
            2 * (read + (1 + changed) / window) * bucket, rel=0.02 / itemsize * 4
        )
    for name in ("gla", "kda"):  # all buckets decay, and the window has the log decays of every channel
        shape, kept = SHAPES[name], Kept(None, window)
        heads, size = shape.num_heads, shape.key_dim * shape.value_dim
        held = (window / 2 + 0.5) * (2 * shape.key_dim + shape.value_dim + shape.delta * window)
        controls, rows = levels + shape.key_dim + shape.delta, 2 * (shape.key_dim + shape.value_dim)
        states = (read + (1 + changed) / window) * size
        assert moved_bytes(shape, start, 2, levels, torch.bfloat16, kept) == pytest.approx(
            2 * heads * (4 * (states + held + controls) + 2 * rows), rel=1e-6
        )
    plain, half = (moved_bytes(delta, start, 2, levels, torch.bfloat16, kept) for kept in (PLAIN, Kept("bfloat16")))
    assert half == pytest.approx(plain / 2, rel=0.01)


def test_states_are_those_of_the_mixers():
    state = zero_state(SHAPES["gated-deltanet-128"], 3, 5, torch.bfloat16, torch.device("meta"))
    assert tuple(state.buckets.shape) == (3, 5, 32, 128, 128) and state.buckets.dtype == torch.float32
    state = zero_state(SHAPES["mamba2"], 3, 5, torch.bfloat16, torch.device("meta"), Kept(None, 16))
    assert state.buckets.dtype == torch.float32, "no model says otherwise"
    kept = Kept("bfloat16", 32)
    state = zero_state(SHAPES["gated-deltanet-128"], 3, 5, torch.bfloat16, torch.device("meta"), kept)
    assert state.buckets.dtype == torch.bfloat16 and state.window.length == 32
    assert kept.labelled("log-linear") == "log-linear, window 32, bfloat16 states"
    assert PLAIN.labelled("log-linear") == "log-linear"
    assert Kept(None, 0).labelled("log-linear") == "log-linear, no window"
    assert [PLAIN.on(torch.device(kind)) for kind in ("cpu", "cuda")] == [Kept(None, 0), Kept(None, 16)]


@pytest.mark.parametrize("preset", ["tiny-mamba2", "tiny-gated-deltanet"])
def test_models_keep_states_in_what_they_choose(preset):
    """Unless another dtype is asked for, and named: allocated is what is counted."""
    sizes = []
    for chosen in (None, "bfloat16", "float32"):
        kept = Kept(chosen, 16)
        model = build_model(preset, 64, torch.bfloat16, CPU, kept)
        cache, (allocated, _) = filled_cache(model, 40, 3), cache_bytes(model, 40, 3)
        assert cache_nbytes(cache) == allocated
        sizes.append((allocated, occupied_bytes(model, 40, 3)))
    assert sizes[0] == sizes[1] < sizes[2] and sizes[2][1] == 2 * sizes[1][1]
    labels = [Kept(chosen).labelled(preset) for chosen in (None, "bfloat16", "float32")]
    assert labels == [preset, f"{preset}, bfloat16 states", f"{preset}, float32 states"]


@pytest.mark.parametrize("kept", [Kept(None, 4), Kept("bfloat16"), Kept("bfloat16", 4)], ids=lambda k: k.labelled("x"))
def test_the_step_alone_with_other_states(kept):
    for shape in ("mamba2-2-heads", "gated-deltanet-2-heads"):
        case = StepCase(shape, (64,), (1,), "cpu", "float32", 0.01, **kept._asdict())
        (result,) = run_step_case(case)
        assert result.status == "ok" and 0 < result.error < result.tolerance
        assert result.tolerance == (2e-6 if kept.state_dtype is None else 2e-2)


def test_defaults_leave_models_without_states_out():
    suite = cpu_suite()
    chosen = {"models": [], "shapes": None, "contexts": (64,), "rows": (1,)}
    assert "tiny-attention" in only_decoding(suite, **chosen).decoded
    assert only_decoding(suite, **chosen, kept=Kept(None, 16)).decoded == ("tiny-mamba2", "tiny-gated-deltanet")


def test_a_wrong_step_is_not_timed(monkeypatch):
    monkeypatch.setattr(decoding, "step_error", lambda *_: 0.5)
    monkeypatch.setattr(decoding, "_timed_steps", lambda *_: pytest.fail("timed"))
    results = list(run_step_case(StepCase("mamba2-2-heads", (64,), (1,), "cpu", "float32", 0.01)))
    assert [result.status for result in results] == ["wrong: error 0.5 > 2e-06"]


def test_the_commands_measure_and_draw(tmp_path, capsys):
    """Both in worker processes, into one CSV."""
    common = ["--cpu", "--budget", "0.01", "--output", str(tmp_path)]
    usual = ["--lengths", "40,64", "--batch", "1,2"]
    kept = ["--lengths", "64", "--batch", "2", "--window", "4", "--state-dtype", "bfloat16"]
    for flags in (
        ["--decode", "--model", "tiny-mamba2", *usual],
        ["--step", "--shape", "mamba2-2-heads", *usual],
        ["--decode", "--model", "tiny-mamba2", *kept],
        ["--step", "--shape", "mamba2-2-heads", *kept],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *flags, *common])
        assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "decoding, batch 2" in shown and "step of the operator" in shown
    rows = read_rows(tmp_path / "cpu.csv")
    assert {row.suite for row in rows} == {"decode", "steps"} and len(rows) == 10
    suffix = ", window 4, bfloat16 states"
    assert {row.operator for row in rows} == {f"{name}{end}" for name in ("tiny-mamba2", "log-linear")
                                              for end in ("", suffix)}  # fmt: skip
    assert all(row.status == "ok" for row in rows)
    for row in rows:
        assert row.tokens_per_second == pytest.approx(row.batch / row.time_ms * 1000, rel=1e-3)
    report = (tmp_path / "cpu.md").read_text()
    assert f"| tiny-mamba2{suffix} |" in report and f"| mamba2-2-heads{suffix} |" in report
    assert "### Decoding" in report and "### The step of the operator" in report and "per sequence" not in report
    assert (tmp_path / "cpu-decode-speed.png").is_file() and (tmp_path / "cpu-decode-cache.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decode", "--step"], "got --decode and --step, wanted one of them"),
        (["--decode", "--shape", "mamba2"], "got --shape with --decode, wanted none of these"),
        (["--step", "--model", "tiny-mamba2"], "got --model with --step"),
        (["--decode", "--operator", "linear", "--forward-only"], "got --operator, --forward-only with --decode"),
        (["--decode", "--batch", "one"], "--batch: got 'one', wanted a number of sequences"),
        (["--decode", "--model", "tiny-mamba3"], "tiny-mamba2"),
        (["--step", "--shape", "mamba3"], "unknown shape mamba3"),
        (["--step", "--window", "12"], "decoding_window must be a power of two, got 12"),
        (["--step", "--state-dtype", "float16"], "state_dtype must be 'float32' or 'bfloat16', got 'float16'"),
        (["--decode", "--model", "tiny-attention", "--window", "16"], "decoding_window is of recurrent states"),
        (["--window", "16", "--state-dtype", "float32"], "got --window, --state-dtype, wanted --decode or --step with"),
        (["--drift", "--window", "16", "--step"], "got --step, --window with --drift, wanted none of these"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_refused(capsys, monkeypatch, flags, message):
    monkeypatch.setattr("loglinear.bench.command.run", lambda *arguments: pytest.fail("ran"))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--cpu", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_numbers_of_rows():
    assert parse_rows(["32,1", "8"]) == (1, 8, 32)
    with pytest.raises(ValueError, match="got '0'"):
        parse_rows(["0"])


def test_what_a_worker_does_not_answer_becomes_rows(monkeypatch):
    monkeypatch.setattr(
        Worker,
        "run",
        lambda self, request, cap_s: [
            Result("decoding step", "ok", 2.0, batch=1, length=64),
            Result("", f"given up after {cap_s:.0f} s"),
        ],
    )
    suite = only_decoding(cpu_suite(cap_s=7), models=["tiny-mamba2"], shapes=None, contexts=(64, 128), rows=(1, 2))
    rows = run_decoding(suite)
    assert [(row.length, row.batch, row.status) for row in rows] == [
        (64, 1, "ok"),
        (64, 2, "given up after 28 s"),
        (128, 1, "given up after 28 s"),
        (128, 2, "given up after 28 s"),
    ]
    assert rows[0].tokens_per_second == 500.0


def test_reports_say_what_was_not_measured(tmp_path):
    common = {"suite": "decode", "shape": "model", "direction": "decoding step", "mechanism": "model", "batch": 1}
    rows = [
        make_row(operator="a", length=1024, cache_bytes=2**20, occupied_bytes=2**19, tokens_per_second=800.0, **common),
        make_row(operator="a", length=4096, cache_bytes=2**20, occupied_bytes=2**19, tokens_per_second=800.0, **common),
        make_row(operator="b", length=1024, cache_bytes=2**21, tokens_per_second=700.0, **common),
        make_row(operator="b", length=4096, time_ms=None, tokens_per_second=None, status="skipped: too much", **common),
    ]
    report = to_markdown(rows)
    assert "| a | 800 (1.25 ms) | 800 (1.25 ms) |" in report
    assert "| a | 1 MiB (512 KiB) | 1 MiB (512 KiB) |" in report
    assert "| b | 2 MiB | skipped |" in report
    assert "Not measured: b: skipped: too much (4K)." in report
    assert len(write_report(rows, tmp_path, "cpu")) == 3


@pytest.mark.gpu
def test_decoding_and_steps_on_a_gpu():
    case = decode_case("tiny-gated-deltanet", device="cuda", dtype="bfloat16", contexts=(64, 1024))
    for preset in PRESETS:
        results = list(run_decode_case(replace(case, preset=preset)))
        assert [result.status for result in results] == ["ok"] * 4 and results[0].error == 0.0
    for shape in ("mamba2", "gated-deltanet"):
        for kept in (PLAIN, Kept(None, 16), Kept("bfloat16", 32)):
            step_case = StepCase(shape, (64, 4096), (1, 2), "cuda", "bfloat16", 0.01, **kept._asdict())
            assert [result.status for result in run_step_case(step_case)] == ["ok"] * 4
    for preset in PRESETS[:2]:
        results = list(run_decode_case(replace(case, preset=preset, state_dtype="float32", decoding_window=16)))
        assert [result.status for result in results] == ["ok"] * 4
