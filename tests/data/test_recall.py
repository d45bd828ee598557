"""Associative recall: every sequence is what the task says, and what cannot be is refused."""

from collections import Counter

import numpy as np
import pytest
import torch

from loglinear.data.recall import NO_ANSWER, RecallTask, recall_batch, stream_seed


@pytest.mark.parametrize(
    "task",
    [
        RecallTask(length=16, pairs=(4,), vocabulary=8),  # everything full: places, keys
        RecallTask(length=33, pairs=(1, 3, 8), vocabulary=64),
        RecallTask(length=4, pairs=(1,), vocabulary=2),
        RecallTask(length=64, pairs=(2, 16), vocabulary=40, power=1.0),
    ],
    ids=["full", "odd", "smallest", "even"],
)
def test_sequences_are_what_the_task_says(task):
    batch = recall_batch(task, 200, seed=1)
    assert batch.inputs.shape == (200, task.length) and batch.answers.shape == (200, max(task.pairs))
    assert set(batch.pairs.tolist()) == set(task.pairs)
    half = task.vocabulary // 2
    for inputs, queries, answers, distances, pairs in zip(
        *(x.tolist() for x in (batch.inputs, batch.queries, batch.answers, batch.distances, batch.pairs)), strict=True
    ):
        assert 0 <= min(inputs) and max(inputs) < task.vocabulary
        keys, values = inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and max(keys) < half <= min(values)
        asked = queries[:pairs]
        assert len(set(asked)) == pairs and min(asked) >= 2 * pairs and max(asked) < task.length
        assert all((place - 2 * pairs) % 2 == 0 for place in asked)
        assert [inputs[place] for place in asked] == keys
        assert answers[:pairs] == values and set(answers[pairs:]) <= {NO_ANSWER}
        assert distances[:pairs] == [place - 2 * number for number, place in enumerate(asked)]


def test_the_seed_decides():
    task = RecallTask(length=64, pairs=(2, 8), vocabulary=64)
    one, same, other = (recall_batch(task, 20, seed) for seed in (3, 3, 4))
    assert torch.equal(one.inputs, same.inputs) and torch.equal(one.answers, same.answers)
    assert not torch.equal(one.inputs, other.inputs)


def test_streams_share_no_seed():
    seeds = [
        stream_seed(stream, seed, part)
        for stream in ("training", "validation", "test")
        for seed in range(5)
        for part in range(50)
    ]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="got 'tests', wanted one of training, validation, test"):
        stream_seed("tests", 0)  # type: ignore[arg-type]


def test_places_follow_the_power_law():
    """One pair: its query's place is drawn in proportion to (place + 1)^(power - 1)."""
    for power in (0.01, 1.0):
        task = RecallTask(length=42, pairs=(1,), vocabulary=8, power=power)
        places = (recall_batch(task, 20_000, seed=0).queries[:, 0] - 2) // 2
        weights = (np.arange(20) + 1.0) ** (power - 1)
        expected = weights / weights.sum()
        found = np.bincount(places.numpy(), minlength=20) / 20_000
        assert np.abs(found - expected).max() < 0.015  # 4 standard errors of the likeliest place


def test_which_pair_is_asked_for_does_not_depend_on_the_place():
    batch = recall_batch(RecallTask(length=64, pairs=(4,), vocabulary=16), 4000, seed=0)
    first = Counter(batch.queries.argmin(dim=1).tolist())
    assert all(abs(first[pair] - 1000) < 120 for pair in range(4))


def test_fewer_pairs_are_a_mixture_in_equal_parts():
    batch = recall_batch(RecallTask(length=32, pairs=(1, 2, 8), vocabulary=64), 3000, seed=0)
    assert all(abs(count - 1000) < 120 for count in Counter(batch.pairs.tolist()).values())


def test_pairs_are_read_from_numbers_and_texts():
    assert RecallTask(pairs=8).pairs == (8,)  # type: ignore[arg-type]
    assert RecallTask(pairs="16,4 8").pairs == (4, 8, 16)  # type: ignore[arg-type]
    assert RecallTask(pairs=[8, 4, 8]).pairs == (4, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 63, "pairs": (16,)}, "got 16 in 63 tokens, wanted at most 15: .*need a length of 64"),
        ({"vocabulary": 30, "length": 64, "pairs": (16,)}, "got 30, wanted an even number of at least 32"),
        ({"vocabulary": 33, "length": 64, "pairs": (16,)}, "got 33, wanted an even number"),
        ({"pairs": ()}, "got none, wanted at least one"),
        ({"pairs": 0}, "got 0, wanted at least 1"),
        ({"power": 0.0}, "power: got 0.0, wanted a finite number above 0"),
        ({"power": float("nan")}, "power: got nan"),
        ({"pairs": (4, 8), "begins": (0.0,)}, "begins: got 1 shares, wanted one for each of 2 numbers of pairs"),
        ({"pairs": (4, 8), "begins": (0.5, 1.0)}, "begins: got 1.0, wanted shares of the training from 0 to below 1"),
        ({"pairs": (4, 8), "begins": (0.5, 0.1)}, "begins: got 0.1 as the lowest, wanted 0 for one"),
        ({"pairs": (4, 4), "begins": (0.0, 0.1)}, "pairs: got 2 numbers, 1 different ones; wanted each once"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecallTask(**options)


def test_numbers_of_pairs_begin_one_after_the_other():
    task = RecallTask.from_options({"pairs": "16, 4 8", "begins": "0.5,0,0.25"}, length=64)
    assert (task.pairs, task.begins) == ((4, 8, 16), (0.0, 0.25, 0.5))
    assert [task.at(progress).pairs for progress in (0, 0.2, 0.25, 0.9)] == [(4,), (4,), (4, 8), (4, 8, 16)]
    assert RecallTask().at(0.3) == RecallTask()
    assert set(recall_batch(task.at(0.3), 50, seed=0).pairs.tolist()) == {4, 8}


def test_wrong_types_and_names_are_refused():
    with pytest.raises(TypeError, match="pairs: got 4.5, wanted whole numbers"):
        RecallTask(pairs=(4.5,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="begins: got 'early', wanted numbers"):
        RecallTask(pairs=(4,), begins="early")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="length: got '8'"):
        RecallTask(length="8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown option 'pair' of the task mqar; known: pairs, .*, begins"):
        RecallTask.from_options({"pair": 4}, length=64)
    with pytest.raises(ValueError, match="count: got 0"):
        recall_batch(RecallTask(), 0, 0)
