"""What the benchmark checks against: patterns, references and sampled rows agree with plain definitions."""

import pytest
import torch

from loglinear import log_linear_attention
from loglinear.bench import operators
from loglinear.bench.inputs import SHAPES, Shape, make_inputs
from loglinear.bench.operators import BLOCK, OPERATORS, SPARSE_BLOCKS, WINDOW, NotSupported, select

SCALAR = Shape("small", "scalar", 4, 2, 8, 16, 2, 8, "")
DELTA = Shape("small", "delta", 2, 2, 8, 16, 2, 8, "")
CHANNEL = Shape("small", "channel", 4, 4, 8, 16, 2, 8, "")
CHANNEL_DELTA = Shape("small", "channel-delta", 2, 2, 8, 16, 2, 8, "")


@pytest.mark.parametrize("name", ["log-linear", "linear"])
@pytest.mark.parametrize("shape", [SCALAR, DELTA, CHANNEL, CHANNEL_DELTA], ids=lambda shape: shape.family)
def test_sampled_rows_are_rows_of_the_reference(name, shape):
    operator = OPERATORS[name]
    inputs = make_inputs(shape, operator.kind, 2, 70, torch.float64, "cpu")
    rows = torch.tensor([0, 1, 37, 69])
    wanted = operator.rows_of(operator.reference(inputs), rows)
    got = operator.expected_rows(inputs, rows)
    assert got is not None and got.shape == (2, 4, 16)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_sampled_rows_of_softmax_attention_are_rows_of_sdpa():
    operator = OPERATORS["softmax-math"]
    inputs = make_inputs(SCALAR, "attention", 2, 50, torch.float64, "cpu")
    output = operator.prepare(inputs)()
    rows = torch.tensor([0, 20, 49])
    torch.testing.assert_close(operator.expected_rows(inputs, rows), operator.rows_of(output, rows))
    torch.testing.assert_close(operator.reference(inputs), output)


def test_the_reference_of_linear_is_log_linear_with_scales_of_one():
    inputs = make_inputs(DELTA, "linear", 1, 20, torch.float64, "cpu")
    wanted = OPERATORS["linear"].reference(inputs)
    got, _ = log_linear_attention(
        inputs.q, inputs.k, inputs.v, torch.ones(1, 20, 2, 6, dtype=torch.float64),
        log_decay=inputs.log_decay, beta=inputs.beta, scale=inputs.scale, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(got, wanted)


def test_the_window_sees_the_newest_tokens():
    visible = OPERATORS["sliding-window"].visible
    assert visible is not None
    seen = visible(torch.tensor([[2000]]), torch.arange(2001)[None])[0]
    assert seen.sum() == WINDOW and bool(seen[-WINDOW:].all())


@pytest.mark.parametrize("block", [0, 1, 13, 14, 15, 40, 100])
def test_sparse_blocks_are_few_whole_and_spread_out(block):
    visible = OPERATORS["block-sparse"].visible
    assert visible is not None
    keys = torch.arange((block + 1) * BLOCK)
    seen = visible(torch.tensor([[block * BLOCK], [block * BLOCK + BLOCK - 1]]), keys[None])
    assert torch.equal(seen[0], seen[1])
    blocks = seen[0].view(block + 1, BLOCK)
    assert torch.equal(blocks.all(1), blocks.any(1))
    chosen = blocks.all(1).nonzero().flatten().tolist()
    assert len(chosen) == min(block + 1, SPARSE_BLOCKS) or block in (15, 40, 100) and len(chosen) >= SPARSE_BLOCKS - 1
    assert chosen[0] == 0 and chosen[-1] == block


def test_the_level_scales_of_the_inputs_are_a_full_partition():
    inputs = make_inputs(SHAPES["mamba2-2-heads"], "log-linear", 1, 1024, torch.float32, "cpu")
    assert inputs.level_scales is not None and inputs.level_scales.shape == (1, 1024, 2, 11)
    assert set(inputs.tensors()) == {"q", "k", "v", "level_scales", "log_decay"}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_inputs_are_those_of_the_family(shape):
    inputs = make_inputs(shape, "log-linear", 1, 8, torch.float32, "cpu")
    assert inputs.log_decay is not None and inputs.k is not None
    per_head = (1, 8, shape.num_heads)
    assert inputs.log_decay.shape == ((*per_head, shape.key_dim) if shape.name.startswith(("gla", "kda")) else per_head)
    delta = shape.name.startswith(("gated-deltanet", "kda"))
    assert (inputs.beta is not None) == delta
    if delta:
        torch.testing.assert_close(inputs.k.norm(dim=-1), torch.ones(1, 8, shape.num_groups))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name.startswith("fla-")])
