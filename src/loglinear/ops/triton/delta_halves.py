"""What one chunk of the delta rule is, made by programs that have half of its rows: see `delta_chunks.py` for what.

A chunk is long so that the tree has few nodes, each of which moves more than its chunk. A program that has all rows of
a long chunk takes all registers of a multiprocessor, and waits alone for each of its loads. Everything in a chunk is
lower triangular, in blocks of half a chunk:

    T = [[T₀, 0], [T₁₀, T₁]]        T₁₀ = -X₁ B X₀ diag(β₀) for (I + A)⁻¹ = [[X₀, 0], [., X₁]], A = [[., 0], [B, .]]

so a program takes one half of the rows, or goes through both one after the other. Decays are put on the left operand of
every product, which is in registers as it is; keys and values are multiplied as they come from memory.

Legend as in `delta_chunks.py` and `delta_nodes.py`, and
    E rows of half a chunk, W columns of a tile of v or k
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    cdiv,
    decays_between,
    level_factor,
    load_column,
    log2_decays,
    program_place,
    programs,
)
from loglinear.ops.triton.delta_chunks import (
    TILE,
    Chunks,
    dot_parts,
    has_room_for_keys,
    inverse_shape,
    load_block,
    load_quarter,
    load_tile,
    parts_of,
    store_block,
    store_parts,
    store_quarter,
    tile_width,
)
from loglinear.ops.triton.delta_whole import make_scores
from loglinear.ops.triton.scalar import INTERPRETED


@triton.jit
def decays_across(later, earlier):
    """2^(sums of the row, in the second half - sums of the column, in the first): [E, E]."""
    return tl.exp2(tl.minimum(later[:, None] - earlier[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=["N", "stride_d", "stride_b"])
def _overlap_kernel(k, log_decay, beta, lower, gamma, tokens, firsts, rows_of, N, H, G, stride_k, stride_kg, stride_d,
                    stride_b, K, E: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """A quarter of A, and gamma: quarters 0 and 2 are what a half has with itself, 1 what the second has with the
    first. Nobody reads the one above the diagonal."""
    part, slot = program_place()
    head, quarter = part // 3, part % 3
    above, left = tl.minimum(quarter, 1) * E, (quarter // 2) * E  # its first row and column
    lower += (slot.to(tl.int64) * H + head) * 4 * E * E
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    later = None if first is None else first - E
    k += (head // (H // G)).to(tl.int64) * stride_kg
    row = tl.arange(0, E)
    sums = tl.cumsum(log2_decays(log_decay + head, token, first, rows, stride_d, E), 0)
    before = tl.sum(tl.where(row == E - 1, sums, 0.0), 0)
    later_sums = before + tl.cumsum(log2_decays(log_decay + head, token + E, later, rows - E, stride_d, E), 0)
    row_sums = tl.where(quarter == 0, sums, later_sums)
    column_sums = tl.where(quarter == 2, later_sums, sums)
    if quarter != 1:
        tl.store(gamma + (head.to(tl.int64) * N + slot) * 2 * E + above + row, row_sums)
    first_row = None if first is None else first - above
    first_column = None if first is None else first - left
    overlap = tl.zeros((E, E), tl.float32)
    for tile in range(KT):
        keys = load_tile(k, token + above, first_row, rows - above, stride_k, E, tile * BK, K, BK)
        others = load_tile(k, token + left, first_column, rows - left, stride_k, E, tile * BK, K, BK)
        overlap = tl.dot(keys, tl.trans(others), overlap, input_precision=PRECISION)
    strength = load_column(beta + head, token + above, first_row, rows - above, stride_b, E)
    strict = (row[:, None] > row[None, :]) | (quarter == 1)
    overlap = tl.where(strict, overlap * decays_across(row_sums, column_sums) * strength[:, None], 0.0)
    store_block(lower, overlap, above, 2 * E, E, left, 2 * E, E)


@triton.jit(do_not_specialize=["N"])
def _substitute_kernel(lower, rows_of, N, H, C: tl.constexpr, BASE: tl.constexpr):
    """(I + A)⁻¹ in place of one block of BASE rows of A on its diagonal: row by row, each from those above it."""
    part, slot = program_place()
    head, block = part // (C // BASE), part % (C // BASE)
    if tl.load(rows_of + slot, mask=slot < N, other=0) == 0:
        return
    lower += (slot.to(tl.int64) * H + head) * C * C + block * BASE * (C + 1)
    row = tl.arange(0, BASE)
    solved = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for number in tl.static_range(1, BASE):
        weights = tl.load(lower + number * C + row)  # zero from this row on
        known = tl.sum(weights[:, None] * solved, 0)
        solved = tl.where(row[:, None] == number, solved - known[None, :], solved)
    tl.debug_barrier()  # all of it is read
    tl.store(lower + (row[:, None] * C + row[None, :]), solved)


@triton.jit
def _store_quarter_in_parts(matrix, values, place, quarter, size, E: tl.constexpr, PARTS: tl.constexpr):
    """In PARTS parts of `size` numbers each: what the first has lost goes to the second."""
    store_quarter(matrix, values, place, quarter, E)
    if PARTS == 2:
        store_quarter(matrix + size, values - values.to(matrix.dtype.element_ty).to(tl.float32), place, quarter, E)


@triton.jit(do_not_specialize=["N"])
def _join_kernel(lower, inverse, rows_of, N, H, C: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """From two blocks of SIZE rows that are inverted to one: [[X, 0], [-Y B X, Y]] for [[X⁻¹, 0], [B, Y⁻¹]].

    In place; the last one, of half a chunk, writes the quarters of `inverse` instead.
    """
    part, slot = program_place()
    head, pair = part // (C // (2 * SIZE)), part % (C // (2 * SIZE))
    if slot >= N:
        return
    exists = tl.load(rows_of + slot) > 0
    place, start = slot.to(tl.int64) * H + head, pair * 2 * SIZE
    lower += place * C * C
    left = load_block(lower, start, C * exists, SIZE, start, C, SIZE)
    between = load_block(lower, start + SIZE, C * exists, SIZE, start, C, SIZE)
    right = load_block(lower, start + SIZE, C * exists, SIZE, start + SIZE, C, SIZE)
    step = tl.dot(between, left, input_precision=PRECISION)
    step = -tl.dot(right, step, input_precision=PRECISION)
    if inverse is None:
        store_block(lower, step, start + SIZE, C, SIZE, start, C, SIZE)
    else:
        size = N.to(tl.int64) * H * 3 * SIZE * SIZE
        _store_quarter_in_parts(inverse, left, place, 0, size, SIZE, PARTS)
        _store_quarter_in_parts(inverse, step, place, 1, size, SIZE, PARTS)
        _store_quarter_in_parts(inverse, right, place, 2, size, SIZE, PARTS)


@triton.jit
def _times_inverse(left, inverse, place, quarter, total, size, E: tl.constexpr, PARTS: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """`total` + `left` times a quarter of X."""
    total = tl.dot(left, load_quarter(inverse, place, quarter, E), total, input_precision=PRECISION)
    if PARTS == 2:
        total = tl.dot(left, load_quarter(inverse + size, place, quarter, E), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _scores_kernel(q, k, scales, beta, inverse, scores, seen, gamma, kept, tokens, firsts, rows_of, reads, places, N, H,
                   G, scale, stride_q, stride_qg, stride_k, stride_kg, stride_s, stride_sh, stride_b, K, L,
                   E: tl.constexpr, HEIGHT: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
                   SKIPS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores and queries of half of the rows. E = 2^HEIGHT.

    The other half is what the second one reads of the first; of the first half, for which it lies ahead, all of that
    is zero, and multiplied unless it SKIPS that.
    """
    part, slot = program_place()
    head, half = part // 2, part % 2
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    group = head // (H // G)
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    q += group.to(tl.int64) * stride_qg
    k += group.to(tl.int64) * stride_kg
    start, ahead, reaches = half * E, (1 - half) * E, (half == 1) | (not SKIPS)
    first_of = None if first is None else first - start
    token_of, rows_of_half = token + start, rows - start
    earlier = rows * half  # none for the first half
    row = tl.arange(0, E)
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + row
    own_sums, other_sums = tl.load(sums + start), tl.load(sums)
    product, across = tl.zeros((E, E), tl.float32), tl.zeros((E, E), tl.float32)
    for tile in range(KT):
        queries = load_tile(q, token_of, first_of, rows_of_half, stride_q, E, tile * BK, K, BK)
        keys = load_tile(k, token_of, first_of, rows_of_half, stride_k, E, tile * BK, K, BK)
        others = load_tile(k, token, first, earlier, stride_k, E, tile * BK, K, BK)
        product = tl.dot(queries, tl.trans(keys), product, input_precision=PRECISION)
        if reaches:
            across = tl.dot(queries, tl.trans(others), across, input_precision=PRECISION)
    product = tl.where(row[:, None] >= row[None, :], product * decays_between(own_sums) * scale, 0.0)
    across *= decays_across(own_sums, other_sums) * scale

    place = slot.to(tl.int64) * H + head
    size = N.to(tl.int64) * H * 3 * E * E  # of a part of X
    strength = load_column(beta + head, token_of, first_of, rows_of_half, stride_b, E)
    before = load_column(beta + head, token, first, earlier, stride_b, E)  # zero for the first half
    dtype = scores.dtype.element_ty
    product, across, nothing = product.to(dtype), across.to(dtype), tl.zeros((E, E), tl.float32)
    mixed = _times_inverse(product, inverse, place, 2 * half, nothing, size, E, PARTS, PRECISION)
    mixed *= strength[None, :]
    mixed_across = nothing
    if reaches:
        mixed_across = _times_inverse(across, inverse, place, 0, nothing, size, E, PARTS, PRECISION)
        # of the first half with itself again: what is multiplied by zero must be as finite as its own
        mixed_across = _times_inverse(product, inverse, place, half, mixed_across, size, E, PARTS, PRECISION)
        mixed_across *= before[None, :]
    out = scores + place * 4 * E * E
    if SCALED:
        lam = scales + head.to(tl.int64) * stride_sh
        factor = level_factor(lam, token_of, first_of, rows_of_half, stride_s, L, E, HEIGHT)
        store_block(out, mixed * factor, start, 2 * E, E, start, 2 * E, E)
        far = load_column(lam + tl.minimum(HEIGHT + 1, L - 1), token_of, first_of, rows_of_half, stride_s, E)
        store_block(out, mixed_across * far[:, None], start, 2 * E, E, ahead, 2 * E, E)
    else:
        store_block(out, mixed, start, 2 * E, E, start, 2 * E, E)
        store_block(out, mixed_across, start, 2 * E, E, ahead, 2 * E, E)
    if kept is not None:
        store_quarter(kept, mixed, place, 2 * half, E)
        if half == 1:
            store_quarter(kept, mixed_across, place, 1, E)
    if tl.load(reads + slot) == 0:
        return
    entering = tl.exp2(own_sums)
    mixed = (mixed * entering[None, :]).to(dtype)
    mixed_across = (mixed_across * tl.exp2(other_sums)[None, :]).to(dtype)
    seen += (tl.load(places + slot).to(tl.int64) * H + head) * 2 * E * K
    for tile in range(KT):
        keys = load_tile(k, token_of, first_of, rows_of_half, stride_k, E, tile * BK, K, BK)
        others = load_tile(k, token, first, earlier, stride_k, E, tile * BK, K, BK)
        passed = tl.dot(mixed, keys, input_precision=PRECISION)
        if reaches:
            passed = tl.dot(mixed_across, others, passed, input_precision=PRECISION)
        queries = load_tile(q, token_of, first_of, rows_of_half, stride_q, E, tile * BK, K, BK).to(tl.float32)
        store_block(seen, queries * (entering * scale)[:, None] - passed, start, 2 * E, E, tile * BK, K, BK)


