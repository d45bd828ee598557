"""One checkpoint behind an OpenAI-compatible server on this machine.

The server is that of transformers (`transformers serve`: its HTTP application, response formats, event streams and
inference thread). Ours is what a request means: which fields are honoured, which tokens the model reads, how they are
drawn, and how text is handed out, so that an answer is the text that `generate_text` gives for the same tokens. Only
the checkpoint can be asked for. Requests are answered one after another: continuous batching and assisted decoding
do not know layers that carry a state.
"""

import asyncio
import contextlib
import difflib
import inspect
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, cast

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from loglinear.data import encode_prompt, encode_text
from loglinear.generate import TextStream
from loglinear.models import LogLinearForCausalLM, decoding_cache
from loglinear.train.checkpoints import choose_device, load_checkpoint, resolve_checkpoint

try:
    # The server of transformers cannot even be imported without these.
    import openai  # noqa: F401
    import uvicorn
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError(
        f"serving needs packages that are not installed ({error.name}): pip install 'log-linear-attention[serve]'"
    ) from error

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, InferenceThread, _StreamError

CHAT, COMPLETIONS, MODELS, HEALTH = "/v1/chat/completions", "/v1/completions", "/v1/models", "/health"
DEFAULT_MAX_TOKENS = 1024
SHUTDOWN_SECONDS = 5  # for answers that are under way: they end with their next token

# What a request may set. `user` names the asker, and the last event of a stream counts tokens with or without
# `stream_options`: neither changes the answer.
FIELDS = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "user")
CHAT_FIELDS = ("messages", "max_completion_tokens", *FIELDS)
COMPLETION_FIELDS = ("prompt", *FIELDS)
# Fields of the protocol that this server does not have, with the value that asks for nothing.
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "store": False,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
}


class RequestError(ValueError):
    """A request that is refused: what was got and what was wanted, and the field that it is about."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Sampling:
    """What a request asks of `generate`: as `generate_text`, with temperature 0 for the likeliest token."""

    max_new_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Sampling":
        """The wishes of a request; a field that is null is one that was not given.

        Raises:
            RequestError: a value of another type, or out of its range.
        """
        given = {name: value for name, value in body.items() if value is not None}
        lengths = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
        if len(lengths) > 1:
            raise RequestError("got max_tokens and max_completion_tokens, wanted one of them", "max_tokens")
        stop = given.get("stop", [])
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise RequestError(f"stop: got {short(stop)}, wanted a text or a list of texts, none of them empty", "stop")
        return cls(
            max_new_tokens=_number(given, lengths[0], int, 1, 2**31) if lengths else DEFAULT_MAX_TOKENS,
            # Logits divided by less than this would overflow.
            temperature=_number(given, "temperature", float, 1e-6, 2, zero=True) if "temperature" in given else 1.0,
            top_p=_number(given, "top_p", float, 1e-6, 1) if "top_p" in given else 1.0,
            seed=_number(given, "seed", int, -(2**63), 2**63 - 1) if "seed" in given else None,
            stop=tuple(texts),
        )

    def config(self, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        greedy = self.temperature == 0
        drawing = {} if greedy else {"temperature": self.temperature, "top_k": 0, "top_p": self.top_p}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=not greedy,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **drawing,
        )


def _number(given: Mapping[str, Any], name: str, kind: type, low: float, high: float, zero: bool = False) -> Any:
    value = given[name]
    wanted = "a whole number" if kind is int else "0, or a number" if zero else "a number"
    of_kind = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not of_kind or not (low <= value <= high or (zero and value == 0)):
        raise RequestError(f"{name}: got {short(value)}, wanted {wanted} from {low} to {high}", name)
    return value


def check_fields(body: Mapping[str, Any], fields: tuple[str, ...], name: str) -> None:
    """Refuses a request for another model than `name`, fields that nobody knows, and those that would be ignored.

    Raises:
        RequestError: with status 404 for another model.
    """
    for field, value in body.items():
        if field in fields:
            continue
        if field not in NEUTRAL:
            near = difflib.get_close_matches(field, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; wanted {', '.join(fields)}"
            raise RequestError(f"unknown field {field!r}{hint}", field)
        neutral = NEUTRAL[field]
        if value is not None and (value != neutral or isinstance(value, bool) != isinstance(neutral, bool)):
            raise RequestError(f"{field}: got {short(value)}, which this server does not support; leave it out", field)
    if body.get("model") not in (None, name):
        message = f"model: got {body['model']!r}, but this server has only {name!r}"
        raise RequestError(message, "model", 404, "model_not_found")
    if not isinstance(body.get("stream") or False, bool):
        raise RequestError(f"stream: got {body['stream']!r}, wanted true or false", "stream")


def read_messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a chat, each a role and a text; parts of text are joined.

    Raises:
        RequestError: none, or one that holds anything but text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages: got {short(messages)}, wanted a list of at least one message", "messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{place}: got {short(message)}, wanted an object with role and content", "messages")
    extra = [key for key, value in message.items() if key not in ("role", "content", "name") and value]
    if extra:
        raise RequestError(f"{place}: got {', '.join(map(repr, extra))}, wanted role and content only", "messages")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise RequestError(
            f"{place}: got content {short(content)}, wanted a text or a list of parts of text", "messages"
        )
    return {"role": message["role"], "content": "".join(part["text"] for part in parts)}


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a chat: by the tokenizer's chat template, or, where it has none, the beginning of one document
    that holds the texts end to end, with nothing between them and without the roles.
    """
    if tokenizer.chat_template is None:
        return encode_prompt(tokenizer, "".join(message["content"] for message in messages))
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return encode_text(tokenizer, cast(str, text))


