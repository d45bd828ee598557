"""`_gather_kernel` of `delta_backward.py` for Hopper, with keys of two or three tiles.

A program has 128 columns of the gradient of a node's U or P. Shared memory holds two readers: the queries that meet the
node, in tiles of 64 keys, and 128 columns of the gradient of the output, or of that of the queries after the node.
While the products of a reader are under way, the next one arrives.

Legend as in `delta_backward.py`, but KT tiles of 64 keys, VT of 128 values
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from loglinear.ops.triton.common import program_place
from loglinear.ops.triton.delta_hopper import (
    EACH,
    HALF,
    MOVED,
    SHARED,
    SIZE,
    arrived,
    barrier,
    begin_copy,
    load_column,
    load_if,
    new_line,
    places_of_columns,
    places_of_rows,
    seen_as,
)
from loglinear.ops.triton.launch import kernel

READERS = gl.constexpr(2)  # that have a place in shared memory
SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))  # of products, [64, 128]


@gluon.jit
def _copy_columns(tile, pointer, token, first, rows, stride, left):
    """Begins to bring 128 columns of the rows of a chunk to shared memory, or as many as are left: zero beyond."""
    at, exists = places_of_rows(pointer, token, first, rows, stride, SIZE, MOVED)
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    begin_copy(tile, at, mask=exists & (column < left)[None, :])


@gluon.jit
def _copy_reader(queries, rights, buffer, token, first, rows, read, passed, tile, grad_o, seen, pulled, H, head,
                 stride_g, KT: gl.constexpr, VT: gl.constexpr):  # fmt: skip
    """Begins to bring what a reader has for the node. Nothing is after a node that no queries pass: zero."""
    K: gl.constexpr = KT * HALF
    at = places_of_columns(seen + (read.to(gl.int64) * H + head) * (SIZE * K), K)
    for key in gl.static_range(KT):
        begin_copy(queries.index(buffer * KT + key), at + key * HALF)
    if tile < VT:
        _copy_columns(rights.index(buffer), grad_o + tile * SIZE, token, first, rows, stride_g, SIZE)
    else:
        start = (tile - VT) * SIZE
        next_read = (read + 1).to(gl.int64) * H + head
        _copy_columns(
            rights.index(buffer), pulled + start, next_read * SIZE, None, gl.where(passed, SIZE, 0), K, K - start
        )


@gluon.jit
def _store(tile, total, pointer, key: gl.constexpr, width, left):
    """64 rows of a gradient, through shared memory."""
    tile = seen_as(tile, [HALF, SIZE])
    tile.store(total.to(gl.bfloat16))
    barrier()
    row = gl.arange(0, HALF, gl.SliceLayout(1, MOVED))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    at = pointer + ((key * HALF + row)[:, None] * width + column[None, :])
    gl.store(at, tile.load(MOVED), mask=(column < left)[None, :])


@kernel(gluon.jit, do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _gather_wide_hopper_kernel(grad_o, scales, seen, pulled, d_added, d_maps, tokens, firsts, rows_of, heights, lefts,
                               variants, places, reader, readers, order, N, H, stride_g, stride_gh, stride_s,
                               stride_sh, L, HEIGHT: gl.constexpr, KT: gl.constexpr, VT: gl.constexpr,
                               SCALED: gl.constexpr):  # fmt: skip
    """128 columns of the gradient of a node's U or P, from the chunks that read it."""
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    part, number = program_place()
    tiles: gl.constexpr = VT + (KT + 1) // 2
    head, tile = part // tiles, part % tiles
    slot = load_if(order, number < N, number)
    chunk, span = gl.load(reader + slot), load_if(readers, number < N, slot)
    height = gl.load(heights + slot)
    written = (span > 0) | (load_if(lefts, (number < N) & (span == 0), slot) != 0)
    lam = scales + head.to(gl.int64) * stride_sh + gl.minimum(HEIGHT + 1 + height, L - 1)
    grad_o += head.to(gl.int64) * stride_gh

    queries = gl.allocate_shared_memory(gl.bfloat16, [READERS * KT, SIZE, HALF], SHARED)
    rights = gl.allocate_shared_memory(gl.bfloat16, [READERS, SIZE, SIZE], SHARED)
    weight_line = new_line()
    each = gl.arange(0, SIZE, EACH)
    weight, next_weight = gl.zeros([SIZE], gl.float32, EACH), gl.zeros([SIZE], gl.float32, EACH)

    # of the first reader, this node is the nearest; if a bucket, it shares that one's only queries with the others
    nearest = load_if(variants, span > 0, chunk)
    passed = nearest > 1
    read0 = load_if(places, span > 0, chunk)
    read1 = load_if(places, span > 1, chunk + 1) + load_if(variants, span > 1, chunk + 1) - nearest
    token0, token1 = load_if(tokens, span > 0, chunk), load_if(tokens, span > 1, chunk + 1)
    rows0, rows1 = load_if(rows_of, span > 0, chunk), load_if(rows_of, span > 1, chunk + 1)
    first0 = None if firsts is None else load_if(firsts, span > 0, chunk)
    first1 = None if firsts is None else load_if(firsts, span > 1, chunk + 1)
    if span > 0:
        _copy_reader(queries, rights, 0, token0, first0, rows0, read0, passed, tile, grad_o, seen, pulled, H, head,
                     stride_g, KT, VT)  # fmt: skip
    async_copy.commit_group()
    if span > 1:
        _copy_reader(queries, rights, 1, token1, first1, rows1, read1, passed, tile, grad_o, seen, pulled, H, head,
                     stride_g, KT, VT)  # fmt: skip
    async_copy.commit_group()
    if SCALED:
        weight = load_column(lam, each, token0, first0, rows0, stride_s)
        next_weight = load_column(lam, each, token1, first1, rows1, stride_s)

    total0 = gl.zeros([HALF, SIZE], gl.float32, SUM)
    total1, total2 = total0, total0
    for step in range(span):
        buffer = step % READERS
        # where the one after the next lies; copied when its place is free
        is_reader = step + READERS < span
        later = chunk + step + READERS
        token, rows = load_if(tokens, is_reader, later), load_if(rows_of, is_reader, later)
        first = None if firsts is None else load_if(firsts, is_reader, later)
        read = load_if(places, is_reader, later) + load_if(variants, is_reader, later) - nearest
        if SCALED:
            weight_line.store(weight)
        arrived(1)
        right = rights.index(buffer)
        if SCALED:
            if tile < VT:
                scaled = right.load(MOVED).to(gl.float32) * weight_line.load(gl.SliceLayout(1, MOVED))[:, None]
                barrier()
                right.store(scaled.to(gl.bfloat16))
                fence_async_shared()
                barrier()
            weight, next_weight = next_weight, load_column(lam, each, token, first, rows, stride_s)
        at = buffer * KT
        total0 = warpgroup_mma(queries.index(at).permute([1, 0]), right, total0, is_async=True)
        total1 = warpgroup_mma(queries.index(at + 1).permute([1, 0]), right, total1, is_async=True)
        if KT == 3:
            total2 = warpgroup_mma(queries.index(at + 2).permute([1, 0]), right, total2, is_async=True)
        total0, total1, total2 = warpgroup_mma_wait(0, deps=[total0, total1, total2])
        barrier()
        if is_reader:
            _copy_reader(queries, rights, buffer, token, first, rows, read, passed, tile, grad_o, seen, pulled, H,
                         head, stride_g, KT, VT)  # fmt: skip
        async_copy.commit_group()
    async_copy.wait_group(0)

    if written:
        place = slot.to(gl.int64) * H + head
        is_value = tile < VT
        width = gl.where(is_value, V, K)
        left = gl.where(is_value, SIZE, K - (tile - VT) * SIZE)
        target = d_added + place * (K * V) + tile * SIZE
        if tile >= VT:
            target = d_maps + place * (K * K) + (tile - VT) * SIZE
        _store(queries.index(0), total0, target, 0, width, left)
        _store(queries.index(1), total1, target, 1, width, left)
        if KT == 3:
            _store(queries.index(2), total2, target, 2, width, left)
