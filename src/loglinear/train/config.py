"""The configuration of a training run: one dataclass, read from YAML or TOML, overridden by flags, saved
beside the checkpoints.

Every field carries its help text; the command line makes its flags from the fields. Imports nothing heavy, so
that `--help` is quick.
"""

import dataclasses
import json
import math
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

CONFIG_FILE = "train_config.yaml"


def _option(panel: str, default: Any, help: str, *, resumable: bool = False) -> Any:
    """A field with its help and the group it is shown in.

    `resumable` fields may differ when a run is resumed. None changes what a step computes (`recompute`: but for
    rounding), except `steps` and `epochs`: the schedule spans the whole run, so another length is another schedule.
    What differs is said when the run goes on. `model` and `model_options` are among them because the model that they
    come to is itself compared with the checkpoint's, and refused if it is another.
    """
    metadata = {"help": help, "panel": panel, "resumable": resumable}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """What a training run does. Values are checked when it is made.

    Raises:
        ValueError: a value out of its range, or a number that is not finite.
        TypeError: a value of the wrong type.

    >>> TrainConfig(steps=100, learning_rate=1e-3).schedule
    'cosine'
    """

    output: str = _option("Output", "runs/train", "Folder for checkpoints, configuration and metrics.", resumable=True)
    # Data
    data: list[str] = _option(
        "Data",
        lambda: ["stdlib"],
        "Training text: a file, directory or glob (text, .jsonl, .parquet), 'stdlib' (the source of Python's "
        "standard library), 'package:NAME' (that of an installed package), or 'hub:OWNER/NAME'. Repeat for several.",
    )
    text_field: str = _option("Data", "text", "Field of JSONL, Parquet and hub data that holds the text.")
    hub_subset: str | None = _option("Data", None, "Subset (configuration) of a hub data set.")
    hub_split: str = _option("Data", "train", "Split of a hub data set.")
    max_documents: int | None = _option("Data", None, "Read at most this many documents.")
    held_out_fraction: float = _option(
        "Data", 0.05, "Share of the documents held out for evaluation, chosen by their content; 0 holds out none."
    )
    split_seed: int = _option("Data", 0, "Another seed holds out other documents.")
    cache: str | None = _option(
        "Data", None, "Folder for tokenized data (default: loglinear in the user's cache folder).", resumable=True
    )
    tokenizer: str = _option("Data", "bytes", "'bytes', or a Hugging Face tokenizer by path or hub name.")
    # What is learned from it, or without it
    task: Literal["text", "mqar"] = _option(
        "Task",
        "text",
        "What is learned: to predict text, or multi-query associative recall (mqar) on sequences that are made on "
        "the spot, of sequence_length tokens.",
    )
    task_options: dict[str, Any] = _option(
        "Task",
        dict,
        "Options of mqar as KEY=VALUE: pairs (numbers of key-value pairs, such as 4,8,16), vocabulary, power (of the "
        "query positions), begins (for each of the pairs the share of the training after which it comes in, such as "
        "0,0,0.5). Repeat for several.",
    )
    # Model
    model: str = _option(
        "Model",
        "quickstart-log-linear-gated-deltanet",
        "A preset's name (an unknown one lists them), or a model configuration (.json, .yaml, .toml).",
        resumable=True,
    )
    model_options: dict[str, Any] = _option(
        "Model", dict, "Model configuration to override, as KEY=VALUE. Repeat for several.", resumable=True
    )
    # What is trained, and for how long
    sequence_length: int = _option(
        "Run",
        1024,
        "Tokens per row; documents are packed into rows, their boundaries kept. Also the model's "
        "max_position_embeddings, and so its number of levels, unless the model file or model options say otherwise.",
    )
    rows: int = _option("Run", 8, "Rows per step on each device, joined to one packed row.")
    accumulation: int = _option("Run", 1, "Gradient accumulation: forward and backward passes per optimiser step.")
    steps: int | None = _option(
        "Run",
        None,
        "Optimiser steps. Give steps or epochs. A run that is resumed with another number follows the schedule of "
        "that number from there on.",
        resumable=True,
    )
    epochs: float | None = _option(
        "Run", None, "Passes over the training data (default: 1 where steps are not given).", resumable=True
    )
    seed: int = _option("Run", 0, "Seed of the initial weights and of the order of the data.")
    # Optimiser
    learning_rate: float = _option("Optimiser", 1e-3, "Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = _option(
        "Optimiser", "cosine", "Learning rate after the warm-up."
    )
    warmup_fraction: float = _option(
        "Optimiser", 0.05, "Share of the steps over which the learning rate rises linearly."
    )
    final_rate_fraction: float = _option(
        "Optimiser", 0.1, "Learning rate at the last step as a share of the peak (cosine and linear)."
    )
    weight_decay: float = _option(
        "Optimiser",
        0.1,
        "Decoupled weight decay; never on norms, biases, decay and time-step parameters or level scales.",
    )
    beta1: float = _option("Optimiser", 0.9, "AdamW's decay of the first moment.")
    beta2: float = _option("Optimiser", 0.95, "AdamW's decay of the second moment.")
    epsilon: float = _option("Optimiser", 1e-8, "AdamW's epsilon.")
    gradient_clip: float = _option("Optimiser", 1.0, "Largest norm of the gradient; 0 does not clip.")
    # Machine
    device: Literal["auto", "cpu", "cuda"] = _option(
        "Machine", "auto", "Where to train: auto takes the GPU when there is one."
    )
    precision: Literal["auto", "bf16", "fp32"] = _option(
        "Machine", "auto", "bf16 is autocast with fp32 weights; auto takes it on GPUs that have it."
    )
    compile: bool = _option(
        "Machine",
        False,
        "Compile the model's blocks with torch.compile: on a GPU almost twice as fast, after a minute at the start.",
    )
    recompute: bool = _option(
        "Machine",
        False,
        "Gradient checkpointing: recompute activations in the backward pass, for less memory.",
        resumable=True,
    )
    workers: int = _option(
        "Machine", 0, "Processes that prepare batches; 0 prepares them in the training process.", resumable=True
    )
    # What is written
    log_every: int = _option("Output", 10, "Steps between lines of metrics.", resumable=True)
    evaluate_every: int = _option(
        "Output", 200, "Steps between held-out evaluations (and one at the end); 0: only at the end.", resumable=True
    )
    evaluation_rows: int = _option("Output", 64, "Held-out rows per evaluation; 0: all.", resumable=True)
    save_every: int = _option(
        "Output", 500, "Steps between checkpoints (and one at the end); 0: only at the end.", resumable=True
    )
    keep_checkpoints: int = _option("Output", 2, "Checkpoints to keep, the newest; 0 keeps all.", resumable=True)
    tensorboard: bool = _option("Output", True, "Write metrics for TensorBoard, too.", resumable=True)
    progress: bool = _option(
        "Output",
        True,
        "Show progress on the terminal. What a resumed run does otherwise than before is said even without it.",
        resumable=True,
    )
    resume: bool = _option(
        "Output",
        False,
        "Go on from the newest checkpoint in the output folder; from the start where there is none. With the same "
        "options, data, versions and kind of machine the run is exactly the one that never stopped. Options that "
        "would make it another run are refused; others that differ are said.",
        resumable=True,
    )
    stop_after: int | None = _option(
        "Output", None, "Stop after this many steps of this call, with a checkpoint; --resume goes on.", resumable=True
    )

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for one in fields(self):
            object.__setattr__(self, one.name, _checked(one.name, getattr(self, one.name), hints[one.name]))
        if not self.data:
            raise ValueError("data: got nothing, wanted at least one source of text")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"got steps={self.steps} and epochs={self.epochs}, wanted one of them")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}, wanted at least {least}")
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted more than 0")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs: got {self.epochs}, wanted more than 0")
        for name in ("held_out_fraction", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 0 and less than 1")
        for name in ("warmup_fraction", "final_rate_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 to 1")
        self._check_task()

    def _check_task(self) -> None:
        if self.task == "text":
            if self.task_options:
                raise ValueError(
                    f"got task_options {self.task_options} with task 'text', which has none; wanted 'mqar'"
                )
            return
        if self.steps is None:
            raise ValueError(f"task {self.task!r} makes sequences without end: wanted steps, got none")
        changed = [one.name for one in fields(self) if one.name in _TEXT_ONLY and not _is_default(self, one)]
        if changed:
            raise ValueError(f"got {', '.join(changed)}, which task {self.task!r} has no use for; wanted task 'text'")
        if self.evaluation_rows < 1:
            raise ValueError(f"evaluation_rows: got 0 (all) with task {self.task!r}, whose sequences have no end")

    def replace(self, **changes: Any) -> "TrainConfig":
        """A copy with some fields changed, checked anew. Giving `steps` takes back `epochs`, and the other way round.

        Raises:
            ValueError: an unknown field, named with its nearest match.
        """
        values = self.to_dict()
        for given, other in (("steps", "epochs"), ("epochs", "steps")):
            if changes.get(given) is not None and changes.get(other) is None:
                values[other] = None
        return self.from_mapping({**values, **changes})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Make a configuration from a mapping.

        Raises:
            ValueError: an unknown key, named with its nearest match.
        """
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                nearest = get_close_matches(str(key), known, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
                raise ValueError(f"unknown training option {key!r}; {hint}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "TrainConfig":
        """Read a configuration from a `.yaml`, `.yml` or `.toml` file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another suffix, a file that cannot be parsed, or an unknown key.
        """
        return cls.from_mapping(read_mapping(path))

    def save(self, path: str | Path) -> None:
        """Write every field as YAML, but for those of a single call: `resume` and `stop_after`."""
        import yaml

        values = self.to_dict()
        del values["resume"], values["stop_after"]
        text = yaml.dump(values, Dumper=_yaml_classes()[1], sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    def check_resumes(self, saved: "TrainConfig") -> None:
        """Refuse to go on as another run.

        Raises:
            ValueError: names every field that differs and is not resumable.
        """
        changed = [
            f"{one.name}: saved {getattr(saved, one.name)!r}, now {getattr(self, one.name)!r}"
            for one in fields(self)
            if not one.metadata["resumable"] and getattr(self, one.name) != getattr(saved, one.name)
        ]
        if changed:
            raise ValueError(
                f"cannot resume: the run in this folder has other values ({'; '.join(changed)}); "
                "give the same ones, or another output folder"
            )

    def resumed_otherwise(self, saved: "TrainConfig") -> list[str]:
        """The resumable fields that differ, as `name: new (was old)`.

        Left out are those that belong to one call, the folder itself, and the length of the run, of which the
        schedule has more to say.
        """
        left_out = ("output", "resume", "stop_after", "steps", "epochs")
        return [
            f"{one.name}: {getattr(self, one.name)!r} (was {getattr(saved, one.name)!r})"
            for one in fields(self)
            if one.metadata["resumable"]
            and one.name not in left_out
            and getattr(self, one.name) != getattr(saved, one.name)
        ]


def _is_default(config: TrainConfig, one: dataclasses.Field) -> bool:
    default = one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
    return getattr(config, one.name) == default


# What only a training on text heeds.
_TEXT_ONLY = (
    "data",
    "text_field",
    "hub_subset",
    "hub_split",
    "max_documents",
    "held_out_fraction",
    "split_seed",
    "cache",
    "tokenizer",
    "epochs",
    "accumulation",
    "recompute",
    "workers",
)

_LEAST = {
    "max_documents": 1,
    "sequence_length": 2,
    "rows": 1,
    "accumulation": 1,
    "steps": 1,
    "weight_decay": 0,
    "gradient_clip": 0,
    "workers": 0,
    "log_every": 1,
    "evaluate_every": 0,
    "evaluation_rows": 0,
    "save_every": 0,
    "keep_checkpoints": 0,
    "stop_after": 1,
    "seed": 0,
    "split_seed": 0,
}


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a `.yaml`, `.yml`, `.toml` or `.json` file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, or a file that holds no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    suffix = path.suffix.lower()
    if suffix == ".toml":
        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: got a file that is not TOML: {error}") from error
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: got the suffix {suffix or '(none)'!r}, wanted .yaml, .yml, .toml or .json")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if suffix == ".json" else parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: got a file that cannot be parsed: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, wanted keys and values")
    return values


def distinct_numbers(name: str, values: Any, kind: type) -> list[Any]:
    """A list of different numbers, as a file has it under `name`.

    Raises:
        ValueError, TypeError: it is not one.
    """
    wanted = "whole numbers" if kind is int else "numbers"
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}: got {values!r}, wanted a list of {wanted}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise TypeError(f"{name}: got {value!r}, wanted {wanted}")
    found = [kind(value) for value in values]
    if len(set(found)) != len(found):
        raise ValueError(f"{name}: got {values}, wanted each number once")
    return found


def parse_yaml(text: str) -> Any:
    """The value that a YAML text says, numbers as YAML 1.2 has them: `1e-6` is a float.

    Raises:
        ValueError: the text is not YAML.

    >>> parse_yaml("{norm_eps: 1e-6, name: 1e-6x}")
    {'norm_eps': 1e-06, 'name': '1e-6x'}
    """
    import yaml

    try:
        return yaml.load(text, Loader=_yaml_classes()[0])
    except yaml.YAMLError as error:
        shown = text if len(text) <= 80 else text[:80] + "…"
        raise ValueError(f"got {shown!r}, wanted YAML: {' '.join(str(error).split())}") from error


@cache
def _yaml_classes() -> tuple[type, type]:
    """A safe loader and dumper that agree on floats.

    PyYAML follows YAML 1.1, in which a float needs a dot and its exponent a sign. The dumper must know what the
    loader reads as a float, to put quotes round a text that looks like one.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    class Dumper(yaml.SafeDumper):
        pass

    floats = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    for one in (Loader, Dumper):
        one.add_implicit_resolver("tag:yaml.org,2002:float", floats, list("-+.0123456789"))
    return Loader, Dumper


def _finite(name: str, value: str | int | float) -> float:
    """The value as a number: the one check of every float field, before those of its range, which NaN may pass."""
    try:
        number = float(value)
    except ValueError:
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), wanted float") from None
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {value}, wanted a finite number")
    return number


def _checked(name: str, value: Any, wanted: Any) -> Any:
    """The value as the field's type, where that loses nothing: 3.0 for 3, and a number that is text."""
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (wanted,) = [one for one in get_args(wanted) if one is not type(None)]
        return _checked(name, value, wanted)
    if origin is Literal:
        if value not in get_args(wanted):
            raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, get_args(wanted)))}")
        return value
    if origin is list:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)) or not all(isinstance(one, (str, Path)) for one in value):
            raise TypeError(f"{name}: got {value!r}, wanted a list of texts")
        return [str(one) for one in value]
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise TypeError(f"{name}: got {value!r}, wanted names with values")
        return dict(value)
    if wanted is str and isinstance(value, Path):
        return str(value)
    if wanted is float and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return _finite(name, value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), wanted {wanted.__name__}")
    return value
