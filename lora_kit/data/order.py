"""The examples and the random seeds of a step, as pure functions of the step.

The order of an epoch is a permutation that a Feistel network computes from (seed, epoch). Any position of it takes
constant time and nothing is stored, so resuming at step 1,000,000 is as cheap as at step 1. The orders of all epochs
form an endless sequence, and every step takes the next `batch_size` examples of it. The order does not
depend on the number of processes.
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
