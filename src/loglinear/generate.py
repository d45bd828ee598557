"""Text from a model, handed out as it is produced."""

import codecs
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from loglinear.data import ByteTokenizer, encode_prompt
from loglinear.models import LogLinearForCausalLM, cache_nbytes, decoding_cache


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took.

    Attributes:
        text: the new text, without the prompt and special tokens.
        tokens: ids of the new tokens, with the one that ended the text where there was one.
        prompt_tokens: tokens read before the first new one.
        first_token_seconds: until the first new token, so mostly reading the prompt (until it was stopped, where
            there is none).
        tokens_per_second: of the tokens after the first; 0 where there is only one.
        state_bytes: size of everything the model carries from token to token, at the end.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    state_bytes: int


class TextStream:
    """Turns token ids, one by one, into text that never ends inside a character.

    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.push(byte) for byte in "hé".encode()], stream.finish()
    (['h', '', 'é'], '')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.specials = set(tokenizer.all_special_ids)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if isinstance(tokenizer, ByteTokenizer) else None
        # For other tokenizers: ids since the last word boundary that was handed out, and how many of them
        # were shown. The shown ones are decoded again with each new one, because a token's text can depend on
        # the token before it.
        self._recent: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes; nothing while a character is incomplete, and for special
        tokens.
        """
        if token in self.specials:
            return ""
        if self._bytes is not None:
            return self._bytes.decode(bytes([token]))
        self._recent.append(token)
        before = self._decode(self._recent[: self._shown])
        text = self._decode(self._recent)
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._recent, self._shown = self._recent[self._shown :], len(self._recent) - self._shown
        return text[len(before) :]

    def finish(self) -> str:
        """What is left: the replacement character for bytes that never became a character."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        before = self._decode(self._recent[: self._shown])
        return self._decode(self._recent)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


class TokenStreamer(BaseStreamer):
    """Receives the tokens of `model.generate` as they come and passes their text on."""

    def __init__(
        self,
        stream: TextStream,
        on_text: Callable[[str], None] | None = None,
        on_token: Callable[[], None] | None = None,
    ):
        self.stream = stream
        self.on_text = on_text
        self.on_token = on_token
        self.prompt_seen = False
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            # The first thing that `generate` hands over is the prompt.
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.times.append(time.perf_counter())
            self.tokens.append(token)
            self._show(self.stream.push(token))
            if self.on_token is not None:
                self.on_token()

    def end(self) -> None:
        self._show(self.stream.finish())

    def generation(self, begin: float, prompt_tokens: int, cache: Cache) -> Generation:
        """What came, since `begin` and after so many tokens of a prompt, and the state that it left."""
        times = self.times
        return Generation(
            text="".join(self.pieces),
            tokens=self.tokens,
            prompt_tokens=prompt_tokens,
            first_token_seconds=(times[0] if times else time.perf_counter()) - begin,
            tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0,
            state_bytes=cache_nbytes(cache),
        )

    def _show(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            if self.on_text is not None:
                self.on_text(text)


def generate_text(
    model: LogLinearForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    greedy: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a text.

    Args:
        prompt: the beginning of a document; empty to let the model begin.
        max_new_tokens: stop after this many, if the model does not end the document before.
        greedy: take the likeliest token each time instead of drawing one.
        temperature: divides the logits before drawing (None: 1).
        top_k: draw from the k likeliest tokens only (None: from all).
        top_p: draw from the likeliest tokens that together have this probability (None: from all).
        seed: makes the draws repeatable; the random state outside is left alone.
        on_text: called with each new piece of text as it is produced.

    Raises:
        ValueError: an argument out of its range, or `greedy` together with one that only drawing heeds.
    """
    check_sampling(max_new_tokens, greedy, temperature, top_k, top_p, seed)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    settings = generation_settings(tokenizer, max_new_tokens, greedy, temperature, top_k, top_p)
    streamer = TokenStreamer(TextStream(tokenizer), on_text)
    devices = [model.device] if model.device.type == "cuda" else []
    begin = time.perf_counter()
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        cache = decoding_cache(model, ids.shape[1] + max_new_tokens)
        output = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else padding tokens that were written would be taken for padding
            generation_config=settings,
            past_key_values=cache,
            streamer=streamer,
        )
    return streamer.generation(begin, ids.shape[1], output.past_key_values)


def generation_settings(
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    greedy: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
) -> GenerationConfig:
    """The options of `generate_text`, as `model.generate` takes them."""
    sampling = {} if greedy else {"temperature": temperature or 1.0, "top_k": top_k or 0, "top_p": top_p or 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        return_dict_in_generate=True,
        **sampling,
    )


def check_sampling(
    max_new_tokens: int = 256,
    greedy: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> None:
    """Refuses options of `generate_text` as it does, for callers that show or load something before.

    Raises:
        ValueError: as `generate_text`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, wanted at least 1")
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    ignored = [name for name, value in given.items() if value is not None]
    if greedy and ignored:
        raise ValueError(
            f"got greedy together with {', '.join(ignored)}, which only drawing heeds; wanted one or the other"
        )
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature: got {temperature}, wanted a finite number, more than 0 (greedy takes the likeliest token)"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, wanted at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, wanted more than 0 and at most 1")
