"""Tokenizers: bytes by default, or any Hugging Face tokenizer by path or name.

`ByteTokenizer` needs no vocabulary file: token `b` is byte `b`, then come beginning of document, end of
document and padding. It saves and loads as every Hugging Face tokenizer does, and `AutoTokenizer` finds it
beside a checkpoint once this module is imported.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase

from loglinear.data.documents import LONE_SURROGATES
from loglinear.models.config import LogLinearConfig

NUM_BYTES = 256
BYTES = "bytes"


class ByteTokenizer(PreTrainedTokenizer):
    """UTF-8 bytes as tokens: 256 bytes, then `<|bos|>` 256, `<|eos|>` 257 and `<|pad|>` 258; 259 tokens in
    all.

    Encoding puts `<|bos|>` before a text (unless `add_special_tokens=False`). Text that spells a special
    token is encoded as its bytes, so no document can hold a control token. Decoding replaces bytes that are
    no valid UTF-8 by U+FFFD.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer("hé").input_ids
    [256, 104, 195, 169]
    >>> tokenizer.decode([104, 195, 169, 257], skip_special_tokens=True)
    'hé'
    """

    model_input_names = ["input_ids", "attention_mask"]
    vocab_files_names: dict[str, str] = {}

    def __init__(
        self,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        split_special_tokens=True,
        **kwargs,
    ):
        specials = [bos_token, eos_token, pad_token]
        self._added_tokens_decoder = {
            NUM_BYTES + index: AddedToken(str(token), special=True, normalized=False)
            for index, token in enumerate(specials)
        }
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            split_special_tokens=split_special_tokens,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the special ones: 256. `len(tokenizer)` is 259."""
        return NUM_BYTES

    def get_vocab(self) -> dict[str, int]:
        """Every token's text and id; a byte's text is the character of that code point (Latin-1)."""
        return {chr(byte): byte for byte in range(NUM_BYTES)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return [chr(byte) for byte in text.encode("utf-8", errors="surrogatepass")]

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < NUM_BYTES else None

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < NUM_BYTES:
            raise ValueError(f"ByteTokenizer has tokens 0 to {NUM_BYTES + 2}, got {index}")
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text; bytes that are no valid UTF-8 become U+FFFD, special tokens their names."""
        specials = self.added_tokens_encoder
        joined = b"".join(token.encode() if token in specials else token.encode("latin-1") for token in tokens)
        return joined.decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [NUM_BYTES, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False) -> list[int]:
        if already_has_special_tokens:
            return [int(token >= NUM_BYTES) for token in token_ids_0]
        return [1] + [0] * (len(token_ids_0) + len(token_ids_1 or []))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to write: the vocabulary is the bytes."""
        return ()


AutoTokenizer.register(LogLinearConfig, slow_tokenizer_class=ByteTokenizer, exist_ok=True)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name_or_path: `"bytes"`, a directory that holds a saved tokenizer (a checkpoint too), or a name on the
            Hugging Face hub.

    Raises:
        FileNotFoundError: neither a directory with a tokenizer nor a name that the hub (or its local cache)
            knows.
    """
    if str(name_or_path) == BYTES:
        return ByteTokenizer()
    path = Path(name_or_path)
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise FileNotFoundError(
            f"no tokenizer in {path}: wanted tokenizer_config.json or tokenizer.json in that directory"
        )
    try:
        return AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"got tokenizer {str(name_or_path)!r}, wanted 'bytes', a directory with a saved tokenizer, "
            f"or a name on the Hugging Face hub: {error}"
        ) from error


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash that changes whenever the tokenizer could encode something differently."""
    if isinstance(tokenizer, ByteTokenizer):
        return "bytes-v1"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    identity = f"{type(tokenizer).__name__}\n{tokenizer.bos_token_id}\n{tokenizer.eos_token_id}\n{content}"
    return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
    """Encode whole documents for training: beginning token, text, end token (each where the tokenizer has
    one).

    Returns:
        One array of token ids of `dtype` per text.
    """
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(tokenizer, ByteTokenizer):
        bodies = [np.frombuffer(text.encode("utf-8", errors="surrogatepass"), dtype=np.uint8) for text in texts]
    else:
        bodies = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    return [np.concatenate([np.asarray(part, dtype=dtype) for part in (before, body, after)]) for body in bodies]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text alone, without those that begin and end a document.

    Raises:
        ValueError: half characters, which stand for bytes of input that was not UTF-8.
    """
    if half := LONE_SURROGATES.search(text):
        raise ValueError(f"got {half[0]!r} at character {half.start()} of the text, wanted text that UTF-8 can hold")
    if isinstance(tokenizer, ByteTokenizer):
        return list(text.encode())
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode the beginning of a document as training saw it: the beginning token (where the tokenizer has
    one), then the text.

    Raises:
        ValueError: as `encode_text`; or the prompt is empty and the tokenizer has no beginning token to start from.
    """
    body, begin = encode_text(tokenizer, text), tokenizer.bos_token_id
    tokens = body if begin is None else [begin, *body]
    if not tokens:
        raise ValueError(
            "got an empty prompt, wanted some text: this tokenizer has no token for the beginning of a text"
        )
    return tokens
