"""One token in three kernels, of states with a window: every family of mixers.

1. A program has a row and head. It puts the token into the window, which it alone reads, and finds what the window does
   to the query on its way to older tokens (`loglinear.window`), and what is read of each value.
2. A program has some columns of the states of a row and head. It reads the occupied buckets, weighted by their level
   scales, as the window's start knows them, multiplies by what the query has become, and adds the window's own part.
   Nothing else keeps its registers from having many loads in flight.
3. Where the window ends with this token, the bucket that takes in others is written, and so is every occupied one that
   the delta rule has changed. For all other rows there is nothing to do.

The first kernel advances the position: programs of a row are counted as they arrive, as in `step`.

The state is computed with in float32 (products in three tf32 parts), whatever it is kept in.

Legend
    B rows, G groups, H heads, K key width, V value width, L levels
    N tokens of a window, P places that are computed with (N, at least 16), M levels that are loaded together
    passed [B, H, K + N]: what the first kernel tells the second one, for a row and head: the query as older tokens see
        it, and what the value in each place of the window is multiplied by
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import chunk_height
from loglinear.ops.triton import step as plain_step
from loglinear.ops.triton.common import (
    block_start,
    carry_level,
    cdiv,
    holds_tokens,
    is_right_half,
    level_between,
    next_power_of_2,
    program_place,
    programs,
)
from loglinear.ops.triton.launch import kernel
from loglinear.ops.triton.step import ARRIVAL
from loglinear.state import FenwickState
from loglinear.window import MOST_OWED as MOST

MOST_OWED = tl.constexpr(MOST)
LONGEST = 64  # window: what registers hold
END_TILE = 64  # keys, and columns, of buckets that are written
FEW_PROGRAMS = 256  # keep a GPU busy


def unsupported(
    q: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    state: FenwickState,
) -> str | None:  # fmt: skip
    """Why the kernel does not cover a call, or None."""
    assert state.window is not None
    if state.window.length > LONGEST:
        return f"a window of {state.window.length} tokens"
    if state.window.keys.dtype == torch.float64:
        return "float64"
    if not all(x.is_contiguous() for _, x in state.named_tensors()):
        return "a state that is not contiguous"
    return plain_step.unsupported(q, v, level_scales, log_decay, beta, state._replace(window=None))


# ----------------------------------------------------------------------------------------------------
# Kernel
# ----------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=["B", "L", "stride_s", "stride_sh"])
def _window_token_kernel(q, k, v, scales, log_decay, beta, positions, begun, keys, values, log_decays, mixing, passed,
                         B, H, G, L, scale, stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_s,
                         stride_sh, stride_g, stride_gh, stride_b, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                         BV: tl.constexpr, N: tl.constexpr, HEIGHT: tl.constexpr, LEVELS: tl.constexpr,
                         BY_CHANNEL: tl.constexpr):  # fmt: skip
    """Puts a token into the window. All keys and values of a head, in BK and BV places; 2^HEIGHT is N; LEVELS: L or
    more, a power of two.
    """
    head, row = program_place()
    if row >= B:
        return
    row = row.to(tl.int64)
    programs_of_row = tl.num_programs(0).to(tl.int64)
    arrived = tl.atomic_add(positions + row, ARRIVAL, sem="relaxed")
    position = arrived % ARRIVAL
    if arrived // ARRIVAL == programs_of_row - 1:
        tl.atomic_add(positions + row, 1 - programs_of_row * ARRIVAL, sem="relaxed")
    base = tl.maximum(block_start(position, HEIGHT), tl.load(begun + row))
    slot = tl.arange(0, N)
    count = (position - base).to(tl.int32)
    earlier, here, there = slot < count, slot == count, slot <= count

    # the token; nobody reads the place that it goes to in this kernel
    channel, column = tl.arange(0, BK), tl.arange(0, BV)
    group = head // (H // G)
    query = tl.load(q + row * stride_q + group * stride_qg + channel, mask=channel < K, other=0.0).to(tl.float32)
    query *= scale
    key = tl.load(k + row * stride_k + group * stride_kg + channel, mask=channel < K, other=0.0).to(tl.float32)
    value = tl.load(v + row * stride_v + head * stride_vh + column, mask=column < V, other=0.0).to(tl.float32)
    by_head = row * H + head
    keys += (row * G + group) * N * K
    if head == group * (H // G):
        tl.store(keys + count * K + channel, key, mask=channel < K)
    tl.store(values + (by_head * N + count) * V + column, value, mask=column < V)
    kept = tl.load(keys + (slot[:, None] * K + channel[None, :]), mask=earlier[:, None] & (channel < K)[None, :],
                   other=0.0)  # fmt: skip
    kept = tl.where(here[:, None], key[None, :], kept)
    near = tl.where(there, 1.0, 0.0)
    if scales is not None:
        level = tl.arange(0, LEVELS)
        near_levels = level_between(position, base + slot[:, None], level[None, :], L, 1)
        near = tl.load(scales + row * stride_s + head * stride_sh + near_levels, mask=there, other=0.0).to(tl.float32)

    # sums of decays: of the tokens after each one, and up to it; not differences, for a decay of -inf is a reset
    total, reading = 1.0, kept
    if log_decays is not None:
        own_log = log_decay + row * stride_g + head * stride_gh
        if BY_CHANNEL:
            log = tl.load(own_log + channel, mask=channel < K, other=0.0).to(tl.float32)
            log_decays += by_head * N * K
            tl.store(log_decays + count * K + channel, log, mask=channel < K)
            logs = log_decays + (slot[:, None] * K + channel[None, :])
            following = tl.load(logs + K, mask=(slot + 1 < count)[:, None] & (channel < K)[None, :], other=0.0)
            following = tl.where((slot + 1 == count)[:, None], log[None, :], following)
            own = tl.load(logs, mask=earlier[:, None] & (channel < K)[None, :], other=0.0)
            own = tl.where(here[:, None], log[None, :], own)
            since = tl.cumsum(following, 0, reverse=True)
            until = tl.cumsum(own, 0)
            total = tl.exp(tl.sum(own, 0))
        else:
            log = tl.load(own_log).to(tl.float32)
            log_decays += by_head * N
            tl.store(log_decays + count, log)
            own = tl.where(here, log, tl.load(log_decays + slot, mask=earlier, other=0.0))
            after = slot[None, :] > slot[:, None]
            since = tl.sum(tl.where(after, own[None, :], 0.0), 1)[:, None]
            until = tl.sum(tl.where(after, 0.0, own[None, :]), 1)[:, None]
            total = tl.exp(tl.sum(own, 0))
        reading = kept * tl.exp(until)
        kept *= tl.exp(since)

    # what the window does to the query
    weights = tl.sum(kept * query[None, :], 1)
    older = query * total
    if mixing is not None:
        strength = tl.load(beta + row * stride_b + head).to(tl.float32)
        mixing += by_head * N * N
        mixed = tl.load(mixing + (slot[:, None] * N + slot[None, :]), mask=earlier[:, None], other=0.0)
        overlap = tl.sum(kept * key[None, :], 1)  # with itself, too: that row is zero yet
        own_row = strength * (tl.where(here, 1.0, 0.0) - tl.sum(overlap[:, None] * mixed, 0))
        mixed = tl.where(here[:, None], own_row[None, :], mixed)
        tl.store(mixing + count * N + slot, own_row)
        weights = tl.sum(weights[:, None] * mixed, 0)
        older -= tl.sum(weights[:, None] * reading, 0)
    passed += by_head * (K + N)
    tl.store(passed + channel, older, mask=channel < K)
    tl.store(passed + K + slot, weights * near)


@kernel(do_not_specialize=["B", "L", "stride_s", "stride_sh"])
def _window_read_kernel(scales, buckets, positions, begun, values, owed, passed, o, B, H, L, stride_s, stride_sh,
                        K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
                        N: tl.constexpr, HEIGHT: tl.constexpr, M: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """BV columns of what the newest token reads. M · BK · BV numbers of the state at a time."""
    place, row = program_place()
    if row >= B:
        return
    head, tile = place // TILES, place % TILES
    row = row.to(tl.int64)
    position = tl.load(positions + row) - 1
    base = tl.maximum(block_start(position, HEIGHT), tl.load(begun + row))
    slot, channel, column = tl.arange(0, N), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    by_head = row * H + head
    level = tl.arange(0, LEVELS)
    occupied = holds_tokens(base, level, L)
    number_of_buckets = tl.sum(occupied.to(tl.int32), 0)
    rank = tl.cumsum(occupied.to(tl.int32), 0)
    if owed is not None:
        owed += ((row * 2 + is_right_half(base, HEIGHT).to(tl.int32)) * H + head) * L
    if scales is not None:
        scales += row * stride_s + head * stride_sh
        seen = tl.maximum(level, level_between(position, base, level, L, 0))
    passed += by_head * (K + N)
    older = tl.load(passed + channel, mask=channel < K, other=0.0)
    weights = tl.load(passed + K + slot)
    written = tl.load(values + by_head * N * V + (slot[:, None] * V + column[None, :]),
                      mask=(slot <= position - base)[:, None] & (column < V)[None, :], other=0.0)  # fmt: skip

    # the buckets: all that is read at a time has been asked for before anything is multiplied
    first = buckets + (row * L * H + head) * K * V
    inside = (channel < K)[:, None] & (column < V)[None, :]
    offsets = channel[:, None] * V + column[None, :]
    reads = tl.zeros((BK, BV), tl.float32)
    for start in range(0, number_of_buckets, M):
        number = start + 1 + tl.arange(0, M)
        exists = number <= number_of_buckets
        found = (rank[:, None] == number[None, :]) & occupied[:, None]
        levels = tl.sum(tl.where(found, level[:, None], 0), 0)  # [M], those of the next M occupied buckets
        at = first + (levels.to(tl.int64) * H * K * V)[None, :, None] + offsets[:, None, :]
        if (BK == K) & (V % BV == 0):
            exist = exists[None, :, None]
        else:
            exist = (number <= number_of_buckets)[None, :, None] & inside[:, None, :]
        states = tl.load(at, mask=exist, other=0.0).to(tl.float32)
        factor = tl.full((M,), 1.0, tl.float32)
        if owed is not None:
            factor *= tl.exp(tl.load(owed + levels, mask=exists, other=0.0))
        if scales is not None:
            far_levels = tl.sum(tl.where(found, seen[:, None], 0), 0)
            factor *= tl.load(scales + far_levels, mask=exists, other=0.0).to(tl.float32)
        reads += tl.sum(states * factor[None, :, None], 1)
    read = tl.sum(older[:, None] * reads, 0) + tl.sum(weights[:, None] * written, 0)
    tl.store(o + by_head * V + column, read.to(o.dtype.element_ty), mask=column < V)


@triton.jit
def _sum_of(buckets, first, last, rank, occupied, level, owed, size, offsets, inside):
    """A tile of the occupied buckets from number `first` to `last` - 1, added up."""
    total = tl.zeros(offsets.shape, tl.float32)
    for number in range(first, last):
        bucket = tl.sum(tl.where((rank == number + 1) & occupied, level, 0), 0)
        states = tl.load(buckets + bucket * size + offsets, mask=inside, other=0.0).to(tl.float32)
        if owed is not None:
            states *= tl.exp(tl.load(owed + bucket))
        total += states
    return total


@kernel(do_not_specialize=["B", "L", "shares"])
def _window_end_kernel(buckets, positions, begun, keys, values, log_decays, mixing, owed, B, H, G, L, shares,
                       K: tl.constexpr, V: tl.constexpr, KT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                       TILES: tl.constexpr, N: tl.constexpr, P: tl.constexpr, HEIGHT: tl.constexpr,
                       LEVELS: tl.constexpr, BY_CHANNEL: tl.constexpr, WRITES: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """BV columns of one of so many `shares` of the buckets of a row and head, if the row's window has just ended.
    WRITES: tokens change buckets by more than a decay that these are owed.

    Each bucket is gone through twice, in KT tiles of BK keys: for what the tokens read of it, and to be written.
    """
    place, row = program_place()
    if row >= B:
        return
    position = tl.load(positions + row)
    if block_start(position, HEIGHT) < position:
        return
    head, tile, share = place // (TILES * shares), place // shares % TILES, place % shares
    row = row.to(tl.int64)
    base = tl.maximum(position - N, tl.load(begun + row))
    count = (position - base).to(tl.int32)
    by_head = row * H + head
    keys += (row * G + head // (H // G)) * N * K
    slot, column = tl.arange(0, P), tile * BV + tl.arange(0, BV)
    there, of_value = slot < count, column < V
    entering = tl.load(values + by_head * N * V + (slot[:, None] * V + column[None, :]),
                       mask=(slot < count)[:, None] & of_value[None, :], other=0.0)  # fmt: skip
    mixed = None
    if mixing is not None:
        mixed = tl.load(mixing + by_head * N * N + (slot[:, None] * N + slot[None, :]),
                        mask=there[:, None] & (slot < N)[None, :], other=0.0)  # fmt: skip
    owing = 0.0
    if log_decays is not None:  # sums, not differences, for a decay of -inf is a reset
        if BY_CHANNEL:
            log_decays += by_head * N * K
        else:
            logs = log_decays + by_head * N + slot
            own = tl.load(logs, mask=there, other=0.0)
            until = tl.exp(tl.cumsum(own, 0))
            since = tl.exp(tl.cumsum(tl.load(logs + 1, mask=slot + 1 < count, other=0.0), 0, reverse=True))
            owing = tl.sum(own, 0)

    level = tl.arange(0, LEVELS)
    occupied = holds_tokens(base, level, L)
    rank = tl.cumsum(occupied.to(tl.int32), 0)
    target = carry_level(position, level, L)
    merging = tl.sum((occupied & (level <= target)).to(tl.int32), 0)
    staying = 0
    if WRITES:
        staying = tl.sum(occupied.to(tl.int32), 0) - merging
    if owed is not None:
        owed += row * 2 * H * L + head * L
        right = is_right_half(base, HEIGHT).to(tl.int32)
        next_owed = owed + (1 - right) * H * L
        owed += right * H * L
    buckets += (row * L * H + head) * K * V
    size = tl.full((), H, tl.int64) * K * V
    for result in range(share, 1 + staying, shares):  # what merges, and then each bucket that stays
        first = tl.where(result == 0, 0, merging + result - 1)
        last = tl.where(result == 0, merging, first + 1)
        into = tl.where(result == 0, target, tl.sum(tl.where((rank == first + 1) & occupied, level, 0), 0))
        added = tl.where(result == 0, entering, 0.0)
        if mixing is not None:
            for key in range(KT):
                channel = key * BK + tl.arange(0, BK)
                inside = (channel < K)[:, None] & of_value[None, :]
                states = _sum_of(buckets, first, last, rank, occupied, level, owed, size,
                                 channel[:, None] * V + column[None, :], inside)  # fmt: skip
                at, exist = slot[:, None] * K + channel[None, :], there[:, None] & (channel < K)[None, :]
                reading = tl.load(keys + at, mask=exist, other=0.0)
                if log_decays is not None:
                    if BY_CHANNEL:
                        reading *= tl.exp(tl.cumsum(tl.load(log_decays + at, mask=exist, other=0.0), 0))
                    else:
                        reading *= until[:, None]
                added -= tl.dot(reading, states, input_precision=PRECISION)
            tl.debug_barrier()  # all of it has been read
        paid = 1.0
        if WRITES:
            if owed is not None:
                owes = tl.load(owed + into, mask=result > 0, other=0.0) + owing
                paid = tl.exp(tl.where((result == 0) | (owes < -MOST_OWED), 0.0, -owes))
        for key in range(KT):
            channel = key * BK + tl.arange(0, BK)
            inside = (channel < K)[:, None] & of_value[None, :]
            offsets = channel[:, None] * V + column[None, :]
            states = _sum_of(buckets, first, last, rank, occupied, level, owed, size, offsets, inside)
            at = slot[None, :] * K + channel[:, None]
            of_key = (channel < K)[:, None]
            writing = tl.load(keys + at, mask=of_key & (slot < count)[None, :], other=0.0)
            if log_decays is not None:
                if BY_CHANNEL:
                    later = tl.load(log_decays + at + K, mask=of_key & (slot + 1 < count)[None, :], other=0.0)
                    writing *= tl.exp(tl.cumsum(later, 1, reverse=True))
                    own = tl.load(log_decays + at, mask=of_key & (slot < count)[None, :], other=0.0)
                    states *= tl.exp(tl.sum(own, 1))[:, None]
                else:
                    writing *= since[None, :]
                    states *= tl.exp(owing)
            if mixing is not None:
                writing = tl.dot(writing, mixed, input_precision=PRECISION)
            states = tl.dot(writing, added, states, input_precision=PRECISION) * paid
            tl.debug_barrier()  # small tiles are loaded by several warps and stored by one
            tl.store(buckets + into * size + offsets, states.to(buckets.dtype.element_ty), mask=inside)
    if owed is not None:
        if (tile == 0) & (share == 0):
            of_each = tl.load(owed + level, mask=occupied, other=0.0) + owing
            stays = occupied & (level > target)
            if WRITES:
                stays = stays & (of_each >= -MOST_OWED)
            tl.store(next_owed + level, tl.where(stays, of_each, 0.0), mask=level < L)


# ----------------------------------------------------------------------------------------------------
# Launch
# ----------------------------------------------------------------------------------------------------


def _launch(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    buckets: Tensor, positions: Tensor, begun: Tensor, keys: Tensor, values: Tensor, log_decays: Tensor | None,
    mixing: Tensor | None, owed: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    (_, groups, key_dim), (rows, heads, value_dim), num_levels = q.shape, v.shape, buckets.shape[1]
    q, k, v, level_scales, log_decay, beta = (
        None if x is None else x if x.stride(-1) == 1 else x.contiguous()
        for x in (q, k, v, level_scales, log_decay, beta)
    )  # fmt: skip
    assert q is not None and k is not None and v is not None
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    by_channel, length = log_decay is not None and log_decay.ndim == 3, keys.shape[2]
    tiles = plain_step.tiling(key_dim, value_dim, num_levels, deferring=True)
    shared = {
        "K": key_dim, "V": value_dim, "N": length, "HEIGHT": chunk_height(length),
        "LEVELS": max(2, next_power_of_2(num_levels)),
    }  # fmt: skip
    passed = q.new_empty(rows, heads, key_dim + length, dtype=torch.float32)
    of_scales = (0, 0) if level_scales is None else level_scales.stride()[:2]
    numbers = tiles.keys * length
    end_keys, end_columns = (max(16, min(END_TILE, next_power_of_2(width))) for width in (key_dim, value_dim))
    end_tiles, writes = cdiv(value_dim, end_columns), by_channel or beta is not None
    # buckets are independent of each other: few programs would go through them one by one
    shares = min(num_levels, max(1, FEW_PROGRAMS // (rows * heads * end_tiles))) if writes else 1
    with torch.cuda.device_of(v):  # kernels are launched on the current device
        _window_token_kernel[programs(heads, rows)](
            q, k, v, level_scales, log_decay, beta, positions, begun, keys, values, log_decays, mixing, passed, rows,
            heads, groups, num_levels, scale, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0),
            v.stride(1), *of_scales, *((0, 0) if log_decay is None else log_decay.stride()[:2]),
            0 if beta is None else beta.stride(0), BK=tiles.keys, BV=max(16, next_power_of_2(value_dim)),
            BY_CHANNEL=by_channel, num_warps=max(4, min(16, numbers // 1024)), num_stages=1, **shared,
        )  # fmt: skip
        _window_read_kernel[programs(heads * tiles.count, rows)](
            level_scales, buckets, positions, begun, values, owed, passed, o, rows, heads, num_levels, *of_scales,
            BK=tiles.keys, BV=tiles.columns, TILES=tiles.count, M=tiles.levels, num_warps=tiles.warps, num_stages=1,
            maxnreg=tiles.registers, **shared,
        )  # fmt: skip
        _window_end_kernel[programs(heads * end_tiles * shares, rows)](
            buckets, positions, begun, keys, values, log_decays, mixing, owed, rows, heads, groups, num_levels, shares,
            KT=cdiv(key_dim, end_keys), BK=end_keys, BV=end_columns, TILES=end_tiles, P=max(16, length),
            BY_CHANNEL=by_channel, WRITES=writes, PRECISION="tf32x3", num_warps=4, num_stages=1, **shared,
        )  # fmt: skip
    return o


_window_step_op = torch.library.custom_op(
    "loglinear::window_step",
    _launch,
    mutates_args=("buckets", "positions", "keys", "values", "log_decays", "mixing", "owed"),
)


@_window_step_op.register_fake
def _(q, k, v, level_scales, log_decay, beta, buckets, positions, begun, keys, values, log_decays, mixing, owed, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def step(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, state: FenwickState, log_decay: Tensor | None,
    beta: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """See `log_linear_attention_step`, of a state with a window."""
    window = state.window
    assert window is not None
    arguments = (q, k, v, level_scales, log_decay, beta, state.buckets, state.positions, *window, scale)
    if torch.compiler.is_compiling():
        return _window_step_op(*arguments)
    # the way through torch's dispatcher takes the host twice as long as all that is done here
    o = _launch(*arguments)
    written = [x for name, x in state.named_tensors() if name != "window.begun" and not x.is_inference()]
    torch.autograd.graph.increment_version(written)
    return o
