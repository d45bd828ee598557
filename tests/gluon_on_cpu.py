"""Runs the kernels for Hopper on a processor: Triton's interpreter does not know Gluon.

    from gluon_on_cpu import on_cpu
    kernels = on_cpu("delta_hopper_walk")          # the module, with kernels that run here
    kernels._walk_hopper_kernel[(heads, slots, 1)](*arguments, HEIGHT=7, SCALED=True, num_warps=8)

A value is a tensor of torch, a program is the kernel's function, called with one. Layouts mean nothing; a product is a
float32 product of what has been rounded. What makes such kernels wrong on a GPU alone is asked for where it can be:

- a copy to shared memory arrives when it is waited for: until then nothing is read or written there;
- a product is used, and its operands in shared memory are changed, only after it is waited for;
- what is stored in shared memory is seen and overwritten after a barrier, and seen by products after a fence and a
  barrier. So is what a copy brings, of which Triton itself lets products take without a fence;
- what is read from shared memory is overwritten only after a barrier, which a product has been waited for before;
- nothing is read or written before the first or after the last number of a tensor;
- there is no more shared memory than a program can have, and nothing is under way as a program ends.

What is not so raises AssertionError. Shared memory is NaN at first. Not seen are

- layouts: whether a value has the one that is asked for, and what an operation can take;
- inline assembly, in whose place kernels do the same in other words here;
- who comes first to global memory: programs run one after the other (`backwards`, the last of them first), and a copy
  reads when it is asked for;
- what the compiler makes of it.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton.experimental
from torch import Tensor

PACKAGE = "loglinear.ops.triton"
HOPPER_SHARED_BYTES = 232_448  # of one program


def scalar(value: Any) -> Any:
    """A number as a kernel has it: of type int32 if it fits, or float32."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32 if abs(value) < 2**31 else torch.int64)
    return torch.tensor(value, dtype=torch.float32) if isinstance(value, float) else value


class Pointer:
    """One, or a tensor of them, into a tensor, which has some of a memory."""

    def __init__(self, memory: Tensor, at: Tensor, has: range):
        self.memory, self.at, self.has = memory, at, has

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        first = tensor.storage_offset()
        after = first + 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(whole, torch.tensor(first), range(first, after if tensor.numel() else first))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + torch.as_tensor(offset).to(torch.int64), self.has)

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.at.shape


