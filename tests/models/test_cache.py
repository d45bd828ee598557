"""Caches copied, stacked, selected, moved, saved and loaded: going on from them is going on from the original."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from loglinear.models import (
    MixerCacheLayer,
    cache_nbytes,
    cache_to,
    copy_cache,
    load_cache,
    load_saved,
    new_cache,
    repeat_rows,
    save_cache,
    select_rows,
    stack_caches,
)
from small_models import TOLERANCE, relative_error, small_model, tokens

WINDOWED = ["windowed mamba2", "windowed gated_deltanet"]
KINDS = ["gated_deltanet", "mamba2", "gla", "hybrid", "attention", *WINDOWED]
ROOM = 64


def cache_for(model, static: bool):
    return StaticCache(config=model.config, max_cache_len=ROOM) if static else new_cache(model.config)


@torch.no_grad()
def read(model, ids: torch.Tensor, cache) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits


def tensors(cache) -> list[torch.Tensor]:
    """All that a cache holds; keys and values up to its longest row, since what lies beyond is no one's."""
    found = []
    for layer in cache.layers:
        for tensor in layer.state.tensors():
            attends = hasattr(layer.state, "keys") and tensor.ndim == 4
            found.append(tensor[:, : int(layer.state.positions.max())] if attends else tensor)
    return [*found, cache.layers[-1].newest_output]


