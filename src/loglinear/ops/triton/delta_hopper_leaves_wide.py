"""`_leaves_kernel` of `delta_halves.py` for Hopper, with keys of two or three tiles and values of whole ones of 128.

One program has all of U and P, and asks for every matrix once, as it begins. It is four warps, which have 64 rows of
keys at a time: then a thread has of k̄ᵀ T, as it is made, just what it needs of it as a left operand, and its two parts
stay in registers. They are multiplied by 64 columns of v at a time, and by e^γ, in two parts again, by 64 of k. A
product is begun before the one before it is waited for, and what that made goes out meanwhile, through shared memory of
its own: v and k are read until the end. k̄ᵀ X of the next 64 rows is begun without asking whether there are any: with a
branch there, ptxas lets nothing run beside products.

As in `delta_hopper_leaves.py`, P comes from the sum of two parts, which is off by 2^-18 of it at most.

Legend as in `delta_halves.py`, but KT tiles of 64 keys, VT of 128 values. Shared memory has
    keys, values [., 128, 64] all of k and v, 64 columns in each
    inverse0, inverse1, inverse2 [128, 64] first columns of X; what they have lost; the last, and what they have lost
    stage0 … stage3 [64, 64] of U in turns 0 and 1; of P, in two parts, in turns 2 and 3, 0 and 1
    decay, entering, strength [128] e^{Γ-γ}, e^γ and β
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import decay_of, program_place
from loglinear.ops.triton.delta_hopper import (
    HALF,
    QUARTER,
    QUARTERS,
    SHARED,
    SIZE,
    arrived,
    barrier,
    copy_columns,
    copy_two_quarters,
    in_parts,
    load_column,
    new_half,
    new_line,
    parts_times,
)
from loglinear.ops.triton.launch import kernel

# where threads have a product [64, 64], its columns, and a left operand of 64 columns
SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUM))
LEFT = gl.constexpr(gl.DotOperandLayout(0, SUM, 2))
MOVED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 64 columns, 16 bytes a thread
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
TIMES = gl.constexpr(4)  # products that `_times` begins
LEFTS = gl.constexpr(6)  # and `_begin_left`


@gluon.jit
def _new_stage():
    return gl.allocate_shared_memory(gl.bfloat16, [HALF, HALF], SHARED)


@gluon.jit
def _by_column(line, half: gl.constexpr):
    """One number for each of 64 columns of a product."""
    return line.slice(half * HALF, HALF).load(COLUMNS)[None, :]


@gluon.jit
def _turned_keys(keys, decay, half: gl.constexpr):
    """Half of the rows of 64 columns of k, turned, each row times its decay: a left operand [64, 64]."""
    turned = gl.convert_layout(keys.slice(half * HALF, HALF).permute([1, 0]).load(LEFT), SUM).to(gl.float32)
    return gl.convert_layout((turned * _by_column(decay, half)).to(gl.bfloat16), LEFT)


@gluon.jit
def _begin_left(keys, decay, inverse0, inverse1, inverse2):
    """Begins 64 rows of k̄ᵀ X, by halves of its columns; also what it is made of, for whom waits for it."""
    keys0, keys1 = _turned_keys(keys, decay, 0), _turned_keys(keys, decay, 1)
    nothing = gl.zeros([HALF, HALF], gl.float32, SUM)
    left0 = warpgroup_mma(keys0, inverse0.slice(0, HALF), nothing, use_acc=False, is_async=True)
    left1 = warpgroup_mma(keys1, inverse2.slice(0, HALF), nothing, use_acc=False, is_async=True)
    left0 = warpgroup_mma(keys0, inverse1.slice(0, HALF), left0, is_async=True)
    left1 = warpgroup_mma(keys1, inverse2.slice(HALF, HALF), left1, is_async=True)
    left0 = warpgroup_mma(keys1, inverse0.slice(HALF, HALF), left0, is_async=True)
    left0 = warpgroup_mma(keys1, inverse1.slice(HALF, HALF), left0, is_async=True)
    return left0, left1, keys0, keys1


@gluon.jit
def _left_times(whole, lost, factors, half: gl.constexpr):
    """The sum of two parts of a left operand, times a factor for each of its columns, as two parts again."""
    whole, lost = parts_times(
        gl.convert_layout(whole, SUM), gl.convert_layout(lost, SUM), _by_column(factors, half)
    )  # fmt: skip
    return gl.convert_layout(whole, LEFT), gl.convert_layout(lost, LEFT)


@gluon.jit
def _times(whole0, lost0, whole1, lost1, columns):
    """Begins the product of 64 rows of a left operand, in two parts and by halves of its columns, with 64 columns of
    the rows of a chunk."""
    right0, right1 = columns.slice(0, HALF), columns.slice(HALF, HALF)
    made = gl.zeros([HALF, HALF], gl.float32, SUM)
    made = warpgroup_mma(whole0, right0, made, use_acc=False, is_async=True)
    made = warpgroup_mma(lost0, right0, made, is_async=True)
    made = warpgroup_mma(whole1, right1, made, is_async=True)
    return warpgroup_mma(lost1, right1, made, is_async=True)


@gluon.jit
def _made(made, left, later: gl.constexpr):
    """The product with a left operand, when all products are done but the last ones, so many."""
    made, _, _, _, _ = warpgroup_mma_wait(later, deps=[made, left[0], left[1], left[2], left[3]])
    return made


@gluon.jit
def _offsets(width: gl.constexpr):
    """Where 64 rows and columns of a contiguous matrix of that width are, as threads move them."""
    row = gl.arange(0, HALF, gl.SliceLayout(1, MOVED))
    return row[:, None] * width + gl.arange(0, HALF, gl.SliceLayout(0, MOVED))[None, :]


@gluon.jit
def _store_map(stage, lost_stage, made, passing, maps, finals, stays, K: gl.constexpr, is_diagonal: gl.constexpr):
    """64 rows and columns of P, of what is `made` of k̄ᵀ T e^γ k, in two parts; the first also to `finals`, if it
    `stays`. On the diagonal is what is `passing`."""
    if is_diagonal:
        row = gl.arange(0, HALF, gl.SliceLayout(1, SUM))
        made -= gl.where(row[:, None] == gl.arange(0, HALF, COLUMNS)[None, :], passing, 0.0)
    whole, lost = in_parts(-made)
    stage.store(whole)
    lost_stage.store(lost)
    barrier()
    values = stage.load(MOVED)
    gl.store(maps + _offsets(K), values)
    if finals is not None:
        gl.store(finals + _offsets(K), values, mask=stays)
    gl.store(maps + K * K + _offsets(K), lost_stage.load(MOVED))


@kernel(gluon.jit, do_not_specialize=["N", "stride_b"])
def _leaves_wide_hopper_kernel(k, v, beta, inverse, gamma, added, maps, finals, tokens, firsts, rows_of, lefts, heights,
                               N, H, G, stride_k, stride_kg, stride_v, stride_vh, stride_b, KT: gl.constexpr,
                               VT: gl.constexpr):  # fmt: skip
    """U and P of one chunk: k̄ᵀ T times v, and times k e^γ."""
    head, slot = program_place()
    is_slot = slot < N
    writes = gl.load(lefts + slot, mask=is_slot, other=0) > 1
    rows = gl.load(rows_of + slot, mask=is_slot, other=0)
    token = gl.load(tokens + slot, mask=is_slot, other=0)
    if not writes:
        return  # nobody reads the last chunk of a sequence
    first = None if firsts is None else gl.load(firsts + slot)
    stays = None if finals is None else gl.load(heights + slot) == 0
    place = slot.to(gl.int64) * H + head
    K: gl.constexpr = KT * HALF
    V: gl.constexpr = VT * SIZE
    tiles: gl.constexpr = 2 * VT  # of 64 values

    keys = gl.allocate_shared_memory(gl.bfloat16, [KT, SIZE, HALF], SHARED)
    values = gl.allocate_shared_memory(gl.bfloat16, [tiles, SIZE, HALF], SHARED)
    inverse0, inverse1, inverse2 = new_half(), new_half(), new_half()
    stage0, stage1, stage2, stage3 = _new_stage(), _new_stage(), _new_stage(), _new_stage()
    decay, entering, strength = new_line(), new_line(), new_line()

    k += (head // (H // G)).to(gl.int64) * stride_kg
    v += head.to(gl.int64) * stride_vh
    inverse += place * QUARTERS
    size = N.to(gl.int64) * H * QUARTERS  # of a part of X
    copy_columns(keys.index(0), k, token, first, rows, stride_k, None, MOVED)
    copy_two_quarters(inverse0, inverse, QUARTER, MOVED)
    copy_two_quarters(inverse1, inverse + size, QUARTER, MOVED)
    copy_two_quarters(inverse2, inverse + 2 * QUARTER, size, MOVED)
    async_copy.commit_group()
    for tile in gl.static_range(tiles):
        copy_columns(values.index(tile), v + tile * HALF, token, first, rows, stride_v, None, MOVED)
        async_copy.commit_group()
    for tile in gl.static_range(1, KT):
        copy_columns(keys.index(tile), k + tile * HALF, token, first, rows, stride_k, None, MOVED)
    async_copy.commit_group()

    each = gl.arange(0, SIZE, EACH)
    sums_at = gamma + (head.to(gl.int64) * N + slot) * SIZE
    sums, end = gl.load(sums_at + each), gl.load(sums_at + (SIZE - 1))
    decay.store(decay_of(end - sums))
    entering.store(decay_of(sums))
    strength.store(load_column(beta + head, each, token, first, rows, stride_b))
    passing = decay_of(end)
    added += place * (K * V)
    maps += place * (2 * K * K)
    if finals is not None:
        finals += place * (K * K)

    arrived(tiles + 1)
    left0, left1, keys0, keys1 = _begin_left(keys.index(0), decay, inverse0, inverse1, inverse2)
    left0, left1, _, _ = warpgroup_mma_wait(0, deps=[left0, left1, keys0, keys1])
    for key in range(KT):
        whole0, lost0 = in_parts(left0 * _by_column(strength, 0))
        whole1, lost1 = in_parts(left1 * _by_column(strength, 1))
        left = (
            gl.convert_layout(whole0, LEFT), gl.convert_layout(lost0, LEFT),
            gl.convert_layout(whole1, LEFT), gl.convert_layout(lost1, LEFT),
        )  # fmt: skip
        # U, and then P: from the diagonal on, so that where tiles are differs, or the compiler spills all of that
        arrived(tiles - 1)
        coming = _times(*left, values.index(key % tiles))
        for step in gl.static_range(tiles):
            made = coming
            if step + 1 < tiles:
                coming = _times(*left, values.index((key + step + 1) % tiles))
            else:
                whole0, lost0 = _left_times(left[0], left[1], entering, 0)
                whole1, lost1 = _left_times(left[2], left[3], entering, 1)
                entered = (whole0, lost0, whole1, lost1)
                coming = _times(*entered, keys.index(key))
            made = _made(made, left, TIMES)
            stage = stage0 if step % 2 == 0 else stage1
            stage.store(made.to(gl.bfloat16))
            if step + 2 <= tiles:
                arrived(tiles - step - 2)
            else:
                barrier()
            at = key * HALF * V + (key + step) % tiles * HALF
            gl.store(added + at + _offsets(V), stage.load(MOVED))
        for step in gl.static_range(KT):
            made = coming
            at = key * HALF * K + (key + step) % KT * HALF
            finals_at = None if finals is None else finals + at
            stage = stage2 if step % 2 == 0 else stage0
            lost_stage = stage3 if step % 2 == 0 else stage1
            if step + 1 < KT:
                coming = _times(*entered, keys.index((key + step + 1) % KT))
                made = _made(made, entered, TIMES)
            else:
                following = keys.index((key + 1) % KT)
                left0, left1, keys0, keys1 = _begin_left(following, decay, inverse0, inverse1, inverse2)
                made = _made(made, entered, LEFTS)
            _store_map(stage, lost_stage, made, passing, maps + at, finals_at, stays, K, step == 0)
        left0, left1, _, _ = warpgroup_mma_wait(0, deps=[left0, left1, keys0, keys1])
