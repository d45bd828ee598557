"""The learning rate over a run, as a share of its peak."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from loglinear.train.config import TrainConfig


def learning_rate_factor(
    step: int,
    *,
    steps: int,
    schedule: Literal["cosine", "linear", "constant"],
    warmup_fraction: float,
    final_fraction: float,
) -> float:
    """Share of the peak learning rate that optimiser step `step` (from 0) uses.

    It rises linearly over the first `warmup_fraction · steps` steps, the first of which already moves, and
    then falls from 1 to `final_fraction` at the last step, along a half cosine or a line; "constant" stays at
    1.

    >>> shape = dict(steps=5, schedule="linear", warmup_fraction=0.4, final_fraction=0.0)
    >>> [learning_rate_factor(step, **shape) for step in (0, 1, 4)]
    [0.5, 1.0, 0.0]
    """
    warmup = math.ceil(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    # The step before the first of the fall has the factor 1: the last of the warm-up, or one before the run.
    progress = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final_fraction + (1 - final_fraction) * remaining


def schedule_of(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """`learning_rate_factor` of a run of so many steps, as a function of the step (from 0)."""
    return partial(
        learning_rate_factor,
        steps=steps,
        schedule=config.schedule,
        warmup_fraction=config.warmup_fraction,
        final_fraction=config.final_rate_fraction,
    )
