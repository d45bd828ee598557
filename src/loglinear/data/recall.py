"""Multi-query associative recall (MQAR; Arora et al., 2023, "Zoology", arXiv 2312.04927): sequences made on the spot.

    N sequences · T tokens (`length`) · P pairs, the most of any sequence · V tokens in the vocabulary

    key value key value … key value │ filler filler key filler filler filler key …
    the pairs, one after the other  │ each key again, once, at a random place: the queries

A key is one of the lower half of the vocabulary and stands in one pair only; a value is one of the upper half; what
is neither a pair nor a query is drawn from all of it. At a query the model is to predict the value of that key, and
nowhere else anything. The answer itself is not in the sequence again.

Queries stand on every second place behind the pairs, so that 4 P tokens are needed. The place `j = 0, 1, …` of those
is taken with a probability in proportion to `(j + 1)^(power - 1)`: for small `power` most queries follow soon and few
come late. Which pair a query asks for is drawn evenly.

Training may begin with few pairs (`begins`): of a long mixture most questions are about many pairs, from which a model
that has learned nothing learns nothing.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

NO_ANSWER = -100
STREAMS = ("training", "validation", "test")
# Distinct keys are the largest of V/2 random numbers for each sequence: so many numbers at a time.
_NUMBERS_AT_ONCE = 8 * 1024 * 1024


@dataclass(frozen=True)
class RecallTask:
    """What the sequences are.

    Args:
        length: tokens T of a sequence.
        pairs: numbers of key-value pairs; each sequence has one of them, drawn evenly.
        vocabulary: number of tokens V, an even number.
        power: of the query positions, above 0; 1 spreads them evenly, 0.01 (as in Zoology) puts most of them early.
        begins: for each of `pairs`, the share of the training after which sequences with so many are among the others,
            from 0 (at least one of them) to below 1. Default: all from the start.

    Raises:
        ValueError: pairs that do not fit into the length or the vocabulary, or numbers out of their range.
        TypeError: numbers that are none.

    >>> RecallTask(length=64, pairs=(4, 16)).places(16)
    16
    """

    length: int = 256
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    vocabulary: int = 8192
    power: float = 0.01
    begins: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.begins is not None:
            pairs, begins = _in_order(self.pairs, self.begins)
            object.__setattr__(self, "pairs", pairs)
            object.__setattr__(self, "begins", begins)
        object.__setattr__(self, "pairs", _as_pairs(self.pairs))
        for name in ("length", "vocabulary"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, wanted a whole number")
        if isinstance(self.power, bool) or not isinstance(self.power, (int, float)):
            raise TypeError(f"power: got {self.power!r}, wanted a number")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power: got {self.power}, wanted a finite number above 0")
        most = max(self.pairs)
        if 4 * most > self.length:
            raise ValueError(
                f"pairs: got {most} in {self.length} tokens, wanted at most {self.length // 4}: a pair and its query "
                f"take 4 tokens, so {most} pairs need a length of {4 * most}"
            )
        if self.vocabulary % 2 or self.vocabulary < 2 * most:
            raise ValueError(
                f"vocabulary: got {self.vocabulary}, wanted an even number of at least {2 * most}: half of it are "
                f"keys, and {most} pairs need as many different ones"
            )

    def places(self, pairs: int) -> int:
        """Places where a query can stand in a sequence of so many pairs."""
        return (self.length - 2 * pairs) // 2

    def at(self, progress: float) -> "RecallTask":
        """The task at a share of the training, from 0 to below 1: with the numbers of pairs that have begun.

        >>> RecallTask(length=64, pairs=(4, 16), begins=(0, 0.5)).at(0.25).pairs
        (4,)
        """
        if self.begins is None:
            return self
        begun = tuple(pairs for pairs, begin in zip(self.pairs, self.begins, strict=True) if begin <= progress)
        return dataclasses.replace(self, pairs=begun, begins=None)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], **fixed: Any) -> "RecallTask":
        """A task from options by name, and others that are not for the user to give.

        Raises:
            ValueError: an unknown option, and as the class.
        """
        known = ("pairs", "vocabulary", "power", "begins")
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r} of the task mqar; known: {', '.join(known)}")
        return cls(**{**options, **fixed})


def _several(values: Any) -> list[Any]:
    """One value or several; a text may hold several: "4 8" or "4,8"."""
    if isinstance(values, str):
        values = values.replace(",", " ").split()
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _in_order(pairs: Any, begins: Any) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Numbers of pairs, each once and in order, and when each begins."""
    numbers, given, shares = _as_pairs(pairs), _several(pairs), []
    if len(given) != len(numbers):
        raise ValueError(
            f"pairs: got {len(given)} numbers, {len(numbers)} different ones; wanted each once, with `begins`"
        )
    for share in _several(begins):
        try:
            shares.append(float(share))
        except (TypeError, ValueError):
            raise TypeError(f"begins: got {share!r}, wanted numbers") from None
        if not 0 <= shares[-1] < 1:
            raise ValueError(f"begins: got {share}, wanted shares of the training from 0 to below 1")
    if len(shares) != len(numbers):
        raise ValueError(f"begins: got {len(shares)} shares, wanted one for each of {len(numbers)} numbers of pairs")
    if min(shares) > 0:
        raise ValueError(f"begins: got {min(shares)} as the lowest, wanted 0 for one number of pairs at least")
    begin_of = dict(zip(map(int, given), shares, strict=True))
    return numbers, tuple(begin_of[number] for number in numbers)


