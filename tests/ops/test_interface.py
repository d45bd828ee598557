"""The door: what is refused and how, dtypes, autocast, compilation, unusual but valid inputs."""

import importlib.util
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loglinear import FenwickState, fenwick, log_linear_attention, log_linear_attention_step
from loglinear.ops import chunked, packing
from operator_cases import MIXERS, TOLERANCES, Shape, assert_close, make_inputs, random_state

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_mixer = pytest.mark.parametrize("mixer", MIXERS)
each_backend = pytest.mark.parametrize("backend", ["torch", "reference"])
SHAPE = Shape(B=2, T=6, G=2, H=4, K=3, V=5, L=4)

# ----------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


REFUSED = {
    "q no tensor": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q int": ({"q": zeros(2, 6, 2, 3, dtype=torch.int64)}, TypeError, "q must be float64, .*got torch.int64"),
    "q complex": ({"q": zeros(2, 6, 2, 3, dtype=torch.complex64)}, TypeError, "q must be .*got torch.complex64"),
    "beta int": ({"beta": zeros(2, 6, 4, dtype=torch.int32)}, TypeError, "beta must be float64, .*got torch.int32"),
    "two dtypes": ({"v": zeros(2, 6, 4, 5, dtype=torch.float64)}, TypeError, "one dtype, got torch.float32, "),
    "two devices": ({"v": zeros(2, 6, 4, 5, device="meta")}, ValueError, "v is on meta, q on cpu"),
    "q 3-dimensional": ({"q": zeros(2, 6, 3)}, ValueError, r"q must be \[B, T, G, K\], got shape \[2, 6, 3\]"),
    "k not as q": ({"k": zeros(2, 6, 2, 4)}, ValueError, r"one shape .* got \[2, 6, 2, 3\] and \[2, 6, 2, 4\]"),
    "v of other length": ({"v": zeros(2, 5, 4, 5)}, ValueError, r"leading sizes \[2, 6\] of q, got \[2, 5, 4, 5\]"),
    "no token": (
        {"q": zeros(2, 0, 2, 3), "k": zeros(2, 0, 2, 3), "v": zeros(2, 0, 4, 5)},
        ValueError,
        r"at least one token, got shape \[2, 0, 2, 3\]",
    ),
    "no key": ({"q": zeros(2, 6, 2, 0), "k": zeros(2, 6, 2, 0)}, ValueError, "K must be at least 1"),
    "no head": ({"v": zeros(2, 6, 0, 5)}, ValueError, "H must be at least 1"),
    "groups": ({"v": zeros(2, 6, 3, 5)}, ValueError, "must divide the number of heads, got G = 2 and H = 3"),
    "scales of other heads": (
        {"level_scales": zeros(2, 6, 2, 4)},
        ValueError,
        r"level_scales must be \[B, T, H, L\] = \[2, 6, 4\] \+ \[L ≥ 1\], got shape \[2, 6, 2, 4\]",
    ),
    "no level": ({"level_scales": zeros(2, 6, 4, 0)}, ValueError, r"L ≥ 1.*got shape \[2, 6, 4, 0\]"),
    "decay per group": (
        {"log_decay": zeros(2, 6, 2)},
        ValueError,
        r"\[B, T, H\] = \[2, 6, 4\] or \[B, T, H, K\] = \[2, 6, 4, 3\], got shape \[2, 6, 2\]",
    ),
    "decay per value": ({"log_decay": zeros(2, 6, 4, 5)}, ValueError, r"got shape \[2, 6, 4, 5\]"),
    "beta": ({"beta": zeros(2, 6, 4, 1)}, ValueError, r"\[B, T, H\] = \[2, 6, 4\], got shape \[2, 6, 4, 1\]"),
    "backend": ({"backend": "cuda"}, ValueError, "'auto', 'reference', 'torch', 'triton', got 'cuda'"),
    "state is a tuple": ({"initial_state": (1, 2)}, TypeError, "must be a FenwickState, got tuple"),
    "state of other levels": (
        {"initial_state": FenwickState.zeros(2, 5, 4, 3, 5)},
        ValueError,
        r"\[rows, L, H, K, V\] = \[2, 4, 4, 3, 5\], got \[2, 5, 4, 3, 5\]",
    ),
    "state of other rows": ({"initial_state": FenwickState.zeros(1, 4, 4, 3, 5)}, ValueError, r"got \[1, 4, 4, 3, 5\]"),
    "state of ints": (
        {"initial_state": FenwickState(zeros(2, 4, 4, 3, 5, dtype=torch.int64), zeros(2, dtype=torch.int64))},
        TypeError,
        "buckets must be floating point, got torch.int64",
    ),
    "positions of int32": (
        {"initial_state": FenwickState(zeros(2, 4, 4, 3, 5), zeros(2, dtype=torch.int32))},
        TypeError,
        "positions must be int64, got torch.int32",
    ),
    "one position": (
        {"initial_state": FenwickState(zeros(2, 4, 4, 3, 5), zeros(1, dtype=torch.int64))},
        ValueError,
        r"positions must be \[rows\] = \[2\], got \[1\]",
    ),
    "state elsewhere": (
        {"initial_state": FenwickState(zeros(2, 4, 4, 3, 5, device="meta"), zeros(2, dtype=torch.int64))},
        ValueError,
        "buckets are on meta, q on cpu",
    ),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "need a batch of 1, got 2"),
    "scale": ({"scale": "big"}, TypeError, "scale must be a number, got str"),
    "negative position": (
        {"initial_state": FenwickState(zeros(2, 4, 4, 3, 5), torch.tensor([3, -1]))},
        ValueError,
        r"positions must be at least 0 and below \d+, got \[3, -1\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@each_backend
def test_refused(case, backend):
    changes, error, message = REFUSED[case]
    arguments = {
        "q": zeros(2, 6, 2, 3), "k": zeros(2, 6, 2, 3), "v": zeros(2, 6, 4, 5), "level_scales": zeros(2, 6, 4, 4),
        "backend": backend,
    } | changes  # fmt: skip
    with pytest.raises(error, match=message):
        log_linear_attention(**arguments)


@pytest.mark.parametrize(
    "cu_seqlens, error, message",
    [
        ([0, 6], TypeError, "cu_seqlens must be an int32 or int64 tensor, got list"),
        (torch.tensor([0.0, 6.0]), TypeError, "must be int32 or int64, got torch.float32"),
        (torch.tensor([0]), ValueError, r"number of sequences \+ 1\], got shape \[1\]"),
        (torch.tensor([[0, 6]]), ValueError, r"got shape \[1, 2\]"),
        (torch.tensor([1, 6]), ValueError, r"must rise from 0 to the 6 tokens, got \[1, 6\]"),
        (torch.tensor([0, 5]), ValueError, r"got \[0, 5\]"),
        (torch.tensor([0, 7]), ValueError, r"got \[0, 7\]"),
        (torch.tensor([0, 4, 3, 6]), ValueError, r"got \[0, 4, 3, 6\]"),
        (torch.tensor([0, -1, 6]), ValueError, r"got \[0, -1, 6\]"),
        (torch.tensor([0, *range(40), 6]), ValueError, r"got \[0, 0, 1, 2, 3, 4, …, 36, 37, 38, 39, 6\]"),
        (torch.tensor([0, 6], device="meta"), ValueError, "cu_seqlens is on meta, q on cpu"),
    ],
    ids=lambda value: str(value.tolist() if isinstance(value, torch.Tensor) and not value.is_meta else "")[:20] or None,
)
@each_backend
def test_packing_refused(cu_seqlens, error, message, backend):
    inputs = make_inputs("mamba2", SHAPE._replace(B=1))
    with pytest.raises(error, match=message):
        log_linear_attention(**inputs.arguments(), cu_seqlens=cu_seqlens, backend=backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_triton_without_a_gpu_is_refused(monkeypatch):
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr("loglinear.ops.triton.scalar.INTERPRETED", False)
    with pytest.raises((RuntimeError, ValueError), match="backend='triton'"):
        log_linear_attention(**make_inputs("mamba2", SHAPE, torch.float32).arguments(), backend="triton")


# ----------------------------------------------------------------------------------------------------
# What is accepted
# ----------------------------------------------------------------------------------------------------


@each_backend
def test_state_only_where_one_is_asked_for(backend):
    arguments = make_inputs("mamba2", SHAPE).arguments()
    assert log_linear_attention(**arguments, backend=backend)[1] is None
    _, state = log_linear_attention(**arguments, backend=backend, return_state=True)
    assert isinstance(state, FenwickState)
    assert state.buckets.shape == (2, 4, 4, 3, 5) and state.positions.tolist() == [6, 6]
    assert state.buckets.is_contiguous() and state.positions.dtype == torch.int64


@each_backend
def test_the_state_that_came_in_stays_as_it_is(backend):
    state = random_state(SHAPE, [5, 0])
    before = state.clone()
    log_linear_attention(
        **make_inputs("gated_deltanet", SHAPE).arguments(), initial_state=state, return_state=True, backend=backend
    )
    assert torch.equal(state.buckets.nan_to_num(), before.buckets.nan_to_num())
    assert torch.equal(state.positions, before.positions)


@each_mixer
@each_backend
@pytest.mark.parametrize("return_state", [False, True])
def test_no_rows(mixer, backend, return_state):
    inputs = make_inputs(mixer, SHAPE._replace(B=0)).leaves()
    o, state = log_linear_attention(**inputs.arguments(), return_state=return_state, backend=backend)
    assert o.shape == (0, 6, 4, 5)
    if state is not None:
        assert state.buckets.shape == (0, 4, 4, 3, 5) and state.positions.shape == (0,)
    named = inputs.present()
    found = torch.autograd.grad(o.sum(), list(named.values()), materialize_grads=True)
    assert [x.shape for x in found] == [x.shape for x in named.values()]


@each_mixer
def test_many_more_levels_than_needed(mixer):
    inputs = make_inputs(mixer, SHAPE._replace(L=200))
    o, state = log_linear_attention(**inputs.arguments(), return_state=True)
    expected, _ = log_linear_attention(**inputs.arguments(), backend="reference")
    assert_close(o, expected, 1e-13, "o")
    assert state is not None and state.num_levels == 200


@each_mixer
@each_backend
def test_inputs_that_are_expanded(mixer, backend):
    """Stride 0, as from one decay for all tokens."""
    shape = Shape(B=2, T=70, G=1, H=2, K=3, V=2, L=8)
    inputs = make_inputs(mixer, shape).map(lambda x: x[:1, :1].expand(2, 70, *x.shape[2:]))
    o, _ = log_linear_attention(**inputs.arguments(), backend=backend)
    expected, _ = log_linear_attention(**inputs.map(torch.Tensor.contiguous).arguments(), backend="reference")
    assert_close(o, expected, 1e-13, "o")


@each_mixer
def test_scales_decays_and_betas_of_other_dtypes(mixer):
    """They need not have the dtype of q, k and v; every gradient has the dtype of what it belongs to."""
    shape = Shape(B=1, T=70, G=1, H=2, K=8, V=4, L=8)
    inputs = make_inputs(mixer, shape, torch.bfloat16)
    assert inputs.level_scales is not None
    inputs.level_scales = inputs.level_scales.half()
    inputs.log_decay = None if inputs.log_decay is None else inputs.log_decay.double()
    inputs.beta = None if inputs.beta is None else inputs.beta.float()
    inputs = inputs.leaves()
    buckets = torch.zeros(1, 8, 2, 8, 4, dtype=torch.bfloat16).requires_grad_()
    state = FenwickState(buckets, torch.tensor([4]))
    o, after = log_linear_attention(**inputs.arguments(), initial_state=state, return_state=True, backend="torch")
    assert o.dtype == torch.bfloat16
    assert after is not None and after.buckets.dtype == torch.float32
    (o.float().sum() + after.buckets.sum()).backward()
    for name, x in (inputs.present() | {"buckets": buckets}).items():
        assert x.grad is not None and x.grad.dtype == x.dtype, name
        assert x.grad.any(), name
    expected, _ = log_linear_attention(
        **inputs.to(torch.float64).arguments(), initial_state=state.detach(), backend="reference"
    )
    assert_close(o, expected, TOLERANCES[torch.bfloat16].forward, "o")


def test_what_overflows_float16_is_infinite_not_wrong():
    inputs = make_inputs("mamba2", SHAPE, torch.float16)
    inputs.v = torch.full_like(inputs.v, 6e4)
    inputs.q = inputs.k = torch.full_like(inputs.q, 0.5)
    inputs.level_scales = torch.full((*inputs.v.shape[:3], 4), 100.0)
    o, state = log_linear_attention(**inputs.arguments(), return_state=True)
    assert o.isinf().all()
    assert state is not None and state.buckets.isfinite().all()


@each_device
@each_mixer
def test_autocast(mixer, device):
    """q, k and v are cast; everything else keeps its precision, and nothing inside is cast again."""
    shape = Shape(B=1, T=70, G=1, H=2, K=8, V=6, L=8)
    inputs = make_inputs(mixer, shape, torch.float32, device).leaves()
    with torch.autocast(device, torch.bfloat16):
        o, _ = log_linear_attention(**inputs.arguments(), backend="torch")
    assert o.dtype == torch.bfloat16
    rounded = {name: x.detach() for name, x in inputs.present().items()}
    rounded |= {name: rounded[name].bfloat16().float() for name in ("q", "k", "v")}
    expected, _ = log_linear_attention(**rounded, backend="torch")
    assert_close(o, expected, TOLERANCES[torch.bfloat16].forward, "o")
    o.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs.present().values())


@each_device
@each_mixer
@pytest.mark.parametrize("tokens", [60, 300])  # one chunk, and several
def test_backward_inside_autocast(mixer, device, tokens):
    """What is ours computes as outside; the products between are torch's, which take the dtype of autocast."""
    shape = Shape(B=1, T=tokens, G=1, H=2, K=8, V=6, L=10)
    drawn, found = make_inputs(mixer, shape, torch.float32, device), []
    for inside in (False, True):
        inputs = drawn.leaves()
        with torch.autocast(device, torch.bfloat16):
            total = log_linear_attention(**inputs.arguments())[0].float().square().sum()
            if inside:
                total.backward()
        if not inside:
            total.backward()
        found.append({name: x.grad for name, x in inputs.present().items()})
    for name, expected in found[0].items():
        assert expected is not None and found[1][name] is not None
        assert_close(found[1][name], expected, 3e-2, f"gradient of {name}")


def test_autocast_leaves_float64_alone():
    inputs = make_inputs("mamba2", SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        assert log_linear_attention(**inputs.arguments())[0].dtype == torch.float64


def test_plan_made_in_inference_mode_serves_training():
    """Plans are cached: one that is built where tensors are inference tensors must not spoil a later gradient."""
    shape = Shape(B=1, T=83, G=1, H=1, K=2, V=2, L=8)  # lengths that no other test uses
    inputs = make_inputs("gated_deltanet", shape)
    cu_seqlens = torch.tensor([0, 13, 13, 83])
    with torch.inference_mode():
        first, _ = log_linear_attention(**inputs.arguments(), cu_seqlens=cu_seqlens)
    leaves = inputs.leaves()
    again, _ = log_linear_attention(**leaves.arguments(), cu_seqlens=cu_seqlens)
    assert torch.equal(again, first)
    again.sum().backward()


def test_fake_tensors_have_shapes_and_leave_no_trace():
    """In a mode of fake tensors only shapes are worked out, and a later call finds no fake plan in the cache."""
    shape = Shape(B=1, T=91, G=1, H=2, K=2, V=3, L=8)  # a length that no other test uses
    with FakeTensorMode() as mode:
        fake = make_inputs("mamba2", shape).map(mode.from_tensor)
        o, state = log_linear_attention(**fake.arguments(), return_state=True, backend="torch")
        assert o.shape == (1, 91, 2, 3)
        assert state is not None and state.buckets.shape == (1, 8, 2, 2, 3)
    o, _ = log_linear_attention(**make_inputs("mamba2", shape).arguments(), backend="torch")
    assert o.isfinite().all()


def test_meta_tensors_have_shapes():
    inputs = make_inputs("kda", SHAPE, device="meta")
    o, state = log_linear_attention(**inputs.arguments(), return_state=True)
    assert o.is_meta and o.shape == (2, 6, 4, 5)
    assert state is not None and state.buckets.shape == (2, 4, 4, 3, 5)


def test_function_transforms_are_refused():
    inputs = make_inputs("mamba2", Shape(B=1, T=70, G=1, H=1, K=2, V=2, L=8))
    arguments = inputs.arguments()
    with pytest.raises(RuntimeError, match="autograd.Function"):
        torch.func.grad(lambda q: log_linear_attention(**(arguments | {"q": q}))[0].sum())(inputs.q)


# ----------------------------------------------------------------------------------------------------
# Compilation
# ----------------------------------------------------------------------------------------------------


def run_with_gradients(function, inputs, state, cu_seqlens):
    leaves = inputs.leaves()
    named = leaves.present()
    if state is not None:
        state = FenwickState(state.buckets.detach().requires_grad_(), state.positions)
        named |= {"buckets": state.buckets}
    o, after = function(leaves.arguments(), state, cu_seqlens)
    outputs = [o] if after is None else [o, after.buckets]
    found = torch.autograd.grad([x.square().sum() for x in outputs], list(named.values()))
    return outputs, dict(zip(named, found, strict=True))


@each_mixer
@pytest.mark.parametrize("form", ["whole", "state", "packed"])
def test_compiled(mixer, form):
    """One graph, forward and backward, equal to what runs without a compiler."""
    shape = Shape(B=1 if form == "packed" else 2, T=70, G=1, H=2, K=4, V=3, L=8)
    inputs = make_inputs(mixer, shape)
    cu_seqlens = torch.tensor([0, 1, 30, 70]) if form == "packed" else None
    state = None if form == "whole" else random_state(shape, [0, 6, 9] if form == "packed" else [13, 64])

    def call(arguments, state, cu_seqlens):
        return log_linear_attention(
            **arguments, initial_state=state, cu_seqlens=cu_seqlens, return_state=form != "whole", backend="torch"
        )

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    outputs, found = run_with_gradients(compiled, inputs, state, cu_seqlens)
    expected_outputs, expected = run_with_gradients(call, inputs, state, cu_seqlens)
    for got, wanted in zip(outputs, expected_outputs, strict=True):
        assert_close(got, wanted, 1e-13, "output")
    for name in expected:
        assert_close(found[name], expected[name], 1e-12, f"gradient of {name}")


def opaque_arguments(mixer, return_state, packed):
    shape = Shape(B=1, T=9, G=1, H=2, K=3, V=2, L=5)
    inputs, rows = make_inputs(mixer, shape).leaves(), [6, 0] if packed else [6]
    state = random_state(shape, rows)
    cu_seqlens = torch.tensor([0, 4, 9]) if packed else None
    buckets = state.buckets.nan_to_num().requires_grad_()
    return (*inputs.values(), 0.7, cu_seqlens, buckets, state.positions, return_state)


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("mixer", ["linear_attention", "kda"])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_a_well_formed_operator(mixer, return_state, packed):
    torch.library.opcheck(chunked._forward_op, opaque_arguments(mixer, return_state, packed))


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("mixer", ["linear_attention", "kda"])
def test_backward_is_a_well_formed_operator(mixer, return_state):
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in opaque_arguments(mixer, return_state, True)]
    o, buckets, _ = chunked._forward_op(*arguments)
    grads = torch.randn_like(o), torch.randn_like(buckets) if return_state else None
    torch.library.opcheck(chunked.tree_attention_backward, (*grads, *arguments[:-1]))


# ----------------------------------------------------------------------------------------------------
# Growth
# ----------------------------------------------------------------------------------------------------


def saved_bytes(mixer: str, tokens: int) -> int:
    """Bytes of distinct memory that the graph keeps for the backward."""
    shape = Shape(B=1, T=tokens, G=1, H=2, K=16, V=16, L=fenwick.full_num_levels(tokens))
    inputs, storages = make_inputs(mixer, shape, torch.float32).leaves(), {}

    def keep(x):
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o, _ = log_linear_attention(**inputs.arguments(), backend="torch")
    for x in inputs.present().values():
        storages.pop(x.untyped_storage().data_ptr(), None)  # the inputs themselves (their L grows with T)
    assert o.requires_grad
    return sum(storages.values())


@each_mixer
def test_memory_grows_with_the_length(mixer):
    """Four times the tokens, two levels more: keeping something for every level would add 2/8 to the ratio of 4."""
    assert saved_bytes(mixer, 16_384) <= 4.1 * saved_bytes(mixer, 4_096)


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_work_grows_with_the_length_times_its_log(mixer):
    """Floating-point operations of matrix products, forward and backward, per token: one more level, one more step."""
    from torch.utils.flop_counter import FlopCounterMode

    per_token = []
    for tokens in (1024, 2048, 4096, 8192):
        shape = Shape(B=1, T=tokens, G=1, H=1, K=8, V=8, L=fenwick.full_num_levels(tokens))
        inputs = make_inputs(mixer, shape, torch.float32).leaves()
        with FlopCounterMode(display=False) as counter:
            log_linear_attention(**inputs.arguments(), backend="torch")[0].sum().backward()
        per_token.append(counter.get_total_flops() / tokens)
    steps = [b - a for a, b in itertools.pairwise(per_token)]
    assert all(step > 0 for step in steps)
    assert max(steps) <= 1.1 * min(steps)  # every doubling adds the same: O(log T) per token
    assert per_token[-1] < 1.5 * per_token[0]


# ----------------------------------------------------------------------------------------------------
# What is refused even where something else is lenient
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_autocast_does_not_let_other_dtypes_in(dtype):
    inputs = make_inputs("mamba2", Shape(B=1, T=5, G=1, H=1, K=4, V=4, L=3), torch.float32)
    inputs.q = inputs.q.to(dtype)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="q must be float64"):
        log_linear_attention(**inputs.arguments())


