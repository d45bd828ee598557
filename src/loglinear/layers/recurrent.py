"""The skeleton that all recurrent mixers share.

    B rows · T tokens · M model width · G query/key groups · H heads · K key width · V value width
    L levels · W convolution taps · S packed sequences

    x ──► qkv_proj ──► conv ──► prepare ──► log_linear_attention ──► finish (norm, gate) ──► out_proj
    └───► level scales, decay, write strength ────────┘                │
    └───► output gate ─────────────────────────────────────────────────┘

A mixer is one short file: it says in `sizes` how wide it is, in `__init__` which small projections it has, in
`prepare` how q, k, v and the controls of the operator come about, and where it differs, in `finish`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers import fused
from loglinear.layers.convolution import ShortConvolution
from loglinear.layers.norms import GatedRMSNorm, RMSNorm
from loglinear.layers.packing import token_positions
from loglinear.layers.precision import initialize, state_dtype_for, widen
from loglinear.layers.state import RecurrentState
from loglinear.ops.interface import log_linear_attention, log_linear_attention_step
from loglinear.state import FenwickState
from loglinear.window import length_for

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig


class OperatorInputs(NamedTuple):
    """What a mixer hands to the operator: q, k `[B,T,G,K]`, v `[B,T,H,V]`, and the controls that its family
    has."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None


class LevelScales(nn.Module):
    """λ for each head and level from the layer's input: `softplus(weight[h, l] * (W x)[h, l])`, `weight`
    starting at ones.

    Args:
        hidden_size: M.
        num_heads: H.
        num_levels: L.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_levels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, num_heads * num_levels, bias=False)
        self.weight = nn.Parameter(torch.ones(num_heads, num_levels))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, T, M]` to `[B, T, H, L]`, at least fp32."""
        raw = self.proj(x)
        if fused.covers(raw, self.weight):
            return fused.level_scales(raw, self.weight)
        return F.softplus(widen(self.weight) * widen(raw).unflatten(-1, self.weight.shape))


