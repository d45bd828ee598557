"""What only a GPU can show: compiled decoding as `generate` does it, and steps without device syncs."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from loglinear.layers import MIXERS
from small_models import relative_error, small_model, tokens

pytestmark = pytest.mark.gpu
KINDS = [*MIXERS, "hybrid", "windowed mamba2", "windowed gated_deltanet"]


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = 0
    return tokens(2, 11).cuda(), mask.cuda()


@pytest.mark.parametrize("kind", ["mamba2", "gated_deltanet", "hybrid"])
def test_generate_compiles_static_caches_if_asked(kind):
    """With a `compile_config`, `generate` compiles decoding with a static cache; else it is recorded."""
    torch.compiler.reset()
    model = small_model(kind).cuda()
    ids, mask = padded_batch()
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    settings = {"cache_implementation": "static", "compile_config": CompileConfig()}
    static = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, **settings)
    assert torch.equal(static, plain)


@pytest.mark.parametrize("kind", ["mamba2", "gated_deltanet", "hybrid", "gla", "kda"])
@pytest.mark.parametrize("kept", [None, "float32"])
@torch.no_grad()
def test_states_of_a_model_in_sixteen_bits(kind, kept):
    """On a GPU states have a window: they are bfloat16, but for decays per channel and where float32 is asked for.
    Steps are as far from float64 as a call on all tokens, which keeps no state.
    """
    model, exact = small_model(kind, state_dtype=kept).cuda().bfloat16(), small_model(kind).cuda()
    exact.load_state_dict(model.state_dict())
    narrow = kept is None and kind not in ("gla", "kda")
    ids = tokens(2, 40).cuda()
    wanted = exact(ids, use_cache=False).logits
    limit = 1.5 * relative_error(model(ids, use_cache=False).logits.double(), wanted)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        found = []
        for part in (ids[:, :9], *ids[:, 9:30].split(1, 1), ids[:, 30:35], *ids[:, 35:].split(1, 1)):
            found.append(model(part, past_key_values=cache).logits.double())
            buckets = cache.layers[0].state.fenwick.buckets
            assert buckets.dtype == (torch.bfloat16 if narrow else torch.float32)
        assert relative_error(torch.cat(found, dim=1), wanted) < limit


@pytest.mark.parametrize("kind", KINDS)
def test_steps_do_not_sync(kind):
    model = small_model(kind).cuda()
    ids, mask = padded_batch()
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
            model(ids, attention_mask=mask, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(ids[:, :1], past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
