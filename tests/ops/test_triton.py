"""The Triton kernels against the fp64 reference: through the interpreter on small shapes, and on a GPU on real ones."""

import logging

import pytest
import torch

from loglinear import fenwick, log_linear_attention
from loglinear.ops import reference
from operator_cases import TOLERANCES, Shape, assert_close, compare, make_inputs, poisoned

pytest.importorskip("triton")
from loglinear.ops.triton import scalar

needs_interpreter = pytest.mark.skipif(not scalar.INTERPRETED, reason="kernels are not interpreted here")
CHUNK = scalar.CHUNK


def kernels(cu_seqlens=None):
    def run(inputs, state):
        o, _ = log_linear_attention(**inputs.arguments(), scale=0.7, cu_seqlens=cu_seqlens, backend="triton")
        return o, None

    return run


def tree(cu_seqlens=None):
    """The torch backend, itself held to the recurrence elsewhere, where the recurrence would take minutes."""

    def run(inputs, state):
        o, _ = log_linear_attention(**inputs.arguments(), scale=0.7, cu_seqlens=cu_seqlens, backend="torch")
        return o, None

    return run


INTERPRETED = [
    Shape(B=1, T=1, G=1, H=1, K=16, V=16, L=1),
    Shape(B=2, T=15, G=1, H=2, K=16, V=16, L=5),
    Shape(B=1, T=97, G=1, H=2, K=20, V=12, L=None),  # widths that are padded inside
    Shape(B=1, T=129, G=2, H=4, K=16, V=16, L=9),  # one past a power of two: full
    Shape(B=1, T=113, G=1, H=3, K=16, V=16, L=3),  # capped inside a chunk
    Shape(B=1, T=145, G=1, H=1, K=16, V=16, L=7),  # capped above the first height
    Shape(B=1, T=40, G=1, H=1, K=80, V=80, L=12),  # more levels than needed, states of several tiles
]


@needs_interpreter
@pytest.mark.parametrize("shape", INTERPRETED)
@pytest.mark.parametrize("mixer", ["linear_attention", "mamba2"])
def test_interpreted(mixer, shape):
    inputs = make_inputs(mixer, shape, torch.float32).map(poisoned)
    compare(kernels(), tree(), inputs, returns_state=False)


@needs_interpreter
def test_interpreted_packed():
    lengths = [0, 40, 1, 0, 17, 16, 3]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make_inputs("mamba2", Shape(B=1, T=sum(lengths), G=1, H=2, K=16, V=16, L=6), torch.float32)
    compare(kernels(bounds), tree(bounds), inputs, returns_state=False)


@needs_interpreter
def test_interpreted_strong_decay():
    """Decays down to e^-100 a chunk."""
    shape = Shape(B=1, T=70, G=1, H=2, K=16, V=16, L=8)
    inputs = make_inputs("mamba2", shape, torch.float32, decay=200 / CHUNK)
    compare(kernels(), tree(), inputs, returns_state=False)


@needs_interpreter
@pytest.mark.parametrize("reset", [-1e4, -1e30, -torch.inf])
def test_interpreted_reset(reset):
    """A decay of zero in the middle of a chunk forgets everything before it, and nothing after it."""
    inputs = make_inputs("mamba2", Shape(B=1, T=70, G=1, H=2, K=16, V=16, L=8), torch.float32)
    inputs.log_decay[:, 37] = reset
    o, _ = kernels()(inputs, None)
    after, _ = reference.log_linear_attention_recurrent(
        *inputs.to(torch.float64).values()[:4], log_decay=inputs.log_decay.double(), beta=None, scale=0.7,
        cu_seqlens=None, initial_state=None, return_state=False,
    )[:2]  # fmt: skip
    assert_close(o, after, 2e-5, "o")  # sums of about 126 to 24 bits
    torch_o, _ = tree()(inputs.to(torch.float64), None)
    assert_close(torch_o, after, 1e-11, "o of the torch backend")


def test_slots_name_every_node_once():
    """Each chunk finds, in the slots it reads, exactly the chunks before it."""
    lengths = [5, 0, 11, 1]
    bounds = torch.tensor([0, *(n * CHUNK for n in lengths)]).cumsum(0)
    for num_levels in (1, fenwick.chunk_height(CHUNK) + 3, fenwick.chunk_height(CHUNK) + 9):
        slots = fenwick.slots(bounds, sum(lengths) + 3, CHUNK, num_levels)
        assert slots.rows.tolist() == [CHUNK] * sum(lengths) + [0] * 3
        for slot, block in enumerate(slots.block.tolist()[: sum(lengths)]):
            covered, rest = [], block
            for _ in range(int(slots.reads[slot])):
                height = int(slots.height[slot - block + rest - 1])
                first = 0 if height == slots.cap else rest - 2**height
                covered.extend(range(first, rest))
                rest = fenwick.drop_lowest_bit(rest)
            assert sorted(covered) == list(range(block))


