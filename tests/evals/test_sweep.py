"""Sweeps: each run one row, none twice, the learning rate chosen on other sequences than those reported."""

import csv
import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loglinear.cli import main
from loglinear.evals import sweep, sweep_summary
from loglinear.evals.sweep import DIVERGED, FAILED, SweepConfig, SweepRow, read_rows, run_sweep
from loglinear.evals.sweep_summary import summarize
from loglinear.train.recall import RecallRun

ROOT = Path(__file__).parent.parent.parent


def small(**changes) -> dict:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 16, "num_heads": 1}
    return {
        "models": {
            "plain": {"mixer": "mamba2", "num_levels": 1, "times_width": {"state_size": 0.5}, **sizes},
            "levels": {"mixer": "mamba2", "times_width": {"state_size": 0.5}, **sizes},
            "softmax": {"mixer": "attention", **sizes},
        },
        "widths": [8],
        "pairs": [[1, 2]],
        "learning_rates": [0.01],
        "seeds": [0, 1],
        "train": {"sequence_length": 8, "steps": 2, "rows": 4, "task_options": {"vocabulary": 8}},
        "validation_sequences": 10,
        "test_sequences": 12,
        **changes,
    }


def test_every_run_is_a_row_and_none_runs_twice(tmp_path, monkeypatch):
    told = []
    rows = run_sweep(SweepConfig(**small()), tmp_path, "cpu", on_row=lambda row, done, of: told.append((done, of)))
    assert [(row.model, row.seed) for row in rows] == [
        (model, seed) for model in ("plain", "levels", "softmax") for seed in (0, 1)
    ]
    assert told == [(done, 6) for done in range(1, 7)] and read_rows(tmp_path / "sweep.csv") == rows
    plain, levels, softmax = rows[0], rows[2], rows[4]
    assert plain.state_bytes == plain.state_bytes_one_level == levels.state_bytes_one_level == 4 * 16 * 4
    assert levels.num_levels == 4 and levels.state_bytes == 4 * plain.state_bytes
    assert (softmax.state_bytes, softmax.kv_cache_bytes) == (0, 2 * 8 * 8 * 4)
    assert all(row.steps == 2 and row.status == "finished" and row.step_runs == "eager" for row in rows)
    by_pairs = plain.accuracies("test")
    assert list(by_pairs) == [1, 2] and plain.test_accuracy == pytest.approx(sum(by_pairs.values()) / 2, abs=1e-6)
    assert by_pairs[1] * 12 == pytest.approx(round(by_pairs[1] * 12), abs=1e-4)
    shares, scales = levels.levels("shares"), levels.levels("scales")
    assert list(shares) == [0, 1, 2, 3] and sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert list(scales) == [0, 1, 2, 3] and all(0.5 < scale < 1 for scale in scales.values()), "ln 2 before training"
    assert plain.levels("shares") == softmax.levels("shares") == {}

    monkeypatch.setattr(sweep, "train_together", lambda *_: pytest.fail("ran again"))
    assert run_sweep(SweepConfig(**small()), tmp_path, "cpu") == rows
    assert len(run_sweep(SweepConfig(**small(seeds=[1])), tmp_path, "cpu")) == 3


def test_other_settings_are_other_runs(tmp_path):
    one = small(models={"softmax": small()["models"]["softmax"]}, seeds=[0])
    run_sweep(SweepConfig(**one), tmp_path, "cpu")
    longer = {**one, "train": {**one["train"], "steps": 3}}
    (row,) = run_sweep(SweepConfig(**longer), tmp_path, "cpu")
    assert row.steps == 3 and len(read_rows(tmp_path / "sweep.csv")) == 2
    assert [row.steps for row in run_sweep(SweepConfig(**one), tmp_path, "cpu")] == [2]


def test_processes_side_by_side_give_the_same_rows(tmp_path):
    config = SweepConfig(**small(models={"levels": small()["models"]["levels"]}))
    alone = run_sweep(config, tmp_path / "one", "cpu", workers=1)
    together = run_sweep(config, tmp_path / "two", "cpu", workers=2)
    for one, other in zip(alone, together, strict=True):
        assert one.key == other.key and one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.test_by_pairs == other.test_by_pairs


