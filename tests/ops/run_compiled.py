"""Runs a call of the operator, forward and backward, on what its kernels are compiled to for Hopper, without a GPU.

    PYTHONPATH=src:tests python tests/ops/run_compiled.py delta --key 192 --value 64 --tokens 300

Every launch runs the PTX of the kernel (`ptx_on_cpu`). A row for each: its programs, races, seconds; then the errors of
the output and the gradients against the torch backend in float64. Compilers have made wrong kernels of right ones,
which the interpreter cannot tell. Run it alone: what it puts in Triton's place stays there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time

import torch
import triton
from compile_kernels import HOPPER, NoDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from loglinear import FenwickState, log_linear_attention
from loglinear.ops import interface
from loglinear.ops.triton import delta_chunks
from operator_cases import Inputs, Shape, gradients, make_inputs, random_state, relative_error, with_buckets
from ptx_on_cpu import run


@dataclasses.dataclass
class Launch:
    kernel: str
    programs: int
    races: int
    seconds: float


def run_instead_of_launching() -> list[Launch]:
    """From now on launches run here; the list grows with each."""
    launches: list[Launch] = []
    compile_for = JITFunction.run

    def launch(self, *args, grid, warmup, **options):
        began = time.perf_counter()
        compiled = compile_for(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | options
        signature = compiled.src.signature  # without what was taken for a constant
        arguments = [given[name] for name in self.arg_names if signature.get(name, "constexpr") != "constexpr"]
        shape = compiled.metadata
        races = run(compiled.asm["ptx"], arguments, grid, shape.num_warps, shape.shared)
        seconds = round(time.perf_counter() - began, 1)
        launches.append(Launch(self.fn.__name__, math.prod(grid), races, seconds))

    driver.set_active(NoDriver(HOPPER))
    JITFunction.run = launch
    return launches


def results(backend: str, inputs: Inputs, state: FenwickState | None) -> dict[str, torch.Tensor]:
    """Output, returned state and gradients."""
    leaves = inputs.leaves()
    if state is not None:
        state = FenwickState(state.buckets.detach().requires_grad_(), state.positions)
    o, final = log_linear_attention(
        **leaves.arguments(), initial_state=state, return_state=state is not None, backend=backend
    )
    outputs = {"o": o} if final is None else {"o": o, "state": final.buckets}
    torch.manual_seed(1)
    cotangents = [torch.randn(x.shape, dtype=torch.float64) for x in outputs.values()]
    found = gradients(list(outputs.values()), cotangents, with_buckets(leaves, state))
    return {name: x.detach() for name, x in outputs.items()} | {f"d {name}": x for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["scalar", "delta"])
    for name, default in {"key": 192, "value": 64, "tokens": 300, "heads": 1, "levels": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--position", type=int, help="with a state in, of so many tokens, and out; default: without")
    parser.add_argument(
        "--gluon", action="store_true", help="kernels for Hopper where this Triton has not run them, too"
    )
    parser.add_argument("--json", action="store_true", help="rows and errors as JSON")
    options = parser.parse_args()
    launches = run_instead_of_launching()
    interface._has_kernels = lambda *_: True  # for tensors that are not on a GPU
    if options.gluon:
        delta_chunks.GLUON = delta_chunks.GLUON_WIDTHS = True

    torch.manual_seed(0)
    shape = Shape(1, options.tokens, options.heads, options.heads, options.key, options.value, options.levels)
    mixer = {"scalar": "mamba2", "delta": "gated_deltanet"}[options.family]
    inputs = make_inputs(mixer, shape, torch.bfloat16, decay=0.01)
    state = None if options.position is None else random_state(shape, [options.position], torch.float32)
    found = results("triton", inputs, state)
    exact = None if state is None else state.to(dtype=torch.float64)
    wanted = results("torch", inputs.to("cpu", torch.float64), exact)
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    if options.json:
        print(json.dumps({"launches": [dataclasses.asdict(one) for one in launches], "errors": errors}))
        return
    print(f"Triton {triton.__version__}, sm_{HOPPER}")
    for one in launches:
        print(f"{one.kernel:28} {one.programs:4} programs {one.races:4} races {one.seconds:6.1f} s")
    print("errors: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))


if __name__ == "__main__":
    main()
