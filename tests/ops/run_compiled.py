"""Runs a call of the operator, forward and backward, on what its kernels are compiled to for Hopper, without a GPU.

    PYTHONPATH=src:tests python tests/ops/run_compiled.py delta --key 192 --value 64 --tokens 300

Every launch runs the PTX of the kernel (`ptx_on_cpu`). A row for each: its programs, races, seconds; then the errors of
the output and the gradients against the torch backend in float64. Compilers have made wrong kernels of right ones,
which the interpreter cannot tell. Run it alone: what it puts in Triton's place stays there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time

import torch
import triton
from compile_kernels import HOPPER, NoDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from operator_cases import Shape, make_inputs, relative_error
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


def results(call, inputs) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    leaves = inputs.leaves()
    o, *_ = call(**leaves.arguments())
    torch.manual_seed(1)
    grads = torch.autograd.grad(o, list(leaves.present().values()), torch.randn(o.shape).to(o.dtype))
    return dict(zip(("o", *leaves.present()), (o.detach(), *grads), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["scalar", "delta"])
    for name, default in {"key": 192, "value": 64, "tokens": 300, "heads": 1, "levels": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="rows and errors as JSON")
    options = parser.parse_args()
    launches = run_instead_of_launching()

    from loglinear import log_linear_attention
    from loglinear.ops.triton import delta, delta_chunks, scalar

    delta_chunks.MISCOMPILES_WIDE_KEYS = False  # that is the question
    mixer, family = "mamba2", scalar.log_linear_attention_scalar
    if options.family == "delta":
        mixer, family = "gated_deltanet", delta.log_linear_attention_delta

    def compiled(q, k, v, level_scales, log_decay, beta=None):
        return family(
            q, k, v, level_scales, log_decay=log_decay, beta=beta, scale=1.0, cu_seqlens=None, initial_state=None,
            return_state=False,
        )  # fmt: skip

    torch.manual_seed(0)
    shape = Shape(1, options.tokens, options.heads, options.heads, options.key, options.value, options.levels)
    inputs = make_inputs(mixer, shape, torch.bfloat16, decay=0.01)
    found = results(compiled, inputs)
    wanted = results(functools.partial(log_linear_attention, backend="torch"), inputs.to("cpu", torch.float64))
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
