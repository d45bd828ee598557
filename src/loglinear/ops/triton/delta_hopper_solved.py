"""`_values_kernel`, `_solved_kernel` and `_overlap_kernel` of `delta_backward_halves.py`, in one, for Hopper.

One program has all rows and columns of a chunk, and asks for each matrix once. The gradients of Y, W and T stay in
shared memory. There is room for seven of the nine matrices that come from memory: S and dO, which are multiplied last,
are asked for as soon as others are done with. Products by a lower triangular matrix take all of it, with zeros above
the diagonal; they multiply whatever the gradient of T has there. A chunk that writes to no state gets zeros for dU and
dP.

What it computes, dA strictly lower:

    dW = -k̄ dP        dY = k̄ dU        dT = dW k̂ᵀ + dY vᵀ + Mᵀ d(MT)        dA = -(Xᵀ dT) diag(β) Xᵀ
    dv = diag(β) Xᵀ dY + Sᵀ dO

Legend as in `delta_backward_halves.py`. What the tiles of shared memory are, one after the other:
    0 k
    1 q; the gradient of k kᵀ as it is stored
    2 dP; dW as it is stored; S
    3 dU; dY
    4 v; dO
    5 d(MT); dT
    6 X; dv as it is stored
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import decay_at_most_one, decay_of, program_place
from loglinear.ops.triton.delta_hopper import (
    COLUMNS,
    EACH,
    LEFT,
    MATRIX,
    MOVED,
    ROWS,
    SIZE,
    WARPS,
    WHOLE_SUM,
    arrived,
    barrier,
    copy_lower,
    copy_quarters,
    copy_rows,
    copy_tile,
    load_column,
    new_line,
    new_tile,
    offsets,
    store_quarters,
    store_rows,
    sum_of_rows,
)
from loglinear.ops.triton.launch import kernel

BY_COLUMNS = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [1, WARPS], [1, 0]))  # a warp has all rows of 16 columns


@gluon.jit
def back_through_inverse(keys, solved, grad_solved, grad_overlap, d_overlap, d_strength, d_mass, place, per_row, sums,
                         strength, sums_line, beta_line, KT: gl.constexpr = 0):  # fmt: skip
    """dA, and the gradient of k kᵀ: dA times decays and β of the row. And what β and gamma get from it.

    grad_overlap: where the gradient of k kᵀ waits to go out; the first of the keys' tiles, if these are KT of 64
    columns. KT = 0: they are one of 128.
    """
    row, column = gl.arange(0, SIZE, ROWS), gl.arange(0, SIZE, COLUMNS)
    nothing = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    grad_a = warpgroup_mma(solved.permute([1, 0]), grad_solved, nothing, use_acc=False, is_async=True)
    if KT == 0:
        overlap = warpgroup_mma(keys, keys.permute([1, 0]), nothing, use_acc=False, is_async=True)
    else:
        grad_a = warpgroup_mma_wait(0, deps=[grad_a])
        overlap = nothing
        for key in gl.static_range(KT):
            tile = keys.index(key)
            overlap = warpgroup_mma(tile, tile.permute([1, 0]), overlap, use_acc=key > 0, is_async=True)
    of_columns = gl.sum(grad_solved.load(BY_COLUMNS).to(gl.float32) * solved.load(BY_COLUMNS).to(gl.float32), 0)
    if KT == 0:
        grad_a = warpgroup_mma_wait(1, deps=[grad_a])
    left = gl.convert_layout((grad_a * beta_line.load(COLUMNS)[None, :]).to(gl.bfloat16), LEFT)
    grad_a = warpgroup_mma(left, solved.permute([1, 0]), nothing, use_acc=False, is_async=True)
    grad_a, overlap, left = warpgroup_mma_wait(0, deps=[grad_a, overlap, left])
    grad_a *= decay_at_most_one(sums[:, None] - sums_line.load(COLUMNS)[None, :])
    grad_a = gl.where(row[:, None] > column[None, :], -grad_a, 0.0)
    if KT > 0:
        barrier()
    grad_overlap.store((grad_a * strength[:, None]).to(gl.bfloat16))
    raw = grad_a * overlap  # with β of the row: A ⊙ dA
    barrier()
    store_quarters(grad_overlap, d_overlap, place)
    of_rows = gl.sum(raw, 1)
    of_others = sum_of_rows(raw * strength[:, None])
    gl.store(d_strength + per_row + row, of_rows + gl.convert_layout(of_columns, ROWS))
    gl.store(d_mass + per_row + row, of_rows * strength - gl.convert_layout(of_others, ROWS))


@kernel(gluon.jit, do_not_specialize=["N", "stride_b"])
def _solved_hopper_kernel(q, k, v, beta, grad_o, inverse, scores, gamma, d_added, d_maps, d_mixed, dv, d_erase,
                          d_overlap, d_strength, d_mass, tokens, firsts, rows_of, lefts, N, H, G, scale, stride_q,
                          stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_b, stride_g,
                          stride_gh):  # fmt: skip
    """Gradients of v, of W and of k kᵀ, and what β and gamma get from the inverse: d_strength, d_mass [1, H, N, C]."""
    head, slot = program_place()
    is_slot = slot < N
    rows = gl.load(rows_of + slot, mask=is_slot, other=0)
    token = gl.load(tokens + slot, mask=is_slot, other=0)
    first = None if firsts is None else gl.load(firsts + slot, mask=is_slot, other=0)
    writes = gl.load(lefts + slot, mask=is_slot, other=0) > 1
    if rows == 0:
        return
    place = slot.to(gl.int64) * H + head
    matrix = place * MATRIX
    group = (head // (H // G)).to(gl.int64)
    dtype: gl.constexpr = gl.bfloat16

    keys, tile1, tile2, tile3 = new_tile(), new_tile(), new_tile(), new_tile()
    tile4, tile5, solved = new_tile(), new_tile(), new_tile()
    sums_line, decays_line, beta_line = new_line(), new_line(), new_line()
    queries, grad_maps, grad_added, values, grad_mixed = tile1, tile2, tile3, tile4, tile5  # at first
    grad_overlap, grad_erase, attention, grad_written, grads, grad_solved = tile1, tile2, tile2, tile3, tile4, tile5
    copy_rows(keys, k + group * stride_kg, token, first, rows, stride_k)
    copy_tile(grad_maps, d_maps + matrix, writes)
    async_copy.commit_group()
    copy_tile(grad_added, d_added + matrix, writes)
    async_copy.commit_group()
    copy_rows(queries, q + group * stride_qg, token, first, rows, stride_q)
    async_copy.commit_group()
    copy_rows(values, v + head.to(gl.int64) * stride_vh, token, first, rows, stride_v)
    async_copy.commit_group()
    copy_quarters(grad_mixed, d_mixed, place)
    async_copy.commit_group()
    copy_quarters(solved, inverse, place)
    async_copy.commit_group()

    per_row = (head.to(gl.int64) * N + slot) * SIZE
    each = gl.arange(0, SIZE, EACH)
    sums_of_each = gl.load(gamma + per_row + each)
    sums_line.store(sums_of_each)
    decays_line.store(decay_of(sums_of_each))
    beta_line.store(load_column(beta + head, each, token, first, rows, stride_b))
    row = gl.arange(0, SIZE, ROWS)
    sums = gl.load(gamma + per_row + row)
    after = decay_of(gl.load(gamma + (per_row + SIZE - 1)) - sums)
    strength = load_column(beta + head, row, token, first, rows, stride_b)
    nothing = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)

    # dW, dY, and what dT gets from dW
    arrived(5)
    grad_w = warpgroup_mma(keys, grad_maps, nothing, use_acc=False, is_async=True)
    grad_w = warpgroup_mma_wait(0, deps=[grad_w])
    barrier()
    grad_erase.store((-grad_w * after[:, None]).to(dtype))
    arrived(4)
    grad_t = warpgroup_mma(grad_erase, keys.permute([1, 0]), nothing, use_acc=False, is_async=True)
    grad_y = warpgroup_mma(keys, grad_added, nothing, use_acc=False, is_async=True)
    gl.store(d_erase + matrix + offsets(), grad_erase.load(MOVED), mask=writes)
    grad_t = warpgroup_mma_wait(1, deps=[grad_t])
    grad_t *= decays_line.load(COLUMNS)[None, :]
    grad_y = warpgroup_mma_wait(0, deps=[grad_y])
    arrived(3)
    grad_written.store((grad_y * after[:, None]).to(dtype))
    pairs = warpgroup_mma(keys, queries.permute([1, 0]), nothing, use_acc=False, is_async=True)
    copy_lower(attention, scores + matrix)
    async_copy.commit_group()

    # dT, which also takes Mᵀ: `pairs`
    arrived(3)
    grad_t = warpgroup_mma(grad_written, values.permute([1, 0]), grad_t, is_async=True)
    pairs = warpgroup_mma_wait(1, deps=[pairs])
    pairs *= decay_at_most_one(sums_line.load(COLUMNS)[None, :] - sums[:, None]) * scale
    column = gl.arange(0, SIZE, COLUMNS)
    pairs = gl.where(row[:, None] <= column[None, :], pairs, 0.0)
    left = gl.convert_layout(pairs.to(dtype), LEFT)
    arrived(2)
    grad_t = warpgroup_mma(left, grad_mixed, grad_t, is_async=True)
    grad_t, left = warpgroup_mma_wait(0, deps=[grad_t, left])
    barrier()
    copy_rows(grads, grad_o + head.to(gl.int64) * stride_gh, token, first, rows, stride_g)
    async_copy.commit_group()
    grad_solved.store(grad_t.to(dtype))

    arrived(2)
    back_through_inverse(
        keys, solved, grad_solved, grad_overlap, d_overlap, d_strength, d_mass, place, per_row, sums, strength,
        sums_line, beta_line,
    )  # fmt: skip

    # dv
    grad_v = warpgroup_mma(solved.permute([1, 0]), grad_written, nothing, use_acc=False, is_async=True)
    grad_v = warpgroup_mma_wait(0, deps=[grad_v])
    grad_v *= strength[:, None]
    arrived(0)
    grad_v = warpgroup_mma(attention.permute([1, 0]), grads, grad_v, is_async=True)
    grad_v = warpgroup_mma_wait(0, deps=[grad_v])
    store_rows(solved, grad_v.to(dtype), dv + head * SIZE, token, first, rows, H * SIZE)
