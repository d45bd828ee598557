"""Operators under `torch.func.vmap`: what is mapped over becomes rows of the batch.

An operator has no parameters, so calls of several models of one shape are one call on all their rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

TENSORS = ("q", "k", "v", "level_scales", "log_decay", "beta")  # [B, T, …] each


def is_mapped(*tensors: Tensor | None) -> bool:
    """Whether `vmap` maps over one of them: shapes are those of one entry then, and Python cannot see all of it."""
    is_batched = torch._C._functorch.is_batchedtensor  # type: ignore[attr-defined]
    return any(x is not None and is_batched(x) for x in tensors)


def register(operator: CustomOpDef) -> None:
    """Teaches an operator, whose first output has the rows of `v`, what to do under `vmap`.

    Only forward calls on whole sequences: neither packed ones nor carried states.
    """
    names = [argument.name for argument in operator._opoverload._schema.arguments]

    def rule(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        given = dict(zip(names, arguments, strict=True))
        carried = [name for name, value in given.items() if isinstance(value, Tensor) and name not in TENSORS]
        if carried or given.get("return_state"):
            raise ValueError(
                f"under vmap: got {', '.join(carried) or 'return_state'}, wanted whole sequences without packing and "
                "without states"
            )
        for (name, value), dim in zip(given.items(), dims, strict=True):
            if isinstance(value, Tensor):
                given[name] = _rows(value, dim, info.batch_size)
        found = operator(*given.values())
        single = isinstance(found, Tensor)
        o, *rest = (found,) if single else found
        o = o.unflatten(0, (info.batch_size, -1))
        return (o, 0) if single else ((o, *rest), (0, *(None for _ in rest)))

    torch.library.register_vmap(operator, rule)


def _rows(x: Tensor, dim: int | None, size: int) -> Tensor:
    """`[size · B, T, …]` of a tensor whose dimension `dim` is mapped over, or that is the same for all (None)."""
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