@triton.jit
def _in_parts(values, dtype: tl.constexpr):
    whole = values.to(dtype)
    return whole, (values - whole.to(tl.float32)).to(dtype)


@triton.jit
def _solved(inverse, place, quarter, whole, lost, total, size, E: tl.constexpr, PARTS: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """`total` + a quarter of X times what is in parts."""
    first = load_quarter(inverse, place, quarter, E)
    total = tl.dot(first, whole, total, input_precision=PRECISION)
    if PARTS == 2:
        total = tl.dot(first, lost, total, input_precision=PRECISION)
        total = tl.dot(load_quarter(inverse + size, place, quarter, E), whole, total, input_precision=PRECISION)
    return total


@triton.jit
def _own_rows(inverse, place, quarter, strength, size, E: tl.constexpr, PARTS: tl.constexpr):
    """A quarter of X, float32, with what its columns are multiplied by."""
    whole = load_quarter(inverse, place, quarter, E).to(tl.float32)
    if PARTS == 2:
        whole += load_quarter(inverse + size, place, quarter, E).to(tl.float32)
    return whole * strength[None, :]


@triton.jit
def _times_keys(k, whole0, lost0, whole1, lost1, token, first, later, rows, stride, column, K, E: tl.constexpr,
                BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BK columns of k, transposed, times what is kept in parts for each half of the rows."""
    keys0 = load_tile(k, token, first, rows, stride, E, column, K, BK)
    keys1 = load_tile(k, token + E, later, rows - E, stride, E, column, K, BK)
    made = tl.dot(tl.trans(keys0), whole0, input_precision=PRECISION)
    made = tl.dot(tl.trans(keys1), whole1, made, input_precision=PRECISION)
    if PARTS == 2:
        made = tl.dot(tl.trans(keys0), lost0, made, input_precision=PRECISION)
        made = tl.dot(tl.trans(keys1), lost1, made, input_precision=PRECISION)
    return made


@triton.jit(do_not_specialize=["N", "stride_b"])
def _leaves_kernel(k, v, beta, inverse, gamma, added, maps, tokens, firsts, rows_of, lefts, heights, N, H, G, stride_k,
                   stride_kg, stride_v, stride_vh, stride_b, K, V, E: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr,
                   BK: tl.constexpr, W: tl.constexpr, WEIGHS: tl.constexpr, PARTS: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """One tile of columns of U, or of P, of one chunk: kᵀ of what T makes of the tile of v, or of k e^γ.

    heights: None, or only of chunks that take in no left sibling. WEIGHS: X as it comes from memory times β v in parts,
    in the place of X diag(β) in parts times v.
    """
    part, slot = program_place()
    columns: tl.constexpr = VT + (KT * BK + W - 1) // W
    head, tile = part // columns, part % columns
    if tl.load(lefts + slot, mask=slot < N, other=0) <= 1:
        return  # nobody reads the last chunk of a sequence
    if heights is not None:
        if tl.load(heights + slot) > 0:
            return
    rows, token = tl.load(rows_of + slot), tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    later = None if first is None else first - E
    k += (head // (H // G)).to(tl.int64) * stride_kg
    v += head.to(tl.int64) * stride_vh
    place = slot.to(tl.int64) * H + head
    row = tl.arange(0, E)
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + row
    sums0, sums1 = tl.load(sums), tl.load(sums + E)
    end = tl.load(gamma + (head.to(tl.int64) * N + slot) * 2 * E + 2 * E - 1)
    strength0 = load_column(beta + head, token, first, rows, stride_b, E)
    strength1 = load_column(beta + head, token + E, later, rows - E, stride_b, E)
    dtype = added.dtype.element_ty
    of_values = tile < VT
    if of_values:
        column = tile * W
        source0 = load_tile(v, token, first, rows, stride_v, E, column, V, W)
        source1 = load_tile(v, token + E, later, rows - E, stride_v, E, column, V, W)
    else:
        column = (tile - VT) * W
        source0 = load_tile(k, token, first, rows, stride_k, E, column, K, W)
        source1 = load_tile(k, token + E, later, rows - E, stride_k, E, column, K, W)
        strength0 *= tl.exp2(sums0)
        strength1 *= tl.exp2(sums1)
    size = N.to(tl.int64) * H * 3 * E * E  # of a part of X
    if WEIGHS:
        whole0, lost0 = _in_parts(source0.to(tl.float32) * strength0[:, None], dtype)
        whole1, lost1 = _in_parts(source1.to(tl.float32) * strength1[:, None], dtype)
        nothing = tl.zeros((E, W), tl.float32)
        solved0 = _solved(inverse, place, 0, whole0, lost0, nothing, size, E, PARTS, PRECISION)
        solved1 = _solved(inverse, place, 1, whole0, lost0, nothing, size, E, PARTS, PRECISION)
        solved1 = _solved(inverse, place, 2, whole1, lost1, solved1, size, E, PARTS, PRECISION)
        whole0, lost0 = _in_parts(solved0 * tl.exp2(end - sums0)[:, None], dtype)
        whole1, lost1 = _in_parts(solved1 * tl.exp2(end - sums1)[:, None], dtype)
    else:
        solved0 = dot_parts(_own_rows(inverse, place, 0, strength0, size, E, PARTS), source0, PARTS, PRECISION)
        solved1 = dot_parts(_own_rows(inverse, place, 1, strength0, size, E, PARTS), source0, PARTS, PRECISION)
        solved1 += dot_parts(_own_rows(inverse, place, 2, strength1, size, E, PARTS), source1, PARTS, PRECISION)
        solved0 *= tl.exp2(end - sums0)[:, None]
        solved1 *= tl.exp2(end - sums1)[:, None]
        whole0, whole1 = solved0.to(dtype), solved1.to(dtype)
        lost0, lost1 = (solved0 - whole0.to(tl.float32)).to(dtype), (solved1 - whole1.to(tl.float32)).to(dtype)
    if of_values:
        for key in range(KT):
            made = _times_keys(k, whole0, lost0, whole1, lost1, token, first, later, rows, stride_k, key * BK, K, E, BK,
                               PARTS, PRECISION)  # fmt: skip
            store_block(added + place * K * V, made, key * BK, K, BK, column, V, W)
    else:
        for key in range(KT):
            made = _times_keys(k, whole0, lost0, whole1, lost1, token, first, later, rows, stride_k, key * BK, K, E, BK,
                               PARTS, PRECISION)  # fmt: skip
            unchanged = (key * BK + tl.arange(0, BK))[:, None] == (column + tl.arange(0, W))[None, :]
            made = tl.where(unchanged, tl.exp2(end), 0.0) - made
            store_parts(maps + place * PARTS * K * K, made, K * K, key * BK, K, BK, column, K, W, PARTS)


@triton.jit
def _met(k, left, token, first, later, rows, stride, column, width, K, E: tl.constexpr, KT: tl.constexpr,
         BK: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Both halves of k times W columns of `left` [K, width], which is in parts."""
    met0, met1 = tl.zeros((E, W), tl.float32), tl.zeros((E, W), tl.float32)
    for key in range(KT):
        keys0 = load_tile(k, token, first, rows, stride, E, key * BK, K, BK)
        keys1 = load_tile(k, token + E, later, rows - E, stride, E, key * BK, K, BK)
        whole = load_block(left, key * BK, K, BK, column, width, W)
        met0 = tl.dot(keys0, whole, met0, input_precision=PRECISION)
        met1 = tl.dot(keys1, whole, met1, input_precision=PRECISION)
        if PARTS == 2:
            lost = load_block(left + K * width, key * BK, K, BK, column, width, W)
            met0 = tl.dot(keys0, lost, met0, input_precision=PRECISION)
            met1 = tl.dot(keys1, lost, met1, input_precision=PRECISION)
    return met0, met1


@triton.jit(do_not_specialize=["N", "stride_b"])
def _right_leaves_kernel(k, v, beta, inverse, gamma, added, maps, tokens, rows_of, lefts, tallest, heights, N, H, G,
                         stride_k, stride_kg, stride_v, stride_vh, stride_b, K, V, E: tl.constexpr, KT: tl.constexpr,
                         VT: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    """One tile of columns of U, or of P, of one chunk and its left sibling together.

    With S for the sibling's U, or its P and v = 0: e^Γ S + k̄ᵀ T (v - k̂ S).
    """
    part, number = program_place()
    slot = tl.load(tallest + number, mask=number < N, other=-1)
    if slot < 0:
        return
    if (tl.load(heights + slot) <= 0) | (tl.load(lefts + slot) <= 1):
        return
    columns: tl.constexpr = VT + (KT * BK + W - 1) // W
    head, tile = part // columns, part % columns
    rows, token = tl.load(rows_of + slot), tl.load(tokens + slot)
    k += (head // (H // G)).to(tl.int64) * stride_kg
    v += head.to(tl.int64) * stride_vh
    place = slot.to(tl.int64) * H + head
    row = tl.arange(0, E)
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + row
    sums0, sums1 = tl.load(sums), tl.load(sums + E)
    end = tl.load(gamma + (head.to(tl.int64) * N + slot) * 2 * E + 2 * E - 1)
    strength0 = load_column(beta + head, token, None, rows, stride_b, E)
    strength1 = load_column(beta + head, token + E, None, rows - E, stride_b, E)
    dtype = added.dtype.element_ty
    of_values = tile < VT
    before = place - H  # the sibling's
    if of_values:
        column = tile * W
        met0, met1 = _met(k, added + before * K * V, token, None, None, rows, stride_k, column, V, K, E, KT, BK, W, 1,
                          PRECISION)  # fmt: skip
        source0 = load_tile(v, token, None, rows, stride_v, E, column, V, W).to(tl.float32)
        source1 = load_tile(v, token + E, None, rows - E, stride_v, E, column, V, W).to(tl.float32)
    else:
        column = (tile - VT) * W
        met0, met1 = _met(k, maps + before * PARTS * K * K, token, None, None, rows, stride_k, column, K, K, E, KT, BK,
                          W, PARTS, PRECISION)  # fmt: skip
        source0, source1 = tl.zeros((E, W), tl.float32), tl.zeros((E, W), tl.float32)
    # T = X diag(β)
    whole0, lost0 = _in_parts((source0 - met0 * tl.exp2(sums0)[:, None]) * strength0[:, None], dtype)
    whole1, lost1 = _in_parts((source1 - met1 * tl.exp2(sums1)[:, None]) * strength1[:, None], dtype)
    size, nothing = N.to(tl.int64) * H * 3 * E * E, tl.zeros((E, W), tl.float32)
    solved0 = _solved(inverse, place, 0, whole0, lost0, nothing, size, E, PARTS, PRECISION)
    solved1 = _solved(inverse, place, 1, whole0, lost0, nothing, size, E, PARTS, PRECISION)
    solved1 = _solved(inverse, place, 2, whole1, lost1, solved1, size, E, PARTS, PRECISION)
    whole0, lost0 = _in_parts(solved0 * tl.exp2(end - sums0)[:, None], dtype)
    whole1, lost1 = _in_parts(solved1 * tl.exp2(end - sums1)[:, None], dtype)
    passing = tl.exp2(end)
    if of_values:
        for key in range(KT):
            made = _times_keys(k, whole0, lost0, whole1, lost1, token, None, None, rows, stride_k, key * BK, K, E, BK,
                               PARTS, PRECISION)  # fmt: skip
            made += passing * load_block(added + before * K * V, key * BK, K, BK, column, V, W).to(tl.float32)
            store_block(added + place * K * V, made, key * BK, K, BK, column, V, W)
    else:
        other = maps + N.to(tl.int64) * H * PARTS * K * K  # where P of height 1 is
        for key in range(KT):
            made = _times_keys(k, whole0, lost0, whole1, lost1, token, None, None, rows, stride_k, key * BK, K, E, BK,
                               PARTS, PRECISION)  # fmt: skip
            sibling = maps + before * PARTS * K * K
            made += passing * load_block(sibling, key * BK, K, BK, column, K, W).to(tl.float32)
            if PARTS == 2:
                made += passing * load_block(sibling + K * K, key * BK, K, BK, column, K, W).to(tl.float32)
            store_parts(other + place * PARTS * K * K, made, K * K, key * BK, K, BK, column, K, W, PARTS)


# To be compared on a GPU:
SKIPS = INTERPRETED  # what is zero for one half of a chunk's rows
WHOLE_SCORES = INTERPRETED  # by programs that have all rows
WEIGHS = INTERPRETED  # leaves: β on what T is multiplied by, and X from memory as it is


def make_chunks(q, k, scales, log_decay, beta, slots: Slots, places: Tensor | None, num_variants: int, chunk: int,
                height: int, scale: float, precision: str, kept: tuple[Tensor, Tensor] | None = None,
                ) -> Chunks:  # fmt: skip
    """Chunks of q, k [T, G, K], level scales [T, H, L] (None: 1), log_decay and beta [T, H].

    places [N]: for each slot the first variant of its queries, of which there are at most `num_variants`; None: queries
    and scores are not to be made. kept: the inverse and gamma of the forward, for the backward: with what that alone
    needs.
    """
    num_slots, (_, groups, key_dim), heads = len(slots.token), q.shape, beta.shape[1]
    inverse, gamma = _inverses(k, log_decay, beta, slots, chunk, precision) if kept is None else kept
    if places is None:
        return Chunks(inverse, None, None, gamma, None)
    scores, seen = k.new_empty(num_slots, heads, chunk, chunk), k.new_empty(num_variants, heads, chunk, key_dim)
    mixed = None if kept is None else k.new_empty(num_slots, heads, 3, chunk // 2, chunk // 2)
    if WHOLE_SCORES and has_room_for_keys(k):
        make_scores(
            q, k, scales, beta, inverse, gamma, scores, seen, mixed, slots, places, chunk, height, scale, precision
        )  # fmt: skip
        return Chunks(inverse, scores, seen, gamma, mixed)
    scaled = scales is not None
    lam = scales if scaled else k
    block = tile_width(key_dim)
    _scores_kernel[programs(2 * heads, num_slots)](
        q, k, lam, beta, inverse, scores, seen, gamma, mixed, slots.token, slots.first, slots.rows, slots.reads, places,
        num_slots, heads, groups, scale, *q.stride()[:2], *k.stride()[:2], *lam.stride()[:2], beta.stride(0), key_dim,
        lam.shape[-1] if scaled else 1, E=chunk // 2, HEIGHT=height - 1, KT=cdiv(key_dim, block), BK=block,
        SCALED=scaled, SKIPS=SKIPS, PARTS=parts_of(k), PRECISION=precision, num_warps=4, num_stages=1,
    )  # fmt: skip
    return Chunks(inverse, scores, seen, gamma, mixed)


def _inverses(k: Tensor, log_decay: Tensor, beta: Tensor, slots: Slots, chunk: int, precision: str,
              ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`inverse` and `gamma` of chunks of k [T, G, K], log_decay and beta [T, H]."""
    num_slots, (_, groups, key_dim), heads = len(slots.token), k.shape, beta.shape[-1]
    lower = k.new_empty(num_slots, heads, chunk, chunk, dtype=torch.float32)
    parts = parts_of(k)
    inverse = k.new_empty(inverse_shape(k, num_slots, heads, chunk))
    gamma = k.new_zeros(heads, num_slots, chunk, dtype=torch.float32)
    block, size = tile_width(key_dim), 16
    _overlap_kernel[programs(3 * heads, num_slots)](
        k, log_decay, beta, lower, gamma, slots.token, slots.first, slots.rows, num_slots, heads, groups,
        *k.stride()[:2], log_decay.stride(0), beta.stride(0), key_dim, E=chunk // 2, KT=cdiv(key_dim, block), BK=block,
        PRECISION=precision, num_warps=4, num_stages=2,
    )  # fmt: skip
    _substitute_kernel[programs(chunk // size * heads, num_slots)](
        lower, slots.rows, num_slots, heads, C=chunk, BASE=size, num_warps=1
    )
    exact = precision if k.dtype == torch.float32 else "tf32x3"
    while size < chunk:
        _join_kernel[programs(chunk // (2 * size) * heads, num_slots)](
            lower,
            inverse if 2 * size == chunk else None,
            slots.rows,
            num_slots,
            heads,
            C=chunk,
            SIZE=size,
            PARTS=parts,
            PRECISION=exact,
            num_warps=size // 16,
        )
        size *= 2
    return inverse, gamma


def make_leaves(k: Tensor, v: Tensor, beta: Tensor, chunks: Chunks, added: Tensor, maps: Tensor, slots: Slots,
                chunk: int, precision: str, pairs: int = 0) -> None:  # fmt: skip
    """Fills in U and P of the chunks.

    pairs: where no more than so many have a left sibling, theirs and the sibling's together, of height 1, instead; 0:
    of each by itself.
    """
    num_slots, (_, groups, key_dim), (_, heads, value_dim) = len(slots.token), k.shape, v.shape
    block, parts = tile_width(key_dim), parts_of(k)
    width = max(block, tile_width(value_dim))
    wide = width
    if parts == 2 and key_dim % (2 * TILE) == value_dim % (2 * TILE) == 0:
        wide = 2 * TILE  # T is read and cast half as often; of float32 only so much fits
    shared = (chunks.inverse, chunks.gamma, added, maps, slots.token)
    shape = (num_slots, heads, groups, *k.stride()[:2], *v.stride()[:2], beta.stride(0), key_dim, value_dim)
    options = {"E": chunk // 2, "KT": cdiv(key_dim, block), "BK": block, "PARTS": parts, "PRECISION": precision}
    _leaves_kernel[programs(heads * (cdiv(key_dim, wide) + cdiv(value_dim, wide)), num_slots)](
        k, v, beta, *shared, slots.first, slots.rows, slots.left, slots.height if pairs else None, *shape,
        VT=cdiv(value_dim, wide), W=wide, WEIGHS=WEIGHS, num_warps=4, num_stages=1 if wide > TILE else 2, **options,
    )  # fmt: skip
    if pairs:
        _right_leaves_kernel[programs(heads * (cdiv(key_dim, width) + cdiv(value_dim, width)), pairs)](
            k, v, beta, *shared, slots.rows, slots.left, slots.tallest, slots.height, *shape,
            VT=cdiv(value_dim, width), W=width, num_warps=4, num_stages=1, **options,
        )  # fmt: skip
