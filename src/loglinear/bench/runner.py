"""Runs suites of cases in worker processes, each under a time cap, and makes rows of what they say."""

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from loglinear import fenwick
from loglinear.bench import rows as rows_module
from loglinear.bench.decoding import DECODING, PLAIN, STEPPED, DecodeCase, Kept, StepCase
from loglinear.bench.decoding import STEP as OPERATOR_STEP
from loglinear.bench.inputs import SHAPES, Shape
from loglinear.bench.models import COMPILED, STEP, ModelCase
from loglinear.bench.operators import OPERATORS, Operator, select
from loglinear.bench.rows import OK, Environment, Row
from loglinear.bench.worker import BOTH, DTYPES, FORWARD, Case, Result, tolerance
from loglinear.models import LogLinearConfig

K = 1024


@dataclass(frozen=True)
class Suite:
    """Which operators are measured on which shapes and lengths.

    `batches` are "one" (a batch of one sequence) and "tokens" (as many sequences as make `tokens_per_call`).
    `decoded` presets and the step of `stepped` shapes are measured at `contexts`, for each number of `rows`.
    Their states are kept as `kept` says. `budget_s` is the time spent on repeating one call, `cap_s` the longest that
    one case (compiling included) may take before it is given up.
    """

    device: str
    shapes: tuple[str, ...]
    operators: tuple[str, ...]
    lengths: tuple[int, ...]
    dtype: str
    batches: tuple[str, ...] = ("one",)
    directions: tuple[str, ...] = (FORWARD, BOTH)
    tokens_per_call: int = 65_536
    budget_s: float = 1.0
    cap_s: float = 120.0
    presets: tuple[str, ...] = ()
    compile: bool = False
    model_lengths: tuple[int, ...] = ()
    decoded: tuple[str, ...] = ()  # presets
    stepped: tuple[str, ...] = ()  # shapes
    contexts: tuple[int, ...] = ()
    rows: tuple[int, ...] = (1,)
    kept: Kept = PLAIN  # of decoded and stepped
    drifted: tuple[int, ...] = ()  # tokens after which errors of steps are taken

    def __post_init__(self) -> None:
        select(list(self.operators))
        for preset in self.presets:
            LogLinearConfig.preset(preset)  # refuses an unknown one, with the nearest
        for preset in self.decoded:
            LogLinearConfig.preset(preset, **self.kept._asdict())
        LogLinearConfig(**self.kept._asdict())
        unknown = [name for name in (*self.shapes, *self.stepped) if name not in SHAPES]
        if unknown:
            raise ValueError(f"unknown shape {', '.join(unknown)}; known are {', '.join(SHAPES)}")
        for name, values, allowed in (
            ("batches", self.batches, ("one", "tokens")),
            ("directions", self.directions, (FORWARD, BOTH)),
            ("dtype", (self.dtype,), tuple(DTYPES)),
        ):
            wrong = [value for value in values if value not in allowed]
            if wrong:
                raise ValueError(f"{name} must be among {', '.join(allowed)}, got {', '.join(wrong)}")
        if any(length < 1 for length in (*self.lengths, *self.model_lengths, *self.contexts, *self.drifted)):
            raise ValueError(
                f"lengths must be at least 1, got {self.lengths}, {self.model_lengths} and {self.contexts}"
            )
        if not self.rows or any(number < 1 for number in self.rows):
            raise ValueError(f"rows must be numbers of sequences, at least 1, got {self.rows}")
        for name in ("budget_s", "cap_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number of seconds, more than 0, got {value}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(
                f"device {self.device} was asked for, but torch sees no CUDA device here; use the CPU suite"
            )


def cpu_suite(**changes) -> Suite:
    """The suite for a processor: two small shapes, 1K to 64K tokens, float32, about ten minutes on two
    cores.
    """
    suite = Suite(
        device="cpu",
        shapes=("mamba2-2-heads", "gated-deltanet-2-heads"),
        operators=("log-linear-torch", "linear-torch", "softmax-flash", "softmax-math"),
        lengths=tuple(K * scale for scale in (1, 2, 4, 8, 16, 32, 64)),
        dtype="float32",
        budget_s=1.0,
        cap_s=180.0,
    )
    return replace(suite, **changes)


