"""Inputs, references and the tolerance table that the tests of the operator share.

Legend: B batch, T tokens, G query/key groups, H heads, K key width, V value width, L levels (None: no level scales).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loglinear import FenwickState

# Mixer: (log_decay per head, per channel or none; whether there is a beta)
MIXERS = {
    "linear_attention": (None, False),
    "mamba2": ("head", False),
    "gla": ("channel", False),
    "delta_net": (None, True),
    "gated_deltanet": ("head", True),
    "kda": ("channel", True),
}


class Tolerance(NamedTuple):
    forward: float
    gradient: float


# Relative Frobenius error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-11),  # rounding alone: a few hundred operations deep
    torch.float32: Tolerance(2e-6, 1e-5),  # rounding of 6e-8, grown by sums over tokens and, in gradients, twice
    torch.bfloat16: Tolerance(5e-3, 1e-2),  # results are stored with 8 bits (2e-3); inside everything is float32
    torch.float16: Tolerance(5e-3, 1e-2),  # 11 bits, but small gradients leave the normal range
}


class Shape(NamedTuple):
    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    L: int | None


@dataclass
class Inputs:
    """Arguments of the operator by name; None where the mixer has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    level_scales: Tensor | None
    log_decay: Tensor | None
    beta: Tensor | None

    def map(self, change) -> Inputs:
        return Inputs(*(None if x is None else change(x) for x in self.values()))

    def values(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def present(self) -> dict[str, Tensor]:
        named = zip((field.name for field in fields(self)), self.values(), strict=True)
        return {name: x for name, x in named if x is not None}

    def tokens(self, start: int, stop: int) -> Inputs:
        return self.map(lambda x: x[:, start:stop])

    def rows(self, start: int, stop: int) -> Inputs:
        return self.map(lambda x: x[start:stop])

    def to(self, *where) -> Inputs:
        return self.map(lambda x: x.detach().to(*where))

    def leaves(self) -> Inputs:
        return self.map(lambda x: x.detach().requires_grad_())

    def arguments(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def step(self, token: int) -> dict[str, Tensor | None]:
        return {name: None if x is None else x[:, token] for name, x in self.arguments().items()}


def make_inputs(
    mixer: str, shape: Shape, dtype=torch.float64, device="cpu", decay: float = 0.3, key_norm: float = 1.0
) -> Inputs:
    """Random inputs. Decays are uniform in [-decay, 0] per token, betas in [0, 2], keys have norm `key_norm`."""
    B, T, G, H, K, V, L = shape
    decays, has_beta = MIXERS[mixer]
    width = {None: None, "head": (B, T, H), "channel": (B, T, H, K)}[decays]
    made = Inputs(
        q=torch.randn(B, T, G, K, dtype=torch.float64) / K**0.5,
        k=key_norm * F.normalize(torch.randn(B, T, G, K, dtype=torch.float64), dim=-1),
        v=torch.randn(B, T, H, V, dtype=torch.float64),
        level_scales=None if L is None else torch.randn(B, T, H, L, dtype=torch.float64),
        log_decay=None if width is None else -decay * torch.rand(width, dtype=torch.float64),
        beta=2 * torch.rand(B, T, H, dtype=torch.float64) if has_beta else None,
    )
    return made.map(lambda x: x.to(device, dtype))


def with_strong_decays(inputs, places):
    """At some tokens; all others forget next to nothing."""
    log_decay = inputs.log_decay.detach().clone()
    log_decay[:, places] = -100.0
    return replace(inputs, log_decay=log_decay.requires_grad_())


def poisoned(x: Tensor) -> Tensor:
    """The same values as a strided view into a buffer that is NaN all around them."""
    *outer, last = x.shape
    buffer = x.new_full([*(size + 2 for size in outer), 2 * last + 3], torch.nan)
    return buffer[(*(slice(1, 1 + size) for size in outer), slice(1, 1 + 2 * last, 2))].copy_(x)


def random_state(shape: Shape, positions: list[int], dtype=torch.float64, device="cpu") -> FenwickState:
    """Random buckets at the given positions; the ones that are not occupied are NaN, for nobody may read them."""
    levels = 1 if shape.L is None else shape.L
    buckets = torch.randn(len(positions), levels, shape.H, shape.K, shape.V, dtype=torch.float64)
    state = FenwickState(buckets, torch.tensor(positions))
    buckets = buckets.masked_fill(~state.occupied()[:, :, None, None, None], torch.nan)
    return FenwickState(buckets.to(device, dtype), state.positions.to(device))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    difference, size = (got.double() - wanted.double()).norm().item(), wanted.double().norm().item()
    return difference / size if size > 0 else difference


def assert_close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == wanted.shape, f"{what}: shape {list(got.shape)}, not {list(wanted.shape)}"
    error = relative_error(got.detach().cpu(), wanted.detach().cpu())
    assert error <= tolerance, f"{what}: error {error:.2e} > {tolerance:.0e}"  # also false for NaN


def with_buckets(inputs: Inputs, state: FenwickState | None) -> dict[str, Tensor]:
    return inputs.present() | ({} if state is None else {"buckets": state.buckets})


def gradients(outputs: list[Tensor], cotangents: list[Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = [(o, w.to(o.device, o.dtype)) for o, w in zip(outputs, cotangents, strict=True)]
    found = torch.autograd.grad(
        [o for o, _ in pairs], list(wanted.values()), [w for _, w in pairs], materialize_grads=True
    )
    return dict(zip(wanted, found, strict=True))


def same_without_pipelining(run, inputs: Inputs, state: FenwickState | None, monkeypatch) -> None:
    """Output, returned state and every gradient are those of kernels compiled with one stage: compilers have made wrong
    ones of right kernels by pipelining them, by less than roundings are allowed to be off."""
    from triton.runtime.jit import JITFunction

    inputs = inputs.map(lambda x: x.detach().requires_grad_())
    if state is not None:
        state = FenwickState(state.buckets.detach().requires_grad_(), state.positions)
    leaves = with_buckets(inputs, state)

    def results() -> dict[str, Tensor]:
        outputs = dict(zip(("o", "state"), (x for x in run(inputs, state) if x is not None), strict=False))
        torch.manual_seed(0)
        cotangents = [torch.randn_like(x) for x in outputs.values()]
        return outputs | gradients(list(outputs.values()), cotangents, leaves)

    pipelined, launch, launched = results(), JITFunction.run, []

    def run_unpipelined(self, *arguments, grid, warmup, **options):
        launched.append(self)
        return launch(self, *arguments, grid=grid, warmup=warmup, **options | {"num_stages": 1})

    monkeypatch.setattr(JITFunction, "run", run_unpipelined)
    unpipelined = results()
    assert launched, "no kernel was launched again"
    for name, wanted in unpipelined.items():
        error = relative_error(pipelined[name].detach(), wanted.detach())
        assert error <= 1e-4, f"{name}: {error:.1e} apart"


def compare(run, reference, inputs: Inputs, state: FenwickState | None = None, returns_state: bool = True) -> None:
    """Output, returned state and every gradient of `run` against `reference` on the same values in float64.

    Both are called as f(inputs, state) and return o and the buckets of the new state (None unless `returns_state`).
    The tolerances are those of the inputs' dtype.
    """
    tolerance = TOLERANCES[inputs.v.dtype]
    results = []
    exact = inputs.to("cpu", torch.float64), None if state is None else state.to("cpu", torch.float64)
    for function, (given, begin) in ((run, (inputs, state)), (reference, exact)):
        given = given.map(lambda x: x.detach().requires_grad_())  # of views too: the layout is part of the test
        if begin is not None:
            begin = FenwickState(begin.buckets.detach().requires_grad_(), begin.positions)
        o, buckets = function(given, begin)
        outputs = [o, buckets] if returns_state else [o]
        if not results:
            cotangents = [torch.randn(x.shape, dtype=torch.float64) for x in outputs]
            # what the result's dtype holds, so that both are given the same
            cotangents = [w.to(x.dtype).double() for w, x in zip(cotangents, outputs, strict=True)]
        wanted = with_buckets(given, begin)
        found = gradients(outputs, cotangents, wanted)
        if not results:
            for name, x in wanted.items():
                assert found[name].dtype == x.dtype, f"gradient of {name} is {found[name].dtype}, not {x.dtype}"
        results.append(({"o": o, "state": buckets} if returns_state else {"o": o}, found))
    (got, got_gradients), (exact_outputs, exact_gradients) = results
    assert got["o"].dtype == inputs.v.dtype
    for name in exact_outputs:
        assert_close(got[name], exact_outputs[name], tolerance.forward, name)
    for name in exact_gradients:
        assert_close(got_gradients[name], exact_gradients[name], tolerance.gradient, f"gradient of {name}")
