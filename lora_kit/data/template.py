"""From an example to token ids and a loss mask.

`rendering` says in characters where the answers stand; one tokenisation of the whole text maps them to
tokens. An answer is trained from its first token to the stop token that ends it, and nothing behind that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from lora_kit.data.formats import Conversation, Example
from lora_kit.data.rendering import Answer, Rendered, Renderer, apply, check_renderer, render
from lora_kit.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding

__all__ = [
    "Prompt",
    "Renderer",
    "Tokenized",
    "check_renderer",
    "prompt",
    "tokenize",
    "tokenize_all",
]


class Tokenized(NamedTuple):
    """An example as the trainer sees it: `trained[i]` says whether token i is a label.

    The first token never is, since nothing comes before it. `merged` says that the first trained token began
    inside the prompt, so that an answer to the prompt alone would start from other tokens than in training.
    """

    ids: list[int]
    trained: list[bool]
    merged: bool = False


class Prompt(NamedTuple):
    """What generation starts from, and the text that it should give (decoded, without the stop token)."""

    ids: list[int]
    expected: str


@dataclass(frozen=True)
class Vocabulary:
    """What a batch asks of the tokenizer, asked once: it is slow to answer.

    Attributes:
        stop_id: The stop token.
        stop_length: Its characters in the text.
        markers: The tokens that were added to the vocabulary, by id: role headers, ends of turns.
        beginning: What the tokenizer puts before raw text: its BOS token, or nothing.
    """

    stop_id: int
    stop_length: int
    markers: dict[int, str]
    beginning: list[int]


def tokenize(example: Example, renderer: Renderer) -> Tokenized:
    """Return an example's token ids and loss mask.

    Raises:
        DataError: The template cannot render the example, or not so that the trained tokens are certain.
    """
    result = tokenize_all([example], renderer)[0]
    if isinstance(result, DataError):
        raise result
    return result


def tokenize_all(examples: Sequence[Example], renderer: Renderer) -> list[Tokenized | DataError]:
    """Return each example's token ids and loss mask, or what is wrong with it; faster than one by one."""
    rendered: list[Rendered | DataError] = []
    for example in examples:
        try:
            rendered.append(render(example, renderer))
        except DataError as error:
            rendered.append(error)
    encodings = iter(_encode([one.text for one in rendered if isinstance(one, Rendered)], renderer))
    vocabulary = _vocabulary(renderer)
    results: list[Tokenized | DataError] = []
    for one in rendered:
        try:
            results.append(_masked(one, next(encodings), renderer, vocabulary) if isinstance(one, Rendered) else one)
        except DataError as error:
            results.append(error)
    return results


def prompt(example: Example, renderer: Renderer) -> Prompt:
    """Return what generation starts from, and what it should give.

    A conversation is cut before its last trained answer; one without an answer is all prompt and expects
    none.

    Raises:
        DataError: As `tokenize`; or raw text without a prompt, for a tokenizer that begins with no token.
    """
    vocabulary = _vocabulary(renderer)
    if isinstance(example, Conversation):
        last = example.answers[-1] if example.answers else len(example.messages)
        start = apply(replace(example, messages=example.messages[:last]), renderer, prompting=True)
        ids = _encode([start], renderer)[0].ids
        if not example.answers:
            return Prompt(ids, "")
    else:
        ids = _encode([example.prompt], renderer)[0].ids
        ids = _beginning(ids, vocabulary) + ids
        if not ids:
            raise DataError("text without a prompt cannot be answered: this tokenizer begins with no token of its own")
    rendered = render(example, replace(renderer, train_on="assistant"))
    encoding = _encode([rendered.text], renderer)[0]
    if rendered.boundary is None:
        first, end = _span(rendered.answers[-1], rendered.text, encoding, renderer, vocabulary)
    else:
        first, end = _first_token(encoding, rendered.boundary, rendered.text, vocabulary), len(encoding.ids)
        end -= encoding.ids[-1:] == [vocabulary.stop_id]
    return Prompt(ids, str(renderer.tokenizer.decode(encoding.ids[first:end], skip_special_tokens=True)))


def _encode(texts: list[str], renderer: Renderer) -> "list[Encoding]":
    # a template writes its special tokens itself: the tokenizer would put a second BOS before its own
    return renderer.tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else []


