"""Gated linear attention (Yang et al., 2023, arXiv 2312.06635): a decay for each key channel.

B rows · T tokens · M model width · G groups · H heads · K key width · V value width
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.precision import widen
from loglinear.layers.recurrent import OperatorInputs, RecurrentMixer

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig


class GatedLinearAttention(RecurrentMixer):
    """Log-linear GLA (the plain one when `num_levels` is 1): keys half as wide as the model, decay
    `sigmoid(low-rank(x))^(1/16)`."""

    GATE_RANK, TEMPERATURE = 16, 16.0

    key_ratio = 0.5
    value_ratio = 2.0
    conv_taps = 0
    uses = ("decay", "channel_decay")

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.decay_proj = nn.Sequential(
            nn.Linear(config.hidden_size, self.GATE_RANK, bias=False),
            nn.Linear(self.GATE_RANK, self.num_heads * self.key_width, bias=True),
        )

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> OperatorInputs:
        log_decay = F.logsigmoid(widen(self.decay_proj(x))) / self.TEMPERATURE
        return OperatorInputs(q, k, v, log_decay.unflatten(-1, (self.num_heads, self.key_width)))
