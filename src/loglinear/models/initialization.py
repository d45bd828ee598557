"""Initial weights that depend on a parameter's name alone, so that models which differ elsewhere start equal."""

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loglinear.models.model import LogLinearPreTrainedModel


def initialize_by_name(model: "LogLinearPreTrainedModel", seed: int) -> None:
    """Give a model new initial weights, each module's from a generator seeded by `seed` and the module's name.

    Parameters of the same name and shape are then equal in any two models with the same `initializer_range`: a linear
    model and its log-linear twin differ in the level scales alone, which is what a comparison of the two wants. The
    random state outside is left alone. The weights are drawn on the CPU, so that they are the same on every device.

    Args:
        model: on the CPU; its weights are overwritten.
        seed: another seed gives other weights.

    Raises:
        ValueError: the model is on another device.

    >>> from loglinear.models import LogLinearConfig, LogLinearForCausalLM
    >>> twins = [LogLinearForCausalLM(LogLinearConfig.preset("tiny-mamba2", num_levels=n)) for n in (1, 9)]
    >>> for twin in twins: initialize_by_name(twin, seed=0)
    >>> bool((twins[0].lm_head.weight == twins[1].lm_head.weight).all())
    True
    """
    if (device := next(model.parameters()).device).type != "cpu":
        raise ValueError(
            f"initial weights are drawn on the CPU, got a model on {device}: initialize it before moving it"
        )
    done = set()
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            own = {id(parameter) for parameter in module.parameters(recurse=False)}
            if own - done:  # a tied weight is drawn once, under its first name
                done.update(own)
                digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
                torch.manual_seed(int.from_bytes(digest, "big"))
                model._init_weights(module)
