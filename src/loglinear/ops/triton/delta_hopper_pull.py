"""`_pull_kernel` and `_ascend_kernel` of `delta_backward.py` in one for Hopper, with keys of two or three tiles.

A program has all of a chunk's reads, from the farthest to the nearest. What each gets is made 64 keys at a time, of
tiles that come through a ring of shared memory one after the other: those of U, the queries, and those of P, through
which comes what the read before got. That stays beside the ring, and so does the gradient of the output.

Legend as in `delta_backward.py`, but KT tiles of 64 keys, VT of 128 values
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import add_highest_bit, drop_lowest_bit, place_of_node, program_place, row_exists
from loglinear.ops.triton.delta_hopper import (
    HALF,
    HALF_SUM,
    MOVED_HALF,
    ROWS_OF_HALF,
    SHARED,
    SIZE,
    arrived,
    barrier,
    begin_copy,
    copy_rows,
    copy_wide,
    load_level,
    places_of_columns,
    seen_as,
)
from loglinear.ops.triton.launch import kernel

RING = gl.constexpr(4)  # tiles that have a place in shared memory, the one that is multiplied among them


@gluon.jit
def _copy_one(tile, one: gl.constexpr, queries, state, map, passes, KT: gl.constexpr, VT: gl.constexpr):
    """Begins to bring one of the tiles of a read. P of a node that nothing passes is zero."""
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    each: gl.constexpr = VT + 1 + (KT + 1) // 2  # tiles for 64 keys
    key: gl.constexpr = one // each * HALF
    of_key: gl.constexpr = one % each
    if of_key < VT:
        copy_wide(tile, state + key * V + of_key * SIZE, V, SIZE, True)
    elif of_key == VT:
        begin_copy(seen_as(tile, [SIZE, HALF]), places_of_columns(queries + key, K))
    else:
        column: gl.constexpr = (of_key - VT - 1) * SIZE
        copy_wide(tile, map + key * K + column, K, K - column, passes)


@gluon.jit
def _next_tile(ring, place, one: gl.constexpr, total: gl.constexpr, here, there, goes_on, KT: gl.constexpr,
               VT: gl.constexpr):  # fmt: skip
    """The tile at `place`, which is number `one` of the `total` of a read: waits for it, and begins to bring that which
    comes into the place of the tile before. here, there: queries, U, P, and whether anything passes, of this read and
    the next, if it `goes_on`."""
    arrived(RING - 2)
    ahead: gl.constexpr = one + RING - 1
    tile = ring.index((place + RING - 1) % RING)
    if ahead < total:
        _copy_one(tile, ahead, *here, KT, VT)
    else:
        if goes_on:
            _copy_one(tile, ahead - total, *there, KT, VT)
    async_copy.commit_group()
    return ring.index(place % RING)


@gluon.jit
def _store_carried(carried, pointer, KT: gl.constexpr):
    for key in gl.static_range(KT):
        gl.store(places_of_columns(pointer + key * HALF, KT * HALF), carried.index(key).load(MOVED_HALF))


@gluon.jit
def _of_keys(ring, place, grad, carried, here, there, goes_on, weight, shares, key: gl.constexpr,
             KT: gl.constexpr, VT: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """64 columns of what a read gets, and its part of the gradient of λ.

    shares: whether the read before it had the same queries, so that what these get adds up; None: it never has.
    """
    maps: gl.constexpr = (KT + 1) // 2
    one: gl.constexpr = key * (VT + 1 + maps)
    total: gl.constexpr = KT * (VT + 1 + maps)
    got = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)
    found = gl.zeros([SIZE], gl.float32, ROWS_OF_HALF)
    for tile in gl.static_range(VT):
        right = _next_tile(ring, place + one + tile, one + tile, total, here, there, goes_on, KT, VT)
        got = warpgroup_mma(grad.index(tile), right.permute([1, 0]), got, use_acc=tile > 0, is_async=True)
        got = warpgroup_mma_wait(0, deps=[got])
    queries = _next_tile(ring, place + one + VT, one + VT, total, here, there, goes_on, KT, VT)
    if SCALED:
        found = gl.sum(seen_as(queries, [SIZE, HALF]).load(HALF_SUM).to(gl.float32) * got, 1)
        got *= weight[:, None]
    if shares is not None:
        if shares:
            got += carried.index(key).load(HALF_SUM).to(gl.float32)
    for tile in gl.static_range(maps):
        right = _next_tile(
            ring, place + one + VT + 1 + tile, one + VT + 1 + tile, total, here, there, goes_on, KT, VT
        )  # fmt: skip
        first, second = right.slice(0, HALF, dim=1), right.slice(HALF, HALF, dim=1)
        got = warpgroup_mma(carried.index(2 * tile), first.permute([1, 0]), got, is_async=True)
        if 2 * tile + 1 < KT:
            got = warpgroup_mma(carried.index(2 * tile + 1), second.permute([1, 0]), got, is_async=True)
        got = warpgroup_mma_wait(0, deps=[got])
    return got.to(gl.bfloat16), found


@kernel(gluon.jit, do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _pull_hopper_kernel(grad_o, scales, seen, added, maps, pulled, dscales, tokens, firsts, rows_of, blocks, origins,
                        oldests, heights, reads, variants, places, N, H, stride_g, stride_gh, stride_s, stride_sh, L,
                        HEIGHT: gl.constexpr, KT: gl.constexpr, VT: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """What each read of a chunk gets from the output, from the farthest node to the nearest: gradients of its queries,
    with what comes through the node that they pass next, and of λ."""
    head, slot = program_place()
    rows = gl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token, block, count = gl.load(tokens + slot), gl.load(blocks + slot), gl.load(reads + slot)
    if count == 0:
        return
    first = None if firsts is None else gl.load(firsts + slot)
    origin = None if origins is None else gl.load(origins + slot)
    oldest = None if oldests is None else gl.load(oldests + slot)
    different = count if variants is None else gl.load(variants + slot)
    base = gl.load(places + slot).to(gl.int64) * H + head
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    total: gl.constexpr = KT * (VT + 1 + (KT + 1) // 2)

    grad = gl.allocate_shared_memory(gl.bfloat16, [VT, SIZE, SIZE], SHARED)
    carried = gl.allocate_shared_memory(gl.bfloat16, [KT, SIZE, HALF], SHARED)  # what the read before got
    ring = gl.allocate_shared_memory(gl.bfloat16, [RING, HALF, SIZE], SHARED)
    for tile in gl.static_range(VT):
        copy_rows(grad.index(tile), grad_o + head.to(gl.int64) * stride_gh + tile * SIZE, token, first, rows, stride_g)
    for key in gl.static_range(KT):
        carried.index(key).store(gl.zeros([SIZE, HALF], gl.bfloat16, HALF_SUM))
    # to climb is to begin with the farthest node
    rest = block
    for _ in range(count - 1):
        rest = drop_lowest_bit(rest)
    node = place_of_node(slot, block, origin, oldest, rest, 1)
    at = node.to(gl.int64) * H + head
    here = (
        seen + (base + (different - 1).to(gl.int64) * H) * (SIZE * K), added + at * K * V, maps + at * K * K,
        count < different,
    )  # fmt: skip
    for one in gl.static_range(RING - 1):
        _copy_one(ring.index(one), one, *here, KT, VT)
        async_copy.commit_group()

    row = gl.arange(0, SIZE, ROWS_OF_HALF)
    exists = row_exists(row, first, rows)
    lam, dlam = scales + head.to(gl.int64) * stride_sh, dscales + (token + row).to(gl.int64) * H * L + head * L
    last = gl.zeros([SIZE], gl.float32, ROWS_OF_HALF)  # for the last level, which may have several nodes
    for step in range(count):
        number = count - 1 - step
        level = gl.minimum(HEIGHT + 1 + gl.load(heights + node), L - 1)
        weight = last
        if SCALED:
            weight = load_level(lam, row, token, first, rows, stride_s, level, L)
        rest = add_highest_bit(rest, block)
        node = place_of_node(slot, block, origin, oldest, rest, step + 2)
        at = node.to(gl.int64) * H + head
        there = (
            seen + (base + gl.minimum(number - 1, different - 1).to(gl.int64) * H) * (SIZE * K), added + at * K * V,
            maps + at * K * K, number < different,
        )  # fmt: skip
        shares = None if variants is None else number + 1 >= different
        found = gl.zeros([SIZE], gl.float32, ROWS_OF_HALF)
        results = ()
        for key in gl.static_range(KT):
            result, part = _of_keys(
                ring, step * total, grad, carried, here, there, number > 0, weight, shares, key, KT, VT, SCALED
            )  # fmt: skip
            results = results + (result,)
            found += part
        if SCALED:
            if level < L - 1:
                gl.store(dlam + level, found, mask=exists)
            else:
                last += found
        barrier()
        for key in gl.static_range(KT):
            carried.index(key).store(results[key])
        if number < different:
            barrier()
            _store_carried(carried, pulled + (base + number.to(gl.int64) * H) * (SIZE * K), KT)
        here = there
    async_copy.wait_group(0)
    if SCALED:
        gl.store(dlam + (L - 1), last, mask=exists)