def assert_equal(cache, expected) -> None:
    for mine, theirs in zip(tensors(cache), tensors(expected), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert int(cache.get_seq_length()) == int(expected.get_seq_length())


@pytest.fixture(params=[False, True], ids=["dynamic", "static"])
def static(request):
    return request.param


@pytest.fixture(params=KINDS)
def started(request, static):
    """A model and a cache of three rows, ragged, that have read 13, 5 and 9 tokens."""
    model = small_model(request.param)
    mask = torch.zeros(3, 13, dtype=torch.int64)
    for row, length in enumerate((13, 5, 9)):
        mask[row, 13 - length :] = 1
    cache = cache_for(model, static)
    with torch.no_grad():
        model(tokens(3, 13), attention_mask=mask, past_key_values=cache)
    return model, cache


def test_a_copy_is_read_without_the_original(started):
    model, cache = started
    kept, moved = copy_cache(cache), cache_to(cache, "cpu")
    assert type(kept) is type(cache) and cache_nbytes(kept) == cache_nbytes(cache)
    more = tokens(3, 6)
    expected = read(model, more, cache)
    assert [layer.state.positions.tolist() for layer in kept.layers] == [[13, 5, 9]] * 2
    assert torch.equal(read(model, more, copy_cache(kept)), expected)
    assert torch.equal(read(model, more, kept), expected) and torch.equal(read(model, more, moved), expected)
    assert_equal(kept, cache)


def test_rows_go_on_as_they_would_have(started):
    model, cache = started
    more = tokens(3, 6)
    alone, twice = select_rows(cache, [2, 0, 2]), repeat_rows(cache, 2)
    stacked = stack_caches([select_rows(cache, torch.tensor([row])) for row in range(3)])
    assert_equal(stacked, cache)
    assert [layer.state.positions.tolist() for layer in twice.layers] == [[13, 13, 5, 5, 9, 9]] * 2
    expected = read(model, more, cache)
    assert relative_error(read(model, more[[2, 0, 2]], alone), expected[[2, 0, 2]]) < TOLERANCE
    assert (
        relative_error(read(model, more.repeat_interleave(2, 0), twice), expected.repeat_interleave(2, 0)) < TOLERANCE
    )
    assert relative_error(read(model, more, stacked), expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["gated_deltanet", "mamba2", "hybrid", *WINDOWED])
def test_sequences_read_one_by_one_are_answered_as_a_batch(kind):
    """Of different lengths; `generate` takes the stack with the sequences padded on the left."""
    model, rows = small_model(kind), [tokens(1, length) for length in (3, 17, 8)]
    caches = [new_cache(model.config) for _ in rows]
    for row, cache in zip(rows, caches, strict=True):
        read(model, row[:, :-1], cache)
    expected = [model.generate(row, max_new_tokens=7, do_sample=False)[:, -7:] for row in rows]
    ids, mask = torch.zeros(3, 17, dtype=torch.int64), torch.zeros(3, 17, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, 17 - row.shape[1] :], mask[index, 17 - row.shape[1] :] = row, 1
    stacked = stack_caches(caches)
    got = model.generate(ids, attention_mask=mask, past_key_values=stacked, max_new_tokens=7, do_sample=False)
    assert torch.equal(got[:, -7:], torch.cat(expected)) and len(got.unique()) > 2


def test_saved_and_loaded_it_is_the_same(started, tmp_path):
    model, cache = started
    file = tmp_path / "state.safetensors"
    ids = tokens(3, 13)
    save_cache(cache, model, file, tokens=ids, notes={"title": "naïve"})
    saved = load_saved(file, model)
    assert type(saved.cache) is type(cache) and saved.notes == {"title": "naïve"}
    assert torch.equal(saved.tokens, ids)
    assert_equal(saved.cache, cache)
    more, again = tokens(3, 9), tokens(3, 1)
    for new in (more, again, again):
        assert torch.equal(read(model, new, saved.cache), read(model, new, cache))
    assert_equal(saved.cache, cache)
    save_cache(cache, model, file)
    assert_equal(load_cache(file, model, "cpu"), cache)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_generation_goes_on_from_a_file(started, tmp_path):
    """One prompt is read once and answered many times."""
    model, _ = started
    ids = tokens(1, 11)
    cache = new_cache(model.config)
    read(model, ids[:, :-1], cache)
    save_cache(cache, model, tmp_path / "prompt")
    for _ in range(2):
        end = torch.cat((ids, tokens(1, 4)), dim=1)
        answer = model.generate(
            end, past_key_values=load_cache(tmp_path / "prompt", model), max_new_tokens=6, do_sample=False
        )
        assert torch.equal(answer, model.generate(end, max_new_tokens=6, do_sample=False))


def test_only_occupied_buckets_are_in_the_file(tmp_path):
    model = small_model("gated_deltanet")
    cache = new_cache(model.config)
    read(model, tokens(1, 32), cache)
    save_cache(cache, model, tmp_path / "state")
    buckets = load_file(tmp_path / "state")["0.buckets"]
    assert buckets.shape[0] == 1 and cache.layers[0].state.fenwick.num_levels == 7


def test_pending_decays_are_in_the_file_and_files_without_are_read(tmp_path, static):
    """Going on from either is going on from the original; buckets that are empty may hold anything."""
    model = small_model("mamba2")
    ids = tokens(2, 13)
    cache = cache_for(model, static)
    read(model, ids[:, :11], cache)
    for layer in cache.layers:
        state = layer.state.fenwick
        state.buckets.mul_(2)
        state.log_decays[state.occupied()] = -math.log(2)
        state.buckets[~state.occupied()] = 1e3
    save_cache(cache, model, tmp_path / "state")
    loaded = load_cache(tmp_path / "state", model)
    assert torch.equal(loaded.layers[0].state.fenwick.log_decays, cache.layers[0].state.fenwick.log_decays)
    assert torch.equal(
        loaded.layers[1].state.fenwick.settled().buckets, cache.layers[1].state.fenwick.settled().buckets
    )
    for layer in cache.layers:
        layer.state = replace(layer.state, fenwick=layer.state.fenwick.settled())
    save_cache(cache, model, tmp_path / "old")
    assert not any("log_decays" in name for name in load_file(tmp_path / "old"))
    old = load_cache(tmp_path / "old", model)
    wanted = model(ids, use_cache=False).logits[:, 11:]
    for one in (loaded, old):
        assert relative_error(read(model, ids[:, 11:], copy_cache(one)), wanted) < 1e-6
        stacked = stack_caches([one, load_cache(tmp_path / "state", model)])
        found = read(model, ids[:, 11:12].repeat(2, 1), stacked)
        assert relative_error(found, wanted[:, :1].repeat(2, 1, 1)) < 1e-6


@pytest.mark.parametrize("kind", [*WINDOWED, "windowed kda", "windowed delta_net"])
def test_windows_are_in_the_file(kind, tmp_path, static):
    """In the middle of one; models that keep none, or another, go on from it too."""
    model, ids = small_model(kind), tokens(2, 13)
    cache = cache_for(model, static)
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:7]):
        read(model, part, cache)
    assert cache.layers[0].state.fenwick.base().tolist() == [5, 5]
    save_cache(cache, model, tmp_path / "state")
    wanted = model(ids, use_cache=False).logits[:, 7:]
    for window in (4, None, 2):
        other = small_model(kind.removeprefix("windowed "), decoding_window=window)
        other.load_state_dict(model.state_dict())
        loaded = load_cache(tmp_path / "state", other)
        assert torch.equal(loaded.layers[1].state.fenwick.window.keys, cache.layers[1].state.fenwick.window.keys)
        for one in (loaded, stack_caches([select_rows(loaded, [0]), select_rows(cache, [1])])):
            found = [read(other, ids[:, t : t + 1], one) for t in range(7, 13)]
            assert relative_error(torch.cat(found, dim=1), wanted) < TOLERANCE


