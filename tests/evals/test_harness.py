"""The evaluation harness: our models through its own wrapper. Skipped where it is missing, but for the message."""

import csv
import importlib.util
import json
import sys

import pytest
import torch

from loglinear.cli import main
from loglinear.data import load_tokenizer
from loglinear.data.needles import NeedleSample
from loglinear.data.tokenizers import encode_prompt
from loglinear.evals import harness, needle
from loglinear.evals.command import run_needle
from loglinear.evals.harness import HarnessRow, harness_table, rows_of
from loglinear.models import LogLinearConfig, LogLinearForCausalLM

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")


def test_a_panel_for_each_metric_and_a_point_for_each_task_and_model():
    def row(model, task, metric, value, error, better):
        return HarnessRow(model, task, metric, "none", value, error, better, 5, 0, "1")

    rows = [row(model, task, "acc", 0.5, 0.1, True) for model in ("a", "b") for task in ("x", "y", "z")]
    figure = harness.plot([*rows, row("a", "x", "ppl", 30.0, None, False)])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["acc, higher is better", "ppl, lower is better"]
    left, right = figure.axes
    assert [len(line.lines[0].get_xdata()) for line in left.containers] == [3, 3]
    assert [len(line.lines[0].get_xdata()) for line in right.containers] == [1, 0]
    assert [label.get_text() for label in left.get_xticklabels()] == ["x", "y", "z"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has learned to go on with digits, so that some answers are values."""
    folder = tmp_path_factory.mktemp("model") / "ours"
    torch.manual_seed(0)
    model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet", max_position_embeddings=1024))
    tokenizer = load_tokenizer("bytes")
    text = torch.tensor([tokenizer(" is 1234567.").input_ids] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "harness", *map(str, arguments), "--device", "cpu"])
    return int(ended.value.code or 0)


def test_a_harness_that_is_not_installed_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert command("anything", "--task", "hellaswag", "-o", tmp_path / "out") == 2
    assert "pip install 'log-linear-attention[harness]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


RESULTS = {
    "results": {
        "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,strict": 3, "ppl_stderr,strict": "N/A"}
    },
    "n-samples": {"a": {"original": 90, "effective": 7}},
    "n-shot": {"a": 2},
    "versions": {"a": 1.0},
    "higher_is_better": {"a": {"acc": True}},
}  # fmt: skip


def test_rows_are_the_numbers_of_the_harness():
    rows = rows_of("m", RESULTS)
    assert rows == [
        HarnessRow("m", "a", "acc", "none", 0.5, 0.1, True, 7, 2, "1.0"),
        HarnessRow("m", "a", "ppl", "strict", 3.0, None, None, 7, 2, "1.0"),
    ]
    other = [HarnessRow("n", "a", "acc", "none", 0.25, None, True, 7, 2, "1.0")]
    header, lines = harness_table(rows + other)
    assert header == ["task", "metric", "m", "n"]
    assert lines == [["a", "acc", "0.5000 ± 0.1000", "0.2500"], ["a", "ppl (strict)", "3.0000", "–"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks: got none"),
        ({"tasks": ["a"], "limit": 0}, "limit: got 0"),
        ({"tasks": ["a"], "fewshot": -1}, "fewshot: got -1"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        harness.evaluate_model("anything", **options)
    with pytest.raises(FileNotFoundError, match="include path: got absent, wanted a folder with task files"):
        harness.evaluate_model("anything", ["a"], include_path=["absent"])


@installed
def test_own_task_files_are_asked_and_scored_as_the_model_does(checkpoint, tmp_path):
    """Likelihoods of two choices, against the model's own."""
    questions = [{"text": "The number is", "choices": [" 1234567.", " none at all"], "right": r} for r in (0, 1)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (tmp_path / "own.yaml").write_text(
        "task: own_choices\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {{test: {json.dumps(str(tmp_path / 'q.jsonl'))}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{right}}"\ntarget_delimiter: ""\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    assert command(checkpoint, "-t", "own_choices", "--include-path", tmp_path, "-o", tmp_path / "out") == 0
    with (tmp_path / "out" / "harness.csv").open() as file:
        (row,) = list(csv.DictReader(file))
    assert (row["task"], row["metric"], float(row["value"]), row["samples"]) == ("own_choices", "acc", 0.5, "2")
    lines = (tmp_path / "out" / "harness_samples.jsonl").read_text().splitlines()
    found = [float(pair[0]) for pair in json.loads(lines[0])["filtered_resps"]]
    model = LogLinearForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = load_tokenizer("bytes")
    for choice, likelihood in zip(questions[0]["choices"], found, strict=True):
        ids = torch.tensor([tokenizer("The number is" + choice).input_ids])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert likelihood == pytest.approx(float(scores[-len(choice) :].sum()), rel=1e-4)
    assert "own_choices" in json.loads((tmp_path / "out" / "harness.json").read_text())["ours"]["results"]
    assert (tmp_path / "out" / "harness.png").stat().st_size > 5000


@installed
@pytest.mark.parametrize("name", ["niah_single_2", "niah_multivalue"])
def test_needles_through_the_harness_are_those_of_the_command(checkpoint, tmp_path, name):
    run_needle(
        [checkpoint], tmp_path / "needle", "cpu", "fp32", harness_task=tmp_path / "task", tasks=[name],
        lengths=[700], depths=[0.0, 1.0], samples=2,
    )  # fmt: skip
    assert command(
        checkpoint, "-t", "loglinear_needle", "--include-path", tmp_path / "task", "-o", tmp_path / "out",
        "--batch-size", 3,
    ) == 0  # fmt: skip
    with (tmp_path / "needle" / "needle_samples.csv").open(newline="") as file:
        ours = list(csv.DictReader(file))
    theirs = [json.loads(line) for line in (tmp_path / "out" / "harness_samples.jsonl").read_text().splitlines()]
    theirs.sort(key=lambda line: line["doc_id"])
    assert [line["resps"][0][0] for line in theirs] == [row["answer"] for row in ours]
    assert len({row["answer"] for row in ours}) >= 1 and all(row["answer"] for row in ours)
    assert [line["exact"] for line in theirs] == [float(row["exact"]) for row in ours]
    with (tmp_path / "out" / "harness.csv").open() as file:
        values = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert values["contained"] == pytest.approx(sum(float(row["contained"]) for row in ours) / 4)


@installed
@pytest.mark.skipif(importlib.util.find_spec("wonderwords") is None, reason="needs lm_eval[ruler]")
def test_needles_of_ruler_are_answered_and_judged_as_ours(checkpoint, tmp_path):
    """RULER's own task makes texts by the model's tokenizer; our loop gives the same answers to its questions."""
    assert command(
        checkpoint, "-t", "niah_single_1", "--limit", 2, "--max-length", 4400, "-o", tmp_path / "out",
        "--metadata", "max_seq_lengths=[4096]",
    ) == 0  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "harness_samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    model, tokenizer = needle.load_any(checkpoint)
    samples = []
    for line in lines:
        prompt = line["arguments"][0][0]
        tokens = encode_prompt(tokenizer, prompt)
        assert 2000 < len(tokens) <= 4096
        expected = tuple(line["doc"]["outputs"])
        samples.append(NeedleSample("niah_single_1", 4096, 0.0, 0, prompt, tokens, expected, answer_tokens=128))
    ours = needle.answers(model, tokenizer, samples)
    assert [line["resps"][0][0] for line in lines] == ours and all(ours)
    with (tmp_path / "out" / "harness.csv").open() as file:
        values = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert values["4096"] == sum(row.contained for row in needle.rows_of("ours", samples, ours)) / 2
    judge = importlib.import_module("lm_eval.tasks.ruler.common_utils").process_results
    for said in (f"It is {samples[0].expected[0]}.", samples[0].expected[0], "It is 1.", ""):
        (row,) = needle.rows_of("ours", samples[:1], [said])
        assert judge(lines[0]["doc"], [said])["4096"] == row.contained


@installed
def test_tasks_that_the_harness_does_not_know_are_refused(checkpoint, capsys, tmp_path):
    assert command(checkpoint, "--task", "no_such_task", "-o", tmp_path / "out") == 2
    assert "tasks: the harness knows no no_such_task" in capsys.readouterr().err
