"""The Triton kernels against the fp64 reference: through the interpreter on small shapes, and on a GPU on real ones."""

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loglinear import FenwickState, fenwick, log_linear_attention
from loglinear.ops import reference
from operator_cases import (
    TOLERANCES,
    Shape,
    assert_close,
    compare,
    gradients,
    make_inputs,
    poisoned,
    random_state,
    same_without_pipelining,
    with_buckets,
    with_strong_decays,
)

pytest.importorskip("triton")
from loglinear.ops.packing import unchanging_bounds
from loglinear.ops.triton import scalar

needs_interpreter = pytest.mark.skipif(not scalar.INTERPRETED, reason="kernels are not interpreted here")
# Every test of what happens before a kernel runs: through the interpreter, and on a GPU.
each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu", marks=pytest.mark.skipif(not scalar.INTERPRETED, reason="kernels are not interpreted here")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
CHUNK = scalar.CHUNK


def runner(backend, cu_seqlens=None, returns_state=True):
    def run(inputs, state):
        o, final = log_linear_attention(
            **inputs.arguments(), scale=0.7, cu_seqlens=cu_seqlens, initial_state=state, return_state=returns_state,
            backend=backend,
        )  # fmt: skip
        return o, None if final is None else final.buckets

    return run


def compare_with_tree(inputs, state=None, cu_seqlens=None, returns_state=True):
    """With the torch backend, itself held to the recurrence elsewhere, where the recurrence would take minutes."""
    with_state = {"cu_seqlens": cu_seqlens, "returns_state": returns_state}
    compare(runner("triton", **with_state), runner("torch", **with_state), inputs, state, returns_state)


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
    compare_with_tree(inputs, returns_state=False)


@needs_interpreter
def test_interpreted_packed():
    lengths = [0, 40, 1, 0, 17, 16, 3]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make_inputs("mamba2", Shape(B=1, T=sum(lengths), G=1, H=2, K=16, V=16, L=6), torch.float32)
    compare_with_tree(inputs, None, bounds, returns_state=False)


@needs_interpreter
@pytest.mark.parametrize(
    ("num_levels", "tokens"), [(None, 45), (1, 1), (2, 45), (3, 16), (5, 45), (6, 16), (7, 45), (12, 1), (12, 45)]
)
def test_interpreted_state(num_levels, tokens):
    """In and out, at positions within chunks and between them, below and above the cap, and different by row."""
    shape = Shape(B=4, T=tokens, G=1, H=1, K=16, V=16, L=num_levels)
    inputs = make_inputs("mamba2", shape, torch.float32)
    compare_with_tree(inputs, random_state(shape, [0, 48, 91, 200], torch.float32))


@needs_interpreter
@pytest.mark.parametrize("num_levels", [9, 32])
@pytest.mark.parametrize("position", [2**20 - 16, 2**35 - 20, 2**41 + 21])
def test_interpreted_state_far_out(position, num_levels):
    """Where there is hardly a node, and where numbers of chunks reach and pass 32 bits."""
    shape = Shape(B=1, T=40, G=1, H=1, K=16, V=16, L=num_levels)
    compare_with_tree(make_inputs("mamba2", shape, torch.float32), random_state(shape, [position], torch.float32))


@needs_interpreter
def test_interpreted_state_out():
    shape = Shape(B=1, T=112, G=2, H=4, K=16, V=16, L=8)
    compare_with_tree(make_inputs("mamba2", shape, torch.float32))
    compare_with_tree(make_inputs("linear_attention", shape, torch.float32).tokens(0, 77))


@needs_interpreter
def test_interpreted_packed_state():
    lengths = [0, 40, 1, 0, 17, 16, 3]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    shape = Shape(B=1, T=sum(lengths), G=1, H=2, K=16, V=16, L=7)
    state = random_state(shape, [3, 15, 15, 64, 1000, 0, 61], torch.float32)
    inputs = make_inputs("mamba2", shape, torch.float32)
    compare_with_tree(inputs, state, bounds)
    compare_with_tree(inputs, None, bounds)
    compare_with_tree(inputs, state, bounds, returns_state=False)


