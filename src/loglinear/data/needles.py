"""Needles in a haystack: texts in which a few facts are hidden, and a question about them.

The tasks have the names and the meaning of RULER's (Hsieh et al., 2024, arXiv 2404.06654), the words are our own: what
is hidden is the secret number (or code) of a name; what is asked for is the number of one name, of several, or all
numbers of one name. A prompt ends where the answer begins, so that a model which only continues text can be asked.

A sample depends on the seed, the task, the length, the depth and its number; beyond that the tokenizer decides how much
of the haystack fits into the length.

Such texts are a poor lesson: an answer is seven characters of hundreds or thousands. For training there are drills
beside them, which hide many needles, say them again, and ask for each of them in the words of the tasks; and recitals,
which are numbers that come again and nothing else. Digits need those: names are found again by the words that they are
made of, but every digit of a number is as likely as every other, so that nothing else in needles tells a model to keep
them apart, and it takes all ten for one (docs/log.md, 2026-11-26).
"""

import functools
import hashlib
import itertools
import random
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class NeedleTask:
    """What is hidden where, and what is asked.

    Args:
        haystack: "repeated" sentences, running "text", or other "needles".
        keys, values: names are "words" or a "uuid"; what is hidden is a "number" of seven digits or a "uuid".
        hidden: names that are hidden.
        each: values that are hidden for each of them.
        asked: names that are asked for.
    """

    haystack: Literal["repeated", "text", "needles"]
    keys: Literal["words", "uuid"] = "words"
    values: Literal["number", "uuid"] = "number"
    hidden: int = 1
    each: int = 1
    asked: int = 1

    @property
    def wanted(self) -> int:
        """Values in a right answer."""
        return self.asked * self.each


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("repeated"),  # the passkey
    "niah_single_2": NeedleTask("text"),
    "niah_single_3": NeedleTask("text", values="uuid"),
    "niah_multikey_1": NeedleTask("text", hidden=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", keys="uuid", values="uuid"),
    "niah_multivalue": NeedleTask("text", each=4),
    "niah_multiquery": NeedleTask("text", hidden=4, asked=4),
}

_TRAINING_SEEDS = 1_000_000  # and above; those of evaluations are below
_DRILLED = ("niah_single_1", "niah_single_2")  # whose haystacks and questions drills have
_RECITAL_SHARE = 0.5  # of the tokens of drills
_RECITAL_SEPARATORS = (" ", ", ", ". ", " and ", "\n")

