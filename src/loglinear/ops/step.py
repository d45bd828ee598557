"""One token in place: the recurrence, vectorised over rows that stand at different positions.

Legend: B rows, G groups, H heads, K key width, V value width, L levels, N tokens of a window.
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
    buckets, positions, log_decays, _ = state
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


def window_step(
    q: Tensor, k: Tensor, v: Tensor, level_scales: Tensor | None, state: FenwickState,
    log_decay: Tensor | None, beta: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """See `log_linear_attention_step`, of a state with a window. Static shapes, no data-dependent control flow."""
    buckets, positions, _, window = state
    assert window is not None
    heads, num_levels = v.shape[1], state.num_levels
    work = torch.promote_types(torch.promote_types(buckets.dtype, window.keys.dtype), v.dtype)
    base = state.base()
    place, places = (positions - base)[:, None, None], torch.arange(window.length, device=positions.device)
    here, earlier = places == place, places < place  # [B, 1, N]

    # the token takes its place
    _put(window.keys, k, here)
    _put(window.values, v, here)
    if window.log_decays is not None:
        _put(window.log_decays, log_decay, here)
    count = positions - base + 1
    written, reading, total = window.decayed(count, work)
    if window.mixing is not None:
        assert beta is not None
        key = k.to(work).repeat_interleave(heads // k.shape[1], dim=1)
        overlap = torch.where(earlier, torch.einsum("bhk,bhnk->bhn", key, written), 0)
        mixing = torch.where(earlier[..., None], window.mixing.to(work), 0)
        _put(window.mixing, beta.to(work)[..., None] * (here.to(work) - torch.einsum("bhi,bhin->bhn", overlap, mixing)),
             here)  # fmt: skip

    # the query reads older buckets, then the tokens of the window
    factors = window.mixed(count, written, reading, total)
    older, weights = factors.read(scale * q.to(work).repeat_interleave(heads // q.shape[1], dim=1))
    held = window.held(buckets, base, work)
    if level_scales is not None:
        levels = torch.arange(num_levels, device=positions.device)
        seen = fenwick.seen_level(positions[:, None], base[:, None], levels, num_levels)
        near = fenwick.level(positions[:, None], window.tokens(base), num_levels)
        scales = level_scales.to(work)
        seen_scales = torch.where(state.occupied()[:, None], _scales_at(scales, seen), 0)
        near_scales = torch.where(torch.logical_or(here, earlier), _scales_at(scales, near), 0)
        older = older[:, None] * seen_scales.transpose(1, 2)[..., None]
        weights = weights * near_scales
    else:
        older = older[:, None].expand(-1, num_levels, -1, -1)
    o = torch.einsum("blhk,blhkv->bhv", older, held) + torch.einsum("bhn,bhnv->bhv", weights, factors.values)

    # where the window ends, its tokens and all that is below them merge into one bucket
    positions += 1
    window.end(buckets, held, factors, base, positions)
    return o.to(v.dtype)


def _put(room: Tensor, value: Tensor | None, here: Tensor) -> None:
    """`value` [B, X, ...] into the places `here` [B, 1, N] of `room` [B, X, N, ...]."""
    assert value is not None
    here = here.reshape(*here.shape, *(1,) * (room.ndim - 3))
    room.copy_(torch.where(here, value[:, :, None].to(room.dtype), room))


def _scales_at(scales: Tensor, levels: Tensor) -> Tensor:
    """[B, H, X]: of `scales` [B, H, L] those on `levels` [B, X]."""
    return scales.gather(2, levels[:, None].expand(-1, scales.shape[1], -1))
