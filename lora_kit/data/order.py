"""The examples and the random seeds of a step, as pure functions of the step.

The order of an epoch is a permutation that a Feistel network computes from (seed, epoch). Any position of it takes
constant time and nothing is stored, so resuming at step 1,000,000 is as cheap as at step 1. The orders of all epochs
form an endless sequence, and every step takes the next `batch_size` examples of it. The order does not
depend on the number of processes.

In a mixture, how often each source was chosen before a position is computed from the shares, rounded to whole numbers.
So the source of each position is known, every step has nearly the shares, and a longer run begins as a shorter one.
Each source has its own sequence of epochs and takes the next example of it at each of its positions.
"""

from collections.abc import Sequence

import numpy as np

from lora_kit.randomness import mix

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


def examples_at(positions: range, examples: int, seed: int) -> list[int]:
    """Return the examples at some positions of the endless sequence, in its order.

    Args:
        positions: The positions, e.g. those of a step.
        examples: The number of training examples.
        seed: The recipe's seed.
    """
    numbers = np.arange(positions.start, positions.stop, dtype=np.int64)
    result: list[int] = _in_epochs(numbers, examples, seed, 0).tolist()
    return result


def _in_epochs(numbers: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Return the examples at ascending positions of a sequence of epochs, int64 [positions].

    Args:
        numbers: The positions.
        size: The number of examples of an epoch.
        key: Selects, together with an epoch, its permutation.
    """
    epochs = numbers // size
    parts = [permute(numbers[epochs == epoch] % size, size, mix(*key, epoch)) for epoch in np.unique(epochs).tolist()]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def allotted(positions: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """Return how many of the first positions each source gets, for each of some numbers of positions.

    One source after the other, the largest share first, gets its part of the remaining positions, rounded to the
    nearest integer. So with each further position the count of exactly one source grows, by one, and counts are exact
    where the shares divide the positions.

    Args:
        positions: Numbers of positions, [n].
        shares: A positive integer for each source.

    Returns:
        The counts, int64 [sources, n].
    """
    total, most = sum(shares), int(positions.max(initial=0))
    rest = positions.astype(np.int64 if 2 * most * total + total < 1 << 63 else object)
    counts = np.zeros((len(shares), len(positions)), np.int64)
    for source in sorted(range(len(shares)), key=lambda source: -shares[source]):
        own = (2 * rest * shares[source] + total) // (2 * total)
        counts[source], rest, total = own, rest - own, total - shares[source]
    return counts


def mixed_examples_at(positions: range, sizes: Sequence[int], shares: Sequence[int], seed: int) -> list[int]:
    """Return the examples at some positions of a mixture, in their order.

    Args:
        positions: The positions, e.g. those of a step.
        sizes: The number of examples of each source; examples are numbered through all sources.
        shares: How often each source is chosen, relative to the others.
        seed: The recipe's seed.
    """
    before = allotted(np.arange(positions.start, positions.stop + 1), shares)
    sources = np.argmax(np.diff(before), axis=0)
    examples, first = np.empty(len(positions), np.int64), 0
    for source, size in enumerate(sizes):
        # positions in the source's sequence of epochs, which never ends
        numbers = before[source, :-1][sources == source]
        examples[sources == source] = first + _in_epochs(numbers, size, seed, 5, source)
        first += size
    result: list[int] = examples.tolist()
    return result
