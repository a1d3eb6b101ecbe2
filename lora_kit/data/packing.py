"""How a step's examples become micro-batches, and in which order their gradients are summed.

Both depend on the lengths alone, never on the number of processes: that is why one, two or eight processes compute the
same bits. A micro-batch holds at most `micro_batch_tokens` tokens, either packed end to end (no padding) or, for a
model that would leak between packed examples, as rows padded to the longest.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lora_kit.data.tokens import Tokens

IGNORE = -100
"""The label of a position that is not trained, as in transformers and torch."""

COST_OF_A_TOKEN = 2048  # attention costs l^2 and the rest about 2,048 l at the widths that people fine-tune


@dataclass(frozen=True)
class MicroBatch:
    """What one process holds at once. Arrays are [rows, length]; packed micro-batches have one row.

    Attributes:
        ids: Token ids.
        labels: The next token where it is trained, IGNORE elsewhere: already shifted.
        position_ids: Positions, restarting at 0 with each example.
        attention_mask: None when packed; 1 on real tokens and 0 on padding when padded.
        segments: The lengths of the examples, in order.
    """

    ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray | None
    segments: tuple[int, ...]

    @property
    def weight(self) -> int:
        """The number of trained tokens."""
        return int((self.labels != IGNORE).sum())


def cost(lengths: Sequence[int]) -> int:
    """Return the relative time of a micro-batch with examples of these lengths."""
    return sum(length * (COST_OF_A_TOKEN + length) for length in lengths)


class Split(Protocol):
    """A function that groups a step's examples into micro-batches; `pack` is one."""

    def __call__(self, lengths: Sequence[int], micro_batch_tokens: int, *, padded: bool = False) -> list[list[int]]:
        """Return the indices into `lengths` of each micro-batch."""


def pack(lengths: Sequence[int], micro_batch_tokens: int, *, padded: bool = False) -> list[list[int]]:
    """Group a step's examples into micro-batches, the most expensive first.

    Args:
        lengths: Tokens of each example, none above `micro_batch_tokens`.
        micro_batch_tokens: The most tokens (padding included) a micro-batch may hold.
        padded: Count a micro-batch as rows times its longest row.

    Returns:
        For each micro-batch the indices into `lengths`, ascending.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens still free, group), ascending
    for index in longest_first:
        place = bisect_left(rooms, (lengths[index], -1))
        if place < len(rooms):
            room, group = rooms.pop(place)
        else:
            row = lengths[index] if padded else 1
            room, group = micro_batch_tokens // row * row, len(groups)
            groups.append([])
        groups[group].append(index)
        # a padded row is as long as its group's first, which is the longest
        insort(rooms, (room - lengths[groups[group][0] if padded else index], group))
    for group_members in groups:
        group_members.sort()
    return sorted(groups, key=lambda members: (-cost([lengths[index] for index in members]), members[0]))


def collate(tokens: Tokens, members: Sequence[int], *, padded: bool) -> MicroBatch:
    """Build the micro-batch of the examples `members` of `tokens`."""
    rows = [_row(*tokens.example(index)) for index in members]
    segments = tuple(len(ids) for ids, _, _ in rows)
    if not padded:
        ids, labels, position_ids = (np.concatenate(parts)[None] for parts in zip(*rows, strict=True))
        return MicroBatch(ids, labels, position_ids, None, segments)
    longest = max(segments)
    ids, labels, position_ids = (
        np.stack([np.pad(part, (0, longest - len(part)), constant_values=fill) for part in parts])
        for parts, fill in zip(zip(*rows, strict=True), (0, IGNORE, 0), strict=True)
    )
    mask = (np.arange(longest) < np.array(segments)[:, None]).astype(np.int64)
    return MicroBatch(ids, labels, position_ids, mask, segments)


def _row(ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE)
    return ids.astype(np.int64), labels, np.arange(len(ids), dtype=np.int64)


def reduction_schedule(count: int) -> list[tuple[int, int]]:
    """Return the order in which a process visits its micro-batches and how it sums their gradients.

    The sum is the fixed binary tree T(m) = T(m[0::2]) + T(m[1::2]); an absent leaf is skipped. Each entry is (index,
    merges): after computing micro-batch `index`, add the last `merges` partial sums of the stack to it, newest first,
    and push the result. The stack never holds more than log2(count) + 1 sums.
    """

    def visit(indices: range, merges: int) -> list[tuple[int, int]]:
        if len(indices) == 1:
            return [(indices[0], merges)]
        return visit(indices[0::2], 0) + visit(indices[1::2], merges + 1)

    return visit(range(count), 0) if count else []
