"""Caches in files: what a model has read, kept for another day or another machine.

A file is a safetensors file. Of every block it holds the convolution's inputs, the *occupied* buckets (a state has
none at about half of its levels) and what steps keep beside them (pending decays, or a window of tokens), or the keys
and values up to the longest row, and the positions; its header says which model wrote it, because a state means nothing
to another.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache

from loglinear.layers.state import AttentionState, MixerState, RecurrentState
from loglinear.models.cache import cache_layers, new_cache
from loglinear.state import FenwickState
from loglinear.window import Window

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig
    from loglinear.models.model import LogLinearForCausalLM

FORMAT = "loglinear-cache-1"
# Weights of every parameter that are compared to tell one model from another.
SAMPLED_WEIGHTS = 64
# What a configuration says beside the model itself.
NOT_OF_THE_MODEL = (
    "initializer_range",
    "rescale_residual_init",
    "use_cache",
    "max_position_embeddings",
    "state_dtype",
    "decoding_window",
)


class SavedCache(NamedTuple):
    """What a file holds.

    Attributes:
        cache: growing or static, as it was saved.
        tokens: `[B, T]` or `[T]` ids saved with it, on the CPU; None where none were.
        notes: texts saved with it.
    """

    cache: Cache
    tokens: Tensor | None
    notes: dict[str, str]


def save_cache(
    cache: Cache,
    model: LogLinearForCausalLM,
    path: str | Path,
    *,
    tokens: Tensor | None = None,
    notes: dict[str, str] | None = None,
) -> None:
    """Write a cache of `model` to a file. A saved state that is there is replaced once the new one is whole; any other
    file is left alone.

    Args:
        tokens: int64 ids to keep with it (`generate` wants them to go on).
        notes: texts to keep with it.

    Raises:
        TypeError, ValueError: the cache is not one of this model.
        FileExistsError: there is a file that is no saved state.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not _is_saved(path):
        raise FileExistsError(f"{path} is there and is no saved state: choose another name")
    tensors: dict[str, Tensor] = {}
    capacities = []
    layers = cache_layers(cache, model.config)
    for index, layer in enumerate(layers):
        capacities.append(layer.max_cache_len)
        parts = {} if layer.state is None else _state_tensors(layer.state)
        if layer.newest_output is not None:
            parts["newest_output"] = layer.newest_output
        tensors.update({f"{index}.{name}": tensor.detach().cpu().contiguous() for name, tensor in parts.items()})
    if tokens is not None:
        tensors["tokens"] = tokens.to("cpu", torch.int64).contiguous()
    header = {
        "model": _model_fields(model.config),
        "dtype": str(model.dtype),
        "weights": weights_fingerprint(model),
        "columns": int(layers[0].cumulative_length),
        "capacity": capacities[0],
        "notes": notes or {},
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            save_file(tensors, unfinished, metadata={"format": FORMAT, "header": json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_cache(path: str | Path, model: LogLinearForCausalLM, device: torch.device | str | None = None) -> Cache:
    """A cache that `save_cache` wrote, to go on from with the same model, on `device` (default: the model's).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of ours, or one that another model wrote: another configuration, other weights or
            another dtype.
    """
    return load_saved(path, model, device).cache


def load_saved(path: str | Path, model: LogLinearForCausalLM, device: torch.device | str | None = None) -> SavedCache:
    """As `load_cache`, with the tokens and notes that were saved."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no saved state {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a saved state: its format is {metadata.get('format')!r}, not {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a saved state, or is damaged: {error}") from error
    try:
        header = json.loads(metadata["header"])
        difference = _difference(header, model)
        if difference is None:
            cache = _cache_from(tensors, header, model.config, model.device if device is None else device)
            return SavedCache(cache, tensors.get("tokens"), header["notes"])
    except (KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error
    raise ValueError(f"{path} was saved by {difference}")


def _cache_from(
    tensors: dict[str, Tensor], header: dict[str, Any], config: LogLinearConfig, device: torch.device | str
) -> Cache:
    """The cache that was taken apart into `tensors`. What is missing is a KeyError, a wrong shape a RuntimeError."""
    capacity, columns = header["capacity"], header["columns"]
    cache = new_cache(config) if capacity is None else StaticCache(config=config, max_cache_len=capacity)
    for index, layer in enumerate(cache_layers(cache, config)):
        prefix = f"{index}."
        parts = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if not parts:
            layer.advance(columns)
            continue
        if config.mixers[index] == "attention":
            state = _attention_state(parts, capacity, config)
        else:
            state = _recurrent_state(parts, config)
        layer.record(state.to(device), columns)
        if "newest_output" in parts:
            layer.record_output(parts["newest_output"].to(device))
    return cache


def weights_fingerprint(model: LogLinearForCausalLM) -> str:
    """A short hash of some weights of every parameter: another one after any step of training."""
    digest = hashlib.blake2b(digest_size=16)
    samples = []
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // SAMPLED_WEIGHTS)
        samples.append(flat[::stride][:SAMPLED_WEIGHTS].double())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_saved(path: Path) -> bool:
    """Whether a file is one that `save_cache` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _state_tensors(state: MixerState) -> dict[str, Tensor]:
    """The tensors of a state that have to be kept, by name."""
    if isinstance(state, AttentionState):
        longest = int(state.seen.max()) if state.batch_size else 0
        return {"keys": state.keys[:, :longest], "values": state.values[:, :longest], "positions": state.seen}
    assert isinstance(state, RecurrentState)
    parts = dict(state.fenwick.named_tensors())
    parts["buckets"] = state.fenwick.buckets[state.fenwick.occupied()]
    return parts if state.convolution is None else {**parts, "convolution": state.convolution}


def _attention_state(parts: dict[str, Tensor], capacity: int | None, config: LogLinearConfig) -> AttentionState:
    """The state of an attention layer that `_state_tensors` took apart."""
    keys, values, positions = parts["keys"], parts["values"], parts["positions"]
    longest = keys.shape[1]
    shape = (positions.shape[0], longest, config.num_key_value_heads, config.attention_head_dim)
    if keys.shape != shape or values.shape != shape:
        raise RuntimeError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, wanted {shape}")
    if capacity is None:
        return AttentionState(keys, values, positions, columns=longest)
    state = AttentionState(keys, values, positions, columns=capacity, fixed=True, filled=longest)
    return state.widened(capacity)


def _recurrent_state(parts: dict[str, Tensor], config: LogLinearConfig) -> RecurrentState:
    """The state of a recurrent layer that `_state_tensors` took apart."""
    packed, positions = parts["buckets"], parts["positions"]
    sizes = config.num_levels, config.num_heads, config.state_size, config.head_dim
    assert None not in sizes
    zeros = FenwickState.zeros(positions.shape[0], *sizes, dtype=packed.dtype)  # type: ignore[arg-type]
    state = FenwickState(zeros.buckets, positions, parts.get("log_decays"), _window(parts, zeros, config))
    occupied = state.occupied()
    if packed.shape != (int(occupied.sum()), *state.buckets.shape[2:]):
        raise RuntimeError(f"buckets {tuple(packed.shape)}, wanted {int(occupied.sum())} of {state.buckets.shape[2:]}")
    state.buckets[occupied] = packed
    if state.log_decays is not None and state.log_decays.shape != state.buckets.shape[:3]:
        raise RuntimeError(f"log_decays {tuple(state.log_decays.shape)}, wanted {tuple(state.buckets.shape[:3])}")
    return RecurrentState(parts.get("convolution"), state)


def _window(parts: dict[str, Tensor], state: FenwickState, config: LogLinearConfig) -> Window | None:
    """The window that `_state_tensors` took apart, of a state of this shape; None where there was none."""
    kept = {name.removeprefix("window."): x for name, x in parts.items() if name.startswith("window.")}
    if not kept:
        return None
    optional = (kept.get(name) for name in ("log_decays", "mixing", "owed"))
    window = Window(kept["begun"], kept["keys"], kept["values"], *optional)
    assert config.num_groups is not None
    decay = None if window.log_decays is None else "channel" if window.log_decays.ndim == 4 else "head"
    wanted = state.with_window(
        window.keys.shape[2], num_groups=config.num_groups, decay=decay, delta=window.mixing is not None
    ).window
    assert wanted is not None
    if window.kind != wanted.kind:
        raise RuntimeError(f"window {window.kind}, wanted {wanted.kind}")
    return window


def _model_fields(config: LogLinearConfig) -> dict[str, Any]:
    """The fields of a configuration that a state depends on, as JSON gives them back."""
    own = [name for name in type(config).__annotations__ if name in config.field_names()]
    kept = [name for name in own if name not in NOT_OF_THE_MODEL and not name.endswith("_token_id")]
    return json.loads(json.dumps({name: getattr(config, name) for name in kept}))


def _difference(header: dict[str, Any], model: LogLinearForCausalLM) -> str | None:
    """What the model that wrote a file was, if it was not this one."""
    theirs, ours = header["model"], _model_fields(model.config)
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        listed = ", ".join(f"{name}={theirs.get(name)!r} (here {ours.get(name)!r})" for name in differing)
        return f"another model: {listed}"
    if header["dtype"] != str(model.dtype):
        return f"this model in {header['dtype']}, but here it is in {model.dtype}"
    if header["weights"] != weights_fingerprint(model):
        return "a model of the same configuration with other weights"
    return None
