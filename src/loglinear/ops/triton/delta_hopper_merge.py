"""`_merge_kernel` of `delta_nodes.py` for Hopper.

One program has all of a node, U and P, and asks for each matrix once: the two parts of P and of the left sibling's P,
U, and the left sibling's U. All of them are under way at once, in the order in which products take them. U goes out
while P is being multiplied. What goes out waits in tiles that nothing reads any more, to go out in whole lines.

Legend as in `delta_nodes.py`
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import left_sibling, program_place
from loglinear.ops.triton.delta_hopper import MATRIX, SIZE, WHOLE_SUM, arrived, barrier, copy_tile, new_tile, store_tile
from loglinear.ops.triton.launch import kernel

MAP = gl.constexpr(2 * MATRIX)  # P, in two parts


@kernel(gluon.jit, do_not_specialize=["N", "height"])
def _merge_hopper_kernel(added, maps, finals, rights, tallest, heights, blocks, origins, oldests, reads, N, H, height):
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
    # P of the nodes of `height`, and of those of `height` + 1
    half = maps + (height % 2).to(gl.int64) * N * H * MAP
    other = maps + (1 - height % 2).to(gl.int64) * N * H * MAP
    dtype: gl.constexpr = gl.bfloat16

    added_tile, added_left = new_tile(), new_tile()
    whole, lost, whole_left, lost_left = new_tile(), new_tile(), new_tile(), new_tile()
    copy_tile(whole, half + place * MAP)
    copy_tile(added_tile, added + place * MATRIX)
    copy_tile(lost, half + place * MAP + MATRIX)
    if origins is None:
        left = place - span.to(gl.int64) * H
    else:
        left = left_sibling(slot, height, span, blocks, origins, oldests, reads).to(gl.int64) * H + head
    copy_tile(added_left, added + left * MATRIX)
    async_copy.commit_group()
    copy_tile(whole_left, half + left * MAP)
    async_copy.commit_group()
    copy_tile(lost_left, half + left * MAP + MATRIX)
    async_copy.commit_group()

    # U + P U_left
    arrived(2)
    total = added_tile.load(WHOLE_SUM).to(gl.float32)
    total = warpgroup_mma(whole, added_left, total, is_async=True)
    total = warpgroup_mma(lost, added_left, total, is_async=True)
    if rights is not None:  # the backward needs P of this node, the right sibling of the one on its left
        store_tile(whole, rights + left * MATRIX)

    # P P_left; the product of what both have lost is too small to count
    arrived(1)
    composed = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    composed = warpgroup_mma(whole, whole_left, composed, use_acc=False, is_async=True)
    composed = warpgroup_mma(lost, whole_left, composed, is_async=True)
    total = warpgroup_mma_wait(2, deps=[total])
    added_tile.store(total.to(dtype))
    barrier()
    store_tile(added_tile, added + place * MATRIX)

    arrived(0)
    composed = warpgroup_mma(whole, lost_left, composed, is_async=True)
    composed = warpgroup_mma_wait(0, deps=[composed])
    rounded = composed.to(dtype)
    added_tile.store(rounded)
    added_left.store((composed - rounded.to(gl.float32)).to(dtype))
    barrier()
    store_tile(added_tile, other + place * MAP)
    store_tile(added_left, other + place * MAP + MATRIX)
    if rights is not None:
        if highest == height + 1:
            store_tile(added_tile, finals + place * MATRIX)
