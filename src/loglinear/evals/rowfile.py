"""Rows of results in a CSV that grows: each row is a dataclass, written as soon as it is known."""

import csv
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

R = TypeVar("R")


def columns(kind: type) -> tuple[str, ...]:
    """Names of the columns of a dataclass."""
    return tuple(one.name for one in dataclasses.fields(kind))


def read_rows(path: str | Path, kind: type[R]) -> list[R]:
    """The rows of a file, none where there is no file; a last line that was cut off while it was written is left out.

    Args:
        kind: a dataclass of texts, numbers and optional numbers; an empty cell of the latter is None.

    Raises:
        ValueError: the file has other columns.
    """
    path = Path(path)
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8")
    lines = whole[: whole.rfind("\n") + 1].splitlines(keepends=True)
    if not lines:
        return []
    reader, wanted = csv.DictReader(lines), columns(kind)
    if tuple(reader.fieldnames or ()) != wanted:
        raise ValueError(f"{path}: got the columns {', '.join(reader.fieldnames or ())}, wanted {', '.join(wanted)}")
    hints = typing.get_type_hints(kind)
    return [kind(**{name: _value(cell, hints[name]) for name, cell in line.items()}) for line in reader]


def _value(cell: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        (plain,) = [one for one in typing.get_args(kind) if one is not types.NoneType]
        return None if cell == "" else plain(cell)
    return kind(cell)


class RowFile(Generic[R]):
    """A CSV to which rows are appended.

    Args:
        path: a file with the rows of `kind`, or a new one.
        kind: the dataclass of a row.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, kind: type[R]):
        self.path = path
        rows = read_rows(path, kind)
        if not path.is_file() or not path.read_bytes().endswith(b"\n"):  # new, or cut off in a line
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(columns(kind))
                self._write(file, rows)

    def append(self, rows: Sequence[R]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            self._write(file, rows)

    @staticmethod
    def _write(file: typing.IO[str], rows: Sequence[Any]) -> None:
        writer = csv.writer(file, lineterminator="\n")
        for row in rows:
            writer.writerow(["" if cell is None else cell for cell in dataclasses.astuple(row)])
