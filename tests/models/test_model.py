"""The model itself: loss, packing, padding, saving, checkpointing, compilation, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from loglinear import LogLinearConfig, LogLinearForCausalLM, LogLinearModel
from loglinear.layers import MIXERS, recurrent
from loglinear.ops import packing
from small_models import TOLERANCE, relative_error, small_config, small_model, tokens

KINDS = [*MIXERS, "hybrid"]
LENGTHS = [11, 3, 1, 7]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A ragged batch with padding on one side (or both), its mask, and its rows."""
    rows = [tokens(1, length) for length in LENGTHS]
    ids, mask = torch.full((len(rows), 13), 42), torch.zeros(len(rows), 13, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = row.shape[1]
        begin = {"left": 13 - length, "right": 0, "both": (13 - length) // 2}[side]
        ids[index, begin : begin + length] = row
        mask[index, begin : begin + length] = 1
    return ids, mask, rows


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_give_what_each_gives_alone(kind, side):
    """Logits, loss and the state that decoding goes on from."""
    model = small_model(kind)
    ids, mask, rows = padded(side)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, past_key_values=cache)
        new = tokens(len(rows), 3)
        steps = [model(new[:, t : t + 1], past_key_values=cache).logits for t in range(3)]
    for index, row in enumerate(rows):
        alone = model(row).logits[0]
        assert relative_error(batch.logits[index][mask[index].bool()], alone) < TOLERANCE
        longer = model(torch.cat((row, new[index : index + 1]), dim=1)).logits[0, -3:]
        assert relative_error(torch.cat([step[index] for step in steps]), longer) < TOLERANCE
    if side != "right":
        return
    assert relative_error(batch.logits[1, -1], batch.logits[1, LENGTHS[1] - 1]) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_predicted(side):
    """The loss of a padded batch with its ids as labels is that of its rows, however the padding is labelled."""
    model = small_model("gated_deltanet")
    ids, mask, rows = padded(side)
    loss = model(ids, attention_mask=mask, labels=ids).loss
    predicted = sum(length - 1 for length in LENGTHS)
    alone = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows if row.shape[1] > 1]
    assert torch.allclose(loss, sum(alone) / predicted)


