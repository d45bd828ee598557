"""Up the tree, for the delta rule: every node is a map S ↦ P S + U of the state that enters it.

Nodes live in slots, one that ends with each chunk (see `fenwick`, "Slots"). The leaves come first; then, height by
height, every node that is not yet as high as its slot takes in its left sibling: U + P U_left and P P_left. From the
cap on, slots hold running states, made one after the other. Of a state that is carried in, far buckets are nodes of
slots of their own, with P = I: they are states as of the start. Near ones are part of the first chunk's U.

A node that grows is read by many programs while it does, so its P changes places: P of height h is in half h mod 2 of
`maps`. U of a node that grows is read by nobody else.

Legend
    N slots, H heads, G groups, K key width, V value width, KT, VT tiles of BK keys and BV values
    S sequences, F far buckets of a state
    added [N, H, K, V] U; maps [2, N, H, PARTS, K, K] P, in parts: see `delta_chunks.py`
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Ends, Slots
from loglinear.ops.triton.common import block_end, cdiv, left_sibling, next_power_of_2, program_place, programs
from loglinear.ops.triton.delta_chunks import (
    HOPPER_WARPS,
    TILE,
    Chunks,
    hopper_kernel,
    load_block,
    parts_of,
    store_block,
    store_parts,
    takes_hopper,
    takes_hopper_wide,
    tile_width,
)
from loglinear.ops.triton.delta_halves import make_leaves
from loglinear.ops.triton.launch import kernel


@kernel(do_not_specialize=["N", "height"])
def _merge_kernel(added, maps, finals, rights, tallest, heights, blocks, origins, oldests, reads, N, H, height, K, V,
                  KT: tl.constexpr, VT: tl.constexpr, RT: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
                  BV: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of U or P of the nodes of `height` + 1, from those of `height`."""
    part, number = program_place()
    slot = tl.load(tallest + number, mask=number < N, other=-1)
    if slot < 0:
        return
    if tl.load(heights + slot) <= height:
        return
    if reads is not None:
        if tl.load(reads + slot) <= height:
            return  # a bucket
    head, tile = part // ((KT + VT) * RT), part // RT % (KT + VT)
    row = part % RT * ROWS
    span = tl.exp2(height.to(tl.float32)).to(tl.int32)
    place = slot.to(tl.int64) * H + head
    left = place - span.to(tl.int64) * H
    if origins is not None:
        left = left_sibling(slot, height, span, blocks, origins, oldests, reads).to(tl.int64) * H + head
    half = maps + (height % 2).to(tl.int64) * N * H * PARTS * K * K
    map, size = half + place * PARTS * K * K, K * K
    if tile < VT:
        column = tile * BV
        total = load_block(added + place * K * V, row, K, ROWS, column, V, BV).to(tl.float32)
        for key in range(KT):
            before = load_block(added + left * K * V, key * BK, K, BK, column, V, BV)
            total = tl.dot(load_block(map, row, K, ROWS, key * BK, K, BK), before, total, input_precision=PRECISION)
            if PARTS == 2:
                rest = load_block(map + size, row, K, ROWS, key * BK, K, BK)
                total = tl.dot(rest, before, total, input_precision=PRECISION)
        store_block(added + place * K * V, total, row, K, ROWS, column, V, BV)
    else:
        column = (tile - VT) * BK
        earlier = half + left * PARTS * K * K
        composed = tl.zeros((ROWS, BK), tl.float32)
        for key in range(KT):
            first = load_block(map, row, K, ROWS, key * BK, K, BK)
            second = load_block(earlier, key * BK, K, BK, column, K, BK)
            composed = tl.dot(first, second, composed, input_precision=PRECISION)
            if PARTS == 2:
                first_lost = load_block(map + size, row, K, ROWS, key * BK, K, BK)
                composed = tl.dot(first_lost, second, composed, input_precision=PRECISION)
                second_lost = load_block(earlier + size, key * BK, K, BK, column, K, BK)
                composed = tl.dot(first, second_lost, composed, input_precision=PRECISION)
        if rights is not None:  # the backward needs P of this node, the right sibling of the one on its left
            right = load_block(map, row, K, ROWS, column, K, BK)
            store_block(rights + left * K * K, right, row, K, ROWS, column, K, BK)
            if tl.load(heights + slot) == height + 1:
                store_block(finals + place * K * K, composed, row, K, ROWS, column, K, BK)
        other = maps + (1 - height % 2).to(tl.int64) * N * H * PARTS * K * K
        store_parts(other + place * PARTS * K * K, composed, K * K, row, K, ROWS, column, K, BK, PARTS)


