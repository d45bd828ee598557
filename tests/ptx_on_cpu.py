"""Runs what Triton compiles for a Hopper GPU on a processor: the PTX of a kernel, program by program.

    from ptx_on_cpu import run
    races = run(compiled.asm["ptx"], arguments, grid, warps=8, shared=compiled.metadata.shared)

Arguments are those of the PTX: tensors, whose memory is read and written in place, and numbers. All threads of a
program take each instruction at once. A copy to shared memory lands when it is waited for, and a product is computed
then, so that what comes too early reads what was there before.

What comes back is the number of races: how often a warp has touched two bytes, of shared memory or, within a program,
of global memory, which another one has touched since the last barrier, if one of them changed something. A copy touches
what it writes, and a product what it reads, from when they begin to the first barrier after they were waited for.

Not seen are: what the assembler makes of the PTX; fences between kinds of memory; programs that run side by side. What
no instruction has written has other bits each time. An instruction that is not known raises NotImplementedError.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Values = NDArray[Any]  # one for each thread
U16, U32, U64, I32, I64, F32 = np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32
UNITS = {"u": (U32, U64), "s": (I32, I64), "b": (U32, U64)}
WARP, GROUP, GRANULE = 32, 128, 2  # threads, threads, bytes
FOUR_WARPS = 0b1111

# ----------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------


def widened(bits: Values) -> Values:
    """bfloat16 in the low bits, as float32."""
    return ((bits.astype(U32) & U32(0xFFFF)) << U32(16)).view(F32)


def rounded(values: Values) -> Values:
    """float32 to bfloat16, to the nearest, in the low bits."""
    bits = np.ascontiguousarray(values.astype(F32)).view(U32)
    return (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)


def of_tf32(bits: Values) -> Values:
    """What tensor cores see of a float32."""
    return (bits.astype(U32) & U32(0xFFFFE000)).view(F32)


# ----------------------------------------------------------------------------------------------------
# The text
# ----------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    guard: str | None  # a predicate, with "!" in front if it has to be false
    name: str
    operands: tuple[str, ...]


def split(text: str) -> tuple[str, ...]:
    """At commas that are in no brackets.

    >>> split("{%r1, %r2}, [%rd1 + 4], 0x10")
    ('{%r1, %r2}', '[%rd1 + 4]', '0x10')
    """
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return tuple(one.strip() for one in found)


def names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


@functools.lru_cache(maxsize=64)
def parse(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of the one kernel, and which of them labels stand before."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    lines = (re.sub(r"//.*", "", line).strip() for line in body.splitlines())
    text = " ".join(line for line in lines if line and not line.startswith((".loc", ".file")))
    code, labels = [], {}
    for statement in text.split(";"):
        statement = " ".join(statement.split())
        while begins := re.match(r"(?:(\$L\w+):|[{}](?![^,]*\},))\s*", statement):
            if begins[1]:
                labels[begins[1]] = len(code)
            statement = statement[begins.end() :]
        found = re.match(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement)
        if found and not statement.startswith("."):
            code.append(Instruction(found[1], found[2], split(found[3])))
    return code, labels


# ----------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------


class Memory:
    """That of tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        storages = [x.untyped_storage() for x in tensors]
        self.spans = sorted({(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages})
        self.tensors = tensors  # which keep it

    def bytes_at(self, address: int, count: int) -> Any:
        """A view of it. Raises IndexError if it is not a tensor's."""
        if not any(begin <= address and address + count <= end for begin, end in self.spans):
            raise IndexError(f"no tensor has {count} bytes at {address:#x}")
        return (ctypes.c_ubyte * count).from_address(address)


class Touched:
    """Which warps have read and written a granule since the last barrier."""

    def __init__(self) -> None:
        self.readers: dict[int, int] = {}
        self.writers: dict[int, int] = {}
        self.under_way: list[tuple[NDArray[np.int64], int, bool]] = []
        self.races = 0

    def touch(self, granules: NDArray[np.int64], warps: int, writes: bool) -> None:
        for granule in granules.tolist():
            others = self.writers.get(granule, 0) | (self.readers.get(granule, 0) if writes else 0)
            self.races += others & ~warps != 0
            mine = self.writers if writes else self.readers
            mine[granule] = mine.get(granule, 0) | warps

    def begin(self, granules: NDArray[np.int64], warps: int, writes: bool) -> Callable[[], None]:
        """The same till the returned function is called."""
        one = (granules, warps, writes)
        self.touch(*one)
        self.under_way.append(one)
        return lambda: self.under_way.__delitem__(next(i for i, other in enumerate(self.under_way) if other is one))

    def barrier(self) -> None:
        self.readers.clear()
        self.writers.clear()
        for granules, warps, writes in self.under_way:
            mine = self.writers if writes else self.readers
            for granule in granules.tolist():
                mine[granule] = mine.get(granule, 0) | warps


def granules_of(addresses: Values, size: int) -> NDArray[np.int64]:
    begins = np.arange(0, size, GRANULE)
    return np.unique((addresses.astype(np.int64)[..., None] + begins) // GRANULE)


# ----------------------------------------------------------------------------------------------------
# Programs
# ----------------------------------------------------------------------------------------------------

BINARY: dict[str, Callable[[Values, Values], Values]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "max": np.maximum, "min": np.minimum,
    "div": lambda x, y: np.trunc(x / np.where(y == 0, 1, y)), "rem": lambda x, y: np.fmod(x, np.where(y == 0, 1, y)),
}  # fmt: skip
COMPARE: dict[str, Callable[[Values, Values], Values]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)), "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}  # fmt: skip


class Program:
    """One block of threads."""

    def __init__(self, ptx: str, values: Sequence[int], memory: Memory, place: Sequence[int], grid: Sequence[int],
                 threads: int, shared: int):  # fmt: skip
        self.code, self.labels = parse(ptx)
        self.values, self.memory, self.threads = values, memory, threads
        self.thread = np.arange(threads, dtype=U32)
        self.registers: dict[str, Values] = {"%tid.x": self.thread, "%laneid": self.thread % WARP}
        for axis, name in enumerate("xyz"):
            self.registers[f"%ctaid.{name}"] = np.full(threads, place[axis], U32)
            self.registers[f"%nctaid.{name}"] = np.full(threads, grid[axis], U32)
        self.shared = np.full(shared, 0xFF, np.uint8)  # NaN
        self.of_shared, self.of_global = Touched(), Touched()
        self.copies: list[list[Callable[[], None]]] = [[]]  # groups; the last one is open
        self.products: list[list[Callable[[], None]]] = [[]]

    def run(self) -> int:
        """Races."""
        at = 0
        while at < len(self.code):
            guard, name, operands = self.code[at]
            at += 1
            active = np.ones(self.threads, bool)
            if guard is not None:
                active = self.registers[guard.lstrip("!")] ^ guard.startswith("!")
            if name.startswith("bra"):
                if active.all() != active.any():
                    raise NotImplementedError("threads that part")
                at = self.labels[operands[0]] if active.all() else at
            elif name == "ret":
                break
            else:
                self.step(name, operands, active)
        return self.of_shared.races + self.of_global.races

    # operands

    def get(self, operand: str, dtype: Any = U32) -> Values:
        """As numbers of `dtype`, of the bits that are there."""
        if operand in self.registers:
            bits = self.registers[operand]
        elif operand.startswith("%"):
            bits = self.unwritten()
        elif operand.startswith(("0f", "0d")):
            bits = np.full(self.threads, int(operand[2:], 16), U64)
        elif re.match(r"-?\d", operand):
            bits = np.full(self.threads, int(operand, 0) % 2**64, U64)
        else:
            bits = np.zeros(self.threads, U64)  # where shared memory begins
        size = np.dtype(dtype).itemsize
        if bits.dtype.itemsize != size or bits.dtype == bool:
            bits = bits.astype({2: U16, 4: U32, 8: U64}[size])
        return bits.view(dtype)

    def unwritten(self) -> Values:
        return np.random.default_rng().integers(0, 2**32, self.threads, dtype=U32)

    def set(self, name: str, values: Values, active: Values) -> None:
        if name == "_":
            return
        if values.dtype != bool:
            values = np.ascontiguousarray(values).view(U64 if values.dtype.itemsize == 8 else U32)
        before = self.registers.get(name)
        self.registers[name] = values if before is None or active.all() else np.where(active, values, before)

    def addresses(self, operand: str) -> Values:
        """Of shared memory they are 32 bits."""
        parts = [part.strip() for part in operand.strip("[] ").split("+")]
        narrow = (re.fullmatch(r"%r\d+", part) for part in parts)
        return functools.reduce(
            np.add,
            (self.get(part).astype(U64) if is_narrow else self.get(part, U64)
             for part, is_narrow in zip(parts, narrow, strict=True)),
        )  # fmt: skip

    # instructions

    def step(self, name: str, operands: tuple[str, ...], active: Values) -> None:
        kind, *rest = name.split(".")
        last = rest[-1] if rest else ""
        if kind == "bar" and "warp" not in rest:
            self.of_shared.barrier()
            self.of_global.barrier()
        elif kind in ("bar", "fence", "membar", "prefetch") or name.startswith("wgmma.fence"):
            pass
        elif kind == "cp":
            self.copy(rest, operands, active)
        elif kind == "wgmma":
            self.product(name, operands)
        elif kind == "mma":
            self.product_of_warps(name, operands, active)
        elif kind in ("ld", "st", "ldmatrix", "stmatrix"):
            self.move(kind, rest, operands, active)
        elif kind == "mov":
            self.rename(last, operands, active)
        elif kind == "setp":
            x, y = (self.get(one, self.dtype(last)) for one in operands[1:3])
            self.set(operands[0], COMPARE[rest[0]](x, y), active)
        elif last == "pred":
            left, *right = (self.registers[one] for one in operands[1:])
            self.set(operands[0], BINARY[kind](left, right[0]) if right else ~left, active)
        else:
            self.set(operands[0], self.computed(kind, rest, last, operands[1:]), active)

    def dtype(self, type: str) -> Any:
        if type.startswith("f"):
            return np.float64 if type == "f64" else F32
        return UNITS[type[0]][type.endswith("64")]

    def computed(self, kind: str, rest: list[str], last: str, operands: tuple[str, ...]) -> Values:
        """What an instruction without memory makes of its operands."""
        if last in ("bf16", "bf16x2") and kind in ("add", "sub", "mul", "fma"):
            bits = [self.get(one) for one in operands]
            low, high = ([widened(one >> U32(shift)) for one in bits] for shift in (0, 16))
            apply = BINARY[kind] if kind != "fma" else fused
            return rounded(apply(*low)) | (rounded(apply(*high)) << U32(16) if last == "bf16x2" else U32(0))
        if kind == "cvt":
            return self.converted(rest, operands)
        if kind == "selp":
            return np.where(self.registers[operands[2]], *(self.get(one, self.dtype(last)) for one in operands[:2]))
        if kind == "shfl":
            return self.shuffled(rest[1], operands)
        if kind in ("mul", "mad") and "wide" in rest or kind == "mul" and rest[0] == "hi":
            narrow = self.dtype(last)
            product = np.multiply(*(self.get(one, narrow).astype(UNITS[last[0]][1]) for one in operands[:2]))
            if rest[0] == "hi":
                return (product >> narrow(32).astype(product.dtype)).astype(narrow)
            return product + self.get(operands[2], product.dtype) if kind == "mad" else product
        if kind in ("shl", "shr"):
            x, by = self.get(operands[0], self.dtype(last)), self.get(operands[1])
            return (np.left_shift if kind == "shl" else np.right_shift)(x, by.astype(x.dtype))
        if kind == "bfe":
            x, begin, count = (self.get(one) for one in operands)
            left = (x << (U32(32) - begin - count)).view(self.dtype(last))
            return left >> (U32(32) - count).astype(left.dtype)
        if kind in ("prmt", "lop3", "not", "neg", "abs", "ex2", "lg2", "rcp", "sqrt", "fma", "mad"):
            return self.of_one_type(kind, last, operands)
        if kind not in BINARY:
            raise NotImplementedError(".".join([kind, *rest]))
        x, y = (self.get(one, U16 if last == "b16" else self.dtype(last)) for one in operands)
        found = BINARY[kind](x, y).astype(x.dtype)
        return found.astype(U32) if found.dtype == U16 else found

    def of_one_type(self, kind: str, last: str, operands: tuple[str, ...]) -> Values:
        x, *others = (self.get(one, self.dtype(last)) for one in operands[:3])
        if kind in ("fma", "mad"):
            return fused(x, *others) if last == "f32" else x * others[0] + others[1]
        if kind == "prmt":
            both = x.astype(U64) | others[0].astype(U64) << U64(32)
            chosen = [(both >> ((others[1] >> U32(4 * i)) & U32(7)).astype(U64) * U64(8)) & U64(255) for i in range(4)]
            return sum((one << U64(8 * i) for i, one in enumerate(chosen)), U64(0)).astype(U32)
        if kind == "lop3":
            table, found = int(operands[3], 0), np.zeros(self.threads, U32)
            for i in range(8):
                if table >> i & 1:
                    found |= functools.reduce(
                        np.bitwise_and,
                        (one if i & bit else ~one for one, bit in zip((x, *others), (4, 2, 1), strict=True)),
                    )
            return found
        return {"not": np.invert, "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2,
                "rcp": np.reciprocal, "sqrt": np.sqrt}[kind](x)  # fmt: skip

    def converted(self, rest: list[str], operands: tuple[str, ...]) -> Values:
        to, given = rest[-2:]
        if to == "bf16x2":
            high, low = (rounded(self.get(one, F32)) for one in operands)
            return high << U32(16) | low
        if to == "bf16":
            return rounded(self.get(operands[0], F32))
        if given == "bf16":
            return widened(self.get(operands[0]))
        if to == "tf32":
            return (self.get(operands[0]) + U32(0x1000)) & U32(0xFFFFE000)
        if to == "u16" or given == "u16":
            return self.get(operands[0]) & U32(0xFFFF)
        return self.get(operands[0], self.dtype(given)).astype(self.dtype(to))

    def shuffled(self, kind: str, operands: tuple[str, ...]) -> Values:
        values, by, lane = self.get(operands[0]), self.get(operands[1]), self.thread % WARP
        source = {"bfly": lane ^ by, "idx": by % WARP, "down": np.minimum(lane + by, WARP - 1),
                  "up": np.where(lane >= by, lane - by, lane)}[kind]  # fmt: skip
        return values[self.thread - lane + source]

    def rename(self, last: str, operands: tuple[str, ...], active: Values) -> None:
        to, given = operands
        wide, half = (U64, 32) if last == "b64" else (U32, 16)
        if to.startswith("{"):
            bits = self.get(given, wide)
            for i, name in enumerate(names(to)):
                self.set(name, (bits >> wide(half * i) & wide(2**half - 1)).astype(U32), active)
        elif given.startswith("{"):
            low, high = (self.get(name).astype(wide) & wide(2**half - 1) for name in names(given))
            self.set(to, low | high << wide(half), active)
        elif last == "pred":
            self.set(to, self.registers[given] if given in self.registers else self.get(given) != 0, active)
        else:
            self.set(to, self.get(given, U64 if "64" in last else U32), active)

    # memory

    def move(self, kind: str, rest: list[str], operands: tuple[str, ...], active: Values) -> None:
        if kind == "ld" and rest[0] == "param":
            found = re.search(r"param_(\d+)\]", operands[1])
            assert found is not None, operands
            value = self.values[int(found[1])]
            self.set(operands[0], np.full(self.threads, value, U64 if "64" in rest[-1] else U32), active)
        elif kind.endswith("matrix"):
            self.move_matrices(kind == "ldmatrix", "trans" in rest, operands)
        elif kind == "ld":
            self.load("global" in rest, int(rest[-1][1:]) // 8, names(operands[0]), operands[1], active)
        else:
            size = int(rest[-1][1:]) // 8
            values = np.stack([self.get(name, {2: U16, 4: U32, 8: U64}[size]) for name in names(operands[1])], 1)
            self.store("global" in rest, self.addresses(operands[0]), values, active)

    def touch(self, of: Touched, addresses: Values, size: int, writes: bool, active: Values) -> None:
        for warp in range(self.threads // WARP):
            threads = np.flatnonzero(active[warp * WARP : (warp + 1) * WARP]) + warp * WARP
            if len(threads):
                of.touch(granules_of(addresses[threads], size), 1 << warp, writes)

    def bytes_of(self, is_global: bool, addresses: Values, size: int, active: Values) -> Values:
        found = np.zeros((self.threads, size), np.uint8)
        for thread in np.flatnonzero(active):
            at = int(addresses[thread])
            found[thread] = self.memory.bytes_at(at, size) if is_global else self.shared[at : at + size]
        return found

    def load(self, is_global: bool, size: int, to: list[str], operand: str, active: Values) -> None:
        addresses = self.addresses(operand)
        self.touch(self.of_global if is_global else self.of_shared, addresses, size * len(to), False, active)
        found = self.bytes_of(is_global, addresses, size * len(to), active)
        for i, name in enumerate(to):
            bits = found[:, size * i : size * (i + 1)].copy().view({2: U16, 4: U32, 8: U64}[size])[:, 0]
            self.set(name, bits.astype(U32) if size == 2 else bits, active)

    def store(self, is_global: bool, addresses: Values, values: Values, active: Values) -> None:
        """Warp by warp, for several may store the same: what changes nothing is no write."""
        size = values.itemsize * values.shape[1]
        new = np.ascontiguousarray(values).view(np.uint8).reshape(self.threads, size)
        for warp in range(self.threads // WARP):
            mine = active & (self.thread // WARP == warp)
            changes = mine & (self.bytes_of(is_global, addresses, size, mine) != new).any(1)
            self.touch(self.of_global if is_global else self.of_shared, addresses, size, True, changes)
            for thread in np.flatnonzero(changes):
                at = int(addresses[thread])
                if is_global:
                    self.memory.bytes_at(at, size)[:] = new[thread].tolist()
                else:
                    self.shared[at : at + size] = new[thread]

    def move_matrices(self, loads: bool, transposed: bool, operands: tuple[str, ...]) -> None:
        """8 x 8 of 16 bits each: eight lanes have the addresses of the rows of one."""
        to = names(operands[0 if loads else 1])
        rows = self.addresses(operands[1 if loads else 0])
        if loads:
            self.touch(self.of_shared, rows, 16, False, self.thread % WARP < 8 * len(to))
        lane = np.arange(WARP)
        row, column = lane // 4, lane % 4 * 2
        for i, name in enumerate(to):
            bits = np.zeros(self.threads, U32) if loads else self.get(name)
            for warp in range(0, self.threads, WARP):
                at = rows[warp + 8 * i : warp + 8 * i + 8].astype(np.int64)[:, None] + np.arange(16)
                if loads:
                    matrix = self.shared[at].view(U16).astype(U32)
                    matrix = matrix.T if transposed else matrix
                    bits[warp : warp + WARP] = matrix[row, column] | matrix[row, column + 1] << U32(16)
                else:
                    matrix = np.zeros((8, 8), U16)
                    mine = bits[warp : warp + WARP]
                    matrix[row, column], matrix[row, column + 1] = mine & U32(0xFFFF), mine >> U32(16)
                    new = np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint8)
                    changed = at[(self.shared[at] != new).any(1)]  # several warps may store the same
                    self.of_shared.touch(granules_of(changed, 1), 1 << warp // WARP, True)
                    self.shared[at] = new
            if loads:
                self.set(name, bits, np.ones(self.threads, bool))

    def copy(self, rest: list[str], operands: tuple[str, ...], active: Values) -> None:
        if "commit_group" in rest:
            self.copies.append([])
        elif "wait_group" in rest:
            self.wait(self.copies, int(operands[0]))
        else:
            size = int(operands[2], 0)
            to, of = self.addresses(operands[0]), self.addresses(operands[1])
            exists = active & (self.get(operands[3]) > 0) if len(operands) > 3 else active
            self.touch(self.of_global, of, size, False, exists)
            found = self.bytes_of(True, of, size, exists)
            ends = [
                self.of_shared.begin(granules_of(to[threads], size), 1 << warp, True)
                for warp in range(self.threads // WARP)
                if len(threads := np.flatnonzero(active[warp * WARP : (warp + 1) * WARP]) + warp * WARP)
            ]

            def land() -> None:
                self.shared[to[active].astype(np.int64)[:, None] + np.arange(size)] = found[active]
                for end in ends:
                    end()

            self.copies[-1].append(land)

    @staticmethod
    def wait(groups: list[list[Callable[[], None]]], later: int) -> None:
        while len(groups) - 1 > later:
            for finish in groups.pop(0):
                finish()

    # products

    def product(self, name: str, operands: tuple[str, ...]) -> None:
        if "commit_group" in name:
            self.products.append([])
        elif "wait_group" in name:
            self.wait(self.products, int(operands[-1].split("}")[-1]))
        else:
            self.products[-1].append(self.begin_product(name, operands))

    def begin_product(self, name: str, operands: tuple[str, ...]) -> Callable[[], None]:
        shape = re.search(r"m64n(\d+)k(\d+)", name)
        assert shape is not None, name
        columns, depth, size = int(shape[1]), int(shape[2]), 4 if "tf32" in name else 2
        total, in_registers = names(operands[0]), operands[1].startswith("{")
        turns_left, turns_right = (int(operands[i]) for i in (-2, -1)) if size == 2 and not in_registers else (
            0, int(operands[-1]) if size == 2 else 0)  # fmt: skip
        adds = self.registers[operands[3]] if operands[3] in self.registers else self.get(operands[3]) != 0
        groups, ends = [], []
        for group in range(self.threads // GROUP):
            first = slice(group * GROUP, group * GROUP + 1)
            of = [(operands[2], columns, turns_right)] + [(operands[1], 64, turns_left)] * (not in_registers)
            places = [places_of(int(self.get(one, U64)[first][0]), rows, depth, size, turns) for one, rows, turns in of]
            warps = FOUR_WARPS << 4 * group
            ends += [self.of_shared.begin(granules_of(one.ravel(), size), warps, False) for one in places]
            left = [self.get(one)[group * GROUP : (group + 1) * GROUP].copy() for one in names(operands[1])]
            groups.append((places, left if in_registers else None, bool(adds[first][0])))

        def finish() -> None:
            for end in ends:
                end()
            for group, (places, registers, adding) in enumerate(groups):
                right = self.numbers(places[0], size)
                left = self.numbers(places[1], size) if registers is None else left_of(registers, size)
                found, mine = left @ right.T, slice(group * GROUP, (group + 1) * GROUP)
                thread = np.arange(GROUP)
                row, column = 16 * (thread // WARP) + thread % WARP // 4, 2 * (thread % 4)
                for i, one in enumerate(total):
                    bits = self.get(one).copy()
                    before = bits[mine].view(F32) if adding else F32(0)
                    new = before + found[row + 8 * (i >> 1 & 1), 8 * (i // 4) + column + (i & 1)]
                    bits[mine] = new.astype(F32).view(U32)
                    self.registers[one] = bits

        return finish

    def numbers(self, places: NDArray[np.int64], size: int) -> Values:
        bits = self.shared[places[..., None] + np.arange(size)].view(U16 if size == 2 else U32)[..., 0]
        return widened(bits) if size == 2 else of_tf32(bits)

    def product_of_warps(self, name: str, operands: tuple[str, ...], active: Values) -> None:
        """m16n8 by a warp."""
        size = 4 if "tf32" in name else 2
        total, left, right, before = ([self.get(one) for one in names(operand)] for operand in operands)
        lane = np.arange(WARP)
        row, column = lane // 4, 2 * (lane % 4)
        new = [one.copy() for one in total]
        for warp in range(0, self.threads, WARP):
            mine = slice(warp, warp + WARP)
            # the right operand is laid out like the upper half of a left one
            turned = fragment([right[0][mine], None, right[1][mine], None], size)[:8]
            found = fragment([one[mine] for one in left], size) @ turned.T
            for i, one in enumerate(new):
                sums = before[i][mine].view(F32) + found[row + 8 * (i >> 1), column + (i & 1)]
                one[mine] = sums.astype(F32).view(U32)
        for one, values in zip(names(operands[0]), new, strict=True):
            self.set(one, values, active)


def fused(x: Values, y: Values, z: Values) -> Values:
    return (x.astype(np.float64) * y + z).astype(F32)


def fragment(registers: Sequence[Values | None], size: int) -> Values:
    """16 rows of a left operand, of four registers of a warp; None: of rows that are not there."""
    lane = np.arange(WARP)
    per_register = 4 // size
    matrix = np.zeros((16, 8 * per_register), F32)
    for i, bits in enumerate(registers):
        if bits is not None:
            row, column = lane // 4 + 8 * (i & 1), per_register * (lane % 4 + 4 * (i >> 1))
            for j in range(per_register):
                matrix[row, column + j] = widened(bits >> U32(16 * j)) if size == 2 else of_tf32(bits)
    return matrix


def left_of(registers: list[Values], size: int) -> Values:
    """64 rows of a left operand, of four registers of four warps."""
    warps = [slice(warp * WARP, (warp + 1) * WARP) for warp in range(4)]
    return np.concatenate([fragment([one[warp] for one in registers], size) for warp in warps])


def places_of(descriptor: int, rows: int, depth: int, size: int, turned: int) -> NDArray[np.int64]:
    """Where the numbers [rows, depth] of an operand in shared memory are, by its descriptor."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62
    if mode == 0:
        raise NotImplementedError("an operand that is not swizzled")
    width = 128 >> (mode - 1)  # bytes of a line
    row, column = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if turned:
        line = width // size
        at = start + row // line * leading + column // 8 * stride + column % 8 * width + row % line * size
    else:
        at = start + row // 8 * stride + row % 8 * width + column * size
    return at ^ (at >> 7 & (width // 16 - 1)) << 4


def run(ptx: str, arguments: Sequence[torch.Tensor | int | float], grid: Sequence[int], warps: int, shared: int) -> int:
    """Runs all programs of a grid, one after the other.

    Returns:
        the number of races, see above.

    Raises:
        IndexError: of memory that no tensor has.
        NotImplementedError: of what is not known here.
    """
    values = [
        x.data_ptr() if isinstance(x, torch.Tensor) else int(F32(x).view(U32)) if isinstance(x, float) else x % 2**32
        for x in arguments
    ]
    memory = Memory([x for x in arguments if isinstance(x, torch.Tensor)])
    grid, races = (*grid, 1, 1)[:3], 0
    with np.errstate(all="ignore"):
        for place in np.ndindex(*reversed(grid)):
            program = Program(ptx, [*values, 0, 0], memory, place[::-1], grid, warps * WARP, shared + 4096)
            races += program.run()
    return races