@pytest.mark.parametrize("workers", [1, 2])
def test_no_run_begins_after_the_time_is_over(tmp_path, monkeypatch, workers):
    """The clock jumps with every look at it: the runs that had begun by then are there, and the others can follow."""
    looks = iter(range(0, 10_000, 100))
    clock = SimpleNamespace(monotonic=lambda: next(looks), perf_counter=time.perf_counter)
    monkeypatch.setattr(sweep, "time", clock)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    config = SweepConfig(**small(models={"softmax": small()["models"]["softmax"]}, seeds=[0, 1, 2, 3, 4]))
    rows = run_sweep(config, tmp_path, "cpu", workers, seconds=150)
    assert len(rows) == workers
    assert len(run_sweep(config, tmp_path, "cpu")) == 5 == len(read_rows(tmp_path / "sweep.csv"))
    with pytest.raises(ValueError, match="seconds: got 0"):
        run_sweep(config, tmp_path, "cpu", seconds=0)


def told(row: SweepRow) -> dict:
    """A row without what depends on the clock."""
    return {**dataclasses.asdict(row), "seconds": 0, "steps_per_second": 0, "date": ""}


@pytest.mark.parametrize("together", [1, 2])
def test_what_is_stopped_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, together):
    """A second passes with every look at the clock; one of the runs diverges before the time is over."""
    values = small(models={"levels": small()["models"]["levels"]}, learning_rates=[0.01, 1e30], seeds=[0])
    values["train"] = {**values["train"], "log_every": 4, "steps": 38, "gradient_clip": 0}
    config = SweepConfig(**{**values, "together": together})
    whole = run_sweep(config, tmp_path / "whole", "cpu")

    kept, calls = tmp_path / "parts" / sweep.UNFINISHED_FOLDER, 0
    while len(rows := run_in(4, config, tmp_path / "parts", monkeypatch)) < 2:
        calls += 1
        assert [path.suffix for path in kept.iterdir()] == [".pt"]
    assert calls >= 2 and not kept.exists()
    assert [told(row) for row in rows] == [told(row) for row in whole]
    assert [row.status for row in rows] == ["finished", DIVERGED] and rows[0].steps == 38


def run_in(seconds: int, config: SweepConfig, output: Path, monkeypatch) -> list[SweepRow]:
    with monkeypatch.context() as patch:
        looks = iter(range(10_000))
        patch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: next(looks), perf_counter=time.perf_counter))
        return run_sweep(config, output, "cpu", seconds=seconds)


def test_a_state_belongs_to_its_runs_and_a_failure_ends_it(tmp_path, monkeypatch):
    values = small(models={"softmax": small()["models"]["softmax"]}, together=2)
    values["train"] = {**values["train"], "log_every": 1, "steps": 9}
    config, other = SweepConfig(**values), SweepConfig(**{**values, "validation_sequences": 11})
    assert run_in(5, config, tmp_path, monkeypatch) == []
    files = [sweep.state_file(tmp_path, one.runs()) for one in (config, other)]
    assert [path.exists() for path in files] == [True, False]
    run_sweep(other, tmp_path, "cpu")
    assert files[0].exists()
    files[0].write_bytes(b"no state")
    assert {row.status for row in run_sweep(config, tmp_path, "cpu")} == {FAILED}
    assert not files[0].exists()
    assert {row.status for row in run_sweep(config, tmp_path, "cpu")} == {"finished"}


def test_runs_are_spread_over_the_devices(tmp_path, monkeypatch):
    """Three devices, and threads in place of processes: each device has two runs, and what is left comes where one
    ends."""
    config, places, held = SweepConfig(**small(seeds=[0, 1, 2], workers=2)), [], threading.Event()
    monkeypatch.setattr(sweep, "choose_device", lambda *_: (torch.device("cuda"), torch.float32))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", places.append)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))

    def train(group, *_):
        number = config.runs().index(group[0])
        if number not in (1, 6):  # the second run ends first, and then the one that comes in its place
            assert held.wait(timeout=60)
        if number == 6:
            held.set()
        return []

    monkeypatch.setattr(sweep, "train_together", train)
    assert run_sweep(config, tmp_path, "auto") == []
    assert places[:7] == [0, 1, 2, 0, 1, 2, 1] and len(places) == 9


