"""The tree algorithm against the references: output, state and every gradient, on shapes chosen to break it."""

import functools

import pytest
import torch

from loglinear import FenwickState, fenwick, log_linear_attention
from loglinear.ops import chunked, reference
from operator_cases import (
    MIXERS,
    Inputs,
    Shape,
    assert_close,
    compare,
    make_inputs,
    poisoned,
    random_state,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_mixer = pytest.mark.parametrize("mixer", MIXERS)


def operator(inputs: Inputs, state, backend="torch", **options):
    o, after = log_linear_attention(
        **inputs.arguments(), scale=0.7, initial_state=state, return_state=True, backend=backend, **options
    )
    assert after is not None
    return o, after.buckets


def tree(chunk, cu_seqlens=None):
    """The algorithm with short chunks, so that short sequences have tall trees."""

    def run(inputs: Inputs, state):
        buckets, positions = (None, None) if state is None else state[:2]
        o, after, _ = chunked.tree_attention(
            *inputs.values(), 0.7, cu_seqlens, buckets, positions, return_state=True, chunk=chunk
        )
        return o, after

    return run


def exact(inputs: Inputs, state, cu_seqlens=None):
    arguments = inputs.arguments()
    positional = [arguments.pop(name) for name in ("q", "k", "v", "level_scales")]
    o, buckets, _ = reference.log_linear_attention_recurrent(
        *positional, **arguments, scale=0.7, cu_seqlens=cu_seqlens, initial_state=state, return_state=True
    )
    return o, buckets


def dense(inputs: Inputs, state):
    arguments = inputs.arguments()
    positional = [arguments.pop(name) for name in ("q", "k", "v", "level_scales")]
    return reference.log_linear_attention_dense(*positional, **arguments, scale=0.7), None


SHAPES = [
    Shape(B=1, T=1, G=1, H=1, K=4, V=3, L=1),
    Shape(B=2, T=1, G=1, H=2, K=3, V=5, L=4),
    Shape(B=2, T=37, G=1, H=2, K=5, V=3, L=7),  # full
    Shape(B=1, T=65, G=2, H=4, K=4, V=6, L=None),
    Shape(B=1, T=65, G=2, H=2, K=4, V=6, L=8),  # one past a power of two
    Shape(B=2, T=32, G=1, H=3, K=1, V=1, L=12),  # more levels than needed
    Shape(B=2, T=31, G=2, H=4, K=4, V=3, L=3),  # capped inside a chunk
    Shape(B=2, T=33, G=1, H=2, K=4, V=3, L=5),  # capped just above a chunk
    Shape(B=1, T=57, G=1, H=2, K=4, V=3, L=2),
    Shape(B=1, T=40, G=1, H=2, K=4, V=3, L=1),
]


@each_device
@each_mixer
@pytest.mark.parametrize("shape", SHAPES)
def test_short_chunks(mixer, shape, device):
    inputs = make_inputs(mixer, shape, device=device).map(poisoned)
    compare(tree(4), exact, inputs)


@each_device
@each_mixer
@pytest.mark.parametrize("shape", SHAPES)
def test_state_carried_in_by_rows_at_different_positions(mixer, shape, device):
    positions = [13, 40, 0][: shape.B]
    inputs = make_inputs(mixer, shape, device=device).map(poisoned)
    compare(tree(4), exact, inputs, random_state(shape, positions, device=device))


@each_mixer
@pytest.mark.parametrize("start", [1, 7, 8, 31, 32, 2**40 + 8 * 5 + 3])
def test_state_carried_in_at_any_position(mixer, start):
    shape = Shape(B=1, T=12, G=1, H=2, K=3, V=2, L=7)
    compare(tree(8), exact, make_inputs(mixer, shape), random_state(shape, [start]))


@each_device
@each_mixer
@pytest.mark.parametrize("L", [None, 2, 6, 12])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_packed(mixer, L, carried, device):
    lengths = [0, 1, 17, 0, 16, 5, 33, 0]
    shape = Shape(B=1, T=sum(lengths), G=1, H=2, K=4, V=3, L=L)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    state = random_state(shape, [3, 0, 8, 100, 5, 7, 12, 0], device=device) if carried else None
    inputs = make_inputs(mixer, shape, device=device).map(poisoned)
    compare(tree(8, cu_seqlens), functools.partial(exact, cu_seqlens=cu_seqlens), inputs, state)


@each_device
@each_mixer
@pytest.mark.parametrize("T", [63, 65, 255, 257])
def test_around_multiples_of_the_chunk(mixer, T, device):
    shape = Shape(B=1, T=T, G=1, H=2, K=6, V=4, L=fenwick.full_num_levels(T))
    inputs = make_inputs(mixer, shape, device=device).map(poisoned)

    def run(inputs, state):
        o, none = log_linear_attention(**inputs.arguments(), scale=0.7, backend="torch")
        assert none is None
        return o, None

    compare(run, dense, inputs, returns_state=False)


@each_device
@each_mixer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_dtypes(mixer, dtype, carried, device):
    shape = Shape(B=2, T=70, G=1, H=2, K=8, V=6, L=8)
    inputs = make_inputs(mixer, shape, dtype, device, decay=0.1)
    state = None
    if carried:
        # bucket contents of the size that tokens leave there
        work = torch.promote_types(dtype, torch.float32)
        state = random_state(shape, [37, 0], work, device)
        state = FenwickState(0.3 * state.buckets, state.positions)
    compare(operator, functools.partial(operator, backend="reference"), inputs, state)


@each_device
@pytest.mark.parametrize("shape", [(1, 64, 1), (1, 64, 1, 16)], ids=["per head", "per channel"])
@pytest.mark.parametrize("mean", [10, 40, 60])
def test_what_has_decayed_is_as_exact_as_the_rest(shape, mean, device):
    """A state that decays by e^-mean, and nothing else, read at the end of a chunk."""
    generator = torch.Generator().manual_seed(mean)
    log_decay = (-2 * mean / 64 * torch.rand(shape, generator=generator)).to(device)
    q, nothing = torch.ones(1, 64, 1, 16, device=device), torch.zeros(1, 64, 1, 1, device=device)

    def read(dtype, backend):
        leaf = log_decay.to(dtype).requires_grad_()
        state = FenwickState(torch.ones(1, 1, 1, 16, 1, dtype=dtype, device=device), torch.tensor([64], device=device))
        given = {"log_decay": leaf, "initial_state": state, "backend": backend}
        o, _ = log_linear_attention(q.to(dtype), q.to(dtype), nothing.to(dtype), **given)
        return o[:, -1], torch.autograd.grad(o[0, -1].sum(), leaf)[0]

    for got, expected in zip(read(torch.float32, "torch"), read(torch.float64, "reference"), strict=True):
        assert_close(got, expected, 2e-7, "last token")


@each_mixer
@pytest.mark.parametrize("num_heads", [2, 8])
def test_enough_chunks_for_several_parts(mixer, num_heads):
    """From 128 chunks on the descent goes part by part."""
    shape = Shape(B=1, T=300, G=1, H=2, K=3, V=2, L=6 if num_heads == 2 else 10)
    assert len(fenwick.plan([300], None, 2, 10, "cpu").parts) > 1
    run = tree(2)
    compare(lambda inputs, state: (run(inputs, state)[0], None), dense, make_inputs(mixer, shape), returns_state=False)


@each_mixer
def test_any_subset_of_inputs_may_need_gradients(mixer):
    shape = Shape(B=1, T=20, G=1, H=2, K=3, V=2, L=6)
    inputs, state = make_inputs(mixer, shape), random_state(shape, [5])
    named = inputs.present() | {"buckets": state.buckets}
    leaves = {name: x.detach().requires_grad_() for name, x in named.items()}

    def total(named):
        arguments = [named.get(name) for name in inputs.arguments()]
        o, after, _ = chunked.tree_attention(*arguments, 1.0, None, named["buckets"], state.positions, True, chunk=4)
        return (o * o).sum() + (after * after).sum()

    together = dict(zip(leaves, torch.autograd.grad(total(leaves), list(leaves.values())), strict=True))
    for name in named:
        alone = torch.autograd.grad(total(named | {name: leaves[name]}), leaves[name])[0]
        assert_close(alone, together[name], 1e-13, f"gradient of {name} alone")


@pytest.mark.parametrize("mixer", ["mamba2", "gla", "gated_deltanet", "kda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strong_decay_stays_finite_and_right(mixer, dtype):
    """Down to e^-100 and less per chunk, among tokens that do not decay at all."""
    shape = Shape(B=1, T=150, G=1, H=2, K=4, V=3, L=9)
    inputs = make_inputs(mixer, shape, dtype)
    assert inputs.log_decay is not None
    inputs.log_decay[:, 10:14] = -30
    inputs.log_decay[:, 70:134] = -2.5
    inputs.log_decay[:, 20:50] = 0
    inputs.log_decay[:, 141] = -1000
    compare(operator, functools.partial(operator, backend="reference"), inputs)


@pytest.mark.parametrize("mixer", ["delta_net", "gated_deltanet", "kda"])
def test_keys_that_are_too_long(mixer):
    """β up to 2 and norms up to 1.5: eigenvalues of the transitions as low as 1 - 2 · 1.5² = -3.5."""
    shape = Shape(B=1, T=40, G=1, H=2, K=8, V=3, L=7)
    compare(operator, functools.partial(operator, backend="reference"), make_inputs(mixer, shape, key_norm=1.5))


@each_mixer
@pytest.mark.parametrize("L", [None, 3, 7])
def test_carried_over_every_split(mixer, L):
    """Splitting anywhere and carrying the state changes nothing: output, final state, gradients through the state."""
    shape = Shape(B=1, T=19, G=1, H=2, K=3, V=2, L=L)
    inputs = make_inputs(mixer, shape).leaves()
    named, whole = inputs.present(), operator(inputs, None)
    cotangents = [torch.randn_like(x) for x in whole]
    expected = torch.autograd.grad(whole, list(named.values()), cotangents)
    for split in range(1, shape.T):
        left, state = log_linear_attention(
            **inputs.tokens(0, split).arguments(), scale=0.7, return_state=True, backend="torch"
        )
        assert state is not None and state.positions.tolist() == [split]
        right, after = operator(inputs.tokens(split, shape.T), state)
        outputs = [torch.cat([left, right], dim=1), after]
        for name, got, wanted in zip(("o", "state"), outputs, whole, strict=True):
            assert_close(got, wanted, 1e-12, f"{name} split at {split}")
        found = torch.autograd.grad(outputs, list(named.values()), cotangents)
        for name, got, wanted in zip(named, found, expected, strict=True):
            assert_close(got, wanted, 1e-11, f"gradient of {name} split at {split}")


@each_mixer
def test_packed_equals_separate(mixer):
    """Through the public operator, with chunks of 64."""
    lengths = [70, 0, 1, 129]
    shape = Shape(B=1, T=sum(lengths), G=1, H=2, K=4, V=3, L=9)
    inputs, state = make_inputs(mixer, shape), random_state(shape, [0, 9, 66, 31])
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor(bounds, dtype=dtype)
        o, after = log_linear_attention(
            **inputs.arguments(), cu_seqlens=cu_seqlens, initial_state=state, return_state=True, backend="torch"
        )
        assert after is not None
        for row, length in enumerate(lengths):
            own = state.select(torch.tensor([row]))
            if length:
                alone, own = log_linear_attention(
                    **inputs.tokens(bounds[row], bounds[row + 1]).arguments(),
                    initial_state=own, return_state=True, backend="torch",
                )  # fmt: skip
                assert_close(o[:, bounds[row] : bounds[row + 1]], alone, 1e-13, f"sequence {row}")
            assert own is not None
            assert after.positions[row] == state.positions[row] + length
            used = own.occupied()[0]  # what is not occupied may hold anything on the way in; it is zero on the way out
            assert_close(after.buckets[row][used], own.buckets[0][used], 1e-13, f"state {row}")
            assert not after.buckets[row][~used].any()


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_but_empty_sequences(count):
    """No tokens at all is refused, but empty ones beside others leave their state as it is."""
    shape = Shape(B=1, T=4, G=1, H=1, K=2, V=2, L=4)
    state = random_state(shape, [6] * (count + 1))
    cu_seqlens = torch.tensor([0] * (count + 1) + [4])
    _, after = log_linear_attention(
        **make_inputs("gla", shape).arguments(), cu_seqlens=cu_seqlens, initial_state=state, return_state=True
    )
    assert after is not None
    for row in range(count):
        assert torch.equal(after.buckets[row], state.buckets[row].nan_to_num())


@each_device
@each_mixer
def test_twice_the_same_bits(mixer, device):
    shape = Shape(B=2, T=200, G=1, H=4, K=8, V=8, L=9)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    runs = []
    for _ in range(2):
        leaves = inputs.leaves()
        outputs = operator(leaves, None)
        found = torch.autograd.grad([x.square().sum() for x in outputs], list(leaves.present().values()))
        runs.append([*outputs, *found])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_second_derivatives_are_refused():
    inputs = make_inputs("mamba2", Shape(B=1, T=200, G=1, H=1, K=2, V=2, L=9)).leaves()
    o, _ = log_linear_attention(**inputs.arguments(), backend="torch")
    (first,) = torch.autograd.grad(o.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
