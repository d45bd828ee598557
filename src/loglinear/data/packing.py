"""Packing: documents, shuffled anew every epoch, laid end to end and cut into rows of T tokens whose
boundaries are kept.

Dimensions: T tokens per row (`length`), N tokens per epoch.

The stream has no end: epoch e's documents, in an order drawn from (seed, e), are its tokens from e·N up to
(e+1)·N. Rows are cut at the multiples of T, so every row is full, a row may run across the end of an epoch,
and no token is ever lost. A long document gives many neighbouring rows; so that a training step does not see
one document only, the rows that begin in an epoch are shuffled among themselves, too.

Everything is computed from the row's number. A position in the data is therefore one integer, and resuming
costs nothing.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from loglinear.data.corpus import Corpus

IGNORED_LABEL = -100


class Row(NamedTuple):
    """One packed row."""

    tokens: np.ndarray  # int64 [T]
    starts: np.ndarray  # int64 [number of sequences], ascending, the first is 0


class PackedRows:
    """Rows of T tokens of a corpus, by number: `rows[17]`.

    Args:
        corpus: at least one document.
        length: T, tokens per row.
        seed: decides the order.
        epochs: None: an endless stream, every row full. A number: only so many epochs, and the last row is as
            long as what is left.
        shuffle: False keeps the order of the corpus (for evaluation).

    Raises:
        ValueError: an empty corpus, or T < 2 (a row must hold at least one token and what follows it).

    >>> from loglinear.data import ByteTokenizer, Document
    >>> documents = [Document("first", "a" * 600), Document("second", "b" * 900)]
    >>> corpus = Corpus.build(documents, ByteTokenizer(), "corpus")
    >>> rows = PackedRows(corpus, length=1024, seed=0)
    >>> rows[0].tokens.shape, len(rows[0].starts)
    ((1024,), 2)
    """

    def __init__(self, corpus: Corpus, length: int, seed: int = 0, *, epochs: int | None = None, shuffle: bool = True):
        if len(corpus) == 0:
            raise ValueError("got a corpus without documents, wanted at least one")
        if length < 2:
            raise ValueError(f"got rows of length {length}, wanted at least 2 tokens")
        if epochs is not None and epochs < 1:
            raise ValueError(f"got epochs={epochs}, wanted at least 1 (or None for an endless stream)")
        self.corpus = corpus
        self.length = length
        self.seed = seed
        self.epochs = epochs
        self.shuffle = shuffle
        self.num_tokens = corpus.num_tokens
        self._make_caches()

    def _make_caches(self) -> None:
        # An epoch's order is as large as the list of documents: a row needs the one it begins in and the one
        # it ends in.
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)
        self._row_order = lru_cache(maxsize=2)(self._shuffled_rows)

    def __getstate__(self) -> dict[str, Any]:
        # Caches cannot be pickled, and a worker process that is spawned is sent the rows that way.
        return {name: value for name, value in vars(self).items() if name not in ("_epoch", "_row_order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_caches()

    @property
    def num_rows(self) -> int:
        """Number of rows of a stream with an end.

        Raises:
            ValueError: the stream has none.
        """
        if self.epochs is None:
            raise ValueError("got an endless stream of rows, wanted one with a number of epochs")
        return -(-self.epochs * self.num_tokens // self.length)

    def __getitem__(self, row: int) -> Row:
        if row < 0 or (self.epochs is not None and row >= self.num_rows):
            raise IndexError(f"got row {row}, wanted 0 to {'…' if self.epochs is None else self.num_rows - 1}")
        epoch = row * self.length // self.num_tokens
        first = self._first_row(epoch)
        if self.shuffle:
            row = first + int(self._row_order(epoch)[row - first])
        return self._cut(row * self.length)

    def _cut(self, position: int) -> Row:
        """The row that begins at a position of the stream: pieces of documents until it is full."""
        stop = position + self.length
        if self.epochs is not None:
            stop = min(stop, self.epochs * self.num_tokens)
        tokens, starts, filled = np.empty(stop - position, np.int64), [], 0
        while position + filled < stop:
            epoch, place = divmod(position + filled, self.num_tokens)
            order, ends = self._epoch(epoch)
            slot = int(np.searchsorted(ends, place, side="right"))
            document = int(order[slot])
            begin = int(self.corpus.lengths[document]) - (int(ends[slot]) - place)
            piece = self.corpus.piece(document, begin, begin + min(int(ends[slot]) - place, stop - position - filled))
            tokens[filled : filled + len(piece)] = piece
            starts.append(filled)
            filled += len(piece)
        return Row(tokens, np.asarray(starts, np.int64))

    def _first_row(self, epoch: int) -> int:
        """Number of the first row that begins in an epoch."""
        return -(-epoch * self.num_tokens // self.length)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of an epoch in their order, and where each ends."""
        order = np.arange(len(self.corpus))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.corpus))
        return order, np.cumsum(self.corpus.lengths[order])

    def _shuffled_rows(self, epoch: int) -> np.ndarray:
        count = self._first_row(epoch + 1) - self._first_row(epoch)
        if self.epochs is not None and epoch == self.epochs - 1:
            count = self.num_rows - self._first_row(epoch)
        return np.random.default_rng([self.seed, epoch, 1]).permutation(count)

    def position(self, row: int) -> dict:
        """Everything that says where in the data row number `row` is, to save beside a checkpoint."""
        return {
            "row": row,
            "length": self.length,
            "seed": self.seed,
            "corpus": self.corpus.identity,
            "tokens": self.num_tokens,
        }

    def row_at(self, position: dict) -> int:
        """The row number of a saved position.

        Raises:
            ValueError: the position belongs to other data, another length or another seed, so that the stream
                would not go on where it stopped.
        """
        here = self.position(position["row"])
        changed = [f"{key}: saved {position[key]}, now {here[key]}" for key in here if position[key] != here[key]]
        if changed:
            raise ValueError(f"the saved position in the data does not fit the data of this run ({'; '.join(changed)})")
        return position["row"]


def join_rows(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Lay rows end to end as one packed batch of one row.

    Returns:
        `input_ids` and `labels` int64 [1, sum of T] (a sequence's first token, which nothing before it can
        predict, is ignored as a label) and `cu_seqlens` int32 [number of sequences + 1].
    """
    offsets = np.cumsum([0, *(len(row.tokens) for row in rows)])
    tokens = np.concatenate([row.tokens for row in rows])
    starts = np.concatenate([row.starts + offset for row, offset in zip(rows, offsets[:-1], strict=True)])
    labels = tokens.copy()
    labels[starts] = IGNORED_LABEL
    return {
        "input_ids": torch.from_numpy(tokens)[None],
        "labels": torch.from_numpy(labels)[None],
        "cu_seqlens": torch.from_numpy(np.concatenate([starts, offsets[-1:]]).astype(np.int32)),
    }
