"""`_merge_kernel` of `delta_nodes.py` for Hopper, with keys of two or three tiles and values of whole ones of 128.

One program has all of a node, and asks for each matrix once. Both parts of its P stay in shared memory, in tiles of 64
columns: of the first 128 rows, and of the others where there are any. Everything else comes through a ring of tiles of
16 KB in the order in which it is taken, 128 columns at a time: U of the left sibling, by 64 keys; U of the node, which
is added to the products, as two tiles [128, 64] of the first rows and one [64, 128] of the others; and at last P of the
left sibling, by 64 keys, each part by itself. Where 64 columns are left, a tile has both parts, one below the other.

U goes out through the tiles in which it came, while the next columns are being multiplied, and so do 128 columns of P
while the last 64 are.

Legend as in `delta_nodes.py`, but KT tiles of 64 keys, VT of 128 values
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import left_sibling, program_place
from loglinear.ops.triton.delta_hopper import (
    HALF,
    HALF_SUM,
    MOVED,
    MOVED_HALF,
    SHARED,
    SIZE,
    WHOLE_SUM,
    arrived,
    barrier,
    begin_copy,
    in_halves,
    in_parts,
    seen_as,
)
from loglinear.ops.triton.launch import kernel

RING = gl.constexpr(5)  # tiles that have a place in shared memory, those that are multiplied among them
LOWER_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))  # of products, [64, 128]
LOWER_HALF_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))  # [64, 64]


@gluon.jit
def _new_tile(HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Shared memory, [1, HEIGHT, WIDTH]: see `_multiply`."""
    return gl.allocate_shared_memory(gl.bfloat16, [1, HEIGHT, WIDTH], SHARED)


@gluon.jit
def _zero(slots):
    """Read anew every time, so that the compiler does not know what it is: the least of a slot and zero."""
    return gl.minimum(gl.load(slots), 0)


