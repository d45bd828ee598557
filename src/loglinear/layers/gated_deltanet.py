"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024, arXiv 2412.06464): the delta rule with a scalar decay
for each head.

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


class GatedDeltaNet(RecurrentMixer):
    """Log-linear Gated DeltaNet (the plain one when `num_levels` is 1): queries and keys of unit length, a
    gated norm at the output."""

    key_ratio = 0.75
    value_ratio = 2.0
    uses = ("decay", "beta")

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.decay_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.beta_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.time_step = TimeStep(self.num_heads, decay_rates=(0.0, 16.0))

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> OperatorInputs:
        log_decay = self.time_step.log_decay(self.decay_proj(x))
        beta = torch.sigmoid(widen(self.beta_proj(x)))
        return OperatorInputs(unit_length(q), unit_length(k), v, log_decay, beta)
