"""Decoding: one token of a whole model, and one step of the operator alone, at given positions.

No text is read to get there: a state is set to its position and filled with random numbers, of which only the size is
plausible. What a step does depends on the position (which buckets are occupied, how many keys there are), not on what
the numbers are.

The number of occupied buckets changes from token to token. A pass of `STEPS` steps therefore goes from `STEPS / 2`
before a power of two to as many behind it: occupied are nearly all buckets in the first half and two or three in the
second, half of them on average, which is the average over all positions.

    B rows · L levels · H heads · K key width · V value width
"""

import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import StaticCache

from loglinear import fenwick, log_linear_attention, log_linear_attention_step
from loglinear.bench.inputs import FAMILIES, SHAPES, Shape, make_inputs
from loglinear.bench.measure import PeakMemory, available_memory, summarize, synchronize
from loglinear.layers import MIXERS, Attention, AttentionState, RecurrentState
from loglinear.models import GraphedStep, LogLinearConfig, LogLinearForCausalLM, MixerCacheLayer, copy_cache
from loglinear.plots import format_bytes
from loglinear.state import FenwickState
from loglinear.window import length_for

if TYPE_CHECKING:
    from loglinear.bench.worker import Result

STEPS = 32  # of a pass
_MOST_PASSES, _FEWEST_PASSES = 10, 3
_CHECKED_STEPS = 4
_SLACK = 1024**3  # bytes of a GPU that are left to kernels and libraries
ROUNDED_STATES = 2e-2  # error of a few dozen steps that round all buckets to 8 bits, each by up to 4e-3
DECODING, STEP = "decoding step", "step"
STEPPED = "log-linear"  # the operator, in rows of steps


@dataclass(frozen=True)
class DecodeCase:
    """A preset at some contexts and batches: one model, whose levels are a full partition of the longest context."""

    preset: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    device: str
    dtype: str
    budget_s: float
    state_dtype: str | None = None
    decoding_window: int | None = None


@dataclass(frozen=True)
class StepCase:
    """The operator's step on one shape, at some positions and batches; levels as in `DecodeCase`."""

    shape: str
    positions: tuple[int, ...]
    batches: tuple[int, ...]
    device: str
    dtype: str
    budget_s: float
    state_dtype: str | None = None
    decoding_window: int | None = None


class Kept(NamedTuple):
    """How states are kept: two fields of `LogLinearConfig`. Without a model, whose dtype has a say in it, states are
    float32 unless a `state_dtype` is given.
    """

    state_dtype: str | None = None
    decoding_window: int | None = None

    def labelled(self, name: str) -> str:
        """`name`, with what is not the default: "log-linear, window 32, bfloat16 states"."""
        window = None if self.decoding_window is None else f"window {self.decoding_window}"
        if self.decoding_window == 0:
            window = "no window"
        states = None if self.state_dtype is None else f"{self.state_dtype} states"
        return ", ".join(part for part in (name, window, states) if part is not None)

    def on(self, device: torch.device) -> "Kept":
        """With the window that states on `device` have."""
        return self._replace(decoding_window=length_for(self.decoding_window, device))


PLAIN = Kept()


