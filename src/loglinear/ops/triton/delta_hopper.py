"""Why there are kernels for Hopper by themselves, and what they share.

A program that has all rows of a chunk has a multiprocessor to itself, and a load that goes through registers keeps it
waiting (docs/log.md, 27 and 28 November 2026). The kernels of `delta_hopper_*.py` ask for everything as soon as there
is shared memory for it: no register is held by what is under way, and a matrix is there when its turn comes. They are
written in Gluon, which is Triton with layouts, shared memory and copies in the hands of who writes it, for bfloat16 and
chunks of 128 rows. Most have keys and values of 128 columns. `inverse` takes keys of other widths, too; `scores_back`,
`read`, `pull` and those that are called `_wide` take keys of two or three tiles of 64, and values of one to three of
128. `takes_hopper` in `delta_chunks.py` says where they run. Each takes what the kernel of Triton takes in whose place
it runs (`inverse`, `solved`, `solved_wide` and `pull`: the kernels), and gives the same, but for sums that are added up
in another order, what `pull` does not round on the way, and NaN, which spreads a little further within a chunk.

For who knows Triton and not Gluon:
    A layout says which thread has which numbers of a tensor, or where shared memory has them. `gl.convert_layout`
    changes it: for nothing if every thread keeps its registers (`assert_trivial=True`), else through shared memory.
    What is allocated in shared memory is named like the matrix that it holds, and gets another name with another matrix
    (the tables at the top of the modules). `tile.permute([1, 0])`, `slice`, `index` and `seen_as` only look at the
    same memory in another way; `tile.load(layout)` and `tile.store` move numbers to registers and back.
    Copies to shared memory come in groups: `commit_group` ends one, be it empty, and `arrived(n)` waits for all but the
    last n. So count the `commit_group`s above it, and the first copies are there.
    `warpgroup_mma(left, right, total)` is `tl.dot`, and with `is_async` only begins. `right` is in shared memory, and
    `left` there or in registers. `warpgroup_mma_wait(n, deps)` waits for all but the last n, and a product may be used
    only as it returns it; one of the last n is still under way then. Left operands are among `deps` so that nothing
    takes their registers before (hence `_`).
    Where code is unrolled, and multiplies the same tiles again and again, they are indexed by a number that is zero,
    which the compiler does not know: else it keeps in registers where every 16 columns of all of them are.
    What is stored in shared memory and multiplied next takes `fence_async_shared` and a barrier between (`arrived` has
    both). Another barrier stands where all threads must be done with a tile before it gets something else.

Names mean the same in all of them: `is_slot` whether the program has a slot at all; `rows`, `token`, `first` of its
chunk (see `common.row_exists`); `exists` which rows there are; `place` which [slot, head] it is; `group` that of its
head; `per_row` where its rows begin in what is [H, N, C]; `whole` and `lost` the two parts of a float32.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

from loglinear.ops.triton.common import in_same_block, row_exists
from loglinear.ops.triton.delta_chunks import HOPPER_WARPS

# what has other names since Triton 3.7 and 3.8 or 3.9
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
begin_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
SEES_AS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

WARPS = HOPPER_WARPS
ASSEMBLES = gl.constexpr(hasattr(gl, "inline_asm_elementwise"))  # not in the emulator of the tests
SIZE = gl.constexpr(128)  # rows of a chunk, columns of keys and of values
HALF = gl.constexpr(64)
MATRIX = gl.constexpr(SIZE * SIZE)  # numbers of a [128, 128]
QUARTER = gl.constexpr(HALF * HALF)  # of a [64, 64]
QUARTERS = gl.constexpr(3 * QUARTER)  # of a lower triangular matrix as it is stored

# where threads have a product ([3, 0]: of Hopper), its rows, its columns, and a left operand of that many columns
WHOLE_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 128, 16]))  # [128, 128]
ROWS = gl.constexpr(gl.SliceLayout(1, WHOLE_SUM))
COLUMNS = gl.constexpr(gl.SliceLayout(0, WHOLE_SUM))
LEFT = gl.constexpr(gl.DotOperandLayout(0, WHOLE_SUM, 2))
HALF_SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16]))  # [128, 64]
ROWS_OF_HALF = gl.constexpr(gl.SliceLayout(1, HALF_SUM))
COLUMNS_OF_HALF = gl.constexpr(gl.SliceLayout(0, HALF_SUM))
LEFT_HALF = gl.constexpr(gl.DotOperandLayout(0, HALF_SUM, 2))
# HALF_SUM with its columns in blocks of eight, [128, 8, 8]: a thread has two columns of each. The lists say what each
# bit of a register's number adds to its place, then each of a lane's, then each of a warp's
BLOCK = gl.constexpr(8)
BLOCK_HEIGHT = gl.constexpr(3)  # 2^3 = 8
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

# where threads have what is not multiplied
MOVED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0]))  # of a tile, 16 bytes a thread
MOVED_HALF = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))  # of 64 columns
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS], [0]))  # one number a thread
SUMMED = gl.constexpr(gl.BlockedLayout([8, 4], [1, 32], [WARPS, 1], [1, 0]))  # [64, 128], eight rows a thread

# of shared memory
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16))  # as products take it: swizzled by 128 bytes, numbers of 16 bits
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # numbers one after the other


@gluon.jit
def new_tile():
    """[128, 128] of shared memory. Each by itself, so that the compiler sees that what is done with one has nothing to
    do with another: it puts barriers between copies to parts of one."""
    return gl.allocate_shared_memory(gl.bfloat16, [SIZE, SIZE], SHARED)


@gluon.jit
def new_half():
    """[128, 64] of shared memory."""
    return gl.allocate_shared_memory(gl.bfloat16, [SIZE, HALF], SHARED)


@gluon.jit
def seen_as(tile, shape: gl.constexpr, layout: gl.constexpr = SHARED):
    """The shared memory of a tile, or the beginning of it, in another shape."""
    if SEES_AS:
        return tile.reinterpret(tile.dtype, shape, layout)
    else:
        return tile._reinterpret(tile.dtype, shape, layout)


@gluon.jit
def new_line():
    """[128] of shared memory, float32: to have by column what threads have by row, or the other way round."""
    return gl.allocate_shared_memory(gl.float32, [SIZE], LINE)


@gluon.jit
def places_of_rows(pointer, token, first, rows, stride, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Where so many columns of the rows of a chunk are, and which rows there are."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    at = pointer + token.to(gl.int64) * stride + (row[:, None] * stride + column[None, :])
    return at, row_exists(row, first, rows)[:, None]


@gluon.jit
def places_of_columns(pointer, stride):
    """Where 64 columns of a matrix [128, stride] are, as threads move them."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED_HALF))
    column = gl.arange(0, HALF, gl.SliceLayout(0, MOVED_HALF))
    return pointer + (row[:, None] * stride + column[None, :])


