"""Causal softmax attention with rotary positions and grouped heads: the baseline, and half of every hybrid.

B rows · T tokens · M model width · H query heads · J key/value heads (J divides H) · D head width
S columns of the cache · R, M rows and length of a block of packed sequences
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from loglinear.layers import fused
from loglinear.layers.packing import PackedLayout, SequenceRows, token_positions, token_rows
from loglinear.layers.rotary import rotate
from loglinear.layers.state import AttentionState

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig

# A mask over a cache is made for this many (row, query, column) triples at a time.
MASK_ELEMENTS = 64 * 1024 * 1024


@torch.compiler.assume_constant_result  # the compiler does not look into it
def _has_flash_attention(device: int) -> bool:
    built = torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device)[0] >= 8


class Attention(nn.Module):
    """Softmax attention through torch's `scaled_dot_product_attention`, with the interface of the recurrent
    mixers."""

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rope_theta = config.attention_head_dim, config.rope_theta
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.splits = (queries, keys, keys)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.out_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def zero_state(
        self,
        batch: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        capacity: int | None = None,
    ) -> AttentionState:
        """An empty cache of `batch` rows, growing or, with `capacity`, of that many columns for good."""
        dtype = self.qkv_proj.weight.dtype if dtype is None else dtype
        device = self.qkv_proj.weight.device if device is None else device
        shape = (batch, capacity or 0, self.num_key_value_heads, self.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return AttentionState(
            keys, values, torch.zeros(batch, dtype=torch.int64, device=device), fixed=capacity is not None
        )

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        layout: PackedLayout | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        """Attends from each token of `x [B, T, M]` to its own sequence up to itself.

        Args:
            x: `[B, T, M]`; `[1, N, M]` when packed.
            state: keys and values seen so far, one row for each row (sequence) of `x`. It is consumed: see
                `layers.state`.
            cu_seqlens: `[S+1]` bounds of packed sequences. No token attends across a bound, and rotations
                restart at it.
            return_state: whether the state after the last token is wanted.
            layout: the host-side plan of `cu_seqlens`, if the caller has it already; making it reads
                `cu_seqlens` back once.

        Returns:
            `y` as `x`, and the new state or None.
        """
        batch, length, _ = x.shape
        parts = self.qkv_proj(x).split(self.splits, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        start = None if state is None else state.positions
        positions = token_positions(batch, length, start, cu_seqlens, x.device)
        q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        if cu_seqlens is not None and layout is None:
            layout = PackedLayout(cu_seqlens, length)
        past = state is not None and state.columns > 0
        if state is None and return_state:
            rows = batch if layout is None else len(layout.lengths)
            state = self.zero_state(rows, k.dtype, k.device)
        if state is not None:
            self._store(state, k, v, positions, cu_seqlens, layout)
        if state is not None and past:
            o = self._over_cache(q, state, positions, layout)
        elif layout is None:
            o = self._attend(q, k, v)
        else:
            o = self._over_sequences(q, k, v, layout, cu_seqlens)
        return self.out_proj(o.flatten(-2)), state if return_state else None

    def _store(
        self,
        state: AttentionState,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        layout: PackedLayout | None,
    ) -> None:
        """Appends the new keys and values to `state` and moves its positions on."""
        batch, length = positions.shape
        if layout is None or cu_seqlens is None:
            counts, most = length, length
            rows = torch.arange(batch, device=k.device)[:, None]
        else:
            counts, most = cu_seqlens.diff().to(torch.int64), max(layout.lengths)
            rows = token_rows(cu_seqlens, length)[None]
        state.reserve(counts, most)
        state.store(k, v, rows, positions)
        state.seen.add_(counts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scaled dot-product attention of `q [B,T,H,D]` to k, v `[B,S,J,D]`: causal, or by a mask `[B,1,T,S]`."""
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.to(q.dtype).transpose(1, 2),
            v.to(q.dtype).transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.num_heads != self.num_key_value_heads,
        )
        return o.transpose(1, 2)

    def _over_sequences(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, bounds: Tensor | None) -> Tensor:
        """Causal attention inside each packed sequence: by torch's kernel for sequences of any lengths, or in blocks of
        sequences of similar length."""
        if bounds is not None and self._has_kernel(q):
            repeats = self.num_heads // self.num_key_value_heads
            k, v = (x[0].to(q.dtype).repeat_interleave(repeats, 1) for x in (k, v))
            # while the compiler looks on no length of a sequence may be part of what it makes: then as long as can be
            longest = q.shape[1] if torch.compiler.is_compiling() else max(layout.lengths)
            ends = bounds.int()
            o = varlen_attn(q[0], k, v, ends, ends, longest, longest, window_size=(-1, 0))
            assert isinstance(o, Tensor)  # and nothing beside it, which was not asked for
            return o[None]
        outputs, tokens = [], []
        for block in layout.buckets():
            gathered = (part[0][block.indices] for part in (q, k, v))
            outputs.append(self._attend(*gathered)[block.valid])
            tokens.append(block.indices[block.valid])
        return torch.zeros_like(q[0]).index_copy(0, torch.cat(tokens), torch.cat(outputs))[None]

    def _has_kernel(self, q: Tensor) -> bool:
        """Whether torch's flash attention takes these queries and, on any GPU, their gradients: 16 bits, Ampere or
        newer."""
        fits = q.dtype in (torch.float16, torch.bfloat16) and self.head_dim % 8 == 0 and self.head_dim <= 192
        return fits and q.is_cuda and _has_flash_attention(q.device.index)

    def _over_cache(self, q: Tensor, state: AttentionState, positions: Tensor, layout: PackedLayout | None) -> Tensor:
        """Attention of the newest tokens to everything in the cache up to themselves, each row by its own
        positions."""
        if layout is None:
            o = fused.attend_one(q, state.keys, state.values, state.seen)  # decoding
            if o is not None:
                return o
        block: SequenceRows | None = None
        rows_q, rows_positions = q, positions
        if layout is not None:
            block = layout.all_rows()
            rows_q = q[0][block.indices]
            rows_positions = torch.where(block.valid, positions[0][block.indices], 0)
        keys, values = state.keys[:, : state.columns], state.values[:, : state.columns]
        columns = torch.arange(state.columns, device=q.device)
        at_once = max(1, MASK_ELEMENTS // max(1, rows_q.shape[0] * state.columns))
        parts = []
        for first in range(0, rows_q.shape[1], at_once):
            mask = columns <= rows_positions[:, first : first + at_once, None]
            parts.append(self._attend(rows_q[:, first : first + at_once], keys, values, mask[:, None]))
        o = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if block is None:
            return o
        return torch.zeros_like(q[0]).index_copy(0, block.indices[block.valid], o[block.valid])[None]
