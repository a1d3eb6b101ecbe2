"""Tokenise a recipe's data into three flat arrays.

All data is tokenised before the first step. Therefore every problem of the data can be reported at once, and the number
of examples, which determines their order, is known.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.data import sandbox, sources
from lora_kit.data.counts import Counts, DataCounts
from lora_kit.data.formats import detect, to_example
from lora_kit.data.rendering import RENDERED_DATE, Renderer, check_renderer
from lora_kit.data.sources import Records
from lora_kit.data.template import Prompt, attempt, prompt, tokenize_all
from lora_kit.errors import DataError

if TYPE_CHECKING:
    from lora_kit.recipe.schema import Data

BATCH = 512  # examples that are rendered and tokenised together
MAX_SHOWN = 20  # problems listed in an error
CONVERSATIONS = ("messages", "sharegpt", "alpaca")  # formats that always need a chat template


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised examples.

    Attributes:
        ids: The token ids of all examples, concatenated, int32 [tokens].
        trained: Whether each token is trained, bool [tokens]. The first token of an example is ignored.
        offsets: Where each example begins, and where the last ends, int64 [examples + 1].
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def of(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Tokens":
        """Concatenate examples, each a pair (ids, trained)."""
        offsets = np.cumsum([0, *(len(ids) for ids, _ in examples)], dtype=np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in examples)])
        trained = np.concatenate([np.zeros(0, np.bool_), *(trained for _, trained in examples)])
        return Tokens(ids.astype(np.int32), trained, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, int64 [examples]."""
        return np.diff(self.offsets)

    @property
    def labels(self) -> np.ndarray:
        """The ids of all trained tokens, int32 [trained tokens]."""
        counted = self.trained.copy()
        counted[self.offsets[:-1]] = False
        return self.ids[counted]

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of an example, and whether each of them is trained."""
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[tokens], self.trained[tokens]

    def weight(self, index: int) -> int:
        """Return the number of trained tokens of an example."""
        return int(self.example(index)[1][1:].sum())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the three arrays, as hexadecimal digits."""
        digest = hashlib.sha256()
        for name, array in vars(self).items():
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A recipe's tokenised data.

    Attributes:
        train: The training examples.
        validation: The validation examples; None if the recipe has no validation data.
        prompts: Prompts of the first validation examples, with the expected answers.
        counts: The statistics of the training and the validation examples.
        notes: Warnings for the user.
    """

    train: Tokens
    validation: Tokens | None
    prompts: tuple[Prompt, ...]
    counts: DataCounts
    notes: tuple[str, ...]


def check_context(data: Prepared, context: int | None) -> None:
    """Refuse examples that are longer than the context of the base.

    Args:
        data: The training and validation examples.
        context: The number of positions of the base; None if its configuration does not say it.

    Raises:
        DataError: An example is too long; the message names the longest example and the limit.
    """
    longest = max(int(tokens.lengths.max()) for tokens in (data.train, data.validation) if tokens)
    if context and longest > context:
        raise DataError(
            f"data.sequence_length: the longest example has {longest:,} tokens, the base was made for {context:,}; "
            f"set data.sequence_length={context} and data.overlong to drop or truncate"
        )


Problem = tuple[Records, int, str]
"""The records, the index of one of them, and what is wrong with it. Its file and line are looked up only if shown."""


@dataclass(frozen=True)
class _Tokenised:
    """The tokenised examples of a source, and the index of the record of each example."""

    records: Records
    tokens: Tokens
    kept: list[int]
    counts: Counts


def prepare(data: "Data", renderer: Renderer, *, base_dir: Path, seed: int, prompts: int = 0) -> Prepared:
    """Read, render and tokenise the data of a recipe.

    Args:
        data: The recipe's section.
        renderer: Tokenizer, template and stop token.
        base_dir: The recipe's folder, where relative paths start.
        seed: Selects the examples that a validation fraction holds out.
        prompts: The number of validation examples to prepare as prompts for generation.

    Raises:
        DataError: A source cannot be read, no example is left, or records have problems; the first 20 are listed.
        BaseError: The tokenizer is not a fast tokenizer, or does not have the stop token.
    """
    check_renderer(renderer)
    sandbox.check_template(renderer)
    opened = _open(data, base_dir, seed)
    if prompts and len(opened) == 1:
        raise DataError(
            f"evaluate.generate is {prompts}, but there is no validation data to answer; set data.validation"
        )
    problems: list[Problem] = []
    try:
        results = [_tokenise(records, data, renderer, problems) for records in opened]
    finally:
        sandbox.close()
    if problems:
        lines = [f"{records.where(index)}: {message}" for records, index, message in problems[:MAX_SHOWN]]
        if len(problems) > MAX_SHOWN:
            lines.append(f"and {len(problems) - MAX_SHOWN:,} more problems of {len(problems):,}")
        raise DataError("\n".join(lines))
    for result in results:
        if not result.kept:
            raise DataError(
                f"{result.records.name}: all {len(result.records)} records are longer than data.sequence_length "
                f"({data.sequence_length}); raise it"
            )
    notes = tuple(_notes(results, renderer))
    train = results[0]
    if len(results) == 1:
        return Prepared(train.tokens, None, (), DataCounts(train.counts, None), notes)
    validation = results[1]
    counts = DataCounts(train.counts, validation.counts)
    return Prepared(train.tokens, validation.tokens, _prompts(validation, data, renderer, prompts), counts, notes)


def _open(data: "Data", base_dir: Path, seed: int) -> tuple[Records, ...]:
    """Open the training data and, if the recipe has any, the validation data."""
    train = sources.load(data.train, base_dir=base_dir, max_examples=data.max_examples)
    if data.validation is None:
        return (train,)
    if isinstance(data.validation, str):
        return train, sources.load(data.validation, base_dir=base_dir)
    return sources.split(train, data.validation, seed)


def _tokenise(records: Records, data: "Data", renderer: Renderer, problems: list[Problem]) -> _Tokenised:
    """Tokenise records, and append the problems of records to `problems`.

    Raises:
        DataError: The columns match no format, or conversations have no chat template.
    """
    format = _format(records, data)
    if format in CONVERSATIONS:
        _ = renderer.chat_template  # if there is none, raise once and not for every record
    read, limit = partial(to_example, format=format, columns=data.columns), data.sequence_length
    kept: list[int] = []
    examples: list[tuple[np.ndarray, np.ndarray]] = []  # arrays, because lists take ten times the memory
    tallies = {"dropped": 0, "truncated": 0, "emptied": 0, "merged": 0}
    for start in range(0, len(records), BATCH):
        batch = [attempt(read, record) for record in records.read(start, start + BATCH)]
        for index, example in enumerate(tokenize_all(batch, renderer), start):
            if isinstance(example, DataError):
                problems.append((records, index, str(example)))
            elif len(example.ids) > limit and data.overlong == "error":
                found = f"{len(example.ids):,} tokens are more than data.sequence_length ({limit:,})"
                problems.append((records, index, f"{found}; raise it, or set data.overlong to drop or truncate"))
            elif len(example.ids) > limit and data.overlong == "drop":
                tallies["dropped"] += 1
            elif not any(example.trained[:limit]):
                tallies["emptied"] += 1
            else:
                kept.append(index)
                examples.append((np.array(example.ids[:limit], np.int32), np.array(example.trained[:limit], np.bool_)))
                tallies["truncated"] += len(example.ids) > limit
                tallies["merged"] += example.merged
    tokens = Tokens.of(examples)
    labels, total = len(tokens.labels), len(tokens.ids)
    counts = Counts(
        format=format,
        examples=len(tokens),
        tokens=total,
        trained_tokens=labels,
        trained_share=round(labels / max(1, total), 4),
        longest=int(max(tokens.lengths, default=0)),
        duplicates=len(tokens) - len(_distinct(tokens)),
        **tallies,
    )
    return _Tokenised(records, tokens, kept, counts)


def _format(records: Records, data: "Data") -> str:
    columns = records.columns
    if not columns:  # no record can be read; every record will report its own error
        return data.format or "messages"
    try:
        return detect(columns, data.columns, named=data.format)
    except DataError as error:
        raise DataError(f"{records.name}: {error}") from error


def _distinct(tokens: Tokens) -> set[bytes]:
    """Return the hashes of the examples; duplicates count once."""
    examples = (tokens.example(index) for index in range(len(tokens)))
    return {hashlib.blake2b(ids.tobytes() + trained.tobytes()).digest() for ids, trained in examples}


def _prompts(result: _Tokenised, data: "Data", renderer: Renderer, count: int) -> tuple[Prompt, ...]:
    if count and result.counts.format == "text":
        raise DataError(
            f"evaluate.generate is {count}, but {result.records.name} is plain text without prompts; set it to 0"
        )
    prompts = []
    for index in result.kept[:count]:
        (record,) = result.records.read(index, index + 1)
        assert isinstance(record, dict)
        prompts.append(prompt(to_example(record, result.counts.format, data.columns), renderer))
    return tuple(prompts)


def _notes(results: Sequence[_Tokenised], renderer: Renderer) -> list[str]:
    """Describe what may surprise the user in the training data and, if there is any, the validation data.

    There are three such notes: answers whose first token contains the end of the prompt, validation examples that are
    also in the training data, and a chat template that prints the date.
    """
    notes = []
    if merged := sum(result.counts.merged for result in results):
        notes.append(
            f"{merged} answers share their first token with the end of the prompt (usually a blank), so generation "
            "starts from other tokens than training; move the blank from the prompt to the answer"
        )
    if len(results) > 1 and (shared := len(_distinct(results[0].tokens) & _distinct(results[1].tokens))):
        notes.append(f"{shared} validation examples are also in the training data, so their loss measures memorisation")
    template = renderer.template or renderer.tokenizer.chat_template
    if results[0].counts.format in CONVERSATIONS and isinstance(template, str) and "strftime_now" in template:
        notes.append(
            f"the chat template prints today's date; it is fixed at {RENDERED_DATE}, so that tokens never change"
        )
    return notes
