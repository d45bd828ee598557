"""`loglinear generate --interactive`: a conversation at a terminal, or along the lines of a pipe.

On a terminal the answer streams in above a line that says how fast it comes and how large the state is. Elsewhere one
line is one turn; answers go to standard output as they are, without control codes, and summaries to standard error.
"""

import difflib
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from loglinear.conversation import Conversation
from loglinear.generate import Generation
from loglinear.train.reporting import quiet_transformers

COMMANDS = {
    "/reset": "forget everything and begin anew",
    "/save FILE": "write the conversation and the model's state to a file",
    "/load FILE": "go on from such a file; a long prompt is read once and answered many times",
    "/help": "show this",
    "/quit": "end (as does the end of input, or Ctrl-C here)",
}
HELP = "\n".join(
    [
        *(f"{command:<12}{meaning}" for command, meaning in COMMANDS.items()),
        f"{'//...':<12}text that begins with a slash",
        f"{'(empty)':<12}let the model go on with its answer",
        "Ctrl-C stops an answer; the conversation goes on from what is shown. A second Ctrl-C ends the program.",
    ]
)
REFRESH_SECONDS = 0.1
# What a model writes must not steer the terminal: control characters are shown as their pictures.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    code: 0xFFFD for code in range(127, 160)
}


class Screen(Protocol):
    """Where a conversation is shown, and where its turns come from."""

    def ask(self) -> str:
        """The next line, without its end. Raises EOFError after the last."""
        ...

    def note(self, text: str) -> None:
        """Shows what is not part of the conversation."""
        ...

    def mistake(self, error: Exception) -> None:
        """Shows what was wrong with a line, or raises it."""
        ...

    def given(self, text: str) -> None:
        """Shows a turn that was not typed."""
        ...

    def begin(self, conversation: Conversation) -> None:
        """An answer begins."""
        ...

    def text(self, piece: str) -> None:
        """A piece of it."""
        ...

    def token(self) -> None:
        """One more token of it."""
        ...

    def end(self) -> None:
        """It is over, however it ended."""
        ...


