"""Packing: no token lost, boundaries kept, order by seed and epoch, exact positions."""

import pickle
from collections import Counter
from typing import cast

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from loglinear.data import ByteTokenizer, Corpus, Document, PackedRows, join_rows
from loglinear.data.packing import IGNORED_LABEL

BEGIN, END = 256, 257


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """37 documents of 2 to 200 characters, each with its own text; 3,000-odd tokens."""
    draw = np.random.default_rng(0)
    lengths = [2, 3, 200, 199, *draw.integers(4, 160, 33)]
    texts = ["".join(chr(97 + (number * 7 + i) % 26) for i in range(n)) for number, n in enumerate(lengths)]
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    return Corpus.build(documents, ByteTokenizer(), tmp_path_factory.mktemp("corpus") / "c")


def pieces(row):
    """The sequences of a row."""
    return np.split(row.tokens, row.starts[1:])


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("length", [2, 16, 33, 128, 100_000])
def test_no_token_is_lost(corpus, length, epochs, shuffle):
    rows = PackedRows(corpus, length, seed=3, epochs=epochs, shuffle=shuffle)
    packed = [rows[number] for number in range(rows.num_rows)]
    counted = Counter(np.concatenate([row.tokens for row in packed]).tolist())
    wanted = Counter(np.concatenate(list(corpus)).tolist())
    assert counted == {token: count * epochs for token, count in wanted.items()}
    assert sorted(len(row.tokens) for row in packed)[1:] == [length] * (rows.num_rows - 1), "one row may be short"


