"""The newest tokens of a state, kept as they came: buckets then stay as they are for many tokens.

Between two tokens all buckets of a row and head go through the same transition. From position `base` on, where the
window is empty, their product is

    P = diag(e^Γ) - Σ_s x_s w_sᵀ,      w_s = e^Γ_s k_s,      x_s = Σ_i mixing[i, s] e^(Γ - Γ_i) k_i

with Γ_s the sum of the log-decays of the window's tokens up to s, and Γ that of all (docs/math.md, section 11). x_s is
also what has become of the key that the value of token s was written with. So with the tokens alone a step can read
what buckets and tokens are by now, and no bucket is written before the window ends, where all that it holds merges.

A decay per head is not even applied then: a bucket is owed it, as a number. Written in 16 bits, a bucket that is
multiplied by e^-0.001 again and again would be rounded to what it was every time, and never fade.

Legend: B rows, G key groups, H heads, K key width, V value width, L levels, N tokens of a window (a power of two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear import fenwick

# Natural log. More is paid where the delta rule writes a bucket anyway: what it is stored as would grow without bound.
MOST_OWED = 1.0
# Tokens of a window on a GPU, where nothing else is said.
DEFAULT_LENGTH = 16


def length_for(chosen: int | None, device: torch.device) -> int:
    """N for states on `device`, 0 for no window: what was chosen, if anything was. Else on a GPU, where a step takes as
    long as its bytes, there is a window; elsewhere it costs more operations than it saves.
    """
    return chosen if chosen is not None else DEFAULT_LENGTH if device.type == "cuda" else 0


class Window(NamedTuple):
    """The tokens since a row's newest position that is a multiple of N, or since the window was begun. A token is in
    place `position - base` of its row; what other places hold is not looked at.

    Attributes:
        begun: [B] int64, positions at which the window was begun. It does not change (who sets a row's position back
            sets it back, too).
        keys: [B, G, N, K]
        values: [B, H, N, V]
        log_decays: [B, H, N], or [B, H, N, K] for a decay per channel; None for mixers without one.
        mixing: [B, H, N, N], delta rule only: row i is what token i's key adds to the writing of each value,
            (I + tril(diag(β) (k kᵀ ⊙ e^(Γ_i - Γ_s)), -1))⁻¹ diag(β). None: every value stays with its own key.
        owed: [B, 2, H, L], with a decay per head: natural log of what each bucket is still to be multiplied by, at the
            start of windows that are left halves of a block of 2N tokens, and of those that are right halves. (So what
            all read is never what one writes.) None: nothing is owed.

    All but `begun` are float32 (float64 for float64 buckets), whatever buckets are kept in.
    """

    begun: Tensor
    keys: Tensor
    values: Tensor
    log_decays: Tensor | None
    mixing: Tensor | None
    owed: Tensor | None

    @classmethod
    def at(
        cls, positions: Tensor, buckets: Tensor, length: int, num_groups: int,
        decay: Literal["head", "channel"] | None, delta: bool,
    ) -> Window:  # fmt: skip
        """An empty window for rows at `positions` [B] with `buckets` [B, L, H, K, V]; see `FenwickState.with_window`.

        Raises:
            ValueError: a length that is no power of two, groups that do not divide the heads, another word for `decay`.
        """
        fenwick.chunk_height(length, "a window")
        batch, num_levels, heads, key_dim, value_dim = buckets.shape
        if num_groups < 1 or heads % num_groups:
            raise ValueError(f"num_groups must divide the {heads} heads of the state, got {num_groups}")
        if decay not in (None, "head", "channel"):
            raise ValueError(f"decay must be 'head', 'channel' or None, got {decay!r}")
        dtype = torch.promote_types(buckets.dtype, torch.float32)

        def room(*sizes: int) -> Tensor:
            return torch.zeros(batch, *sizes, dtype=dtype, device=buckets.device)

        by_head = (heads, length)
        return cls(
            positions.clone(),
            room(num_groups, length, key_dim),
            room(heads, length, value_dim),
            None if decay is None else room(*by_head) if decay == "head" else room(*by_head, key_dim),
            room(*by_head, length) if delta else None,
            room(2, heads, num_levels) if decay == "head" else None,
        )

    @property
    def length(self) -> int:
        """N."""
        return self.keys.shape[2]

    @property
    def kind(self) -> tuple:
        """What two windows must have in common for their rows to be those of one."""
        return tuple(None if x is None else (tuple(x.shape[1:]), x.dtype, x.device) for x in self)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those that there are, by name."""
        return ((name, x) for name, x in self._asdict().items() if x is not None)

    @classmethod
    def cat(cls, windows: Sequence[Window]) -> Window:
        """The rows of windows of one kind, one after the other."""
        parts = zip(*windows, strict=True)
        return cls(*(None if same[0] is None else torch.cat(same) for same in parts))  # type: ignore[arg-type]

    def emptied(self, positions: Tensor) -> Window:
        """An empty window of the same kind, for rows at `positions` [B]."""
        rows = positions.shape[0]
        return self.map(lambda x: x.new_zeros(rows, *x.shape[1:]))._replace(begun=positions.clone())

    def map(self, function: Callable[[Tensor], Tensor]) -> Window:
        """A window of what `function` makes of each tensor."""
        return Window(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]

    def base(self, positions: Tensor) -> Tensor:
        """[B] where the windows of rows at `positions` start: the position of which the buckets are."""
        return fenwick.block_start(positions, fenwick.chunk_height(self.length)).maximum(self.begun)

    def decayed(self, count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What decay alone makes of keys, of the first `count` [B] tokens of each row.

        Returns:
            written: [B, H, N, K], e^(Γ - Γ_s) k_s; zeros for tokens that are not there, as `reading`.
            reading: [B, H, N, K], w_s = e^Γ_s k_s.
            total: [B, H, K or 1], Γ.
        """
        heads, groups = self.values.shape[1], self.keys.shape[1]
        there = self._there(count)[:, None, :, None]
        keys = torch.where(there, self.keys.to(dtype), 0).repeat_interleave(heads // groups, dim=1)
        logs = self.log_decays
        if logs is None:
            return keys, keys, keys.new_zeros(*self.values.shape[:2], 1)
        logs = torch.where(there, (logs if logs.ndim == 4 else logs[..., None]).to(dtype), 0)
        # Sums of what lies between two tokens, not differences: a decay of -inf is a reset, not a NaN.
        since = F.pad(logs[:, :, 1:], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2)
        until = logs.cumsum(2)
        return since.exp() * keys, until.exp() * keys, until[:, :, -1]

    def factors(self, count: Tensor, dtype: torch.dtype) -> Factors:
        """What the first `count` [B] tokens of each row do to buckets, and what they write."""
        return self.mixed(count, *self.decayed(count, dtype))

    def mixed(self, count: Tensor, written: Tensor, reading: Tensor, total: Tensor) -> Factors:
        """As `factors`, from what `decayed` gives."""
        there = self._there(count)[:, None, :, None]
        values = torch.where(there, self.values.to(written.dtype), 0)
        if self.mixing is None:
            return Factors(total, written, None, values)
        mixing = torch.where(there, self.mixing.to(written.dtype), 0)
        return Factors(total, torch.einsum("bhik,bhis->bhsk", written, mixing), reading, values)

    def owed_at(self, base: Tensor) -> Tensor | None:
        """[B, L, H] what buckets are owed in the windows that start at `base` [B]."""
        if self.owed is None:
            return None
        right = fenwick.is_right_half(base, fenwick.chunk_height(self.length))
        return torch.where(right[:, None, None], self.owed[:, 1], self.owed[:, 0]).transpose(1, 2)

    def held(self, buckets: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        """What the buckets [B, L, H, K, V] stand for at `base`: what they are owed is paid, and empty ones are zero."""
        there, owed = fenwick.occupied(base, buckets.shape[1])[:, :, None, None, None], self.owed_at(base)
        paid = buckets.to(dtype) if owed is None else owed.to(dtype).exp()[..., None, None] * buckets.to(dtype)
        return torch.where(there, paid, 0)

    def into(self, buckets: Tensor, base: Tensor, positions: Tensor) -> Tensor:
        """The buckets [B, L, H, K, V] of rows at `positions`, from those at `base` and the tokens since; in the widest
        dtype of all, and nothing is owed.
        """
        num_levels, work = buckets.shape[1], torch.promote_types(buckets.dtype, self.keys.dtype)
        factors = self.factors(positions - base, work)
        moved = factors.apply(self.held(buckets, base, work))
        levels = torch.arange(num_levels, device=positions.device)
        goes = fenwick.seen_level(positions[:, None], base[:, None], levels, num_levels)[..., None] == levels
        level = fenwick.level(positions[:, None], self.tokens(base), num_levels)
        enters = (level[..., None] == levels).to(work)
        merged = torch.einsum("bol,bohkv->blhkv", goes.to(work), moved)
        merged += torch.einsum("bnl,bhnk,bhnv->blhkv", enters, factors.written, factors.values)
        return merged

    def end(self, buckets: Tensor, held: Tensor, factors: Factors, base: Tensor, positions: Tensor) -> None:
        """Brings `buckets` [B, L, H, K, V] at `base` to `positions`, in place, in rows whose window ends there.

        Args:
            held: what they stand for at `base`.
            factors: of the tokens since.
        """
        ends, num_levels = self.base(positions) == positions, buckets.shape[1]
        levels = torch.arange(num_levels, device=base.device)
        target = fenwick.carry_level(positions, num_levels)[:, None]
        merging, at_target = (x[:, :, None, None, None] for x in (levels <= target, levels == target))
        moved = factors.apply(held)
        merged = torch.where(merging, moved, 0).sum(1, keepdim=True)
        merged += torch.einsum("bhnk,bhnv->bhkv", factors.written, factors.values)[:, None]
        stored = torch.where(at_target, merged, torch.where(merging, 0, moved))
        if self.owed is not None:
            owed = self.owed_at(base)
            assert owed is not None
            owed = owed + factors.total.transpose(1, 2)
            stays = torch.logical_and(levels > target, fenwick.occupied(base, num_levels))[..., None]
            if self.mixing is None:
                stored = torch.where(stays[..., None, None], buckets.to(stored.dtype), stored)
            else:
                stays = torch.logical_and(stays, owed >= -MOST_OWED)
                stored = torch.where(stays[..., None, None], (-owed).exp()[..., None, None] * stored, stored)
            owed = torch.where(stays, owed, 0).transpose(1, 2)
            right = fenwick.is_right_half(positions, fenwick.chunk_height(self.length))
            for half, here in enumerate((torch.logical_not(right), right)):
                mine = torch.logical_and(ends, here)[:, None, None]
                self.owed[:, half].copy_(torch.where(mine, owed, self.owed[:, half]))
        buckets.copy_(torch.where(ends[:, None, None, None, None], stored.to(buckets.dtype), buckets))

    def tokens(self, base: Tensor) -> Tensor:
        """[B, N] positions of the tokens in the places of each row."""
        return base[:, None] + torch.arange(self.length, device=base.device)

    def _there(self, count: Tensor) -> Tensor:
        return torch.arange(self.length, device=count.device) < count[:, None]


class Factors(NamedTuple):
    """What the tokens of a window do to buckets that are older, and what they write.

    Attributes:
        total: [B, H, K or 1], Γ.
        written: [B, H, N, K], x_s; zero where there is no token, as `values`.
        reading: [B, H, N, K], w_s; None: nothing is erased.
        values: [B, H, N, V]
    """

    total: Tensor
    written: Tensor
    reading: Tensor | None
    values: Tensor

    def apply(self, states: Tensor) -> Tensor:
        """P S for each of `states` [B, L, H, K, V]."""
        moved = self.total.exp()[:, None, :, :, None] * states
        if self.reading is None:
            return moved
        seen = torch.einsum("bhnk,blhkv->blhnv", self.reading, states)
        return moved - torch.einsum("bhnk,blhnv->blhkv", self.written, seen)

    def read(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """What the query [B, H, K] reads of older buckets with, Pᵀ q [B, H, K], and of each token's value, qᵀ x_s
        [B, H, N].
        """
        weights = torch.einsum("bhk,bhnk->bhn", q, self.written)
        older = self.total.exp() * q
        if self.reading is not None:
            older = older - torch.einsum("bhn,bhnk->bhk", weights, self.reading)
        return older, weights
