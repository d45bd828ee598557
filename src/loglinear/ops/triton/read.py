"""Down the tree: every chunk reads its own rows, and the nodes on its left, each on its level.

A program takes one chunk and one head. Taking several heads of a group would save products and loads of q and k, but
was slower: what is kept from head to head fills the registers, and fewer programs share a multiprocessor (docs/log.md).

Legend
    N chunks (slots), C rows of a chunk, H heads, G groups, K key width, V value width, L levels
    nodes [N, H, K, V], logs [N, H], gamma [H, N, C]: see `nodes.py`
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    decay_of,
    drop_lowest_bit,
    level_mask,
    load_column,
    load_rows,
    load_state,
    next_power_of_2,
    place_of_node,
    program_place,
    programs,
    store_rows,
)
from loglinear.ops.triton.launch import kernel


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _read_kernel(q, k, v, scales, o, nodes, logs, gamma, tokens, firsts, rows_of, blocks, origins,
                 oldests, heights, reads, N, H, G, scale,
                 stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_s, stride_sh,
                 K: tl.constexpr, V: tl.constexpr, L, C: tl.constexpr, HEIGHT: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    group = head // (H // G)
    token, block, count = tl.load(tokens + slot), tl.load(blocks + slot), tl.load(reads + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    origin = None if origins is None else tl.load(origins + slot)
    oldest = None if oldests is None else tl.load(oldests + slot)
    dtype = v.dtype.element_ty
    queries = load_rows(q + group.to(tl.int64) * stride_qg, token, first, rows, stride_q, C, K, BK, K == BK)
    keys = load_rows(k + group.to(tl.int64) * stride_kg, token, first, rows, stride_k, C, K, BK, K == BK)
    row = tl.arange(0, C)
    lam = scales + head.to(tl.int64) * stride_sh
    sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + row)
    values = load_rows(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, V, BV, V == BV)

    # the rows of the chunk
    mask = level_mask(lam, token, first, rows, stride_s, sums, L, C, HEIGHT, SCALED) * scale
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * mask
    out = tl.dot(scores.to(dtype), values, input_precision=PRECISION)

    # the nodes on its left, the nearest first
    rest, log = block, 0.0
    for step in range(count):
        node = place_of_node(slot, block, origin, oldest, rest, count - step)
        place = node.to(tl.int64) * H + head
        state = load_state(nodes + place * K * V, K, V, BK, BV).to(dtype)
        weight = decay_of(sums + log) * scale
        if SCALED:
            level = tl.minimum(HEIGHT + 1 + tl.load(heights + node), L - 1)
            weight *= load_column(lam + level, token, first, rows, stride_s, C)
        out += weight[:, None] * tl.dot(queries, state, input_precision=PRECISION)
        log += tl.load(logs + place)
        rest = drop_lowest_bit(rest)
    store_rows(o + head * V, out, token, first, rows, H * V, C, V, BV, V == BV)


def read(q, k, v, scales, nodes, logs, gamma, slots: Slots, chunk: int, height: int, scale: float,
         precision: str) -> Tensor:  # fmt: skip
    """o [T, H, V] for q, k [T, G, K], v [T, H, V] and level scales [T, H, L] (None: 1)."""
    (_, groups, key_dim), (_, heads, value_dim) = q.shape, v.shape
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    scaled = scales is not None
    lam = scales if scaled else v
    _read_kernel[programs(heads, len(slots.token))](
        q, k, v, lam, o, nodes, logs, gamma, slots.token, slots.first, slots.rows, slots.block, slots.origin,
        slots.oldest, slots.height, slots.reads, len(slots.token), heads, groups, scale, q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), lam.stride(0), lam.stride(1), key_dim, value_dim,
        lam.shape[-1] if scaled else 1, C=chunk, HEIGHT=height, BK=max(16, next_power_of_2(key_dim)), BV=max(16,
        next_power_of_2(value_dim)), SCALED=scaled, PRECISION=precision, num_warps=4, num_stages=2,
    )  # fmt: skip
    return o
