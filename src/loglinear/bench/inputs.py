"""Shapes and random inputs of the operator benchmarks.

B batch, T tokens, G query/key groups, H heads, K key width, V value width, L levels
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loglinear import fenwick


@dataclass(frozen=True)
class Shape:
    """One mixer of a model, and the softmax attention that a model of the same width would use in its place.

    `family` is one of `FAMILIES`: "scalar" (a decay per head), "delta" (that and the delta rule), "channel" (a decay
    per key channel) or "channel-delta" (that and the delta rule).
    """

    name: str
    family: str
    num_heads: int
    num_groups: int
    key_dim: int
    value_dim: int
    attention_heads: int
    attention_head_dim: int
    note: str

    @property
    def per_channel(self) -> bool:
        """Whether every key channel has a decay of its own."""
        return self.family.startswith("channel")

    @property
    def delta(self) -> bool:
        """Whether it writes by the delta rule."""
        return self.family.endswith("delta")


# The mixer (`loglinear.layers.MIXERS`) that each family is measured for.
FAMILIES = {"scalar": "mamba2", "delta": "gated_deltanet", "channel": "gla", "channel-delta": "kda"}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mamba2", "scalar", 48, 1, 128, 64, 48, 64, "the log-linear paper's Mamba-2, 802M parameters"),
        Shape("mamba2-8-heads", "scalar", 8, 1, 128, 64, 8, 64, "the same with 8 heads, for a million tokens"),
        Shape("gated-deltanet", "delta", 6, 6, 192, 384, 24, 64, "the log-linear paper's Gated DeltaNet, 793M"),
        Shape("gated-deltanet-128", "delta", 32, 32, 128, 128, 32, 128, "Gated DeltaNet of current large models"),
        Shape("gla", "channel", 4, 4, 256, 512, 16, 128, "GLA of width 2,048, its paper's 1.3B model"),
        Shape("kda", "channel-delta", 32, 32, 128, 128, 32, 128, "Kimi Delta Attention of current large models"),
        Shape("mamba2-2-heads", "scalar", 2, 1, 128, 64, 2, 64, "two heads of Mamba-2, for a processor"),
        Shape(
            "gated-deltanet-2-heads",
            "delta",
            2,
            2,
            64,
            64,
            2,
            64,
            "two small heads of Gated DeltaNet, for a processor",
        ),
        Shape("gla-2-heads", "channel", 2, 2, 64, 128, 2, 64, "two small heads of GLA, for a processor"),
        Shape("kda-2-heads", "channel-delta", 2, 2, 64, 64, 2, 64, "two small heads of KDA, for a processor"),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Random inputs of one call. `q`, `k` [B,T,G,K], `v` [B,T,H,V], `level_scales` [B,T,H,L], `log_decay` [B,T,H] or,
    per channel, [B,T,H,K], `beta` [B,T,H] (of the delta rule).

    The softmax operators take `attention` instead: q, k, v [B,A,T,E] with A heads of width E.
    """

    shape: Shape
    scale: float
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    level_scales: Tensor | None = None
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    attention: tuple[Tensor, Tensor, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The floating tensors by name, in a fixed order: what gradients are taken of."""
        named = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        if self.attention is not None:
            named.update(zip(("attention_q", "attention_k", "attention_v"), self.attention, strict=True))
        return named

    def map(self, change) -> "Inputs":
        """A copy with `change(tensor) -> tensor` applied to every tensor."""
        changed = {
            field.name: change(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        if self.attention is not None:
            changed["attention"] = tuple(change(tensor) for tensor in self.attention)
        return dataclasses.replace(self, **changed)


def make_inputs(
    shape: Shape,
    kind: str,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int = 0,
) -> Inputs:
    """Random inputs of `shape`: decays uniform in (-0.1, 0), level scales uniform in (0.2, 1.2), keys of
    length one for the delta rule.

    `kind` is "attention" (only q, k, v of softmax attention), "linear" (no level scales) or "log-linear" (a
    full partition).
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        drawn = torch.rand(*size, generator=generator, device=device, dtype=torch.float32)
        return low + (high - low) * drawn

    if kind == "attention":
        size = (batch, shape.attention_heads, length, shape.attention_head_dim)
        q, k, v = (normal(*size).to(dtype) for _ in range(3))
        return Inputs(shape, scale=1.0 / math.sqrt(shape.attention_head_dim), attention=(q, k, v))
    q = normal(batch, length, shape.num_groups, shape.key_dim)
    k = normal(batch, length, shape.num_groups, shape.key_dim)
    if shape.delta:
        q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    heads = (batch, length, shape.num_heads)
    levels = fenwick.full_num_levels(length)
    return Inputs(
        shape,
        scale=1.0 / math.sqrt(shape.key_dim),
        q=q.to(dtype),
        k=k.to(dtype),
        v=normal(*heads, shape.value_dim).to(dtype),
        level_scales=uniform(0.2, 1.2, *heads, levels) if kind == "log-linear" else None,
        log_decay=uniform(-0.1, 0.0, *heads, *((shape.key_dim,) if shape.per_channel else ())),
        beta=uniform(0.1, 0.9, *heads) if shape.delta else None,
    )
