"""Conversations: every turn reads what is new, and the state is always that of the tokens that were shown."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loglinear import LogLinearConfig, LogLinearForCausalLM, conversation
from loglinear.conversation import Conversation
from loglinear.data import ByteTokenizer
from loglinear.models import copy_cache

KINDS = {
    "gated_deltanet": "tiny-gated-deltanet",
    "mamba2": "tiny-mamba2",
    "hybrid": "tiny-gated-deltanet",
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content | trim }}<|eos|>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
EOS, PAD = 257, 258


@pytest.fixture(params=KINDS)
def model(request):
    """In fp64, so that two ways to compute one thing decode to one text; it never writes a special token by itself."""
    torch.manual_seed(0)
    attention = {"attention_layers": [1]} if request.param == "hybrid" else {}
    made = LogLinearForCausalLM(LogLinearConfig.preset(KINDS[request.param], initializer_range=0.2, **attention))
    with torch.no_grad():
        made.lm_head.weight[256:] = 0
    return made.double().eval()


@pytest.fixture
def chat_tokenizer():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def from_scratch(model, ids: list[int], count: int) -> list[int]:
    """Greedy continuation that knows no state."""
    sequence = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            sequence = torch.cat((sequence, model(sequence, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return sequence[0, len(ids) :].tolist()


def count_read(model) -> list[int]:
    """A list to which every call of the model appends how many tokens it read."""
    counts = []
    model.model.register_forward_pre_hook(
        lambda module, arguments, options: counts.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    return counts


def make_it_say(model, *answers: bytes) -> None:
    """The model's answers are these, whatever it reads, each ended by the model."""
    make_it_write(model, [token for answer in answers for token in (*answer, EOS)])


def make_it_write(model, tokens: list[int]) -> None:
    """The model's next tokens are these, whatever it reads."""
    script = list(tokens)

    def writes(module, inputs, output):
        output = torch.full_like(output, -1e4)
        output[..., script.pop(0)] = 0
        return output

    model.lm_head.register_forward_hook(writes)


def test_each_turn_reads_what_is_new(model):
    talk, counts, shown, expected, answers = Conversation(model, ByteTokenizer()), count_read(model), [], [], []
    for text in ("def f(x):", "x = 1\n", "", "é"):
        expected += [256, *text.encode()] if not expected else list(text.encode())
        answer = talk.answer(text, max_new_tokens=7, greedy=True, on_text=shown.append)
        answers.append((list(expected), answer.tokens))
        expected += answer.tokens
        assert talk.tokens == expected and talk.read == len(expected) - 1
    assert counts == [10, *[1] * 6, 7, *[1] * 6, 1, *[1] * 6, 3, *[1] * 6]
    for before, answer in answers:
        assert answer == from_scratch(model, before, 7)
    assert "".join(shown) == "".join(ByteTokenizer().decode(answer) for _, answer in answers)
    assert len(set(expected)) > 8, "the model repeats itself: this would show nothing"


def test_padding_tokens_that_the_model_writes_are_read_like_any_other(model):
    """A model that was trained little writes them, too. The state is that of all tokens that were shown."""
    make_it_write(model, [97, PAD, PAD, 98, PAD, EOS])
    talk = Conversation(model, ByteTokenizer())
    for text, answer in (("x", [97, PAD, PAD]), ("y", [98, PAD, EOS])):
        assert talk.answer(text, max_new_tokens=3, greedy=True).tokens == answer
        assert talk.read == len(talk.tokens) - 1
        assert talk.cache.layers[0].state.positions.tolist() == [talk.read]


@pytest.mark.parametrize("first", [1, 5])
def test_a_stopped_answer_goes_on_as_if_it_had_not_been(model, first):
    whole = Conversation(model, ByteTokenizer()).answer("def f(", max_new_tokens=16, greedy=True).tokens
    talk = Conversation(model, ByteTokenizer())
    seen = []
    stopped = talk.answer(
        "def f(", greedy=True, on_token=lambda: seen.append(1), should_stop=lambda: len(seen) >= first
    )
    assert stopped.tokens == whole[: first + 1] and len(seen) == first + 1
    assert talk.read == len(talk.tokens) - 1 == 7 + first
    rest = talk.answer("", max_new_tokens=16 - len(stopped.tokens), greedy=True)
    assert stopped.tokens + rest.tokens == whole


def test_reading_a_long_text_can_be_stopped(model, monkeypatch):
    monkeypatch.setattr(conversation, "READ_AT_ONCE", 8)
    text = "a long text that is read in parts"
    whole = Conversation(model, ByteTokenizer()).answer(text, max_new_tokens=6, greedy=True).tokens
    talk, counts = Conversation(model, ByteTokenizer()), count_read(model)
    stopped = talk.answer(text, greedy=True, should_stop=lambda: len(counts) == 2)
    assert counts == [8, 8] and stopped.tokens == [] and stopped.prompt_tokens == talk.read == 16
    assert talk.answer("", max_new_tokens=6, greedy=True).tokens == whole
    assert counts[2:] == [8, 8, 2, *[1] * 5]


def test_what_fails_in_the_middle_is_read_again(model):
    talk = Conversation(model, ByteTokenizer())
    shown = []

    def fail(piece):
        shown.append(piece)
        if len(shown) == 4:
            raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError):
        talk.answer("def f(", greedy=True, on_text=fail)
    assert talk.read == 0 and len(talk.tokens) > 7 + 3
    before = list(talk.tokens)
    assert talk.answer("", max_new_tokens=5, greedy=True).tokens == from_scratch(model, before, 5)


