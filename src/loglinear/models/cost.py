"""What a model costs, from its configuration alone: parameters, arithmetic and memory.

    T tokens of context · L levels · H heads · K key width · V value width · G groups · C tokens per chunk

Conventions. A multiplication and its addition are two FLOPs. Training counts the forward pass and twice that
for the backward one, no recomputation. Only matrix products are counted (projections, head, attention,
operator); norms, activations and convolutions are a few per cent at most. Attention is causal: a token meets
half the context on average.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loglinear.fenwick import full_num_levels, occupied
from loglinear.layers import MIXERS, Attention, RecurrentMixer
from loglinear.layers.precision import state_dtype_for
from loglinear.window import length_for

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig

CHUNK = 64  # tokens per chunk that the operator's training cost is counted with


@dataclass(frozen=True)
class Cost:
    """Cost of one model.

    Attributes:
        length: the context T that the rest is for.
        parameters: all of them, tied ones once.
        parameters_non_embedding: without the embedding and the output head.
        training_flops_per_token: forward and backward, averaged over a sequence of T tokens.
        decoding_flops_per_token: one token, averaged over the positions from 0 to T - 1.
        state_bytes: bytes of recurrent state per sequence as allocated, buckets of all levels, in the dtype that
            they are kept in (see `LogLinearConfig.state_dtype`); the newest tokens of a window are not counted.
        occupied_state_bytes: bytes of those buckets that hold tokens, averaged over the positions from 0 to
            T - 1; what a decoding step has to read.
        kv_cache_bytes: bytes of keys and values per sequence at T: those of this model's attention layers, if
            it has any; else what a softmax model with as many layers of the same width (heads of any size,
            ungrouped) would keep, for comparison.
        conv_bytes: bytes of the short convolutions' state per sequence.
    """

    length: int
    parameters: int
    parameters_non_embedding: int
    training_flops_per_token: int
    decoding_flops_per_token: int
    state_bytes: int
    occupied_state_bytes: int
    kv_cache_bytes: int
    conv_bytes: int


@functools.lru_cache
def mean_occupied(length: int, num_levels: int) -> float:
    """How many buckets hold tokens, on average over the positions from 0 to `length` - 1."""
    block = 1024 * 1024
    starts = range(0, length, block)
    positions = (torch.arange(start, min(start + block, length), device="cpu") for start in starts)
    return sum(int(torch.as_tensor(occupied(part, num_levels)).sum()) for part in positions) / length


def count_parameters(config: LogLinearConfig) -> tuple[int, int, int]:
    """(all parameters, those outside embedding and head, those in matrices that every token is multiplied with),
    counted on the meta device."""
    from loglinear.models.model import LogLinearForCausalLM

    with torch.device("meta"):
        model = LogLinearForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = config.vocab_size * config.hidden_size
    non_embedding = total - embedding * (1 if config.tie_word_embeddings else 2)
    matrices = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.ndim > 1)
    return total, non_embedding, matrices + embedding


def _operator_training_flops(mixer: type[RecurrentMixer], config: LogLinearConfig, length: int) -> float:
    """FLOPs per token of the forward pass of one layer's operator, tree algorithm (docs/math.md) with chunks
    of CHUNK tokens."""
    heads, groups, key, value = config.num_heads, config.num_groups, config.state_size, config.head_dim
    chunk = min(CHUNK, length)
    delta, channel = "beta" in mixer.uses, "channel_decay" in mixer.uses
    score_heads = heads if channel else groups  # with a decay per channel the scores differ between heads
    flops = 2.0 * chunk * key * score_heads  # scores
    flops += 2.0 * chunk * value * heads  # scores times values
    flops += 2.0 * key * value * heads  # what a chunk adds to the state
    # A chunk reads a node for every set bit of its number, half of them; from the height of the last level on, one
    # state stands for all that is older, and is read by every chunk that has something older.
    heights = max(0, full_num_levels(length) - full_num_levels(chunk))
    below = min(heights, max(0, config.num_levels - 1 - full_num_levels(chunk)))
    reads = below / 2 + 1 - 0.5 ** (heights - below)
    flops += 2.0 * reads * key * value * heads
    if delta:
        flops += 2.0 * chunk * (2 * key + value + chunk) * heads  # k k^T, W, T v, scores times T
        flops += 2.0 * (key * key + chunk * key) * heads  # the chunk's transition
        flops += 2.0 * reads * key * key * heads  # the query passes through the nodes that it reads
        flops += 2.0 * heads * key * key * (key + value) / chunk  # composing nodes on the way up
    return flops


def _operator_decoding_flops(mixer: type[RecurrentMixer], config: LogLinearConfig, length: int) -> float:
    """FLOPs of one step of one layer's operator: every occupied bucket is read, decayed and, for delta,
    corrected."""
    buckets = 1 + mean_occupied(length, config.num_levels)
    per_element = 2 + (1 if "decay" in mixer.uses else 0) + (4 if "beta" in mixer.uses else 0)
    return float(per_element * buckets * config.num_heads * config.state_size * config.head_dim)


def cost(
    config: LogLinearConfig,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Cost:
    """The cost of a model of `config`.

    Args:
        config: the configuration; no weights are built.
        length: context T, at least 1. Default: `config.max_position_embeddings`.
        dtype: of weights and caches. Default: bf16.
        device: where it decodes, which has a say in what states are kept in. Default: a GPU.

    Raises:
        ValueError: length is smaller than 1.
    """
    length = config.max_position_embeddings if length is None else length
    dtype = torch.bfloat16 if dtype is None else dtype
    window = length_for(config.decoding_window, torch.device("cuda" if device is None else device))
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    parameters, non_embedding, multiplied = count_parameters(config)
    forward, decoding = 2.0 * multiplied, 2.0 * multiplied
    state, filled, cached, convolution = 0, 0, 0, 0
    attention_layers = 0
    for name in config.mixers:
        mixer = MIXERS[name]
        if issubclass(mixer, Attention):
            attention_layers += 1
            width = config.num_attention_heads * config.attention_head_dim
            forward += 4.0 * width * (length + 1) / 2
            decoding += 4.0 * width * (length + 1) / 2
            cached += 2 * length * config.num_key_value_heads * config.attention_head_dim * dtype.itemsize
            continue
        forward += _operator_training_flops(mixer, config, length)
        decoding += _operator_decoding_flops(mixer, config, length)
        full, channel = config.full_partition, "channel_decay" in mixer.uses
        kept_in = state_dtype_for(config.state_dtype, dtype, window=window, full=full, channel_decay=channel)
        bucket = config.num_heads * config.state_size * config.head_dim * kept_in.itemsize
        state += config.num_levels * bucket
        filled += round(mean_occupied(length, config.num_levels) * bucket)
        channels = 2 * config.num_groups * config.state_size + config.num_heads * config.head_dim
        convolution += max(config.conv_size - 1, 0) * channels * dtype.itemsize
    if not attention_layers:
        cached = 2 * length * config.hidden_size * config.num_hidden_layers * dtype.itemsize
    return Cost(
        length=length,
        parameters=parameters,
        parameters_non_embedding=non_embedding,
        training_flops_per_token=round(3 * forward),
        decoding_flops_per_token=round(decoding),
        state_bytes=state,
        occupied_state_bytes=filled,
        kv_cache_bytes=cached,
        conv_bytes=convolution,
    )
