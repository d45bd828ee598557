"""Down the tree, for the delta rule: chunks read the nodes on their left, and their queries pass what they have read.

Queries first, from node to node, all of them kept (R ↦ R P); then every chunk's output, a sum of products over all of
its reads. Buckets that are carried in are read last, and all with the same queries. Where one program has room for all
columns (see `walks`) and no gradient wants the queries, it reads on the way instead, and keeps none.

Legend
    N slots, C rows of a chunk, H heads, K key width, V value width, L levels
    M variants of the queries of all chunks, as many as `variants` says for each: one for each read, or one for all
    buckets that are carried in
    KT tiles of BK keys; seen [M, H, C, K], scores [N, H, C, C]: see `delta_chunks.py`
    added [N, H, K, V], maps [2, N, H, PARTS, K, K], or those of `Kept` [N, H, K, K]: see `delta_nodes.py`
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    cdiv,
    decay_of,
    decays_between,
    drop_lowest_bit,
    level_factor,
    load_column,
    place_of_node,
    program_place,
    programs,
)
from loglinear.ops.triton.delta_chunks import (
    HOPPER_WARPS,
    Chunks,
    has_room_for_keys,
    hopper_kernel,
    in_parts,
    load_block,
    load_quarters,
    load_tile,
    parts_of,
    store_block,
    store_quarters,
    store_tile,
    takes_hopper,
    takes_hopper_wide,
    tile_width,
    warps_of,
    whole_width,
)
from loglinear.ops.triton.delta_nodes import Kept, Nodes
from loglinear.ops.triton.launch import kernel


@kernel(do_not_specialize=["N"])
def _descend_kernel(seen, maps, rows_of, blocks, heights, variants, places, N, H, K, C: tl.constexpr,
                    ROWS: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """The queries of one chunk as they meet each node that it reads, the nearest first.

    heights: None where every P is in its place. Where one tile has all keys (KT = 1) ROWS of the queries stay in
    registers on the way; else a program has all rows.
    """
    part, slot = program_place()
    head, start = part // (C // ROWS), part % (C // ROWS) * ROWS
    if tl.load(rows_of + slot, mask=slot < N, other=0) == 0:
        return
    block, count = tl.load(blocks + slot), tl.load(variants + slot)
    if count <= 1:
        return
    here = (tl.load(places + slot).to(tl.int64) * H + head) * C * K
    rest = block
    dtype = seen.dtype.element_ty
    if KT == 1:
        queries = load_block(seen + here, start, C, ROWS, 0, K, BK)
    for number in range(count - 1):
        node = place_of_node(slot, block, None, None, rest, count - number)  # buckets are not passed
        map = maps + (node.to(tl.int64) * H + head) * PARTS * K * K
        if heights is not None:
            map += (tl.load(heights + node) % 2).to(tl.int64) * N * H * PARTS * K * K
        there = here + H * C * K
        if KT == 1:
            passed = tl.dot(queries, load_block(map, 0, K, BK, 0, K, BK), input_precision=PRECISION)
            queries = passed.to(dtype)
            store_block(seen + there, queries, start, C, ROWS, 0, K, BK)
        else:
            for column in range(KT):
                total = tl.zeros((ROWS, BK), tl.float32)
                for key in range(KT):
                    before = load_block(seen + here, 0, C, ROWS, key * BK, K, BK)
                    total = tl.dot(before, load_block(map, key * BK, K, BK, column * BK, K, BK), total,
                                   input_precision=PRECISION)  # fmt: skip
                store_block(seen + there, total.to(dtype), 0, C, ROWS, column * BK, K, BK)
            tl.debug_barrier()
        here = there
        rest = drop_lowest_bit(rest)


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _read_kernel(v, scales, o, scores, seen, added, tokens, firsts, rows_of, blocks, origins, oldests, heights, reads,
                 variants, places, N, H, stride_v, stride_vh, stride_s, stride_sh, K, V, L, C: tl.constexpr,
                 HEIGHT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                 SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BV columns of what the rows of one chunk read."""
    part, slot = program_place()
    head, tile = part // VT, part % VT
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token, block, count = tl.load(tokens + slot), tl.load(blocks + slot), tl.load(reads + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    origin = None if origins is None else tl.load(origins + slot)
    oldest = None if oldests is None else tl.load(oldests + slot)
    different = None if variants is None else tl.load(variants + slot)
    column = tile * BV
    values = load_tile(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, column, V, BV)
    inside = load_block(scores + (slot.to(tl.int64) * H + head) * C * C, 0, C, C, 0, C, C)
    out = tl.dot(inside, values, input_precision=PRECISION)
    lam = scales + head.to(tl.int64) * stride_sh
    queries = seen + (tl.load(places + slot).to(tl.int64) * H + head) * C * K
    rest = block
    for number in range(count):
        node = place_of_node(slot, block, origin, oldest, rest, count - number)
        state = added + (node.to(tl.int64) * H + head) * K * V
        read = tl.zeros((C, BV), tl.float32)
        for key in range(KT):
            read = tl.dot(load_block(queries, 0, C, C, key * BK, K, BK),
                          load_block(state, key * BK, K, BK, column, V, BV), read,
                          input_precision=PRECISION)  # fmt: skip
        if SCALED:
            level = tl.minimum(HEIGHT + 1 + tl.load(heights + node), L - 1)
            read *= load_column(lam + level, token, first, rows, stride_s, C)[:, None]
        out += read
        if different is None:
            queries += H * C * K
        else:
            queries += tl.where(number + 1 < different, H * C * K, 0)
        rest = drop_lowest_bit(rest)
    store_tile(o + head * V, out, token, first, rows, H * V, C, column, V, BV)


@triton.jit
def _scores_of(q, k, beta, inverse, kept, sums, token, first, rows, place, size, scale, stride_q, stride_k, stride_b, K,
              C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores before λ, float32, which fill in `kept` too, and queries as seen from S. size: of a part of X."""
    row = tl.arange(0, C)
    queries = load_tile(q, token, first, rows, stride_q, C, 0, K, BK)
    keys = load_tile(k, token, first, rows, stride_k, C, 0, K, BK)
    dtype = queries.dtype
    product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    product = tl.where(row[:, None] >= row[None, :], product * decays_between(sums, sums) * scale, 0.0)
    whole, lost = in_parts(product, dtype)
    matrix = load_quarters(inverse, place, C // 2)
    mixed = tl.dot(whole, matrix, input_precision=PRECISION)
    if PARTS == 2:
        mixed = tl.dot(lost, matrix, mixed, input_precision=PRECISION)
        mixed = tl.dot(whole, load_quarters(inverse + size, place, C // 2), mixed, input_precision=PRECISION)
    mixed *= load_column(beta, token, first, rows, stride_b, C)[None, :]
    if kept is not None:
        store_quarters(kept, mixed, place, C // 2)
    entering = decay_of(sums)
    passing, lost = in_parts(mixed * entering[None, :], dtype)
    passed = tl.dot(passing, keys, input_precision=PRECISION)
    if PARTS == 2:
        passed = tl.dot(lost, keys, passed, input_precision=PRECISION)
    seen = queries.to(tl.float32) * (entering * scale)[:, None] - passed
    return mixed, seen.to(dtype)


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _walk_kernel(q, k, v, scales, beta, inverse, gamma, mixed, o, added, maps, tokens, firsts, rows_of, blocks, origins,
                 oldests, heights, reads, N, H, G, scale, stride_q, stride_qg, stride_k, stride_kg, stride_v,
                 stride_vh, stride_s, stride_sh, stride_b, K, V, L, C: tl.constexpr, HEIGHT: tl.constexpr,
                 BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """What the rows of one chunk read: its queries meet one node after the other, the nearest first. Buckets that are
    carried in pass them as they are, for P = I."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token, block, count = tl.load(tokens + slot), tl.load(blocks + slot), tl.load(reads + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    origin = None if origins is None else tl.load(origins + slot)
    oldest = None if oldests is None else tl.load(oldests + slot)
    place = slot.to(tl.int64) * H + head
    lam = scales + head.to(tl.int64) * stride_sh
    group = head // (H // G)
    size = N.to(tl.int64) * H * 3 * (C * C // 4)  # of a part of X
    sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + tl.arange(0, C))
    inside, queries = _scores_of(
        q + group.to(tl.int64) * stride_qg, k + group.to(tl.int64) * stride_kg, beta + head, inverse, mixed, sums,
        token, first, rows, place, size, scale, stride_q, stride_k, stride_b, K, C, BK, PARTS, PRECISION,
    )  # fmt: skip
    if SCALED:
        inside *= level_factor(lam, token, first, rows, stride_s, L, C, HEIGHT)
    inside = inside.to(queries.dtype)
    values = load_tile(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, 0, V, BV)
    out = tl.dot(inside, values, input_precision=PRECISION)
    rest = block
    for number in range(count - 1):
        node = place_of_node(slot, block, origin, oldest, rest, count - number)
        height = tl.load(heights + node)
        here = node.to(tl.int64) * H + head
        map = maps + ((height % 2).to(tl.int64) * N * H + here) * PARTS * K * K
        read = tl.dot(queries, load_block(added + here * K * V, 0, K, BK, 0, V, BV), input_precision=PRECISION)
        if SCALED:
            level = tl.minimum(HEIGHT + 1 + height, L - 1)
            read *= load_column(lam + level, token, first, rows, stride_s, C)[:, None]
        out += read
        passed = tl.dot(queries, load_block(map, 0, K, BK, 0, K, BK), input_precision=PRECISION)
        queries = passed.to(queries.dtype)
        rest = drop_lowest_bit(rest)
    if count > 0:
        node = place_of_node(slot, block, origin, oldest, rest, 1)
        state = load_block(added + (node.to(tl.int64) * H + head) * K * V, 0, K, BK, 0, V, BV)
        read = tl.dot(queries, state, input_precision=PRECISION)
        if SCALED:
            level = tl.minimum(HEIGHT + 1 + tl.load(heights + node), L - 1)
            read *= load_column(lam + level, token, first, rows, stride_s, C)[:, None]
        out += read
    store_tile(o + head * V, out, token, first, rows, H * V, C, 0, V, BV)


def reading_tables(slots: Slots, variants: Tensor) -> tuple[Tensor | None, ...]:
    """What tells a chunk its nodes, and which queries it reads each with: every one with its own where no state is
    carried in, and kernels that are given None compile to less."""
    carried = slots.origin is not None
    return slots.block, slots.origin, slots.oldest, slots.height, slots.reads, variants if carried else None


def descend(chunks: Chunks, nodes: Nodes | Kept, slots: Slots, variants: Tensor, places: Tensor, chunk: int,
            precision: str) -> None:  # fmt: skip
    """Fills in the rest of `chunks.seen`."""
    num_slots, (heads, key_dim) = len(slots.token), chunks.seen.shape[1::2]
    whole, grown = has_room_for_keys(chunks.seen), isinstance(nodes, Nodes)  # grown: P has changed places
    block, rows = whole_width(key_dim) if whole else tile_width(key_dim), min(chunk, 64) if whole else chunk
    _descend_kernel[programs(heads * (chunk // rows), num_slots)](
        chunks.seen, nodes.maps, slots.rows, slots.block, slots.height if grown else None, variants, places, num_slots,
        heads, key_dim, C=chunk, ROWS=rows, KT=cdiv(key_dim, block), BK=block,
        PARTS=nodes.maps.shape[3] if grown else 1, PRECISION=precision, num_warps=4, num_stages=1 if whole else 3,
    )  # fmt: skip


def walk(q, k, v, scales, beta, chunks: Chunks, nodes: Nodes, slots: Slots, chunk: int, height: int, scale: float,
         precision: str) -> Tensor:  # fmt: skip
    """As `descend` and `read`, and what makes scores and queries, which are not stored; fills in `chunks.mixed`, if
    there is room for it."""
    num_slots, (_, groups, key_dim), (_, heads, value_dim) = len(slots.token), q.shape, v.shape
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    scaled = scales is not None
    lam = scales if scaled else v
    arguments = (
        q, k, v, lam, beta, chunks.inverse, chunks.gamma, chunks.mixed, o, nodes.added, nodes.maps, slots.token,
        slots.first, slots.rows, slots.block, slots.origin, slots.oldest, slots.height, slots.reads,
        num_slots, heads, groups, scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *lam.stride()[:2],
        beta.stride(0),
    )  # fmt: skip
    num_levels = lam.shape[-1] if scaled else 1
    if takes_hopper(chunk, q, k, v):
        hopper_kernel("walk")[programs(heads, num_slots)](
            *arguments, num_levels, HEIGHT=height, SCALED=scaled, num_warps=HOPPER_WARPS
        )
        return o
    _walk_kernel[programs(heads, num_slots)](
        *arguments, key_dim, value_dim, num_levels, C=chunk, HEIGHT=height,
        BK=whole_width(key_dim), BV=whole_width(value_dim), PARTS=parts_of(k), SCALED=scaled,
        PRECISION=precision, num_warps=warps_of(chunk), num_stages=3,
    )  # fmt: skip
    return o


def read(v: Tensor, scales: Tensor | None, chunks: Chunks, nodes: Nodes, slots: Slots, variants: Tensor,
         places: Tensor, chunk: int, height: int, precision: str) -> Tensor:  # fmt: skip
    """o [T, H, V] for v [T, H, V] and level scales [T, H, L] (None: 1), after `descend`."""
    num_slots, (_, heads, value_dim), key_dim = len(slots.token), v.shape, chunks.seen.shape[-1]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block_k, block_v = tile_width(key_dim), tile_width(value_dim)
    if v.dtype == torch.bfloat16:  # of float32 only so much fits
        block_v = tile_width(value_dim, 2 * block_v)
    scaled = scales is not None
    lam = scales if scaled else v
    values = cdiv(value_dim, block_v)
    arguments = (
        v, lam, o, chunks.scores, chunks.seen, nodes.added, slots.token, slots.first, slots.rows,
        *reading_tables(slots, variants), places, num_slots, heads, *v.stride()[:2], *lam.stride()[:2],
    )  # fmt: skip
    num_levels = lam.shape[-1] if scaled else 1
    shape = {"HEIGHT": height, "KT": cdiv(key_dim, block_k), "VT": values, "SCALED": scaled}
    if takes_hopper_wide(chunk, key_dim, v):
        hopper_kernel("read")[programs(heads * values, num_slots)](
            *arguments, num_levels, **shape, num_warps=HOPPER_WARPS
        )
        return o
    _read_kernel[programs(heads * values, num_slots)](
        *arguments, key_dim, value_dim, num_levels, C=chunk, BK=block_k, BV=block_v, PRECISION=precision,
        num_warps=warps_of(chunk), num_stages=3, **shape,
    )  # fmt: skip
    return o
