"""`_keys_kernel` of `delta_backward_halves.py` for Hopper, with keys of two or three tiles and values of whole ones
of 128.

One program has all rows and columns of a chunk, and asks for each matrix once. What the keys owe to the state that
leaves is made of tiles of dP and dU that come through a ring of shared memory, beside all of k and v. Then X, M T and
the gradient of q kᵀ take their place, and through a smaller ring come dW, dR and q, 64 columns at a time. The gradient
of k kᵀ comes last; it and its transpose are added up before they multiply k, which is exact: the diagonal is zero.

Legend as in `delta_backward_halves.py`, but KT tiles of 64 keys, VT of 128 values. What shared memory is, one after the
other:
    keys [KT, 128, 64] k
    wide [128, 128] the first columns of v; X; the gradient of k kᵀ
    narrow [.., 128, 64] the other columns of v; diag(β) (v dUᵀ - k̂ dPᵀ); the second ring, but for its first tile, and
        beside it dq as it is stored; dk as it is stored
    ring [4, 64, 128] the first ring, but for its last tile; M T and the gradient of q kᵀ
    last [128, 64] the last tile of the first ring; the first of the second
    found [2 KT, 128] what gamma and its end get from 64 columns each: in registers it would wait until the end
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import block_number, decay_of, program_place
from loglinear.ops.triton.delta_hopper import (
    EACH,
    HALF,
    HALF_SUM,
    LEFT_HALF,
    LINE,
    MOVED_HALF,
    ROWS_OF_HALF,
    SHARED,
    SIZE,
    arrived,
    barrier,
    begin_copy,
    copy_columns,
    copy_quarters,
    copy_rows,
    copy_wide,
    load_column,
    new_half,
    new_tile,
    places_of_columns,
    places_of_rows,
    seen_as,
)
from loglinear.ops.triton.launch import kernel

RING = gl.constexpr(5)  # tiles of dP and dU that have a place in shared memory, the one that is multiplied among them
BEYOND = gl.constexpr(8)  # no chunk has 2^8 rows: the number of that block is zero, which the compiler does not know


@gluon.jit
def _place_of(ring, last, number: gl.constexpr, count: gl.constexpr):
    """Of `count` tiles that come through the ring, so that the last of them is in its last place."""
    place: gl.constexpr = (number - count) % RING
    if place < RING - 1:
        return ring.index(place)
    else:
        return seen_as(last, [HALF, SIZE])


@gluon.jit
def _copy_one(ring, last, number: gl.constexpr, d_added, d_maps, writes, KT: gl.constexpr, VT: gl.constexpr):
    """Begins to bring one of the tiles of dP and dU."""
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    maps: gl.constexpr = (KT + 1) // 2  # tiles of dP for 64 keys
    tile = _place_of(ring, last, number, KT * (maps + VT))
    if number < KT * maps:
        key: gl.constexpr = number // maps * HALF
        column: gl.constexpr = number % maps * SIZE
        copy_wide(tile, d_maps + key * K + column, K, K - column, writes)
    else:
        key: gl.constexpr = (number - KT * maps) % KT * HALF
        column: gl.constexpr = (number - KT * maps) // KT * SIZE
        copy_wide(tile, d_added + key * V + column, V, SIZE, writes)


@gluon.jit
def _next_tile(ring, last, wide, number: gl.constexpr, d_added, d_maps, inverse, mixed, d_pairs, place, writes, is_read,
               KT: gl.constexpr, VT: gl.constexpr):  # fmt: skip
    """The tile of that number: waits for it, and begins to bring what comes into the place of the tile before. Towards
    the end that is what is needed next, X, M T and the gradient of q kᵀ, as soon as there is all the room for it."""
    maps: gl.constexpr = (KT + 1) // 2
    count: gl.constexpr = KT * (maps + VT)
    arrived(RING - 2)
    if number + RING - 1 < count:
        _copy_one(ring, last, number + RING - 1, d_added, d_maps, writes, KT, VT)
    if number == KT * (maps + 1):
        copy_quarters(wide, inverse, place, writes)
    pairs = seen_as(ring, [2, SIZE, SIZE])
    if number == count - 3:
        copy_quarters(pairs.index(0), mixed, place, is_read)
    if number == count - 1:
        copy_quarters(pairs.index(1), d_pairs, place)
    async_copy.commit_group()
    return _place_of(ring, last, number, count)


@gluon.jit
def _copy_of_ring(last, narrow, number: gl.constexpr, first, d_erase, pulled, q, token, rows, stride_q, writes, is_read,
                  KT: gl.constexpr):  # fmt: skip
    """Begins to bring one of the tiles of the second ring: dW, dR and q, one after the other."""
    key: gl.constexpr = number // 3
    tile = _place_in_ring(last, narrow, number, KT)
    if number % 3 == 0:
        begin_copy(tile, places_of_columns(d_erase + key * HALF, KT * HALF), mask=writes)
    elif number % 3 == 1:
        begin_copy(tile, places_of_columns(pulled + key * HALF, KT * HALF), mask=is_read)
    else:
        copy_columns(tile, q + key * HALF, token, first, rows, stride_q)


@gluon.jit
def _place_in_ring(last, narrow, number: gl.constexpr, KT: gl.constexpr):
    """Of a tile of the second ring, which has KT + 1 places."""
    place: gl.constexpr = number % (KT + 1)
    if place == 0:
        return last
    else:
        return narrow.index(place - 1)


@gluon.jit
def _next_of_ring(last, narrow, number: gl.constexpr, first, d_erase, pulled, q, token, rows, stride_q, writes, is_read,
                  KT: gl.constexpr):  # fmt: skip
    """The tile of that number: waits for it, and begins to bring what comes into the place of the tile before."""
    arrived(KT - 1)
    if number + KT < 3 * KT:
        _copy_of_ring(
            last, narrow, number + KT, first, d_erase, pulled, q, token, rows, stride_q, writes, is_read, KT
        )  # fmt: skip
    async_copy.commit_group()
    return _place_in_ring(last, narrow, number, KT)


@gluon.jit
def _sums_with(values, tile):
    """The sum of each row of `values` times that row of a tile."""
    return gl.sum(values * tile.load(HALF_SUM).to(gl.float32), 1)


@gluon.jit
def _store_gradient(tile, values, pointer, token, first, rows, stride):
    """64 columns to the rows of a chunk: bfloat16 through a tile of shared memory, float32 as threads have it."""
    if pointer.dtype.element_ty == gl.bfloat16:
        tile.store(values.to(gl.bfloat16))
        barrier()
        at, exists = places_of_rows(pointer, token, first, rows, stride, HALF, MOVED_HALF)
        gl.store(at, tile.load(MOVED_HALF), mask=exists)
    else:
        at, exists = places_of_rows(pointer, token, first, rows, stride, HALF, HALF_SUM)
        gl.store(at, values, mask=exists)


@kernel(gluon.jit, do_not_specialize=["N", "stride_b"])
def _keys_wide_hopper_kernel(q, k, v, beta, inverse, pulled, gamma, d_added, d_maps, d_erase, mixed, d_pairs, d_overlap,
                             dq, dk, d_sums, d_end, tokens, firsts, rows_of, lefts, reads, places, N, H, G, scale,
                             stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_b, KT: gl.constexpr,
                             VT: gl.constexpr):  # fmt: skip
    """Gradients of q and k by head, [T, H, K] each, and what gamma and its end get: d_sums, d_end [1, H, N, C]."""
    head, slot = program_place()
    is_slot = slot < N
    rows = gl.load(rows_of + slot, mask=is_slot, other=0)
    token = gl.load(tokens + slot, mask=is_slot, other=0)
    writes = gl.load(lefts + slot, mask=is_slot, other=0) > 1
    is_read = gl.load(reads + slot, mask=is_slot, other=0) > 0
    read = gl.load(places + slot, mask=is_slot, other=0)
    if rows == 0:
        return
    first = None if firsts is None else gl.load(firsts + slot)
    place = slot.to(gl.int64) * H + head
    group = (head // (H // G)).to(gl.int64)
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    maps: gl.constexpr = (KT + 1) // 2
    narrow_count: gl.constexpr = max(2 * (VT - 1), KT + 1)
    q += group * stride_qg
    k += group * stride_kg
    v += head.to(gl.int64) * stride_vh
    d_added += place * K * V
    d_maps += place * K * K
    d_erase += place * SIZE * K
    pulled += (read.to(gl.int64) * H + head) * SIZE * K

    wide, last = new_tile(), new_half()
    narrow = gl.allocate_shared_memory(gl.bfloat16, [narrow_count, SIZE, HALF], SHARED)
    ring = gl.allocate_shared_memory(gl.bfloat16, [RING - 1, HALF, SIZE], SHARED)
    found = gl.allocate_shared_memory(gl.float32, [2 * KT, SIZE], LINE)
    keys = gl.allocate_shared_memory(gl.bfloat16, [KT, SIZE, HALF], SHARED)
    for key in gl.static_range(KT):
        copy_columns(keys.index(key), k + key * HALF, token, first, rows, stride_k)
    _copy_one(ring, last, 0, d_added, d_maps, writes, KT, VT)
    async_copy.commit_group()
    for number in gl.static_range(1, RING - 1):
        _copy_one(ring, last, number, d_added, d_maps, writes, KT, VT)
        if number == 1:
            copy_rows(wide, v, token, first, rows, stride_v)
        elif number <= VT:
            copy_columns(narrow.index(2 * number - 4), v + (number - 1) * SIZE, token, first, rows, stride_v)
            copy_columns(narrow.index(2 * number - 3), v + (number - 1) * SIZE + HALF, token, first, rows, stride_v)
        async_copy.commit_group()

    row = gl.arange(0, SIZE, ROWS_OF_HALF)
    per_row = (head.to(gl.int64) * N + slot) * SIZE
    sums = gl.load(gamma + per_row + row)
    entering, after = decay_of(sums), decay_of(gl.load(gamma + (per_row + SIZE - 1)) - sums)
    strength = load_column(beta + head, row, token, first, rows, stride_b)
    rest = (d_added, d_maps, inverse, mixed, d_pairs, place, writes, is_read)

    # as they write to the state that leaves: k̄ gets T (v dUᵀ - k̂ dPᵀ)
    totals = ()
    for key in gl.static_range(KT):
        total = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)
        for pair in gl.static_range(maps):
            tile = _next_tile(ring, last, wide, key * maps + pair, *rest, KT, VT)
            for half in gl.static_range(2):
                if 2 * pair + half < KT:
                    right = tile.slice(half * HALF, HALF, dim=1).permute([1, 0])
                    total = warpgroup_mma(
                        keys.index(2 * pair + half), right, total, use_acc=pair + half > 0, is_async=True
                    )
            total = warpgroup_mma_wait(0, deps=[total])
        totals = totals + (total * -entering[:, None],)
    for value in gl.static_range(VT):
        grown = ()
        for key in gl.static_range(KT):
            tile = _next_tile(ring, last, wide, KT * (maps + value) + key, *rest, KT, VT)
            total = totals[key]
            if value == 0:
                total = warpgroup_mma(wide, tile.permute([1, 0]), total, is_async=True)
            else:
                for half in gl.static_range(2):
                    right = tile.slice(half * HALF, HALF, dim=1).permute([1, 0])
                    total = warpgroup_mma(narrow.index(2 * value - 2 + half), right, total, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
            grown = grown + (total,)
        totals = grown
    barrier()
    if VT == 1:
        copy_quarters(wide, inverse, place, writes)
    sources = (d_erase, pulled, q, token, rows, stride_q, writes, is_read)
    _copy_of_ring(last, narrow, 0, first, *sources, KT)
    async_copy.commit_group()
    for key in gl.static_range(KT):
        narrow.index(key).store((totals[key] * strength[:, None]).to(gl.bfloat16))
    if VT == 1:
        arrived(0)
    else:
        arrived(2)
    grads = ()
    zero = block_number(rows, BEYOND)
    solved = seen_as(wide, [1, SIZE, SIZE]).index(zero)
    for key in gl.static_range(KT):
        grad = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)
        grads = grads + (warpgroup_mma(solved, narrow.index(key + zero), grad, use_acc=False, is_async=True),)
    grads = warpgroup_mma_wait(0, deps=grads)
    barrier()
    for number in gl.static_range(1, KT):
        _copy_of_ring(last, narrow, number, first, *sources, KT)
        async_copy.commit_group()

    # as they meet the state that enters: k̂ gets diag(β) Xᵀ dW - (MT)ᵀ dR; and as queries meet keys
    pairs = seen_as(ring, [2, SIZE, SIZE])
    stage = narrow.index(KT)
    seen = entering * scale
    totals = ()
    for key in gl.static_range(KT):
        zero = block_number(rows, BEYOND + 2 + key)
        mix, grad_pairs, solved = pairs.index(zero), pairs.index(zero + 1), seen_as(wide, [1, SIZE, SIZE]).index(zero)
        grad_erase = _next_of_ring(last, narrow, 3 * key, first, *sources, KT)
        met = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)
        met = warpgroup_mma(solved.permute([1, 0]), grad_erase, met, use_acc=False, is_async=True)
        grad = grads[key] * after[:, None]
        to_end = _sums_with(grad, keys.index(key + zero))
        found.index(2 * key).store(to_end)
        met = warpgroup_mma_wait(0, deps=[met])
        met *= -strength[:, None]
        pull = _next_of_ring(last, narrow, 3 * key + 1, first, *sources, KT)
        if key == KT - 1:
            copy_quarters(wide, d_overlap, place)
            async_copy.commit_group()
        met = warpgroup_mma(mix.permute([1, 0]), pull, met, is_async=True)
        pulls = pull.load(HALF_SUM)
        met = warpgroup_mma_wait(0, deps=[met])
        met *= -entering[:, None]
        mass = _sums_with(met, keys.index(key + zero)) - to_end
        grad += met

        queries = _next_of_ring(last, narrow, 3 * key + 2, first, *sources, KT)
        grad_q = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)
        grad_q = warpgroup_mma(grad_pairs, keys.index(key + zero), grad_q, use_acc=False, is_async=True)
        grad = warpgroup_mma(grad_pairs.permute([1, 0]), queries, grad, is_async=True)
        mass += _sums_with(pulls.to(gl.float32), queries) * seen
        found.index(2 * key + 1).store(mass)
        grad_q = warpgroup_mma_wait(1, deps=[grad_q])
        grad_q += pulls.to(gl.float32) * seen[:, None]
        _store_gradient(stage, grad_q, dq + head * K + key * HALF, token, first, rows, H * K)
        grad = warpgroup_mma_wait(0, deps=[grad])
        totals = totals + (grad,)

    # and as keys meet keys
    arrived(0)
    mass, to_end = gl.zeros([SIZE], gl.float32, EACH), gl.zeros([SIZE], gl.float32, EACH)
    for key in gl.static_range(KT):
        to_end += found.index(2 * key).load(EACH)
        mass += found.index(2 * key + 1).load(EACH)
    each = gl.arange(0, SIZE, EACH)
    gl.store(d_sums + per_row + each, mass)
    gl.store(d_end + per_row + each, to_end)
    zero = block_number(rows, BEYOND + 1)
    both = wide.load(LEFT_HALF) + wide.permute([1, 0]).load(LEFT_HALF)
    grads = ()
    for key in gl.static_range(KT):
        grads = grads + (warpgroup_mma(both, keys.index(key + zero), totals[key], is_async=True),)
    for key in gl.static_range(KT):
        grad, _ = warpgroup_mma_wait(KT - 1 - key, deps=[grads[key], both])
        _store_gradient(narrow.index(key), grad, dk + head * K + key * HALF, token, first, rows, H * K)
