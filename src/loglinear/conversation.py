"""A text that a model and somebody else write by turns: what was read stays in the model's state.

A turn costs what is new in it, however long the conversation is. The tokens of the conversation are those that were
shown, in their order; the state has read the first `read` of them, and the next turn reads the rest before anything
else. So an answer may be stopped between any two tokens, and so may the reading of a long prompt.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from loglinear.data import encode_prompt, encode_text
from loglinear.data.tokenizers import fingerprint
from loglinear.generate import Generation, TextStream, TokenStreamer, check_sampling, generation_settings
from loglinear.models import LogLinearForCausalLM, cache_nbytes, decoding_cache, load_saved, new_cache, save_cache

# Tokens that are read at once; between two such parts reading can be stopped.
READ_AT_ONCE = 2048
# Stands for an answer when only what a template puts around it is wanted. No letters that a template might change.
ANSWER = "\x00answer\x00"


class _Stop(StoppingCriteria):
    """Stops `generate` after the token that it is at."""

    def __init__(self, wanted: Callable[[], bool]):
        self.wanted = wanted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.wanted(), dtype=torch.bool, device=input_ids.device)


class Conversation:
    """Turns of text and answers, with the state that the model has after them.

    With a tokenizer that has a chat template, turns are messages and answers those of the assistant, each put into the
    template; else every turn goes on where the answer before it ended, as one text.

    Attributes:
        tokens: ids of everything so far, special tokens included.
        cache: the state after the first `read` of them.
        messages: of a chat, the messages so far; None otherwise.

    Example:
        >>> from loglinear import LogLinearConfig, LogLinearForCausalLM
        >>> from loglinear.data import ByteTokenizer
        >>> _ = torch.manual_seed(0)
        >>> model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet")).eval()
        >>> conversation = Conversation(model, ByteTokenizer())
        >>> conversation.answer("def f(", max_new_tokens=4).prompt_tokens    # with the one for the beginning
        7
        >>> conversation.answer("x", max_new_tokens=4).prompt_tokens    # with the newest one of the answer
        2
    """

    def __init__(self, model: LogLinearForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.chat = getattr(tokenizer, "chat_template", None) is not None
        self.tokens: list[int] = []
        self.messages: list[dict[str, str]] | None = None
        self.cache: Cache
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self.tokens = []
        self.messages = [] if self.chat else None
        self.cache = new_cache(self.model.config)

    @property
    def read(self) -> int:
        """How many of the tokens the state has read."""
        return int(self.cache.get_seq_length())

    @property
    def state_bytes(self) -> int:
        """Bytes of the state at the moment."""
        return cache_nbytes(self.cache)

    @property
    def ended(self) -> bool:
        """Whether the model itself ended the newest answer."""
        return self.tokens[-1:] == [self.tokenizer.eos_token_id]

    def answer(self, text: str, **options: Any) -> Generation:
        """The model's answer to the next turn: `prepare(text)`, then `respond(**options)`.

        Raises:
            ValueError: as both of them.
        """
        self.prepare(text)
        return self.respond(**options)

    def prepare(self, text: str) -> None:
        """Takes a turn without an answer yet.

        Args:
            text: what is new: a message, or how the text goes on. Empty: the model goes on with its answer (or begins
                a text by itself).

        Raises:
            ValueError: a message that the template refuses; an empty text where the model has ended its answer, or
                nobody has said anything.
        """
        if not text and self.tokens:
            if self.ended:
                raise ValueError("the model has ended here: only new text can follow")
            return
        if self.messages is not None:
            if not text:
                raise ValueError("got an empty message, wanted some text")
            new = encode_text(self.tokenizer, self._templated(text))
        elif self.tokens:
            new = encode_text(self.tokenizer, text)
        else:
            new = encode_prompt(self.tokenizer, text)
        if self.ended and self.read < len(self.tokens):
            # The end of the answer, which was not read: the text goes on, and a template closes the answer itself.
            self.tokens.pop()
        self.tokens.extend(new)
        if self.messages is not None:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]

    def respond(
        self,
        *,
        max_new_tokens: int = 256,
        greedy: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        on_text: Callable[[str], None] | None = None,
        on_token: Callable[[], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Generation:
        """Reads what was prepared and answers.

        Args:
            max_new_tokens, greedy, temperature, top_k, top_p, on_text: as in `generate_text`.
            on_token: called after every token.
            should_stop: asked after every token, and while a long text is read; if it says True the answer ends there,
                and the conversation goes on from there.

        Returns:
            The answer; its `prompt_tokens` are those that were read for it, without what the state had read before.

        Raises:
            ValueError: an option out of its range; nothing was prepared.
        """
        check_sampling(max_new_tokens, greedy, temperature, top_k, top_p)
        if self.read == len(self.tokens):
            raise ValueError("nothing to answer to: prepare a turn first")
        stop = should_stop or (lambda: False)
        settings = generation_settings(self.tokenizer, max_new_tokens, greedy, temperature, top_k, top_p)
        streamer = TokenStreamer(TextStream(self.tokenizer), on_text, on_token)
        before, begin = self.read, time.perf_counter()
        complete = False
        self.cache = decoding_cache(self.model, len(self.tokens) + max_new_tokens, self.cache)
        try:
            if self._read_ahead(stop):
                ids = torch.tensor([self.tokens], device=self.model.device)
                cast(Any, self.model).generate(
                    ids,
                    attention_mask=torch.ones_like(ids),  # else padding tokens that were written would be left out
                    generation_config=settings,
                    past_key_values=self.cache,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                )
            complete = True
        finally:
            prompt_tokens = min(self.read, len(self.tokens)) - before
            self.tokens.extend(streamer.tokens)
            if self.messages:
                self.messages[-1]["content"] += "".join(streamer.pieces)
            if not complete:
                # Some blocks may have read a token that others have not: read everything again.
                self.cache = new_cache(self.model.config)
        return streamer.generation(begin, prompt_tokens, self.cache)

    def save(self, path: str | Path) -> None:
        """Writes the conversation to a file, from which `load` goes on.

        Raises:
            OSError: it cannot be written.
        """
        notes = {"tokenizer": fingerprint(self.tokenizer), "messages": json.dumps(self.messages)}
        tokens = torch.tensor(self.tokens, dtype=torch.int64)
        save_cache(self.cache, self.model, path, tokens=tokens, notes=notes)

    def load(self, path: str | Path) -> None:
        """Goes on with a conversation that was saved; the present one is given up (but not if this fails).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no conversation of this model and tokenizer.
        """
        cache, tokens, notes = load_saved(path, self.model)
        if tokens is None or "messages" not in notes:
            raise ValueError(f"{path} is a saved state without its conversation")
        if notes["tokenizer"] != fingerprint(self.tokenizer):
            raise ValueError(f"{path} is a conversation with another tokenizer")
        messages = json.loads(notes["messages"])
        if (messages is not None) != self.chat:
            saved, here = ("a chat", "plain text") if messages is not None else ("plain text", "a chat")
            raise ValueError(f"{path} is {saved}, and this conversation {here}: the chat template has come or gone")
        self.cache, self.tokens, self.messages = cache, tokens.tolist(), messages

    def _read_ahead(self, stop: Callable[[], bool]) -> bool:
        """Reads all but the last few of the tokens; False if it was stopped."""
        while len(self.tokens) - self.read > READ_AT_ONCE:
            if stop():
                return False
            part = self.tokens[self.read : self.read + READ_AT_ONCE]
            with torch.no_grad():
                ids = torch.tensor([part], device=self.model.device)
                self.model(ids, past_key_values=self.cache, logits_to_keep=1)
        return not stop()

    def _templated(self, text: str) -> str:
        """What the template puts behind the newest answer if this is the next message, up to where the answer to it
        begins.
        """
        history = [dict(message) for message in self.messages or []]
        if history:
            history[-1]["content"] = ANSWER
        history.append({"role": "user", "content": text})
        try:
            whole = str(self.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this message: {error}") from error
        if len(history) == 1:
            return whole
        before, found, after = whole.partition(ANSWER)
        if not found:
            raise ValueError("the chat template leaves out earlier answers: it is not one to go on with turn by turn")
        return after
