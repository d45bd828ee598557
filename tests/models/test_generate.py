"""`generate` in all its modes against a loop that knows no cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from loglinear.layers import MIXERS
from small_models import small_model, tokens

KINDS = [*MIXERS, "hybrid"]
NEW = 9
STATIC = {"cache_implementation": "static"}
CHUNKED = {"prefill_chunk_size": 4}
MODES = {
    "dynamic": {},
    "static": STATIC,
    "none": {"use_cache": False},
    "chunked": CHUNKED,
    "static-chunked": {**STATIC, **CHUNKED},
    "by-one": {"prefill_chunk_size": 1},
}


@torch.no_grad()
def by_loop(model, ids: torch.Tensor, count: int = NEW) -> torch.Tensor:
    """Greedy continuation of `ids`, everything computed anew for each token; the new tokens only."""
    for _ in range(count):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids[:, -count:]


def assert_same(generated: torch.Tensor, expected: torch.Tensor) -> None:
    assert len(expected.unique()) > 2, "the model repeats one token: this comparison would show nothing"
    assert torch.equal(generated, expected)


def generate(model, ids: torch.Tensor, count: int = NEW, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)[:, -count:]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy(kind, mode):
    model, ids = small_model(kind), tokens(2, 11)
    assert_same(generate(model, ids, **MODES[mode]), by_loop(model, ids))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding(kind, mode):
    """Each row of a ragged batch continues as it would alone; in chunks, some see nothing but padding of a row."""
    model = small_model(kind)
    rows = [tokens(1, length) for length in (11, 2, 7)]
    ids, mask = torch.full((3, 11), 42), torch.zeros(3, 11, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, 11 - row.shape[1] :], mask[index, 11 - row.shape[1] :] = row, 1
    generated = generate(model, ids, attention_mask=mask, **MODES[mode])
    assert_same(generated, torch.cat([by_loop(model, row) for row in rows]))


@pytest.mark.parametrize("kind", ["gated_deltanet", "hybrid"])
def test_right_padding(kind):
    model = small_model(kind)
    rows = [tokens(1, length) for length in (11, 2, 7)]
    ids, mask = torch.full((3, 11), 42), torch.zeros(3, 11, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : row.shape[1]], mask[index, : row.shape[1]] = row, 1
    generated = generate(model, ids, attention_mask=mask)
    assert_same(generated, torch.cat([by_loop(model, row) for row in rows]))


@pytest.mark.parametrize("options", [{}, STATIC, CHUNKED], ids=["dynamic", "static", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search(kind, options):
    """Against beam search without a cache; beams that survive take their states along."""
    model, ids = small_model(kind), tokens(2, 5)
    without = generate(model, ids, num_beams=4, use_cache=False)
    assert torch.equal(generate(model, ids, num_beams=4, **options), without)
    assert not torch.equal(without, generate(model, ids, use_cache=False)), "beam search found what greedy does"


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_sampling(kind):
    model, ids = small_model(kind), tokens(2, 5)
    sampled = []
    for options in ({"use_cache": False}, {}, STATIC):
        torch.manual_seed(3)
        sampled.append(model.generate(ids, max_new_tokens=NEW, do_sample=True, num_return_sequences=3, **options))
    assert sampled[0].shape == (6, 5 + NEW)
    assert torch.equal(sampled[1], sampled[0]) and torch.equal(sampled[2], sampled[0])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_continuing_from_a_passed_cache(kind, static):
    """Generate, then generate on with the same cache; and a second turn whose prompt is longer than what is cached."""
    model, ids = small_model(kind), tokens(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert int(cache.get_seq_length()) == 9  # the newest token has not been read yet
    second = model.generate(first, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert_same(second[:, 6:], by_loop(model, ids, 9))
    turn = torch.cat((second, tokens(2, 5)), dim=1)
    assert_same(generate(model, turn, past_key_values=cache), by_loop(model, turn))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_by_hand(kind):
    """Prefill in unequal parts, then single tokens, ragged: the mask may cover the past or this call only."""
    model = small_model(kind)
    ids, whole_mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    whole_mask[0, :5] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=whole_mask).logits
        for covers_past in (False, True):
            cache, parts = DynamicCache(config=model.config), []
            for begin, end in ((0, 3), (3, 8), (8, 9), (9, 12)):
                mask = whole_mask[:, (0 if covers_past else begin) : end]
                parts.append(model(ids[:, begin:end], attention_mask=mask, past_key_values=cache).logits)
            assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-10)
            assert cache.get_seq_length() == 12
            assert [layer.state.positions.tolist() for layer in cache.layers] == [[7, 12], [7, 12]]


def test_mask_by_layer_type():
    model, ids = small_model("hybrid"), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    by_type = {"loglinear_mixer": mask}
    assert torch.equal(model(ids, attention_mask=by_type).logits, model(ids, attention_mask=mask).logits)


def test_decoding_needs_no_mask():
    """`generate` passes none for a token that it just generated: decoding has fixed shapes and no device sync."""
    model, ids = small_model("hybrid"), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    seen = []
    forward = model.model.forward

    def spy(**arguments):
        seen.append((arguments["input_ids"].shape[1], arguments["attention_mask"] is None))
        return forward(**arguments)

    model.model.forward = spy
    generate(model, ids, count=3, attention_mask=mask)
    assert seen == [(6, False), (1, True), (1, True)]


def test_assisted_decoding_is_refused():
    model = small_model("gla")
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, tokens(1, 4), assistant_model=small_model("gla"))


def test_unknown_generation_arguments_are_refused():
    with pytest.raises(ValueError, match="not used by the model"):
        generate(small_model("gla"), tokens(1, 4), atention_mask=torch.ones(1, 4))


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_cache_housekeeping(kind):
    model, ids = small_model(kind), tokens(2, 6)
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
            expected = model(ids, past_key_values=cache).logits
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 1]))
            swapped = model(ids[[1, 0], :1], past_key_values=cache).logits
            again = model(torch.cat((ids, ids[:, :1]), dim=1)[[1, 0]], use_cache=False).logits[:, -1:]
            assert torch.allclose(swapped[1], model(torch.cat((ids[:1], ids[:1, :1]), 1)).logits[0, -1:])
            assert torch.allclose(swapped[0], model(torch.cat((ids[1:], ids[1:, :1]), 1)).logits[0, -1:]), again
            with pytest.raises(ValueError, match="cannot forget its last tokens"):
                cache.crop(-1)
            cache.reset()
            assert int(cache.get_seq_length()) == 0
            assert torch.equal(model(ids, past_key_values=cache).logits, expected)