@pytest.mark.parametrize("length", [7, 64, 500])
def test_every_sequence_lies_in_one_document(corpus, length):
    rows = PackedRows(corpus, length, seed=1)
    texts = [tokens.tobytes() for tokens in corpus]
    for number in range(2 * corpus.num_tokens // length):
        row = rows[number]
        assert len(row.tokens) == length and row.starts[0] == 0 and (np.diff(row.starts) > 0).all()
        for place, piece in enumerate(pieces(row)):
            assert any(piece.astype(np.uint16).tobytes() in text for text in texts)
            assert not (piece[1:] == BEGIN).any() and not (piece[:-1] == END).any()
            assert place == 0 or piece[0] == BEGIN, "inside a row a sequence starts only where a document does"


def test_unshuffled_rows_are_the_corpus_in_order(corpus):
    rows = PackedRows(corpus, 50, epochs=1, shuffle=False)
    joined = np.concatenate([rows[number].tokens for number in range(rows.num_rows)])
    np.testing.assert_array_equal(joined, np.concatenate(list(corpus)))
    ends = np.cumsum(corpus.lengths)
    starts = np.concatenate([rows[number].starts + 50 * number for number in range(rows.num_rows)])
    assert set(starts) == {0, *ends[:-1], *range(0, corpus.num_tokens, 50)}


def test_endless_stream_holds_every_epoch_whole(corpus):
    """Over k epochs of an endless stream every token was seen k times, whatever the row length divides."""
    length, epochs = 48, 4
    rows = PackedRows(corpus, length, seed=5)
    # Rows that begin in the first `epochs` epochs; the last of them runs on into the next epoch.
    count = -(-epochs * corpus.num_tokens // length)
    total = Counter(np.concatenate([rows[number].tokens for number in range(count)]).tolist())
    wanted = Counter(np.concatenate(list(corpus)).tolist())
    beyond = count * length - epochs * corpus.num_tokens
    excess = sum(total[token] - epochs * wanted[token] for token in wanted)
    assert excess == beyond < length
    assert all(total[token] >= epochs * wanted[token] for token in wanted)


def test_a_corpus_shorter_than_a_row_repeats(tmp_path):
    small = Corpus.build([Document("a", "ab"), Document("b", "xyz")], ByteTokenizer(), tmp_path / "c")
    row = PackedRows(small, 30, seed=0)[4]
    assert len(row.tokens) == 30
    assert Counter(row.tokens.tolist())[BEGIN] in (6, 7), "30 tokens are 3 1/3 times two documents"


def test_order_is_by_seed_and_epoch(corpus):
    length = 64
    per_epoch = corpus.num_tokens // length

    def stream(seed, first):
        rows = PackedRows(corpus, length, seed=seed)
        return np.concatenate([rows[number].tokens for number in range(first, first + per_epoch)])

    np.testing.assert_array_equal(stream(0, 0), stream(0, 0))
    assert not np.array_equal(stream(0, 0), stream(1, 0))
    assert not np.array_equal(stream(0, 0), stream(0, per_epoch + 1))


def test_neighbouring_rows_of_a_long_document_are_spread(tmp_path):
    long = Document("long", "".join(chr(97 + i // 100) for i in range(2000)))
    short = [Document(str(n), f"{n:04d}" * 25) for n in range(20)]
    corpus = Corpus.build([long, *short], ByteTokenizer(), tmp_path / "c")
    rows = PackedRows(corpus, 100, seed=0)
    from_long = [bool((rows[number].tokens >= 97).all()) for number in range(corpus.num_tokens // 100)]
    switches = sum(a != b for a, b in zip(from_long, from_long[1:], strict=False))
    assert switches > 5, "unshuffled rows would switch once or twice"


def test_rows_by_number_equal_rows_in_order(corpus):
    fresh = PackedRows(corpus, 40, seed=2)
    numbers = [170, 3, 99, 0, 170]
    for number in numbers:
        row, again = fresh[number], PackedRows(corpus, 40, seed=2)[number]
        np.testing.assert_array_equal(row.tokens, again.tokens)
        np.testing.assert_array_equal(row.starts, again.starts)


def test_position_is_exact_and_refuses_other_data(corpus):
    import json

    rows = PackedRows(corpus, 40, seed=2)
    position = json.loads(json.dumps(rows.position(17)))
    assert PackedRows(corpus, 40, seed=2).row_at(position) == 17
    training, _ = corpus.split(0.2)
    for other, what in [
        (PackedRows(corpus, 41, seed=2), "length: saved 40, now 41"),
        (PackedRows(corpus, 40, seed=3), "seed: saved 2, now 3"),
        (PackedRows(training, 40, seed=2), "corpus: saved"),
    ]:
        with pytest.raises(ValueError, match=what):
            other.row_at(position)


def test_join_keeps_boundaries_and_hides_first_tokens(corpus):
    rows = PackedRows(corpus, 60, seed=4)
    parts = [rows[number] for number in range(5)]
    batch = join_rows(parts)
    ids, labels, boundaries = batch["input_ids"], batch["labels"], batch["cu_seqlens"]
    assert ids.shape == labels.shape == (1, 300)
    assert boundaries[0] == 0 and boundaries[-1] == 300
    assert {0, 60, 120, 180, 240, 300} <= set(boundaries.tolist())
    sequences = [piece for row in parts for piece in pieces(row)]
    assert boundaries.diff().tolist() == [len(piece) for piece in sequences]
    for begin, piece in zip(boundaries.tolist(), sequences, strict=False):
        np.testing.assert_array_equal(ids[0, begin : begin + len(piece)].numpy(), piece)
        assert labels[0, begin] == IGNORED_LABEL
        np.testing.assert_array_equal(labels[0, begin + 1 : begin + len(piece)].numpy(), piece[1:])


def assert_same_rows(one, other, numbers):
    for number in numbers:
        np.testing.assert_array_equal(one[number].tokens, other[number].tokens)
        np.testing.assert_array_equal(one[number].starts, other[number].starts)


def test_pickled_rows_are_the_same_rows_and_hold_no_text(corpus):
    training, _ = corpus.split(0.2)
    for part in (corpus, training):
        rows = PackedRows(part, 40, seed=2)
        rows[3]  # caches that are full are left behind, too
        sent = pickle.dumps(rows)
        again = pickle.loads(sent)
        assert_same_rows(again, rows, [170, 3, 0])
        assert again.position(7) == rows.position(7)
        assert not any(tokens.tobytes() in sent for tokens in corpus), "the files are opened anew"


def test_spawned_workers_read_the_same_rows(corpus):
    rows, numbers = PackedRows(corpus, 40, seed=2), [170, 3, 99, 0]
    loader = DataLoader(
        cast(Dataset, rows),
        sampler=numbers,
        batch_size=2,
        collate_fn=join_rows,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    for batch, pair in zip(loader, (numbers[:2], numbers[2:]), strict=True):
        wanted = join_rows([rows[number] for number in pair])
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_wrong_arguments_are_refused(corpus):
    with pytest.raises(ValueError, match="length 1, wanted at least 2"):
        PackedRows(corpus, 1)
    with pytest.raises(ValueError, match="epochs=0"):
        PackedRows(corpus, 8, epochs=0)
    with pytest.raises(ValueError, match="endless"):
        _ = PackedRows(corpus, 8).num_rows
    with pytest.raises(IndexError, match="row -1"):
        PackedRows(corpus, 8)[-1]
    with pytest.raises(IndexError, match="row 10"):
        PackedRows(corpus, corpus.num_tokens, epochs=10)[10]