@needs_interpreter
@pytest.mark.parametrize("poisoned_input", ["v", "k", "log_decay", "cotangent"])
def test_interpreted_nan_stays_in_its_row(poisoned_input):
    """It is not hidden, and no other row of the batch sees it."""
    inputs = make_inputs("mamba2", Shape(B=3, T=40, G=1, H=1, K=16, V=16, L=7), torch.float32).leaves()
    cotangent = torch.randn_like(inputs.v)
    with torch.no_grad():
        (cotangent if poisoned_input == "cotangent" else getattr(inputs, poisoned_input))[1, 5] = torch.nan
    results = []
    for backend in ("triton", "torch"):
        o, _ = log_linear_attention(**inputs.arguments(), backend=backend)
        found = torch.autograd.grad(o, list(inputs.present().values()), cotangent)
        results.append([x.isfinite().flatten(1) for x in (o, *found)])
    for ours, theirs in zip(*results, strict=True):
        assert ours[[0, 2]].all()
        assert ours[1].all() == theirs[1].all()


@needs_interpreter
def test_interpreted_many_levels():
    shape = Shape(B=1, T=20, G=1, H=1, K=16, V=16, L=70)
    compare_with_tree(make_inputs("mamba2", shape, torch.float32), random_state(shape, [5], torch.float32))


@needs_interpreter
def test_interpreted_wide():
    """Keys and values wider than what a program holds are taken apart."""
    shape = Shape(B=1, T=19, G=1, H=1, K=144, V=72, L=6)
    compare_with_tree(make_inputs("mamba2", shape, torch.float32), random_state(shape, [9], torch.float32))


@needs_interpreter
def test_interpreted_strong_decay():
    """Decays down to e^-100 a chunk."""
    shape = Shape(B=1, T=70, G=1, H=2, K=16, V=16, L=8)
    inputs = make_inputs("mamba2", shape, torch.float32, decay=200 / CHUNK)
    compare_with_tree(inputs, returns_state=False)


@needs_interpreter
@pytest.mark.parametrize("reset", [-1e4, -1e30, -torch.inf])
def test_interpreted_reset(reset):
    """A decay of zero in the middle of a chunk forgets everything before it, and nothing after it."""
    inputs = make_inputs("mamba2", Shape(B=1, T=70, G=1, H=2, K=16, V=16, L=8), torch.float32)
    inputs.log_decay[:, 37] = reset
    o, _ = runner("triton", returns_state=False)(inputs, None)
    after, _ = reference.log_linear_attention_recurrent(
        *inputs.to(torch.float64).values()[:4], log_decay=inputs.log_decay.double(), beta=None, scale=0.7,
        cu_seqlens=None, initial_state=None, return_state=False,
    )[:2]  # fmt: skip
    assert_close(o, after, TOLERANCES[torch.float32].forward, "o")
    torch_o, _ = runner("torch", returns_state=False)(inputs.to(torch.float64), None)
    assert_close(torch_o, after, 1e-11, "o of the torch backend")


@needs_interpreter
def test_interpreted_single_strong_decays():
    """They take no digits from the weak ones after them in their chunks."""
    inputs = make_inputs("mamba2", Shape(B=1, T=70, G=1, H=2, K=16, V=16, L=8), torch.float32, decay=0.01)
    compare_with_tree(with_strong_decays(inputs, [3, 37, 50]))


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
    Shape(B=1, T=20_001, G=1, H=2, K=128, V=64, L=1),
    Shape(B=2, T=300, G=1, H=2, K=192, V=192, L=10),
    Shape(B=1, T=200, G=1, H=2, K=256, V=256, L=9),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", ON_GPU)
def test_on_gpu(shape, dtype):
    inputs = make_inputs("mamba2", shape, dtype, "cuda", decay=0.1)
    inputs.level_scales = None if inputs.level_scales is None else inputs.level_scales.float()
    inputs.log_decay = inputs.log_decay.float()
    on_device(inputs)


