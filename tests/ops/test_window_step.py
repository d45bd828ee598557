"""Steps of a state with a window are the steps of the recurrence, wherever a window begins and ends."""

import importlib.util
import logging

import pytest
import torch

from loglinear import FenwickState, fenwick, log_linear_attention, log_linear_attention_step
from operator_cases import MIXERS, TOLERANCES, Inputs, Shape, assert_close, make_inputs, poisoned, random_state

without_gpu = importlib.util.find_spec("triton") is None or torch.cuda.is_available()
on_kernels = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(without_gpu, reason="kernels are not interpreted here")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
each_mixer = pytest.mark.parametrize("mixer", MIXERS)
some_mixers = pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])


def steps(inputs: Inputs, state: FenwickState, backend: str = "auto") -> torch.Tensor:
    return torch.stack(
        [
            log_linear_attention_step(**inputs.step(t), state=state, scale=0.7, backend=backend)
            for t in range(inputs.v.shape[1])
        ],
        dim=1,
    )


def windowed(mixer: str, shape: Shape, positions, length: int, dtype=torch.float64, device="cpu") -> FenwickState:
    """A state in the middle of a sequence with an empty window, whose buckets are owed decays where they can be; empty
    buckets and places are NaN."""
    decay, delta = MIXERS[mixer]
    state = random_state(shape, positions, dtype, device)
    state = state.with_window(length, num_groups=shape.G, decay=decay, delta=delta)
    for name, x in state.named_tensors():
        if name.startswith("window.") and name != "window.begun":
            x.fill_(torch.nan)
    if state.window.owed is not None:
        right = fenwick.is_right_half(state.positions, fenwick.chunk_height(length)).long()
        owed = -torch.rand(len(positions), shape.H, state.num_levels, dtype=torch.float64).to(state.window.owed)
        owed = owed.masked_fill(~state.occupied()[:, None], torch.nan)
        state.window.owed[torch.arange(len(positions)), right] = owed
    return state


def exactly(inputs: Inputs, state: FenwickState) -> tuple[torch.Tensor, FenwickState]:
    """Output and final state of the recurrence in float64."""
    o, after = log_linear_attention(
        **inputs.to("cpu", torch.float64).arguments(), scale=0.7, initial_state=state.to("cpu", torch.float64),
        return_state=True, backend="reference",
    )  # fmt: skip
    assert after is not None
    return o, after


def check(inputs: Inputs, state: FenwickState, tolerance: float, backend: str = "auto") -> None:
    """Steps against the recurrence, the state that is left, and where it is kept."""
    exact, after = exactly(inputs, state)
    addresses = [x.data_ptr() for _, x in state.named_tensors()]
    found = steps(inputs, state, backend)
    assert found.dtype == inputs.v.dtype
    assert_close(found, exact, tolerance, "o")
    assert_close(state.settled().buckets, after.buckets, tolerance, "state")
    assert state.positions.tolist() == after.positions.tolist()
    assert [x.data_ptr() for _, x in state.named_tensors()] == addresses


# ----------------------------------------------------------------------------------------------------
# In torch
# ----------------------------------------------------------------------------------------------------


@each_mixer
@pytest.mark.parametrize("L", [None, 1, 2, 4, 9])
@pytest.mark.parametrize("N", [1, 4, 16])
def test_steps_are_the_recurrence(mixer, L, N):
    """Rows at different positions, past the ends of several windows; nothing that is not there is looked at."""
    shape = Shape(B=3, T=70, G=1, H=2, K=3, V=4, L=L)
    inputs = make_inputs(mixer, shape).map(poisoned)
    check(inputs, windowed(mixer, shape, [0, 29, 64], N), 1e-12)


@some_mixers
def test_every_phase_of_a_window(mixer):
    """A row for every position that a window of eight can begin at, near the end of larger blocks too."""
    positions = [*range(17), *range(56, 73), *range(1016, 1033)]
    shape = Shape(B=len(positions), T=19, G=1, H=1, K=3, V=2, L=7)
    check(make_inputs(mixer, shape), windowed(mixer, shape, positions, 8), 1e-12)


