"""Rotary position embedding (Su et al., 2021): the first half of a head's channels is rotated against the
second.

B rows · T tokens · H heads · D head width
"""

import torch
from torch import Tensor

from loglinear.layers import fused
from loglinear.layers.precision import widen


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotates `x [B, T, H, D]` by its tokens' `positions [B, T]`; channel pair `i` turns by `theta^(-2i/D)`
    per token.

    Angles are computed from the integer positions at every call, in at least fp32: no table limits the
    length.
    """
    if fused.covers(x):
        return fused.rotate(x, positions, theta)
    half = x.shape[-1] // 2
    wide = widen(x)
    exponents = torch.arange(half, device=x.device, dtype=wide.dtype) / half
    angles = positions[..., None].to(wide.dtype) * theta**-exponents
    cosine, sine = angles.cos()[:, :, None], angles.sin()[:, :, None]
    first, second = wide[..., :half], wide[..., half:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
