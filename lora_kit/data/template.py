"""Convert an example to token ids and a loss mask.

`answers` gives the character positions of the answers. The whole text is tokenised once, and the offsets of the
tokens map these positions to tokens. The trained tokens are those of an answer up to and including its stop token.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from unicodedata import normalize

from lora_kit.data.answers import Answer, Rendered
from lora_kit.data.formats import Example
from lora_kit.data.messages import Conversation
from lora_kit.data.remarks import BLANKS, FIRST, LOST, UNKNOWN, Remark
from lora_kit.data.rendering import Renderer
from lora_kit.data.sandbox import render_all, render_prompt
from lora_kit.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding

Value = TypeVar("Value")
Result = TypeVar("Result")


class Tokenized(NamedTuple):
    """The tokens of an example.

    Attributes:
        ids: Token ids.
        trained: Whether each token is trained. The first token never is, because no token precedes it.
        merged: Whether the first trained token also contains characters of the prompt. Generation then starts from
            other tokens than training did.
        remarks: The differences between the record and the tokens, e.g. characters that the tokenizer does not know.
    """

    ids: list[int]
    trained: list[bool]
    merged: bool = False
    remarks: tuple[Remark, ...] = ()


class Prompt(NamedTuple):
    """A prompt for generation, and the expected answer as decoded text without the stop token."""

    ids: list[int]
    expected: str


def attempt(function: Callable[[Value], Result], value: Value | DataError) -> Result | DataError:
    """Return the function's result for a value, or the error if it raises one; an error as the value is returned."""
    if isinstance(value, DataError):
        return value
    try:
        return function(value)
    except DataError as error:
        return error


def tokenize_all(examples: Sequence[Example | DataError], renderer: Renderer) -> list[Tokenized | DataError]:
    """Return the token ids and loss mask of each example, or the error for it.

    The error of an example is that the template cannot render it, or that the positions of its answers are ambiguous.
    """
    rendered = render_all(examples, renderer)
    encodings = iter(_encode([item.text for item in rendered if isinstance(item, Rendered)], renderer))
    made = [attempt(lambda item: _mask(item, next(encodings), renderer), item) for item in rendered]
    return [
        item._replace(remarks=example.remarks + item.remarks)
        if isinstance(item, Tokenized) and not isinstance(example, DataError)
        else item
        for example, item in zip(examples, made, strict=True)
    ]


def pieces(example: Tokenized, length: int, overlap: int) -> list[Tokenized]:
    """Cut an example into pieces, so that each of its trained tokens is trained in exactly one of them.

    Args:
        example: The example.
        length: The number of tokens of a piece; the last piece may be shorter.
        overlap: How many tokens at the start of a piece repeat the end of the piece before it, as context. At least 1,
            because the first token of a piece is never trained.
    """
    found = [Tokenized(example.ids[:length], example.trained[:length], example.merged)]
    for start in range(length - overlap, len(example.ids) - overlap, length - overlap):
        end = start + length
        trained = [False] * overlap + example.trained[start + overlap : end]
        found.append(Tokenized(example.ids[start:end], trained))
    return found


def prompt(example: Example, renderer: Renderer) -> Prompt:
    """Return the prompt and the expected answer of an example.

    The prompt of a conversation is everything before its last trained answer. A conversation without an answer is all
    prompt, and its expected answer is empty.

    Raises:
        DataError: The template cannot render the example, the position of its answer is ambiguous, or the prompt is
            empty and the tokenizer has no BOS token to start from.
    """
    if isinstance(example, Conversation):
        last = example.answers[-1] if example.answers else len(example.messages)
        ids = prompt_tokens(replace(example, messages=example.messages[:last]), renderer)
        if not example.answers:
            return Prompt(ids, "")
    else:
        ids = text_tokens(example.prompt, renderer)
    (rendered,) = render_all([example], replace(renderer, train_on="assistant"))
    if isinstance(rendered, DataError):
        raise rendered
    encoding = _encode([rendered.text], renderer)[0]
    if rendered.boundary is None:
        first, end = _span(rendered.answers[-1], rendered.text, encoding, renderer)
    else:
        first, end = _first_token(encoding, rendered.boundary, rendered.text, renderer), len(encoding.ids)
        end -= encoding.ids[-1:] == [renderer.stop_id]
    return Prompt(ids, str(renderer.tokenizer.decode(encoding.ids[first:end], skip_special_tokens=True)))