class PipeScreen:
    """Lines in from standard input, answers out, the rest to standard error. A line that is wrong ends it all: what
    follows was meant for another state.
    """

    def ask(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def mistake(self, error: Exception) -> None:
        raise error

    def given(self, text: str) -> None:
        pass

    def begin(self, conversation: Conversation) -> None:
        pass

    def text(self, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    def token(self) -> None:
        pass

    def end(self) -> None:
        self.text("\n")


class TerminalScreen:
    """Lines that are typed, and answers above a live line."""

    def __init__(self) -> None:
        try:
            import readline  # noqa: F401  (input() then has editing and a history)
        except ImportError:
            pass
        self.console = Console(highlight=False)
        self.conversation: Conversation | None = None
        self.live: Live | None = None
        # The last line of the answer, which may still grow; those before it are printed for good.
        self.line = ""
        self.tokens = 0
        self.first = self.shown = 0.0

    def ask(self) -> str:
        return input("> ")

    def note(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))

    def mistake(self, error: Exception) -> None:
        self.console.print(Text(str(error), style="red"))

    def given(self, text: str) -> None:
        self.console.print(Text(f"> {text}".translate(VISIBLE)))

    def begin(self, conversation: Conversation) -> None:
        self.conversation, self.line, self.tokens = conversation, "", 0
        self.live = Live(self, console=self.console, auto_refresh=False, transient=True, redirect_stderr=False)
        self.live.start()
        self._refresh()

    def text(self, piece: str) -> None:
        self.line += piece.translate(VISIBLE).expandtabs(4)
        *whole, self.line = self.line.split("\n")
        rows = Text(self.line).wrap(self.console, self.console.width)
        if len(rows) > 1:
            whole += [row.plain for row in rows[:-1]]
            self.line = rows[-1].plain
        for line in whole:
            self.console.print(Text(line))

    def token(self) -> None:
        now = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first = now
        if now - self.shown >= REFRESH_SECONDS:
            self._refresh()

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
        if self.line:
            self.console.print(Text(self.line))

    def __rich__(self) -> Group:
        """The live lines: what is written of the last line, and how it goes."""
        assert self.conversation is not None
        if self.tokens:
            seconds = time.perf_counter() - self.first
            rate = (self.tokens - 1) / seconds if self.tokens > 1 else 0.0
            status = f"{self.tokens:,} tokens · {rate:,.1f} tokens/s"
        else:
            status = f"reading {len(self.conversation.tokens) - self.conversation.read:,} tokens"
        status += f" · state {self.conversation.state_bytes:,} bytes"
        return Group(Text(self.line), Text(status, style="dim", no_wrap=True))

    def _refresh(self) -> None:
        assert self.live is not None
        self.shown = time.perf_counter()
        self.live.refresh()


class Interrupts:
    """While it is entered, the first Ctrl-C sets `wanted`, and the second is a KeyboardInterrupt as ever."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: Any = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


def converse(
    conversation: Conversation, first: str | None = None, screen: Screen | None = None, **sampling: Any
) -> None:
    """Take turns until `/quit`, the end of input, or Ctrl-C at the prompt.

    Args:
        first: the first turn, if it is already known.
        screen: where to show it (default: by what standard input and output are).
        sampling: options of `Conversation.answer`.

    Raises:
        ValueError, OSError: a line of a pipe that is wrong; at a terminal the next one is asked for.
    """
    if screen is None:
        screen = TerminalScreen() if sys.stdin.isatty() and sys.stdout.isatty() else PipeScreen()
    if isinstance(screen, TerminalScreen):
        kind = "A chat" if conversation.chat else "A text to go on with"
        screen.note(f"{kind}. Ctrl-C stops an answer, and ends the program here; /help for more.")
    try:
        with quiet_transformers():
            _take_turns(conversation, first, screen, sampling)
    except (EOFError, KeyboardInterrupt):
        if isinstance(screen, TerminalScreen):
            screen.note("")  # ends the line of the prompt


def _take_turns(conversation: Conversation, first: str | None, screen: Screen, sampling: dict[str, Any]) -> None:
    """Turns and commands, until `/quit` or what ends the input."""
    if first is not None:
        screen.given(first)
        _turn(conversation, first, screen, sampling)
    while True:
        line = screen.ask()
        if line.startswith("/") and not line.startswith("//"):
            try:
                if not _command(conversation, line, screen):
                    return
            except (ValueError, OSError) as error:
                screen.mistake(error)
        else:
            _turn(conversation, line.removeprefix("/") if line.startswith("//") else line, screen, sampling)


def _turn(conversation: Conversation, text: str, screen: Screen, sampling: dict[str, Any]) -> None:
    """One turn and its answer."""
    try:
        with Interrupts() as interrupts:
            conversation.prepare(text)
            screen.begin(conversation)
            try:
                answer = conversation.respond(
                    on_text=screen.text, on_token=screen.token, should_stop=lambda: interrupts.wanted, **sampling
                )
            finally:
                screen.end()
            screen.note(summary(conversation, answer, interrupts.wanted))
    except ValueError as error:
        screen.mistake(error)


def summary(conversation: Conversation, answer: Generation, stopped: bool) -> str:
    """One line about an answer."""
    return (
        f"{len(answer.tokens):,} tokens at {answer.tokens_per_second:,.1f} tokens/s after reading "
        f"{answer.prompt_tokens:,} (first token in {answer.first_token_seconds:.2f} s); conversation "
        f"{len(conversation.tokens):,} tokens, state {answer.state_bytes:,} bytes{'; stopped' if stopped else ''}"
    )


def _command(conversation: Conversation, line: str, screen: Screen) -> bool:
    """Does what a command says; False to end."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    wanted = {command.split()[0]: command for command in COMMANDS}
    if name not in wanted:
        near = difflib.get_close_matches(name, list(wanted), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; the commands are {', '.join(wanted)}"
        raise ValueError(f"no command {name}{hint} (text that begins with a slash needs two)")
    takes_file = " " in wanted[name]
    if takes_file != bool(argument):
        raise ValueError(f"got {line.strip()!r}, wanted {wanted[name]}")
    if name == "/quit":
        return False
    if name == "/help":
        screen.note(HELP)
        return True
    file = Path(argument).expanduser()
    if name == "/reset":
        conversation.reset()
    elif name == "/save":
        conversation.save(file)
    else:
        conversation.load(file)
    done = {"/reset": "forgotten", "/save": f"saved to {file}", "/load": f"loaded from {file}"}[name]
    screen.note(f"{done}: {len(conversation.tokens):,} tokens, state {conversation.state_bytes:,} bytes")
    return True
