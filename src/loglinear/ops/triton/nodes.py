"""Up the tree: the states of all nodes, one slot each (see `fenwick`, "Slots").

Two kernels. The first makes the nodes of every SUB chunks in registers, one program per head and tile of the state;
the second walks over those subtrees in order, in one program per sequence, head and tile, and finishes what ends with
them. Decays are kept as base-2 logs; a node is stored in 16 bits for 16-bit inputs and summed in float32.

Legend
    N chunks (slots), C rows of a chunk, H heads, G groups, K key width, V value width
    nodes [N, H, K, V], logs [N, H] (of the decay across a node), gamma [H, N, C] (inclusive sums of the log decay
    within a chunk)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    cdiv,
    decay_of,
    load_rows,
    log2_decays,
    next_power_of_2,
    program_place,
    programs,
    sums_dtype,
)
from loglinear.ops.triton.launch import kernel

SUBTREE_HEIGHT = 2  # of the subtrees whose nodes are made in registers


@triton.jit
def _leaf(k, v, log_decay, gamma, token, first, rows, present, slot, head, N, stride_k, stride_v, stride_d, K, V,
          write_gamma, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """State that one chunk adds, [BK, BV], and the log of its decay."""
    decay = log2_decays(log_decay + head, token, first, rows, stride_d, C).to(gamma.dtype.element_ty)
    sums = tl.cumsum(decay, 0)
    total = tl.sum(decay, 0)
    if write_gamma:
        row = tl.arange(0, C)
        tl.store(gamma + (head.to(tl.int64) * N + slot) * C + row, sums, mask=row < tl.where(present, C, 0))
    keys = load_rows(k, token, first, rows, stride_k, C, K, BK, False)
    values = load_rows(v, token, first, rows, stride_v, C, V, BV, False)
    weighted = (values * decay_of(total - sums)[:, None]).to(values.dtype)
    return tl.dot(tl.trans(keys), weighted, input_precision=PRECISION), total


@triton.jit
def _store(nodes, logs, state, log, slot, head, present, offset, mask, H, size, write_log):
    """A node into its slot."""
    place = slot.to(tl.int64) * H + head
    stored = mask & (offset < tl.where(present, size, 0))
    tl.store(nodes + place * size + offset, state.to(nodes.dtype.element_ty), mask=stored)
    if write_log:
        tl.store(logs + place, log, mask=present)


@triton.jit
def _subtree(k, v, log_decay, gamma, nodes, logs, firsts, rows, token, slot, left, head, N, H, stride_k, stride_v,
             stride_d, K, V, size, offset, mask, write, FIRST: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr,
             BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """State and log decay of the SIZE chunks from FIRST on, after storing the left siblings among them."""
    if SIZE == 1:
        present = left > FIRST
        first = None if firsts is None else tl.load(firsts + slot)  # where there is such a table, SIZE is 1
        count = tl.load(rows + slot + FIRST, mask=present, other=0)
        return _leaf(k, v, log_decay, gamma, token + FIRST * C, first, count, present, slot + FIRST, head, N,
                     stride_k, stride_v, stride_d, K, V, write, C, BK, BV, PRECISION)  # fmt: skip
    else:
        HALF: tl.constexpr = SIZE // 2
        before, before_log = _subtree(k, v, log_decay, gamma, nodes, logs, firsts, rows, token, slot, left, head, N, H,
                                      stride_k, stride_v, stride_d, K, V, size, offset, mask, write, FIRST, HALF, C, BK,
                                      BV, PRECISION)  # fmt: skip
        end = FIRST + HALF - 1
        _store(nodes, logs, before, before_log, slot + end, head, left > end, offset, mask, H, size, write)
        after, after_log = _subtree(k, v, log_decay, gamma, nodes, logs, firsts, rows, token, slot, left, head, N, H,
                                    stride_k, stride_v, stride_d, K, V, size, offset, mask, write, FIRST + HALF,
                                    HALF, C, BK, BV, PRECISION)  # fmt: skip
        return before * decay_of(after_log) + after, before_log + after_log


@kernel(do_not_specialize=["N"])
def _subtrees_kernel(k, v, log_decay, gamma, nodes, logs, tops, tokens, firsts, rows, blocks, lefts, N, H, G,
                     stride_k, stride_kg, stride_v, stride_vh, stride_d, K, V, C: tl.constexpr, SUB: tl.constexpr,
                     BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(K, BK) * tl.cdiv(V, BV)
    part, slot = program_place()
    head, tile = part // tiles, part % tiles
    left = tl.load(lefts + slot, mask=slot < N, other=0)
    block = tl.load(blocks + slot, mask=slot < N, other=0)
    if (tl.load(rows + slot, mask=slot < N, other=0) == 0) | (block % SUB != 0):
        return
    tiles_v = tl.cdiv(V, BV)
    first_k, first_v = (tile // tiles_v) * BK, (tile % tiles_v) * BV
    k += (head // (H // G)).to(tl.int64) * stride_kg + first_k
    v += head.to(tl.int64) * stride_vh + first_v
    row, column = tl.arange(0, BK)[:, None], tl.arange(0, BV)[None, :]
    offset = (first_k + row) * V + first_v + column
    mask = (first_k + row < K) & (first_v + column < V)
    state, log = _subtree(k, v, log_decay, gamma, nodes, logs, firsts, rows, tl.load(tokens + slot), slot, left, head,
                          N, H, stride_k, stride_v, stride_d, K - first_k, V - first_v, K * V, offset, mask, tile == 0,
                          0, SUB, C, BK, BV, PRECISION)  # fmt: skip
    _store(nodes, tops, state, log, slot + SUB - 1, head, left >= SUB, offset, mask, H, K * V, tile == 0)


@kernel(do_not_specialize=["cap"])
def _walk_kernel(nodes, logs, tops, heights, oldests, bases, counts, H, size, cap, LOW: tl.constexpr,
                 SUB: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Finishes the slots that end a subtree (of height LOW), in order: they take in what is on their left.

    A slot below the cap takes in as many nodes as its height asks for, or buckets of the initial state, the nearest
    first; from the cap on it takes in everything. What a program reads back it wrote itself: the tiles of a head all
    write the same logs.
    """
    sequence, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, count = tl.load(bases + sequence), tl.load(counts + sequence)
    offset = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    bucket = base - 1
    running = tl.zeros((BLOCK,), tl.float32)
    if oldests is not None:
        oldest = tl.load(oldests + base)
        if oldest < base:
            if tl.load(heights + oldest) == cap:  # the last bucket of the initial state
                place = oldest.to(tl.int64) * H + head
                running += tl.load(nodes + place * size + offset, mask=mask, other=0.0).to(tl.float32)
    for subtree in range(count // SUB):
        slot = base + (subtree + 1) * SUB - 1
        place = slot.to(tl.int64) * H + head
        state = tl.load(nodes + place * size + offset, mask=mask, other=0.0).to(tl.float32)
        log = tl.load(tops + place)
        height = tl.load(heights + slot)
        span = SUB
        for _ in range(height - LOW):
            before = place - span * H
            if oldests is not None:
                if slot - span < base:
                    before = bucket.to(tl.int64) * H + head
                    bucket -= 1
            state += tl.exp2(log) * tl.load(nodes + before * size + offset, mask=mask, other=0.0).to(tl.float32)
            log += tl.load(logs + before)
            span *= 2
        if height == cap:
            running = state + tl.exp2(log) * running
            state = running
        tl.store(nodes + place * size + offset, state.to(nodes.dtype.element_ty), mask=mask)
        tl.store(logs + place, log)
        tl.debug_barrier()


class Carried(NamedTuple):
    """State that sequences begin with, in float32."""

    far: Tensor  # [S, F, H, K, V], the buckets of whole chunks, and the last one
    near: Tensor  # [S, H, K, V], the sum of those that are part of the first chunk


def subtree_height(slots: Slots, state: Carried | None) -> int:
    """Of the subtrees that are made in registers.

    They would have to take in buckets: chunks that continue a sequence are left to the walk, one by one.
    """
    return 0 if state is not None else min(slots.cap, SUBTREE_HEIGHT)


def make_nodes(k: Tensor, v: Tensor, log_decay: Tensor, slots: Slots, chunk: int, precision: str,
               state: Carried | None = None):  # fmt: skip
    """nodes [N, H, K, V], logs [N, H] and gamma [H, N, C] of k [T, G, K], v [T, H, V] and log_decay [T, H].

    Slots without a node (the last chunks of a sequence) are left as they are: nobody reads them.
    """
    num_slots, (_, groups, key_dim), (_, heads, value_dim) = len(slots.token), k.shape, v.shape
    stored = v.dtype if v.dtype == torch.bfloat16 else torch.float32
    new = v.new_empty if slots.ends is None else v.new_zeros  # where states are carried there are slots without rows
    nodes = v.new_empty(num_slots, heads, key_dim, value_dim, dtype=stored)
    logs = new(num_slots, heads, dtype=torch.float32)
    tops = torch.empty_like(logs)
    gamma = new(heads, num_slots, chunk, dtype=sums_dtype(v))
    low = subtree_height(slots, state)
    block_k, block_v = min(64, next_power_of_2(key_dim)), min(64, next_power_of_2(value_dim))
    block_k, block_v = max(16, block_k), max(16, block_v)
    tiles = cdiv(key_dim, block_k) * cdiv(value_dim, block_v)
    _subtrees_kernel[programs(heads * tiles, num_slots)](  # the tiles of a head side by side: they share v in the cache
        k, v, log_decay, gamma, nodes, logs, tops, slots.token, slots.first, slots.rows, slots.block, slots.left,
        num_slots, heads, groups, k.stride(0), k.stride(1), v.stride(0), v.stride(1), log_decay.stride(0),
        key_dim, value_dim, C=chunk, SUB=2**low, BK=block_k, BV=block_v, PRECISION=precision, num_warps=4, num_stages=1,
    )  # fmt: skip
    if state is not None:
        held = torch.where(slots.ends.has_bucket[..., None, None, None], state.far, 0)
        nodes[slots.ends.bucket.flatten()] = held.flatten(0, 1).to(stored)
        across = torch.exp2(gamma[:, slots.base, -1]).float().T[..., None, None]  # the first chunk
        nodes[slots.base] = (nodes[slots.base] + across * state.near).to(stored)
    size = key_dim * value_dim
    block = min(1024, next_power_of_2(size))
    _walk_kernel[(len(slots.base), heads, cdiv(size, block))](
        nodes, logs, tops, slots.height, slots.oldest, slots.base, slots.count, heads, size, slots.cap,
        LOW=low, SUB=2**low, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return nodes, logs, gamma


@kernel(do_not_specialize=["N"])
def _offsets_kernel(gamma, offsets, bases, counts, N, C: tl.constexpr, BLOCK: tl.constexpr):
    sequence, head = tl.program_id(0), tl.program_id(1)
    base, count = tl.load(bases + sequence), tl.load(counts + sequence)
    before = tl.zeros((1,), tl.float64)
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        at = gamma + (head.to(tl.int64) * N + base + number) * C + C - 1
        totals = tl.load(at, mask=number < count, other=0.0).to(tl.float64)
        at = offsets + head.to(tl.int64) * (N + 1) + base + number + 1
        tl.store(at, before + tl.cumsum(totals, 0), mask=number < count)
        before += tl.sum(totals, 0)


def decay_offsets(gamma: Tensor, slots: Slots) -> Tensor:
    """offsets [H, N + 1] float64: log decay from the beginning of a sequence to the end of the slot before each.

    Sequence by sequence, so that what is not finite stays in its own. Differences lose nothing that matters.
    """
    heads, num_slots, chunk = gamma.shape
    offsets = gamma.new_zeros(heads, num_slots + 1, dtype=torch.float64)
    _offsets_kernel[(len(slots.base), heads)](
        gamma, offsets, slots.base, slots.count, num_slots, C=chunk, BLOCK=128, num_warps=1
    )
    return offsets


class Leaving(NamedTuple):
    """What sequences leave behind, in float32."""

    far: Tensor  # [S, F, H, K, V] buckets of whole chunks, and the last one but for what is part of the last chunk
    decay: Tensor  # [S, F, H, 1, 1] from the nodes that they are to the ends of the sequences; 0: there is no node


def leaving(nodes: Tensor, offsets: Tensor, slots: Slots) -> Leaving:
    ends = slots.ends
    after = offsets[:, ends.last + 1][..., None] - offsets[:, ends.node + 1]  # [H, S, F]
    decay = torch.where(ends.has_node, torch.exp2(after.float()), 0).permute(1, 2, 0)[..., None, None]
    held = nodes[ends.node.flatten()].unflatten(0, ends.node.shape)
    return Leaving(torch.where(ends.has_node[..., None, None, None], held * decay, 0), decay)
