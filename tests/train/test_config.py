"""The training configuration: values, files, flags that win, and what a resumed run may change."""

import dataclasses
import math
import platform
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from loglinear.train import TrainConfig
from loglinear.train.config import parse_yaml, read_mapping

FLOATS = [name for name, kind in get_type_hints(TrainConfig).items() if kind is float or float in get_args(kind)]


def test_defaults_are_valid_and_every_field_says_what_it_is():
    config = TrainConfig()
    assert config.steps is None and config.epochs is None
    assert all(len(one.metadata["help"]) > 10 for one in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize("suffix", ["yaml", "yml", "toml", "json"])
def test_files_say_the_same(tmp_path, suffix):
    texts = {
        "yaml": "steps: 7\nlearning_rate: 3e-4\ndata: [a.txt, b.txt]\nmodel_options: {num_levels: 4}\n",
        "toml": 'steps = 7\nlearning_rate = 3e-4\ndata = ["a.txt", "b.txt"]\n[model_options]\nnum_levels = 4\n',
        "json": '{"steps": 7, "learning_rate": 3e-4, "data": ["a.txt", "b.txt"], "model_options": {"num_levels": 4}}',
    }
    path = tmp_path / f"config.{suffix}"
    path.write_text(texts.get(suffix, texts["yaml"]))
    wanted = TrainConfig(steps=7, learning_rate=3e-4, data=["a.txt", "b.txt"], model_options={"num_levels": 4})
    assert TrainConfig.from_file(path) == wanted


def test_save_and_read_back(tmp_path):
    config = TrainConfig(epochs=0.5, data=["é.txt"], hub_subset="en", model_options={"num_levels": 1})
    config.save(tmp_path / "c.yaml")
    assert TrainConfig.from_file(tmp_path / "c.yaml") == config


def test_what_belongs_to_one_call_is_not_saved(tmp_path):
    TrainConfig(resume=True, stop_after=3).save(tmp_path / "c.yaml")
    saved = TrainConfig.from_file(tmp_path / "c.yaml")
    assert saved.resume is False and saved.stop_after is None


def test_replace_takes_back_the_other_length():
    assert TrainConfig(epochs=2).replace(steps=5).epochs is None
    assert TrainConfig(steps=5).replace(epochs=2).steps is None
    with pytest.raises(ValueError, match="steps=5 and epochs=2"):
        TrainConfig(epochs=2).replace(steps=5, epochs=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1e-3}, "unknown training option 'learning_rte'; did you mean 'learning_rate'?"),
        ({"zzz": 1}, "unknown training option 'zzz'; known: output, data"),
        ({"steps": 0}, "steps: got 0, wanted at least 1"),
        ({"steps": 1, "epochs": 1}, "got steps=1 and epochs=1.0, wanted one of them"),
        ({"epochs": 0}, "epochs: got 0.0, wanted more than 0"),
        ({"data": []}, "data: got nothing"),
        ({"sequence_length": 1}, "sequence_length: got 1, wanted at least 2"),
        ({"schedule": "cosin"}, "schedule: got 'cosin', wanted one of 'cosine', 'linear', 'constant'"),
        ({"precision": "fp16"}, "precision: got 'fp16', wanted one of"),
        ({"learning_rate": 0}, "learning_rate: got 0.0, wanted more than 0"),
        ({"learning_rate": 10**400}, "learning_rate: got 1000"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: got 1.0, wanted at least 0 and less than 1"),
        ({"warmup_fraction": 1.5}, "warmup_fraction: got 1.5, wanted 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1, wanted at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_mapping(values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "inf", "nan"], ids=repr)
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got {value}, wanted a finite number$"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    "values",
    [{"steps": "many"}, {"steps": 1.5}, {"steps": True}, {"compile": "yes"}, {"data": [3]}, {"model_options": [1]},
     {"learning_rate": "fast"}, {"output": None}],
    ids=str,
)  # fmt: skip
def test_wrong_types_are_refused(values):
    with pytest.raises(TypeError, match=f"{next(iter(values))}: got "):
        TrainConfig(**values)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        read_mapping(tmp_path / "absent.yaml")
    for name, content, message in [
        ("c.ini", "", "got the suffix '.ini', wanted .yaml"),
        ("c.toml", "= 3", "not TOML"),
        ("c.yaml", "a: [", r"c\.yaml: got a file that cannot be parsed: got 'a: \[', wanted YAML"),
        ("c.json", "{norm_eps: 1}", r"c\.json: got a file that cannot be parsed"),
        ("d.yaml", "- 1", "got a list, wanted keys and values"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_mapping(tmp_path / name)
    for suffix in ("yaml", "toml", "json"):
        (tmp_path / f"latin.{suffix}").write_bytes("é".encode("latin-1"))
        with pytest.raises(ValueError, match=rf"latin\.{suffix}: got a file that .*'utf-8' codec can't decode"):
            read_mapping(tmp_path / f"latin.{suffix}")
    (tmp_path / "empty.yaml").write_text("")
    assert read_mapping(tmp_path / "empty.yaml") == {}


def test_resuming_allows_only_what_changes_no_result():
    saved = TrainConfig(steps=10)
    saved.replace(steps=20, save_every=3, output="elsewhere", tensorboard=False).check_resumes(saved)
    with pytest.raises(ValueError, match=r"learning_rate: saved 0\.001, now 0\.1; seed|seed: saved 0, now 1"):
        saved.replace(learning_rate=0.1, seed=1).check_resumes(saved)


def test_what_a_resumed_run_does_otherwise():
    saved = TrainConfig(steps=10)
    assert saved.replace(steps=20, output="elsewhere", resume=True, stop_after=1).resumed_otherwise(saved) == []
    changed = saved.replace(workers=2, evaluation_rows=0).resumed_otherwise(saved)
    assert changed == ["workers: 2 (was 0)", "evaluation_rows: 0 (was 64)"]


@pytest.mark.parametrize("text", ["1e-05", "1e5", "-2.5e3", "+1.E-3", ".5e1"])
def test_exponents_are_floats_and_texts_like_them_stay_texts(tmp_path, text):
    value = parse_yaml(f"{{norm_eps: {text}}}")["norm_eps"]
    assert type(value) is float and value == float(text)
    config = TrainConfig(hub_split=text, model_options={"norm_eps": value, "mixer": text})
    config.save(tmp_path / "c.yaml")
    assert TrainConfig.from_file(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "12ab"])
def test_what_is_no_number_stays_a_text(text):
    assert parse_yaml(text) == text


def test_a_value_that_is_no_yaml_is_refused():
    with pytest.raises(ValueError, match=r"^got '\[1, ', wanted YAML: [^\n]+$"):
        parse_yaml("[1, ")


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"), reason="a setting of the processor"
)
def test_subnormal_numbers_are_zero_in_all_threads_of_a_run_on_the_processor():
    """In a process of its own, which has begun no threads yet; enough numbers that two of them share the work."""
    program = (
        "import torch; from loglinear.train.checkpoints import choose_device; torch.set_num_threads(2);"
        "choose_device('cpu'); print(int((torch.full((2**20,), 2.0**-126) / 4 != 0).sum()))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"