@each_mixer
def test_groups_of_heads(mixer):
    shape = Shape(B=2, T=21, G=2, H=6, K=5, V=3, L=6)
    check(make_inputs(mixer, shape), windowed(mixer, shape, [3, 40], 8), 1e-12)


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet", "kda"])
def test_thousands_of_steps(mixer):
    """From two places, one with a capped last level."""
    shape = Shape(B=2, T=2000, G=1, H=1, K=4, V=4, L=11)
    inputs = make_inputs(mixer, shape, decay=0.02)
    check(inputs, windowed(mixer, shape, [0, 1_047_000], 16), 1e-12)
    check(inputs.to(torch.float32), windowed(mixer, shape, [0, 1_047_000], 16, torch.float32), 2e-6)


@some_mixers
def test_far_out(mixer):
    shape = Shape(B=1, T=5, G=1, H=1, K=2, V=2, L=45)
    state = windowed(mixer, shape, [2**40 - 2], 4)
    check(make_inputs(mixer, shape), state, 1e-12)
    assert state.base().tolist() == [2**40]
    held = state.buckets.nan_to_num().abs().amax((2, 3, 4)) > 0
    assert held[state.occupied()].all() and state.occupied().tolist() == [fenwick.occupied(2**40, 45)]


@each_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(mixer, dtype):
    shape = Shape(B=1, T=66, G=2, H=4, K=8, V=6, L=8)
    inputs = make_inputs(mixer, shape, dtype, decay=0.1)
    state = windowed(mixer, shape, [0], 16, torch.float32)
    check(inputs, state, TOLERANCES[dtype].forward)
    assert state.buckets.dtype == state.window.keys.dtype == torch.float32


@some_mixers
def test_buckets_in_sixteen_bits_are_rounded_at_the_end_of_a_window(mixer):
    shape = Shape(B=2, T=64, G=1, H=2, K=8, V=6, L=7)
    inputs = make_inputs(mixer, shape, torch.bfloat16, decay=0.1)
    state = windowed(mixer, shape, [0, 5], 16, torch.bfloat16)
    assert state.window.values.dtype == torch.float32
    before = state.clone()
    steps(inputs.tokens(0, 10), state)
    assert torch.equal(state.buckets.nan_to_num(), before.buckets.nan_to_num()), "written before a window's end"
    exact, _ = exactly(inputs, before)
    assert_close(steps(inputs, before), exact, 5e-3, "o")


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.skipif(
    without_gpu, reason="kernels are not interpreted here"))])  # fmt: skip
@some_mixers
def test_what_is_owed_stays_within_bounds(mixer, backend):
    """Buckets that live through windows of strong decays: nothing overflows, nothing comes back."""
    shape = Shape(B=1, T=40, G=1, H=1, K=4, V=4, L=9)
    inputs = make_inputs(mixer, shape, torch.float32, decay=60.0)
    state = windowed(mixer, shape, [64], 4, torch.float32)
    check(inputs, state, 2e-6, backend)
    assert state.buckets[state.occupied()].abs().max() < 100


@some_mixers
def test_slow_decays_are_not_rounded_away(mixer):
    """A bucket that is multiplied by e^-0.0005 and rounded to 8 bits is what it was; one that is owed it, fades."""
    shape = Shape(B=1, T=3000, G=1, H=1, K=8, V=8, L=14)
    inputs = make_inputs(mixer, shape, torch.float32)
    inputs.log_decay.fill_(-5e-4)
    inputs.v[:, 1:] = 0
    if inputs.beta is not None:
        inputs.k[:, 1:] = 0
    state = windowed(mixer, shape, [0], 16, torch.bfloat16)
    exact, _ = exactly(inputs, state)
    assert_close(steps(inputs, state)[:, -20:], exact[:, -20:], 1e-2, "o")