def test_runs_that_are_computed_together_give_the_same_rows(tmp_path):
    values = small(learning_rates=[0.01, 0.02], together=3)
    together = run_sweep(SweepConfig(**values), tmp_path / "together", "cpu")
    alone = run_sweep(SweepConfig(**values), tmp_path / "alone", "cpu", together=1)
    assert [row.together for row in together] == [3, 3, 3, 1] * 3 and {row.together for row in alone} == {1}
    for one, other in zip(together, alone, strict=True):
        assert one.key == other.key and one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.test_by_pairs == other.test_by_pairs
    # groups are of what is missing
    path = tmp_path / "together" / "sweep.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for number, line in enumerate(lines) if number not in (2, 4)))
    again = run_sweep(SweepConfig(**values), tmp_path / "together", "cpu")
    assert [row.key for row in again] == [row.key for row in together]
    assert [row.together for row in again[:4]] == [3, 2, 3, 2]


def test_one_of_several_runs_that_diverges_is_a_row_beside_the_others(tmp_path):
    values = small(models={"softmax": small()["models"]["softmax"]}, learning_rates=[1e30, 0.01], seeds=[0], together=2)
    values["train"] = {**values["train"], "log_every": 1, "steps": 3, "gradient_clip": 0}
    bad, good = run_sweep(SweepConfig(**values), tmp_path, "cpu")
    assert (bad.status, good.status, good.steps) == (DIVERGED, "finished", 3) and bad.steps < 3
    (alone,) = run_sweep(SweepConfig(**{**values, "learning_rates": [0.01]}), tmp_path / "alone", "cpu")
    assert good.loss == pytest.approx(alone.loss, rel=1e-5)


def test_diverged_and_failed_runs_are_rows_too(tmp_path, monkeypatch):
    values = small(models={"softmax": small()["models"]["softmax"]}, learning_rates=[0.01, 1e30], seeds=[0])
    values["train"] = {**values["train"], "log_every": 1, "steps": 3, "gradient_clip": 0}
    good, bad = run_sweep(SweepConfig(**values), tmp_path, "cpu")
    assert good.status == "finished" and bad.status == DIVERGED and bad.test_accuracy is None
    assert "was not finite" in bad.message and bad.steps < 3
    assert bad.accuracies("test") == {1: 0.0, 2: 0.0}

    advance = RecallRun.advance
    monkeypatch.setattr(RecallRun, "advance", lambda self: 1 / 0)
    (row,) = run_sweep(SweepConfig(**{**values, "learning_rates": [0.02]}), tmp_path, "cpu")
    assert row.status == FAILED and row.message == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(RecallRun, "advance", advance)
    (row,) = run_sweep(SweepConfig(**{**values, "learning_rates": [0.02]}), tmp_path, "cpu")
    assert row.status == "finished"
    assert [row.status for row in read_rows(tmp_path / "sweep.csv")] == ["finished", DIVERGED, FAILED, "finished"]


def test_a_line_that_was_cut_off_is_run_again(tmp_path):
    values = small(models={"softmax": small()["models"]["softmax"]})
    rows = run_sweep(SweepConfig(**values), tmp_path, "cpu")
    path = tmp_path / "sweep.csv"
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_rows(path)) == 1
    assert [row.key for row in run_sweep(SweepConfig(**values), tmp_path, "cpu")] == [row.key for row in rows]
    assert len(read_rows(path)) == 2
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="got the columns a, b, wanted model"):
        run_sweep(SweepConfig(**values), tmp_path, "cpu")


def row(rate: float, seed: int, validation: float, test: float, **changes) -> SweepRow:
    whole = SweepRow("m", 16, "4 8", rate, seed, "{}", "{}", 10, 10, state_bytes=64, num_levels=2)
    cells = {"validation_by_pairs": f"4:{validation} 8:{validation}", "test_by_pairs": f"4:{test} 8:{test / 2}"}
    return dataclasses.replace(whole, **{**cells, **changes})


def test_the_rate_is_chosen_by_the_validation_mean_over_seeds():
    rows = [
        row(1e-4, 0, 0.50, 0.99), row(1e-4, 1, 0.50, 0.99),  # best on the test sequences: must not matter
        row(1e-3, 0, 0.60, 0.60), row(1e-3, 1, 0.56, 0.40),  # best mean
        row(1e-2, 0, 0.90, 0.90), row(1e-2, 1, 0.10, 0.10),  # best single seed
    ]  # fmt: skip
    four, eight, mean = summarize(rows)
    assert (four.learning_rate, four.at_edge, four.seeds) == (1e-3, False, 2)
    assert four.validation_accuracy == pytest.approx(0.58)
    assert (four.pairs, eight.pairs, mean.pairs) == (4, 8, None)
    assert four.accuracy == 0.5 and four.standard_deviation == pytest.approx(0.1 * 2**0.5)
    assert eight.accuracy == 0.25 and mean.accuracy == pytest.approx(0.375)
    header, lines = sweep_summary.summary_table([four, eight, mean])
    assert header[-3:] == ["4 pairs", "8 pairs", "mean"]
    assert lines[0][-3:] == ["50.0 ± 14.1", "25.0 ± 7.1", "37.5 ± 10.6"]


