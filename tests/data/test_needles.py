"""Needles: every sample has its facts where it says, fits into its length, and is judged by what was hidden."""

import re

import pytest

from loglinear.data import ByteTokenizer, encode_prompt
from loglinear.data.needles import (
    NEEDLE_TASKS,
    Haystack,
    default_haystack,
    read_haystack,
    score,
    sentences_of,
    training_documents,
    training_drills,
)

TEXT = [f"Sentence number {word} says little." for word in ("one", "two", "three", "four", "five", "six", "seven")]


def byte_haystack(**options) -> Haystack:
    tokenizer = ByteTokenizer()
    return Haystack(lambda text: encode_prompt(tokenizer, text), TEXT, **options)


def word_haystack() -> Haystack:
    """Tokens that are words and punctuation: sizes of sentences add up otherwise than with bytes."""
    return Haystack(lambda text: [len(word) for word in re.findall(r"\w+|[^\w\s]", text)], TEXT)


@pytest.mark.parametrize("name", NEEDLE_TASKS)
@pytest.mark.parametrize("make", [byte_haystack, word_haystack])
def test_samples_fit_and_hold_what_is_asked_for(name, make):
    task, haystack = NEEDLE_TASKS[name], make()
    for length in (800, 1503):
        sample = haystack.sample(name, length, 0.5, 3)
        assert sample.tokens == haystack.encode(sample.prompt)
        assert len(sample.tokens) + sample.answer_tokens <= length
        assert len(sample.tokens) + sample.answer_tokens > length - 150, "room for another sentence or needle was left"
        context, question = sample.prompt.split("\n\nQuestion:")
        assert len(set(sample.expected)) == task.wanted
        for value in sample.expected:
            assert context.count(value) == 1 and value not in question
            (key,) = re.findall(rf"of (\S+) is {value}\.", context)
            assert question.count(key) == 2, "in the question and in the beginning of the answer"
        assert len(haystack.encode(", ".join(sample.expected))) <= sample.answer_tokens
        if task.haystack != "needles":
            assert len(re.findall(r"One secret", context)) == task.hidden * task.each
        assert not sample.prompt.endswith(" ")


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_the_depth_is_where_the_needle_is(name):
    haystack = byte_haystack()
    for depth in (0.0, 0.3, 0.5, 1.0):
        sample = haystack.sample(name, 4000, depth, 0)
        context = sample.prompt.split("\n\n")[1]
        needle = next(part for part in sentences_of(context) if sample.expected[0] in part)
        before = context.index(needle)
        assert abs(before / (len(context) - len(needle)) - depth) < 0.02


def test_samples_depend_on_their_cell_and_seed_alone():
    haystack, other = byte_haystack(), byte_haystack()
    one = haystack.sample("niah_multikey_1", 900, 0.5, 0)
    haystack.sample("niah_single_2", 900, 0.5, 0)
    assert haystack.sample("niah_multikey_1", 900, 0.5, 0) == one == other.sample("niah_multikey_1", 900, 0.5, 0)
    changed = [("niah_multikey_1", 901, 0.5, 0), ("niah_multikey_1", 900, 0.6, 0), ("niah_multikey_1", 900, 0.5, 1)]
    for cell in changed:
        assert haystack.sample(*cell).expected != one.expected
    assert haystack.sample("niah_multikey_1", 900, 0.5, 0, seed=1).expected != one.expected


def test_a_wrapped_prompt_fits_too():
    haystack = byte_haystack(wrap=lambda text, answer: f"<user>{text}</user><model>{answer}")
    sample = haystack.sample("niah_single_1", 700, 0.5, 0)
    assert sample.prompt.startswith("<user>") and sample.prompt.endswith(" is") and "</user><model>The" in sample.prompt
    assert len(sample.tokens) + sample.answer_tokens <= 700


def test_answers_are_judged_by_the_first_values():
    assert score("niah_single_1", " 7654321 and 1234567.", ["7654321"]).exact
    assert not score("niah_single_1", " 17654321", ["7654321"]).exact
    both = score("niah_multivalue", "2222222, 1111111", ["1111111", "2222222"])
    assert both.exact and both.contained == 1.0
    late = score("niah_multivalue", "1111111, 3333333, 2222222", ["1111111", "2222222"])
    assert not late.exact and late.contained == 1.0
    twice = score("niah_multivalue", "1111111, 1111111", ["1111111", "2222222"])
    assert not twice.exact and twice.contained == 0.5
    code = "0f237d37-ae16-41b7-a6cd-1abc1f206c91"
    assert score("niah_single_3", f" {code}.", [code]).exact
    assert score("niah_single_3", f" {code[:-1]}.", [code]).contained == 0.0
    assert not score("niah_single_1", "", ["7654321"]).exact


