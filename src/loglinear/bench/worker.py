"""The process that runs cases: reads a case (one line of JSON) from its input, writes results (lines of
JSON) to its output.

It is a process of its own so that a case which crashes, hangs or takes all memory costs one row and not the
run, and so that the peak of resident memory belongs to one case.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from loglinear.bench.inputs import SHAPES, Inputs, Shape, make_inputs
from loglinear.bench.measure import PeakMemory, limit_memory, synchronize, time_call
from loglinear.bench.operators import OPERATORS, NotSupported, Operator

FORWARD, BOTH = "forward", "forward+backward"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Relative Frobenius error (forward, gradients) that the library's own operators must keep; the 16-bit ones
# compute in 32 bits.
TOLERANCES = {"float32": (2e-6, 1e-5), "bfloat16": (5e-3, 1e-2), "float16": (5e-3, 1e-2)}
# Peers are only required not to be wrong: more than this is no rounding.
PEER_TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 4e-2), "float16": (2e-2, 4e-2)}
# Odd on purpose; peers that only take multiples of their block get one.
CHECK_LENGTH = 333
PEER_CHECK_LENGTH = 384
_CHECKED_ROWS = 16


@dataclass(frozen=True)
class Case:
    """One operator on one shape, batch and length; `check` compares with the reference on a short input
    instead of timing.
    """

    operator: str
    shape: str
    batch: int
    length: int
    dtype: str
    directions: tuple[str, ...]
    device: str
    budget_s: float
    check: bool = False


@dataclass(frozen=True)
class Result:
    """What a worker says about one direction of a case; `direction` is empty when it concerns all of them."""

    direction: str
    status: str
    time_ms: float | None = None
    time_low_ms: float | None = None
    time_high_ms: float | None = None
    repeats: int | None = None
    peak_memory_bytes: int | None = None
    error: float | None = None
    batch: int | None = None
    length: int | None = None
    levels: int | None = None
    tolerance: float | None = None
    cache_bytes: int | None = None
    occupied_bytes: int | None = None
    moved_bytes: int | None = None
    bandwidth_share: float | None = None


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`; infinite where `got` is not finite."""
    got, wanted = got.detach().double(), wanted.detach().double()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _leaves(inputs: Inputs) -> Inputs:
    return inputs.map(lambda tensor: tensor.detach().requires_grad_(True))


def _adapted(operator: Operator, inputs: Inputs) -> Inputs:
    return operator.adapt(inputs) if operator.adapt is not None else inputs


