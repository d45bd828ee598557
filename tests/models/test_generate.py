"""`generate` in all its modes against a loop that knows no cache."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation import stopping_criteria

from loglinear.layers import MIXERS
from small_models import relative_error, small_model, tokens

KINDS = [*MIXERS, "hybrid", "windowed mamba2", "windowed hybrid"]
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


def ragged(side: str, lengths: tuple[int, ...] = (3, 17, 40)) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Ids and mask of prompts of different lengths, padded on one side, and each prompt alone."""
    rows = [tokens(1, length) for length in lengths]
    ids = torch.full((len(rows), max(lengths)), 42)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(0, row.shape[1]) if side == "right" else slice(ids.shape[1] - row.shape[1], None)
        ids[index, place], mask[index, place] = row, 1
    return ids, mask, rows


@pytest.mark.parametrize("chunk", [None, 1, 8, 40])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gated_deltanet", "mamba2", "hybrid"])
def test_ragged_prompts_in_chunks(kind, side, static, chunk):
    """Tokens and logits are those of each row alone, also where a row has no token in the last chunks."""
    model = small_model(kind)
    ids, mask, rows = ragged(side)
    options = {"prefill_chunk_size": chunk, "max_new_tokens": NEW, "do_sample": False}
    if static:
        options |= STATIC
    found = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    assert_same(found.sequences[:, -NEW:], torch.cat([by_loop(model, row) for row in rows]))
    logits = torch.stack(found.logits, dim=1)
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(torch.cat((row, found.sequences[index : index + 1, -NEW:-1]), dim=1)).logits[0, -NEW:]
        assert relative_error(logits[index], alone.float()) < 1e-6  # `generate` returns logits in fp32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_right_padding(kind, mode):
    model = small_model(kind)
    ids, mask, rows = ragged("right", (11, 2, 7))
    generated = generate(model, ids, attention_mask=mask, **MODES[mode])
    assert_same(generated, torch.cat([by_loop(model, row) for row in rows]))


def test_right_padding_without_a_cache_is_refused():
    """It would put new tokens behind the padding."""
    ids, mask, _ = ragged("right", (5, 2))
    with pytest.raises(ValueError, match="row 1 has 2 runs: remove the masked tokens"):
        generate(small_model("mamba2"), ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_ragged_beams_in_chunks(kind, side, options):
    model = small_model(kind)
    ids, mask, rows = ragged(side)
    found = generate(model, ids, attention_mask=mask, num_beams=3, prefill_chunk_size=8, **options)
    alone = [generate(model, row, num_beams=3, use_cache=False) for row in rows]
    assert_same(found, torch.cat(alone))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_ragged_turns_in_chunks(kind, static):
    """A second turn, right-padded and in chunks, behind a first one: one row of it has the newest token only."""
    model = small_model(kind)
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    ids, mask, rows = ragged("right", (3, 17))
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, past_key_values=cache, prefill_chunk_size=8
    )
    turn, turn_mask, turns = ragged("right", (0, 20))
    whole_mask = torch.cat((mask, torch.ones(2, 4, dtype=torch.int64), turn_mask), dim=1)
    second = generate(
        model, torch.cat((first, turn), dim=1), attention_mask=whole_mask, past_key_values=cache, prefill_chunk_size=8
    )
    said = [torch.cat((rows[i], first[i : i + 1, -4:], turns[i]), dim=1) for i in range(2)]
    assert_same(second, torch.cat([by_loop(model, row) for row in said]))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["gated_deltanet", "hybrid"])
def test_padding_repeats_the_newest_output(kind, static):
    """Whatever happens to the cache between the chunks: rows reordered, repeated, selected, forgotten."""
    model = small_model(kind)
    ids, nothing = tokens(3, 6), torch.zeros(3, 2, dtype=torch.int64)
    some = torch.tensor([[0, 0], [1, 1], [0, 1]])

    def step(cache, ids, mask=None):
        return model.model(ids, attention_mask=mask, past_key_values=cache).last_hidden_state

    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
        assert step(cache, ids[:, :2], nothing).abs().max() == 0  # no row has a token yet
        newest = step(cache, ids)[:, -1]
        address = cache.layers[-1].newest_output.data_ptr()
        assert torch.equal(step(cache, ids[:, :2], nothing), newest[:, None].expand(-1, 2, -1))
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        newest = newest[[2, 0, 1]]
        padded = step(cache, ids[:, :2], some)
        assert torch.equal(padded[0], newest[:1].expand(2, -1))
        assert torch.equal(padded[2, 0], newest[2])  # between its tokens a row repeats the one before, too
        newest = step(cache, ids[:, :1])[:, -1]
        if static:
            assert cache.layers[-1].newest_output.data_ptr() == address
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 1, 0, 2]))
        newest = newest[[2, 0, 0, 1]]
        assert torch.equal(step(cache, tokens(4, 1), torch.zeros(4, 1)), newest[:, None])
        with pytest.raises(ValueError, match="holds 4 rows, but the batch has 3"):
            step(cache, ids, torch.zeros(3, 6))
        cache.reset()
        assert step(cache, ids[:, :2], nothing).abs().max() == 0


