"""The examples and the random seeds of a step, as pure functions of the step.

The order of an epoch is a permutation that a Feistel network computes from (seed, epoch). Any position of it takes
constant time and nothing is stored, so resuming at step 1,000,000 is as cheap as at step 1. The orders of all epochs
form an endless sequence, and every step takes the next `batch_size` examples of it. The order does not
depend on the number of processes.

A mixture divides the sequence into blocks of 1,000 positions. How many of them each source gets is computed from the
shares, so that the counts of the whole run are exact. A permutation of the block says which positions they are. Each
source has its own sequence of epochs and takes the next example of it at each of its positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lora_kit.randomness import mix

BLOCK = 1000  # positions of a mixture in which each source has a fixed number of examples
ROUNDS = 6  # four rounds already pass the statistical tests; two more cost nothing


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Return the torch seed for a micro-batch; it does not depend on the process that computes it."""
    return mix(seed, 1, step, index) >> 1  # torch takes 63 bits


def permute(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Apply a pseudo-random permutation of range(count) to some positions.

    Args:
        positions: Integers in range(count).
        count: The size of the permuted range.
        key: Selects the permutation.

    Returns:
        The permuted positions, int64, in the same order.

    Source: Luby and Rackoff 1988 (Feistel network); Black and Rogaway 2002 (cycle walking into a smaller range).
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = [np.uint64(mix(key, 2, number)) for number in range(ROUNDS)]
    result = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := result >= count).any():
        result[outside] = _feistel(result[outside], half_bits, keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: Sequence[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return (left << shift) | right


def _scramble(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def examples_of_step(step: int, *, batch_size: int, examples: int, total: int, seed: int) -> list[int]:
    """Return the examples of a step: positions [step * batch_size, (step + 1) * batch_size) of the endless sequence.

    Args:
        step: The optimizer step, counted from 0.
        batch_size: Examples per step, over all processes.
        examples: The number of training examples.
        total: The number of examples of the whole run, where the last step ends.
        seed: The recipe's seed.

    Returns:
        The indices of the examples, in the order of the sequence.
    """
    positions = np.arange(step * batch_size, min((step + 1) * batch_size, total), dtype=np.int64)
    result: list[int] = []
    for epoch in np.unique(positions // examples).tolist():
        inside = positions[positions // examples == epoch] - epoch * examples
        result += permute(inside, examples, mix(seed, 0, epoch)).tolist()
    return result


@dataclass(frozen=True)
class Mixture:
    """Several sources of training examples, and how often each is chosen.

    Attributes:
        sizes: The number of examples of each source; examples are numbered through all sources.
        shares: How often each source is chosen, relative to the others.
        cycle: A block ends at every multiple of this number of positions, so that the counts are exact there.
    """

    sizes: tuple[int, ...]
    shares: tuple[int, ...]
    cycle: int


def allotted(positions: int, shares: Sequence[int]) -> np.ndarray:
    """Return how many of the first positions each source gets, int64 [sources].

    One source after the other, the largest share first, gets its part of the remaining positions, rounded to the
    nearest integer. So no count falls when positions are added, and counts are exact where the shares divide the
    positions.

    Args:
        positions: The number of positions.
        shares: A positive integer for each source.
    """
    counts, total = [0] * len(shares), sum(shares)
    for source in sorted(range(len(shares)), key=lambda source: -shares[source]):
        counts[source] = (2 * positions * shares[source] + total) // (2 * total)
        positions, total = positions - counts[source], total - shares[source]
    return np.array(counts, np.int64)


def mixed_examples_of_step(step: int, *, batch_size: int, mixture: Mixture, total: int, seed: int) -> list[int]:
    """Return the examples of a step of a mixture; `examples_of_step` explains the other arguments.

    A block ends after `BLOCK` positions, at the end of a cycle, or at the end of the run.
    """
    position, stop = step * batch_size, min((step + 1) * batch_size, total)
    result: list[int] = []
    while position < stop:
        inside = position % mixture.cycle
        start = position - inside % BLOCK
        end = min(start + BLOCK, position - inside + mixture.cycle, total)
        result += _examples_of_block(start, end, mixture, seed)[position - start : stop - start].tolist()
        position = end
    return result


@lru_cache(maxsize=4)  # consecutive steps take positions of the same block
def _examples_of_block(start: int, end: int, mixture: Mixture, seed: int) -> np.ndarray:
    """Return the examples at the positions [start, end) of a block, int64 [end - start]."""
    before, after = allotted(start, mixture.shares), allotted(end, mixture.shares)
    in_order = np.repeat(np.arange(len(before)), after - before)
    sources = in_order[permute(np.arange(end - start), end - start, mix(seed, 4, start))]
    examples, first = np.empty(end - start, np.int64), 0
    for source, size in enumerate(mixture.sizes):
        numbers = np.arange(before[source], after[source])  # in the endless sequence of the source's epochs
        order = [
            permute(numbers[numbers // size == epoch] % size, size, mix(seed, 5, source, epoch))
            for epoch in np.unique(numbers // size).tolist()
        ]
        examples[sources == source] = first + np.concatenate([np.zeros(0, np.int64), *order])
        first += size
    return examples