@triton.jit
def running_from(base, count, span, cap, origins, oldests, heights):
    """Where a sequence that may start anywhere has its running states: in slots base + (step + 1) span - 1 for the
    steps from the third of what is returned up to (count - 1) // span. The last is the slot of its oldest bucket, which
    is what a step 0 takes in."""
    oldest = tl.load(oldests + base)
    has_last = (oldest < base) & (tl.load(heights + oldest) == cap)
    origin = tl.load(origins + base)
    missing = span - 1 - (block_end(origin, cap) - origin)  # chunks of the first block of the cap height
    return base - missing, count + missing, tl.where(has_last, 0, 1), oldest


@kernel(do_not_specialize=["N", "cap"])
def _running_kernel(added, maps, bases, counts, origins, oldests, heights, N, H, cap, K, V, KT: tl.constexpr,
                    BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds up what is in the slots of the cap height, in order; a program has BV columns of a head's states."""
    sequence, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, count = tl.load(bases + sequence), tl.load(counts + sequence)
    span = tl.exp2(cap.to(tl.float32)).to(tl.int32)
    half = maps + (cap % 2).to(tl.int64) * N * H * PARTS * K * K
    begin, oldest = 1, None
    if origins is not None:
        base, count, begin, oldest = running_from(base, count, span, cap, origins, oldests, heights)
    for step in range(begin, (count - 1) // span):
        place = (base + (step + 1) * span - 1).to(tl.int64) * H + head
        before = place - span.to(tl.int64) * H
        if oldest is not None:
            before = tl.where(step == 0, oldest.to(tl.int64) * H + head, before)
        map = half + place * PARTS * K * K
        for row in range(KT):
            total = load_block(added + place * K * V, row * BK, K, BK, tile * BV, V, BV).to(tl.float32)
            for key in range(KT):
                state = load_block(added + before * K * V, key * BK, K, BK, tile * BV, V, BV)
                first = load_block(map, row * BK, K, BK, key * BK, K, BK)
                total = tl.dot(first, state, total, input_precision=PRECISION)
                if PARTS == 2:
                    rest = load_block(map + K * K, row * BK, K, BK, key * BK, K, BK)
                    total = tl.dot(rest, state, total, input_precision=PRECISION)
            store_block(added + place * K * V, total, row * BK, K, BK, tile * BV, V, BV)
        tl.debug_barrier()


class Nodes(NamedTuple):
    """See the legend of this file."""

    added: Tensor
    maps: Tensor


class Kept(NamedTuple):
    """What the backward needs of the nodes: all single, as they are read."""

    added: Tensor  # [N, H, K, V] U
    maps: Tensor  # [N, H, K, K] P
    rights: Tensor  # [N, H, K, K] P of the right sibling of the node in a slot, where it has one


class Carried(NamedTuple):
    """State that S sequences begin with, in float32."""

    far: Tensor  # [S, F, H, K, V], the buckets of whole chunks, and the last one
    near: Tensor | None  # [S, H, K, V], the others together as they leave the first chunk, where the state has any


def _value_width(value_dim: int, key_dim: int, parts: int) -> int:
    """Columns of U in a tile: of float32 only so much fits."""
    return tile_width(value_dim, 2 * tile_width(key_dim)) if parts == 2 else tile_width(value_dim)


def make_nodes(k: Tensor, v: Tensor, beta: Tensor, chunks: Chunks, slots: Slots, chunk: int, precision: str,
               state: Carried | None, keeps: bool) -> tuple[Nodes, Kept | None]:  # fmt: skip
    """Nodes of k [T, G, K], v [T, H, V] and beta [T, H], and what of them is kept if it `keeps` something. The last
    chunks of sequences have none.
    """
    num_slots, key_dim, (_, heads, value_dim) = len(slots.token), k.shape[-1], v.shape
    parts = parts_of(k)
    nodes = Nodes(
        added=v.new_empty(num_slots, heads, key_dim, value_dim),
        maps=v.new_empty(2, num_slots, heads, parts, key_dim, key_dim),
    )
    kept, finals, rights = None, None, None
    if keeps:
        finals, rights = (v.new_empty(num_slots, heads, key_dim, key_dim) for _ in range(2))
        kept = Kept(nodes.added, finals, rights)
    block_k, block_v = tile_width(key_dim), tile_width(value_dim)
    wide_v = _value_width(value_dim, key_dim, parts)
    keys = {"KT": cdiv(key_dim, block_k), "BK": block_k, "PARTS": parts, "PRECISION": precision}
    values = {"VT": cdiv(value_dim, wide_v), "BV": wide_v}
    columns = keys["KT"] + values["VT"]
    make_leaves(k, v, beta, chunks, *nodes, finals, slots, chunk, precision)
    if state is not None:
        _store_state(nodes, finals, state, slots)
    merge, on_hopper = row_tiles(key_dim), takes_hopper(chunk, k, v)
    on_hopper_wide = takes_hopper_wide(chunk, key_dim, v)
    for height in range(slots.cap):
        highest = most_higher(slots, height)
        if not highest:
            continue
        arguments = (
            *nodes, finals, rights, slots.tallest, slots.height, *sibling_tables(slots), num_slots, heads, height,
        )  # fmt: skip
        if on_hopper:
            hopper_kernel("merge")[programs(heads, highest)](*arguments, num_warps=HOPPER_WARPS)
        elif on_hopper_wide:
            hopper_kernel("merge_wide")[programs(heads, highest)](
                *arguments, KT=key_dim // TILE, VT=value_dim // (2 * TILE), num_warps=HOPPER_WARPS
            )
        else:
            _merge_kernel[programs(heads * columns * merge["RT"], highest)](
                *arguments, key_dim, value_dim, **merge, **keys, **values
            )
    if has_running(slots):
        # one program after the other has each head's columns: narrow tiles make more of them
        _running_kernel[(len(slots.base), heads, cdiv(value_dim, block_v))](
            *nodes, *running_tables(slots), num_slots, heads, slots.cap, key_dim, value_dim,
            BV=block_v, num_warps=4, num_stages=3, **keys,
        )  # fmt: skip
    return nodes, kept


def _store_state(nodes: Nodes, finals: Tensor | None, state: Carried, slots: Slots) -> None:
    """Far buckets into their slots, and the near ones to what the first chunks have written."""
    ends, (_, _, _, parts, key_dim, _) = slots.ends, nodes.maps.shape
    held = torch.where(ends.has_bucket[..., None, None, None], state.far, 0)
    nodes.added[ends.bucket.flatten()] = held.flatten(0, 1).to(nodes.added.dtype)
    unchanged = nodes.maps.new_zeros(parts, key_dim, key_dim)
    unchanged[0].fill_diagonal_(1)
    nodes.maps[_heights(ends) % 2, ends.bucket] = unchanged
    if finals is not None:
        finals[ends.bucket.flatten()] = unchanged[0]
    if state.near is not None:
        nodes.added[slots.base] = (nodes.added[slots.base] + state.near).to(nodes.added.dtype)


class Leaving(NamedTuple):
    """The nodes that become far buckets of the final state, in float32."""

    added: Tensor  # [S, F, H, K, V] U, zero where there is no node
    maps: Tensor  # [S, F - 1, H, K, K] P of all but the last, which nothing passes; I where there is no node


def leaving(nodes: Nodes, state: Carried | None, slots: Slots) -> Leaving:
    """What the ends of the sequences read, as it was at the end of each node."""
    ends = slots.ends
    present = ends.has_node[..., None, None, None]
    added = torch.where(present, nodes.added[ends.node].float(), 0)
    if state is not None:  # a bucket that nothing took in: as it was, not as it is stored
        kept = ends.has_node.logical_and(ends.node < slots.base[:, None])
        added = torch.where(kept[..., None, None, None], state.far, added)
    maps = nodes.maps[_heights(ends)[:-1] % 2, ends.node[:, :-1]].float().sum(3)
    return Leaving(added, torch.where(present[:, :-1], maps, torch.eye(maps.shape[-1], device=maps.device)))


def _heights(ends: Ends) -> Tensor:
    """[F] of the far buckets: a node's P is where that of its height is."""
    return torch.arange(ends.node.shape[1], device=ends.node.device)


# Kernels that are given None for a table are those that were compiled before there was one.


def sibling_tables(slots: Slots) -> tuple[Tensor | None, ...]:
    """What tells a node its left sibling where that may be a bucket."""
    return (None,) * 4 if slots.origin is None else (slots.block, slots.origin, slots.oldest, slots.reads)


def running_tables(slots: Slots) -> tuple[Tensor | None, ...]:
    """What tells where the running states of a sequence are."""
    beginning = (None,) * 3 if slots.origin is None else (slots.origin, slots.oldest, slots.height)
    return slots.base, slots.count, *beginning


def most_higher(slots: Slots, height: int) -> int:
    """There are no more nodes above this height: one for so many chunks; one more where a sequence starts anywhere.
    What would end with the last chunk of a sequence is read by nobody."""
    span, count = 2 ** (height + 1), slots.token.shape[0]
    if slots.origin is None:
        return count // span if slots.longest > span else 0
    return count // span + slots.base.shape[0]


def has_running(slots: Slots) -> bool:
    """Whether there can be states that run into one of the cap height."""
    return slots.origin is not None or slots.longest > 2 ** (slots.cap + 1)


def row_tiles(key_dim: int) -> dict[str, int]:
    """How the rows of U and P are split among programs, and how those are launched."""
    rows = 128 if key_dim % 128 == 0 else min(64, max(16, next_power_of_2(key_dim)))
    return {"RT": cdiv(key_dim, rows), "ROWS": rows, "num_warps": 4, "num_stages": 2}
