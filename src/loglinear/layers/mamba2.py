"""Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060): state space duality with a scalar decay for each head.

    B rows · T tokens · M model width · G groups · H heads · K state width · V head width

C, B and x of the paper are q, k and v here; `x` enters the state multiplied by its time step and leaves
through the skip `D` as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loglinear.layers.norms import GatedRMSNorm
from loglinear.layers.recurrent import OperatorInputs, RecurrentMixer, TimeStep

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig


class Mamba2(RecurrentMixer):
    """Log-linear Mamba-2 (plain Mamba-2 when `num_levels` is 1)."""

    conv_bias = True
    uses = ("decay",)

    @classmethod
    def sizes(cls, config: LogLinearConfig) -> dict[str, Any]:
        """Head width from `expand` (default 2: the heads together are twice as wide as the model), state
        width 128, one group."""
        if config.expand_v is not None:
            raise ValueError("expand_v is not a size of mixer 'mamba2'; give expand, head_dim or state_size")
        inner = (2.0 if config.expand is None else config.expand) * config.hidden_size
        head_dim = config.head_dim
        if head_dim is None:
            if inner % config.num_heads:
                raise ValueError(f"num_heads {config.num_heads} does not divide expand x hidden_size = {inner:g}")
            head_dim = int(inner) // config.num_heads
        elif config.expand is not None and head_dim * config.num_heads != round(inner):
            raise ValueError(
                f"num_heads {config.num_heads} x head_dim {head_dim} contradicts expand x hidden_size = "
                f"{inner:g}: give head_dim or expand"
            )
        return {
            "num_groups": 1 if config.num_groups is None else config.num_groups,
            "state_size": 128 if config.state_size is None else config.state_size,
            "head_dim": head_dim,
            "expand": head_dim * config.num_heads / config.hidden_size,
            "conv_size": cls.conv_taps if config.conv_size is None else config.conv_size,
        }

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scale = 1.0  # the paper does not scale C
        self.dt_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.time_step = TimeStep(self.num_heads)
        self.D = nn.Parameter(torch.ones(self.num_heads))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.D)

    def make_norm(self, config: LogLinearConfig) -> nn.Module:
        """Over all heads together, after the gate."""
        width = self.num_heads * self.value_width
        return GatedRMSNorm(width, gate_first=True, eps=config.norm_eps)

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> OperatorInputs:
        scaled, log_decay = self.time_step.scale(v, self.dt_proj(x))
        return OperatorInputs(q, k, scaled, log_decay=log_decay)

    def finish(self, o: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.norm(o.to(v.dtype).flatten(-2), self.output_gate(x), skip=(v, self.D))
