"""Which parameters weight decay is for."""

from typing import Any

from torch import nn

# By the last part of the name: the mixers' own parameters, which set time scales and mixing weights and have
# no business near zero.
UNDECAYED_NAMES = ("A_log", "dt_bias", "D", "bias")
# By a module on the path: norms and everything that makes level scales.
UNDECAYED_MODULES = ("norm", "mixer_norm", "mlp_norm", "level_scales")


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter `name`: to the weights of projections, convolutions and
    embeddings; not to norms, biases, `A_log`, `dt_bias`, `D` and level parameters."""
    *modules, leaf = name.split(".")
    return leaf not in UNDECAYED_NAMES and not any(module in UNDECAYED_MODULES for module in modules)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups, `{"params", "param_names", "weight_decay"}`, with each trainable parameter of
    `model` in exactly one.

    Args:
        model: any of our models or layers; tied parameters count once.
        weight_decay: for the decayed group, >= 0.

    Raises:
        ValueError: weight_decay is negative.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for decayed in (True, False):
        members = [(name, parameter) for name, parameter in named if is_decayed(name) == decayed]
        if members:
            groups.append(
                {
                    "params": [parameter for _, parameter in members],
                    "param_names": [name for name, _ in members],
                    "weight_decay": weight_decay if decayed else 0.0,
                }
            )
    return groups
