"""Gradients: the reads of `read.py` and the tree of `nodes.py`, run backwards.

In this order. Inside the chunks, and from chunks to the nodes they read: gradients of q and of the level scales. For
every node: the gradient of its state, from all chunks that read it. Back over the tree: what a node owes to its
ancestors, added to it, until every slot holds the gradient of what its chunk wrote. From there: gradients of v and k.

The decay gradient needs no products of its own. A pair of tokens (s, t) contributes x to Σ dO·o at t, and x to
Σ v·dv at s, and every decay between s and t has the gradient x: it is the sum of x over the pairs that span it.
Within a chunk that is a difference of sums over rows and columns of the same products; for pairs that span a whole
chunk it is summed over nodes. (The same difference of sums over the whole sequence is shorter, and wrong in 16 bits:
both sums carry their own rounding, which adds up over the tokens while the gradient stays local.)

Legend
    N chunks (slots), C rows of a chunk, H heads, G groups, K key width, V value width, L levels, J tree heights
    nodes [N, H, K, V], gamma [H, N, C], offsets [H, N + 1]: see `nodes.py`
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from loglinear.fenwick import Slots
from loglinear.ops.triton.common import (
    block_end,
    cdiv,
    decay_of,
    decays_between,
    drop_lowest_bit,
    in_same_block,
    is_right_half,
    level_mask,
    load_column,
    load_rows,
    load_state,
    next_power_of_2,
    place_of_node,
    program_place,
    programs,
    row_exists,
    store_rows,
)
from loglinear.ops.triton.launch import kernel
from loglinear.ops.triton.nodes import decay_offsets, leaving, make_nodes, subtree_height


@kernel(do_not_specialize=["T", "N", "L", "stride_s", "stride_sh"])
def _inside_kernel(q, k, v, scales, grad_o, gamma, dq, dscales, grad_scores, row_mass, tokens, firsts, rows_of, T, N,
                   H, G, scale, stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_s, stride_sh,
                   stride_g, stride_gh, K: tl.constexpr, V: tl.constexpr, L, C: tl.constexpr, HEIGHT: tl.constexpr,
                   HEADS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALED: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """What the rows of a chunk read of each other: gradients of its scores (summed over HEADS heads), q and λ."""
    part, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    first_head = part * HEADS
    group = first_head // (H // G)
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    dtype = v.dtype.element_ty
    queries = load_rows(q + group.to(tl.int64) * stride_qg, token, first, rows, stride_q, C, K, BK, K == BK)
    keys = load_rows(k + group.to(tl.int64) * stride_kg, token, first, rows, stride_k, C, K, BK, K == BK)
    row = tl.arange(0, C)
    exists = row_exists(row, first, rows)
    total = tl.zeros((C, C), tl.float32)
    for step in range(HEADS):
        head = first_head + step
        sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + row)
        values = load_rows(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, V, BV, V == BV)
        grad = load_rows(grad_o + head.to(tl.int64) * stride_gh, token, first, rows, stride_g, C, V, BV, V == BV)
        decay = decays_between(sums, sums)
        decay = tl.where(row[:, None] >= row[None, :], decay, 0.0)
        decay *= tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        product = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * decay  # of a pair, before scale and λ
        mass = tl.zeros((C,), tl.float32)
        if SCALED:
            lam, dlam = scales + head.to(tl.int64) * stride_sh, dscales + (token + row).to(tl.int64) * H * L + head * L
            within = tl.zeros((C,), tl.float32)
            last = tl.zeros((C,), tl.float32)
            factor = tl.zeros((C, C), tl.float32)
            for level in tl.static_range(HEIGHT + 1):
                near = load_column(lam + tl.minimum(level, L - 1), token, first, rows, stride_s, C)
                # rows of the same block of 2^level, of which those of half the size are done
                same = in_same_block(row[:, None], row[None, :], level)
                upto = tl.sum(tl.where(same, product, 0.0), 1)
                found = (upto - within) * scale
                within = upto
                mass += near * found
                if level < L - 1:
                    tl.store(dlam + level, found.to(dscales.dtype.element_ty), mask=exists)
                else:
                    last += found
            for down in tl.static_range(HEIGHT + 1):
                near = load_column(lam + tl.minimum(HEIGHT - down, L - 1), token, first, rows, stride_s, C)
                same = in_same_block(row[:, None], row[None, :], HEIGHT - down)
                factor = tl.where(same, near[:, None], factor)
            if L - 1 <= HEIGHT:
                tl.store(dlam + L - 1, last.to(dscales.dtype.element_ty), mask=exists)
            total += decay * factor
            product *= factor
        else:
            mass += tl.sum(product, 1) * scale
            total += decay
        mass -= tl.sum(product, 0) * scale  # of the same products, so that what cancels cancels exactly
        tl.store(row_mass + (head.to(tl.int64) * N + slot) * C + row, mass)
    total *= scale
    at = (part.to(tl.int64) * N + slot) * C * C + row[:, None] * C + row[None, :]
    tl.store(grad_scores + at, total.to(dtype))
    grad_q = tl.dot(total.to(dtype), keys, input_precision=PRECISION)
    # the programs that share a group have sums of their own
    share = (part % (H // G // HEADS)).to(tl.int64) * T * G * K + group * K
    store_rows(dq + share, grad_q, token, first, rows, G * K, C, K, BK, K == BK)


@kernel(do_not_specialize=["T", "N", "L", "J", "stride_s", "stride_sh"])
def _queries_kernel(q, scales, grad_o, nodes, gamma, offsets, dq, dscales, row_mass, read_mass, tokens, firsts,
                    rows_of, blocks, origins, oldests, heights, reads, T, N, H, G, scale, stride_q, stride_qg,
                    stride_s, stride_sh, stride_g, stride_gh, K: tl.constexpr, V: tl.constexpr, L, J, C: tl.constexpr,
                    HEIGHT: tl.constexpr, HEADS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                    SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What chunks read of the nodes on their left: gradients of q and of λ."""
    part, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    first_head = part * HEADS
    group = first_head // (H // G)
    token, block, count = tl.load(tokens + slot), tl.load(blocks + slot), tl.load(reads + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    origin = None if origins is None else tl.load(origins + slot)
    oldest = None if oldests is None else tl.load(oldests + slot)
    dtype = grad_o.dtype.element_ty
    queries = load_rows(q + group.to(tl.int64) * stride_qg, token, first, rows, stride_q, C, K, BK, K == BK)
    row = tl.arange(0, C)
    exists = row_exists(row, first, rows)
    grad_q = tl.zeros((C, BK), tl.float32)
    for step in range(HEADS):
        head = first_head + step
        lam, dlam = scales + head.to(tl.int64) * stride_sh, dscales + (token + row).to(tl.int64) * H * L + head * L
        sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + row)
        here = tl.load(offsets + head.to(tl.int64) * (N + 1) + slot)
        grad = load_rows(grad_o + head.to(tl.int64) * stride_gh, token, first, rows, stride_g, C, V, BV, V == BV)
        mass = tl.zeros((C,), tl.float32)
        last = tl.zeros((C,), tl.float32)
        rest = block
        for number in range(count):
            node = place_of_node(slot, block, origin, oldest, rest, count - number)
            state = load_state(nodes + (node.to(tl.int64) * H + head) * K * V, K, V, BK, BV).to(dtype)
            between = (here - tl.load(offsets + head.to(tl.int64) * (N + 1) + node + 1)).to(tl.float32)
            weight = decay_of(sums + between) * scale
            height = tl.load(heights + node)
            read = tl.dot(queries, state, input_precision=PRECISION)
            found = tl.sum(grad.to(tl.float32) * read, 1) * weight
            scaled = found
            if SCALED:
                level = tl.minimum(HEIGHT + 1 + height, L - 1)
                far = load_column(lam + level, token, first, rows, stride_s, C)
                weight *= far
                scaled = found * far
                if level < L - 1:
                    tl.store(dlam + level, found.to(dscales.dtype.element_ty), mask=exists)
                else:
                    last += found
            weighted = (grad.to(tl.float32) * weight[:, None]).to(dtype)
            grad_q = tl.dot(weighted, tl.trans(state), grad_q, input_precision=PRECISION)
            mass += scaled
            tl.store(read_mass + (head * J + height).to(tl.int64) * N + slot, tl.sum(scaled, 0))
            rest = drop_lowest_bit(rest)
        if SCALED:
            if L - 1 <= HEIGHT:
                last += tl.load(dlam + L - 1, mask=exists, other=0.0).to(tl.float32)
            tl.store(dlam + L - 1, last.to(dscales.dtype.element_ty), mask=exists)
        mass_at = row_mass + (head.to(tl.int64) * N + slot) * C + row
        tl.store(mass_at, tl.load(mass_at) + mass)
    share = (part % (H // G // HEADS)).to(tl.int64) * T * G * K + group * K
    store_rows(dq + share, grad_q, token, first, rows, G * K, C, K, BK, K == BK)


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _gather_kernel(q, scales, grad_o, grad_nodes, gamma, offsets, tokens, firsts, rows_of, heights, lefts, reader,
                   readers, order, N, H, G, scale, stride_q, stride_qg, stride_s, stride_sh, stride_g, stride_gh,
                   K: tl.constexpr, V: tl.constexpr, L, C: tl.constexpr, HEIGHT: tl.constexpr, BK: tl.constexpr,
                   BV: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradient of one node: from all the chunks that read it. The nodes with the most readers come first."""
    head, place = program_place()
    slot = tl.load(order + place, mask=place < N, other=0)
    chunk, span, height = tl.load(reader + slot), tl.load(readers + slot), tl.load(heights + slot)
    if (place >= N) | ((span == 0) & (tl.load(lefts + slot) == 0)):
        return
    dtype = q.dtype.element_ty
    key, column, row = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, C)
    q += (head // (H // G)).to(tl.int64) * stride_qg
    lam = scales + head.to(tl.int64) * stride_sh + tl.minimum(HEIGHT + 1 + height, L - 1)
    end = tl.load(offsets + head.to(tl.int64) * (N + 1) + slot + 1)
    total = tl.zeros((BK, BV), tl.float32)
    token = tl.load(tokens + chunk, mask=chunk < N, other=0)
    for _ in range(span):
        rows = tl.load(rows_of + chunk)
        first = None if firsts is None else tl.load(firsts + chunk)
        sums = tl.load(gamma + (head.to(tl.int64) * N + chunk) * C + row)
        between = (tl.load(offsets + head.to(tl.int64) * (N + 1) + chunk) - end).to(tl.float32)
        weight = decay_of(sums + between) * scale
        if SCALED:
            weight *= load_column(lam, token, first, rows, stride_s, C)
        queries = load_rows(q, token, first, rows, stride_q, C, K, BK, K == BK)
        grad_rows = grad_o + head.to(tl.int64) * stride_gh
        grad = load_rows(grad_rows, token, first, rows, stride_g, C, V, BV, V == BV)
        total = tl.dot(tl.trans(queries), (grad * weight[:, None]).to(dtype), total, input_precision=PRECISION)
        chunk, token = chunk + 1, token + C
    tile = key[:, None] * V + column[None, :]
    tl.store(grad_nodes + (slot.to(tl.int64) * H + head) * K * V + tile, total.to(grad_nodes.dtype.element_ty),
             mask=(key < K)[:, None] & (column < V)[None, :])  # fmt: skip


@kernel(do_not_specialize=["N"])
def _walk_back_kernel(nodes, grad_nodes, offsets, inherited_mass, parents, oldests, bases, counts, N, H, size,
                      SUB: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Adds to the gradients of slots that end a subtree what they owe to their ancestors, the last slot first.

    Then to those of the buckets that a sequence began with (there, SUB is 1). inherited_mass [tiles, H, N]: the part of
    what is inherited that goes through the right sibling's decay.
    """
    sequence, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, count = tl.load(bases + sequence), tl.load(counts + sequence)
    offset = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    subtrees = count // SUB
    slots = subtrees
    if oldests is not None:
        slots += base - tl.load(oldests + base)
    for step in range(slots):
        number = subtrees - step
        slot = base + tl.where(number > 0, number * SUB, number) - 1
        parent = tl.load(parents + slot)
        place = slot.to(tl.int64) * H + head
        if parent >= 0:
            grad = tl.load(grad_nodes + place * size + offset, mask=mask, other=0.0).to(tl.float32)
            above = grad_nodes + (parent.to(tl.int64) * H + head) * size + offset
            at = offsets + head.to(tl.int64) * (N + 1) + 1
            decay = decay_of(tl.load(at + parent) - tl.load(at + slot))
            inherited = decay * tl.load(above, mask=mask, other=0.0).to(tl.float32)
            state = tl.load(nodes + place * size + offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(inherited_mass + (tile.to(tl.int64) * H + head) * N + slot, tl.sum(inherited * state, 0))
            tl.store(grad_nodes + place * size + offset, (grad + inherited).to(grad_nodes.dtype.element_ty), mask=mask)
        tl.debug_barrier()


@kernel(do_not_specialize=["N"])
def _settle_kernel(nodes, grad_nodes, offsets, inherited_mass, blocks, lefts, N, H, size, LOW: tl.constexpr,
                   SUB: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The same for the slots within a subtree, from its end on; LOW is its height."""
    part, slot = program_place()
    head, tile = part % H, part // H
    left = tl.load(lefts + slot, mask=slot < N, other=0)
    if (left == 0) | (tl.load(blocks + slot, mask=slot < N, other=0) % SUB != 0):
        return
    offset = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    span = SUB // 2
    for _ in range(LOW):
        for first in range(span - 1, SUB - 1, 2 * span):
            if first + span < left:
                place = (slot + first).to(tl.int64) * H + head
                grad = tl.load(grad_nodes + place * size + offset, mask=mask, other=0.0).to(tl.float32)
                above = tl.load(grad_nodes + (place + span * H) * size + offset, mask=mask, other=0.0)
                at = offsets + head.to(tl.int64) * (N + 1) + slot + first + 1
                inherited = decay_of(tl.load(at + span) - tl.load(at)) * above.to(tl.float32)
                state = tl.load(nodes + place * size + offset, mask=mask, other=0.0).to(tl.float32)
                through = inherited_mass + (tile.to(tl.int64) * H + head) * N + slot + first
                tl.store(through, tl.sum(inherited * state, 0))
                grad = (grad + inherited).to(grad_nodes.dtype.element_ty)
                tl.store(grad_nodes + place * size + offset, grad, mask=mask)
        span //= 2
        tl.debug_barrier()


@kernel(do_not_specialize=["N", "L", "stride_s", "stride_sh"])
def _values_kernel(q, k, v, scales, grad_o, grad_nodes, gamma, dv, row_mass, written_mass, tokens, firsts, rows_of, N,
                   H, G, scale, stride_q, stride_qg, stride_k, stride_kg, stride_v, stride_vh, stride_s, stride_sh,
                   stride_g, stride_gh, K: tl.constexpr, V: tl.constexpr, L, C: tl.constexpr, HEIGHT: tl.constexpr,
                   BK: tl.constexpr, BV: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradient of v. row_mass [H, N, C] loses what was written for later chunks: it is then the gradient of gamma.

    Made as [V, source rows]. The other way round scores would be the transpose of a product cast to 16 bits (silently
    wrong on Hopper before Triton 3.7.1), or be made as [source, target], where level scales vary along the columns and
    every thread loads many of them (1.9 ms instead of 1.0).
    """
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    group = head // (H // G)
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    dtype = v.dtype.element_ty
    row = tl.arange(0, C)
    queries = load_rows(q + group.to(tl.int64) * stride_qg, token, first, rows, stride_q, C, K, BK, K == BK)
    keys = load_rows(k + group.to(tl.int64) * stride_kg, token, first, rows, stride_k, C, K, BK, K == BK)
    grad = load_rows(grad_o + head.to(tl.int64) * stride_gh, token, first, rows, stride_g, C, V, BV, V == BV)
    grad_state = load_state(grad_nodes + (slot.to(tl.int64) * H + head) * K * V, K, V, BK, BV).to(dtype)
    sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + row)

    lam = scales + head.to(tl.int64) * stride_sh
    mask = level_mask(lam, token, first, rows, stride_s, sums, L, C, HEIGHT, SCALED) * scale
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * mask
    end = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + C - 1)
    after = decay_of(end - sums)
    written = tl.dot(tl.trans(grad_state), tl.trans(keys), input_precision=PRECISION) * after[None, :]
    values = load_rows(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, V, BV, V == BV)
    mass = tl.sum(tl.trans(values).to(tl.float32) * written, 0)
    mass_at = row_mass + (head.to(tl.int64) * N + slot) * C + row
    tl.store(mass_at, tl.load(mass_at) - mass)
    tl.store(written_mass + head.to(tl.int64) * N + slot, tl.sum(mass, 0))
    grad_v = tl.dot(tl.trans(grad), scores.to(dtype), written, input_precision=PRECISION)
    store_rows(dv + head * V, tl.trans(grad_v), token, first, rows, H * V, C, V, BV, V == BV)


@kernel(do_not_specialize=["T", "N"])
def _keys_kernel(q, v, grad_nodes, grad_scores, gamma, dk, tokens, firsts, rows_of, T, N, H, G, stride_q, stride_qg,
                 stride_v, stride_vh, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
                 BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradient of k: from the scores within the chunk, read transposed from memory, and from what it wrote."""
    part, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    first_head = part * HEADS
    group = first_head // (H // G)
    token = tl.load(tokens + slot)
    first = None if firsts is None else tl.load(firsts + slot)
    dtype = v.dtype.element_ty
    row = tl.arange(0, C)
    queries = load_rows(q + group.to(tl.int64) * stride_qg, token, first, rows, stride_q, C, K, BK, K == BK)
    turned = grad_scores + (part.to(tl.int64) * N + slot) * C * C + row[:, None] + row[None, :] * C
    grad_k = tl.dot(tl.load(turned), queries, input_precision=PRECISION)
    for step in range(HEADS):
        head = first_head + step
        sums = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + row)
        end = tl.load(gamma + (head.to(tl.int64) * N + slot) * C + C - 1)
        values = load_rows(v + head.to(tl.int64) * stride_vh, token, first, rows, stride_v, C, V, BV, V == BV)
        grad_state = load_state(grad_nodes + (slot.to(tl.int64) * H + head) * K * V, K, V, BK, BV).to(dtype)
        weighted = (values.to(tl.float32) * decay_of(end - sums)[:, None]).to(dtype)
        grad_k = tl.dot(weighted, tl.trans(grad_state), grad_k, input_precision=PRECISION)
    share = (part % (H // G // HEADS)).to(tl.int64) * T * G * K + group * K
    store_rows(dk + share, grad_k, token, first, rows, G * K, C, K, BK, K == BK)


@kernel(do_not_specialize=["N", "J"])
def _passed_kernel(read_mass, passed_mass, bases, counts, N, H, J, BLOCK: tl.constexpr):
    """passed_mass [H, J, N] float64: what the chunks of a sequence, up to and with each, have read above a height.

    Sequence by sequence, so that what is not finite stays in its own.
    """
    sequence, head, height = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, count = tl.load(bases + sequence), tl.load(counts + sequence)
    before = tl.zeros((1,), tl.float64)
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        mass = tl.zeros((BLOCK,), tl.float64)
        for above in range(height + 1, J):
            at = read_mass + (head * J + above).to(tl.int64) * N + base + number
            mass += tl.load(at, mask=number < count, other=0.0).to(tl.float64)
        at = passed_mass + (head * J + height).to(tl.int64) * N + base + number
        tl.store(at, before + tl.cumsum(mass, 0), mask=number < count)
        before += tl.sum(mass, 0)


@kernel(do_not_specialize=["N", "cap", "tiles"])
def _decay_kernel(row_mass, written_mass, inherited_mass, passed_mass, dlog_decay, tokens, firsts, rows_of, blocks,
                  origins, oldests, lefts, reads, N, H, cap, tiles, C: tl.constexpr):  # fmt: skip
    """Gradient of the log decays [T, H] from the sums over pairs of tokens.

    passed_mass [H, cap + 1, N]: see `_passed_kernel`.
    """
    head, slot = program_place()
    rows = tl.load(rows_of + slot, mask=slot < N, other=0)
    if rows == 0:
        return
    block, left, remaining = tl.load(blocks + slot), tl.load(lefts + slot), tl.load(reads + slot)
    origin = None if origins is None else tl.load(origins + slot)
    oldest = None if oldests is None else tl.load(oldests + slot)
    spanning = tl.load(written_mass + head.to(tl.int64) * N + slot)
    for height in range(cap + 1):
        end = block_end(block, height)
        size = block_end(0, height) + 1
        if (height == cap) | is_right_half(block, height):
            # the left sibling's tokens, read beyond this node
            if remaining > 0:
                sibling = place_of_node(slot, block, origin, oldest, end - size + 1, remaining)
                for tile in range(tiles):
                    spanning += tl.load(inherited_mass + (tile * H + head).to(tl.int64) * N + sibling)
                remaining -= 1
        else:
            # what is older than this node, read by the chunks of its right sibling
            start = slot - block + end + 1
            stop = tl.minimum(start + size, slot + left)
            if start < stop:
                at = passed_mass + (head * (cap + 1) + height).to(tl.int64) * N - 1
                spanning += (tl.load(at + stop) - tl.load(at + start)).to(tl.float32)
    row = tl.arange(0, C)
    mass = tl.load(row_mass + (head.to(tl.int64) * N + slot) * C + row)
    grad = tl.sum(mass, 0) - tl.cumsum(mass, 0) + mass + spanning
    at = dlog_decay + (tl.load(tokens + slot) + row).to(tl.int64) * H + head
    first = None if firsts is None else tl.load(firsts + slot)
    exists = row_exists(row, first, rows)
    tl.store(at, grad.to(dlog_decay.dtype.element_ty), mask=exists)


class Gradients(NamedTuple):
    """Of all that a call was given; shapes as there."""

    q: Tensor
    k: Tensor
    v: Tensor
    level_scales: Tensor | None
    log_decay: Tensor
    far: Tensor | None  # of the initial state
    near: Tensor | None


def gradients(q, k, v, scales, log_decay, state, grad_o, grad_far, slots: Slots, chunk: int, height: int, scale: float,
              precision: str) -> Gradients:  # fmt: skip
    """Gradients from those of o [T, H, V] and of the far buckets [S, F, H, K, V] of the final state (None: not used).

    Inputs as in `read` and `make_nodes`.
    """
    nodes, _, gamma = make_nodes(k, v, log_decay, slots, chunk, precision, state)
    (tokens, groups, key_dim), (_, heads, value_dim) = q.shape, v.shape
    num_slots, heights = len(slots.token), slots.cap + 1
    scaled = scales is not None
    lam = scales if scaled else v
    num_levels = lam.shape[-1] if scaled else 1
    float32 = {"dtype": torch.float32, "device": v.device}
    offsets = decay_offsets(gamma, slots)
    together = largest_divisor(heads // groups, 16)
    parts = heads // groups // together
    dq = torch.empty(2 * parts, *q.shape, **float32)
    dk = torch.empty(parts, *k.shape, **float32)
    dscales = torch.zeros(scales.shape, dtype=scales.dtype, device=v.device) if scaled else dq
    dlog_decay = torch.empty(log_decay.shape, dtype=log_decay.dtype, device=v.device)
    grad_scores = torch.empty(heads // together, num_slots, chunk, chunk, dtype=v.dtype, device=v.device)
    grad_nodes = torch.empty_like(nodes)
    row_mass = torch.empty(gamma.shape, **float32)
    written_mass = torch.empty(heads, num_slots, **float32)
    read_mass = torch.zeros(heads, heights, num_slots, **float32)
    size = key_dim * value_dim
    walk = min(1024, next_power_of_2(size))
    tiles = cdiv(size, walk)
    inherited_mass = torch.zeros(tiles, heads, num_slots, **float32)
    low = subtree_height(slots, state)

    of_q, of_kv = (q.stride(0), q.stride(1)), (k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    of_rows = (lam.stride(0), lam.stride(1), grad_o.stride(0), grad_o.stride(1))
    sizes = (num_slots, heads, groups, scale)
    widths = (key_dim, value_dim, num_levels)
    blocks = {"BK": max(16, next_power_of_2(key_dim)), "BV": max(16, next_power_of_2(value_dim))}
    options = {"C": chunk, "HEIGHT": height, "SCALED": scaled, "PRECISION": precision, **blocks}
    by_part = programs(heads // together, num_slots)
    _inside_kernel[by_part](
        q, k, v, lam, grad_o, gamma, dq, dscales, grad_scores, row_mass, slots.token, slots.first, slots.rows, tokens,
        *sizes, *of_q, *of_kv, *of_rows, *widths, HEADS=together, num_warps=4, num_stages=2, **options,
    )  # fmt: skip
    _queries_kernel[by_part](
        q, lam, grad_o, nodes, gamma, offsets, dq[parts:], dscales, row_mass, read_mass, slots.token, slots.first,
        slots.rows, slots.block, slots.origin, slots.oldest, slots.height, slots.reads, tokens, *sizes, *of_q,
        *of_rows, *widths, heights, HEADS=together, num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    _gather_kernel[programs(heads, num_slots)](
        q, lam, grad_o, grad_nodes, gamma, offsets, slots.token, slots.first, slots.rows, slots.height, slots.left,
        slots.reader, slots.readers, slots.order, *sizes, *of_q, *of_rows, *widths, num_warps=4, num_stages=3,
        **options,
    )  # fmt: skip
    if grad_far is not None:
        final = leaving(nodes, offsets, slots)
        mass = (final.far * grad_far).sum((-2, -1))  # [S, F, H], read by the chunk that the end falls into, at its end
        grad_nodes.index_add_(0, slots.ends.node.flatten(), (final.decay * grad_far).flatten(0, 1).to(grad_nodes.dtype))
        read_mass[:, :, slots.ends.last] += mass.permute(2, 1, 0)
        row_mass[:, slots.ends.last, slots.ends.end_row] += mass.sum(1).T
    _walk_back_kernel[(len(slots.base), heads, tiles)](
        nodes, grad_nodes, offsets, inherited_mass, slots.parent, slots.oldest, slots.base, slots.count, num_slots,
        heads, size, SUB=2**low, BLOCK=walk, num_warps=4, num_stages=1,
    )  # fmt: skip
    if low:
        _settle_kernel[programs(heads * tiles, num_slots)](
            nodes, grad_nodes, offsets, inherited_mass, slots.block, slots.left, num_slots, heads, size,
            LOW=low, SUB=2**low, BLOCK=walk, num_warps=4, num_stages=1,
        )  # fmt: skip
    del nodes  # a gigabyte at a time: the gradient of v takes their place
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _values_kernel[programs(heads, num_slots)](
        q, k, v, lam, grad_o, grad_nodes, gamma, dv, row_mass, written_mass, slots.token, slots.first, slots.rows,
        *sizes, *of_q, *of_kv, *of_rows, *widths, num_warps=4, num_stages=1, **options,
    )  # fmt: skip
    _keys_kernel[by_part](
        q, v, grad_nodes, grad_scores, gamma, dk, slots.token, slots.first, slots.rows, tokens, num_slots, heads,
        groups, *of_q, v.stride(0), v.stride(1), key_dim, value_dim, C=chunk, HEADS=together, PRECISION=precision,
        num_warps=4, num_stages=3, **blocks,
    )  # fmt: skip
    far, near = None, None
    if state is not None:
        far = grad_nodes[slots.ends.bucket.flatten()].float().unflatten(0, slots.ends.bucket.shape)
        far = torch.where(slots.ends.has_bucket[..., None, None, None], far, 0)
        near = grad_nodes[slots.base] * torch.exp2(gamma[:, slots.base, -1]).float().T[..., None, None]
        written_mass[:, slots.base] += (near * state.near).sum((-2, -1)).T
    passed = torch.empty(read_mass.shape, dtype=torch.float64, device=v.device)
    _passed_kernel[(len(slots.base), heads, heights)](
        read_mass, passed, slots.base, slots.count, num_slots, heads, heights, BLOCK=128, num_warps=1,
    )  # fmt: skip
    _decay_kernel[programs(heads, num_slots)](
        row_mass, written_mass, inherited_mass, passed, dlog_decay, slots.token, slots.first, slots.rows, slots.block,
        slots.origin, slots.oldest, slots.left, slots.reads, num_slots, heads, slots.cap, tiles, C=chunk, num_warps=1,
    )  # fmt: skip
    dq, dk = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype)
    return Gradients(dq, dk, dv, dscales if scaled else None, dlog_decay, far, near)


def largest_divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if number % d == 0)
