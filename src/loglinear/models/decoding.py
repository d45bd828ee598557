"""Decoding through a CUDA graph: one token of a whole model as a single launch.

    B rows · V vocabulary

A decoding step launches several hundred small kernels, and on a GPU it is the launches that take the time. Where all
tensors stay where they are (a static cache) and nothing is read back by the host, the launches can be recorded once
and replayed. `GraphedStep` is such a recording, `decode_call` what `generate` calls for every token, and
`decoding_cache` gives the commands the kind of cache that it takes.

A recording holds addresses: those of the cache, and those of all parameters and buffers. Both are compared before every
replay.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from loglinear.layers.attention import Attention
from loglinear.layers.state import AttentionState
from loglinear.models.cache import MixerCacheLayer, cache_layers, new_cache

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig
    from loglinear.models.model import LogLinearForCausalLM

WARM_UP_STEPS = 2  # the first compiles kernels and makes library handles, the second finds all of them


class GraphedStep:
    """One decoding step of a model with a static cache, recorded as a CUDA graph.

    Recording runs the step a few times, and leaves the cache as it was. Between replays the cache may be used by other
    calls without gradients (a further prompt, for example), which leave a static cache's tensors where they are.

    Args:
        model: in evaluation mode, on a CUDA device. Neither it nor the cache is kept alive.
        cache: `StaticCache(config=model.config, max_cache_len=...)`, with something in it or empty.
        batch: rows of an empty cache; of another one, what it must hold (None: what it holds).

    Attributes:
        logits: `[B, 1, V]`, of the newest step.

    Raises:
        ValueError: the model is not on a CUDA device or in training, the cache is not static or full, the batch is
            another, autocast is on (its copies of weights would be recorded, and do not stay), or a module has hooks
            (they would not run).
        TypeError: the cache is not one of this model.

    Example:
        >>> step = GraphedStep(model, cache)  # doctest: +SKIP
        >>> ids = step(ids).argmax(-1)  # doctest: +SKIP
    """

    @torch.no_grad()
    def __init__(self, model: LogLinearForCausalLM, cache: Cache, batch: int | None = None) -> None:
        reason = refusal(model, cache)
        if reason is not None:
            raise ValueError(f"a decoding step cannot be recorded: {reason}")
        layers = cache_layers(cache, model.config)
        _fill_empty(model, layers, batch)
        states = [layer.state for layer in layers if layer.state is not None]
        for state in states:
            if isinstance(state, AttentionState):
                _count_on_host(state)
                state.columns = state.capacity  # of an empty one too: what is recorded is not a prompt's first token
        rows = states[0].batch_size
        if batch not in (None, rows):
            raise ValueError(f"batch: got {batch}, wanted {rows}, the rows that the cache holds")
        model.model.check_room(layers, 1, 1)
        self._model, self._cache = weakref.ref(model), weakref.ref(cache)
        self._weights = _weights(model)
        self._states = states
        self._counters = [_counter(layer) for layer in layers]
        self._output = layers[-1].newest_output
        self.batch = rows
        self.input_ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self.logits: Tensor
        self._graph = self._record(model, cache, layers)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Reads `input_ids [B, 1]` (int64) and returns the logits `[B, 1, V]` of the next tokens.

        They are a view that the next call overwrites.

        Raises:
            ValueError: ids of another shape; the cache is full; parameters or the cache's tensors were moved or
                replaced since.
        """
        if tuple(input_ids.shape) != (self.batch, 1):
            raise ValueError(f"input_ids must be [{self.batch}, 1], got {tuple(input_ids.shape)}")
        cache = self._cache()
        if not self.fits_model(self._model()):
            raise ValueError("parameters of the model were moved or replaced since this step was recorded: record anew")
        if cache is None or not self.holds(cache.layers):
            raise ValueError("the cache was reset, moved or dropped since this step was recorded: record anew")
        return self.replay(input_ids)

    def replay(self, input_ids: Tensor) -> Tensor:
        """As a call, for who has checked ids, model and cache already.

        Raises:
            ValueError: the cache is full.
        """
        filled = [
            (state, state.filled_after(1, 1)) for state in self._states if isinstance(state, AttentionState)
        ]  # refuses all before one is counted
        for state, count in filled:
            state.filled = count
        self.input_ids.copy_(input_ids)
        self._graph.replay()
        return self.logits

    def fits_model(self, model: nn.Module | None) -> bool:
        """Whether the parameters and buffers of `model` are those that were recorded, at the same addresses."""
        if model is None or model is not self._model():
            return False
        return all(
            entries.get(name) is tensor and tensor.data_ptr() == address
            for entries, name, tensor, address in self._weights
        )

    def holds(self, layers: Sequence[Any]) -> bool:
        """Whether the states of these layers are the recorded ones."""
        return layers[-1].newest_output is self._output and all(
            layer.state is state and layer.cumulative_length is counter
            for layer, state, counter in zip(layers, self._states, self._counters, strict=True)
        )

    @torch.no_grad()
    def take(self, cache: Cache, layers: list[MixerCacheLayer]) -> bool:
        """Copies what this cache's layers hold into the recorded tensors and gives them those, if they are alike;
        whether they were. No other cache may hold the recorded tensors.
        """
        mine = [(*state.tensors(), counter) for state, counter in zip(self._states, self._counters, strict=True)]
        for tensors, layer, state in zip(mine, layers, self._states, strict=True):
            if layer.state is None or type(layer.state) is not type(state):
                return False
            theirs = (*layer.state.tensors(), _counter(layer))
            if [_kind(tensor) for tensor in tensors] != [_kind(tensor) for tensor in theirs]:
                return False
        output = layers[-1].newest_output
        if output is None or self._output is None or _kind(output) != _kind(self._output):
            return False
        self._output.copy_(output)
        layers[-1].newest_output = self._output
        for layer, state, counter in zip(layers, self._states, self._counters, strict=True):
            assert layer.state is not None
            layer.state = state.copy_(layer.state)
            layer.cumulative_length = counter.copy_(_counter(layer))
        self._cache = weakref.ref(cache)
        return True

    def _record(self, model: LogLinearForCausalLM, cache: Cache, layers: list[MixerCacheLayer]) -> torch.cuda.CUDAGraph:
        """Runs the step, then records it; everything is as it was before. `logits` are what the graph writes."""
        graph = torch.cuda.CUDAGraph()
        saved = [_Saved(layer) for layer in layers]
        assert self._output is not None
        output = self._output.clone()
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        try:
            # What each layer counts would be a launch of its own: they are counted together.
            for layer in layers:
                layer.cumulative_length = 0
            with torch.cuda.device(model.device):
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_STEPS):
                        self._step(model, cache)
                        for one in saved:
                            one.restore()
                torch.cuda.current_stream().wait_stream(stream)
                # Other threads may go on with their own work meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self.logits = self._step(model, cache)
                    torch._foreach_add_(self._counters, 1)
        finally:
            for layer, counter, one in zip(layers, self._counters, saved, strict=True):
                layer.cumulative_length = counter
                one.restore()
            self._output.copy_(output)
        return graph

    def _step(self, model: LogLinearForCausalLM, cache: Cache) -> Tensor:
        return model(input_ids=self.input_ids, past_key_values=cache, use_cache=True).logits