def check_operator(operator: Operator, shape: Shape, dtype: str, device: str) -> Result:
    """Output and all gradients against the fp64 reference, on a few heads of `shape`."""
    heads = 2 * max(1, min(2, shape.num_heads // shape.num_groups))
    groups = max(1, heads * shape.num_groups // shape.num_heads)
    few = Shape(
        shape.name,
        shape.family,
        heads,
        groups,
        shape.key_dim,
        shape.value_dim,
        2,
        shape.attention_head_dim,
        shape.note,
    )
    length = CHECK_LENGTH if operator.ours else PEER_CHECK_LENGTH
    # An unusual seed: the check and the timing see different numbers.
    drawn = _adapted(operator, make_inputs(few, operator.kind, 1, length, DTYPES[dtype], device, seed=20_260))
    inputs, exact = _leaves(drawn), _leaves(drawn.map(lambda tensor: tensor.double()))
    output, wanted = operator.prepare(inputs)(), operator.reference(exact)
    forward_error = relative_error(output, wanted)
    towards = torch.randn_like(wanted)
    gradients = torch.autograd.grad(output, list(inputs.tensors().values()), towards.to(output.dtype))
    exact_gradients = torch.autograd.grad(wanted, list(exact.tensors().values()), towards.to(output.dtype).double())
    errors = map(relative_error, gradients, exact_gradients)
    backward_error, which = max(zip(errors, inputs.tensors(), strict=True))
    forward_limit, backward_limit = tolerance(operator, dtype)
    worst = max(forward_error, backward_error)
    if forward_error > forward_limit:
        return Result("", f"wrong: error {forward_error:.2g} > {forward_limit:g} in the output", error=worst)
    if backward_error > backward_limit:
        return Result(
            BOTH,
            f"wrong: error {backward_error:.2g} > {backward_limit:g} in the gradient of {which}",
            error=backward_error,
        )
    return Result("", "ok", error=worst)


def tolerance(operator: Operator, dtype: str) -> tuple[float, float]:
    return (TOLERANCES if operator.ours else PEER_TOLERANCES)[dtype]


def tolerance_of(dtype: str) -> float:
    """Of a forward call of this library."""
    return TOLERANCES[dtype][0]


def run_case(case: Case) -> Iterator[Result]:
    """Measures one case, a result per direction, forward first."""
    operator, shape, device = OPERATORS[case.operator], SHAPES[case.shape], torch.device(case.device)
    if case.check:
        yield check_operator(operator, shape, case.dtype, case.device)
        return
    if device.type == "cpu":
        _warm_up(operator, shape, case)
    drawn = make_inputs(shape, operator.kind, case.batch, case.length, DTYPES[case.dtype], device)
    inputs = _adapted(operator, drawn)
    del drawn
    for direction in case.directions:
        call = _forward_call(operator, inputs) if direction == FORWARD else _backward_call(operator, inputs)
        if device.type == "cuda":
            call()  # compiles, tunes, and fills the allocator's cache
        started = time.perf_counter()
        with PeakMemory(device) as peak:
            output = call()
        first_s = time.perf_counter() - started
        error = _row_error(operator, inputs, output) if direction == FORWARD else None
        del output
        limit = tolerance(operator, case.dtype)[0]
        if error is not None and not error <= limit:
            yield Result("", f"wrong: error {error:.2g} > {limit:g} at this length", error=error)
            return
        timing = time_call(call, device, case.budget_s, first_s)
        yield Result(
            direction,
            "ok",
            timing.median_ms,
            timing.low_ms,
            timing.high_ms,
            timing.repeats,
            peak.bytes,
            error,
        )


def _warm_up(operator: Operator, shape: Shape, case: Case) -> None:
    """A short call, so that thread pools and libraries loaded on first use are not counted as memory of the
    measured one.
    """
    few = _adapted(operator, make_inputs(shape, operator.kind, 1, 128, DTYPES[case.dtype], case.device))
    _backward_call(operator, few)()
    gc.collect()


def _forward_call(operator: Operator, inputs: Inputs) -> Callable[[], Tensor]:
    bound = operator.prepare(inputs)

    def call() -> Tensor:
        with torch.no_grad():
            return bound()

    return call


def _backward_call(operator: Operator, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    leaves = _leaves(inputs)
    bound = operator.prepare(leaves)
    tensors = list(leaves.tensors().values())
    source = inputs.attention[2] if inputs.attention is not None else inputs.v
    assert source is not None
    towards = torch.ones_like(source)  # the output has the shape and dtype of v
    return lambda: torch.autograd.grad(bound(), tensors, towards)


def _row_error(operator: Operator, inputs: Inputs, output: Tensor | tuple[Tensor, ...]) -> float | None:
    """The error of a few rows of the output at the timed length, the newest among them; None where there is no room
    for the fp64 ones.
    """
    source = inputs.attention[0] if inputs.attention is not None else inputs.q
    assert source is not None and isinstance(output, Tensor)
    length = source.shape[2] if inputs.attention is not None else source.shape[1]
    rows = torch.linspace(0, length - 1, min(_CHECKED_ROWS, length), dtype=torch.float64).long().to(source.device)
    try:
        wanted = operator.expected_rows(inputs, rows)
    except (MemoryError, torch.OutOfMemoryError):
        return None
    return relative_error(operator.rows_of(output, rows), wanted)


def _describe(error: BaseException) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message[:160]


def guarded(results: Iterator[Result]) -> Iterator[Result]:
    """Turns failures into results that say what happened. A broken GPU context is raised: the process must
    then end.
    """
    try:
        yield from results
    except NotSupported as error:
        yield Result("", f"not supported: {_describe(error)}")
    except (MemoryError, torch.OutOfMemoryError):
        yield Result("", "out of memory")
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        message = _describe(error)
        if "alloc" in message and "memory" in message:
            yield Result("", "out of memory")
        elif "illegal memory access" in message or "device-side assert" in message:
            raise
        else:
            yield Result("", f"not supported: {message}")


def main() -> None:
    """Serves cases until the input ends."""
    # Libraries may print; the results keep the real output for themselves.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    limited = False
    for line in sys.stdin:
        request = json.loads(line)
        if request["device"] == "cpu" and not limited:
            limit_memory()
            limited = True
        started = time.perf_counter()
        for result in guarded(_dispatch(request)):
            print(json.dumps(asdict(result)), file=output)
        gc.collect()
        if torch.cuda.is_initialized():
            synchronize(torch.device(request["device"]))
            torch.cuda.empty_cache()
        print(json.dumps({"done": time.perf_counter() - started}), file=output)


def _dispatch(request: dict) -> Iterator[Result]:
    kind = request.pop("kind")
    if kind == "models":
        from loglinear.bench.models import ModelCase, run_model_case

        return run_model_case(ModelCase(**request))
    if kind in ("decode", "steps"):
        from loglinear.bench.decoding import DecodeCase, StepCase, run_decode_case, run_step_case

        request = {name: tuple(value) if isinstance(value, list) else value for name, value in request.items()}
        return run_decode_case(DecodeCase(**request)) if kind == "decode" else run_step_case(StepCase(**request))
    request["directions"] = tuple(request["directions"])
    return run_case(Case(**request))


if __name__ == "__main__":
    main()
