"""Checkpoints: finding them in the folder of a run, loading what is in them, and the data they were held out
from.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from loglinear.data import Corpus, Documents, load_tokenizer
from loglinear.models.config import LogLinearConfig
from loglinear.train.config import CONFIG_FILE, TrainConfig, read_mapping
from loglinear.train.reporting import quiet_transformers

if TYPE_CHECKING:
    from loglinear.models import LogLinearForCausalLM

# The Trainer writes it last: a checkpoint that has it is whole.
COMPLETION_FILE = "trainer_state.json"
POSITION_FILE = "data_position.json"


def checkpoint_step(path: Path) -> int | None:
    """The step of a folder named `checkpoint-STEP`; None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match.group(1)) if match else None


def newest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder that was written to its end; None where there is
    none.
    """
    output = Path(output)
    found = [path for path in output.glob("checkpoint-*") if checkpoint_step(path) is not None]
    whole = [path for path in found if (path / COMPLETION_FILE).is_file() and (path / "config.json").is_file()]
    return max(whole, key=lambda path: checkpoint_step(path) or 0, default=None)


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder with the model: `path` itself, or the newest checkpoint in it when it is the folder of a
    run.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"got {path}, wanted the folder of a checkpoint or of a training run")
    if (path / "config.json").is_file():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise FileNotFoundError(f"no model in {path}: neither config.json nor a finished checkpoint-STEP folder in it")
    return newest


def load_checkpoint(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    state_dtype: str | None = None,
) -> tuple["LogLinearForCausalLM", PreTrainedTokenizerBase]:
    """Load the model, in evaluation mode, and the tokenizer of a checkpoint.

    Args:
        path: a checkpoint's folder, or a run's (its newest checkpoint is taken).
        state_dtype: in which the model keeps its states, "float32" or "bfloat16" (None: as its configuration says,
            see `LogLinearConfig`).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of another kind of model, or its weights are damaged or not those of its configuration; or
            another `state_dtype`, or any for a model without recurrent states.
    """
    checkpoint = resolve_checkpoint(path)
    changes: dict[str, Any] = {} if state_dtype is None else {"state_dtype": state_dtype}
    model = load_model(checkpoint, dtype=dtype, **changes)
    torch.nn.Module.to(model, device)
    return model.eval(), load_tokenizer(checkpoint)


def load_model(checkpoint: Path, **options: Any) -> "LogLinearForCausalLM":
    """`from_pretrained` with `options`, which by itself takes any configuration for one of ours, and gives weights that
    it does not find new values without an error.

    Raises:
        ValueError: the checkpoint is of another kind of model, or its weights are damaged or not those of its
            configuration.
    """
    from loglinear.models import LogLinearForCausalLM

    kind = read_mapping(checkpoint / "config.json").get("model_type")
    if kind != LogLinearConfig.model_type:
        raise ValueError(f"{checkpoint}: got a model of type {kind!r}, wanted {LogLinearConfig.model_type!r}")
    try:
        with quiet_transformers():
            loaded: Any = LogLinearForCausalLM.from_pretrained(checkpoint, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(f"{checkpoint}: got weights that are damaged, or not all of them: {error}") from error
    model, found = loaded
    wrong = [f"{what} {name}" for what in ("missing", "unexpected") for name in sorted(found[f"{what}_keys"])]
    if wrong:
        shown = ", ".join(wrong[:3]) + ", …" * (len(wrong) > 3)
        raise ValueError(f"{checkpoint}: got weights that are not those of its config.json: {shown}")
    return model


def choose_device(device: str = "auto", precision: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where to run, and in what type: "auto" is the GPU when there is one, and bf16 where a GPU has it.

    If that is the processor, subnormal numbers (below 2^-126 in float32) are zero from here on, in this thread and in
    those that it starts: decays make many, and processors take twice as long for a training step that has them.

    Args:
        device: "auto", "cpu" or "cuda".
        precision: "auto", "bf16" or "fp32".

    Raises:
        ValueError: another word, or "cuda" without a GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, wanted 'auto', 'cpu' or 'cuda'")
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision: got {precision!r}, wanted 'auto', 'bf16' or 'fp32'")
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("device: got 'cuda', but PyTorch finds no GPU here; wanted 'cpu' or 'auto'")
    on_gpu = cuda and device != "cpu"
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16)
    if not on_gpu:
        torch.set_flush_denormal(True)
    return torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if bf16 else torch.float32


def load_corpora(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Corpus, Corpus | None]:
    """The training and the held-out corpus of a run; None where nothing is held out. Tokenizes what is not in
    the cache.
    """
    documents = Documents(
        config.data,
        text_field=config.text_field,
        hub_subset=config.hub_subset,
        hub_split=config.hub_split,
        limit=config.max_documents,
    )
    corpus = Corpus.load(documents, tokenizer, config.cache, on_progress)
    if config.held_out_fraction == 0:
        return corpus, None
    return corpus.split(config.held_out_fraction, config.split_seed)


def train_config_of(path: str | Path) -> TrainConfig:
    """The training configuration saved in a checkpoint or in the folder of a run.

    Raises:
        FileNotFoundError: it was not trained by this library, or the file was removed.
    """
    checkpoint = resolve_checkpoint(path)
    file = checkpoint / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {CONFIG_FILE} in {checkpoint}: the data this model was trained on is not known")
    return TrainConfig.from_file(file)


def held_out_corpus(path: str | Path) -> Corpus:
    """The documents that were held out when a checkpoint was trained, tokenized by its tokenizer.

    Args:
        path: a checkpoint's folder, or a run's.

    Raises:
        FileNotFoundError: no checkpoint, no saved training configuration, or data that is no longer there.
        ValueError: the run held out nothing.
    """
    config = train_config_of(path)
    _, held_out = load_corpora(config, load_tokenizer(resolve_checkpoint(path)))
    if held_out is None:
        raise ValueError(f"the run of {path} held out no documents (held_out_fraction=0)")
    return held_out
