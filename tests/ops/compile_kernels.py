"""Compiles the kernels for an H100 or H200 (or another GPU), on a machine without one, and says what each takes.

    PYTHONPATH=src python tests/ops/compile_kernels.py delta --chunk 128 --key 192 --value 384

A call of the operator runs on the CPU with launches that compile and do nothing else. A row for each kernel: registers
and spilled bytes a thread, shared memory, warps, seconds. Spills that cost nothing in the interpreter, and what the
compiler refuses, show here, and so does machine code that reads uniform registers which nothing has written: CUDA's
assembler makes such code of some right programs, and what it computes depends on what ran before. Run it alone: what it
puts in Triton's place stays there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = 90


@dataclasses.dataclass
class Compiled:
    """One kernel. `failed` is what the compiler said, if it refused."""

    kernel: str
    warps: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    unwritten: list[str] = dataclasses.field(default_factory=list)  # instructions that read what nothing has written
    seconds: float = 0.0
    failed: str | None = None


class NoDriver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, capability: int = HOPPER):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_instead_of_launching(capability: int) -> list[Compiled]:
    """From now on launches compile; the list grows with each new kernel."""
    found: dict[int, Compiled] = {}
    rows: list[Compiled] = []
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        began = time.perf_counter()
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # whatever a compiler can do; the caller shows it
            rows.append(Compiled(self.fn.__name__, failed=f"{type(error).__name__}: {error}"[:500]))
            return None
        if id(kernel) not in found:
            seconds = round(time.perf_counter() - began, 2)
            found[id(kernel)] = Compiled(self.fn.__name__, seconds=seconds, **used(kernel))
            rows.append(found[id(kernel)])
        # nothing is returned: a launch like this one would get it, and launch

    driver.set_active(NoDriver(capability))
    JITFunction.run = run
    return rows


def used(kernel) -> dict[str, Any]:
    """What `Compiled` says of a compiled kernel."""
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", told)[0])
    return {
        "warps": kernel.metadata.num_warps, "registers": registers, "spilled_bytes": stack,
        "shared_bytes": kernel.metadata.shared, "unwritten": reads_of_unwritten(code),
    }  # fmt: skip


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
UNIFORM = re.compile(r"(gdesc|desc)?\[?(?:R\d+[.\w]*\+)?\bUR(\d+)")
WRITE_UNIFORM = ("U", "R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX", "LDCU")


def reads_of_unwritten(code: str) -> list[str]:
    """Instructions of a disassembly that read a uniform register which no instruction before them writes.

    In the order of the listing, where loops come after what leads into them. Raises ValueError for a text without
    instructions, in which nothing could be found.

    >>> reads_of_unwritten("/*0010*/ UMOV UR4, 0x1 ; /*0020*/ UIADD3 UR5, UR4, UR6, URZ ;")
    ['UIADD3 UR5, UR4, UR6, URZ']
    """
    instructions = list(INSTRUCTION.finditer(code))
    if not instructions:
        raise ValueError(f"got {code[:100]!r}, wanted a disassembly")
    written: set[int] = set()
    found = []
    for match in instructions:
        name, _, rest = match[1].strip().partition(" ")
        operands = [one.strip() for one in rest.split(",")]
        reads: set[int] = set()
        writes: set[int] = set()
        for place, operand in enumerate(operands):
            for kind, number in UNIFORM.findall(operand):
                first = int(number)
                if kind == "gdesc" and name.startswith("UTC"):  # of Blackwell, where each side has its own
                    reads.update((first, first + 1))
                elif (
                    kind == "gdesc"
                ):  # descriptors of both sides; of the right one alone where the left is in registers
                    in_registers = re.match(r"R\d", operands[1]) is not None
                    reads.update(range(first + 2 * in_registers, first + 4))
                elif kind == "desc":
                    reads.update((first, first + 1))
                elif place == 0 and name.startswith(WRITE_UNIFORM):
                    wide = ".64" in name or ".WIDE" in name or name.startswith("CS2UR")
                    writes.update(range(first, first + (4 if ".128" in name else 1 + wide)))
                else:
                    reads.update(range(first, first + 1 + (".64" in name and name.startswith("U"))))
        if not reads <= written:
            found.append(match[1].strip())
        written |= writes
    return found


def call(family: str, dtype: torch.dtype, heads: int, groups: int, key: int, value: int, state: bool) -> None:
    """The operator, forward and backward, through the kernels of a family."""
    from loglinear import FenwickState
    from loglinear.ops.triton import delta, scalar

    batch, tokens, levels = 1, 1024, 15
    q, k = torch.randn(2, batch, tokens, groups, key).to(dtype).unbind(0)
    v, scales = torch.randn(batch, tokens, heads, value).to(dtype), torch.rand(batch, tokens, heads, levels)
    log_decay = -torch.rand(batch, tokens, heads)
    beta = torch.rand(batch, tokens, heads).to(dtype) if family == "delta" else None
    inputs = [x.requires_grad_() for x in (q, k, v, scales, log_decay, beta) if x is not None]
    initial = None
    if state:
        initial = FenwickState.zeros(batch, levels, heads, key, value)
        initial = FenwickState(initial.buckets.requires_grad_(), initial.positions + 1000)
    run = delta.log_linear_attention_delta if family == "delta" else scalar.log_linear_attention_scalar
    o, *_ = run(
        q, k, v, scales, log_decay=log_decay, beta=beta, scale=1.0, cu_seqlens=None, initial_state=initial,
        return_state=state,
    )  # fmt: skip
    torch.autograd.grad(o, inputs, torch.ones_like(o))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["scalar", "delta"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--groups", type=int, help="default: one for each head")
    parser.add_argument("--key", type=int, default=192)
    parser.add_argument("--value", type=int, default=384)
    parser.add_argument("--chunk", type=int, help="rows of a chunk of the delta rule in 16 bits")
    parser.add_argument("--state", action="store_true", help="with a state in and out")
    parser.add_argument(
        "--gluon", action="store_true", help="kernels for Hopper where this Triton has not run them, too"
    )
    parser.add_argument("--capability", type=int, default=HOPPER, help="of the GPU, times ten")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args()
    rows = compile_instead_of_launching(options.capability)

    from loglinear.ops.triton import delta, delta_chunks

    delta.LONG_CHUNK = options.chunk or delta.LONG_CHUNK
    if options.gluon:
        delta_chunks.GLUON = delta_chunks.GLUON_WIDTHS = True
    call(
        options.family, getattr(torch, options.dtype), options.heads, options.groups or options.heads, options.key,
        options.value, options.state,
    )  # fmt: skip
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    print(f"Triton {triton.__version__}, sm_{options.capability}")
    for row in rows:
        print(
            f"{row.kernel:24} {row.failed}" if row.failed else
            f"{row.kernel:24} {row.warps:2} warps {row.registers:4} registers {row.spilled_bytes:6} B spilled "
            f"{row.shared_bytes:7} B shared {row.seconds:6.1f} s"
            + (f"  reads what nothing has written: {row.unwritten[0]}" if row.unwritten else "")
        )  # fmt: skip


if __name__ == "__main__":
    main()
