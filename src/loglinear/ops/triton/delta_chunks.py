"""What one chunk of the delta rule is: the WY form (arXiv 2406.06484; gated: 2412.06464), in two kernels.

With A = strictly lower part of diag(β) (k kᵀ ⊙ e^{γ_t - γ_s}) the rows of a chunk write T (v - W S), where S is the
state that enters it, T = (I + A)⁻¹ diag(β), and W = T (k e^γ). This file makes T, W, the scores of the rows among each
other, and their queries as seen from S.

Precision, for 16-bit inputs (all else is float32): A, its inverse and the products that join it are float32 in three
tf32 parts, for the inverse of a chunk of nearly equal keys is as badly conditioned as the chunk is long. What every
later product passes through is kept in two bfloat16 parts, the second of them what the first has lost: T, W, T v, and
P in `delta_nodes.py`. With single ones the output is wrong by 6e-3 where nothing decays, instead of 4e-3, of which
1.7e-3 is the rounding of the output. U, the queries and the scores are single.

Legend
    N chunks (slots), C rows of a chunk, H heads, G groups, K key width, V value width, L levels
    M variants of the queries of all chunks: see `delta_read.py`; KT tiles of BK key columns
    inverse [N, H, C, C] (I + A)⁻¹, float32; erase [N, H, PARTS, C, K] W; scores [N, H, C, C]
    seen [M, H, C, K] variants of the queries, of which the first of each chunk is filled here
    gamma [H, N, C] inclusive sums of the base-2 log decay; mixed [N, H, C, C] scores before λ, for the backward
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    decays_between,
    level_factor,
    load_column,
    log2_decays,
    program_place,
    programs,
    row_exists,
)

TILE = 64  # columns of keys or values that are multiplied at once


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
def load_turned(pointer, SIZE: tl.constexpr):
    """The transpose of a contiguous matrix [SIZE, SIZE]: what is changed and cast after loading must not be turned
    there, which is silently wrong on Hopper before Triton 3.7.1."""
    place = tl.arange(0, SIZE)
    return tl.load(pointer + (place[None, :] * SIZE + place[:, None]))


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
def dot_parts(left, right, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """`left`, float32, in parts of right's dtype, times `right`."""
    first = left.to(right.dtype)
    total = tl.dot(first, right, input_precision=PRECISION)
    if PARTS == 2:
        total = tl.dot((left - first.to(tl.float32)).to(right.dtype), right, total, input_precision=PRECISION)
    return total


