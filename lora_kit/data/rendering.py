"""Chat templates, and where they put the answers: found out by asking, never by searching for strings.

The messages before an answer, rendered with the generation prompt, are the characters that come before it.
The conversation rendered once more with another answer shows which characters behind it stay the same. What
a template leaves out is found the same way: changing it changes nothing. What this does not settle is an
error.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_kit.data.formats import Completion, Conversation, Example
from lora_kit.errors import BaseError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates print today's date. The same data must give the same tokens tomorrow, or no resume would
# accept it; transformers lets no caller choose the date, so a macro takes the function's place.
RENDERED_DATE = "2025-01-01"
_DATE = {
    **{"%Y": "2025", "%y": "25", "%B": "January", "%b": "Jan", "%m": "01", "%-m": "1"},
    **{"%d": "01", "%-d": "1", "%A": "Wednesday", "%a": "Wed", "%H": "00", "%M": "00", "%S": "00"},
}
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f".replace('{code}', '{text}')" for code, text in _DATE.items())
    + " }}{%- endmacro %}\n"
)


@dataclass(frozen=True)
class Renderer:
    """What decides how examples become tokens.

    Attributes:
        tokenizer: The base's.
        template: The text of a chat template that replaces the tokenizer's.
        train_on: "assistant" trains the answers, "all" every token that has one before it.
        stop_token: The token that ends an answer; None means the tokenizer's end of sequence.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: str | None = None
    train_on: str = "assistant"
    stop_token: str | None = None

    @property
    def chat_template(self) -> str:
        """The text of the template in use, with a fixed date where it prints one.

        Raises:
            DataError: There is none.
        """
        template = self.template or self.tokenizer.chat_template
        if isinstance(template, dict):  # some tokenizers bring several
            template = template.get("default")
        if not template:
            raise DataError(
                "the tokenizer has no chat template, and the data is conversations; set data.template to a "
                "jinja file, or bring prompt-completion or text data"
            )
        return FIXED_DATE + template if "strftime_now" in template else template

    @property
    def stop(self) -> str:
        """The stop token.

        Raises:
            BaseError: Neither recipe nor tokenizer names one.
        """
        if not (stop := self.stop_token or self.tokenizer.eos_token):
            raise BaseError("base.stop_token: the tokenizer names no end of sequence; name the token that ends answers")
        return str(stop)

    @property
    def stop_id(self) -> int:
        """The stop token's id.

        Raises:
            BaseError: The tokenizer has no such token.
        """
        number = self.tokenizer.convert_tokens_to_ids(self.stop)
        unknown = number == self.tokenizer.unk_token_id and self.stop != self.tokenizer.unk_token
        if isinstance(number, int) and not unknown:
            return number
        ids = self.tokenizer.encode(self.stop, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:  # vocabularies write "\n" as "Ċ", for one
            return int(ids[0])
        markers = ", ".join(repr(token.content) for token in self.tokenizer.added_tokens_decoder.values())
        raise BaseError(
            f"base.stop_token: {self.stop!r} is not one token of the tokenizer; its markers: {markers[:1000]}"
        )


class Place(NamedTuple):
    """Where a message's content stands in the rendered text, in characters."""

    begin: int
    end: int


class Answer(NamedTuple):
    """Where one answer stands in the rendered text, in characters.

    The answer begins at `start` and its content ends at `end`; what ends the turn comes before `limit`, where
    the next message's content or the end of the text is.
    """

    label: str
    start: int
    end: int
    limit: int


class Rendered(NamedTuple):
    """A text to tokenise, and what to train in it.

    Attributes:
        text: All of it.
        answers: A conversation's trained parts.
        boundary: Where raw text's completion begins, in characters; None for a conversation.
        tagged: For a template with `{% generation %}`, whether it marks each token.
    """

    text: str
    answers: tuple[Answer, ...] = ()
    boundary: int | None = None
    tagged: list[bool] | None = None


def check_renderer(renderer: Renderer) -> None:
    """Raise what is wrong with tokenizer, stop token or template, before any example is read.

    Raises:
        BaseError: The tokenizer is not a fast one, or has no such stop token.
        DataError: The recipe's template is not valid jinja.
    """
    from jinja2 import TemplateSyntaxError

    if not renderer.tokenizer.is_fast:
        kind = type(renderer.tokenizer).__name__
        raise BaseError(f"base.repo: its tokenizer ({kind}) has no tokenizer.json, so it maps no characters to tokens")
    _ = renderer.stop_id  # raises
    if renderer.template is not None:
        try:
            apply(Conversation(({"role": "user", "content": "x"},)), renderer)
        except DataError as error:
            cause = error.__cause__  # any other failure may be this little conversation's fault
            if isinstance(cause, TemplateSyntaxError):
                line = cause.lineno - renderer.chat_template.count("\n") + renderer.template.count("\n")
                raise DataError(f"data.template: line {line} is no chat template: {cause.message}") from cause


def render(example: Example, renderer: Renderer) -> Rendered:
    """Return the text of an example and where its answers stand.

    Raises:
        DataError: The template fails, leaves a part of the example out, or where an answer begins open.
    """
    if isinstance(example, Completion):
        return Rendered(example.prompt + example.completion, boundary=len(example.prompt))
    text = apply(example, renderer)
    places = _places_at_once(example, renderer, text) or _places_one_by_one(example, renderer, text)
    if renderer.train_on == "all":
        return Rendered(text)
    tagged = _tags(example, renderer) if "endgeneration" in renderer.chat_template else None
    answers = [_find(example, index, text, places, renderer, tagged is not None) for index in example.answers]
    return Rendered(text, tuple(answers), tagged=tagged)


def apply(conversation: Conversation, renderer: Renderer, *, prompting: bool = False) -> str:
    """Apply the chat template; with `prompting`, end where an answer is to begin.

    Raises:
        DataError: The template fails.
    """
    try:
        text: Any = renderer.tokenizer.apply_chat_template(
            list(conversation.messages),
            tools=list(conversation.tools) if conversation.tools else None,
            chat_template=renderer.chat_template,
            add_generation_prompt=prompting,
            tokenize=False,
        )
        return str(text)
    except DataError:
        raise
    except Exception as error:  # a template is a program and can fail in any way
        roles = ", ".join(message["role"] for message in conversation.messages) or "no messages"
        raise DataError(
            f"the chat template cannot render {roles}: {error}; change the record, or bring another template "
            "(data.template)"
        ) from error


def _tags(conversation: Conversation, renderer: Renderer) -> list[bool]:
    """Return which tokens the template's `{% generation %}` marks."""
    output: Any = renderer.tokenizer.apply_chat_template(
        list(conversation.messages),
        tools=list(conversation.tools) if conversation.tools else None,
        chat_template=renderer.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return [bool(mark) for mark in output["assistant_masks"]]


def _places_at_once(conversation: Conversation, renderer: Renderer, text: str) -> list[Place] | None:
    """Return where each message's content stands, from one more rendering; None where that settles nothing.

    The rendering has a mark for each content. What stands between the marks, with the contents between, must give the
    text again.
    """
    if conversation.tools or any("tool_calls" in message for message in conversation.messages):
        return None
    marks = [f"\ue000{index}\ue001" for index in range(len(conversation.messages))]
    marked = (message | {"content": mark} for message, mark in zip(conversation.messages, marks, strict=True))
    rest = apply(replace(conversation, messages=tuple(marked)), renderer)
    places, end = [], 0
    for message, mark in zip(conversation.messages, marks, strict=True):
        between, found, rest = rest.partition(mark)
        content = message["content"]
        begin = end + len(between)
        forms = [form for form in (content, content.strip()) if text.startswith(between + form, end)]
        if not found or not forms or mark in rest:
            return None
        end = begin + len(forms[0])
        places.append(Place(begin, end))
    return places if text[end:] == rest else None


def _places_one_by_one(conversation: Conversation, renderer: Renderer, text: str) -> list[Place]:
    """Return where each message's content and tool calls stand, from a rendering with each of these parts changed.

    Raises:
        DataError: A part makes no difference: the template leaves it out.
    """
    remedy = "bring a template that renders it (data.template), or take it out of the record"
    places = []
    for index, message in enumerate(conversation.messages):
        begin, end = len(text), 0
        for part, changed in _changed(message):
            messages = (*conversation.messages[:index], changed, *conversation.messages[index + 1 :])
            other = apply(replace(conversation, messages=messages), renderer)
            if other == text:
                place = f"messages[{index}].{part} (role {message['role']})"
                raise DataError(f"the chat template leaves out {place}; {remedy}")
            begin = min(begin, _common_prefix(text, other))
            end = max(end, len(text) - _common_prefix(text[::-1], other[::-1]))
        places.append(Place(begin, end))
    if conversation.tools:
        others = tuple(tool | {"function": tool["function"] | {"name": "x" * 9}} for tool in conversation.tools)
        if apply(replace(conversation, tools=others), renderer) == text:
            raise DataError(f"the chat template leaves out `tools`; {remedy}")
    return places


def _changed(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return copies of a message with one part another: its content, or one of its tool calls."""
    content, calls = message["content"], message.get("tool_calls", [])
    copies = []
    if content.strip() or not calls:
        copies.append(("content", message | {"content": _unlike(content)}))
    for number, call in enumerate(calls):
        function = call["function"]  # its name stays: some templates repeat it with the tool's response
        arguments = {"x": "x"} if function["arguments"] != {"x": "x"} else {"y": "y"}
        other = call | {"function": function | {"arguments": arguments}}
        changed = [*calls[:number], other, *calls[number + 1 :]]
        copies.append((f"tool_calls[{number}]", message | {"tool_calls": changed}))
    return copies


def _unlike(text: str) -> str:
    """Return a letter with which the text neither begins nor ends."""
    taken = text.strip()[:1] + text.strip()[-1:]
    return next(letter for letter in "xyz" if letter not in taken)


def _find(
    conversation: Conversation, index: int, text: str, places: list[Place], renderer: Renderer, tagged: bool
) -> Answer:
    """Find the answer messages[index] in the rendered text.

    Raises:
        DataError: What comes before the answer is not what generation would start from.
    """
    label, own = f"messages[{index}]", places[index]
    before = replace(conversation, messages=conversation.messages[:index])
    beginning = apply(before, renderer, prompting=True)
    if index + 1 < len(places):
        limit = places[index + 1].begin
    else:  # what a template adds only when no answer is asked for, as Phi's does, is not the answer's
        limit = _common_prefix(text, apply(conversation, renderer, prompting=True))
    if not text.startswith(beginning):
        if tagged:  # the tags say where the answer begins; it is after the message before
            return Answer(label, places[index - 1].end, own.end, limit)
        raise DataError(
            f"the chat template renders what comes before {label} differently once the answer is there, so it is not "
            "certain where the answer begins; train on later answers only (`weight: 0` in this message), or bring a "
            "template with {% generation %} (data.template)"
        )
    header = text[len(beginning) : own.begin]
    if header.strip() and not tagged and beginning == apply(before, renderer):
        raise DataError(
            f"the chat template does not heed add_generation_prompt and puts {header!r} before {label}; bring one that "
            "does (data.template)"
        )
    return Answer(label, len(beginning), own.end, limit)


def _common_prefix(first: str, second: str) -> int:
    """Return with how many characters two texts begin in common, by bisection: comparing slices is fast."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low