class _Saved:
    """The state of a layer, to be put back after a step."""

    def __init__(self, layer: MixerCacheLayer) -> None:
        assert layer.state is not None
        self.state = layer.state
        # A step of attention writes behind what is there, where nobody looks: its counts are all that must be put back.
        if isinstance(self.state, AttentionState):
            self.filled, self.columns = self.state.filled, self.state.columns
            self.copy: Any = self.state.seen.clone()
        else:
            self.copy = self.state.clone()

    def restore(self) -> None:
        if isinstance(self.state, AttentionState):
            self.state.seen.copy_(self.copy)
            self.state.filled, self.state.columns = self.filled, self.columns
        else:
            self.state.copy_(self.copy)


def refusal(model: LogLinearForCausalLM, cache: Cache) -> str | None:
    """Why a step of this model with this cache cannot be recorded, or None.

    Raises:
        TypeError, ValueError: the cache is not one of this model.
    """
    layers = cache_layers(cache, model.config)
    if any(layer.max_cache_len is None for layer in layers):
        return "the cache grows; wanted StaticCache(config=model.config, max_cache_len=...)"
    if model.training:
        return "the model is in training; call eval() first"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on; wanted a model in the dtype that it computes in"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "a module has forward hooks, which a recording would not call"
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"the model is on {' and '.join(sorted(map(str, devices)))}; wanted one CUDA device"
    if any(layer.state is not None and layer.state.positions.device not in devices for layer in layers):
        return "the cache is on another device than the model"
    return None


