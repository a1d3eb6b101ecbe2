"""Tokenise a recipe's data into three flat arrays.

All data is tokenised before the first step. Therefore every problem of the data can be reported at once, and the number
of examples, which determines their order, is known.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.numpy import load

from lora_kit.data import sandbox, sources
from lora_kit.data.arrays import Growing, chunks, spill_folder
from lora_kit.data.counts import Counts, DataCounts, summed
from lora_kit.data.files import read_text
from lora_kit.data.formats import FORMATS, Preference, detect, to_example
from lora_kit.data.remarks import Remark, Remarks, notes_of
from lora_kit.data.rendering import RENDERED_DATE, Renderer, check_renderer
from lora_kit.data.sources import Records
from lora_kit.data.template import Prompt, prompt
from lora_kit.data.tokenising import ARRAYS, TALLIES, Pace, Tokenising, children
from lora_kit.errors import DataError

if TYPE_CHECKING:
    from lora_kit.recipe.schema import Data, Source

MAX_SHOWN = 20  # problems listed in an error
MAX_NAMED = 10  # bad records named in a note
SFT_FORMATS = tuple(name for name, format in FORMATS.items() if "sft" in format.kinds)
CONVERSATIONS = ("messages", "sharegpt", "alpaca")  # formats that always need a chat template


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised examples.

    Attributes:
        ids: The token ids of all examples, concatenated, int32 [tokens].
        trained: Whether each token is trained, bool [tokens]. The first token of an example is ignored.
        offsets: Where each example begins, and where the last ends, int64 [examples + 1].
        chosen: How many tokens of each example are those of the side with the chosen (or desirable) answer; those of
            the side with the rejected (or undesirable) answer follow them. int64 [examples]; None if the data has no
            preferences.
        reference: The summed log-probabilities that the reference gives to the answers of each example, float32
            [examples, columns], with the columns of `objectives.reference`; None before they are computed.
        share: Whether both sides of an example share the computation of their common beginning where examples are
            packed.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    chosen: np.ndarray | None = None
    reference: np.ndarray | None = None
    share: bool = False

    @classmethod
    def restored(
        cls,
        ids: np.ndarray,
        trained: np.ndarray,
        offsets: np.ndarray,
        *,
        chosen: np.ndarray | None,
        fingerprint: str,
        largest: int,
    ) -> "Tokens":
        """Return tokens that were saved together with these properties, so that no pass over them is necessary."""
        tokens = cls(ids, trained, offsets, chosen)
        vars(tokens).update(fingerprint=fingerprint, largest=largest)
        return tokens

    def with_reference(self, reference: np.ndarray) -> "Tokens":
        """Return these tokens with the log-probabilities of the reference."""
        return self._with(reference=reference)

    def sharing(self, share: bool) -> "Tokens":
        """Return these tokens with another value of `share`."""
        return self._with(share=share)

    def _with(self, **changes: Any) -> "Tokens":
        tokens = replace(self, **changes)
        vars(tokens).update({name: vars(self)[name] for name in ("fingerprint", "largest") if name in vars(self)})
        return tokens

    @staticmethod
    def of(examples: Sequence[tuple[np.ndarray, np.ndarray]], chosen: Sequence[int] | None = None) -> "Tokens":
        """Concatenate examples, each a pair (ids, trained), perhaps with the number of tokens of each chosen side."""
        offsets = np.cumsum([0, *(len(ids) for ids, _ in examples)], dtype=np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in examples)])
        trained = np.concatenate([np.zeros(0, np.bool_), *(trained for _, trained in examples)])
        sides = None if chosen is None else np.array(chosen, np.int64)
        return Tokens(ids.astype(np.int32), trained, offsets, sides)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, int64 [examples]."""
        return np.diff(self.offsets)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of an example, and whether each of them is trained."""
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[tokens], self.trained[tokens]

    def lengths_of(self, indices: Sequence[int]) -> list[int]:
        """Return the number of tokens of some examples."""
        places = np.asarray(indices, np.int64)
        lengths: list[int] = (self.offsets[places + 1] - self.offsets[places]).tolist()
        return lengths

    def side_lengths(self, indices: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """Return the number of tokens of the chosen and the rejected side of examples, int64 [examples, 2].

        An example without preferences counts as a chosen side; a side that is missing has no tokens.
        """
        lengths = self.lengths[indices] if isinstance(indices, slice) else np.array(self.lengths_of(indices), np.int64)
        chosen = lengths if self.chosen is None else self.chosen[indices]
        return np.stack([chosen, lengths - chosen], axis=-1)

    def sides(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each side of an example, and whether each of them is trained; a missing side is left out.

        An example without preferences is a single side.
        """
        ids, trained = self.example(index)
        place = len(ids) if self.chosen is None else int(self.chosen[index])
        return [(ids[side], trained[side]) for side in (slice(place), slice(place, None)) if len(ids[side])]

    def places(self, indices: Sequence[int] | slice, *, padded: bool) -> list[int]:
        """Return how many tokens examples take in a micro-batch; a pair in padded rows takes twice its longer side.

        Packed, a beginning that both sides share counts once.
        """
        sides = self.side_lengths(indices)
        longer, count = sides.max(axis=1, initial=0), (sides > 0).sum(axis=1)
        taken: list[int] = (longer * count if padded else sides.sum(axis=1)).tolist()
        if self.share and not padded:
            chosen = range(len(self))[indices] if isinstance(indices, slice) else indices
            taken = [length - self.shared(index) for length, index in zip(taken, chosen, strict=True)]
        return taken

    def shared(self, index: int) -> int:
        """Return the length of the common beginning of both sides of an example: the same tokens, trained or not alike.

        At least one token of each side is not in it. An example with a single side has none.
        """
        sides = self.sides(index)
        if len(sides) < 2:
            return 0
        (ids, trained), (other_ids, other_trained) = sides
        most = min(len(ids), len(other_ids)) - 1
        differ = (ids[:most] != other_ids[:most]) | (trained[:most] != other_trained[:most])
        return int(differ.argmax()) if differ.any() else most

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example; in preference data, of the longest side."""
        return int(self.side_lengths().max(initial=0))

    def weight(self, index: int) -> int:
        """Return the number of trained tokens of an example."""
        return int(self.example(index)[1][1:].sum())

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the arrays, as hexadecimal digits."""
        digest = hashlib.sha256()
        for name in ("ids", "trained", "offsets", *(("chosen",) if self.chosen is not None else ())):
            array = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            for chunk in chunks(array):
                digest.update(chunk.data)
        return digest.hexdigest()

    @cached_property
    def largest(self) -> int:
        """The largest token id; 0 if there are no tokens."""
        return max((int(chunk.max()) for chunk in chunks(self.ids)), default=0)

    def label_counts(self) -> np.ndarray:
        """Return how often each token id is trained, int64 [largest + 1]."""
        counts, start, firsts = np.zeros(self.largest + 1, np.int64), 0, self.offsets[:-1]
        for ids in chunks(self.ids):
            counted = self.trained[start : start + len(ids)].copy()
            begin, end = np.searchsorted(firsts, (start, start + len(ids)))
            counted[firsts[begin:end] - start] = False
            counts += np.bincount(ids[counted], minlength=len(counts))
            start += len(ids)
        return counts


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Return the examples of several sources, one source after the other; large arrays stay in a file."""
    folder = spill_folder()
    ids, trained = Growing(np.int32, folder), Growing(np.bool_, folder)
    offsets, end = [np.zeros(1, np.int64)], 0
    for part in parts:
        for grown, array in ((ids, part.ids), (trained, part.trained)):
            for chunk in chunks(array):
                grown.append(chunk)
        offsets.append(part.offsets[1:] + end)
        end += int(part.offsets[-1])
    chosen = [part.chosen for part in parts if part.chosen is not None]
    return Tokens(ids.finish(), trained.finish(), np.concatenate(offsets), np.concatenate(chosen) if chosen else None)


class Entry(NamedTuple):
    """A file of the cache, and its checksum."""

    path: Path
    checksum: str


@dataclass(frozen=True)
class Prepared:
    """A recipe's tokenised data.

    Attributes:
        train: The training examples.
        validation: The validation examples; None if the recipe has no validation data.
        prompts: Prompts of the first validation examples, with the expected answers.
        counts: The statistics of the training and the validation examples.
        notes: Warnings for the user.
        kept: For each training example, the index of its record in its source, int64 [examples]; the same for the
            validation examples.
        entry: The file of the cache that has the same data; None if the data is not in the cache.
    """

    train: Tokens
    validation: Tokens | None
    prompts: tuple[Prompt, ...]
    counts: DataCounts
    notes: tuple[str, ...]
    kept: tuple[np.ndarray, ...]
    entry: Entry | None = None

    def sharing(self, share: bool) -> "Prepared":
        """Return the same data with another value of `Tokens.share`."""
        validation = self.validation and self.validation.sharing(share)
        return replace(self, train=self.train.sharing(share), validation=validation)


def check_context(data: Prepared, context: int | None) -> None:
    """Refuse examples that are longer than the context of the base.

    Args:
        data: The training and validation examples.
        context: The number of positions of the base; None if its configuration does not say it.

    Raises:
        DataError: An example is too long; the message names the longest example and the limit.
    """
    longest = max(tokens.longest for tokens in (data.train, data.validation) if tokens)
    if context and longest > context:
        raise DataError(
            f"data.sequence_length: the longest example has {longest:,} tokens, the base was made for {context:,}; "
            f"set data.sequence_length={context} and data.overlong to drop or truncate"
        )


Problem = tuple[Records, int, str]
"""The records, the index of a bad record, and the reason. File and line are looked up only for the error message."""

Tell = Callable[[int, int], None]
"""A function that is called while data is prepared, with the number of records that are done and of all records."""


@dataclass
class Problems:
    """The problems of records: the first ones, which an error lists, and how many there are."""

    first: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, records: Records, index: int, message: str) -> None:
        """Add a problem of record `index`."""
        self.count += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append((records, index, message))

    def refuse(self) -> None:
        """Raise a DataError that lists the first problems, if there are any."""
        if self.count:
            lines = [f"{records.where(index)}: {message}" for records, index, message in self.first]
            if self.count > MAX_SHOWN:
                lines.append(f"and {self.count - MAX_SHOWN:,} more problems of {self.count:,}")
            raise DataError("\n".join(lines))


@dataclass
class Overlong:
    """The records of a source that are too long.

    Attributes:
        first: The index of the first of these records.
        tokens: The number of tokens of that record, or of its side that is too long.
        side: Which side of that record is too long, as text for the message; empty if it has no sides.
        count: The number of records that are too long.
        longest: The number of tokens of the longest record or side.
    """

    first: int = 0
    tokens: int = 0
    side: str = ""
    count: int = 0
    longest: int = 0

    def add(self, index: int, tokens: int, side: str) -> None:
        """Count the record `index`, `side` of which is too long; records come in ascending order."""
        if not self.count:
            self.first, self.tokens, self.side = index, tokens, side
        self.count += 1
        self.longest = max(self.longest, tokens)

    def message(self, data: "Data", format: str) -> str:
        """Return what is wrong with the first record, how many other records are too long, and what to do."""
        more = self.count - 1
        others = f", as in {more:,} other{'s' * (more > 1)} of up to {self.longest:,} tokens" if more else ""
        ways = "drop, truncate or split" if format == "text" else "drop or truncate"
        return (
            f"{self.tokens:,} tokens{self.side} are more than data.sequence_length ({data.sequence_length:,})"
            f"{others}; raise it, or set data.overlong to {ways}"
        )


@dataclass(frozen=True)
class _Tokenised:
    """The tokenised examples of a source.

    Attributes:
        records: The records of the source.
        renderer: Tokenizer, template and stop token for this source.
        tokens: The examples.
        kept: The index of the record of each example, int64 [examples].
        counts: Statistics.
        bad: The first records that were left out as bad: their index, and what is wrong.
        remarks: The differences between the records and their tokens.
    """

    records: Records
    renderer: Renderer
    tokens: Tokens
    kept: np.ndarray
    counts: Counts
    bad: list[tuple[int, str]]
    remarks: Remarks


def silent(done: int, total: int) -> None:
    """Tell nobody."""


def _tell_total(tell: Tell, before: int, total: int, done: int) -> None:
    tell(before + done, total)


def prepare(
    data: "Data", renderer: Renderer, *, base_dir: Path, seed: int, prompts: int = 0, tell: Tell = silent
) -> Prepared:
    """Read, render and tokenise the data of a recipe.

    Args:
        data: The recipe's section.
        renderer: Tokenizer, template and stop token.
        base_dir: The recipe's folder, where relative paths start.
        seed: Selects the examples that a validation fraction holds out.
        prompts: The number of validation examples to prepare as prompts for generation.
        tell: Called with the progress.

    Raises:
        DataError: A source cannot be read, no example is left, or records have problems; the first 20 are listed.
        BaseError: The tokenizer is not a fast tokenizer, or does not have the stop token.
    """
    check_renderer(renderer)
    opened = open_data(data, base_dir, seed, renderer.kind)
    if prompts and not opened.validation:
        raise DataError(
            f"evaluate.generate is {prompts}, but there is no validation data to answer; set data.validation"
        )
    problems, results, sources = Problems(), list[_Tokenised](), (*opened.train, *opened.validation)
    total = sum(len(source.records) for source in sources)
    try:
        for source in sources:
            before = sum(len(result.records) for result in results)
            own = renderer_of(source.settings, renderer, base_dir)
            sandbox.check_template(own)
            told = partial(_tell_total, tell, before, total)
            results.append(_tokenise(source.records, _settings(source.settings, data), own, problems, told))
    finally:
        sandbox.close()
    problems.refuse()
    for result in results:
        if result.counts.bad and not len(result.kept):
            raise DataError(f"{_left_out(result)}\n{result.records.name}: no record is left; mend them")
        if not len(result.kept):
            raise DataError(
                f"{result.records.name}: every record ({len(result.records):,}) is longer than data.sequence_length "
                f"({data.sequence_length:,}); raise it"
            )
    train, validation = results[: len(opened.train)], results[len(opened.train) :]
    notes = tuple(_notes(results))
    tokens, counts, named = _joined(opened.train, train)
    if not validation:
        return Prepared(tokens, None, (), DataCounts(counts, None, named), notes, (_kept(train),))
    held_out, held_out_counts, sets = _joined(opened.validation, validation)
    try:
        asked = _prompts(opened.validation, validation, data, prompts)
    finally:
        sandbox.close()
    kept = (_kept(train), _kept(validation))
    return Prepared(tokens, held_out, asked, DataCounts(counts, held_out_counts, named, sets), notes, kept)


def _kept(results: Sequence[_Tokenised]) -> np.ndarray:
    """Return the index of the record of each example, in its source."""
    return results[0].kept if len(results) == 1 else np.concatenate([result.kept for result in results])


@dataclass(frozen=True)
class OpenedSource:
    """A source whose records can be read.

    Attributes:
        records: All its records; if validation data is split off, only those of the training or the validation part.
        settings: The source in the recipe.
        name: Its name; None if `data.train` or `data.validation` is one source, not a list or a mapping.
    """

    records: Records
    settings: "Source"
    name: str | None


class OpenedData(NamedTuple):
    """The sources of the training data and of the validation data, of which there may be none."""

    train: tuple[OpenedSource, ...]
    validation: tuple[OpenedSource, ...]

    def where(self, index: int, kept: np.ndarray, sizes: Sequence[int], *, validation: bool) -> str:
        """Return the file and line of an example, with its number if it is a piece of a text.

        Args:
            index: The index of the example in its part, through all sources.
            kept: The index of the record of each example of the part, in its source, int64 [examples].
            sizes: The number of examples of each source of the part.
            validation: Whether the part is the validation data.
        """
        for source, size in zip(self.validation if validation else self.train, sizes, strict=True):
            if index < size:
                first, end = (int(np.searchsorted(kept[:size], kept[index], side)) for side in ("left", "right"))
                piece = f", piece {index - first + 1:,} of {end - first:,}" if end - first > 1 else ""
                return source.records.where(int(kept[index])) + piece
            index, kept = index - size, kept[size:]
        raise IndexError("the example is after the last one")


def open_data(data: "Data", base_dir: Path, seed: int, kind: str) -> OpenedData:
    """Open the training data and, if the recipe has any, the validation data, for an objective of this kind."""
    load = partial(sources.load, base_dir=base_dir, documents=data.overlong == "split")
    train = tuple(
        OpenedSource(
            load(source.source, max_examples=source.max_examples or data.max_examples),
            source,
            name if data.mixture else None,
        )
        for name, source in data.train_sources.items()
    )
    if isinstance(data.validation, float):
        for source in train:
            if len(source.records) == 1:  # raises if the columns fit no format: likelier the error than too few records
                _format(source.records, _settings(source.settings, data), kind)
        parts = [sources.split(source.records, data.validation, seed) for source in train]
        sides = zip(*parts, strict=True)
        return OpenedData(
            *(
                tuple(replace(source, records=records) for source, records in zip(train, side, strict=True))
                for side in sides
            )
        )
    held_out = tuple(
        OpenedSource(
            load(source.source, max_examples=source.max_examples),
            source,
            name if isinstance(data.validation, dict) else None,
        )
        for name, source in data.validation_sources.items()
    )
    return OpenedData(train, held_out)


def _settings(source: "Source", data: "Data") -> "Data":
    """Return the section `data` with the settings of a source where it has its own."""
    columns = data.columns if source.columns is None else source.columns
    return data.model_copy(update={"format": source.format or data.format, "columns": columns})


def renderer_of(source: "Source", renderer: Renderer, base_dir: Path) -> Renderer:
    """Return the renderer of a source: with a template of its own if it names one.

    Raises:
        DataError: The template cannot be read.
    """
    if source.template is None:
        return renderer
    path = sources.path_of(source.template, base_dir, f"{source.source}: template")
    if not path.is_file():
        raise DataError(f"{source.source}: template: {source.template} is not a file; expected a Jinja file")
    return replace(renderer, template=read_text(path, source.template))


def _joined(opened: Sequence[OpenedSource], results: Sequence[_Tokenised]) -> tuple[Tokens, Counts, dict[str, Counts]]:
    """Return the examples of several sources as one, their statistics, and those of each source that has a name."""
    named = {source.name: result.counts for source, result in zip(opened, results, strict=True) if source.name}
    if len(results) == 1:
        return results[0].tokens, results[0].counts, named
    counts = summed([result.counts for result in results])
    return joined([result.tokens for result in results]), counts, named


def _tokenise(
    records: Records, data: "Data", renderer: Renderer, problems: Problems, tell: Callable[[int], None]
) -> _Tokenised:
    """Tokenise records in child processes, and add the problems of records to `problems`.

    The result does not depend on the number of children: it is put together in the order of the records.

    Args:
        records: The records.
        data: The recipe's section.
        renderer: Tokenizer, template and stop token.
        problems: Gets the problems of records.
        tell: Is called with the number of records that are done.

    Raises:
        DataError: The columns match no format, conversations have no chat template, or the template exceeds a limit.
    """
    format = _format(records, data, renderer.kind)
    if format in CONVERSATIONS:
        # raises now, once and not for every record, if there is no template
        renderer = replace(renderer, template=renderer.chat_template)
    folder, pace, tallies = spill_folder(), Pace(), dict.fromkeys(TALLIES, 0)
    arrays = {name: Growing(dtype, folder) for name, dtype in ARRAYS.items()}
    work = Tokenising(records, renderer, format, data.columns, data.sequence_length, data.overlong, data.overlap)
    bad, overlong, remarks = list[tuple[int, str]](), Overlong(), Remarks()
    try:
        with sandbox.Pool(work, children(len(records))) as pool:
            for answer in pool.map(pace.ranges(len(records))):
                piece = load(bytes(answer))
                about = json.loads(piece.pop("about").tobytes())
                if data.bad_records == "drop":
                    tallies["bad"] += len(about["bad"])
                    bad += about["bad"][: MAX_NAMED - len(bad)]
                else:
                    for index, message in about["bad"]:
                        problems.add(records, index, message)
                for too_long in about["overlong"]:
                    overlong.add(*too_long)
                for index, found in about["remarks"]:
                    remarks.add(index, tuple(Remark(*each) for each in found))
                for name in TALLIES:
                    tallies[name] += about["tallies"].get(name, 0)
                for name, array in piece.items():
                    arrays[name].append(array)
                pace.note(about["records"], about["tokens"])
                tell(pace.records)
    except sandbox.LostError as lost:
        raise lost.error(records.where(json.loads(lost.request)[0] + (lost.place or 0))) from lost
    if overlong.count:
        problems.add(records, overlong.first, overlong.message(data, format))
    lengths, chosen = arrays["lengths"].finish(), arrays["chosen"].finish()
    tokens = Tokens(
        arrays["ids"].finish(),
        arrays["trained"].finish(),
        np.concatenate([[0], np.cumsum(lengths)]),
        None if format in SFT_FORMATS else chosen,
    )
    total, labels = len(tokens.ids), tallies.pop("labels")
    counts = Counts(
        format=format,
        examples=len(tokens),
        tokens=total,
        trained_tokens=labels,
        trained_share=round(labels / max(1, total), 4),
        longest=tokens.longest,
        records=len(records),
        **tallies,
    )
    return _Tokenised(records, renderer, tokens, arrays["kept"].finish(), counts, bad, remarks)


def _format(records: Records, data: "Data", kind: str) -> str:
    columns = records.columns
    if not columns:  # no record can be read; every record will report its own error
        return data.format or ("text" if kind == "sft" else "preference")  # both need no chat template
    try:
        return detect(columns, data.columns, named=data.format, kind=kind)
    except DataError as error:
        raise DataError(f"{records.name}: {error}{_nested(records)}") from error


def _nested(records: Records) -> str:
    """Return what to do if the only record has a list of records inside, e.g. `{"data": [{...}, ...]}`."""
    record = records.read(0, 1)[0]
    if len(records) > 1 or not isinstance(record, dict):
        return ""
    if all(isinstance(value, dict) for value in record.values()):  # records by their names
        return "; the file is a single object: take the records out of it with `jq -c '.[]' FILE`"
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return (
                f"; the file is a single object, and its records seem to be in {name}: take them out with "
                f"`jq -c '.{name}[]' FILE`"
            )
    return ""


def _prompts(
    opened: Sequence[OpenedSource], results: Sequence[_Tokenised], data: "Data", count: int
) -> tuple[Prompt, ...]:
    """Return prompts of the first validation examples, taken in turn from the sources that have prompts."""
    asked = [(source, result) for source, result in zip(opened, results, strict=True) if result.counts.format != "text"]
    if count and not asked:
        raise DataError(
            f"evaluate.generate is {count}, but {results[0].records.name} is plain text without prompts; set it to 0"
        )
    turns = zip_longest(*(result.kept[:count].tolist() for _, result in asked))
    in_turn = ((place, index) for turn in turns for place, index in enumerate(turn) if index is not None)
    prompts = []
    for place, index in islice(in_turn, count):
        source, result = asked[place]
        (record,) = result.records.read(index, index + 1)
        assert isinstance(record, dict)
        try:
            example = to_example(record, result.counts.format, _settings(source.settings, data).columns)
            side = example.sides[0] if isinstance(example, Preference) else example
            prompts.append(prompt(side, result.renderer))
        except DataError as error:
            raise DataError(f"{result.records.where(index)}: {error}") from error
    return tuple(prompts)


def _left_out(result: _Tokenised) -> str:
    """Name the first records that were left out as bad."""
    lines = [f"{result.records.where(index)}: {message}" for index, message in result.bad]
    more = [f"and {result.counts.bad - len(lines):,} more"] * (result.counts.bad > len(lines))
    count = f"{result.counts.bad:,} of {len(result.records):,} records were left out (data.bad_records: drop)"
    return "\n  ".join([f"{result.records.name}: {count}", *lines, *more])


def _notes(results: Sequence[_Tokenised]) -> list[str]:
    """Describe what may surprise the user in the sources of the training and the validation data.

    The notes are about records left out as bad, texts cut into pieces, answers whose first token contains the end of
    the prompt, a chat template that prints the date, and remarks: differences between a record and its tokens, e.g. a
    column that is not read, a key that the template does not read, or a character that the tokenizer does not know.
    `preflight` finds more in the tokens.
    """
    notes = [_left_out(result) for result in results if result.counts.bad]
    # training data and the validation data split off from it have the same name
    for name in dict.fromkeys(result.records.name for result in results):
        notes += notes_of([(each.remarks, each.records.where) for each in results if each.records.name == name])
    for result in results:
        if texts := result.counts.split:
            count = len(result.kept) - len(np.unique(result.kept)) + texts
            notes.append(
                f"{result.records.name}: {texts:,} of {len(result.records):,} texts were cut, into {count:,} pieces of "
                "at most data.sequence_length tokens"
            )
    if merged := sum(result.counts.merged for result in results):
        notes.append(
            f"{merged} answers share their first token with the end of the prompt (usually a blank), so generation "
            "starts from other tokens than training; move the blank from the prompt to the answer"
        )
    chats = (result for result in results if result.counts.raw != result.counts.examples)
    if dated := dict.fromkeys(result.records.name for result in chats if result.renderer.prints_date):
        notes.append(
            f"{', '.join(dated)}: the chat template prints today's date; it is fixed at {RENDERED_DATE}, so that "
            "tokens never change"
        )
    return notes
