"""Why there are kernels for Hopper by themselves, and what they share.

A program that has all rows of a chunk has a multiprocessor to itself, and a load that goes through registers keeps it
waiting (docs/log.md, 27 and 28 November 2026). The kernels of `delta_hopper_*.py` ask for everything as soon as there
is shared memory for it: no register is held by what is under way, and a matrix is there when its turn comes. They are
written in Gluon, which is Triton with layouts, shared memory and copies in the hands of who writes it, for bfloat16,
chunks of 128 rows, and keys and values of 128 columns; `takes_hopper` in `delta_chunks.py` says where they run. Each
takes what the kernel of Triton takes in whose place it runs, and gives the same, but for sums that are added up in
another order, and for NaN, which spreads a little further within a chunk.

A product takes its right operand from shared memory, and its left one from registers or shared memory. Copies to
shared memory come in groups: `commit_group` ends one, `arrived` waits for all but the last few. What is stored in
shared memory and multiplied next takes `fence_async_shared` and a barrier between.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

from loglinear.ops.triton.common import in_same_block, row_exists
from loglinear.ops.triton.delta_chunks import HOPPER_WARPS

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before Triton 3.7

WARPS = HOPPER_WARPS
ASSEMBLES = gl.constexpr(hasattr(gl, "inline_asm_elementwise"))  # not in the emulator of the tests
SIZE = gl.constexpr(128)  # rows of a chunk, columns of keys and of values
HALF = gl.constexpr(64)
WHOLE_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 16]))  # of products [128, 128]
HALF_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16]))  # and [128, 64]
LEFT = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 16]), 2))
LEFT_HALF = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16]), 2))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS], [0]))  # one number a thread
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # of numbers in shared memory
# HALF_SUM with its columns in blocks of eight, [128, 8, 8]: a thread has two columns of each
BLOCK = gl.constexpr(8)
BLOCK_HEIGHT = gl.constexpr(3)
BLOCKS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        [],
        [128, 8, 8],
    )
)
OF_BLOCKS = gl.constexpr(gl.SliceLayout(2, BLOCKS))  # [128, 8], a number for each block
IN_BLOCK = gl.constexpr(gl.SliceLayout(1, BLOCKS))  # [128, 8], of the columns of one block
SUMMED = gl.constexpr(gl.BlockedLayout([8, 4], [1, 32], [WARPS, 1], [1, 0]))  # [64, 128], eight rows a thread
MOVED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0]))  # of a tile, 16 bytes a thread
MOVED_HALF = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))  # of 64 columns


@gluon.jit
def new_tile():
    """[128, 128] of shared memory. Each by itself, so that the compiler sees that what is done with one has nothing to
    do with another: it puts barriers between copies to parts of one."""
    return gl.allocate_shared_memory(gl.bfloat16, [SIZE, SIZE], SHARED)


@gluon.jit
def copy_rows(tile, pointer, token, first, rows, stride):
    """Begins to bring the rows of a chunk to shared memory: zero where there is none."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    at = pointer + token.to(gl.int64) * stride + (row[:, None] * stride + column[None, :])
    async_copy.async_copy_global_to_shared(tile, at, mask=row_exists(row, first, rows)[:, None])


@gluon.jit
def offsets():
    """Of a contiguous [128, 128], as it is moved."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED))
    return row[:, None] * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))[None, :]


@gluon.jit
def copy_tile(tile, pointer, exists=None):
    """Begins to bring a contiguous [128, 128] to shared memory; zeros if it does not exist."""
    async_copy.async_copy_global_to_shared(tile, pointer + offsets(), mask=exists)


@gluon.jit
def store_tile(tile, pointer):
    """And back."""
    gl.store(pointer + offsets(), tile.load(MOVED))


@gluon.jit
def _quarters(matrix, place):
    """Where the numbers of a chunk's lower triangular matrix are, and which of [128, 128] it has."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    below, right = row // HALF, column // HALF
    quarter = below[:, None] + right[None, :]
    at = quarter * (HALF * HALF) + ((row % HALF * HALF)[:, None] + (column % HALF)[None, :])
    return matrix + place * (3 * HALF * HALF) + at, below[:, None] >= right[None, :]


@gluon.jit
def copy_quarters(tile, matrix, place):
    """Begins to bring a chunk's lower triangular matrix to shared memory, with zeros above the diagonal."""
    at, exists = _quarters(matrix, place)
    async_copy.async_copy_global_to_shared(tile, at, mask=exists)


@gluon.jit
def store_quarters(tile, matrix, place):
    """And back."""
    at, exists = _quarters(matrix, place)
    gl.store(at, tile.load(MOVED), mask=exists)