def test_damaged_windows_are_refused(tmp_path):
    model = small_model("windowed gated_deltanet")
    cache = new_cache(model.config)
    read(model, tokens(1, 5), cache)
    save_cache(cache, model, tmp_path / "state")
    parts = load_file(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        metadata = file.metadata()
    for spoil in (
        lambda parts: parts.pop("0.window.keys"),
        lambda parts: parts.update({"1.window.mixing": parts["1.window.mixing"][:, :1].contiguous()}),
        lambda parts: parts.update({"1.window.begun": parts["1.window.begun"].int()}),
    ):
        spoilt = dict(parts)
        spoil(spoilt)
        save_file(spoilt, tmp_path / "spoilt", metadata=metadata)
        with pytest.raises(ValueError, match="is damaged.*(window|keys)"):
            load_cache(tmp_path / "spoilt", model)


@pytest.mark.parametrize("levels", [1, 3])
def test_few_levels_are_saved_too(levels, tmp_path):
    model = small_model("mamba2", num_levels=levels)
    cache = new_cache(model.config)
    read(model, tokens(2, 21), cache)
    save_cache(cache, model, tmp_path / "state")
    assert_equal(load_cache(tmp_path / "state", model), cache)


def test_an_empty_cache_is_saved_and_copied_and_has_no_rows(tmp_path, static):
    model = small_model("hybrid")
    cache = cache_for(model, static)
    save_cache(cache, model, tmp_path / "state")
    ids = tokens(2, 5)
    expected = model(ids, use_cache=False).logits
    for other in (load_cache(tmp_path / "state", model), copy_cache(cache)):
        assert int(other.get_seq_length()) == 0 and type(other) is type(cache)
        assert torch.allclose(read(model, ids, other), expected)
    for operation in (lambda: select_rows(cache, [0]), lambda: stack_caches([cache]), lambda: repeat_rows(cache, 2)):
        with pytest.raises(ValueError, match="got an empty cache"):
            operation()


@pytest.mark.parametrize("kind", ["mamba2", "hybrid", "windowed gated_deltanet"])
def test_states_in_sixteen_bits(kind, tmp_path, static):
    """From the first token on, after a prompt that goes on from one, and in files: half the bytes."""
    model, ids = small_model(kind, state_dtype="bfloat16").float(), tokens(2, 40)
    wide = small_model(kind).float()
    wide.load_state_dict(model.state_dict())
    cache, exact = cache_for(model, static), cache_for(wide, static)
    found, wanted = [], []
    for part in (ids[:, :9], *ids[:, 9:20].split(1, 1), ids[:, 20:31], *ids[:, 31:].split(1, 1)):
        found.append(read(model, part, cache))
        wanted.append(read(wide, part, exact))
        buckets = cache.layers[0].state.fenwick.buckets
        assert buckets.dtype == torch.bfloat16 and 2 * buckets.nbytes == exact.layers[0].state.fenwick.buckets.nbytes
    error = relative_error(torch.cat(found, dim=1), torch.cat(wanted, dim=1))
    assert 1e-5 < error < 2e-2, "rounded to 8 bits, not more"
    save_cache(cache, model, tmp_path / "state")
    assert_equal(load_cache(tmp_path / "state", model), cache)
    assert load_cache(tmp_path / "state", wide).layers[0].state.fenwick.buckets.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_states_of_a_model_in_sixteen_bits(kind, tmp_path, static):
    """With a window they are in 16 bits by themselves, from prompt to prompt and from a file; float32 if asked for.
    Steps are as far from float64 as a call on all tokens, which keeps no state.
    """
    model = small_model(kind, decoding_window=16).bfloat16()
    wide = small_model(kind, decoding_window=16, state_dtype="float32").bfloat16()
    exact = small_model(kind)
    for other in (wide, exact):
        other.load_state_dict(model.state_dict())
    ids, found, rounded = tokens(2, 60), [], []
    cache, full = cache_for(model, static), cache_for(wide, static)
    for part in (ids[:, :9], *ids[:, 9:29].split(1, 1), ids[:, 29:36], *ids[:, 36:].split(1, 1)):
        found.append(read(model, part, cache).double())
        rounded.append(read(wide, part, full).double())
        assert cache.layers[0].state.fenwick.buckets.dtype == torch.bfloat16
        assert full.layers[0].state.fenwick.buckets.dtype == torch.float32
        if len(found) == 17:
            save_cache(cache, model, tmp_path / "state")
            cache = load_cache(tmp_path / "state", model)
    found, rounded = torch.cat(found, dim=1), torch.cat(rounded, dim=1)
    assert 1e-5 < relative_error(found, rounded) < 2e-2, "rounded to 8 bits, not more"
    with torch.no_grad():
        whole, wanted = (one(ids, use_cache=False).logits.double() for one in (model, exact))
    assert relative_error(found, wanted) < 1.25 * relative_error(whole, wanted)


@pytest.mark.parametrize("kept", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_state_takes_the_form_of_its_model_with_the_next_prompt(kept, static):
    """It steps as it came; in a static cache, whose tensors stay where they are, it also stays as it came."""
    options = ({"state_dtype": "float32"} if name == "float32" else {} for name in kept)
    one, other = (small_model("mamba2", decoding_window=16, **chosen).bfloat16() for chosen in options)
    before, after = (getattr(torch, name) for name in kept)
    cache = cache_for(one, static)
    read(one, tokens(2, 5), cache)
    for count, wanted in ((1, before), (3, before if static else after)):
        read(other, tokens(2, count), cache)
        assert cache.layers[0].state.fenwick.buckets.dtype == wanted


def test_a_cache_in_sixteen_bits_is_kept_exactly(tmp_path):
    model = small_model("hybrid").to(torch.bfloat16)
    cache = new_cache(model.config)
    read(model, tokens(2, 19), cache)
    save_cache(cache, model, tmp_path / "state")
    loaded = load_cache(tmp_path / "state", model)
    assert_equal(loaded, cache)
    assert {tensor.dtype for tensor in tensors(loaded)} == {torch.bfloat16, torch.float32, torch.int64}
    with pytest.raises(ValueError, match="in torch.bfloat16, but here it is in torch.float32"):
        load_cache(tmp_path / "state", model.float())


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("gated_deltanet", {}, "same configuration with other weights"),
        ("mamba2", {}, "another model: mixer='gated_deltanet' .here 'mamba2'."),
        ("gated_deltanet", {"num_levels": 5}, r"another model: num_levels=7 \(here 5\)"),
        ("gated_deltanet", {"num_hidden_layers": 3}, r"num_hidden_layers=2 \(here 3\)"),
        ("hybrid", {}, r"attention_layers=\[\] \(here \[1\]\)"),
    ],
    ids=["weights", "mixer", "levels", "layers", "hybrid"],
)
def test_the_state_of_another_model_is_refused(tmp_path, kind, overrides, message):
    model = small_model("gated_deltanet")
    cache = new_cache(model.config)
    read(model, tokens(1, 5), cache)
    save_cache(cache, model, tmp_path / "state")
    with pytest.raises(ValueError, match=message):
        load_cache(tmp_path / "state", small_model(kind, **overrides))


