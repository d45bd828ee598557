"""Training on the Hugging Face Trainer, and checkpoints.

`train(TrainConfig(...))` runs a training; `load_checkpoint(path)` gives back its model and tokenizer.
"""

import importlib
from typing import TYPE_CHECKING, Any

from loglinear.train.config import TrainConfig

if TYPE_CHECKING:
    from loglinear.train.checkpoints import held_out_corpus, load_checkpoint, resolve_checkpoint
    from loglinear.train.trainer import NonFiniteError, TrainResult, train

__all__ = [
    "NonFiniteError",
    "TrainConfig",
    "TrainResult",
    "held_out_corpus",
    "load_checkpoint",
    "resolve_checkpoint",
    "train",
]

# Imported on first use: they need torch and transformers, which the command line's help does not.
_MODULES = {
    "NonFiniteError": "trainer",
    "TrainResult": "trainer",
    "train": "trainer",
    "held_out_corpus": "checkpoints",
    "load_checkpoint": "checkpoints",
    "resolve_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"loglinear.train.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'loglinear.train' has no attribute {name!r}")
