"""`_values_kernel` of `delta_backward_halves.py` for Hopper, with keys of two or three tiles and values of whole ones
of 128.

A program has 128 columns of a chunk's values. Two share a multiprocessor if they are launched with `maxnreg=128`: one
loads or stores while the other multiplies. So there is room for one sum in registers, and for three tiles of shared
memory: a product is multiplied by what it is to be, before the next is added to it.

Legend as in `delta_backward_halves.py`, but KT tiles of 64 keys, VT of 128 columns of the values. What the tiles of
shared memory are, one after the other, with three tiles of keys (with two, tile 2 is the first to have X):
    0 first 64 columns of k and rows of dU; X; dO
    1 the second; S
    2 the third; dY; dv as it is stored
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import decay_of, program_place
from loglinear.ops.triton.delta_hopper import (
    HALF,
    MATRIX,
    MOVED,
    ROWS,
    SHARED,
    SIZE,
    WHOLE_SUM,
    arrived,
    barrier,
    copy_columns,
    copy_lower,
    copy_quarters,
    copy_rows,
    copy_wide,
    load_column,
    offsets,
    seen_as,
    store_rows,
)
from loglinear.ops.triton.launch import kernel

TILES = gl.constexpr(3)


@gluon.jit
def _in_two(tile):
    """64 columns of all rows, and 128 of 64 rows."""
    halves = seen_as(tile, [2, SIZE, HALF])
    return halves.index(0), seen_as(halves.index(1), [HALF, SIZE])


@kernel(gluon.jit, do_not_specialize=["N", "stride_b"])
def _values_wide_hopper_kernel(k, beta, grad_o, inverse, scores, gamma, d_added, dv, d_written, tokens, firsts, rows_of,
                               lefts, N, H, G, stride_k, stride_kg, stride_b, stride_g, stride_gh, KT: gl.constexpr,
                               VT: gl.constexpr):  # fmt: skip
    """Gradients of 128 columns of v, and of what T made of them."""
    part, slot = program_place()
    head, column = part // VT, part % VT * SIZE
    rows = gl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token, writes = gl.load(tokens + slot), gl.load(lefts + slot) > 1
    first = None if firsts is None else gl.load(firsts + slot)
    place = slot.to(gl.int64) * H + head
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    k += (head // (H // G)).to(gl.int64) * stride_kg
    d_added += place * K * V + column

    tiles = gl.allocate_shared_memory(gl.bfloat16, [TILES, SIZE, SIZE], SHARED)
    solved, attention, grad_written = tiles.index(KT % TILES), tiles.index((KT + 1) % TILES), tiles.index(KT - 1)
    grads = solved
    for key in gl.static_range(KT):
        keys, state = _in_two(tiles.index(key))
        copy_columns(keys, k + key * HALF, token, first, rows, stride_k, writes)
        copy_wide(state, d_added + key * HALF * V, V, SIZE, writes)
        async_copy.commit_group()
    if KT < TILES:
        copy_quarters(solved, inverse, place, writes)
        async_copy.commit_group()

    row = gl.arange(0, SIZE, ROWS)
    sums_at = gamma + (head.to(gl.int64) * N + slot) * SIZE
    after = decay_of(gl.load(sums_at + (SIZE - 1)) - gl.load(sums_at + row))
    strength = load_column(beta + head, row, token, first, rows, stride_b)

    # dY
    total = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    for key in gl.static_range(KT):
        keys, state = _in_two(tiles.index(key))
        arrived(2)
        total = warpgroup_mma(keys, state, total, use_acc=key > 0, is_async=True)
        total = warpgroup_mma_wait(0, deps=[total])
        barrier()
        if key == KT - TILES:
            copy_quarters(solved, inverse, place, writes)
            async_copy.commit_group()
        if key == KT - TILES + 1:
            copy_lower(attention, scores + place * MATRIX)
            async_copy.commit_group()
    grad_written.store((total * after[:, None]).to(gl.bfloat16))

    # diag(β) Xᵀ dY
    arrived(1)
    total = warpgroup_mma(solved.permute([1, 0]), grad_written, total, use_acc=False, is_async=True)
    if writes:
        gl.store(d_written + place * SIZE * V + column + offsets(V), grad_written.load(MOVED))
    total = warpgroup_mma_wait(0, deps=[total])
    barrier()
    copy_rows(grads, grad_o + head.to(gl.int64) * stride_gh + column, token, first, rows, stride_g)
    async_copy.commit_group()
    total *= strength[:, None]

    # Sᵀ dO
    arrived(0)
    total = warpgroup_mma(attention.permute([1, 0]), grads, total, is_async=True)
    total = warpgroup_mma_wait(0, deps=[total])
    store_rows(grad_written, total.to(gl.bfloat16), dv + head * V + column, token, first, rows, H * V)