@some_mixers
def test_states_pass_between_steps_and_whole_sequences(mixer):
    """A window ends at the door of the operator; a new one begins wherever that leaves the rows."""
    shape = Shape(B=2, T=50, G=1, H=2, K=3, V=2, L=7)
    inputs, (decay, delta) = make_inputs(mixer, shape), MIXERS[mixer]
    whole, end = log_linear_attention(**inputs.arguments(), scale=0.7, return_state=True)
    parts, state = [], None
    for start, stop in ((0, 13), (21, 29), (40, 45)):
        part, state = log_linear_attention(
            **inputs.tokens(start, stop).arguments(), scale=0.7, initial_state=state, return_state=True
        )
        assert state is not None and state.window is None
        state = state.with_window(8, num_groups=1, decay=decay, delta=delta)
        after = {13: 21, 29: 40, 45: 50}[stop]
        parts += [part, steps(inputs.tokens(stop, after), state)]
    assert end is not None and state is not None
    assert_close(torch.cat(parts, dim=1), whole, 1e-12, "o")
    assert_close(state.settled().buckets, end.buckets, 1e-12, "state")


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_the_operator_settles_a_window(backend):
    if backend == "triton" and (without_gpu or torch.cuda.is_available()):
        pytest.skip("kernels are not interpreted here")
    shape = Shape(B=2, T=5, G=1, H=1, K=3, V=2, L=5)
    inputs, state = make_inputs("mamba2", shape, torch.float32), windowed("mamba2", shape, [7, 20], 8, torch.float32)
    steps(inputs.tokens(0, 3), state)
    (found, left), (wanted, after) = (
        log_linear_attention(**inputs.arguments(), initial_state=begin, return_state=True, backend=backend)
        for begin in (state, state.settled())
    )
    assert torch.equal(found, wanted) and torch.equal(left.buckets, after.buckets) and left.window is None


@each_mixer
def test_resets_and_numbers_that_are_not_finite(mixer):
    """A decay of -inf empties; a NaN is seen by its own row alone, and level scales of empty levels by none."""
    shape = Shape(B=2, T=12, G=1, H=1, K=4, V=4, L=5)
    inputs, state = make_inputs(mixer, shape), windowed(mixer, shape, [5, 6], 8)
    inputs.v[1, 2] = torch.nan
    if inputs.log_decay is not None:
        inputs.log_decay[0, 6:8] = -torch.inf
    found = steps(inputs, state.clone())
    assert found[1, 2].isnan().all() and found[0].isfinite().all()
    exact, _ = exactly(inputs.rows(0, 1), state.select(torch.tensor([0])))
    assert_close(found[:1], exact, 1e-12, "o")


