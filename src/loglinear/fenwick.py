"""The Fenwick bookkeeping: which level a token is on, which buckets exist, what merges, who reads whom.

Everything in the library that knows about bits is in this file. The first half are small functions of positions; they
take Python ints, numpy arrays and integer tensors alike, and those that consist of operators alone also run inside
kernels. The second half is the *plan*: for a set of sequences it lists, as indices, what the tree algorithm
(`docs/math.md`) has to merge and to read. A plan depends on lengths and positions only, never on data.

Legend
    S sequences, T tokens, C tokens in a chunk (a power of two), N chunks of all sequences together, L levels
    height j of the tree: its nodes span 2^j chunks and are read at level log2(C) + 1 + j

The partition is that of log-linear attention (arXiv 2506.04761, section 3.2), with one addition: a cap on the number
of levels, whose last bucket holds everything older.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# ----------------------------------------------------------------------------------------------------
# Positions
# ----------------------------------------------------------------------------------------------------


def in_same_block(t, s, height):
    """Whether positions `t` and `s` lie in the same aligned block of 2^height tokens."""
    return ((t ^ s) >> height) == 0


def block_number(position, height):
    """Number of the block of 2^`height` that holds `position`."""
    return position >> height


def is_right_half(block, height):
    """Whether block number `block` (in units of the leaves) lies in the right half of its block at `height` + 1."""
    return ((block >> height) & 1) == 1


def left_sibling(block, height):
    """Number, among the nodes of `height`, of the node just left of the one that holds leaf `block`."""
    return (block >> height) - 1


def level(t, s, num_levels: int):
    """Level on which the token at position `s` is seen from position `t`: min(bit_length(t XOR s), num_levels - 1).

    Takes ints or integer tensors (broadcast against each other). Level 0 is the token itself.

    >>> [level(6, s, 4) for s in range(7)]
    [3, 3, 3, 3, 2, 2, 0]
    """
    start = (t ^ s) * 0
    return (
        sum(
            (~in_same_block(t, s, height) if torch.is_tensor(start) else not in_same_block(t, s, height))
            for height in range(num_levels - 1)
        )
        + start
    )


def full_num_levels(length: int) -> int:
    """Number of levels of a full (uncapped) partition of `length` tokens: bit_length(length - 1) + 1.

    >>> full_num_levels(16_384)
    15
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return (length - 1).bit_length() + 1


def carry_level(position, num_levels: int):
    """Level into which all lower ones merge when the token at `position` > 0 arrives (ints or integer tensors)."""
    return level(position, position - 1, num_levels)


def is_occupied(position, bucket: int, num_levels: int):
    """Whether bucket `bucket` of a state at `position` holds tokens (ints, integer tensors or arrays)."""
    if num_levels == 1:
        return position > 0
    if bucket == 0:
        return position < 0  # the newest token leaves bucket 0 with the carry; nothing is ever found there
    if bucket == num_levels - 1:
        return (position >> (bucket - 1)) > 0
    return is_right_half(position, bucket - 1)


def occupied(position, num_levels: int) -> Any:
    """Which buckets of a state at `position` hold tokens.

    An int gives a list of `num_levels` bools, an integer tensor [...] gives a bool tensor [..., num_levels].

    >>> occupied(6, 5)
    [False, False, True, True, False]
    """
    flags = [is_occupied(position, bucket, num_levels) for bucket in range(num_levels)]
    return torch.stack(flags, dim=-1) if torch.is_tensor(position) else [bool(flag) for flag in flags]


def bucket_start(position, bucket):
    """First token of an occupied, uncapped bucket of a state at `position` (ints or integer tensors)."""
    return ((position >> (bucket - 1)) - 1) << (bucket - 1)


def block_start(position, height):
    """First position of the aligned block of 2^height tokens that `position` lies in (operators only)."""
    return (position >> height) << height


def seen_level(t, position, bucket, num_levels: int):
    """Level on which a later token `t` ≥ `position` sees bucket `bucket` of a state at `position` (integer tensors).

    All tokens of a bucket are on one level: that of the bucket, until `t` leaves the block that `position` is in.
    """
    return level(t, position, num_levels).maximum(bucket)


def chunk_height(chunk: int, name: str = "a chunk length") -> int:
    """log2 of a chunk length (or of what `name` says), refusing anything that is not a power of two."""
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"{name} must be a power of two, got {chunk}")
    return chunk.bit_length() - 1


