import pytest
import torch
from transformers import DynamicCache

from loglinear import LogLinearConfig, LogLinearForCausalLM
from loglinear.layers import MIXERS
from loglinear.models import cache_nbytes
from loglinear.models.cost import mean_occupied
from small_models import small_config, small_model, tokens

PAPER = {
    "transformer-693m": 693e6,
    "transformer-778m": 778e6,
    "mamba2-802m": 802e6,
    "log-linear-mamba2-825m": 825e6,
    "gated-deltanet-793m": 793e6,
    "log-linear-gated-deltanet-796m": 796e6,
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_have_the_papers_parameter_counts(name):
    with torch.device("meta"):
        model = LogLinearForCausalLM(LogLinearConfig.preset(name))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert abs(counted / PAPER[name] - 1) < 0.005
    assert model.cost().parameters == counted


def test_log_linear_adds_exactly_its_level_parameters():
    """A projection to 48 heads x 15 levels and as many scales, in each of 21 layers."""
    added = 21 * (1536 * 48 * 15 + 48 * 15)
    plain, full = (LogLinearConfig.preset(name).cost() for name in ("mamba2-802m", "log-linear-mamba2-825m"))
    assert full.parameters - plain.parameters == added


def test_paper_states_are_as_large_as_published():
    """Per sequence, fp32, 15 levels x 21 layers: 557 and 495 MB, against 37 and 33 MB for one level. Here those of
    full partitions take half of that, but for a processor.
    """
    configs = {name: LogLinearConfig.preset(name) for name in PAPER}
    sizes = {name: config.cost(16_384, device="cpu").state_bytes / 1e6 for name, config in configs.items()}
    assert round(sizes["log-linear-gated-deltanet-796m"]) == 557 and round(sizes["gated-deltanet-793m"]) == 37
    assert round(sizes["log-linear-mamba2-825m"]) == 495 and round(sizes["mamba2-802m"]) == 33
    for name, config in configs.items():
        parts = 2 if name.startswith("log-linear") else 1
        assert parts * config.cost(16_384).state_bytes == config.cost(16_384, device="cpu").state_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 0, 16])
@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("gated_deltanet", {}),
        ("hybrid", {}),
        ("kda", {}),
        ("mamba2", {"num_levels": 1}),
        ("mamba2", {"num_levels": 6}),  # one fewer than 64 tokens fill
        ("mamba2", {"num_levels": 8}),
        ("mamba2", {"state_dtype": "float32"}),
        ("gla", {"state_dtype": "bfloat16"}),
    ],
)
def test_bytes_of_states_are_those_that_are_allocated(mixer, options, dtype, window):
    """By the dtype of the model and by device: on a processor states have a window if one is asked for."""
    model = small_model(mixer, decoding_window=window, **options).to(dtype)
    recurrent = [block.mixer for block in model.model.layers if hasattr(block.mixer, "decoding_window")]
    allocated = sum(layer.zero_state(1).fenwick.buckets.nbytes for layer in recurrent)
    assert model.cost(21, dtype, "cpu").state_bytes == allocated
    on_a_gpu = small_config(mixer, decoding_window=16 if window is None else window, **options)
    assert model.cost(21, dtype).state_bytes == on_a_gpu.cost(21, dtype, "cpu").state_bytes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mixer", [*MIXERS, "hybrid"])
def test_bytes_and_parameters_are_those_of_a_real_model(mixer, tied):
    model = small_model(mixer, tie_word_embeddings=tied).float()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 21), past_key_values=cache)
    cost = model.cost(21, torch.float32)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    embedding = 43 * 28 * (1 if tied else 2)
    assert cost.parameters_non_embedding == cost.parameters - embedding
    small = 2 * 8  # positions: one int64 per layer and row
    if mixer in ("linear_attention", "retention", "mamba2"):
        small += 2 * 4 * model.config.num_levels * model.config.num_heads  # pending decays
    keys_and_values = cost.kv_cache_bytes if mixer in ("attention", "hybrid") else 0
    assert cache_nbytes(cache) == cost.state_bytes + cost.conv_bytes + keys_and_values + small


def test_matrix_products_are_counted_as_torch_counts_them():
    """Forward FLOPs of everything but attention itself, whose causal half torch's counter does not know."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small_model("attention", num_key_value_heads=4).float()
    length = 32
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(tokens(1, length), use_cache=False)
    products = sum(
        count
        for name, count in counter.get_flop_counts()["Global"].items()
        if str(name) in ("aten.mm", "aten.addmm", "aten.bmm")
    )
    attention = 2 * 4 * (4 * 6) * (length + 1) / 2  # two layers, two products, four heads of six, half the context
    assert model.cost(length).training_flops_per_token == 3 * (products / length + attention)


def test_mean_occupied():
    assert mean_occupied(8, 4) == (0 + 1 + 1 + 2 + 1 + 2 + 2 + 3) / 8
    assert mean_occupied(4, 1) == 3 / 4
    # About half of the levels, as the paper says.
    assert 0.4 < mean_occupied(16_384, 15) / 15 < 0.5


@pytest.mark.parametrize("mixer", [*MIXERS, "hybrid"])
def test_costs_grow_as_they_should(mixer):
    config = small_config(mixer)
    short, long = config.cost(256), config.cost(1024)
    grows = mixer in ("attention", "hybrid")
    assert (long.kv_cache_bytes == 4 * short.kv_cache_bytes) and long.conv_bytes == short.conv_bytes
    assert long.state_bytes == short.state_bytes and (long.state_bytes > 0) == (mixer != "attention")
    assert long.training_flops_per_token > short.training_flops_per_token
    if not grows:
        assert long.training_flops_per_token < 1.5 * short.training_flops_per_token
        plain = small_config(mixer, num_levels=1).cost(1024)
        assert plain.training_flops_per_token < long.training_flops_per_token
        assert plain.decoding_flops_per_token < long.decoding_flops_per_token
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        config.cost(0)
