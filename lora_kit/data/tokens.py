"""All examples as three flat arrays, and how a recipe's data becomes them.

Tokens are made once, before the first step, so that every problem of the data is known and reported at once,
and so that the number of examples, on which the order of the run depends, is final.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_kit.data import sources
from lora_kit.data.formats import Example, detect, to_example
from lora_kit.data.rendering import RENDERED_DATE
from lora_kit.data.sources import Records
from lora_kit.data.template import Prompt, Renderer, Tokenized, check_renderer, prompt, tokenize_all
from lora_kit.errors import DataError

if TYPE_CHECKING:
    from lora_kit.recipe.schema import Data

AT_ONCE = 512  # examples that are rendered and tokenised together
SHOWN = 20  # problems that an error spells out
RENDERED = ("messages", "sharegpt", "alpaca")  # formats that are always conversations


@dataclass(frozen=True, eq=False)
class Tokens:
    """Examples as tokens.

    Attributes:
        ids: Token ids of all examples, one after the other, int32 [tokens].
        trained: Whether each token is a label, bool [tokens]; the first of an example never counts.
        offsets: Where each example begins, and the end of the last, int64 [examples + 1].
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def of(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Tokens":
        """Put examples, each as `example` returns it, one after the other."""
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
        """Return the ids of one example, and which of them are trained."""
        place = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[place], self.trained[place]

    def weight(self, index: int) -> int:
        """Return the number of trained tokens of one example."""
        return int(self.example(index)[1][1:].sum())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the arrays: equal fingerprints train the same."""
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the arrays as safetensors."""
        from safetensors.numpy import save_file

        save_file(self._arrays(), path)

    @staticmethod
    def load(path: Path) -> "Tokens":
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        arrays = load_file(path)
        return Tokens(ids=arrays["ids"], trained=arrays["trained"], offsets=arrays["offsets"])

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"ids": self.ids, "trained": self.trained, "offsets": self.offsets}


@dataclass(frozen=True)
class Counts:
    """What became of a source's records.

    Attributes:
        format: As named or detected.
        examples: Those kept.
        tokens: Their tokens.
        trained_tokens: Their labels.
        trained_share: Labels of all tokens.
        longest: Tokens of the longest.
        dropped: Left out because they were longer than `data.sequence_length`.
        truncated: Kept, but cut there.
        emptied: Left out because nothing trained was left of them after the cut.
        duplicates: Kept, although an earlier one has the same tokens.
        merged: Their first trained token began inside the prompt.
    """

    format: str
    examples: int
    tokens: int
    trained_tokens: int
    trained_share: float
    longest: int
    dropped: int
    truncated: int
    emptied: int
    duplicates: int
    merged: int


@dataclass(frozen=True)
class Prepared:
    """A recipe's data, ready to train on.

    Attributes:
        train: What is trained.
        validation: What is held out, if anything.
        prompts: The first held-out examples as prompts with the text they should give.
        summary: `train` and `validation` as in Counts, and `notes`: sentences that a user should read.
    """

    train: Tokens
    validation: Tokens | None
    prompts: tuple[Prompt, ...]
    summary: dict[str, Any]


@dataclass(frozen=True)
class _Problem:
    """What is wrong with a record; its place is looked up only if the problem is shown."""

    records: Records
    index: int
    what: str

    def __str__(self) -> str:
        return f"{self.records.where(self.index)}: {self.what}"


@dataclass(frozen=True)
class _Made:
    """A source's examples as tokens, and the indices of the records that they come from."""

    tokens: Tokens
    kept: list[int]
    counts: Counts


def prepare(data: "Data", renderer: Renderer, *, base_dir: Path, seed: int, prompts: int = 0) -> Prepared:
    """Read, render and tokenise the data of a recipe.

    Args:
        data: The recipe's section.
        renderer: How examples become tokens.
        base_dir: The recipe's folder, from which relative paths start.
        seed: Decides which examples a validation fraction holds out.
        prompts: How many held-out examples to prepare for generation.

    Raises:
        DataError: A source cannot be read or no example is left; or every problem of the records, the first
            20 spelt out. BaseError: The tokenizer has no such stop token.
    """
    check_renderer(renderer)
    train, held_out = _open(data, base_dir, seed)
    if prompts and held_out is None:
        raise DataError(f"evaluate.generate is {prompts}, but nothing is held out to answer; set data.validation")
    problems: list[_Problem] = []
    made = [_make(records, data, renderer, problems) for records in (train, held_out) if records is not None]
    if problems:
        raise DataError(_report(problems))
    for records, one in zip((train, held_out), made, strict=False):
        if not one.kept and records is not None:
            raise DataError(
                f"{records.name}: none of its {len(records)} records is left, all are longer than "
                f"data.sequence_length ({data.sequence_length}); raise it"
            )
    validation = made[1] if len(made) > 1 else None
    asked: tuple[Prompt, ...] = ()
    if held_out is not None and validation is not None:
        asked = _prompts(held_out, validation, data, renderer, prompts)
    counts = {
        "train": asdict(made[0].counts),
        "validation": asdict(validation.counts) if validation else None,
    }
    summary = counts | {"notes": _notes(made, renderer)}
    return Prepared(made[0].tokens, validation.tokens if validation else None, asked, summary)


