"""`_scores_back_kernel` of `delta_backward_halves.py` for Hopper: back through the scores of a chunk.

In `delta_backward_halves.py` a program has half of the rows, and what lies across is loaded for both. Here one has them
all, and asks as it begins for all that it needs, in the order in which it needs it: every input has its own place in
shared memory. What is lower triangular is made as two halves of its columns, [C, E] each. The first has what the first
half of the rows has with itself, and below it what the second half has with the first: two quarters, one after the
other in memory. Of the second only the lower half is not zero: what the second half has with itself.

Where keys and values are WIDE, not both of 128 columns, there is no such room. Then the products are made of 64 columns
at a time, which come through a ring of shared memory; k, which is multiplied twice, stays beside it.

Legend as in `delta_backward_halves.py`, but KT tiles of 64 keys, VT of 128 values, and
    d_scored [1, H, N, C], the whole of it
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from loglinear.ops.triton.common import decay_at_most_one, decay_of, program_place, row_exists
from loglinear.ops.triton.delta_hopper import (
    BLOCK,
    BLOCK_HEIGHT,
    BLOCKS,
    COLUMNS_OF_HALF,
    EACH,
    HALF,
    HALF_SUM,
    LEFT_HALF,
    QUARTER,
    QUARTERS,
    ROWS_OF_HALF,
    SHARED,
    SIZE,
    WHOLE_SUM,
    arrived,
    barrier,
    begin_copy,
    copy_columns,
    copy_first_half,
    copy_halves,
    copy_quarter,
    copy_rows,
    copy_tile,
    in_halves,
    level_factor,
    load_column,
    load_level,
    new_half,
    new_line,
    new_tile,
    places_of_columns,
    same_block,
    seen_as,
    store_halves,
    sum_of_rows,
)
from loglinear.ops.triton.launch import kernel

RING = gl.constexpr(3)  # pairs of tiles that have a place in shared memory, those that are multiplied among them


@gluon.jit
def _store_level_sums(dlam, pairs, beyond, exists, L, HEIGHT: gl.constexpr):
    """Gradients of λ, from each row's pairs with its own half [128, 64] and the sum of those with the other.

    A level gets what is in blocks of its size but in no smaller one; levels beyond the last count as the last.
    """
    pairs = gl.convert_layout(gl.reshape(pairs, [SIZE, BLOCK, BLOCK]), BLOCKS, assert_trivial=True)
    inside = gl.sum(gl.where(same_block(BLOCK_HEIGHT)[:, :, None], pairs, 0.0), 1)
    of_blocks = gl.sum(pairs, 2)
    within, last = gl.zeros([SIZE], gl.float32, ROWS_OF_HALF), gl.zeros([SIZE], gl.float32, ROWS_OF_HALF)
    for level in gl.static_range(HEIGHT + 1):
        if level < BLOCK_HEIGHT:
            upto = gl.sum(gl.where(same_block(level), inside, 0.0), 1)
        else:
            upto = gl.sum(gl.where(same_block(level), of_blocks, 0.0), 1)
        upto = gl.convert_layout(upto, ROWS_OF_HALF, assert_trivial=True)
        gl.store(dlam + level, upto - within, mask=exists & (level < L - 1))
        last += gl.where(level < L - 1, 0.0, upto - within)
        within = upto
    if HEIGHT + 1 < L - 1:
        gl.store(dlam + HEIGHT + 1, beyond, mask=exists)
    else:
        last += beyond
        dlam += L - 1
        gl.store(dlam, last + gl.load(dlam, mask=exists, other=0.0), mask=exists)


@gluon.jit
def _of_halves(first, second):
    """Back from `in_halves`, in another layout of the same registers."""
    return gl.reshape(gl.permute(gl.join(first, second), [0, 2, 1]), [SIZE, SIZE])


@gluon.jit
def _copy_item(ring, keys, item: gl.constexpr, first, q, k, v, grad_o, pulled, token, rows, stride_q, stride_k,
               stride_v, stride_g, is_read, KT: gl.constexpr, VT: gl.constexpr):  # fmt: skip
    """Begins to bring 64 columns each of what is multiplied: dO and v, then dR and k, then q."""
    of_values: gl.constexpr = 2 * VT
    key: gl.constexpr = (item - of_values) % KT
    left = ring.index(2 * (item % RING))
    if item < of_values:
        copy_columns(left, grad_o + item * HALF, token, first, rows, stride_g)
        copy_columns(ring.index(2 * (item % RING) + 1), v + item * HALF, token, first, rows, stride_v)
    elif item < of_values + KT:  # where nothing is read nothing is pulled: zero
        begin_copy(left, places_of_columns(pulled + key * HALF, KT * HALF), mask=is_read)
        copy_columns(keys.index(key), k + key * HALF, token, first, rows, stride_k)
    else:
        copy_columns(left, q + key * HALF, token, first, rows, stride_q)


@gluon.jit
def _product_of(ring, keys, begin: gl.constexpr, end: gl.constexpr, first, q, k, v, grad_o, pulled, token, rows,
                stride_q, stride_k, stride_v, stride_g, is_read, KT: gl.constexpr, VT: gl.constexpr):  # fmt: skip
    """The sum of some of the products that are made of what comes through the ring, [128, 128]."""
    total = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    of_values: gl.constexpr = 2 * VT
    for item in gl.static_range(begin, end):
        arrived(RING - 2)
        if item + RING - 1 < of_values + 2 * KT:
            _copy_item(
                ring, keys, item + RING - 1, first, q, k, v, grad_o, pulled, token, rows, stride_q, stride_k, stride_v,
                stride_g, is_read, KT, VT,
            )  # fmt: skip
        async_copy.commit_group()
        if item < of_values:
            right = ring.index(2 * (item % RING) + 1)
        else:
            right = keys.index((item - of_values) % KT)
        left = ring.index(2 * (item % RING))
        total = warpgroup_mma(left, right.permute([1, 0]), total, use_acc=item > begin, is_async=True)
        total = warpgroup_mma_wait(0, deps=[total])
    return total


@gluon.jit
def _times_turned(left, right):
    """Begins the product `left` `right`ᵀ, [128, 128]."""
    nothing = gl.zeros([SIZE, SIZE], gl.float32, WHOLE_SUM)
    return warpgroup_mma(left, right.permute([1, 0]), nothing, use_acc=False, is_async=True)


@kernel(gluon.jit, do_not_specialize=["N", "L", "stride_s", "stride_sh", "stride_b"])
def _scores_back_hopper_kernel(q, k, v, scales, beta, grad_o, inverse, mixed, pulled, gamma, d_mixed, d_pairs, dscales,
                               d_scored, tokens, firsts, rows_of, reads, places, N, H, G, scale, stride_q, stride_qg,
                               stride_k, stride_kg, stride_v, stride_vh, stride_s, stride_sh, stride_b, stride_g,
                               stride_gh, L, HEIGHT: gl.constexpr, SCALED: gl.constexpr, KT: gl.constexpr,
                               VT: gl.constexpr):  # fmt: skip
    """Back through the scores of a chunk: gradients of λ, of MT and of q kᵀ. Half a chunk is 2^HEIGHT rows."""
    head, slot = program_place()
    # side by side, for nothing else can begin before
    is_slot = slot < N
    rows = gl.load(rows_of + slot, mask=is_slot, other=0)
    token = gl.load(tokens + slot, mask=is_slot, other=0)
    first = None if firsts is None else gl.load(firsts + slot, mask=is_slot, other=0)
    is_read = gl.load(reads + slot, mask=is_slot, other=0) > 0
    read = gl.load(places + slot, mask=is_slot, other=0)
    if rows == 0:
        return
    place = slot.to(gl.int64) * H + head
    quarters = place * QUARTERS
    group = (head // (H // G)).to(gl.int64)
    dtype: gl.constexpr = gl.bfloat16

    q += group * stride_qg
    k += group * stride_kg
    v += head.to(gl.int64) * stride_vh
    grad_o += head.to(gl.int64) * stride_gh
    pulled += (read.to(gl.int64) * H + head) * (SIZE * KT * HALF)
    WIDE: gl.constexpr = KT != 2 or VT != 1
    if WIDE:
        ring = gl.allocate_shared_memory(dtype, [2 * RING, SIZE, HALF], SHARED)
        keys = gl.allocate_shared_memory(dtype, [KT, SIZE, HALF], SHARED)
        kept0, kept1, kept2 = ring.index(1), ring.index(3), ring.index(5)  # where v was
        sources = (
            q, k, v, grad_o, pulled, token, rows, stride_q, stride_k, stride_v, stride_g, is_read,
        )  # fmt: skip
    else:
        grads_tile, values_tile, keys_tile, pulled_tile, queries_tile = (
            new_tile(), new_tile(), new_tile(), new_tile(), new_tile()
        )  # fmt: skip
        kept0, kept1, kept2 = (
            seen_as(values_tile, [SIZE, HALF]), seen_as(grads_tile, [SIZE, HALF]), seen_as(pulled_tile, [SIZE, HALF])
        )  # fmt: skip
    scores0, scores1, solved0 = new_half(), new_half(), new_half()
    solved1 = gl.allocate_shared_memory(dtype, [HALF, HALF], SHARED)
    sums_line, decays_line, beta_line = new_line(), new_line(), new_line()
    if WIDE:
        for item in gl.static_range(RING - 1):
            _copy_item(ring, keys, item, first, *sources, KT, VT)
            if item == RING - 2:
                if SCALED:
                    copy_halves(scores0, scores1, mixed + quarters)
                copy_first_half(solved0, inverse + quarters)
                copy_quarter(solved1, inverse + quarters + 2 * QUARTER)
            async_copy.commit_group()
    else:
        copy_rows(grads_tile, grad_o, token, first, rows, stride_g)
        copy_rows(values_tile, v, token, first, rows, stride_v)
        async_copy.commit_group()
        if SCALED:
            copy_halves(scores0, scores1, mixed + quarters)
        async_copy.commit_group()
        # where nothing is read nothing is pulled: zero
        copy_tile(pulled_tile, pulled, is_read)
        copy_rows(keys_tile, k, token, first, rows, stride_k)
        async_copy.commit_group()
        copy_rows(queries_tile, q, token, first, rows, stride_q)
        async_copy.commit_group()
        copy_first_half(solved0, inverse + quarters)
        copy_quarter(solved1, inverse + quarters + 2 * QUARTER)
        async_copy.commit_group()

    each = gl.arange(0, SIZE, EACH)
    per_row = (head.to(gl.int64) * N + slot) * SIZE
    sums = gl.load(gamma + per_row + each)
    strength = load_column(beta + head, each, token, first, rows, stride_b)
    row, column = gl.arange(0, SIZE, ROWS_OF_HALF), gl.arange(0, HALF, COLUMNS_OF_HALF)
    lower = row >= HALF
    if SCALED:
        lam = scales + head.to(gl.int64) * stride_sh
        factor = level_factor(lam, token, first, rows, stride_s, L, HEIGHT)
        far = load_level(lam, row, token, first, rows, stride_s, HEIGHT + 1, L)
    sums_line.store(sums)
    decays_line.store(decay_of(sums))
    beta_line.store(strength)

    # dO vᵀ ⊙ Λ, of which MT gets all; λ gets dO vᵀ ⊙ MT
    if WIDE:
        grad = _product_of(ring, keys, 0, 2 * VT, first, *sources, KT, VT)
    else:
        arrived(4)
        grad = _times_turned(grads_tile, values_tile)
        grad = warpgroup_mma_wait(0, deps=[grad])
    grad0, grad1 = in_halves(grad)
    if SCALED:
        if not WIDE:
            arrived(3)
        pairs0 = scores0.load(HALF_SUM).to(gl.float32) * grad0
        pairs1 = scores1.load(HALF_SUM).to(gl.float32) * grad1
        beyond = gl.where(lower, gl.sum(pairs0, 1), 0.0)
        pairs = gl.where(lower[:, None], pairs1, pairs0)
        pairs = gl.where(row[:, None] % HALF >= column[None, :], pairs, 0.0)
        grad0 *= gl.where(lower[:, None], far[:, None], factor)
        grad1 *= factor
    # d(MT) = dO vᵀ ⊙ Λ - dR k̂ᵀ
    if WIDE:
        met = _product_of(ring, keys, 2 * VT, 2 * VT + KT, first, *sources, KT, VT)
    else:
        arrived(2)
        met = _times_turned(pulled_tile, keys_tile)
    if SCALED:
        dlam = dscales + (token + row).to(gl.int64) * H * L + head * L
        _store_level_sums(dlam, pairs, beyond, row_exists(row, first, rows), L, HEIGHT)
    met = warpgroup_mma_wait(0, deps=[met])
    met0, met1 = in_halves(met)
    grad0 -= met0 * decays_line.slice(0, HALF).load(COLUMNS_OF_HALF)[None, :]
    grad1 -= met1 * decays_line.slice(HALF, HALF).load(COLUMNS_OF_HALF)[None, :]
    # q kᵀ is needed last
    if WIDE:
        product = _product_of(ring, keys, 2 * VT + KT, 2 * VT + 2 * KT, first, *sources, KT, VT)
    else:
        arrived(1)
        product = _times_turned(queries_tile, keys_tile)
    grad0 = gl.where(row[:, None] >= column[None, :], grad0, 0.0)
    grad1 = gl.where(row[:, None] >= column[None, :] + HALF, grad1, 0.0)
    # d(MT) waits in tiles that are read, to go out
    kept0.store(grad0.to(dtype))
    kept1.store(grad1.to(dtype))

    # dM = d(MT) Tᵀ = d(MT) diag(β) Xᵀ
    left0 = (grad0 * beta_line.slice(0, HALF).load(COLUMNS_OF_HALF)[None, :]).to(dtype)
    left1 = (grad1 * beta_line.slice(HALF, HALF).load(COLUMNS_OF_HALF)[None, :]).to(dtype)
    left0, left1 = gl.convert_layout(left0, LEFT_HALF), gl.convert_layout(left1, LEFT_HALF)
    arrived(0)
    nothing = gl.zeros([SIZE, HALF], gl.float32, HALF_SUM)
    solved00, solved10 = solved0.slice(0, HALF).permute([1, 0]), solved0.slice(HALF, HALF).permute([1, 0])
    pairs0 = warpgroup_mma(left0, solved00, nothing, use_acc=False, is_async=True)
    pairs1 = warpgroup_mma(left0, solved10, nothing, use_acc=False, is_async=True)
    pairs1 = warpgroup_mma(left1, solved1.permute([1, 0]), pairs1, is_async=True)
    store_halves(kept0, kept1, d_mixed + quarters)

    # the gradient of q kᵀ is dM times decays; and gamma gets that times q kᵀ, of rows less of columns
    product, pairs0, left0 = warpgroup_mma_wait(2, deps=[product, pairs0, left0])
    product0, product1 = in_halves(product)
    sums = sums_line.load(ROWS_OF_HALF)[:, None]
    pairs0 *= decay_at_most_one(sums - sums_line.slice(0, HALF).load(COLUMNS_OF_HALF)[None, :]) * scale
    pairs0 = gl.where(row[:, None] >= column[None, :], pairs0, 0.0)
    mass0 = product0 * pairs0
    pairs1, _, _ = warpgroup_mma_wait(0, deps=[pairs1, left0, left1])
    pairs1 *= decay_at_most_one(sums - sums_line.slice(HALF, HALF).load(COLUMNS_OF_HALF)[None, :]) * scale
    pairs1 = gl.where(row[:, None] >= column[None, :] + HALF, pairs1, 0.0)
    mass1 = product1 * pairs1
    kept2.store(pairs0.to(dtype))
    scores1.store(pairs1.to(dtype))
    mass = gl.sum(mass0 + mass1, 1) - gl.convert_layout(sum_of_rows(_of_halves(mass0, mass1)), ROWS_OF_HALF)
    gl.store(d_scored + per_row + row, mass)
    barrier()
    store_halves(kept2, scores1, d_pairs + quarters)