@gluon.jit
def places_of_half_rows(pointer, stride):
    """And 128 columns of 64 rows."""
    row = gl.arange(0, HALF, gl.SliceLayout(1, MOVED))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    return pointer + (row[:, None] * stride + column[None, :])


@gluon.jit
def copy_rows(tile, pointer, token, first, rows, stride):
    """Begins to bring the rows of a chunk to shared memory: zero where there is none."""
    at, exists = places_of_rows(pointer, token, first, rows, stride, SIZE, MOVED)
    begin_copy(tile, at, mask=exists)


@gluon.jit
def copy_columns(tile, pointer, token, first, rows, stride, exists=None, LAYOUT: gl.constexpr = MOVED_HALF):
    """And 64 columns of them, where they exist."""
    at, has_row = places_of_rows(pointer, token, first, rows, stride, HALF, LAYOUT)
    if exists is None:
        begin_copy(tile, at, mask=has_row)
    else:
        begin_copy(tile, at, mask=has_row & (exists != 0))


@gluon.jit
def copy_wide(tile, pointer, stride: gl.constexpr, left: gl.constexpr, exists):
    """Begins to bring 64 rows of a matrix to shared memory, of 128 columns as many as are left: zero beyond, and where
    it does not exist."""
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    begin_copy(tile, places_of_half_rows(pointer, stride), mask=(column < left)[None, :] & exists)


@gluon.jit
def offsets(stride: gl.constexpr = SIZE):
    """Where the numbers of 128 columns of a matrix [128, stride] are, as threads move them."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED))
    return row[:, None] * stride + gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))[None, :]


@gluon.jit
def copy_tile(tile, pointer, exists=None):
    """Begins to bring a contiguous [128, 128] to shared memory: zero where it does not exist."""
    begin_copy(tile, pointer + offsets(), mask=exists)


@gluon.jit
def copy_lower(tile, pointer):
    """The same, but for its upper right quarter: zero."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    copy_tile(tile, pointer, (row // HALF)[:, None] >= (column // HALF)[None, :])


@gluon.jit
def store_tile(tile, pointer):
    """A tile of shared memory, to a contiguous [128, 128]."""
    gl.store(pointer + offsets(), tile.load(MOVED))