def _open(data: "Data", base_dir: Path, seed: int) -> tuple[Records, Records | None]:
    train = sources.load(data.train, base_dir=base_dir, max_examples=data.max_examples)
    if data.validation is None:
        return train, None
    if isinstance(data.validation, str):
        return train, sources.load(data.validation, base_dir=base_dir)
    return sources.split(train, data.validation, seed)


def _make(records: Records, data: "Data", renderer: Renderer, problems: list[_Problem]) -> _Made:
    """Turn records into tokens; what is wrong with them is added to `problems`.

    Raises:
        DataError: The records' columns are those of no format.
    """
    format = _format(records, data)
    if format in RENDERED:
        _ = renderer.chat_template  # raises once, and not for each record
    kept: list[int] = []
    examples: list[tuple[np.ndarray, np.ndarray]] = []  # arrays, since lists of numbers take ten times as much
    tally = {"dropped": 0, "truncated": 0, "emptied": 0, "merged": 0}
    for start in range(0, len(records), AT_ONCE):
        for index, result in enumerate(_tokenized(records, start, format, data, renderer), start):
            fate, example = _fit(result, data)
            if isinstance(example, str):
                problems.append(_Problem(records, index, example))
            elif example is not None:
                kept.append(index)
                examples.append((np.array(example.ids, np.int32), np.array(example.trained, np.bool_)))
                tally["merged"] += example.merged
            if fate:
                tally[fate] += 1
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
        **tally,
    )
    return _Made(tokens, kept, counts)


def _format(records: Records, data: "Data") -> str:
    columns = records.columns
    if not columns:  # no record can be read: they will say so one by one
        return data.format or "messages"
    try:
        return detect(columns, data.columns, named=data.format)
    except DataError as error:
        raise DataError(f"{records.name}: {error}") from error


def _tokenized(
    records: Records, start: int, format: str, data: "Data", renderer: Renderer
) -> list[Tokenized | DataError]:
    made: list[Example | DataError] = []
    for record in records.read(start, start + AT_ONCE):
        try:
            made.append(record if isinstance(record, DataError) else to_example(record, format, data.columns))
        except DataError as error:
            made.append(error)
    results = iter(tokenize_all([one for one in made if not isinstance(one, DataError)], renderer))
    return [one if isinstance(one, DataError) else next(results) for one in made]


def _fit(result: Tokenized | DataError, data: "Data") -> tuple[str, Tokenized | str | None]:
    """Return what becomes of an example that may be too long, and the example or what is wrong with it."""
    if isinstance(result, DataError):
        return "", str(result)
    length, limit = len(result.ids), data.sequence_length
    if length <= limit:
        return "", result
    if data.overlong == "error":
        what = f"{length:,} tokens are more than data.sequence_length ({limit:,})"
        return "", f"{what}; raise it, or set data.overlong to drop or truncate"
    if data.overlong == "drop":
        return "dropped", None
    cut = result._replace(ids=result.ids[:limit], trained=result.trained[:limit])
    return ("truncated", cut) if any(cut.trained) else ("emptied", None)


def _report(problems: Sequence[_Problem]) -> str:
    lines = [str(problem) for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN:,} more problems of {len(problems):,}")
    return "\n".join(lines)


def _distinct(tokens: Tokens) -> set[bytes]:
    examples = (tokens.example(index) for index in range(len(tokens)))
    return {hashlib.blake2b(ids.tobytes() + trained.tobytes()).digest() for ids, trained in examples}


def _prompts(records: Records, made: _Made, data: "Data", renderer: Renderer, count: int) -> tuple[Prompt, ...]:
    if count and made.counts.format == "text":
        raise DataError(f"evaluate.generate is {count}, but {records.name} is plain text without prompts; set it to 0")
    found = []
    for index in made.kept[:count]:
        (record,) = records.read(index, index + 1)
        assert isinstance(record, dict)
        found.append(prompt(to_example(record, made.counts.format, data.columns), renderer))
    return tuple(found)


def _notes(made: Sequence[_Made], renderer: Renderer) -> list[str]:
    """Return what a user should know although nothing is wrong."""
    notes = []
    if merged := sum(one.counts.merged for one in made):
        notes.append(
            f"{merged} answers begin inside their prompt's last token (mostly a blank at its end), so that "
            "answering starts from other tokens than training; move the blank to the answer"
        )
    if len(made) > 1 and (shared := len(_distinct(made[0].tokens) & _distinct(made[1].tokens))):
        notes.append(f"held-out examples that are trained on as well: {shared}; they measure memory")
    template = renderer.template or renderer.tokenizer.chat_template
    if made[0].counts.format in RENDERED and isinstance(template, str) and "strftime_now" in template:
        notes.append(f"the chat template prints today's date; it is fixed at {RENDERED_DATE} for resumes' sake")
    return notes
