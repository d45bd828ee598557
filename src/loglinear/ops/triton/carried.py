"""Near buckets of carried states, in plain torch: they concern only the chunks that sequences begin and end in.

A state's near buckets hold parts of the chunk that its position falls into. The rows of that chunk read each of them on
a level of its own; later chunks find their sum in the chunk's node. The end of a sequence reads the rows of its last
chunk in the same way, and the near buckets too if it is the same chunk. All of it is a few small products, and autograd
differentiates them; the buckets of whole chunks are nodes, and the kernels' business. This is for scalar decay; the
delta rule's part is in `delta_carried.py`.

Legend
    S sequences, C rows of a chunk, G groups, R heads of a group, H = G · R heads, K key width, V value width, L levels
    M near buckets, D levels on which rows of a chunk are seen from its end
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.fenwick import Edges


def near_buckets(buckets: Tensor, edges: Edges) -> Tensor:
    """[S, M, H, K, V] of buckets [S, L, H, K, V], zero where there is nothing in them."""
    near = buckets[:, 1 : 1 + edges.has_bucket.shape[1]]
    return torch.where(edges.has_bucket[..., None, None, None], near, 0)


def add_near_reads(o: Tensor, q: Tensor, level_scales: Tensor, log_decay: Tensor | None, near: Tensor, edges: Edges,
                   scale: float) -> Tensor:  # fmt: skip
    """o [B, T, H, V] with what the rows of the first chunks read of the near buckets."""
    exist, groups = edges.first_exist, q.shape[-2]
    queries = take(q, edges.first_rows, exist).transpose(1, 2)  # [S, G, C, K]
    weights = near_scales(level_scales, edges) * scale  # [S, C, H, M]
    if log_decay is not None:
        weights = weights * _decays(log_decay, edges.first_rows, exist).cumsum(1).exp()[..., None]
    held = near.unflatten(2, (groups, -1)).permute(0, 2, 4, 1, 3, 5)  # [S, G, K, M, R, V]
    reads = (queries @ held.flatten(3)).unflatten(3, held.shape[3:])  # [S, G, C, M, R, V]
    weights = weights.unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3)  # [S, G, C, M, R]
    return add_to_first(o, (weights[..., None] * reads).sum(3).transpose(1, 2).flatten(2, 3), edges)


def near_scales(level_scales: Tensor, edges: Edges) -> Tensor:
    """[S, C, H, M] λ of each near bucket, seen from the rows of the first chunks."""
    scales = take(level_scales, edges.first_rows, edges.first_exist)  # [S, C, H, L]
    # a product rather than a gather, whose gradient would be summed in any order
    picked = torch.nn.functional.one_hot(edges.seen, level_scales.shape[-1]).float()  # [S, C, M, L]
    return scales @ picked.transpose(2, 3)


def add_to_first(o: Tensor, found: Tensor, edges: Edges) -> Tensor:
    """o [B, T, H, V] with `found` [S, C, H, V] added to the rows of the first chunks."""
    found = torch.where(edges.first_exist[..., None, None], found, 0).flatten(0, 1).to(o.dtype)
    return o.flatten(0, 1).index_add(0, edges.first_rows.flatten(), found).view_as(o)


def final_buckets(k: Tensor, v: Tensor, log_decay: Tensor | None, near: Tensor | None, far: Tensor, edges: Edges,
                  num_levels: int) -> Tensor:  # fmt: skip
    """Buckets [S, L, H, K, V] of the final state; `far` [S, F, H, K, V] are those that the kernels have found."""
    exist, groups = edges.last_exist, k.shape[-2]
    keys, values = take(k, edges.last_rows, exist), take(v, edges.last_rows, exist)
    across = None
    if log_decay is not None:
        decays = _decays(log_decay, edges.last_rows, exist)
        to_end = decays.flip(1).cumsum(1).flip(1)  # including the row's own, which is applied before it is written
        values = values * torch.nn.functional.pad(to_end[:, 1:], (0, 0, 0, 1)).exp()[..., None]
        across = to_end[:, :1, :, None, None].exp()
    by_level = edges.ends_row[:, None, :, None] * keys.permute(0, 2, 3, 1)[:, :, None]  # [S, G, D, K, C]
    written = by_level.flatten(2, 3) @ values.unflatten(2, (groups, -1)).transpose(1, 2).flatten(3)  # [S, G, DK, RV]
    written = written.unflatten(3, (-1, v.shape[-1])).unflatten(2, (-1, k.shape[-1]))  # [S, G, D, K, R, V]
    written = written.permute(0, 2, 1, 4, 3, 5).flatten(2, 3)  # [S, D, H, K, V]
    if near is not None:
        kept = near if across is None else near * across
        written = written + torch.einsum("sdm,smhkv->sdhkv", edges.ends_bucket.float(), kept)
    return all_levels(written, far, edges, num_levels)


def all_levels(written: Tensor, far: Tensor, edges: Edges, num_levels: int) -> Tensor:
    """[S, L, H, K, V] of what was `written` [S, D, H, K, V] in the last chunks and of far buckets [S, F, H, K, V]."""
    # levels 0 … lowest - 1 hold nothing; the last of `written` may be the last level, which is also the last of `far`
    empty = written.new_zeros(written.shape[0], edges.lowest, *written.shape[2:])
    if edges.lowest + written.shape[1] + far.shape[1] == num_levels:
        return torch.cat([empty, written, far], 1)
    return torch.cat([empty, written[:, :-1], written[:, -1:] + far], 1)


def take(x: Tensor, rows: Tensor, exist: Tensor) -> Tensor:
    """Rows [S, C] of x [B, T, A, W] in float32, zero where there are none: [S, C, A, W]."""
    taken = x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape).float()
    return torch.where(exist[..., None, None], taken, 0)


def _decays(log_decay: Tensor, rows: Tensor, exist: Tensor) -> Tensor:
    """Natural log decays [S, C, H]; a reset is as good as zero at e^-87, and must not drown what is summed after it."""
    return take(log_decay[..., None], rows, exist)[..., 0].clamp(min=-87.3)
