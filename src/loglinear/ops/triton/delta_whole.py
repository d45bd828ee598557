"""One chunk of the delta rule by one program that has all of its rows: what `delta_halves.py` makes by halves, where
there is room for all columns of the keys. Each program loads everything once, and has a multiprocessor for itself.

Legend as in `delta_chunks.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import decays_between, level_factor, load_column, program_place, programs
from loglinear.ops.triton.delta_chunks import (
    WALKED,
    load_quarters,
    load_tile,
    parts_of,
    store_block,
    store_quarters,
    tile_width,
    warps_of,
)


@triton.jit
def scores_of(q, k, beta, inverse, sums, token, first, rows, place, size, scale, stride_q, stride_k, stride_b, K,
              C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores before λ, float32, and queries as seen from S. size: of a part of X."""
    row = tl.arange(0, C)
    queries = load_tile(q, token, first, rows, stride_q, C, 0, K, BK)
    keys = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
    dtype = queries.dtype
    product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    product = tl.where(row[:, None] >= row[None, :], product * decays_between(sums) * scale, 0.0).to(dtype)
    mixed = tl.dot(product, load_quarters(inverse, place, C // 2), input_precision=PRECISION)
    if PARTS == 2:
        mixed = tl.dot(product, load_quarters(inverse + size, place, C // 2), mixed, input_precision=PRECISION)
    mixed *= load_column(beta, token, first, rows, stride_b, C)[None, :]
    entering = tl.exp2(sums)
    passed = tl.dot((mixed * entering[None, :]).to(dtype), keys, input_precision=PRECISION)
    seen = queries.to(tl.float32) * (entering * scale)[:, None] - passed
    return mixed, seen.to(dtype)


@triton.jit(do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _scores_kernel(q, k, scales, beta, inverse, scores, seen, gamma, kept, tokens, firsts, rows_of, reads, places, N, H,
                   G, scale, stride_q, stride_qg, stride_k, stride_kg, stride_s, stride_sh, stride_b, K, L,
                   C: tl.constexpr, HEIGHT: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Scores and queries of a chunk, and what of the scores is kept."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    group, place = head // (H // G), slot.to(tl.int64) * H + head
    sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + tl.arange(0, C))
    mixed, queries = scores_of(
        q + group.to(tl.int64) * stride_qg, k + group.to(tl.int64) * stride_kg, beta + head, inverse, sums, token,
        first, rows, place, N.to(tl.int64) * H * 3 * (C * C // 4), scale, stride_q, stride_k, stride_b, K, C, BK,
        PARTS, PRECISION,
    )  # fmt: skip
    if tl.load(reads + slot) > 0:
        store_block(seen + (tl.load(places + slot).to(tl.int64) * H + head) * C * K, queries, 0, C, C, 0, K, BK)
    if kept is not None:
        store_quarters(kept, mixed, place, C // 2)
    if SCALED:
        mixed *= level_factor(scales + head.to(tl.int64) * stride_sh, token, first, rows, stride_s, L, C, HEIGHT)
    store_block(scores + place * C * C, mixed, 0, C, C, 0, C, C)


def make_scores(q: Tensor, k: Tensor, scales: Tensor | None, beta: Tensor, inverse: Tensor, gamma: Tensor,
                scores: Tensor, seen: Tensor, kept: Tensor | None, slots: Slots, places: Tensor, chunk: int,
                height: int, scale: float, precision: str) -> None:  # fmt: skip
    """Fills in scores, the first variant of the queries of each chunk, and `kept`, as `make_chunks` does."""
    num_slots, (_, groups, key_dim), heads, lam = len(slots.token), q.shape, beta.shape[1], k
    if scales is not None:
        lam = scales
    _scores_kernel[programs(heads, num_slots)](
        q, k, lam, beta, inverse, scores, seen, gamma, kept, slots.token, slots.first, slots.rows, slots.reads, places,
        num_slots, heads, groups, scale, *q.stride()[:2], *k.stride()[:2], *lam.stride()[:2], beta.stride(0), key_dim,
        1 if scales is None else scales.shape[-1], C=chunk, HEIGHT=height, BK=tile_width(key_dim, WALKED),
        SCALED=scales is not None, PARTS=parts_of(k), PRECISION=precision, num_warps=warps_of(chunk), num_stages=1,
    )  # fmt: skip
