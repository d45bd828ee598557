"""One token at a time equals the whole, whatever the state's dtype, levels and positions."""

import importlib.util
import logging

import pytest
import torch

from loglinear import FenwickState, fenwick, log_linear_attention, log_linear_attention_step
from operator_cases import MIXERS, TOLERANCES, Shape, assert_close, make_inputs, poisoned, random_state

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Kernels: through the interpreter on small shapes, and on a GPU.
without_gpu = importlib.util.find_spec("triton") is None or torch.cuda.is_available()
on_kernels = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(without_gpu, reason="kernels are not interpreted here")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
DEFERRING = ["linear_attention", "mamba2"]  # whose steps add to pending decays
each_mixer = pytest.mark.parametrize("mixer", MIXERS)


def steps(inputs, state, backend="auto"):
    return torch.stack(
        [
            log_linear_attention_step(**inputs.step(t), state=state, scale=0.7, backend=backend)
            for t in range(inputs.v.shape[1])
        ],
        dim=1,
    )


def start(shape, positions, pending=False, dtype=torch.float64, device="cpu"):
    """A state in the middle of a sequence; with pending decays, some are owed and empty buckets hold garbage."""
    state = random_state(shape, positions, dtype, device)
    if not pending:
        return FenwickState(state.buckets.nan_to_num(), state.positions)
    occupied = state.occupied()
    owed = torch.where(occupied[..., None], -torch.rand(state.buckets.shape[:3], device=device), 0.0)
    return FenwickState(state.buckets.nan_to_num(nan=-3e4), state.positions, owed)


def exactly(inputs, state):
    """Output and final state of the recurrence in float64."""
    return log_linear_attention(
        **inputs.to("cpu", torch.float64).arguments(), scale=0.7, initial_state=state.to("cpu", torch.float64),
        return_state=True, backend="reference",
    )  # fmt: skip


def check_kernel(inputs, state, tolerance):
    """Steps on kernels against the recurrence; what has to be true of the state that is left."""
    exact, after = exactly(inputs, state)
    addresses = [None if x is None else x.data_ptr() for x in state]
    found = steps(inputs, state, "triton")
    assert found.dtype == inputs.v.dtype
    assert_close(found, exact, tolerance, "o")
    assert_close(state.settled().buckets, after.buckets, tolerance, "state")
    assert state.positions.tolist() == after.positions.tolist()
    assert [None if x is None else x.data_ptr() for x in state] == addresses
    empty = ~state.occupied()
    if state.log_decays is None:
        assert not state.buckets[empty].any(), "empty buckets are zero"
    else:
        assert not state.log_decays[empty].any(), "nothing is pending for empty buckets"


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


# ----------------------------------------------------------------------------------------------------
# Pending decays
# ----------------------------------------------------------------------------------------------------


@each_mixer
@pytest.mark.parametrize("L", [1, 2, 5])
def test_torch_steps_of_a_pending_state(mixer, L):
    shape = Shape(B=3, T=9, G=1, H=2, K=3, V=4, L=L)
    inputs, state = make_inputs(mixer, shape), start(shape, [0, 29, 64], pending=True)
    exact, after = exactly(inputs, state)
    assert_close(steps(inputs, state, "torch"), exact, 1e-12, "o")
    assert_close(state.settled().buckets, after.buckets, 1e-12, "state")
    assert not state.log_decays.any()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_the_operator_applies_pending_decays(backend):
    if backend == "triton" and (without_gpu or torch.cuda.is_available()):
        pytest.skip("kernels are not interpreted here")
    shape = Shape(B=2, T=5, G=1, H=1, K=3, V=2, L=5)
    inputs, state = make_inputs("mamba2", shape, torch.float32), start(shape, [7, 20], True, torch.float32)
    plain = FenwickState(*(x.clone() for x in state.settled()[:2]))
    (found, left), (wanted, after) = (
        log_linear_attention(**inputs.arguments(), initial_state=begin, return_state=True, backend=backend)
        for begin in (state, plain)
    )
    assert torch.equal(found, wanted) and torch.equal(left.buckets, after.buckets) and left.log_decays is None


@pytest.mark.parametrize(
    ("log_decays", "error", "message"),
    [
        (torch.zeros(2, 4, 1, dtype=torch.float64), TypeError, "log_decays must be float32, got torch.float64"),
        (torch.zeros(2, 4), ValueError, r"log_decays must be \[rows, L, H\] = \[2, 4, 1\], got \[2, 4\]"),
        (torch.zeros(2, 4, 1, device="meta"), ValueError, "log_decays are on meta, q on cpu"),
        (torch.zeros(2, 1, 1).expand(2, 4, 1), ValueError, "log_decays are updated in place, but several entries"),
    ],
    ids=["dtype", "shape", "device", "shared"],
)
def test_wrong_pending_decays_are_refused(log_decays, error, message):
    inputs = make_inputs("mamba2", Shape(B=2, T=1, G=1, H=1, K=2, V=2, L=4), torch.float32).step(0)
    state = FenwickState.zeros(2, 4, 1, 2, 2)._replace(log_decays=log_decays)
    with pytest.raises(error, match=message):
        log_linear_attention_step(**inputs, state=state)


