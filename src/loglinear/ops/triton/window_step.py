"""One token in one kernel, of states with a window: every family of mixers, buckets read and not written.

A program has some columns of the states of one row and head. It reads the occupied buckets, weighted by their level
scales, as the window's start knows them, and multiplies by what the query has become on its way there: the tokens of
the window say what that is (`loglinear.window`). They give their own part of the output, too.

The token that arrives goes to a place that nobody reads in the same launch, so nothing has to be waited for: its key
and decay are written by the first program of its group or head, its values by each program for its own columns. Only
the position is read by all and changed by one, as in `step`. Where the window ends, each program writes its own columns
of the bucket that takes in others, and of every occupied one that the delta rule has changed; what buckets are owed
from then on has a place of its own.

The state is computed with in float32, whatever it is kept in.

Legend
    B rows, G groups, H heads, K key width, V value width, L levels
    N tokens of a window, M levels that are loaded together
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
    holds_tokens,
    is_right_half,
    level_between,
    program_place,
    programs,
)
from loglinear.ops.triton.step import ARRIVAL
from loglinear.state import FenwickState
from loglinear.window import MOST_OWED as MOST

MOST_OWED = tl.constexpr(MOST)
LONGEST = 64  # window: what registers hold


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


@triton.jit
def _through(states, keys, key, values, value, log_decays, log, mixing, strength, count, channel,
             column, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, ENTER: tl.constexpr,
             BY_CHANNEL: tl.constexpr):  # fmt: skip
    """`states` [BK, M, BV] after the window's `count` tokens and the one at hand, which may not be in memory yet: one
    by one, because products of whole tiles spill ten times the registers. ENTER: the tokens enter, too.
    """
    for token in range(0, count + 1):
        kept = token < count
        of_token = tl.load(keys + token * K + channel, mask=channel < tl.where(kept, K, 0), other=0.0)
        of_token = tl.where(kept, of_token, key)
        if log_decays is not None:
            if BY_CHANNEL:
                decay = tl.load(log_decays + token * K + channel, mask=channel < tl.where(kept, K, 0), other=0.0)
                states *= tl.exp(tl.where(kept, decay, log))[:, None, None]
            else:
                states *= tl.exp(tl.where(kept, tl.load(log_decays + tl.where(kept, token, 0)), log))
        written = of_token
        if mixing is not None:
            own = tl.load(mixing + tl.where(kept, token * (N + 1), 0))  # on the diagonal: beta
            written *= tl.where(kept, own, strength)
            seen = tl.sum(states * of_token[:, None, None], 0)
            states -= written[:, None, None] * seen[None, :, :]
        if ENTER:
            entering = tl.load(values + token * V + column, mask=column < tl.where(kept, V, 0), other=0.0)
            entering = tl.where(kept, entering, value)
            states += written[:, None, None] * entering[None, None, :]
    return states


@triton.jit(do_not_specialize=["B", "L", "stride_s", "stride_sh"])
def _window_step_kernel(q, k, v, scales, log_decay, beta, buckets, positions, begun, keys, values, log_decays, mixing,
                        owed, o, B, H, G, L, scale, stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh,
                        stride_s, stride_sh, stride_g, stride_gh, stride_b, K: tl.constexpr, V: tl.constexpr,
                        BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, N: tl.constexpr, HEIGHT: tl.constexpr,
                        M: tl.constexpr, LEVELS: tl.constexpr, BY_CHANNEL: tl.constexpr,
                        WRITES: tl.constexpr):  # fmt: skip
    """M · BK · BV numbers of the state at a time; 2^HEIGHT is N; LEVELS: L or more, a power of two. WRITES: tokens
    change buckets by more than a decay that these are owed.
    """
    place, row = program_place()
    if row >= B:
        return
    head, tile = place // TILES, place % TILES
    row = row.to(tl.int64)
    programs_of_row = tl.num_programs(0).to(tl.int64)
    arrived = tl.atomic_add(positions + row, ARRIVAL, sem="relaxed")
    position = arrived % ARRIVAL
    if arrived // ARRIVAL == programs_of_row - 1:
        tl.atomic_add(positions + row, 1 - programs_of_row * ARRIVAL, sem="relaxed")
    base = tl.maximum(block_start(position, HEIGHT), tl.load(begun + row))
    ends = block_start(position + 1, HEIGHT) > position
    slot = tl.arange(0, N)
    count = (position - base).to(tl.int32)
    earlier, here, there = slot < count, slot == count, slot <= count

    # the token
    channel, column = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    group = head // (H // G)
    query = tl.load(q + row * stride_q + group * stride_qg + channel, mask=channel < K, other=0.0).to(tl.float32)
    query *= scale
    key = tl.load(k + row * stride_k + group * stride_kg + channel, mask=channel < K, other=0.0).to(tl.float32)
    value = tl.load(v + row * stride_v + head * stride_vh + column, mask=column < V, other=0.0).to(tl.float32)
    by_head = row * H + head
    keys += (row * G + group) * N * K
    values += by_head * N * V
    if tile == 0:
        if head == group * (H // G):
            tl.store(keys + count * K + channel, key, mask=channel < K)
    tl.store(values + count * V + column, value, mask=column < V)

    # the tokens before it
    kept = tl.load(keys + (slot[:, None] * K + channel[None, :]), mask=earlier[:, None] & (channel < K)[None, :],
                   other=0.0)  # fmt: skip
    kept = tl.where(here[:, None], key[None, :], kept)
    written = tl.load(values + (slot[:, None] * V + column[None, :]), mask=earlier[:, None] & (column < V)[None, :],
                      other=0.0)  # fmt: skip
    written = tl.where(here[:, None], value[None, :], written)
    strength = 1.0
    if mixing is not None:
        strength = tl.load(beta + row * stride_b + head).to(tl.float32)
        mixing += by_head * N * N
        mixed = tl.load(mixing + (slot[:, None] * N + slot[None, :]), mask=earlier[:, None], other=0.0)
    near = tl.where(there, 1.0, 0.0)
    level = tl.arange(0, LEVELS)
    if scales is not None:
        scales += row * stride_s + head * stride_sh
        near_levels = level_between(position, base + slot[:, None], level[None, :], L, 1)
        near = tl.load(scales + near_levels, mask=there, other=0.0).to(tl.float32)

    # sums of decays: of the tokens after each one, and up to it; not differences, for a decay of -inf is a reset
    log, total = 0.0, 1.0
    if log_decays is not None:
        own_log = log_decay + row * stride_g + head * stride_gh
        if BY_CHANNEL:
            log = tl.load(own_log + channel, mask=channel < K, other=0.0).to(tl.float32)
            log_decays += by_head * N * K
            if tile == 0:
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
            if tile == 0:
                tl.store(log_decays + count, log)
            own = tl.where(here, log, tl.load(log_decays + slot, mask=earlier, other=0.0))
            after = slot[None, :] > slot[:, None]
            since = tl.sum(tl.where(after, own[None, :], 0.0), 1)[:, None]
            until = tl.sum(tl.where(after, 0.0, own[None, :]), 1)[:, None]
            logs_of_all = tl.sum(own, 0)
            total = tl.exp(logs_of_all)

    # what the buckets are owed
    occupied = holds_tokens(base, level, L)
    if owed is not None:
        right = is_right_half(position, HEIGHT).to(tl.int32)
        owed += row * 2 * H * L + head * L
        next_owed = owed + (1 - right) * H * L
        owed += right * H * L

    # the buckets: all that is read has been asked for before anything is multiplied
    seen = tl.maximum(level, level_between(position, base, level, L, 0))
    number_of_buckets = tl.sum(occupied.to(tl.int32), 0)
    rank = tl.cumsum(occupied.to(tl.int32), 0)
    target = carry_level(position + 1, level, L)
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
        if owed is not None:
            owes = tl.load(owed + levels, mask=exists, other=0.0)
            states *= tl.exp(owes)[None, :, None]
        if scales is None:
            reads += tl.sum(states, 1)
        else:
            far_levels = tl.sum(tl.where(found, seen[:, None], 0), 0)
            factor = tl.load(scales + far_levels, mask=exists, other=0.0).to(tl.float32)
            reads += tl.sum(states * factor[None, :, None], 1)
        if WRITES:
            if ends:
                states = _through(states, keys, key, values, value, log_decays, log, mixing, strength, count, channel,
                                  column, K, V, N, False, BY_CHANNEL)  # fmt: skip
                if owed is not None:
                    owes = owes + logs_of_all
                    states *= tl.exp(tl.where(owes < -MOST_OWED, 0.0, -owes))[None, :, None]
                tl.debug_barrier()  # small tiles are loaded by several warps and stored by one
                stored = exist & (levels > target)[None, :, None]
                tl.store(at, states.to(buckets.dtype.element_ty), mask=stored)

    # what the window does to the query
    reading = kept
    if log_decays is not None:
        reading = kept * tl.exp(until)
        kept *= tl.exp(since)
    weights = tl.sum(kept * query[None, :], 1)
    older = query * total
    if mixing is not None:
        overlap = tl.sum(kept * key[None, :], 1)  # with itself, too: that row is zero yet
        own_row = strength * (tl.where(here, 1.0, 0.0) - tl.sum(overlap[:, None] * mixed, 0))
        mixed = tl.where(here[:, None], own_row[None, :], mixed)
        if tile == 0:
            tl.store(mixing + count * N + slot, own_row)
        weights = tl.sum(weights[:, None] * mixed, 0)
        older -= tl.sum(weights[:, None] * reading, 0)

    if ends:  # the buckets up to the target, and the window's values
        merging = tl.sum((occupied & (level <= target)).to(tl.int32), 0)
        merged = tl.zeros((BK, BV), tl.float32)
        for start in range(0, merging):
            bucket = tl.sum(tl.where((rank == start + 1) & occupied, level, 0), 0)
            one = tl.load(first + bucket.to(tl.int64) * H * K * V + offsets, mask=inside, other=0.0).to(tl.float32)
            if owed is not None:
                one *= tl.exp(tl.load(owed + bucket))
            merged += one
        merged = _through(merged[:, None, :], keys, key, values, value, log_decays, log, mixing, strength, count,
                          channel, column, K, V, N, True, BY_CHANNEL)  # fmt: skip
        merged = tl.sum(merged, 1)
        tl.debug_barrier()  # small tiles are loaded by several warps and stored by one
        into = first + target.to(tl.int64) * H * K * V + offsets
        tl.store(into, merged.to(buckets.dtype.element_ty), mask=inside)
        if owed is not None:
            if tile == 0:
                of_each = tl.load(owed + level, mask=occupied, other=0.0) + logs_of_all
                stays = occupied & (level > target)
                if WRITES:
                    stays = stays & (of_each >= -MOST_OWED)
                tl.store(next_owed + level, tl.where(stays, of_each, 0.0), mask=level < L)

    read = tl.sum(older[:, None] * reads, 0) + tl.sum((weights * near)[:, None] * written, 0)
    tl.store(o + by_head * V + column, read.to(o.dtype.element_ty), mask=column < V)


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
    by_channel = log_decay is not None and log_decay.ndim == 3
    # the tokens of the window take the room that reading without writing leaves to `step`
    tiles, length = plain_step.tiling(key_dim, value_dim, num_levels, deferring=False), keys.shape[2]
    with torch.cuda.device_of(v):  # kernels are launched on the current device
        _window_step_kernel[programs(heads * tiles.count, rows)](
            q, k, v, level_scales, log_decay, beta, buckets, positions, begun, keys, values, log_decays, mixing, owed,
            o, rows, heads, groups, num_levels, scale, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0),
            v.stride(1), *((0, 0) if level_scales is None else level_scales.stride()[:2]),
            *((0, 0) if log_decay is None else log_decay.stride()[:2]), 0 if beta is None else beta.stride(0),
            key_dim, value_dim, BK=tiles.keys, BV=tiles.columns, TILES=tiles.count, N=length,
            HEIGHT=chunk_height(length), M=tiles.levels, LEVELS=max(2, triton.next_power_of_2(num_levels)),
            BY_CHANNEL=by_channel, WRITES=by_channel or beta is not None, num_warps=tiles.warps, num_stages=1,
            maxnreg=tiles.registers,
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