class _Stopped(Exception):
    """Ends `generate` from inside its streamer: a stop text came, nobody listens any longer, or the server stops."""


class _Pieces(BaseStreamer):
    """Receives tokens from `generate` and puts their text on the queue of an answer, up to a stop text.

    The last characters are held back while they may be the beginning of a stop text.
    """

    def __init__(
        self,
        stream: TextStream,
        stop: tuple[str, ...],
        loop: asyncio.AbstractEventLoop,
        stopping: threading.Event,
    ):
        self.stream, self.stop, self.loop, self.stopping = stream, stop, loop, stopping
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.tokens: list[int] = []
        self._held = ""
        self._prompt_seen = False
        self._cancelled = threading.Event()

    @property
    def total_tokens(self) -> int:
        return len(self.tokens)

    def cancel(self) -> None:
        self._cancelled.set()

    def hand_out(self, item: Any) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    def put(self, value: torch.Tensor) -> None:
        if self._cancelled.is_set() or self.stopping.is_set():
            raise _Stopped
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.tokens.append(token)
            self._show(self.stream.push(token))

    def end(self) -> None:
        self._show(self.stream.finish())
        if self._held:
            self.hand_out(self._held)

    def _show(self, text: str) -> None:
        self._held += text
        ends = [place for place in (self._held.find(stop) for stop in self.stop) if place >= 0]
        keep = 0 if ends else max((_overlap(self._held, stop) for stop in self.stop), default=0)
        shown = self._held[: min(ends) if ends else len(self._held) - keep]
        if shown:
            self.hand_out(shown)
        if ends:
            raise _Stopped
        self._held = self._held[len(shown) :]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class _Answer(BaseGenerateManager):
    """How the handlers of transformers have one request generated: streamed, or the same pieces joined."""

    def __init__(self, thread: InferenceThread, sampling: Sampling, stopping: threading.Event):
        self.thread, self.sampling, self.stopping = thread, sampling, stopping

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None) -> Any:
        stream = TextStream(cast(Any, processor))
        pieces = _Pieces(stream, self.sampling.stop, asyncio.get_running_loop(), self.stopping)
        self.thread.submit(self._generate, model, inputs, gen_config, pieces)
        return pieces.queue, pieces

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id) -> Any:
        queue, pieces = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        texts = []
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, _StreamError):
                    status = 503 if self.stopping.is_set() else 500
                    raise RequestError(json.loads(f'"{item.msg}"'), status=status)
                texts.append(item)
        finally:
            pieces.cancel()
        return "".join(texts), inputs["input_ids"].shape[1], pieces.tokens

    def stop(self) -> None:
        """Nothing to stop: the thread is a daemon."""

    def _generate(self, model: LogLinearForCausalLM, inputs: dict, config: GenerationConfig, pieces: _Pieces) -> None:
        seed = self.sampling.seed
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices, enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                tokens = inputs["input_ids"].shape[1] + self.sampling.max_new_tokens
                cache = decoding_cache(model, tokens)
                cast(Any, model).generate(**inputs, generation_config=config, past_key_values=cache, streamer=pieces)
        except _Stopped:
            if self.stopping.is_set():
                pieces.hand_out(_StreamError("the server is stopping"))
        except Exception as error:
            traceback.print_exc()
            # transformers writes this text between quotation marks as it is.
            pieces.hand_out(_StreamError(json.dumps(f"{type(error).__name__}: {error}")[1:-1]))
        pieces.hand_out(None)


@dataclass(frozen=True)
class _Served:
    """What all requests share."""

    name: str
    model: LogLinearForCausalLM
    tokenizer: PreTrainedTokenizerBase
    thread: InferenceThread
    stopping: threading.Event