@triton.jit
def dot_with_parts(left, right, total, dtype: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """`total` + `left`, in dtype, times `right`, which is float32 and multiplied in parts of dtype."""
    whole = right.to(dtype)
    total = tl.dot(left, whole, total, input_precision=PRECISION)
    if PARTS == 2:
        total = tl.dot(left, (right - whole.to(tl.float32)).to(dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def _join(matrix, C: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """From blocks of SIZE rows that are inverted to blocks twice as large."""
    for pair in range(C // (2 * SIZE)):
        start = pair * 2 * SIZE
        left = load_block(matrix, start, C, SIZE, start, WIDTH, SIZE)
        between = load_block(matrix, start + SIZE, C, SIZE, start, WIDTH, SIZE)
        right = load_block(matrix, start + SIZE, C, SIZE, start + SIZE, WIDTH, SIZE)
        step = tl.dot(between, left, input_precision=PRECISION)
        step = tl.dot(right, step, input_precision=PRECISION)
        store_block(matrix, -step, start + SIZE, C, SIZE, start, WIDTH, SIZE)


@triton.jit
def invert(matrix, C: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)⁻¹ in place of a strictly lower A [C, C], C = 2^HEIGHT, in memory that this program has written, in rows
    of WIDTH.

    By substitution in blocks of 16, then block by block: [[X, 0], [-Y B X, Y]] for [[X⁻¹, 0], [B, Y⁻¹]].
    """
    BASE: tl.constexpr = 16
    BLOCKS: tl.constexpr = C // BASE
    block, row, column = tl.arange(0, BLOCKS), tl.arange(0, BASE), tl.arange(0, BASE)
    at = matrix + (block[:, None, None] * BASE * (WIDTH + 1) + row[None, :, None] * WIDTH + column[None, None, :])
    lower = tl.load(at)
    solved = tl.zeros((BLOCKS, BASE, BASE), tl.float32)
    solved += tl.where(row[:, None] == column[None, :], 1.0, 0.0)[None, :, :]
    for number in range(1, BASE):
        here = (row == number)[None, :, None]
        weights = tl.sum(tl.where(here, lower, 0.0), 1)  # [BLOCKS, BASE]
        known = tl.sum(weights[:, :, None] * solved, 1)
        solved = tl.where(here, solved - known[:, None, :], solved)
    tl.store(at, solved)
    for doubling in tl.static_range(HEIGHT - 4):
        tl.debug_barrier()
        _join(matrix, C, WIDTH, 16 * 2**doubling, PRECISION)


@triton.jit(do_not_specialize=["N", "stride_d", "stride_b"])
def _inverse_kernel(k, log_decay, beta, inverse, gamma, tokens, firsts, rows_of, N, H, G, stride_k, stride_kg, stride_d,
                    stride_b, K, C: tl.constexpr, HEIGHT: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr,
                    PRECISION: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """(I + A)⁻¹ and gamma of one chunk."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    k += (head // (H // G)).to(tl.int64) * stride_kg
    row = tl.arange(0, C)
    decay = log2_decays(log_decay + head, token, first, rows, stride_d, C)
    strength = load_column(beta + head, token, first, rows, stride_b, C)
    sums = tl.cumsum(decay, 0)
    tl.store(gamma + (head.to(tl.int64) * N + slot) * C + row, sums)
    overlap = tl.zeros((C, C), tl.float32)
    for tile in range(KT):
        keys = load_tile(k, token, first, rows, stride_k, C, tile * BK, K, BK)
        overlap = tl.dot(keys, tl.trans(keys), overlap, input_precision=PRECISION)
    passing = decays_between(sums) * strength[:, None]
    lower = tl.where(row[:, None] > row[None, :], overlap * passing, 0.0)
    matrix = inverse + (slot.to(tl.int64) * H + head) * C * C
    store_block(matrix, lower, 0, C, C, 0, C, C)
    tl.debug_barrier()
    invert(matrix, C, C, HEIGHT, EXACT)


@triton.jit(do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _chunks_kernel(q, k, scales, beta, inverse, erase, scores, seen, gamma, kept, tokens, firsts, rows_of, reads,
                   places, N, H, G, scale, stride_q, stride_qg, stride_k, stride_kg, stride_s, stride_sh, stride_b, K,
                   L, C: tl.constexpr, HEIGHT: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
                   PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """W, scores and queries of one chunk."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    group = head // (H // G)
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    q += group.to(tl.int64) * stride_qg
    k += group.to(tl.int64) * stride_kg
    row = tl.arange(0, C)
    sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + row)
    product = tl.zeros((C, C), tl.float32)
    for tile in range(KT):
        keys = load_tile(k, token, first, rows, stride_k, C, tile * BK, K, BK)
        queries = load_tile(q, token, first, rows, stride_q, C, tile * BK, K, BK)
        product = tl.dot(queries, tl.trans(keys), product, input_precision=PRECISION)
    passing = decays_between(sums) * scale
    product = tl.where(row[:, None] >= row[None, :], product * passing, 0.0)

    place = slot.to(tl.int64) * H + head
    dtype = erase.dtype.element_ty
    strength = load_column(beta + head, token, first, rows, stride_b, C)
    solved = load_block(inverse + place * C * C, 0, C, C, 0, C, C) * strength[None, :]
    mixed = tl.dot(product, solved, input_precision=PRECISION)
    if SCALED:
        lam = scales + head.to(tl.int64) * stride_sh
        factor = level_factor(lam, token, first, rows, stride_s, L, C, HEIGHT)
        store_block(scores + place * C * C, mixed * factor, 0, C, C, 0, C, C)
    else:
        store_block(scores + place * C * C, mixed, 0, C, C, 0, C, C)
    mixed = mixed.to(dtype)
    if kept is not None:
        store_block(kept + place * C * C, mixed, 0, C, C, 0, C, C)
    entering = tl.exp2(sums)
    read = tl.load(places + slot).to(tl.int64) * H + head
    is_read = tl.load(reads + slot) > 0
    for tile in range(KT):
        keys = load_tile(k, token, first, rows, stride_k, C, tile * BK, K, BK)
        keys = (keys.to(tl.float32) * entering[:, None]).to(dtype)
        erased = dot_parts(solved, keys, PARTS, PRECISION)
        store_parts(erase + place * PARTS * C * K, erased, C * K, 0, C, C, tile * BK, K, BK, PARTS)
        if is_read:
            queries = load_tile(q, token, first, rows, stride_q, C, tile * BK, K, BK).to(tl.float32)
            queries = queries * (entering * scale)[:, None] - tl.dot(mixed, keys, input_precision=PRECISION)
            store_block(seen + read * C * K, queries, 0, C, C, tile * BK, K, BK)


class Chunks(NamedTuple):
    """See the legend of this file."""

    inverse: Tensor
    erase: Tensor | None
    scores: Tensor
    seen: Tensor
    gamma: Tensor
    mixed: Tensor | None
    written: Tensor | None = None  # [N, H, C, V] T v, where `delta_halves.py` keeps it for the backward


def make_chunks(q, k, v, scales, log_decay, beta, slots: Slots, places: Tensor, num_variants: int, chunk: int,
                height: int, scale: float, precision: str, backward: bool = False) -> Chunks:  # fmt: skip
    """Chunks of q, k [T, G, K], v [T, H, V], level scales [T, H, L] (None: 1), log_decay and beta [T, H].

    places [N]: for each slot the first variant of its queries, of which there are at most `num_variants`. `backward`:
    keeps `mixed`.
    """
    num_slots, heads, (_, groups, key_dim) = len(slots.token), v.shape[1], q.shape
    made = Chunks(
        inverse=k.new_empty(num_slots, heads, chunk, chunk, dtype=torch.float32),
        erase=k.new_empty(num_slots, heads, parts_of(k), chunk, key_dim),
        scores=k.new_empty(num_slots, heads, chunk, chunk), seen=k.new_empty(num_variants, heads, chunk, key_dim),
        gamma=k.new_zeros(heads, num_slots, chunk, dtype=torch.float32),
        mixed=k.new_empty(num_slots, heads, chunk, chunk) if backward else None,
    )  # fmt: skip
    scaled = scales is not None
    lam = scales if scaled else k
    block = tile_width(key_dim)
    tiles = {"C": chunk, "HEIGHT": height, "KT": triton.cdiv(key_dim, block), "BK": block}
    of_q, of_k, of_scales = q.stride()[:2], k.stride()[:2], lam.stride()[:2]
    _inverse_kernel[programs(heads, num_slots)](
        k, log_decay, beta, made.inverse, made.gamma, slots.token, slots.first, slots.rows, num_slots, heads, groups,
        *of_k, log_decay.stride(0), beta.stride(0), key_dim, PRECISION=precision,
        EXACT=precision if k.dtype == torch.float32 else "tf32x3",
        num_warps=warps_of(chunk), num_stages=2, **tiles,
    )  # fmt: skip
    _chunks_kernel[programs(heads, num_slots)](
        q, k, lam, beta, *made[:-1], slots.token, slots.first, slots.rows, slots.reads, places, num_slots, heads,
        groups, scale, *of_q, *of_k, *of_scales, beta.stride(0), key_dim, lam.shape[-1] if scaled else 1, SCALED=scaled,
        PARTS=parts_of(k), PRECISION=precision, num_warps=warps_of(chunk), num_stages=1, **tiles,
    )  # fmt: skip
    return made


def warps_of(chunk: int) -> int:
    """Of a program that has all rows of a chunk."""
    return max(4, chunk // 16)


def parts_of(k: Tensor) -> int:
    return 2 if k.dtype == torch.bfloat16 else 1


def tile_width(width: int, most: int = TILE) -> int:
    return max(16, min(most, triton.next_power_of_2(width)))
