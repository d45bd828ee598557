"""One chunk of the delta rule: what it is, how exact, and how the kernels that make it and use it load and store tiles.

The WY form (arXiv 2406.06484; gated: 2412.06464): with A = strictly lower part of diag(β) (k kᵀ ⊙ e^{γ_t - γ_s}) the
rows of a chunk write T (v - k̂ S), where S is the state that enters it, T = (I + A)⁻¹ diag(β), and k̂ = k e^γ. So S
leaves it as P S + U, with P = e^Γ I - k̄ᵀ T k̂ and U = k̄ᵀ T v, where k̄ = k e^{Γ-γ}. The kernels of `delta_halves.py` make
all of it, and the scores of the rows among each other, and their queries as seen from S.

Precision. Of float32 inputs all is float32, but for gamma, A and its inverse, and what that is multiplied by at once
(keys and scores), which are float64 until they are done.
For 16-bit inputs A, its inverse and the products that join it are float32 in three tf32 parts (in
`delta_hopper_inverse.py` three bfloat16 parts), for the inverse of a chunk of nearly equal keys is as badly conditioned
as the chunk is long. What every later product passes through is in two bfloat16 parts, the second of them what the
first has lost: the inverse as it is stored and the scores that it is multiplied by, what comes of them where queries
pass it, k̄ᵀ T, and P in `delta_nodes.py` where nodes grow. With single ones the output is wrong by 6e-3 where nothing
decays, instead of 3.5e-3, of which 1.7e-3 is the rounding of the output. U, the queries and the scores that meet v are
single, and so is P where queries pass it, and all that the backward multiplies by.

Legend
    N chunks (slots), C rows of a chunk, H heads, G groups, K key width, V value width, L levels
    M variants of the queries of all chunks: see `delta_read.py`
    E rows of half a chunk
    inverse [PARTS, N, H, 3, E, E] (I + A)⁻¹ in quarters (see `_quarter`); scores [N, H, C, C]
    seen [M, H, C, K] variants of the queries, of which the first of each chunk is filled by what makes it
    gamma [H, N, C] inclusive sums of the base-2 log decay
    for the backward: mixed [N, H, 3, E, E] scores before λ, in quarters
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from loglinear.ops.triton.common import next_power_of_2, row_exists, sums_dtype
from loglinear.ops.triton.launch import Kernel
from loglinear.ops.triton.scalar import INTERPRETED

TILE = 64  # columns of keys or values that are multiplied at once
WALKED = 128  # the most that a program may have of all columns at once
HOPPER_CHUNK = HOPPER_WIDTH = 128  # rows of chunks and columns of keys and values for which Hopper has its own kernels
HOPPER_WARPS = 8  # of a program of them
HOPPER_KEYS = (64, 128, 192, 256)  # of which Hopper has its own kernel for the inverse
HOPPER_VALUES = (128, 256, 384)  # and, with two or three tiles of keys, nearly all others
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
GLUON = VERSION in ((3, 6), (3, 7), (3, 9))  # what the kernels for Hopper have run with
GLUON_WIDTHS = VERSION in ((3, 6), (3, 7))  # and those of them that take other widths
FETCHES = tl.constexpr(torch.version.hip is None and not INTERPRETED)


@triton.jit
def _fetch(pointer, rows_at, exists, column, width, WIDTH: tl.constexpr):
    """Columns `column` … of the rows that begin at `rows_at` and that exist."""
    LINE: tl.constexpr = 1024 // pointer.dtype.element_ty.primitive_bitwidth  # 128 bytes
    columns = column + tl.arange(0, triton.next_power_of_2(triton.cdiv(WIDTH, LINE))) * LINE
    inside = exists[:, None] & (columns < width)[None, :]
    at = pointer + tl.where(inside, rows_at[:, None] + columns[None, :], 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.uint64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def fetch_tile(pointer, token, first, rows, stride, C: tl.constexpr, column, width, WIDTH: tl.constexpr):
    """Begins to bring to the second-level cache what `load_tile` will read.

    Loads of a program with many registers wait for the products before them, and few other programs work meanwhile.
    What is asked for when the program begins is near when its turn comes.
    """
    if FETCHES:
        row = tl.arange(0, triton.next_power_of_2(C))
        _fetch(pointer, (token + row).to(tl.int64) * stride, row_exists(row, first, rows), column, width, WIDTH)


@triton.jit
def fetch_block(pointer, row, height, HEIGHT: tl.constexpr, column, width, WIDTH: tl.constexpr):
    """The same of what `load_block` will read."""
    if FETCHES:
        rows = row + tl.arange(0, triton.next_power_of_2(HEIGHT))
        _fetch(pointer, rows * width, rows < height, column, width, WIDTH)


@triton.jit
def fetch_quarters(matrix, place, E: tl.constexpr):
    """The same of all that there is of a chunk's lower triangular matrix [2 E, 2 E]."""
    fetch_block(matrix + place * 3 * E * E, 0, 3 * E, 4 * E, 0, E, E)