def prompt_tokens(conversation: Conversation, renderer: Renderer) -> list[int]:
    """Return the token ids that the model answers after these messages. The template's end of an answer plays no part.

    Raises:
        DataError: The template cannot render the messages.
    """
    return _encode([render_prompt(conversation, renderer)], renderer)[0].ids


def text_tokens(text: str, renderer: Renderer) -> list[int]:
    """Return the token ids with which the model continues raw text: those with which training begins an example.

    Raises:
        DataError: The text is empty, and the tokenizer has no BOS token to start from.
    """
    ids = _encode([text], renderer)[0].ids
    ids = _missing_bos(ids, renderer) + ids
    if not ids:
        raise DataError("text without a prompt cannot be answered: the tokenizer has no BOS token to start from")
    return ids


def _encode(texts: list[str], renderer: Renderer) -> "list[Encoding]":
    # templates contain the special tokens already: with add_special_tokens the text would begin with two BOS tokens
    return renderer.tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else []


def _missing_bos(ids: list[int], renderer: Renderer) -> list[int]:
    return [] if ids[:1] == renderer.bos else renderer.bos


def _mask(rendered: Rendered, encoding: "Encoding", renderer: Renderer) -> Tokenized:
    """Compute the loss mask of a tokenised text.

    Raises:
        DataError: An answer does not end with the stop token, or no token of it is trained.
    """
    ids, text, merged = encoding.ids, rendered.text, False
    trained, remarks = [False] * len(ids), list[Remark]()
    for answer in rendered.answers:
        first, stop = _span(answer, text, encoding, renderer)
        marked = rendered.marked[first : stop + 1] if rendered.marked else [True] * (stop + 1 - first)
        if any(marked):
            trained[first : stop + 1] = [*marked[:-1], True]
        merged = merged or _begins_before(encoding, first, answer.start)
        remarks += _check_text(answer.label, text[answer.start : answer.end], ids[first:stop], renderer)
    if rendered.boundary is not None:
        first = _first_token(encoding, rendered.boundary, text, renderer)
        merged = _begins_before(encoding, first, rendered.boundary)
        bos = _missing_bos(ids, renderer)
        end = [] if ids[-1:] == [renderer.stop_id] else [renderer.stop_id]
        trained = [False] * (len(bos) + first) + [True] * (len(ids) - first + len(end))
        label = "completion" if rendered.boundary else "text"
        remarks += _check_text(label, text[rendered.boundary :], ids[first:], renderer)
        if first == 0 and ids and not renderer.bos:
            remarks.append(Remark(FIRST, "", label))
            if rendered.boundary and ids[1:] in ([], [renderer.stop_id]):
                raise DataError(
                    "the completion begins in the first token, which is never trained, because the tokenizer puts no "
                    "BOS token before it, so only the stop token would be trained; write more text into the prompt, "
                    "or remove the record"
                )
        ids = bos + ids + end
    if renderer.train_on == "all":
        trained = [True] * len(ids)
    for begin, end_of_context in rendered.context:
        for token in range(*_tokens(encoding, begin, end_of_context)):
            trained[token] = False
    trained[:1] = [False] * len(trained[:1])
    if not any(trained):
        raise DataError("no token of this example is trained; add an answer or remove the example")
    return Tokenized(ids, trained, merged, rendered.remarks + tuple(remarks) + _lost(text, encoding, renderer))


def _tokens(encoding: "Encoding", begin: int, end: int) -> tuple[int, int]:
    """Return the range of the tokens that have a character in [begin, end)."""
    offsets = encoding.offsets  # a character may be several tokens
    first = bisect_right(offsets, begin, key=lambda characters: characters[1])
    return first, bisect_left(offsets, end, key=lambda characters: characters[0])


def _check_text(label: str, text: str, ids: list[int], renderer: Renderer) -> tuple[Remark, ...]:
    """Check that the tokens of an answer have any of its text, and return a remark if they lack blanks inside it.

    Decoders may add blanks beside special tokens, so only missing blanks are reported.

    Raises:
        DataError: The tokenizer knows none of its characters.
    """
    if not text.strip():
        return ()
    unknown = renderer.unknown_id
    known = ids if unknown is None or unknown not in ids else [number for number in ids if number != unknown]
    if not known or not _decoded(known, renderer).strip():
        raise DataError(
            f"the tokenizer knows no character of {label} ({text.strip()[:40]!r}), so nothing of it would be trained; "
            "remove the record, or choose a base whose tokenizer knows them"
        )
    blanks, decoded = text.strip(), _decoded(ids, renderer).strip()
    fewer = sum(map(str.isspace, decoded)) < sum(map(str.isspace, blanks))
    return (Remark(BLANKS, "", label),) if fewer else ()