# ----------------------------------------------------------------------------------------------------
# The kernel
# ----------------------------------------------------------------------------------------------------


@on_kernels
@each_mixer
@pytest.mark.parametrize("L", [None, 1, 2, 6])
def test_kernel(mixer, L, device):
    """Ragged rows, past carries of every height, below and beyond the cap; tiles that are not full."""
    shape = Shape(B=3, T=4, G=1, H=2, K=3, V=20, L=L)
    inputs = make_inputs(mixer, shape, torch.float32, device).map(poisoned)
    check_kernel(inputs, start(shape, [0, 13, 62], dtype=torch.float32, device=device), 2e-6)


@on_kernels
@each_mixer
@pytest.mark.parametrize("L", [2, 5])
def test_kernel_with_pending_decays(mixer, L, device):
    shape = Shape(B=3, T=4, G=1, H=2, K=3, V=20, L=L)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    check_kernel(inputs, start(shape, [0, 13, 62], True, torch.float32, device), 2e-6)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mixer", "pending"), [("mamba2", False), ("mamba2", True), ("gated_deltanet", False)])
def test_kernel_in_groups_and_dtypes(mixer, pending, dtype, device):
    shape = Shape(B=1, T=9, G=2, H=4, K=8, V=6, L=6)
    inputs = make_inputs(mixer, shape, dtype, device, decay=0.1)
    check_kernel(inputs, start(shape, [22], pending, torch.float32, device), TOLERANCES[dtype].forward)


@on_kernels
@pytest.mark.parametrize(("mixer", "pending"), [("mamba2", False), ("mamba2", True), ("gated_deltanet", False)])
def test_kernel_on_a_state_in_sixteen_bits(mixer, pending, device):
    """The interpreter cuts numbers off where a GPU rounds them to bfloat16: nine steps stay within the tolerance."""
    shape = Shape(B=2, T=9, G=1, H=1, K=8, V=40, L=6)
    inputs = make_inputs(mixer, shape, torch.bfloat16, device, decay=0.1)
    state = start(shape, [0, 22], pending, torch.bfloat16, device)
    check_kernel(inputs, state, 2e-2)
    assert state.buckets.dtype == torch.bfloat16


@on_kernels
@pytest.mark.parametrize(("mixer", "pending"), [("mamba2", True), ("gated_deltanet", False)])
@pytest.mark.parametrize("position", [2**20 - 1, 2**20 + 4095, 2**40 - 1])
@pytest.mark.parametrize("L", [22, 45])
def test_kernel_far_out(mixer, pending, position, L, device):
    shape = Shape(B=1, T=3, G=1, H=1, K=2, V=2, L=L)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    check_kernel(inputs, start(shape, [position], pending, torch.float32, device), 2e-6)


@on_kernels
@pytest.mark.parametrize(("mixer", "pending"), [("mamba2", False), ("mamba2", True), ("gated_deltanet", False)])
def test_kernel_on_many_steps(mixer, pending, device):
    """Rounding does not pile up, and nothing is lost in a carry: one row that fills its levels, one beyond the cap."""
    shape = Shape(B=2, T=20_000 if device == "cuda" else 200, G=1, H=1, K=4, V=4, L=8)
    inputs = make_inputs(mixer, shape, torch.float32, device, decay=0.02)
    check_kernel(inputs, start(shape, [0, 1_047_000], pending, torch.float32, device), 4e-6)


@on_kernels
@pytest.mark.parametrize("mixer", DEFERRING)
def test_what_is_not_read_cannot_leak(mixer, device):
    """Empty buckets of a pending state, and level scales of empty levels."""
    shape = Shape(B=2, T=1, G=1, H=1, K=4, V=4, L=7)
    inputs, state = make_inputs(mixer, shape, torch.float32, device), start(shape, [5, 40], True, torch.float32, device)
    wanted = steps(inputs, state.clone(), "triton")
    empty = ~state.occupied()
    state.buckets[empty] = torch.nan
    inputs.level_scales[:, 0, 0, 1:] = inputs.level_scales[:, 0, 0, 1:].masked_fill(empty[:, 1:], torch.inf)
    assert torch.equal(steps(inputs, state, "triton"), wanted)


@on_kernels
@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_resets_and_numbers_that_are_not_finite(mixer, device):
    """A decay of -inf empties; a NaN is seen by its own row alone."""
    shape = Shape(B=2, T=3, G=1, H=1, K=4, V=4, L=5)
    for pending in (False, True):
        inputs, state = (
            make_inputs(mixer, shape, torch.float32, device),
            start(shape, [5, 6], pending, torch.float32, device),
        )
        inputs.log_decay[:, 1] = -torch.inf
        inputs.v[1, 2] = torch.nan
        found = steps(inputs, state, "triton")
        assert found[1, 2].isnan().all() and found[0].isfinite().all()
        assert state.settled().buckets[0].isfinite().all()
        fresh = start(shape, [6, 7], False, torch.float32, device)
        fresh.buckets.zero_()
        assert_close(found[0, 1:], steps(inputs.tokens(1, 3), fresh, "triton")[0], 1e-6, "after a reset")


