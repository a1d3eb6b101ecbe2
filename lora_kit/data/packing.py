"""Pack a step's examples into micro-batches, and define the order in which their gradients are summed.

Both depend only on the lengths of the examples, not on the number of processes. This is why one, two or eight processes
compute the same bits. A micro-batch holds at most `micro_batch_tokens` tokens: either examples packed end to end
without padding or, for a model whose attention would leak between packed examples, one row per example, padded to the
longest. Packed, a pair of sequences may be one example that forks: their common beginning, the rest of the first, the
rest of the second.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from lora_kit.data.tokens import Tokens

IGNORE = -100
"""The label of an untrained position, as in torch and transformers."""

TOKEN_COST = 2048  # an example of length l costs l^2 for attention and about 2,048 l for the rest, at usual widths


class Fork(NamedTuple):
    """Where a pair of sequences with a common beginning forks.

    Attributes:
        shared: The number of tokens of the beginning.
        second: Where the rest of the second sequence begins, counted from the beginning.
        label: The label of the last token of the beginning in the second sequence.
    """

    shared: int
    second: int
    label: int


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass. Arrays are int64 [rows, length]; a packed micro-batch has one row.

    Attributes:
        ids: Token ids.
        labels: At each position the id of the next token if it is trained, otherwise IGNORE (so already shifted).
        position_ids: Positions, which restart at 0 with each example, and where it forks with the second branch.
        attention_mask: 1 for tokens and 0 for padding; None if packed.
        segments: The lengths of the examples, in order; both sides of a pair have a length of their own, unless they
            fork.
        sources: The index of the source of each example; empty if nothing is measured for each source.
        sides: The index in `sequences` of the chosen and of the rejected side of each example, or -1 without such a
            side, int64 [examples, 2]; None if the data has no preferences.
        reference: The rows of `Tokens.reference` of the examples.
        forks: Where each segment forks, None for a segment that does not; empty if no segment forks.
    """

    ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray | None
    segments: tuple[int, ...]
    sources: tuple[int, ...] = ()
    sides: np.ndarray | None = None
    reference: np.ndarray | None = None
    forks: tuple[Fork | None, ...] = ()

    @property
    def weight(self) -> int:
        """The number of trained tokens."""
        return int((self.labels != IGNORE).sum())

    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the trained positions of the flattened rows, and their labels, of each sequence.

        A segment that forks is two sequences. A trained position that both share is in both, perhaps with two labels.
        """
        found, labels, start = [], self.labels.reshape(-1), 0
        for length, fork in zip_longest(self.segments, self.forks):
            width = length if self.attention_mask is None else self.ids.shape[1]
            places, own = np.arange(start, start + width), labels[start : start + width]
            if fork is None:
                found.append((places, own))
            else:
                found.append((places[: fork.second], own[: fork.second]))
                last, rest = slice(max(0, fork.shared - 1), fork.shared), slice(fork.second, None)
                other = np.concatenate([own[: last.start], np.full(fork.shared, fork.label)[last], own[rest]])
                found.append((np.concatenate([places[: fork.shared], places[rest]]), other))
            start += width
        return [(places[own != IGNORE], own[own != IGNORE]) for places, own in found]

    def by_source(self, positions: np.ndarray, count: int) -> list[np.ndarray]:
        """Return positions of the flattened rows as one array for each of `count` sources, in the same order."""
        rows = self.segments[: len(self.sources)] if self.attention_mask is None else self.ids.shape[1]
        owners = np.repeat(np.array(self.sources), rows)[positions]
        return [positions[owners == source] for source in range(count)]


def cost(lengths: Sequence[int]) -> int:
    """Return the estimated time of a micro-batch with examples of these lengths, in arbitrary units."""
    return sum(length * (TOKEN_COST + length) for length in lengths)


class Split(Protocol):
    """A function that groups a step's examples into micro-batches, such as `pack`."""

    def __call__(self, lengths: Sequence[int], micro_batch_tokens: int, *, padded: bool = False) -> list[list[int]]:
        """Return the indices into `lengths` of each micro-batch."""


