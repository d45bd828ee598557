"""DeltaNet (Yang et al., 2024, arXiv 2406.06484): the delta rule without decay.

B rows · T tokens · M model width · G groups · H heads · K key width · V value width
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loglinear.layers.norms import unit_length
from loglinear.layers.precision import widen
from loglinear.layers.recurrent import OperatorInputs, RecurrentMixer

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig


class DeltaNet(RecurrentMixer):
    """Log-linear DeltaNet (the plain one when `num_levels` is 1): unit queries and keys, no gate."""

    gate = None
    uses = ("beta",)

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.beta_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> OperatorInputs:
        return OperatorInputs(unit_length(q), unit_length(k), v, beta=torch.sigmoid(widen(self.beta_proj(x))))