# ----------------------------------------------------------------------------------------------------
# On a GPU
# ----------------------------------------------------------------------------------------------------

ON_GPU = [
    Shape(B=1, T=1, G=1, H=1, K=16, V=16, L=1),
    Shape(B=2, T=63, G=1, H=4, K=64, V=64, L=7),
    Shape(B=2, T=65, G=2, H=4, K=128, V=64, L=8),
    Shape(B=1, T=1023, G=1, H=4, K=128, V=64, L=11),
    Shape(B=1, T=1024, G=4, H=4, K=64, V=128, L=11),
    Shape(B=1, T=1025, G=1, H=4, K=128, V=128, L=12),
    Shape(B=3, T=777, G=1, H=6, K=96, V=80, L=None),
    Shape(B=2, T=2048, G=1, H=3, K=128, V=64, L=5),
    Shape(B=2, T=1500, G=1, H=48, K=128, V=64, L=9),
    Shape(B=1, T=20_001, G=1, H=2, K=128, V=64, L=16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", ON_GPU)
def test_on_gpu(shape, dtype):
    inputs = make_inputs("mamba2", shape, dtype, "cuda", decay=0.1)
    inputs.level_scales = None if inputs.level_scales is None else inputs.level_scales.float()
    inputs.log_decay = inputs.log_decay.float()
    on_device(inputs)


def on_device(inputs, cu_seqlens=None):
    """`compare`, with the float64 side on the GPU too."""
    reference = inputs.map(lambda x: x.double().detach().requires_grad_())
    run = inputs.map(lambda x: x.detach().requires_grad_())
    got, _ = kernels(cu_seqlens)(run, None)
    wanted, _ = tree(cu_seqlens)(reference, None)
    cotangent = torch.randn_like(got)
    found = torch.autograd.grad(got, list(run.present().values()), cotangent)
    true = torch.autograd.grad(wanted, list(reference.present().values()), cotangent.double())
    tolerance = TOLERANCES[inputs.v.dtype]
    assert_close(got, wanted, tolerance.forward, "o")
    for name, a, b in zip(run.present(), found, true, strict=True):
        assert_close(a, b, tolerance.gradient, f"gradient of {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["linear_attention", "mamba2"])
def test_packed_among_nan_on_gpu(mixer):
    lengths = [0, 700, 1, 64, 0, 63, 129, 2048, 5]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    shape = Shape(B=1, T=sum(lengths), G=1, H=4, K=128, V=64, L=9)
    on_device(make_inputs(mixer, shape, torch.bfloat16, "cuda").map(poisoned), bounds)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [1e-6, 100 / 32])
def test_extreme_decays_on_gpu(decay):
    shape = Shape(B=1, T=3000, G=1, H=4, K=128, V=64, L=13)
    inputs = make_inputs("mamba2", shape, torch.bfloat16, "cuda", decay=decay)
    inputs.log_decay = inputs.log_decay.float()
    on_device(inputs)


@pytest.mark.gpu
def test_same_bits_compiled_and_in_a_graph():
    inputs = make_inputs("mamba2", Shape(B=2, T=1000, G=1, H=4, K=128, V=64, L=11), torch.bfloat16, "cuda")

    def run(inputs):
        o, _ = log_linear_attention(**inputs.arguments(), backend="triton")
        return o, *torch.autograd.grad(o.float().square().sum(), list(inputs.present().values()))

    leaves = inputs.leaves()
    first, second = run(leaves), run(leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    compiled = torch.compile(lambda x: log_linear_attention(**x.arguments(), backend="triton")[0], fullgraph=True)
    assert torch.equal(compiled(leaves), first[0])

    plain = inputs.map(lambda x: x.detach())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = log_linear_attention(**plain.arguments(), backend="triton")
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, first[0])


def test_what_no_kernel_covers_goes_to_torch(caplog):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not scalar.INTERPRETED:
        pytest.skip("no GPU, no interpreter")
    inputs = make_inputs("gated_deltanet", Shape(B=1, T=20, G=1, H=1, K=16, V=16, L=5), torch.float32, device)
    with caplog.at_level(logging.DEBUG, logger="loglinear"):
        o, _ = log_linear_attention(**inputs.arguments(), backend="triton")
    assert "delta rule" in caplog.text
    assert torch.equal(o, log_linear_attention(**inputs.arguments(), backend="torch")[0])


@pytest.mark.parametrize("tokens", [65_535 * CHUNK, 65_535 * CHUNK + 1])
def test_calls_too_long_for_a_launch_are_left_to_torch(tokens):
    q, v = torch.empty(1, tokens, 1, 16, device="meta"), torch.empty(1, tokens, 2, 16, device="meta")
    reason = scalar.unsupported(q, v, None, None, None, None, False)
    assert (reason is None) == (tokens == 65_535 * CHUNK)