def test_what_cannot_be_made_is_refused(tmp_path):
    haystack = byte_haystack()
    with pytest.raises(ValueError, match="unknown needle task 'niah'; known: niah_single_1"):
        haystack.sample("niah", 1000, 0.5, 0)
    with pytest.raises(ValueError, match="depth: got 50, wanted 0"):
        haystack.sample("niah_single_1", 1000, 50, 0)
    with pytest.raises(ValueError, match="length: got 100 tokens for niah_single_1, wanted at least "):
        haystack.sample("niah_single_1", 100, 0.5, 0)
    with pytest.raises(FileNotFoundError, match="no haystack file"):
        read_haystack(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="without any text"):
        read_haystack(tmp_path / "empty.txt")


def test_the_smallest_length_that_is_named_is_enough():
    haystack = byte_haystack()
    with pytest.raises(ValueError) as caught:
        haystack.sample("niah_single_1", 100, 0.5, 0)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0]) + 3  # keys of other samples are a little longer
    assert len(haystack.sample("niah_single_1", least + 10, 0.5, 0).tokens) <= least + 10


def test_every_python_brings_a_haystack():
    text = default_haystack()
    assert sum(map(len, text)) > 100_000 and all(sentence == " ".join(sentence.split()) for sentence in text)


def test_documents_to_train_on_are_answered_and_of_many_lengths():
    haystack = byte_haystack()
    tasks, lengths = ["niah_single_1", "niah_multiquery"], [700, 1400, 2800]
    texts = list(training_documents(haystack, tasks, lengths, 60_000))
    sizes = [len(haystack.encode(text)) for text in texts]
    assert 60_000 <= sum(sizes) < 60_000 + 2800
    by_length = {length: sum(size for size in sizes if length / 2 < size <= length) for length in lengths}
    assert sum(by_length.values()) == sum(sizes) and min(by_length.values()) > 10_000, "as many tokens of each length"
    assert texts == list(training_documents(haystack, tasks, lengths, 60_000))
    assert texts != list(training_documents(haystack, tasks, lengths, 60_000, seed=1))
    wanted = 0
    for text in texts:
        context, question = text.split("\n\nQuestion:")
        values = re.findall(r"\d{7}", question)
        assert all(f" is {value}." in context for value in values) and question.endswith(f"{values[-1]}.\n")
        wanted += len(values)
    assert wanted > len(texts), "some ask for several"
    evaluated = {haystack.sample(task, length, 0.5, number).expected
                 for task in tasks for length in lengths for number in range(50)}  # fmt: skip
    assert not any(value in "".join(texts) for values in evaluated for value in values)
    with pytest.raises(ValueError, match="wanted some of both"):
        next(training_documents(haystack, [], [600], 10))


def facts_and_answers(drill: str) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """Needles (name, value) of a drill, and its questions (name in the question, in the answer, value)."""
    context, *exchanges = drill.split("\n\nQuestion: ")
    form = r"What is the secret number of (\S+) in the text above\?\nAnswer: The secret number of (\S+) is (\d{7})\.\n?"
    asked = [re.fullmatch(form, exchange) for exchange in exchanges]
    assert asked and all(asked), "the words of the tasks, and nothing else"
    answers = [(one[1], one[2], one[3]) for one in asked if one]
    return re.findall(r"One secret number of (\S+) is (\d{7})\.", context), answers


@pytest.mark.parametrize("make", [byte_haystack, word_haystack])
@pytest.mark.parametrize("length", [0, 256, 512, 2049])
def test_drills_ask_for_every_needle_and_answer_right(make, length):
    haystack, again, sizes = make(), False, []
    length = length or haystack.least_drill()
    for number in range(40):
        drill = haystack.drill(length, number)
        stated, asked = facts_and_answers(drill)
        values = dict(stated)
        assert len(set(values.values())) == len(values) == len(set(stated)), "a name has one value, a value one name"
        assert {name for name, _, _ in asked} == set(values), "each is asked for, and nothing else"
        for name, repeated, value in asked:
            assert name == repeated and value == values[name]
        assert drill.endswith(".\n") and drill.count("One secret") == len(stated)
        again |= len(stated) > len(values) and len(asked) > len(values)
        sizes.append(len(haystack.encode(drill)))
    assert max(sizes) <= length
    assert again == (length >= (512 if make is byte_haystack else 200)), "the shortest have no room to repeat both"
    assert length < 2000 or min(sizes) > length - 150, "room for another sentence or needle was left"