def _fill_empty(model: LogLinearForCausalLM, layers: list[MixerCacheLayer], batch: int | None) -> None:
    """Makes the states of an empty cache."""
    if any(layer.state is not None for layer in layers):
        return
    if batch is None or batch < 1:
        raise ValueError(f"batch: got {batch}, wanted the number of rows, because the cache is empty")
    dtype = model.model.embed_tokens.weight.dtype
    for block, layer in zip(model.model.layers, layers, strict=True):
        mixer = cast(Any, block).mixer
        capacity = {"capacity": layer.max_cache_len} if isinstance(mixer, Attention) else {}
        layer.record(mixer.zero_state(batch, dtype, model.device, **capacity), 0)
    layers[-1].record_output(torch.zeros(batch, model.config.hidden_size, dtype=dtype, device=model.device))


def _count_on_host(state: AttentionState) -> None:
    """Makes `filled` exact where it is open or says that the state is full: a recording cannot wait for the device."""
    if state.filled is None or state.filled >= state.capacity:
        state.filled = int(state.seen.max())


def _counter(layer: MixerCacheLayer) -> Tensor:
    """The count of columns of a static cache's layer."""
    assert isinstance(layer.cumulative_length, Tensor)
    return layer.cumulative_length


def _kind(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _weights(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor, int]]:
    """Every parameter and buffer: the module's own table that names it, and its address."""
    return [
        (entries, name, tensor, tensor.data_ptr())
        for module in model.modules()
        for entries in (module._parameters, module._buffers)
        for name, tensor in entries.items()
        if tensor is not None
    ]


class _Recordings:
    """The recorded steps of one model: those of living caches, and of a model without attention the newest one even
    after its cache is gone. The next cache then takes its place: nothing is recorded for a second prompt.
    """

    def __init__(self) -> None:
        self.by_cache: weakref.WeakKeyDictionary[Cache, GraphedStep] = weakref.WeakKeyDictionary()
        self.spare: GraphedStep | None = None

    def step_for(self, model: LogLinearForCausalLM, cache: Cache, rows: int) -> GraphedStep | None:
        """The step for a cache that was read, recorded if there is none; None where it cannot be."""
        layers = cache_layers(cache, model.config)
        step = self.by_cache.get(cache)
        if step is not None and step.batch == rows and step.holds(layers) and step.fits_model(model):
            return step
        self.by_cache.pop(cache, None)
        if any(layer.state is None for layer in layers) or refusal(model, cache) is not None:
            return None
        spare = self.spare
        if spare is not None and not spare.fits_model(model):
            self.spare = spare = None
        free = spare is not None and all(step is not spare for step in self.by_cache.values())
        if spare is not None and free and spare.batch == rows and spare.take(cache, layers):
            step = spare
        else:
            step = GraphedStep(model, cache, rows)
        self.by_cache[cache] = step
        if not _attends(model.config):  # keys and values of a long context are too much to keep
            self.spare = step
        return step


_recordings: weakref.WeakKeyDictionary[nn.Module, _Recordings] = weakref.WeakKeyDictionary()


