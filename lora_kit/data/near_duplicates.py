"""Find near duplicates in a sample of examples, by MinHash (datasketch, which `lora_kit[check]` installs)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_kit.data.order import permute
from lora_kit.data.tokens import Tokens
from lora_kit.errors import InputError

SAMPLE = 50_000
WIDTH = 5  # tokens of a sequence; two examples are compared by their sets of such sequences
LIKE = 0.8  # near duplicates have at least this Jaccard similarity
LIKELY = 0.7  # threshold for candidates from MinHash; lower than `LIKE`, so that few near duplicates are missed
COMMON = 0.5  # a sequence in a larger share of the examples is ignored, e.g. that of a template or system message
PERMUTATIONS = 128


class NearDuplicates(NamedTuple):
    """Near duplicates in a sample.

    Attributes:
        sampled: The number of examples compared.
        pairs: The index of an earlier example and of its near duplicate, one pair for each near duplicate.
    """

    sampled: int
    pairs: tuple[tuple[int, int], ...]


def near_duplicates(parts: Sequence[Tokens], hashes: np.ndarray, *, sample: int = SAMPLE) -> NearDuplicates:
    """Return the near duplicates among the examples of several parts. Their indices count through all parts.

    Two examples are near duplicates if the Jaccard similarity of their sets of token sequences is at least `LIKE`.
    Common sequences, e.g. of the template, are ignored. Of equal examples only the first is compared, because
    `preflight` counts the others.

    Args:
        parts: The examples.
        hashes: The hashes of the examples of all parts, from `preflight.inspect`, uint64 [examples].
        sample: The largest number of examples to compare; more are sampled.

    Raises:
        InputError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise InputError("datasketch is not installed; pip install 'lora_kit[check]'") from error
    distinct = np.sort(np.unique(hashes, return_index=True)[1])
    chosen = np.sort(distinct[permute(np.arange(min(sample, len(distinct))), len(distinct), 0)])
    sequences = _without_common([_sequences(*_place(parts, int(index))) for index in chosen])
    empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    index_of, pairs = MinHashLSH(threshold=LIKELY, num_perm=PERMUTATIONS), []
    for place, (index, own) in enumerate(zip(chosen.tolist(), sequences, strict=True)):
        if not len(own):
            continue
        signature = empty.copy()
        signature.update_batch(own.tolist())
        alike = (other for other in sorted(index_of.query(signature)) if _similarity(own, sequences[other]) >= LIKE)
        if (earlier := next(alike, None)) is not None:
            pairs.append((int(chosen[earlier]), index))
        index_of.insert(place, signature, check_duplication=False)
    return NearDuplicates(len(chosen), tuple(pairs))


def _place(parts: Sequence[Tokens], index: int) -> tuple[Tokens, int]:
    for tokens in parts:
        if index < len(tokens):
            return tokens, index
        index -= len(tokens)
    raise IndexError


def _sequences(tokens: Tokens, index: int) -> np.ndarray:
    """Return the distinct hashes of all sequences of `WIDTH` tokens of an example, uint32, ascending."""
    ids = tokens.example(index)[0].astype(np.uint64)
    if len(ids) < WIDTH:
        return np.zeros(0, np.uint32)
    factors = np.random.default_rng(0).integers(1, 1 << 63, WIDTH, np.uint64) * np.uint64(2) + np.uint64(1)
    windows = np.lib.stride_tricks.sliding_window_view(ids, WIDTH)
    return np.unique(((windows * factors).sum(axis=1) >> np.uint64(32)).astype(np.uint32))


def _without_common(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the sequences of each example without the common sequences."""
    values, counts = np.unique(np.concatenate([np.zeros(0, np.uint32), *sequences]), return_counts=True)
    common = values[counts > max(10, COMMON * len(sequences))]
    return [own[~np.isin(own, common)] for own in sequences]


def _similarity(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
