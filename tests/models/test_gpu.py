"""What only a GPU can show: compiled decoding as `generate` does it, and steps without device syncs."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from loglinear.layers import MIXERS
from small_models import small_model, tokens

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
