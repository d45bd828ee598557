"""Down the tree: every chunk reads its own rows, and the nodes on its left, each on its level.

A program takes one chunk and some of the heads of a group; q, k and their products serve all of these. The chunk is
two halves: the right half sees the left one on a level of its own, so there the mask is a number per row.

Legend
    N chunks (slots), C rows of a chunk, D = C / 2, H heads, G groups, K key width, V value width, L levels
    nodes [N, H, K, V], logs [N, H], gamma [H, N, C]: see `nodes.py`
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import drop_lowest_bit, in_same_block, load_column, load_rows


@triton.jit
def level_mask(scales, token, rows, stride_s, first, gamma, D: tl.constexpr, HEIGHT: tl.constexpr, L,
               SCALED: tl.constexpr):  # fmt: skip
    """Decay times level scale between the rows of a half of 2^HEIGHT = D rows: [D, D], not yet causal."""
    row = tl.arange(0, D)
    mask = tl.exp2(tl.minimum(gamma[:, None] - gamma[None, :], 0.0))
    if SCALED:
        factor = load_column(scales + tl.minimum(HEIGHT, L - 1), token, rows, stride_s, first, D)[:, None]
        factor = tl.broadcast_to(factor, (D, D))
        for down in tl.static_range(HEIGHT):
            level = HEIGHT - 1 - down
            near = load_column(scales + tl.minimum(level, L - 1), token, rows, stride_s, first, D)[:, None]
            factor = tl.where(in_same_block(row[:, None], row[None, :], level), near, factor)
        mask *= factor
    return tl.where(row[:, None] >= row[None, :], mask, 0.0)


@triton.jit(do_not_specialize=["N", "L"])
def _read_kernel(q, k, v, scales, o, nodes, logs, gamma, tokens, rows_of, blocks, heights, reads, N, H, G, scale,
                 stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_s, stride_sh, stride_o,
                 stride_oh, K, V, L, C: tl.constexpr, HEIGHT: tl.constexpr, HEADS: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    D: tl.constexpr = C // 2
    slot = tl.program_id(1)
    rows = tl.load(rows_of + slot)
    if rows == 0:
        return
    first_head = tl.program_id(0) * HEADS
    group = first_head // (H // G)
    first_v = tl.program_id(2) * BV
    token, block, count = tl.load(tokens + slot), tl.load(blocks + slot), tl.load(reads + slot)
    dtype = v.dtype.element_ty
    q0 = load_rows(q + group * stride_qg, token, rows, stride_q, 0, D, K, BK)
    q1 = load_rows(q + group * stride_qg, token, rows, stride_q, D, D, K, BK)
    k0 = load_rows(k + group * stride_kg, token, rows, stride_k, 0, D, K, BK)
    k1 = load_rows(k + group * stride_kg, token, rows, stride_k, D, D, K, BK)
    scores0 = tl.dot(q0, tl.trans(k0), input_precision=PRECISION) * scale
    scores1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION) * scale
    across = tl.dot(q1, tl.trans(k0), input_precision=PRECISION) * scale
    key, column = tl.arange(0, BK), first_v + tl.arange(0, BV)
    tile = key[:, None] * V + column[None, :]
    in_tile = (key < K)[:, None] & (column < V)[None, :]
    half = tl.arange(0, D)
    for step in range(HEADS):
        head = first_head + step
        lam = scales + head * stride_sh
        sums = gamma + (head.to(tl.int64) * N + slot) * C + half
        gamma0, gamma1 = tl.load(sums), tl.load(sums + D)
        middle = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + D - 1)
        values = v + head * stride_vh + first_v
        v0 = load_rows(values, token, rows, stride_v, 0, D, V - first_v, BV)
        v1 = load_rows(values, token, rows, stride_v, D, D, V - first_v, BV)

        # the rows of the chunk
        mask0 = level_mask(lam, token, rows, stride_s, 0, gamma0, D, HEIGHT - 1, L, SCALED)
        mask1 = level_mask(lam, token, rows, stride_s, D, gamma1, D, HEIGHT - 1, L, SCALED)
        o0 = tl.dot((scores0 * mask0).to(dtype), v0, input_precision=PRECISION)
        o1 = tl.dot((scores1 * mask1).to(dtype), v1, input_precision=PRECISION)
        right = tl.exp2(gamma1 - middle)
        if SCALED:
            right *= load_column(lam + tl.minimum(HEIGHT, L - 1), token, rows, stride_s, D, D)
        joined = across * right[:, None] * tl.exp2(middle - gamma0)[None, :]
        o1 = tl.dot(joined.to(dtype), v0, o1, input_precision=PRECISION)

        # the nodes on its left, the nearest first
        rest, log = block, 0.0
        for _ in range(count):
            node = slot - block + rest - 1
            place = node.to(tl.int64) * H + head
            state = tl.load(nodes + place * K * V + tile, mask=in_tile, other=0.0).to(dtype)
            weight0, weight1 = tl.exp2(gamma0 + log) * scale, tl.exp2(gamma1 + log) * scale
            if SCALED:
                level = tl.minimum(HEIGHT + 1 + tl.load(heights + node), L - 1)
                weight0 *= load_column(lam + level, token, rows, stride_s, 0, D)
                weight1 *= load_column(lam + level, token, rows, stride_s, D, D)
            o0 += weight0[:, None] * tl.dot(q0, state, input_precision=PRECISION)
            o1 += weight1[:, None] * tl.dot(q1, state, input_precision=PRECISION)
            log += tl.load(logs + place)
            rest = drop_lowest_bit(rest)

        outputs = o + head * stride_oh + first_v
        at = (token + half).to(tl.int64)[:, None] * stride_o + tl.arange(0, BV)[None, :]
        fits = (column < V)[None, :]
        tl.store(outputs + at, o0.to(dtype), mask=(half < rows)[:, None] & fits)
        tl.store(outputs + at + D * stride_o, o1.to(dtype), mask=(half + D < rows)[:, None] & fits)


def read(q, k, v, scales, nodes, logs, gamma, slots: Slots, chunk: int, height: int, scale: float,
         precision: str) -> Tensor:  # fmt: skip
    """o [T, H, V] for q, k [T, G, K], v [T, H, V] and level scales [T, H, L] (None: 1)."""
    (_, groups, key_dim), (_, heads, value_dim) = q.shape, v.shape
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    together = largest_divisor(heads // groups, 8)
    block_k, block_v = max(16, triton.next_power_of_2(key_dim)), max(16, min(64, triton.next_power_of_2(value_dim)))
    scaled = scales is not None
    lam = scales if scaled else v
    _read_kernel[(heads // together, len(slots.token), triton.cdiv(value_dim, block_v))](
        q, k, v, lam, o, nodes, logs, gamma, slots.token, slots.rows, slots.block, slots.height, slots.reads,
        len(slots.token), heads, groups, scale, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0),
        v.stride(1), lam.stride(0), lam.stride(1), o.stride(0), o.stride(1), key_dim, value_dim,
        lam.shape[-1] if scaled else 1, C=chunk, HEIGHT=height, HEADS=together, BK=block_k, BV=block_v,
        SCALED=scaled, PRECISION=precision, num_warps=8, num_stages=3,
    )  # fmt: skip
    return o


def largest_divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if number % d == 0)