@gluon.jit
def _places(pointer, stride, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Where part of a matrix [.., stride] is, 64 or 128 columns, as threads move them."""
    LAYOUT: gl.constexpr = MOVED if WIDTH == SIZE else MOVED_HALF
    row = gl.arange(0, HEIGHT, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    return pointer + (row[:, None] * stride + column[None, :])


@gluon.jit
def _store_tile(tile, pointer, stride):
    """A tile of shared memory, to part of a matrix."""
    LAYOUT: gl.constexpr = MOVED if tile.shape[1] == SIZE else MOVED_HALF
    gl.store(_places(pointer, stride, tile.shape[0], tile.shape[1]), tile.load(LAYOUT))


@gluon.jit
def _tile_of_piece(ring, one: gl.constexpr, piece: gl.constexpr):
    """Tile number `one` as a piece of 128 columns: the first rows of either half of them, or the other rows of all."""
    if piece < 2:
        return seen_as(ring[one % RING].index(0), [SIZE, HALF])
    else:
        return ring[one % RING].index(0)


@gluon.jit
def _place_of_piece(piece: gl.constexpr, stride: gl.constexpr):
    """Where such a piece of 128 columns begins."""
    if piece < 2:
        return piece * HALF
    else:
        return SIZE * stride


@gluon.jit
def _copy_one(ring, one: gl.constexpr, sources, KT: gl.constexpr, VT: gl.constexpr):
    """Begins to bring tile number `one`, if there is one. sources: U of the node, and U and P of its left sibling."""
    added, added_left, map_left = sources
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    maps: gl.constexpr = one - 2 * KT * VT  # number among those of P
    lasts: gl.constexpr = maps - 2 * KT  # and of its last 64 columns
    tile = ring[one % RING].index(0)
    if maps < 0:
        column: gl.constexpr = one // (2 * KT) * SIZE
        key: gl.constexpr = one % (2 * KT)
        piece: gl.constexpr = key - KT
        if key < KT:
            begin_copy(tile, _places(added_left + key * HALF * V + column, V, HALF, SIZE))
        elif piece < 2:
            at = _places(added + column + _place_of_piece(piece, V), V, SIZE, HALF)
            begin_copy(_tile_of_piece(ring, one, piece), at)
        else:
            begin_copy(tile, _places(added + column + _place_of_piece(piece, V), V, HALF, SIZE))
    elif lasts < 0:
        begin_copy(tile, _places(map_left + maps % 2 * K * K + maps // 2 * HALF * K, K, HALF, SIZE))
    elif lasts < KT * (KT - 2):
        row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED_HALF))
        column = gl.arange(0, HALF, gl.SliceLayout(0, MOVED_HALF))
        at = (row // HALF * (K * K) + row % HALF * K)[:, None] + column[None, :]
        begin_copy(seen_as(tile, [SIZE, HALF]), map_left + lasts * HALF * K + SIZE + at)
    async_copy.commit_group()


@gluon.jit
def _new_sums(WIDTH: gl.constexpr, KT: gl.constexpr):
    """Of products of P with so many columns: the first 128 rows, and the others."""
    WHOLE: gl.constexpr = WHOLE_SUM if WIDTH == SIZE else HALF_SUM
    LOWER: gl.constexpr = LOWER_SUM if WIDTH == SIZE else LOWER_HALF_SUM
    sums = (gl.zeros([SIZE, WIDTH], gl.float32, WHOLE),)
    if KT == 3:
        sums = sums + (gl.zeros([HALF, WIDTH], gl.float32, LOWER),)
    return sums


@gluon.jit
def _multiply(map, key: gl.constexpr, right, zero, sums, adds: gl.constexpr, KT: gl.constexpr):
    """Begins to multiply 64 columns of a part of P.

    Where tiles are is told by a `_zero`: else the compiler keeps what it has found out about all of them, for there are
    many products with each, and has no registers left for anything else.
    """
    found = ()
    for rows in gl.static_range(KT - 1):
        left = map[key * (KT - 1) + rows].index(zero)
        found = found + (warpgroup_mma(left, right, sums[rows], use_acc=adds, is_async=True),)
    return found


@gluon.jit
def _wait(sums, later: gl.constexpr, KT: gl.constexpr):
    """The sums, when all products are done but the last, so many."""
    if KT == 3:
        upper, lower = warpgroup_mma_wait(later, deps=[sums[0], sums[1]])
        return upper, lower
    else:
        return (warpgroup_mma_wait(later, deps=[sums[0]]),)


@gluon.jit
def _next_in_place(ring, one: gl.constexpr, sums, later: gl.constexpr, sources, KT: gl.constexpr, VT: gl.constexpr):
    """When the products with tile number `one` are done, all but the `later` ones, begins to bring what comes in its
    place."""
    sums = _wait(sums, later, KT)
    barrier()
    _copy_one(ring, one + RING, sources, KT, VT)
    return sums


@gluon.jit
def _in_pieces(sums, KT: gl.constexpr):
    """Sums of 128 columns, as U of the node comes."""
    if KT == 3:
        return in_halves(sums[0]) + (sums[1],)
    else:
        return in_halves(sums[0])


@gluon.jit
def _add_own(ring, one: gl.constexpr, sums, KT: gl.constexpr):
    """128 columns of U, rounded, piece by piece. They came as the tiles from number `one` on."""
    pieces, found = _in_pieces(sums, KT), ()
    for piece in gl.static_range(KT):
        own = _tile_of_piece(ring, one + piece, piece).load(HALF_SUM if piece < 2 else LOWER_SUM)
        found = found + ((pieces[piece] + own.to(gl.float32)).to(gl.bfloat16),)
    return found


@gluon.jit
def _store_added(ring, one: gl.constexpr, pieces, sources, KT: gl.constexpr, VT: gl.constexpr):
    """What `_add_own` made goes out through the tiles in which it came, and what comes in their place is asked for."""
    V: gl.constexpr = VT * SIZE
    for piece in gl.static_range(KT):
        _tile_of_piece(ring, one + piece, piece).store(pieces[piece])
    barrier()
    for piece in gl.static_range(KT):
        to = sources[0] + (one // (2 * KT) * SIZE + _place_of_piece(piece, V))
        _store_tile(_tile_of_piece(ring, one + piece, piece), to, V)
        barrier()
        _copy_one(ring, one + piece + RING, sources, KT, VT)


@gluon.jit
def _store_columns(map, key: gl.constexpr, pointer, KT: gl.constexpr):
    """64 columns of a part of P, to a matrix."""
    K: gl.constexpr = KT * HALF
    for rows in gl.static_range(KT - 1):
        _store_tile(map[key * (KT - 1) + rows].index(0), pointer + key * HALF + rows * SIZE * K, K)


@gluon.jit
def _store_map(values, tile, tile_lost, map, final, at: gl.constexpr, is_final, K: gl.constexpr):
    """Part of P of the node, through two tiles of shared memory; rounded where it is final, too."""
    whole, lost = in_parts(values)
    barrier()
    tile.store(whole)
    tile_lost.store(lost)
    barrier()
    _store_tile(tile, map + at, K)
    _store_tile(tile_lost, map + (at + K * K), K)
    if final is not None:
        if is_final:
            _store_tile(tile, final + at, K)


@kernel(gluon.jit, do_not_specialize=["N", "height"])
def _merge_wide_hopper_kernel(added, maps, finals, rights, tallest, heights, blocks, origins, oldests, reads, N, H,
                              height, KT: gl.constexpr, VT: gl.constexpr):  # fmt: skip
    """U and P of the nodes of `height` + 1, from those of `height`."""
    head, number = program_place()
    slot = gl.load(tallest + number, mask=number < N, other=-1)
    if slot < 0:
        return
    highest = gl.load(heights + slot)
    is_done = highest <= height
    if reads is not None:
        is_done = is_done | (gl.load(reads + slot) <= height)  # or a bucket
    if is_done:
        return
    span = gl.exp2(height.to(gl.float32)).to(gl.int32)
    place = slot.to(gl.int64) * H + head
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    MAP: gl.constexpr = 2 * K * K
    # P of the nodes of `height`, and of those of `height` + 1
    half = maps + (height % 2).to(gl.int64) * N * H * MAP
    other = maps + (1 - height % 2).to(gl.int64) * N * H * MAP + place * MAP
    map = half + place * MAP
    if origins is None:
        left = place - span.to(gl.int64) * H
    else:
        left = left_sibling(slot, height, span, blocks, origins, oldests, reads).to(gl.int64) * H + head
    sources = added + place * (K * V), added + left * (K * V), half + left * MAP

    whole, lost, ring = (), (), ()
    for _ in gl.static_range(KT):
        for rows in gl.static_range(KT - 1):  # the first 128, and 64 others
            whole = whole + (_new_tile(SIZE // (rows + 1), HALF),)
            lost = lost + (_new_tile(SIZE // (rows + 1), HALF),)
    for _ in gl.static_range(RING):
        ring = ring + (_new_tile(HALF, SIZE),)
    for one in gl.static_range(RING):
        if one < KT:
            for rows in gl.static_range(KT - 1):
                at = _places(map + one * HALF + rows * SIZE * K, K, SIZE // (rows + 1), HALF)
                begin_copy(whole[one * (KT - 1) + rows].index(0), at)
                begin_copy(lost[one * (KT - 1) + rows].index(0), at + K * K)
        _copy_one(ring, one, sources, KT, VT)

    # U + P U_left
    waiting = ()
    for tile in gl.static_range(VT):
        sums = _new_sums(SIZE, KT)
        for key in gl.static_range(KT):
            if key > 0:
                arrived(RING - 2)
            elif tile == 0:
                arrived(RING - 1)
            else:
                arrived(RING - KT - 1)
            zero = _zero(tallest + number)
            right = ring[(2 * KT * tile + key) % RING].index(zero)
            sums = _multiply(whole, key, right, zero, sums, key > 0, KT)
            sums = _multiply(lost, key, right, zero, sums, True, KT)
            if key > 0:
                sums = _next_in_place(ring, 2 * KT * tile + key - 1, sums, 2 * (KT - 1), sources, KT, VT)
            elif tile > 0:
                _store_added(ring, 2 * KT * tile - KT, waiting, sources, KT, VT)
            if tile == 0:
                if rights is not None:  # the backward needs P of this node, the right sibling of the one on its left
                    _store_columns(whole, key, rights + left * (K * K), KT)
        sums = _wait(sums, 0, KT)
        arrived(RING - KT - 1)
        _copy_one(ring, 2 * KT * tile + KT - 1 + RING, sources, KT, VT)
        waiting = _add_own(ring, 2 * KT * tile + KT, sums, KT)

    # P P_left; the product of what both have lost is too small to count
    sums = _new_sums(SIZE, KT)
    for key in gl.static_range(KT):
        if key > 0:
            arrived(RING - 2)
        else:
            arrived(RING - KT - 1)
        zero = _zero(tallest + number)
        right = ring[2 * (KT * VT + key) % RING].index(zero)
        sums = _multiply(whole, key, right, zero, sums, key > 0, KT)
        sums = _multiply(lost, key, right, zero, sums, True, KT)
        if key > 0:
            sums = _next_in_place(ring, 2 * (KT * VT + key) - 1, sums, 2 * (KT - 1), sources, KT, VT)
        else:
            _store_added(ring, 2 * KT * VT - KT, waiting, sources, KT, VT)
        arrived(RING - 2)
        zero = _zero(tallest + number)
        sums = _multiply(whole, key, ring[(2 * (KT * VT + key) + 1) % RING].index(zero), zero, sums, True, KT)
        sums = _next_in_place(ring, 2 * (KT * VT + key), sums, KT - 1, sources, KT, VT)
    last: gl.constexpr = 2 * KT * (VT + 1)
    ends = sums
    if KT == 3:
        ends = _new_sums(HALF, KT)
        for key in gl.static_range(KT):
            arrived(RING - 2 - key)
            zero = _zero(tallest + number)
            both = seen_as(ring[(last + key) % RING].index(zero), [SIZE, HALF])
            ends = _multiply(whole, key, both.slice(0, HALF, dim=0), zero, ends, key > 0, KT)
            ends = _multiply(lost, key, both.slice(0, HALF, dim=0), zero, ends, True, KT)
            ends = _multiply(whole, key, both.slice(HALF, HALF, dim=0), zero, ends, True, KT)
        sums = _wait(sums, 3 * KT * (KT - 1), KT)
    else:
        sums = _wait(sums, 0, KT)
    final = None if finals is None else finals + place * (K * K)
    is_final = highest == height + 1
    # through the two tiles before the last KT, with which nothing is multiplied any more
    pieces = _in_pieces(sums, KT)
    for piece in gl.static_range(KT):
        _store_map(
            pieces[piece], _tile_of_piece(ring, last - 2, piece), _tile_of_piece(ring, last - 1, piece),
            other, final, _place_of_piece(piece, K), is_final, K,
        )  # fmt: skip
    if KT == 3:
        ends = _wait(ends, 0, KT)
        tile, tile_lost = _tile_of_piece(ring, last - 2, 0), _tile_of_piece(ring, last - 1, 0)
        _store_map(ends[0], tile, tile_lost, other, final, SIZE, is_final, K)
        tile = seen_as(ring[last % RING].index(0), [HALF, HALF])
        tile_lost = seen_as(ring[(last + 1) % RING].index(0), [HALF, HALF])
        _store_map(ends[1], tile, tile_lost, other, final, SIZE * K + SIZE, is_final, K)