@on_kernels
def test_wide_states_and_several_tiles_share_a_counter(device):
    """K of more than one warp's rows, V of many tiles: every tile must have read before the last one writes."""
    shape = Shape(B=1, T=3, G=1, H=2, K=200, V=70, L=6)
    inputs = make_inputs("mamba2", shape, torch.float32, device)
    check_kernel(inputs, start(shape, [13], True, torch.float32, device), 2e-6)
    inputs = make_inputs("kda", shape, torch.float32, device)
    check_kernel(inputs, start(shape, [13], False, torch.float32, device), 2e-6)


@on_kernels
def test_what_the_kernel_does_not_cover_goes_to_torch(device, caplog):
    caplog.set_level(logging.DEBUG, "loglinear")
    shape = Shape(B=1, T=1, G=1, H=1, K=2, V=2, L=3)
    one_level = shape._replace(L=1)
    inputs = make_inputs("mamba2", shape, torch.float32, device)
    strided = FenwickState(
        torch.zeros(1, 3, 1, 2, 4, device=device)[..., ::2], torch.zeros(1, dtype=int, device=device)
    )
    cases = {
        "float64": (inputs.to(torch.float64), start(shape, [3], device=device)),
        "pending decay of the only level": (
            make_inputs("mamba2", one_level, torch.float32, device),
            start(one_level, [3], True, torch.float32, device),
        ),
        "state that is not contiguous": (inputs, strided),
    }  # fmt: skip
    for reason, (given, state) in cases.items():
        exact, after = exactly(given, state)
        assert_close(steps(given, state, "triton"), exact, 2e-6, reason)
        assert_close(state.settled().buckets, after.buckets, 2e-6, reason)
        assert f"{reason}: torch takes this step" in caplog.text


def test_backends_of_a_step():
    inputs = make_inputs("mamba2", Shape(B=1, T=1, G=1, H=1, K=2, V=2, L=3), torch.float32, "meta").step(0)
    state = FenwickState.zeros(1, 3, 1, 2, 2, device="meta")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'triton', got 'reference'"):
        log_linear_attention_step(**inputs, state=state, backend="reference")


@on_kernels
@pytest.mark.parametrize(("mixer", "pending"), [("mamba2", True), ("gated_deltanet", False)])
def test_kernel_is_an_operator(mixer, pending, device):
    """With a fake, and true about what it writes."""
    from loglinear.ops.triton.step import _step_op

    shape = Shape(B=2, T=1, G=1, H=1, K=4, V=4, L=5)
    inputs, state = (
        make_inputs(mixer, shape, torch.float32, device),
        start(shape, [3, 4], pending, torch.float32, device),
    )
    arguments = (*inputs.step(0).values(), state.buckets, state.positions, state.log_decays, 0.7)
    torch.library.opcheck(_step_op, arguments, test_utils=("test_schema", "test_faketensor"))


@on_kernels
def test_autograd_is_told_of_what_the_kernel_writes(device):
    """A gradient that needs what a step has overwritten is refused, not wrong."""
    shape = Shape(B=1, T=1, G=1, H=1, K=4, V=4, L=5)
    inputs, state = make_inputs("mamba2", shape, torch.float32, device), start(shape, [3], True, torch.float32, device)
    weight = torch.ones_like(state.buckets, requires_grad=True)
    product = (weight * state.buckets).sum()
    with torch.no_grad():
        steps(inputs, state, "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@on_kernels
def test_steps_in_inference_mode(device):
    shape = Shape(B=1, T=2, G=1, H=1, K=4, V=4, L=5)
    inputs = make_inputs("mamba2", shape, torch.float32, device)
    begin = start(shape, [3], True, torch.float32, device)
    wanted = steps(inputs, begin.clone(), "triton")
    with torch.inference_mode():
        assert torch.equal(steps(inputs, begin.clone(), "triton"), wanted)


@on_kernels
@pytest.mark.parametrize(("mixer", "pending"), [("mamba2", True), ("gated_deltanet", False)])
def test_a_compiled_step_is_one_graph(mixer, pending, device):
    shape = Shape(B=2, T=3, G=1, H=1, K=4, V=4, L=5)
    inputs = make_inputs(mixer, shape, torch.float32, device)
    eager = start(shape, [3, 4], pending, torch.float32, device)
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
    for mine, theirs in zip(compiled, eager, strict=True):
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize(("mixer", "pending"), [("mamba2", False), ("mamba2", True), ("gated_deltanet", False)])
@pytest.mark.parametrize("B", [1, 40])
def test_captured_steps_of_a_real_shape(mixer, pending, B):
    """Thousands of programs that race for one counter, replayed from a graph; the same tokens on torch in float64."""
    shape = Shape(B=B, T=1, G=1 if mixer == "mamba2" else 32, H=32, K=128, V=128, L=12)
    state = start(shape, torch.randint(0, 3000, (B,)).tolist(), pending, torch.float32, "cuda")
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
    assert_close(state.settled().buckets, exact.buckets, 1e-5, "state")
    assert torch.equal(state.positions, exact.positions)


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
