"""`_climb_kernel` of `delta_backward.py` for Hopper.

Shared memory holds two reads of U, P and queries, tiles [128, 128], and one tile more. While the products of a read are
under way, the next read arrives in place of the one before, whose result goes out. The last tile brings the gradient of
the output, which products then take from registers; later each result waits there to go out in whole lines.

Legend as in `delta_backward.py`
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import add_highest_bit, drop_lowest_bit, place_of_node, program_place, row_exists
from loglinear.ops.triton.delta_hopper import (
    LEFT,
    MATRIX,
    ROWS,
    SHARED,
    SIZE,
    WHOLE_SUM,
    arrived,
    barrier,
    copy_rows,
    copy_tile,
    load_level,
    store_tile,
)
from loglinear.ops.triton.launch import kernel

READS = gl.constexpr(2)  # that have a place in shared memory


@gluon.jit
def _copy_read(states, passes, queries, step, number, different, node, base, added, maps, seen, H, head,
               SCALED: gl.constexpr):  # fmt: skip
    """Begins to bring what a read takes: U, P and its queries. P of a node that nothing passes is zero.

    number: of the read, the nearest is 0; base: place of its queries, of which there are `different` ones.
    """
    at = (node.to(gl.int64) * H + head) * MATRIX
    copy_tile(states.index(step % READS), added + at)
    copy_tile(passes.index(step % READS), maps + at, number + 1 < different)
    if SCALED:
        read = base + gl.minimum(number, different - 1).to(gl.int64) * H
        copy_tile(queries.index(step % READS), seen + read * MATRIX)


@kernel(gluon.jit, do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _climb_hopper_kernel(grad_o, scales, seen, added, maps, pulled, dscales, tokens, firsts, rows_of, blocks, origins,
                         oldests, heights, reads, variants, places, N, H, stride_g, stride_gh, stride_s, stride_sh, L,
                         HEIGHT: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """What each read of a chunk gets from the output, from the farthest node to the nearest: gradients of its queries,
    with what comes through the node that they pass next, and of λ."""
    head, slot = program_place()
    rows = gl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token, block, count = gl.load(tokens + slot), gl.load(blocks + slot), gl.load(reads + slot)
    first = None if firsts is None else gl.load(firsts + slot)
    origin = None if origins is None else gl.load(origins + slot)
    oldest = None if oldests is None else gl.load(oldests + slot)
    different = count if variants is None else gl.load(variants + slot)
    base = gl.load(places + slot).to(gl.int64) * H + head
    dtype: gl.constexpr = gl.bfloat16

    states = gl.allocate_shared_memory(dtype, [READS, SIZE, SIZE], SHARED)
    passes = gl.allocate_shared_memory(dtype, [READS, SIZE, SIZE], SHARED)
    queries = gl.allocate_shared_memory(dtype, [READS, SIZE, SIZE], SHARED)
    leaving = gl.allocate_shared_memory(dtype, [SIZE, SIZE], SHARED)
    copy_rows(leaving, grad_o + head.to(gl.int64) * stride_gh, token, first, rows, stride_g)
    async_copy.commit_group()
    # the first reads: to climb is to begin with the farthest node
    rest = block
    for _ in range(count - 1):
        rest = drop_lowest_bit(rest)
    next_node, height, next_height = slot, 0, 0
    for step in range(READS):
        next_node = place_of_node(slot, block, origin, oldest, rest, step + 1)
        if step < count:
            _copy_read(
                states, passes, queries, step, count - 1 - step, different, next_node, base, added, maps, seen, H,
                head, SCALED,
            )  # fmt: skip
        async_copy.commit_group()
        height, next_height = next_height, gl.load(heights + next_node, mask=step < count, other=0)
        rest = add_highest_bit(rest, block)

    row = gl.arange(0, SIZE, ROWS)
    exists = row_exists(row, first, rows)
    lam, dlam = scales + head.to(gl.int64) * stride_sh, dscales + (token + row).to(gl.int64) * H * L + head * L
    last = gl.zeros([SIZE], gl.float32, ROWS)  # for the last level, which may have several nodes
    weight = last
    level = gl.minimum(HEIGHT + 1 + height, L - 1)
    if SCALED:
        weight = load_level(lam, row, token, first, rows, stride_s, level, L)
    total = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)  # gradient of the queries of the read before
    passing = gl.convert_layout(total.to(dtype), LEFT)
    arrived(2)
    grad = gl.convert_layout(leaving.load(WHOLE_SUM), LEFT)
    arrived(1)
    for step in range(count):
        number = count - 1 - step
        buffer = step % READS
        nothing = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
        pull = warpgroup_mma(grad, states.index(buffer).permute([1, 0]), nothing, use_acc=False, is_async=True)
        map = passes.index(buffer).permute([1, 0])
        if variants is None:
            passed = warpgroup_mma(passing, map, nothing, use_acc=False, is_async=True)
        else:
            # buckets that are carried in share their queries: what these get adds up
            passed = warpgroup_mma(passing, map, total, use_acc=number + 1 >= different, is_async=True)
        # meanwhile: the next read comes in place of the one before, and the result of that goes out
        if step > 0:
            if number > 0:
                _copy_read(
                    states, passes, queries, step + 1, number - 1, different, next_node, base, added, maps, seen, H,
                    head, SCALED,
                )  # fmt: skip
            if number + 1 < different:
                store_tile(leaving, pulled + (base + (number + 1).to(gl.int64) * H) * MATRIX)
        async_copy.commit_group()
        next_node = place_of_node(slot, block, origin, oldest, rest, step + READS + 1)
        rest = add_highest_bit(rest, block)
        if SCALED:
            next_level = gl.minimum(HEIGHT + 1 + next_height, L - 1)
            next_weight = load_level(lam, row, token, first, rows, stride_s, next_level, L)
            next_height = gl.load(heights + next_node, mask=step + READS < count, other=0)
            pull = warpgroup_mma_wait(1, deps=[pull])
            found = gl.sum(queries.index(buffer).load(WHOLE_SUM).to(gl.float32) * pull, 1)
            pull *= weight[:, None]
            passed, passing, pull, found = warpgroup_mma_wait(0, deps=[passed, passing, pull, found])
            if level < L - 1:
                gl.store(dlam + level, found, mask=exists)
            else:
                last += found
            weight, level = next_weight, next_level
        else:
            passed, passing, pull = warpgroup_mma_wait(0, deps=[passed, passing, pull])
        total = pull + passed
        result = total.to(dtype)
        passing = gl.convert_layout(result, LEFT)
        barrier()
        leaving.store(result)
        arrived(0)
    if count > 0:
        store_tile(leaving, pulled + base * MATRIX)
    if SCALED:
        gl.store(dlam + (L - 1), last, mask=exists)
