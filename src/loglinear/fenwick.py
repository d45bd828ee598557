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

# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


def in_same_block(t, s, height):
    """Whether positions `t` and `s` lie in the same aligned block of 2^height tokens (operators only: ints, tensors, kernels)."""
    return (t >> height) == (s >> height)


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
    return sum((~in_same_block(t, s, height) if torch.is_tensor(start) else not in_same_block(t, s, height))
               for height in range(num_levels - 1)) + start


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


def occupied(position, num_levels: int):
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


def chunk_height(chunk: int) -> int:
    """log2 of a chunk length, refusing anything that is not a power of two."""
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"a chunk length must be a power of two, got {chunk}")
    return chunk.bit_length() - 1


def chunk_for(length: int, largest: int = 64) -> int:
    """Chunk length for sequences of `length` tokens: `largest`, or the power of two that holds a shorter sequence."""
    return min(largest, 1 << (max(length, 1) - 1).bit_length())


# ---------------------------------------------------------------------------------------------------------------------
# The plan of the tree algorithm
# ---------------------------------------------------------------------------------------------------------------------

Index = slice | torch.Tensor  # where the entries are evenly spaced a slice is kept: it takes a view, not a copy

GROUP = 8  # neighbouring chunks that read the same node are multiplied with it together, this many at a time