def _mask_of(pointer: Pointer, mask: Tensor | None) -> Tensor:
    mask = (
        torch.ones_like(pointer.at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(pointer.at)
    )
    inside = (pointer.at >= pointer.has.start) & (pointer.at < pointer.has.stop)
    assert bool((inside | ~mask).all()), "beyond a tensor"
    return mask


def load(pointer: Pointer, mask: Tensor | None = None, other: float | None = None, **_: Any) -> Tensor:
    mask = _mask_of(pointer, mask)
    nothing = other if other is not None else (math.nan if pointer.memory.is_floating_point() else 0)
    found = torch.full(pointer.at.shape, nothing, dtype=pointer.memory.dtype)
    found[mask] = pointer.memory[pointer.at[mask]]
    return found


def store(pointer: Pointer, value: Any, mask: Tensor | None = None, **_: Any) -> None:
    mask = _mask_of(pointer, mask)
    value = torch.as_tensor(value).to(pointer.memory.dtype).expand_as(pointer.at)
    pointer.memory[pointer.at[mask]] = value[mask]


class Program:
    """What is going on in the program that runs."""

    def __init__(self, place: tuple[int, int, int], grid: tuple[int, int, int]):
        self.place, self.grid = place, grid
        self.memories: list[dict[str, Tensor]] = []  # allocations of shared memory
        self.groups: list[list[tuple[Shared, Tensor]]] = [[]]  # copies, the last of them not yet committed
        self.products: list[tuple[list[Shared], Sum, Any]] = []  # under way: operands, result, and what it is added to


running: Program | None = None


def program() -> Program:
    assert running is not None
    return running


# Of each number in shared memory. ARRIVING: a copy to it is under way; UNSEEN: since it was written there was no
# barrier; UNFENCED: no fence and then a barrier (FENCED: no barrier yet); READ: since it was read there was no barrier;
# and how many products that are under way read it.
MARKS = ("arriving", "unseen", "unfenced", "read", "multiplied")
UNFENCED, FENCED = 1, 2


class Shared:
    """A piece of shared memory."""

    def __init__(self, parts: dict[str, Tensor]):
        self.parts = parts

    shape = property(lambda self: self.parts["value"].shape)
    dtype = property(lambda self: self.parts["value"].dtype)

    def _each(self, change) -> Shared:
        return Shared({name: change(part) for name, part in self.parts.items()})

    def index(self, number: Any) -> Shared:
        assert 0 <= int(number) < self.shape[0]
        return self._each(lambda part: part[int(number)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert start + length <= self.shape[dim]
        return self._each(lambda part: part.narrow(dim, start, length))

    def permute(self, order: list[int]) -> Shared:
        return self._each(lambda part: part.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        assert dtype == self.dtype and math.prod(shape) <= self.parts["value"].numel()
        return self._each(lambda part: part.view(-1)[: math.prod(shape)].view(shape))

    def _refuse(self, marks: dict[str, str]) -> None:
        for mark, objection in marks.items():
            assert not self.parts[mark].any(), objection

    def _about_to_write(self) -> None:
        self._refuse({
            "arriving": "written before a copy to it has arrived", "multiplied": "changed while a product is under way",
            "read": "overwritten while it may be read", "unseen": "overwritten before a barrier",
        })  # fmt: skip

    def _about_to_read(self) -> None:
        self._refuse({"arriving": "read before it has arrived", "unseen": "read before a barrier"})
        self.parts["read"].fill_(1)

    def _write(self, value: Tensor) -> None:
        assert value.dtype == self.dtype and value.shape == self.shape, (value.dtype, value.shape, self.shape)
        self.parts["value"].copy_(value)
        self.parts["unseen"].fill_(1)
        self.parts["unfenced"].fill_(UNFENCED)

    def store(self, value: Tensor) -> None:
        self._about_to_write()
        self._write(value)

    def expect(self) -> None:
        """A copy to it begins."""
        self._about_to_write()
        self.parts["arriving"].fill_(1)

    def receive(self, value: Tensor) -> None:
        """And has come."""
        self.parts["arriving"].zero_()
        self._write(value)

    def load(self, layout: Any) -> Tensor:
        self._about_to_read()
        return self.parts["value"].clone()

    def multiply(self) -> Tensor:
        """A product that takes it begins."""
        self._about_to_read()
        self._refuse({"unfenced": "multiplied without a fence and a barrier"})
        self.parts["multiplied"].add_(1)
        return self.parts["value"]

    def multiplied(self) -> None:
        """And is done."""
        self.parts["multiplied"].sub_(1)


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    parts = {
        "value": torch.full(shape, math.nan, dtype=dtype),
        **{name: torch.zeros(shape, dtype=torch.int8) for name in MARKS},
    }
    program().memories.append(parts)
    taken = sum(each["value"].numel() * each["value"].element_size() for each in program().memories)
    assert taken <= HOPPER_SHARED_BYTES, f"{taken} bytes of shared memory"
    return Shared(parts)


def thread_barrier() -> None:
    for parts in program().memories:
        parts["unseen"].zero_()
        parts["unfenced"][parts["unfenced"] == FENCED] = 0
        parts["read"].copy_(parts["multiplied"] > 0)


def fence_async_shared() -> None:
    for parts in program().memories:
        parts["unfenced"][parts["unfenced"] == UNFENCED] = FENCED


def async_copy_global_to_shared(smem: Shared, pointer: Pointer, mask: Tensor | None = None, **_: Any) -> None:
    assert smem.shape == pointer.shape, (smem.shape, pointer.shape)
    smem.expect()
    program().groups[-1].append((smem, load(pointer, mask, other=0.0)))


def commit_group() -> None:
    program().groups.append([])


def wait_group(outstanding: int = 0) -> None:
    *committed, current = program().groups
    count = max(0, len(committed) - outstanding)
    for group in committed[:count]:
        for tile, value in group:
            tile.receive(value)
    program().groups = [*committed[count:], current]


class Sum:
    """Of products that are under way: nothing can be done with it but to add to it, and to wait for it."""

    def __init__(self, value: Tensor):
        self.value = value

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a product is used before it is waited for")

    __getattr__ = __getitem__ = __neg__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __torch_function__ = classmethod(_refuse)


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    assert isinstance(b, Shared)
    left, right = (x.multiply() if isinstance(x, Shared) else x for x in (a, b))
    assert left.dtype == right.dtype == torch.bfloat16, (left.dtype, right.dtype)
    total = acc.value if isinstance(acc, Sum) else acc
    assert total.dtype == torch.float32 and total.shape == (left.shape[0], right.shape[1]), total.shape
    product = left.float() @ right.float()
    found = Sum(product + total if use_acc else product)
    program().products.append(([x for x in (a, b) if isinstance(x, Shared)], found, acc))
    return found if is_async else warpgroup_mma_wait(0, deps=[found])


def warpgroup_mma_wait(outstanding: int, deps: Any) -> Any:
    products = program().products
    count = max(0, len(products) - outstanding)
    for operands, _, _ in products[:count]:
        for tile in operands:
            tile.multiplied()
    program().products = products[count:]
    # what a product under way is added to is in the same registers as its result: it stays under way
    under_way = [x for _, *sums in products[count:] for x in sums]
    found = tuple(x.value if isinstance(x, Sum) and not any(x is y for y in under_way) else x for x in deps)
    return found[0] if len(found) == 1 else found


def _numbers(x: Any) -> Tensor:
    return torch.as_tensor(x)


class Layout:
    """Of any kind."""

    def __init__(self, *_: Any, **__: Any):
        pass


def _language() -> dict[str, Any]:
    """What a kernel calls as `gl` or `tl`."""
    kinds = "NVMMADistributed DotOperand NVMMAShared SwizzledShared Blocked Slice DistributedLinear".split()
    layouts = {f"{kind}Layout": Layout for kind in kinds}
    dtypes = {name: getattr(torch, name) for name in ("bfloat16", "float32", "float64", "int32", "int64")}

    def full(shape: list[int], value: float, dtype: torch.dtype, layout: Any = None) -> Tensor:
        return torch.full([int(x) for x in shape], value, dtype=dtype)

    def associative_scan(x: Tensor, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.stack(list(itertools.accumulate(x.unbind(axis), combine)), axis)

    def where(condition: Tensor, x: Any, y: Any) -> Tensor:
        return torch.where(_numbers(condition), x, y)

    return {
        **layouts, **dtypes, "constexpr": lambda x: x, "shared_memory_descriptor": Shared,
        "allocate_shared_memory": allocate_shared_memory, "thread_barrier": thread_barrier, "load": load,
        "store": store, "where": where, "full": full,
        "zeros": lambda shape, dtype, layout=None: full(shape, 0, dtype),
        "arange": lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
        "program_id": lambda axis: scalar(program().place[axis]),
        "num_programs": lambda axis: scalar(program().grid[axis]),
        "convert_layout": lambda x, layout, **_: x, "static_range": range, "reshape": torch.reshape,
        "permute": torch.permute, "join": lambda x, y: torch.stack((x, y), -1), "split": lambda x: x.unbind(-1),
        "minimum": lambda x, y, **_: torch.minimum(_numbers(x), _numbers(y).to(_numbers(x).dtype)),
        "maximum": lambda x, y, **_: torch.maximum(_numbers(x), _numbers(y).to(_numbers(x).dtype)),
        "exp2": torch.exp2, "sum": lambda x, axis: x.sum(axis), "cdiv": lambda x, y: -(-x // y),
        "associative_scan": associative_scan,
        "expand_dims": torch.unsqueeze, "PropagateNan": types.SimpleNamespace(ALL=None),
    }  # fmt: skip


class Launched:
    """A kernel: `name[programs](arguments, options)` runs all of its programs, one after the other."""

    def __init__(self, function, backwards: bool = False):
        self.function, self.backwards = function, backwards

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **options: self._run((*grid, 1, 1)[:3], arguments, options)

    def _run(self, grid: tuple[int, int, int], arguments: tuple, options: dict) -> None:
        global running
        options = {name: value for name, value in options.items() if name not in ("num_warps", "maxnreg")}
        given = [Pointer.to(x) if isinstance(x, Tensor) else scalar(x) for x in arguments]
        places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        try:
            for place in reversed(places) if self.backwards else places:
                running = Program(place, grid)
                self.function(*given, **options)
                assert not running.products and not any(running.groups), "ends while something is under way"
        finally:
            running = None


def _module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


@contextmanager
def _in_place_of_gluon(backwards: bool):
    """Modules that are imported now get this file's functions for those of Gluon, and common ones that call them."""
    language = _module("gl", **_language())
    common = _module("common", tl=language, triton=triton)
    for name, value in vars(importlib.import_module(f"{PACKAGE}.common")).items():
        if hasattr(value, "fn"):
            function = types.FunctionType(value.fn.__code__, common.__dict__, name, value.fn.__defaults__)
            setattr(common, name, function)
        elif isinstance(value, triton.language.constexpr):
            setattr(common, name, value.value)
    copies = _module("async_copy", async_copy_global_to_shared=async_copy_global_to_shared, commit_group=commit_group,
                     wait_group=wait_group)  # fmt: skip
    products = {"warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait}
    hopper = _module("hopper", async_copy=copies, fence_async_shared=fence_async_shared, **products)
    gluon = _module("gluon", jit=lambda function: function, language=language)
    launch = _module("launch", kernel=lambda jit, **options: functools.partial(Launched, backwards=backwards))
    modules = {
        "triton.experimental.gluon": gluon, "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language.nvidia": _module("nvidia", hopper=hopper),
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        f"{PACKAGE}.common": common, f"{PACKAGE}.launch": launch,
    }  # fmt: skip
    others = {name: module for name, module in sys.modules.items() if not name.startswith(f"{PACKAGE}.delta_hopper")}
    with (
        mock.patch.dict(sys.modules, {**others, **modules}, clear=True),
        mock.patch.object(triton.experimental, "gluon", gluon, create=True),
    ):
        yield


def on_cpu(name: str, backwards: bool = False) -> ModuleType:
    """The module of `loglinear.ops.triton` of this name (`delta_hopper…`), with kernels that run on a processor.

    Args:
        backwards: the last program of a kernel runs first.
    """
    parent = importlib.import_module(PACKAGE)
    before = dict(vars(parent))
    with _in_place_of_gluon(backwards):
        made = importlib.import_module(f"{PACKAGE}.{name}")
    for added in set(vars(parent)) - set(before):
        delattr(parent, added)
    vars(parent).update(before)
    return made
