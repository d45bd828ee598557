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
    EACH,
    HALF,
    LEFT,
    LINE,
    MOVED,
    SIZE,
    SUMMED,
    WARPS,
    WHOLE_SUM,
    arrived,
    barrier,
    copy_quarters,
    copy_rows,
    copy_tile,
    load_column,
    new_tile,
    offsets,
    store_quarters,
    store_rows,
)
from loglinear.ops.triton.launch import kernel

ROWS = gl.constexpr(gl.SliceLayout(1, WHOLE_SUM))
COLUMNS = gl.constexpr(gl.SliceLayout(0, WHOLE_SUM))
BY_COLUMNS = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [1, WARPS], [1, 0]))  # a warp has all rows of 16 columns


@gluon.jit
def _new_line():
    return gl.allocate_shared_memory(gl.float32, [SIZE], LINE)


@gluon.jit
def _copy_lower(tile, pointer):
    """The same of one with zeros in its upper right quarter."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    copy_tile(tile, pointer, (row // HALF)[:, None] >= (column // HALF)[None, :])


@gluon.jit
def _sum_of_rows(values):
    """[128] of [128, 128]. Each thread gets eight rows of four columns first: to sum as they lie takes three shuffles
    for every column."""
    pairs = gl.sum(gl.reshape(values, [8, 2, 8, SIZE]), 1)
    return gl.sum(gl.convert_layout(gl.reshape(pairs, [HALF, SIZE]), SUMMED), 0)


@kernel(gluon.jit, do_not_specialize=["N", "stride_b"])
def _solved_hopper_kernel(q, k, v, beta, grad_o, inverse, scores, gamma, d_added, d_maps, d_mixed, dv, d_erase,
                          d_overlap, d_strength, d_mass, tokens, firsts, rows_of, lefts, N, H, G, scale, stride_q,
                          stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_b, stride_g,
                          stride_gh):  # fmt: skip
    """Gradients of v, of W and of k kᵀ, and what β and gamma get from the inverse: d_strength, d_mass [1, H, N, C]."""
    head, slot = program_place()
    exists = slot < N
    rows = gl.load(rows_of + slot, mask=exists, other=0)
    token = gl.load(tokens + slot, mask=exists, other=0)
    first = None if firsts is None else gl.load(firsts + slot, mask=exists, other=0)
    writes = gl.load(lefts + slot, mask=exists, other=0) > 1
    if rows == 0:
        return
    place = slot.to(gl.int64) * H + head
    whole = place * (SIZE * SIZE)
    group = (head // (H // G)).to(gl.int64)
    dtype: gl.constexpr = gl.bfloat16

    keys, tile1, tile2, tile3 = new_tile(), new_tile(), new_tile(), new_tile()
    tile4, tile5, solved = new_tile(), new_tile(), new_tile()
    sums_line, decays_line, beta_line = _new_line(), _new_line(), _new_line()
    queries, maps, states, values, mix = tile1, tile2, tile3, tile4, tile5
    of_overlap, erase, attention, written, grads, given = tile1, tile2, tile2, tile3, tile4, tile5
    copy_rows(keys, k + group * stride_kg, token, first, rows, stride_k)
    copy_tile(maps, d_maps + whole, writes)
    async_copy.commit_group()
    copy_tile(states, d_added + whole, writes)
    async_copy.commit_group()
    copy_rows(queries, q + group * stride_qg, token, first, rows, stride_q)
    async_copy.commit_group()
    copy_rows(values, v + head.to(gl.int64) * stride_vh, token, first, rows, stride_v)
    async_copy.commit_group()
    copy_quarters(mix, d_mixed, place)
    async_copy.commit_group()
    copy_quarters(solved, inverse, place)
    async_copy.commit_group()

    at = (head.to(gl.int64) * N + slot) * SIZE
    each = gl.arange(0, SIZE, EACH)
    of_each = gl.load(gamma + at + each)
    sums_line.store(of_each)
    decays_line.store(decay_of(of_each))
    beta_line.store(load_column(beta + head, each, token, first, rows, stride_b))
    row = gl.arange(0, SIZE, ROWS)
    sums = gl.load(gamma + at + row)
    after = decay_of(gl.load(gamma + (at + SIZE - 1)) - sums)
    strength = load_column(beta + head, row, token, first, rows, stride_b)
    nothing = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)

    # dW, dY
    arrived(5)
    erased = warpgroup_mma(keys, maps, nothing, use_acc=False, is_async=True)
    erased = warpgroup_mma_wait(0, deps=[erased])
    barrier()
    erase.store((-erased * after[:, None]).to(dtype))
    arrived(4)
    grad = warpgroup_mma(erase, keys.permute([1, 0]), nothing, use_acc=False, is_async=True)
    wrote = warpgroup_mma(keys, states, nothing, use_acc=False, is_async=True)
    gl.store(d_erase + whole + offsets(), erase.load(MOVED), mask=writes)
    grad = warpgroup_mma_wait(1, deps=[grad])
    grad *= decays_line.load(COLUMNS)[None, :]
    wrote = warpgroup_mma_wait(0, deps=[wrote])
    arrived(3)
    written.store((wrote * after[:, None]).to(dtype))
    pairs = warpgroup_mma(keys, queries.permute([1, 0]), nothing, use_acc=False, is_async=True)
    _copy_lower(attention, scores + whole)
    async_copy.commit_group()

    # dT
    arrived(3)
    grad = warpgroup_mma(written, values.permute([1, 0]), grad, is_async=True)
    pairs = warpgroup_mma_wait(1, deps=[pairs])
    pairs *= decay_at_most_one(sums_line.load(COLUMNS)[None, :] - sums[:, None]) * scale
    column = gl.arange(0, SIZE, COLUMNS)
    pairs = gl.where(row[:, None] <= column[None, :], pairs, 0.0)
    left = gl.convert_layout(pairs.to(dtype), LEFT)
    arrived(2)
    grad = warpgroup_mma(left, mix, grad, is_async=True)
    grad, left = warpgroup_mma_wait(0, deps=[grad, left])
    barrier()
    copy_rows(grads, grad_o + head.to(gl.int64) * stride_gh, token, first, rows, stride_g)
    async_copy.commit_group()
    given.store(grad.to(dtype))

    # dA, and the gradient of k kᵀ
    arrived(2)
    lower = warpgroup_mma(solved.permute([1, 0]), given, nothing, use_acc=False, is_async=True)
    overlap = warpgroup_mma(keys, keys.permute([1, 0]), nothing, use_acc=False, is_async=True)
    of_columns = gl.sum(given.load(BY_COLUMNS).to(gl.float32) * solved.load(BY_COLUMNS).to(gl.float32), 0)
    lower = warpgroup_mma_wait(1, deps=[lower])
    left = gl.convert_layout((lower * beta_line.load(COLUMNS)[None, :]).to(dtype), LEFT)
    lower = warpgroup_mma(left, solved.permute([1, 0]), nothing, use_acc=False, is_async=True)
    lower, overlap, left = warpgroup_mma_wait(0, deps=[lower, overlap, left])
    lower *= decay_at_most_one(sums[:, None] - sums_line.load(COLUMNS)[None, :])
    lower = gl.where(row[:, None] > column[None, :], -lower, 0.0)
    of_overlap.store((lower * strength[:, None]).to(dtype))
    raw = lower * overlap  # with β of the row: A ⊙ dA
    barrier()
    store_quarters(of_overlap, d_overlap, place)
    of_rows = gl.sum(raw, 1)
    of_others = _sum_of_rows(raw * strength[:, None])
    gl.store(d_strength + at + row, of_rows + gl.convert_layout(of_columns, ROWS))
    gl.store(d_mass + at + row, of_rows * strength - gl.convert_layout(of_others, ROWS))

    # dv
    wrote = warpgroup_mma(solved.permute([1, 0]), written, nothing, use_acc=False, is_async=True)
    wrote = warpgroup_mma_wait(0, deps=[wrote])
    wrote *= strength[:, None]
    arrived(0)
    wrote = warpgroup_mma(attention.permute([1, 0]), grads, wrote, is_async=True)
    wrote = warpgroup_mma_wait(0, deps=[wrote])
    store_rows(solved, wrote.to(dtype), dv + head * SIZE, token, first, rows, H * SIZE)
