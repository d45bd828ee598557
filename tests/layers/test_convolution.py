import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from loglinear.layers import ShortConvolution
from small_models import TOLERANCE, relative_error

INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()


@pytest.fixture(params=[(2, False), (4, True)], ids=["W2", "W4,bias"])
def convolution(request) -> ShortConvolution:
    width, bias = request.param
    return ShortConvolution(5, width, bias).double()


def test_equals_torchs_convolution(convolution):
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    y, state = convolution(x)
    past = convolution.width - 1
    padded = F.pad(x.transpose(1, 2), (past, 0))
    expected = F.silu(F.conv1d(padded, convolution.weight[:, None], convolution.bias, groups=5)).transpose(1, 2)
    assert relative_error(y, expected) < TOLERANCE
    assert state is None


def test_state_is_the_last_inputs(convolution):
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    _, state = convolution(x, return_state=True)
    assert torch.equal(state, x[:, 9 - (convolution.width - 1) :])


@pytest.mark.parametrize("split", range(1, 7))
def test_split_anywhere(convolution, split):
    """Also with a first part shorter than the taps reach back."""
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    whole, whole_state = convolution(x, return_state=True)
    first, state = convolution(x[:, :split], return_state=True)
    second, state = convolution(x[:, split:], state, return_state=True)
    assert relative_error(torch.cat((first, second), dim=1), whole) < TOLERANCE
    assert torch.equal(state, whole_state)


def test_steps_equal_the_whole_and_update_the_state_in_place(convolution):
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    whole, whole_state = convolution(x, return_state=True)
    state = convolution.zero_state(2, torch.float64, x.device)
    address = state.data_ptr()
    with torch.no_grad():
        stepped = torch.cat([convolution.step(x[:, t : t + 1], state) for t in range(7)], dim=1)
    assert relative_error(stepped, whole) < TOLERANCE
    assert torch.equal(state, whole_state)
    assert state.data_ptr() == address


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="kernels are not interpreted here")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "bias", "channels"), [(2, False, 5), (4, True, 300), (7, True, 64)])
def test_kernel_of_a_step(width, bias, channels, dtype, device):
    """Against torch in fp64 on the same numbers, from a strided input; the state exactly."""
    from loglinear.ops.triton.convolution import convolution_step

    convolution = ShortConvolution(channels, width, bias).to(device, dtype)
    exact = copy.deepcopy(convolution).double()
    state = torch.randn(3, width - 1, channels).to(device, dtype)
    wide, address = state.double(), state.data_ptr()
    with torch.no_grad():
        for _ in range(width + 1):
            x = torch.randn(3, 2, 2 * channels).to(device, dtype)[:, 1:, ::2]
            found = convolution_step(x, state, convolution.weight, convolution.bias)
            assert found.dtype == dtype and found.is_contiguous()
            assert relative_error(found.double(), exact.step(x.double(), wide)) < (
                1e-6 if dtype == torch.float32 else 5e-3
            )
            assert torch.equal(state.double(), wide)
    assert state.data_ptr() == address


@pytest.mark.skipif(not INTERPRETED, reason="kernels are not interpreted here")
def test_kernel_of_a_step_is_an_operator():
    from loglinear.ops.triton.convolution import _convolution_op, convolution_step

    layer, x = ShortConvolution(6, 4, True).requires_grad_(False), torch.randn(2, 1, 6)
    state = torch.randn(2, 3, 6)
    arguments = (x, state.clone(), layer.weight, layer.bias)
    torch.library.opcheck(_convolution_op, arguments, test_utils=("test_schema", "test_faketensor"))
    eager, compiled = state.clone(), state.clone()
    step = torch.compile(convolution_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        step(x, compiled, layer.weight, layer.bias), convolution_step(x, eager, layer.weight, layer.bias)
    )
    assert torch.equal(compiled, eager) and eager._version > 0


@pytest.mark.gpu
def test_steps_without_gradients_take_the_kernel(monkeypatch):
    from loglinear.layers import convolution as module

    layer, x = ShortConvolution(6, 4).cuda(), torch.randn(2, 1, 6, device="cuda")
    state, calls = layer.zero_state(2, torch.float32, x.device), []
    kernel = module.kernel.convolution_step
    monkeypatch.setattr(module.kernel, "convolution_step", lambda *given: calls.append(1) or kernel(*given))
    layer.step(x, state.clone()).sum().backward()
    assert not calls
    with torch.no_grad():
        layer.step(x, state)
        assert calls == [1]
        layer.double().step(x.double(), state.double())
        layer.float().step(x, torch.zeros(2, 6, 3, device="cuda").transpose(1, 2))
    assert calls == [1], "float64 and states that are not contiguous are torch's"


@pytest.mark.parametrize("lengths", [[4, 0, 1, 3], [0, 2], [1, 1, 1], [5, 0], [0, 0, 6, 0]])
@pytest.mark.parametrize("carried", [False, True])
def test_packed_equals_separate(convolution, lengths, carried):
    """Outputs, final states and gradients, with empty and one-token sequences."""
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x = torch.randn(1, sum(lengths), 5, dtype=torch.float64, requires_grad=True)
    past = convolution.width - 1
    states = torch.randn(len(lengths), past, 5, dtype=torch.float64) if carried else None
    y, state = convolution(x, states, bounds, return_state=True)
    weights = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * weights).sum(), x)
    for row, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        own = None if states is None else states[row : row + 1]
        if begin == end:
            assert torch.equal(state[row], torch.zeros(past, 5) if own is None else own[0])
            continue
        piece = x[:, begin:end].detach().requires_grad_()
        alone, alone_state = convolution(piece, own, return_state=True)
        assert relative_error(y[:, begin:end], alone) < TOLERANCE
        assert torch.equal(state[row], alone_state[0])
        (alone_grad,) = torch.autograd.grad((alone * weights[:, begin:end]).sum(), piece)
        assert relative_error(grad[:, begin:end], alone_grad) < TOLERANCE
