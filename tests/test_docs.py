"""The documents say what is so: their Python runs, their commands, options, links and pictures exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer.main

from loglinear.cli import app

ROOT = Path(__file__).parent.parent
EXAMPLES = [ROOT / "README.md", ROOT / "docs" / "math.md"]  # those with Python that runs
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
SHELL = ("sh", "bash", "shell", "console")


def blocks(text: str, languages: tuple[str, ...]) -> list[tuple[int, str]]:
    """Fenced blocks in one of the languages, each with the number of its first line."""
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            found.append((text.count("\n", 0, match.start(2)) + 1, match[2]))
    return found


def commands(text: str) -> list[list[str]]:
    """Every `loglinear …` in a shell block or in inline code, as words without the leading `loglinear`."""
    lines = [line for _, block in blocks(text, SHELL) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(loglinear [^`\n]+)`", text)
    words = [shlex.split(line, comments=True) for line in lines]
    return [entry[1:] for entry in words if entry[:1] == ["loglinear"]]


def complaints(words: list[str], command=None) -> list[str]:
    """What is wrong with a command line: no such command, or no such option."""
    command = typer.main.get_command(app) if command is None else command
    spoken = ["loglinear"]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return [f"{' '.join(spoken)} has no command {words[0]}"]
        command = command.commands[words[0]]
        spoken.append(words[0])
        words = words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options = [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    return [f"{' '.join(spoken)} has no option {name}" for name in options if name not in known | {"--help", "-h"}]


def leaves(command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all commands that do something."""
    if not hasattr(command, "commands"):
        return [path]
    return [leaf for name, inner in command.commands.items() for leaf in leaves(inner, (*path, name))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a document, in order and in one namespace, as a reader would paste them."""
    examples = blocks(path.read_text(encoding="utf-8"), ("python",))
    assert examples
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for line, source in examples:
        exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)


def test_unknown_commands_are_seen() -> None:
    assert complaints(["no-such-command"])
    assert complaints([leaves(typer.main.get_command(app))[0][0], "--no-such-option"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_commands_exist(path: Path) -> None:
    wrong = [text for words in commands(path.read_text(encoding="utf-8")) for text in complaints(words)]
    assert not wrong


def test_readme_names_every_command() -> None:
    named = [tuple(words) for words in commands((ROOT / "README.md").read_text(encoding="utf-8"))]
    missing = [
        " ".join(leaf)
        for leaf in leaves(typer.main.get_command(app))
        if not any(words[: len(leaf)] == leaf for words in named)
    ]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    """Links to files of this repository, and to headings of its documents."""
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        destination = (path.parent / file).resolve() if file else path
        assert destination.exists(), f"{name(path)} links to {file}, which does not exist"
        if heading:
            assert heading in anchors(destination.read_text(encoding="utf-8")), f"{target}: no such heading"


def anchors(text: str) -> set[str]:
    """Names under which the headings of a document can be linked to."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pictures_are_drawn_by_their_script(tmp_path: Path) -> None:
    """The script draws every picture that the document shows, and the folder holds no other."""
    folder = ROOT / "docs" / "figures"
    runpy.run_path(str(folder / "draw.py"))["main"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"\]\(figures/([^)]+)\)", (ROOT / "docs" / "math.md").read_text(encoding="utf-8")))
    assert drawn == shown == {path.name for path in folder.glob("*.png")}
    assert all((tmp_path / picture).stat().st_size > 1000 for picture in drawn)
