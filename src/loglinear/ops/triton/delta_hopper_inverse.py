"""Both kernels of `delta_inverse.py` for Hopper, in one.

A program of four warps has a chunk, whose keys come once. What is joined stays in registers and shared memory; several
programs share a multiprocessor, and while one waits for a product or a sum another goes on. A warp has 16 rows of half
of a chunk, which are a block of the diagonal: it inverts that row by row by itself. Blocks are joined by products in
three bfloat16 parts, which lose nothing of float32, but for Y in the last join, which comes back in the two parts that
are stored. With two throughout, outputs for nearly equal keys and β = 2 are wrong by 7.2e-3 instead of 4.0e-3.

Keys are 64, 128, 192 or 256 wide. Legend as in `delta_inverse.py`, and
    own [64, 64] A of half of a chunk
    whole, lost, rest [64, 64] shared memory for the three parts of the right side of a product, one after the other:
        blocks of 16 rows, side by side; -B X of them; both blocks of 32 rows; -B X of the first; the inverse of the
        half, which is stored from there; and when both halves are done, -B X of the first, and the quarter below
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from loglinear.ops.triton.common import decays_between, log2_of, program_place
from loglinear.ops.triton.delta_hopper import (
    HALF,
    QUARTER,
    QUARTERS,
    SHARED,
    SIZE,
    arrived,
    barrier,
    begin_copy,
    in_three_parts,
    load_column,
    new_line,
    places_of_rows,
    seen_as,
)
from loglinear.ops.triton.delta_inverse import INVERSE_WARPS
from loglinear.ops.triton.launch import kernel

WARPS = INVERSE_WARPS
BASE = gl.constexpr(16)  # rows that are inverted one by one
BLOCKS = gl.constexpr(4)  # of them in half a chunk

SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16]))  # of products, [64, 64]
ROWS = gl.constexpr(gl.SliceLayout(1, SUM))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUM))
LEFT = gl.constexpr(gl.DotOperandLayout(0, SUM, 2))
# SUM with its columns in blocks of 16, [64, 4, 16]; see `delta_hopper.BLOCKS`
BY_BLOCK = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 1, 0], [0, 2, 0]],
        [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 4, 16],
    )
)
OF_BLOCKS = gl.constexpr(gl.SliceLayout(2, BY_BLOCK))  # [64, 4], a number for each block
ONE_BLOCK = gl.constexpr(gl.SliceLayout(1, BY_BLOCK))  # [64, 16], one block of each row
# blocks that are inverted, [4, 16, 16]: a warp has one, a thread eight rows of a column
SOLVED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 8, 0]],
        [[1, 0, 0], [2, 0, 0]],
        [],
        [4, 16, 16],
    )
)
WEIGHTS = gl.constexpr(gl.SliceLayout(2, SOLVED))  # [4, 16], a row of each block
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS], [0]))  # a row of a chunk a thread
MOVED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))  # of 64 columns, 16 bytes a thread
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))  # numbers one after the other


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _overlap(keys, sums, strength, half: gl.constexpr, other: gl.constexpr, KT: gl.constexpr):
    """A from the rows of one half to those of another, or its own."""
    total = gl.zeros([HALF, HALF], gl.float32, SUM)
    for tile in gl.static_range(KT):
        left, right = keys.index(tile).slice(half * HALF, HALF), keys.index(tile).slice(other * HALF, HALF)
        total = warpgroup_mma(left, right.permute([1, 0]), total, use_acc=tile > 0, is_async=True)
    total = warpgroup_mma_wait(0, deps=[total])
    later, earlier = sums.slice(half * HALF, HALF).load(ROWS), sums.slice(other * HALF, HALF).load(COLUMNS)
    total *= decays_between(later, earlier) * strength.slice(half * HALF, HALF).load(ROWS)[:, None]
    if half == other:
        row, column = gl.arange(0, HALF, ROWS), gl.arange(0, HALF, COLUMNS)
        total = gl.where(row[:, None] > column[None, :], total, 0.0)
    return total


@gluon.jit
def _put(values, whole, lost, rest):
    """Float32 values into shared memory, as the right side of a product."""
    barrier()  # what is there is read
    first, second, third = in_three_parts(values)
    whole.store(first)
    lost.store(second)
    rest.store(third)
    fence_async_shared()
    barrier()


@gluon.jit
def _times(left, whole, lost, rest):
    """A product [64, 64] of float32 values with what was put into shared memory, but for what is too small to count."""
    first, second, third = in_three_parts(left)
    first, second = gl.convert_layout(first, LEFT), gl.convert_layout(second, LEFT)
    third = gl.convert_layout(third, LEFT)
    total = gl.zeros([HALF, HALF], gl.float32, SUM)
    total = warpgroup_mma(third, whole, total, use_acc=False, is_async=True)
    total = warpgroup_mma(second, lost, total, is_async=True)
    total = warpgroup_mma(first, rest, total, is_async=True)
    total = warpgroup_mma(second, whole, total, is_async=True)
    total = warpgroup_mma(first, lost, total, is_async=True)
    total = warpgroup_mma(first, whole, total, is_async=True)
    total, _, _, _ = warpgroup_mma_wait(0, deps=[total, first, second, third])
    return total


@gluon.jit
def _by_block(values):
    """A product's columns in blocks of 16: the same registers."""
    return gl.convert_layout(gl.reshape(values, [HALF, BLOCKS, BASE]), BY_BLOCK, assert_trivial=True)


