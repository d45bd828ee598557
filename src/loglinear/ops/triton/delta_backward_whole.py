"""Gradients of one chunk of the delta rule in programs that have all of its rows: what `delta_backward_halves.py` does
by halves, where there is room for all columns of keys and values.

Legend as in `delta_backward.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    cdiv,
    decays_between,
    in_same_block,
    level_factor,
    load_column,
    program_place,
    programs,
    row_exists,
)
from loglinear.ops.triton.delta_chunks import (
    TILE,
    WALKED,
    Chunks,
    load_block,
    load_quarters,
    load_tile,
    store_block,
    store_quarters,
    store_tile,
    tile_width,
    warps_of,
)
from loglinear.ops.triton.scalar import INTERPRETED


@triton.jit
def _add_to_scales(dlam, pairs, exists, L, C: tl.constexpr, HEIGHT: tl.constexpr):
    """Gradients of λ of one chunk's rows, from those of the scores times the scores, [C, C]. C = 2^HEIGHT."""
    row = tl.arange(0, C)
    within, last = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for level in range(HEIGHT + 1):  # not unrolled: that would take the compiler ten seconds
        upto = tl.sum(tl.where(in_same_block(row[:, None], row[None, :], level), pairs, 0.0), 1)
        if level < L - 1:
            tl.store(dlam + level, upto - within, mask=exists)
        else:
            last += upto - within
        within = upto
    if HEIGHT >= L - 1:
        tl.store(dlam + L - 1, last + tl.load(dlam + L - 1, mask=exists, other=0.0), mask=exists)


