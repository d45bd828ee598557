"""The inverse of one chunk's I + A, for `delta_chunks.py`, and gamma.

From blocks of 16 rows on the diagonal, which are inverted row by row, to those of half a chunk and the quarter below:

    [[X⁻¹, 0], [B, Y⁻¹]]⁻¹ = [[X, 0], [-Y B X, Y]]

Of float32 keys all of it is float64, as gamma is, but for X and Y where they are joined, which are rounded by then:
the inverse of a chunk of nearly equal keys magnifies what A has lost, and sums of float32 products, one after the
other, lose enough for outputs to err by 3e-6.

Legend as in `delta_chunks.py`, and
    halves [N, H, 2, E, E] the two blocks of A on the diagonal, and what is inverted of them
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots, chunk_height
from loglinear.ops.triton.common import (
    cdiv,
    decays_between,
    load_column,
    log2_decays,
    program_place,
    programs,
    sums_dtype,
)
from loglinear.ops.triton.delta_chunks import (
    HOPPER_KEYS,
    TILE,
    hopper_kernel,
    inverse_shape,
    load_block,
    load_quarter,
    load_tile,
    parts_of,
    product,
    store_block,
    store_quarter,
    takes_hopper,
    tile_width,
)
from loglinear.ops.triton.launch import kernel

BASE = 16  # rows that are inverted one by one
INVERSE_WARPS = 4  # of a program of the kernel for Hopper


@triton.jit
def _store_quarter_in_parts(matrix, values, place, quarter, size, E: tl.constexpr, PARTS: tl.constexpr):
    """In PARTS parts of `size` numbers each: what the first has lost goes to the second."""
    store_quarter(matrix, values, place, quarter, E)
    if PARTS == 2:
        store_quarter(matrix + size, values - values.to(matrix.dtype.element_ty).to(tl.float32), place, quarter, E)


@triton.jit
def _join_pair(matrix, pair, E: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """In place, of a matrix [E, E]: two blocks of SIZE rows on its diagonal that are inverted become one."""
    start = pair * 2 * SIZE
    left = load_block(matrix, start, E, SIZE, start, E, SIZE)
    between = load_block(matrix, start + SIZE, E, SIZE, start, E, SIZE)
    right = load_block(matrix, start + SIZE, E, SIZE, start + SIZE, E, SIZE)
    nothing = tl.zeros((SIZE, SIZE), matrix.dtype.element_ty)
    step = -product(right, product(between, left, nothing, EXACT), nothing, EXACT)
    store_block(matrix, step, start + SIZE, E, SIZE, start, E, SIZE)


@kernel(do_not_specialize=["N", "stride_d", "stride_b"])
def _diagonal_kernel(k, log_decay, beta, halves, inverse, gamma, tokens, firsts, rows_of, N, H, G, stride_k, stride_kg,
                     stride_d, stride_b, K, E: tl.constexpr, LEVELS: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr,
                     BASE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
                     EXACT: tl.constexpr):  # fmt: skip
    """The inverse of one of the two halves of a chunk, by itself, and its gamma. E = 2^LEVELS BASE."""
    part, slot = program_place()
    head, half = part // 2, part % 2
    if slot >= N:
        return
    rows, place = tl.load(rows_of + slot), slot.to(tl.int64) * H + head
    halves += (place * 2 + half) * E * E
    start = half * E
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    own_first = None if first is None else first - start
    k += (head // (H // G)).to(tl.int64) * stride_kg
    row = tl.arange(0, E)
    earlier = log2_decays(log_decay + head, token, first, rows * half, stride_d, E)  # none for the first half
    own = log2_decays(log_decay + head, token + start, own_first, rows - start, stride_d, E)
    dtype = gamma.dtype.element_ty
    sums = tl.sum(earlier.to(dtype), 0) + tl.cumsum(own.to(dtype), 0)
    tl.store(gamma + (head.to(tl.int64) * N + slot) * 2 * E + start + row, sums)
    overlap = tl.zeros((E, E), halves.dtype.element_ty)
    for tile in range(KT):
        keys = load_tile(k, token + start, own_first, rows - start, stride_k, E, tile * BK, K, BK)
        overlap = product(keys, tl.trans(keys), overlap, PRECISION)
    strength = load_column(beta + head, token + start, own_first, rows - start, stride_b, E)
    overlap = tl.where(row[:, None] > row[None, :], overlap * decays_between(sums, sums) * strength[:, None], 0.0)
    store_block(halves, overlap, 0, E, E, 0, E, E)
    tl.debug_barrier()
    inner = tl.arange(0, BASE)
    corner = halves + tl.arange(0, E // BASE) * BASE * (E + 1)
    solved = tl.zeros((E // BASE, BASE, BASE), halves.dtype.element_ty)
    solved += tl.where(inner[:, None] == inner[None, :], 1.0, 0.0)[None, :, :]
    for number in tl.static_range(1, BASE):
        weights = tl.load(corner[:, None] + (number * E + inner)[None, :])  # zero from this row on
        known = tl.sum(weights[:, :, None] * solved, 1)
        solved = tl.where(inner[None, :, None] == number, solved - known[:, None, :], solved)
    tl.debug_barrier()  # all of it is read
    tl.store(corner[:, None, None] + (inner[:, None] * E + inner[None, :])[None, :, :], solved)
    tl.debug_barrier()
    for level in tl.static_range(LEVELS):
        for pair in tl.static_range(E // (BASE * 2 ** (level + 1))):
            _join_pair(halves, pair, E, BASE * 2**level, EXACT)
        tl.debug_barrier()
    found = load_block(halves, 0, E, E, 0, E, E)
    _store_quarter_in_parts(inverse, found, place, 2 * half, N.to(tl.int64) * H * 3 * E * E, E, PARTS)


@triton.jit
def _whole_quarter(inverse, place, quarter, size, E: tl.constexpr, PARTS: tl.constexpr):
    """A quarter of X, float32."""
    whole = load_quarter(inverse, place, quarter, E).to(tl.float32)
    if PARTS == 2:
        whole += load_quarter(inverse + size, place, quarter, E).to(tl.float32)
    return whole


@kernel(do_not_specialize=["N", "stride_b"])
def _below_kernel(k, beta, inverse, gamma, tokens, firsts, rows_of, N, H, G, stride_k, stride_kg, stride_b, K,
                  E: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
                  EXACT: tl.constexpr):  # fmt: skip
    """The quarter below the two halves of a chunk: -Y B X."""
    head, slot = program_place()
    if slot >= N:
        return
    rows, place = tl.load(rows_of + slot), slot.to(tl.int64) * H + head
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    later = None if first is None else first - E
    k += (head // (H // G)).to(tl.int64) * stride_kg
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + tl.arange(0, E)
    below = tl.zeros((E, E), gamma.dtype.element_ty)
    for tile in range(KT):
        keys = load_tile(k, token + E, later, rows - E, stride_k, E, tile * BK, K, BK)
        others = load_tile(k, token, first, rows, stride_k, E, tile * BK, K, BK)
        below = product(keys, tl.trans(others), below, PRECISION)
    strength = load_column(beta + head, token + E, later, rows - E, stride_b, E)
    below *= decays_between(tl.load(sums + E), tl.load(sums)) * strength[:, None]
    size = N.to(tl.int64) * H * 3 * E * E
    nothing = tl.zeros((E, E), gamma.dtype.element_ty)
    step = product(below, _whole_quarter(inverse, place, 0, size, E, PARTS), nothing, EXACT)
    step = -product(_whole_quarter(inverse, place, 2, size, E, PARTS), step, nothing, EXACT)
    _store_quarter_in_parts(inverse, step, place, 1, size, E, PARTS)


def make_inverses(k: Tensor, log_decay: Tensor, beta: Tensor, slots: Slots, chunk: int, precision: str,
              ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`inverse` and `gamma` of chunks of k [T, G, K], log_decay and beta [T, H]."""
    num_slots, (_, groups, key_dim), heads = len(slots.token), k.shape, beta.shape[-1]
    inverse = k.new_empty(inverse_shape(k, num_slots, heads, chunk))
    gamma = k.new_zeros(heads, num_slots, chunk, dtype=sums_dtype(k))
    if takes_hopper(chunk, k, widths=HOPPER_KEYS):
        # so that three programs share a multiprocessor; of wider keys it has shared memory for two
        registers = {"maxnreg": 168} if key_dim <= 128 else {}
        hopper_kernel("inverse")[programs(heads, num_slots)](
            k, log_decay, beta, inverse, gamma, slots.token, slots.first, slots.rows, num_slots, heads, groups,
            *k.stride()[:2], log_decay.stride(0), beta.stride(0), KT=key_dim // TILE, num_warps=INVERSE_WARPS,
            **registers,
        )  # fmt: skip
        return inverse, gamma
    block, half = tile_width(key_dim), chunk // 2
    halves = k.new_empty(num_slots, heads, 2, half, half, dtype=gamma.dtype)
    tiles = {"E": half, "KT": cdiv(key_dim, block), "BK": block}
    shape = {**tiles, "PARTS": parts_of(k), "PRECISION": precision, "EXACT": "tf32x3"}
    # steps follow one another, and one warp waits for no other; of float32 it would not have the registers
    warps = 2 if k.dtype == torch.float32 else 1
    _diagonal_kernel[programs(2 * heads, num_slots)](
        k, log_decay, beta, halves, inverse, gamma, slots.token, slots.first, slots.rows, num_slots, heads, groups,
        *k.stride()[:2], log_decay.stride(0), beta.stride(0), key_dim, LEVELS=chunk_height(half // BASE), BASE=BASE,
        num_warps=warps, num_stages=2, **shape,
    )  # fmt: skip
    _below_kernel[programs(heads, num_slots)](
        k, beta, inverse, gamma, slots.token, slots.first, slots.rows, num_slots, heads, groups, *k.stride()[:2],
        beta.stride(0), key_dim, num_warps=4, num_stages=2, **shape,
    )  # fmt: skip
    return inverse, gamma
