"""Documents: text read lazily from files, directories, globs, the hub or Python's own library.

A source is a string:

    notes.txt, src/, corpus/**/*.md      a file, a directory (searched recursively), a glob: one document per
                                         text file
    corpus.jsonl, corpus.parquet         one document per line or row, in the field `text_field`
    stdlib                               the source of the running Python's standard library, no download
    package:NAME                         the source of an installed Python package, no download
    hub:OWNER/NAME                       a data set of the Hugging Face hub (needs the `datasets` package)

Text files and JSONL may be compressed with gzip (`.gz` after the suffix).
"""

import glob
import gzip
import hashlib
import importlib.util
import io
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .adoc .org .tex .bib .html .htm .xml .css .csv .tsv .log .srt"
    " .py .pyi .ipynb .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .rs .go .java .kt .scala .js .jsx .ts .tsx"
    " .rb .pl .php .lua .r .jl .hs .ml .swift .sh .bash .sql .json .yaml .yml .toml .ini .cfg".split()
)
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})
KNOWN_SUFFIXES = TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES
STANDARD_LIBRARY = "stdlib"
PACKAGE_PREFIX = "package:"
HUB_PREFIX = "hub:"
TEXT_FIELD = "text"
HUB_SPLIT = "train"
# Halves of a character of UTF-16, which JSON can spell (as \ud800) and UTF-8 and tokenizers cannot.
LONE_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text and where it came from (a path, with line or row number where a file holds several)."""

    name: str
    text: str


class Documents:
    """The documents of some sources, read anew and lazily at every iteration, in an order that depends on
    their names alone.

    Empty documents are skipped. Text that is not valid UTF-8 is read with U+FFFD in place of the bad bytes (and of
    half characters in JSON); a byte order mark at the beginning of a file is not part of its text.

    Args:
        sources: one or several sources, as the module describes them.
        text_field: the field of JSONL, Parquet and hub data sets that holds the text.
        hub_subset, hub_split: the subset (None: the only one) and the split of hub data sets.
        limit: read at most this many documents (None: all).

    Raises:
        FileNotFoundError: a source that does not exist, or a glob or directory that holds nothing readable.
        ValueError: a file with a suffix that is not known, options that none of the sources heeds, or (while
            iterating) a wrong field, a broken line, or a file that is not gzip or was cut off.
        ImportError: a hub data set without the `datasets` package.

    >>> next(iter(Documents("stdlib"))).name.endswith(".py")
    True
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        *,
        text_field: str = TEXT_FIELD,
        hub_subset: str | None = None,
        hub_split: str = HUB_SPLIT,
        limit: int | None = None,
    ):
        if isinstance(sources, (str, Path)):
            sources = [sources]
        if not sources:
            raise ValueError(
                "got no data source, wanted at least one file, directory, glob, 'stdlib' or 'hub:OWNER/NAME'"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"got limit={limit}, wanted at least 1 document (or None for all)")
        self.text_field = text_field
        self.hub_subset = hub_subset
        self.hub_split = hub_split
        self.limit = limit
        self.hub_names = sorted({str(s).removeprefix(HUB_PREFIX) for s in sources if str(s).startswith(HUB_PREFIX)})
        if self.hub_names:
            _hub_loader()
        files = {file for source in sources if not str(source).startswith(HUB_PREFIX) for file in _files(str(source))}
        self.files = sorted(files)
        self._refuse_idle_options()

    def _refuse_idle_options(self) -> None:
        """Refuses options that are not the default and that none of the sources heeds."""
        with_fields = JSONL_SUFFIXES | PARQUET_SUFFIXES
        if self.text_field != TEXT_FIELD and not (
            self.hub_names or any(_suffix(file) in with_fields for file in self.files)
        ):
            raise ValueError(
                f"got text_field={self.text_field!r}, but no source has fields; wanted JSONL, Parquet or a hub data "
                "set with it"
            )
        hub = {"hub_subset": (self.hub_subset, None), "hub_split": (self.hub_split, HUB_SPLIT)}
        given = [f"{name}={value!r}" for name, (value, default) in hub.items() if value != default]
        if given and not self.hub_names:
            raise ValueError(
                f"got {', '.join(given)}, but no source is a hub data set; wanted 'hub:OWNER/NAME' with it"
            )

    def __iter__(self) -> Iterator[Document]:
        for count, document in enumerate(self._all()):
            if count == self.limit:
                return
            yield document

    def _all(self) -> Iterator[Document]:
        for file in self.files:
            yield from (document for document in self._read(file) if document.text.strip())
        for name in self.hub_names:
            yield from (document for document in self._read_hub(name) if document.text.strip())

    def fingerprint(self) -> str:
        """A short hash of what would be read: paths, sizes and modification times, field, hub names and
        limit. Reads no document.
        """
        state = [self.text_field, self.limit, self.hub_names, self.hub_subset, self.hub_split]
        digest = hashlib.blake2b(json.dumps(state).encode(), digest_size=12)
        for file in self.files:
            status = file.stat()
            digest.update(f"\n{file}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _read(self, file: Path) -> Iterator[Document]:
        suffix = _suffix(file)
        if suffix in PARQUET_SUFFIXES:
            yield from self._read_parquet(file)
            return
        try:
            if suffix in JSONL_SUFFIXES:
                yield from self._read_jsonl(file)
            else:
                with _open_text(file) as stream:
                    yield Document(str(file), stream.read())
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{file}: got a file that is not gzip, or not all of it ({error})") from error

    def _read_jsonl(self, file: Path) -> Iterator[Document]:
        with _open_text(file) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                name = f"{file}:{number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{name}: got a line that is not JSON ({error}), wanted one JSON object per line"
                    ) from error
                if not isinstance(record, dict):
                    raise ValueError(
                        f"{name}: got a JSON {type(record).__name__}, "
                        f"wanted an object with the field {self.text_field!r}"
                    )
                yield Document(name, self._text(record, name))

    def _read_parquet(self, file: Path) -> Iterator[Document]:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        try:
            table = parquet.ParquetFile(file)
        except arrow.ArrowInvalid as error:
            raise ValueError(f"{file}: got a file that is not Parquet ({error})") from error
        with table:
            if self.text_field not in table.schema_arrow.names:
                raise ValueError(_wrong_field(str(file), self.text_field, table.schema_arrow.names))
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[self.text_field]):
                for value in batch.column(0):
                    yield Document(f"{file}:{number}", self._text({self.text_field: value.as_py()}, f"{file}:{number}"))
                    number += 1

    def _read_hub(self, name: str) -> Iterator[Document]:
        rows = _hub_loader()(name, self.hub_subset, split=self.hub_split, streaming=True)
        for number, record in enumerate(rows):
            label = f"{HUB_PREFIX}{name}:{number}"
            yield Document(label, self._text(record, label))

    def _text(self, record: dict, name: str) -> str:
        if self.text_field not in record:
            raise ValueError(_wrong_field(name, self.text_field, list(record)))
        text = record[self.text_field]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise ValueError(f"{name}: got {type(text).__name__} in the field {self.text_field!r}, wanted text")
        return LONE_SURROGATES.sub("\ufffd", text)