def gpu_suite(**changes) -> Suite:
    """The suite for a GPU: the paper's shapes in bfloat16, 1K to 1M tokens, at batch 1 and at 65,536 tokens
    a call.
    """
    suite = Suite(
        device="cuda",
        shapes=("mamba2", "gated-deltanet"),
        operators=(
            "log-linear",
            "linear",
            "softmax-math",
            "softmax-flash",
            "softmax-cudnn",
            "sliding-window",
            "block-sparse",
            "fla-log-linear",
            "fla-simple-gla",
            "fla-gated-deltanet",
        ),
        lengths=tuple(K * scale for scale in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)),
        dtype="bfloat16",
        batches=("one", "tokens"),
        budget_s=0.2,
        cap_s=60.0,
    )
    return replace(suite, **changes)


def operator_cases(suite: Suite) -> list[Case]:
    """Every case of a suite: per operator and shape a check first, then lengths from short to long."""
    cases = []
    for shape in (SHAPES[name] for name in suite.shapes):
        for operator in select(list(suite.operators)):
            if shape.family not in operator.families:
                continue
            common = {
                "operator": operator.name,
                "shape": shape.name,
                "dtype": suite.dtype,
                "directions": suite.directions,
                "device": suite.device,
                "budget_s": suite.budget_s,
            }
            cases.append(Case(batch=1, length=0, check=True, **common))
            seen = set()
            for batches in suite.batches:
                for length in sorted(suite.lengths):
                    batch = 1 if batches == "one" else max(1, suite.tokens_per_call // length)
                    if (batch, length) not in seen:
                        cases.append(Case(batch=batch, length=length, **common))
                    seen.add((batch, length))
    return cases


class Worker:
    """A worker process that answers one case at a time; `run` never raises for what happens inside it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._complaints = tempfile.TemporaryFile(mode="w+", errors="replace")

    def _start(self) -> subprocess.Popen:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
        process = subprocess.Popen(
            [sys.executable, "-m", "loglinear.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        self._lines = lines
        return process

    def run(self, request: dict, cap_s: float) -> list[Result]:
        """Results of one case; the last one says so if the worker was stopped at `cap_s` seconds or ended by
        itself.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        assert self._process.stdin is not None
        results: list[Result] = []
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; the queue says so below
        deadline = time.monotonic() + cap_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.stop()
                return [*results, Result("", f"given up after {cap_s:.0f} s")]
            if line is None:
                code = self._process.wait()
                self._process = None
                return [
                    *results,
                    Result("", f"crashed: the process ended with code {code}{self._last_complaint()}"),
                ]
            message = json.loads(line)
            if "done" in message:
                return results
            results.append(Result(**message))

    def _last_complaint(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read().split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f" ({said[-1][:160]})" if said else ""

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass
class _Progress:
    """What is known about an operator on a shape while its cases run."""

    error: float | None = None
    verdicts: dict[str, str] = field(default_factory=dict)  # direction -> why it is not timed at all
    too_long: dict[tuple[str, bool], tuple[int, str]] = field(default_factory=dict)  # -> length that failed, and how


def run_operators(
    suite: Suite,
    on_row: Callable[[Row], None] | None = None,
    on_case: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Runs the operator part of a suite.

    Args:
        suite: what to run.
        on_row: called with every row as soon as there is one.
        on_case: called before every case with its number, the number of cases, and its description.

    Returns:
        One row per operator, shape, batch, length and direction, those that could not run included.
    """
    environment = rows_module.environment(suite.device)
    cases = operator_cases(suite)
    rows: list[Row] = []
    measured: dict[tuple, list[Result]] = {}
    progress: dict[tuple[str, str], _Progress] = {}
    worker = Worker()
    try:
        for number, case in enumerate(cases):
            operator, shape = OPERATORS[case.operator], SHAPES[case.shape]
            state = progress.setdefault((case.operator, case.shape), _Progress())
            if on_case is not None:
                what = "check against fp64" if case.check else f"{case.batch} x {case.length} tokens"
                on_case(number, len(cases), f"{shape.name}, {operator.name}, {what}")
            key = _measurement_key(case, operator, shape)
            reason = _not_worth_running(case, operator, state)
            if reason is not None:
                results = [Result("", reason)]
            elif key in measured:
                results = measured[key]
            else:
                if suite.device == "cpu":
                    worker.stop()  # peak memory is that of a fresh process
                results = worker.run({"kind": "operators", **asdict(case)}, suite.cap_s)
                measured[key] = results
            if case.check:
                _note_check(state, results, suite.directions)
                continue
            for row in _rows_of(case, operator, shape, results, state, environment):
                rows.append(row)
                if on_row is not None:
                    on_row(row)
    finally:
        worker.stop()
    return rows


def _measurement_key(case: Case, operator: Operator, shape: Shape) -> tuple:
    """Softmax attention is the same for two shapes with the same heads: it is then measured once."""
    if operator.kind == "attention":
        sizes: tuple = ("attention", shape.attention_heads, shape.attention_head_dim)
    else:
        sizes = (shape.name,)
    return operator.name, sizes, case.batch, case.length, case.check


def _not_worth_running(case: Case, operator: Operator, state: _Progress) -> str | None:
    device = case.device.split(":")[0]
    if device not in operator.devices:
        return f"not supported: runs on {' and '.join(operator.devices)} only"
    longest = (operator.longest or {}).get(device)
    if longest is not None and case.length > longest:
        return f"skipped: longer than {longest} tokens, where this operator stops being worth the time"
    if not case.check and case.directions and all(direction in state.verdicts for direction in case.directions):
        return state.verdicts[case.directions[-1]]
    failures = [state.too_long.get((direction, case.batch == 1)) for direction in case.directions]
    if all(failure is not None and failure[0] < case.length for failure in failures):
        assert failures[-1] is not None
        return f"skipped: {failures[-1][1]} at {failures[-1][0]} tokens already"
    return None


def _note_check(state: _Progress, results: list[Result], directions: Sequence[str]) -> None:
    for result in results:
        state.error = result.error if result.error is not None else state.error
        if result.status != OK:
            for direction in directions if result.direction == "" else (result.direction,):
                state.verdicts[direction] = result.status


def _rows_of(
    case: Case,
    operator: Operator,
    shape: Shape,
    results: list[Result],
    state: _Progress,
    environment: Environment,
) -> list[Row]:
    by_direction = {result.direction: result for result in results}
    rest = by_direction.get("")
    rows = []
    for direction in case.directions:
        result = by_direction.get(direction) or rest or Result(direction, "no answer from the worker")
        if direction in state.verdicts:
            result = Result(direction, state.verdicts[direction])
        if result.status.startswith(("out of memory", "given up")):
            known = state.too_long.get((direction, case.batch == 1))
            if known is None or known[0] > case.length:
                state.too_long[direction, case.batch == 1] = (case.length, result.status)
        attention = operator.kind == "attention"
        heads = shape.attention_heads if attention else shape.num_heads
        width = shape.attention_head_dim
        levels = {"attention": None, "linear": 1, "log-linear": fenwick.full_num_levels(case.length)}[operator.kind]
        errors = [error for error in (state.error, result.error) if error is not None]
        forward_limit, backward_limit = tolerance(operator, case.dtype)
        rows.append(
            Row(
                suite="operators",
                operator=operator.name,
                mechanism=operator.mechanism,
                shape=shape.name,
                direction=direction,
                batch=case.batch,
                length=case.length,
                heads=heads,
                groups=heads if attention else shape.num_groups,
                key_dim=width if attention else shape.key_dim,
                value_dim=width if attention else shape.value_dim,
                levels=levels,
                dtype=case.dtype,
                status=result.status,
                error=max(errors, default=None),
                tolerance=forward_limit if direction == FORWARD else backward_limit,
                **_numbers(result, case.batch * case.length),
                **asdict(environment),
            )
        )
    return rows


def _numbers(result: Result, tokens: int) -> dict[str, float | int | None]:
    return {
        "time_ms": result.time_ms,
        "time_low_ms": result.time_low_ms,
        "time_high_ms": result.time_high_ms,
        "repeats": result.repeats,
        "tokens_per_second": None if result.time_ms is None else tokens / result.time_ms * 1000,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def run_models(
    suite: Suite,
    on_row: Callable[[Row], None] | None = None,
    on_case: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Runs the model part of a suite: a training step of each of `presets` at each of `model_lengths`."""
    environment = rows_module.environment(suite.device)
    cases = [
        ModelCase(preset, length, max(length, suite.tokens_per_call), suite.device, suite.budget_s, suite.compile)
        for preset in suite.presets
        for length in sorted(suite.model_lengths)
    ]
    worker, rows = Worker(), []
    try:
        for number, case in enumerate(cases):
            if on_case is not None:
                on_case(number, len(cases), f"{case.preset}, training at {case.length} tokens")
            if suite.device == "cpu":
                worker.stop()
            result = worker.run({"kind": "models", **asdict(case)}, suite.cap_s)[-1]
            batch = result.batch or max(1, case.tokens // case.length)
            row = Row(
                suite="models",
                operator=case.preset,
                mechanism="model",
                shape="model",
                direction=result.direction or (f"{STEP}, {COMPILED}" if case.compile else STEP),
                batch=batch,
                length=case.length,
                heads=None,
                groups=None,
                key_dim=None,
                value_dim=None,
                levels=None,
                dtype="float32" if suite.device == "cpu" else "bfloat16",
                status=result.status,
                **_numbers(result, batch * case.length),
                **asdict(environment),
            )
            rows.append(row)
            if on_row is not None:
                on_row(row)
    finally:
        worker.stop()
    return rows


def run_decoding(
    suite: Suite,
    on_row: Callable[[Row], None] | None = None,
    on_case: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Runs the decoding part of a suite: `decoded` models, then the step of `stepped` shapes, each at all of `contexts`
    and `rows` in one call of the worker, which makes a model once.
    """
    environment = rows_module.environment(suite.device)
    contexts, batches = tuple(sorted(suite.contexts)), tuple(sorted(suite.rows))
    common: dict[str, Any] = {"batches": batches, "device": suite.device, "dtype": suite.dtype}
    common |= {"budget_s": suite.budget_s, **suite.kept._asdict()}
    cases: list[DecodeCase | StepCase] = [DecodeCase(preset, contexts, **common) for preset in suite.decoded]
    cases += [StepCase(shape, contexts, **common) for shape in suite.stepped]
    places = [(context, batch) for context in contexts for batch in batches]
    worker, rows = Worker(), []
    try:
        for number, case in enumerate(cases):
            of_model = isinstance(case, DecodeCase)
            name = case.preset if isinstance(case, DecodeCase) else case.shape
            if on_case is not None:
                on_case(number, len(cases), f"{name}, {'decoding' if of_model else 'steps of the operator'}")
            if suite.device == "cpu":
                worker.stop()
            request = {"kind": "decode" if of_model else "steps", **asdict(case)}
            results = worker.run(request, suite.cap_s * len(places))
            found = {(result.length, result.batch): result for result in results}
            direction = DECODING if of_model else OPERATOR_STEP
            unknown = Result(direction, "no answer from the worker")
            rest = next((result for result in results if result.length is None), unknown)
            for context, batch in places:
                result = found.get((context, batch)) or rest
                row = _decoding_row(case, result, context, batch, direction, environment)
                rows.append(row)
                if on_row is not None:
                    on_row(row)
    finally:
        worker.stop()
    return rows


def _decoding_row(
    case: DecodeCase | StepCase, result: Result, context: int, batch: int, direction: str, environment: Environment
) -> Row:
    shape = SHAPES[case.shape] if isinstance(case, StepCase) else None
    kept = Kept(case.state_dtype, case.decoding_window)
    return Row(
        suite="decode" if shape is None else "steps",
        operator=kept.labelled(case.preset if isinstance(case, DecodeCase) else STEPPED),
        mechanism="model" if shape is None else "log-linear",
        shape="model" if shape is None else shape.name,
        direction=direction,
        batch=batch,
        length=context,
        heads=None if shape is None else shape.num_heads,
        groups=None if shape is None else shape.num_groups,
        key_dim=None if shape is None else shape.key_dim,
        value_dim=None if shape is None else shape.value_dim,
        levels=result.levels,
        dtype=case.dtype,
        status=result.status,
        error=result.error,
        tolerance=result.tolerance,
        cache_bytes=result.cache_bytes,
        occupied_bytes=result.occupied_bytes,
        moved_bytes=result.moved_bytes,
        bandwidth_share=result.bandwidth_share,
        **_numbers(result, batch),
        **asdict(environment),
    )
