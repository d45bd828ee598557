"""Weights by name: twins start equal where they agree."""

import pytest
import torch

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.initialization import initialize_by_name


def initialized(mixer: str, seed: int = 0, **options) -> dict[str, torch.Tensor]:
    model = LogLinearForCausalLM(LogLinearConfig.preset(f"tiny-{mixer}", **options))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)
    initialize_by_name(model, seed)
    return dict(model.state_dict())


@pytest.mark.parametrize("mixer", ["mamba2", "gated-deltanet", "kda"])
def test_twins_differ_in_the_levels_alone(mixer):
    plain, levels = initialized(mixer, num_levels=1), initialized(mixer)
    assert all("level_scales" in name for name in set(levels).difference(plain))
    assert set(plain) <= set(levels) and all(torch.equal(plain[name], levels[name]) for name in plain)


def test_every_weight_is_drawn_by_the_model_s_own_rule():
    weights = initialized("mamba2", initializer_range=0.5)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert weights["model.layers.0.mixer.qkv_proj.weight"].std() == pytest.approx(0.5, rel=0.1)
    assert (weights["model.norm.weight"] == 1).all()


def test_names_and_seeds_make_weights_different():
    one, other = initialized("mamba2", 0), initialized("mamba2", 1)
    name = "model.layers.{}.mixer.qkv_proj.weight"
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert not torch.equal(one[name.format(0)], other[name.format(0)])


def test_tied_weights_stay_tied_and_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-mamba2", tie_word_embeddings=True))
    torch.set_rng_state(state)
    initialize_by_name(model, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, initialized("mamba2")["model.embed_tokens.weight"])