@pytest.mark.parametrize("make", [byte_haystack, word_haystack])
def test_drills_without_room_for_a_question_say_every_needle_twice(make):
    haystack, counts = make(), set()
    least, most = haystack.least_drill(questions=False), haystack.least_drill() - 1
    for length in (least, most):
        for number in range(20):
            drill = haystack.drill(length, number)
            stated = re.findall(r"One secret number of (\S+) is (\d{7})\.", drill)
            assert all(stated.count(fact) >= 2 for fact in stated) and len(dict(stated)) == len(set(stated))
            assert "Question" not in drill and len(haystack.encode(drill)) <= length
            counts.add(len(stated))
    assert min(counts) == 2 < max(counts)


def test_drills_have_few_needles_and_many_and_both_haystacks():
    haystack = byte_haystack()
    drills = [haystack.drill(4096, number) for number in range(60)]
    counts = [len(set(facts_and_answers(drill)[0])) for drill in drills]
    assert min(counts) == 1 and max(counts) >= 15
    assert any("The river runs" in drill for drill in drills) and any(TEXT[0] in drill for drill in drills)
    starts = [drill.index("One secret") for drill in drills]
    assert min(starts) == 0 and max(starts) > 100, "needles stand anywhere"


def test_drills_depend_on_their_number_length_and_seed_alone():
    haystack = byte_haystack()
    one = haystack.drill(700, 3)
    haystack.drill(700, 4)
    assert one == haystack.drill(700, 3) == byte_haystack().drill(700, 3)
    assert len({one, haystack.drill(701, 3), haystack.drill(700, 4), haystack.drill(700, 3, seed=1)}) == 4
    with pytest.raises(ValueError, match=r"length: got 80 tokens for a drill, wanted at least \d+ here"):
        haystack.drill(80, 0)


@pytest.mark.parametrize("make", [byte_haystack, word_haystack])
def test_recitals_say_numbers_again_and_nothing_else(make):
    haystack, counts = make(), []
    for length in (30, 64, 700):
        for number in range(30):
            text = haystack.recital(length, number)
            assert re.fullmatch(r"\d{7}(?:(\D{1,5})\d{7}(?:\1\d{7})*)\n", text), "one separator"
            assert length - 16 < len(haystack.encode(text)) <= length
            values = re.findall(r"\d+", text)
            assert values[0] == values[1] and len(set(values)) <= max(1, length // 64)
            counts.append(len(set(values)))
    assert {1, 2, 3} <= set(counts) and max(counts) > 5
    assert haystack.recital(64, 1) == make().recital(64, 1)
    assert len({haystack.recital(64, 1), haystack.recital(64, 2), haystack.recital(64, 1, seed=1)}) == 3
    with pytest.raises(ValueError, match="length: got 2 tokens for a recital, wanted at least"):
        haystack.recital(2, 0)


def test_drills_to_train_on_are_of_many_lengths_and_hold_nothing_that_is_to_be_unseen():
    haystack, lengths = byte_haystack(), [64, 256, 512, 1024]
    texts = list(training_drills(haystack, lengths, 60_000))
    sizes = [len(haystack.encode(text)) for text in texts]
    assert 60_000 <= sum(sizes) < 60_000 + 1024
    assert sum(size for size in sizes if size > 512) > 10_000 and sum(size for size in sizes if size <= 256) > 10_000
    assert texts == list(training_drills(haystack, lengths, 60_000))
    assert texts != list(training_drills(haystack, lengths, 60_000, seed=1))
    asked = {haystack.sample("niah_single_1", length, 0.5, number).expected[0]
             for length in (512, 1024) for number in range(100)}  # fmt: skip
    assert not any(value in text for text in texts for value in asked)
    drilled = [size for text, size in zip(texts, sizes, strict=True) if "Question" in text]
    longer = sum(size for size in sizes if size > 64)
    assert sum(drilled) / longer == pytest.approx(0.5, abs=0.12), "half of what is long enough for either"
    assert 10_000 < sum(sizes) - longer < 20_000
    values = re.findall(r"\d{7}", texts[0])
    others = list(training_drills(haystack, lengths, 60_000, unseen=values))
    assert texts[0] not in others and others[:20] == texts[1:21]
    documents = list(training_documents(haystack, ["niah_single_1"], [700], 6000))
    (value,) = re.findall(r"is (\d{7})\.\n", documents[0])
    assert next(training_documents(haystack, ["niah_single_1"], [700], 6000, unseen=[value])) != documents[0]
    with pytest.raises(ValueError, match="drills: got no lengths"):
        next(training_drills(haystack, [], 10))
