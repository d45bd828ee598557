"""What the operator means, in the plainest form: a recurrence over tokens, and a dense T × T form.

Both are specifications. They share nothing with the implementations that are judged by them, except `fenwick.level` and
`fenwick.carry_level`. They run on any device, in any float type, and are differentiable; they are slow.

Legend: S sequences, T tokens, G query/key groups, H heads, K key width, V value width, L levels.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.ops.packing import sequence_bounds, start_positions


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_scales: Tensor | None,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    buckets: Tensor | None,
    position: int,
) -> tuple[Tensor, Tensor]:
    """One sequence, token by token (arXiv 2506.04761, section 3; transitions: the table in `log_linear_attention`).

    Args: q, k [T, G, K]; v [T, H, V]; level_scales [T, H, L] or None; log_decay [T, H] or [T, H, K]; beta [T, H];
        buckets [L, H, K, V] at `position`, or None for an empty state.
    Returns: o [T, H, V] and the buckets that the next token finds.
    """
    (length, heads, value_dim), key_dim = v.shape, q.shape[-1]
    num_levels = 1 if level_scales is None else level_scales.shape[-1]
    q, k = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (q * scale, k))
    empty = v.new_zeros(heads, key_dim, value_dim)
    states = [empty] * num_levels if buckets is None else list(buckets.unbind(0))
    outputs = []
    for t in range(length):
        if log_decay is not None:
            decay = log_decay[t].exp().reshape(heads, -1, 1)  # [H, 1 or K, 1]
            states = [decay * state for state in states]
        if beta is not None:
            # (I - β k kᵀ) S, after the decay: for one decay per head the order makes no difference
            states = [s - torch.einsum("h,hk,hj,hjv->hkv", beta[t], k[t], k[t], s) for s in states]
        written = v[t] if beta is None else beta[t, :, None] * v[t]
        states[0] = states[0] + torch.einsum("hk,hv->hkv", k[t], written)
        read = torch.einsum("lhkv,hk->hlv", torch.stack(states), q[t])
        outputs.append(read.sum(1) if level_scales is None else torch.einsum("hl,hlv->hv", level_scales[t], read))
        # the carry before the next token
        target = fenwick.carry_level(position + t + 1, num_levels)
        merged = torch.stack(states[: target + 1]).sum(0)
        states = [empty] * target + [merged] + states[target + 1 :]
    return (torch.stack(outputs) if outputs else v), torch.stack(states)


def log_linear_attention_recurrent(
    q, k, v, level_scales, *, log_decay, beta, scale, cu_seqlens, initial_state, return_state
) -> tuple[Tensor, Tensor, Tensor]:
    """`recurrence` for each sequence. Returns o [B, T, H, V], buckets [S, L, H, K, V] and positions [S]."""
    dtype = v.dtype
    work = torch.promote_types(dtype, torch.float32)
    per_token = [None if x is None else x.to(work) for x in (q, k, v, level_scales, log_decay, beta)]
    if cu_seqlens is not None:
        bounds = itertools.pairwise(sequence_bounds(cu_seqlens, q.shape[1]))
        rows: list[Any] = [[None if x is None else x[0, lo:hi] for x in per_token] for lo, hi in bounds]
    else:
        rows = [[None if x is None else x[b] for x in per_token] for b in range(q.shape[0])]
    positions = [0] * len(rows) if initial_state is None else start_positions(initial_state.positions)
    outputs, states = [], []
    for index, row in enumerate(rows):
        buckets = None
        if initial_state is not None:
            used = fenwick.occupied(initial_state.positions[index], initial_state.num_levels)
            buckets = torch.where(used[:, None, None, None], initial_state.buckets[index].to(work), 0)
        o, final = recurrence(*row, scale=scale, buckets=buckets, position=positions[index])
        outputs.append(o)
        states.append(final)
    ends = [position + len(output) for position, output in zip(positions, outputs, strict=True)]
    ends = torch.tensor(ends, dtype=torch.int64, device=v.device)
    if not rows:
        num_levels = 1 if level_scales is None else level_scales.shape[-1]
        return v, v.new_zeros(0, num_levels, *v.shape[2:3], q.shape[3], v.shape[3], dtype=work), ends
    o = torch.cat(outputs)[None] if cu_seqlens is not None else torch.stack(outputs)
    return o.to(dtype), torch.stack(states), ends


def log_linear_attention_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    level_scales: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The parallel form: (Λ ⊙ scores) v with a T × T matrix per head (arXiv 2506.04761, equation 5).

    For the delta rule the scores are A T with T = (I + tril(diag(β) k kᵀ ⊙ decay, -1))⁻¹ diag(β), over the whole
    sequence. Whole sequences only (no state, no packing). Shapes as in `log_linear_attention`; returns o [B, T, H, V].
    """
    (_, length, heads, _), dtype = v.shape, v.dtype
    work = torch.promote_types(dtype, torch.float32)
    q, k = (x.to(work).repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in (q, k))
    q, v = q * scale, v.to(work).transpose(1, 2)  # [B, H, T, V]
    causal = torch.ones(length, length, dtype=torch.bool, device=v.device).tril()
    if log_decay is None:
        decay = causal[..., None].to(work)
    else:
        total = log_decay.to(work).transpose(1, 2).cumsum(2)
        total = total[..., None] if total.ndim == 3 else total  # [B, H, T, 1 or K]
        difference = total[..., :, None, :] - total[..., None, :, :]
        decay = difference.masked_fill(~causal[..., None], -torch.inf).exp()
    decay = decay.expand(*q.shape[:2], length, length, k.shape[-1])  # [B, H, T, T, K]
    scores = torch.einsum("bhtk,bhsk,bhtsk->bhts", q, k, decay)
    if beta is not None:
        write = beta.to(work).transpose(1, 2)  # [B, H, T]
        overlap = torch.einsum("bhtk,bhsk,bhtsk->bhts", k, k, decay)
        system = torch.eye(length, dtype=work, device=v.device) + (write[..., None] * overlap).tril(-1)
        scores = scores @ torch.linalg.solve_triangular(system, torch.diag_embed(write), upper=False)
    if level_scales is not None:
        t = torch.arange(length, device=v.device)
        levels = fenwick.level(t[:, None], t[None, :], level_scales.shape[-1])
        by_head = level_scales.to(work).transpose(1, 2)  # [B, H, T, L]
        scores = scores * by_head.gather(-1, levels.expand(*by_head.shape[:2], -1, -1))
    return (scores.masked_fill(~causal, 0) @ v).transpose(1, 2).to(dtype)