def test_layers_share_what_is_computed_from_bounds(monkeypatch):
    """Each forward says anew that its bounds stay as they are."""
    scopes, operator = [], recurrent.log_linear_attention

    def watched(*arguments, **options):
        scopes.append(packing.plans.scope)
        return operator(*arguments, **options)

    monkeypatch.setattr(recurrent, "log_linear_attention", watched)
    model, ids, bounds = small_model("mamba2"), tokens(1, 12), torch.tensor([0, 5, 12])
    for _ in range(2):
        model(ids, cu_seqlens=bounds)
    first, second = scopes[: len(scopes) // 2], scopes[len(scopes) // 2 :]
    assert len(first) == model.config.num_hidden_layers > 1
    assert None not in scopes and len(set(first)) == len(set(second)) == 1 and first[0] is not second[0]
    assert packing.plans.scope is None


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_give_what_each_gives_alone(kind):
    """Logits, loss and gradients; no label is predicted across a boundary."""
    model = small_model(kind)
    lengths = [6, 1, 0, 9]
    bounds = torch.tensor([0, 6, 7, 7, 16], dtype=torch.int32)
    ids = tokens(1, 16)
    packed = model(ids, labels=ids, cu_seqlens=bounds)
    packed.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    losses = []
    for begin, length in zip(bounds[:-1].tolist(), lengths, strict=True):
        if length:
            piece = ids[:, begin : begin + length]
            alone = model(piece)
            assert relative_error(packed.logits[0, begin : begin + length], alone.logits[0]) < TOLERANCE
            losses.append(F.cross_entropy(alone.logits[0, :-1].float(), piece[0, 1:], reduction="sum"))
    loss = sum(losses) / (5 + 8)
    assert torch.allclose(packed.loss, loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < 1e-5, name  # the loss is taken in fp32


def test_loss_is_shifted_and_divided_by_the_given_number():
    model = small_model("gla")
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, 4] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(output.loss, expected / 15)
    assert torch.allclose(model(ids, labels=labels, num_items_in_batch=100).loss, expected / 100)
    assert output.past_key_values is None


def test_a_loss_of_nothing_is_not_a_number():
    """As with the other models of transformers: 0 would read as a perfect prediction."""
    ids = tokens(2, 5)
    assert small_model("gla")(ids, labels=torch.full_like(ids, -100)).loss.isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    model = LogLinearForCausalLM(small_config(kind, tie_word_embeddings=kind == "mamba2")).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LogLinearForCausalLM
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LogLinearModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_loaded_in_sixteen_bits_time_scales_stay_wide(tmp_path):
    LogLinearForCausalLM(small_config("kda")).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    ends = {name.split("mixer.")[-1] for name in wide}
    assert ends == {"time_step.A_log", "time_step.dt_bias", "level_scales.weight"}
    assert loaded(tokens(1, 5)).logits.dtype == torch.bfloat16


def test_tied_weights_are_one():
    tied, untied = (LogLinearForCausalLM(small_config("gla", tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    model = small_model(kind).train()
    ids, mask, _ = padded("left")
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.model.layers[0].gradient_checkpointing
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    model = small_model(kind)
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_gradients_flow_through_a_carried_state():
    """Truncated backpropagation is the caller's choice: what is carried is not detached."""
    model = small_model("gated_deltanet")
    embeds = torch.randn(1, 8, 28, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(model(inputs_embeds=embeds).logits[:, 5:].square().sum(), embeds)[0]
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=embeds[:, :5], past_key_values=cache)
    second = model(inputs_embeds=embeds[:, 5:], past_key_values=cache).logits
    assert relative_error(torch.autograd.grad(second.square().sum(), embeds)[0], whole) < TOLERANCE


def test_bfloat16_and_autocast_train():
    for kind in ("mamba2", "hybrid"):
        ids = tokens(2, 9)
        narrow = LogLinearForCausalLM(small_config(kind, initializer_range=0.02)).bfloat16()
        narrow(ids, labels=ids).loss.backward()
        wide = LogLinearForCausalLM(small_config(kind, initializer_range=0.02))
        with torch.autocast("cpu", torch.bfloat16):
            loss = wide(ids, labels=ids).loss
        loss.backward()
        for model in (narrow, wide):
            assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        assert abs(loss.item() - wide(ids, labels=ids).loss.item()) < 0.02


def test_initial_weights():
    model = LogLinearForCausalLM(small_config("mamba2", initializer_range=0.02, hidden_size=128))
    assert abs(model.model.embed_tokens.weight.std().item() - 0.02) < 2e-3
    assert abs(model.model.layers[0].mixer.out_proj.weight.std().item() - 0.02) < 2e-3
    assert torch.equal(model.model.layers[0].mixer.D, torch.ones(4))
    rescaled = LogLinearForCausalLM(
        small_config("mamba2", initializer_range=0.02, hidden_size=128, rescale_residual_init=True)
    )
    for writer in (rescaled.model.layers[0].mixer.out_proj, rescaled.model.layers[1].mlp.down_proj):
        assert abs(writer.weight.std().item() - 0.01) < 2e-3  # two layers: 1 / sqrt(4)


def test_a_model_built_on_the_meta_device_gets_its_initial_weights(tmp_path):
    """`from_pretrained` builds there and initialises what a checkpoint lacks, without touching what it has."""
    model = LogLinearForCausalLM(small_config("gated_deltanet"))
    model.save_pretrained(tmp_path, state_dict={n: p for n, p in model.state_dict().items() if "time_step" not in n})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert all("time_step" in name for name in report["missing_keys"]) and report["missing_keys"]
    step = loaded.model.layers[0].mixer.time_step
    assert torch.isfinite(step.A_log).all() and -7 < step.dt_bias.min() and step.dt_bias.max() < -2
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_logits_to_keep_and_hidden_states():
    model = small_model("hybrid")
    ids = tokens(2, 9)
    full = model(ids, output_hidden_states=True)
    assert torch.equal(model(ids, logits_to_keep=3).logits, full.logits[:, -3:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, full.logits[:, [0, 4]])
    assert len(full.hidden_states) == 3 and full.hidden_states[0].shape == (2, 9, 28)
    assert torch.equal(full.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(full.hidden_states[-1]), full.logits)
    assert torch.equal(model(ids, return_dict=False)[0], full.logits)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, full.logits)


def test_state_is_returned_when_asked_for():
    model = small_model("gla")
    ids = tokens(1, 4)
    assert model(ids).past_key_values is not None
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    assert LogLinearForCausalLM(small_config("gla", use_cache=False)).eval()(ids).past_key_values is None


@pytest.mark.parametrize("kind", ["gated_deltanet", "mamba2", "hybrid"])
def test_compiles_without_graph_breaks(kind):
    """Forward, and decoding with a static cache, whose later positions run the graph of the first ones."""
    torch.compiler.reset()
    model = small_model(kind)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    ids = tokens(2, 16)
    with torch.no_grad():
        assert relative_error(compiled(ids, use_cache=False).logits, model(ids).logits) < TOLERANCE
        whole = model(ids).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :9], past_key_values=cache)
        addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.state.tensors()]
        traced = []
        for t in range(9, 14):
            step = compiled(ids[:, t : t + 1], past_key_values=cache).logits
            assert relative_error(step[:, 0], whole[:, t]) < TOLERANCE
            traced.append(graphs.frame_count)
        assert traced == [2] * 5  # one for the forward pass, one for every step
        assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.state.tensors()] == addresses
        if kind == "hybrid":  # compiled steps are counted by the next call that is not
            with pytest.raises(ValueError, match="3 tokens do not fit into a static cache of 16 tokens that holds 14"):
                model(ids[:, :3], past_key_values=cache)
        newest = compiled(ids[:, 14:15], past_key_values=cache).logits
        padding = model(ids[:, :1], attention_mask=torch.zeros(2, 1), past_key_values=cache).logits
        assert relative_error(padding, newest) < TOLERANCE  # the newest output of a compiled step is kept, too


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, r"T >= 1 wanted, got shape \(2, 0\)"),
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"wanted, got shape \(4,\)"),
        ({"attention_mask": torch.ones(2, 3)}, ValueError, r"attention_mask must be \[2, at least 4\], got \(2, 3\)"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, ValueError, "attention_mask must be"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, ValueError, "row 0 has 2 runs"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens came with 2 rows"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "cu_seqlens": torch.tensor([0, 5])}, ValueError,
         r"cu_seqlens must rise from 0 to the 4 tokens, got \[0, 5\]"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "cu_seqlens": [0, 4]}, TypeError, "got list"),
        ({"cu_seqlens": torch.tensor([0, 4]), "attention_mask": torch.ones(2, 4)}, ValueError, "not both"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"labels must be \(2, 4\) .*, got \(2, 3\)"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64), "logits_to_keep": 1}, ValueError, "leave logits_to_keep out"),
        ({"logits_to_keep": -1}, ValueError, "logits_to_keep: got -1, wanted a number of columns .0: all."),
        ({"past_key_values": DynamicCache()}, TypeError, "made for this model, as DynamicCache.config=model.config"),
        ({"past_key_values": (1, 2)}, TypeError, "got tuple"),
        ({"past_key_values": DynamicCache(config=LogLinearConfig.preset("tiny-gla", num_hidden_layers=3))}, ValueError,
         "past_key_values has 3 layers, the model 2"),
        ({"position_ids": torch.zeros(2, 4)}, TypeError, "position_ids"),
    ],
    ids=lambda value: ",".join(value) or "nothing" if isinstance(value, dict) else "",
)  # fmt: skip
def test_refusals(arguments, error, message):
    model = small_model("hybrid")
    if arguments and not {"input_ids"} & set(arguments):
        arguments = {"input_ids": tokens(2, 4), **arguments}
    with pytest.raises(error, match=message):
        model(**arguments)


def test_a_cache_of_another_batch_is_refused():
    model = small_model("hybrid")
    cache = model(tokens(2, 4)).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, but the batch has 3"):
        model(tokens(3, 1), past_key_values=cache)