def standard_library() -> Documents:
    """The running Python's standard library, one document per source file, without its tests; no download."""
    return Documents(STANDARD_LIBRARY)


def _files(source: str) -> list[Path]:
    if source == STANDARD_LIBRARY:
        return _standard_library_files()
    if source.startswith(PACKAGE_PREFIX):
        return _package_files(source.removeprefix(PACKAGE_PREFIX))
    path = Path(source).expanduser()
    if path.is_file():
        if _suffix(path) not in KNOWN_SUFFIXES:
            raise ValueError(_unknown_suffix(path))
        return [path.resolve()]
    if path.is_dir():
        found = _readable(path.rglob("*"), path)
        if not found:
            raise FileNotFoundError(
                f"got the directory {path}, which holds no file with a known suffix ({_suffix_list()})"
            )
        return found
    if glob.has_magic(source):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise FileNotFoundError(f"got the glob {source!r}, which matches no file")
        for file in files:
            if _suffix(file) not in KNOWN_SUFFIXES:
                raise ValueError(_unknown_suffix(file))
        return [file.resolve() for file in files]
    hint = f" (for a data set of the hub write {HUB_PREFIX}{source})" if source.count("/") == 1 else ""
    raise FileNotFoundError(
        f"got the data source {source!r}, wanted an existing file, directory or glob, 'stdlib' or 'package:NAME'{hint}"
    )


def _readable(paths: Iterator[Path], root: Path) -> list[Path]:
    """Files with a known suffix, outside hidden directories."""
    return [
        path.resolve()
        for path in paths
        if _suffix(path) in KNOWN_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]


def _standard_library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _python_files(root)
    if not files:
        raise FileNotFoundError(f"this Python keeps no source of its standard library in {root}; name another corpus")
    return files


def _package_files(name: str) -> list[Path]:
    try:
        found = importlib.util.find_spec(name)  # imports nothing but what the package lies in
    except (ImportError, ValueError):
        found = None
    roots = [] if found is None else [Path(root) for root in found.submodule_search_locations or ()]
    files = [file.resolve() for root in roots for file in _python_files(root)]
    if not files:
        raise FileNotFoundError(f"got {PACKAGE_PREFIX}{name}, wanted an installed Python package with its source")
    return files


def _python_files(root: Path) -> list[Path]:
    """Source below a folder, without tests and without what is installed in it."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]


def _suffix(path: Path) -> str:
    """The suffix that says the format: the last one, or the one before `.gz` for text and JSONL."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] and suffixes[-2] not in PARQUET_SUFFIXES:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _open_text(file: Path) -> io.TextIOBase:
    opened = gzip.open(file, "rb") if file.suffix.lower() == ".gz" else open(file, "rb")
    return io.TextIOWrapper(opened, encoding="utf-8-sig", errors="replace", newline="")


def _suffix_list() -> str:
    return "text such as .txt .md .py, .jsonl, .ndjson, .parquet; .gz after text and JSONL"


def _unknown_suffix(path: Path) -> str:
    return f"{path}: got the suffix {_suffix(path) or '(none)'!r}, wanted a known one ({_suffix_list()})"


def _wrong_field(name: str, field: str, present: list[str]) -> str:
    nearest = get_close_matches(field, present, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{name}: no field {field!r}, it has {', '.join(map(repr, present)) or 'none'}{hint}"


def _hub_loader():
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError as error:
        raise ImportError(
            "reading a data set of the hub needs the `datasets` package: pip install 'log-linear-attention[data]'"
        ) from error
    return load_dataset
