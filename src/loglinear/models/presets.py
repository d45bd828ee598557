"""Named configurations: the models of the paper (arXiv 2506.04761, section 4.2), and small ones for tests,
quickstart and one GPU."""

from typing import Any

_PAPER: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 1536,
    "num_hidden_layers": 21,
    "intermediate_size": 4096,
    "max_position_embeddings": 16_384,
}
_PAPER_MAMBA2 = {
    **_PAPER,
    "mixer": "mamba2",
    "num_heads": 48,
    "head_dim": 64,
    "state_size": 128,
    "conv_size": 4,
}
_PAPER_DELTA = {
    **_PAPER,
    "mixer": "gated_deltanet",
    "num_heads": 6,
    "head_dim": 384,
    "state_size": 192,
    "conv_size": 4,
}
_PAPER_TRANSFORMER = {**_PAPER, "mixer": "attention", "num_heads": 24}

# Byte-level vocabulary: 256 bytes and three special tokens.
_BYTES = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}

_TINY: dict[str, Any] = {
    **_BYTES,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}
_TINY_MIXERS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16},
    "gated_deltanet": {"num_heads": 2, "state_size": 16, "head_dim": 32},
    "linear_attention": {"num_heads": 2},
    "retention": {"num_heads": 2, "state_size": 16},
    "gla": {"num_heads": 2},
    "delta_net": {"num_heads": 2},
    "kda": {"num_heads": 2, "state_size": 16},
    "attention": {"num_heads": 2},
}

_QUICKSTART: dict[str, Any] = {
    **_BYTES,
    "mixer": "gated_deltanet",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_heads": 2,
    "state_size": 32,
    "head_dim": 64,
    "intermediate_size": 384,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}

_SMALL: dict[str, Any] = {
    **_BYTES,
    "hidden_size": 512,
    "num_hidden_layers": 10,
    "intermediate_size": 1408,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": True,
}
_SMALL_DELTA = {**_SMALL, "mixer": "gated_deltanet", "num_heads": 4, "state_size": 96, "head_dim": 192}
_SMALL_MAMBA2 = {**_SMALL, "mixer": "mamba2", "num_heads": 16, "head_dim": 64, "state_size": 128}

PRESETS: dict[str, dict[str, Any]] = {
    "transformer-693m": _PAPER_TRANSFORMER,
    "transformer-778m": {**_PAPER_TRANSFORMER, "num_hidden_layers": 24},
    "mamba2-802m": {**_PAPER_MAMBA2, "num_levels": 1},
    "log-linear-mamba2-825m": _PAPER_MAMBA2,
    "gated-deltanet-793m": {**_PAPER_DELTA, "num_levels": 1},
    "log-linear-gated-deltanet-796m": _PAPER_DELTA,
    "small-transformer": {**_SMALL, "mixer": "attention", "num_heads": 8},
    "small-mamba2": {**_SMALL_MAMBA2, "num_levels": 1},
    "small-log-linear-mamba2": _SMALL_MAMBA2,
    "small-gated-deltanet": {**_SMALL_DELTA, "num_levels": 1},
    "small-log-linear-gated-deltanet": _SMALL_DELTA,
    "quickstart-gated-deltanet": {**_QUICKSTART, "num_levels": 1},
    "quickstart-log-linear-gated-deltanet": _QUICKSTART,
    **{f"tiny-{mixer.replace('_', '-')}": {**_TINY, "mixer": mixer, **sizes} for mixer, sizes in _TINY_MIXERS.items()},
}
