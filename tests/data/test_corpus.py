"""Tokenized corpora: the cache on disk and the split by document."""

import numpy as np
import pytest

from loglinear.data import ByteTokenizer, Corpus, Document, Documents


def build(directory, texts):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    return Corpus.build(documents, ByteTokenizer(), directory)


def contents(corpus):
    return {bytes(tokens[1:-1].astype(np.uint8)).decode() for tokens in corpus}


def test_tokens_come_back(tmp_path):
    texts = [f"document {number} " * (number % 7 + 1) for number in range(150)]
    corpus = build(tmp_path / "c", texts)
    assert len(corpus) == corpus.num_documents == 150
    assert corpus.num_tokens == sum(len(text) + 2 for text in texts)
    assert [bytes(tokens[1:-1].astype(np.uint8)).decode() for tokens in corpus] == texts
    assert all(tokens[0] == 256 and tokens[-1] == 257 for tokens in corpus)
    assert corpus[3].dtype == np.uint16, "two bytes a token where the vocabulary allows it"
    assert corpus.piece(3, 1, 4).tolist() == list(b"doc")


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    class Large(ByteTokenizer):
        def __len__(self):
            return 100_000

    corpus = Corpus.build([Document("a", "hé")], Large(), tmp_path / "c")
    assert corpus[0].dtype == np.uint32 and corpus[0].tolist() == [256, 104, 195, 169, 257]


def test_split_is_disjoint_and_complete(tmp_path):
    texts = [f"text {number}" for number in range(2000)]
    training, held_out = build(tmp_path / "c", texts).split(0.1)
    assert contents(training).isdisjoint(contents(held_out))
    assert contents(training).union(contents(held_out)) == set(texts)
    # A binomial of 2000 draws: five standard deviations are 67.
    assert abs(len(held_out) - 200) < 67


def test_split_depends_on_the_text_alone(tmp_path):
    texts = [f"text {number}" for number in range(400)]
    _, held_out = build(tmp_path / "a", texts).split(0.2)
    _, turned = build(tmp_path / "b", texts[::-1]).split(0.2)
    _, more = build(tmp_path / "c", [f"new {number}" for number in range(300)] + texts).split(0.2)
    assert contents(turned) == contents(held_out)
    assert contents(more).intersection(texts) == contents(held_out)


def test_split_changes_with_the_seed_and_grows_with_the_fraction(tmp_path):
    corpus = build(tmp_path / "c", [f"text {number}" for number in range(1000)])
    first, other = (contents(corpus.split(0.2, seed)[1]) for seed in (0, 1))
    shared = len(first.intersection(other))
    # Independent splits share a fifth of a fifth: 40 of 1000.
    assert 10 < shared < 80
    assert first < contents(corpus.split(0.4, 0)[1])


def test_equal_texts_fall_on_one_side(tmp_path):
    corpus = build(tmp_path / "c", ["same", "same", "same", "other"])
    training, held_out = corpus.split(0.3)
    assert contents(training).isdisjoint(contents(held_out))
    assert {len(training), len(held_out)} == {1, 3}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_neither_side_is_ever_empty(tmp_path, fraction, count):
    training, held_out = build(tmp_path / "c", [f"t{n}" for n in range(count)]).split(fraction)
    assert len(training) >= 1 and len(held_out) >= 1 and len(training) + len(held_out) == count


def test_split_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="1 document"):
        build(tmp_path / "one", ["alone"]).split(0.1)
    with pytest.raises(ValueError, match="2 document.*1 of them different"):
        build(tmp_path / "equal", ["same", "same"]).split(0.1)
    for fraction in (0, 1, -0.1, 2):
        with pytest.raises(ValueError, match="held_out_fraction"):
            build(tmp_path / f"f{fraction}", ["a", "b"]).split(fraction)


def test_identity_is_of_the_content(tmp_path):
    texts = ["one", "two", "three"]
    assert build(tmp_path / "a", texts).identity == build(tmp_path / "b", texts).identity
    assert build(tmp_path / "c", [*texts, "four"]).identity != build(tmp_path / "d", texts).identity
    training, held_out = build(tmp_path / "e", texts).split(0.5)
    assert training.identity != held_out.identity


def test_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="without any text"):
        build(tmp_path / "c", [])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_nothing(tmp_path):
    def broken():
        yield Document("a", "fine")
        raise ValueError("line 2 is broken")

    with pytest.raises(ValueError, match="line 2 is broken"):
        Corpus.build(broken(), ByteTokenizer(), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_opening_what_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no meta.json"):
        Corpus(tmp_path)


def test_cache_is_used_until_the_files_change(tmp_path):
    (tmp_path / "text.txt").write_text("first")
    progress = []

    def load():
        documents = Documents(tmp_path / "text.txt")
        return Corpus.load(documents, ByteTokenizer(), tmp_path / "cache", lambda *counts: progress.append(counts))

    assert load().num_tokens == 7 and progress == [(1, 7)]
    assert load().num_tokens == 7 and progress == [(1, 7)], "the second load reads the cache"
    (tmp_path / "text.txt").write_text("changed")
    assert load().num_tokens == 9 and progress == [(1, 7), (1, 9)]


def test_two_builders_of_one_corpus_agree(tmp_path):
    first = build(tmp_path / "c", ["a", "b"])
    second = build(tmp_path / "c", ["a", "b"])
    assert first.identity == second.identity
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
