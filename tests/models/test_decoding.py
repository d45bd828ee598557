"""Decoding through a recorded step gives the tokens of plain decoding, whatever happens to the cache in between.

What decides when to record, when to replay and when to do neither is tested on a processor, too: there a "recording" is
the plain step on the tensors that were recorded.
"""

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig

from loglinear.models import GraphedStep, LogLinearForCausalLM, MixerCacheLayer, cache_nbytes, decoding, decoding_cache
from loglinear.models.decoding import decode_call
from small_models import small_model, tokens

KINDS = ["mamba2", "gated_deltanet", "hybrid", "windowed mamba2", "windowed hybrid"]
NEW = 12  # tokens that are generated


class Replayed:
    """Stands for a CUDA graph: the plain step on recorded tensors."""

    def __init__(self, step: GraphedStep, model: LogLinearForCausalLM, cache: StaticCache):
        self.step, self.model, self.shell = step, model, copy.copy(cache)
        layers = []
        for state, counter in zip(step._states, step._counters, strict=True):
            layer = MixerCacheLayer(cache.layers[0].max_cache_len)
            layer.state, layer.cumulative_length = state, counter
            layers.append(layer)
        layers[-1].newest_output = step._output
        self.shell.layers = layers

    @torch.no_grad()
    def replay(self) -> None:
        kept = [getattr(state, "filled", None) for state in self.step._states]
        logits = self.model(input_ids=self.step.input_ids, past_key_values=self.shell).logits
        for state, filled in zip(self.step._states, kept, strict=True):
            if filled is not None:
                state.filled = filled  # no graph counts on the host
        self.step.logits.copy_(logits)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    """Where to decode; recordings are counted in `Recording.made`."""
    monkeypatch.setattr(decoding, "_recordings", type(decoding._recordings)())
    real = GraphedStep._record
    made: list[int] = []

    def record(self: GraphedStep, model, cache, layers):
        made.append(self.batch)
        if request.param == "cuda":
            return real(self, model, cache, layers)
        weight = model.lm_head.weight
        self.logits = weight.new_zeros(self.batch, 1, weight.shape[0])
        return Replayed(self, model, cache)

    monkeypatch.setattr(GraphedStep, "_record", record)
    monkeypatch.setattr(GraphedStep, "made", made, raising=False)
    if request.param == "cpu":
        refusal = decoding.refusal

        def refused(model, cache):
            reason = refusal(model, cache)
            return None if reason is not None and reason.startswith("the model is on cpu") else reason

        monkeypatch.setattr(decoding, "refusal", refused)
        monkeypatch.setattr(LogLinearForCausalLM, "_valid_auto_compile_criteria", lambda *_: True)
    return request.param


def read(model: LogLinearForCausalLM, cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, attention_mask=mask).logits[:, -1:].argmax(-1)


def decode(step, ids: Tensor, count: int) -> list[Tensor]:
    """Logits of `count` greedy steps."""
    found = []
    for _ in range(count):
        logits = step(ids).clone()
        found.append(logits)
        ids = logits.argmax(-1)
    return found


def plain(model: LogLinearForCausalLM, cache):
    def step(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, past_key_values=cache).logits

    return step