@gluon.jit
def _quarters(matrix, place):
    """Where the numbers of a chunk's lower triangular matrix are, and which of [128, 128] it has: three quarters."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED))
    column = gl.arange(0, SIZE, gl.SliceLayout(0, MOVED))
    below, right = row // HALF, column // HALF
    quarter = below[:, None] + right[None, :]
    within = quarter * QUARTER + ((row % HALF * HALF)[:, None] + (column % HALF)[None, :])
    return matrix + place * QUARTERS + within, below[:, None] >= right[None, :]


@gluon.jit
def copy_quarters(tile, matrix, place, exists=None):
    """Begins to bring a chunk's lower triangular matrix to shared memory, with zeros above the diagonal, or zeros alone
    where it does not exist."""
    at, is_below = _quarters(matrix, place)
    if exists is None:
        begin_copy(tile, at, mask=is_below)
    else:
        begin_copy(tile, at, mask=is_below & (exists != 0))


@gluon.jit
def store_quarters(tile, matrix, place):
    """A tile of shared memory, to a chunk's lower triangular matrix."""
    at, exists = _quarters(matrix, place)
    gl.store(at, tile.load(MOVED), mask=exists)


@gluon.jit
def copy_quarter(tile, pointer):
    """Begins to bring a contiguous [64, 64] to shared memory."""
    row = gl.arange(0, HALF, gl.SliceLayout(1, MOVED_HALF))
    column = gl.arange(0, HALF, gl.SliceLayout(0, MOVED_HALF))
    begin_copy(tile, pointer + (row[:, None] * HALF + column[None, :]))


@gluon.jit
def copy_two_quarters(tile, pointer, apart, LAYOUT: gl.constexpr = MOVED_HALF):
    """Begins to bring two contiguous [64, 64] to shared memory, one below the other: the second begins so many numbers
    after the first."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
    at = pointer + ((row // HALF).to(gl.int64) * apart + row % HALF * HALF)[:, None]
    begin_copy(tile, at + column[None, :])


@gluon.jit
def _halves(matrix):
    """Where the first half of the columns of a lower triangular matrix is, and which of its rows the second half has,
    which is a quarter further on."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED_HALF))
    column = gl.arange(0, HALF, gl.SliceLayout(0, MOVED_HALF))
    return matrix + (row[:, None] * HALF + column[None, :]), (row >= HALF)[:, None]


@gluon.jit
def copy_first_half(tile, matrix):
    """Begins to bring the first half of the columns of a lower triangular matrix to shared memory, [128, 64]."""
    at, _ = _halves(matrix)
    begin_copy(tile, at)


@gluon.jit
def copy_halves(tile0, tile1, matrix):
    """And the second, whose upper half is zero."""
    at, below = _halves(matrix)
    begin_copy(tile0, at)
    begin_copy(tile1, at + QUARTER, mask=below)


@gluon.jit
def store_halves(tile0, tile1, matrix):
    """Two tiles [128, 64] of shared memory, to both halves of the columns of a lower triangular matrix."""
    at, below = _halves(matrix)
    gl.store(at, tile0.load(MOVED_HALF))
    gl.store(at + QUARTER, tile1.load(MOVED_HALF), mask=below)


@gluon.jit
def arrived(later: gl.constexpr):
    """Waits until products can take what was asked for, but for the last groups, so many."""
    async_copy.wait_group(later)
    fence_async_shared()
    barrier()


@gluon.jit
def load_column(pointer, row, token, first, rows, stride):
    """One number per row of a chunk, as float32: zero where there is no row."""
    at = pointer + token.to(gl.int64) * stride + row * stride
    return gl.load(at, mask=row_exists(row, first, rows), other=0.0).to(gl.float32)


@gluon.jit
def load_if(table, exists, slot):
    """What a table of slots has for one that there may not be: else zero."""
    return gl.load(table + slot, mask=exists, other=0)


@gluon.jit
def load_level(lam, row, token, first, rows, stride, level, L):
    """Level scales of the rows of a chunk."""
    return load_column(lam + gl.minimum(level, L - 1), row, token, first, rows, stride)


@gluon.jit
def store_rows(tile, values, pointer, token, first, rows, stride):
    """To the rows of a chunk, through a tile of shared memory, from which they go out in whole lines."""
    tile.store(values)
    barrier()
    at, exists = places_of_rows(pointer, token, first, rows, stride, SIZE, MOVED)
    gl.store(at, tile.load(MOVED), mask=exists)


