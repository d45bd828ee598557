"""Softmax attention of one query per head to a cache, of which every row fills as much as the device knows.

The columns of a row are split evenly among programs, each with a softmax of its own; a second kernel puts the parts
together. So there are enough programs for a whole GPU at any batch, only occupied columns are read, and the launch is
the same for every length: it can be recorded.

Legend
    B rows, H query heads, J key/value heads (J divides H), R = H/J, S columns, D head width, P parts of a row
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from loglinear.ops.triton.common import LOG2E, next_power_of_2
from loglinear.ops.triton.launch import kernel

WIDEST = 256  # head
MOST_QUERIES = 16  # of a key/value head: more would not fit into registers
PROGRAMS = 1024  # wanted for a whole GPU: a few for every multiprocessor
FEWEST_COLUMNS = 128  # of a part
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: two of them have a difference


@kernel(do_not_specialize=["S"])
def _parts_kernel(q, keys, values, lengths, outputs, highest, sums, J, S, stride_b, stride_s, scale, P,
                  R: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    blocks = tl.cdiv(tl.cdiv(length, P), COLUMNS)
    begin = part * blocks * COLUMNS
    end = tl.minimum(begin + blocks * COLUMNS, length)
    member, channel = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    mine = (row * J + head) * R + member  # of all B H queries
    mask = (member < R)[:, None] & (channel < D)[None, :]
    query = tl.load(q + mine[:, None] * D + channel[None, :], mask=mask, other=0.0).to(tl.float32) * (scale * LOG2E)
    # Every column of the tile has a softmax of its own over the blocks: threads wait for each other at the end only.
    top = tl.full((GROUP, COLUMNS), LOWEST, tl.float32)
    total = tl.zeros((GROUP, COLUMNS), tl.float32)
    output = tl.zeros((GROUP, COLUMNS, WIDTH), tl.float32)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        exists = column < end
        at = row * stride_b + column[:, None].to(tl.int64) * stride_s + head * D + channel[None, :]
        seen = exists[:, None] & (channel < D)[None, :]
        key = tl.load(keys + at, mask=seen, other=0.0).to(tl.float32)
        scores = tl.sum(query[:, None, :] * key[None, :, :], 2)
        scores = tl.where(exists[None, :], scores, float("-inf"))
        higher = tl.maximum(top, scores)
        kept, weight = tl.exp2(top - higher), tl.exp2(scores - higher)
        value = tl.load(values + at, mask=seen, other=0.0).to(tl.float32)
        output = output * kept[:, :, None] + weight[:, :, None] * value[None, :, :]
        total = total * kept + weight
        top = higher
    place = mine * P + part
    higher = tl.max(top, 1)
    weight = tl.exp2(top - higher[:, None])
    output = tl.sum(output * weight[:, :, None], 1)
    tl.store(outputs + place[:, None] * D + channel[None, :], output, mask=mask)
    tl.store(highest + place, higher, mask=member < R)
    tl.store(sums + place, tl.sum(total * weight, 1), mask=member < R)


@kernel()
def _together_kernel(outputs, highest, sums, o, P, PARTS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    top = tl.full((PARTS,), float("-inf"), tl.float32)
    for first in range(0, P, PARTS):
        part = first + tl.arange(0, PARTS)
        top = tl.maximum(top, tl.load(highest + query * P + part, mask=part < P, other=float("-inf")))
    higher = tl.max(top, 0)
    total = tl.zeros((PARTS,), tl.float32)
    output = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, P, PARTS):
        part = first + tl.arange(0, PARTS)
        place = query * P + part
        # A part without columns has the lowest, so weight zero.
        weight = tl.exp2(tl.load(highest + place, mask=part < P, other=float("-inf")) - higher)
        total += weight * tl.load(sums + place, mask=part < P, other=0.0)
        mask = (part < P)[:, None] & (channel < D)[None, :]
        output += weight[:, None] * tl.load(outputs + place[:, None] * D + channel[None, :], mask=mask, other=0.0)
    result = tl.sum(output, 0) / tl.sum(total, 0)
    tl.store(o + query * D + channel, result.to(o.dtype.element_ty), mask=channel < D)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """`[B, H, D]` in q's dtype: attention of `q [B, H, D]` to the first `lengths [B]` (int64, at least 1) columns of
    `keys, values [B, S, J, D]`, which have the same strides and dense heads.
    """
    batch, heads, width = q.shape
    columns, key_heads = keys.shape[1:3]
    group = next_power_of_2(heads // key_heads)
    padded = next_power_of_2(width)
    parts = max(1, min(-(-columns // FEWEST_COLUMNS), PROGRAMS // (batch * key_heads)))
    at_once = max(8, min(128, 2048 // (group * padded)))
    warps = min(16, max(4, group * at_once * padded // 1024))
    outputs = torch.empty(batch, heads, parts, width, dtype=torch.float32, device=q.device)
    highest, sums = torch.empty(2, batch, heads, parts, dtype=torch.float32, device=q.device).unbind(0)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(q):
        _parts_kernel[batch, key_heads, parts](
            q.contiguous(), keys, values, lengths, outputs, highest, sums, key_heads, columns, keys.stride(0),
            keys.stride(1), scale, parts, heads // key_heads, group, width, padded,
            at_once, num_warps=warps,
        )  # fmt: skip
        _together_kernel[batch * heads,](outputs, highest, sums, o, parts, 32, width, padded, num_warps=4)
    return o
