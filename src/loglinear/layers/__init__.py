"""Mixer layers, each `forward(x, state) -> (y, state)`: seven recurrent ones on one skeleton, and attention.

A new mixer of a known operator family is one file with a subclass of `RecurrentMixer` and one line in `MIXERS`.
"""

from loglinear.layers.attention import Attention
from loglinear.layers.convolution import ShortConvolution
from loglinear.layers.delta_net import DeltaNet
from loglinear.layers.gated_deltanet import GatedDeltaNet
from loglinear.layers.gla import GatedLinearAttention
from loglinear.layers.kda import KimiDeltaAttention
from loglinear.layers.linear_attention import LinearAttention
from loglinear.layers.mamba2 import Mamba2
from loglinear.layers.norms import GatedRMSNorm, RMSNorm
from loglinear.layers.recurrent import LevelScales, RecurrentMixer, TimeStep
from loglinear.layers.retention import Retention
from loglinear.layers.state import AttentionState, MixerState, RecurrentState

MIXERS: dict[str, type[RecurrentMixer] | type[Attention]] = {
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "linear_attention": LinearAttention,
    "retention": Retention,
    "gla": GatedLinearAttention,
    "delta_net": DeltaNet,
    "kda": KimiDeltaAttention,
    "attention": Attention,
}

__all__ = [
    "MIXERS",
    "Attention",
    "AttentionState",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedRMSNorm",
    "KimiDeltaAttention",
    "LevelScales",
    "LinearAttention",
    "Mamba2",
    "MixerState",
    "RMSNorm",
    "RecurrentMixer",
    "RecurrentState",
    "Retention",
    "ShortConvolution",
    "TimeStep",
]
