"""Kimi Delta Attention (Kimi Team, 2025, arXiv 2510.26692): the delta rule with a decay for each key channel.

B rows · T tokens · M model width · G groups · H heads · K key width · V value width
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loglinear.layers.norms import unit_length
from loglinear.layers.precision import widen
from loglinear.layers.recurrent import OperatorInputs, RecurrentMixer, TimeStep

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig


class KimiDeltaAttention(RecurrentMixer):
    """Log-linear KDA (the plain one when `num_levels` is 1): decay and output gate through projections of the
    rank of a head's value."""

    gate = "sigmoid"
    uses = ("decay", "channel_decay", "beta")

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        rank = self.value_width
        self.decay_proj = nn.Sequential(
            nn.Linear(config.hidden_size, rank, bias=False),
            nn.Linear(rank, self.num_heads * self.key_width, bias=False),
        )
        self.gate_proj = nn.Sequential(
            nn.Linear(config.hidden_size, rank, bias=False),
            nn.Linear(rank, self.num_heads * self.value_width, bias=True),
        )
        self.beta_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.time_step = TimeStep(self.num_heads, channels=self.key_width)

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> OperatorInputs:
        log_decay = self.time_step.log_decay(self.decay_proj(x))
        beta = torch.sigmoid(widen(self.beta_proj(x)))
        return OperatorInputs(unit_length(q), unit_length(k), v, log_decay, beta)
