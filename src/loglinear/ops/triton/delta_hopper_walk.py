"""`_walk_kernel` of `delta_read.py` for Hopper.

Shared memory is a ring of three pairs of tiles, [128, 128] each. A node takes a pair, U and P. Before the first nodes
come the second pair is q and k, and the third v and four quarters of the two parts of (I + A)⁻¹, of which two more have
a place of their own; where those four were, the scores before λ wait to be stored.

Legend as in `delta_read.py`
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import (
    decay_at_most_one,
    decay_of,
    drop_lowest_bit,
    place_of_node,
    program_place,
)
from loglinear.ops.triton.delta_hopper import (
    COLUMNS_OF_HALF,
    HALF,
    HALF_SUM,
    LEFT,
    LEFT_HALF,
    MATRIX,
    QUARTER,
    QUARTERS,
    ROWS,
    ROWS_OF_HALF,
    SHARED,
    SIZE,
    WHOLE_SUM,
    arrived,
    barrier,
    copy_quarter,
    copy_rows,
    copy_tile,
    in_parts,
    level_factor,
    load_column,
    load_level,
    seen_as,
    store_halves,
    store_rows,
)
from loglinear.ops.triton.launch import kernel

PAIRS = gl.constexpr(3)  # of tiles in shared memory: U and P of so many nodes


@gluon.jit
def _copy_node(states, passes, number, count, slot, block, origin, oldest, rest, heights, added, maps, N, H, head):
    """Begins to bring U and P of a node to its pair of tiles, if there is one of this number."""
    if number < count:
        node = place_of_node(slot, block, origin, oldest, rest, count - number)
        place = node.to(gl.int64) * H + head
        pair = number % PAIRS
        copy_tile(states.index(pair), added + place * MATRIX)
        if number < count - 1:
            half = (gl.load(heights + node) % 2).to(gl.int64) * N * H
            copy_tile(passes.index(pair), maps + (half + place) * (2 * MATRIX))  # the first of two parts
    async_copy.commit_group()


@kernel(gluon.jit, do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _walk_hopper_kernel(q, k, v, scales, beta, inverse, gamma, mixed, o, added, maps, tokens, firsts, rows_of, blocks,
                        origins, oldests, heights, reads, N, H, G, scale, stride_q, stride_qg, stride_k, stride_kg,
                        stride_v, stride_vh, stride_s, stride_sh, stride_b, L, HEIGHT: gl.constexpr,
                        SCALED: gl.constexpr):  # fmt: skip
    """What the rows of one chunk read: its queries meet one node after the other, the nearest first. Buckets that are
    carried in pass them as they are, for P = I."""
    head, slot = program_place()
    # side by side, for nothing else can begin before
    is_slot = slot < N
    rows, token = gl.load(rows_of + slot, mask=is_slot, other=0), gl.load(tokens + slot, mask=is_slot, other=0)
    block, count = gl.load(blocks + slot, mask=is_slot, other=0), gl.load(reads + slot, mask=is_slot, other=0)
    first = None if firsts is None else gl.load(firsts + slot, mask=is_slot, other=0)
    origin = None if origins is None else gl.load(origins + slot, mask=is_slot, other=0)
    oldest = None if oldests is None else gl.load(oldests + slot, mask=is_slot, other=0)
    if rows == 0:
        return
    place = slot.to(gl.int64) * H + head
    group = (head // (H // G)).to(gl.int64)
    dtype: gl.constexpr = gl.bfloat16

    states = gl.allocate_shared_memory(dtype, [PAIRS, SIZE, SIZE], SHARED)
    passes = gl.allocate_shared_memory(dtype, [PAIRS, SIZE, SIZE], SHARED)
    more = gl.allocate_shared_memory(dtype, [2, HALF, HALF], SHARED)
    queries_tile, keys_tile, values_tile, inverse_tile = (
        states.index(1),
        passes.index(1),
        states.index(2),
        passes.index(2),
    )
    quarters = seen_as(inverse_tile, [4, HALF, HALF])
    copy_rows(queries_tile, q + group * stride_qg, token, first, rows, stride_q)
    copy_rows(keys_tile, k + group * stride_kg, token, first, rows, stride_k)
    async_copy.commit_group()
    # X: the first parts of its quarters, then what they have lost
    parts = inverse + place * QUARTERS
    lost_parts = parts + N.to(gl.int64) * H * QUARTERS
    for quarter in gl.static_range(3):
        copy_quarter(quarters.index(quarter), parts + quarter * QUARTER)
    copy_quarter(quarters.index(3), lost_parts)
    copy_quarter(more.index(0), lost_parts + QUARTER)
    copy_quarter(more.index(1), lost_parts + 2 * QUARTER)
    async_copy.commit_group()
    copy_rows(values_tile, v + head.to(gl.int64) * stride_vh, token, first, rows, stride_v)
    async_copy.commit_group()
    _copy_node(states, passes, 0, count, slot, block, origin, oldest, block, heights, added, maps, N, H, head)

    # a chunk's matrices are made as two halves of their columns, 0 and 1
    row = gl.arange(0, SIZE, ROWS_OF_HALF)
    column = gl.arange(0, HALF, COLUMNS_OF_HALF)
    lower = row >= HALF
    sums_at = gamma + (head.to(gl.int64) * N + slot) * SIZE
    sums = gl.load(sums_at + row)
    sums0, sums1 = gl.load(sums_at + column), gl.load(sums_at + HALF + column)
    later = None if first is None else first - HALF  # as if the second half were a chunk
    beta0 = load_column(beta + head, column, token, first, rows, stride_b)
    beta1 = load_column(beta + head, column, token + HALF, later, rows - HALF, stride_b)
    nothing = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)

    # M: q kᵀ with decays
    arrived(3)
    keys0, keys1 = keys_tile.slice(0, HALF), keys_tile.slice(HALF, HALF)
    pairs0 = warpgroup_mma(queries_tile, keys0.permute([1, 0]), nothing, use_acc=False, is_async=True)
    pairs1 = warpgroup_mma(queries_tile, keys1.permute([1, 0]), nothing, use_acc=False, is_async=True)
    pairs0, pairs1 = warpgroup_mma_wait(0, deps=[pairs0, pairs1])
    decays0 = decay_at_most_one(sums[:, None] - sums0[None, :])
    decays1 = decay_at_most_one(sums[:, None] - sums1[None, :])
    pairs0 = gl.where(row[:, None] >= column[None, :], pairs0 * decays0 * scale, 0.0)
    pairs1 = gl.where(row[:, None] >= column[None, :] + HALF, pairs1 * decays1 * scale, 0.0)
    whole0, lost0 = in_parts(pairs0)
    whole1, lost1 = in_parts(pairs1)
    whole0, whole1 = gl.convert_layout(whole0, LEFT_HALF), gl.convert_layout(whole1, LEFT_HALF)
    lost0, lost1 = gl.convert_layout(lost0, LEFT_HALF), gl.convert_layout(lost1, LEFT_HALF)

    # MT = M X diag(β), both in parts
    arrived(2)
    mixed0 = warpgroup_mma(whole0, quarters.index(0), nothing, use_acc=False, is_async=True)
    mixed1 = warpgroup_mma(whole1, quarters.index(2), nothing, use_acc=False, is_async=True)
    mixed0 = warpgroup_mma(lost0, quarters.index(0), mixed0, is_async=True)
    mixed1 = warpgroup_mma(lost1, quarters.index(2), mixed1, is_async=True)
    mixed0 = warpgroup_mma(whole1, quarters.index(1), mixed0, is_async=True)
    mixed1 = warpgroup_mma(whole1, more.index(1), mixed1, is_async=True)
    mixed0 = warpgroup_mma(lost1, quarters.index(1), mixed0, is_async=True)
    mixed0 = warpgroup_mma(whole0, quarters.index(3), mixed0, is_async=True)
    mixed0 = warpgroup_mma(whole1, more.index(0), mixed0, is_async=True)
    mixed0, mixed1, _, _, _, _ = warpgroup_mma_wait(0, deps=[mixed0, mixed1, whole0, lost0, whole1, lost1])
    mixed0 *= beta0[None, :]
    mixed1 *= beta1[None, :]

    # what the queries meet of the keys before them in the chunk: MT k̂, MT e^γ in parts
    passing, lost = in_parts(mixed0 * decay_of(sums0)[None, :])
    passing, lost = gl.convert_layout(passing, LEFT_HALF), gl.convert_layout(lost, LEFT_HALF)
    passed = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    passed = warpgroup_mma(passing, keys0, passed, use_acc=False, is_async=True)
    passed = warpgroup_mma(lost, keys0, passed, is_async=True)
    passed, _, _ = warpgroup_mma_wait(0, deps=[passed, passing, lost])
    passing, lost = in_parts(mixed1 * decay_of(sums1)[None, :])
    passing, lost = gl.convert_layout(passing, LEFT_HALF), gl.convert_layout(lost, LEFT_HALF)
    passed = warpgroup_mma(passing, keys1, passed, is_async=True)
    passed = warpgroup_mma(lost, keys1, passed, is_async=True)
    if mixed is not None:
        kept = seen_as(inverse_tile, [2, SIZE, HALF])
        barrier()
        kept.index(0).store(mixed0.to(dtype))
        kept.index(1).store(mixed1.to(dtype))
        barrier()
        store_halves(kept.index(0), kept.index(1), mixed + place * QUARTERS)

    # S = MT ⊙ Λ
    lam = scales + head.to(gl.int64) * stride_sh
    if SCALED:
        factor = level_factor(lam, token, first, rows, stride_s, L, HEIGHT - 1)
        far = load_level(lam, row, token, first, rows, stride_s, HEIGHT, L)
        mixed0 *= gl.where(lower[:, None], far[:, None], factor)
        mixed1 *= factor
    inside0 = gl.convert_layout(mixed0.to(dtype), LEFT_HALF)
    inside1 = gl.convert_layout(mixed1.to(dtype), LEFT_HALF)
    passed, _, _ = warpgroup_mma_wait(0, deps=[passed, passing, lost])

    # R, the queries as seen from the state that enters; and S v
    row = gl.arange(0, SIZE, ROWS)
    entering = decay_of(gl.load(sums_at + row)) * scale
    queries = queries_tile.load(WHOLE_SUM).to(gl.float32) * entering[:, None] - passed
    queries = gl.convert_layout(queries.to(dtype), LEFT)
    arrived(1)
    out = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    out = warpgroup_mma(inside0, values_tile.slice(0, HALF), out, use_acc=False, is_async=True)
    out = warpgroup_mma(inside1, values_tile.slice(HALF, HALF), out, is_async=True)

    # nodes take the place of q and k, then of v and X; `ahead` is `rest` of the next that is asked for
    ahead = drop_lowest_bit(block)
    _copy_node(states, passes, 1, count, slot, block, origin, oldest, ahead, heights, added, maps, N, H, head)
    ahead = drop_lowest_bit(ahead)
    out, _, _ = warpgroup_mma_wait(0, deps=[out, inside0, inside1])
    barrier()
    _copy_node(states, passes, 2, count, slot, block, origin, oldest, ahead, heights, added, maps, N, H, head)
    ahead = drop_lowest_bit(ahead)

    # from node to node, the nearest first
    rest = block
    for number in range(count):
        pair = number % PAIRS
        if SCALED:
            height = gl.load(heights + place_of_node(slot, block, origin, oldest, rest, count - number))
            level = load_level(lam, row, token, first, rows, stride_s, HEIGHT + 1 + height, L)
        rest = drop_lowest_bit(rest)
        arrived(2)
        empty = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
        read = warpgroup_mma(queries, states.index(pair), empty, use_acc=False)
        if SCALED:
            read *= level[:, None]
        out += read
        if number < count - 1:
            passed = warpgroup_mma(queries, passes.index(pair), empty, use_acc=False)
            queries = gl.convert_layout(passed.to(dtype), LEFT)
        barrier()
        _copy_node(
            states, passes, number + PAIRS, count, slot, block, origin, oldest, ahead, heights, added, maps, N, H, head
        )
        ahead = drop_lowest_bit(ahead)
    async_copy.wait_group(0)
    barrier()
    store_rows(states.index(0), out.to(dtype), o + head * SIZE, token, first, rows, H * SIZE)
