"""What is computed in more than 16 bits, and how parameters are set.

Precision policy of the layers: projections, convolutions and the operator's q, k, v run in the model's dtype
(or autocast's). Everything that is exponentiated or accumulated over the sequence (time step, decay, write
strength, level scales), every norm and every rotation is computed in at least fp32, because an error in a
decay grows with its power. fp64 models stay fp64 throughout. What states are kept in between calls is said by
`state_dtype_for`.
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in fp32 if it has 16 bits, else as it is (fp32 and fp64 are left alone)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def state_dtype_for(
    chosen: str | None, dtype: torch.dtype, *, window: int, full: bool, channel_decay: bool
) -> torch.dtype:
    """What the states of a model in `dtype` are kept in: what was chosen, if anything was. Else bf16 in a bf16 model
    where they err by no more than its outputs are rounded (docs/math.md, section 12), fp64 in a fp64 model, and fp32.

    That takes a `window` (of so many tokens, 0 for none), in which a bucket is written once, and is owed its decays,
    which a decay per channel never is; and a `full` partition of what the model is made for (see
    `LogLinearConfig.full_partition`), whose levels merge what is about as large. One level, and the last of too few,
    would add ever smaller things to an ever larger sum, until 8 bits swallow them.
    """
    if chosen is not None:
        return getattr(torch, chosen)
    if dtype == torch.float64:
        return dtype
    narrow = dtype == torch.bfloat16 and window > 0 and full and not channel_decay
    return torch.bfloat16 if narrow else torch.float32


@torch.no_grad()
def initialize(parameter: Tensor, value: Tensor) -> None:
    """Copies `value` into `parameter`, unless a checkpoint has already filled it (transformers marks such
    parameters)."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
