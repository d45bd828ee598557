"""The delta rule's kernels against the torch backend in fp64: interpreted on small shapes, on a GPU on real ones."""

import pytest
import torch

from loglinear import fenwick, log_linear_attention
from operator_cases import TOLERANCES, Shape, assert_close, compare, gradients, make_inputs, poisoned, with_buckets

pytest.importorskip("triton")
from loglinear.ops.triton import delta, scalar

needs_interpreter = pytest.mark.skipif(not scalar.INTERPRETED, reason="kernels are not interpreted here")


def runner(backend, cu_seqlens=None):
    def run(inputs, state):
        o, _ = log_linear_attention(**inputs.arguments(), scale=0.7, cu_seqlens=cu_seqlens, backend=backend)
        return o, None

    return run


def compare_with_tree(inputs, cu_seqlens=None):
    compare(runner("triton", cu_seqlens), runner("torch", cu_seqlens), inputs, returns_state=False)


INTERPRETED = [
    Shape(B=1, T=1, G=1, H=1, K=16, V=16, L=1),
    Shape(B=2, T=37, G=1, H=2, K=16, V=16, L=7),
    Shape(B=1, T=130, G=2, H=4, K=20, V=24, L=9),
    Shape(B=1, T=113, G=1, H=1, K=80, V=16, L=3),
    Shape(B=1, T=145, G=1, H=1, K=16, V=80, L=None),
    Shape(B=1, T=145, G=1, H=1, K=16, V=16, L=7),
]


@needs_interpreter
@pytest.mark.parametrize("shape", INTERPRETED)
@pytest.mark.parametrize("mixer", ["delta_net", "gated_deltanet"])
def test_interpreted(mixer, shape):
    compare_with_tree(make_inputs(mixer, shape, torch.float32, key_norm=1.2).map(poisoned))


@needs_interpreter
def test_interpreted_packed():
    lengths = [0, 40, 1, 0, 17, 16, 3]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make_inputs("gated_deltanet", Shape(B=1, T=sum(lengths), G=1, H=2, K=16, V=16, L=6), torch.float32)
    compare_with_tree(inputs, bounds)


@needs_interpreter
def test_interpreted_with_chunks_of_64(monkeypatch):
    """The inverse of a chunk is joined from blocks of 16."""
    monkeypatch.setattr(scalar, "CHUNK", 64)
    monkeypatch.setattr(delta, "CHUNK", 64)
    compare_with_tree(make_inputs("gated_deltanet", Shape(B=1, T=150, G=1, H=1, K=16, V=16, L=9), torch.float32))


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8, 13, 64])
@pytest.mark.parametrize("cap", [0, 1, 2, 3, 9])
def test_room_for_all_reads(num_slots, cap):
    """Enough for one sequence, and for the same chunks in two; not twice as much."""

    def reads(chunks):
        return int(fenwick.slots(torch.tensor([0, 64 * chunks]), chunks, 64, cap + 8).reads.sum())

    room = fenwick.most_reads(num_slots, cap)
    assert room >= reads(num_slots)
    assert all(room >= reads(part) + reads(num_slots - part) for part in range(1, num_slots))
    assert room <= max(1, 2 * reads(num_slots))


def reads_by_definition(first, block, cap):
    """Ends of what chunk `block` of a sequence that begins in chunk `first` reads: nodes of its own and, as they stand,
    blocks before it. From the last capped block's end on there is one read."""
    ends, rest = [], block
    while rest:
        ends.append(rest)
        rest = 0 if rest % 2**cap == 0 else fenwick.drop_lowest_bit(rest)
    return [end for end in ends if end > first], [end for end in ends if end <= first]