class TimeStep(nn.Module):
    """Mamba's input-dependent step and the decay that follows from it: `dt = softplus(z + dt_bias)`,
    `log_decay = -exp(A_log) * dt`.

    At the start `dt` (for z = 0) is log-uniform in [dt_min, dt_max] and `exp(A_log)` uniform in `decay_rates`
    (Mamba-2, section 7).

    Args:
        num_heads: H.
        channels: width of `z` per head; 1 for a decay per head, K for one per channel.
        decay_rates: range of `exp(A_log)`.
    """

    DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4

    def __init__(self, num_heads: int, channels: int = 1, decay_rates: tuple[float, float] = (1.0, 16.0)) -> None:
        super().__init__()
        self.num_heads, self.channels, self.decay_rates = num_heads, channels, decay_rates
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads * channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        low, high = self.decay_rates
        uniform = torch.rand(self.A_log.shape, device=self.A_log.device)
        initialize(self.A_log, (low + (high - low) * uniform).clamp_min(1e-3).log())
        low, high = math.log(self.DT_MIN), math.log(self.DT_MAX)
        uniform = torch.rand(self.dt_bias.shape, device=self.dt_bias.device)
        dt = (low + (high - low) * uniform).exp().clamp_min(self.DT_FLOOR)
        initialize(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`z [B, T, H]` (`[B, T, H*K]`) to `(dt, log_decay)`, each `[B, T, H]` (`[B, T, H, K]`), at least
        fp32."""
        dt = F.softplus(widen(z) + widen(self.dt_bias))
        rate = widen(self.A_log).exp()
        if self.channels > 1:
            dt, rate = dt.unflatten(-1, (self.num_heads, self.channels)), rate[:, None]
        return dt, -rate * dt

    def log_decay(self, z: Tensor) -> Tensor:
        """The second of what `forward` gives, alone."""
        if fused.covers(z, self.dt_bias, self.A_log):
            logs = fused.log_decay(z, self.dt_bias, self.A_log)
            return logs if self.channels == 1 else logs.unflatten(-1, (self.num_heads, self.channels))
        return self(z)[1]

    def scale(self, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """`(dt * v, log_decay)` with a step per head: `v [B, T, H, V]` and `z [B, T, H]`; the product in the dtype of v
        or a wider one."""
        if fused.covers(z, v, self.dt_bias, self.A_log):
            log_decay, scaled = fused.log_decay_and_values(z, self.dt_bias, self.A_log, v)
            return scaled, log_decay
        dt, log_decay = self(z)
        return widen(v) * dt[..., None], log_decay


class RecurrentMixer(nn.Module):
    """Base of the recurrent mixers: `forward(x, state) -> (y, state)`.

    Class attributes, set by a mixer:
        key_ratio: total key width over the model width, when `state_size` is not given.
        value_ratio: V / K, when neither `head_dim` nor `expand_v` is given.
        conv_taps: W of its paper, 0 for no convolution.
        conv_bias: whether the convolution has a bias.
        gate: activation of the output gate, or None for no gate.
        uses: of "decay", "channel_decay" and "beta" the controls it gives to the operator (for the cost
            report), and "positions" if it wants to know them.
    """

    key_ratio: ClassVar[float] = 1.0
    value_ratio: ClassVar[float] = 1.0
    conv_taps: ClassVar[int] = 4
    conv_bias: ClassVar[bool] = False
    gate: ClassVar[str | None] = "silu"
    uses: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def sizes(cls, config: LogLinearConfig) -> dict[str, Any]:
        """The sizes of this mixer that `config` leaves open (None), from those that it gives.

        Returns values for the fields num_groups, state_size, expand_v, head_dim and conv_size.

        Raises:
            ValueError: the given sizes contradict each other or do not divide.
        """
        if config.expand is not None:
            raise ValueError(
                f"expand is a size of mixer 'mamba2'; for {config.mixer!r} give expand_v, head_dim or state_size"
            )
        groups = config.num_heads if config.num_groups is None else config.num_groups
        key_width = config.state_size
        if key_width is None:
            keys = cls.key_ratio * config.hidden_size
            if keys % config.num_heads:
                raise ValueError(
                    f"num_heads {config.num_heads} does not divide the {keys:g} key channels of mixer {config.mixer!r} "
                    f"at hidden_size {config.hidden_size}: give state_size"
                )
            key_width = int(keys) // config.num_heads
        value_width = config.head_dim
        if value_width is None:
            exact = (cls.value_ratio if config.expand_v is None else config.expand_v) * key_width
            value_width = round(exact)
            if not math.isclose(exact, value_width, rel_tol=1e-6):
                raise ValueError(f"expand_v x state_size = {exact:g} must be a whole number: give head_dim")
        elif config.expand_v is not None and round(config.expand_v * key_width) != value_width:
            raise ValueError(
                f"head_dim {value_width} contradicts expand_v {config.expand_v} x state_size {key_width}: "
                "give one of the two"
            )
        return {
            "num_groups": groups,
            "state_size": key_width,
            "head_dim": value_width,
            "expand_v": value_width / key_width,
            "conv_size": cls.conv_taps if config.conv_size is None else config.conv_size,
        }

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_groups = config.num_heads, config.num_groups
        self.key_width, self.value_width = config.state_size, config.head_dim
        self.num_levels, self.full_partition = config.num_levels, config.full_partition
        self.state_dtype = config.state_dtype
        self.decoding_window = config.decoding_window
        keys, values = self.num_groups * self.key_width, self.num_heads * self.value_width
        self.splits = (keys, keys, values)
        self.scale = self.key_width**-0.5
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.conv = None
        if config.conv_size:
            self.conv = ShortConvolution(sum(self.splits), config.conv_size, self.conv_bias)
        self.level_scales = (
            LevelScales(config.hidden_size, self.num_heads, self.num_levels) if self.num_levels > 1 else None
        )
        self.gate_proj = nn.Linear(config.hidden_size, values, bias=False) if self.gate else None
        self.norm = self.make_norm(config)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def make_norm(self, config: LogLinearConfig) -> nn.Module:
        """The norm of the operator's output: per head, gated if the mixer has a gate."""
        if self.gate is None:
            return RMSNorm(self.value_width, config.norm_eps)
        return GatedRMSNorm(self.value_width, self.gate, eps=config.norm_eps)

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> OperatorInputs:
        """The operator's inputs, from the layer's input `x [B,T,M]` and the projected, convolved q, k
        `[B,T,G,K]` and v `[B,T,H,V]`. `positions [B,T]` (of each token in its own sequence) are None unless
        `uses` asks for them."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it prepares the operator's inputs")

    def output_gate(self, x: Tensor) -> Tensor:
        """`[B, T, H*V]`, before the activation."""
        assert self.gate_proj is not None
        return self.gate_proj(x)

    def finish(self, o: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """`[B, T, H*V]` from the operator's output `o` and the convolved `v` `[B,T,H,V]`, and the layer's `x`."""
        if self.gate is None:
            return self.norm(o).flatten(-2)
        return self.norm(o, self.output_gate(x).unflatten(-1, o.shape[-2:])).flatten(-2)

    def zero_state(
        self, batch: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> RecurrentState:
        """The state before the first token of `batch` rows of a model in `dtype`. See `state_dtype` and
        `decoding_window` of the configuration for how it is kept."""
        dtype = self.qkv_proj.weight.dtype if dtype is None else dtype
        device = self.qkv_proj.weight.device if device is None else device
        sizes = (batch, self.num_levels, self.num_heads, self.key_width, self.value_width)
        return RecurrentState(
            None if self.conv is None else self.conv.zero_state(batch, dtype, device),
            self._for_steps(FenwickState.zeros(*sizes, dtype=self._kept_in(dtype, device), device=device), dtype),
        )

    def _kept_in(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of buckets on `device` in a model in `dtype`."""
        window, channel = length_for(self.decoding_window, device), "channel_decay" in self.uses
        full = self.full_partition
        return state_dtype_for(self.state_dtype, dtype, window=window, full=full, channel_decay=channel)

    def _for_steps(self, state: FenwickState, dtype: torch.dtype) -> FenwickState:
        """In what a model in `dtype` keeps it in, and with what steps make use of: a window (see `decoding_window` of
        the configuration), or room for pending decays where they pay. A state that steps start from has it from the
        beginning: a captured step needs it at one address."""
        device = state.buckets.device
        state = state.to(dtype=self._kept_in(dtype, device))
        decays = {"decay", "channel_decay"}.intersection(self.uses)
        decay = "channel" if "channel_decay" in decays else "head" if decays else None
        delta = "beta" in self.uses
        length = length_for(self.decoding_window, device)
        if length > 0:
            return state.with_window(length, num_groups=self.num_groups, decay=decay, delta=delta)
        return state if delta or decay == "channel" else state.with_pending()

    def forward(
        self,
        x: Tensor,
        state: RecurrentState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mixes `x [B, T, M]` along its tokens.

        One token with a state and without gradients (`T == 1`, grad mode off, not packed) takes the step of
        the operator and updates `state` in place, without host syncs and with fixed shapes; everything else
        goes through the operator itself.

        Args:
            x: `[B, T, M]`; `[1, N, M]` when packed.
            state: of a row each (of a sequence each when packed), or None for zeros. It is consumed: see
                `layers.state`.
            cu_seqlens: `[S+1]` bounds of packed sequences.
            return_state: whether the state after the last token is wanted.

        Returns:
            `y` as `x`, and the new state or None.
        """
        stepping = x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
        projected = self.qkv_proj(x)
        convolution = None if state is None else state.convolution
        if self.conv is not None and stepping and convolution is not None:
            projected = self.conv.step(projected, convolution)
        elif self.conv is not None:
            projected, convolution = self.conv(projected, convolution, cu_seqlens, return_state)
        q, k, v = projected.split(self.splits, dim=-1)
        q, k = q.unflatten(-1, (self.num_groups, -1)), k.unflatten(-1, (self.num_groups, -1))
        v = v.unflatten(-1, (self.num_heads, -1))
        positions = None
        if "positions" in self.uses:
            start = None if state is None else state.positions
            positions = token_positions(x.shape[0], x.shape[1], start, cu_seqlens, x.device)
        inputs = self.prepare(x, q, k, v, positions)
        # The operator wants one dtype for q, k and v; norms and rotations may have left a wider one.
        inputs = inputs._replace(q=inputs.q.to(v.dtype), k=inputs.k.to(v.dtype), v=inputs.v.to(v.dtype))
        level_scales = None if self.level_scales is None else self.level_scales(x)
        if stepping and state is not None:
            o = log_linear_attention_step(
                inputs.q[:, 0],
                inputs.k[:, 0],
                inputs.v[:, 0],
                _only_token(level_scales),
                state.fenwick,
                log_decay=_only_token(inputs.log_decay),
                beta=_only_token(inputs.beta),
                scale=self.scale,
            )[:, None]
            new_state = state
        else:
            o, fenwick = log_linear_attention(
                inputs.q,
                inputs.k,
                inputs.v,
                level_scales,
                log_decay=inputs.log_decay,
                beta=inputs.beta,
                scale=self.scale,
                cu_seqlens=cu_seqlens,
                initial_state=None if state is None else state.fenwick,
                return_state=return_state,
            )
            if fenwick is not None and not torch.is_grad_enabled():
                fenwick = self._for_steps(fenwick, self.qkv_proj.weight.dtype)
            new_state = None if fenwick is None else RecurrentState(convolution, fenwick)
        return self.out_proj(self.finish(o, v, x)), new_state if return_state else None


def _only_token(x: Tensor | None) -> Tensor | None:
    """`[B, 1, ...]` to `[B, ...]`."""
    return None if x is None else x[:, 0]