def start_of(context: int) -> int:
    """Where a pass around `context` tokens begins."""
    return max(1, context - STEPS // 2)


# ----------------------------------------------------------------------------------------------------
# Whole models
# ----------------------------------------------------------------------------------------------------


def run_decode_case(case: DecodeCase) -> Iterator["Result"]:
    """Times decoding steps, the choice of the likeliest token included: a recorded step on a GPU, a plain one on a
    processor. The recorded step of the first case is compared with the plain one. What does not fit into memory is not
    tried.
    """
    from loglinear.bench.worker import DTYPES, Result, tolerance_of

    device, first = torch.device(case.device), (min(case.contexts), min(case.batches))
    kept = Kept(case.state_dtype, case.decoding_window)
    if LogLinearConfig.preset(case.preset).mixer != "attention":
        kept = kept.on(device)
    model = build_model(case.preset, max(case.contexts), DTYPES[case.dtype], device, kept)
    for context in sorted(case.contexts):
        for batch in sorted(case.batches):
            place = {"length": context, "batch": batch}
            reason = _does_not_fit(model, context, batch)
            if reason is not None:
                yield Result(DECODING, reason, **place)
                continue
            error = None
            try:
                if (context, batch) == first:
                    error = _recording_error(model, context, batch)
                    limit = tolerance_of(case.dtype)
                    if not error <= limit:
                        yield Result(DECODING, f"wrong: error {error:.2g} > {limit:g}", error=error)  # none is timed
                        return
                result = _timed(model, context, batch, case.budget_s, error)
            except (MemoryError, torch.OutOfMemoryError):
                result = Result(DECODING, "out of memory", **place)
            yield result
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def build_model(
    preset: str, longest: int, dtype: torch.dtype, device: torch.device, kept: Kept = PLAIN
) -> LogLinearForCausalLM:
    """A preset with random weights, made where it will be, for sequences of `longest` tokens."""
    torch.manual_seed(0)
    config = LogLinearConfig.preset(preset, max_position_embeddings=longest, **kept._asdict())
    with torch.device(device):
        model = LogLinearForCausalLM(config).eval()
    wide = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in wide):
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


def cache_bytes(model: LogLinearForCausalLM, context: int, batch: int) -> tuple[int, int]:
    """Bytes that a static cache for a pass around `context` allocates, and how many of them are of recurrent states."""
    recurrent = attention = 0
    for state in _zero_states(model, context, batch, torch.device("meta")):
        if isinstance(state, AttentionState):
            attention += state.nbytes
        else:
            recurrent += state.nbytes
    return recurrent + attention, recurrent


def occupied_bytes(model: LogLinearForCausalLM, context: int, batch: int) -> int | None:
    """Bytes of the occupied buckets of all layers, averaged over a pass; None for a model without levels."""
    levels = model.config.num_levels
    if levels == 1 or all(mixer == "attention" for mixer in model.config.mixers):
        return None
    meta = torch.device("meta")
    states = [s for s in _zero_states(model, context, batch, meta) if isinstance(s, RecurrentState)]
    used = mean_occupied(start_of(context), levels, window=model.config.decoding_window)
    return round(sum(s.fenwick.buckets.nbytes for s in states) / levels * used)


def mean_occupied(start: int, levels: int, after: int = 0, window: int | None = None) -> float:
    """Occupied buckets of a state before each step of a pass from `start` on (`after=1`: after each), on average; of
    one with a `window`, where that starts.
    """
    positions = _bases(start + after, window)
    return float(fenwick.occupied(positions, levels).sum(-1).double().mean())


def _bases(start: int, window: int | None) -> Tensor:
    """[STEPS] the positions of which buckets are, in a pass from `start` on."""
    return fenwick.block_start(torch.arange(start, start + STEPS), fenwick.chunk_height(window or 1))


def filled_cache(model: LogLinearForCausalLM, context: int, batch: int) -> StaticCache:
    """A static cache in which every row stands where a pass around `context` begins."""
    cache = StaticCache(config=model.config, max_cache_len=_capacity(context))
    device = model.device
    for layer, state in zip(cache.layers, _zero_states(model, context, batch, device), strict=True):
        cast(MixerCacheLayer, layer).record(state, start_of(context))
    weight = model.model.embed_tokens.weight
    cast(MixerCacheLayer, cache.layers[-1]).record_output(weight.new_zeros(batch, model.config.hidden_size))
    refill(cache, context)
    return cache


@torch.no_grad()
def refill(cache: StaticCache, context: int) -> None:
    """Brings every row back to the beginning of the pass, in place, with new random numbers."""
    start = start_of(context)
    for layer in cache.layers:
        state = cast(MixerCacheLayer, layer).state
        if isinstance(state, AttentionState):
            state.keys.normal_()
            state.values.normal_()
            state.seen.fill_(start)
            state.columns, state.filled = state.capacity, start
        elif isinstance(state, RecurrentState):
            if state.convolution is not None:
                state.convolution.normal_()
            _fill(state.fenwick, start)


