"""Loss by position: the numbers are those of one document read alone, the errors those of the definition."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loglinear.cli import main
from loglinear.data import load_tokenizer
from loglinear.evals import position_loss
from loglinear.evals.command import run_position_loss
from loglinear.evals.position_loss import (
    bucket_edges,
    choose_documents,
    compare,
    document_losses,
    evaluate,
    labels_of,
    mean_and_error,
    student_quantile,
    tabulate,
)
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.train import TrainConfig, train


def tiny_model(mixer: str = "gated-deltanet", **options) -> LogLinearForCausalLM:
    return LogLinearForCausalLM(LogLinearConfig.preset(f"tiny-{mixer}", **options)).eval()


def documents_of(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, length).astype(np.uint16) for length in lengths]


@pytest.mark.parametrize("mixer", ["gated-deltanet", "attention"])
def test_losses_are_those_of_each_document_alone(mixer):
    model = tiny_model(mixer)
    documents = documents_of(2, 40, 1, 90, 13)
    losses = document_losses(model, documents, length=60, tokens_per_batch=70)
    assert [len(one) for one in losses] == [1, 39, 0, 60, 12]
    for document, got in zip(documents, losses, strict=True):
        if len(document) < 2:
            continue
        ids = torch.from_numpy(document[:61].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        wanted = F.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_buckets_double_or_have_one_width():
    assert bucket_edges(100) == [0, 16, 32, 64, 100]
    assert bucket_edges(64) == [0, 16, 32, 64]
    assert bucket_edges(5) == [0, 5]
    assert bucket_edges(10, width=4) == [0, 4, 8, 10]
    with pytest.raises(ValueError, match="at least 1"):
        bucket_edges(0)


def test_the_table_by_hand():
    losses = [np.array([1.0, 2.0, 6.0]), np.array([3.0, 4.0])]
    table = tabulate("m", losses, [0, 2, 4, 8])
    assert [(row.position_start, row.position_end, row.documents, row.tokens) for row in table] == [
        (0, 2, 2, 4),
        (2, 4, 1, 1),
    ]
    assert table[0].loss == 2.5 and table[1].loss == 6.0
    # Document means 1.5 and 3.5 with equal weights: the error of a mean of two numbers that are 2 apart is 1.
    assert table[0].standard_error == pytest.approx(1.0)
    assert table[1].standard_error is None


def test_the_standard_error_is_that_of_the_mean_over_documents():
    generator = np.random.default_rng(1)
    means = generator.normal(size=50)
    counts = np.full(50, 8)
    mean, error = mean_and_error(means * counts, counts)
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / np.sqrt(50))


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(1000):
        losses = [generator.normal(size=2) + generator.normal() for _ in range(5)]
        row = tabulate("m", losses, [0, 2])[0]
        assert row.confidence_low < row.loss < row.confidence_high
        inside += row.confidence_low < 0 < row.confidence_high
    assert 930 < inside < 970
    alone = tabulate("m", losses[:1], [0, 2])[0]
    assert alone.confidence_low is None and alone.confidence_high is None


def test_bands_are_the_intervals():
    models = {"a": tiny_model(), "b": tiny_model("attention")}
    result = evaluate(models, documents_of(40, 40, 40), 30)
    figure = position_loss.plot(result)
    for axis, rows in zip(figure.axes, (result.table, result.differences), strict=True):
        bands = [band.get_paths()[0].vertices[:, 1] for band in axis.collections]
        names = list(dict.fromkeys(row.model for row in rows))
        assert len(bands) == len(names)
        for band, name in zip(bands, names, strict=True):
            ends = [end for row in rows if row.model == name for end in (row.confidence_low, row.confidence_high)]
            assert band.min() == pytest.approx(min(ends)) and band.max() == pytest.approx(max(ends))


def test_differences_are_paired():
    """Documents differ much, models little: the paired error must not see the documents."""
    hard = np.linspace(0, 5, 20)
    one = [np.full(4, level) for level in hard]
    other = [np.full(4, level - 0.1) for level in hard]
    row = compare("b", other, "a", one, [0, 4])[0]
    assert row.difference == pytest.approx(-0.1)
    assert row.standard_error == pytest.approx(0, abs=1e-12) and row.clear
    assert tabulate("a", one, [0, 4])[0].standard_error > 0.3
    with pytest.raises(ValueError, match="not evaluated on the same tokens"):
        compare("b", other[1:], "a", one, [0, 4])


def test_noise_is_called_noise():
    generator = np.random.default_rng(2)
    one = [generator.normal(size=4) for _ in range(6)]
    other = [generator.normal(size=4) for _ in range(6)]
    assert not compare("b", other, "a", one, [0, 4])[0].clear
    assert not compare("b", other[:1], "a", one[:1], [0, 4])[0].clear


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_student_quantiles(degrees, quantile):
    assert student_quantile(degrees) == pytest.approx(quantile, abs=0.01)


class Fake:
    def __init__(self, documents):
        self.documents, self.lengths = documents, np.array([len(one) for one in documents])

    def __getitem__(self, index):
        return self.documents[index]


def test_documents_are_long_enough_and_the_same_every_time():
    corpus = Fake(documents_of(10, 50, 51, 52, 1))
    whole = choose_documents(corpus, 50, whole=True)
    assert sorted(len(one) for one in whole) == [51, 52]
    everything = choose_documents(corpus, 50, whole=False)
    assert sorted(len(one) for one in everything) == [10, 50, 51, 52]
    few = choose_documents(corpus, 50, whole=False, maximum=2)
    assert [len(one) for one in few] == [len(one) for one in everything[:2]]
    with pytest.raises(ValueError, match="no document has more than 60 tokens .the longest has 52."):
        choose_documents(corpus, 60)


def test_labels_are_short_and_different():
    assert labels_of(["/r/a/checkpoint-9"]) == ["a"]
    assert labels_of(["/r/a/checkpoint-9", "/r/b/checkpoint-9"]) == ["a", "b"]
    assert labels_of(["/r/a/checkpoint-9", "/r/a/checkpoint-10"]) == ["a/checkpoint-9", "a/checkpoint-10"]
    assert labels_of(["/r/x/a", "/r/y/a"]) == ["x/a", "y/a"]
    assert labels_of(["/r/a", "/r/a"]) == ["r/a (1)", "r/a (2)"]


def test_there_must_be_something_to_evaluate():
    with pytest.raises(ValueError, match="at least one model"):
        evaluate({}, documents_of(5), 4)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate({"m": tiny_model()}, documents_of(1), 4)
    with pytest.raises(ValueError, match="at least one checkpoint"):
        position_loss.evaluate_checkpoints([])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained checkpoints that held out the same documents, and one that held out others."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"document {number} says {number * 7} and so on. " * (3 + number))

    def trained(name: str, **options):
        config = TrainConfig(
            output=str(folder / name), data=[str(text)], cache=str(folder / "cache"), sequence_length=32, rows=1,
            steps=1, held_out_fraction=0.4, tensorboard=False, progress=False, device="cpu", evaluation_rows=1,
            **{"model": "tiny-gated-deltanet", **options},
        )  # fmt: skip
        return str(train(config).output)

    return [trained("first"), trained("second", model="tiny-attention"), trained("third", split_seed=5)]


def test_checkpoints_are_compared_on_the_documents_they_held_out(runs, tmp_path):
    result = run_position_loss(runs[:2], tmp_path, device="cpu", length=100)
    with (tmp_path / "position_loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "model", "position_start", "position_end", "loss", "standard_error", "documents", "tokens", "confidence_low",
        "confidence_high",
    ]  # fmt: skip
    assert [(row["model"], row["position_start"]) for row in rows] == [
        (model, start) for model in ("first", "second") for start in ("0", "16", "32", "64")
    ]
    documents = {int(row["documents"]) for row in rows}
    assert len(documents) == 1
    assert [int(row["tokens"]) for row in rows[:4]] == [width * max(documents) for width in (16, 16, 32, 36)]
    with (tmp_path / "position_loss_differences.csv").open() as file:
        differences = list(csv.DictReader(file))
    assert float(differences[0]["difference"]) == pytest.approx(
        float(rows[4]["loss"]) - float(rows[0]["loss"]), abs=1e-5
    )
    assert (tmp_path / "position_loss.png").read_bytes().startswith(b"\x89PNG")
    assert result.length == 100


def test_documents_that_one_model_was_trained_on_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="did not hold out the same documents"):
        run_position_loss([runs[0], runs[2]], tmp_path, device="cpu", length=100)


def test_other_documents_can_be_named(runs, tmp_path):
    (tmp_path / "other.txt").write_text("another text, " * 20)
    result = run_position_loss(
        [runs[0], runs[2]],
        tmp_path / "out",
        device="cpu",
        length=64,
        data=[str(tmp_path / "other.txt")],
        labels=["a", "b"],
    )
    assert {row.documents for row in result.table} == {1}
    assert list(result.losses) == ["a", "b"]
    assert all(row.standard_error is None for row in result.table)


def test_the_field_of_the_text_can_be_named(runs, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "another text, " * 20}) + "\n")
    data = {"length": 32, "data": [str(tmp_path / "other.jsonl")]}
    with pytest.raises(ValueError, match="no field 'text', it has 'body'"):
        position_loss.evaluate_checkpoints(runs[:1], **data)
    result = position_loss.evaluate_checkpoints(runs[:1], **data, data_options={"text_field": "body"})
    assert {row.documents for row in result.table} == {1}
    with pytest.raises(ValueError, match="got text_field without data"):
        position_loss.evaluate_checkpoints(runs[:1], length=32, data_options={"text_field": "body"})


def test_the_command_passes_the_options_of_data_on(monkeypatch):
    seen = {}
    monkeypatch.setattr("loglinear.evals.command.run_position_loss", lambda *arguments, **options: seen.update(options))
    flags = ["--data", "hub:some/data", "--text-field", "body", "--hub-subset", "small", "--hub-split", "test"]
    with pytest.raises(SystemExit):
        main(["eval", "position-loss", "run", *flags])
    assert seen["data"] == ["hub:some/data"]
    assert seen["data_options"] == {"text_field": "body", "hub_subset": "small", "hub_split": "test"}
    with pytest.raises(SystemExit):
        main(["eval", "position-loss", "run"])
    assert seen["data_options"] == {}


def vertical_lines(result) -> list[list[float]]:
    """Where each axis of the plot has a vertical line."""
    figure = position_loss.plot(result)
    return [
        [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
        for axis in figure.axes
    ]


def test_positions_beyond_the_training_are_told_of_and_marked(runs, tmp_path, capsys):
    result = run_position_loss(runs[:2], tmp_path, device="cpu", length=100)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Trained on rows of 32 tokens: first, second. Positions from 32 on are longer than anything in" in shown
    assert vertical_lines(result) == [[32], [32]]
    within = run_position_loss(runs[:2], tmp_path, device="cpu", length=32)
    assert "Trained on rows" not in capsys.readouterr().out
    assert within.trained_lengths == {"first": 32, "second": 32} and vertical_lines(within) == [[], []]


def test_the_trained_length_is_only_marked_where_all_share_it(runs, tmp_path):
    result = position_loss.evaluate_checkpoints(runs[:2], length=100)
    mixed = replace(result, trained_lengths={"first": 32, "second": 64})
    assert vertical_lines(mixed) == [[], []] and len(position_loss.beyond_training(mixed)) == 2
    assert vertical_lines(replace(result, trained_lengths={"first": 32})) == [[], []]


def test_a_model_from_elsewhere_has_no_known_training(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    (tmp_path / "other.txt").write_text("another text, " * 20)
    result = position_loss.evaluate_checkpoints([tmp_path / "model"], length=64, data=[str(tmp_path / "other.txt")])
    assert result.trained_lengths == {} and position_loss.beyond_training(result) == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(position_loss, "evaluate_checkpoints", lambda *arguments, **options: pytest.fail("evaluated"))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="wanted a folder that is there or can be made"):
        run_position_loss(["run"], tmp_path / "file", device="cpu")


def test_options_that_the_data_does_not_heed_are_refused_before_anything_is_loaded(runs, monkeypatch):
    monkeypatch.setattr(position_loss, "load_checkpoint", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="got text_field='body', but no source has fields"):
        position_loss.evaluate_checkpoints(runs[:1], length=32, data=["stdlib"], data_options={"text_field": "body"})


def test_two_checkpoints_with_one_label_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a label of its own, got x, x"):
        position_loss.evaluate_checkpoints([tmp_path / "a", tmp_path / "b"], labels=["x", "x"])
