from copy import deepcopy

import pytest
import torch

from loglinear.layers import attention as attention_module
from small_models import TOLERANCE, relative_error, small_mixer


@pytest.fixture
def attention():
    return small_mixer("attention")


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 28, dtype=torch.float64)


def by_definition(attention, x: torch.Tensor) -> torch.Tensor:
    """Rotation as multiplication of complex numbers, one softmax per head and token; shares nothing with the layer."""
    heads, shared, width = 4, 2, 6
    q, k, v = attention.qkv_proj(x[0]).split(attention.splits, dim=-1)
    frequencies = 10_000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)

    def turn(part: torch.Tensor, position: int) -> torch.Tensor:
        number = torch.complex(part[:3], part[3:]) * torch.exp(1j * position * frequencies)
        return torch.cat((number.real, number.imag))

    rows = []
    for t in range(x.shape[1]):
        outputs = []
        for head in range(heads):
            group = slice(width * (head // (heads // shared)), width * (head // (heads // shared)) + width)
            query = turn(q[t, head * width : (head + 1) * width], t)
            scores = torch.stack([turn(k[s, group], s) @ query for s in range(t + 1)]) * width**-0.5
            outputs.append(scores.softmax(0) @ v[: t + 1, group])
        rows.append(torch.cat(outputs))
    return attention.out_proj(torch.stack(rows))[None]


def test_equals_the_definition(attention):
    x = inputs(1, 7)
    assert relative_error(attention(x)[0], by_definition(attention, x)) < TOLERANCE


@pytest.mark.parametrize("capacity", [None, 20])
def test_split_anywhere_equals_the_whole(attention, capacity):
    x = inputs(2, 11)
    whole, _ = attention(x)
    for split in range(1, 11):
        state = None if capacity is None else attention.zero_state(2, capacity=capacity)
        first, state = attention(x[:, :split], state, return_state=True)
        second, state = attention(x[:, split:], state, return_state=True)
        assert relative_error(torch.cat((first, second), dim=1), whole) < TOLERANCE, split
        assert state.positions.tolist() == [11, 11]


@pytest.mark.parametrize("capacity", [None, 40])
def test_steps_equal_the_whole(attention, capacity):
    x = inputs(2, 40)
    whole, _ = attention(x)
    state = attention.zero_state(2, capacity=capacity)
    with torch.no_grad():
        outputs = []
        for t in range(40):
            y, state = attention(x[:, t : t + 1], state, return_state=True)
            outputs.append(y)
    assert relative_error(torch.cat(outputs, dim=1), whole) < TOLERANCE
    if capacity is not None:
        assert state.capacity == capacity


@pytest.mark.parametrize("carried", [False, True])
def test_packed_equals_separate(attention, carried):
    bounds = torch.tensor([0, 5, 5, 6, 15])
    before = None
    if carried:
        _, before = attention(inputs(1, 11), cu_seqlens=torch.tensor([0, 3, 4, 4, 11]), return_state=True)
    x = inputs(1, 15)
    packed, state = attention(x, None if before is None else before.clone(), cu_seqlens=bounds, return_state=True)
    for row, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        own = None if before is None else before.select(torch.tensor([row]))
        if begin == end:
            continue
        alone, alone_state = attention(x[:, begin:end], own, return_state=True)
        assert relative_error(packed[:, begin:end], alone) < TOLERANCE
        seen = int(alone_state.positions)
        assert int(state.positions[row]) == seen
        assert relative_error(state.keys[row, :seen], alone_state.keys[0, :seen]) < TOLERANCE
        assert relative_error(state.values[row, :seen], alone_state.values[0, :seen]) < TOLERANCE


def test_rows_go_on_from_their_own_positions(attention):
    """Decoding after a ragged call, against each row alone."""
    x = inputs(1, 9)
    _, state = attention(x, cu_seqlens=torch.tensor([0, 2, 9]), return_state=True)
    new = inputs(2, 3)
    y, _ = attention(new, state, return_state=True)
    for row, (begin, end) in enumerate(((0, 2), (2, 9))):
        alone, _ = attention(torch.cat((x[:, begin:end], new[row : row + 1]), dim=1))
        assert relative_error(y[row], alone[0, -3:]) < TOLERANCE


def test_mask_in_pieces(attention, monkeypatch):
    """A long call over a long cache makes its mask piece by piece."""
    x = inputs(2, 20)
    whole, _ = attention(x)
    _, state = attention(x[:, :6], return_state=True)
    monkeypatch.setattr(attention_module, "MASK_ELEMENTS", 2 * 20 * 3)
    rest, _ = attention(x[:, 6:], state, return_state=True)
    assert relative_error(rest, whole[:, 6:]) < TOLERANCE


def test_gradients_through_a_carried_cache(attention):
    x = inputs(1, 8).requires_grad_()
    (whole,) = torch.autograd.grad(attention(x)[0].square().sum(), x)
    first, state = attention(x[:, :5], return_state=True)
    second, _ = attention(x[:, 5:], state)
    (parts,) = torch.autograd.grad(torch.cat((first, second), dim=1).square().sum(), x)
    assert relative_error(parts, whole) < TOLERANCE


def test_packed_gradients_equal_separate(attention):
    x = inputs(1, 9).requires_grad_()
    (packed,) = torch.autograd.grad(attention(x, cu_seqlens=torch.tensor([0, 2, 9]))[0].square().sum(), x)
    separate = sum(attention(x[:, begin:end])[0].square().sum() for begin, end in ((0, 2), (2, 9)))
    (expected,) = torch.autograd.grad(separate, x)
    assert relative_error(packed, expected) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_on_gpu(dtype, shared):
    """By the kernel for sequences of any lengths, an empty one among them, against float64 on the processor."""
    options = {"hidden_size": 64, "num_heads": 4, "num_key_value_heads": shared, "attention_head_dim": 16}
    exact = small_mixer("attention", **options)
    layer = deepcopy(exact).to("cuda", dtype)
    assert layer._has_kernel(torch.empty(1, device="cuda", dtype=dtype)) == (dtype == torch.bfloat16)
    x = torch.randn(1, 300, 64, dtype=torch.float64)
    bounds = torch.tensor([0, 130, 130, 131, 300])
    results = []
    for module, given in ((layer, x.to("cuda", dtype)), (exact, x)):
        given.requires_grad_()
        o, _ = module(given, cu_seqlens=bounds.to(given.device))
        o.square().sum().backward()
        results.append((o, given.grad, module.qkv_proj.weight.grad))
    for got, wanted in zip(*results, strict=True):
        assert relative_error(got.detach().cpu().double(), wanted) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_full_static_cache_is_refused(attention):
    with pytest.raises(ValueError, match="9 tokens do not fit into a static cache of 8 tokens that holds 0"):
        attention(inputs(1, 9), attention.zero_state(1, capacity=8), return_state=True)
    _, state = attention(inputs(1, 6), attention.zero_state(1, capacity=8), return_state=True)
    for copy in (state, state.clone(), state.select(torch.tensor([0, 0]))):
        with pytest.raises(ValueError, match="3 tokens do not fit into a static cache of 8 tokens that holds 6"):
            attention(inputs(copy.batch_size, 3), copy, return_state=True)
    assert state.positions.tolist() == [6]
    attention(inputs(1, 2), state, return_state=True)
    with pytest.raises(ValueError, match="1 tokens do not fit into a static cache of 8 tokens that holds 8"):
        attention(inputs(1, 1), state, return_state=True)


def test_room_is_counted_row_by_row_where_it_matters(attention, monkeypatch):
    """The host counts the longest sequence of each call, which may be more than any row holds; it then reads `seen`
    once, and not where its own count suffices."""
    state = attention.zero_state(2, capacity=8)
    _, state = attention(inputs(1, 6), state, cu_seqlens=torch.tensor([0, 5, 6]), return_state=True)
    _, state = attention(inputs(1, 4), state, cu_seqlens=torch.tensor([0, 0, 4]), return_state=True)
    assert (state.positions.tolist(), state.filled) == ([5, 5], 5)
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *_: pytest.fail("the state was read back"))
    for _ in range(3):
        _, state = attention(inputs(2, 1), state, return_state=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="1 tokens do not fit into a static cache of 8 tokens that holds 8"):
        attention(inputs(2, 1), state, return_state=True)


def test_copying_takes_the_count_along(attention):
    state, other = attention.zero_state(1, capacity=8), attention.zero_state(1, capacity=8)
    _, other = attention(inputs(1, 6), other, return_state=True)
    with torch.no_grad():
        state.copy_(other.detach())
    with pytest.raises(ValueError, match="3 tokens do not fit into a static cache of 8 tokens that holds 6"):
        attention(inputs(1, 3), state, return_state=True)