def _fill(state: FenwickState, position: int) -> None:
    """Sets a state to a position: random numbers in occupied buckets, zeros in the others, no decay pending. The tokens
    of a window are zeros.
    """
    for _, tensor in state.named_tensors():
        tensor.zero_()
    state.positions.fill_(position)
    for bucket, used in enumerate(state.occupied()[0].tolist()):
        if used:
            state.buckets[:, bucket].normal_()


def _capacity(context: int) -> int:
    return start_of(context) + STEPS


def _zero_states(
    model: LogLinearForCausalLM, context: int, batch: int, device: torch.device
) -> Iterator[AttentionState | RecurrentState]:
    dtype = model.model.embed_tokens.weight.dtype
    for block in model.model.layers:
        mixer = cast(Any, block).mixer
        capacity = {"capacity": _capacity(context)} if isinstance(mixer, Attention) else {}
        yield mixer.zero_state(batch, dtype, device, **capacity)


def _does_not_fit(model: LogLinearForCausalLM, context: int, batch: int) -> str | None:
    """Why a case is not tried: recording holds a second copy of recurrent states for a while."""
    total, recurrent = cache_bytes(model, context, batch)
    cuda = model.device.type == "cuda"
    wanted, free = total + (recurrent + _SLACK) * cuda, available_memory(model.device)
    if wanted <= free:
        return None
    return f"skipped: the cache needs {format_bytes(wanted)}, free are {format_bytes(free)}"


def _stepper(model: LogLinearForCausalLM, cache: StaticCache) -> Callable[[Tensor], Tensor]:
    if model.device.type == "cuda":
        return GraphedStep(model, cache)
    return functools.partial(_plain_step, model, cache)


@torch.no_grad()
def _plain_step(model: LogLinearForCausalLM, cache: StaticCache, ids: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model(input_ids=ids, past_key_values=cache)).logits)


def _recording_error(model: LogLinearForCausalLM, context: int, batch: int) -> float:
    """How far the logits of a few recorded steps are from those of plain ones, from the same state."""
    from loglinear.bench.worker import relative_error

    cache = filled_cache(model, context, batch)
    plain = copy_cache(cache)
    step = _stepper(model, cache)
    worst = 0.0
    for _ in range(_CHECKED_STEPS):
        ids = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
        worst = max(worst, relative_error(step(ids), _plain_step(model, plain, ids)))
    return worst


def _timed(model: LogLinearForCausalLM, context: int, batch: int, budget_s: float, error: float | None) -> "Result":
    from loglinear.bench.worker import Result, tolerance_of

    device = model.device
    allocated, _ = cache_bytes(model, context, batch)
    with PeakMemory(device) as peak:
        cache = filled_cache(model, context, batch)
        step = _stepper(model, cache)
        ids = torch.randint(model.config.vocab_size, (batch, 1), device=device)

        def run_pass() -> None:
            chosen = ids
            for _ in range(STEPS):
                chosen = step(chosen).argmax(-1)

        peak.restart()  # recording takes more than steps do
        timing = _time_passes(run_pass, lambda: refill(cache, context), device, STEPS, budget_s)
    return Result(
        DECODING,
        "ok",
        timing.median_ms,
        timing.low_ms,
        timing.high_ms,
        timing.repeats,
        peak.bytes,
        error,
        batch=batch,
        length=context,
        levels=None if all(mixer == "attention" for mixer in model.config.mixers) else model.config.num_levels,
        tolerance=tolerance_of(str(model.dtype).removeprefix("torch.")),
        cache_bytes=allocated,
        occupied_bytes=occupied_bytes(model, context, batch),
    )


def _time_passes(
    run_pass: Callable[[], object], reset: Callable[[], object], device: torch.device, steps: int, budget_s: float
):
    """Milliseconds a step, a sample for each pass; `reset` goes before each and is not timed."""
    reset()
    run_pass()  # whatever happens for the first time
    samples, spent = [], 0.0
    while len(samples) < _FEWEST_PASSES or (spent < budget_s and len(samples) < _MOST_PASSES):
        reset()
        synchronize(device)
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run_pass()
            end.record()
            synchronize(device)
            seconds = begin.elapsed_time(end) / 1000
        else:
            started = time.perf_counter()
            run_pass()
            seconds = time.perf_counter() - started
        samples.append(seconds / steps * 1000)
        spent += seconds
    return summarize(samples)