def static(model: LogLinearForCausalLM, length: int = 64) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_recorded_steps_are_plain_steps(kind, ragged, device):
    """Bit by bit, across merges of many buckets, and after a second prompt into the same cache."""
    model = small_model(kind).to(device)
    ids = tokens(3, 13).to(device)
    mask = torch.ones_like(ids)
    if ragged:
        mask[0, :5], mask[2, :12] = 0, 0
    caches = [static(model), static(model)]
    first = [read(model, cache, ids, mask if ragged else None) for cache in caches]
    step = GraphedStep(model, caches[0], 3)
    assert same(decode(step, first[0], NEW), decode(plain(model, caches[1]), first[1], NEW))
    more = tokens(3, 7).to(device)
    second = [read(model, cache, more) for cache in caches]
    assert torch.equal(*second)
    assert same(decode(step, second[0], NEW), decode(plain(model, caches[1]), second[1], NEW))
    for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert int(mine.cumulative_length) == int(theirs.cumulative_length) == 13 + NEW + 7 + NEW
        assert torch.equal(mine.state.positions, theirs.state.positions)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_are_recorded(kind, dtype):
    model = small_model(kind).cuda().to(dtype)
    caches = [static(model), static(model)]
    ids = tokens(2, 13).cuda()
    first = [read(model, cache, ids) for cache in caches]
    mine = decode(GraphedStep(model, caches[0]), first[0], 24)
    assert same(mine, decode(plain(model, caches[1]), first[1], 24))


@pytest.mark.parametrize("kind", KINDS)
def test_recording_leaves_the_cache_as_it_was(kind, device):
    model = small_model(kind).to(device)
    cache = static(model)
    read(model, cache, tokens(2, 9).to(device))
    before = [layer.state.clone() for layer in cache.layers]
    output = cache.layers[-1].newest_output.clone()
    GraphedStep(model, cache)
    for layer, state in zip(cache.layers, before, strict=True):
        assert isinstance(layer.cumulative_length, Tensor) and int(layer.cumulative_length) == 9
        counts = {"filled", "columns"} & vars(state).keys()
        assert {name: getattr(layer.state, name) for name in counts} == {name: getattr(state, name) for name in counts}
        assert torch.equal(layer.state.positions, state.positions)
        if not counts:
            assert all(torch.equal(a, b) for a, b in zip(layer.state.tensors(), state.tensors(), strict=True))
    assert torch.equal(cache.layers[-1].newest_output, output)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_cache_is_filled_with_the_first_token(kind, device):
    model = small_model(kind).to(device)
    caches = [static(model), static(model)]
    begin = tokens(2, 1).to(device)
    step = GraphedStep(model, caches[0], batch=2)
    mine, theirs = decode(step, begin, 5), decode(plain(model, caches[1]), begin, 5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)  # not the same bits: for plain decoding the first token is a prompt
    with pytest.raises(ValueError, match="batch: got None, wanted the number of rows"):
        GraphedStep(model, static(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_with_a_static_cache_is_generate(kind, options, device):
    model = small_model(kind).to(device)
    ids = tokens(2, 11).to(device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **options}
    wanted = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), wanted)
    assert GraphedStep.made == ([] if options else [2])  # beam search of transformers knows no compiled calls
    cache = static(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), wanted)


def test_the_next_cache_takes_the_place_of_one_that_is_gone(device):
    """Without attention a second prompt needs no recording; caches that live on have one each."""
    model = small_model("mamba2").to(device)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    prompts = [tokens(1, length).to(device) for length in (5, 9, 14)]
    wanted = [model.generate(ids, **settings) for ids in prompts]
    for ids, expected in zip(prompts, wanted, strict=True):
        assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)
        gc.collect()
    assert GraphedStep.made == [1]
    caches = [static(model) for _ in prompts]
    for ids, expected, cache in zip(prompts, wanted, caches, strict=True):
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
    assert len(GraphedStep.made) == 3  # the first of the three took the old one
    for expected, cache in zip(wanted, caches, strict=True):  # and none has written into another's state
        longer = model.generate(expected, past_key_values=cache, **settings)
        assert torch.equal(longer[:, : expected.shape[1]], expected)
        assert torch.equal(longer, model.generate(expected, **settings))
    assert len(GraphedStep.made) == 3


def test_steps_with_attention_are_gone_with_their_cache(device):
    model = small_model("hybrid").to(device)
    cache = static(model)
    model.generate(tokens(1, 5).to(device), past_key_values=cache, max_new_tokens=4, do_sample=False)
    recordings = decoding._recordings[model]
    assert len(recordings.by_cache) == 1 and recordings.spare is None
    del cache
    gc.collect()
    assert len(recordings.by_cache) == 0


