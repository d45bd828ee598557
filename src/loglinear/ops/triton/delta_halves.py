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

import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    cdiv,
    decay_of,
    decays_between,
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
    Chunks,
    fetch_quarters,
    fetch_tile,
    hopper_kernel,
    in_parts,
    load_quarter,
    load_tile,
    most_rows,
    parts_of,
    product,
    store_block,
    store_parts,
    store_quarter,
    takes_hopper,
    takes_hopper_wide,
    tile_width,
)
from loglinear.ops.triton.delta_inverse import make_inverses
from loglinear.ops.triton.launch import kernel


@triton.jit
def _times_inverse(left, inverse, place, quarter, total, size, E: tl.constexpr, PARTS: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """`total` + `left` times a quarter of X."""
    total = product(left, load_quarter(inverse, place, quarter, E), total, PRECISION)
    if PARTS == 2:
        total = product(left, load_quarter(inverse + size, place, quarter, E), total, PRECISION)
    return total


@triton.jit
def _both_times_inverse(whole, lost, inverse, place, quarter, total, size, E: tl.constexpr, PARTS: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """The same, of what is in PARTS parts: `whole`, and what it has `lost`."""
    total = _times_inverse(whole, inverse, place, quarter, total, size, E, PARTS, PRECISION)
    if PARTS == 2:
        total = product(lost, load_quarter(inverse, place, quarter, E), total, PRECISION)
    return total


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _scores_kernel(q, k, scales, beta, inverse, scores, seen, gamma, mixed, tokens, firsts, rows_of, reads, places, N,
                   H, G, scale, stride_q, stride_qg, stride_k, stride_kg, stride_s, stride_sh, stride_b, K, L,
                   E: tl.constexpr, HEIGHT: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
                   KNOWN: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores and queries of half of the rows. E = 2^HEIGHT. KNOWN: from `mixed`, which is filled in else.

    The other half is what the second one reads of the first; of the first half, for which it lies ahead, all of that
    is zero, and multiplied as well.
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
    start, ahead = half * E, (1 - half) * E
    first_of = None if first is None else first - start
    token_of, rows_of_half = token + start, rows - start
    earlier = rows * half  # none for the first half
    row = tl.arange(0, E)
    place = slot.to(tl.int64) * H + head
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + row
    own_sums, other_sums = tl.load(sums + start), tl.load(sums)
    dtype = scores.dtype.element_ty
    if KNOWN:
        own = load_quarter(mixed, place, 2 * half, E).to(tl.float32)
        across = tl.where(half == 1, load_quarter(mixed, place, 1, E).to(tl.float32), 0.0)
    else:
        size = N.to(tl.int64) * H * 3 * E * E  # of a part of X
        pairs, pairs_across = tl.zeros((E, E), tl.float32), tl.zeros((E, E), tl.float32)
        for tile in range(KT):
            queries = load_tile(q, token_of, first_of, rows_of_half, stride_q, E, tile * BK, K, BK)
            keys = load_tile(k, token_of, first_of, rows_of_half, stride_k, E, tile * BK, K, BK)
            others = load_tile(k, token, first, earlier, stride_k, E, tile * BK, K, BK)
            pairs = tl.dot(queries, tl.trans(keys), pairs, input_precision=PRECISION)
            pairs_across = tl.dot(queries, tl.trans(others), pairs_across, input_precision=PRECISION)
        pairs = tl.where(row[:, None] >= row[None, :], pairs * decays_between(own_sums, own_sums) * scale, 0.0)
        pairs_across *= decays_between(own_sums, other_sums) * scale
        strength = load_column(beta + head, token_of, first_of, rows_of_half, stride_b, E)
        before = load_column(beta + head, token, first, earlier, stride_b, E)  # zero for the first half
        pairs, lost_pairs = in_parts(pairs, dtype)
        pairs_across, lost_across = in_parts(pairs_across, dtype)
        nothing = tl.zeros((E, E), gamma.dtype.element_ty)
        own = _both_times_inverse(pairs, lost_pairs, inverse, place, 2 * half, nothing, size, E, PARTS, PRECISION)
        own = own.to(tl.float32) * strength[None, :]
        across = _both_times_inverse(pairs_across, lost_across, inverse, place, 0, nothing, size, E, PARTS, PRECISION)
        # of the first half with itself again: what is multiplied by zero must be as finite as its own
        across = _both_times_inverse(pairs, lost_pairs, inverse, place, half, across, size, E, PARTS, PRECISION)
        across = across.to(tl.float32) * before[None, :]
        if mixed is not None:
            store_quarter(mixed, own, place, 2 * half, E)
            if half == 1:
                store_quarter(mixed, across, place, 1, E)
    out = scores + place * 4 * E * E
    if SCALED:
        lam = scales + head.to(tl.int64) * stride_sh
        factor = level_factor(lam, token_of, first_of, rows_of_half, stride_s, L, E, HEIGHT)
        store_block(out, own * factor, start, 2 * E, E, start, 2 * E, E)
        far = load_column(lam + tl.minimum(HEIGHT + 1, L - 1), token_of, first_of, rows_of_half, stride_s, E)
        store_block(out, across * far[:, None], start, 2 * E, E, ahead, 2 * E, E)
    else:
        store_block(out, own, start, 2 * E, E, start, 2 * E, E)
        store_block(out, across, start, 2 * E, E, ahead, 2 * E, E)
    if tl.load(reads + slot) == 0:
        return
    entering = decay_of(own_sums)
    whole, lost = in_parts(own * entering[None, :], dtype)
    whole_across, lost_across = in_parts(across * decay_of(other_sums)[None, :], dtype)
    seen += (tl.load(places + slot).to(tl.int64) * H + head) * 2 * E * K
    for tile in range(KT):
        keys = load_tile(k, token_of, first_of, rows_of_half, stride_k, E, tile * BK, K, BK)
        others = load_tile(k, token, first, earlier, stride_k, E, tile * BK, K, BK)
        passed = tl.dot(whole, keys, input_precision=PRECISION)
        passed = tl.dot(whole_across, others, passed, input_precision=PRECISION)
        if (PARTS == 2) & (not KNOWN):
            passed = tl.dot(lost, keys, passed, input_precision=PRECISION)
            passed = tl.dot(lost_across, others, passed, input_precision=PRECISION)
        queries = load_tile(q, token_of, first_of, rows_of_half, stride_q, E, tile * BK, K, BK).to(tl.float32)
        store_block(seen, queries * (entering * scale)[:, None] - passed, start, 2 * E, E, tile * BK, K, BK)


@triton.jit
def _turned_keys(k, decay, token, first, rows, stride, E: tl.constexpr, column, K, BK: tl.constexpr,
                 dtype: tl.constexpr):  # fmt: skip
    """BK columns of half of the rows of k, turned [BK, E], each row times its `decay`."""
    row, columns = tl.arange(0, E), column + tl.arange(0, BK)
    at = k + token.to(tl.int64) * stride + (row[None, :] * stride + columns[:, None])
    keys = tl.load(at, mask=row_exists(row, first, rows)[None, :] & (columns < K)[:, None], other=0.0)
    return (keys.to(tl.float32) * decay[None, :]).to(dtype)


@triton.jit
def _times_rows(whole0, lost0, whole1, lost1, right, token, first, later, rows, stride, E: tl.constexpr, column, width,
                W: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What is kept in parts for each half of the rows of a chunk times W columns of them."""
    right0 = load_tile(right, token, first, rows, stride, E, column, width, W)
    right1 = load_tile(right, token + E, later, rows - E, stride, E, column, width, W)
    made = tl.dot(whole0, right0, input_precision=PRECISION)
    made = tl.dot(whole1, right1, made, input_precision=PRECISION)
    if PARTS == 2:
        made = tl.dot(lost0, right0, made, input_precision=PRECISION)
        made = tl.dot(lost1, right1, made, input_precision=PRECISION)
    return made


@kernel(do_not_specialize=["N", "stride_b"])
def _leaves_kernel(k, v, beta, inverse, gamma, added, maps, finals, tokens, firsts, rows_of, lefts, heights, N, H, G,
                   stride_k, stride_kg, stride_v, stride_vh, stride_b, K, V, E: tl.constexpr, KT: tl.constexpr,
                   VT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """BK rows of U and of P of one chunk: k̄ᵀ T times v, and times k e^γ."""
    part, slot = program_place()
    head, column = part // KT, part % KT * BK
    if tl.load(lefts + slot, mask=slot < N, other=0) <= 1:
        return  # nobody reads the last chunk of a sequence
    rows, token = tl.load(rows_of + slot), tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    later = None if first is None else first - E
    k += (head // (H // G)).to(tl.int64) * stride_kg
    v += head.to(tl.int64) * stride_vh
    place = slot.to(tl.int64) * H + head
    size = N.to(tl.int64) * H * 3 * E * E  # of a part of X
    fetch_quarters(inverse, place, E)
    if PARTS == 2:
        fetch_quarters(inverse + size, place, E)
    fetch_tile(beta + head, token, first, rows, stride_b, 2 * E, 0, 1, 1)
    fetch_tile(v, token, first, rows, stride_v, 2 * E, 0, V, VT * BV)
    row = tl.arange(0, E)
    sums = gamma + (head.to(tl.int64) * N + slot) * 2 * E + row
    sums0, sums1 = tl.load(sums), tl.load(sums + E)
    end = tl.load(gamma + (head.to(tl.int64) * N + slot) * 2 * E + 2 * E - 1)
    dtype = added.dtype.element_ty
    keys0 = _turned_keys(k, decay_of(end - sums0), token, first, rows, stride_k, E, column, K, BK, dtype)
    keys1 = _turned_keys(k, decay_of(end - sums1), token + E, later, rows - E, stride_k, E, column, K, BK, dtype)
    nothing = tl.zeros((BK, E), gamma.dtype.element_ty)
    left0 = _times_inverse(keys0, inverse, place, 0, nothing, size, E, PARTS, PRECISION)
    left0 = _times_inverse(keys1, inverse, place, 1, left0, size, E, PARTS, PRECISION)
    left1 = _times_inverse(keys1, inverse, place, 2, nothing, size, E, PARTS, PRECISION)
    left0 = left0.to(tl.float32) * load_column(beta + head, token, first, rows, stride_b, E)[None, :]
    left1 = left1.to(tl.float32) * load_column(beta + head, token + E, later, rows - E, stride_b, E)[None, :]
    whole0, lost0 = in_parts(left0, dtype)
    whole1, lost1 = in_parts(left1, dtype)
    for value in range(VT):
        made = _times_rows(whole0, lost0, whole1, lost1, v, token, first, later, rows, stride_v, E, value * BV, V, BV,
                           PARTS, PRECISION)  # fmt: skip
        store_block(added + place * K * V, made, column, K, BK, value * BV, V, BV)
    whole0, lost0 = in_parts(left0 * decay_of(sums0)[None, :], dtype)
    whole1, lost1 = in_parts(left1 * decay_of(sums1)[None, :], dtype)
    passing = decay_of(end)
    for key in range(KT):
        made = _times_rows(whole0, lost0, whole1, lost1, k, token, first, later, rows, stride_k, E, key * BK, K, BK,
                           PARTS, PRECISION)  # fmt: skip
        unchanged = (column + tl.arange(0, BK))[:, None] == (key * BK + tl.arange(0, BK))[None, :]
        made = tl.where(unchanged, passing, 0.0) - made
        store_parts(maps + place * PARTS * K * K, made, K * K, column, K, BK, key * BK, K, BK, PARTS)
        if finals is not None:
            if tl.load(heights + slot) == 0:
                store_block(finals + place * K * K, made, column, K, BK, key * BK, K, BK)


def make_chunks(q, k, scales, log_decay, beta, slots: Slots, places: Tensor | None, num_variants: int, chunk: int,
                height: int, scale: float, precision: str, keeps: bool,
                kept: tuple[Tensor, Tensor, Tensor] | None = None) -> Chunks:  # fmt: skip
    """Chunks of q, k [T, G, K], level scales [T, H, L] (None: 1), log_decay and beta [T, H].

    places [N]: for each slot the first variant of its queries, of which there are at most `num_variants`; None: queries
    and scores are not to be made. keeps: with room for `mixed`, for the backward. kept: inverse, gamma and mixed of the
    forward (the last of which may be empty).
    """
    num_slots, (_, groups, key_dim), heads = len(slots.token), q.shape, beta.shape[1]
    if kept is None:
        inverse, gamma = make_inverses(k, log_decay, beta, slots, chunk, precision)
        mixed = k.new_empty(num_slots, heads, 3, chunk // 2, chunk // 2) if keeps else None
    else:
        inverse, gamma, mixed = kept
    if places is None:
        return Chunks(inverse, None, None, gamma, mixed)
    known = kept is not None and mixed.numel() > 0
    if kept is not None and not known:
        mixed = k.new_empty(num_slots, heads, 3, chunk // 2, chunk // 2)
    scores, seen = k.new_empty(num_slots, heads, chunk, chunk), k.new_empty(num_variants, heads, chunk, key_dim)
    scaled = scales is not None
    lam = scales if scaled else k
    block = tile_width(key_dim)
    _scores_kernel[programs(2 * heads, num_slots)](
        q, k, lam, beta, inverse, scores, seen, gamma, mixed, slots.token, slots.first, slots.rows, slots.reads, places,
        num_slots, heads, groups, scale, *q.stride()[:2], *k.stride()[:2], *lam.stride()[:2], beta.stride(0), key_dim,
        lam.shape[-1] if scaled else 1, E=chunk // 2, HEIGHT=height - 1, KT=cdiv(key_dim, block), BK=block,
        SCALED=scaled, KNOWN=known, PARTS=parts_of(k), PRECISION=precision, num_warps=4, num_stages=1,
    )  # fmt: skip
    return Chunks(inverse, scores, seen, gamma, mixed)


def make_leaves(k: Tensor, v: Tensor, beta: Tensor, chunks: Chunks, added: Tensor, maps: Tensor, finals: Tensor | None,
                slots: Slots, chunk: int, precision: str) -> None:  # fmt: skip
    """Fills in U and P of the chunks; also P of those that stay leaves in `finals`, if that is given."""
    num_slots, (_, groups, key_dim), (_, heads, value_dim) = len(slots.token), k.shape, v.shape
    if takes_hopper(chunk, k, v):
        hopper_kernel("leaves")[programs(heads, num_slots)](
            k, v, beta, chunks.inverse, chunks.gamma, added, maps, finals, slots.token, slots.first, slots.rows,
            slots.left, slots.height, num_slots, heads, groups, *k.stride()[:2], *v.stride()[:2], beta.stride(0),
            num_warps=HOPPER_WARPS, maxnreg=128,
        )  # fmt: skip
        return
    if takes_hopper(chunk, k, widths=HOPPER_KEYS) and takes_hopper_wide(chunk, key_dim, v):
        hopper_kernel("leaves_wide")[programs(heads, num_slots)](
            k, v, beta, chunks.inverse, chunks.gamma, added, maps, finals, slots.token, slots.first, slots.rows,
            slots.left, slots.height, num_slots, heads, groups, *k.stride()[:2], *v.stride()[:2], beta.stride(0),
            KT=key_dim // TILE, VT=value_dim // HOPPER_WIDTH, num_warps=4,
        )  # fmt: skip
        return
    block, wide = tile_width(key_dim, most_rows(k)), tile_width(value_dim, 2 * TILE)
    key_tiles = cdiv(key_dim, block)
    _leaves_kernel[programs(heads * key_tiles, num_slots)](
        k, v, beta, chunks.inverse, chunks.gamma, added, maps, finals, slots.token, slots.first, slots.rows, slots.left,
        slots.height, num_slots, heads, groups, *k.stride()[:2], *v.stride()[:2], beta.stride(0), key_dim, value_dim,
        E=chunk // 2, KT=key_tiles, VT=cdiv(value_dim, wide), BK=block, BV=wide, PARTS=parts_of(k), PRECISION=precision,
        num_warps=4, num_stages=2,
    )  # fmt: skip