_REPEATED = (
    "The river runs past the mill.",
    "Clouds drift over the fields.",
    "A dog sleeps by the gate.",
    "Nothing else happens today.",
)
_FIRST = (
    "amber ancient bitter blue bold brave bright brisk calm clever cold crisp dark deep dusty eager early faint fancy "
    "gentle golden grand happy hollow humble icy keen lively lucky misty noble proud"
).split()
_LAST = (
    "anchor badger barrel basin beacon bridge candle canyon castle cedar comet copper falcon forest garden glacier "
    "hammer harbor island kettle lantern marble meadow mirror orchard pebble ribbon saddle spindle timber valley willow"
).split()
_NOUNS = {"number": ("number", "numbers"), "uuid": ("code", "codes")}
_LONGEST = (f"{max(_FIRST, key=len)}-{max(_FIRST, key=len)}-{max(_LAST, key=len)}", "9999999")
_VALUES = {"number": re.compile(r"\d+"), "uuid": re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")}


@dataclass(frozen=True)
class NeedleSample:
    """A prompt and what answers it.

    Attributes:
        task: its name in `NEEDLE_TASKS`.
        length: tokens that prompt and answer have room in.
        depth: where in the haystack the first needle that is asked for is, from 0 (its beginning) to 1.
        number: of the sample in its cell.
        prompt: the text that the model goes on with.
        tokens: of the prompt.
        expected: the values, in the order of the question.
        answer_tokens: so many new ones are enough for a right answer.
    """

    task: str
    length: int
    depth: float
    number: int
    prompt: str
    tokens: list[int] = field(repr=False)
    expected: tuple[str, ...]
    answer_tokens: int


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, white space as single spaces.

    >>> sentences_of("One  is\\nhere. Two! And three")
    ['One is here.', 'Two!', 'And three']
    """
    flat = " ".join(text.split())
    return [part for part in re.split(r"(?<=[.!?])\s+", flat) if part]


def default_haystack() -> list[str]:
    """Prose that every Python brings along: its language reference, as `help()` shows it.

    Raises:
        FileNotFoundError: this Python was built without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError("this Python has no pydoc_data, wanted a file of text for the haystack") from error
    return [sentence for name in sorted(topics) for sentence in sentences_of(topics[name])]


def read_haystack(path: str | Path) -> list[str]:
    """The sentences of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no text in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no haystack file {path}")
    found = sentences_of(path.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"haystack: got {path} without any text, wanted some sentences")
    return found


class Haystack:
    """Makes samples for one tokenizer.

    Args:
        encode: text -> tokens, with the tokens that begin a text.
        text: sentences of the tasks with running text; default: `default_haystack()`.
        wrap: makes a prompt of a text and the beginning of the answer, for example with a chat template.
    """

    def __init__(
        self,
        encode: Encode,
        text: Sequence[str] | None = None,
        wrap: Callable[[str, str], str] | None = None,
    ):
        self.encode, self._text = encode, text
        self.wrap = wrap or (lambda text, answer: f"{text} {answer}")
        self._sizes: dict[str, int] = {}

    def sample(self, name: str, length: int, depth: float, number: int, seed: int = 0) -> NeedleSample:
        """Sample `number` of a cell.

        Raises:
            ValueError: an unknown task, a depth outside 0 to 1, or a length that the question alone does not fit into.
        """
        if name not in NEEDLE_TASKS:
            raise ValueError(f"unknown needle task {name!r}; known: {', '.join(NEEDLE_TASKS)}")
        if not 0 <= depth <= 1:
            raise ValueError(f"depth: got {depth}, wanted 0 (the beginning) to 1 (the end)")
        task = NEEDLE_TASKS[name]
        draw = _generator(f"{seed} {name} {length} {depth:.6f} {number}")
        keys = _distinct(lambda: _key(draw, task.keys), task.hidden)
        values = _distinct(lambda: _value(draw, task.values), task.hidden * task.each)
        facts = [(key, values[place * task.each + i]) for place, key in enumerate(keys) for i in range(task.each)]
        needles = [_needle(task, key, value) for key, value in facts]
        # The first is at the depth that is asked for, the others anywhere.
        places = [depth] + [draw.random() for _ in needles[1:]]
        asked = keys[: task.asked]
        expected = tuple(value for key, value in facts if key in asked)
        room = len(self.encode(_listed(expected) + ".")) + 8
        hay = self._hay(task, draw, set(keys))

        def prompt_of(sentences: Sequence[str]) -> str:
            sizes = [self._size(sentence) for sentence in sentences]
            return self._prompt(task, asked, _hidden(sentences, sizes, needles, places))

        bare = len(self.encode(prompt_of([]))) + room
        if bare > length:
            raise ValueError(f"length: got {length} tokens for {name}, wanted at least {bare} with this tokenizer")
        sentences, size = [], bare
        while size <= length:
            sentences.append(hay())
            size += self._size(sentences[-1])
        tokens = self.encode(prompt_of(sentences))
        while len(tokens) + room > length:
            # Sizes of sentences do not quite add up: take away what is too much, by their sizes.
            over = len(tokens) + room - length
            while over > 0 and sentences:
                over -= self._size(sentences.pop())
            tokens = self.encode(prompt_of(sentences))
        return NeedleSample(name, length, depth, number, prompt_of(sentences), tokens, expected, room)

    def least_drill(self, questions: bool = True) -> int:
        """Tokens that a drill takes at least: one needle and a question, or without questions one needle twice."""
        task = NEEDLE_TASKS[_DRILLED[0]]
        needle = _needle(task, *_LONGEST)
        return self._tokens(needle + (_exchange(task, *_LONGEST) if questions else f" {needle}") + "\n")

    def drill(self, length: int, number: int, seed: int = 0) -> str:
        """Drill `number` of a length: needles between sentences of a haystack, then questions with their answers, about
        every needle at least once, both in any order. Where no question fits, every needle is said at least twice.

        Drawn are the haystack, the number of needles (evenly by its logarithm, so that few are as common as many), and
        how the rest of the length is shared by needles that are said again, questions that are asked again, and the
        haystack. There is no preface, for which short drills have no room.

        Raises:
            ValueError: a length that no needle fits into twice.
        """
        draw = _generator(f"drill {seed} {length} {number}")
        task = NEEDLE_TASKS[draw.choice(_DRILLED)]
        asks = length >= self.least_drill()
        count = round(max(1, length // self.least_drill(asks)) ** draw.random())
        keys = _distinct(lambda: _key(draw, task.keys), count)
        facts = list(zip(keys, _distinct(lambda: _value(draw, task.values), count), strict=True))
        places: list[float] = []

        def text_of(sentences: Sequence[str]) -> str:
            needles = [_needle(task, *fact) for fact in stated]
            places.extend(draw.random() for _ in stated[len(places) :])
            context = _hidden(sentences, [self._size(one) for one in sentences], needles, places)
            return context + "".join(_exchange(task, *fact) for fact in asked) + "\n"

        while True:
            stated = draw.sample(facts, len(facts))
            asked = draw.sample(facts, len(facts)) if asks else []
            stated += [] if asks else draw.sample(facts, len(facts))
            if (left := length - self._tokens(text_of([]))) >= 0:
                break
            if len(facts) == 1:
                raise ValueError(f"length: got {length} tokens for a drill, wanted at least {length - left} here")
            facts.pop()
        least_stated, least_asked = len(stated), len(asked)
        for again, write in ((stated, _needle), (asked, _exchange)):
            room = left * draw.random() if again else -1
            while (size := self._tokens(" " + write(task, *(fact := draw.choice(facts))))) <= room:
                again.append(fact)
                room, left = room - size, left - size
        hay, sentences = self._hay(task, draw, set()), []
        while (size := self._size(sentence := hay())) < left:
            sentences.append(sentence)
            left -= size
        while self._tokens(text := text_of(sentences)) > length:  # sizes do not quite add up
            for more, least in ((sentences, 0), (asked, least_asked), (stated, least_stated)):
                if len(more) > least:
                    more.pop()
                    break
        return text

    def recital(self, length: int, number: int, seed: int = 0) -> str:
        """Recital `number` of a length: some numbers in any order, each again and again, with one separator between
        them. How many is drawn evenly by the logarithm, from one to one in 64 tokens.

        Raises:
            ValueError: a length that a number does not fit into twice.
        """
        draw = _generator(f"recital {seed} {length} {number}")
        values = _distinct(lambda: _value(draw, "number"), round(max(1, length // 64) ** draw.random()))
        separator, said = draw.choice(_RECITAL_SEPARATORS), [values[0], values[0]]
        size = functools.cache(lambda *numbers: self._tokens(separator.join(numbers)))
        left = length - self._tokens(separator.join(said) + "\n")
        if left < 0:
            wanted = length - left
            raise ValueError(f"length: got {length} tokens for a recital, wanted at least {wanted} with this tokenizer")
        while left >= 0:
            said.append(draw.choice(values))
            left -= size(*said[-2:]) - size(said[-2])
        while self._tokens(text := separator.join(said) + "\n") > length:  # sizes do not quite add up
            said.pop()
        return text

    def _tokens(self, text: str) -> int:
        return len(self.encode(text))

    def _size(self, sentence: str) -> int:
        if sentence not in self._sizes:
            self._sizes[sentence] = len(self.encode(f" {sentence}")) - len(self.encode(" "))
        return max(1, self._sizes[sentence])

    def _hay(self, task: NeedleTask, draw: random.Random, taken: set[str]) -> Callable[[], str]:
        """Sentences of the haystack, one after the other."""
        if task.haystack == "needles":

            def distractor() -> str:
                key = next(key for key in iter(lambda: _key(draw, task.keys), None) if key not in taken)
                taken.add(key)
                return _needle(task, key, _value(draw, task.values))

            return distractor
        if task.haystack == "text" and self._text is None:
            self._text = default_haystack()
        text = _REPEATED if task.haystack == "repeated" or self._text is None else self._text
        start = 0 if task.haystack == "repeated" else draw.randrange(len(text))
        place = iter(range(start, 1_000_000_000))
        return lambda: text[next(place) % len(text)]

    def _prompt(self, task: NeedleTask, asked: Sequence[str], context: str) -> str:
        question, answer = _question(task, asked)
        preface = f"Secret {_NOUNS[task.values][1]} are hidden in the text below. Remember them for a question."
        return self.wrap(f"{preface}\n\n{context}{question}", answer)


def _hidden(sentences: Sequence[str], sizes: Sequence[int], needles: Sequence[str], places: Sequence[float]) -> str:
    """The haystack with each needle at the boundary of sentences that is nearest to its share of all tokens."""
    bounds = [0, *itertools.accumulate(sizes)]
    spots = [min(range(len(bounds)), key=lambda i: abs(bounds[i] - place * bounds[-1])) for place in places]
    whole = list(sentences)
    for order in sorted(range(len(needles)), key=lambda order: (spots[order], order), reverse=True):
        whole.insert(spots[order], needles[order])
    return " ".join(whole)


def _question(task: NeedleTask, asked: Sequence[str]) -> tuple[str, str]:
    """The question behind a haystack, and the beginning of its answer."""
    noun = _NOUNS[task.values][task.wanted > 1]
    verb, names = ("are" if task.wanted > 1 else "is"), _listed(asked)
    question = f"\n\nQuestion: What {verb} the secret {noun} of {names} in the text above?\nAnswer:"
    return question, f"The secret {noun} of {names} {verb}"


def _exchange(task: NeedleTask, key: str, value: str) -> str:
    """A question with its answer."""
    return f"{' '.join(_question(task, [key]))} {value}."


def _generator(what: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "big"))


def _needle(task: NeedleTask, key: str, value: str) -> str:
    return f"One secret {_NOUNS[task.values][0]} of {key} is {value}."


def _key(draw: random.Random, kind: str) -> str:
    if kind == "uuid":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return f"{draw.choice(_FIRST)}-{draw.choice(_FIRST)}-{draw.choice(_LAST)}"


def _value(draw: random.Random, kind: str) -> str:
    return _key(draw, "uuid") if kind == "uuid" else str(draw.randrange(1_000_000, 10_000_000))


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        if (one := make()) not in found:
            found.append(one)
    return found


def _listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def right_answer(sample: NeedleSample) -> str:
    """What follows a prompt that is answered right, up to the last value: a blank, then the values."""
    return f" {_listed(sample.expected)}"


def training_documents(
    haystack: Haystack,
    tasks: Sequence[str],
    lengths: Sequence[int],
    tokens: int,
    seed: int = 0,
    unseen: Collection[str] = (),
) -> Iterator[str]:
    """Texts to learn the tasks from: prompts with their right answers, of `tokens` tokens at least together.

    Each length has as many tokens in all as every other, so that short texts are many; tasks and depths are drawn
    evenly. The seeds are none of those that samples are evaluated with, and values that are to be `unseen` are in no
    text.

    Raises:
        ValueError: as `Haystack.sample`, or nothing to make.
    """
    if not tasks or not lengths:
        raise ValueError(f"needles to train on: got tasks {[*tasks]} and lengths {[*lengths]}, wanted some of both")
    draw = random.Random(f"needles to train on {seed}")

    def text(length: int, number: int) -> str:
        sample = haystack.sample(draw.choice(tasks), length, draw.random(), number, _TRAINING_SEEDS + seed)
        return f"{sample.prompt}{right_answer(sample)}.\n"

    return _texts(haystack, text, draw, lengths, tokens, unseen)


def training_drills(
    haystack: Haystack, lengths: Sequence[int], tokens: int, seed: int = 0, unseen: Collection[str] = ()
) -> Iterator[str]:
    """Drills and, evenly, recitals of `tokens` tokens at least together; recitals alone of lengths that are too short
    for drills. Lengths, seeds and what is `unseen` as in `training_documents`.

    Raises:
        ValueError: as `Haystack.recital`, or nothing to make.
    """
    if not lengths:
        raise ValueError("drills: got no lengths, wanted some")
    draw = random.Random(f"drills {seed}")

    def text(length: int, number: int) -> str:
        recited = draw.random() < _RECITAL_SHARE or length < haystack.least_drill(questions=False)
        make = haystack.recital if recited else haystack.drill
        return make(length, number, _TRAINING_SEEDS + seed)

    return _texts(haystack, text, draw, lengths, tokens, unseen)


def _texts(
    haystack: Haystack,
    make: Callable[[int, int], str],
    draw: random.Random,
    lengths: Sequence[int],
    tokens: int,
    unseen: Collection[str],
) -> Iterator[str]:
    weights, hidden = [1 / length for length in lengths], frozenset(unseen)
    for number in itertools.count():
        if tokens <= 0:
            return
        (length,) = draw.choices(lengths, weights)
        text = make(length, number)
        if hidden.isdisjoint(value for kind in _VALUES.values() for value in kind.findall(text)):
            tokens -= len(haystack.encode(text))
            yield text


@dataclass(frozen=True)
class NeedleScore:
    """How an answer does: `exact` if the first values that it names, as many as are asked for, are those that were
    hidden, in any order; `contained` is the share of hidden values that occur in it at all (RULER's measure).
    """

    exact: bool
    contained: float


def score(task: str, answer: str, expected: Sequence[str]) -> NeedleScore:
    """Judges an answer.

    >>> score("niah_single_1", " 1234567. And 7654321", ["1234567"])
    NeedleScore(exact=True, contained=1.0)
    >>> score("niah_single_1", " 7654321, or 1234567", ["1234567"])
    NeedleScore(exact=False, contained=1.0)
    """
    named = _VALUES[NEEDLE_TASKS[task].values].findall(answer)[: len(expected)]
    return NeedleScore(sorted(named) == sorted(expected), sum(value in answer for value in expected) / len(expected))