def _lost(text: str, encoding: "Encoding", renderer: Renderer) -> tuple[Remark, ...]:
    """Compare the decoded tokens with the text, apart from blanks, and return a remark on what differs."""
    unknown, ids = renderer.unknown_id, encoding.ids
    if unknown is not None and unknown in ids:
        places = [_characters(encoding, token) for token, number in enumerate(ids) if number == unknown]
        items = dict.fromkeys(text[begin:end] for begin, end in places)
        items.pop(renderer.tokenizer.unk_token, None)
        return tuple(Remark(UNKNOWN, repr(item), "") for item in items)
    decoded = _decoded(ids, renderer)
    if decoded == text or _comparable(decoded) == _comparable(text):
        return ()
    missing = [character for character in dict.fromkeys(_comparable(text)) if character not in decoded]
    return tuple(Remark(LOST, repr(character), "") for character in missing) or (Remark(LOST, "", ""),)


def _decoded(ids: list[int], renderer: Renderer) -> str:
    return str(renderer.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))


def _comparable(text: str) -> str:
    """Return a text without blanks, which decoders place differently, and with composed characters, as NFC has them."""
    return normalize("NFC", "".join(text.split()).replace("\u2581", ""))


def _span(answer: Answer, text: str, encoding: "Encoding", renderer: Renderer) -> tuple[int, int]:
    """Return the indices of an answer's first token and of the stop token that ends it.

    Raises:
        DataError: The template puts no stop token after the answer.
    """
    ids, endings = encoding.ids, []
    first = _first_token(encoding, answer.start, text, renderer)
    for token in range(first, len(ids)):
        if ids[token] not in renderer.added and ids[token] != renderer.stop_id:
            continue
        begin, end = _characters(encoding, token)
        # count only characters between the answer and the next message: an added token may include whitespace of both
        begin, end = max(begin, answer.end), min(end, answer.limit)
        if ids[token] == renderer.stop_id and end - begin >= renderer.stop_length:
            return first, token
        name = renderer.added.get(ids[token], renderer.stop)
        if end - begin >= len(name):
            endings.append(name)
    remedy = "set data.template to a template that ends answers with it"
    if endings and renderer.stop_token is None:
        remedy = f"set base.stop_token: {endings[-1]!r}"
    elif endings:  # the recipe wants this stop token, perhaps because the base does not know the template's
        remedy = (
            f"copy the chat template to a file, write {renderer.stop!r} in its place there, and set data.template to "
            f"the file; or leave base.stop_token to {endings[-1]!r}, if the base knows that token"
        )
    raise DataError(
        f"the chat template ends {answer.label} with {text[answer.end : answer.limit]!r}, without the stop "
        f"token {renderer.stop!r}, so the model would not learn to stop; {remedy}"
    )


def _first_token(encoding: "Encoding", start: int, text: str, renderer: Renderer) -> int:
    """Return the index of the first token of an answer that begins at character `start`.

    A token that begins before `start` is the first token if it is text, because it contains the answer's first
    characters. It is not if it is an added token that includes the whitespace after it.
    """
    for character in range(start, len(text)):
        token = encoding.char_to_token(character)
        if token is not None:
            is_header = encoding.ids[token] in renderer.added and _characters(encoding, token)[0] < start
            return token + is_header
    return len(encoding.ids)


def _begins_before(encoding: "Encoding", token: int, start: int) -> bool:
    """Return whether a token contains a character before `start`, even a blank that its offsets do not include."""
    return token < len(encoding.ids) and (_characters(encoding, token - 1)[1] if token else 0) < start


def _characters(encoding: "Encoding", token: int) -> tuple[int, int]:
    """Return the characters [begin, end) of a token."""
    span = encoding.token_to_chars(token)
    assert span is not None, "only special tokens added by the tokenizer have no characters, and it adds none here"
    return span