# ----------------------------------------------------------------------------------------------------
# The operator alone
# ----------------------------------------------------------------------------------------------------


def run_step_case(case: StepCase) -> Iterator["Result"]:
    """Times `log_linear_attention_step`; first compared with the fp64 recurrence over a few dozen tokens.

    On a GPU a whole pass is one CUDA graph, over more states, taken in turns, than the L2 cache holds.
    """
    from loglinear.bench.worker import DTYPES, Result, tolerance_of

    device, shape, dtype = torch.device(case.device), SHAPES[case.shape], DTYPES[case.dtype]
    kept = Kept(case.state_dtype, case.decoding_window).on(device)
    levels = fenwick.full_num_levels(max(case.positions))
    error, limit = step_error(shape, dtype, device, kept), tolerance_of(case.dtype)
    if kept.state_dtype == "bfloat16":
        limit = max(limit, ROUNDED_STATES)
    for position in sorted(case.positions):
        for batch in sorted(case.batches):
            place: dict[str, Any] = {"length": position, "batch": batch, "levels": levels, "error": error}
            place["tolerance"] = limit
            if not error <= limit:
                yield Result(STEP, f"wrong: error {error:.2g} > {limit:g}", **place)
                continue
            moved = moved_bytes(shape, start_of(position), batch, levels, dtype, kept)
            copies = _copies(moved, device)
            size = zero_state(shape, batch, levels, dtype, torch.device("meta"), kept).nbytes
            free = available_memory(device)
            if copies * size + _SLACK * (device.type == "cuda") > free:
                why = f"skipped: states need {format_bytes(copies * size)}, free are {format_bytes(free)}"
                yield Result(STEP, why, **place)
                continue
            try:
                timing, peak = _timed_steps(shape, position, batch, levels, copies, dtype, device, kept, case.budget_s)
            except (MemoryError, torch.OutOfMemoryError):
                yield Result(STEP, "out of memory", **place)
                continue
            share = moved / (timing.median_ms / 1000) / copy_bandwidth(device)
            yield Result(
                STEP,
                "ok",
                timing.median_ms,
                timing.low_ms,
                timing.high_ms,
                timing.repeats,
                peak,
                cache_bytes=size,
                moved_bytes=moved,
                bandwidth_share=share,
                **place,
            )
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def zero_state(
    shape: Shape, batch: int, levels: int, dtype: torch.dtype, device: torch.device, kept: Kept = PLAIN
) -> FenwickState:
    """The state that the mixer of a shape steps from."""
    config = LogLinearConfig(
        mixer=FAMILIES[shape.family],
        vocab_size=8,
        hidden_size=shape.num_heads,
        intermediate_size=8,
        num_hidden_layers=1,
        num_heads=shape.num_heads,
        num_groups=shape.num_groups,
        state_size=shape.key_dim,
        head_dim=shape.value_dim,
        num_levels=levels,
        **kept._replace(state_dtype=kept.state_dtype or "float32")._asdict(),
    )
    with torch.device("meta"):
        mixer = cast(Any, MIXERS[config.mixers[0]](config, 0))
    return mixer.zero_state(batch, dtype, device).fenwick


