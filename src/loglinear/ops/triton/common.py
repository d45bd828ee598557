"""What the kernels share.

Legend
    N chunks (slots), C rows of a chunk, H heads, G groups, K key width, V value width, L levels
"""

from __future__ import annotations

import types

import triton
import triton.language as tl

from loglinear import fenwick



def _on_device(function):
    """A function of operators as a device function; the interpreter wants `tl` among its globals, so it gets ours."""
    return triton.jit(types.FunctionType(function.__code__, globals(), function.__name__))


# The bookkeeping has one home.
in_same_block = _on_device(fenwick.in_same_block)
block_end = _on_device(fenwick.block_end)
is_right_half = _on_device(fenwick.is_right_half)
lowest_bit = _on_device(fenwick.lowest_bit)
drop_lowest_bit = _on_device(fenwick.drop_lowest_bit)


@triton.jit
def load_rows(pointer, token, rows, stride, first, ROWS: tl.constexpr, width, WIDTH: tl.constexpr):
    """Rows first … first + ROWS of a chunk that starts at row `token` and has `rows` rows: [ROWS, WIDTH], else zero."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = (token + row).to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer + at, mask=(row < rows)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def load_column(pointer, token, rows, stride, first, ROWS: tl.constexpr):
    """One number per row of a chunk, as float32: [ROWS], zero where there is no row."""
    row = first + tl.arange(0, ROWS)
    return tl.load(pointer + (token + row).to(tl.int64) * stride, mask=row < rows, other=0.0).to(tl.float32)