def test_peers_that_are_not_installed_say_so(name):
    shape = next(shape for shape in SHAPES.values() if shape.family in OPERATORS[name].families)
    inputs = make_inputs(shape, OPERATORS[name].kind, 1, 16, torch.float32, "cpu")
    with pytest.raises(NotSupported, match="flash-linear-attention"):
        OPERATORS[name].prepare(inputs)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("fla-log-linear", "q k v log_decay level_scales"),
        ("fla-simple-gla", "q k v log_decay"),
        ("fla-gated-deltanet", "q k v log_decay beta"),
        ("fla-gla", "q k v log_decay"),
        ("fla-kda", "q k v log_decay beta"),
    ],
)
def test_peers_are_given_what_they_take(name, taken, monkeypatch):
    given = []

    def peer(module, function):
        assert (module.split(".")[:2], function[:6]) == (["fla", "ops"], "chunk_")
        return lambda *arguments, scale: given.append((arguments, scale)) or ("o", "state")

    monkeypatch.setattr(operators, "_peer", peer)
    shape = next(shape for shape in SHAPES.values() if shape.family in OPERATORS[name].families)
    inputs = make_inputs(shape, OPERATORS[name].kind, 1, 16, torch.float32, "cpu")
    assert OPERATORS[name].prepare(inputs)() == "o"
    ((arguments, scale),) = given
    assert scale == inputs.scale
    for argument, wanted in zip(arguments, taken.split(), strict=True):
        assert argument is getattr(inputs, wanted) is not None


def test_unknown_operators_are_refused():
    with pytest.raises(ValueError, match="unknown operator softmax; known are log-linear"):
        select(["softmax"])


@pytest.mark.parametrize("name", ["sliding-window", "block-sparse"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_of_sparse_attention_are_its_pattern(name, monkeypatch):
    """Through FlexAttention's uncompiled form, which runs anywhere: blocks left out, whole and cut must give
    the dense result.
    """
    from torch.nn.attention.flex_attention import flex_attention

    operator = OPERATORS[name]
    monkeypatch.setattr(operators, "_compiled_flex_attention", lambda: flex_attention)
    length = 20 * BLOCK
    shape = Shape("small", "scalar", 1, 1, 8, 8, 1, 16, "")
    inputs = make_inputs(shape, "attention", 1, length, torch.float32, "cpu")
    call = operator.prepare(inputs)
    with torch.no_grad():
        output = call()
    rows = torch.arange(0, length, 37)
    torch.testing.assert_close(
        operator.rows_of(output, rows), operator.expected_rows(inputs, rows), rtol=1e-4, atol=1e-5
    )
    assert operator.visible is not None
    block_mask = call.__closure__[0].cell_contents
    blocks = int(block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum())
    assert blocks < 20 * 21 // 2, "a sparse mask must leave blocks out"


@pytest.mark.parametrize("name", ["sliding-window", "block-sparse"])
def test_sparse_attention_needs_whole_blocks(name):
    inputs = make_inputs(SCALAR, "attention", 1, 100, torch.float32, "cpu")
    with pytest.raises(NotSupported, match="not a multiple of 128"):
        OPERATORS[name].prepare(inputs)