def test_no_gradients_and_no_shared_memory():
    shape = Shape(B=2, T=1, G=1, H=1, K=2, V=2, L=4)
    inputs, state = make_inputs("mamba2", shape), windowed("mamba2", shape, [0, 3], 4)
    shared = state._replace(window=state.window._replace(values=torch.zeros(1, 1, 4, 2).double().expand(2, 1, 4, 2)))
    with pytest.raises(ValueError, match="window.values are updated in place, but several entries share memory"):
        log_linear_attention_step(**inputs.step(0), state=shared)
    inputs.q.requires_grad_()
    with pytest.raises(RuntimeError, match="updates its state in place and has no gradient"):
        log_linear_attention_step(**inputs.step(0), state=state)
    assert state.positions.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("mixer", "begun_for", "message"),
    [
        ("linear_attention", "mamba2", "is for tokens with a decay per head, got no decay"),
        ("gla", "mamba2", "is for tokens with a decay per head, got a decay per channel"),
        ("kda", "delta_net", "is for tokens with no decay, got a decay per channel"),
        ("gated_deltanet", "mamba2", "is for tokens without a beta, got one with"),
        ("mamba2", "gated_deltanet", "is for tokens with a beta, got one without"),
    ],
)
def test_windows_of_other_mixers_are_refused(mixer, begun_for, message):
    shape = Shape(B=2, T=1, G=1, H=2, K=2, V=2, L=4)
    state = windowed(begun_for, shape, [0, 3], 4)
    with pytest.raises(ValueError, match=message):
        log_linear_attention_step(**make_inputs(mixer, shape).step(0), state=state)
    assert state.positions.tolist() == [0, 3]
    with pytest.raises(ValueError, match="is for 1 groups of keys, but q and k have 2"):
        log_linear_attention_step(**make_inputs(begun_for, shape._replace(G=2)).step(0), state=state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"begun": torch.zeros(2)}, TypeError, "window's begun must be int64, got torch.float32"),
        ({"keys": torch.zeros(2, 1, 4, 3)}, ValueError, r"window's keys must be \[2, 1, 4, 2\], got \[2, 1, 4, 3\]"),
        ({"keys": torch.zeros(2, 3, 4, 2)}, ValueError, r"keys must be \[rows, G, N, K\], got \[2, 3, 4, 2\]"),
        ({"keys": torch.zeros(2, 1, 6, 2)}, ValueError, "a window must be a power of two, got 6"),
        ({"values": torch.zeros(2, 2, 4, 2).half()}, TypeError, "window's values must be float32 or float64"),
        ({"log_decays": torch.zeros(2, 2, 8)}, ValueError, r"window's log_decays must be \[2, 2, 4\]"),
        ({"mixing": torch.zeros(2, 2, 4, 2)}, ValueError, r"window's mixing must be \[2, 2, 4, 4\]"),
        ({"values": torch.zeros(2, 2, 4, 2, device="meta")}, ValueError, "window.values are on meta, q on cpu"),
        ({"keys": [1]}, TypeError, "window.keys must be a tensor, got list"),
    ],
    ids=["begun", "width", "groups", "length", "dtype", "decays", "mixing", "device", "list"],
)
def test_wrong_windows_are_refused(change, error, message):
    shape = Shape(B=2, T=1, G=1, H=2, K=2, V=2, L=4)
    state = windowed("gated_deltanet", shape, [0, 3], 4, torch.float32)
    state = state._replace(window=state.window._replace(**change))
    with pytest.raises(error, match=message):
        log_linear_attention_step(**make_inputs("gated_deltanet", shape, torch.float32).step(0), state=state)


def test_a_window_and_pending_decays_are_refused_together():
    shape = Shape(B=1, T=1, G=1, H=1, K=2, V=2, L=4)
    state = windowed("mamba2", shape, [3], 4, torch.float32)
    both = state._replace(log_decays=torch.zeros(1, 4, 1))
    with pytest.raises(ValueError, match="pending decays and a window, wanted one of them at most"):
        log_linear_attention_step(**make_inputs("mamba2", shape, torch.float32).step(0), state=both)
    with pytest.raises(TypeError, match="window must be a Window or None, got tuple"):
        log_linear_attention_step(
            **make_inputs("mamba2", shape, torch.float32).step(0), state=state._replace(window=tuple(state.window))
        )


# ----------------------------------------------------------------------------------------------------
# The kernel
# ----------------------------------------------------------------------------------------------------


@on_kernels
@each_mixer
@pytest.mark.parametrize("L", [None, 1, 2, 6])
def test_kernel(mixer, L, device):
    """Ragged rows, windows that begin anywhere and end; tiles that are not full."""
    shape = Shape(B=3, T=5, G=1, H=2, K=3, V=20, L=L)
    inputs = make_inputs(mixer, shape, torch.float32, device).map(poisoned)
    check(inputs, windowed(mixer, shape, [0, 13, 62], 4, torch.float32, device), 2e-6, "triton")


@on_kernels
@some_mixers
@pytest.mark.parametrize("N", [1, 16, 64])
def test_kernel_by_length_of_window(mixer, N, device):
    """Up to two ends of a window of 16, from a row that has just begun and one in the middle of its blocks."""
    shape = Shape(B=2, T=36, G=1, H=1, K=4, V=4, L=8)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    check(inputs, windowed(mixer, shape, [0, 107], N, torch.float32, device), 2e-6, "triton")


