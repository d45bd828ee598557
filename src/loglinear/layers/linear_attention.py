"""Linear attention (Katharopoulos et al., 2020, arXiv 2006.16236) with the norm that later work puts in place
of the normaliser.

B rows · T tokens · M model width · G groups · H heads · K key width · V value width
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from loglinear.layers.precision import widen
from loglinear.layers.recurrent import OperatorInputs, RecurrentMixer


class LinearAttention(RecurrentMixer):
    """Log-linear attention without decay (plain linear attention when `num_levels` is 1): feature map `elu +
    1`, a norm per head (Qin et al., 2022, arXiv 2210.10340) instead of division by the summed keys, no gate
    and no convolution."""

    conv_taps = 0
    gate = None

    def prepare(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> OperatorInputs:
        return OperatorInputs(F.elu(widen(q)) + 1, F.elu(widen(k)) + 1, v)