def test_sparse_tensors_are_refused():
    inputs = make_inputs("mamba2", Shape(B=1, T=5, G=1, H=1, K=4, V=4, L=3), torch.float32)
    inputs.v = inputs.v.to_sparse()
    with pytest.raises(TypeError, match="v must be a dense tensor"):
        log_linear_attention(**inputs.arguments())


@pytest.mark.parametrize(
    ("name", "value"), [("buckets", [1.0]), ("positions", [0]), ("positions", None), ("positions", 0)]
)
def test_a_state_of_other_things_is_refused(name, value):
    shape = Shape(B=1, T=5, G=1, H=1, K=4, V=4, L=3)
    state = random_state(shape, [0], torch.float32)._replace(**{name: value})
    inputs = make_inputs("mamba2", shape, torch.float32)
    with pytest.raises(TypeError, match=f"the state's {name} must be a tensor"):
        log_linear_attention(**inputs.arguments(), initial_state=state)
    with pytest.raises(TypeError, match=f"the state's {name} must be a tensor"):
        log_linear_attention_step(**inputs.step(0), state=state)


def test_positions_too_large_to_count_from_are_refused():
    shape = Shape(B=1, T=5, G=1, H=1, K=4, V=4, L=3)
    state = random_state(shape, [2**63 - 3], torch.float32)
    with pytest.raises(ValueError, match="below"):
        log_linear_attention(**make_inputs("mamba2", shape, torch.float32).arguments(), initial_state=state)


