"""What every recurrent mixer owes, whatever is in it."""

import pytest
import torch

from loglinear import log_linear_attention
from loglinear.layers import MIXERS, LevelScales, TimeStep
from small_models import RECURRENT, TOLERANCE, relative_error, small_config, small_mixer

LEVELS = [1, None, 3]  # plain, full partition of 64 tokens (7 levels), capped


@pytest.fixture(params=RECURRENT)
def mixer_name(request) -> str:
    return request.param


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 28, dtype=torch.float64)


def states_equal(actual, expected) -> None:
    for mine, theirs in zip(actual.tensors(), expected.tensors(), strict=True):
        assert relative_error(mine.double(), theirs.double()) < TOLERANCE


@pytest.mark.parametrize("levels", LEVELS)
def test_split_anywhere_equals_the_whole(mixer_name, levels):
    """Every split of 13 tokens: output and state; the second part may be one token."""
    mixer = small_mixer(mixer_name, num_levels=levels)
    x = inputs(2, 13)
    whole, whole_state = mixer(x, return_state=True)
    assert whole.shape == x.shape
    for split in range(1, 13):
        first, state = mixer(x[:, :split], return_state=True)
        second, state = mixer(x[:, split:], state, return_state=True)
        assert relative_error(torch.cat((first, second), dim=1), whole) < TOLERANCE, split
        states_equal(state, whole_state)


@pytest.mark.parametrize("levels", LEVELS)
def test_steps_equal_the_whole(mixer_name, levels):
    """Decoding from nothing, token by token, in place."""
    mixer = small_mixer(mixer_name, num_levels=levels)
    x = inputs(2, 19)
    with torch.no_grad():
        whole, whole_state = mixer(x, return_state=True)
        state = mixer.zero_state(2)
        addresses = [tensor.data_ptr() for tensor in state.tensors()]
        outputs = []
        for t in range(19):
            y, state = mixer(x[:, t : t + 1], state, return_state=True)
            outputs.append(y)
    assert relative_error(torch.cat(outputs, dim=1), whole) < TOLERANCE
    states_equal(state, whole_state)
    assert [tensor.data_ptr() for tensor in state.tensors()] == addresses


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("carried", [False, True])
def test_packed_equals_separate(mixer_name, levels, carried):
    """Outputs and states, also with empty and one-token sequences that begin at different positions."""
    mixer = small_mixer(mixer_name, num_levels=levels)
    lengths = [5, 0, 1, 9]
    bounds = torch.tensor([0, 5, 5, 6, 15], dtype=torch.int32)
    before = None
    if carried:
        _, before = mixer(inputs(1, 11), cu_seqlens=torch.tensor([0, 3, 4, 4, 11]), return_state=True)
    x = inputs(1, 15)
    packed, state = mixer(x, None if before is None else before.clone(), cu_seqlens=bounds, return_state=True)
    for row, (begin, length) in enumerate(zip(bounds[:-1].tolist(), lengths, strict=True)):
        own = None if before is None else before.select(torch.tensor([row]))
        if length == 0:
            if own is not None:
                states_equal(state.select(torch.tensor([row])), own)
            continue
        alone, alone_state = mixer(x[:, begin : begin + length], own, return_state=True)
        assert relative_error(packed[:, begin : begin + length], alone) < TOLERANCE
        states_equal(state.select(torch.tensor([row])), alone_state)


def test_rows_are_independent(mixer_name):
    mixer = small_mixer(mixer_name)
    x = inputs(3, 9)
    order = torch.tensor([2, 0, 1])
    y, state = mixer(x, return_state=True)
    permuted, permuted_state = mixer(x[order], return_state=True)
    assert relative_error(permuted, y[order]) < TOLERANCE
    states_equal(permuted_state, state.select(order))


