"""Small mixers and models that the tests of layers and models share, with sizes that differ between dimensions."""

import torch

from loglinear.layers import MIXERS
from loglinear.models import LogLinearConfig, LogLinearForCausalLM

RECURRENT = [name for name in MIXERS if name != "attention"]
TOLERANCE = 1e-11  # relative, for fp64: two ways to compute one thing

SIZES = {"num_heads": 4, "num_groups": 2, "state_size": 6, "head_dim": 5}
VOCABULARY = 43


def small_config(mixer: str, **overrides) -> LogLinearConfig:
    """A configuration of two blocks; "hybrid" is a Gated DeltaNet whose second block is softmax attention. With
    "windowed" before the mixer, decoding keeps a window of four tokens.
    """
    if mixer.startswith("windowed "):
        return small_config(mixer.removeprefix("windowed "), decoding_window=4, **overrides)
    if mixer == "hybrid":
        attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_head_dim": 6}
        sizes = {**SIZES, "mixer": "gated_deltanet", "attention_layers": [1], **attention}
    elif mixer == "attention":
        sizes = {"mixer": mixer, "num_heads": 4, "num_key_value_heads": 2, "attention_head_dim": 6}
    else:
        sizes = {**SIZES, "mixer": mixer}
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 28,
        "num_hidden_layers": 2,
        "intermediate_size": 36,
        "max_position_embeddings": 64,
        # Large enough that logits of different tokens differ and greedy decoding does not repeat one token.
        "initializer_range": 0.3,
    }
    return LogLinearConfig(**{**fields, **sizes, **overrides})


def small_mixer(mixer: str, **overrides) -> torch.nn.Module:
    """One fp64 mixer layer."""
    return MIXERS[mixer](small_config(mixer, **overrides), 0).double()


def small_model(mixer: str, **overrides) -> LogLinearForCausalLM:
    """A fp64 language model in evaluation mode that never stops by itself."""
    return LogLinearForCausalLM(small_config(mixer, **overrides)).double().eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected` (over 1 if that is zero)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = expected.norm().item() or 1.0
    return (actual - expected).norm().item() / scale
