"""Tokenise ranges of a source's records in child processes.

A child reads, converts, renders and tokenises a range of records. It returns arrays as the bytes of a safetensors file,
and the parent appends them to the arrays of the earlier ranges.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from safetensors.numpy import save

from lora_kit.data.formats import Completion, Example, Preference, to_example
from lora_kit.data.messages import Conversation, unknown_nulls
from lora_kit.data.remarks import NULLS, Remark
from lora_kit.data.rendering import Renderer
from lora_kit.data.sources import Records
from lora_kit.data.template import Tokenized, attempt, pieces, tokenize_all
from lora_kit.errors import DataError
from lora_kit.host import host_cores

BATCH, FIRST_BATCH = 512, 32  # records of a range; fewer in the first ranges, until lengths are known
BATCH_TOKENS = 1 << 20  # roughly the most tokens of a range; this limits the memory of children and parent
WORTH_A_CHILD = 1024  # records per child; a fork takes as long as a few hundred records
ARRAYS: dict[str, type[np.generic]] = {
    "kept": np.int64,  # the index of the record of each example
    "lengths": np.int64,  # the number of tokens of each example
    "chosen": np.int64,  # the number of its tokens that belong to the chosen side
    "ids": np.int32,  # the token ids of all examples
    "trained": np.bool_,  # whether each token is trained
}
"""The arrays that a child returns, and their types."""
TALLIES = ("dropped", "truncated", "emptied", "merged", "split", "bad", "raw", "labels")
"""The names of the counts; `labels` are the trained tokens without the first token of each example."""


def children(records: int) -> int:
    """Return the number of children that tokenise `records` records: one for few records, at most one per core."""
    return max(1, min(host_cores(), records // WORTH_A_CHILD))


@dataclass
class Range:
    """The result of tokenising a range of records.

    Attributes:
        records: The number of records.
        tokens: The number of tokens before any was dropped or cut.
        bad: The index of each record that cannot be used, and the error.
        overlong: The index of each record that is too long, its number of tokens, and which side of a pair has them.
        remarks: The index of each record with remarks, and its remarks.
        tallies: Counts by the names in TALLIES.
        arrays: The arrays by the names in ARRAYS, as lists of numbers or, if they have an element per token, of bytes.
    """

    records: int
    tokens: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    overlong: list[tuple[int, int, str]] = field(default_factory=list)
    remarks: list[tuple[int, tuple[Remark, ...]]] = field(default_factory=list)
    tallies: Counter[str] = field(default_factory=Counter)
    arrays: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in ARRAYS})

    def add(self, index: int, ids: Sequence[int], trained: Sequence[bool], chosen: int) -> None:
        """Add the example of record `index`; its first `chosen` tokens are the chosen side."""
        tokens, mask = np.array(ids, np.int32).tobytes(), bytes(trained)
        for name, value in zip(ARRAYS, (index, len(ids), chosen, tokens, mask), strict=True):
            self.arrays[name].append(value)
        self.tallies["labels"] += mask.count(1) - mask[0]

    def dump(self) -> bytes:
        """Return the result as the bytes of a safetensors file; the array `about` has all other attributes as JSON."""
        about = {name: value for name, value in vars(self).items() if name != "arrays"}
        arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for name, dtype in ARRAYS.items():
            parts = self.arrays[name]
            per_token = name in ("ids", "trained")
            arrays[name] = np.frombuffer(b"".join(parts), dtype) if per_token else np.array(parts, dtype)
        return save(arrays)


@dataclass(frozen=True)
class Tokenising:
    """The work of a child.

    Attributes:
        records: The records of the source.
        renderer: Tokenizer, template and stop token.
        format: The format of the records.
        columns: The recipe's `data.columns`.
        sequence_length: The recipe's `data.sequence_length`.
        overlong: The recipe's `data.overlong`.
        overlap: The recipe's `data.overlap`.
    """

    records: Records
    renderer: Renderer
    format: str
    columns: Mapping[str, str]
    sequence_length: int
    overlong: str
    overlap: int

    def __call__(self, request: bytes) -> list[bytes]:
        """Tokenise the records [start, stop), which are the request as JSON."""
        start, stop = json.loads(request)
        read = partial(to_example, format=self.format, columns=self.columns)
        examples = [attempt(read, record) for record in self.records.read(start, stop)]
        result = Range(stop - start)
        raw_sides = [_sides(example) for example in examples]
        tokenized = iter(tokenize_all([side for sides in raw_sides for side in sides if side], self.renderer))
        for index, raw in enumerate(raw_sides, start):
            sides = tuple(next(tokenized) if side else None for side in raw)
            try:
                self._add_record(index, raw, sides, result)
            except DataError as error:
                result.bad.append((index, str(error)))
        return [result.dump()]

    def _add_record(self, index: int, raw: "Sides", sides: "TokenizedSides", result: Range) -> None:
        """Add the examples of a record and the remarks on it.

        Raises:
            DataError: A side could not be tokenised, or both have the same tokens.
        """
        made = [side for side in sides if side is not None]
        for side in made:
            if isinstance(side, DataError):
                raise side
        chosen, rejected = sides
        if isinstance(chosen, Tokenized) and isinstance(rejected, Tokenized) and chosen.ids == rejected.ids:
            raise DataError("chosen and rejected have the same tokens, so the pair states no preference; remove it")
        before = len(result.arrays["kept"])
        self._add(index, sides, result)
        result.tallies["raw"] += isinstance(raw[0] or raw[1], Completion) * (len(result.arrays["kept"]) - before)
        remarks = [side.remarks for side in made if isinstance(side, Tokenized)] + [_nulls(side) for side in raw]
        if found := tuple(dict.fromkeys(remark for each in remarks for remark in each)):
            result.remarks.append((index, found))

    def _add(self, index: int, sides: "TokenizedSides", result: Range) -> None:
        made = [side for side in sides if isinstance(side, Tokenized)]
        limit, length = self.sequence_length, max(len(side.ids) for side in made)
        result.tokens += sum(len(side.ids) for side in made)
        if length > limit and self.overlong == "split" and self.format == "text":
            for piece in pieces(made[0], limit, self.overlap):
                result.add(index, piece.ids, piece.trained, len(piece.ids))
            result.tallies["split"] += 1
        elif length > limit and self.overlong in ("error", "split"):
            side = "" if len(made) == 1 else " of chosen" if len(made[0].ids) == length else " of rejected"
            result.overlong.append((index, length, side))
        elif length > limit and self.overlong == "drop":
            result.tallies["dropped"] += 1
        elif not all(any(side.trained[:limit]) for side in made):
            result.tallies["emptied"] += 1
        else:
            ids = [number for side in made for number in side.ids[:limit]]
            trained = [each for side in made for each in side.trained[:limit]]
            result.add(index, ids, trained, min(limit, len(made[0].ids)) if sides[0] else 0)
            result.tallies["truncated"] += length > limit
            result.tallies["merged"] += any(side.merged for side in made)


Sides = tuple[Example | DataError | None, Example | DataError | None]
"""An example and None, or the chosen and the rejected side; in place of the first an error."""
TokenizedSides = tuple[Tokenized | DataError | None, ...]


def _sides(example: Example | Preference | DataError) -> Sides:
    """Return the sides of a record; both have the remarks on the record."""
    if not isinstance(example, Preference):
        return example, None
    sides = (example.chosen, example.rejected)
    chosen, rejected = (side and replace(side, remarks=(*side.remarks, *example.remarks)) for side in sides)
    return chosen, rejected


def _nulls(example: Example | DataError | None) -> tuple[Remark, ...]:
    names = unknown_nulls(example.messages, example.tools) if isinstance(example, Conversation) else []
    return tuple(Remark(NULLS, name, "") for name in names)


class Pace:
    """Divides records into ranges of a suitable size, from the lengths seen so far. Results do not depend on it."""

    def __init__(self) -> None:
        self.records = self.tokens = 0  # done so far

    def note(self, records: int, tokens: int) -> None:
        """Add to the numbers of records and tokens that are done."""
        self.records += records
        self.tokens += tokens

    def ranges(self, count: int) -> Iterator[bytes]:
        """Yield the requests for all of `count` records."""
        start = 0
        while start < count:
            size = BATCH * BATCH_TOKENS // max(BATCH_TOKENS, BATCH * self.tokens // max(1, self.records))
            stop = min(count, start + (max(1, size) if self.records else FIRST_BATCH))
            yield json.dumps([start, stop]).encode()
            start = stop
