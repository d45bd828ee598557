"""Short causal depthwise convolution with a carried state.

B rows · T tokens · C channels · W taps · S packed sequences
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.packing import take_once, token_rows

try:
    from loglinear.ops.triton import convolution as kernel
except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.split(".")[0] != "triton":
        raise
    kernel = None  # Triton is not installed


class ShortConvolution(nn.Module):
    """`y_t = silu(sum_j weight[:, j] * x_{t-W+1+j} + bias)` for each channel, with zeros (or the carried
    state) before the first token.

    The state is the last `W-1` inputs of every sequence, `[B, W-1, C]`, oldest first.

    Args:
        channels: C.
        width: W, at least 2.
        bias: whether there is a bias (Mamba-2) or not.
    """

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def zero_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The state before the first token: `[batch, W-1, C]` zeros."""
        return torch.zeros(batch, self.width - 1, self.weight.shape[0], dtype=dtype, device=device)

    def _taps(self, window: Tensor, length: int) -> Tensor:
        """The convolution of `window [B, length+W-1, C]`, `[B, length, C]`. A sum of shifted products: no
        transposition to channels first is needed, and every tap is a view of one buffer."""
        weight = self.weight.to(window.dtype)
        out = window[:, :length] * weight[:, 0]
        for tap in range(1, self.width):
            out = torch.addcmul(out, window[:, tap : tap + length], weight[:, tap])
        return F.silu(out if self.bias is None else out + self.bias.to(window.dtype))

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolves `x [B, T, C]`; returns `(y [B, T, C], new state or None)`.

        Args:
            x: inputs; `[1, N, C]` when packed.
            state: `[B, W-1, C]` (`[S, W-1, C]` when packed), not changed.
            cu_seqlens: `[S+1]` bounds of packed sequences. No token sees across a bound.
            return_state: whether to return the state after the last token of each sequence.
        """
        batch, length, channels = x.shape
        past = self.width - 1
        if cu_seqlens is None:
            before = x.new_zeros(batch, past, channels) if state is None else state.to(x.dtype)
            window = torch.cat((before, x), dim=1)
            return self._taps(window, length), window[:, length:].clone() if return_state else None
        # Each packed sequence gets W-1 places of its own in front of it: one ordinary convolution then serves
        # them all.
        num_sequences = cu_seqlens.shape[0] - 1
        tokens = torch.arange(length, device=x.device)
        places = tokens + (token_rows(cu_seqlens, length) + 1) * past
        sequences = torch.arange(num_sequences, device=x.device)
        if state is None:
            before = x.new_zeros(num_sequences * past, channels)
        else:
            before = state.to(x.dtype).flatten(0, 1)
        bounds = cu_seqlens.to(torch.int64)
        heads = (bounds[:-1] + sequences * past)[:, None] + torch.arange(past, device=x.device)
        total = length + num_sequences * past
        window = x.new_zeros(total, channels).index_copy(
            0, torch.cat((places, heads.flatten())), torch.cat((x[0], before))
        )
        # Output i of the plain convolution ends at window place i + W - 1.
        y = take_once(self._taps(window[None], total - past), places - past)
        if not return_state:
            return y, None
        tails = (bounds[1:] + sequences * past)[:, None] + torch.arange(past, device=x.device)
        return y, window[tails]

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One token: `x [B, 1, C]` to `[B, 1, C]`; `state` is updated in place. One kernel on CUDA devices, where no
        gradients are wanted."""
        if kernel is not None and x.is_cuda and not torch.is_grad_enabled():
            if kernel.unsupported(x, state, self.weight) is None:
                return kernel.convolution_step(x, state, self.weight, self.bias)
        window = torch.cat((state.to(x.dtype), x), dim=1)
        state.copy_(window[:, 1:])
        return self._taps(window, 1)