@pytest.mark.parametrize("levels", LEVELS)
def test_gradients_reach_every_parameter_and_the_past(mixer_name, levels):
    mixer = small_mixer(mixer_name, num_levels=levels)
    x = inputs(2, 11).requires_grad_()
    _, state = mixer(x[:, :6], return_state=True)
    y, _ = mixer(x[:, 6:], state)
    (y * torch.randn_like(y)).sum().backward()
    untouched = [
        name for name, parameter in mixer.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert untouched == []
    assert x.grad[:, :6].abs().sum(-1).min() > 0


def test_gradients_are_right(mixer_name):
    """Against finite differences, through everything around the operator."""
    mixer = small_mixer(mixer_name, num_levels=3)
    x = inputs(1, 5).requires_grad_()
    parameters = tuple(mixer.parameters())
    assert torch.autograd.gradcheck(lambda *_: mixer(x)[0], (x, *parameters), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups(mixer_name, groups):
    """A group's query and key serve its heads: the same as giving every head its own copy."""
    mixer = small_mixer(mixer_name, num_groups=groups)
    repeated = small_mixer(mixer_name, num_groups=4)
    weights = mixer.state_dict()
    copies = 4 // groups

    def widen_groups(weight: torch.Tensor) -> torch.Tensor:
        q, k, v = weight.split(mixer.splits)
        q, k = (part.unflatten(0, (groups, 6)).repeat_interleave(copies, dim=0).flatten(0, 1) for part in (q, k))
        return torch.cat((q, k, v))

    for name in ("qkv_proj.weight", "conv.weight", "conv.bias"):
        if name in weights:
            weights[name] = widen_groups(weights[name])
    repeated.load_state_dict(weights)
    x = inputs(2, 10)
    assert relative_error(mixer(x)[0], repeated(x)[0]) < TOLERANCE


def test_one_level_has_no_level_parameters_and_is_the_plain_mixer(mixer_name):
    plain = small_mixer(mixer_name, num_levels=1)
    assert not [name for name, _ in plain.named_parameters() if "level" in name]
    full = small_mixer(mixer_name)
    full.load_state_dict(plain.state_dict(), strict=False)
    # softplus(weight * (W x)) = 1 for every level when weight is 1 and W x is log(e - 1): here through one constant
    # input channel.
    x = inputs(2, 12)
    x[..., 0] = 1.0
    with torch.no_grad():
        full.level_scales.proj.weight.zero_()
        full.level_scales.proj.weight[:, 0] = torch.tensor(1.0, dtype=torch.float64).exp().sub(1).log()
    assert relative_error(full(x)[0], plain(x)[0]) < TOLERANCE


def test_level_scales_start_at_softplus_of_the_projection():
    scales = LevelScales(28, num_heads=4, num_levels=7).double()
    x = inputs(2, 3)
    expected = torch.nn.functional.softplus(scales.proj(x)).unflatten(-1, (4, 7))
    assert torch.equal(scales(x), expected)
    with torch.no_grad():
        scales.weight[1, 2] = 0.0
    assert torch.allclose(scales(x)[..., 1, 2], torch.full((2, 3), 2.0, dtype=torch.float64).log())


def test_time_step_starts_in_its_range():
    step = TimeStep(2000)
    dt, log_decay = step(torch.zeros(1, 1, 2000))
    assert 0.9e-3 < dt.min() and dt.max() < 1.1e-1
    rates = -log_decay / dt
    assert 1 <= rates.min() + 1e-4 and rates.max() <= 16 + 1e-3
    # Log-uniform: as many below the geometric middle as above it.
    assert 0.45 < (dt < 1e-2).float().mean() < 0.55


def test_retention_forgets_at_fixed_rates():
    mixer = small_mixer("retention")
    q = torch.randn(1, 2, 2, 6, dtype=torch.float64)
    prepared = mixer.prepare(inputs(1, 2), q, q, inputs(1, 2), torch.tensor([[0, 1]]))
    expected = 1 - torch.tensor([2.0**-5, 2.0**-6, 2.0**-7, 2.0**-8], dtype=torch.float64)
    assert torch.allclose(prepared.log_decay[0, 0].exp(), expected)


def test_sixteen_bit_models_keep_controls_wide(mixer_name):
    """Decay, write strength and level scales are fp32 in a bf16 model, and the result is near that of fp32."""
    torch.manual_seed(0)
    narrow = MIXERS[mixer_name](small_config(mixer_name), 0).bfloat16()
    wide = MIXERS[mixer_name](small_config(mixer_name), 0)
    wide.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    x = torch.randn(2, 9, 28).bfloat16()
    q, k = torch.randn(2, 2, 9, 2, 6).bfloat16().unbind(0)
    positions = torch.arange(9).expand(2, 9)
    prepared = narrow.prepare(x, q, k, torch.randn(2, 9, 4, 5).bfloat16(), positions)
    for control in (prepared.log_decay, prepared.beta, narrow.level_scales(x)):
        assert control is None or control.dtype == torch.float32
    y, state = narrow(x, return_state=True)
    assert y.dtype == torch.bfloat16
    assert state.fenwick.buckets.dtype == torch.float32
    assert relative_error(y.float(), wide(x.float())[0]) < 3e-2


def test_mixer_is_the_operator_it_says(mixer_name):
    """A mixer with identity-like surroundings hands its prepared inputs to the public operator unchanged."""
    mixer = small_mixer(mixer_name)
    x = inputs(2, 9)
    seen = {}
    prepare, finish = mixer.prepare, mixer.finish
    mixer.prepare = lambda *arguments: seen.setdefault("inputs", prepare(*arguments))
    mixer.finish = lambda o, v, x: (seen.setdefault("o", o), finish(o, v, x))[1]
    mixer(x)
    given = seen["inputs"]
    uses = set(mixer.uses)
    assert (given.log_decay is not None) == ("decay" in uses)
    assert (given.log_decay is not None and given.log_decay.ndim == 4) == ("channel_decay" in uses)
    assert (given.beta is not None) == ("beta" in uses)
    o, _ = log_linear_attention(
        given.q, given.k, given.v, mixer.level_scales(x), log_decay=given.log_decay, beta=given.beta, scale=mixer.scale,
        backend="reference",
    )  # fmt: skip
    assert relative_error(seen["o"], o) < TOLERANCE
