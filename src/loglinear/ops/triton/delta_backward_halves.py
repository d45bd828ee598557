"""Gradients of one chunk of the delta rule, in programs that have half of its rows: see `delta_backward.py` for what.
(On Hopper, where programs can have all of them, three or four kernels take the place of these five.)

Of the matrices [C, C] of a chunk only three quarters exist, for they are lower triangular: two of a half with itself,
and that of the second half (`later` rows) with the first. Programs go by half, and take in what lies across:

    dv₀ = S₀ᵀ dO₀ + S₁₀ᵀ dO₁ + T₀ᵀ dY₀ + T₁₀ᵀ dY₁        dT₀ = M₀ᵀ d(MT)₀ + M₁₀ᵀ d(MT)₁₀ + …
    dv₁ = S₁ᵀ dO₁ + T₁ᵀ dY₁                              dT₁ = M₁ᵀ d(MT)₁ + …        dT₁₀ = M₁ᵀ d(MT)₁₀ + …
    dA₀ = -(X₀ᵀ dT₀ + X₁₀ᵀ dT₁₀) T₀ᵀ      dA₁₀ = -X₁ᵀ dT₁₀ T₀ᵀ      dA₁ = -X₁ᵀ (dT₁₀ T₁₀ᵀ + dT₁ T₁ᵀ)

Legend as in `delta_backward.py`, and
    E rows of half a chunk; d_written [N, H, C, V] gradient of Y = T v; parts of the gradient of gamma:
    d_scored [2, H, N, C] from the scores of each half, d_mass and d_strength (of β) [2, H, N, C] from the inverse
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    cdiv,
    decay_at_most_one,
    decay_of,
    decays_between,
    in_same_block,
    level_factor,
    load_column,
    program_place,
    programs,
    row_exists,
)
from loglinear.ops.triton.delta_chunks import (
    HOPPER_KEYS,
    HOPPER_WARPS,
    HOPPER_WIDTH,
    TILE,
    VERSION,
    Chunks,
    fetch_block,
    fetch_quarters,
    fetch_tile,
    hopper_kernel,
    load_block,
    load_quarter,
    load_tile,
    store_block,
    store_quarter,
    store_tile,
    takes_hopper,
    takes_hopper_wide,
    tile_width,
)
from loglinear.ops.triton.launch import kernel


@kernel(do_not_specialize=["N", "stride_b"])
def _values_kernel(k, beta, grad_o, inverse, scores, gamma, d_added, dv, d_written, tokens, firsts, rows_of, lefts, N,
                   H, G, stride_k, stride_kg, stride_b, stride_g, stride_gh, K, V, E: tl.constexpr, KT: tl.constexpr,
                   VT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of a tile of v, and of what T made of it."""
    part, slot = program_place()
    head, tile = part // VT, part % VT
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    later = None if first is None else first - E
    k += (head // (H // G)).to(tl.int64) * stride_kg
    grad_o += head.to(tl.int64) * stride_gh
    place = slot.to(tl.int64) * H + head
    column = tile * BV
    if tl.load(lefts + slot) > 1:
        fetch_tile(k, token, first, rows, stride_k, 2 * E, 0, K, KT * BK)
        fetch_block(d_added + place * K * V, 0, K, KT * BK, column, V, BV)
        fetch_quarters(inverse, place, E)
    grad0 = load_tile(grad_o, token, first, rows, stride_g, E, column, V, BV)
    grad1 = load_tile(grad_o, token + E, later, rows - E, stride_g, E, column, V, BV)
    scores += place * 4 * E * E
    grad_v0 = tl.dot(tl.trans(load_block(scores, 0, E, E, 0, 2 * E, E)), grad0, input_precision=PRECISION)
    grad_v0 = tl.dot(tl.trans(load_block(scores, E, 2 * E, E, 0, 2 * E, E)), grad1, grad_v0, input_precision=PRECISION)
    grad_v1 = tl.dot(tl.trans(load_block(scores, E, 2 * E, E, E, 2 * E, E)), grad1, input_precision=PRECISION)
    if tl.load(lefts + slot) > 1:
        row = tl.arange(0, E)
        sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E
        end = tl.load(sums + 2 * E - 1)
        wrote0, wrote1 = tl.zeros((E, BV), tl.float32), tl.zeros((E, BV), tl.float32)
        for key in range(KT):
            keys0 = load_tile(k, token, first, rows, stride_k, E, key * BK, K, BK)
            keys1 = load_tile(k, token + E, later, rows - E, stride_k, E, key * BK, K, BK)
            state = load_block(d_added + place * K * V, key * BK, K, BK, column, V, BV)
            wrote0 = tl.dot(keys0, state, wrote0, input_precision=PRECISION)
            wrote1 = tl.dot(keys1, state, wrote1, input_precision=PRECISION)
        dtype = d_written.dtype.element_ty
        wrote0 = (wrote0 * decay_of(end - tl.load(sums + row))[:, None]).to(dtype)
        wrote1 = (wrote1 * decay_of(end - tl.load(sums + E + row))[:, None]).to(dtype)
        d_written += place * 2 * E * V
        store_block(d_written, wrote0, 0, 2 * E, E, column, V, BV)
        store_block(d_written, wrote1, E, 2 * E, E, column, V, BV)
        strength0 = load_column(beta + head, token, first, rows, stride_b, E)
        strength1 = load_column(beta + head, token + E, later, rows - E, stride_b, E)
        # Tᵀ = diag(β) Xᵀ
        given0 = tl.dot(tl.trans(load_quarter(inverse, place, 0, E)), wrote0, input_precision=PRECISION)
        given0 = tl.dot(tl.trans(load_quarter(inverse, place, 1, E)), wrote1, given0, input_precision=PRECISION)
        given1 = tl.dot(tl.trans(load_quarter(inverse, place, 2, E)), wrote1, input_precision=PRECISION)
        grad_v0 += given0 * strength0[:, None]
        grad_v1 += given1 * strength1[:, None]
    store_tile(dv + head * V, grad_v0, token, first, rows, H * V, E, column, V, BV)
    store_tile(dv + head * V, grad_v1, token + E, later, rows - E, H * V, E, column, V, BV)


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _scores_back_kernel(q, k, v, scales, beta, grad_o, inverse, mixed, pulled, gamma, d_mixed, d_pairs, dscales,
                        d_scored, tokens, firsts, rows_of, reads, places, N, H, G, scale, stride_q, stride_qg, stride_k,
                        stride_kg, stride_v, stride_vh, stride_s, stride_sh, stride_b, stride_g, stride_gh, K, V, L,
                        E: tl.constexpr, HEIGHT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, BK: tl.constexpr,
                        BV: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Back through the scores of half of the rows: gradients of λ, of MT and of q kᵀ. E = 2^HEIGHT.

    For the first half all that is across is zero, and multiplied as well: to skip that saves little.
    """
    part, slot = program_place()
    head, half = part // 2, part % 2
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    group = head // (H // G)
    q += group.to(tl.int64) * stride_qg
    k += group.to(tl.int64) * stride_kg
    v += head.to(tl.int64) * stride_vh
    grad_o += head.to(tl.int64) * stride_gh
    place = slot.to(tl.int64) * H + head
    start = half * E
    own_first = None if first is None else first - start
    own_token, own_rows = token + start, rows - start
    earlier = rows * half  # none for the first half
    row = tl.arange(0, E)
    if SCALED:
        fetch_quarters(mixed, place, E)
        fetch_tile(scales + head.to(tl.int64) * stride_sh, own_token, own_first, own_rows, stride_s, E, 0, 1, 1)
    fetch_tile(k, token, first, rows, stride_k, 2 * E, 0, K, KT * BK)
    fetch_tile(q, own_token, own_first, own_rows, stride_q, E, 0, K, KT * BK)
    fetch_tile(beta + head, token, first, rows, stride_b, 2 * E, 0, 1, 1)
    fetch_quarters(inverse, place, E)
    if tl.load(reads + slot) > 0:
        pull = pulled + (tl.load(places + slot).to(tl.int64) * H + head) * 2 * E * K
        fetch_block(pull, start, 2 * E, E, 0, K, KT * BK)
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + row
    own_sums, other_sums = tl.load(sums + start), tl.load(sums)
    causal = row[:, None] >= row[None, :]

    own, across = tl.zeros((E, E), tl.float32), tl.zeros((E, E), tl.float32)
    for tile in range(VT):
        grad = load_tile(grad_o, own_token, own_first, own_rows, stride_g, E, tile * BV, V, BV)
        values = load_tile(v, own_token, own_first, own_rows, stride_v, E, tile * BV, V, BV)
        others = load_tile(v, token, first, earlier, stride_v, E, tile * BV, V, BV)
        own = tl.dot(grad, tl.trans(values), own, input_precision=PRECISION)
        across = tl.dot(grad, tl.trans(others), across, input_precision=PRECISION)
    if SCALED:
        lam = scales + head.to(tl.int64) * stride_sh
        dlam = dscales + (own_token + row).to(tl.int64) * H * L + head * L
        exists = row_exists(row, own_first, own_rows)
        pairs = load_quarter(mixed, place, 2 * half, E).to(tl.float32)
        pairs = tl.where(causal, pairs * own, 0.0)
        within, last = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
        for level in tl.static_range(HEIGHT + 1):
            upto = tl.sum(tl.where(in_same_block(row[:, None], row[None, :], level), pairs, 0.0), 1)
            if level < L - 1:
                tl.store(dlam + level, upto - within, mask=exists)
            else:
                last += upto - within
            within = upto
        # of the first half `across` is zero, and what is loaded beside it finite
        pairs_across = load_quarter(mixed, place, half, E).to(tl.float32) * across
        beyond = tl.sum(pairs_across, 1)
        if HEIGHT + 1 < L - 1:
            tl.store(dlam + HEIGHT + 1, beyond, mask=exists)
        else:
            last += beyond
            tl.store(dlam + L - 1, last + tl.load(dlam + L - 1, mask=exists, other=0.0), mask=exists)
        own *= level_factor(lam, own_token, own_first, own_rows, stride_s, L, E, HEIGHT)
        far = load_column(lam + tl.minimum(HEIGHT + 1, L - 1), own_token, own_first, own_rows, stride_s, E)
        across *= far[:, None]
    if tl.load(reads + slot) > 0:
        pulled += (tl.load(places + slot).to(tl.int64) * H + head) * 2 * E * K
        met, met_across = tl.zeros((E, E), tl.float32), tl.zeros((E, E), tl.float32)
        for tile in range(KT):
            pull = load_block(pulled, start, 2 * E, E, tile * BK, K, BK)
            keys = load_tile(k, own_token, own_first, own_rows, stride_k, E, tile * BK, K, BK)
            others = load_tile(k, token, first, earlier, stride_k, E, tile * BK, K, BK)
            met = tl.dot(pull, tl.trans(keys), met, input_precision=PRECISION)
            met_across = tl.dot(pull, tl.trans(others), met_across, input_precision=PRECISION)
        own -= met * decay_of(own_sums)[None, :]
        across -= met_across * decay_of(other_sums)[None, :]
    own = tl.where(causal, own, 0.0)
    dtype = d_mixed.dtype.element_ty
    store_quarter(d_mixed, own, place, 2 * half, E)
    if half == 1:
        store_quarter(d_mixed, across, place, 1, E)

    # d(MT) Tᵀ = d(MT) diag(β) Xᵀ
    strength = load_column(beta + head, own_token, own_first, own_rows, stride_b, E)
    before = load_column(beta + head, token, first, earlier, stride_b, E)
    own, across = (own * strength[None, :]).to(dtype), (across * before[None, :]).to(dtype)
    of_own = tl.dot(own, tl.trans(load_quarter(inverse, place, 2 * half, E)), input_precision=PRECISION)
    of_own = tl.dot(across, tl.trans(load_quarter(inverse, place, half, E)), of_own, input_precision=PRECISION)
    of_across = tl.dot(across, tl.trans(load_quarter(inverse, place, 0, E)), input_precision=PRECISION)
    product, product_across = tl.zeros((E, E), tl.float32), tl.zeros((E, E), tl.float32)
    for tile in range(KT):
        queries = load_tile(q, own_token, own_first, own_rows, stride_q, E, tile * BK, K, BK)
        keys = load_tile(k, own_token, own_first, own_rows, stride_k, E, tile * BK, K, BK)
        others = load_tile(k, token, first, earlier, stride_k, E, tile * BK, K, BK)
        product = tl.dot(queries, tl.trans(keys), product, input_precision=PRECISION)
        product_across = tl.dot(queries, tl.trans(others), product_across, input_precision=PRECISION)
    of_own = tl.where(causal, of_own * decays_between(own_sums, own_sums) * scale, 0.0)
    of_across *= decays_between(own_sums, other_sums) * scale
    store_quarter(d_pairs, of_own, place, 2 * half, E)
    d_scored += ((half * H + head).to(tl.int64) * N + slot) * 2 * E + row
    mass = tl.where(causal, product * of_own, 0.0)
    mass_across = product_across * of_across
    tl.store(d_scored + start, tl.sum(mass, 1) + tl.sum(mass_across, 1) - tl.sum(mass, 0))
    if half == 1:
        store_quarter(d_pairs, of_across, place, 1, E)
        tl.store(d_scored, -tl.sum(mass_across, 0))


@kernel(do_not_specialize=["N"])
def _solved_kernel(q, k, v, gamma, d_maps, d_written, d_mixed, d_solved, d_erase, tokens, firsts, rows_of, lefts, N, H,
                   G, scale, stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh, K, V, E: tl.constexpr,
                   KT: tl.constexpr, VT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of half of the rows of T, and of W. What is zero for one half is multiplied as well."""
    part, slot = program_place()
    head, half = part // 2, part % 2
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    group = head // (H // G)
    q += group.to(tl.int64) * stride_qg
    k += group.to(tl.int64) * stride_kg
    v += head.to(tl.int64) * stride_vh
    place = slot.to(tl.int64) * H + head
    start = half * E
    own_first = None if first is None else first - start
    later_first = None if first is None else first - E
    own_token, own_rows = token + start, rows - start
    earlier, later_rows = rows * half, (rows - E) * (1 - half)
    row = tl.arange(0, E)
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + row
    own_sums, first_sums, later_sums = tl.load(sums + start), tl.load(sums), tl.load(sums + E)
    dtype = d_erase.dtype.element_ty
    own, across = tl.zeros((E, E), tl.float32), tl.zeros((E, E), tl.float32)
    if tl.load(lefts + slot) > 1:
        end = tl.load(gamma + (head.to(tl.int64) * N + slot) * 2 * E + 2 * E - 1)
        after = decay_of(end - own_sums)[:, None]
        for column in range(KT):
            erased = tl.zeros((E, BK), tl.float32)
            for key in range(KT):
                keys = load_tile(k, own_token, own_first, own_rows, stride_k, E, key * BK, K, BK)
                map = load_block(d_maps + place * K * K, key * BK, K, BK, column * BK, K, BK)
                erased = tl.dot(keys, map, erased, input_precision=PRECISION)
            erased = (-erased * after).to(dtype)
            store_block(d_erase + place * 2 * E * K, erased, start, 2 * E, E, column * BK, K, BK)
            met = load_tile(k, own_token, own_first, own_rows, stride_k, E, column * BK, K, BK)
            others = load_tile(k, token, first, earlier, stride_k, E, column * BK, K, BK)
            own = tl.dot(erased, tl.trans(met), own, input_precision=PRECISION)
            across = tl.dot(erased, tl.trans(others), across, input_precision=PRECISION)
        own *= decay_of(own_sums)[None, :]
        across *= decay_of(first_sums)[None, :]
        for tile in range(VT):
            wrote = load_block(d_written + place * 2 * E * V, start, 2 * E, E, tile * BV, V, BV)
            values = load_tile(v, own_token, own_first, own_rows, stride_v, E, tile * BV, V, BV)
            others_v = load_tile(v, token, first, earlier, stride_v, E, tile * BV, V, BV)
            own = tl.dot(wrote, tl.trans(values), own, input_precision=PRECISION)
            across = tl.dot(wrote, tl.trans(others_v), across, input_precision=PRECISION)
    # the transposed products are made directly: a product, cast and turned, is silently wrong on Hopper before 3.7.1
    product, product_later = tl.zeros((E, E), tl.float32), tl.zeros((E, E), tl.float32)
    for tile in range(KT):
        keys_of = load_tile(k, own_token, own_first, own_rows, stride_k, E, tile * BK, K, BK)
        queries = load_tile(q, own_token, own_first, own_rows, stride_q, E, tile * BK, K, BK)
        later = load_tile(q, token + E, later_first, later_rows, stride_q, E, tile * BK, K, BK)
        product = tl.dot(keys_of, tl.trans(queries), product, input_precision=PRECISION)
        product_later = tl.dot(keys_of, tl.trans(later), product_later, input_precision=PRECISION)
    passing = decay_at_most_one(own_sums[None, :] - own_sums[:, None]) * scale
    product = tl.where(row[:, None] <= row[None, :], product * passing, 0.0)
    product_later *= decay_at_most_one(later_sums[None, :] - own_sums[:, None]) * scale
    below = load_quarter(d_mixed, place, 1, E)
    product = product.to(dtype)
    own = tl.dot(product, load_quarter(d_mixed, place, 2 * half, E), own, input_precision=PRECISION)
    own = tl.dot(product_later.to(dtype), below, own, input_precision=PRECISION)
    store_quarter(d_solved, own, place, 2 * half, E)
    if half == 1:
        across = tl.dot(product, below, across, input_precision=PRECISION)
        store_quarter(d_solved, across, place, 1, E)


@kernel(do_not_specialize=["N", "stride_b"])
def _overlap_kernel(k, beta, inverse, gamma, d_solved, d_overlap, d_strength, d_mass, tokens, firsts, rows_of, N, H, G,
                    stride_k, stride_kg, stride_b, K, E: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Back through a chunk's inverse: a quarter of the gradient of k kᵀ, and what β and gamma get from it.

    Quarter 0 and 2 are what a half has with itself, and write to the first part of d_strength and d_mass; quarter 1 is
    what the second half has with the first, and writes to the second.
    """
    part, slot = program_place()
    head, quarter = part // 3, part % 3
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    k += (head // (H // G)).to(tl.int64) * stride_kg
    above, left = tl.minimum(quarter, 1) * E, (quarter // 2) * E  # its first row and column
    first_row = None if first is None else first - above
    first_column = None if first is None else first - left
    row = tl.arange(0, E)
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + row
    strength = load_column(beta + head, token + above, first_row, rows - above, stride_b, E)
    of_column = load_column(beta + head, token + left, first_column, rows - left, stride_b, E)
    place = slot.to(tl.int64) * H + head

    dtype = d_solved.dtype.element_ty
    given = load_quarter(d_solved, place, quarter, E)
    turned = tl.trans(load_quarter(inverse, place, 2 * (above // E), E))
    lower = tl.dot(turned, given, input_precision=PRECISION)
    if quarter == 0:
        below = load_quarter(d_solved, place, 1, E)
        lower = tl.dot(tl.trans(load_quarter(inverse, place, 1, E)), below, lower, input_precision=PRECISION)
    lower = (lower * of_column[None, :]).to(dtype)
    lower = tl.dot(lower, tl.trans(load_quarter(inverse, place, 2 * (left // E), E)), input_precision=PRECISION)
    if quarter == 2:
        before = load_column(beta + head, token, first, rows, stride_b, E)
        below_it = tl.dot(turned, load_quarter(d_solved, place, 1, E), input_precision=PRECISION)
        below_it = (below_it * before[None, :]).to(dtype)
        lower = tl.dot(below_it, tl.trans(load_quarter(inverse, place, 1, E)), lower, input_precision=PRECISION)
    strict = (row[:, None] > row[None, :]) | (quarter == 1)
    lower = tl.where(strict, -lower * decays_between(tl.load(sums + above), tl.load(sums + left)), 0.0)
    store_quarter(d_overlap, lower * strength[:, None], place, quarter, E)

    overlap = tl.zeros((E, E), tl.float32)
    for tile in range(KT):
        keys = load_tile(k, token + above, first_row, rows - above, stride_k, E, tile * BK, K, BK)
        others = load_tile(k, token + left, first_column, rows - left, stride_k, E, tile * BK, K, BK)
        overlap = tl.dot(keys, tl.trans(others), overlap, input_precision=PRECISION)
    raw = tl.where(strict, lower * overlap, 0.0)  # with β of the row: A ⊙ dA
    of_rows = tl.sum(raw, 1)
    solved = load_quarter(inverse, place, quarter, E)
    of_columns = tl.sum(given.to(tl.float32) * solved.to(tl.float32), 0)
    mass = raw * strength[:, None]
    at = (head.to(tl.int64) * N + slot) * 2 * E + row
    if quarter == 1:
        at += tl.num_programs(0).to(tl.int64) // 3 * N * 2 * E
        tl.store(d_strength + at, of_columns)
        tl.store(d_strength + at + E, of_rows)
        tl.store(d_mass + at, -tl.sum(mass, 0))
        tl.store(d_mass + at + E, tl.sum(mass, 1))
    else:
        tl.store(d_strength + at + above, of_columns + of_rows)
        tl.store(d_mass + at + above, tl.sum(mass, 1) - tl.sum(mass, 0))


@triton.jit
def _owed(k, v, d_added, d_maps, sums, token, first, rows, stride_k, stride_v, column, K, V, E: tl.constexpr,
          KT: tl.constexpr, VT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BK columns of v dUᵀ - k̂ dPᵀ, for half of the rows of a chunk."""
    total, kept = tl.zeros((E, BK), tl.float32), tl.zeros((E, BK), tl.float32)
    for value in range(VT):
        values = load_tile(v, token, first, rows, stride_v, E, value * BV, V, BV)
        state = load_block(d_added, column, K, BK, value * BV, V, BV)
        total = tl.dot(values, tl.trans(state), total, input_precision=PRECISION)
    for key in range(KT):
        keys = load_tile(k, token, first, rows, stride_k, E, key * BK, K, BK)
        map = load_block(d_maps, column, K, BK, key * BK, K, BK)
        kept = tl.dot(keys, tl.trans(map), kept, input_precision=PRECISION)
    return total - kept * decay_of(sums)[:, None]


@kernel(do_not_specialize=["N", "stride_b"])
def _keys_kernel(q, k, v, beta, inverse, pulled, gamma, d_added, d_maps, d_erase, mixed, d_pairs, d_overlap, dq, dk,
                 d_sums, d_end, tokens, firsts, rows_of, lefts, reads, places, N, H, G, scale, stride_q, stride_qg,
                 stride_k, stride_kg, stride_v, stride_vh, stride_b, K, V, E: tl.constexpr, KT: tl.constexpr,
                 VT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of the gradients of q and k by head, [T, H, K] each, for half of the rows.

    And what gamma and its end get from those columns: d_sums, d_end [KT, H, N, C].
    """
    part, slot = program_place()
    head, half, tile = part // (2 * KT), part // KT % 2, part % KT
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    writes, is_read = tl.load(lefts + slot) > 1, tl.load(reads + slot) > 0
    group = head // (H // G)
    q += group.to(tl.int64) * stride_qg
    k += group.to(tl.int64) * stride_kg
    v += head.to(tl.int64) * stride_vh
    place = slot.to(tl.int64) * H + head
    start, other, column = half * E, (1 - half) * E, tile * BK
    own_first = None if first is None else first - start
    other_first = None if first is None else first - other
    own_token, own_rows, other_token, other_rows = token + start, rows - start, token + other, rows - other
    row = tl.arange(0, E)
    own_gamma = gamma + (head.to(tl.int64) * N + slot) * 2 * E + start + row
    sums = tl.load(own_gamma)
    end = tl.load(gamma + (head.to(tl.int64) * N + slot) * 2 * E + 2 * E - 1)
    entering, after = decay_of(sums)[:, None], decay_of(end - sums)[:, None]
    pulled += (tl.load(places + slot).to(tl.int64) * H + head) * 2 * E * K

    # as they write to the state that leaves; those of the second half also through what it made of the first
    dtype = mixed.dtype.element_ty
    strength = load_column(beta + head, own_token, own_first, own_rows, stride_b, E)[:, None]
    grad_k = tl.zeros((E, BK), tl.float32)
    if writes:
        d_added += place * K * V
        d_maps += place * K * K
        for of in range(half + 1):
            rows_first = None if first is None else first - of * E
            part_sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * 2 * E + of * E + row)
            owed = _owed(k, v, d_added, d_maps, part_sums, token + of * E, rows_first, rows - of * E, stride_k,
                         stride_v, column, K, V, E, KT, VT, BK, BV, PRECISION)  # fmt: skip
            owed *= load_column(beta + head, token + of * E, rows_first, rows - of * E, stride_b, E)[:, None]
            solved = load_quarter(inverse, place, half + of, E)
            grad_k = tl.dot(solved, owed.to(dtype), grad_k, input_precision=PRECISION)
        grad_k *= after
    keys = load_tile(k, own_token, own_first, own_rows, stride_k, E, column, K, BK)
    to_end = tl.sum(grad_k * keys.to(tl.float32), 1)

    # as they meet the state that enters; the first half also through what the second makes of it
    met = tl.zeros((E, BK), tl.float32)
    seen = tl.zeros((E, BK), tl.float32)
    if is_read:
        pull = load_block(pulled, start, 2 * E, E, column, K, BK)
        met -= tl.dot(tl.trans(load_quarter(mixed, place, 2 * half, E)), pull, input_precision=PRECISION)
        seen = pull.to(tl.float32) * entering * scale
        if half == 0:
            pull_later = load_block(pulled, E, 2 * E, E, column, K, BK)
            met -= tl.dot(tl.trans(load_quarter(mixed, place, 1, E)), pull_later,
                          input_precision=PRECISION)  # fmt: skip
    if writes:
        d_erase += place * 2 * E * K
        of_erase = load_block(d_erase, start, 2 * E, E, column, K, BK)
        given = tl.dot(tl.trans(load_quarter(inverse, place, 2 * half, E)), of_erase, input_precision=PRECISION)
        if half == 0:
            of_later = load_block(d_erase, E, 2 * E, E, column, K, BK)
            given = tl.dot(tl.trans(load_quarter(inverse, place, 1, E)), of_later, given, input_precision=PRECISION)
        met += given * strength
    met *= entering
    queries = load_tile(q, own_token, own_first, own_rows, stride_q, E, column, K, BK)
    mass = tl.sum(met * keys.to(tl.float32), 1) + tl.sum(seen * queries.to(tl.float32), 1)

    # as they meet each other
    of_pairs = load_quarter(d_pairs, place, 2 * half, E)
    of_overlap = load_quarter(d_overlap, place, 2 * half, E)  # of k kᵀ, whose both sides are keys
    grad_q = tl.dot(of_pairs, keys, seen, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(of_pairs), queries, grad_k + met, input_precision=PRECISION)
    grad_k = tl.dot(of_overlap, keys, grad_k, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(of_overlap), keys, grad_k, input_precision=PRECISION)
    others = load_tile(k, other_token, other_first, other_rows, stride_k, E, column, K, BK)
    across = load_quarter(d_overlap, place, 1, E)
    pairs_across = load_quarter(d_pairs, place, 1, E)
    if half == 0:
        later = load_tile(q, other_token, other_first, other_rows, stride_q, E, column, K, BK)
        grad_k = tl.dot(tl.trans(across), others, grad_k, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(pairs_across), later, grad_k, input_precision=PRECISION)
    else:
        grad_k = tl.dot(across, others, grad_k, input_precision=PRECISION)
        grad_q = tl.dot(pairs_across, others, grad_q, input_precision=PRECISION)
    store_tile(dq + head * K, grad_q, own_token, own_first, own_rows, H * K, E, column, K, BK)
    store_tile(dk + head * K, grad_k, own_token, own_first, own_rows, H * K, E, column, K, BK)
    at = ((tile * H + head).to(tl.int64) * N + slot) * 2 * E + start + row
    tl.store(d_sums + at, mass - to_end)
    tl.store(d_end + at, to_end)


@triton.jit
def _sum_of_parts(parts, head, slot, N, H, C: tl.constexpr, COUNT: tl.constexpr):
    """[C] of [COUNT, H, N, C], over the parts."""
    row = tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    for part in tl.static_range(COUNT):
        total += tl.load(parts + ((part * H + head).to(tl.int64) * N + slot) * C + row)
    return total


@kernel(do_not_specialize=["N"])
def _decays_kernel(gamma, d_maps, d_scored, d_mass, d_strength, d_sums, d_end, d_decay, d_beta, tokens, firsts, rows_of,
                   lefts, N, H, K, C: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
                   PARTS: tl.constexpr):  # fmt: skip
    """Gradients of log_decay and β [T, H]: the former of all that comes after in the chunk, and of what leaves it."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    row, channel = tl.arange(0, C), tl.arange(0, BK)
    exists = row_exists(row, first, rows)
    own = (token + row).to(tl.int64) * H + head
    tl.store(d_beta + own, _sum_of_parts(d_strength, head, slot, N, H, C, PARTS), mask=exists)
    mass = _sum_of_parts(d_scored, head, slot, N, H, C, PARTS) + _sum_of_parts(d_mass, head, slot, N, H, C, PARTS)
    mass += _sum_of_parts(d_sums, head, slot, N, H, C, TILES)
    whole = tl.sum(_sum_of_parts(d_end, head, slot, N, H, C, TILES), 0)
    if tl.load(lefts + slot) > 1:
        through = 0.0
        for tile in tl.static_range(KT):
            diagonal = tile * BK + channel
            of_map = d_maps + (slot.to(tl.int64) * H + head) * K * K + diagonal * (K + 1)
            through += tl.sum(tl.load(of_map, mask=diagonal < K, other=0.0).to(tl.float32), 0)
        whole += decay_of(tl.load(gamma + (head.to(tl.int64) * N + slot) * C + C - 1)) * through
    tl.store(d_decay + own, tl.sum(mass, 0) - tl.cumsum(mass, 0) + mass + whole, mask=exists)


def chunk_gradients(q, k, v, scales, beta, grad_o, chunks: Chunks, pulled: Tensor, d_added: Tensor, d_maps: Tensor,
                    dscales: Tensor, slots: Slots, places: Tensor, chunk: int, height: int, scale: float,
                    precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q and k by head [T, H, K], of v, log_decay and beta, from those of nodes and queries; adds to
    `dscales`."""
    if takes_hopper(chunk, q, k, v, grad_o):
        return _chunk_gradients_on_hopper(
            q, k, v, scales, beta, grad_o, chunks, pulled, d_added, d_maps, dscales, slots, places, height, scale
        )
    num_slots, (tokens, groups, key_dim), (_, heads, value_dim) = len(slots.token), q.shape, v.shape
    block_k, block_v = tile_width(key_dim), tile_width(value_dim)
    key_tiles, value_tiles = cdiv(key_dim, block_k), cdiv(value_dim, block_v)
    keys = {"E": chunk // 2, "KT": key_tiles, "BK": block_k, "PRECISION": precision, "num_warps": 4}
    keys["num_stages"] = 2 if chunk <= 64 else 3
    values = {"VT": value_tiles, "BV": block_v}
    scaled = scales is not None
    lam = scales if scaled else v
    float32 = {"dtype": torch.float32, "device": v.device}
    of_q, of_k, of_v, of_g, of_s, of_b = (x.stride() for x in (q, k, v, grad_o, lam, beta))
    rows, halves = (slots.token, slots.first, slots.rows), programs(2 * heads, num_slots)
    quarters = (num_slots, heads, 3, chunk // 2, chunk // 2)

    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_written = v.new_empty(num_slots, heads, chunk, value_dim)
    on_hopper = takes_hopper(chunk, q, k, widths=HOPPER_KEYS) and takes_hopper_wide(chunk, key_dim, v, grad_o)
    tiles = {"KT": key_dim // TILE, "VT": value_dim // HOPPER_WIDTH, "num_warps": HOPPER_WARPS}  # of kernels for Hopper
    arguments = (
        k, beta, grad_o, chunks.inverse, chunks.scores, chunks.gamma, d_added, dv, d_written, *rows, slots.left,
        num_slots, heads, groups, *of_k[:2], of_b[0], *of_g[:2],
    )  # fmt: skip
    if on_hopper:
        hopper_kernel("values_wide")[programs(heads * tiles["VT"], num_slots)](*arguments, **tiles, maxnreg=128)
    else:
        _values_kernel[programs(heads * value_tiles, num_slots)](*arguments, key_dim, value_dim, **values, **keys)
    d_mixed, d_pairs = v.new_empty(quarters), v.new_empty(quarters)
    by_half = (1 if on_hopper else 2, *chunks.gamma.shape)
    d_scored = torch.zeros(by_half, **float32)
    arguments = (
        q, k, v, lam, beta, grad_o, chunks.inverse, chunks.mixed, pulled, chunks.gamma, d_mixed, d_pairs, dscales,
        d_scored, *rows, slots.reads, places, num_slots, heads, groups, scale, *of_q[:2], *of_k[:2], *of_v[:2],
        *of_s[:2], of_b[0], *of_g[:2],
    )  # fmt: skip
    levels, of_levels = lam.shape[-1] if scaled else 1, {"HEIGHT": height - 1, "SCALED": scaled}
    if on_hopper:
        hopper_kernel("scores_back")[programs(heads, num_slots)](*arguments, levels, **of_levels, **tiles)
    else:
        # pipelined, this kernel is silently wrong on Hopper (Triton 3.6): d_mixed by 4e-2 with K = 192, V = 384
        _scores_back_kernel[halves](
            *arguments, key_dim, value_dim, levels, **of_levels, **values, **{**keys, "num_stages": 1}
        )
    d_erase, d_overlap = v.new_empty(num_slots, heads, chunk, key_dim), v.new_empty(quarters)
    d_strength, d_mass = (torch.empty(by_half, **float32) for _ in range(2))
    if on_hopper:
        hopper_kernel("solved_wide")[programs(heads, num_slots)](
            q, k, v, beta, chunks.inverse, chunks.gamma, d_maps, d_written, d_mixed, d_erase, d_overlap, d_strength,
            d_mass, *rows, slots.left, num_slots, heads, groups, scale, *of_q[:2], *of_k[:2], *of_v[:2], of_b[0],
            **tiles,
        )  # fmt: skip
    else:
        d_solved = v.new_empty(quarters)
        # pipelined by Triton 3.9, it is wrong where K > 128: gradients of the keys by more than half; 3.8 has not run
        staged = {**keys, "num_stages": 1} if key_dim > 128 and VERSION >= (3, 8) else keys
        _solved_kernel[halves](
            q, k, v, chunks.gamma, d_maps, d_written, d_mixed, d_solved, d_erase, *rows, slots.left, num_slots, heads,
            groups, scale, *of_q[:2], *of_k[:2], *of_v[:2], key_dim, value_dim, **values, **staged,
        )  # fmt: skip
        _overlap_kernel[programs(3 * heads, num_slots)](
            k, beta, chunks.inverse, chunks.gamma, d_solved, d_overlap, d_strength, d_mass, *rows, num_slots, heads,
            groups, *of_k[:2], of_b[0], key_dim, **keys,
        )  # fmt: skip
        del d_solved
    del d_mixed, d_written
    wide = {"dtype": v.dtype if groups == heads else torch.float32, "device": v.device}  # sums over a group's heads
    dq, dk = (torch.empty(tokens, heads, key_dim, **wide) for _ in range(2))
    by_tile = (1 if on_hopper else key_tiles, *chunks.gamma.shape)
    d_sums, d_end = (torch.empty(by_tile, **float32) for _ in range(2))
    arguments = (
        q, k, v, beta, chunks.inverse, pulled, chunks.gamma, d_added, d_maps, d_erase, chunks.mixed, d_pairs, d_overlap,
        dq, dk, d_sums, d_end, *rows, slots.left, slots.reads, places, num_slots, heads, groups, scale, *of_q[:2],
        *of_k[:2], *of_v[:2], of_b[0],
    )  # fmt: skip
    if on_hopper:
        hopper_kernel("keys_wide")[programs(heads, num_slots)](*arguments, **tiles)
    else:
        # pipelined, it is wrong where K > 128: by 1e-2, and by 1e-1 where sequences start anywhere
        staged = keys if key_dim <= 128 and slots.first is None else {**keys, "num_stages": 1}
        _keys_kernel[programs(2 * heads * key_tiles, num_slots)](*arguments, key_dim, value_dim, **values, **staged)
    parts = d_scored, d_strength, d_mass, d_sums, d_end
    return dq, dk, dv, *_of_decays(chunks, d_maps, slots, tokens, *parts)


def _chunk_gradients_on_hopper(q, k, v, scales, beta, grad_o, chunks: Chunks, pulled: Tensor, d_added: Tensor,
                               d_maps: Tensor, dscales: Tensor, slots: Slots, places: Tensor, height: int,
                               scale: float):  # fmt: skip
    """The same by kernels that have all rows of a chunk."""
    num_slots, (tokens, groups, key_dim), heads = len(slots.token), q.shape, v.shape[1]
    chunk, scaled = chunks.gamma.shape[-1], scales is not None
    lam = scales if scaled else v
    sums = {"size": (1, *chunks.gamma.shape), "dtype": torch.float32, "device": v.device}
    of_q, of_k, of_v, of_g, of_s, of_b = (x.stride() for x in (q, k, v, grad_o, lam, beta))
    rows, each = (slots.token, slots.first, slots.rows), programs(heads, num_slots)
    d_mixed, d_pairs, d_overlap = (v.new_empty(num_slots, heads, 3, chunk // 2, chunk // 2) for _ in range(3))
    d_scored, d_strength, d_mass, d_sums, d_end = (torch.empty(**sums) for _ in range(5))
    hopper_kernel("scores_back")[each](
        q, k, v, lam, beta, grad_o, chunks.inverse, chunks.mixed, pulled, chunks.gamma, d_mixed, d_pairs, dscales,
        d_scored, *rows, slots.reads, places, num_slots, heads, groups, scale, *of_q[:2], *of_k[:2], *of_v[:2],
        *of_s[:2], of_b[0], *of_g[:2], lam.shape[-1] if scaled else 1, HEIGHT=height - 1, SCALED=scaled, KT=2, VT=1,
        num_warps=HOPPER_WARPS,
    )  # fmt: skip
    dv, d_erase = torch.empty(v.shape, dtype=v.dtype, device=v.device), v.new_empty(num_slots, heads, chunk, key_dim)
    hopper_kernel("solved")[each](
        q, k, v, beta, grad_o, chunks.inverse, chunks.scores, chunks.gamma, d_added, d_maps, d_mixed, dv, d_erase,
        d_overlap, d_strength, d_mass, *rows, slots.left, num_slots, heads, groups, scale, *of_q[:2], *of_k[:2],
        *of_v[:2], of_b[0], *of_g[:2], num_warps=HOPPER_WARPS,
    )  # fmt: skip
    del d_mixed
    wide = {"dtype": v.dtype if groups == heads else torch.float32, "device": v.device}  # sums over a group's heads
    dq, dk = (torch.empty(tokens, heads, key_dim, **wide) for _ in range(2))
    hopper_kernel("keys")[each](
        q, k, v, beta, chunks.inverse, pulled, chunks.gamma, d_added, d_maps, d_erase, chunks.mixed, d_pairs, d_overlap,
        dq, dk, d_sums, d_end, *rows, slots.left, slots.reads, places, num_slots, heads, groups, scale, *of_q[:2],
        *of_k[:2], *of_v[:2], of_b[0], num_warps=HOPPER_WARPS,
    )  # fmt: skip
    parts = d_scored, d_strength, d_mass, d_sums, d_end
    return dq, dk, dv, *_of_decays(chunks, d_maps, slots, tokens, *parts)


def _of_decays(chunks: Chunks, d_maps: Tensor, slots: Slots, tokens: int, scored: Tensor, strength: Tensor,
               mass: Tensor, sums: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of log_decay and β [T, H] from parts [parts, H, N, C] of what a chunk's programs have found."""
    (heads, num_slots, chunk), key_dim = chunks.gamma.shape, d_maps.shape[-1]
    d_decay, d_beta = (torch.empty(tokens, heads, dtype=torch.float32, device=d_maps.device) for _ in range(2))
    block = tile_width(key_dim)
    _decays_kernel[programs(heads, num_slots)](
        chunks.gamma, d_maps, scored, mass, strength, sums, end, d_decay, d_beta, slots.token, slots.first, slots.rows,
        slots.left, num_slots, heads, key_dim, C=chunk, KT=cdiv(key_dim, block), BK=block, TILES=len(sums),
        PARTS=len(scored), num_warps=1,
    )  # fmt: skip
    return d_decay, d_beta