@on_kernels
@some_mixers
def test_kernel_at_every_phase(mixer, device):
    positions = [*range(8), *range(24, 33), 127, 1_048_575]
    shape = Shape(B=len(positions), T=2, G=1, H=1, K=2, V=2, L=6)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    check(inputs, windowed(mixer, shape, positions, 8, torch.float32, device), 2e-6, "triton")


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet", "kda"])
def test_kernel_in_groups_and_dtypes(mixer, dtype, device):
    shape = Shape(B=1, T=9, G=2, H=4, K=8, V=6, L=6)
    inputs = make_inputs(mixer, shape, dtype, device, decay=0.1)
    state = windowed(mixer, shape, [22], 4, torch.float32, device)
    check(inputs, state, TOLERANCES[dtype].forward, "triton")


@on_kernels
@some_mixers
def test_kernel_on_a_state_in_sixteen_bits(mixer, device):
    """The interpreter cuts numbers off where a GPU rounds them to bfloat16: two ends stay within the tolerance."""
    shape = Shape(B=2, T=9, G=1, H=1, K=8, V=40, L=6)
    inputs = make_inputs(mixer, shape, torch.bfloat16, device, decay=0.1)
    state = windowed(mixer, shape, [0, 22], 4, torch.bfloat16, device)
    check(inputs, state, 2e-2, "triton")
    assert state.buckets.dtype == torch.bfloat16


@on_kernels
@some_mixers
@pytest.mark.parametrize("position", [2**20 - 1, 2**40 - 2])
@pytest.mark.parametrize("L", [22, 45])
def test_kernel_far_out(mixer, position, L, device):
    shape = Shape(B=1, T=3, G=1, H=1, K=2, V=2, L=L)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    check(inputs, windowed(mixer, shape, [position], 8, torch.float32, device), 2e-6, "triton")


@on_kernels
@some_mixers
def test_kernel_on_many_steps(mixer, device):
    """Rounding does not pile up: one row that fills its levels, one beyond the cap."""
    shape = Shape(B=2, T=20_000 if device == "cuda" else 100, G=1, H=1, K=4, V=4, L=8)
    inputs = make_inputs(mixer, shape, torch.float32, device, decay=0.02)
    check(inputs, windowed(mixer, shape, [0, 1_047_000], 16, torch.float32, device), 4e-6, "triton")


@on_kernels
def test_kernel_with_wide_states_and_several_tiles(device):
    """K of more than one warp's rows, V of many tiles: the first tile alone writes what the head shares."""
    for mixer in ("mamba2", "kda"):
        shape = Shape(B=1, T=3, G=1, H=2, K=200, V=70, L=6)
        inputs = make_inputs(mixer, shape, torch.float32, device)
        check(inputs, windowed(mixer, shape, [13], 16, torch.float32, device), 2e-6, "triton")


@on_kernels
@pytest.mark.parametrize("few", [1, 6])
@pytest.mark.parametrize("mixer", ["gated_deltanet", "kda"])
def test_kernel_where_a_program_writes_several_buckets(mixer, few, device, monkeypatch):
    """All of a head's at a window's end, or every third; with enough programs each has one."""
    monkeypatch.setattr("loglinear.ops.triton.window_step.FEW_PROGRAMS", few)
    shape = Shape(B=1, T=9, G=1, H=2, K=8, V=4, L=10)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    check(inputs, windowed(mixer, shape, [487], 4, torch.float32, device), 2e-6, "triton")


@on_kernels
@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet", "gla"])
def test_kernel_on_resets_and_numbers_that_are_not_finite(mixer, device):
    shape = Shape(B=2, T=5, G=1, H=1, K=4, V=4, L=5)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    state = windowed(mixer, shape, [5, 6], 8, torch.float32, device)
    inputs.log_decay[0, 1:3] = -torch.inf
    inputs.v[1, 2] = torch.nan
    exact, _ = exactly(inputs.rows(0, 1), state.select(torch.tensor([0], device=device)))
    found = steps(inputs, state, "triton")
    assert found[1, 2].isnan().all()
    assert_close(found[:1], exact, 2e-6, "o")
    assert state.settled().buckets[0].isfinite().all()


