"""Accuracy at recall: the table by hand, and the command on trained models."""

import csv

import numpy as np
import pytest

from loglinear.cli import main
from loglinear.evals import recall
from loglinear.evals.command import run_mqar
from loglinear.evals.recall import accuracy_table, distance_edges, tabulate
from loglinear.train import TrainConfig, train


def test_distances_double():
    assert distance_edges(64) == [0, 4, 8, 16, 32, 64]
    assert distance_edges(3) == [0, 3]


def test_the_table_by_hand():
    right = {1: np.array([[True], [False]]), 2: np.array([[True, True], [False, True]])}
    distances = {1: np.array([[2], [9]]), 2: np.array([[2, 5], [10, 2]])}
    rows = tabulate("m", 16, right, distances)
    found = {(row.pairs, row.distance_start, row.distance_end): row for row in rows}
    assert len(found) == len(rows)
    whole = found[2, None, None]
    assert (whole.accuracy, whole.queries, whole.sequences) == (0.75, 4, 2)
    # Sequences with shares 1 and 1/2, of equal size: half their difference.
    assert whole.standard_error == pytest.approx(0.25)
    assert found[2, 0, 4].accuracy == 1.0 and found[2, 0, 4].queries == 2
    assert found[2, 8, 16].accuracy == 0.0 and found[2, 8, 16].standard_error is None
    assert found[None, 0, 4].accuracy == 1.0 and found[None, 0, 4].queries == 3
    assert found[None, 8, 16].accuracy == 0.0 and found[None, 8, 16].queries == 2
    assert (1, 4, 8) not in found
    assert accuracy_table(rows) == (["model", "1 pairs", "2 pairs"], [["m", "50.0 ± 50.0", "75.0 ± 25.0"]])


def trained(folder, name: str, **options) -> str:
    config = TrainConfig(
        output=str(folder / name), task="mqar", steps=2, rows=4, tensorboard=False, progress=False, device="cpu",
        **{
            "task_options": {"pairs": [1, 4], "vocabulary": 16},
            "sequence_length": 16,
            "model": "tiny-mamba2",
            "evaluation_rows": 2,
            **options,
        },
    )  # fmt: skip
    return str(train(config).output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [trained(folder, "first"), trained(folder, "second", model="tiny-attention", seed=3)]


def test_models_answer_the_same_queries_and_leave_csv_and_plot(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "mqar", *runs, "-o", str(tmp_path), "--sequences", "20", "--device", "cpu"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "first" in shown and "second" in shown and "4 pairs" in shown
    with (tmp_path / "mqar.csv").open() as file:
        rows = list(csv.DictReader(file))
    counts = {
        name: [(row["pairs"], row["distance_start"], row["queries"]) for row in rows if row["model"] == name]
        for name in ("first", "second")
    }
    assert counts["first"] == counts["second"] and ("4", "", "80") in counts["first"]
    assert (tmp_path / "mqar.png").read_bytes().startswith(b"\x89PNG")


def test_longer_sequences_and_other_pairs_than_trained(runs, tmp_path):
    rows = run_mqar(runs[:1], tmp_path, "cpu", sequences=5, length=40, options={"pairs": "2,7", "power": 1.0})
    assert {row.length for row in rows} == {40} and {row.pairs for row in rows} == {2, 7, None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"pairs": 5}}, "got 5 in 16 tokens, wanted at most 4"),
        ({"options": {"vocabulary": 32}}, "vocabulary: got 32, wanted 16"),
        ({"labels": ["a", "b"]}, "got 2 labels for 1 checkpoints"),
        ({"sequences": 0}, "sequences: got 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(runs, options, message):
    with pytest.raises(ValueError, match=message):
        recall.evaluate_checkpoints(runs[:1], **options)


def test_models_of_another_task_are_refused(runs, tmp_path):
    other = trained(tmp_path, "other", task_options={"pairs": 2, "vocabulary": 8})
    with pytest.raises(ValueError, match="trained on a vocabulary of 8, .* on one of 16"):
        recall.evaluate_checkpoints([runs[0], other])
    (tmp_path / "a.txt").write_text("some text to learn from. " * 40)
    (tmp_path / "b.txt").write_text("another text to learn from. " * 40)
    text = TrainConfig(
        output=str(tmp_path / "text"), data=[str(tmp_path / "*.txt")], cache=str(tmp_path / "cache"),
        sequence_length=32, rows=1, steps=1, held_out_fraction=0, tensorboard=False, progress=False, device="cpu",
        model="tiny-mamba2",
    )  # fmt: skip
    with pytest.raises(ValueError, match="was trained on text, wanted a model of `loglinear train --task mqar`"):
        recall.evaluate_checkpoints([str(train(text).output)])
    with pytest.raises(ValueError, match="at least one checkpoint"):
        recall.evaluate_checkpoints([])
