"""Which examples a step trains on, and which random numbers it draws: pure functions of the step.

An epoch is a permutation of the examples that a Feistel network computes from (seed, epoch): any position is found in
constant time and nothing is stored, so resuming at step 1,000,000 costs what resuming at step 1 costs. Steps read the
endless concatenation of the epochs' permutations, `batch_size` positions each, however many processes there are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_kit.randomness import mix

ROUNDS = 6  # four rounds already pass the statistical tests; two more cost nothing


class Position(NamedTuple):
    """One place in the endless sequence of examples."""

    epoch: int
    example: int


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Return the generator's seed for one micro-batch, whichever process runs it."""
    return mix(seed, 1, step, index) >> 1  # torch takes 63 bits


def permute(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Return where a permutation of range(count), chosen by `key`, sends each position (int64).

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


def total_examples(examples: int, *, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """Return how many examples the whole run trains on, counting each epoch's visit."""
    if steps is not None:
        return steps * batch_size
    assert epochs is not None
    return max(1, round(epochs * examples))


def total_steps(total: int, batch_size: int) -> int:
    """Return the number of optimizer steps that `total` examples make; the last may be short."""
    return math.ceil(total / batch_size)


def examples_of_step(step: int, *, batch_size: int, examples: int, total: int, seed: int) -> list[Position]:
    """Return what step `step` (from 0) trains on: positions [step*B, (step+1)*B) of the endless sequence.

    Args:
        step: The optimizer step, counted from 0.
        batch_size: Examples a step, over all processes.
        examples: N, the number of examples after drops.
        total: Where the run ends, in examples; the last step is cut there.
        seed: The recipe's seed.
    """
    wanted = np.arange(step * batch_size, min((step + 1) * batch_size, total), dtype=np.int64)
    found: list[Position] = []
    for epoch in np.unique(wanted // examples).tolist():
        inside = wanted[wanted // examples == epoch] - epoch * examples
        order = permute(inside, examples, mix(seed, 0, epoch))
        found.extend(Position(epoch, example) for example in order.tolist())
    return found
