"""Says what each kernel of a call of the operator takes on this machine's GPU, and what other launch options would.

    PYTHONPATH=src python tests/ops/time_kernels.py delta --heads 32 --key 128 --value 128
    PYTHONPATH=src python tests/ops/time_kernels.py delta --try _walk_kernel:8:1 --try _walk_kernel:8:3
    PYTHONPATH=src python tests/ops/time_kernels.py delta --set delta.CHUNK=64,_below_kernel:8:2

Milliseconds of a call, forward without gradients and forward with backward: medians of calls by events, which wait
for the host, the sum of their kernels, and means by kernel from torch's profiler. `--try
KERNEL:WARPS:STAGES[:REGISTERS]` changes a launch (which cannot tell two kernels of one name apart), `--set
MODULE.NAME=VALUE` (or several, with commas, launches among them) constants of modules of `loglinear.ops.triton`.
Beside either stands by how much output and gradients then differ from those of the usual call, relative to them: the
tests compare them with what is right.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import statistics
from collections.abc import Callable
from types import ModuleType

import torch
import triton
from triton.runtime.jit import JITFunction

from loglinear import log_linear_attention

NAMES = ("q", "k", "v", "level_scales", "log_decay", "beta")
LEAST = 0.02  # milliseconds: kernels below are not shown

changed: dict[str, dict[str, int]] = {}  # launch options by kernel, in the place of its own


def launch_as_changed() -> None:
    """From now on launches take their options from `changed`."""
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        return launch(self, *args, grid=grid, warmup=warmup, **options | changed.get(self.fn.__name__, {}))

    JITFunction.run = run


def set_constant(one: str) -> tuple[ModuleType, str, object]:
    """Sets MODULE.NAME=VALUE; module, name and the value before."""
    place, value = one.split("=")
    module_name, name = place.rsplit(".", 1)
    module = importlib.import_module(f"loglinear.ops.triton.{module_name}")
    before = getattr(module, name)
    setattr(module, name, ast.literal_eval(value))
    return module, name, before


def set_launch(one: str) -> str:
    """Sets KERNEL:WARPS:STAGES[:REGISTERS]; the kernel."""
    name, *numbers = one.split(":")
    changed[name] = dict(zip(("num_warps", "num_stages", "maxnreg"), map(int, numbers), strict=False))
    return name


def milliseconds(call: Callable[[], object], times: int = 10) -> float:
    """Median by events, after three calls."""
    found = []
    for number in range(3 + times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            found.append(begin.elapsed_time(end))
    return statistics.median(found)


def by_kernel(call: Callable[[], object], times: int = 4) -> dict[str, float]:
    """Milliseconds of a call by kernel, the longest first."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / times / 1000 for event in profile.key_averages()}
    return {name: found[name] for name in sorted(found, key=lambda name: -found[name])}


def inputs_of(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Arguments of the operator: normalised keys, decays of about 0.95, every level its own scale."""
    torch.manual_seed(0)
    place = {"device": "cuda", "dtype": getattr(torch, options.dtype)}
    batch, tokens, heads = options.batch, options.tokens, options.heads
    groups = options.groups or heads
    q, k = (torch.nn.functional.normalize(torch.randn(batch, tokens, groups, options.key, **place), dim=-1)
            for _ in range(2))  # fmt: skip
    found = {
        "q": q, "k": k, "v": torch.randn(batch, tokens, heads, options.value, **place),
        "level_scales": torch.rand(batch, tokens, heads, options.levels, device="cuda"),
        "log_decay": -0.1 * torch.rand(batch, tokens, heads, device="cuda"),
    }  # fmt: skip
    if options.family == "delta":
        found["beta"] = torch.rand(batch, tokens, heads, **place)
    return {name: x.requires_grad_() for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["scalar", "delta"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    for name, default in (("batch", 4), ("tokens", 16384), ("heads", 6), ("key", 192), ("value", 384), ("levels", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--groups", type=int, help="default: one for each head")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="KERNEL:WARPS:STAGES[:REGISTERS]")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="MODULE.NAME=VALUE")
    options = parser.parse_args()
    inputs = inputs_of(options)
    launch_as_changed()

    def forward() -> torch.Tensor:
        q, k, v, scales, log_decay, beta = (inputs.get(name) for name in NAMES)
        assert q is not None and k is not None and v is not None
        return log_linear_attention(q, k, v, scales, log_decay=log_decay, beta=beta, backend="triton")[0]

    cotangent = torch.randn_like(forward())

    def without_gradients() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), list(inputs.values()), cotangent)

    def results() -> list[torch.Tensor]:
        return [forward().detach(), *both()]

    def difference() -> float:
        pairs = zip(results(), usual, strict=True)
        return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)

    def show(title: str, call: Callable[[], object]) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = milliseconds(call)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        kernels = by_kernel(call)
        total = sum(kernels.values())
        print(f"{title}: {took:.3f} ms, {total:.3f} in kernels, {peak:.2f} GiB beside the inputs", flush=True)
        for name, each in kernels.items():
            if each >= LEAST:
                print(f"  {each:8.3f}  {name[:100]}")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    usual = results()
    show("forward", without_gradients)
    show("forward and backward", both)
    for one in options.tries:
        name = set_launch(one)
        try:
            print(f"{one}: {by_kernel(both).get(name, 0.0):.3f} ms, differs by {difference():.1e}", flush=True)
        except Exception as error:  # whatever a compiler or a launch can do: the next one is tried
            print(f"{one}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        del changed[name]
    for one in options.sets:
        before = [set_constant(each) for each in one.split(",") if ":" not in each]
        launches = [set_launch(each) for each in one.split(",") if ":" in each]
        try:
            print(f"{one}: differs by {difference():.1e}")
            show("forward", without_gradients)
            show("forward and backward", both)
        except Exception as error:
            print(f"{one}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        for module, name, value in before:
            setattr(module, name, value)
        for name in launches:
            del changed[name]


if __name__ == "__main__":
    main()
