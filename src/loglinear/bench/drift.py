"""How far steps drift from float64: one long sequence, token by token, in every way that states are kept.

Two heads of the same sequence differ in how long they remember: decays of one are uniform in (-0.1, 0), so that it
forgets within a few dozen tokens, those of the other in (-1e-4, 0), so that a bucket is rounded thousands of times
before it is forgotten. The error is that of the newest outputs, against float64 steps on the same numbers.

    H heads · K key width · V value width · L levels
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from loglinear import fenwick, log_linear_attention_step
from loglinear.bench import rows as rows_module
from loglinear.bench.decoding import Kept
from loglinear.bench.inputs import Shape
from loglinear.bench.rows import OK, Row
from loglinear.bench.worker import relative_error
from loglinear.state import FenwickState

DRIFT = "drift"
DECAYS = (0.1, 1e-4)  # of the heads: log-decays lie between zero and minus this
WIDTH = 32
NEWEST = 1000  # tokens whose outputs are compared
WINDOW = 16
SHAPES = (
    Shape("mamba2-32", "scalar", len(DECAYS), 1, WIDTH, WIDTH, len(DECAYS), WIDTH, "small heads of Mamba-2"),
    Shape(
        "gated-deltanet-32", "delta", len(DECAYS), len(DECAYS), WIDTH, WIDTH, len(DECAYS), WIDTH, "of Gated DeltaNet"
    ),
)
KEPT = tuple(Kept(dtype, window) for window in (None, WINDOW) for dtype in (None, "bfloat16"))


def run_drift(
    lengths: Sequence[int],
    on_row: Callable[[Row], None] | None = None,
    on_case: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Rows of the errors at `lengths` tokens, for each of `SHAPES`, `KEPT` and `DECAYS`; on a processor, in torch.

    `error` is the relative Frobenius error of the outputs of the newest `NEWEST` tokens (all, where there are fewer).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # states are small: more threads would only wait for each other
    try:
        return _rows(lengths, on_row, on_case)
    finally:
        torch.set_num_threads(threads)


def _rows(lengths: Sequence[int], on_row: Callable | None, on_case: Callable | None) -> list[Row]:
    environment, found = rows_module.environment("cpu"), []
    last = max(lengths)
    for number, shape in enumerate(SHAPES):
        for length, errors in drift(shape, lengths, lambda token, at=number: _tell(on_case, at, token, last)):
            for (kept, head), error in sorted(errors.items(), key=lambda entry: entry[0][1]):
                row = Row(
                    suite=DRIFT,
                    operator=kept.labelled("delta rule" if shape.delta else "decay per head"),
                    mechanism="log-linear",
                    shape=shape.name,
                    direction=f"decays to {DECAYS[head]:g}",
                    batch=1,
                    length=length,
                    heads=shape.num_heads,
                    groups=shape.num_groups,
                    key_dim=shape.key_dim,
                    value_dim=shape.value_dim,
                    levels=fenwick.full_num_levels(last),
                    dtype="float32",
                    status=OK,
                    error=error,
                    **asdict(environment),
                )
                found.append(row)
                if on_row is not None:
                    on_row(row)
    return found


def _tell(on_case: Callable[[int, int, str], None] | None, shape: int, token: int, last: int) -> None:
    if on_case is not None and token % NEWEST == 0:
        on_case(shape * last + token, len(SHAPES) * last, f"{SHAPES[shape].name}, errors of steps")


@torch.inference_mode()
def drift(
    shape: Shape, lengths: Sequence[int], on_token: Callable[[int], object] = lambda token: None
) -> Iterator[tuple[int, dict[tuple[Kept, int], float]]]:
    """Errors at each of `lengths`, by how states are kept and by head."""
    generator = torch.Generator().manual_seed(0)
    levels = fenwick.full_num_levels(max(lengths))
    zeros = FenwickState.zeros(1, levels, shape.num_heads, shape.key_dim, shape.value_dim)
    exact, states = zeros.to(dtype=torch.float64), {kept: _state(zeros, shape, kept) for kept in KEPT}
    wanted: list[Tensor] = []
    outputs: dict[Kept, list[Tensor]] = {kept: [] for kept in KEPT}
    for position in range(max(lengths)):
        on_token(position)
        token = _token(shape, levels, generator)
        wide = {name: x.double() for name, x in token.items()}
        wanted.append(log_linear_attention_step(state=exact, **cast(Any, wide)))
        for kept, state in states.items():
            if state.log_decays is None:
                o = log_linear_attention_step(state=state, **cast(Any, token))
            else:
                o = _deferring_step(state, token)
            outputs[kept].append(o)
        for written in (wanted, *outputs.values()):
            del written[:-NEWEST]
        if position + 1 in lengths:
            truth = torch.stack(wanted)
            yield (
                position + 1,
                {
                    (kept, head): relative_error(torch.stack(found)[:, :, head], truth[:, :, head])
                    for kept, found in outputs.items()
                    for head in range(shape.num_heads)
                },
            )


def _token(shape: Shape, levels: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Arguments of a step, as `make_inputs` draws them but for the decays."""

    def normal(*size: int) -> Tensor:
        return torch.randn(1, *size, generator=generator)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(1, *size, generator=generator)

    heads, key = shape.num_heads, (shape.num_groups, shape.key_dim)
    token = {
        "q": torch.nn.functional.normalize(normal(*key), dim=-1),
        "k": torch.nn.functional.normalize(normal(*key), dim=-1),
        "v": normal(heads, shape.value_dim),
        "level_scales": uniform(0.2, 1.2, heads, levels),
        "log_decay": -torch.tensor(DECAYS) * uniform(0.0, 1.0, heads),
    }
    return {**token, "beta": uniform(0.1, 0.9, heads)} if shape.delta else token


def _state(zeros: FenwickState, shape: Shape, kept: Kept) -> FenwickState:
    """An empty state that is kept in this way."""
    state = zeros.clone()
    if kept.state_dtype is not None:
        state = state.to(dtype=getattr(torch, kept.state_dtype))
    delta = shape.delta
    if kept.decoding_window is not None:
        window = kept.decoding_window
        return state.with_window(window, num_groups=shape.num_groups, decay="head", delta=delta)
    return state if delta else state.with_pending()


def _deferring_step(state: FenwickState, token: dict[str, Tensor]) -> Tensor:
    """A step of a state with pending decays as the kernel takes it: only what merges is written, and rounded. (The
    step in torch applies the decays to all buckets.)
    """
    assert state.log_decays is not None
    wide = state.to(dtype=torch.float32).settled()
    o = log_linear_attention_step(state=wide, **cast(Any, token))
    state.positions.copy_(wide.positions)
    target = fenwick.carry_level(state.positions, state.num_levels)
    levels = torch.arange(state.num_levels)
    state.buckets[:, target] = wide.buckets[:, target].to(state.buckets.dtype)
    state.log_decays.add_(token["log_decay"][:, None])
    state.log_decays.mul_(torch.logical_and(levels > target, state.occupied())[..., None])
    return o
