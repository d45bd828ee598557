"""Bookkeeping against direct constructions: the Fenwick partition by peeling bits off, the plan by counting reads."""

import itertools

import numpy
import pytest
import torch

from loglinear import fenwick


def buckets_by_definition(t: int) -> list[set[int]]:
    """The partition of 0 … t (arXiv 2506.04761, section 3.2): the token itself, then the rest of the prefix, from its
    end, in blocks as large as the lowest set bit of what is left; a block of 2^(l-1) tokens is bucket l."""
    buckets = [{t}] + [set() for _ in range(t.bit_length())]
    left = t
    while left:
        size = left & -left
        buckets[size.bit_length()] = set(range(left - size, left))
        left -= size
    return buckets


@pytest.mark.parametrize("t", [0, 1, 2, 3, 6, 7, 8, 37, 64, 100])
def test_level_is_the_partition_of_the_paper(t):
    by_definition = {s: bucket for bucket, members in enumerate(buckets_by_definition(t)) for s in members}
    assert {s: fenwick.level(t, s, 40) for s in range(t + 1)} == by_definition


@pytest.mark.parametrize("num_levels", [1, 2, 3, 5])
def test_last_level_takes_everything_older(num_levels):
    for t in range(40):
        for s in range(t + 1):
            assert fenwick.level(t, s, num_levels) == min(fenwick.level(t, s, 40), num_levels - 1)


@pytest.mark.parametrize("num_levels", [1, 2, 4, 9])
def test_level_of_tensors_is_level_of_ints(num_levels):
    t, s = torch.arange(50)[:, None], torch.arange(50)[None, :]
    levels = fenwick.level(t, s, num_levels)
    assert levels.dtype == torch.int64
    assert levels.tolist() == [[fenwick.level(a, b, num_levels) for b in range(50)] for a in range(50)]


def test_level_far_out():
    far = 2**40 + 5
    assert fenwick.level(far, far - 1, 60) == 1
    assert fenwick.level(far, 0, 60) == 41
    assert fenwick.level(torch.tensor(far), torch.tensor(0), 60).item() == 41


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 100, 16_384, 16_385])
def test_full_num_levels_is_the_least_that_caps_nothing(length):
    levels = fenwick.full_num_levels(length)
    reached = max(fenwick.level(length - 1, s, 60) for s in (0, length // 2, length - 1))
    reached = max(reached, max(fenwick.level(t, 0, 60) for t in range(min(length, 200))))
    assert levels == reached + 1


def test_full_num_levels_refuses_no_tokens():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        fenwick.full_num_levels(0)


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4, 10])
def test_occupied_buckets_and_carry_follow_the_tokens(num_levels):
    """Tokens inserted one by one and merged as `carry_level` says are always where `level` sees them."""
    members = [set() for _ in range(num_levels)]
    for position in range(70):
        if position:
            target = fenwick.carry_level(position, num_levels)
            gathered = set().union(*members[: target + 1])
            members = [set()] * target + [gathered] + members[target + 1 :]
        assert fenwick.occupied(position, num_levels) == [bool(bucket) for bucket in members]
        for bucket in range(1, num_levels - 1):
            if members[bucket]:
                assert fenwick.bucket_start(position, bucket) == min(members[bucket])
        members[0] = members[0] | {position}
        for bucket, tokens in enumerate(members):
            assert all(fenwick.level(position, s, num_levels) == bucket for s in tokens)


def test_occupied_of_tensors():
    positions = torch.tensor([[0, 1], [6, 2**40]])
    for num_levels in (1, 2, 5):
        flags = fenwick.occupied(positions, num_levels)
        assert flags.shape == (2, 2, num_levels)
        assert flags.tolist() == [[fenwick.occupied(p, num_levels) for p in row] for row in positions.tolist()]


@pytest.mark.parametrize("chunk", [0, -4, 3, 48])
def test_a_chunk_that_is_no_power_of_two_is_refused(chunk):
    with pytest.raises(ValueError, match=f"power of two, got {chunk}"):
        fenwick.chunk_height(chunk)


def test_chunk_for_is_the_power_of_two_that_holds_a_short_sequence():
    lengths = (0, 1, 2, 3, 33, 64, 65, 10_000)
    assert [fenwick.chunk_for([length]) for length in lengths] == [1, 1, 2, 4, 64, 64, 64, 64]


def test_chunks_are_smaller_where_most_of_their_rows_would_be_empty():
    assert fenwick.chunk_for([8192] + 8192 * [1]) == 8
    assert fenwick.chunk_for([8192] + 8192 * [20]) == 64
    assert fenwick.chunk_for([700, 1, 0, 64, 63]) == 64


