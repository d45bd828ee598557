"""`_read_kernel` of `delta_read.py` for Hopper, with keys of two or three tiles and values of whole ones of 128.

A program has 128 columns of a chunk's output. Each read is a product of KT pairs of tiles, 64 columns of the queries
and as many rows of U. Shared memory holds two reads: while the tiles of one are multiplied, those of the next arrive.

Legend as in `delta_read.py`, but KT tiles of 64 keys, VT of 128 columns of the values
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import drop_lowest_bit, place_of_node, program_place, row_exists
from loglinear.ops.triton.delta_hopper import (
    HALF,
    MATRIX,
    MOVED,
    ROWS,
    SHARED,
    SIZE,
    WHOLE_SUM,
    arrived,
    begin_copy,
    load_level,
    places_of_columns,
    places_of_half_rows,
    places_of_rows,
)
from loglinear.ops.triton.launch import kernel

READS = gl.constexpr(2)  # that have a place in shared memory


@gluon.jit
def _copy_values(tile, v, token, first, rows, stride):
    """Begins to bring 128 columns of 64 rows of the values to shared memory: zero where there is none."""
    row = gl.arange(0, HALF, gl.SliceLayout(1, MOVED))
    at = places_of_half_rows(v + token.to(gl.int64) * stride, stride)
    begin_copy(tile, at, mask=row_exists(row, first, rows)[:, None])


@kernel(gluon.jit, do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _read_hopper_kernel(v, scales, o, scores, seen, added, tokens, firsts, rows_of, blocks, origins, oldests, heights,
                        reads, variants, places, N, H, stride_v, stride_vh, stride_s, stride_sh, L,
                        HEIGHT: gl.constexpr, KT: gl.constexpr, VT: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """128 columns of what the rows of one chunk read."""
    part, slot = program_place()
    head, column = part // VT, part % VT * SIZE
    rows = gl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token, block, count = gl.load(tokens + slot), gl.load(blocks + slot), gl.load(reads + slot)
    first = None if firsts is None else gl.load(firsts + slot)
    later = None if first is None else first - HALF  # as if the second half were a chunk
    origin = None if origins is None else gl.load(origins + slot)
    oldest = None if oldests is None else gl.load(oldests + slot)
    different = count if variants is None else gl.load(variants + slot)
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    queries = seen + (gl.load(places + slot).to(gl.int64) * H + head) * (SIZE * K)
    added += head.to(gl.int64) * K * V + column

    lefts = gl.allocate_shared_memory(gl.bfloat16, [READS * KT, SIZE, HALF], SHARED)
    rights = gl.allocate_shared_memory(gl.bfloat16, [READS * KT, HALF, SIZE], SHARED)
    # the rows of the chunk, in the place of a second read, and the first read
    scores += (slot.to(gl.int64) * H + head) * MATRIX
    v += head.to(gl.int64) * stride_vh + column
    begin_copy(lefts.index(KT), places_of_columns(scores, SIZE))
    _copy_values(rights.index(KT), v, token, first, rows, stride_v)
    async_copy.commit_group()
    begin_copy(lefts.index(KT + 1), places_of_columns(scores + HALF, SIZE))
    _copy_values(rights.index(KT + 1), v, token + HALF, later, rows - HALF, stride_v)
    async_copy.commit_group()
    rest = block
    node = place_of_node(slot, block, origin, oldest, rest, count)
    for tile in gl.static_range(KT):
        if count > 0:
            begin_copy(lefts.index(tile), places_of_columns(queries + tile * HALF, K))
            begin_copy(
                rights.index(tile), places_of_half_rows(added + (node.to(gl.int64) * H * K + tile * HALF) * V, V)
            )
        async_copy.commit_group()
    row = gl.arange(0, SIZE, ROWS)
    lam = scales + head.to(gl.int64) * stride_sh
    height = gl.load(heights + node, mask=count > 0, other=0)

    out = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    arrived(KT + 1)
    out = warpgroup_mma(lefts.index(KT), rights.index(KT), out, use_acc=False, is_async=True)
    arrived(KT)
    out = warpgroup_mma(lefts.index(KT + 1), rights.index(KT + 1), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])
    for number in range(count):
        here, there = number % READS * KT, (number + 1) % READS * KT
        rest = drop_lowest_bit(rest)
        node = place_of_node(slot, block, origin, oldest, rest, count - number - 1)
        queries += gl.where(number + 1 < different, H * SIZE * K, 0)
        read = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
        for tile in gl.static_range(KT):
            arrived(KT - 1)
            read = warpgroup_mma(
                lefts.index(here + tile), rights.index(here + tile), read, use_acc=tile > 0, is_async=True
            )
            if number + 1 < count:
                begin_copy(lefts.index(there + tile), places_of_columns(queries + tile * HALF, K))
                begin_copy(
                    rights.index(there + tile),
                    places_of_half_rows(added + (node.to(gl.int64) * H * K + tile * HALF) * V, V),
                )
            async_copy.commit_group()
        if SCALED:
            weight = load_level(lam, row, token, first, rows, stride_s, HEIGHT + 1 + height, L)
            height = gl.load(heights + node, mask=number + 1 < count, other=0)
            read = warpgroup_mma_wait(0, deps=[read])
            read *= weight[:, None]
        else:
            read = warpgroup_mma_wait(0, deps=[read])
        out += read
    async_copy.wait_group(0)
    o += head * V + column
    at, exists = places_of_rows(o, token, first, rows, H * V, SIZE, MOVED)
    gl.store(at, gl.convert_layout(out.to(gl.bfloat16), MOVED), mask=exists)