def test_a_step_refuses_a_state_it_cannot_write_before_it_changes_anything():
    shape = Shape(B=2, T=1, G=1, H=1, K=4, V=4, L=3)
    inputs = make_inputs("mamba2", shape, torch.float32)
    expanded = FenwickState(torch.zeros(1, 3, 1, 4, 4).expand(2, -1, -1, -1, -1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="share memory"):
        log_linear_attention_step(**inputs.step(0), state=expanded)
    with torch.inference_mode():
        made = FenwickState.zeros(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="inference mode"):
        log_linear_attention_step(**inputs.step(0), state=made)
    assert expanded.positions.tolist() == made.positions.tolist() == [0, 0]


def test_bounds_changed_behind_torchs_back_are_seen():
    inputs = make_inputs("mamba2", Shape(B=1, T=10, G=1, H=1, K=4, V=4, L=5))
    bounds = torch.tensor([0, 5, 10])
    first, _ = log_linear_attention(**inputs.arguments(), cu_seqlens=bounds)
    bounds.data[1] = 3
    second, _ = log_linear_attention(**inputs.arguments(), cu_seqlens=bounds)
    wanted, _ = log_linear_attention(**inputs.arguments(), cu_seqlens=torch.tensor([0, 3, 10]))
    assert torch.equal(second, wanted)
    assert not torch.equal(first, second)


def test_bounds_that_the_host_was_told():
    """They are not read back, are checked all the same, and are forgotten when the tensor is written to."""
    bounds = torch.tensor([0, 3, 5])
    packing.remember_bounds(bounds, [0, 4, 5])  # not what it holds, so as to see which of them is believed
    assert packing.sequence_bounds(bounds, 5) == [0, 4, 5]
    packing.sequence_bounds(bounds, 5).append(9)  # nobody else's list
    packing.check_bounds(bounds, 5)
    for check in (packing.sequence_bounds, packing.check_bounds):
        with pytest.raises(ValueError, match=r"rise from 0 to the 6 tokens, got \[0, 4, 5\]"):
            check(bounds, 6)
    bounds[1] = 2
    assert packing.sequence_bounds(bounds, 5) == [0, 2, 5]
    with torch.inference_mode():  # which counts no writes
        silent = torch.tensor([0, 3, 5])
        packing.remember_bounds(silent, [0, 4, 5])
        assert packing.sequence_bounds(silent, 5) == [0, 3, 5]