@pytest.mark.parametrize("cap", [0, 1, 3, 9])
def test_buckets_are_read_with_one_variant_of_the_queries(cap):
    """Each node changes the queries, but for the buckets, and the last one read."""
    starts, counts = [0, 1, 5, 7, 8, 21, 31], [9, 0, 3, 2, 12, 1, 4]
    bounds = torch.tensor([0, *(16 * count for count in counts)]).cumsum(0)
    positions = 16 * torch.tensor(starts)
    room = fenwick.num_slots(int(bounds[-1]), len(counts), 16, cap + 6, True)
    slots = fenwick.slots(bounds, room, 16, cap + 6, positions, True)
    assert slots.cap == cap
    variants, expected = fenwick.variants(slots).tolist(), [0] * room
    for base, start, count in zip(slots.base.tolist(), starts, counts, strict=True):
        for number in range(count + 1):  # with the chunk that the end falls into
            nodes, buckets = reads_by_definition(start, start + number, cap)
            expected[base + number] = len(nodes) + (len(buckets) > 0)
    assert variants == expected


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5, 8, 13, 64])
@pytest.mark.parametrize("cap", [0, 1, 2, 3, 9])
def test_room_for_all_variants(num_chunks, cap):
    """Enough wherever sequences start, for one and for several; not much more than if they started at 0."""

    def variants(start, chunks):
        reads = [reads_by_definition(start, start + number, cap) for number in range(chunks)]
        return sum(len(nodes) + (len(buckets) > 0) for nodes, buckets in reads)

    starts = [*range(70), *(2**bit - near for bit in range(7, 14) for near in range(1, 66, 3))]
    worst = [max(variants(start, chunks) for start in starts) for chunks in range(num_chunks + 1)]
    assert fenwick.most_variants(num_chunks, cap, 1) >= worst[num_chunks]
    assert fenwick.most_variants(num_chunks, cap, 1) <= 2 * fenwick.most_reads(num_chunks, cap) + 3 * num_chunks
    for first in range(num_chunks + 1):
        room = fenwick.most_variants(num_chunks, cap, 2)
        assert room >= worst[first] + worst[num_chunks - first]
    single = worst[1] if num_chunks else 0
    assert fenwick.most_variants(num_chunks, cap, num_chunks) >= single * num_chunks


@pytest.mark.parametrize(("key_dim", "covered"), [(256, True), (257, False)])
def test_keys_too_wide_for_a_program_are_left_to_torch(key_dim, covered):
    q, v = torch.empty(1, 20, 1, key_dim, device="meta"), torch.empty(1, 20, 1, 600, device="meta")
    assert (delta.unsupported(q, v, None, False) is None) == covered


ON_GPU = [
    Shape(B=1, T=1, G=1, H=1, K=64, V=64, L=1),
    Shape(B=2, T=65, G=2, H=2, K=128, V=128, L=8),
    Shape(B=1, T=1025, G=2, H=4, K=192, V=384, L=12),
    Shape(B=3, T=777, G=1, H=2, K=96, V=80, L=None),
    Shape(B=2, T=2048, G=1, H=3, K=128, V=64, L=5),
    Shape(B=1, T=300, G=2, H=2, K=256, V=512, L=10),
    Shape(B=1, T=20_001, G=2, H=2, K=128, V=128, L=16),
]


def on_device(inputs, cu_seqlens=None):
    results = []
    for backend, dtype in (("triton", None), ("torch", torch.float64)):
        given = inputs.map(lambda x, dtype=dtype: x.detach().to(dtype or x.dtype).requires_grad_())
        o, _ = runner(backend, cu_seqlens)(given, None)
        if not results:
            cotangent = torch.randn_like(o)
        results.append((o, gradients([o], [cotangent], with_buckets(given, None))))
    (got, found), (exact, true) = results
    tolerance = TOLERANCES[inputs.v.dtype]
    assert_close(got, exact, tolerance.forward, "o")
    for name in true:
        assert_close(found[name], true[name], tolerance.gradient, f"gradient of {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", ON_GPU)
def test_on_gpu(shape, dtype):
    on_device(make_inputs("gated_deltanet", shape, dtype, "cuda", decay=0.1))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [1e-6, 100 / 32])
def test_extreme_decays_on_gpu(decay):
    shape = Shape(B=1, T=3000, G=2, H=2, K=128, V=64, L=13)
    on_device(make_inputs("gated_deltanet", shape, torch.bfloat16, "cuda", decay=decay))


@pytest.mark.gpu
def test_packed_among_nan_on_gpu():
    lengths = [0, 700, 1, 64, 0, 63, 129, 2048, 5]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    shape = Shape(B=1, T=sum(lengths), G=1, H=2, K=192, V=64, L=9)
    on_device(make_inputs("gated_deltanet", shape, torch.bfloat16, "cuda").map(poisoned), bounds)


@pytest.mark.gpu
def test_same_bits_compiled_and_in_a_graph():
    inputs = make_inputs("gated_deltanet", Shape(B=2, T=1000, G=1, H=4, K=128, V=64, L=11), torch.bfloat16, "cuda")

    def run(inputs):
        return log_linear_attention(**inputs.arguments(), backend="triton")[0]

    first = run(inputs)
    assert torch.equal(first, run(inputs))
    assert torch.equal(torch.compile(run, fullgraph=True)(inputs), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, first)


@needs_interpreter
def test_well_formed_operator():
    inputs = make_inputs("gated_deltanet", Shape(B=2, T=20, G=1, H=2, K=16, V=16, L=7), torch.float32).leaves()
    torch.library.opcheck(delta._forward_op, (*inputs.values(), 0.7, None))
