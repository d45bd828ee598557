import pytest
import torch

from loglinear.layers import MIXERS
from loglinear.models import parameter_groups
from small_models import small_model


@pytest.mark.parametrize("mixer", [*MIXERS, "hybrid"])
@pytest.mark.parametrize("tied", [False, True])
def test_each_parameter_is_in_exactly_one_group(mixer, tied):
    model = small_model(mixer, tie_word_embeddings=tied)
    groups = model.parameter_groups(0.1)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in members}) == len(members)
    assert {id(parameter) for parameter in members} == {id(parameter) for parameter in model.parameters()}
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("mixer", [*MIXERS, "hybrid"])
def test_what_is_decayed(mixer):
    """Matrices of projections, convolutions and embeddings, and nothing else."""
    model = small_model(mixer)
    decayed, undecayed = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    parameters = dict(model.named_parameters())
    for name in decayed["param_names"]:
        assert parameters[name].ndim == 2 and "level_scales" not in name, name
    matrices = [name for name in undecayed["param_names"] if parameters[name].ndim > 1]
    assert all("level_scales" in name for name in matrices), matrices
    for word in ("norm", "bias", "A_log", "dt_bias", ".D", "level_scales"):
        assert not [name for name in decayed["param_names"] if word in name]


def test_frozen_parameters_are_left_out_and_negative_decay_is_refused():
    model = small_model("mamba2")
    model.model.embed_tokens.weight.requires_grad_(False)
    names = [name for group in parameter_groups(model, 0.1) for name in group["param_names"]]
    assert "model.embed_tokens.weight" not in names
    with pytest.raises(ValueError, match="weight_decay must not be negative, got -1"):
        parameter_groups(model, -1)
