"""Generation: streamed text is the generated text, drawn as asked, never cut inside a character."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loglinear import LogLinearConfig, LogLinearForCausalLM
from loglinear.data import ByteTokenizer
from loglinear.generate import TextStream, generate_text
from loglinear.models import cache_nbytes

TEXT = "naïve 数学 🦜 and so on\n"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # Larger initial weights than usual, so that an untrained model has clear preferences.
    return LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet", initializer_range=0.2)).eval()


@pytest.fixture
def piece_tokenizer():
    """A byte-level BPE tokenizer whose tokens split characters, and whose decoding is joint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["and so on and on"], trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=265))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def stream(tokenizer, tokens):
    streamed = TextStream(tokenizer)
    pieces = [streamed.push(token) for token in tokens]
    return pieces, streamed.finish()


def test_bytes_stream_whole_characters():
    pieces, rest = stream(ByteTokenizer(), list("é数🦜x".encode()))
    assert pieces == ["", "é", "", "", "数", "", "", "", "🦜", "x"] and rest == ""


def test_bytes_that_never_become_a_character_are_replaced():
    assert stream(ByteTokenizer(), [0xF0, 0x9F, ord("a")]) == (["", "", "\ufffda"], "")
    assert stream(ByteTokenizer(), [ord("a"), 0xE6, 0x95]) == (["a", "", ""], "\ufffd")
    assert stream(ByteTokenizer(), [256, ord("a"), 257]) == (["", "a", ""], "")


def test_pieces_stream_whole_characters(piece_tokenizer):
    tokens = piece_tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]
    pieces, rest = stream(piece_tokenizer, tokens)
    assert "".join(pieces) + rest == TEXT * 3
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(piece != "" for piece in pieces) > len(TEXT), "text comes bit by bit"
    _, rest = stream(piece_tokenizer, piece_tokenizer("a数", add_special_tokens=False)["input_ids"][:-1])
    assert "\ufffd" in rest


@pytest.mark.parametrize("prompt", ["def ", "", TEXT], ids=["short", "empty", "many bytes"])
def test_greedy_is_what_the_model_generates(model, prompt):
    pieces = []
    result = generate_text(model, ByteTokenizer(), prompt, max_new_tokens=40, greedy=True, on_text=pieces.append)
    ids = torch.tensor([[256, *prompt.encode()]])
    output = model.generate(
        ids, max_new_tokens=40, do_sample=False, eos_token_id=257, pad_token_id=258, return_dict_in_generate=True
    )
    assert result.tokens == output.sequences[0, ids.shape[1] :].tolist()
    assert "".join(pieces) == result.text
    assert result.text == ByteTokenizer().decode(result.tokens, skip_special_tokens=True)
    assert result.prompt_tokens == ids.shape[1]
    assert result.state_bytes == cache_nbytes(output.past_key_values) > 0
    assert result.tokens_per_second > 0 and result.first_token_seconds > 0


def test_the_state_does_not_grow_with_the_text(model):
    sizes = {
        generate_text(model, ByteTokenizer(), "a" * length, max_new_tokens=2, greedy=True).state_bytes
        for length in (3, 100)
    }
    assert len(sizes) == 1


def test_text_ends_where_the_model_ends_it():
    torch.manual_seed(0)
    model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-linear-attention")).eval()

    def always_the_end(module, inputs, output):
        output[..., 257] = output.amax() + 100
        return output

    model.lm_head.register_forward_hook(always_the_end)
    result = generate_text(model, ByteTokenizer(), "a", max_new_tokens=20)
    assert result.tokens == [257] and result.text == "" and result.tokens_per_second == 0


def test_draws_repeat_with_the_seed_and_leave_other_draws_alone(model):
    def draw(seed):
        return generate_text(model, ByteTokenizer(), "x", max_new_tokens=30, temperature=2.0, seed=seed).tokens

    before = torch.get_rng_state()
    assert draw(3) == draw(3) != draw(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_narrow_draws_are_greedy(model):
    greedy = generate_text(model, ByteTokenizer(), "x", max_new_tokens=20, greedy=True).tokens
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert generate_text(model, ByteTokenizer(), "x", max_new_tokens=20, seed=0, **options).tokens == greedy, (
            options
        )


def test_draws_are_from_the_whole_distribution_unless_narrowed(model):
    """A flat distribution: nothing is cut off by a default of the library's."""
    wide = generate_text(model, ByteTokenizer(), "x", max_new_tokens=300, temperature=1e4, seed=0).tokens
    narrow = generate_text(model, ByteTokenizer(), "x", max_new_tokens=300, temperature=1e4, top_k=5, seed=0).tokens
    assert len(set(wide)) > 100 or 257 in wide
    first = [
        generate_text(model, ByteTokenizer(), "x", max_new_tokens=1, temperature=1e4, top_k=5, seed=seed).tokens[0]
        for seed in range(40)
    ]
    assert len(set(first)) <= 5 and narrow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"temperature": 0.0}, "temperature: got 0.0, wanted a finite number, more than 0"),
        ({"temperature": float("inf")}, "temperature: got inf, wanted a finite number"),
        ({"temperature": float("nan")}, "temperature: got nan, wanted a finite number"),
        ({"top_p": float("nan")}, "top_p: got nan, wanted more than 0 and at most 1"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"greedy": True, "temperature": 0.5, "seed": 1}, "got greedy together with temperature, seed"),
    ],
)
def test_wrong_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate_text(model, ByteTokenizer(), "x", **options)
