"""`_gather_kernel` of `delta_backward.py` for Hopper.

One program has all of the gradients of a node's U and P, in registers, so that what a reader has for them is asked for
once. Shared memory holds two readers, three tiles [128, 128] each: the queries that meet the node, the gradient of the
output, and that of the queries after the node. While the products of a reader are under way, the next one arrives; the
one after it is asked for as soon as they are done, and where it lies is known by then.

Legend as in `delta_backward.py`
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import program_place
from loglinear.ops.triton.delta_hopper import (
    EACH,
    LEFT,
    MATRIX,
    SHARED,
    SIZE,
    WHOLE_SUM,
    arrived,
    barrier,
    copy_rows,
    copy_tile,
    load_column,
    load_if,
    new_line,
    store_tile,
)
from loglinear.ops.triton.launch import kernel

READERS = gl.constexpr(2)  # that have a place in shared memory


@gluon.jit
def _copy_reader(queries, grads, after, buffer, token, first, rows, read, passed, grad_o, seen, pulled, H, head,
                 stride_g):  # fmt: skip
    """Begins to bring what a reader has for the node. Nothing is after a node that no queries pass: zero."""
    at = (read.to(gl.int64) * H + head) * MATRIX
    copy_tile(queries.index(buffer), seen + at)
    copy_rows(grads.index(buffer), grad_o, token, first, rows, stride_g)
    next_read = (read + 1).to(gl.int64) * H + head
    copy_rows(after.index(buffer), pulled, next_read * SIZE, None, gl.where(passed, SIZE, 0), SIZE)


@kernel(gluon.jit, do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _gather_hopper_kernel(grad_o, scales, seen, pulled, d_added, d_maps, tokens, firsts, rows_of, heights, lefts,
                          variants, places, reader, readers, order, N, H, stride_g, stride_gh, stride_s, stride_sh, L,
                          HEIGHT: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """The gradients of a node's U and P, from the chunks that read it."""
    head, number = program_place()
    slot = load_if(order, number < N, number)
    chunk, span = gl.load(reader + slot), load_if(readers, number < N, slot)
    height = gl.load(heights + slot)
    # to return at once would be to wait for this before anything else is asked for
    written = (span > 0) | (load_if(lefts, (number < N) & (span == 0), slot) != 0)
    lam = scales + head.to(gl.int64) * stride_sh + gl.minimum(HEIGHT + 1 + height, L - 1)
    grad_o += head.to(gl.int64) * stride_gh
    dtype: gl.constexpr = gl.bfloat16

    queries = gl.allocate_shared_memory(dtype, [READERS, SIZE, SIZE], SHARED)
    grads = gl.allocate_shared_memory(dtype, [READERS, SIZE, SIZE], SHARED)
    after = gl.allocate_shared_memory(dtype, [READERS, SIZE, SIZE], SHARED)
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
        _copy_reader(queries, grads, after, 0, token0, first0, rows0, read0, passed, grad_o, seen, pulled, H,
                     head, stride_g)  # fmt: skip
    async_copy.commit_group()
    if span > 1:
        _copy_reader(queries, grads, after, 1, token1, first1, rows1, read1, passed, grad_o, seen, pulled, H,
                     head, stride_g)  # fmt: skip
    async_copy.commit_group()
    if SCALED:
        weight = load_column(lam, each, token0, first0, rows0, stride_s)
        next_weight = load_column(lam, each, token1, first1, rows1, stride_s)

    total = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    change = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
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
        turned = queries.index(buffer).permute([1, 0])
        change = warpgroup_mma(turned, after.index(buffer), change, is_async=True)
        if SCALED:
            # as U_j gets R_jᵀ (λ_j ⊙ dO), scale the columns of R_jᵀ instead, which are in registers
            scaled = turned.load(LEFT).to(gl.float32) * weight_line.load(gl.SliceLayout(0, LEFT))[None, :]
            scaled = scaled.to(dtype)
            total = warpgroup_mma(scaled, grads.index(buffer), total, is_async=True)
            weight, next_weight = next_weight, load_column(lam, each, token, first, rows, stride_s)
            total, change, _ = warpgroup_mma_wait(0, deps=[total, change, scaled])
        else:
            total = warpgroup_mma(turned, grads.index(buffer), total, is_async=True)
            total, change = warpgroup_mma_wait(0, deps=[total, change])
        barrier()
        if is_reader:
            _copy_reader(queries, grads, after, buffer, token, first, rows, read, passed, grad_o, seen, pulled,
                         H, head, stride_g)  # fmt: skip
        async_copy.commit_group()
    async_copy.wait_group(0)

    if written:
        queries.index(0).store(total.to(dtype))
        grads.index(0).store(change.to(dtype))
        barrier()
        at = (slot.to(gl.int64) * H + head) * MATRIX
        store_tile(queries.index(0), d_added + at)
        store_tile(grads.index(0), d_maps + at)