def _as_pairs(pairs: Any) -> tuple[int, ...]:
    """One number or several, each once and in order."""
    numbers = _several(pairs)
    found = []
    for number in numbers:
        if isinstance(number, str) and number.strip().isdecimal():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"pairs: got {number!r}, wanted whole numbers")
        if number < 1:
            raise ValueError(f"pairs: got {number}, wanted at least 1")
        found.append(number)
    if not found:
        raise ValueError("pairs: got none, wanted at least one number of pairs")
    return tuple(sorted(set(found)))


@dataclass(frozen=True)
class RecallBatch:
    """Sequences and their queries; those with fewer pairs than P fill up with queries that have no answer.

    Attributes:
        inputs: `[N, T]` int64.
        queries: `[N, P]` int64, positions of the queries in the order of their keys in the sequence; 0 for none.
        answers: `[N, P]` int64, the values to predict there; `NO_ANSWER` for none.
        distances: `[N, P]` int64, tokens from a key in its pair to its query; 0 for none.
        pairs: `[N]` int64.
    """

    inputs: Tensor
    queries: Tensor
    answers: Tensor
    distances: Tensor
    pairs: Tensor

    def rows(self, start: int, end: int) -> "RecallBatch":
        """The sequences from `start` to `end`."""
        return RecallBatch(*(getattr(self, name)[start:end] for name in self.__dataclass_fields__))

    def to(self, device: torch.device | str) -> "RecallBatch":
        return RecallBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def stream_seed(stream: Literal["training", "validation", "test"], seed: int, part: int = 0) -> int:
    """The seed of a part of a stream of sequences; the streams share none.

    Raises:
        ValueError: no such stream.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream: got {stream!r}, wanted one of {', '.join(STREAMS)}")
    digest = hashlib.blake2b(f"mqar {stream} {seed} {part}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _draw_pairs(task: RecallTask, count: int, generator: torch.Generator) -> Tensor:
    """Numbers of pairs `[N]`: the first that is drawn of a batch."""
    choices = torch.tensor(task.pairs, device=generator.device)
    drawn = torch.randint(0, len(task.pairs), (count,), generator=generator, device=generator.device)
    return choices[drawn]


def pairs_of(task: RecallTask, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The `pairs` of `recall_batch` with the same arguments, without making the sequences."""
    return _draw_pairs(task, count, torch.Generator(device).manual_seed(seed))


def recall_batch(task: RecallTask, count: int, seed: int, device: torch.device | str = "cpu") -> RecallBatch:
    """`count` sequences, made on `device` without a loop over them. The same seed gives the same ones on the same kind
    of device.

    Raises:
        ValueError: a count below 1.

    >>> batch = recall_batch(RecallTask(length=32, pairs=(4,), vocabulary=16), 2, seed=0)
    >>> batch.inputs.shape, batch.answers.shape
    (torch.Size([2, 32]), torch.Size([2, 4]))
    """
    if count < 1:
        raise ValueError(f"count: got {count}, wanted at least 1")
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    most, half = max(task.pairs), task.vocabulary // 2
    pairs = _draw_pairs(task, count, generator)
    pair = torch.arange(most, device=device)
    present = pair < pairs[:, None]  # [N, P]

    rows_at_once = max(1, _NUMBERS_AT_ONCE // half)
    sizes = [min(rows_at_once, count - start) for start in range(0, count, rows_at_once)]
    keys = torch.cat([uniform(size, half).topk(most).indices for size in sizes])
    values = integers(half, task.vocabulary, count, most)

    # Places without replacement: the largest of log-probabilities with Gumbel noise, in the order of being drawn, so
    # that the first of them are what a sequence of fewer pairs draws. Then dealt out to the pairs in random order.
    places = task.places(min(task.pairs))
    place = torch.arange(places, device=device)
    noise = -torch.log(-torch.log(uniform(count, places).clamp(1e-20, 1 - 1e-7)))
    scores = (task.power - 1) * torch.log(place + 1.0) + noise
    scores = scores.masked_fill(place >= ((task.length - 2 * pairs) // 2)[:, None], -math.inf)
    # With few pairs of a mixture there may be fewer places than the most pairs: those have no answer anyway.
    drawn = scores.topk(min(most, places)).indices
    drawn = torch.nn.functional.pad(drawn, (0, most - drawn.shape[1]))
    order = uniform(count, most).masked_fill(pair >= pairs[:, None], math.inf).argsort(dim=1)
    drawn = drawn.gather(1, order)

    queries = torch.where(present, 2 * pairs[:, None] + 2 * drawn, 0)
    inputs = integers(0, task.vocabulary, count, task.length + 1)  # the last column takes what is not there
    column = torch.arange(2 * most, device=device)
    interleaved = torch.stack([keys, values], dim=2).flatten(1)
    inputs[:, : 2 * most] = torch.where(column < 2 * pairs[:, None], interleaved, inputs[:, : 2 * most])
    inputs.scatter_(1, torch.where(present, queries, task.length), keys)
    return RecallBatch(
        inputs=inputs[:, : task.length].contiguous(),
        queries=queries,
        answers=values.masked_fill(torch.logical_not(present), NO_ANSWER),
        distances=torch.where(present, queries - 2 * pair, 0),
        pairs=pairs,
    )
