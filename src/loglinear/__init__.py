"""Log-linear attention: linear attention with a set of states that grows with log T (arXiv 2506.04761)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loglinear.models import LogLinearConfig, LogLinearForCausalLM, LogLinearModel
    from loglinear.ops.interface import log_linear_attention, log_linear_attention_step
    from loglinear.state import FenwickState

__version__ = "0.1.0"

__all__ = [
    "FenwickState",
    "LogLinearConfig",
    "LogLinearForCausalLM",
    "LogLinearModel",
    "log_linear_attention",
    "log_linear_attention_step",
]

# Imported on first use, so that the command line answers --help without loading torch.
_HOME = {
    "FenwickState": "loglinear.state",
    "LogLinearConfig": "loglinear.models",
    "LogLinearForCausalLM": "loglinear.models",
    "LogLinearModel": "loglinear.models",
    "log_linear_attention": "loglinear.ops.interface",
    "log_linear_attention_step": "loglinear.ops.interface",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loglinear' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Also what is not imported yet, for those who complete names with the Tab key."""
    return sorted({*globals(), *__all__})