@gluon.jit
def copy_quarter(tile, pointer):
    """Begins to bring a contiguous [64, 64] to shared memory."""
    row = gl.arange(0, HALF, gl.SliceLayout(1, MOVED_HALF))
    column = gl.arange(0, HALF, gl.SliceLayout(0, MOVED_HALF))
    async_copy.async_copy_global_to_shared(tile, pointer + (row[:, None] * HALF + column[None, :]))


@gluon.jit
def arrived(later: gl.constexpr):
    """Waits for what was asked for, but for the `later` groups, to be seen by products."""
    async_copy.wait_group(later)
    fence_async_shared()
    barrier()


@gluon.jit
def load_column(pointer, row, token, first, rows, stride):
    """One number per row of a chunk, as float32: zero where there is no row."""
    at = pointer + token.to(gl.int64) * stride + row * stride
    return gl.load(at, mask=row_exists(row, first, rows), other=0.0).to(gl.float32)


@gluon.jit
def load_level(lam, row, token, first, rows, stride, level, L):
    """Level scales of the rows of a chunk."""
    return load_column(lam + gl.minimum(level, L - 1), row, token, first, rows, stride)


@gluon.jit
def store_rows(tile, values, pointer, token, first, rows, stride):
    """To the rows of a chunk, through shared memory, which makes lines of what threads have."""
    tile.store(values)
    barrier()
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    at = pointer + token.to(gl.int64) * stride + (row[:, None] * stride + column[None, :])
    gl.store(at, tile.load(MOVED), mask=row_exists(row, first, rows)[:, None])


@gluon.jit
def in_parts(values):
    """Float32 values as two of bfloat16: what the first has lost is the second.

    Two by two, as they are multiplied and stored: the compiler takes apart what is used twice, which is cast by
    instructions of a quarter of the speed, and takes twice the registers.
    """
    if ASSEMBLES:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            cvt.rn.bf16x2.f32 $0, $3, $2;
            shl.b32 low, $0, 16;
            and.b32 high, $0, 0xffff0000;
            sub.rn.f32 low, $2, low;
            sub.rn.f32 high, $3, high;
            cvt.rn.bf16x2.f32 $1, high, low;
            }""",
            "=&r,=r,r,r", [values], (gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        whole = values.to(gl.bfloat16)
        return whole, (values - whole.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def same_block(level: gl.constexpr):
    """Which blocks of eight columns a row shares a block of 2^level rows with; if that is smaller, which columns of its
    own eight."""
    if level < BLOCK_HEIGHT:
        row = gl.arange(0, SIZE, gl.SliceLayout(1, IN_BLOCK)) % BLOCK
        column = gl.arange(0, BLOCK, gl.SliceLayout(0, IN_BLOCK))
        return in_same_block(row[:, None], column[None, :], level)
    else:
        row = gl.arange(0, SIZE, gl.SliceLayout(1, OF_BLOCKS)) % HALF // BLOCK
        block = gl.arange(0, BLOCK, gl.SliceLayout(0, OF_BLOCKS))
        return in_same_block(row[:, None], block[None, :], level - BLOCK_HEIGHT)


@gluon.jit
def level_factor(lam, token, first, rows, stride, L, HEIGHT: gl.constexpr):
    """Level scale from source rows (columns) to target rows of the same half of a chunk: [128, 64], of both halves."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, OF_BLOCKS))
    factor = load_level(lam, row, token, first, rows, stride, HEIGHT, L)[:, None]
    for down in gl.static_range(HEIGHT - 1 - BLOCK_HEIGHT):
        near = load_level(lam, row, token, first, rows, stride, HEIGHT - 1 - down, L)
        factor = gl.where(same_block(HEIGHT - 1 - down), near[:, None], factor)
    row = gl.arange(0, SIZE, gl.SliceLayout(1, IN_BLOCK))
    inside = load_level(lam, row, token, first, rows, stride, BLOCK_HEIGHT, L)[:, None]
    for down in gl.static_range(BLOCK_HEIGHT):
        near = load_level(lam, row, token, first, rows, stride, BLOCK_HEIGHT - 1 - down, L)
        inside = gl.where(same_block(BLOCK_HEIGHT - 1 - down), near[:, None], inside)
    factor = gl.where(same_block(BLOCK_HEIGHT)[:, :, None], inside[:, None, :], factor[:, :, None])
    return gl.convert_layout(gl.reshape(factor, [SIZE, HALF]), HALF_SUM, assert_trivial=True)