def test_runs_that_are_not_there_or_not_finite():
    kept = [row(1e-3, 0, 0.5, 0.5), row(1e-3, 1, 0.5, 0.5)]
    broken = [row(1e-2, 0, 0.9, 0.9), row(1e-2, 1, 0, 0, status=DIVERGED, validation_by_pairs="", test_by_pairs="")]
    assert summarize(kept + broken)[0].learning_rate == 1e-3
    failed = [row(1e-2, 0, 0.9, 0.9), row(1e-2, 1, 0.9, 0.9, status=FAILED)]
    assert summarize(kept + failed)[0].learning_rate == 1e-3
    only = summarize(broken)[0]
    assert (only.accuracy, only.diverged, only.at_edge) == (0.45, 1, False)
    assert summarize([row(1e-3, 0, 0.5, 0.5), row(1e-2, 1, 0.5, 0.5)]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, "widths: got .., wanted a list of whole numbers"),
        ({"seeds": [1, 1]}, "wanted each number once"),
        ({"models": {}}, "models: got none"),
        ({"workers": 0}, "workers: got 0"),
        ({"pairs": [[1, 3]]}, "pairs: got 3 in 8 tokens, wanted at most 2"),
        ({"models": {"m": {"mixer": "mamba3"}}}, "models.m at width 8: .*did you mean 'mamba2'"),
        ({"models": {"m": {"mixer": "mamba2", "times_width": {"state_size": 0.3}}}}, "state_size is 0.3 x 8 = 2.4"),
        ({"train": {"steps": 2, "learning_rate": 1.0}}, "train: got learning_rate, which is not for all runs"),
        ({"train": {"steps": 2, "row": 1}}, "unknown training option 'row'; did you mean 'rows'"),
        ({"train": {"rows": 2}}, "wanted steps, got none"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_is_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**small(**changes))


def test_files_are_checked_by_name(tmp_path):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({**small(), "width": [8]}))
    with pytest.raises(ValueError, match="unknown key 'width'"):
        SweepConfig.from_file(path)
    path.write_text(json.dumps({"models": {}}))
    with pytest.raises(ValueError, match="got no widths, pairs, learning_rates, seeds, train, wanted them"):
        SweepConfig.from_file(path)


@pytest.mark.parametrize("name", ["mqar.yaml", "mqar-edge.yaml", "mqar-long.yaml", "mqar-small.yaml", "mqar-tiny.yaml"])
def test_committed_files_can_be_read_and_their_twins_differ_in_levels_alone(name):
    config = SweepConfig.from_file(ROOT / "experiments" / name)
    runs = config.runs()
    text = (ROOT / "experiments" / name).read_text()
    assert f"{len(runs)} trainings" in text and len({run.key for run in runs}) == len(runs)
    widest = {run.model.name: run.model_config() for run in runs if run.width == max(config.widths)}
    for mixer in ("mamba2", "gated-deltanet"):
        plain, levels = widest[mixer], widest[f"log-linear-{mixer}"]
        differing = {key for key in plain.field_names() if getattr(plain, key) != getattr(levels, key)}
        assert differing == {"num_levels"} and plain.num_levels == 1
        assert 2 ** (levels.num_levels - 1) == runs[0].task.length


def test_the_command_runs_resumes_and_leaves_tables_and_plot(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(small(learning_rates=[0.01, 0.02])))
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["sweep", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"])
        assert not ended.value.code
        shown = capsys.readouterr().out
        assert "Queries answered right" in shown and "softmax" in shown
    assert "12/12" not in shown
    with (tmp_path / "out" / "sweep_summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["pairs"]) for row in rows] == [
        (model, pairs) for model in ("plain", "levels", "softmax") for pairs in ("1", "2", "")
    ]
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