def chunk_for(lengths: Sequence[int], largest: int = 64, smallest: int = 8) -> int:
    """Chunk length for sequences of so many tokens: `largest`, or the power of two that holds the longest.

    Smaller, down to `smallest`, where most of the chunks' rows would be empty: many short sequences beside a long one.

    >>> chunk_for([40, 3]), chunk_for([5000]), chunk_for([5000] + 5000 * [1])
    (64, 64, 8)
    """
    chunk = min(largest, 1 << (max(1, max(lengths, default=1)) - 1).bit_length())
    while chunk > smallest and sum(-(-length // chunk) for length in lengths) * chunk > 4 * max(sum(lengths), largest):
        chunk //= 2
    return chunk


# ----------------------------------------------------------------------------------------------------
# The plan of the tree algorithm
# ----------------------------------------------------------------------------------------------------

Index = slice | torch.Tensor  # where the entries are evenly spaced a slice is kept: it takes a view, not a copy

GROUP = 8  # at most so many neighbouring chunks that read the same node are multiplied with it together
PART, PARTS = 64, 8  # see `Part`: at least so many chunks in each, and so many of them once there are enough chunks


@dataclass(frozen=True)
class Reads:
    """Groups of `size` neighbouring chunks; all chunks of group i read node `nodes[i]`."""

    chunks: Index  # [groups * size], numbers within the part, group by group
    nodes: torch.Tensor  # [groups]
    size: int


@dataclass(frozen=True)
class Part:
    """Some neighbouring chunks, and what they read: at every height, then on the last level if there is one.

    What the chunks of a part read is kept for its gradient only while that part is at work. With as many parts as
    heights (once there are enough chunks) this takes O(T) memory, although there are O(T log T) reads; and more than a
    few parts keep temporaries small, which on a CPU is faster.
    """

    chunks: slice
    stages: tuple[tuple[Reads, ...], ...]


@dataclass(frozen=True)
class Rows:
    """Where the tokens lie in the chunks."""

    of_slot: torch.Tensor  # [N * C] token in each row of the chunks
    valid: torch.Tensor  # [N * C] whether the row exists
    slot: torch.Tensor  # [tokens], the inverse


@dataclass(frozen=True)
class Merge:
    """Node i of the next height is the composition of `left[i]` and `right[i]`."""

    left: Index
    right: Index


@dataclass(frozen=True)
class ScanStep:
    """One height of the downward half of the scan: entering states of a height from those of the height above.

    The states of a height are ordered: the sequences' first ones, then those of even blocks (equal to their parent's),
    then those of odd blocks (the left sibling's map applied to the parent's).
    """

    even_parent: torch.Tensor
    odd_parent: torch.Tensor
    odd_left: torch.Tensor  # node number of the left sibling


@dataclass(frozen=True)
class Plan:
    """Everything the tree algorithm needs to know about lengths and positions; indices live on one device."""

    chunk: int
    chunk_height: int
    num_levels: int
    num_chunks: int
    tree_heights: int  # heights whose nodes are read on a level of their own
    has_last: bool  # whether anything can be in the capped last bucket
    rows: Rows | None  # None: the sequences are equally long and a plain reshape does it
    num_sequences: int
    leaves: Index  # chunks that are complete, i.e. nodes of height 0
    merges: tuple[Merge, ...]  # height j to j + 1, j = 0 …
    parts: tuple[Part, ...]
    scan_merges: tuple[Merge, ...]
    scan_steps: tuple[ScanStep, ...]  # from the top down
    # carried state, all indexed by sequence
    first_chunk: torch.Tensor  # [S] chunk that holds the first token (0 if there is none: see has_tokens)
    has_tokens: torch.Tensor  # [S]
    partial_chunk: torch.Tensor  # [S] chunk that the end of the sequence falls into, where it is incomplete
    has_partial: torch.Tensor  # [S]
    stays_in_chunk: torch.Tensor  # [S] whether start and end lie in the same chunk
    near_start_level: torch.Tensor  # [S, C, near] level of near bucket i + 1 seen from the rows of the first chunk
    near_end_level: torch.Tensor  # [S, near] its level seen from the end, where stays_in_chunk
    end_row_level: torch.Tensor  # [S, C] level of the rows of the partial chunk, seen from the end
    end_nodes: tuple[torch.Tensor, ...]  # [S] per height: node of the final bucket (any number where unused)
    end_used: tuple[torch.Tensor, ...]  # [S] per height
    end_last: torch.Tensor  # [S] entering state that ends up in the last bucket


def num_near_buckets(num_levels: int, chunk_height: int) -> int:
    """How many buckets (1, 2, …) lie inside a chunk and below the last one."""
    return max(0, min(num_levels - 2, chunk_height))


def _exclusive_sum(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)[:-1]]) if len(counts) else counts


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of sum(counts) items: which sequence it belongs to, and its number within that sequence."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - _exclusive_sum(counts)[owner]


