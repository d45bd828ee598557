"""Near buckets of states that the delta rule carries in and out, in plain torch: see `carried.py`.

The chunk that a sequence begins in and the one that it ends in are made here a second time, by the torch backend's
`factors`, and autograd differentiates them: the queries that meet near buckets, and P and U of what is not whole. The
kernels are told what near buckets add to U of the first chunk, and need to know nothing of the last one.

Legend
    S sequences, C rows of a chunk, G groups, H heads, K key width, V value width, L levels
    M near buckets, D levels on which rows of a chunk are seen from its end, F far buckets
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.fenwick import Edges
from loglinear.ops.families import Factors, factors
from loglinear.ops.triton.carried import add_to_first, all_levels, near_scales, take


def chunk_factors(q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor, rows: Tensor, exist: Tensor,
                  scale: float) -> Factors:  # fmt: skip
    """Factors [H, S, …] in float32 of chunks of rows [S, C], as `fenwick.Edges` has them."""
    # bounds that are wrong are for the operator to refuse, and nothing is read out of bounds before
    rows = rows.clamp(max=q.shape[0] * q.shape[1] - 1)
    heads = beta.shape[-1]
    queries, keys = (take(x, rows, exist).repeat_interleave(heads // x.shape[2], 2).movedim(2, 0) for x in (q, k))
    strength = take(beta[..., None], rows, exist).movedim(2, 0)
    if log_decay is not None:
        # a reset is a zero long before -1000, and would drown what is summed after it
        log_decay = take(log_decay[..., None], rows, exist).movedim(2, 0).double().clamp(min=-1e3)
    return factors(queries * scale, keys, 1, log_decay, strength)


def written_by_near(near: Tensor, first: Factors) -> Tensor:
    """[S, H, K, V] what becomes of the near buckets [S, M, H, K, V] in the first chunk."""
    return first.transition.act(near.sum(1).transpose(0, 1)).transpose(0, 1)


def add_near_reads(o: Tensor, level_scales: Tensor, near: Tensor, first: Factors, edges: Edges) -> Tensor:
    """o [B, T, H, V] with what the rows of the first chunks read of the near buckets [S, M, H, K, V]."""
    held = near.permute(2, 0, 3, 1, 4)  # [H, S, K, M, V]
    reads = (first.queries @ held.flatten(3)).unflatten(3, held.shape[3:])  # [H, S, C, M, V]
    weights = near_scales(level_scales, edges).permute(2, 0, 1, 3)  # [H, S, C, M]
    return add_to_first(o, (weights[..., None] * reads).sum(3).permute(1, 2, 0, 3), edges)


def final_buckets(v: Tensor, last: Factors, near: Tensor | None, added: Tensor, maps: Tensor, edges: Edges,
                  num_levels: int) -> Tensor:  # fmt: skip
    """Buckets [S, L, H, K, V] of the final state.

    added [S, F, H, K, V], maps [S, F - 1, H, K, K]: the nodes that its far buckets are, nearest first, as they were at
    their own ends: see `Leaving`.
    """
    writes = last.writes.permute(1, 0, 3, 2)[:, None]  # [S, 1, H, K, C]
    by_level = writes * edges.ends_row[:, :, None, None]  # [S, D, H, K, C]
    written = by_level @ take(v, edges.last_rows, edges.last_exist).transpose(1, 2)[:, None]  # [S, D, H, K, V]
    passing = [last.transition.data.transpose(0, 1)]  # [S, H, K, K] from the end of a node to that of the sequence
    if near is not None:
        kept = torch.einsum("sdm,smhkv->sdhkv", edges.ends_bucket.float(), near)
        written = written + passing[0][:, None] @ kept
    for map in maps.unbind(1):
        passing.append(passing[-1] @ map)
    return all_levels(written, torch.stack(passing, 1) @ added, edges, num_levels)