def sources_read(plan: fenwick.Plan, lengths: list[int], positions: list[int], num_levels: int):
    """Runs a plan on sets instead of matrices: for every token row the set of (source, level) that it reads of earlier
    chunks. A source is (sequence, position); what was carried in is (sequence, "bucket", level)."""
    chunk = plan.chunk
    chunks = []  # (sequence, absolute number)
    for sequence, (length, start) in enumerate(zip(lengths, positions, strict=True)):
        if length:
            chunks += [(sequence, number) for number in range(start // chunk, (start + length - 1) // chunk + 1)]
    assert len(chunks) == plan.num_chunks

    def tokens(sequence, number):
        first, stop = positions[sequence], positions[sequence] + lengths[sequence]
        return {(sequence, p) for p in range(number * chunk, (number + 1) * chunk) if first <= p < stop}

    def at(nodes, index):
        if isinstance(index, slice):
            return nodes[index]
        return [nodes[i] for i in index.tolist()]

    def below(sequence, number):
        """What earlier buckets inside the chunk of the first token fold into it."""
        here = tokens(sequence, number)
        if number == positions[sequence] // chunk:
            near = fenwick.num_near_buckets(num_levels, plan.chunk_height)
            held = fenwick.occupied(positions[sequence], num_levels)
            here |= {(sequence, "bucket", level) for level in range(1, near + 1) if held[level]}
        return here

    nodes, heights = at([below(*c) for c in chunks], plan.leaves), []
    for height in range(len(plan.merges) + 1):
        level = plan.chunk_height + 1 + height
        if height < plan.tree_heights and sum(positions):
            held = [fenwick.occupied(p, num_levels) for p in positions]
            nodes = nodes + [{(s, "bucket", level)} if held[s][level] else set() for s in range(len(positions))]
        heights.append(nodes)
        if height < len(plan.merges):
            merge = plan.merges[height]
            nodes = [a | b for a, b in zip(at(nodes, merge.left), at(nodes, merge.right), strict=True)]

    found = [set() for _ in chunks]
    for part in plan.parts:
        for height, tables in enumerate(part.stages[: plan.tree_heights]):
            for table in tables:
                readers = list(range(plan.num_chunks))[part.chunks]
                readers = at(readers, table.chunks)
                for group, node in enumerate(table.nodes.tolist()):
                    for c in readers[group * table.size : (group + 1) * table.size]:
                        read = {(source, plan.chunk_height + 1 + height) for source in heights[height][node]}
                        assert not read & found[c], "a source is read twice"
                        found[c] |= read
    return chunks, found


@pytest.mark.parametrize(
    "lengths, positions",
    [([1], [0]), ([64], [0]), ([37], [0]), ([0, 1, 17, 0, 33], [0] * 5), ([20, 20], [0, 0]), ([30, 7, 1], [5, 64, 31])],
    ids=["T1", "T64", "T37", "packed", "batch", "carried"],
)
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_plan_covers_every_pair_exactly_once(lengths, positions, chunk):
    num_levels = 12  # a full partition of all of these
    carried = positions if any(positions) else None
    plan = fenwick.plan(lengths, carried, chunk, num_levels, "cpu")
    chunks, found = sources_read(plan, lengths, positions, num_levels)
    for (sequence, number), read in zip(chunks, found, strict=True):
        start = positions[sequence]
        for p in range(max(start, number * chunk), min(start + lengths[sequence], (number + 1) * chunk)):
            expected = {((sequence, s), fenwick.level(p, s, num_levels)) for s in range(start, number * chunk)}
            held = fenwick.occupied(start, num_levels)
            for bucket in (b for b in range(1, num_levels) if held[b]):
                first = fenwick.bucket_start(start, bucket)
                if first < number * chunk:  # else inside the chunk: its rows read it apart
                    expected.add(((sequence, "bucket", bucket), fenwick.level(p, first, num_levels)))
            assert {entry for entry in read} == expected


def test_plan_gives_every_token_one_row():
    lengths, positions = [3, 0, 21, 8], [7, 2, 0, 16]
    rows = fenwick.plan(lengths, positions, 8, 6, "cpu").rows
    assert rows is not None
    valid, slots = rows.valid, rows.slot
    assert valid.sum() == sum(lengths)
    assert rows.of_slot[slots].tolist() == list(range(sum(lengths)))
    assert slots.tolist() == torch.nonzero(valid).flatten().tolist()


def test_parts_hold_every_chunk_once_and_grow_in_number():
    counts = []
    for tokens in (64, 4096, 65_536, 1_048_576):
        plan = fenwick.plan([tokens], None, 64, fenwick.full_num_levels(tokens), "cpu")
        covered = numpy.concatenate([numpy.arange(plan.num_chunks)[part.chunks] for part in plan.parts])
        assert covered.tolist() == list(range(plan.num_chunks))
        counts.append(len(plan.parts))
    assert counts == sorted(counts) and counts[-1] == 14  # as many as heights


def test_plan_is_built_once():
    first = fenwick.plan([100, 100], None, 64, 9, "cpu")
    assert fenwick.plan((100, 100), None, 64, 9, torch.device("cpu")) is first


@pytest.mark.parametrize("num_levels", [1, 3, 8])
def test_chunk_levels(num_levels):
    table = fenwick.chunk_levels(16, num_levels)
    assert table.tolist() == [[fenwick.level(t, s, num_levels) if s <= t else 0 for s in range(16)] for t in range(16)]


def test_a_dropped_bit_comes_back():
    for whole in [*range(300), 2**31 - 1, 2**32 - 1, 2**31 + 2**16 + 1]:
        rests = [whole]
        while rests[-1]:
            rests.append(fenwick.drop_lowest_bit(rests[-1]))
        for rest, before in itertools.pairwise(reversed(rests)):
            assert fenwick.add_highest_bit(rest, whole) == before