class _Planner:
    """Builds a Plan on the host. Positions are absolute; nodes are numbered sequence by sequence at each height."""

    def __init__(self, lengths, positions, chunk, num_levels, has_state, device):
        self.device = device
        self.chunk, self.height = chunk, chunk_height(chunk)
        self.num_levels, self.has_state = num_levels, has_state
        self.lengths = np.asarray(lengths, np.int64)
        self.start = np.asarray(positions, np.int64)
        self.end = self.start + self.lengths
        self.first = self.start >> self.height  # absolute number of the chunk of the first token
        self.stop = self.end >> self.height  # number of complete chunks before the end
        self.counts = np.where(self.lengths > 0, ((self.end - 1) >> self.height) - self.first + 1, 0)
        self.base = _exclusive_sum(self.counts)
        self.owner, local = _ragged(self.counts)
        self.block = self.first[self.owner] + local  # absolute number of every chunk
        self.cap_height = max(0, num_levels - 2 - self.height)  # first height whose nodes belong to the last level

    # -- indices -------------------------------------------------------------------------------------
    def tensor(self, values) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def index(self, values: np.ndarray) -> Index:
        if len(values) and (values >= 0).all():
            step = int(values[1] - values[0]) if len(values) > 1 else 1
            if step > 0 and (np.diff(values) == step).all():
                return slice(int(values[0]), int(values[-1]) + 1, step)
        return self.tensor(values)

    def node_counts(self, height: int) -> np.ndarray:
        return (self.stop >> height) - (self.first >> height)

    def node(self, height: int, owner: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Index of the absolute node `number`; one that lies before the sequence is a bucket of the initial state."""
        counts = self.node_counts(height)
        relative = number - (self.first >> height)[owner]
        return np.where(relative >= 0, _exclusive_sum(counts)[owner] + relative, counts.sum() + owner)

    def grouped(self, chunks: np.ndarray, nodes: np.ndarray, group: int) -> tuple[Reads, ...]:
        """Split reads into groups of `group` neighbouring chunks with the same node, and single ones for the rest."""
        starts = np.flatnonzero(np.diff(nodes, prepend=-1) != 0)
        run = np.diff(starts, append=len(nodes))
        owner, local = _ragged(run)
        in_group = local < (run - run % group)[owner]
        tables = ((in_group, group), (~in_group, 1))
        return tuple(Reads(self.index(chunks[mask]), self.tensor(nodes[mask][::size]), size)
                     for mask, size in tables if mask.any())  # fmt: skip

    def parts(self, stages: list[tuple[np.ndarray, np.ndarray, int]]) -> tuple[Part, ...]:
        """Stages list all reads of a height (or of the last level): chunks, nodes, and the height."""
        total = len(self.block)
        count = max(1, min(max(len(stages), PARTS), total // PART))
        size = max(1, -(-total // count // GROUP) * GROUP)  # rounded up to whole groups
        parts = []
        for start in range(0, total, size):
            within = [np.logical_and(chunks >= start, chunks < start + size) for chunks, _, _ in stages]
            parts.append(Part(slice(start, min(start + size, total)), tuple(
                self.grouped(chunks[mask] - start, nodes[mask], min(GROUP, 1 << height))
                for mask, (chunks, nodes, height) in zip(within, stages, strict=True))))  # fmt: skip
        return tuple(parts)

    # -- the tree ------------------------------------------------------------------------------------
    def build(self) -> Plan:
        heights = min(self.cap_height, int(self.stop.max(initial=0)).bit_length())
        has_last = self.has_state or bool((self.stop >> self.cap_height).any())
        leaf_owner, leaf_local = _ragged(self.node_counts(0))
        scan = self.scan() if has_last else {}
        nothing = self.tensor(np.zeros(len(self.start), np.int64))
        return Plan(
            chunk=self.chunk, chunk_height=self.height, num_levels=self.num_levels, num_chunks=len(self.block),
            tree_heights=heights, has_last=has_last,
            leaves=self.index(self.base[leaf_owner] + leaf_local),
            merges=tuple(self.merge(height) for height in range(self.cap_height if has_last else max(0, heights - 1))
                         if self.node_counts(height).any() or self.has_state),
            parts=self.parts([self.tree_reads(height) for height in range(heights)] + scan.get("reads", [])),
            scan_merges=scan.get("merges", ()), scan_steps=scan.get("steps", ()),
            end_last=scan.get("end", nothing),
            rows=self.rows(), num_sequences=len(self.start), **self.ends(heights),
        )  # fmt: skip

    def merge(self, height: int) -> Merge:
        owner, local = _ragged(self.node_counts(height + 1))
        number = (self.first >> (height + 1))[owner] + local
        left, right = (self.node(height, owner, 2 * number + side) for side in (0, 1))
        return Merge(self.index(left), self.index(right))

    def tree_reads(self, height: int) -> tuple[np.ndarray, np.ndarray, int]:
        chunks = np.flatnonzero(is_right_half(self.block, height))
        return chunks, self.node(height, self.owner[chunks], left_sibling(self.block[chunks], height)), height

    def scan(self) -> dict[str, Any]:
        """The last level: states that enter the blocks of the cap height, by a scan up and down over their maps."""
        firsts = len(self.start) if self.has_state else 1  # slots of the states that enter the sequences
        top = int(self.node_counts(self.cap_height).max(initial=0)).bit_length()
        counts = [self.node_counts(self.cap_height) >> above for above in range(top + 1)]

        places = []  # per height: place of entering state (sequence, block ≥ 1), evens before odds
        for count in counts:
            odd = is_right_half(_ragged(count)[1] + 1, 0)
            place = np.empty(len(odd), np.int64)
            place[~odd] = np.arange((~odd).sum())
            place[odd] = (~odd).sum() + np.arange(odd.sum())
            places.append(place)

        def entering(above: int, owner: np.ndarray, block: np.ndarray) -> np.ndarray:
            at = np.minimum(_exclusive_sum(counts[above])[owner] + block - 1, max(len(places[above]) - 1, 0))
            inner = places[above][at] if len(places[above]) else np.zeros_like(block)
            return np.where(block > 0, firsts + inner, owner if self.has_state else 0)

        steps, merges = [], []
        for above in reversed(range(top)):
            owner, local = _ragged(counts[above])
            block = local + 1
            odd = is_right_half(block, 0)
            parent = entering(above + 1, owner, block >> 1)
            left = _exclusive_sum(counts[above])[owner] + block - 1
            steps.append(ScanStep(self.tensor(parent[~odd]), self.tensor(parent[odd]), self.tensor(left[odd])))
        for above in range(top - 1):
            owner, local = _ragged(counts[above + 1])
            left = _exclusive_sum(counts[above])[owner] + 2 * local
            merges.append(Merge(self.index(left), self.index(left + 1)))

        block = (self.block >> self.cap_height) - (self.first >> self.cap_height)[self.owner]
        chunks = np.arange(len(block)) if self.has_state else np.flatnonzero(block > 0)
        reads = [(chunks, entering(0, self.owner[chunks], block[chunks]), self.cap_height)]
        end = entering(0, np.arange(len(self.start)), self.node_counts(self.cap_height))
        return {"steps": tuple(steps), "merges": tuple(merges), "reads": reads, "end": self.tensor(end)}

    # -- rows and ends -------------------------------------------------------------------------------
    def rows(self) -> Rows | None:
        uniform = len(set(self.lengths.tolist())) <= 1 and not (self.start & (self.chunk - 1)).any()
        if uniform and len(self.block):
            return None
        position = (self.block[:, None] << self.height) + np.arange(self.chunk)
        valid = (position >= self.start[self.owner, None]) & (position < self.end[self.owner, None])
        offset = _exclusive_sum(self.lengths) - self.start
        row = np.where(valid, position + offset[self.owner, None], 0).ravel()
        slot = np.empty(int(self.lengths.sum()), np.int64)
        slot[row[valid.ravel()]] = np.flatnonzero(valid.ravel())
        return Rows(self.tensor(row), self.tensor(valid.ravel()), self.tensor(slot))

    def ends(self, heights: int) -> dict[str, Any]:
        sequences = np.arange(len(self.start))
        near = np.arange(1, num_near_buckets(self.num_levels, self.height) + 1)
        has_tokens = self.lengths > 0
        has_partial = has_tokens & ((self.end & (self.chunk - 1)) > 0)
        first_chunk = np.where(has_tokens, self.base, 0)
        # positions within the chunk are enough: whatever is compared here lies in one chunk
        start, end = self.start & (self.chunk - 1), self.end & (self.chunk - 1)
        starts = torch.from_numpy(bucket_start(start[:, None], near))
        ends, rows = torch.from_numpy(end)[:, None], torch.from_numpy(np.arange(self.chunk))
        siblings = [left_sibling(self.stop, j) for j in range(heights)]
        used = [is_right_half(self.stop, j) for j in range(heights)]
        return {
            "first_chunk": self.tensor(first_chunk), "has_tokens": self.tensor(has_tokens),
            "partial_chunk": self.tensor(np.where(has_partial, self.base + self.counts - 1, 0)),
            "has_partial": self.tensor(has_partial),
            "stays_in_chunk": self.tensor(self.first == self.stop),
            "near_start_level": level(rows[:, None], starts[:, None, :], self.num_levels).to(self.device),
            "near_end_level": level(ends, starts, self.num_levels).to(self.device),
            "end_row_level": level(ends, rows, self.num_levels).to(self.device),
            "end_nodes": tuple(
                self.tensor(np.where(used[j], self.node(j, sequences, siblings[j]), 0)) for j in range(heights)),
            "end_used": tuple(self.tensor(flags) for flags in used),
        }  # fmt: skip


@functools.lru_cache(maxsize=64)
def _cached_plan(lengths, positions, chunk, num_levels, has_state, device) -> Plan:
    with torch.inference_mode(False):
        return _Planner(lengths, positions, chunk, num_levels, has_state, device).build()


def plan(lengths: Sequence[int], positions: Sequence[int] | None, chunk: int, num_levels: int, device) -> Plan:
    """Plan for sequences of `lengths` tokens; `positions` are where they start if states are carried in, else None."""
    start = tuple(positions) if positions is not None else (0,) * len(lengths)
    return _cached_plan(tuple(lengths), start, chunk, num_levels, positions is not None, torch.device(device))


def chunk_levels(chunk: int, num_levels: int, device=None) -> torch.Tensor:
    """Levels [C, C] of the source rows (columns) seen from the target rows of one chunk; what is not causal is 0."""
    rows = torch.arange(chunk, device=device)
    return level(rows[:, None], rows[None, :], num_levels).tril()


# ------------------------------------------------------------------------------------------------
# Slots: the tree in an array
# ------------------------------------------------------------------------------------------------
#
# Only left siblings are read, and exactly one of them ends with each chunk: the one of height ctz(block + 1), as in a
# Fenwick tree kept in an array. So N slots hold all nodes. Chunk number b reads, lowest bit first, the slots that end
# just before b, before b without its lowest bit, and so on. A slot whose height reaches the cap holds the sum of
# everything up to it, and ends the walk.


def block_end(block, height):
    """The last leaf of the aligned block of 2^height leaves that holds leaf `block` (operators only)."""
    return (((block >> height) + 1) << height) - 1


def lowest_bit(x):
    """The lowest set bit of x, as a number (operators only: ints, tensors, kernels)."""
    return x & -x


def drop_lowest_bit(x):
    """x without its lowest set bit (operators only: ints, tensors, kernels)."""
    return x & (x - 1)


def add_highest_bit(part, whole):
    """One `drop_lowest_bit` less: `part`, which is left of `whole`, with the highest bit that was dropped (below 2^32;
    operators only: ints, tensors, kernels)."""
    dropped = part ^ whole
    dropped |= dropped >> 1
    dropped |= dropped >> 2
    dropped |= dropped >> 4
    dropped |= dropped >> 8
    dropped |= dropped >> 16
    return part | (dropped ^ (dropped >> 1))


@dataclass(frozen=True)
class Slots:
    """What kernels need to know about N slots of S sequences; all int32 on one device.

    A sequence that carries a state in has slots for its far buckets (those of whole chunks) just before its first
    chunk: the occupied ones last, the nearest of them at the very end, so that chunks find them as they find nodes.
    A sequence that carries a state out has a last chunk for what its end reads, even if no row falls into it. There
    may be more slots than all that (packed lengths are not known on the host): those have no rows.
    """

    token: torch.Tensor  # [N] row of the chunk's first position (of which the sequence may lack some)
    rows: torch.Tensor  # [N] end of the rows that exist; 0: none does
    block: torch.Tensor  # [N] number of the chunk, counted from position 0 or a multiple of 2^cap chunks
    left: torch.Tensor  # [N] chunks of the sequence from this one on
    height: torch.Tensor  # [N] height of the node in this slot, at most `cap`
    reads: torch.Tensor  # [N] nodes that this chunk reads
    reader: torch.Tensor  # [N] first chunk that reads this node
    readers: torch.Tensor  # [N] how many do, one after the other
    parent: torch.Tensor  # [N] slot of the node that takes this one in; -1: none does
    order: torch.Tensor  # [N] slots, those with the most readers first
    tallest: torch.Tensor  # [N] slots, those of the highest nodes first
    base: torch.Tensor  # [S] slot of the first chunk of a sequence
    count: torch.Tensor  # [S] chunks of a sequence
    cap: int  # height from which on slots hold running sums
    longest: int  # no sequence has more chunks, as far as the host knows
    ends: Ends | None = None  # where states are carried in or out
    places: torch.Tensor | None = None  # [N] nodes that the chunks before read; None where states are carried in
    # where states are carried in; else every sequence starts at 0
    first: torch.Tensor | None = None  # [N] the first of the chunk's rows that exists
    origin: torch.Tensor | None = None  # [N] number of the sequence's first chunk, counted from there too
    oldest: torch.Tensor | None = None  # [N] slot of the sequence's oldest far bucket


@dataclass(frozen=True)
class Ends:
    """Where states enter and leave the slots. F = cap + 1 far buckets; far bucket f holds a node of height f.

    Near buckets are not in slots; see `Edges`.
    """

    bucket: torch.Tensor  # [S, F] slot of a far bucket of the initial state
    has_bucket: torch.Tensor  # [S, F] whether it holds anything
    node: torch.Tensor  # [S, F] slot of the node that is a far bucket of the final state
    has_node: torch.Tensor  # [S, F] whether there is one
    last: torch.Tensor  # [S] slot of the chunk that the end falls into
    end_row: torch.Tensor  # [S] row of that chunk that comes after the last token


def num_far_buckets(num_levels: int, chunk: int) -> int:
    """How many buckets of a state consist of whole chunks, or are the last one."""
    return max(0, num_levels - 2 - chunk_height(chunk)) + 1


def chunks_of(tokens: int, chunk: int, carried: bool) -> int:
    """Chunks of a sequence from position 0 on. `carried`: with the one that its end falls into."""
    return tokens // chunk + 1 if carried else -(-tokens // chunk)


def num_slots(tokens: int, sequences: int, chunk: int, num_levels: int, state: bool) -> int:
    """Enough slots for `sequences` packed sequences of `tokens` tokens in all, however long each is.

    `state`: they carry a state in.
    """
    if not state:
        return tokens // chunk + sequences
    return tokens // chunk + sequences * (2 + num_far_buckets(num_levels, chunk))


def most_reads(num_slots: int, cap: int) -> int:
    """At least as many nodes as `num_slots` chunks read, in sequences of any lengths from position 0 on."""
    ones = sum(((num_slots >> (bit + 1)) << bit) + max(0, (num_slots & ((2 << bit) - 1)) - (1 << bit))
               for bit in range(min(cap, num_slots.bit_length())))  # fmt: skip
    return ones + max(0, num_slots - (1 << cap))  # and one each from the cap on


def readers_with_rows(slots: Slots) -> torch.Tensor:
    """[N] `readers` without those that have no rows: the chunk that a sequence's end falls into may be such."""
    if slots.ends is None:
        return slots.readers
    last = (slots.reader + slots.readers - 1).clamp(max=len(slots.rows) - 1)
    return slots.readers - ((slots.readers > 0) & (slots.rows[last] == 0)).int()


def variants(slots: Slots) -> torch.Tensor:
    """[N] int32: how many different queries the rows of each chunk read with, where nodes change them as they pass.

    As many as nodes are read; but a state that is carried in is one as of the sequence's first token, so that all of
    its buckets, which come last, are read with the same queries.
    """
    if slots.origin is None:
        return slots.reads
    heights = torch.arange(slots.cap + 1, device=slots.block.device)
    block = slots.block[:, None]
    inside = ((block >> heights) << heights) > slots.origin[:, None]  # what is read at this height ends there
    passed = (inside & (is_right_half(block, heights) | (heights == slots.cap))).sum(1)
    return torch.minimum(passed + 1, slots.reads).int()


def most_variants(num_chunks: int, cap: int, sequences: int) -> int:
    """At least the sum of `variants` over `num_chunks` chunks of `sequences` sequences of any lengths and positions.

    Of n blocks one after the other, at most (n + 2^bit) / 2 have a bit set. Of the bits worth n or more, a chunk has at
    most one that stands for a node of its sequence: of two, the older node would end n blocks before the chunk.
    """
    bits = min(cap, num_chunks.bit_length())
    ones = sum(min(num_chunks, (num_chunks + (sequences << bit)) >> 1) for bit in range(bits))
    return ones + num_chunks * (1 + (bits < cap))  # and one each from the cap on, or beyond those bits and for buckets


def slots(
    cu_seqlens: torch.Tensor, num_slots: int, chunk: int, num_levels: int, positions: torch.Tensor | None = None,
    carried: bool = False, longest: int | None = None,
) -> Slots:  # fmt: skip
    """Slots of packed sequences, computed where `cu_seqlens` is, without reading it back.

    `positions` [S]: the sequences carry a state in. `carried`: they carry one in or out. `longest`: no sequence has
    more chunks, if that is known.
    """
    shift, device = chunk_height(chunk), cu_seqlens.device
    cap = num_far_buckets(num_levels, chunk) - 1
    if not carried:
        cap = min(cap, max(2, num_slots.bit_length()))  # no node is higher; at least 2, for kernels differ below
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    start = torch.zeros_like(lengths) if positions is None else positions
    end = start + lengths
    origins, stops = start >> shift, end >> shift
    counts = stops - origins + 1 if carried else (lengths + chunk - 1) >> shift
    heights = torch.arange(cap + 1, device=device)
    has_last = (start >> max(0, num_levels - 2)) > 0
    has_bucket = torch.where(heights < cap, is_right_half(origins[:, None], heights), has_last[:, None])
    far = 0 if positions is None else cap + 1
    stop_slots = (counts + far).cumsum(0)
    bases = stop_slots - counts
    oldest = bases - has_bucket.sum(1)

    slot = torch.arange(num_slots, device=device)
    owner = torch.searchsorted(stop_slots, slot, right=True).clamp_(max=len(lengths) - 1)
    base, origin, count = bases[owner], origins[owner], counts[owner]
    local = slot - base
    exists = slot < stop_slots[-1]
    is_chunk = exists & (local >= 0)
    block = origin + local.clamp(min=0)
    position = block << shift
    first = (start[owner] - position).clamp(min=0)
    rows = (end[owner] - position).clamp(max=chunk)
    powers = 1 << heights[:cap]
    height = torch.where(is_chunk, ((block[:, None] + 1) % (2 * powers) == 0).sum(1), 0)
    reads = ((block[:, None] & powers) > 0).sum(1) + (((block >> cap) > 0) | has_last[owner])
    reads = torch.where(is_chunk, reads, 0)
    left = torch.where(is_chunk, count - local, 0)
    span = 1 << height
    reader, readers = slot + 1, torch.where(is_chunk, torch.minimum(span, left - 1), 0)
    parent = torch.where(is_chunk & (span < left), slot + span, -1)
    ends = None
    if carried:
        # the unoccupied ones first, then from the highest to the lowest
        order = has_bucket * (cap + 1) + cap - heights
        bucket_of = order.argsort(1)  # [S, F] far bucket in each slot
        bucket = bases[:, None] - (cap + 1) + bucket_of.argsort(1)
        if positions is not None:
            kind = bucket_of[owner, (local + cap + 1).clamp(0, cap)]
            is_bucket = exists & (local < 0) & has_bucket[owner, kind]
            # it is read by what its block's right sibling has of the sequence, and then taken in
            rest = (((origin >> kind) + 1) << kind) - origin
            height = torch.where(exists, torch.where(local < 0, kind, height), 0)
            reader = torch.where(local < 0, base, reader)
            readers = torch.where(is_bucket, torch.minimum(rest, count), readers)
            parent = torch.where(is_bucket & (rest <= count), base + rest - 1, parent)
        first_after = (stops[:, None] >> heights) << heights
        inside = first_after > origins[:, None]
        has_node = torch.where(heights < cap, is_right_half(stops[:, None], heights), inside | has_last[:, None])
        node = torch.where(inside, (bases - origins)[:, None] + first_after - 1, bucket)
        last = bases + counts - 1
        node = torch.where(has_node, node, last[:, None])
        ends = Ends(bucket, has_bucket, node, has_node, last, end & (chunk - 1))
    carried_in = {}
    if positions is not None:
        # what is counted from a multiple of 2^cap has the same bits below the cap, and fits in 32
        beginning = (origin >> cap) << cap
        block = block - beginning
        carried_in = {"first": first, "origin": origin - beginning, "oldest": oldest[owner]}
    tables = {
        "token": bounds[owner] + position - start[owner], "rows": torch.where(is_chunk & (rows > first), rows, 0),
        "block": block, "left": left, "height": height, "reads": reads, "reader": reader, "readers": readers,
        "parent": parent, "order": readers.argsort(descending=True, stable=True), "base": bases, "count": counts,
        "tallest": torch.where(is_chunk, height, -1).argsort(descending=True, stable=True),
    } | carried_in  # fmt: skip
    if positions is None:
        tables["places"] = reads.cumsum(0) - reads
    longest = num_slots if longest is None else longest
    return Slots(**{name: table.int() for name, table in tables.items()}, cap=cap, longest=longest, ends=ends)


@functools.lru_cache(maxsize=64)
def uniform_slots(
    batch: int, tokens: int, chunk: int, num_levels: int, device: torch.device, carried: bool = False
) -> Slots:
    """Slots of `batch` sequences of `tokens` tokens each, from position 0 on."""
    with torch.inference_mode(False), torch.no_grad():
        bounds = torch.arange(batch + 1, device=device) * tokens
        chunks = chunks_of(tokens, chunk, carried)
        return slots(bounds, batch * chunks, chunk, num_levels, carried=carried, longest=chunks)


@dataclass(frozen=True)
class Edges:
    """The chunks that S sequences begin and end in, which near buckets (1, 2, …: parts of a chunk) have to do with.

    M near buckets; D levels on which positions of a chunk are seen from its end, the first of which is `lowest`.
    """

    first_rows: torch.Tensor  # [S, C] row of the packed sequences, for each position of the first chunk
    first_exist: torch.Tensor  # [S, C] whether the sequence has it
    last_rows: torch.Tensor  # [S, C] the same for the chunk that the end falls into
    last_exist: torch.Tensor  # [S, C]
    has_bucket: torch.Tensor  # [S, M] whether a near bucket of the initial state holds anything
    seen: torch.Tensor  # [S, C, M] level of that bucket, seen from the rows of the first chunk
    lowest: int
    ends_row: torch.Tensor  # [S, D, C] whether that level of the final state holds that row
    ends_bucket: torch.Tensor  # [S, D, M] whether it holds that near bucket of the initial state
    end: torch.Tensor  # [S] position after the last token


def edges(bounds: torch.Tensor, positions: torch.Tensor | None, chunk: int, num_levels: int) -> Edges:
    """Edges of packed sequences (`bounds` [S + 1]) that start at `positions` [S] (None: at 0)."""
    shift, device = chunk_height(chunk), bounds.device
    bounds = bounds.long()
    lengths = bounds.diff()
    start = torch.zeros_like(lengths) if positions is None else positions
    end = start + lengths
    rows = torch.arange(chunk, device=device)
    limit = (bounds[-1] - 1).clamp(min=0)

    def chunk_of(position):
        first = (position >> shift) << shift
        at = first[:, None] + rows
        token = bounds[:-1, None] + at - start[:, None]
        return token.clamp(min=0).minimum(limit), (at >= start[:, None]) & (at < end[:, None])

    start_row, end_row = start & (chunk - 1), end & (chunk - 1)
    near = torch.arange(1, num_near_buckets(num_levels, shift) + 1, device=device)
    starts = bucket_start(start_row[:, None], near)
    has_bucket = is_right_half(start_row[:, None], near - 1)
    lowest, highest = min(1, num_levels - 1), min(num_levels - 1, shift)
    levels = torch.arange(lowest, highest + 1, device=device)
    first_rows, first_exist = chunk_of(start)
    last_rows, last_exist = chunk_of(end)
    stays = has_bucket & ((start >> shift) == (end >> shift))[:, None]
    return Edges(
        first_rows=first_rows, first_exist=first_exist, last_rows=last_rows, last_exist=last_exist,
        has_bucket=has_bucket, seen=level(rows[:, None], starts[:, None, :], num_levels), lowest=lowest,
        ends_row=(level(end_row[:, None, None], rows, num_levels) == levels[:, None]) & last_exist[:, None],
        ends_bucket=(level(end_row[:, None, None], starts[:, None], num_levels) == levels[:, None]) & stays[:, None],
        end=end,
    )  # fmt: skip