@triton.jit
def load_tile(pointer, token, first, rows, stride, C: tl.constexpr, column, width, WIDTH: tl.constexpr):
    """Columns `column` … of the rows of a chunk: [C, WIDTH], zero where there is nothing."""
    row, columns = tl.arange(0, C), column + tl.arange(0, WIDTH)
    at = pointer + token.to(tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    return tl.load(at, mask=row_exists(row, first, rows)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_tile(pointer, values, token, first, rows, stride, C: tl.constexpr, column, width, WIDTH: tl.constexpr):
    """`values` [C, WIDTH] to where `load_tile` reads them."""
    row, columns = tl.arange(0, C), column + tl.arange(0, WIDTH)
    at = pointer + token.to(tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    exists = row_exists(row, first, rows)[:, None] & (columns < width)[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def load_block(pointer, row, height, HEIGHT: tl.constexpr, column, width, WIDTH: tl.constexpr):
    """Part of a contiguous matrix [height, width] from `row`, `column` on: [HEIGHT, WIDTH], zero beyond it."""
    rows, columns = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + (rows[:, None] * width + columns[None, :]), mask=inside, other=0.0)


@triton.jit
def store_block(pointer, values, row, height, HEIGHT: tl.constexpr, column, width, WIDTH: tl.constexpr):
    """`values` [HEIGHT, WIDTH] to where `load_block` reads them."""
    rows, columns = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    at = pointer + (rows[:, None] * width + columns[None, :])
    tl.store(at, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_parts(pointer, values, size, row, height, HEIGHT: tl.constexpr, column, width, WIDTH: tl.constexpr,
                PARTS: tl.constexpr):  # fmt: skip
    """`store_block` in PARTS parts of `size` numbers each: what the first has lost goes to the second."""
    store_block(pointer, values, row, height, HEIGHT, column, width, WIDTH)
    if PARTS == 2:
        lost = values - values.to(pointer.dtype.element_ty).to(tl.float32)
        store_block(pointer + size, lost, row, height, HEIGHT, column, width, WIDTH)


@triton.jit
def _quarter(matrix, place, quarter, E: tl.constexpr):
    """Where a quarter of a chunk's lower triangular matrix is: 0 and 2 are what a half of its rows has with itself, 1
    the second with the first."""
    row = tl.arange(0, E)
    return matrix + (place * 3 + quarter) * E * E + (row[:, None] * E + row[None, :])


@triton.jit
def load_quarter(matrix, place, quarter, E: tl.constexpr):
    """To be multiplied as it comes from memory, turned or not: what is changed, cast and then turned is silently wrong
    on Hopper before Triton 3.7.1."""
    return tl.load(_quarter(matrix, place, quarter, E))


@triton.jit
def load_quarters(matrix, place, E: tl.constexpr):
    """All of a lower triangular matrix [2 E, 2 E], zero above the diagonal."""
    half, row = tl.arange(0, 2 * E) // E, tl.arange(0, 2 * E) % E
    at = (half[:, None] + half[None, :]) * (E * E) + (row[:, None] * E + row[None, :])
    return tl.load(matrix + place * 3 * E * E + at, mask=half[:, None] >= half[None, :], other=0.0)


@triton.jit
def store_quarter(matrix, values, place, quarter, E: tl.constexpr):
    tl.store(_quarter(matrix, place, quarter, E), values.to(matrix.dtype.element_ty))


@triton.jit
def store_quarters(matrix, values, place, E: tl.constexpr):
    """`values` [2 E, 2 E] to where `load_quarters` reads them."""
    half, row = tl.arange(0, 2 * E) // E, tl.arange(0, 2 * E) % E
    at = (half[:, None] + half[None, :]) * (E * E) + (row[:, None] * E + row[None, :])
    values = values.to(matrix.dtype.element_ty)
    tl.store(matrix + place * 3 * E * E + at, values, mask=half[:, None] >= half[None, :])


@triton.jit
def in_parts(values, dtype: tl.constexpr):
    """Float32 values as two of `dtype`: what the first has lost is the second."""
    whole = values.to(dtype)
    return whole, (values - whole.to(tl.float32)).to(dtype)


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """`total` + `left` times `right`, as wide as `total`."""
    if total.dtype == tl.float64:
        return tl.dot(left.to(tl.float64), right.to(tl.float64), total, out_dtype=tl.float64)
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


class Chunks(NamedTuple):
    """See the legend of this file."""

    inverse: Tensor
    scores: Tensor | None
    seen: Tensor | None
    gamma: Tensor
    mixed: Tensor | None


def has_room_for_keys(k: Tensor) -> bool:
    """Whether a program has room for all columns of a chunk's queries and of P."""
    return (k.dtype == torch.bfloat16 or INTERPRETED) and k.shape[-1] <= WALKED


def walks(k: Tensor, value_dim: int) -> bool:
    """The same, and of the output and U."""
    return has_room_for_keys(k) and value_dim <= WALKED


def whole_width(width: int) -> int:
    """Columns of a program that has all of them. Never fewer than a tile: for narrower ones the assembler of CUDA 12.8
    multiplies what a register that nothing has written points to (the walk with K = 16, V = 32)."""
    return max(16 if INTERPRETED else TILE, tile_width(width, WALKED))


def warps_of(chunk: int) -> int:
    """Of a program that has all rows of a chunk."""
    return max(4, chunk // 16)


def parts_of(k: Tensor) -> int:
    return 2 if k.dtype == torch.bfloat16 else 1


def takes_hopper(chunk: int, *rows: Tensor, widths: Collection[int] | None = None) -> bool:
    """Whether this is a GPU for the kernels of `delta_hopper_*.py`, and they take these rows [T, heads, width].

    Copies are of 16 bytes, which Triton compiles where rows begin at multiples of 16 numbers. Gluon changes from one
    Triton to the next: see `GLUON`, and `GLUON_WIDTHS` where `widths` are given.

    Args:
        widths: for a kernel that takes any of these; None: for one that takes 128 alone.
    """
    has_run, widths = (GLUON, (HOPPER_WIDTH,)) if widths is None else (GLUON_WIDTHS, widths)
    if not has_run or INTERPRETED or chunk != HOPPER_CHUNK:
        return False
    are_taken = (
        x.dtype == torch.bfloat16
        and x.shape[-1] in widths
        and x.data_ptr() % 16 == 0
        and all(stride % 16 == 0 for stride in x.stride()[:2])
        for x in rows
    )
    return all(are_taken) and driver.active.get_current_target().arch == 90


def takes_hopper_wide(chunk: int, key_dim: int, *rows: Tensor) -> bool:
    """The same of the kernels for keys and values that are too wide for `walks`, of which they load these rows
    [T, H, V], or none."""
    return key_dim in (2 * TILE, 3 * TILE) and takes_hopper(chunk, *rows, widths=HOPPER_VALUES)


@functools.cache
def hopper_kernel(name: str) -> Kernel:
    """That of `delta_hopper_<name>.py`, which nothing else imports: Gluon may be missing, or another one."""
    return getattr(importlib.import_module(f"loglinear.ops.triton.delta_hopper_{name}"), f"_{name}_hopper_kernel")


def inverse_shape(k: Tensor, num_slots: int, heads: int, chunk: int) -> tuple[int, ...]:
    """Of `inverse`, for bfloat16 or float32 keys."""
    return parts_of(k), num_slots, heads, 3, chunk // 2, chunk // 2


def most_rows(k: Tensor) -> int:
    """Of a program's part of products with the inverse. Triton 3.6 sends 64 rows of float64 to the tensor cores of
    Blackwell (compute capability 10), which have no float64 (triton-lang/triton #10126)."""
    wide = sums_dtype(k) == torch.float64 and not INTERPRETED
    return TILE // 2 if wide and driver.active.get_current_target().arch // 10 == 10 else TILE


def tile_width(width: int, most: int = TILE) -> int:
    return max(16, min(most, next_power_of_2(width)))