@torch.no_grad()
def test_padding_repeats_the_newest_output_of_packed_rows():
    model, ids = small_model("hybrid").model, tokens(1, 7)
    cache = DynamicCache(config=model.config)
    first = model(ids, cu_seqlens=torch.tensor([0, 3, 3, 7]), past_key_values=cache).last_hidden_state[0]
    second = model(ids[:, :2], cu_seqlens=torch.tensor([0, 2, 2, 2]), past_key_values=cache).last_hidden_state[0]
    padding = model(tokens(3, 1), attention_mask=torch.zeros(3, 1), past_key_values=cache).last_hidden_state[:, 0]
    assert torch.equal(padding, torch.stack((second[1], torch.zeros_like(first[0]), first[6])))


def test_an_overfull_static_cache_is_refused():
    """Before any layer has read the call; a padded column takes no room."""
    model, ids = small_model("hybrid"), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    mask[1, 3] = 0
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=8)
        with pytest.raises(ValueError, match="9 tokens do not fit into a static cache of 8 tokens that holds 0"):
            model(tokens(2, 9), past_key_values=cache)
        model(ids, attention_mask=mask, past_key_values=cache)  # 5 and 4 tokens in 8 columns
        model(ids[:, :2], past_key_values=cache)
        before = [tensor.clone() for layer in cache.layers for tensor in layer.state.tensors()]
        with pytest.raises(ValueError, match="2 tokens do not fit into a static cache of 8 tokens that holds 7"):
            model(ids[:, :2], past_key_values=cache)
        after = [tensor for layer in cache.layers for tensor in layer.state.tensors()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        model(ids[:, :1], past_key_values=cache)
        only_shorter = torch.tensor([[0], [1]])
        model(ids[:, :1], attention_mask=only_shorter, past_key_values=cache)
        with pytest.raises(ValueError, match="1 tokens do not fit into a static cache of 8 tokens that holds 8"):
            model(ids[:, :1], attention_mask=only_shorter, past_key_values=cache)


@pytest.mark.parametrize("chunk", [None, 4])
def test_generating_beyond_a_static_cache_is_refused(chunk):
    model, ids = small_model("hybrid"), tokens(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=12)
    options = {"do_sample": False, "prefill_chunk_size": chunk}
    first = model.generate(ids, max_new_tokens=7, past_key_values=cache, **options)  # the newest is never read
    with pytest.raises(ValueError, match="1 tokens do not fit into a static cache of 12 tokens that holds 12"):
        model.generate(first, max_new_tokens=1, past_key_values=cache, **options)
    recurrent = small_model("gated_deltanet")
    cache = StaticCache(config=recurrent.config, max_cache_len=12)  # its states have room for any length
    assert recurrent.generate(ids, max_new_tokens=20, past_key_values=cache, **options).shape == (2, 26)


def test_generate_refuses_an_overfull_cache_when_compiled():
    """Steps that `generate` compiles count nothing: it asks before each. Padding, of 3 columns here, takes no room."""
    torch.compiler.reset()
    model, ids = small_model("hybrid"), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    compiled = CompileConfig(backend="aot_eager", mode=None)
    compiled._compile_all_devices = True  # as it is on CUDA
    expected = generate(model, ids, 6, attention_mask=mask)
    for new, fits in ((6, True), (7, False)):  # the newest is never read: 3 + 5 tokens, in 11 columns
        cache = StaticCache(config=model.config, max_cache_len=8)
        options = {"attention_mask": mask, "past_key_values": cache, "compile_config": compiled}
        if fits:
            assert_same(generate(model, ids, new, **options), expected)
            assert cache.layers[1].state.filled is None, "the steps were not compiled"
        else:
            with pytest.raises(ValueError, match="1 tokens do not fit into a static cache of 8 tokens that holds 8"):
                generate(model, ids, new, **options)


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_prompts_may_be_embeddings(kind, mode):
    model, ids = small_model(kind), tokens(2, 11)
    embedded = model.get_input_embeddings()(ids)
    generated = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False, **MODES[mode])
    assert_same(generated, by_loop(model, ids))


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_nobody_is_warned_of_lengths_beyond_the_trained_one(kind, monkeypatch):
    model, ids = small_model(kind, max_position_embeddings=8), tokens(1, 5)
    said = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", said.append)
    assert_same(generate(model, ids, 12), by_loop(model, ids, 12))
    assert not said


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


@pytest.mark.parametrize("length", [16_384, 32_768])
@pytest.mark.parametrize("kind", ["mamba2", "gated_deltanet"])
def test_across_the_lengths_where_others_stop(kind, length):
    """A prompt that ends just before, a continuation that ends just after, and more tokens than the model has levels
    for: the last level takes in what is older.
    """
    model, ids = small_model(kind), tokens(1, length - 3)
    generated = generate(model, ids, count=7)
    with torch.no_grad():
        logits = model(torch.cat((ids, generated[:, :-1]), dim=1), logits_to_keep=7).logits
    assert torch.equal(generated, logits.argmax(-1))
