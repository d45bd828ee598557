"""The byte tokenizer, loading of tokenizers, and how documents and prompts are encoded."""

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loglinear.data import ByteTokenizer, encode_prompt, encode_text, load_tokenizer
from loglinear.data.tokenizers import encode_documents, fingerprint

TEXT = "naïve café, 数学 🦜\n\tend\0"


@pytest.fixture
def word_tokenizer():
    """A small Hugging Face tokenizer, made here, with no special tokens of its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {word: index for index, word in enumerate(["?", "a", "tree", "of", "states", "<end>"])}
    backend = Tokenizer(WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="<end>")


def test_bytes_round_trip_and_vocabulary():
    tokenizer = ByteTokenizer()
    assert len(tokenizer) == 259 and tokenizer.vocab_size == 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert tokenizer(TEXT).input_ids == [256, *TEXT.encode()]
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == list(TEXT.encode())
    assert tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True) == TEXT
    assert sorted(tokenizer.get_vocab().values()) == list(range(259))


def test_text_cannot_spell_a_control_token():
    ids = ByteTokenizer()("a<|eos|>b<|pad|>").input_ids
    assert ids == [256, *b"a<|eos|>b<|pad|>"]


def test_bytes_that_are_no_utf8_decode_to_replacement():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xE6, 0x95]) == "\ufffd"
    assert tokenizer.decode([256, 104, 257]) == "<|bos|>h<|eos|>"
    assert tokenizer.decode([256, 104, 257], skip_special_tokens=True) == "h"


def test_bytes_pad_a_batch():
    batch = ByteTokenizer()(["ab", "c"], padding=True, return_tensors="np")
    assert batch["input_ids"].tolist() == [[256, 97, 98], [256, 99, 258]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained], ids=["ours", "auto"])
def test_bytes_save_and_load(tmp_path, load):
    ByteTokenizer().save_pretrained(tmp_path)
    restored = load(tmp_path)
    assert isinstance(restored, ByteTokenizer)
    assert restored(TEXT + "<|eos|>").input_ids == ByteTokenizer()(TEXT + "<|eos|>").input_ids
    assert len(restored) == 259 and restored.eos_token_id == 257


def test_hugging_face_tokenizer_by_path(tmp_path, word_tokenizer):
    word_tokenizer.save_pretrained(tmp_path)
    restored = load_tokenizer(tmp_path)
    assert restored("a tree of states").input_ids == [1, 2, 3, 4]
    assert fingerprint(restored) == fingerprint(load_tokenizer(tmp_path))
    assert fingerprint(restored) != fingerprint(ByteTokenizer())


@pytest.mark.parametrize("where", ["empty directory", "no such name"])
def test_no_tokenizer_is_refused(tmp_path, monkeypatch, where):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = tmp_path if where == "empty directory" else tmp_path / "absent"
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load_tokenizer(name)


def test_documents_are_framed_by_the_tokens_that_exist(word_tokenizer):
    (tokens,) = encode_documents(ByteTokenizer(), ["hé"], np.dtype(np.uint16))
    assert tokens.dtype == np.uint16 and tokens.tolist() == [256, 104, 195, 169, 257]
    (tokens,) = encode_documents(word_tokenizer, ["a tree"], np.dtype(np.uint16))
    assert tokens.tolist() == [1, 2, 5]


def test_prompt_is_the_beginning_of_a_document(word_tokenizer):
    assert encode_prompt(ByteTokenizer(), "hé") == [256, 104, 195, 169]
    assert encode_prompt(ByteTokenizer(), "") == [256]
    assert encode_prompt(word_tokenizer, "a tree") == [1, 2]
    with pytest.raises(ValueError, match="empty prompt"):
        encode_prompt(word_tokenizer, "")


@pytest.mark.parametrize("encode", [encode_text, encode_prompt])
@pytest.mark.parametrize("bytewise", [True, False])
def test_text_that_utf8_cannot_hold_is_refused(word_tokenizer, encode, bytewise):
    """As it comes from arguments and pipes that are not UTF-8, and from JSON."""
    with pytest.raises(ValueError, match=r"got '\\udcff' at character 2 of the text, wanted text that UTF-8 can hold"):
        encode(ByteTokenizer() if bytewise else word_tokenizer, "a \udcff")
