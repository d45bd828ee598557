"""`_solved_kernel` and `_overlap_kernel` of `delta_backward_halves.py`, in one, for Hopper, with keys of two or three
tiles and values of whole ones of 128: what `delta_hopper_solved.py` does, but for the gradient of v.

One program has all rows and columns of a chunk, and asks for each matrix once. k, X and d(MT) have their own places in
shared memory, and all else comes through a ring, in the order in which it is multiplied: dP, by 64 of its rows; dY and
v, by 64 of their columns; q by as many.

Legend as in `delta_backward_halves.py`, but KT tiles of 64 keys, VT of 128 values. dT takes the place of d(MT), and the
gradient of k kᵀ as it is stored that of k.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import decay_at_most_one, decay_of, program_place
from loglinear.ops.triton.delta_hopper import (
    COLUMNS,
    EACH,
    HALF,
    HALF_SUM,
    LEFT,
    MOVED_HALF,
    ROWS,
    ROWS_OF_HALF,
    SHARED,
    SIZE,
    WHOLE_SUM,
    arrived,
    barrier,
    begin_copy,
    copy_columns,
    copy_quarters,
    copy_wide,
    load_column,
    new_half,
    new_line,
    new_tile,
    places_of_columns,
    seen_as,
)
from loglinear.ops.triton.delta_hopper_solved import back_through_inverse
from loglinear.ops.triton.launch import kernel

RING = gl.constexpr(3)  # pairs of tiles that have a place in shared memory, those that are multiplied among them


@gluon.jit
def _copy_item(ring, item: gl.constexpr, first, q, v, d_maps, d_written, token, rows, stride_q, stride_v, writes,
               KT: gl.constexpr, VT: gl.constexpr):  # fmt: skip
    """Begins to bring what is multiplied at once."""
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    left, right = ring.index(2 * (item % RING)), ring.index(2 * (item % RING) + 1)
    if item < KT:
        copy_wide(seen_as(left, [HALF, SIZE]), d_maps + item * HALF * K, K, SIZE, writes)
        if KT > 2:
            copy_wide(seen_as(right, [HALF, SIZE]), d_maps + item * HALF * K + SIZE, K, K - SIZE, writes)
    elif item < KT + 2 * VT:
        column: gl.constexpr = (item - KT) * HALF
        begin_copy(left, places_of_columns(d_written + column, V), mask=writes)
        copy_columns(right, v + column, token, first, rows, stride_v)
    else:
        column: gl.constexpr = (item - KT - 2 * VT) * HALF
        copy_columns(left, q + column, token, first, rows, stride_q)


@gluon.jit
def _next_item(ring, item: gl.constexpr, first, q, v, d_maps, d_written, token, rows, stride_q, stride_v, writes,
               KT: gl.constexpr, VT: gl.constexpr):  # fmt: skip
    """The two tiles of it: waits for them, and begins to bring what comes into the place of those before."""
    arrived(RING - 2)
    if item + RING - 1 < 2 * (KT + VT):
        _copy_item(
            ring, item + RING - 1, first, q, v, d_maps, d_written, token, rows, stride_q, stride_v, writes, KT, VT
        )  # fmt: skip
    async_copy.commit_group()
    return ring.index(2 * (item % RING)), ring.index(2 * (item % RING) + 1)


@kernel(gluon.jit, do_not_specialize=["N", "stride_b"])
def _solved_wide_hopper_kernel(q, k, v, beta, inverse, gamma, d_maps, d_written, d_mixed, d_erase, d_overlap,
                               d_strength, d_mass, tokens, firsts, rows_of, lefts, N, H, G, scale, stride_q, stride_qg,
                               stride_k, stride_kg, stride_v, stride_vh, stride_b, KT: gl.constexpr,
                               VT: gl.constexpr):  # fmt: skip
    """Gradients of W and of k kᵀ, and what β and gamma get from the inverse: d_strength, d_mass [1, H, N, C]."""
    head, slot = program_place()
    is_slot = slot < N
    rows = gl.load(rows_of + slot, mask=is_slot, other=0)
    token = gl.load(tokens + slot, mask=is_slot, other=0)
    first = None if firsts is None else gl.load(firsts + slot, mask=is_slot, other=0)
    writes = gl.load(lefts + slot, mask=is_slot, other=0) > 1
    if rows == 0:
        return
    place = slot.to(gl.int64) * H + head
    group = (head // (H // G)).to(gl.int64)
    dtype: gl.constexpr = gl.bfloat16
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    q += group * stride_qg
    k += group * stride_kg
    v += head.to(gl.int64) * stride_vh
    sources = (
        q, v, d_maps + place * K * K, d_written + place * SIZE * V, token, rows, stride_q, stride_v, writes,
    )  # fmt: skip

    keys = gl.allocate_shared_memory(dtype, [KT, SIZE, HALF], SHARED)
    ring = gl.allocate_shared_memory(dtype, [2 * RING, SIZE, HALF], SHARED)
    grad_mixed, solved, stage = new_tile(), new_tile(), new_half()
    grad_solved, grad_overlap = grad_mixed, seen_as(keys, [SIZE, SIZE])
    sums_line, decays_line, beta_line = new_line(), new_line(), new_line()
    for key in gl.static_range(KT):
        copy_columns(keys.index(key), k + key * HALF, token, first, rows, stride_k)
    for item in gl.static_range(RING - 1):
        _copy_item(ring, item, first, *sources, KT, VT)
        if item == RING - 2:
            copy_quarters(grad_mixed, d_mixed, place)
            copy_quarters(solved, inverse, place)
        async_copy.commit_group()

    per_row = (head.to(gl.int64) * N + slot) * SIZE
    each = gl.arange(0, SIZE, EACH)
    sums_of_each = gl.load(gamma + per_row + each)
    sums_line.store(sums_of_each)
    decays_line.store(decay_of(sums_of_each))
    beta_line.store(load_column(beta + head, each, token, first, rows, stride_b))
    row, column = gl.arange(0, SIZE, ROWS), gl.arange(0, SIZE, COLUMNS)
    end = gl.load(gamma + (per_row + SIZE - 1))
    after_half = decay_of(end - gl.load(gamma + per_row + gl.arange(0, SIZE, ROWS_OF_HALF)))

    # dW, and what dT gets from it
    erased = ()
    for _ in gl.static_range(KT):
        erased = erased + (gl.zeros([SIZE, HALF], gl.float32, HALF_SUM),)
    for item in gl.static_range(KT):
        left, right = _next_item(ring, item, first, *sources, KT, VT)
        map, rest = seen_as(left, [HALF, SIZE]), seen_as(right, [HALF, SIZE])
        grown = ()
        for key in gl.static_range(KT):
            columns = map if key < 2 else rest
            columns = columns.slice(key % 2 * HALF, HALF, dim=1)
            grown = grown + (
                warpgroup_mma(keys.index(item), columns, erased[key], use_acc=item > 0, is_async=True),
            )  # fmt: skip
        erased = warpgroup_mma_wait(0, deps=grown)
    lefts_of_sum = ()
    for key in gl.static_range(KT):
        rounded = (-erased[key] * after_half[:, None]).to(dtype)
        if key > 0:
            barrier()
        stage.store(rounded)
        barrier()
        gl.store(places_of_columns(d_erase + place * SIZE * K + key * HALF, K), stage.load(MOVED_HALF), mask=writes)
        lefts_of_sum = lefts_of_sum + (gl.convert_layout(rounded, LEFT),)
    grad_t = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    for key in gl.static_range(KT):
        grad_t = warpgroup_mma(
            lefts_of_sum[key], keys.index(key).permute([1, 0]), grad_t, use_acc=key > 0, is_async=True
        )
    waited = warpgroup_mma_wait(0, deps=(grad_t,) + lefts_of_sum)
    grad_t = waited[0] * decays_line.load(COLUMNS)[None, :]

    # and from dY and d(MT): that takes Mᵀ, `pairs`
    for item in gl.static_range(KT, KT + 2 * VT):
        written, values = _next_item(ring, item, first, *sources, KT, VT)
        grad_t = warpgroup_mma(written, values.permute([1, 0]), grad_t, is_async=True)
        grad_t = warpgroup_mma_wait(0, deps=[grad_t])
    pairs = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    for key in gl.static_range(KT):
        queries, _ = _next_item(ring, KT + 2 * VT + key, first, *sources, KT, VT)
        pairs = warpgroup_mma(keys.index(key), queries.permute([1, 0]), pairs, use_acc=key > 0, is_async=True)
        pairs = warpgroup_mma_wait(0, deps=[pairs])
    sums = gl.load(gamma + per_row + row)
    pairs *= decay_at_most_one(sums_line.load(COLUMNS)[None, :] - sums[:, None]) * scale
    pairs = gl.where(row[:, None] <= column[None, :], pairs, 0.0)
    left = gl.convert_layout(pairs.to(dtype), LEFT)
    grad_t = warpgroup_mma(left, grad_mixed, grad_t, is_async=True)
    grad_t, _ = warpgroup_mma_wait(0, deps=[grad_t, left])
    barrier()
    grad_solved.store(grad_t.to(dtype))
    arrived(0)
    strength = load_column(beta + head, row, token, first, rows, stride_b)
    back_through_inverse(
        keys, solved, grad_solved, grad_overlap, d_overlap, d_strength, d_mass, place, per_row, sums, strength,
        sums_line, beta_line, KT,
    )  # fmt: skip
