import json

import pytest
import torch
from transformers import AutoConfig

from loglinear import LogLinearConfig
from loglinear.layers import MIXERS
from loglinear.window import length_for
from small_models import small_config

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_heads": 4}


def test_sizes_are_derived_as_in_the_papers():
    mamba2 = LogLinearConfig(mixer="mamba2", hidden_size=1536, num_heads=48)
    assert (mamba2.num_groups, mamba2.state_size, mamba2.head_dim, mamba2.conv_size) == (1, 128, 64, 4)
    delta = LogLinearConfig(mixer="gated_deltanet", hidden_size=1536, num_heads=6)
    assert (delta.num_groups, delta.state_size, delta.head_dim, delta.conv_size) == (6, 192, 384, 4)
    gla = LogLinearConfig(mixer="gla", hidden_size=1024, num_heads=4)
    assert (gla.state_size, gla.head_dim, gla.conv_size) == (128, 256, 0)
    retention = LogLinearConfig(mixer="retention", hidden_size=1024, num_heads=4)
    assert (retention.state_size, retention.head_dim) == (256, 512)
    assert delta.num_levels == 15 and delta.intermediate_size == 4096
    assert LogLinearConfig(**SMALL, max_position_embeddings=16_385).num_levels == 16


def test_hybrids_derive_their_attention():
    config = LogLinearConfig(hidden_size=256, num_hidden_layers=4, num_heads=2, attention_layers=[3, 1])
    assert config.mixers == ["gated_deltanet", "attention", "gated_deltanet", "attention"]
    assert (config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim) == (4, 4, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_head": 4}, "unknown configuration key 'num_head'; did you mean 'num_heads'"),
        ({"hiden_size": 4}, "unknown configuration key 'hiden_size'; did you mean 'hidden_size'"),
        ({"temperature": 0.5}, "unknown configuration key 'temperature'"),
        ({"mixer": "mamba"}, "mixer must be one of .*, got 'mamba'; did you mean 'mamba2'"),
        ({"attention_layers": [3]}, r"attention_layers must be indices from 0 to num_hidden_layers - 1 = 2, got \[3\]"),
        ({"attention_layers": [-1]}, r"got \[-1\]"),
        ({"attention_layers": [1, 1]}, "attention_layers must not repeat an index"),
        ({"num_groups": 3}, "num_groups 3 does not divide num_heads 4"),
        ({"num_levels": 0}, "num_levels must be an integer of at least 1, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number, got 0.0"),
        ({"conv_size": 1}, "conv_size must be 0 .no convolution. or at least 2 taps, got 1"),
        ({"expand": 2}, "expand is a size of mixer 'mamba2'; for 'gated_deltanet' give expand_v"),
        ({"expand_v": 2, "state_size": 8, "head_dim": 12}, "head_dim 12 contradicts expand_v 2 x state_size 8"),
        ({"mixer": "mamba2", "expand_v": 2}, "expand_v is not a size of mixer 'mamba2'"),
        ({"mixer": "mamba2", "num_heads": 3}, "num_heads 3 does not divide expand x hidden_size = 128"),
        ({"mixer": "mamba2", "expand": 2, "head_dim": 16}, "num_heads 4 x head_dim 16 contradicts expand"),
        ({"mixer": "retention", "state_size": 7}, "state_size must be even, got 7"),
        ({"mixer": "attention", "num_levels": 3}, "num_levels is not a size of mixer 'attention', got 3"),
        ({"mixer": "attention", "head_dim": 3}, "head_dim is not a size .*, got 3; give attention_head_dim"),
        ({"mixer": "attention", "attention_layers": [0]}, "leave attention_layers out"),
        ({"mixer": "attention", "num_heads": 5}, "num_attention_heads 5 does not divide hidden_size 64"),
        ({"mixer": "attention", "num_attention_heads": 2}, "num_attention_heads 2 contradicts num_heads 4"),
        ({"mixer": "attention", "num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"mixer": "attention", "attention_head_dim": 5}, "attention_head_dim must be even"),
        ({"num_attention_heads": 2}, "num_attention_heads is a size of .*, but attention_layers is empty"),
        ({"state_dtype": "float16"}, "state_dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ({"decoding_window": 12}, "decoding_window must be a power of two, got 12"),
        ({"mixer": "attention", "state_dtype": "bfloat16"}, "state_dtype is of recurrent states"),
        ({"mixer": "attention", "decoding_window": 16}, "decoding_window is of recurrent states"),
        ({"pad_token_id": 32_000}, "pad_token_id must be in .0, vocab_size = 32000., got 32000"),
        ({"num_heads": 5}, "num_heads 5 does not divide the 48 key channels of mixer"),
        ({"state_size": 3, "expand_v": 1.5}, "expand_v x state_size = 4.5 must be a whole number"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        LogLinearConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(
    "fields",
    [{"num_heads": "4"}, {"num_levels": 2.5}, {"vocab_size": True}, {"attention_layers": 3}, {"use_cache": "yes"}],
)
def test_wrong_types(fields):
    (name,) = fields
    with pytest.raises(TypeError, match=name):
        LogLinearConfig(**{**SMALL, **fields})


@pytest.mark.parametrize("mixer", [*MIXERS, "hybrid"])
def test_saved_and_loaded(mixer, tmp_path):
    config = small_config(mixer, num_hidden_layers=3, eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LogLinearConfig
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "loglinear" and saved["mixer"] == config.mixer
    for name in set(LogLinearConfig.field_names()) - {"transformers_version"}:
        assert getattr(loaded, name) == getattr(config, name), name
    assert "layer_types" not in saved


def test_options_of_states_are_checked_where_they_are_changed(tmp_path):
    """`from_pretrained` sets fields of a configuration that was checked before."""
    from loglinear import LogLinearForCausalLM

    LogLinearForCausalLM(LogLinearConfig.preset("tiny-mamba2", state_dtype="bfloat16")).save_pretrained(tmp_path)
    model = LogLinearForCausalLM.from_pretrained(tmp_path, decoding_window=8)
    state = model.model.layers[0].mixer.zero_state(2).fenwick
    assert state.buckets.dtype == torch.bfloat16 and state.window.length == 8
    assert model.config.state_dtype == "bfloat16" and model.config.decoding_window == 8
    with pytest.raises(ValueError, match="state_dtype must be 'float32' or 'bfloat16', got 'float16'"):
        LogLinearForCausalLM.from_pretrained(tmp_path, state_dtype="float16")
    with pytest.raises(ValueError, match="decoding_window must be a power of two, got -1"):
        LogLinearForCausalLM.from_pretrained(tmp_path, decoding_window=-1)
    model = LogLinearForCausalLM.from_pretrained(tmp_path, decoding_window=0)
    assert model.model.layers[0].mixer.zero_state(2).fenwick.window is None


def test_windows_that_nobody_chose_are_those_of_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert [length_for(None, device) for device in (cpu, gpu)] == [0, 16]
    assert [length_for(chosen, gpu) for chosen in (0, 4)] == [0, 4] == [length_for(chosen, cpu) for chosen in (0, 4)]
    LogLinearConfig(mixer="attention", decoding_window=0)


def test_presets_take_overrides_and_refuse_unknown_names():
    config = LogLinearConfig.preset("log-linear-mamba2-825m", num_hidden_layers=2, num_levels=4)
    assert (config.num_hidden_layers, config.num_levels, config.head_dim) == (2, 4, 64)
    with pytest.raises(ValueError, match="unknown preset 'log-linear-mamba2'; did you mean"):
        LogLinearConfig.preset("log-linear-mamba2")
    with pytest.raises(ValueError, match="unknown configuration key 'num_layers'"):
        LogLinearConfig.preset("mamba2-802m", num_layers=2)


def test_every_preset_is_valid():
    for name in LogLinearConfig.presets():
        LogLinearConfig.preset(name)
    assert {f"tiny-{mixer.replace('_', '-')}" for mixer in MIXERS} <= set(LogLinearConfig.presets())
