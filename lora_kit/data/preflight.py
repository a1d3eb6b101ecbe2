"""Inspect the token ids and loss masks of all examples for mistakes in the training data, before training.

Only the arrays are inspected, so the result is independent of the code that made them. Everything is vectorised over
chunks of the arrays, which may be memory-mapped, so a million examples take seconds and little memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_kit.data import sandbox
from lora_kit.data.arrays import release
from lora_kit.data.counts import TRAINING, VALIDATION
from lora_kit.data.messages import question
from lora_kit.data.packing import TOKEN_COST
from lora_kit.data.parts import TAGS
from lora_kit.data.places import Where
from lora_kit.data.rendering import Renderer
from lora_kit.data.sandbox import render_prompt
from lora_kit.data.tokens import Prepared, Tokens, renderer_of
from lora_kit.errors import DataError

if TYPE_CHECKING:
    from lora_kit.recipe.schema import Preflight, Recipe

CHUNK_TOKENS = 1 << 20
MARK = "\ue000"  # a private character, in place of a message
THOUGHTS = [*((f"<{tag}>", f"</{tag}>") for tag in TAGS), ("[THINK]", "[/THINK]")]
PROBES = (("user", "assistant", "user"), ("system", "user"), ("user", "assistant", "tool"))
# what may stand between the two tags of an empty thought, and after them
GAPS, TAILS = ("", "\n", "\n\n", " "), ("", "\n", "\n\n")

KINDS = {  # for each kind of finding a description of the examples, and the remedy
    "masked": ("without a trained token", "remove them, or train their answers"),
    "unstopped": (
        "with an answer that does not end with the stop token, so it does not teach to stop; most often it is cut",
        "raise data.sequence_length, or set data.overlong: drop",
    ),
    "endless": (
        "trained as a whole and without a stop token",
        "right for pieces of a longer text; else set base.stop_token to the token with which the template ends a turn",
    ),
    "doubled_bos": (
        "with two BOS tokens at the beginning",
        "remove the BOS token from the records, or from the chat template (data.template)",
    ),
    "missing_bos": (
        "without the BOS token that the tokenizer puts before a text",
        "if the base was trained with it, write {{ bos_token }} at the start of the chat template (data.template)",
    ),
    "unknown": (
        "with the unknown token in place of characters that the tokenizer does not have",
        "replace these characters, or use a base whose tokenizer has them",
    ),
    "empty_thoughts": (
        "with a trained thought without content, such as <think></think>, which teaches not to think",
        "add the thoughts to the records, or use a chat template that writes no empty thought (data.template)",
    ),
    "prompted": (
        "with trained tokens of the generation prompt, which generation supplies and never predicts",
        "move {% generation %} in the chat template behind them (data.template)",
    ),
    "duplicates": ("with the tokens of an earlier example", "remove them, if the repetition is not intended"),
    "leaked": (
        "whose tokens are also in the training data, so that the loss measures memorisation",
        "remove the repetition from one of the two",
    ),
}


class Signs(NamedTuple):
    """What the inspection needs to judge the examples of a source: special tokens, and how examples are made.

    Attributes:
        stop: The stop token.
        bos: The BOS token; None if the tokenizer has none.
        adds_bos: Whether the tokenizer puts the BOS token before a text.
        unknown: The unknown token; None if the tokenizer has none, or uses it as another special token too.
        prompt: The end of a user message and the generation prompt, without trailing blanks; empty for raw text.
        blank: The token of the trailing blanks of `prompt`; None if there are none.
        thoughts: The ways to write a thought without content.
        parts: Whether the template has `{% generation %}`, so that parts of an answer may not be trained.
        answers: Whether only answers are trained; otherwise all of each text or conversation is trained.
        pieces: Whether long texts are cut into several examples, so that an example may end anywhere.
    """

    stop: int
    bos: int | None = None
    adds_bos: bool = False
    unknown: int | None = None
    prompt: tuple[int, ...] = ()
    blank: int | None = None
    thoughts: tuple[tuple[int, ...], ...] = ()
    parts: bool = False
    answers: bool = True
    pieces: bool = False


@dataclass(frozen=True)
class Found:
    """The number of examples with a kind of finding, and the index of the first of them."""

    count: int
    first: int


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting some examples.

    Attributes:
        found: The findings by kind; kinds that no example has are missing.
        weights: The number of trained tokens of each example, int64 [examples].
        hashes: A hash of the ids of each example, uint64 [examples].
    """

    found: dict[str, Found]
    weights: np.ndarray
    hashes: np.ndarray