def test_models_are_not_kept_alive(device):
    model = small_model("mamba2").to(device)
    model.generate(tokens(1, 5).to(device), cache_implementation="static", max_new_tokens=4, do_sample=False)
    assert len(decoding._recordings) == 1
    if device == "cpu":
        decoding._recordings[model].spare._graph = None  # the stand-in holds the model
    del model
    gc.collect()
    assert len(decoding._recordings) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_changed_is_recorded_anew(kind, device):
    model = small_model(kind).to(device)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    ids, cache = tokens(2, 6).to(device), static(model)
    wanted = model.generate(ids, **settings)
    for _ in range(2):
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), wanted)
        cache.reset()
    read(model, cache, ids)
    step = GraphedStep(model, cache)
    cache.reset()
    with pytest.raises(ValueError, match="the cache was reset, moved or dropped"):
        step(ids[:, :1])
    del cache
    gc.collect()
    with pytest.raises(ValueError, match="the cache was reset, moved or dropped"):
        step(ids[:, :1])


def test_weights_that_were_replaced_are_not_the_old_ones(device):
    model = small_model("gated_deltanet").to(device)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    ids, cache = tokens(2, 6).to(device), static(model)
    model.generate(ids, past_key_values=cache, **settings)
    read(model, other := static(model), ids)
    step = GraphedStep(model, other)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # in place: seen by what was recorded
    assert torch.equal(step(ids[:, :1]), decode(plain(model, _twin(model, ids)), ids[:, :1], 1)[0])
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight), requires_grad=False)
    with pytest.raises(ValueError, match="parameters of the model were moved or replaced"):
        step(ids[:, :1])
    before = len(GraphedStep.made)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), model.generate(ids, **settings))
    assert len(GraphedStep.made) == before + 1


def _twin(model: LogLinearForCausalLM, ids: Tensor) -> StaticCache:
    cache = static(model)
    read(model, cache, ids)
    return cache


@pytest.mark.parametrize("known", [True, False])
def test_a_full_cache_is_refused_and_left_as_it_is(known, device):
    model = small_model("hybrid").to(device)
    ids, cache = tokens(2, 6).to(device), static(model, 8)
    chosen = read(model, cache, ids)
    if not known:
        cache.layers[1].state.filled = None  # as after compiled calls
    step = GraphedStep(model, cache)
    decode(step, chosen, 2)
    keys = cache.layers[1].state.keys.clone()
    with pytest.raises(ValueError, match="1 tokens do not fit into a static cache of 8 tokens that holds 8"):
        step(chosen)
    with pytest.raises(ValueError, match="1 tokens do not fit into a static cache of 8 tokens that holds 8"):
        GraphedStep(model, cache)
    assert torch.equal(cache.layers[1].state.keys, keys)
    with pytest.raises(ValueError, match="do not fit into a static cache"):
        model.generate(ids, past_key_values=static(model, 8), max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.ones(2, 1)},
        {"input_ids": tokens(2, 2)},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"past_key_values": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_calls_are_plain_calls(change, device):
    model = small_model("mamba2").to(device)
    caches = [_twin(model, tokens(2, 5).to(device)) for _ in range(2)]
    change = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in change.items()}
    inputs = {"input_ids": tokens(2, 1).to(device), "use_cache": True, **change}
    caches[1] = copy.deepcopy(caches[0])
    with torch.no_grad():
        mine = decode_call(model, **{"past_key_values": caches[0], **inputs})
        theirs = model(**{"past_key_values": caches[1], **inputs})
    logits = (mine[0], theirs[0]) if isinstance(mine, tuple) else (mine.logits, theirs.logits)
    assert torch.equal(*logits)
    assert GraphedStep.made == []


