"""One token at a time equals the whole, whatever the state's dtype, levels and positions."""

import pytest
import torch

from loglinear import FenwickState, fenwick, log_linear_attention, log_linear_attention_step
from operator_cases import MIXERS, TOLERANCES, Shape, assert_close, make_inputs, poisoned, random_state

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_mixer = pytest.mark.parametrize("mixer", MIXERS)


def steps(inputs, state):
    return torch.stack(
        [log_linear_attention_step(**inputs.step(t), state=state, scale=0.7) for t in range(inputs.v.shape[1])], dim=1
    )


@pytest.mark.parametrize("device", DEVICES)
@each_mixer
@pytest.mark.parametrize("L", [None, 1, 2, 4, 9])
def test_steps_equal_the_whole(mixer, L, device):
    """Rows at different positions, past several carries."""
    shape = Shape(B=3, T=70, G=1, H=2, K=3, V=4, L=L)
    inputs = make_inputs(mixer, shape, device=device).map(poisoned)
    state = random_state(shape, [0, 29, 64], device=device)
    state = FenwickState(state.buckets.nan_to_num(), state.positions)  # a step takes empty buckets to be zero
    o, after = log_linear_attention(
        **inputs.arguments(), scale=0.7, initial_state=state, return_state=True, backend="torch"
    )
    assert after is not None
    found = steps(inputs, state)
    assert_close(found, o, 1e-13, "o")
    assert_close(state.buckets, after.buckets, 1e-13, "state")
    assert state.positions.tolist() == after.positions.tolist() == [70, 99, 134]


