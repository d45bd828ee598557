"""What is computed in more than 16 bits, and how parameters are set.

Precision policy of the layers: projections, convolutions and the operator's q, k, v run in the model's dtype
(or autocast's). Everything that is exponentiated or accumulated over the sequence (time step, decay, write
strength, level scales), every norm and every rotation is computed in at least fp32, because an error in a
decay grows with its power. fp64 models stay fp64 throughout.
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in fp32 if it has 16 bits, else as it is (fp32 and fp64 are left alone)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@torch.no_grad()
def initialize(parameter: Tensor, value: Tensor) -> None:
    """Copies `value` into `parameter`, unless a checkpoint has already filled it (transformers marks such
    parameters)."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