def test_a_text_goes_on_behind_the_end_that_a_model_made(model):
    make_it_say(model, b"pass", b"ok")
    talk = Conversation(model, ByteTokenizer())
    answer = talk.answer("def f(): ")
    assert answer.tokens == [*b"pass", EOS] and answer.text == "pass" and talk.ended
    with pytest.raises(ValueError, match="the model has ended here"):
        talk.answer("")
    assert talk.answer("; ").prompt_tokens == 2
    assert talk.tokens == [256, *b"def f(): pass; ok", EOS]


def test_a_chat_is_what_the_template_makes_of_its_messages(model, chat_tokenizer):
    make_it_say(model, b"Hello!", b" it is me ", b"Bye")
    talk, counts = Conversation(model, chat_tokenizer), count_read(model)
    for text in ("Hi", "who?", "[bye]"):
        talk.answer(text)
    assert [message["content"] for message in talk.messages] == ["Hi", "Hello!", "who?", " it is me ", "[bye]", "Bye"]
    whole = bytes(talk.tokens[:-1]).decode()
    # What was written stays as it was written; a template that trims it does not change what the model has read.
    assert whole + "<|eos|>\n" == chat_tokenizer.apply_chat_template(talk.messages, tokenize=False).replace(
        "it is me", " it is me "
    )
    assert sum(counts) == len(talk.tokens) - 1, "every token is read once"
    with pytest.raises(ValueError, match="the model has ended here"):
        talk.answer("")
    talk.reset()
    assert talk.tokens == talk.messages == [] and talk.read == 0
    with pytest.raises(ValueError, match="got an empty message"):
        talk.answer("")


def test_special_tokens_of_a_template_are_tokens():
    """With a tokenizer that has them; the model's own end and the template's are one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    tokenizer.chat_template = "<|bos|>" + TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, EOS)
    model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-mamba2")).eval()
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("yes", "no")]
    make_it_say(model, *(bytes(word) for word in words))
    talk = Conversation(model, tokenizer)
    talk.answer("One?")
    talk.answer("Two?")
    assert tokenizer.decode(talk.tokens) == "<|bos|>[user]One?<|eos|>\n[assistant]yes<|eos|>\n[user]Two?<|eos|>\n" + (
        "[assistant]no<|eos|>"
    )
    assert talk.tokens.count(EOS) == 4 and talk.tokens.count(256) == 1


def test_a_stopped_message_is_closed_by_the_template(model, chat_tokenizer):
    talk = Conversation(model, chat_tokenizer)
    first = talk.answer("Hi", max_new_tokens=3, greedy=True)
    more = talk.answer("", max_new_tokens=2, greedy=True)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    talk.answer("So?", max_new_tokens=1, greedy=True)
    asked = [*b"[user]Hi<|eos|>\n[assistant]", *first.tokens, *more.tokens]
    assert talk.tokens[:-1] == [*asked, *b"<|eos|>\n[user]So?<|eos|>\n[assistant]"]


def test_a_message_that_the_template_refuses_changes_nothing(model, chat_tokenizer):
    chat_tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}x"
    talk = Conversation(model, chat_tokenizer)
    talk.answer("a", max_new_tokens=2)
    before = list(talk.tokens)
    with pytest.raises(ValueError, match="the chat template refuses this message: one message only"):
        talk.answer("b")
    chat_tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="leaves out earlier answers"):
        talk.answer("b")
    assert talk.tokens == before and len(talk.messages) == 2


def test_saved_and_loaded_it_goes_on_the_same(model, chat_tokenizer, tmp_path):
    for tokenizer in (ByteTokenizer(), chat_tokenizer):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.state"
        talk = Conversation(model, tokenizer)
        talk.answer("def f(x):", max_new_tokens=9, greedy=True)
        talk.save(file)
        other = Conversation(model, tokenizer)
        other.answer("something else", max_new_tokens=2)
        for _ in range(2):  # read once, answered many times
            other.load(file)
            counts = count_read(model)
            assert (other.tokens, other.messages, other.read) == (talk.tokens, talk.messages, talk.read)
            again = Conversation(model, tokenizer)
            again.tokens, again.cache = list(talk.tokens), copy_cache(talk.cache)
            again.messages = None if talk.messages is None else [dict(message) for message in talk.messages]
            got = other.answer("next", max_new_tokens=9, greedy=True)
            assert counts[0] == got.prompt_tokens < len(other.tokens) - 9
            assert got.tokens == again.answer("next", max_new_tokens=9, greedy=True).tokens
            assert got.tokens == from_scratch(model, other.tokens[:-9], 9)


def test_a_file_of_another_conversation_is_refused(model, chat_tokenizer, tmp_path):
    talk = Conversation(model, ByteTokenizer())
    talk.answer("abc", max_new_tokens=3)
    talk.save(tmp_path / "text")
    chat = Conversation(model, chat_tokenizer)
    chat.answer("abc", max_new_tokens=3)
    before = list(chat.tokens), chat.cache
    with pytest.raises(ValueError, match="text is plain text, and this conversation a chat"):
        chat.load(tmp_path / "text")
    from loglinear.models import save_cache

    save_cache(talk.cache, model, tmp_path / "bare")
    with pytest.raises(ValueError, match="bare is a saved state without its conversation"):
        talk.load(tmp_path / "bare")
    assert (chat.tokens, chat.cache) == before


def test_options_are_checked_before_anything_is_read(model):
    talk = Conversation(model, ByteTokenizer())
    with pytest.raises(ValueError, match="nothing to answer to"):
        talk.respond()
    talk.prepare("x")
    with pytest.raises(ValueError, match="top_k: got 0"):
        talk.respond(top_k=0)
    assert talk.read == 0
