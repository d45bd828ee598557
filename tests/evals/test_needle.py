"""Needles: batched answers are those of each prompt alone, cells are counted, any causal model can be asked."""

import csv
import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loglinear.cli import main
from loglinear.data import ByteTokenizer, load_tokenizer
from loglinear.data.needles import NeedleSample, right_answer, score
from loglinear.evals import needle
from loglinear.evals.command import run_needle
from loglinear.evals.needle import (
    NeedleRow,
    answer_losses,
    answers,
    haystack_for,
    load_any,
    samples_of,
    summary_table,
    tabulate,
)
from loglinear.models import LogLinearConfig, LogLinearForCausalLM


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model of ours and one of transformers that share nothing with us, each with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    ours = LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet", initializer_range=0.2))
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=256, eos_token_id=257, pad_token_id=258,
            initializer_range=0.2,
        )
    )  # fmt: skip
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(folder / name)
        load_tokenizer("bytes").save_pretrained(folder / name)
    return [str(folder / "ours"), str(folder / "theirs")]


@pytest.mark.parametrize("which", [0, 1], ids=["ours", "theirs"])
def test_batched_answers_are_those_of_each_prompt_alone(checkpoints, which):
    model, tokenizer = load_any(checkpoints[which])
    samples = samples_of(haystack_for(tokenizer), ["niah_single_1", "niah_single_2"], [420, 460], [0.0, 1.0], 1)
    assert len({len(sample.tokens) for sample in samples}) > 2, "padding must matter"
    together = answers(model, tokenizer, samples, tokens_per_batch=10_000)
    alone = answers(model, tokenizer, samples, tokens_per_batch=1)
    assert together == alone and len(together) == 8
    with torch.no_grad():
        ids = torch.tensor([samples[0].tokens])
        for _ in range(samples[0].answer_tokens):
            logits = model(input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    new = ids[0, len(samples[0].tokens) :].tolist()
    end = new.index(257) if 257 in new else len(new)
    assert together[0] == tokenizer.decode(new[:end], skip_special_tokens=True)


def test_the_loss_of_the_right_answer_is_that_of_its_tokens(checkpoints):
    model, tokenizer = load_any(checkpoints[0])
    samples = samples_of(haystack_for(tokenizer), ["niah_single_1", "niah_multivalue"], [700, 900], [0.5], 1)
    found = answer_losses(model, tokenizer, samples, tokens_per_batch=1500)
    for sample, loss in zip(samples, found, strict=True):
        answer = " " + (
            sample.expected[0]
            if len(sample.expected) == 1
            else ", ".join(sample.expected[:-1]) + f" and {sample.expected[-1]}"
        )
        assert right_answer(sample) == answer
        ids = torch.tensor([sample.tokens + list(answer.encode())])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        wanted = torch.nn.functional.cross_entropy(logits[len(sample.tokens) - 1 :], ids[0, len(sample.tokens) :])
        assert loss == pytest.approx(float(wanted), rel=1e-5)
        assert score(sample.task, answer, sample.expected).exact


class Oracle(torch.nn.Module):
    """Answers a prompt of bytes as someone would who read it, when the needle is in the first half."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = ByteTokenizer()

    def generate(self, inputs, attention_mask, generation_config):
        rows = []
        for ids, mask in zip(inputs, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()].tolist(), skip_special_tokens=True)
            found = re.search(r"is (\d{7})\.", prompt)
            right = found is not None and found.start() < len(prompt) / 2
            answer = f" {found[1] if right else 1}." if found else " ?"
            new = self.tokenizer(answer, add_special_tokens=False).input_ids
            rows.append(ids.tolist() + new + [258] * (generation_config.max_new_tokens - len(new)))
        return torch.tensor(rows)


def test_cells_count_what_was_found():
    tokenizer = ByteTokenizer()
    samples = samples_of(haystack_for(tokenizer), ["niah_single_1"], [500, 1000], [0.0, 1.0], 3)
    rows = needle.rows_of("oracle", samples, answers(Oracle(), tokenizer, samples))
    cells = {(cell.length, cell.depth): cell for cell in tabulate(rows)}
    assert set(cells) == {(length, depth) for length in (500, 1000) for depth in (0.0, 1.0, None)}
    for length in (500, 1000):
        assert [cells[length, depth].accuracy for depth in (0.0, 1.0, None)] == [1.0, 0.0, 0.5]
        whole = cells[length, None]
        assert whole.samples == 6 and whole.standard_error == pytest.approx((0.3 / 6) ** 0.5)
        assert cells[length, 0.0].standard_error == 0.0
    header, lines = summary_table(list(cells.values()))
    assert header == ["model", "task", "500", "1000"] and lines == [["oracle", "niah_single_1", "50 ± 22", "50 ± 22"]]


def test_a_row_is_cut_where_its_own_room_ends():
    samples = [
        NeedleSample("niah_single_1", 100, 0.0, number, "x", [1, 2], ("1234567",), room)
        for number, room in enumerate((8, 20))
    ]

    class Counting(Oracle):
        def generate(self, inputs, attention_mask, generation_config):
            new = torch.arange(65, 65 + generation_config.max_new_tokens).expand(len(inputs), -1)
            return torch.cat([inputs, new], dim=1)

    assert [len(text) for text in answers(Counting(), ByteTokenizer(), samples)] == [8, 20]


def test_the_command_leaves_rows_cells_and_a_plot(checkpoints, tmp_path, capsys):
    arguments = ["eval", "needle", *checkpoints, "-o", str(tmp_path), "-t", "niah_single_1,niah_multivalue"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--lengths", "700", "--depths", "0,100", "--samples", "2", "--device", "cpu"])
    assert not ended.value.code and "Needles found" in capsys.readouterr().out
    with (tmp_path / "needle_samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 and {row["model"] for row in rows} == {"ours", "theirs"}
    assert all(len(row["expected"].split()) == (4 if row["task"] == "niah_multivalue" else 1) for row in rows)
    with (tmp_path / "needle.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [cell["depth"] for cell in cells[:3]] == ["0.000000", "1.000000", ""]
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_chat_templates_hold_the_question(checkpoints, tmp_path):
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="chat: got a tokenizer without a chat template"):
        haystack_for(tokenizer, chat=True)
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (sample,) = samples_of(haystack_for(tokenizer, chat=True), ["niah_single_1"], [600], [0.5], 1)
    assert (
        sample.prompt.startswith("[user]Secret numbers") and "Answer:[/][assistant]The secret number" in sample.prompt
    )


def test_samples_are_a_task_of_the_harness(checkpoints, tmp_path):
    rows = run_needle(
        checkpoints[:1], tmp_path / "out", "cpu", harness_task=tmp_path / "task", tasks=["niah_single_2"],
        lengths=[500], depths=[0.5], samples=2,
    )  # fmt: skip
    assert rows[0].samples == 2
    lines = [json.loads(line) for line in (tmp_path / "task" / "loglinear_needle.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["prompt"].endswith("is") and len(lines[0]["expected"]) == 1
    namespace: dict = {}
    exec((tmp_path / "task" / "loglinear_needle_scoring.py").read_text(), namespace)
    judged = namespace["process_results"](lines[0], [f" {lines[0]['expected'][0]}"])
    assert judged == {"exact": 1.0, "contained": 1.0}
    with pytest.raises(ValueError, match="one limit for all answers, got 17, 46 tokens"):
        tokenizer = ByteTokenizer()
        mixed = samples_of(haystack_for(tokenizer), ["niah_single_1", "niah_single_3"], [600], [0.5], 1)
        needle.write_harness_task(mixed, tmp_path / "mixed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["niah_single_4"]}, "unknown needle task 'niah_single_4'"),
        ({"tasks": []}, "tasks: got none"),
        ({"lengths": [500, 500]}, "lengths: got 500, 500, wanted each once"),
        ({"samples": 0}, "samples: got 0"),
        ({"labels": ["a", "b"]}, "got 2 labels for 1 models"),
        ({"depths": [2.0]}, "depth: got 2.0"),
    ],
)
def test_what_cannot_be_asked_is_refused(checkpoints, options, message):
    with pytest.raises(ValueError, match=message):
        needle.evaluate_checkpoints(checkpoints[:1], **options)


def test_models_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted the folder of a causal language model"):
        load_any(tmp_path / "absent" / "model")
    with pytest.raises(ValueError, match="at least one model"):
        needle.evaluate_checkpoints([])
    assert score("niah_single_1", "1234567", ["1234567"]).exact and NeedleRow.__dataclass_fields__


@pytest.mark.parametrize("depths", ["a,b", "0,101", "-1", "0,nan"])
def test_depths_are_per_cents(checkpoints, capsys, depths):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "needle", checkpoints[0], "--depths", depths])
    assert ended.value.code == 2 and f"--depths: got '{depths}', wanted per cents" in capsys.readouterr().err
