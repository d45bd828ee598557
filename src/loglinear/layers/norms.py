"""Root-mean-square norms, plain and gated, and the unit-length norm of queries and keys. All in at least fp32
inside."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers import fused
from loglinear.layers.precision import widen

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang and Sennrich, 2019).

    Args:
        width: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if fused.covers(x, self.weight):
            return fused.rms_norm(x, self.weight, self.eps)
        wide = widen(x)
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normalized * widen(self.weight)).to(x.dtype)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """`x + added`, both of one shape, and what `forward` makes of it."""
        hooked = self._forward_hooks or self._forward_pre_hooks  # which want to see a call
        if not hooked and x.dtype == added.dtype and fused.covers(x, added, self.weight):
            return fused.add_rms_norm(x, added, self.weight, self.eps)
        total = x + added
        return total, self(total)


class GatedRMSNorm(nn.Module):
    """An RMSNorm with a multiplicative gate: `norm(x) * act(gate)`, or `norm(x * act(gate))` when
    `gate_first` (Mamba-2).

    Args:
        width: size of the last dimension of `x` and `gate`.
        gate: "silu" or "sigmoid", the gate's activation.
        gate_first: whether the gate is applied before the norm.
        eps: added to the mean square.
    """

    def __init__(self, width: int, gate: str = "silu", gate_first: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.gate, self.activation = gate, GATES[gate]
        self.gate_first = gate_first

    def forward(self, x: Tensor, gate: Tensor, skip: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`x, gate [..., W]` to `[..., W]`. `skip`: `(v [..., H, V], factor [H])` with H V = W; `factor * v` is added
        to x first, and the sum rounded to the dtype of x."""
        if fused.covers(x, gate, self.norm.weight) and (skip is None or fused.covers(*skip)):
            weight, eps = self.norm.weight, self.norm.eps
            return fused.gated_rms_norm(x, gate, weight, eps, self.gate, self.gate_first, skip)
        if skip is not None:
            v, factor = skip
            x = (widen(x).unflatten(-1, v.shape[-2:]) + widen(factor)[:, None] * widen(v)).to(x.dtype).flatten(-2)
        opened = self.activation(widen(gate))
        wide = widen(x)
        y = self.norm(wide * opened) if self.gate_first else self.norm(wide) * opened
        return y.to(x.dtype)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dimension; keeps the delta rule's transition a contraction."""
    if fused.covers(x):
        return fused.unit_length(x, eps)
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
