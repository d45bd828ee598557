"""One token in place: the recurrence, vectorised over rows that stand at different positions.

Legend: B rows, G groups, H heads, K key width, V value width, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.state import FenwickState


def step(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, state: FenwickState,
    log_decay: Tensor | None, beta: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """See `log_linear_attention_step`. Static shapes, no data-dependent control flow. Pending decays are applied."""
    buckets, positions, log_decays = state
    heads, num_levels, work = v.shape[1], state.num_levels, torch.promote_types(buckets.dtype, torch.float32)
    work = torch.promote_types(work, v.dtype)
    q, k = (x.to(work).repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k))
    q, written = q * scale, v.to(work)
    states = state.to(dtype=work).settled().buckets
    if log_decays is not None:
        log_decays.zero_()
    if log_decay is not None:
        states = states * log_decay.to(work).exp().reshape(v.shape[0], 1, heads, -1, 1)
    if beta is not None:
        strength = beta.to(work)[..., None]
        erased = strength[:, None] * torch.einsum("bhk,blhkv->blhv", k, states)
        states = states - torch.einsum("bhk,blhv->blhkv", k, erased)
        written = strength * written
    entering = k[..., :, None] * written[..., None, :]  # [B, H, K, V], in bucket 0
    states = torch.cat([states[:, :1] + entering[:, None], states[:, 1:]], dim=1)

    read = torch.einsum("bhk,blhkv->blhv", q, states)
    o = read.sum(1) if level_scales is None else torch.einsum("bhl,blhv->bhv", level_scales.to(work), read)

    # the carry: buckets up to the target are emptied into it
    positions += 1
    target = fenwick.carry_level(positions, num_levels)[:, None]
    levels = torch.arange(num_levels, device=positions.device)
    merging = (levels <= target).reshape(*target.shape[:1], num_levels, 1, 1, 1)
    merged = torch.where(merging, states, 0).sum(1, keepdim=True)
    at_target = (levels == target).reshape(merging.shape)
    buckets.copy_(torch.where(at_target, merged, torch.where(merging, 0, states)))
    return o.to(v.dtype)