@triton.jit(do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _pairs_kernel(q, k, v, scales, beta, grad_o, inverse, mixed, pulled, gamma, d_mixed, d_pairs, dscales, d_scored,
                  tokens, firsts, rows_of, reads, places, N, H, G, scale, stride_q, stride_qg, stride_k, stride_kg,
                  stride_v, stride_vh, stride_s, stride_sh, stride_b, stride_g, stride_gh, K, V, L, C: tl.constexpr,
                  HEIGHT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Back through the scores: gradients of λ, of MT and of q kᵀ. C = 2^HEIGHT."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    group, place = head // (H // G), slot.to(tl.int64) * H + head
    k += group.to(tl.int64) * stride_kg
    row = tl.arange(0, C)
    of_rows = (head.to(tl.int64) * N + slot) * C + row
    sums, causal = tl.load(gamma + of_rows), row[:, None] >= row[None, :]
    dtype = d_pairs.dtype.element_ty
    grad = load_tile(grad_o + head.to(tl.int64) * stride_gh, token, first, rows, stride_g, C, 0, V, BV)
    values = load_tile(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, 0, V, BV)
    found = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
    if SCALED:
        lam = scales + head.to(tl.int64) * stride_sh
        dlam = dscales + (token + row).to(tl.int64) * H * L + head * L
        pairs = tl.where(causal, load_quarters(mixed, place, C // 2).to(tl.float32) * found, 0.0)
        _add_to_scales(dlam, pairs, row_exists(row, first, rows), L, C, HEIGHT)
        found *= level_factor(lam, token, first, rows, stride_s, L, C, HEIGHT)
    if tl.load(reads + slot) > 0:
        at = (tl.load(places + slot).to(tl.int64) * H + head) * C * K
        pull = load_block(pulled + at, 0, C, C, 0, K, BK)
        met = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
        found -= tl.dot(pull, tl.trans(met), input_precision=PRECISION) * tl.exp2(sums)[None, :]
    found = tl.where(causal, found, 0.0)
    store_quarters(d_mixed, found, place, C // 2)

    # d(MT) Tᵀ = d(MT) diag(β) Xᵀ
    found = (found * load_column(beta + head, token, first, rows, stride_b, C)[None, :]).to(dtype)
    found = tl.dot(found, tl.trans(load_quarters(inverse, place, C // 2)), input_precision=PRECISION)
    found = tl.where(causal, found * decays_between(sums) * scale, 0.0)
    store_quarters(d_pairs, found, place, C // 2)
    queries = load_tile(q + group.to(tl.int64) * stride_qg, token, first, rows, stride_q, C, 0, K, BK)
    keys = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
    found *= tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    tl.store(d_scored + of_rows, tl.sum(found, 1) - tl.sum(found, 0))


@triton.jit(do_not_specialize=["N", "stride_b"])
def _overlap_kernel(q, k, v, beta, grad_o, inverse, scores, gamma, d_added, d_maps, d_mixed, dv, d_overlap, d_erase,
                    d_strength, d_mass, tokens, firsts, rows_of, lefts, N, H, G, scale, stride_q, stride_qg, stride_k,
                    stride_kg, stride_v, stride_vh, stride_b, stride_g, stride_gh, K, V, C: tl.constexpr,
                    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Back through T: gradients of v [T, H, V], of W and of k kᵀ, and what β and gamma get from it."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    group, place = head // (H // G), slot.to(tl.int64) * H + head
    k += group.to(tl.int64) * stride_kg
    row = tl.arange(0, C)
    of_rows = (head.to(tl.int64) * N + slot) * C + row
    sums, strength = tl.load(gamma + of_rows), load_column(beta + head, token, first, rows, stride_b, C)
    dtype = d_overlap.dtype.element_ty

    # dv
    writes = tl.load(lefts + slot) > 1
    after = tl.exp2(tl.load(gamma + (head.to(tl.int64) * N + slot) * C + C - 1) - sums)[:, None]
    grad = load_tile(grad_o + head.to(tl.int64) * stride_gh, token, first, rows, stride_g, C, 0, V, BV)
    given = load_block(scores + place * C * C, 0, C, C, 0, C, C)
    grad_v = tl.dot(tl.trans(given), grad, input_precision=PRECISION)
    wrote = tl.zeros((C, BV), dtype)
    if writes:
        met = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
        gave = tl.dot(met, load_block(d_added + place * K * V, 0, K, BK, 0, V, BV), input_precision=PRECISION)
        wrote = (gave * after).to(dtype)
        gave = tl.dot(tl.trans(load_quarters(inverse, place, C // 2)), wrote, input_precision=PRECISION)
        grad_v += gave * strength[:, None]  # Tᵀ = diag(β) Xᵀ
    store_tile(dv + head * V, grad_v, token, first, rows, H * V, C, 0, V, BV)

    # of dT what comes from the node
    found = tl.zeros((C, C), tl.float32)
    if writes:
        met_again = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
        map = load_block(d_maps + place * K * K, 0, K, BK, 0, K, BK)
        erased = (-tl.dot(met_again, map, input_precision=PRECISION) * after).to(dtype)
        store_block(d_erase + place * C * K, erased, 0, C, C, 0, K, BK)
        found = tl.dot(erased, tl.trans(met_again), input_precision=PRECISION) * tl.exp2(sums)[None, :]
        values = load_tile(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, 0, V, BV)
        found = tl.dot(wrote, tl.trans(values), found, input_precision=PRECISION)

    # dT; Mᵀ is made directly: a product, cast and turned, is silently wrong on Hopper before Triton 3.7.1
    queries = load_tile(q + group.to(tl.int64) * stride_qg, token, first, rows, stride_q, C, 0, K, BK)
    keys = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
    turned = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    turned *= tl.exp2(tl.minimum(sums[None, :] - sums[:, None], 0.0)) * scale
    turned = tl.where(row[:, None] <= row[None, :], turned, 0.0).to(dtype)
    found = tl.dot(turned, load_quarters(d_mixed, place, C // 2), found, input_precision=PRECISION)

    # -Tᵀ dT Tᵀ = -diag(β) Xᵀ dT diag(β) Xᵀ, strictly lower
    solved = load_quarters(inverse, place, C // 2)
    of_columns = tl.sum(found * solved.to(tl.float32), 0)
    found = tl.dot(tl.trans(solved), found.to(dtype), input_precision=PRECISION)
    found = tl.dot((found * strength[None, :]).to(dtype), tl.trans(solved), input_precision=PRECISION)
    found = tl.where(row[:, None] > row[None, :], -found * decays_between(sums), 0.0)
    store_quarters(d_overlap, found * strength[:, None], place, C // 2)
    others = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
    found *= tl.dot(others, tl.trans(others), input_precision=PRECISION)  # with β of the row: A ⊙ dA
    tl.store(d_strength + of_rows, of_columns + tl.sum(found, 1))
    found *= strength[:, None]
    tl.store(d_mass + of_rows, tl.sum(found, 1) - tl.sum(found, 0))


@triton.jit(do_not_specialize=["N", "stride_b"])
def _keys_kernel(q, k, v, beta, inverse, pulled, gamma, d_added, d_maps, d_erase, mixed, d_pairs, d_overlap, dq, dk,
                 d_sums, d_end, tokens, firsts, rows_of, lefts, reads, places, N, H, G, scale, stride_q, stride_qg,
                 stride_k, stride_kg, stride_v, stride_vh, stride_b, K, V, C: tl.constexpr, KT: tl.constexpr,
                 BK: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """W columns of the gradients of q and k by head, [T, H, K] each, and what gamma and its end get from them: d_sums,
    d_end [KT, H, N, C]."""
    part, slot = program_place()
    head, tile = part // KT, part % KT
    column = tile * W
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    writes, is_read = tl.load(lefts + slot) > 1, tl.load(reads + slot) > 0
    group, place = head // (H // G), slot.to(tl.int64) * H + head
    q += group.to(tl.int64) * stride_qg
    k += group.to(tl.int64) * stride_kg
    of_rows = (head.to(tl.int64) * N + slot) * C + tl.arange(0, C)
    sums, strength = tl.load(gamma + of_rows), load_column(beta + head, token, first, rows, stride_b, C)[:, None]
    entering = tl.exp2(sums)[:, None]
    of_tile = tile.to(tl.int64) * H * N * C + of_rows
    dtype = mixed.dtype.element_ty
    pulled += (tl.load(places + slot).to(tl.int64) * H + head) * C * K

    # as they write to the state that leaves: T (v dUᵀ - k̂ dPᵀ)
    grad_k = tl.zeros((C, W), tl.float32)
    if writes:
        values = load_tile(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, 0, V, BV)
        state = load_block(d_added + place * K * V, column, K, W, 0, V, BV)
        owed = tl.dot(values, tl.trans(state), input_precision=PRECISION)
        keys_left = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
        map = load_block(d_maps + place * K * K, column, K, W, 0, K, BK)
        owed -= tl.dot(keys_left, tl.trans(map), input_precision=PRECISION) * entering
        owed = (owed * strength).to(dtype)
        solved = load_quarters(inverse, place, C // 2)
        end = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + C - 1)
        grad_k = tl.dot(solved, owed, input_precision=PRECISION) * tl.exp2(end - sums)[:, None]
    keys = load_tile(k, token, first, rows, stride_k, C, column, K, W)
    to_end = tl.sum(grad_k * keys.to(tl.float32), 1)
    tl.store(d_end + of_tile, to_end)

    # as they meet the state that enters
    met = tl.zeros((C, W), tl.float32)
    if writes:
        of_erase = load_block(d_erase + place * C * K, 0, C, C, column, K, W)
        solved_again = load_quarters(inverse, place, C // 2)
        met = tl.dot(tl.trans(solved_again), of_erase, input_precision=PRECISION) * strength
    if is_read:
        pull = load_block(pulled, 0, C, C, column, K, W)
        met -= tl.dot(tl.trans(load_quarters(mixed, place, C // 2)), pull, input_precision=PRECISION)
    met *= entering
    keys_met = load_tile(k, token, first, rows, stride_k, C, column, K, W)
    mass = tl.sum(met * keys_met.to(tl.float32), 1) - to_end
    grad_k += met

    # as they meet each other; both sides of k kᵀ are keys
    others = load_tile(k, token, first, rows, stride_k, C, column, K, W)
    of_overlap = load_quarters(d_overlap, place, C // 2)
    grad_k = tl.dot(of_overlap, others, grad_k, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(of_overlap), others, grad_k, input_precision=PRECISION)
    queries = load_tile(q, token, first, rows, stride_q, C, column, K, W)
    grad_k = tl.dot(tl.trans(load_quarters(d_pairs, place, C // 2)), queries, grad_k, input_precision=PRECISION)
    store_tile(dk + head * K, grad_k, token, first, rows, H * K, C, column, K, W)
    grad_q = tl.zeros((C, W), tl.float32)
    if is_read:
        grad_q += load_block(pulled, 0, C, C, column, K, W).to(tl.float32) * entering * scale
        queries_met = load_tile(q, token, first, rows, stride_q, C, column, K, W)
        mass += tl.sum(grad_q * queries_met.to(tl.float32), 1)
    tl.store(d_sums + of_tile, mass)
    keys_of = load_tile(k, token, first, rows, stride_k, C, column, K, W)
    grad_q = tl.dot(load_quarters(d_pairs, place, C // 2), keys_of, grad_q, input_precision=PRECISION)
    store_tile(dq + head * K, grad_q, token, first, rows, H * K, C, column, K, W)


KEY_COLUMNS = 16 if INTERPRETED else 64  # of a program that has all rows


class WholeGradients(NamedTuple):
    """dq, dk [T, H, K], dv [T, H, V], and what is summed up to the gradients of log_decay and β, [1, H, N, C] each."""

    q: Tensor
    k: Tensor
    v: Tensor
    scored: Tensor
    strength: Tensor
    mass: Tensor
    sums: Tensor
    end: Tensor


def whole_gradients(q, k, v, scales, beta, grad_o, chunks: Chunks, pulled: Tensor, d_added: Tensor, d_maps: Tensor,
                    dscales: Tensor, slots: Slots, places: Tensor, chunk: int, height: int, scale: float,
                    precision: str) -> WholeGradients:  # fmt: skip
    """Of a call's chunks; adds to `dscales`."""
    num_slots, (tokens, groups, key_dim), (_, heads, value_dim) = len(slots.token), q.shape, v.shape
    d_pairs, d_overlap, d_mixed = (v.new_empty(num_slots, heads, 3, chunk // 2, chunk // 2) for _ in range(3))
    d_scored, d_strength, d_mass = (torch.empty_like(chunks.gamma)[None] for _ in range(3))
    scaled = scales is not None
    lam = scales if scaled else v
    rows, grid = (slots.token, slots.first, slots.rows), programs(heads, num_slots)
    sizes = (num_slots, heads, groups, scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    of_g, of_b, widths = grad_o.stride()[:2], beta.stride(0), (key_dim, value_dim)
    options = {
        "C": chunk, "BK": tile_width(key_dim, WALKED), "BV": tile_width(value_dim, WALKED), "PRECISION": precision,
        "num_warps": warps_of(chunk), "num_stages": 1,
    }  # fmt: skip
    _pairs_kernel[grid](
        q, k, v, lam, beta, grad_o, chunks.inverse, chunks.mixed, pulled, chunks.gamma, d_mixed, d_pairs, dscales,
        d_scored, *rows, slots.reads, places, *sizes, *lam.stride()[:2], of_b, *of_g, *widths,
        lam.shape[-1] if scaled else 1, HEIGHT=height, SCALED=scaled, **options,
    )  # fmt: skip
    dv, d_erase = torch.empty(v.shape, dtype=v.dtype, device=v.device), v.new_empty(num_slots, heads, chunk, key_dim)
    _overlap_kernel[grid](
        q, k, v, beta, grad_o, chunks.inverse, chunks.scores, chunks.gamma, d_added, d_maps, d_mixed, dv, d_overlap,
        d_erase, d_strength, d_mass, *rows, slots.left, *sizes, of_b, *of_g, *widths, **options,
    )  # fmt: skip
    del d_mixed
    wide = {"dtype": v.dtype if groups == heads else torch.float32, "device": v.device}  # sums over a group's heads
    dq, dk = (torch.empty(tokens, heads, key_dim, **wide) for _ in range(2))
    width = tile_width(key_dim, KEY_COLUMNS)
    tiles = cdiv(key_dim, width)
    d_sums, d_end = (chunks.gamma.new_empty(tiles, *chunks.gamma.shape) for _ in range(2))
    _keys_kernel[programs(heads * tiles, num_slots)](
        q, k, v, beta, chunks.inverse, pulled, chunks.gamma, d_added, d_maps, d_erase, chunks.mixed, d_pairs, d_overlap,
        dq, dk, d_sums, d_end, *rows, slots.left, slots.reads, places, *sizes, of_b, *widths,
        KT=tiles, W=width, **options | {"num_warps": warps_of(chunk) if width > TILE else 4},
    )  # fmt: skip
    return WholeGradients(dq, dk, dv, d_scored, d_strength, d_mass, d_sums, d_end)
