"""The server: a subprocess on a free port, asked by the `openai` client, answers what `generate_text` generates."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import openai
import pytest
import torch
import uvicorn
from transformers import PreTrainedTokenizerFast

from loglinear import LogLinearConfig, LogLinearForCausalLM
from loglinear.cli import main
from loglinear.data import ByteTokenizer
from loglinear.generate import generate_text
from loglinear.serve import RequestError, Sampling, build_app, encode_messages

PROMPT = "def naïve(数): "
LENGTH = 40
ENDLESS = {"prompt": PROMPT, "max_tokens": 10**6, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # Larger initial weights than usual, so that an untrained model has clear preferences.
    model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet", initializer_range=0.2)).eval()
    # Its logit is zero: the end of the text is never the likeliest token.
    torch.nn.init.zeros_(model.lm_head.weight[257])
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "checkpoint"
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@contextlib.contextmanager
def running(checkpoint):
    """The process of `loglinear serve` and a client for it; the process is gone afterwards."""
    command = [sys.executable, "-m", "loglinear", "serve", str(checkpoint), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        # Whatever goes wrong, reading does not wait for ever.
        alarm = threading.Timer(60, process.kill)
        alarm.start()
        try:
            told = []
            for line in process.stderr:
                told.append(line)
                if found := re.search(r"at (http://127\.0\.0\.1:\d+/v1)", line):
                    break
            else:
                raise AssertionError("".join(told))
            # Its log is read, so that it never waits for us.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=30) as client:
                yield process, client
        finally:
            alarm.cancel()
            process.kill()


@pytest.fixture(scope="module")
def client(checkpoint):
    with running(checkpoint) as (process, client):
        yield client
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=15) == 0


@pytest.fixture
def ask(client, checkpoint):
    """A chat of one message, greedy unless said otherwise."""

    def ask(**options):
        request = {"temperature": 0, "max_tokens": LENGTH, **options}
        messages = [{"role": "user", "content": PROMPT}]
        return client.chat.completions.create(model=str(checkpoint), messages=messages, **request)

    return ask


@pytest.fixture(scope="module")
def greedy(model):
    return generate_text(model, ByteTokenizer(), PROMPT, max_new_tokens=LENGTH, greedy=True)


def test_health_and_models(client, checkpoint):
    assert [one.id for one in client.models.list()] == [str(checkpoint)]
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/health")) as answer:
        assert json.load(answer) == {"status": "ok"}


def test_a_chat_is_the_greedy_continuation(ask, greedy, checkpoint):
    answer = ask()
    assert answer.model == str(checkpoint)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == greedy.text
    assert answer.choices[0].finish_reason == ("length" if len(greedy.tokens) == LENGTH else "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (greedy.prompt_tokens, len(greedy.tokens))


def test_a_streamed_chat_is_the_same_in_pieces(ask, greedy):
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == greedy.text and len(pieces) > 5
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == LENGTH


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_continues_the_prompt(client, checkpoint, greedy, stream):
    answer = client.completions.create(
        model=str(checkpoint), prompt=PROMPT, temperature=0, max_tokens=LENGTH, stream=stream
    )
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text == greedy.text


def test_messages_without_a_template_are_one_document(client, checkpoint, greedy):
    parts = [{"type": "text", "text": PROMPT[4:6]}, {"type": "text", "text": PROMPT[6:]}]
    messages = [{"role": "system", "content": PROMPT[:4]}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(
        model=str(checkpoint), messages=messages, temperature=0, max_completion_tokens=LENGTH
    )
    assert answer.choices[0].message.content == greedy.text


def test_an_answer_may_end_inside_a_character(ask, model):
    lengths = range(1, 12)
    results = [generate_text(model, ByteTokenizer(), PROMPT, max_new_tokens=one, greedy=True) for one in lengths]
    assert any(0xC2 <= result.tokens[-1] <= 0xF4 for result in results), "the first byte of several"
    for length, result in zip(lengths, results, strict=True):
        assert ask(max_tokens=length).choices[0].message.content == result.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("begin", "end"), [(7, 8), (9, 13), (0, 2)])
def test_text_ends_before_a_stop_text(ask, greedy, stream, begin, end):
    stop = greedy.text[begin:end]
    answer = ask(stop=["never in it", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content or "", answer.choices[0].finish_reason
    assert text == greedy.text[: greedy.text.index(stop)] and reason == "stop"


def test_what_might_have_been_a_stop_text_is_shown(ask, greedy):
    assert ask(stop=greedy.text[-1] + "and more").choices[0].message.content == greedy.text


def test_draws_are_those_of_generate_text(ask, model):
    def drawn(seed, **options):
        return ask(temperature=1.5, seed=seed, **options).choices[0].message.content

    def expected(seed, **options):
        settings = {"temperature": 1.5, "seed": seed, "max_new_tokens": LENGTH, **options}
        return generate_text(model, ByteTokenizer(), PROMPT, **settings).text

    assert drawn(3) == drawn(3) == expected(3) != drawn(4)
    assert drawn(3, top_p=0.5) == expected(3, top_p=0.5) != drawn(3)


def test_requests_at_the_same_time_do_not_mix(ask, greedy):
    answers = []

    def whole():
        answers.append(ask().choices[0].message.content)

    def streamed():
        answers.append("".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)))

    threads = [threading.Thread(target=target) for target in (whole, streamed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [greedy.text] * 2


def test_a_client_that_leaves_does_not_hold_up_the_next(ask, client, checkpoint, greedy):
    endless = client.completions.create(model=str(checkpoint), **ENDLESS)
    next(iter(endless))
    endless.close()
    assert ask(timeout=10).choices[0].message.content == greedy.text


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"max_tokens": -3}, "max_tokens", "max_tokens: got -3, wanted a whole number from 1"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: got 1.5, wanted a whole number"),
        ({"max_completion_tokens": 4}, "max_tokens", "got max_tokens and max_completion_tokens, wanted one of them"),
        ({"temperature": -1}, "temperature", "temperature: got -1, wanted 0, or a number from"),
        ({"temperature": "hot"}, "temperature", "temperature: got 'hot', wanted 0, or a number"),
        ({"top_p": 0}, "top_p", "top_p: got 0, wanted a number from"),
        ({"seed": True}, "seed", "seed: got True, wanted a whole number"),
        ({"max_tokens": 10**400}, "max_tokens", "max_tokens: got 1000"),
        ({"stop": [""]}, "stop", "stop: got [''], wanted a text or a list of texts"),
        ({"stream": "yes"}, "stream", "stream: got 'yes', wanted true or false"),
        ({"n": 2}, "n", "n: got 2, which this server does not support"),
        ({"logprobs": True}, "logprobs", "logprobs: got True, which this server does not support"),
        ({"tools": [{"type": "function"}]}, "tools", "tools: got [{'type': 'function'}], which"),
        ({"extra_body": {"max_token": 3}}, "max_token", "unknown field 'max_token'; did you mean 'max_tokens'?"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config", "unknown field 'generation_config'"),
        ({"extra_body": {"messages": None}}, "messages", "messages: got None, wanted a list of at least one"),
        ({"extra_body": {"messages": []}}, "messages", "messages: got [], wanted a list of at least one"),
        ({"extra_body": {"messages": ["hi"]}}, "messages", "messages[0]: got 'hi', wanted an object with role"),
        ({"extra_body": {"messages": [{"role": "user"}]}}, "messages", "messages[0]: got content None"),
        (
            {"extra_body": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}},
            "messages",
            "messages[0]: got content [{'type': 'image_url'}], wanted a text",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_wrong_requests_are_refused(ask, options, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**options)
    assert caught.value.body["message"].startswith(message)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server has only") as caught:
        client.chat.completions.create(model="gpt2", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"


def test_wrong_completions_are_refused(client, checkpoint):
    for options in ({"prompt": ["a", "b"]}, {"prompt": "a", "suffix": "b"}, {"prompt": "a", "logprobs": 0}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=str(checkpoint), **options)


@pytest.mark.parametrize("body", [b"{", b"[1]", b""], ids=["broken", "list", "empty"])
def test_what_is_no_object_is_refused(client, body):
    with pytest.raises(openai.BadRequestError, match="wanted one, with Content-Type"):
        client.post(
            "/chat/completions", cast_to=object, content=body, options={"headers": {"Content-Type": "application/json"}}
        )


def test_the_rest_of_the_server_is_closed(client):
    """The library's server would load other models, or put ours away."""
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/systemone", "/v1/audio/transcriptions", "/docs"):
        with pytest.raises(openai.NotFoundError, match="Not Found"):
            client.post(str(client.base_url).replace("/v1/", path), cast_to=object, body={"model": "gpt2"})


