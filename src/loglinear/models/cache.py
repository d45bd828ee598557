"""The state of a model between calls, in the shape that transformers' `generate` expects.

A `DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=...)` then holds one
`MixerCacheLayer` for each block, and that holds the mixer's state whatever its kind. transformers' own layers
are of no use here: those for linear attention do not know the length that `generate` asks for, and those for
attention keep the padding in the cache, so that rows share their positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
)
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from loglinear.layers.attention import Attention
from loglinear.layers.recurrent import RecurrentMixer
from loglinear.layers.state import AttentionState, MixerState, overfull
from loglinear.models.config import CACHE_LAYER_TYPE, LogLinearConfig

CacheT = TypeVar("CacheT", bound=Cache)


class MixerCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """The state of one block.

    Args:
        max_cache_len: columns that an attention layer allocates for good (static caches), or None to grow.
            Recurrent states have a fixed size in both.

    Attributes:
        state: the mixer's state, None before the first token.
        newest_output: `[B, M]`, in the last layer only: the model's final hidden state at each row's newest token
            (zeros for a row without one), which padding behind it repeats. None before the first call.
    """

    is_compileable = True
    supports_early_init = False

    def __init__(self, max_cache_len: int | None = None) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        self.max_cache_len = max_cache_len
        self.state: MixerState | None = None
        self.newest_output: Tensor | None = None
        # Columns of the batch seen so far, padding included: what `generate` calls the length. A tensor where
        # the call may be compiled, because a Python number would be compiled in.
        self.cumulative_length: int | Tensor = 0 if max_cache_len is None else torch.tensor(0)

    def check_rows(self, rows: int) -> None:
        """Refuses a batch of another number of rows.

        Raises:
            ValueError: the cache holds another number.
        """
        if self.state is not None and self.state.batch_size != rows:
            raise ValueError(f"past_key_values holds {self.state.batch_size} rows, but the batch has {rows}")

    def check_room(self, counts: Tensor | int, most: int) -> None:
        """Refuses tokens that an attention layer's static cache has no columns for: `counts` (`[B]`, or one number
        for all rows), at most `most` in a row.

        Raises:
            ValueError: they do not fit.
        """
        if self.max_cache_len is None:
            return
        if self.state is None:
            if most > self.max_cache_len:
                raise overfull(most, self.max_cache_len, 0)
        else:
            assert isinstance(self.state, AttentionState)
            self.state.filled_after(counts, most)

    def starting_state(self, mixer: RecurrentMixer | Attention, batch: int, x: Tensor) -> MixerState | None:
        """The state to begin a call with; made here if a static cache has to exist beforehand."""
        if self.state is None:
            if self.max_cache_len is not None and isinstance(mixer, Attention):
                return mixer.zero_state(batch, x.dtype, x.device, capacity=self.max_cache_len)
            return None
        if self.state.positions.device != x.device:
            self.state = self.state.to(x.device)
        return self.state

    def record(self, state: MixerState, columns: int) -> None:
        """Takes the state after `columns` more columns. A static cache keeps its tensors' addresses."""
        if self.state is None:
            if isinstance(self.cumulative_length, Tensor) and not torch.compiler.is_compiling():
                self.cumulative_length = self.cumulative_length.to(state.positions.device)
                for tensor in (*state.tensors(), self.cumulative_length):
                    torch._dynamo.mark_static_address(tensor)
            self.state = state
        elif self.state is not state:
            keep = self.max_cache_len is not None and not torch.is_grad_enabled()
            self.state = self.state.copy_(state) if keep else state
        self.advance(columns)

    def output_before(self, rows: int, x: Tensor) -> Tensor:
        """`[rows, M]`, the newest output of every row before this call, of the dtype and device of `x [..., M]`."""
        if self.newest_output is None:
            return x.new_zeros(rows, x.shape[-1])
        return self.newest_output.to(x)

    def record_output(self, output: Tensor) -> None:
        """Takes a copy of the newest outputs `[B, M]`. A static cache keeps its tensor's address."""
        mine, static = self.newest_output, self.max_cache_len is not None
        if static and mine is not None and not torch.is_grad_enabled():
            if mine.shape == output.shape and mine.device == output.device:
                mine.copy_(output)
                return
        self.newest_output = output.clone()
        if static and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.newest_output)

    def holding(self, state: MixerState, newest_output: Tensor | None, columns: int) -> MixerCacheLayer:
        """A new layer of the same kind that holds this state after `columns` columns. The tensors become its own."""
        layer = type(self)(self.max_cache_len)
        layer.record(state, columns)
        if newest_output is not None:
            layer.record_output(newest_output)
        return layer

    def advance(self, columns: int) -> None:
        """Counts `columns` more columns."""
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.add_(columns)
        else:
            self.cumulative_length += columns

    # What follows is transformers' side of the object.

    def get_seq_length(self) -> int:
        return self.cumulative_length  # type: ignore[return-value]  (a tensor in static caches, as in transformers')

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    get_max_cache_shape = get_max_length  # the name before transformers 5.20

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.cumulative_length) + query_length, 0

    def reset(self) -> None:
        self.state, self.newest_output = None, None
        self.cumulative_length = 0 if self.max_cache_len is None else torch.tensor(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            selected = self.state.select(indices)
            keep = self.max_cache_len is not None and selected.batch_size == self.state.batch_size
            self.state = self.state.copy_(selected) if keep else selected
        if self.newest_output is not None:
            self.record_output(self.newest_output.index_select(0, indices.to(self.newest_output.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.positions.device)
            self.state = self.state.select(rows.repeat_interleave(repeats))
        if self.newest_output is not None:
            self.record_output(self.newest_output.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        if self.state is not None:
            self.state = self.state.to("cpu", non_blocking=True)
        if self.newest_output is not None:
            self.newest_output = self.newest_output.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Nothing: a state that was offloaded is brought back by the call that uses it."""

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a recurrent state cannot forget its last tokens; clone it before reading them instead")

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the state of a log-linear model is made by its layers, not by the cache")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the state of a log-linear model is updated by its layers, not through Cache.update")

    update_conv_state = update
    update_recurrent_state = update


DYNAMIC_LAYER_TYPE_MAPPING[CACHE_LAYER_TYPE] = MixerCacheLayer
STATIC_LAYER_TYPE_MAPPING[CACHE_LAYER_TYPE] = MixerCacheLayer


def _padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The mask of our layer type is the padding mask itself."""
    return attention_mask


LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[CACHE_LAYER_TYPE] = _padding_mask


def new_cache(config: LogLinearConfig) -> DynamicCache:
    """An empty cache for a model of `config`."""
    return DynamicCache(config=config)


def cache_layers(cache: Any, config: LogLinearConfig) -> list[MixerCacheLayer]:
    """The layers of a cache, which is refused if it was not made for `config`.

    Raises:
        TypeError: it is not a cache of our layers.
        ValueError: it has another number of layers.
    """
    found = list(cache.layers) if isinstance(cache, Cache) else []
    layers = [layer for layer in found if isinstance(layer, MixerCacheLayer)]
    if not found or len(layers) < len(found):
        kinds = sorted({type(layer).__name__ for layer in found}) or "no layers"
        raise TypeError(
            "past_key_values must be made for this model, as DynamicCache(config=model.config) or "
            f"StaticCache(config=model.config, max_cache_len=...), got {type(cache).__name__} with {kinds}"
        )
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"past_key_values has {len(layers)} layers, the model {config.num_hidden_layers}")
    return layers


def cache_nbytes(cache: Cache) -> int:
    """Bytes of the layers' states that a cache of ours holds at the moment, without the newest outputs."""
    states = (layer.state for layer in cache.layers if isinstance(layer, MixerCacheLayer))
    return sum(state.nbytes for state in states if state is not None)


def copy_cache(cache: CacheT) -> CacheT:
    """A cache of its own: what is read with the copy leaves the original as it was.

    A model consumes the cache that it is given, so this is how one prompt is read once and answered many times.

    Raises:
        TypeError: it is not a cache of our layers (so do all functions below).
    """
    return _rebuilt(cache, [_copied(layer, None) for layer in _own_layers(cache)])


def cache_to(cache: CacheT, device: torch.device | str) -> CacheT:
    """A copy of the cache on another device, for example in CPU memory. A model brings a cache that it is given to its
    own device.
    """
    return _rebuilt(cache, [_copied(layer, device) for layer in _own_layers(cache)])


def select_rows(cache: CacheT, rows: Sequence[int] | Tensor) -> CacheT:
    """A new cache with the given rows, in this order; repeats are allowed.

    Raises:
        ValueError: the cache is empty, or has no such row.
    """
    layers = _own_layers(cache)
    count = _rows_of(layers)
    chosen = torch.as_tensor(rows, dtype=torch.int64).flatten().cpu()
    wrong = [row for row in chosen.tolist() if not 0 <= row < count]
    if wrong:
        raise ValueError(f"rows: got {wrong[0]}, wanted 0 to {count - 1}, the rows of the cache")
    selected = []
    for layer in layers:
        assert layer.state is not None
        output = layer.newest_output
        if output is not None:
            output = output.index_select(0, chosen.to(output.device))
        state = layer.state.select(chosen)
        selected.append(layer.holding(state, output, int(layer.cumulative_length)))
    return _rebuilt(cache, selected)


def repeat_rows(cache: CacheT, repeats: int) -> CacheT:
    """A new cache with every row `repeats` times, copies of a row side by side (as `torch.repeat_interleave`).

    Raises:
        ValueError: the cache is empty, or `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, wanted at least 1")
    return select_rows(cache, torch.arange(_rows_of(_own_layers(cache))).repeat_interleave(repeats))


def stack_caches(caches: Sequence[CacheT]) -> CacheT:
    """A new cache with the rows of all caches, one after the other, each at its own position: sequences that were read
    one by one, also of different lengths, go on as one batch.

    `generate` counts columns, and the stack has seen as many as its longest cache: give it the sequences padded on the
    left, with their mask.

    Raises:
        ValueError: no caches, an empty one, or caches that differ in their layers, widths, capacities, dtypes or
            devices. Caches of different models that are alike in all of these are not told apart.
    """
    if not caches:
        raise ValueError("got no caches, wanted at least one")
    every = [_own_layers(cache) for cache in caches]
    numbers = sorted({len(layers) for layers in every})
    if len(numbers) > 1:
        raise ValueError(f"caches to be stacked must be of one model, got {' and '.join(map(str, numbers))} layers")
    for layers in every:
        _rows_of(layers)
    stacked = []
    for parts in zip(*every, strict=True):
        states = [layer.state for layer in parts if layer.state is not None]
        outputs = [layer.newest_output for layer in parts if layer.newest_output is not None]
        if any(layer.max_cache_len != parts[0].max_cache_len for layer in parts):
            raise ValueError("caches to be stacked must have one capacity: got static and growing ones, or two sizes")
        state = type(states[0]).cat(states)
        output = torch.cat(outputs) if outputs else None
        stacked.append(parts[0].holding(state, output, max(int(layer.cumulative_length) for layer in parts)))
    return _rebuilt(caches[0], stacked)


def _own_layers(cache: Cache) -> list[MixerCacheLayer]:
    """All layers of a cache of ours.

    Raises:
        TypeError: some are not ours.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, MixerCacheLayer)]
    if not layers or len(layers) < len(cache.layers):
        raise TypeError(f"wanted a cache of a log-linear model, got {type(cache).__name__} with other layers")
    return layers


def _rows_of(layers: list[MixerCacheLayer]) -> int:
    """The rows of a cache that has any."""
    states = [layer.state for layer in layers if layer.state is not None]
    if len(states) < len(layers):
        raise ValueError("got an empty cache, wanted one that has read something: until then it has no rows")
    return states[0].batch_size


def _copied(layer: MixerCacheLayer, device: torch.device | str | None) -> MixerCacheLayer:
    """A layer with tensors of its own, on `device` (None: where they are)."""
    columns = int(layer.cumulative_length)
    if layer.state is None:
        empty = type(layer)(layer.max_cache_len)
        empty.advance(columns)
        return empty
    state, output = layer.state.clone(), layer.newest_output
    if device is not None:
        state, output = state.to(device), None if output is None else output.to(device)
    return layer.holding(state, output, columns)


def _rebuilt(cache: CacheT, layers: list[MixerCacheLayer]) -> CacheT:
    """A cache like `cache` with other layers."""
    rebuilt = copy.copy(cache)
    rebuilt.layers = list[Any](layers)
    return rebuilt