@dataclass(frozen=True)
class Reads:
    """Chunks `chunks[i]` (a group of neighbours) all read node `nodes[i]`."""

    chunks: torch.Tensor  # [groups * size], chunk numbers, group by group
    nodes: torch.Tensor  # [groups]
    size: int


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
    row_of_slot: torch.Tensor | None  # [N * C] token in each row of the chunks; None: a plain reshape does it
    row_valid: torch.Tensor | None  # [N * C] whether the row exists
    slot_of_row: torch.Tensor | None  # [tokens], the inverse
    chunks_per_sequence: int | None  # for the plain reshape
    leaves: Index  # chunks that are complete, i.e. nodes of height 0
    merges: tuple[Merge, ...]  # height j to j + 1, j = 0 …
    reads: tuple[tuple[Reads, ...], ...]  # one entry per height below tree_heights
    scan_merges: tuple[Merge, ...]
    scan_steps: tuple[ScanStep, ...]  # from the top down
    last_reads: tuple[Reads, ...]
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

    # -- indices ------------------------------------------------------------------------------------------------------
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
        """Index of the absolute node `number`; one that ends where the sequence starts is a bucket of the initial state."""
        counts = self.node_counts(height)
        relative = number - (self.first >> height)[owner]
        return np.where(relative >= 0, _exclusive_sum(counts)[owner] + relative, counts.sum() + owner)

    def grouped(self, chunks: np.ndarray, nodes: np.ndarray) -> tuple[Reads, ...]:
        """Split reads into groups of GROUP neighbouring chunks with the same node, and single ones for the rest."""
        if not len(chunks):
            return ()
        starts = np.flatnonzero(np.concatenate([[True], np.diff(nodes) != 0]))
        run = np.diff(np.concatenate([starts, [len(nodes)]]))
        owner, local = _ragged(run)
        in_group = local < (run - run % GROUP)[owner]
        parts = []
        for mask, size in ((in_group, GROUP), (~in_group, 1)):
            if mask.any():
                parts.append(Reads(self.tensor(chunks[mask]), self.tensor(nodes[mask][::size]), size))
        return tuple(parts)

    # -- the tree -----------------------------------------------------------------------------------------------------
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
            reads=tuple(self.tree_reads(height) for height in range(heights)),
            scan_merges=scan.get("merges", ()), scan_steps=scan.get("steps", ()), last_reads=scan.get("reads", ()),
            end_last=scan.get("end", nothing),
            **self.rows(), **self.ends(heights),
        )  # fmt: skip

    def merge(self, height: int) -> Merge:
        owner, local = _ragged(self.node_counts(height + 1))
        number = (self.first >> (height + 1))[owner] + local
        return Merge(self.index(self.node(height, owner, 2 * number)), self.index(self.node(height, owner, 2 * number + 1)))

    def tree_reads(self, height: int) -> tuple[Reads, ...]:
        chunks = np.flatnonzero(is_right_half(self.block, height))
        return self.grouped(chunks, self.node(height, self.owner[chunks], left_sibling(self.block[chunks], height)))

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
        reads = self.grouped(chunks, entering(0, self.owner[chunks], block[chunks]))
        end = entering(0, np.arange(len(self.start)), self.node_counts(self.cap_height))
        return {"steps": tuple(steps), "merges": tuple(merges), "reads": reads, "end": self.tensor(end)}

    # -- rows and ends ------------------------------------------------------------------------------------------------
    def rows(self) -> dict[str, Any]:
        uniform = len(set(self.lengths.tolist())) <= 1 and not (self.start & (self.chunk - 1)).any()
        if uniform and len(self.block):
            return {"row_of_slot": None, "row_valid": None, "slot_of_row": None,
                    "chunks_per_sequence": int(self.counts[0])}  # fmt: skip
        position = (self.block[:, None] << self.height) + np.arange(self.chunk)
        valid = (position >= self.start[self.owner, None]) & (position < self.end[self.owner, None])
        offset = _exclusive_sum(self.lengths) - self.start
        row = np.where(valid, position + offset[self.owner, None], 0).ravel()
        slot = np.empty(int(self.lengths.sum()), np.int64)
        slot[row[valid.ravel()]] = np.flatnonzero(valid.ravel())
        return {"row_of_slot": self.tensor(row), "row_valid": self.tensor(valid.ravel()),
                "slot_of_row": self.tensor(slot), "chunks_per_sequence": None}  # fmt: skip

    def ends(self, heights: int) -> dict[str, Any]:
        sequences = np.arange(len(self.start))
        rows = np.arange(self.chunk)
        near = np.arange(1, num_near_buckets(self.num_levels, self.height) + 1)
        has_tokens = self.lengths > 0
        has_partial = has_tokens & ((self.end & (self.chunk - 1)) > 0)
        first_chunk = np.where(has_tokens, self.base, 0)
        # positions within the chunk are enough: whatever is compared here lies in one chunk
        start, end = self.start & (self.chunk - 1), self.end & (self.chunk - 1)
        starts = torch.from_numpy(bucket_start(start[:, None], near))
        return {
            "first_chunk": self.tensor(first_chunk), "has_tokens": self.tensor(has_tokens),
            "partial_chunk": self.tensor(np.where(has_partial, self.base + self.counts - 1, 0)),
            "has_partial": self.tensor(has_partial),
            "stays_in_chunk": self.tensor(self.first == self.stop),
            "near_start_level": level(torch.from_numpy(rows)[:, None], starts[:, None, :], self.num_levels).to(self.device),
            "near_end_level": level(torch.from_numpy(end)[:, None], starts, self.num_levels).to(self.device),
            "end_row_level": level(torch.from_numpy(end)[:, None], torch.from_numpy(rows), self.num_levels).to(self.device),
            "end_nodes": tuple(
                self.tensor(np.where(is_right_half(self.stop, j), self.node(j, sequences, left_sibling(self.stop, j)), 0))
                for j in range(heights)),
            "end_used": tuple(self.tensor(is_right_half(self.stop, j)) for j in range(heights)),
        }  # fmt: skip


@functools.lru_cache(maxsize=64)
def _cached_plan(lengths, positions, chunk, num_levels, has_state, device) -> Plan:
    with torch.inference_mode(False):
        return _Planner(lengths, positions, chunk, num_levels, has_state, device).build()


def plan(lengths: Sequence[int], positions: Sequence[int] | None, chunk: int, num_levels: int, device) -> Plan:
    """Plan for sequences of the given lengths; `positions` are where they start when states are carried in, else None."""
    start = tuple(positions) if positions is not None else (0,) * len(lengths)
    return _cached_plan(tuple(lengths), start, chunk, num_levels, positions is not None, torch.device(device))


def chunk_levels(chunk: int, num_levels: int, device=None) -> torch.Tensor:
    """Levels [C, C] of the source rows (columns) seen from the target rows of one chunk; what is not causal is 0."""
    rows = torch.arange(chunk, device=device)
    return level(rows[:, None], rows[None, :], num_levels).tril()