class _Handler:
    """What a request is to both endpoints; the mixed-in class of transformers writes the response."""

    served: _Served
    fields: tuple[str, ...]

    def encode(self, body: Mapping[str, Any]) -> list[int]:
        raise NotImplementedError(f"{type(self).__name__} does not say how it turns a request into tokens")

    async def handle_request(self, body: dict, request_id: str) -> Any:
        model, tokenizer = self.served.model, self.served.tokenizer
        check_fields(body, self.fields, self.served.name)
        sampling = Sampling.of(body)
        tokens = torch.tensor([self.encode(body)], device=model.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        answer = _Answer(self.served.thread, sampling, self.served.stopping)
        respond = cast(Any, self)
        arguments = (request_id, model, tokenizer, self.served.name, inputs, sampling.config(tokenizer), answer)
        return respond._streaming(*arguments) if body.get("stream") else await respond._non_streaming(*arguments)


class _Chat(_Handler, ChatCompletionHandler):
    fields = CHAT_FIELDS

    def encode(self, body: Mapping[str, Any]) -> list[int]:
        messages = read_messages(body)
        try:
            return encode_messages(self.served.tokenizer, messages)
        except (ValueError, TypeError, TemplateError) as error:
            raise RequestError(f"messages: {error}", "messages") from error


class _Completion(_Handler, CompletionHandler):
    fields = COMPLETION_FIELDS

    def encode(self, body: Mapping[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise RequestError(f"prompt: got {short(prompt)}, wanted a text", "prompt")
        try:
            return encode_prompt(self.served.tokenizer, prompt)
        except (ValueError, TypeError) as error:
            raise RequestError(f"prompt: {error}", "prompt") from error


def build_app(
    model: LogLinearForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, stopping: threading.Event | None = None
) -> FastAPI:
    """The application: `POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models` and `GET /health`.

    Args:
        name: what a request calls the model.
        stopping: when it is set, answers under way end with an error.
    """
    manager, state = ModelManager(device="cpu"), GenerationState()  # neither is asked for anything
    chat, completion = _Chat(manager, state), _Completion(manager, state)
    chat.served = completion.served = _Served(name, model, tokenizer, InferenceThread(), stopping or threading.Event())
    parts: dict[str, Any] = {
        one: None for one in inspect.signature(build_server).parameters if one.endswith("_handler")
    }
    parts |= {"chat_handler": chat, "completion_handler": completion}
    app = build_server(model_manager=manager, generation_state=state, **parts)
    # The other routes load models by name, unload ours, or belong to the handlers that are None.
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) in (CHAT, COMPLETIONS, HEALTH)
    ]
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "loglinear"}
    app.add_api_route(MODELS, lambda: {"object": "list", "data": [entry]})

    def refuse(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)

    def wrong(request: Any, error: Any) -> JSONResponse:
        return refuse(error.status, str(error), error.param, error.code)

    def malformed(request: Any, error: Any) -> JSONResponse:
        return refuse(400, "got a body that is no JSON object, wanted one, with Content-Type: application/json")

    def http(request: Any, error: Any) -> JSONResponse:
        return refuse(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    def failed(request: Any, error: Any) -> JSONResponse:
        return refuse(500, f"{type(error).__name__}: {error}")

    app.add_exception_handler(RequestError, wrong)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)
    return app


class _Server(uvicorn.Server):
    """Ends the answers that are under way before it waits for them."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event):
        super().__init__(config)
        self.stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.stopping.set()
        await super().shutdown(sockets)


def serve(
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    precision: str = "auto",
    state_dtype: str | None = None,
) -> None:
    """Serve a checkpoint until SIGINT or SIGTERM.

    Args:
        checkpoint: a checkpoint's folder, or a run's (its newest checkpoint is taken); requests call the model by this
            path, as it is given here.
        port: 0 takes a free one; the address is printed to standard error.
        device, precision: as `choose_device`.
        state_dtype: as `load_checkpoint`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a `state_dtype` that is wrong for the model.
        OSError: the address cannot be listened on.
    """
    place, dtype = choose_device(device, precision)
    resolve_checkpoint(checkpoint)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        model, tokenizer = load_checkpoint(checkpoint, device=place, dtype=dtype, state_dtype=state_dtype)
        name, stopping = str(Path(checkpoint)), threading.Event()
        app = build_app(model, tokenizer, name, stopping)
        config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        address = f"http://{shown}:{listener.getsockname()[1]}/v1"
        print(f"serving {name!r} at {address}; Ctrl-C stops it", file=sys.stderr, flush=True)
        # uvicorn stops in good order, then raises the signal again.
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, stopping).run(sockets=[listener])