@gluon.jit
def sum_of_rows(values):
    """[128] of [128, 128]. Each thread gets eight rows of four columns first: to sum as they lie takes three shuffles
    for every column."""
    pairs = gl.sum(gl.reshape(values, [SIZE // (2 * BLOCK), 2, BLOCK, SIZE]), 1)  # a thread has both, eight rows apart
    return gl.sum(gl.convert_layout(gl.reshape(pairs, [HALF, SIZE]), SUMMED), 0)


@gluon.jit
def in_halves(product):
    """[128, 128] as two halves of its columns."""
    first, second = gl.split(gl.permute(gl.reshape(product, [SIZE, 2, HALF]), [0, 2, 1]))
    first = gl.convert_layout(first, HALF_SUM, assert_trivial=True)
    return first, gl.convert_layout(second, HALF_SUM, assert_trivial=True)


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
def parts_times(whole, lost, factor):
    """The sum of two parts times a float32 factor, as two parts again.

    Not by the instructions with which `in_parts` took `whole` apart, whose results would be kept till here.
    """
    if ASSEMBLES:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, rest;
            prmt.b32 low, $2, 0, 0x1044;
            shl.b32 rest, $3, 16;
            add.rn.f32 low, low, rest;
            mul.rn.f32 low, low, $4;
            prmt.b32 high, $2, 0, 0x3244;
            and.b32 rest, $3, 0xffff0000;
            add.rn.f32 high, high, rest;
            mul.rn.f32 high, high, $5;
            cvt.rn.bf16x2.f32 $0, high, low;
            shl.b32 rest, $0, 16;
            sub.rn.f32 low, low, rest;
            and.b32 rest, $0, 0xffff0000;
            sub.rn.f32 high, high, rest;
            cvt.rn.bf16x2.f32 $1, high, low;
            }""",
            "=r,=r,r,r,r,r", [whole, lost, factor], (gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return in_parts((whole.to(gl.float32) + lost.to(gl.float32)) * factor)


@gluon.jit
def in_three_parts(values):
    """Float32 values as three of bfloat16, which lose nothing: what the first has lost is the second, and so on."""
    if ASSEMBLES:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, taken;
            cvt.rn.bf16x2.f32 $0, $4, $3;
            shl.b32 taken, $0, 16;
            sub.rn.f32 low, $3, taken;
            and.b32 taken, $0, 0xffff0000;
            sub.rn.f32 high, $4, taken;
            cvt.rn.bf16x2.f32 $1, high, low;
            shl.b32 taken, $1, 16;
            sub.rn.f32 low, low, taken;
            and.b32 taken, $1, 0xffff0000;
            sub.rn.f32 high, high, taken;
            cvt.rn.bf16x2.f32 $2, high, low;
            }""",
            "=&r,=&r,=r,r,r", [values], (gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        whole, lost = in_parts(values)
        return whole, lost, (values - whole.to(gl.float32) - lost.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def same_block(level: gl.constexpr):
    """[128, 8], with what a row of half a chunk shares a block of 2^level rows: which blocks of eight columns, or if
    2^level < 8, which columns of its own eight."""
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
    """Level scale from source rows (columns) to target rows of the same half of a chunk: [128, 64], of both halves, one
    below the other. Half a chunk is 2^HEIGHT rows. From the highest level to the lowest, each where it is nearer."""
    # between blocks of eight columns
    row = gl.arange(0, SIZE, gl.SliceLayout(1, OF_BLOCKS))
    factor = load_level(lam, row, token, first, rows, stride, HEIGHT, L)[:, None]
    for down in gl.static_range(HEIGHT - 1 - BLOCK_HEIGHT):
        near = load_level(lam, row, token, first, rows, stride, HEIGHT - 1 - down, L)
        factor = gl.where(same_block(HEIGHT - 1 - down), near[:, None], factor)
    # in a row's own eight
    row = gl.arange(0, SIZE, gl.SliceLayout(1, IN_BLOCK))
    inside = load_level(lam, row, token, first, rows, stride, BLOCK_HEIGHT, L)[:, None]
    for down in gl.static_range(BLOCK_HEIGHT):
        near = load_level(lam, row, token, first, rows, stride, BLOCK_HEIGHT - 1 - down, L)
        inside = gl.where(same_block(BLOCK_HEIGHT - 1 - down), near[:, None], inside)
    factor = gl.where(same_block(BLOCK_HEIGHT)[:, :, None], inside[:, None, :], factor[:, :, None])
    return gl.convert_layout(gl.reshape(factor, [SIZE, HALF]), HALF_SUM, assert_trivial=True)
