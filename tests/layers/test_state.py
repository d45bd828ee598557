import pytest
import torch

from small_models import small_mixer


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