@pytest.mark.parametrize(
    ("told", "dtype", "wanted"),
    [
        ("none", torch.float32, "tf32x3"),
        ("ieee", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("ieee", torch.bfloat16, "tf32"),
    ],
)
def test_float32_is_multiplied_as_torch_is_told(told_to, told, dtype, wanted):
    told_to(told)
    assert scalar.precision_of(torch.zeros(1, dtype=dtype)) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_plain_float32_on_gpu(told_to, mixer):
    told_to("ieee")
    on_device(make_inputs(mixer, Shape(B=1, T=333, G=1, H=2, K=64, V=64, L=10), torch.float32, "cuda", decay=0.1))


def on_device(inputs, cu_seqlens=None, state=None):
    """`compare_with_tree`, with the float64 side on the GPU too."""
    results = []
    for backend, dtype in (("triton", None), ("torch", torch.float64)):
        given = inputs.map(lambda x, dtype=dtype: x.detach().to(dtype or x.dtype).requires_grad_())
        begin = None
        if state is not None:
            buckets = state.buckets.detach().to(dtype or torch.float32).requires_grad_()
            begin = FenwickState(buckets, state.positions)
        returns_state = state is not None
        outputs = [x for x in runner(backend, cu_seqlens, returns_state)(given, begin) if x is not None]
        if not results:
            cotangents = [torch.randn_like(x) for x in outputs]
        wanted = with_buckets(given, begin)
        results.append((outputs, gradients(outputs, cotangents, wanted)))
    (got, found), (exact, true) = results
    tolerance = TOLERANCES[inputs.v.dtype]
    for name, a, b in zip(("o", "state"), got, exact, strict=False):
        assert_close(a, b, tolerance.forward, name)
    for name in true:
        assert_close(found[name], true[name], tolerance.gradient, f"gradient of {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(("groups", "heads", "widths"), [(1, 8, (128, 64)), (2, 4, (64, 128)), (1, 2, (192, 384))])
def test_pipelining_changes_nothing(groups, heads, widths, carried, dtype, monkeypatch):
    shape = Shape(B=2, T=1500, G=groups, H=heads, K=widths[0], V=widths[1], L=12)
    state = random_state(shape, [1000, 70_001], torch.float32, "cuda") if carried else None
    inputs = make_inputs("mamba2", shape, dtype, "cuda", decay=0.05)
    same_without_pipelining(runner("triton", None, carried), inputs, state, monkeypatch)


STATES = [
    Shape(B=4, T=1, G=1, H=4, K=128, V=64, L=9),
    Shape(B=4, T=1500, G=1, H=4, K=128, V=64, L=12),
    Shape(B=4, T=1600, G=2, H=4, K=64, V=128, L=17),
    Shape(B=4, T=700, G=1, H=3, K=128, V=64, L=4),
    Shape(B=4, T=300, G=1, H=2, K=96, V=48, L=None),
    Shape(B=4, T=500, G=1, H=2, K=256, V=256, L=14),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", STATES)
def test_state_on_gpu(shape, dtype):
    inputs = make_inputs("mamba2", shape, dtype, "cuda", decay=0.05)
    on_device(inputs, None, random_state(shape, [0, 1000, 64, 70_001], torch.float32, "cuda"))


@pytest.mark.gpu
def test_packed_state_on_gpu():
    lengths = [0, 700, 1, 64, 0, 63, 129, 2048, 5]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    shape = Shape(B=1, T=sum(lengths), G=1, H=4, K=128, V=64, L=13)
    positions = [7, 63, 64, 1, 128, 4097, 0, 16_384, 16_383]
    inputs = make_inputs("mamba2", shape, torch.bfloat16, "cuda", decay=0.05).map(poisoned)
    on_device(inputs, bounds, random_state(shape, positions, torch.float32, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [[20_001], [1, 20_000], [8192, 11_809], [63, 65, 16_384, 3489]])
def test_pieces_on_gpu(pieces):
    """A sequence in pieces that hand on their state is the sequence, whatever the pieces."""
    shape = Shape(B=1, T=sum(pieces), G=1, H=2, K=128, V=64, L=16)
    inputs = make_inputs("mamba2", shape, torch.bfloat16, "cuda", decay=0.01)
    exact, wanted = log_linear_attention(
        **inputs.to(torch.float64).arguments(), scale=0.7, return_state=True, backend="torch"
    )
    state, found, start = None, [], 0
    for length in pieces:
        piece = inputs.tokens(start, start + length).arguments()
        o, state = log_linear_attention(**piece, scale=0.7, initial_state=state, return_state=True, backend="triton")
        found.append(o)
        start += length
    tolerance = TOLERANCES[torch.bfloat16].forward
    assert_close(torch.cat(found, 1), exact, tolerance, "o")
    assert_close(state.buckets, wanted.buckets, tolerance, "state")
    assert torch.equal(state.positions, wanted.positions)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_single_strong_decays_on_gpu(dtype):
    inputs = make_inputs("mamba2", Shape(B=1, T=3000, G=1, H=4, K=128, V=64, L=13), dtype, "cuda", decay=0.01)
    on_device(with_strong_decays(inputs, [50, 1000, 1001, 2047, 2048]))


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


@each_device
def test_what_no_kernel_covers_goes_to_torch(device, caplog):
    inputs = make_inputs("kda", Shape(B=1, T=20, G=1, H=1, K=16, V=16, L=5), torch.float32, device)
    with caplog.at_level(logging.DEBUG, logger="loglinear"):
        o, _ = log_linear_attention(**inputs.arguments(), backend="triton")
    assert "a decay per channel" in caplog.text
    assert torch.equal(o, log_linear_attention(**inputs.arguments(), backend="torch")[0])


@pytest.mark.parametrize(("heads", "covered"), [(48, True), (2**14, False)])
def test_calls_too_large_for_a_launch_are_left_to_torch(heads, covered):
    tokens = 2**20
    q, v = torch.empty(1, tokens, 1, 16, device="meta"), torch.empty(1, tokens, heads, 16, device="meta")
    assert (scalar.unsupported(q, v, None, None, 1, False) is None) == covered


@pytest.mark.parametrize("bounds", [[0, 5, 3, 20], [1, 20], [0, 21], [0, -3, 20]])
@each_device
def test_wrong_bounds(bounds, device):
    inputs = make_inputs("mamba2", Shape(B=1, T=20, G=1, H=1, K=16, V=16, L=5), torch.float32, device)
    for _ in range(2):  # the second time, too
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 20 tokens"):
            runner("triton", torch.tensor(bounds, device=device), returns_state=False)(inputs, None)


@needs_interpreter
@pytest.mark.parametrize(("num_levels", "bounds"), [(None, None), (1, [0, 200, 210, 290]), (8, [0, 200, 210, 290])])
@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_few_states_over_many_chunks(mixer, bounds, num_levels, monkeypatch):
    """Nodes of several chunks come first, however few levels λ has, and nothing else changes."""
    caps, slots = set(), fenwick.slots
    monkeypatch.setattr(scalar, "MANY_CHUNKS", 2)
    monkeypatch.setattr(scalar, "GROUP_HEIGHT", 2)
    monkeypatch.setattr(scalar, "CHUNK", 32)

    def made(*given, **told):
        found = slots(*given, **told)
        caps.add(found.cap)
        return found

    monkeypatch.setattr(fenwick, "slots", made)
    inputs = make_inputs(mixer, Shape(B=1, T=290, G=1, H=1, K=16, V=16, L=num_levels), torch.float32, decay=0.01)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    fenwick.uniform_slots.cache_clear()
    compare(
        runner("triton", cu_seqlens, returns_state=False), runner("torch", cu_seqlens, returns_state=False),
        inputs.map(poisoned), None, returns_state=False,
    )  # fmt: skip
    assert caps == {2}


@pytest.mark.parametrize(
    ("num_levels", "batch", "tokens", "sequences", "levels"),
    [
        (1, 1, 10_000, None, 12),  # 79 chunks, which 2^3 make a node of
        (14, 1, 10_000, None, 14),
        (1, 1, 8192, None, 1),  # too few of them
        (1, 4, 10_000, None, 1),  # too many states
        (1, 1, 40_000, 4, 1),
        (1, 1, 40_000, 2, 12),
    ],
)
def test_levels_of_tree(num_levels, batch, tokens, sequences, levels):
    q, v = (torch.empty(batch, tokens, 6, width, device="meta") for width in (192, 384))
    bounds = None if sequences is None else torch.zeros(sequences + 1, dtype=torch.int32)
    assert scalar.levels_of_tree(num_levels, 128, q, v, bounds) == levels


@needs_interpreter
@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_slots_of_packed_sequences_are_made_once(mixer, monkeypatch):
    """For all layers of a model that are given the same bounds, and their backward; elsewhere for each call, since
    bounds may have been written to without torch's knowledge."""
    made = []
    slots = fenwick.slots
    monkeypatch.setattr(fenwick, "slots", lambda *arguments: made.append(1) or slots(*arguments))
    bounds = torch.tensor([0, 20, 36])

    def output(bounds):
        torch.manual_seed(5)
        inputs = make_inputs(mixer, Shape(B=1, T=int(bounds[-1]), G=1, H=1, K=16, V=16, L=8), torch.float32)
        leaves = inputs.leaves()
        o, _ = log_linear_attention(**leaves.arguments(), cu_seqlens=bounds, backend="triton")
        return o.square().sum(), list(leaves.present().values())

    def assert_as_of_new_bounds(found):
        wanted = torch.autograd.grad(*output(bounds.clone()))
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(*found), wanted, strict=True))

    with unchanging_bounds():
        found = [output(bounds) for _ in range(3)]
    gradients_found = [torch.autograd.grad(*one) for one in found]
    assert len(made) == 1 and all(
        torch.equal(a, b) for a, b in zip(gradients_found[0], gradients_found[2], strict=True)
    )
    with unchanging_bounds():
        found_again = checkpoint(output, bounds, use_reentrant=False)
    torch.autograd.grad(*found_again)
    assert len(made) == 2
    with unchanging_bounds():
        first = output(bounds)
        bounds[1] = 17
        second = output(bounds)
    assert len(made) == 4
    assert_as_of_new_bounds(second)
    del first
    for hidden in ([0, 10, 36], [0, 5, 37]):  # another length in the same number of chunks, too
        bounds.numpy()[:] = hidden
        assert_as_of_new_bounds(output(bounds))
        bounds.numpy()[1] += 1
        with unchanging_bounds():
            assert_as_of_new_bounds(output(bounds))


@each_device
def test_bounds_that_were_changed_are_read_again(device):
    inputs = make_inputs("mamba2", Shape(B=1, T=20, G=1, H=1, K=16, V=16, L=5), torch.float32, device)
    bounds = torch.tensor([0, 5, 20], device=device)
    run = runner("triton", bounds, returns_state=False)
    run(inputs, None)
    bounds[1] = 30
    with pytest.raises(ValueError, match="cu_seqlens"):
        run(inputs, None)


@each_device
def test_negative_positions(device):
    shape = Shape(B=2, T=20, G=1, H=1, K=16, V=16, L=5)
    state = random_state(shape, [3, 4], torch.float32, device)
    state.positions[1] = -1
    with pytest.raises(ValueError, match="positions must be at least 0"):
        runner("triton")(make_inputs("mamba2", shape, torch.float32, device), state)


@pytest.mark.gpu
def test_known_bounds_cost_no_wait():
    """Once bounds were looked at, the host does not wait for the device any more, forward or backward."""
    inputs = make_inputs("mamba2", Shape(B=1, T=2000, G=1, H=4, K=128, V=64, L=12), torch.bfloat16, "cuda").leaves()
    run = runner("triton", torch.tensor([0, 700, 2000], device="cuda"))

    def step(state):
        o, _ = run(inputs, state)
        return torch.autograd.grad(o.float().square().sum(), list(inputs.present().values()))

    state = random_state(Shape(B=2, T=1, G=1, H=4, K=128, V=64, L=12), [0, 70], torch.float32, "cuda")
    step(state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_interpreter
@pytest.mark.parametrize("carried", [False, True])
def test_well_formed_operators(carried):
    """Schemas, shapes without data, and gradients under the compiler."""
    shape = Shape(B=2, T=20, G=1, H=2, K=16, V=16, L=7)
    q, k, v, scales, decay, _ = make_inputs("mamba2", shape, torch.float32).leaves().values()
    positions = far = near = None
    if carried:
        state = random_state(shape, [3, 40], torch.float32)
        positions = state.positions
        far = state.buckets[:, -fenwick.num_far_buckets(7, CHUNK) :].nan_to_num().requires_grad_()
        near = torch.randn(2, 2, 16, 16, requires_grad=True)
    arguments = (q, k, v, scales, decay, 0.7, None, positions, far, near, carried)
    torch.library.opcheck(scalar._forward_op, arguments)
    o, left = scalar._forward_op(*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))
    inputs = [x if x is None else x.detach() for x in (q, k, v, scales, decay, None, positions, far, near)]
    backward = (torch.randn_like(o), torch.randn_like(left), *inputs, 0.7, carried)
    torch.library.opcheck(scalar._backward_op, backward, test_utils=("test_schema", "test_faketensor"))
