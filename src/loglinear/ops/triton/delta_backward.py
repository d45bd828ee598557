"""Gradients of the delta rule: `delta_read.py` and `delta_nodes.py` run backwards, then each chunk by itself.

With G_j = λ_j ⊙ dO U_jᵀ for the nodes j that a chunk reads, nearest first, and R_j its queries as they meet them:

    dR_j = G_j + dR_{j+1} P_jᵀ        dU_n = Σ R_jᵀ (λ_j ⊙ dO)        dP_n = Σ R_jᵀ dR_{j+1}

over all chunks that read n (P of buckets that are carried in is I, and needs none). Then from parents to children, for
the composition U = U_r + P_r U_l, P = P_r P_l:

    dU_l += P_rᵀ dU       dP_l += P_rᵀ dP       dU_r = dU       dP_r = dU U_lᵀ + dP P_lᵀ

In a chunk (`delta_backward_halves.py`; names as in `delta_chunks.py`; X = (I + A)⁻¹, T = X diag(β), Y = T v, k̂ = k e^γ,
k̄ = k e^{Γ-γ}, M the scores before T, S after it and times Λ; dW = -k̄ dP, dY = k̄ dU):

    d(MT) = dO vᵀ ⊙ Λ - dR_0 k̂ᵀ         dT = Mᵀ d(MT) + dY vᵀ + dW k̂ᵀ         dA = -Xᵀ dT Tᵀ, strictly lower
    dv = Sᵀ dO + Tᵀ dY                  dk̂ = Tᵀ dW - (MT)ᵀ dR_0               dk̄ = T (v dUᵀ - k̂ dPᵀ)

and M, A, k̂ and k̄ are functions of q, k, β and γ. Nothing of the decay gradient leaves the chunk: what decays beyond
it is part of P. What is stored is as wide as the inputs, single; accumulation is float32.

Legend
    N slots, C rows of a chunk, H heads, G groups, K key width, V value width, L levels, S sequences, F far buckets
    M variants of the queries of all chunks: see `delta_read.py`
    KT, VT, RT tiles of BK keys, BV values and ROWS rows
    added, maps, rights: see `Kept` in `delta_nodes.py`; pulled [M, H, C, K] dR; d_added [N, H, K, V], d_maps [N, H,
    K, K] gradients of nodes; d_erase [N, H, C, K] dW; mixed [N, H, 3, E, E] MT; d_mixed, d_solved, d_pairs, d_overlap
    [N, H, 3, E, E] gradients of MT, T, q kᵀ and k kᵀ
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots, readers_with_rows
from loglinear.ops.triton.common import (
    add_highest_bit,
    cdiv,
    drop_lowest_bit,
    left_sibling,
    load_column,
    next_power_of_2,
    place_of_node,
    program_place,
    programs,
    row_exists,
)
from loglinear.ops.triton.delta_backward_halves import chunk_gradients
from loglinear.ops.triton.delta_chunks import (
    HOPPER_WARPS,
    TILE,
    Chunks,
    fetch_block,
    fetch_tile,
    hopper_kernel,
    load_block,
    load_tile,
    store_block,
    takes_hopper,
    takes_hopper_wide,
    tile_width,
    walks,
    warps_of,
    whole_width,
)
from loglinear.ops.triton.delta_nodes import (
    Kept,
    Leaving,
    has_running,
    most_higher,
    row_tiles,
    running_from,
    running_tables,
    sibling_tables,
)
from loglinear.ops.triton.delta_read import reading_tables
from loglinear.ops.triton.launch import kernel


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _pull_kernel(grad_o, scales, seen, added, pulled, dscales, tokens, firsts, rows_of, blocks, origins, oldests,
                 heights, reads, variants, places, N, H, stride_g, stride_gh, stride_s, stride_sh, K, V, L,
                 C: tl.constexpr, HEIGHT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What each read of a chunk gets from the output: gradients of its queries, and of λ."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token, block, count = tl.load(tokens + slot), tl.load(blocks + slot), tl.load(reads + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    origin = None if origins is None else tl.load(origins + slot)
    oldest = None if oldests is None else tl.load(oldests + slot)
    different = None if variants is None else tl.load(variants + slot)
    row = tl.arange(0, C)
    exists = row_exists(row, first, rows)
    grad_o += head.to(tl.int64) * stride_gh
    here = (tl.load(places + slot).to(tl.int64) * H + head) * C * K
    lam, dlam = scales + head.to(tl.int64) * stride_sh, dscales + (token + row).to(tl.int64) * H * L + head * L
    last = tl.zeros((C,), tl.float32)
    rest = block
    for number in range(count):
        node = place_of_node(slot, block, origin, oldest, rest, count - number)
        state = added + (node.to(tl.int64) * H + head) * K * V
        level = tl.minimum(HEIGHT + 1 + tl.load(heights + node), L - 1)
        weight = tl.full((C,), 1.0, tl.float32)
        if SCALED:
            weight = load_column(lam + level, token, first, rows, stride_s, C)
        found = tl.zeros((C,), tl.float32)
        for key in range(KT):
            pull = tl.zeros((C, BK), tl.float32)
            for tile in range(VT):
                grad = load_tile(grad_o, token, first, rows, stride_g, C, tile * BV, V, BV)
                part = load_block(state, key * BK, K, BK, tile * BV, V, BV)
                pull = tl.dot(grad, tl.trans(part), pull, input_precision=PRECISION)
            if SCALED:
                queries = load_block(seen + here, 0, C, C, key * BK, K, BK).to(tl.float32)
                found += tl.sum(queries * pull, 1)
            pull *= weight[:, None]
            if different is not None:
                if number >= different:  # with the same queries as the read before
                    pull += load_block(pulled + here, 0, C, C, key * BK, K, BK).to(tl.float32)
            store_block(pulled + here, pull, 0, C, C, key * BK, K, BK)
        if SCALED:
            if level < L - 1:
                tl.store(dlam + level, found, mask=exists)
            else:
                last += found
        if different is None:
            here += H * C * K
        else:
            here += tl.where(number + 1 < different, H * C * K, 0)
            tl.debug_barrier()
        rest = drop_lowest_bit(rest)
    if SCALED:
        tl.store(dlam + L - 1, last, mask=exists)


@kernel(do_not_specialize=["N"])
def _ascend_kernel(pulled, maps, rows_of, blocks, variants, places, N, H, K, C: tl.constexpr, KT: tl.constexpr,
                   BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds to the gradient of each read's queries what comes through the node that they pass next."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    block, count = tl.load(blocks + slot), tl.load(variants + slot)
    base = (tl.load(places + slot).to(tl.int64) * H + head) * C * K
    for step in range(count - 1):
        number = count - 2 - step
        rest = block
        for _ in range(number):
            rest = drop_lowest_bit(rest)
        node = place_of_node(slot, block, None, None, rest, count - number)  # buckets are not passed
        map = maps + (node.to(tl.int64) * H + head) * K * K
        here = base + number * H * C * K
        for column in range(KT):
            total = load_block(pulled + here, 0, C, C, column * BK, K, BK).to(tl.float32)
            for key in range(KT):
                after = load_block(pulled + here + H * C * K, 0, C, C, key * BK, K, BK)
                part = load_block(map, column * BK, K, BK, key * BK, K, BK)
                total = tl.dot(after, tl.trans(part), total, input_precision=PRECISION)
            store_block(pulled + here, total, 0, C, C, column * BK, K, BK)
        tl.debug_barrier()


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _climb_kernel(grad_o, scales, seen, added, maps, pulled, dscales, tokens, firsts, rows_of, blocks, origins, oldests,
                  heights, reads, variants, places, N, H, stride_g, stride_gh, stride_s, stride_sh, K, V, L,
                  C: tl.constexpr, HEIGHT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                  SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`_pull_kernel` and `_ascend_kernel` in one, which has all columns: from the farthest node to the nearest."""
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    token, block, count = tl.load(tokens + slot), tl.load(blocks + slot), tl.load(reads + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    origin = None if origins is None else tl.load(origins + slot)
    oldest = None if oldests is None else tl.load(oldests + slot)
    different = count if variants is None else tl.load(variants + slot)
    row = tl.arange(0, C)
    exists = row_exists(row, first, rows)
    base = (tl.load(places + slot).to(tl.int64) * H + head) * C * K
    lam, dlam = scales + head.to(tl.int64) * stride_sh, dscales + (token + row).to(tl.int64) * H * L + head * L
    if SCALED:
        fetch_tile(lam, token, first, rows, stride_s, C, 0, 1, 1)
    grad = load_tile(grad_o + head.to(tl.int64) * stride_gh, token, first, rows, stride_g, C, 0, V, BV)
    dtype = pulled.dtype.element_ty
    total = tl.zeros((C, BK), tl.float32)
    last = tl.zeros((C,), tl.float32)
    rest = block
    for _ in range(count - 1):
        rest = drop_lowest_bit(rest)
    for step in range(count):
        number = count - 1 - step
        node = place_of_node(slot, block, origin, oldest, rest, count - number)
        level = tl.minimum(HEIGHT + 1 + tl.load(heights + node), L - 1)
        place = node.to(tl.int64) * H + head
        here = base + tl.minimum(number, different - 1).to(tl.int64) * H * C * K
        nearer = add_highest_bit(rest, block)
        if number > 0:
            next_node = place_of_node(slot, block, origin, oldest, nearer, count - number + 1)
            next_place = next_node.to(tl.int64) * H + head
            fetch_block(added + next_place * K * V, 0, K, BK, 0, V, BV)
            fetch_block(maps + next_place * K * K, 0, K, BK, 0, K, BK)
        if SCALED:
            fetch_block(seen + here, 0, C, C, 0, K, BK)
        state = load_block(added + place * K * V, 0, K, BK, 0, V, BV)
        # what is read after this node has passed it; nothing passes a bucket, or the farthest node
        map = load_block(maps + place * K * K, 0, tl.where(number + 1 < different, K, 0), BK, 0, K, BK)
        pull = tl.dot(grad, tl.trans(state), input_precision=PRECISION)
        if SCALED:
            queries = load_block(seen + here, 0, C, C, 0, K, BK).to(tl.float32)
            found = tl.sum(queries * pull, 1)
            if level < L - 1:
                tl.store(dlam + level, found, mask=exists)
            else:
                last += found
            pull *= load_column(lam + level, token, first, rows, stride_s, C)[:, None]
        if variants is not None:
            pull += tl.where(number + 1 < different, 0.0, total)
        total = tl.dot(total.to(dtype), tl.trans(map), pull, input_precision=PRECISION)
        store_block(pulled + here, total, 0, C, C, 0, K, BK)
        rest = nearer
    if SCALED:
        tl.store(dlam + L - 1, last, mask=exists)


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _gather_kernel(grad_o, scales, seen, pulled, d_added, d_maps, tokens, firsts, rows_of, heights, lefts, variants,
                   places, reader, readers, order, N, H, stride_g, stride_gh, stride_s, stride_sh, K, V, L,
                   C: tl.constexpr, HEIGHT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, RT: tl.constexpr,
                   ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALED: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """A tile of the gradient of a node's U or P, from the chunks that read it."""
    part, number = program_place()
    head, tile = part // ((KT + VT) * RT), part // RT % (KT + VT)
    row = part % RT * ROWS
    slot = tl.load(order + number, mask=number < N, other=0)
    chunk, span, height = tl.load(reader + slot), tl.load(readers + slot), tl.load(heights + slot)
    if (number >= N) | ((span == 0) & (tl.load(lefts + slot) == 0)):
        return
    place = slot.to(tl.int64) * H + head
    lam = scales + head.to(tl.int64) * stride_sh + tl.minimum(HEIGHT + 1 + height, L - 1)
    grad_o += head.to(tl.int64) * stride_gh
    # of the first reader, this node is the nearest; if a bucket, it shares that one's only queries with the others
    nearest = tl.load(variants + chunk, mask=chunk < N, other=0)
    if tile < VT:
        total = tl.zeros((ROWS, BV), tl.float32)
        for _ in range(span):
            read = tl.load(places + chunk) + tl.load(variants + chunk) - nearest
            token, rows = tl.load(tokens + chunk), tl.load(rows_of + chunk)
            first = None if firsts is None else tl.load(firsts + chunk)
            queries = load_block(seen + (read.to(tl.int64) * H + head) * C * K, 0, C, C, row, K, ROWS)
            grad = load_tile(grad_o, token, first, rows, stride_g, C, tile * BV, V, BV)
            if SCALED:
                weight = load_column(lam, token, first, rows, stride_s, C)
                grad = (grad.to(tl.float32) * weight[:, None]).to(queries.dtype)
            total = tl.dot(tl.trans(queries), grad, total, input_precision=PRECISION)
            chunk += 1
        store_block(d_added + place * K * V, total, row, K, ROWS, tile * BV, V, BV)
    else:
        column = (tile - VT) * BK
        change = tl.zeros((ROWS, BK), tl.float32)
        for _ in range(span):
            count = tl.load(variants + chunk)
            number_of_read = count - nearest
            if number_of_read + 1 < count:
                at = ((tl.load(places + chunk) + number_of_read).to(tl.int64) * H + head) * C * K
                queries_of = load_block(seen + at, 0, C, C, row, K, ROWS)
                after = load_block(pulled + at + H * C * K, 0, C, C, column, K, BK)
                change = tl.dot(tl.trans(queries_of), after, change, input_precision=PRECISION)
            chunk += 1
        store_block(d_maps + place * K * K, change, row, K, ROWS, column, K, BK)


@kernel(do_not_specialize=["N", "cap"])
def _running_back_kernel(maps, d_added, bases, counts, origins, oldests, heights, N, H, cap, K, V, KT: tl.constexpr,
                         BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Back over the running states: each owes P of the next, transposed, times that one's gradient."""
    sequence, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, count = tl.load(bases + sequence), tl.load(counts + sequence)
    span = tl.exp2(cap.to(tl.float32)).to(tl.int32)
    begin, oldest = 1, None
    if origins is not None:
        base, count, begin, oldest = running_from(base, count, span, cap, origins, oldests, heights)
    steps = (count - 1) // span
    for step in range(steps - begin):
        place = (base + (steps - step) * span - 1).to(tl.int64) * H + head
        before = place - span.to(tl.int64) * H
        if oldest is not None:
            before = tl.where(step == steps - 1, oldest.to(tl.int64) * H + head, before)
        map = maps + place * K * K
        for row in range(KT):
            total = load_block(d_added + before * K * V, row * BK, K, BK, tile * BV, V, BV).to(tl.float32)
            for key in range(KT):
                grad = load_block(d_added + place * K * V, key * BK, K, BK, tile * BV, V, BV)
                part = load_block(map, key * BK, K, BK, row * BK, K, BK)
                total = tl.dot(tl.trans(part), grad, total, input_precision=PRECISION)
            store_block(d_added + before * K * V, total, row * BK, K, BK, tile * BV, V, BV)
        tl.debug_barrier()


@kernel(do_not_specialize=["N", "height"])
def _left_kernel(rights, d_added, d_maps, tallest, heights, lefts, blocks, origins, oldests, reads, N, H, height, K, V,
                 KT: tl.constexpr, VT: tl.constexpr, PT: tl.constexpr, RT: tl.constexpr, ROWS: tl.constexpr,
                 BK: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of what the left halves of the nodes of `height` + 1 owe to them."""
    part, number = program_place()
    slot = tl.load(tallest + number, mask=number < N, other=-1)
    if slot < 0:
        return
    if (tl.load(heights + slot) <= height) | (tl.load(lefts + slot) <= 1):
        return
    head, tile = part // ((PT + VT) * RT), part // RT % (PT + VT)
    row = part % RT * ROWS
    span = tl.exp2(height.to(tl.float32)).to(tl.int32)
    place = slot.to(tl.int64) * H + head
    left = place - span.to(tl.int64) * H
    if origins is not None:
        left = left_sibling(slot, height, span, blocks, origins, oldests, reads).to(tl.int64) * H + head
    right = rights + left * K * K
    if tile < VT:
        column = tile * BV
        total = load_block(d_added + left * K * V, row, K, ROWS, column, V, BV).to(tl.float32)
        for key in range(KT):
            grad = load_block(d_added + place * K * V, key * BK, K, BK, column, V, BV)
            map = load_block(right, key * BK, K, BK, row, K, ROWS)
            total = tl.dot(tl.trans(map), grad, total, input_precision=PRECISION)
        store_block(d_added + left * K * V, total, row, K, ROWS, column, V, BV)
    else:
        column = (tile - VT) * BP
        change = load_block(d_maps + left * K * K, row, K, ROWS, column, K, BP).to(tl.float32)
        for key in range(KT):
            grad_map = load_block(d_maps + place * K * K, key * BK, K, BK, column, K, BP)
            map_again = load_block(right, key * BK, K, BK, row, K, ROWS)
            change = tl.dot(tl.trans(map_again), grad_map, change, input_precision=PRECISION)
        store_block(d_maps + left * K * K, change, row, K, ROWS, column, K, BP)


@kernel(do_not_specialize=["N", "height"])
def _right_kernel(added, maps, d_added, d_maps, tallest, heights, lefts, blocks, origins, oldests, reads, N, H, height,
                  K, V, KT: tl.constexpr, VT: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                  RUNNING: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Some rows of the gradient of P of the right halves of the nodes of `height` + 1.

    RUNNING: of the nodes of the cap height, which took in the running state before them; that has no P.
    """
    part, number = program_place()
    slot = tl.load(tallest + number, mask=number < N, other=-1)
    if slot < 0:
        return
    if RUNNING:
        if tl.load(heights + slot) < height:
            return
    else:
        if tl.load(heights + slot) <= height:
            return
    if tl.load(lefts + slot) <= 1:
        return
    head, row = part // KT, part % KT * BK
    span = tl.exp2(height.to(tl.float32)).to(tl.int32)
    if RUNNING:
        if reads is None:
            if tl.load(blocks + slot) < span:
                return  # the first of its sequence
        else:
            if tl.load(reads + slot) <= height:
                return  # nothing is older
    place = slot.to(tl.int64) * H + head
    left = place - span.to(tl.int64) * H
    if origins is not None:
        left = left_sibling(slot, height, span, blocks, origins, oldests, reads).to(tl.int64) * H + head
    total = tl.zeros((BK, ROWS), tl.float32)
    if RUNNING:
        total += load_block(d_maps + place * K * K, row, K, BK, 0, K, ROWS).to(tl.float32)
    for tile in range(VT):
        grad = load_block(d_added + place * K * V, row, K, BK, tile * BV, V, BV)
        state = load_block(added + left * K * V, 0, K, ROWS, tile * BV, V, BV)
        total = tl.dot(grad, tl.trans(state), total, input_precision=PRECISION)
    if not RUNNING:
        for key in range(KT):
            grad_map = load_block(d_maps + place * K * K, row, K, BK, key * BK, K, BK)
            map = load_block(maps + left * K * K, 0, K, ROWS, key * BK, K, BK)
            total = tl.dot(grad_map, tl.trans(map), total, input_precision=PRECISION)
    tl.debug_barrier()
    store_block(d_maps + place * K * K, total, row, K, BK, 0, K, ROWS)


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    level_scales: Tensor | None
    log_decay: Tensor
    beta: Tensor
    far: Tensor | None  # of the initial state: see `Carried`
    near: Tensor | None


@dataclass
class Remade:
    """The forward's chunks and descent, made again, and its nodes. Each is let go of when the gradients need it no
    longer."""

    chunks: Chunks
    nodes: Kept


def gradients(q, k, v, scales, beta, grad_o, grad_left: Leaving | None, remade: Remade, slots: Slots, variants, places,
              chunk: int, height: int, scale: float, precision: str) -> Gradients:  # fmt: skip
    """Of the rows of a call, from those of o [T, H, V] and of what `leaving` gave (None: not used); `remade` is used
    up."""
    num_slots, (tokens, groups, key_dim), (_, heads, value_dim) = len(slots.token), q.shape, v.shape
    block_k, block_v = tile_width(key_dim), tile_width(value_dim)
    keys = {"KT": cdiv(key_dim, block_k), "BK": block_k, "PRECISION": precision}
    values = {"VT": cdiv(value_dim, block_v), "BV": block_v}
    rows = max(16, next_power_of_2(key_dim))
    scaled = scales is not None
    lam = scales if scaled else v
    num_levels = lam.shape[-1] if scaled else 1
    float32 = {"dtype": torch.float32, "device": v.device}
    dscales = torch.zeros(tokens, heads, num_levels, **float32) if scaled else lam
    of_g, of_s = grad_o.stride()[:2], lam.stride()[:2]
    stages = 2 if chunk <= 64 else 3

    # the tree
    chunks, nodes = remade.chunks, remade.nodes
    del remade.chunks, remade.nodes
    pulled = torch.empty_like(chunks.seen)
    read = (slots.token, slots.first, slots.rows, *reading_tables(slots, variants), places, num_slots, heads)
    shape = (*of_g, *of_s, key_dim, value_dim, num_levels)
    on_hopper = takes_hopper(chunk, q, k, v, grad_o)
    on_hopper_wide = not walks(k, value_dim) and takes_hopper_wide(chunk, key_dim, grad_o)
    wide_tiles = {"KT": key_dim // TILE, "VT": value_dim // (2 * TILE)}
    if on_hopper:
        hopper_kernel("climb")[programs(heads, num_slots)](
            grad_o, lam, chunks.seen, nodes.added, nodes.maps, pulled, dscales, *read, *of_g, *of_s, num_levels,
            HEIGHT=height, SCALED=scaled, num_warps=HOPPER_WARPS,
        )  # fmt: skip
    elif walks(k, value_dim):
        _climb_kernel[programs(heads, num_slots)](
            grad_o, lam, chunks.seen, nodes.added, nodes.maps, pulled, dscales, *read, *shape, C=chunk, HEIGHT=height,
            BK=whole_width(key_dim), BV=whole_width(value_dim), SCALED=scaled, PRECISION=precision,
            num_warps=warps_of(chunk), num_stages=1,
        )  # fmt: skip
    elif on_hopper_wide:
        hopper_kernel("pull")[programs(heads, num_slots)](
            grad_o, lam, chunks.seen, nodes.added, nodes.maps, pulled, dscales, *read, *of_g, *of_s, num_levels,
            HEIGHT=height, SCALED=scaled, **wide_tiles, num_warps=HOPPER_WARPS,
        )  # fmt: skip
    else:
        _pull_kernel[programs(heads, num_slots)](
            grad_o, lam, chunks.seen, nodes.added, pulled, dscales, *read, *shape, HEIGHT=height, C=chunk,
            SCALED=scaled, num_warps=4, num_stages=stages, **keys, **values,
        )  # fmt: skip
        _ascend_kernel[programs(heads, num_slots)](
            pulled, nodes.maps, slots.rows, slots.block, variants, places, num_slots, heads, key_dim,
            C=chunk, num_warps=4, num_stages=stages, **keys,
        )  # fmt: skip
    tiled = row_tiles(key_dim) | {"num_stages": 1}
    all_rows = {"num_warps": 8 if rows > 128 else 4, "num_stages": 2, "ROWS": rows}
    # what has no rows reads nothing, and nobody fills in the gradients of a bucket that nothing reads
    readers = readers_with_rows(slots)
    new = torch.empty_like if slots.origin is None else torch.zeros_like
    d_added, d_maps = new(nodes.added), torch.empty_like(nodes.maps)
    of_readers = (
        slots.token, slots.first, slots.rows, slots.height, slots.left, variants, places, slots.reader, readers,
        slots.order, num_slots, heads, *of_g, *of_s,
    )  # fmt: skip
    if on_hopper:
        hopper_kernel("gather")[programs(heads, num_slots)](
            grad_o, lam, chunks.seen, pulled, d_added, d_maps, *of_readers, num_levels, HEIGHT=height, SCALED=scaled,
            num_warps=HOPPER_WARPS,
        )  # fmt: skip
    elif on_hopper_wide:
        columns = wide_tiles["VT"] + cdiv(key_dim, 2 * TILE)
        hopper_kernel("gather_wide")[programs(heads * columns, num_slots)](
            grad_o, lam, chunks.seen, pulled, d_added, d_maps, *of_readers, num_levels, HEIGHT=height, SCALED=scaled,
            **wide_tiles, num_warps=HOPPER_WARPS,
        )  # fmt: skip
    else:
        _gather_kernel[programs(heads * (keys["KT"] + values["VT"]) * tiled["RT"], num_slots)](
            grad_o, lam, chunks.seen, pulled, d_added, d_maps, *of_readers, key_dim, value_dim, num_levels,
            HEIGHT=height, C=chunk, SCALED=scaled, **keys, **values, **tiled,
        )  # fmt: skip
    chunks = chunks._replace(seen=None)
    if grad_left is not None:
        _add_from_ends(d_added, d_maps, grad_left, slots)
    siblings = sibling_tables(slots)
    wide = 2 * TILE if key_dim % (2 * TILE) == value_dim % (2 * TILE) == 0 and k.dtype == torch.bfloat16 else TILE
    left_k, left_v = tile_width(key_dim, wide), tile_width(value_dim, wide)
    left = {"PT": cdiv(key_dim, left_k), "BP": left_k, "VT": cdiv(value_dim, left_v), "BV": left_v}
    of_nodes = (slots.tallest, slots.height, slots.left)
    if has_running(slots):
        _running_back_kernel[(len(slots.base), heads, values["VT"])](
            nodes.maps, d_added, *running_tables(slots), num_slots, heads, slots.cap, key_dim, value_dim,
            BV=block_v, num_warps=4, num_stages=2, **keys,
        )  # fmt: skip
        _right_kernel[programs(heads * keys["KT"], most_higher(slots, slots.cap - 1))](
            nodes.added, nodes.maps, d_added, d_maps, *of_nodes, slots.block, *siblings[1:], num_slots, heads,
            slots.cap, key_dim, value_dim, RUNNING=True, **keys, **values, **all_rows,
        )  # fmt: skip
    for level in reversed(range(slots.cap)):
        highest = most_higher(slots, level)
        if highest:
            _left_kernel[programs(heads * (left["VT"] + left["PT"]) * tiled["RT"], highest)](
                nodes.rights, d_added, d_maps, *of_nodes, *siblings, num_slots, heads, level, key_dim, value_dim,
                **keys, **left, **tiled,
            )  # fmt: skip
            _right_kernel[programs(heads * keys["KT"], highest)](
                nodes.added, nodes.maps, d_added, d_maps, *of_nodes, slots.block, *siblings[1:], num_slots, heads,
                level, key_dim, value_dim, RUNNING=False, **keys, **values, **all_rows,
            )  # fmt: skip
    del nodes
    far, near = None, None
    if slots.origin is not None:
        far = torch.where(slots.ends.has_bucket[..., None, None, None], d_added[slots.ends.bucket].float(), 0)
        near = d_added[slots.base].float()

    # every chunk by itself
    dq, dk, dv, d_decay, d_beta = chunk_gradients(
        q, k, v, scales, beta, grad_o, chunks, pulled, d_added, d_maps, dscales, slots, places, chunk, height, scale,
        precision,
    )  # fmt: skip
    if groups != heads:
        dq, dk = (x.unflatten(1, (groups, -1)).sum(2) for x in (dq, dk))
    return Gradients(dq, dk, dv, dscales if scaled else None, d_decay, d_beta, far, near)


def _add_from_ends(d_added: Tensor, d_maps: Tensor, grad: Leaving, slots: Slots) -> None:
    """What the ends of the sequences owe to the nodes that they read."""
    ends = slots.ends
    present = ends.has_node[..., None, None, None]
    for target, x in ((d_added, grad.added), (d_maps, grad.maps)):
        nodes = ends.node[:, : x.shape[1]].flatten()
        target.index_add_(0, nodes, torch.where(present[:, : x.shape[1]], x, 0).flatten(0, 1).to(target.dtype))