@each_mixer
def test_group_of_heads_and_dtypes(mixer):
    shape = Shape(B=1, T=66, G=2, H=4, K=8, V=6, L=8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make_inputs(mixer, shape, dtype, decay=0.1)
        state = FenwickState.zeros(1, 8, 4, 8, 6)
        found = steps(inputs, state)
        exact, _ = log_linear_attention(**inputs.to(torch.float64).arguments(), scale=0.7, backend="reference")
        assert found.dtype == dtype and state.buckets.dtype == torch.float32
        assert_close(found, exact, TOLERANCES[dtype].forward, "o")


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_state_kept_in_sixteen_bits(mixer):
    """Every step rounds all buckets to 8 bits (4e-3 at most, 1e-3 on average): errors of single steps add at random."""
    shape = Shape(B=2, T=64, G=1, H=2, K=8, V=6, L=7)
    inputs = make_inputs(mixer, shape, torch.bfloat16, decay=0.1)
    state = FenwickState.zeros(2, 7, 2, 8, 6, dtype=torch.bfloat16)
    found = steps(inputs, state)
    assert state.buckets.dtype == torch.bfloat16
    exact, _ = log_linear_attention(**inputs.to(torch.float64).arguments(), scale=0.7, backend="reference")
    assert_close(found, exact, 2e-2, "o")


@each_mixer
def test_state_passes_between_steps_and_whole_sequences(mixer):
    shape = Shape(B=2, T=50, G=1, H=2, K=3, V=2, L=7)
    inputs = make_inputs(mixer, shape)
    whole, end = log_linear_attention(**inputs.arguments(), scale=0.7, return_state=True)
    first, state = log_linear_attention(**inputs.tokens(0, 21).arguments(), scale=0.7, return_state=True)
    assert state is not None and end is not None
    middle = steps(inputs.tokens(21, 30), state)
    last, state = log_linear_attention(
        **inputs.tokens(30, 50).arguments(), scale=0.7, initial_state=state, return_state=True
    )
    assert state is not None
    assert_close(torch.cat([first, middle, last], dim=1), whole, 1e-13, "o")
    assert_close(state.buckets, end.buckets, 1e-13, "state")


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_thousands_of_steps(mixer):
    """Rounding does not pile up: the recurrence in fp64, 3,000 tokens from two places, one with a capped last level."""
    shape = Shape(B=2, T=3000, G=1, H=1, K=4, V=4, L=11)
    inputs = make_inputs(mixer, shape, decay=0.02)
    begin = random_state(shape, [0, 1_047_000])
    begin = FenwickState(begin.buckets.nan_to_num(), begin.positions)
    exact, after = log_linear_attention(
        **inputs.arguments(), scale=0.7, initial_state=begin, return_state=True, backend="reference"
    )
    assert after is not None
    single = FenwickState(begin.buckets.float(), begin.positions.clone())
    found = steps(inputs.to(torch.float32), single)
    assert_close(found, exact, 2e-6, "o in float32")
    assert_close(single.buckets, after.buckets, 2e-6, "state in float32")
    assert_close(steps(inputs, begin), exact, 1e-12, "o")
    assert begin.positions.tolist() == [3000, 1_050_000]


def test_far_out():
    """Positions beyond 2^40 carry into the right bucket."""
    start = 2**40 - 1
    shape = Shape(B=1, T=3, G=1, H=1, K=2, V=2, L=45)
    inputs, state = make_inputs("mamba2", shape), random_state(shape, [start])
    state = FenwickState(state.buckets.nan_to_num(), state.positions)
    exact, after = log_linear_attention(
        **inputs.arguments(), scale=0.7, initial_state=state, return_state=True, backend="reference"
    )
    assert after is not None
    assert_close(steps(inputs, state), exact, 1e-13, "o")
    assert_close(state.buckets, after.buckets, 1e-13, "state")
    assert (state.buckets.abs().amax((2, 3, 4)) > 0).tolist() == [fenwick.occupied(start + 3, 45)]


@pytest.mark.parametrize("name", ["q", "level_scales", "state"])
def test_gradients_are_refused(name):
    shape = Shape(B=1, T=1, G=1, H=1, K=2, V=2, L=4)
    inputs, state = make_inputs("mamba2", shape), FenwickState.zeros(1, 4, 1, 2, 2, dtype=torch.float64)
    needy = state.buckets if name == "state" else getattr(inputs, name)
    needy.requires_grad_()
    with pytest.raises(RuntimeError, match="updates its state in place and has no gradient"):
        log_linear_attention_step(**inputs.step(0), state=state)
    assert state.positions.tolist() == [0]
    with torch.no_grad():
        log_linear_attention_step(**inputs.step(0), state=state)
    assert state.positions.tolist() == [1]


def test_wrong_state_is_refused_before_anything_changes():
    inputs = make_inputs("mamba2", Shape(B=2, T=1, G=1, H=1, K=2, V=2, L=4)).step(0)
    with pytest.raises(ValueError, match=r"\[rows, L, H, K, V\] = \[2, 4, 1, 2, 2\], got \[2, 5, 1, 2, 2\]"):
        log_linear_attention_step(**inputs, state=FenwickState.zeros(2, 5, 1, 2, 2))
    with pytest.raises(TypeError, match="must be a FenwickState, got NoneType"):
        log_linear_attention_step(**inputs, state=None)
    with pytest.raises(ValueError, match=r"q must be \[B, G, K\], got shape \[2, 1, 1, 2\]"):
        log_linear_attention_step(**(inputs | {"q": inputs["q"][:, None]}), state=FenwickState.zeros(2, 4, 1, 2, 2))


@pytest.mark.gpu
def test_a_step_can_be_captured_in_a_graph():
    shape = Shape(B=2, T=20, G=1, H=2, K=16, V=16, L=8)
    inputs = make_inputs("gated_deltanet", shape, torch.float32, "cuda")
    expected, _ = log_linear_attention(**inputs.arguments(), scale=0.7, backend="torch")
    state, current = FenwickState.zeros(2, 8, 2, 16, 16, device="cuda"), {
        name: None if x is None else x.clone() for name, x in inputs.step(0).items()}  # fmt: skip
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        log_linear_attention_step(**current, state=state.clone(), scale=0.7)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = log_linear_attention_step(**current, state=state, scale=0.7)
    state.buckets.zero_()
    state.positions.zero_()
    for t in range(20):
        for name, x in inputs.step(t).items():
            if x is not None:
                current[name].copy_(x)
        graph.replay()
        assert_close(o, expected[:, t], 1e-5, f"token {t}")
