"""Autocast ends at the operator: queries, keys and values are cast at the door, and what is computed of them is not."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def cast(*tensors: Any) -> tuple[Any, ...]:
    """All of them in the dtype of autocast, where it is on for the device of the first one."""
    first = tensors[0]
    if isinstance(first, Tensor) and not first.is_meta and torch.is_autocast_enabled(first.device.type):
        dtype = torch.get_autocast_dtype(first.device.type)
        castable = (torch.float32, torch.bfloat16, torch.float16)  # the rest is refused, or kept
        return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in castable else x for x in tensors)
    return tensors


def turned_off(x: Tensor) -> AbstractContextManager:
    """A context without autocast on the device of x."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # meta tensors know none
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def outside(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes in the dtypes of its forward also where `backward()` is called inside autocast.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     outside(lambda ctx, grad: grad @ grad)(None, torch.ones(2, 2)).dtype
    torch.float32
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        first = next((grad for grad in grads if grad is not None), None)
        with nullcontext() if first is None else turned_off(first):
            return backward(ctx, *grads)

    return run