@dataclass(frozen=True)
class Finding:
    """A finding in the training or the validation examples.

    Attributes:
        part: `training` or `validation`.
        kind: A key of KINDS.
        count: The number of examples with the finding.
        examples: The number of examples of the part.
        first: The index of the first example with the finding.
        original: The index of the example that the first one repeats: of an earlier one if the kind is `duplicates`, of
            a training example if it is `leaked`; None for other kinds.
    """

    part: str
    kind: str
    count: int
    examples: int
    first: int
    original: int | None = None

    @property
    def share(self) -> float:
        """The share of the part's examples."""
        return self.count / self.examples

    def text(self, where: Where) -> str:
        """Return the finding as a line that begins with the place of its first example."""
        what, remedy = KINDS[self.kind]
        place = where(self.part, self.first)
        if self.original is not None:
            place = f"{place} (as {where(TRAINING if self.kind == 'leaked' else self.part, self.original)})"
        which = "the only" if self.count == 1 else f"the first of {self.count:,}"
        examples = f"{self.part} example{'s' if self.count > 1 else ''} ({self.share:.1%})"
        return f"{place}: {which} {examples} {what}; {remedy}"


def signs_of(renderer: Renderer, *, raw: bool, pieces: bool = False) -> Signs:
    """Return the `Signs` of a source, which `inspect` needs to judge its examples.

    Args:
        renderer: The tokenizer, the template and the stop token for this source.
        raw: Whether all examples are raw text, without the template.
        pieces: Whether long texts were cut into several examples.
    """
    tokenizer = renderer.tokenizer

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    special = (renderer.stop_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    unknown = None if tokenizer.unk_token_id in special else tokenizer.unk_token_id  # GPT-2 has one token for all
    written = (encode(begin + gap + end + tail) for begin, end in THOUGHTS for gap in GAPS for tail in TAILS)
    text = "" if raw else _prompt(renderer)
    sandbox.close()
    prompt, with_blank = encode(text.rstrip()), encode(text)
    if prompt[-1:] == (renderer.stop_id,):  # the template has no generation prompt
        prompt = ()
    return Signs(
        stop=renderer.stop_id,
        bos=tokenizer.bos_token_id,
        adds_bos=bool(renderer.bos),
        unknown=unknown,
        prompt=prompt,
        blank=with_blank[-1] if prompt and with_blank[:-1] == prompt else None,
        thoughts=tuple(dict.fromkeys(ids for ids in written if unknown not in ids)),
        parts=not raw and "endgeneration" in renderer.chat_template,
        answers=renderer.train_on != "all",
        pieces=pieces,
    )


def _prompt(renderer: Renderer) -> str:
    """Return the end of a message and the generation prompt; empty if the template renders no single message."""
    try:
        return render_prompt(question([{"role": "user", "content": MARK}]), renderer).rpartition(MARK)[2]
    except DataError:  # e.g. it needs a system message
        return ""


class Header(NamedTuple):
    """The text that the template writes before the content of a message.

    Attributes:
        role: The role of the message.
        ids: The token ids between the contents of the previous message and of this one, without trailing blanks.
        blank: The token of the trailing blanks; None if there are none.
    """

    role: str
    ids: tuple[int, ...]
    blank: int | None


def headers_of(renderer: Renderer) -> tuple[Header, ...]:
    """Return the template's headers, found in renderings of short conversations with the roles that it accepts."""
    tokenizer, found = renderer.tokenizer, list[Header]()
    for roles in PROBES:
        try:
            text = render_prompt(question([{"role": role, "content": MARK} for role in roles]), renderer)
        except DataError:  # e.g. there is no system role
            continue
        gaps = text.split(MARK)
        if len(gaps) != len(roles) + 1:
            continue
        for role, gap in zip((*roles, "assistant"), gaps, strict=True):
            ids, whole = (tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (gap.rstrip(), gap))
            if ids:
                found.append(Header(role, ids, whole[-1] if whole[:-1] == ids else None))
    sandbox.close()
    return tuple(dict.fromkeys(found))


def roles(tokens: Tokens, headers: Sequence[Sequence[Header]], sizes: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return the number of tokens, and of trained tokens, in the messages of each role.

    Tokens between the contents of two messages are not counted. The tokens after the last content are.

    Args:
        tokens: The examples.
        headers: The headers of the template of each source.
        sizes: The number of examples of each source.
    """
    result: dict[str, tuple[int, int]] = {}
    for begin, end, source in _chunks(tokens.offsets, sizes):
        for role, count, trained in _Chunk(tokens, begin, end).roles(headers[source]):
            before = result.get(role, (0, 0))
            result[role] = (before[0] + count, before[1] + trained)
    return result


class Sources(NamedTuple):
    """The sources of the training data or of the validation data, in order.

    Attributes:
        renderers: The tokenizer, template and stop token of each source.
        signs: The `Signs` of each source, which `inspect` needs to judge its examples.
        sizes: The number of examples of each source.
    """

    renderers: tuple[Renderer, ...]
    signs: tuple[Signs, ...]
    sizes: tuple[int, ...]


def sources_of(recipe: "Recipe", data: Prepared, renderer: Renderer) -> dict[str, Sources]:
    """Return the sources of the training data and of the validation data, by the names TRAINING and VALIDATION.

    Args:
        recipe: The recipe.
        data: The prepared data of the recipe.
        renderer: Tokenizer, template and stop token of the run.
    """
    settings = {TRAINING: recipe.data.train_sources.values(), VALIDATION: recipe.data.held_out_sources}
    result = {}
    for part, counts in data.counts.parts.items():
        renderers = tuple(renderer_of(source, renderer, recipe.folder) for source in settings[part])
        signs = (
            signs_of(own, raw=each.is_raw, pieces=each.split > 0) for own, each in zip(renderers, counts, strict=True)
        )
        result[part] = Sources(renderers, tuple(signs), tuple(each.examples for each in counts))
    return result


def inspect(tokens: Tokens, signs: Sequence[Signs], sizes: Sequence[int]) -> Inspection:
    """Look for all kinds of findings except `leaked`, which needs the training and the validation examples.

    Args:
        tokens: The examples.
        signs: The `Signs` of each source.
        sizes: The number of examples of each source.
    """
    weights, hashes = np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.uint64)
    longest = int(tokens.lengths.max(initial=1))
    factors = np.random.default_rng(0).integers(1, 1 << 63, longest, np.uint64) * np.uint64(2) + np.uint64(1)
    counts, firsts = dict.fromkeys(KINDS, 0), dict[str, int]()
    for begin, end, source in _chunks(tokens.offsets, sizes):
        chunk = _Chunk(tokens, begin, end)
        weights[begin:end] = chunk.weights
        release(tokens.ids, tokens.trained)
        hashes[begin:end] = chunk.hashes(factors)
        for kind, examples in chunk.findings(signs[source]):
            if len(examples):
                counts[kind] += len(examples)
                firsts.setdefault(kind, begin + int(examples[0]))
        release(tokens.ids)
        release(tokens.trained)
    found = {kind: Found(counts[kind], first) for kind, first in firsts.items()}
    repeated = _repeated(hashes)
    if len(repeated):
        found["duplicates"] = Found(len(repeated), int(repeated.min()))
    return Inspection(found, weights, hashes)


def findings(train: Inspection, validation: Inspection | None) -> list[Finding]:
    """Return all findings about the examples, those of the training data first."""
    result = list(_findings(TRAINING, train))
    if validation is not None:
        result += _findings(VALIDATION, validation)
        leaked = np.flatnonzero(np.isin(validation.hashes, train.hashes))
        if len(leaked):
            first, original = int(leaked[0]), _first(train.hashes, validation.hashes[leaked[0]])
            result.append(Finding(VALIDATION, "leaked", len(leaked), len(validation.hashes), first, original))
    return result


def _findings(part: str, inspection: Inspection) -> Iterator[Finding]:
    for kind in KINDS:
        if kind in inspection.found:
            found, hashes = inspection.found[kind], inspection.hashes
            original = _first(hashes, hashes[found.first]) if kind == "duplicates" else None
            yield Finding(part, kind, found.count, len(hashes), found.first, original)


def _first(hashes: np.ndarray, value: np.uint64) -> int:
    return int(np.flatnonzero(hashes == value)[0])


def judge(found: Sequence[Finding], settings: "Preflight", where: Where) -> tuple[list[str], list[str]]:
    """Return the findings as errors and warnings: an error is a finding of more examples than the recipe allows."""
    errors, warnings = list[str](), list[str]()
    for finding in found:
        limit, text = getattr(settings, finding.kind), finding.text(where)
        if finding.share > limit:
            errors.append(f"{text} (preflight.{finding.kind} allows {limit:.4g} of the examples)")
        elif finding.kind != "unknown":  # data preparation already notes which characters are unknown
            warnings.append(text)
    return errors, warnings


def inspect_all(data: Prepared, sources: Mapping[str, Sources]) -> tuple[Inspection, Inspection | None]:
    """Inspect the training and the validation examples; without validation data the second result is None."""
    _, signs, sizes = sources[TRAINING]
    train = inspect(data.train, signs, sizes)
    if data.validation is None:
        return train, None
    _, signs, sizes = sources[VALIDATION]
    return train, inspect(data.validation, signs, sizes)


def preflight(recipe: "Recipe", data: Prepared, renderer: Renderer, where: Where) -> list[str]:
    """Inspect all examples, and return the warnings.

    Raises:
        DataError: A finding has more examples than the recipe allows; the message lists all such findings.
    """
    found = findings(*inspect_all(data, sources_of(recipe, data, renderer)))
    errors, warnings = judge(found, recipe.preflight, where)
    if errors:
        raise DataError("\n".join(errors))
    return warnings


class Cost(NamedTuple):
    """What a source contributes to a run.

    Attributes:
        source: The name of the source.
        examples: The number of examples of the source.
        tokens: The number of tokens of these examples.
        trained: The number of trained tokens of these examples.
        share: The share of the run's estimated time that the source takes.
    """

    source: str
    examples: int
    tokens: int
    trained: int
    share: float


def costs(
    tokens: Tokens,
    weights: np.ndarray,
    ranges: Mapping[str, tuple[int, int]],
    epochs: Mapping[str, float] | None = None,
) -> list[Cost]:
    """Return what each source contributes to a run.

    Args:
        tokens: The examples.
        weights: The number of trained tokens of each example, from `inspect`.
        ranges: The examples [begin, end) of each source, by the name of the source.
        epochs: How often the run sees the examples of each source of a mixture; None if all equally often.
    """
    lengths = tokens.lengths
    times = {
        name: int((lengths[begin:end] * (lengths[begin:end] + TOKEN_COST)).sum()) * (epochs[name] if epochs else 1)
        for name, (begin, end) in ranges.items()
    }
    total = max(1, sum(times.values()))
    return [
        Cost(
            source=name,
            examples=end - begin,
            tokens=int(lengths[begin:end].sum()),
            trained=int(weights[begin:end].sum()),
            share=times[name] / total,
        )
        for name, (begin, end) in ranges.items()
    ]


def histogram(lengths: np.ndarray, bins: int = 10) -> list[tuple[int, int, int]]:
    """Return ranges of lengths of equal width as (first length, last length, number of examples)."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // bins)
    counts = np.bincount((lengths - shortest) // width)
    starts = range(shortest, longest + 1, width)
    return [(start, start + width - 1, int(count)) for start, count in zip(starts, counts, strict=True)]


def _chunks(offsets: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield ranges of examples of a source with about CHUNK_TOKENS tokens, at least one example each, and the source.

    Args:
        offsets: Where each example begins, and where the last ends.
        sizes: The number of examples of each source.
    """
    begin = stop = 0
    for source, size in enumerate(sizes):
        stop += size
        while begin < stop:
            end = int(np.searchsorted(offsets, offsets[begin] + CHUNK_TOKENS, side="right")) - 1
            end = min(max(end, begin + 1), stop)
            yield begin, end, source
            begin = end


class _Chunk:
    """Some examples, each with at least one token.

    Attributes:
        weights: The number of trained tokens of each example, int64 [examples].
    """

    def __init__(self, tokens: Tokens, begin: int, end: int) -> None:
        offsets = tokens.offsets[begin : end + 1]
        self._ids = np.array(tokens.ids[offsets[0] : offsets[-1]])
        self._trained = np.array(tokens.trained[offsets[0] : offsets[-1]])
        self._starts, self._lengths = offsets[:-1] - offsets[0], np.diff(offsets)
        self._of_id: dict[int, np.ndarray] = {}  # a cache of `_places`: the indices of an id
        self._trained[self._starts] = False  # no token precedes the first
        self.weights = self._count(self._trained)

    def hashes(self, factors: np.ndarray) -> np.ndarray:
        """Return the sum of each example's ids times the odd factors of their positions, modulo 2^64."""
        positions = np.arange(len(self._ids)) - np.repeat(self._starts, self._lengths)
        products = (self._ids.astype(np.uint64) + np.uint64(1)) * factors[positions]
        return np.add.reduceat(products, self._starts)

    def findings(self, signs: Signs) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each kind of finding with the ascending indices of its examples in the chunk."""
        ids, trained, first = self._ids, self._trained, self._ids[self._starts]
        whole = ((self.weights == self._lengths - 1) & (self._lengths > 1)) | (not signs.answers)
        yield "masked", np.flatnonzero(self.weights == 0)
        yield "unstopped", self._unstopped(signs, whole)
        if not signs.pieces:
            yield "endless", np.flatnonzero(whole & (self._count(trained & (ids == signs.stop)) == 0))
        if signs.bos is not None:
            second = ids[np.minimum(self._starts + 1, len(ids) - 1)]
            doubled = (first == signs.bos) & (second == signs.bos) & (self._lengths > 1)
            yield "doubled_bos", np.flatnonzero(doubled)
            yield "missing_bos", np.flatnonzero(signs.adds_bos & (not signs.pieces) & (first != signs.bos))
        if signs.unknown is not None:
            yield "unknown", self._examples(np.flatnonzero(ids == signs.unknown))
        ends = np.concatenate([self._places(pattern) + len(pattern) - 1 for pattern in (*signs.thoughts, ())])
        yield "empty_thoughts", self._examples(ends[trained[ends]])
        yield "prompted", self._prompted(signs, whole)

    def roles(self, headers: Sequence[Header]) -> Iterator[tuple[str, int, int]]:
        """Yield for each header its role, and the number of tokens and trained tokens of the messages behind it."""
        found = []
        for number, header in enumerate(headers):
            begin = self._places(header.ids)
            end = begin + len(header.ids)
            end += self._ids[np.minimum(end, len(self._ids) - 1)] == (-1 if header.blank is None else header.blank)
            found.append(np.stack([begin, end, np.full(len(begin), number)]))
        begin, end, number = np.concatenate([np.zeros((3, 0), np.int64), *found], axis=1)
        order = np.lexsort((begin, end))
        begin, end, number = begin[order], end[order], number[order]
        longest = np.append(True, end[1:] != end[:-1])[: len(end)]  # if headers end at the same token, take the longest
        end, begin, number = end[longest], begin[longest], number[longest]
        following = np.append(begin[1:], len(self._ids))[: len(begin)]
        stop = np.minimum(following, (self._starts + self._lengths)[self._owners(begin)])
        before = np.append(0, np.cumsum(self._trained))
        for which, header in enumerate(headers):
            own = number == which
            spans = end[own], np.maximum(stop[own], end[own])
            yield header.role, int((spans[1] - spans[0]).sum()), int((before[spans[1]] - before[spans[0]]).sum())

    def _unstopped(self, signs: Signs, whole: np.ndarray) -> np.ndarray:
        """Return the examples with a run of trained tokens that does not end with the stop token."""
        following = np.append(self._trained[1:], False)
        ends = np.flatnonzero(self._trained & ~following)
        owners = self._owners(ends)
        is_open = (self._ids[ends] != signs.stop) & ~whole[owners]
        if signs.pieces:
            is_open &= ends + 1 < (self._starts + self._lengths)[owners]
        if signs.parts:  # the template may leave out a part of an answer, so only the last run is checked
            is_open &= np.append(owners[1:] != owners[:-1], True)[: len(owners)]
        return np.unique(owners[is_open])

    def _prompted(self, signs: Signs, whole: np.ndarray) -> np.ndarray:
        """Return the examples that train the end of the generation prompt, apart from those that train all tokens."""
        last = self._places(signs.prompt) + len(signs.prompt) - 1
        after = np.minimum(last + 1, len(self._ids) - 1)
        is_trained = self._trained[last]
        if signs.blank is not None:  # the blanks may be one token with those at the beginning of the answer
            is_trained |= self._trained[after] & (self._ids[after] == signs.blank)
        examples = self._examples(last[is_trained])
        return examples[~whole[examples]]

    def _places(self, pattern: Sequence[int]) -> np.ndarray:
        """Return the indices at which a sequence of ids begins inside an example."""
        if not pattern or len(pattern) > len(self._ids):
            return np.zeros(0, np.int64)
        if pattern[0] not in self._of_id:
            self._of_id[pattern[0]] = np.flatnonzero(self._ids == pattern[0])
        places = self._of_id[pattern[0]]
        places = places[places <= len(self._ids) - len(pattern)]
        for distance, number in enumerate(pattern):
            places = places[self._ids[places + distance] == number]
        return places[self._owners(places) == self._owners(places + len(pattern) - 1)]

    def _count(self, which: np.ndarray) -> np.ndarray:
        return np.add.reduceat(which, self._starts, dtype=np.int64)

    def _owners(self, places: np.ndarray) -> np.ndarray:
        """Return the example of each token."""
        return np.searchsorted(self._starts, places, side="right") - 1

    def _examples(self, places: np.ndarray) -> np.ndarray:
        return np.unique(self._owners(places))


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """Return the indices of values that an earlier element also has."""
    order = np.argsort(hashes, kind="stable")
    return order[1:][hashes[order[1:]] == hashes[order[:-1]]]