@on_kernels
def test_what_the_kernel_does_not_cover_goes_to_torch(device, caplog):
    caplog.set_level(logging.DEBUG, "loglinear")
    shape = Shape(B=1, T=1, G=1, H=1, K=2, V=2, L=3)
    inputs = make_inputs("mamba2", shape, torch.float32, device)
    strided = windowed("mamba2", shape, [3], 4, torch.float32, device)
    strided = strided._replace(window=strided.window._replace(values=torch.zeros(1, 1, 4, 4, device=device)[..., ::2]))
    cases = {
        "float64": (inputs.to(torch.float64), windowed("mamba2", shape, [3], 4, device=device)),
        "a window of 128 tokens": (inputs, windowed("mamba2", shape, [3], 128, torch.float32, device)),
        "a state that is not contiguous": (inputs, strided),
    }
    for reason, (given, state) in cases.items():
        check(given, state, 2e-6, "triton")
        assert f"{reason}: torch takes this step" in caplog.text


@on_kernels
@some_mixers
def test_kernel_is_an_operator(mixer, device):
    """With a fake, and true about what it writes."""
    from loglinear.ops.triton.window_step import _window_step_op

    shape = Shape(B=2, T=1, G=1, H=1, K=4, V=4, L=5)
    inputs, state = (
        make_inputs(mixer, shape, torch.float32, device),
        windowed(mixer, shape, [3, 4], 4, torch.float32, device),
    )
    state = state.map(torch.Tensor.nan_to_num)
    arguments = (*inputs.step(0).values(), state.buckets, state.positions, *state.window, 0.7)
    torch.library.opcheck(_window_step_op, arguments, test_utils=("test_schema", "test_faketensor"))


@on_kernels
def test_autograd_is_told_of_what_the_kernel_writes(device):
    shape = Shape(B=1, T=1, G=1, H=1, K=4, V=4, L=5)
    inputs = make_inputs("mamba2", shape, torch.float32, device)
    state = windowed("mamba2", shape, [3], 16, torch.float32, device)
    weight = torch.ones_like(state.window.values, requires_grad=True)
    product = (weight * state.window.values).sum()
    with torch.no_grad():
        steps(inputs, state, "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@on_kernels
@some_mixers
def test_a_compiled_step_is_one_graph(mixer, device):
    shape = Shape(B=2, T=3, G=1, H=1, K=4, V=4, L=5)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    eager = windowed(mixer, shape, [2, 4], 4, torch.float32, device)
    compiled = eager.clone()

    @torch.compile(fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    def step(state, **token):
        with torch.no_grad():
            return 2 * log_linear_attention_step(**token, state=state, scale=0.7, backend="triton")

    for t in range(3):
        found = step(compiled, **inputs.step(t))
        assert torch.equal(
            found, 2 * log_linear_attention_step(**inputs.step(t), state=eager, scale=0.7, backend="triton")
        )
    for (_, mine), (_, theirs) in zip(compiled.named_tensors(), eager.named_tensors(), strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet", "kda"])
@pytest.mark.parametrize("buckets", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 40])
def test_captured_steps_of_a_real_shape(mixer, buckets, B):
    """Thousands of programs that race for one counter, replayed from a graph; the same tokens on torch in float64."""
    shape = Shape(B=B, T=1, G=1 if mixer == "mamba2" else 32, H=32, K=128, V=128, L=12)
    state = windowed(mixer, shape, torch.randint(0, 3000, (B,)).tolist(), 16, buckets, "cuda")
    exact = state.clone().to(dtype=torch.float64).settled()
    current = make_inputs(mixer, shape, torch.bfloat16, "cuda").step(0)
    warm, stream, graph = state.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        log_linear_attention_step(**current, state=warm, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        o = log_linear_attention_step(**current, state=state, backend="triton")
    for _ in range(40):
        for name, x in make_inputs(mixer, shape, torch.bfloat16, "cuda").step(0).items():
            if x is not None:
                current[name].copy_(x)
        graph.replay()
        wide = {name: None if x is None else x.double() for name, x in current.items()}
        assert_close(o, log_linear_attention_step(**wide, state=exact, backend="torch"), 5e-3, "o")
    assert_close(state.settled().buckets, exact.buckets, 1e-5 if buckets == torch.float32 else 5e-3, "state")
    assert torch.equal(state.positions, exact.positions)
