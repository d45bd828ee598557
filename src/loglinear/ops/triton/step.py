"""One token in one kernel: every family of mixers, states updated in place.

A program has some columns of the states of one row and head, so that a few heads of one sequence keep a GPU busy. It
finds the occupied levels from the row's position, loads several at a time (all of their loads are in flight together;
empty buckets cost no traffic), and holds two sums: what the query reads, and what merges.

    decay      one per head: pending decays are added to, and buckets stay as they are until they are merged
               one per head and no pending decays, or one per channel: every occupied bucket is multiplied
    delta      S ← S - β k (kᵀ S), after the decay; every occupied bucket changes

The programs of a row advance its position, and the programs of a head its pending decays, although all of them read
these numbers first. Nothing waits for that: programs are counted as they arrive, and the last one writes.

    positions   Programs take their position with a (relaxed) atomic that adds ARRIVAL to it. Atomics on one word have
                one order, so the program that finds all others counted knows that all have their position. It takes
                the count away and adds 1.
    log_decays  One column tile: the program is alone. Several: bucket 0 owes nothing, for it is empty between tokens,
                and its place is the counter. A program arrives there (acquire and release, after a barrier of its
                threads) once it has loaded its decays; so the loads of all come before the stores of the last.

The state is computed with in float32, whatever it is kept in.

Legend
    B rows, G groups, H heads, K key width, V value width, L levels
    N tiles of columns, M levels that are loaded together
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from loglinear.ops.triton.common import carry_level, cdiv, holds_tokens, next_power_of_2, program_place, programs
from loglinear.ops.triton.launch import kernel
from loglinear.state import FenwickState

ARRIVAL = tl.constexpr(2**48)  # positions are below
MOST_ARRIVALS = 2**15 - 1  # times ARRIVAL, and a position, is below 2^63
MOST_LEVELS = 63  # positions have so many bits
WIDEST_KEY = 512
COLUMNS = 16  # of a tile: rows of 32 bytes at least, which is what memory is read in
REGISTERS = 128  # of a thread: so many that 16 warps of a multiprocessor have loads in flight


def unsupported(
    q: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    state: FenwickState,
) -> str | None:  # fmt: skip
    """Why the kernel does not cover a call, or None."""
    tensors = (q, v, level_scales, log_decay, beta, state.buckets)
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        return "float64"
    if q.shape[0] == 0:
        return "an empty batch"
    if q.shape[-1] > WIDEST_KEY:
        return f"keys wider than {WIDEST_KEY}"
    if state.num_levels > MOST_LEVELS:
        return f"a state of more than {MOST_LEVELS} levels"
    if state.num_levels == 1 and state.log_decays is not None:
        return "a pending decay of the only level"
    if not all(x.is_contiguous() for _, x in state.named_tensors()):
        return "a state that is not contiguous"
    if v.shape[1] * (v.shape[2] // COLUMNS + 1) > MOST_ARRIVALS:
        return f"more than {MOST_ARRIVALS} programs for a row"
    return None


# ----------------------------------------------------------------------------------------------------
# Kernel
# ----------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=["B", "L", "stride_s", "stride_sh"])
def _step_kernel(q, k, v, scales, log_decay, beta, buckets, positions, log_decays, o, B, H, G, L, scale,
                 stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_s, stride_sh, stride_g,
                 stride_gh, stride_b, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                 N: tl.constexpr, M: tl.constexpr, LEVELS: tl.constexpr, BY_CHANNEL: tl.constexpr):  # fmt: skip
    """M · BK · BV numbers of the state at a time; LEVELS: L or more, a power of two."""
    place, row = program_place()
    if row >= B:
        return
    head, tile = place // N, place % N
    row = row.to(tl.int64)
    programs_of_row = tl.num_programs(0).to(tl.int64)
    arrived = tl.atomic_add(positions + row, ARRIVAL, sem="relaxed")
    position = arrived % ARRIVAL
    if arrived // ARRIVAL == programs_of_row - 1:
        tl.atomic_add(positions + row, 1 - programs_of_row * ARRIVAL, sem="relaxed")

    # the token
    channel, column = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    group = head // (H // G)
    query = tl.load(q + row * stride_q + group * stride_qg + channel, mask=channel < K, other=0.0).to(tl.float32)
    key = tl.load(k + row * stride_k + group * stride_kg + channel, mask=channel < K, other=0.0).to(tl.float32)
    written = tl.load(v + row * stride_v + head * stride_vh + column, mask=column < V, other=0.0).to(tl.float32)
    strength = 1.0
    if beta is not None:
        strength = tl.load(beta + row * stride_b + head).to(tl.float32)
        written *= strength
    log = 0.0
    if log_decay is not None:
        own_log = log_decay + row * stride_g + head * stride_gh
        if BY_CHANNEL:
            log = tl.load(own_log + channel, mask=channel < K, other=0.0).to(tl.float32)[:, None, None]
        else:
            log = tl.load(own_log).to(tl.float32)
    merged = key[:, None] * written[None, :]
    reads = merged
    if scales is not None:
        scales += row * stride_s + head * stride_sh
        reads *= tl.load(scales).to(tl.float32)

    # the levels
    level = tl.arange(0, LEVELS)
    occupied = holds_tokens(position, level, L)
    target = carry_level(position + 1, level, L)
    count = tl.sum(occupied.to(tl.int32), 0)
    rank = tl.cumsum(occupied.to(tl.int32), 0)
    defers: tl.constexpr = log_decays is not None and beta is None and not BY_CHANNEL
    changes: tl.constexpr = log_decay is not None or beta is not None or log_decays is not None
    if log_decays is not None:
        owed_by = log_decays + (row * L + level) * H + head
        owed = tl.load(owed_by, mask=occupied, other=0.0)

    # the buckets; of the dimensions [BK, M, BV] the compiler leaves the second one to a thread, which then adds alone
    first = buckets + (row * L * H + head) * K * V
    inside = (channel < K)[:, None] & (column < V)[None, :]
    offsets = channel[:, None] * V + column[None, :]
    for start in range(0, count, M):
        number = start + 1 + tl.arange(0, M)
        exists = number <= count
        found = (rank[:, None] == number[None, :]) & occupied[:, None]
        levels = tl.sum(tl.where(found, level[:, None], 0), 0)  # [M], those of the next M occupied buckets
        at = first + (levels.to(tl.int64) * H * K * V)[None, :, None] + offsets[:, None, :]
        if (BK == K) & (V % BV == 0):
            exist = exists[None, :, None]
        else:
            exist = (number <= count)[None, :, None] & inside[:, None, :]
        states = tl.load(at, mask=exist, other=0.0).to(tl.float32)
        logs = log
        if log_decays is not None:
            logs += tl.load(log_decays + (row * L + levels) * H + head, mask=exists, other=0.0)[None, :, None]
        if changes:
            states *= tl.exp(logs)
        if beta is not None:
            seen = tl.sum(states * key[:, None, None], 0)
            states -= (strength * key)[:, None, None] * seen[None, :, :]
        if scales is None:
            reads += tl.sum(states, 1)
        else:
            factor = tl.load(scales + levels, mask=exists, other=0.0).to(tl.float32)
            reads += tl.sum(states * factor[None, :, None], 1)
        merges = (levels <= target)[None, :, None]
        merged += tl.sum(tl.where(merges, states, 0.0), 1)
        if not defers:  # what merges leaves zeros behind
            stored = exist & (levels != target)[None, :, None]
            if not changes:
                stored = stored & (levels <= target)[None, :, None]
            tl.debug_barrier()  # small tiles are loaded by several warps and stored by one
            tl.store(at, tl.where(merges, 0.0, states).to(buckets.dtype.element_ty), mask=stored)

    read = tl.sum((query * scale)[:, None] * reads, 0)
    tl.debug_barrier()  # all threads have loaded
    if log_decays is not None:
        last = True
        if N > 1:
            last = tl.atomic_add(log_decays + row * L * H + head, 1.0, sem="acq_rel") == N - 1
        if defers:
            owed = tl.where(occupied & (level > target), owed + log, 0.0)
        else:
            owed = tl.zeros_like(owed)
        if last:
            tl.store(owed_by, owed, mask=level < L)
    tl.store(first + target.to(tl.int64) * H * K * V + offsets, merged.to(buckets.dtype.element_ty), mask=inside)
    tl.store(o + (row * H + head) * V + column, read.to(o.dtype.element_ty), mask=column < V)


# ----------------------------------------------------------------------------------------------------
# Launch
# ----------------------------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """How states are cut: tiles of [`keys`, `columns`], `count` of them side by side, of `levels` levels at a time."""

    keys: int
    columns: int
    count: int
    levels: int
    warps: int
    registers: int


def tiling(key_dim: int, value_dim: int, num_levels: int, deferring: bool) -> Tiling:
    """`deferring`: buckets are read and not written, which leaves a thread room for twice as many numbers."""
    keys = max(16, next_power_of_2(key_dim))  # Triton 3.6 fails to compile tiles of fewer
    columns = min(COLUMNS, next_power_of_2(value_dim))
    warps = max(4, min(16, keys // 32))
    numbers = warps * 32 * (REGISTERS // 2 if deferring else REGISTERS // 4)
    levels = max(1, min(numbers // (keys * columns), 8, next_power_of_2(num_levels)))
    return Tiling(keys, columns, cdiv(value_dim, columns), levels, warps, REGISTERS)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, log_decay: Tensor | None, beta: Tensor | None,
    buckets: Tensor, positions: Tensor, log_decays: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    (_, groups, key_dim), (rows, heads, value_dim), num_levels = q.shape, v.shape, buckets.shape[1]
    q, k, v, level_scales, log_decay, beta = (
        None if x is None else x if x.stride(-1) == 1 else x.contiguous()
        for x in (q, k, v, level_scales, log_decay, beta)
    )  # fmt: skip
    assert q is not None and k is not None and v is not None
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    by_channel = log_decay is not None and log_decay.ndim == 3
    tiles = tiling(key_dim, value_dim, num_levels, log_decays is not None and beta is None and not by_channel)
    with torch.cuda.device_of(v):  # kernels are launched on the current device
        _step_kernel[programs(heads * tiles.count, rows)](
            q, k, v, level_scales, log_decay, beta, buckets, positions, log_decays, o, rows, heads, groups, num_levels,
            scale, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *((0, 0) if level_scales is None else level_scales.stride()[:2]),
            *((0, 0) if log_decay is None else log_decay.stride()[:2]), 0 if beta is None else beta.stride(0),
            key_dim, value_dim, BK=tiles.keys, BV=tiles.columns, N=tiles.count, M=tiles.levels,
            LEVELS=max(2, next_power_of_2(num_levels)), BY_CHANNEL=by_channel, num_warps=tiles.warps,
            num_stages=1, maxnreg=tiles.registers,
        )  # fmt: skip
    return o


_step_op = torch.library.custom_op("loglinear::step", _launch, mutates_args=("buckets", "positions", "log_decays"))


@_step_op.register_fake
def _(q, k, v, level_scales, log_decay, beta, buckets, positions, log_decays, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def step(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, state: FenwickState, log_decay: Tensor | None,
    beta: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """See `log_linear_attention_step`."""
    if torch.compiler.is_compiling():
        return _step_op(q, k, v, level_scales, log_decay, beta, *state[:3], scale)
    # the way through torch's dispatcher takes the host twice as long as all that is done here
    o = _launch(q, k, v, level_scales, log_decay, beta, *state[:3], scale)
    torch.autograd.graph.increment_version([x for _, x in state.named_tensors() if not x.is_inference()])
    return o
