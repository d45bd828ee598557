"""Root-mean-square norms, plain and gated, and the unit-length norm of queries and keys. All in at least fp32
inside."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        wide = widen(x)
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normalized * widen(self.weight)).to(x.dtype)


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
        self.activation = GATES[gate]
        self.gate_first = gate_first

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        opened = self.activation(widen(gate))
        wide = widen(x)
        y = self.norm(wide * opened) if self.gate_first else self.norm(wide) * opened
        return y.to(x.dtype)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dimension; keeps the delta rule's transition a contraction."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
