"""Comparisons: every run is whole rows, none runs twice, twins see the same and start equal."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from loglinear.cli import main
from loglinear.data import PackedRows, load_tokenizer
from loglinear.data.needles import NEEDLE_TASKS
from loglinear.evals import comparison
from loglinear.evals.comparison import ComparisonConfig, ComparisonRow, read_rows, run_comparison
from loglinear.models import LogLinearForCausalLM
from loglinear.models.initialization import initialize_by_name
from loglinear.train import TrainConfig, resolve_checkpoint
from loglinear.train.checkpoints import load_corpora

ROOT = Path(__file__).parent.parent.parent
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1, "intermediate_size": 16}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(30):
        words = " ".join(f"word{number * place % 17}" for place in range(400 + 10 * number))
        (folder / f"{number}.txt").write_text(words)
    return folder


def small(texts, **changes) -> dict:
    return {
        "models": {
            "linear": {"mixer": "mamba2", "num_levels": 1, "state_size": 8, **SIZES},
            "levels": {"mixer": "mamba2", "num_levels": 9, "state_size": 8, **SIZES},
            "softmax": {"mixer": "attention", **SIZES},
        },
        "seeds": [0, 1],
        "train": {
            "data": [str(texts)], "cache": str(texts / ".cache"), "held_out_fraction": 0.2, "sequence_length": 256,
            "rows": 1, "steps": 2, "progress": False, "log_every": 1,
        },
        "needles": {
            "share": 0.3, "train_tasks": ["niah_single_1"], "train_lengths": [400, 420], "tasks": ["niah_single_1"],
            "lengths": [400, 450], "depths": [0.0, 1.0], "samples": 1,
        },
        "documents": 3,
        **changes,
    }  # fmt: skip


def config_of(tmp_path, values: dict) -> ComparisonConfig:
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(values))
    return ComparisonConfig.from_file(path)


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """Two seeds of three models, the second call with nothing left to do."""
    folder = tmp_path_factory.mktemp("comparison")
    config, told = config_of(folder, small(texts)), []
    rows = run_comparison(
        config, folder / "rows", folder / "work", "cpu", on_rows=lambda _, done, of: told.append((done, of))
    )
    assert told == [(number, 6) for number in range(1, 7)]
    return config, folder, rows


def only(rows: list[ComparisonRow], **wanted) -> ComparisonRow:
    (row,) = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return row


def test_every_run_is_rows_and_none_runs_twice(done, monkeypatch):
    config, folder, rows = done
    ends = [row for row in rows if row.metric == "run"]
    assert [(row.model, row.seed, row.status, row.count) for row in ends] == [
        (model, seed, "finished", 2) for seed in (0, 1) for model in ("linear", "levels", "softmax")
    ]
    assert all(json.loads(row.detail)["train"]["steps"] == 2 and row.value > 0 and row.date for row in ends)
    for model, levels in (("linear", 1), ("levels", 9)):
        assert only(rows, model=model, seed=0, metric="state_bytes").value == levels * 8 * 32 * 4
        assert only(rows, model=model, seed=0, metric="state_bytes_one_level").value == 8 * 32 * 4
    assert only(rows, model="softmax", seed=0, metric="kv_cache_bytes").value == 2 * 256 * 16 * 2
    for seed in (0, 1):
        buckets = [row for row in rows if (row.model, row.seed, row.metric) == ("levels", seed, "position_loss")]
        assert [(row.position, row.until) for row in buckets][-3:] == [(128, 256), (256, 512), (512, 1024)]
        assert all(row.count == 3 and row.value > 0 for row in buckets)
        shares = [row.value for row in rows if (row.model, row.seed, row.metric) == ("levels", seed, "level_share")]
        assert len(shares) == 9 and sum(shares) == pytest.approx(1, abs=1e-5)
        needles = [row for row in rows if (row.model, row.seed, row.metric) == ("softmax", seed, "needle")]
        assert [(row.position, row.depth, row.count) for row in needles] == [
            (length, depth, count) for length in (400, 450) for depth, count in ((0.0, 1), (1.0, 1), (None, 2))
        ]
        assert only(rows, model="linear", seed=seed, metric="needle_loss", position=400).value > 0
        assert only(rows, model="linear", seed=seed, metric="tokens").value == 512
        speed = only(rows, model="linear", seed=seed, metric="tokens_per_second")
        assert speed.value > 0 and speed.count == 1
    assert len({row.detail for row in rows if row.metric == "corpus_tokens"}) == 1
    monkeypatch.setattr(comparison, "train", lambda *_, **__: pytest.fail("ran again"))
    assert run_comparison(config, folder / "rows", folder / "elsewhere", "cpu") == rows


def test_runs_of_other_settings_count_for_nothing(done, texts, tmp_path):
    _, folder, rows = done
    shutil.copytree(folder / "rows", tmp_path / "rows")
    config, told = (
        config_of(tmp_path, small(texts, models={"linear": small(texts)["models"]["linear"]}, seeds=[1, 2])),
        [],
    )
    found = run_comparison(
        config, tmp_path / "rows", tmp_path / "work", "cpu", on_rows=lambda _, done, of: told.append((done, of))
    )
    assert told == [(2, 2)] and {(row.model, row.seed) for row in found} == {("linear", 1), ("linear", 2)}
    assert set(comparison.read_rows(tmp_path / "rows" / comparison.ROWS_FILE)) == {*rows, *found}


def test_runs_side_by_side_are_those_in_turn(done, tmp_path):
    config, _, rows = done
    told, folders = [], (tmp_path / "rows", tmp_path / "work")
    found = run_comparison(config, *folders, "cpu", workers=2, on_rows=lambda _, done, of: told.append((done, of)))
    assert told == [(number, 6) for number in range(1, 7)]
    place = ("model", "seed", "settings", "metric", "task", "position", "until", "depth")
    losses = ("training_loss", "held_out_loss", "position_loss", "needle_loss")
    ours, theirs = (
        {tuple(getattr(row, name) for name in place): row.value for row in those if row.metric in losses}
        for those in (found, rows)
    )
    assert len(ours) > 60 and ours == pytest.approx(theirs, rel=1e-4)
    assert {row.count for row in found if row.metric == "tokens_per_second"} == {2}
    with pytest.raises(ValueError, match="workers: got 0, wanted at least 1"):
        run_comparison(config, *folders, "cpu", workers=0)


def test_each_worker_sees_one_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert comparison._visible_device(2) == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert comparison._visible_device(1) == "7"


def test_a_run_that_was_cut_off_is_run_again(done, tmp_path):
    config, folder, rows = done
    path = tmp_path / "comparison.csv"
    whole = (folder / "rows" / "comparison.csv").read_text()
    path.write_text(whole[: whole.rindex(",run,") - 40])
    assert {row.key for row in rows} - {row.key for row in read_rows(path)} == {config.runs()[-1].key}
    told = []
    again = run_comparison(
        config, tmp_path, folder / "work", "cpu", on_begin=lambda run, *_: told.append((run.model, run.seed))
    )
    assert told == [("softmax", 1)] and {row.key for row in again} == {row.key for row in rows}
    # it went on from the checkpoint that is there, at which nothing was left to train
    ours, theirs = (only(found, model="softmax", seed=1, metric="held_out_loss").value for found in (again, rows))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_twins_see_the_same_rows_and_start_from_the_same_weights(done):
    config, folder, _ = done
    runs = {(run.model, run.seed): run for run in config.runs()}
    orders, weights = {}, {}
    for (model, seed), run in runs.items():
        training = TrainConfig.from_file(next((folder / "work").glob(f"{model}-seed{seed}-*")) / "train_config.yaml")
        assert training.seed == seed and training.data[-1].endswith("needles.jsonl")
        corpus, _ = load_corpora(training, load_tokenizer("bytes"))
        packed = PackedRows(corpus, training.sequence_length, training.seed)
        orders[model, seed] = [packed[number].tokens.tolist() for number in range(4)]
        network = LogLinearForCausalLM(run.model_config())
        initialize_by_name(network, seed)
        weights[model, seed] = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert orders["linear", 0] == orders["levels", 0] == orders["softmax", 0] != orders["linear", 1]
    shared = [name for name in weights["linear", 0] if name in weights["levels", 0]]
    assert len(shared) == len(weights["linear", 0]) < len(weights["levels", 0])
    for name in shared:
        assert torch.equal(weights["linear", 0][name], weights["levels", 0][name]), name
    assert not torch.equal(weights["linear", 0]["lm_head.weight"], weights["linear", 1]["lm_head.weight"])


def test_a_share_of_the_training_is_needles_and_none_of_the_evaluation(done, texts):
    config, folder, rows = done
    lines = [json.loads(line)["text"] for line in (folder / "work" / "needles.jsonl").read_text().splitlines()]
    real = only(rows, model="linear", seed=0, metric="corpus_tokens")
    read = sum(len(line) + 1 for line in lines)
    assert read / (read + real.value) == pytest.approx(0.3, abs=0.02)
    for line in lines:
        text, answer = line.rsplit(" is ", 1)
        assert f" is {answer[:-2]}." in text and answer.endswith(".\n")
    held_out = only(rows, model="linear", seed=0, metric="held_out_tokens")
    assert held_out.count + real.count == 30


def test_drills_are_a_share_of_the_needles_and_part_of_the_settings_where_there_are_any(done, texts, tmp_path):
    plain, values = done[0], small(texts, seeds=[0])
    values["needles"] |= {"drill_share": 0.6, "drill_lengths": [256, 400]}
    config = config_of(tmp_path, values)
    assert "drill" not in plain.runs()[0].settings() and config.runs()[0].key != plain.runs()[0].key
    examiner = comparison._Examiner(config, tmp_path, torch.device("cpu"))
    lines = [json.loads(line)["text"] for line in (tmp_path / "needles.jsonl").read_text().splitlines()]
    sizes = {drill: sum(len(line) + 1 for line in lines if line.startswith("Secret") != drill) for drill in (0, 1)}
    whole = examiner.real.num_tokens + sum(sizes.values())
    assert sizes[1] / sum(sizes.values()) == pytest.approx(0.6, abs=0.02)
    assert sum(sizes.values()) / whole == pytest.approx(0.3, abs=0.02)
    assert not any(value in line for line in lines for sample in examiner.samples for value in sample.expected)


def test_time_is_heeded_as_far_as_it_is_known(done, tmp_path, monkeypatch):
    config, folder, rows = done
    path = tmp_path / "comparison.csv"
    whole = (folder / "rows" / "comparison.csv").read_text().splitlines(keepends=True)
    ends = [number for number, line in enumerate(whole) if ",run," in line]
    path.write_text("".join(whole[: ends[2] + 1]))
    slow = [dataclasses.replace(row, value=100.0) if row.metric == "run" else row for row in read_rows(path)]
    monkeypatch.setattr(comparison, "read_rows", lambda _: slow)
    begun = []
    run_comparison(config, tmp_path, folder / "work", "cpu", seconds=99, on_begin=lambda run, *_: begun.append(run.key))
    assert begun == []
    # another rate of a model takes as long as the model
    tuned = dataclasses.replace(config, learning_rates=[*config.rates_of("linear"), 0.5])
    known = [dataclasses.replace(row, value=7.0) if row.model == "linear" else row for row in slow]
    device = known[-1].device
    seconds = {
        run.model: comparison._expected_seconds(known, run, device) for run in tuned.runs() if run.learning_rate == 0.5
    }
    assert seconds == {"linear": 7.0, "levels": 100.0, "softmax": 100.0}
    with pytest.raises(ValueError, match="seconds: got -1"):
        run_comparison(config, tmp_path, folder / "work", "cpu", seconds=-1)


def test_what_goes_wrong_is_rows_too(texts, tmp_path, monkeypatch):
    values = small(texts, seeds=[0], needles={})
    values["models"] = {"softmax": values["models"]["softmax"]}
    values["train"] = {**values["train"], "learning_rate": 1e30, "gradient_clip": 0, "steps": 4}
    config = config_of(tmp_path, values)
    rows = run_comparison(config, tmp_path / "rows", tmp_path / "work", "cpu")
    assert rows[-1].status == "diverged" and "was not finite" in rows[-1].detail and rows[-1].value is not None
    assert not any(row.metric == "held_out_loss" for row in rows)
    monkeypatch.setattr(comparison, "train", lambda *_, **__: pytest.fail("a diverged run is done"))
    assert run_comparison(config, tmp_path / "rows", tmp_path / "work", "cpu") == rows

    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(comparison, "train", broken)
    values["train"]["learning_rate"] = 1e-3
    config = config_of(tmp_path, values)
    rows = run_comparison(config, tmp_path / "rows", tmp_path / "work2", "cpu")
    assert (rows[-1].status, rows[-1].detail) == ("failed", "RuntimeError: out of luck")
    monkeypatch.undo()
    rows = run_comparison(config, tmp_path / "rows", tmp_path / "work2", "cpu")
    assert rows[-1].status == "finished" and sum(row.metric == "run" for row in rows) == 1


def test_a_run_is_compiled_however_many_were_before(texts, tmp_path, monkeypatch):
    """torch runs a function as it is when it has compiled it eight times, for whatever models these were."""
    compiled, names = [], itertools.count()

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    @torch.compile(backend=backend)
    def block(x, name):
        return x + len(name)

    def training(*_, **__):
        for _ in range(3):
            block(torch.ones(1), f"model {next(names)}")
        raise RuntimeError("trained")

    monkeypatch.setattr(comparison, "train", training)
    run_comparison(config_of(tmp_path, small(texts)), tmp_path / "rows", tmp_path / "work", "cpu")
    assert len(compiled) == next(names) == 3 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models: got {}"),
        ({"seeds": [1, 1]}, "seeds: got"),
        ({"models": {"m": {"mixer": "mamba3"}}}, "models.m: .*did you mean 'mamba2'"),
        ({"train": {"rows": 2}}, "train: got no steps"),
        ({"train": {"steps": 2, "seed": 1}}, "train: got seed, which is not for all runs"),
        ({"train": {"steps": 2, "row": 1}}, "unknown training option 'row'; did you mean 'rows'"),
        ({"longest": 0}, "longest: got 0"),
        ({"needles": {"share": 0.5}}, "a share without train_tasks"),
        ({"needles": {"share": 0.5, "drill_share": 1.5, "drill_lengths": [512]}}, "needles.drill_share: got 1.5"),
        ({"needles": {"share": 0.5, "drill_share": 0.9, "drill_lengths": [512]}}, "a share without train_tasks"),
        ({"needles": {"share": 0.5, "drill_share": 1.0}}, "got one of drill_share and drill_lengths"),
        ({"needles": {"drill_lengths": [512]}}, "got one of drill_share and drill_lengths"),
        ({"needles": {"drill_share": 1.0, "drill_lengths": [512]}}, "got drill_share without a share"),
        ({"needles": {"tasks": ["niah_9"], "lengths": [500]}}, "unknown task 'niah_9'"),
        ({"needles": {"tasks": ["niah_single_1"]}}, "got one of tasks and lengths"),
        ({"needles": {"part": 1}}, "unknown key 'needles.part'"),
        ({"seed": 1}, "unknown key 'seed'"),
        ({"learning_rates": [1e-3, -1]}, "wanted numbers above 0"),
        ({"learning_rates": [1e-3, 1e-3]}, "wanted each number once"),
        ({"learning_rates": 1e-3}, "learning_rates: got 0.001, wanted a list of numbers"),
        ({"learning_rates": None}, "learning_rates: got None, wanted a list"),
        ({"learning_rates": [1e-2, 1e-1]}, "without 0.001, the rate of models without another"),
        (
            {"learning_rates": [1e-3, 1e-2], "chosen_rates": {"levels": 0.1}},
            "chosen_rates.levels: got 0.1, wanted one or more of",
        ),
        ({"learning_rates": [1e-3, 1.0], "chosen_rates": {"levels": True}}, "chosen_rates.levels: got True"),
        ({"learning_rates": [1e-3], "chosen_rates": {"levels": None}}, "chosen_rates.levels: got None"),
        ({"learning_rates": [1e-3], "chosen_rates": {"levels": []}}, r"chosen_rates.levels: got \[\]"),
        (
            {"learning_rates": [1e-3], "chosen_rates": {"levels": [1e-3, 0.1]}},
            "chosen_rates.levels: got .*, wanted one or more of",
        ),
        ({"learning_rates": [1e-3], "chosen_rates": {"levels": [1e-3, 1e-3]}}, "wanted each rate once"),
        ({"learning_rates": [1e-3], "chosen_rates": {"other": 1e-3}}, "chosen_rates: got 'other'"),
        ({"learning_rates": [1e-3], "chosen_rates": ["levels"]}, "chosen_rates: got .*, wanted names of models with"),
        (
            {"chosen_rates": {"levels": 1e-3}},
            r"chosen_rates.levels: got 0.001, wanted one or more of learning_rates: \[\]",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_is_refused(texts, tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        config_of(tmp_path, small(texts, **changes))


def test_rates_are_tried_with_the_first_seed_and_the_others_take_the_chosen_one(texts, tmp_path):
    train = {**small(texts)["train"], "learning_rate": 1e-3}
    alone = config_of(tmp_path, small(texts, train=train))
    tuned = config_of(tmp_path, small(texts, train=train, learning_rates=[1e-3, 1e-2], chosen_rates={"levels": 1e-2}))
    found = [(run.model, run.seed, run.learning_rate) for run in tuned.runs()]
    chosen = [(run.model, run.seed, run.learning_rate) for run in tuned.chosen_runs()]
    assert chosen == [
        (model, seed, rate)
        for seed in (0, 1)
        for model, rate in (("linear", 1e-3), ("levels", 1e-2), ("softmax", 1e-3))
    ]
    assert found[:6] == chosen and sorted(found[6:]) == [("levels", 0, 1e-3), ("linear", 0, 1e-2), ("softmax", 0, 1e-2)]
    # runs that were measured before anything was tuned are those at their rate
    keys = {(run.model, run.seed): run.key for run in alone.runs()}
    assert all((keys[model, seed] == run.key) == (run.learning_rate == 1e-3)
               for run in tuned.runs() for model, seed in [run.key[:2]])  # fmt: skip
    assert [run.training.learning_rate for run in tuned.runs()] == [rate for _, _, rate in found]


def test_of_several_rates_the_one_with_the_lowest_mean_counts(texts, tmp_path):
    rates = {"levels": [1e-3, 1e-2]}
    values = small(texts, learning_rates=[1e-3, 1e-2, 1e-1], chosen_rates=rates)
    config = config_of(tmp_path, {**values, "train": {**values["train"], "learning_rate": 1e-3}})
    of_levels = [(run.seed, run.learning_rate) for run in config.chosen_runs() if run.model == "levels"]
    assert of_levels == [(0, 1e-3), (0, 1e-2), (1, 1e-3), (1, 1e-2)]
    assert len(config.runs()) == 8 + 5 and len({run.key for run in config.runs()}) == 13

    def rows(losses):
        found = []
        for run in config.chosen_runs():
            loss = losses.get((run.seed, run.learning_rate))
            given = {"model": run.model, "seed": run.seed, "settings": run.key[2]}
            if run.model == "levels" and loss is not None:
                status = "finished" if loss else "diverged"
                found += [ComparisonRow(**given, metric="held_out_loss", value=loss)] if loss else []
                found.append(ComparisonRow(**given, metric="run", status=status))
        return found

    losses = {(0, 1e-3): 1.0, (1, 1e-3): 1.3, (0, 1e-2): 1.1, (1, 1e-2): 1.1}
    assert config.best_rate("levels", rows(losses)) == 1e-2
    assert config.best_rate("levels", rows({**losses, (1, 1e-2): 0})) == 1e-3, "a run that diverged"
    assert config.best_rate("levels", rows({**dict.fromkeys(losses, 0), (0, 1e-2): 1.1, (1, 1e-2): None})) == 1e-2
    del losses[1, 1e-2]
    assert config.best_rate("levels", rows(losses)) == 1e-3, "a seed is missing"
    assert config.best_rate("levels", []) == config.best_rate("linear", []) == 1e-3


def test_documents_that_are_missing_are_found_out_before_a_training(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match="no document has more than 90000 tokens"):
        run_comparison(config_of(tmp_path, small(texts, longest=90_000)), tmp_path, tmp_path / "work", "cpu")
    values = small(texts)
    values["train"]["held_out_fraction"] = 0
    with pytest.raises(ValueError, match="held_out_fraction: got 0"):
        run_comparison(config_of(tmp_path, values), tmp_path, tmp_path / "work", "cpu")


def test_needles_without_drills_stay_the_runs_that_were_measured():
    """Rows from before there were drills are of settings that do not name them."""
    config = ComparisonConfig.from_file(ROOT / "experiments" / "language-asked-once.yaml")
    rows = read_rows(ROOT / "benchmarks" / "language-asked-once" / comparison.ROWS_FILE)
    assert {run.key for run in config.runs()} == {row.key for row in rows}


@pytest.mark.parametrize("name", ["language.yaml", "language-tiny.yaml"])
def test_committed_files_can_be_read_and_their_twins_differ_in_levels_alone(name):
    path = ROOT / "experiments" / name
    config = ComparisonConfig.from_file(path)
    runs = config.runs()
    assert f"{len(runs)} runs" in path.read_text() and len({run.key for run in runs}) == len(runs)
    length = config.training(0).sequence_length
    made = {run.model: run.model_config() for run in runs}
    for mixer in ("mamba2", "gated-deltanet"):
        plain, levels = made[mixer], made[f"log-linear-{mixer}"]
        differing = {key for key in plain.field_names() if getattr(plain, key) != getattr(levels, key)}
        assert differing == {"num_levels"} and plain.num_levels == 1 and 2 ** (levels.num_levels - 1) == length
    parameters = [model.cost(length).parameters for model in made.values()]
    if name == "language.yaml":
        assert 20e6 < min(parameters) < max(parameters) < 1.1 * min(parameters)
        assert config.positions == 4 * length == max(config.needles.lengths)
        assert set(config.needles.tasks) <= set(config.needles.train_tasks) <= set(NEEDLE_TASKS)
    assert config.needles.drill_share and max(config.needles.drill_lengths) <= length


def test_the_command_runs_and_tells_what_is_left(texts, tmp_path, capsys):
    path = tmp_path / "comparison.json"
    values = small(texts, seeds=[0], needles={})
    values["models"] = {"softmax": values["models"]["softmax"]}
    path.write_text(json.dumps(values))
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(path), "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device",
              "cpu"])  # fmt: skip
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "1/1 · softmax, seed 0 · held-out loss" in shown and "tokens/s" in shown and "left" not in shown
    assert resolve_checkpoint(next((tmp_path / "work").glob("softmax-*")))