def moved_bytes(shape: Shape, start: int, batch: int, levels: int, dtype: torch.dtype, kept: Kept = PLAIN) -> int:
    """Fewest bytes that a step must move, averaged over a pass from `start` on: it reads every occupied bucket and
    writes them all (delta rule, a decay per channel) or the one that takes in others (a decay per head); and its
    inputs and output.

    With a window it reads the window and the buckets that are older, writes a token, and writes those buckets only in
    the step that ends a window.
    """
    heads, window, delta = shape.num_heads, kept.decoding_window, shape.delta
    decays, all_change = (shape.key_dim if shape.per_channel else 1), delta or shape.per_channel
    itemsize = 4 if kept.state_dtype is None else getattr(torch, kept.state_dtype).itemsize
    keys, values = shape.num_groups * shape.key_dim, heads * shape.value_dim
    controls = heads * (levels + decays + delta) * 4
    tokens = 0.0
    read, written = mean_occupied(start, levels, window=window), 1.0
    if window:
        bases = _bases(start, window)
        places = float((torch.arange(start, start + STEPS) - bases).double().mean())
        tokens = (places + 1) * (keys + values + heads * (decays + delta * window)) * 4
        above = torch.arange(levels) > fenwick.carry_level(bases + window, levels)[:, None]
        changed = torch.logical_and(above, fenwick.occupied(bases, levels)).sum(-1).double().mean()
        written = (1 + all_change * float(changed)) / window
    elif all_change:
        written = mean_occupied(start, levels, after=1)
    bucket = heads * shape.key_dim * shape.value_dim * itemsize
    return round(batch * ((read + written) * bucket + 2 * (keys + values) * dtype.itemsize + controls + tokens))


def step_error(shape: Shape, dtype: torch.dtype, device: torch.device, kept: Kept = PLAIN, tokens: int = 41) -> float:
    """Error of the step, token by token, against the fp64 recurrence on few tokens: of the outputs."""
    from loglinear.bench.worker import relative_error

    inputs = make_inputs(shape, "log-linear", 2, tokens, dtype, device)
    assert inputs.q is not None and inputs.k is not None and inputs.v is not None and inputs.level_scales is not None
    state = zero_state(shape, 2, inputs.level_scales.shape[-1], dtype, device, kept)
    names = ("q", "k", "v", "level_scales", "log_decay", "beta")
    outputs = []
    with torch.no_grad():
        for token in range(tokens):
            now = {name: None if (x := getattr(inputs, name)) is None else x[:, token] for name in names}
            outputs.append(log_linear_attention_step(state=state, scale=inputs.scale, **cast(Any, now)))
        exact = {name: None if (x := getattr(inputs, name)) is None else x.double() for name in names}
        wanted, _ = log_linear_attention(scale=inputs.scale, backend="reference", **cast(Any, exact))
    return relative_error(torch.stack(outputs, dim=1), wanted)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a tensor much larger than any cache."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    timing = _time_passes(lambda: target.copy_(source), lambda: None, device, 1, 0.5)
    return 2 * source.nbytes / (timing.median_ms / 1000)


def _copies(moved: int, device: torch.device) -> int:
    """So many states that what a step leaves in the L2 cache, of the `moved` bytes, is gone when their turn comes
    again.
    """
    if device.type != "cuda":
        return 1
    return max(1, -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // moved))


def _timed_steps(
    shape: Shape, position: int, batch: int, levels: int, copies: int, dtype: torch.dtype, device: torch.device,
    kept: Kept, budget_s: float,
):  # fmt: skip
    """Timing of a step, and the peak of memory with one state."""
    drawn = make_inputs(shape, "linear", batch, 1, dtype, device)
    assert drawn.q is not None and drawn.k is not None and drawn.v is not None
    scales = 0.2 + torch.rand(batch, shape.num_heads, levels, device=device)
    log_decay, beta = (None if x is None else x[:, 0] for x in (drawn.log_decay, drawn.beta))
    q, k, v = (x[:, 0] for x in (drawn.q, drawn.k, drawn.v))
    with PeakMemory(device) as peak:
        states = [zero_state(shape, batch, levels, dtype, device, kept) for _ in range(copies)]

        def reset() -> None:
            for state in states:
                _fill(state, start_of(position))

        @torch.no_grad()
        def run_pass() -> None:
            for _ in range(STEPS):
                for state in states:
                    log_linear_attention_step(q, k, v, scales, state, log_decay=log_decay, beta=beta, scale=drawn.scale)

        whole: Callable[[], object] = run_pass
        if device.type == "cuda":
            reset()
            run_pass()
            synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run_pass()
            whole = graph.replay
        timing = _time_passes(whole, reset, device, STEPS * copies, budget_s)
    return timing, peak.bytes
