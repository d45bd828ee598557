from dataclasses import replace

import pytest
import torch

from small_models import relative_error, small_mixer


@pytest.fixture(params=["mamba2", "linear_attention", "attention"])
def state(request):
    """A state that has seen some tokens: with a convolution, without, and keys and values."""
    mixer = small_mixer(request.param)
    _, state = mixer(torch.randn(3, 7, 28, dtype=torch.float64), return_state=True)
    return state.detach()


def test_select_repeats_and_reorders_rows(state):
    rows = torch.tensor([2, 0, 0, 1])
    for old, new in zip(state.tensors(), state.select(rows).tensors(), strict=True):
        assert torch.equal(new, old[rows])


def test_clone_is_independent(state):
    copy = state.clone()
    before = [tensor.clone() for tensor in copy.tensors()]
    for tensor in state.tensors():
        tensor.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(copy.tensors(), before, strict=True))


def test_copy_keeps_addresses(state):
    copy = state.select(torch.tensor([1, 1, 1]))
    addresses = [tensor.data_ptr() for tensor in copy.tensors()]
    copy.copy_(state)
    assert [tensor.data_ptr() for tensor in copy.tensors()] == addresses
    assert all(torch.equal(a, b) for a, b in zip(copy.tensors(), state.tensors(), strict=True))


def test_measures_and_moves(state):
    assert state.nbytes == sum(tensor.nbytes for tensor in state.tensors())
    assert state.batch_size == 3
    assert {tensor.device.type for tensor in state.to("meta").tensors()} == {"meta"}
    assert [tensor.dtype for tensor in state.to("meta").tensors()] == [tensor.dtype for tensor in state.tensors()]


@pytest.mark.parametrize(
    ("mixer", "pends"),
    [("mamba2", True), ("retention", True), ("linear_attention", True), ("gla", False), ("gated_deltanet", False)],
)
def test_mixers_whose_steps_defer_decays_keep_room_for_them(mixer, pends):
    """From the first state on, so that its address is there to be captured; not in training, where nothing steps."""
    mixer = small_mixer(mixer)
    x = torch.randn(2, 5, 28, dtype=torch.float64)
    with torch.no_grad():
        for state in (mixer.zero_state(2), mixer(x, return_state=True)[1]):
            assert (state.fenwick.log_decays is not None) == pends
    assert mixer(x, return_state=True)[1].fenwick.log_decays is None


NARROW, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("mixer", "dtype", "options", "kept_in"),
    [
        ("mamba2", NARROW, {}, NARROW),
        ("retention", NARROW, {}, NARROW),
        ("linear_attention", NARROW, {}, NARROW),
        ("delta_net", NARROW, {}, NARROW),
        ("gated_deltanet", NARROW, {}, NARROW),
        ("mamba2", NARROW, {"num_levels": 7}, NARROW),  # all that 64 tokens fill
        ("mamba2", NARROW, {"num_levels": 8}, NARROW),
        ("mamba2", NARROW, {"num_levels": 6}, WIDE),
        ("mamba2", NARROW, {"num_levels": 7, "max_position_embeddings": 65}, WIDE),
        ("gated_deltanet", NARROW, {"num_levels": 2}, WIDE),
        ("gated_deltanet", NARROW, {"num_levels": 2, "max_position_embeddings": 2}, NARROW),
        ("gated_deltanet", NARROW, {"num_levels": 2, "max_position_embeddings": 1}, NARROW),
        ("gla", NARROW, {}, WIDE),
        ("kda", NARROW, {}, WIDE),
        ("gated_deltanet", NARROW, {"num_levels": 1}, WIDE),
        ("gated_deltanet", NARROW, {"num_levels": 1, "max_position_embeddings": 1}, WIDE),
        ("mamba2", NARROW, {"decoding_window": 0}, WIDE),
        ("mamba2", NARROW, {"decoding_window": None}, WIDE),  # on a processor
        ("mamba2", WIDE, {}, WIDE),
        ("mamba2", torch.float16, {}, WIDE),
        ("mamba2", torch.float64, {}, torch.float64),
        ("mamba2", NARROW, {"state_dtype": "float32"}, WIDE),
        ("mamba2", NARROW, {"state_dtype": "bfloat16", "num_levels": 2}, NARROW),
        ("kda", WIDE, {"state_dtype": "bfloat16", "num_levels": 1, "decoding_window": 0}, NARROW),
    ],
)
def test_what_states_are_kept_in(mixer, dtype, options, kept_in):
    mixer = small_mixer(mixer, **{"decoding_window": 16, **options}).to(dtype)
    x = torch.randn(2, 5, 28, dtype=dtype)
    with torch.no_grad():
        for state in (mixer.zero_state(2), mixer(x, return_state=True)[1]):
            assert state.fenwick.buckets.dtype == kept_in
            mixer(x[:, :1], state, return_state=True)
            _, state = mixer(x, state, return_state=True)
            assert state.fenwick.buckets.dtype == kept_in


def test_the_dtype_of_a_state_is_that_of_the_model_it_is_made_for():
    """`zero_state` is told it where weights are not what the model computes in."""
    mixer = small_mixer("mamba2", decoding_window=16)
    assert mixer.zero_state(2).fenwick.buckets.dtype == torch.float64
    assert mixer.zero_state(2, NARROW).fenwick.buckets.dtype == NARROW
    assert mixer.zero_state(2, WIDE).fenwick.buckets.dtype == WIDE


def test_copies_between_pending_and_plain_states():
    mixer = small_mixer("mamba2")
    with torch.no_grad():
        _, pending = mixer(torch.randn(2, 7, 28, dtype=torch.float64), return_state=True)
        _, other = mixer(torch.randn(2, 12, 28, dtype=torch.float64), return_state=True)
    pending.fenwick.log_decays[pending.fenwick.occupied()] = -0.5
    plain = replace(other.clone(), fenwick=other.fenwick.settled().clone())
    wanted = pending.fenwick.settled()
    assert torch.equal(plain.copy_(pending).fenwick.buckets, wanted.buckets) and plain.fenwick.log_decays is None
    pending.copy_(replace(other, fenwick=other.fenwick.settled()))
    assert not pending.fenwick.log_decays.any()
    assert torch.equal(pending.fenwick.settled().buckets, other.fenwick.settled().buckets)


def test_going_on_from_a_pending_state():
    """Steps and longer calls read what is pending; stale buckets are not looked at."""
    mixer = small_mixer("mamba2")
    x = torch.randn(2, 9, 28, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x[:, :6], return_state=True)
        state.fenwick.buckets.mul_(torch.tensor(0.5).exp())
        state.fenwick.log_decays[state.fenwick.occupied()] = -0.5
        state.fenwick.buckets[~state.fenwick.occupied()] = 1e4
        wanted, _ = mixer(x)
        found, _ = mixer(x[:, 6:], state.clone())
        assert relative_error(found, wanted[:, 6:]) < 1e-6  # e^0.5 in float32
        for t in range(6, 9):
            y, state = mixer(x[:, t : t + 1], state, return_state=True)
            assert relative_error(y, wanted[:, t : t + 1]) < 1e-6