def test_one_step_of_training_makes_another_model(tmp_path):
    model = small_model("mamba2").float()
    cache = new_cache(model.config)
    read(model, tokens(1, 5), cache)
    save_cache(cache, model, tmp_path / "state")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="other weights"):
        load_cache(tmp_path / "state", model)


def test_files_that_are_not_ours_are_refused_and_not_overwritten(tmp_path):
    model = small_model("gla")
    cache = new_cache(model.config)
    with pytest.raises(FileNotFoundError, match="no saved state"):
        load_cache(tmp_path / "absent", model)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights", metadata={"format": "pt"})
    (tmp_path / "text").write_text("once upon a time")
    (tmp_path / "empty").write_text("")
    for name in ("weights", "text", "empty"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match="is not a saved state"):
            load_cache(tmp_path / name, model)
        with pytest.raises(FileExistsError, match="is there and is no saved state"):
            save_cache(cache, model, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(OSError, match="absent"):
        save_cache(cache, model, tmp_path / "absent" / "state")
    save_cache(cache, model, tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a saved state"):
        load_cache(tmp_path / "state", model)


def test_damaged_pending_decays_are_refused(tmp_path):
    model = small_model("mamba2")
    cache = new_cache(model.config)
    read(model, tokens(1, 5), cache)
    save_cache(cache, model, tmp_path / "state")
    parts = load_file(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        metadata = file.metadata()
    parts["0.log_decays"] = parts["0.log_decays"][:, :2].contiguous()
    save_file(parts, tmp_path / "spoilt", metadata=metadata)
    with pytest.raises(ValueError, match="is damaged.*log_decays"):
        load_cache(tmp_path / "spoilt", model)


def test_damaged_files_are_refused(tmp_path):
    model = small_model("hybrid")
    cache = new_cache(model.config)
    read(model, tokens(1, 5), cache)
    save_cache(cache, model, tmp_path / "state")
    parts = load_file(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        metadata = file.metadata()
    for spoil in (
        lambda parts: parts.pop("0.buckets"),
        lambda parts: parts.pop("1.values"),
        lambda parts: parts.update({"0.buckets": parts["0.buckets"][:1]}),
        lambda parts: parts.update({"1.keys": parts["1.keys"][..., :2].contiguous()}),
    ):
        spoilt = dict(parts)
        spoil(spoilt)
        save_file(spoilt, tmp_path / "spoilt", metadata=metadata)
        with pytest.raises(ValueError, match="is damaged"):
            load_cache(tmp_path / "spoilt", model)
    header = json.loads(metadata["header"])
    del header["columns"]
    save_file(parts, tmp_path / "spoilt", metadata={**metadata, "header": json.dumps(header)})
    with pytest.raises(ValueError, match="is damaged"):
        load_cache(tmp_path / "spoilt", model)


def test_rows_and_stacks_that_cannot_be_are_refused():
    model, other = small_model("hybrid"), small_model("hybrid", num_hidden_layers=3)
    cache, foreign, fixed = (cache_for(*which) for which in ((model, False), (other, False), (model, True)))
    for one, holder in ((cache, model), (foreign, other), (fixed, model)):
        read(holder, tokens(2, 4), one)
    mixer = small_model("mamba2")
    wide = cache_for(mixer, False)
    read(mixer, tokens(2, 4), wide)
    with pytest.raises(ValueError, match="rows: got 2, wanted 0 to 1"):
        select_rows(cache, [0, 2])
    with pytest.raises(ValueError, match="repeats: got 0, wanted at least 1"):
        repeat_rows(cache, 0)
    with pytest.raises(ValueError, match="got no caches"):
        stack_caches([])
    with pytest.raises(ValueError, match="one model, got 2 and 3 layers"):
        stack_caches([cache, foreign])
    with pytest.raises(ValueError, match="one capacity"):
        stack_caches([cache, fixed])
    with pytest.raises(ValueError, match="states to be joined must be of one kind"):
        stack_caches([cache, wide])
    with pytest.raises(TypeError, match="wanted a cache of a log-linear model"):
        copy_cache(DynamicCache())
    assert all(isinstance(layer, MixerCacheLayer) for layer in cache.layers)
