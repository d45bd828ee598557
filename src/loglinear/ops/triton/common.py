"""What the kernels share.

Legend
    N chunks (slots), C rows of a chunk, H heads, G groups, K key width, V value width, L levels
"""

from __future__ import annotations

import functools
import types

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear import fenwick

LOG2E = tl.constexpr(1.4426950408889634)


def _on_device(function):
    """A function of operators as a device function; the interpreter wants `tl` among its globals, so it gets ours."""
    return triton.jit(types.FunctionType(function.__code__, globals(), function.__name__))


# The bookkeeping has one home.
in_same_block = _on_device(fenwick.in_same_block)
block_start = _on_device(fenwick.block_start)
block_end = _on_device(fenwick.block_end)
block_number = _on_device(fenwick.block_number)
is_right_half = _on_device(fenwick.is_right_half)
lowest_bit = _on_device(fenwick.lowest_bit)
add_highest_bit = _on_device(fenwick.add_highest_bit)
drop_lowest_bit = _on_device(fenwick.drop_lowest_bit)


@triton.jit
def program_place():
    """What this program is, and its slot; in two dimensions, of which the second may have 65,535 programs."""
    return tl.program_id(0), tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


# They take microseconds a call on the host, for they serve kernels as well.
cdiv = functools.lru_cache(1024)(triton.cdiv)
next_power_of_2 = functools.lru_cache(1024)(triton.next_power_of_2)


def sums_dtype(k: Tensor) -> torch.dtype:
    """Of the sums of log decays within a chunk (gamma), for bfloat16 or float32 keys (as which float16 is computed).

    A strong decay drowns the weak ones after it: what float32 sums lose by e^-100, 5e-6, is nothing in 16 bits alone.
    """
    return torch.float32 if k.dtype == torch.bfloat16 else torch.float64


