"""The first call of an operator compiles its kernels side by side, and launches none of them before."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from loglinear.ops.triton.launch import compiled_first

ROOT = Path(__file__).parents[2]


def run_script(script, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests/ops'}"} | environment
    return subprocess.run([sys.executable, "-c", script], env=kept, capture_output=True, text=True, check=True).stdout


def test_every_launch_is_of_a_kernel():
    """One of anything else would be a launch on what no kernel has computed."""
    launched, kernels = set(), set()
    for path in (ROOT / "src/loglinear/ops/triton").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
            if isinstance(node, ast.FunctionDef):
                decorators = {ast.unparse(one).partition("(")[0] for one in node.decorator_list}
                if "kernel" in decorators:
                    kernels.add(node.name)
                    name = node.name.removeprefix("_").removesuffix("_hopper_kernel")
                    if path.stem == f"delta_hopper_{name}":
                        kernels.add(f"hopper_kernel('{name}')")
    assert len(launched) > 30
    assert launched <= kernels


def test_one_call_without_a_gpu():
    calls = []
    x = torch.zeros(2, 3)
    for _ in range(2):
        compiled_first(lambda: calls.append(1), "one call", x)
    assert len(calls) == 2


LAUNCHED_AGAIN = """
import itertools
import torch
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
import compile_kernels
from loglinear.ops.triton.delta_read import _descend_kernel as kernel

driver.set_active(compile_kernels.NoDriver())
launched, asked = [], []


class Compiled(CompiledKernel):
    def __init__(self):
        self.module, self.function, self.packed_metadata, self.name, self.src = 1, 1, (), "a kernel", None
        self._run = lambda *given: launched.append((self, *given[:3], *map(pointer, given[9:])))


def pointer(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def compiled(self, key, *_):
    kernel = self.device_caches[0][0][key] = Compiled()
    return kernel


JITFunction._do_compile = compiled
kernel.jitted.add_pre_run_hook(lambda *_, **__: asked.append(1))
memory = torch.zeros(64, dtype=torch.bfloat16)
tensors = memory, memory[1:], memory[8:], memory.float(), memory[:0]
for x, heights, N, K, constant in list(
    itertools.product(tensors, (memory, memory[1:], None), (1, 5, 16, 2**31), (1, 3, 16, 2**40), (1, 2))
) * 2:
    arguments = x, memory, memory, memory, heights, memory, memory, N, 4, K
    options = {"num_warps": 4, "C": 64, "ROWS": 64, "KT": constant, "BK": 16, "PRECISION": "tf32", "PARTS": 2}
    for way in (kernel, kernel.jitted):
        way[3, 4](*arguments, **options)
print(all(ours == theirs for ours, theirs in zip(launched[::2], launched[1::2], strict=True)))
print(len({id(one) for one, *_ in launched}) > 50, len(asked) < 0.8 * len(launched))
"""


def test_a_launch_like_an_earlier_one_gets_its_kernel():
    """The kernel, grid and arguments that Triton would have launched, for all that it looks at in arguments."""
    assert run_script(LAUNCHED_AGAIN).split() == ["True"] * 3


SIDE_BY_SIDE = """
import threading
import torch
from triton import knobs
from triton.runtime import driver
import compile_kernels
from loglinear.ops.triton import launch

driver.set_active(compile_kernels.NoDriver())  # which cannot launch anything
compiled = []
knobs.compilation.listener = lambda **what: compiled.append(threading.get_ident())
for _ in range(2):
    launch._compile_kernels_of(lambda: compile_kernels.call("scalar", torch.bfloat16, 2, 2, 64, 64, False))
    print(len(compiled), threading.get_ident() in compiled)
"""


def test_kernels_are_compiled_in_threads_and_once(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    first, second = run_script(SIDE_BY_SIDE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    number, in_this_thread = first.split()
    assert int(number) > 10
    assert in_this_thread == "False"
    assert second == first


FIRST_CALL = """
import time
import torch
from loglinear import FenwickState, log_linear_attention

place = {"device": "cuda", "dtype": torch.DTYPE}
q, k = torch.nn.functional.normalize(torch.randn(2, 1, 4096, 6, KEY, **place), dim=-1).unbind(0)
v, beta = torch.randn(1, 4096, 6, VALUE, **place), torch.rand(1, 4096, 6, **place)
scales, decay = torch.rand(1, 4096, 6, 13, device="cuda"), -torch.rand(1, 4096, 6, device="cuda")
inputs = [x.requires_grad_() for x in (q, k, v, scales, decay, beta)]
state = None
if STATE:
    buckets = torch.randn(1, 13, 6, KEY, VALUE, device="cuda", requires_grad=True)
    state = FenwickState(buckets, torch.tensor([1000], device="cuda"))
    inputs.append(buckets)

def call():
    o, final = log_linear_attention(
        q, k, v, scales, log_decay=decay, beta=beta, initial_state=state, return_state=STATE, backend="triton"
    )
    found = [o, final.buckets] if STATE else [o]
    return [*found, *torch.autograd.grad(sum(x.float().square().sum() for x in found), inputs)]

torch.cuda.synchronize()
begin = time.perf_counter()
first = call()
torch.cuda.synchronize()
print(time.perf_counter() - begin)
print(all(torch.equal(a, b) for a, b in zip(first, call())))
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("key", "value", "dtype", "state"),
    [
        (128, 128, "bfloat16", False),  # with all columns in a program
        (192, 384, "bfloat16", False),  # and without
        (128, 128, "bfloat16", True),
        (192, 384, "bfloat16", True),
        (192, 384, "float32", True),
        (256, 512, "bfloat16", True),
    ],
)
def test_first_call_on_gpu(key, value, dtype, state, tmp_path):
    """At most 30 seconds, with nothing compiled before; and it computes what later ones do."""
    script = FIRST_CALL
    for name, what in {"KEY": key, "VALUE": value, "DTYPE": dtype, "STATE": state}.items():
        script = script.replace(name, str(what))
    seconds, same = run_script(script, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert same == "True"
    assert float(seconds) <= 30
