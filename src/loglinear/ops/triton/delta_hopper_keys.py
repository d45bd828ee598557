"""`_keys_kernel` of `delta_backward_halves.py` for Hopper.

One program has all rows and columns of a chunk, and asks for each matrix once. There is room for seven of the eleven
that it multiplies: the others are asked for as soon as the products with what they replace are done, so that copies are
under way until the last product. Products by a lower triangular matrix take all of it, with zeros above the diagonal.
The gradient of k kᵀ and its transpose are added up before they multiply k, which is exact: the diagonal is zero.

Legend as in `delta_backward_halves.py`. What the tiles of shared memory are, one after the other:
    0 v; diag(β) (v dUᵀ - k̂ dPᵀ); dq as it is stored
    1 dU; MT; dk as it is stored
    2 k
    3 dP; the gradient of q kᵀ
    4 X; q
    5 dW; the gradient of k kᵀ
    6 dR
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import decay_of, program_place
from loglinear.ops.triton.delta_hopper import (
    LEFT,
    MATRIX,
    ROWS,
    SIZE,
    WHOLE_SUM,
    arrived,
    barrier,
    copy_quarters,
    copy_rows,
    copy_tile,
    load_column,
    new_tile,
    places_of_rows,
    store_rows,
)
from loglinear.ops.triton.launch import kernel


@gluon.jit
def _store_gradient(tile, values, pointer, token, first, rows, stride):
    """To the rows of a chunk: bfloat16 through a tile of shared memory, float32 as threads have it."""
    if pointer.dtype.element_ty == gl.bfloat16:
        store_rows(tile, values.to(gl.bfloat16), pointer, token, first, rows, stride)
    else:
        at, exists = places_of_rows(pointer, token, first, rows, stride, SIZE, WHOLE_SUM)
        gl.store(at, values, mask=exists)


@gluon.jit
def _sums_with(values, tile):
    """The sum of each row of `values` times that row of a tile."""
    return gl.sum(values * tile.load(WHOLE_SUM).to(gl.float32), 1)


@kernel(gluon.jit, do_not_specialize=["N", "stride_b"])
def _keys_hopper_kernel(q, k, v, beta, inverse, pulled, gamma, d_added, d_maps, d_erase, mixed, d_pairs, d_overlap, dq,
                        dk, d_sums, d_end, tokens, firsts, rows_of, lefts, reads, places, N, H, G, scale, stride_q,
                        stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_b):  # fmt: skip
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
    dtype: gl.constexpr = gl.bfloat16

    tile0, tile1, keys = new_tile(), new_tile(), new_tile()
    tile3, tile4, tile5, pull = new_tile(), new_tile(), new_tile(), new_tile()
    values, grad_added, grad_maps, solved, grad_erase = tile0, tile1, tile3, tile4, tile5  # at first
    owed, mix, grad_pairs, queries, grad_overlap = tile0, tile1, tile3, tile4, tile5  # and then
    copy_rows(keys, k + group * stride_kg, token, first, rows, stride_k)
    if writes:
        copy_tile(grad_maps, d_maps + place * MATRIX)
    async_copy.commit_group()
    if writes:
        copy_rows(values, v + head.to(gl.int64) * stride_vh, token, first, rows, stride_v)
        copy_tile(grad_added, d_added + place * MATRIX)
    async_copy.commit_group()
    if writes:
        copy_quarters(solved, inverse, place)
        copy_tile(grad_erase, d_erase + place * MATRIX)
    async_copy.commit_group()
    if is_read:
        copy_tile(pull, pulled + (read.to(gl.int64) * H + head) * MATRIX)
    async_copy.commit_group()

    row = gl.arange(0, SIZE, ROWS)
    per_row = (head.to(gl.int64) * N + slot) * SIZE
    sums = gl.load(gamma + per_row + row)
    entering, after = decay_of(sums), decay_of(gl.load(gamma + (per_row + SIZE - 1)) - sums)
    strength = load_column(beta + head, row, token, first, rows, stride_b)

    # as they write to the state that leaves: k̄ gets T (v dUᵀ - k̂ dPᵀ); and on the way Xᵀ dW, which k̂ gets below
    grad_k = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    if writes:
        arrived(3)
        grad_k = warpgroup_mma(keys, grad_maps.permute([1, 0]), grad_k, use_acc=False, is_async=True)
        grad_k = warpgroup_mma_wait(0, deps=[grad_k])
        grad_k *= -entering[:, None]
        arrived(2)
        grad_k = warpgroup_mma(values, grad_added.permute([1, 0]), grad_k, is_async=True)
        grad_k = warpgroup_mma_wait(0, deps=[grad_k])
        grad_k *= strength[:, None]
        barrier()
    if is_read:
        copy_quarters(mix, mixed, place)
    async_copy.commit_group()
    copy_quarters(grad_pairs, d_pairs, place)
    async_copy.commit_group()
    met = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    to_end = gl.zeros([SIZE], gl.float32, ROWS)
    if writes:
        owed.store(grad_k.to(dtype))
        arrived(3)
        grad_k = warpgroup_mma(solved, owed, grad_k, use_acc=False, is_async=True)
        met = warpgroup_mma(solved.permute([1, 0]), grad_erase, met, use_acc=False, is_async=True)
        grad_k, met = warpgroup_mma_wait(0, deps=[grad_k, met])
        barrier()
    copy_quarters(grad_overlap, d_overlap, place)
    async_copy.commit_group()
    copy_rows(queries, q + group * stride_qg, token, first, rows, stride_q)
    async_copy.commit_group()
    if writes:
        grad_k *= after[:, None]
        to_end = _sums_with(grad_k, keys)
        met *= -strength[:, None]

    # as they meet the state that enters: k̂ gets diag(β) Xᵀ dW - (MT)ᵀ dR, and so far `met` is minus that
    if is_read:
        arrived(3)
        met = warpgroup_mma(mix.permute([1, 0]), pull, met, is_async=True)
        met = warpgroup_mma_wait(0, deps=[met])
    met *= -entering[:, None]

    # as they meet each other; q also gets what it meets the state that enters with
    arrived(2)
    grad_q = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    grad_q = warpgroup_mma(grad_pairs, keys, grad_q, use_acc=False, is_async=True)
    mass = _sums_with(met, keys)
    grad_k += met
    arrived(1)
    both = grad_overlap.load(LEFT) + grad_overlap.permute([1, 0]).load(LEFT)
    grad_k = warpgroup_mma(both, keys, grad_k, is_async=True)
    grad_q = warpgroup_mma_wait(1, deps=[grad_q])
    seen = entering * scale
    if is_read:
        grad_q += pull.load(WHOLE_SUM).to(gl.float32) * seen[:, None]
    _store_gradient(tile0, grad_q, dq + head * SIZE, token, first, rows, H * SIZE)
    arrived(0)
    grad_k = warpgroup_mma(grad_pairs.permute([1, 0]), queries, grad_k, is_async=True)
    if is_read:
        mass += _sums_with(pull.load(WHOLE_SUM).to(gl.float32), queries) * seen
    gl.store(d_sums + per_row + row, mass - to_end)
    gl.store(d_end + per_row + row, to_end)
    grad_k, _ = warpgroup_mma_wait(0, deps=[grad_k, both])
    _store_gradient(tile1, grad_k, dk + head * SIZE, token, first, rows, H * SIZE)