def programs(width: int, slots: int) -> tuple[int, int, int]:
    """A launch of `width` programs for each slot, side by side, as `program_place` reads it (too many, maybe)."""
    most = 65_535
    return width, min(slots, most), -(-slots // most)


@triton.jit
def row_exists(row, first, rows):
    if first is None:
        return row < rows
    else:
        return (row >= first) & (row < rows)


@triton.jit
def load_rows(pointer, token, first, rows, stride, ROWS: tl.constexpr, width, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """The rows of a chunk that starts at row `token`, of which `first` … `rows` exist: [ROWS, WIDTH], else zero.

    `first` is None where chunks begin with their first row: a comparison less in every mask.

    EVEN: no column is beyond `width`. Within a chunk offsets fit in 32 bits; where it starts takes 64.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = pointer + token.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])
    exists = row_exists(row, first, rows)
    if EVEN:
        return tl.load(at, mask=exists[:, None], other=0.0)
    else:
        return tl.load(at, mask=exists[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, values, token, first, rows, stride, ROWS: tl.constexpr, width, WIDTH: tl.constexpr,
               EVEN: tl.constexpr):  # fmt: skip
    """[ROWS, WIDTH] to the rows of a chunk, as `load_rows` reads them."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = pointer + token.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])
    exists = row_exists(row, first, rows)
    if EVEN:
        tl.store(at, values.to(pointer.dtype.element_ty), mask=exists[:, None])
    else:
        mask = exists[:, None] & (column < width)[None, :]
        tl.store(at, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_column(pointer, token, first, rows, stride, ROWS: tl.constexpr):
    """One number per row of a chunk, as float32: [ROWS], zero where there is no row."""
    row = tl.arange(0, ROWS)
    at = pointer + token.to(tl.int64) * stride + row * stride
    return tl.load(at, mask=row_exists(row, first, rows), other=0.0).to(tl.float32)


@triton.jit
def place_of_node(slot, block, origin, oldest, end, remaining):
    """Slot of a node that chunk `block` of a sequence reads and that ends before chunk `end`.

    Before the sequence's first chunk, `origin`, that is a bucket of its initial state: of these `remaining` are left to
    read, this one included, and the oldest comes first.
    """
    if origin is None:
        return slot - block + end - 1
    else:
        return tl.where(end > origin, slot - block + end - 1, oldest + remaining - 1)


@triton.jit
def left_sibling(slot, height, span, blocks, origins, oldests, reads):
    """Slot of what the node in `slot` takes in to grow beyond `height` (span = 2^height): a node, or a bucket.

    Its own last chunk reads just that at this height, after one node at each height below it.
    """
    end = tl.load(blocks + slot) + 1 - span
    return place_of_node(
        slot, tl.load(blocks + slot), tl.load(origins + slot), tl.load(oldests + slot), end,
        tl.load(reads + slot) - height,
    )  # fmt: skip


@triton.jit
def holds_tokens(position, level, L):
    """Which levels of a state at `position` are occupied: `fenwick.is_occupied`, for levels that may be beyond L."""
    height = tl.maximum(level - 1, 0)
    older = in_same_block(position, 0, height) == 0
    return (
        (level < L)
        & ((level > 0) | (level == L - 1))
        & tl.where(level == L - 1, older, is_right_half(position, height))
    )


@triton.jit
def level_between(t, s, level, L, AXIS: tl.constexpr):
    """`fenwick.level`, from `level`, 0, 1, … up to L at least, along that axis."""
    apart = in_same_block(t, s, level) == 0
    return tl.sum(((level < L - 1) & apart).to(tl.int32), AXIS)


@triton.jit
def carry_level(position, level, L):
    """`fenwick.carry_level` at `position`, from `level`, 0, 1, … up to L at least."""
    return level_between(position, position - 1, level, L, 0)


@triton.jit
def load_state(pointer, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """A state [K, V], in a tile [BK, BV] padded with zeros."""
    key, column = tl.arange(0, BK), tl.arange(0, BV)
    at = pointer + (key[:, None] * V + column[None, :])
    if (BK == K) & (BV == V):
        return tl.load(at)
    else:
        return tl.load(at, mask=(key < K)[:, None] & (column < V)[None, :], other=0.0)


@triton.jit
def log2_of(log_decay):
    """Base-2 logs of decays, of natural ones. NaN stays NaN.

    2^-126 is as good as zero; a reset (-inf, or a huge number) would drown what is summed after it.
    """
    return tl.maximum(log_decay * LOG2E, -126.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log2_decays(log_decay, token, first, rows, stride, C: tl.constexpr):
    """Base-2 logs of the decays of a chunk's rows: [C], zero where there is no row."""
    return log2_of(load_column(log_decay, token, first, rows, stride, C))


@triton.jit
def decay_of(log):
    """2^log, in float32."""
    return tl.exp2(log.to(tl.float32))


@triton.jit
def decay_at_most_one(log):
    """The same, and 1 where `log` is not that of a decay. NaN stays NaN."""
    return tl.exp2(tl.minimum(log.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def decays_between(later, earlier):
    """From earlier rows (columns) to later ones, of inclusive sums of the log2 decays: [ROWS, ROWS], 1 where the column
    is later."""
    return decay_at_most_one(later[:, None] - earlier[None, :])


@triton.jit
def level_factor(scales, token, first, rows, stride, L, C: tl.constexpr, HEIGHT: tl.constexpr):
    """Level scale from source rows (columns) to target rows of one chunk: [C, C], where it is causal.

    The level of two rows is that of the smallest block that holds both: from the whole chunk (2^HEIGHT rows) down,
    smaller blocks overwrite.
    """
    row = tl.arange(0, C)
    factor = load_column(scales + tl.minimum(HEIGHT, L - 1), token, first, rows, stride, C)[:, None]
    factor = tl.broadcast_to(factor, (C, C))
    for down in tl.static_range(HEIGHT):
        near = load_column(scales + tl.minimum(HEIGHT - 1 - down, L - 1), token, first, rows, stride, C)
        same = in_same_block(row[:, None], row[None, :], HEIGHT - 1 - down)
        factor = tl.where(same, near[:, None], factor)
    return factor


@triton.jit
def level_mask(
    scales, token, first, rows, stride, sums, L, C: tl.constexpr, HEIGHT: tl.constexpr, SCALED: tl.constexpr
):
    """Decay times level scale from source rows (columns) to target rows of one chunk, causal: [C, C].

    sums [C]: the inclusive sum of the log2 decays.
    """
    row = tl.arange(0, C)
    mask = decays_between(sums, sums)
    if SCALED:
        mask *= level_factor(scales, token, first, rows, stride, L, C, HEIGHT)
    return tl.where(row[:, None] >= row[None, :], mask, 0.0)
