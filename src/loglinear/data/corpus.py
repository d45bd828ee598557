"""A corpus: the token ids of many documents in one memory-mapped file, and its split by document.

Documents are tokenized once, in a stream, into a cache; nothing of the size of the corpus is ever held in
memory.

    tokens.bin    the token ids of all documents, one after the other (uint16, or uint32 for large
                  vocabularies)
    ends.npy      int64 [documents]: where each document ends in tokens.bin
    hashes.npy    uint64 [documents]: a hash of each document's text, which alone decides the side of the
                  split it falls on
    meta.json     counts, dtype, and the identity of the content
"""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from loglinear.data.documents import Document, Documents
from loglinear.data.tokenizers import encode_documents, fingerprint

FORMAT = 1
DOCUMENTS_PER_BATCH = 64


class Corpus:
    """Token ids of documents, on disk. A split of a corpus is a corpus on the same files.

    Attributes:
        directory: where the files are.
        documents: int64 [num_documents], this corpus's documents as indices into the files.
        lengths: int64 [num_documents], tokens per document.
        identity: hash of what the documents hold (not of where they were), so that a resumed run can tell
            whether its data changed.
    """

    def __init__(self, directory: str | Path, documents: np.ndarray | None = None):
        self.directory = Path(directory)
        meta_file = self.directory / "meta.json"
        if not meta_file.is_file():
            raise FileNotFoundError(
                f"got {self.directory}, wanted a directory with a tokenized corpus (no meta.json in it)"
            )
        self.meta = json.loads(meta_file.read_text())
        self._tokens = np.memmap(self.directory / "tokens.bin", dtype=self.meta["dtype"], mode="r")
        self._ends = np.load(self.directory / "ends.npy", mmap_mode="r")
        self._hashes = np.load(self.directory / "hashes.npy", mmap_mode="r")
        self.documents = np.arange(len(self._ends)) if documents is None else documents
        starts = np.concatenate([np.zeros(1, np.int64), self._ends[:-1]])
        self._starts = starts[self.documents]
        self.lengths = self._ends[self.documents] - self._starts
        self._selected = documents
        part = "" if documents is None else hashlib.blake2b(self.documents.tobytes(), digest_size=8).hexdigest()
        self.identity = self.meta["identity"] + part

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.documents)

    def __reduce__(self):
        # A memory map is pickled as its whole content; another process can open the files itself.
        return type(self), (self.directory, self._selected)

    def __getitem__(self, index: int) -> np.ndarray:
        """Token ids of one document, a read-only view of the file."""
        return self.piece(index, 0, int(self.lengths[index]))

    def piece(self, index: int, start: int, stop: int) -> np.ndarray:
        """Token ids `start … stop - 1` of one document."""
        first = int(self._starts[index])
        return self._tokens[first + start : first + stop]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def split(self, held_out_fraction: float, seed: int = 0) -> tuple["Corpus", "Corpus"]:
        """Split by document into a training and a held-out corpus.

        A document's side depends on its text and the seed alone: not on its name, its place, or the other
        documents. Equal texts fall on the same side. Only where chance leaves a side empty is the document
        nearest to the threshold moved over.

        Args:
            held_out_fraction: expected share of documents held out, in (0, 1).
            seed: another seed is another split.

        Returns:
            `(training, held_out)`, both with at least one document.

        Raises:
            ValueError: a fraction outside (0, 1), or fewer than two different documents.
        """
        if not 0 < held_out_fraction < 1:
            raise ValueError(f"got held_out_fraction={held_out_fraction}, wanted more than 0 and less than 1")
        places = _places(self._hashes[self.documents], seed)
        distinct = np.unique(places)
        if len(distinct) < 2:
            raise ValueError(
                f"got a corpus of {len(self)} document(s), {len(distinct)} of them different, and "
                f"held_out_fraction={held_out_fraction}: wanted at least 2 different documents to hold one "
                "out; set held_out_fraction=0 to train on everything"
            )
        # At least the smallest place is held out, and the largest is not.
        threshold = min(max(held_out_fraction, np.nextafter(distinct[0], 2)), distinct[-1])
        held_out = places < threshold
        return Corpus(self.directory, self.documents[~held_out]), Corpus(self.directory, self.documents[held_out])

    @classmethod
    def build(
        cls,
        documents: Documents | Iterable[Document],
        tokenizer: PreTrainedTokenizerBase,
        directory: str | Path,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "Corpus":
        """Tokenize documents into `directory`, which appears complete or not at all.

        Args:
            on_progress: called with (documents, tokens) written so far, once per batch.

        Raises:
            ValueError: there is no document.
        """
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            meta = _write(documents, tokenizer, scratch, on_progress)
            if meta["documents"] == 0:
                raise ValueError("got a corpus without any text, wanted at least one document that is not empty")
            (scratch / "meta.json").write_text(json.dumps(meta))
            try:
                os.replace(scratch, directory)
            except OSError:
                # Another process finished the same corpus first: its files are as good.
                if not (directory / "meta.json").is_file():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return cls(directory)

    @classmethod
    def load(
        cls,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        cache_directory: str | Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "Corpus":
        """The corpus of some documents, from the cache when these files were tokenized before with the same
        tokenizer, else built now.

        Args:
            cache_directory: None: `loglinear` in the user's cache directory.
        """
        key = f"{documents.fingerprint()}-{fingerprint(tokenizer)}-{FORMAT}"
        directory = Path(cache_directory or default_cache_directory()) / "corpora" / key
        if (directory / "meta.json").is_file():
            return cls(directory)
        return cls.build(documents, tokenizer, directory, on_progress)


def default_cache_directory() -> Path:
    """`$XDG_CACHE_HOME/loglinear`, or `~/.cache/loglinear`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loglinear"


def _places(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A place in [0, 1) for each content hash: the hash times an odd number drawn from the seed, mod 2^64."""
    drawn = hashlib.blake2b(f"split {seed}".encode(), digest_size=8).digest()
    odd = np.uint64(int.from_bytes(drawn, "little") // 2 * 2 + 1)
    mixed = hashes * odd  # unsigned arithmetic wraps, which is the modulo
    return (mixed // np.uint64(2**11)).astype(np.float64) / 2**53


def _write(documents: Iterable[Document], tokenizer, directory: Path, on_progress) -> dict:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    ends, hashes, total = array("q"), array("Q"), 0
    identity = hashlib.blake2b(f"{fingerprint(tokenizer)}".encode(), digest_size=12)
    remaining = iter(documents)
    with open(directory / "tokens.bin", "wb") as file:
        while batch := list(islice(remaining, DOCUMENTS_PER_BATCH)):
            texts = [document.text for document in batch]
            for text, tokens in zip(texts, encode_documents(tokenizer, texts, dtype), strict=True):
                content = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
                tokens.tofile(file)
                total += len(tokens)
                ends.append(total)
                hashes.append(int.from_bytes(content, "little"))
                identity.update(content)
            if on_progress is not None:
                on_progress(len(ends), total)
    np.save(directory / "ends.npy", np.frombuffer(ends, dtype=np.int64) if ends else np.zeros(0, np.int64))
    np.save(directory / "hashes.npy", np.frombuffer(hashes, dtype=np.uint64) if hashes else np.zeros(0, np.uint64))
    return {
        "format": FORMAT,
        "documents": len(ends),
        "tokens": total,
        "dtype": dtype.name,
        "vocabulary": len(tokenizer),
        "identity": identity.hexdigest(),
    }
