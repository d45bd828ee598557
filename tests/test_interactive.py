"""The interactive command: along a pipe, at a terminal, and with Ctrl-C in both."""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from loglinear import LogLinearConfig, LogLinearForCausalLM
from loglinear.cli import main
from loglinear.conversation import Conversation
from loglinear.data import ByteTokenizer
from loglinear.generate import TextStream, generate_text
from loglinear.interactive import TerminalScreen
from loglinear.train.checkpoints import load_checkpoint

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that never ends an answer, when the likeliest token is taken."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet", initializer_range=0.2))
    with torch.no_grad():
        model.lm_head.weight[256:] = 0
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(checkpoint):
    return load_checkpoint(checkpoint)


def run(capsys, monkeypatch, lines: str, *arguments):
    """Run the command on lines of a pipe: exit code, standard output, standard error."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as ended:
        main(["generate", *map(str, arguments), "--interactive", "--greedy", "--device", "cpu"])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def text_of(tokens: list[int]) -> str:
    stream = TextStream(ByteTokenizer())
    return "".join(map(stream.push, tokens)) + stream.finish()


def answers(loaded, *turns: str, count: int = 12) -> str:
    talk = Conversation(*loaded)
    return "".join(text_of(talk.answer(turn, max_new_tokens=count, greedy=True).tokens) + "\n" for turn in turns)


def test_one_line_is_one_turn(capsys, monkeypatch, checkpoint, loaded):
    code, shown, told = run(capsys, monkeypatch, "def f(\nx é\n\n//go\n/quit\nnot read\n", checkpoint, "-n", 12)
    assert code == 0 and shown == answers(loaded, "def f(", "x é", "", "/go")
    summaries = told.splitlines()
    assert len(summaries) == 4
    for line, read, total in zip(summaries, (7, 5, 1, 4), (19, 35, 47, 62), strict=True):
        assert re.fullmatch(
            rf"12 tokens at [\d.,]+ tokens/s after reading {read} \(first token in [\d.]+ s\); "
            rf"conversation {total} tokens, state [\d,]+ bytes",
            line,
        ), line


def test_the_first_answer_is_what_generate_writes(capsys, monkeypatch, checkpoint, loaded):
    """The prompt, or the file of one, is the first turn."""
    expected = generate_text(*loaded, "def f(", max_new_tokens=12, greedy=True).text
    assert run(capsys, monkeypatch, "", checkpoint, "def f(", "-n", 12)[1] == expected + "\n"
    file = checkpoint / "prompt.txt"
    file.write_text("def f(")
    code, shown, _ = run(capsys, monkeypatch, "more", checkpoint, "-f", file, "-n", 12)
    assert code == 0 and shown == answers(loaded, "def f(", "more")


def test_seeds_repeat_a_conversation(capsys, monkeypatch, checkpoint):
    shown = []
    for seed in (3, 3, 4):
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
        with pytest.raises(SystemExit):
            main(["generate", str(checkpoint), "-i", "-n", "9", "--seed", str(seed), "--device", "cpu"])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_states_are_saved_loaded_and_forgotten(capsys, monkeypatch, checkpoint, loaded, tmp_path):
    file = tmp_path / "a state"
    lines = f"long text\n/save {file}\none\n/load {file}\ntwo\n/reset\nlong text\n/help\n"
    code, shown, told = run(capsys, monkeypatch, lines, checkpoint, "-n", 12)
    first, one, two = (
        answers(loaded, "long text"),
        answers(loaded, "long text", "one"),
        answers(loaded, "long text", "two"),
    )
    assert code == 0 and shown == one + two.removeprefix(first) + first
    assert f"saved to {file}: 22 tokens, state" in told and f"loaded from {file}: 22 tokens, state" in told
    assert "forgotten: 0 tokens, state 0 bytes" in told and "/load FILE  go on from" in told


def test_a_chat_where_the_tokenizer_has_a_template(capsys, monkeypatch, loaded, tmp_path):
    model, tokenizer = loaded
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, shown, told = run(capsys, monkeypatch, "Hi\nSo?\n", tmp_path, "-n", 8)
    assert code == 0 and shown == answers((model, tokenizer), "Hi", "So?", count=8)
    assert f"after reading {len('<user>Hi</><a>')} " in told and f"reading {len('x</><user>So?</><a>')} " in told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/lod x", "no command /lod; did you mean /load? (text that begins with a slash needs two)"),
        ("/frobnicate", "no command /frobnicate; the commands are /reset, /save, /load, /help, /quit"),
        ("/load", "got '/load', wanted /load FILE"),
        ("/reset now", "got '/reset now', wanted /reset"),
        ("/load absent", "no saved state absent"),
        ("/save config.json", "config.json is there and is no saved state: choose another name"),
    ],
    ids=lambda value: value if value[0] == "/" else "",
)
def test_a_wrong_line_of_a_pipe_ends_it(capsys, monkeypatch, checkpoint, line, message):
    monkeypatch.chdir(checkpoint)
    code, shown, told = run(capsys, monkeypatch, f"{line}\nmore\n", checkpoint, "-n", 4)
    assert code == 2 and shown == "" and told.startswith(f"loglinear: error: {message}")


def test_options_are_checked_first(capsys, monkeypatch, checkpoint):
    for flags, message in (
        (("-n", 0), "max_new_tokens: got 0"),
        (("--top-k", 3), "got greedy together with top_k"),
        (("x", "-f", "y"), "got a prompt and --prompt-file"),
    ):
        code, shown, told = run(capsys, monkeypatch, "a\n", checkpoint, *flags)
        assert code == 2 and shown == "" and message in told
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("café\n".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(checkpoint), "-i", "--device", "cpu"])
    assert ended.value.code == 2 and "got standard input, wanted it in utf-8" in capsys.readouterr().err


def command(checkpoint, *arguments) -> list[str]:
    return [
        *(sys.executable, "-m", "loglinear", "generate", str(checkpoint), "-i", "--greedy", "--device", "cpu"),
        *arguments,
    ]


def restore_interrupts() -> None:
    """A test run in the background has children that ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_an_interrupt_stops_the_answer_and_not_the_program(checkpoint, loaded, tmp_path):
    process = subprocess.Popen(
        command(checkpoint, "-n", "1000000"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=restore_interrupts,
    )
    shown = b""

    def say(line: str) -> None:
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()

    def interrupt() -> str:
        """In the middle of an answer; the summary of what there was of it."""
        nonlocal shown
        for _ in range(20):
            shown += os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        return process.stderr.readline().decode()

    try:
        say("def f(")
        assert interrupt().endswith("; stopped\n")
        say(f"/save {tmp_path / 'stopped'}")
        assert process.stderr.readline().startswith(b"saved to")
        say("")
        assert interrupt().endswith("; stopped\n") and process.poll() is None
        say(f"/save {tmp_path / 'again'}")
        rest, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and told.startswith(b"saved to")
    first, second = Conversation(*loaded), Conversation(*loaded)
    first.load(tmp_path / "stopped")
    second.load(tmp_path / "again")
    count, more = len(first.tokens) - 7, len(second.tokens) - len(first.tokens)
    assert count > 10 and more > 10
    # The tokens that were saved are those that were shown, and the state is theirs: going on from it gives what the
    # program went on with, which is what a model gives that was never stopped.
    assert (shown + rest).decode() == f"{text_of(first.tokens[7:])}\n{text_of(second.tokens[-more:])}\n"
    assert first.tokens[:7] == [256, *b"def f("] and first.read == len(first.tokens) - 1
    assert first.answer("", max_new_tokens=more, greedy=True).tokens == second.tokens[-more:]
    assert generate_text(*loaded, "def f(", max_new_tokens=count + more, greedy=True).tokens == second.tokens[7:]


class Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, arguments: list[str]):
        import pty

        self.shown = ""
        self.process, self.end = pty.fork()
        if self.process == 0:
            os.environ.update(TERM="xterm", COLUMNS="60", LINES="24")
            restore_interrupts()
            os.execv(arguments[0], arguments)

    def until(self, wanted: str, seconds: float = 30) -> str:
        """All that is shown from where the last call ended until something is."""
        end = time.monotonic() + seconds
        while wanted not in self.shown:
            ready, _, _ = select.select([self.end], [], [], max(0.0, end - time.monotonic()))
            assert ready and time.monotonic() < end, f"no {wanted!r} in {self.shown[-500:]!r}"
            self.shown += os.read(self.end, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(wanted)
        return before + wanted

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def interrupt_until_it_ends(self) -> int:
        """Presses Ctrl-C at the prompt: again if it came just before readline listened. The exit status.

        Not again too soon: a program that has understood takes seconds to end on a busy machine, and would be killed.
        """
        for _ in range(6):
            self.type("\x03")
            for _ in range(100):
                ended, status = os.waitpid(self.process, os.WNOHANG)
                if ended:
                    return status
                time.sleep(0.1)
        raise AssertionError("the program does not end")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_at_a_terminal(checkpoint):
    terminal = Terminal(command(checkpoint, "def f(", "-n", "1000000"))
    try:
        assert "> def f(" in terminal.until("reading 7 tokens", 60)
        live = "".join(terminal.until(" bytes") for _ in range(3))
        assert re.search(r"\d+ tokens · [\d.]+ tokens/s · state [\d,]+ bytes", live), live
        terminal.type("\x03")
        assert "after reading 7" in " ".join(terminal.until("stopped").split())
        terminal.until("> ")
        terminal.type("/sav x\n")
        terminal.until("did you mean /save?")
        terminal.until("> ")
        terminal.type("\n")
        terminal.until("tokens/s")
        terminal.type("\x03")
        terminal.until("stopped")
        terminal.until("> ")
        assert terminal.interrupt_until_it_ends() == 0
    finally:
        os.close(terminal.end)


def test_what_a_terminal_shows_cannot_steer_it(capsys, monkeypatch, loaded):
    monkeypatch.setenv("COLUMNS", "20")
    screen = TerminalScreen()
    screen.begin(Conversation(*loaded))
    for piece in ("a\x1b[2Jb\x9b\r", "c\td\n", "words that are longer than a line is ", "[bold]wide"):
        screen.text(piece)
        screen.token()
    screen.end()
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    kept = [line for line in shown if "state" not in line and "reading" not in line]
    assert "".join(kept).replace(" ", "") == "a␛[2Jb\ufffd␍cdwordsthatarelongerthanalineis[bold]wide"
    assert all(len(line) <= 20 for line in kept)