@gluon.jit
def _one_block(values, which):
    """Of each row the block of 16 columns that is meant, or zero: [64, 16]."""
    return gl.sum(gl.where(which, values, 0.0), 1)


@gluon.jit
def _turned(values):
    """Blocks of 16 rows one below the other, [64, 16], side by side."""
    return gl.reshape(gl.permute(gl.reshape(values, [BLOCKS, BASE, BASE]), [1, 0, 2]), [BASE, HALF])


@gluon.jit
def _of_columns(values, last: gl.constexpr):
    """The first or last 32 columns of [64, 64]."""
    first, second = gl.split(gl.permute(gl.reshape(values, [HALF, 2, HALF // 2]), [0, 2, 1]))
    return second if last else first


@gluon.jit
def _first_rows(tile):
    """32 of [64, 64] in shared memory."""
    return tile.slice(0, HALF // 2)


@gluon.jit
def _last_rows(tile):
    return tile.slice(HALF // 2, HALF // 2)


@gluon.jit
def _inverse_of_blocks(own, base):
    """Of the blocks of 16 rows on the diagonal of I + own, [64, 16]. `base` [16, 64] is shared memory."""
    base.store(_turned(own))
    barrier()
    weights_of = seen_as(base, [BASE, BLOCKS, BASE], PLAIN)
    row = gl.arange(0, BASE, gl.SliceLayout(0, WEIGHTS))[None, :, None]
    column = gl.arange(0, BASE, gl.SliceLayout(0, gl.SliceLayout(1, SOLVED)))[None, None, :]
    solved = gl.where(row == column, 1.0, 0.0) + gl.zeros([BLOCKS, BASE, BASE], gl.float32, SOLVED)
    for number in gl.static_range(1, BASE):
        weights = weights_of.index(number).load(WEIGHTS)  # zero from this row on
        known = gl.sum(weights[:, :, None] * solved, 1)
        solved = gl.where(row == number, solved - known[:, None, :], solved)
    return gl.convert_layout(gl.reshape(solved, [HALF, BASE]), ONE_BLOCK)


@gluon.jit
def _inverse_of_half(own, base, whole, lost, rest):
    """(I + own)⁻¹ [64, 64]."""
    block_of_row = (gl.arange(0, HALF, gl.SliceLayout(1, OF_BLOCKS)) // BASE)[:, None]
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, OF_BLOCKS))[None, :]
    on_diagonal = (block == block_of_row)[:, :, None]
    below = ((block + 1 == block_of_row) & (block % 2 == 0))[:, :, None]  # what joins two blocks of 16
    blocks = _by_block(own)
    lower = _of_columns(own, False)
    between = _one_block(blocks, below)
    inverse = _inverse_of_blocks(_one_block(blocks, on_diagonal), base)

    # 32 rows: each row meets all four blocks, of which it needs one
    whole_row, lost_row = seen_as(whole, [BASE, HALF]), seen_as(lost, [BASE, HALF])
    rest_row = seen_as(rest, [BASE, HALF])
    _put(_turned(inverse), whole_row, lost_row, rest_row)
    step = _one_block(_by_block(_times(between, whole_row, lost_row, rest_row)), below)
    _put(_turned(-step), whole_row, lost_row, rest_row)
    step = _one_block(_by_block(_times(inverse, whole_row, lost_row, rest_row)), on_diagonal)
    joined = gl.where(on_diagonal, inverse[:, None, :], gl.where(below, step[:, None, :], 0.0))
    joined = gl.convert_layout(gl.reshape(joined, [HALF, HALF]), SUM, assert_trivial=True)

    # 64 rows
    _put(joined, whole, lost, rest)
    step = _times(lower, _first_rows(whole), _first_rows(lost), _first_rows(rest))
    _put(-step, whole, lost, rest)  # of which the lower half is meant
    return joined + _times(_of_columns(joined, True), _last_rows(whole), _last_rows(lost), _last_rows(rest))


@gluon.jit
def _places(quarter):
    """Where the numbers of a contiguous [64, 64] are, as threads move them."""
    row, column = gl.arange(0, HALF, gl.SliceLayout(1, MOVED)), gl.arange(0, HALF, gl.SliceLayout(0, MOVED))
    return quarter + (row[:, None] * HALF + column[None, :])


@gluon.jit
def _store_quarter(whole, lost, quarter, size):
    at = _places(quarter)
    gl.store(at, whole.load(MOVED))
    gl.store(at + size, lost.load(MOVED))


@kernel(gluon.jit, do_not_specialize=["N", "stride_d", "stride_b"])
def _inverse_hopper_kernel(k, log_decay, beta, inverse, gamma, tokens, firsts, rows_of, N, H, G, stride_k, stride_kg,
                           stride_d, stride_b, KT: gl.constexpr):  # fmt: skip
    """The inverse of one chunk, and its gamma."""
    head, slot = program_place()
    if slot >= N:
        return
    rows, token = gl.load(rows_of + slot), gl.load(tokens + slot)
    first = None if firsts is None else gl.load(firsts + slot)
    group = (head // (H // G)).to(gl.int64)
    inverse += (slot.to(gl.int64) * H + head) * QUARTERS
    size = N.to(gl.int64) * H * QUARTERS  # of a part
    keys = gl.allocate_shared_memory(gl.bfloat16, [KT, SIZE, HALF], SHARED)
    whole = gl.allocate_shared_memory(gl.bfloat16, [HALF, HALF], SHARED)
    lost = gl.allocate_shared_memory(gl.bfloat16, [HALF, HALF], SHARED)
    rest = gl.allocate_shared_memory(gl.bfloat16, [HALF, HALF], SHARED)
    base = gl.allocate_shared_memory(gl.float32, [BASE, HALF], PLAIN)
    for tile in gl.static_range(KT):
        at, exists = places_of_rows(k + group * stride_kg + tile * HALF, token, first, rows, stride_k, HALF, MOVED)
        begin_copy(keys.index(tile), at, mask=exists)
    async_copy.commit_group()

    row = gl.arange(0, SIZE, EACH)
    found = gl.associative_scan(log2_of(load_column(log_decay + head, row, token, first, rows, stride_d)), 0, _add)
    gl.store(gamma + (head.to(gl.int64) * N + slot) * SIZE + row, found)
    sums, strength = new_line(), new_line()
    sums.store(found)
    strength.store(load_column(beta + head, row, token, first, rows, stride_b))
    arrived(0)

    _put(_inverse_of_half(_overlap(keys, sums, strength, 1, 1, KT), base, whole, lost, rest), whole, lost, rest)
    _store_quarter(whole, lost, inverse + 2 * QUARTER, size)
    _put(_inverse_of_half(_overlap(keys, sums, strength, 0, 0, KT), base, whole, lost, rest), whole, lost, rest)
    _store_quarter(whole, lost, inverse, size)
    step = _times(_overlap(keys, sums, strength, 1, 0, KT), whole, lost, rest)
    _put(-step, whole, lost, rest)
    # the inverse of the second half comes back as it is stored, to where the keys were
    later, lost_later = keys.index(0).slice(0, HALF), keys.index(0).slice(HALF, HALF)
    at = _places(inverse + 2 * QUARTER)
    begin_copy(later, at)
    begin_copy(lost_later, at + size)
    async_copy.commit_group()
    arrived(0)
    total = gl.zeros([HALF, HALF], gl.float32, SUM)
    total = warpgroup_mma(later, rest, total, use_acc=False, is_async=True)
    total = warpgroup_mma(lost_later, lost, total, is_async=True)
    total = warpgroup_mma(lost_later, whole, total, is_async=True)
    total = warpgroup_mma(later, lost, total, is_async=True)
    total = warpgroup_mma(later, whole, total, is_async=True)
    _put(warpgroup_mma_wait(0, deps=[total]), whole, lost, rest)
    _store_quarter(whole, lost, inverse + QUARTER, size)