def _vocabulary(renderer: Renderer) -> Vocabulary:
    tokenizer, stop_id = renderer.tokenizer, renderer.stop_id
    first = tokenizer("").input_ids[:1]
    return Vocabulary(
        stop_id=stop_id,
        stop_length=len(tokenizer.decode([stop_id])),
        markers={number: token.content for number, token in tokenizer.added_tokens_decoder.items()},
        beginning=first if first == [tokenizer.bos_token_id] else [],
    )


def _beginning(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    return [] if ids[:1] == vocabulary.beginning else vocabulary.beginning


def _masked(rendered: Rendered, encoding: "Encoding", renderer: Renderer, vocabulary: Vocabulary) -> Tokenized:
    """Turn characters into tokens.

    Raises:
        DataError: An answer does not end with the stop token, or nothing is trained.
    """
    ids, text, merged = encoding.ids, rendered.text, False
    trained = [False] * len(ids)
    for answer in rendered.answers:
        first, stop = _span(answer, text, encoding, renderer, vocabulary)
        marked = rendered.tagged[first : stop + 1] if rendered.tagged else [True] * (stop + 1 - first)
        if any(marked):
            trained[first : stop + 1] = [*marked[:-1], True]
        merged = merged or _begins_before(encoding, first, answer.start)
    if rendered.boundary is not None:
        first = _first_token(encoding, rendered.boundary, text, vocabulary)
        merged = _begins_before(encoding, first, rendered.boundary)
        beginning = _beginning(ids, vocabulary)
        end = [] if ids[-1:] == [vocabulary.stop_id] else [vocabulary.stop_id]
        trained = [False] * (len(beginning) + first) + [True] * (len(ids) - first + len(end))
        ids = beginning + ids + end
    if renderer.train_on == "all":
        trained = [True] * len(ids)
    trained[:1] = [False] * len(trained[:1])
    if not any(trained):
        raise DataError("no token of this example is trained; give it an answer, or take it out")
    return Tokenized(ids, trained, merged)


def _span(
    answer: Answer, text: str, encoding: "Encoding", renderer: Renderer, vocabulary: Vocabulary
) -> tuple[int, int]:
    """Return the positions of an answer's first token and of the stop token that ends it.

    Raises:
        DataError: The template puts no stop token behind the answer.
    """
    ids, markers = encoding.ids, []
    first = _first_token(encoding, answer.start, text, vocabulary)
    for token in range(first, len(ids)):
        if ids[token] not in vocabulary.markers and ids[token] != vocabulary.stop_id:
            continue
        begin, end = _place(encoding, token)
        begin, end = (
            max(begin, answer.end),
            min(end, answer.limit),
        )  # a marker may take in the blanks around it
        if ids[token] == vocabulary.stop_id and end - begin >= vocabulary.stop_length:
            return first, token
        name = vocabulary.markers.get(ids[token], renderer.stop)
        if end - begin >= len(name):
            markers.append(name)
    remedy = (
        f"set base.stop_token: {markers[-1]!r}"
        if markers
        else "bring a template that ends them with it (data.template)"
    )
    raise DataError(
        f"the chat template ends {answer.label} with {text[answer.end : answer.limit]!r}, without the stop "
        f"token {renderer.stop!r}, so the model would not learn to stop; {remedy}"
    )


def _first_token(encoding: "Encoding", start: int, text: str, vocabulary: Vocabulary) -> int:
    """Return the position of the first token that holds a character from `start` on.

    A token that begins before it counts when it is text, since the answer's first characters are in it; it
    does not when it is a marker that takes in the blanks behind it.
    """
    for place in range(start, len(text)):
        token = encoding.char_to_token(place)
        if token is not None:
            takes_in_blanks = encoding.ids[token] in vocabulary.markers and _place(encoding, token)[0] < start
            return token + takes_in_blanks
    return len(encoding.ids)


def _begins_before(encoding: "Encoding", token: int, start: int) -> bool:
    """Return whether a token holds a character before `start`; a blank that its offsets leave out counts."""
    return 0 < token < len(encoding.ids) and _place(encoding, token - 1)[1] < start


def _place(encoding: "Encoding", token: int) -> tuple[int, int]:
    """Return where a token's characters begin and end."""
    place = encoding.token_to_chars(token)
    assert place is not None, "only tokens that a tokenizer adds have none, and it adds none"
    return place