def decode_call(model: LogLinearForCausalLM, **inputs: Any) -> CausalLMOutputWithPast | tuple:
    """`model(**inputs)`, through a recorded step where the call is one: one token a row, no mask, a static cache that
    was read before, no gradients, logits and nothing else wanted.

    The logits of a recorded step are overwritten by the next one.

    Raises:
        ValueError: the cache is full; else as `model.forward`.
    """
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    known = {"input_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep"}
    plain = any(value is not None and value is not False for name, value in inputs.items() if name not in known)
    logits_to_keep = inputs.get("logits_to_keep", 0)
    if (
        plain
        or not isinstance(ids, Tensor)
        or ids.ndim != 2
        or ids.shape[1] != 1
        or ids.device != model.device
        or not isinstance(cache, Cache)
        or inputs.get("use_cache") is False
        or inputs.get("return_dict") is False
        or not isinstance(logits_to_keep, int)
        or logits_to_keep < 0
        or torch.is_grad_enabled()
    ):
        return model(**inputs)
    recordings = _recordings.setdefault(model, _Recordings())
    step = recordings.step_for(model, cache, ids.shape[0])
    if step is None:
        return model(**inputs)
    return CausalLMOutputWithPast(logits=cast(Any, step.replay(ids)), past_key_values=cache)


def decoding_cache(model: LogLinearForCausalLM, tokens: int, cache: Cache | None = None) -> Cache:
    """The cache that decodes fastest: a static one on CUDA devices, which `generate` decodes with through a recorded
    step, and a growing one elsewhere.

    Attention layers allocate the whole of a static cache at once. So a model that has some gets a growing one where
    `tokens` are more than it is meant for (`config.max_position_embeddings`).

    Args:
        model: that will read it.
        tokens: that the sequence will have in the end.
        cache: one to go on with, instead of an empty one. What it holds is taken over, and it must not be used again;
            it is returned as it is where it will do.
    """
    attends = _attends(model.config)
    wanted = model.device.type == "cuda" and not (attends and tokens > model.config.max_position_embeddings)
    if cache is None:
        return StaticCache(config=model.config, max_cache_len=tokens) if wanted else new_cache(model.config)
    capacity = cache_layers(cache, model.config)[0].max_cache_len
    if capacity is None:
        return _with_capacity(cache, model.config, tokens) if wanted else cache
    if not attends or tokens <= capacity:
        return cache
    # Twice as much, so that a long conversation is copied a few times only.
    most = min(max(tokens, 2 * capacity), model.config.max_position_embeddings)
    return _with_capacity(cache, model.config, most if wanted else None)


def _attends(config: LogLinearConfig) -> bool:
    return "attention" in config.mixers


def _with_capacity(cache: Cache, config: LogLinearConfig, capacity: int | None) -> Cache:
    """What `cache` holds in a static cache of `capacity` columns, or in a growing one."""
    changed = new_cache(config) if capacity is None else StaticCache(config=config, max_cache_len=capacity)
    for mine, theirs in zip(cache_layers(changed, config), cache_layers(cache, config), strict=True):
        if theirs.state is None:
            continue
        state = theirs.state
        if isinstance(state, AttentionState):
            state = _sized(state, capacity)
        mine.record(state, int(theirs.cumulative_length))
        if theirs.newest_output is not None:
            mine.record_output(theirs.newest_output)
    return changed


def _sized(state: AttentionState, capacity: int | None) -> AttentionState:
    """The same keys and values in a fixed state of `capacity` columns, or in a growing one."""
    filled = int(state.seen.max())
    columns = filled if capacity is None else capacity
    assert filled <= columns
    wide = state.widened(columns)
    return AttentionState(
        wide.keys[:, :columns].contiguous(),
        wide.values[:, :columns].contiguous(),
        state.seen,
        columns=columns,
        fixed=capacity is not None,
        filled=filled if capacity is not None else 0,
    )
