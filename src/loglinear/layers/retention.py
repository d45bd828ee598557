"""Retention (RetNet; Sun et al., 2023, arXiv 2307.08621): fixed decays, one for each head, and rotated
queries and keys.

B rows · T tokens · M model width · G groups · H heads · K key width · V value width
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loglinear.layers.precision import widen
from loglinear.layers.recurrent import OperatorInputs, RecurrentMixer
from loglinear.layers.rotary import rotate

if TYPE_CHECKING:
    from loglinear.models.config import LogLinearConfig


class Retention(RecurrentMixer):
    """Log-linear retention (the plain one when `num_levels` is 1). Head `h` forgets by `1 - 2^(-5-h)` per
    token; values are twice as wide as keys; the output passes a norm per head and a swish gate."""

    value_ratio = 2.0
    conv_taps = 0
    uses = ("decay", "positions")

    @classmethod
    def sizes(cls, config: LogLinearConfig) -> dict[str, Any]:
        sizes = super().sizes(config)
        if sizes["state_size"] % 2:
            raise ValueError(
                f"retention rotates pairs of key channels: state_size must be even, got {sizes['state_size']}"
            )
        return sizes

    def __init__(self, config: LogLinearConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.rope_theta = config.rope_theta

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> OperatorInputs:
        heads = torch.arange(self.num_heads, device=x.device, dtype=widen(x).dtype)
        log_decay = torch.log1p(-(2.0 ** (-5 - heads))).expand(*x.shape[:2], -1)
        assert positions is not None
        q, k = (rotate(part, positions, self.rope_theta) for part in (q, k))
        return OperatorInputs(q, k, v, log_decay)