def pack(lengths: Sequence[int], micro_batch_tokens: int, *, padded: bool = False) -> list[list[int]]:
    """Group a step's examples into micro-batches by best-fit decreasing, the most expensive micro-batch first.

    Args:
        lengths: The number of tokens of each example, at most `micro_batch_tokens`.
        micro_batch_tokens: The maximum number of tokens in a micro-batch, padding included.
        padded: Whether each example is a row that is padded to the longest.

    Returns:
        For each micro-batch the indices into `lengths`, ascending.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, group) of every group, ascending
    for index in longest_first:
        place = bisect_left(spaces, (lengths[index], -1))
        if place < len(spaces):
            free, group = spaces.pop(place)
        else:
            row = lengths[index] if padded else 1
            free, group = micro_batch_tokens // row * row, len(groups)
            groups.append([])
        groups[group].append(index)
        # a padded row has the length of the first example of its group, which is the longest
        insort(spaces, (free - lengths[groups[group][0] if padded else index], group))
    for group_members in groups:
        group_members.sort()
    return sorted(groups, key=lambda members: (-cost([lengths[index] for index in members]), members[0]))


def collate(tokens: Tokens, members: Sequence[int], *, padded: bool, sources: tuple[int, ...] = ()) -> MicroBatch:
    """Build a micro-batch.

    Args:
        tokens: All examples.
        members: The indices of the examples of the micro-batch.
        padded: Whether each example is a row that is padded to the longest; otherwise all are packed into one row.
            Each side of a pair is a row. Packed, the sides of a pair fork if `tokens.share`.
        sources: The source of each member, to measure each source.
    """
    rows, forks = list[Row](), list[Fork | None]()
    for index in members:
        sides = [_row(*side) for side in tokens.sides(index)]
        if tokens.share and not padded and len(sides) == 2:
            row, fork = _forked(sides[0], sides[1], tokens.shared(index))
            rows.append(row)
            forks.append(fork)
        else:
            rows += sides
            forks += [None] * len(sides)
    segments = tuple(len(ids) for ids, _, _ in rows)
    places, reference = None, None if tokens.reference is None else tokens.reference[list(members)]
    if tokens.chosen is not None:
        present = tokens.side_lengths(members) > 0
        places = np.where(present, np.cumsum(present).reshape(present.shape) - 1, -1)
    if not padded:
        ids, labels, position_ids = (np.concatenate(parts)[None] for parts in zip(*rows, strict=True))
        where = tuple(forks) if any(forks) else ()
        return MicroBatch(ids, labels, position_ids, None, segments, sources, places, reference, where)
    longest = max(segments)
    ids, labels, position_ids = (
        np.stack([np.pad(part, (0, longest - len(part)), constant_values=fill) for part in parts])
        for parts, fill in zip(zip(*rows, strict=True), (0, IGNORE, 0), strict=True)
    )
    mask = (np.arange(longest) < np.array(segments)[:, None]).astype(np.int64)
    return MicroBatch(ids, labels, position_ids, mask, segments, sources, places, reference)


Row = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The ids, labels and position ids of an example."""


def _forked(first: Row, second: Row, shared: int) -> tuple[Row, Fork]:
    """Return two sequences as one that forks after `shared` tokens."""
    ids, labels, position_ids = (
        np.concatenate([one, other[shared:]]) for one, other in zip(first, second, strict=True)
    )
    label = int(second[1][shared - 1]) if shared else IGNORE
    return (ids, labels, position_ids), Fork(shared, len(first[0]), label)


def _row(ids: np.ndarray, trained: np.ndarray) -> Row:
    """Return the ids, labels and position ids of an example."""
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE)
    return ids.astype(np.int64), labels, np.arange(len(ids), dtype=np.int64)


def reduction_schedule(count: int) -> list[tuple[int, int]]:
    """Return the order in which a process computes its micro-batches and sums their gradients.

    The order is fixed because floating-point addition is not associative. The gradients of a list m of micro-batches
    are summed by the binary tree T(m) = T(m[0::2]) + T(m[1::2]), so that each of 2^k processes computes a subtree.

    Args:
        count: The number of micro-batches of this process.

    Returns:
        Pairs (index, merges) for a stack of partial sums: compute the gradient of micro-batch `index`, add the last
        `merges` sums of the stack to it, newest first, and push the result. The stack holds at most log2(count) + 1
        sums.
    """

    def visit(indices: range, merges: int) -> list[tuple[int, int]]:
        if len(indices) == 1:
            return [(indices[0], merges)]
        return visit(indices[0::2], 0) + visit(indices[1::2], merges + 1)

    return visit(range(count), 0) if count else []
