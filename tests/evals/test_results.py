"""The page of results says what the rows say: means, spreads, and whether twins differ by more than seeds do."""

import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest

from loglinear import plots
from loglinear.cli import main
from loglinear.evals import comparison, results, rowfile, sweep
from loglinear.evals.comparison import ComparisonConfig, ComparisonRow
from loglinear.evals.results import FIGURES, Difference, comparison_table, twins, verdict, write_page
from loglinear.evals.sweep import SweepConfig, SweepRow

ROOT = Path(__file__).parent.parent.parent


def test_a_difference_is_judged_seed_by_seed():
    """Seeds that are far apart do not hide what twins have in common, and their spread is not taken for nothing."""
    linear = {0: 10.0, 1: 50.0, 2: 90.0}
    small = Difference.of({0: 11.0, 1: 51.1, 2: 90.9}, linear)
    assert small.seeds == 3 and small.mean == pytest.approx(1.0) and small.deviation == pytest.approx(0.1)
    assert small.clear and small.interval == pytest.approx((1 - 4.30 * 0.1 / 3**0.5, 1 + 4.30 * 0.1 / 3**0.5))
    wide = Difference.of({0: 20.0, 1: 51.0, 2: 91.0}, linear)
    assert wide.mean == pytest.approx(4.0) and not wide.clear
    assert "not larger than the spread of seeds" in verdict(wide, "x", "points", 1, True)
    assert verdict(small, "x", "points", 1, True).endswith("larger than the spread of seeds, log-linear is better.")
    assert verdict(small, "x", "nats", 1, False).endswith("larger than the spread of seeds, log-linear is worse.")
    assert "+1.0 points (95 % interval over 3 seeds +0.8 to +1.2)" in verdict(small, "x", "points", 1, True)
    assert Difference.of({0: 1.0}, {1: 1.0}) is None and "no seed of both" in verdict(None, "x", "", 1, True)
    one = Difference.of({0: 1.0, 5: 9.0}, {0: 3.0})
    assert (one.seeds, one.clear) == (1, False) and "of one seed" in verdict(one, "x", "nats", 2, False)
    none = Difference.of({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert verdict(none, "x", "points", 1, True) == "x: none with any of 2 seeds."


def test_twins_differ_in_levels_alone():
    models = {
        "a": {"mixer": "mamba2", "num_levels": 1, "num_heads": 2},
        "b": {"mixer": "mamba2", "num_levels": 9, "num_heads": 2},
        "c": {"mixer": "mamba2", "num_heads": 2},
        "d": {"mixer": "mamba2", "num_levels": 9, "num_heads": 4},
        "e": {"mixer": "gated_deltanet", "num_levels": 1, "num_heads": 2},
        "f": {"mixer": "attention", "num_heads": 2},
    }
    assert twins(models) == [("a", "b"), ("a", "c")]


def language_rows(config: ComparisonConfig, values) -> list[ComparisonRow]:
    """Rows of a comparison with numbers `values(model, seed, metric, position)`; None: no such row."""
    rows = []
    for run in config.runs():
        model, seed, settings = run.key
        shared = {"model": model, "seed": seed, "settings": settings, "device": "a machine", "torch": "2.11"}
        shared["date"] = f"2026-11-2{seed}T00:00:00"
        places = [(0, 256), (256, 512), (512, 1024), (1024, 2048)]
        found = [
            {"metric": "corpus_tokens", "value": 1000.0, "count": 7, "detail": "abc"},
            {"metric": "parameters", "value": 1234.0},
            {"metric": "state_bytes", "value": 2048.0},
            {"metric": "held_out_loss"},
            *({"metric": "position_loss", "position": start, "until": end} for start, end in places),
            *({"metric": "needle", "task": "niah_single_1", "position": length, "depth": depth}
              for length in (512, 1024) for depth in (0.0, 1.0, None)),
            *({"metric": "needle_loss", "task": "niah_single_1", "position": length} for length in (512, 1024)),
            *({"metric": metric, "position": level} for metric in ("level_share", "level_scale") for level in range(10)
              if model.startswith("log-linear")),
        ]  # fmt: skip
        for row in found:
            row.setdefault("value", values(model, seed, row["metric"], row.get("position")))
        rows += [ComparisonRow(**{**shared, **row}) for row in found]
        rows.append(ComparisonRow(**shared, metric="run", value=60.0, count=60, detail=run.settings()))
    return rows


def write_language(folder: Path, values, seeds: int = 2, status=None, more: str = "") -> ComparisonConfig:
    text = (ROOT / "experiments" / "language-tiny.yaml").read_text()
    text = re.sub(r"seeds: \[.*\]", f"seeds: {list(range(seeds))}", text)
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "experiments" / "words.yaml").write_text(text + "title: Words\nconclusion: Use both.\n" + more)
    config = ComparisonConfig.from_file(folder / "experiments" / "words.yaml")
    rows = language_rows(config, values)
    if status is not None:
        rows = status(rows)
    rowfile.RowFile(folder / "benchmarks" / "words" / comparison.ROWS_FILE, ComparisonRow).append(rows)
    return config


def better_with_levels(model: str, seed: int, metric: str, position: int | None) -> float:
    value = 0.5 + 0.01 * seed + (0.001 * position if position and metric == "position_loss" else 0.0)
    if model == "log-linear-mamba2":
        value += -0.1 - 0.001 * seed
    return value


def test_the_page_of_a_comparison(tmp_path):
    write_language(tmp_path, better_with_levels)
    written = write_page(tmp_path / "experiments", tmp_path / "benchmarks", tmp_path / "docs" / "results.md")
    page = written[0].read_text()
    assert "## Words" in page and "All 10 runs are done." in page and "Use both." in page
    assert "training on 1,000 tokens of 7 documents (abc)" in page and "do not compare" not in page
    assert f"| mamba2 | 1,234 | 2 | 0.5050 ± {statistics.stdev([0.5, 0.51]):.4f} |" in page
    assert "log-linear-mamba2 minus mamba2, held-out loss: −0.1005 nats" in page
    sentence = next(line for line in page.splitlines() if "log-linear-mamba2 minus mamba2, held-out loss" in line)
    assert sentence.endswith("larger than the spread of seeds, log-linear is better.") and "not larger" not in sentence
    assert "log-linear-gated-deltanet minus gated-deltanet, held-out loss: none with any of 2 seeds." in page
    worse = next(line for line in page.splitlines() if "log-linear-mamba2 minus mamba2, niah_single_1, up to" in line)
    assert worse.endswith("log-linear is worse."), "a share of right answers is better when higher"
    assert (
        "Took, added up over devices, 10:00" in page
        and "`loglinear compare" in page
        and "a machine (torch 2.11; 2026-11-20 to 2026-11-21)" in page
    )
    for name in ("positions", "needles", "levels"):
        path = tmp_path / "docs" / FIGURES / f"words-{name}.png"
        assert path in written and path.read_bytes().startswith(b"\x89PNG")
        assert f"({FIGURES}/{path.name})" in page


def test_the_page_of_a_comparison_whose_rates_were_tuned(tmp_path):
    """Rows at other rates are in the table of rates, and nowhere else."""
    more = "learning_rates: [1e-3, 3e-3]\nchosen_rates: {mamba2: 1e-3, gated-deltanet: 1e-3}\n"

    def lower_at_another_rate(rows):
        settings = {row.settings: json.loads(row.detail) for row in rows if row.metric == "run"}
        rates = {of: found["train"]["learning_rate"] for of, found in settings.items()}
        return [
            dataclasses.replace(row, value=0.4)
            if (row.model, row.metric, rates[row.settings]) == ("mamba2", "held_out_loss", 3e-3) else row
            for row in rows
        ]  # fmt: skip

    config = write_language(tmp_path, better_with_levels, status=lower_at_another_rate, more=more)
    written = write_page(tmp_path / "experiments", tmp_path / "benchmarks", tmp_path / "docs" / "results.md")
    page = written[0].read_text()
    assert len(config.runs()) == 15 and "All 15 runs are done." in page and "learning rates below" in page
    assert "| model | 0.001 | 0.003 |" in page
    spread = statistics.stdev([0.5, 0.51])
    assert f"| mamba2 | 0.5050 ± {spread:.4f}* | 0.4000 |" in page
    assert f"| gated-deltanet | 0.5050 ± {spread:.4f}* | 0.5000 |" in page
    assert f"| log-linear-mamba2 | 0.4000 | 0.4045 ± {statistics.stdev([0.4, 0.409]):.4f}* |" in page
    assert "With seed 0 the loss is lower at another one: mamba2 (0.003)." in page
    assert "It was chosen by these losses" in page and "lowest mean" not in page
    assert f"| mamba2 | 1,234 | 2 | 0.5050 ± {statistics.stdev([0.5, 0.51]):.4f} |" in page, "two seeds, one rate"
    header, lines = comparison_table(config, language_rows(config, better_with_levels))
    assert [line[header.index("seeds")] for line in lines] == ["2"] * 5
    # both rates with all seeds: the better mean is chosen, and no other loss is better
    more = more.replace("mamba2: 1e-3", "mamba2: [1e-3, 3e-3]")
    config = write_language(tmp_path, better_with_levels, status=lower_at_another_rate, more=more)
    page = write_page(tmp_path / "experiments", tmp_path / "benchmarks", tmp_path / "docs" / "results.md")[
        0
    ].read_text()
    assert len(config.runs()) == 16 and f"| mamba2 | 0.5050 ± {spread:.4f} | 0.4000 ± 0.0000* |" in page
    assert "| mamba2 | 1,234 | 2 | 0.4000 ± 0.0000 |" in page
    assert "lowest mean" in page and "lower at another one" not in page


def test_the_page_of_a_comparison_of_costs(tmp_path):
    write_language(tmp_path, better_with_levels)
    file = tmp_path / "experiments" / "words.yaml"
    file.write_text(file.read_text() + "cost_only: true\n")
    written = write_page(tmp_path / "experiments", tmp_path / "benchmarks", tmp_path / "docs" / "results.md")
    page = written[0].read_text()
    assert written == [tmp_path / "docs" / "results.md"], "a page without plots"
    assert "| mamba2 | 1,234 | 2 |" in page and "Use both." in page and "`loglinear compare" in page
    assert not any(word in page for word in ("Loss by position", "Needles", "What the levels are used for", "minus"))


def test_what_is_missing_or_went_wrong_is_said(tmp_path):
    def status(rows):
        kept = []
        for row in rows:
            if (row.model, row.seed) == ("mamba2", 1):
                if row.metric not in ("run", "parameters"):
                    continue
                row = dataclasses.replace(row, status="diverged", detail="step 3 was not finite")
            if row.seed == 0 and row.metric == "corpus_tokens" and row.model == "attention":
                row = dataclasses.replace(row, detail="other")
            if (row.model, row.seed) != ("attention", 1):
                kept.append(row)
        kept.insert(0, dataclasses.replace(kept[0], metric="tokens_per_second", value=9.0, count=2))
        return kept

    write_language(tmp_path, better_with_levels, status=status)
    page = write_page(tmp_path / "experiments", tmp_path / "benchmarks", tmp_path / "results.md")[0].read_text()
    assert "Up to 2 runs shared a device, and its speed." in page
    assert "9 of 10 runs are done; the rest is missing." in page
    assert "mamba2, seed 1: step 3 was not finite" in page
    assert "of one seed, which says nothing of how much seeds differ" in page
    assert "Not all runs read the same texts" in page


def sweep_rows(config: SweepConfig, accuracy) -> list[SweepRow]:
    rows = []
    for run in config.runs():
        share = accuracy(run.model.name, run.training.seed, run.training.learning_rate)
        cells = " ".join(f"{pairs}:{share}" for pairs in run.task.pairs)
        use = f"0:{share} 1:{1 - share}" if run.model.name == "log-linear-mamba2" else ""
        rows.append(
            SweepRow(**run.settings(), num_levels=1, state_bytes=64, validation_by_pairs=cells, test_by_pairs=cells,
                     level_shares=use, seconds=30.0, together=2, device="a machine", torch="2.11",
                     date="2026-11-20T00:00:00")
        )  # fmt: skip
    return rows


def test_the_page_of_a_sweep(tmp_path):
    (tmp_path / "experiments").mkdir()
    file = tmp_path / "experiments" / "recall.yaml"
    text = (ROOT / "experiments" / "mqar-tiny.yaml").read_text()
    file.write_text(text + "title: Recall\nabout: Small.\npaper: {mamba2: {32: 46.9 (2.3)}}\n")
    config = SweepConfig.from_file(file)

    def accuracy(model, seed, rate):
        best = 0.5 + 0.01 * seed + (0.2 if model == "log-linear-gated-deltanet" else 0.0)
        return best if rate == 3e-3 else 0.1

    path = tmp_path / "benchmarks" / "recall" / sweep.ROWS_FILE
    older = [
        dataclasses.replace(row, test_by_pairs=row.test_by_pairs.replace(":0", ":1"))
        for row in sweep_rows(config, accuracy)
    ]
    rowfile.RowFile(path, SweepRow).append([*older, *sweep_rows(config, accuracy)])  # run again: the newest count
    page = write_page(tmp_path / "experiments", tmp_path / "benchmarks", tmp_path / "results.md")[0].read_text()
    assert "## Recall\n\nSmall." in page and "All 20 runs are done." in page
    (line,) = [line for line in page.splitlines() if line.startswith("| mamba2 |")]
    assert page.count("| log-linear-mamba2 | 32 | 50.5 ± 0.7 | 49.5 ± 0.7 |") == 1, "of the chosen rate alone"
    assert "| 0.003* | 2 |" in line and line.endswith("| 50.5 ± 0.7 | 46.9 (2.3) |")
    assert "log-linear-gated-deltanet minus gated-deltanet, width 32: +20.0 points" in page
    assert "log-linear-gated-deltanet minus gated-deltanet, width 32, 8 pairs: +20.0 points" in page
    assert "log-linear-mamba2 minus mamba2, width 32: none with any of 2 seeds." in page
    assert "added up, took 5:00" in page  # 20 runs of 30 seconds, two at a time
    assert (tmp_path / FIGURES / "recall.png").is_file()
    with pytest.raises(ValueError, match="paper: got 'mamba3'"):
        SweepConfig(**{**dataclasses.asdict(config), "paper": {"mamba3": {32: "1"}}})


def test_runs_of_a_sweep_that_failed_are_named_until_they_are_done(tmp_path):
    file = tmp_path / "experiments" / "recall.yaml"
    file.parent.mkdir()
    file.write_text((ROOT / "experiments" / "mqar-tiny.yaml").read_text())
    rows = sweep_rows(SweepConfig.from_file(file), lambda model, seed, rate: 0.5)
    broken = [dataclasses.replace(row, status=sweep.FAILED, message="no room") for row in rows if row.model == "mamba2"]
    others = [row for row in rows if row.model != "mamba2"]
    path = tmp_path / "benchmarks" / "recall" / sweep.ROWS_FILE

    def page(more):
        rowfile.RowFile(path, SweepRow).append(more)
        return write_page(file.parent, tmp_path / "benchmarks", tmp_path / "results.md")[0].read_text()

    first = page([*others, *broken, *broken])
    assert f"{len(others)} of {len(rows)} runs are done" in first and first.count("mamba2, width 32: no room") == 1
    assert "failed" not in page([row for row in rows if row.model == "mamba2"])


def test_no_page_without_rows(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["results", "--experiments", str(ROOT / "experiments"), "--benchmarks", str(tmp_path), "--output",
              str(tmp_path / "page.md")])  # fmt: skip
    assert ended.value.code == 2 and not (tmp_path / "page.md").exists()
    assert f"no rows in {tmp_path} of an experiment" in capsys.readouterr().err


def test_the_committed_page_is_what_the_committed_rows_say(tmp_path):
    """Where there are rows, `docs/results.md` was drawn from them and from the files of the experiments."""
    folders = [path for path in (ROOT / "benchmarks").iterdir() if (path / sweep.ROWS_FILE).is_file()]
    folders += [path for path in (ROOT / "benchmarks").iterdir() if (path / comparison.ROWS_FILE).is_file()]
    assert (ROOT / "docs" / "results.md").is_file() == bool(folders)
    if folders:
        page = write_page(ROOT / "experiments", ROOT / "benchmarks", tmp_path / "results.md")[0].read_text()
        assert page.replace(f"{ROOT}/", "") == (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize(("beyond", "told", "highest"), [(4.1, "attention reaches 4.1", 1.0), (1.2, "", 1.2)])
def test_what_goes_far_above_the_others_leaves_the_axis(beyond, told, highest):
    """A model without a clue beyond its trained length would press the others into one line."""
    _, axes = plots.new_figure(1, 1)
    lines = [
        plots.Series("attention", [10, 100, 200], [1.0, 0.9, beyond]),
        plots.Series("mamba2", [10, 100, 200], [0.9, 0.8, 0.8]),
    ]
    plots.draw_series(axes[0], lines)
    assert results._cut_off_above(axes[0], lines, trained=100) == told
    low, high = axes[0].get_ylim()
    assert low < 0.8
    assert high >= highest and (high < beyond) == bool(told)