def test_a_server_stops_while_it_answers(checkpoint):
    with running(checkpoint) as (process, client):
        endless = client.completions.create(model=str(checkpoint), **ENDLESS)
        assert next(iter(endless)).object == "text_completion"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as caught:
            list(endless)
        assert caught.value.body == "the server is stopping"
        assert process.wait(timeout=15) == -signal.SIGTERM


def test_a_chat_template_is_heeded():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: token for token, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.decode(encode_messages(tokenizer, messages)) == "<|bos|>HiHo"
    tokenizer.chat_template = (
        "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert tokenizer.decode(encode_messages(tokenizer, messages)) == "user: Hi\nassistant: Ho\nassistant:"


def test_a_failing_model_is_an_error_of_the_server():
    class Failing(torch.nn.Module):
        device, config = torch.device("cpu"), LogLinearConfig.preset("tiny-mamba2")

        def generate(self, **options):
            raise RuntimeError('no "luck"')

    server = uvicorn.Server(uvicorn.Config(build_app(Failing(), ByteTokenizer(), "failing")))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=30) as client:
            with pytest.raises(openai.InternalServerError, match='RuntimeError: no "luck"') as caught:
                client.completions.create(model="failing", prompt="x")
            assert caught.value.type == "server_error"
            with pytest.raises(openai.APIError) as streamed:
                list(client.completions.create(model="failing", prompt="x", stream=True))
            assert streamed.value.body == 'RuntimeError: no "luck"'
        server.should_exit = True
        thread.join(timeout=15)
    assert not thread.is_alive()


def test_nulls_are_not_given():
    assert Sampling.of({"max_tokens": None, "temperature": None, "stop": None, "seed": None}) == Sampling()
    with pytest.raises(RequestError, match="temperature: got nan"):
        Sampling.of({"temperature": float("nan")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "got absent, wanted the folder of a checkpoint or of a training run"),
        (["absent", "--device", "tpu"], "device: got 'tpu', wanted 'auto', 'cpu' or 'cuda'"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *arguments).startswith(f"loglinear: error: {message}")


def test_a_port_in_use_is_refused(capsys, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "Address already in use" in refused(capsys, checkpoint, "--port", other.getsockname()[1])


def test_the_missing_extra_is_named(capsys, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "loglinear.serve")
    assert "(uvicorn): pip install 'log-linear-attention[serve]'" in refused(capsys, checkpoint)


def refused(capsys, *arguments):
    """What `loglinear serve` says when it refuses."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, arguments)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    return told