def test_gradients_and_hooks_are_not_recorded(device):
    model = small_model("mamba2").to(device)
    ids = tokens(2, 1).to(device)
    cache = _twin(model, tokens(2, 5).to(device))
    assert decode_call(model, input_ids=ids, past_key_values=cache).logits.requires_grad
    called = []
    handle = model.model.norm.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        decode_call(model, input_ids=ids, past_key_values=_twin(model, tokens(2, 5).to(device)))
    assert len(called) == 2 and GraphedStep.made == []
    with pytest.raises(ValueError, match="a module has forward hooks"):
        GraphedStep(model, cache)
    handle.remove()
    with pytest.raises(ValueError, match="the cache grows; wanted StaticCache"):
        GraphedStep(model, DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="batch: got 3, wanted 2"):
        GraphedStep(model, cache, batch=3)
    with pytest.raises(ValueError, match=r"input_ids must be \[2, 1\], got \(2, 2\)"):
        GraphedStep(model, cache)(tokens(2, 2).to(device))
    with pytest.raises(ValueError, match="the model is in training"):
        GraphedStep(model.train(), cache)


def test_a_processor_is_refused():
    model = small_model("mamba2")
    with pytest.raises(ValueError, match="the model is on cpu; wanted one CUDA device"):
        GraphedStep(model, static(model), 1)


def test_a_compile_config_is_heeded(monkeypatch):
    model = small_model("mamba2")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(options) or call)
    assert model.get_compiled_call(None).func is decode_call
    model.get_compiled_call(CompileConfig())
    assert len(compiled) == 1


def on_cuda(monkeypatch, model: LogLinearForCausalLM) -> LogLinearForCausalLM:
    """A model that says that it is on a GPU."""
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    return model


def test_the_cache_to_decode_with(monkeypatch):
    recurrent, hybrid = small_model("mamba2"), small_model("hybrid")
    assert type(decoding_cache(recurrent, 10)) is DynamicCache
    grown = decoding_cache(recurrent, 10)
    assert decoding_cache(recurrent, 20, grown) is grown
    with monkeypatch.context() as patch:
        on_cuda(patch, recurrent)
        cache = decoding_cache(recurrent, 1000)
        assert type(cache) is StaticCache
        assert decoding_cache(recurrent, 2000, cache) is cache  # a recurrent state is never full
        assert type(decoding_cache(hybrid, 64)) is StaticCache
        assert type(decoding_cache(hybrid, 65)) is DynamicCache  # longer than it is meant for


def test_a_recurrent_state_is_never_full(device):
    model = small_model("mamba2").to(device)
    ids, cache = tokens(2, 6).to(device), static(model, 8)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    once = model.generate(ids, past_key_values=cache, **settings)
    twice = model.generate(once, past_key_values=cache, **settings)
    assert torch.equal(twice, model.generate(model.generate(ids, **settings), **settings))
    assert GraphedStep.made == [2]


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_a_cache_changes_its_kind_and_goes_on(kind, monkeypatch):
    """Growing, static, wider, growing again: what was read stays."""
    model = small_model(kind)
    ids = tokens(2, 60)
    wanted = model(ids).logits
    cache = DynamicCache(config=model.config)
    kinds, read_before, capacities = [], 0, []
    for until, room in ((5, 8), (8, 8), (14, 20), (30, 64), (60, 200)):
        with monkeypatch.context() as patch:
            on_cuda(patch, model)
            cache = decoding_cache(model, room, cache)
        with torch.no_grad():
            logits = model(ids[:, read_before:until], past_key_values=cache).logits
        assert torch.allclose(logits, wanted[:, read_before:until], rtol=1e-8, atol=1e-8)
        read_before = until
        kinds.append(type(cache))
        capacities.append(cache.layers[0].max_cache_len)
        assert int(cache.get_seq_length()) == until and cache_nbytes(cache) > 0
    if kind == "hybrid":
        assert capacities == [8, 8, 20, 64, None]
    else:
        assert set(kinds) == {StaticCache}
