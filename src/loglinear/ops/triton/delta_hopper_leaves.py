"""`_leaves_kernel` of `delta_halves.py` for Hopper.

One program has all rows of U and P, and asks for each matrix once, as soon as it begins. Two share a multiprocessor if
they are launched with `maxnreg=128`: one loads or stores while the other multiplies. That leaves no room for what P is
made of in float32 while U is made: there is k̄ᵀ T in its two parts alone, the first in registers and the second in
shared memory, and P comes from their sum, which is off by 2^-18 of it at most. Both are made by 64 columns at a time.

Legend as in `delta_halves.py`. What the tiles of shared memory are, one after the other, [128, 64] each but
for k, and `lost` what the first part has lost:
    0 first columns of X; lost of the first of k̄ᵀ T; first columns of P; lost of the last of P
    1 lost of the first columns of X; lost of the last of k̄ᵀ T; lost of the first of P
    2 last columns of X, and lost of them; first columns of U; lost of the last of k̄ᵀ T e^γ
    3 first columns of v; last columns of U; last columns of P
    4 last columns of v; lost of the first of k̄ᵀ T e^γ
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

from loglinear.ops.triton.common import decay_of, program_place
from loglinear.ops.triton.delta_hopper import (
    COLUMNS_OF_HALF,
    EACH,
    HALF,
    HALF_SUM,
    LEFT_HALF,
    MATRIX,
    MOVED_HALF,
    QUARTER,
    QUARTERS,
    ROWS_OF_HALF,
    SIZE,
    arrived,
    barrier,
    copy_columns,
    copy_rows,
    copy_two_quarters,
    in_parts,
    load_column,
    new_half,
    new_tile,
    parts_times,
)
from loglinear.ops.triton.launch import kernel


@gluon.jit
def _by_column(numbers):
    """One number for each of 64 columns of a product."""
    return gl.convert_layout(numbers, COLUMNS_OF_HALF)[None, :]


@gluon.jit
def _turned_keys(keys, decay):
    """Half of the rows of k, turned, each row times its `decay`: a left operand [128, 64]."""
    turned = _as_sum(keys.permute([1, 0]).load(LEFT_HALF)).to(gl.float32)
    return _as_left((turned * _by_column(decay)).to(gl.bfloat16))


@gluon.jit
def _as_left(values):
    """Values where threads have a product, as a left operand: the same registers."""
    return gl.convert_layout(values, LEFT_HALF)


@gluon.jit
def _as_sum(values):
    """A left operand, as values where threads have a product: the same registers."""
    return gl.convert_layout(values, HALF_SUM)


@gluon.jit
def _times_rows(whole0, whole1, lost0, lost1, columns):
    """Begins the product of a left operand with 64 columns of the rows of a chunk. The left operand comes in two parts,
    and by halves of its columns, 0 and 1."""
    right0, right1 = columns.slice(0, HALF), columns.slice(HALF, HALF)
    made = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)
    made = warpgroup_mma(whole0, right0, made, use_acc=False, is_async=True)
    made = warpgroup_mma(whole1, right1, made, is_async=True)
    made = warpgroup_mma(lost0, right0, made, is_async=True)
    return warpgroup_mma(lost1, right1, made, is_async=True)


@gluon.jit
def _offsets(half: gl.constexpr):
    """Where the numbers of half of the columns of a contiguous [128, 128] are, as threads move them."""
    row = gl.arange(0, SIZE, gl.SliceLayout(1, MOVED_HALF))
    column = gl.arange(0, HALF, gl.SliceLayout(0, MOVED_HALF))
    return row[:, None] * SIZE + (column[None, :] + half * HALF)


@gluon.jit
def _store_half(tile, pointer, half: gl.constexpr):
    """A tile [128, 64] of shared memory, to half of the columns of a contiguous [128, 128]."""
    gl.store(pointer + _offsets(half), tile.load(MOVED_HALF))


@gluon.jit
def _map_in_parts(taken, passing, half: gl.constexpr):
    """Half of the columns of P: `passing` on the diagonal, less what is `taken`."""
    row = gl.arange(0, SIZE, ROWS_OF_HALF)
    column = gl.arange(0, HALF, COLUMNS_OF_HALF) + half * HALF
    return in_parts(gl.where(row[:, None] == column[None, :], passing, 0.0) - taken)


@gluon.jit
def _store_map(tile, lost_tile, maps, finals, stays, half: gl.constexpr):
    """Half of the columns of P, in two parts; the first also to `finals`, if it `stays`."""
    values = tile.load(MOVED_HALF)
    gl.store(maps + _offsets(half), values)
    if finals is not None:
        if stays:
            gl.store(finals + _offsets(half), values)
    _store_half(lost_tile, maps + MATRIX, half)


@kernel(gluon.jit, do_not_specialize=["N", "stride_b"])
def _leaves_hopper_kernel(k, v, beta, inverse, gamma, added, maps, finals, tokens, firsts, rows_of, lefts, heights, N,
                          H, G, stride_k, stride_kg, stride_v, stride_vh, stride_b):  # fmt: skip
    """U and P of one chunk: k̄ᵀ T times v, and times k e^γ."""
    head, slot = program_place()
    is_slot = slot < N
    writes = gl.load(lefts + slot, mask=is_slot, other=0) > 1
    rows = gl.load(rows_of + slot, mask=is_slot, other=0)
    token = gl.load(tokens + slot, mask=is_slot, other=0)
    if not writes:
        return  # nobody reads the last chunk of a sequence
    first = None if firsts is None else gl.load(firsts + slot)
    later = None if first is None else first - HALF  # as if the second half were a chunk
    stays = None if finals is None else gl.load(heights + slot) == 0
    place = slot.to(gl.int64) * H + head
    group = (head // (H // G)).to(gl.int64)

    keys = new_tile()
    tile0, tile1, tile2, tile3, tile4 = new_half(), new_half(), new_half(), new_half(), new_half()
    copy_rows(keys, k + group * stride_kg, token, first, rows, stride_k)
    async_copy.commit_group()
    inverse += place * QUARTERS
    size = N.to(gl.int64) * H * QUARTERS  # of a part of X
    copy_two_quarters(tile0, inverse, QUARTER)
    copy_two_quarters(tile1, inverse + size, QUARTER)
    copy_two_quarters(tile2, inverse + 2 * QUARTER, size)
    async_copy.commit_group()
    v += head.to(gl.int64) * stride_vh
    copy_columns(tile3, v, token, first, rows, stride_v)
    copy_columns(tile4, v + HALF, token, first, rows, stride_v)
    async_copy.commit_group()

    each = gl.arange(0, HALF, EACH)
    sums_at = gamma + (head.to(gl.int64) * N + slot) * SIZE
    sums0, sums1, end = gl.load(sums_at + each), gl.load(sums_at + HALF + each), gl.load(sums_at + (SIZE - 1))
    beta0 = load_column(beta + head, each, token, first, rows, stride_b)
    beta1 = load_column(beta + head, each, token + HALF, later, rows - HALF, stride_b)
    decay0, decay1, passing = decay_of(end - sums0), decay_of(end - sums1), decay_of(end)
    # k̄ᵀ T, by halves of its columns: the first lacks nothing of X, the second only what is zero
    arrived(2)
    keys0 = _turned_keys(keys.slice(0, HALF), decay0)
    keys1 = _turned_keys(keys.slice(HALF, HALF), decay1)
    arrived(1)
    nothing = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)
    left0 = warpgroup_mma(keys0, tile0.slice(0, HALF), nothing, use_acc=False, is_async=True)
    left1 = warpgroup_mma(keys1, tile2.slice(0, HALF), nothing, use_acc=False, is_async=True)
    left0 = warpgroup_mma(keys0, tile1.slice(0, HALF), left0, is_async=True)
    left1 = warpgroup_mma(keys1, tile2.slice(HALF, HALF), left1, is_async=True)
    left0 = warpgroup_mma(keys1, tile0.slice(HALF, HALF), left0, is_async=True)
    left0 = warpgroup_mma(keys1, tile1.slice(HALF, HALF), left0, is_async=True)
    left0, left1, _, _ = warpgroup_mma_wait(0, deps=[left0, left1, keys0, keys1])
    barrier()  # X is read
    whole, lost = in_parts(left0 * _by_column(beta0))
    whole0 = _as_left(whole)
    tile0.store(lost)
    whole, lost = in_parts(left1 * _by_column(beta1))
    whole1 = _as_left(whole)
    tile1.store(lost)

    # U
    arrived(0)
    made = _times_rows(whole0, whole1, tile0, tile1, tile3)
    made, _, _ = warpgroup_mma_wait(0, deps=[made, whole0, whole1])
    tile2.store(made.to(gl.bfloat16))
    made = _times_rows(whole0, whole1, tile0, tile1, tile4)
    barrier()
    added += place * MATRIX
    _store_half(tile2, added, 0)
    made, _, _ = warpgroup_mma_wait(0, deps=[made, whole0, whole1])
    barrier()
    tile3.store(made.to(gl.bfloat16))

    # k̄ᵀ T e^γ
    whole, lost = parts_times(_as_sum(whole0), _as_sum(tile0.load(LEFT_HALF)), _by_column(decay_of(sums0)))
    whole0 = _as_left(whole)
    tile4.store(lost)
    whole, lost = parts_times(_as_sum(whole1), _as_sum(tile1.load(LEFT_HALF)), _by_column(decay_of(sums1)))
    whole1 = _as_left(whole)
    tile2.store(lost)
    fence_async_shared()
    barrier()

    # P = e^Γ I - k̄ᵀ T e^γ k
    made = _times_rows(whole0, whole1, tile4, tile2, keys.slice(0, HALF, dim=1))
    _store_half(tile3, added, 1)
    made, _, _ = warpgroup_mma_wait(0, deps=[made, whole0, whole1])
    maps += place * (2 * MATRIX)
    if finals is not None:
        finals += place * MATRIX
    whole, lost = _map_in_parts(made, passing, 0)
    tile0.store(whole)
    tile1.store(lost)
    made = _times_rows(whole0, whole1, tile4, tile2, keys.slice(HALF, HALF, dim=1))
    barrier()
    _store_map(tile0, tile1, maps, finals, stays, 0)
    made, _, _ = warpgroup_mma_wait(0, deps=[made, whole0, whole1])
    barrier()
    whole, lost = _map_in_parts(made, passing, 1)
    tile3.store(whole)
    tile0.store(lost)
    barrier()
    _store_map(tile3, tile0, maps, finals, stays, 1)
