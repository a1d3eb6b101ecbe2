"""Render a conversation with a chat template, and find the answers in the text by comparing renderings.

The text is never searched for strings that a template might contain. Instead, the messages before an answer, rendered
with the generation prompt, give the text before the answer. The conversation rendered with a changed message shows
where the content of that message begins and ends, and whether the template leaves it out. A template for which the
position of an answer stays ambiguous is an error.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_kit.data.formats import Completion, Example
from lora_kit.data.messages import Conversation
from lora_kit.errors import BaseError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_CHARACTERS = 1 << 26  # of one rendered conversation


class TooLongError(Exception):
    """A template writes more than `TEXT_CHARACTERS`."""


# Some templates print today's date with strftime_now(format). The same data must give the same tokens tomorrow, because
# a resume refuses changed data. transformers has no argument for the date, so this macro replaces the function.
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
    """The settings that determine how examples become tokens. Properties that are slow to query are cached.

    Attributes:
        tokenizer: The base's tokenizer.
        template: A chat template that replaces the tokenizer's; None takes the tokenizer's.
        train_on: "assistant" trains the answers, "all" trains every token except the first.
        stop_token: The token that ends an answer; None takes the tokenizer's end-of-sequence token.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: str | None = None
    train_on: str = "assistant"
    stop_token: str | None = None

    @property
    def chat_template(self) -> str:
        """The chat template, with a fixed date if it prints the date.

        Raises:
            DataError: Neither the recipe nor the tokenizer has a template.
        """
        template = self.template or self.tokenizer.chat_template
        if isinstance(template, dict):  # some tokenizers have several templates
            template = template.get("default")
        if not template:
            raise DataError(
                "the tokenizer has no chat template, and the data is conversations; set data.template to a "
                "Jinja file, or use prompt-completion or text data"
            )
        prints_date = "strftime_now" in template and not template.startswith(FIXED_DATE)
        return FIXED_DATE + template if prints_date else template

    @property
    def stop(self) -> str:
        """The text of the stop token.

        Raises:
            BaseError: Neither the recipe nor the tokenizer names a stop token.
        """
        if not (stop := self.stop_token or self.tokenizer.eos_token):
            raise BaseError(
                "base.stop_token: the tokenizer has no end-of-sequence token; set the token that ends answers"
            )
        return str(stop)

    @cached_property
    def stop_id(self) -> int:
        """The stop token's id.

        Raises:
            BaseError: The stop token is not a single token of the tokenizer.
        """
        number = self.tokenizer.convert_tokens_to_ids(self.stop)
        unknown = number == self.tokenizer.unk_token_id and self.stop != self.tokenizer.unk_token
        if isinstance(number, int) and not unknown:
            return number
        ids = self.tokenizer.encode(self.stop, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:  # e.g. "\n", which vocabularies write as "Ċ"
            return int(ids[0])
        added = ", ".join(map(repr, self.added.values()))
        raise BaseError(
            f"base.stop_token: {self.stop!r} is not a single token of the tokenizer; its added tokens: {added[:1000]}"
        )

    @cached_property
    def stop_length(self) -> int:
        """The number of characters of the stop token."""
        return len(self.tokenizer.decode([self.stop_id]))

    @cached_property
    def added(self) -> dict[int, str]:
        """The contents of the tokens added to the vocabulary, by id, e.g. role headers and ends of turns."""
        return {number: token.content for number, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def bos(self) -> list[int]:
        """The ids that the tokenizer puts before raw text: its BOS token, or none."""
        first: list[int] = self.tokenizer("").input_ids[:1]
        return first if first == [self.tokenizer.bos_token_id] else []


class Span(NamedTuple):
    """The characters [begin, end) of a message's content and tool calls in the rendered text."""

    begin: int
    end: int


class Answer(NamedTuple):
    """The position of an answer in the rendered text, in characters.

    Attributes:
        label: The message's name in errors, e.g. `messages[2]`.
        start: Where the answer begins.
        end: Where its content ends.
        limit: Where the next message's content begins, or the text ends. The stop token is between `end` and `limit`.
    """

    label: str
    start: int
    end: int
    limit: int


class Rendered(NamedTuple):
    """A rendered example.

    Attributes:
        text: The text to tokenise.
        answers: The trained answers of a conversation.
        boundary: The character at which the completion of raw text begins; None for a conversation.
        marked: Whether each token is inside `{% generation %}`; None for a template without it.
    """

    text: str
    answers: tuple[Answer, ...] = ()
    boundary: int | None = None
    marked: list[bool] | None = None


def check_renderer(renderer: Renderer) -> None:
    """Check tokenizer and stop token before any example is read.

    Raises:
        BaseError: The tokenizer is not a fast tokenizer, or does not have the stop token.
    """
    if not renderer.tokenizer.is_fast:
        kind = type(renderer.tokenizer).__name__
        raise BaseError(
            f"base.repo: its tokenizer ({kind}) is not a fast tokenizer, so it cannot map characters to tokens; "
            "choose a base with a tokenizer.json"
        )
    _ = renderer.stop_id  # raises


def syntax_problem(renderer: Renderer, example: Conversation) -> str | None:
    """Return where and why the template is not valid Jinja; None if it is. transformers parses it for an example."""
    from jinja2 import TemplateSyntaxError

    try:
        apply(example, renderer)
    except DataError as error:
        cause = error.__cause__  # other errors may be due to the example
        if isinstance(cause, TemplateSyntaxError):
            line = cause.lineno - (FIXED_DATE.count("\n") if renderer.chat_template.startswith(FIXED_DATE) else 0)
            return f"data.template: line {line} is not valid Jinja: {cause.message}"
    return None


def render(example: Example, renderer: Renderer) -> Rendered:
    """Render an example and find its answers.

    Raises:
        DataError: The template fails, leaves out a part of the example, or the position of an answer is ambiguous.
    """
    if isinstance(example, Completion):
        return Rendered(example.prompt + example.completion, boundary=len(example.prompt))
    text = apply(example, renderer)
    spans = _spans_from_marks(example, renderer, text) or _spans_from_changes(example, renderer, text)
    if renderer.train_on == "all":
        return Rendered(text)
    marked = _marked_tokens(example, renderer) if "endgeneration" in renderer.chat_template else None
    answers = [_find(example, index, text, spans, renderer, marked is not None) for index in example.answers]
    return Rendered(text, tuple(answers), marked=marked)


def apply(conversation: Conversation, renderer: Renderer, *, prompting: bool = False) -> str:
    """Render a conversation with the chat template.

    Args:
        conversation: The conversation.
        renderer: Tokenizer and template.
        prompting: Whether to add the generation prompt, so that the text ends where an answer begins.

    Raises:
        DataError: The template fails.
        TooLongError: The text is too long.
        MemoryError: The template needs more memory than there is.
    """
    try:
        text: Any = renderer.tokenizer.apply_chat_template(
            list(conversation.messages),
            tools=list(conversation.tools) if conversation.tools else None,
            chat_template=renderer.chat_template,
            add_generation_prompt=prompting,
            tokenize=False,
        )
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a template is a program and can raise any error
        roles = ", ".join(message["role"] for message in conversation.messages) or "no messages"
        raise DataError(
            f"the chat template cannot render {roles}: {str(error)[:1000]}; change the record, or set another template "
            "(data.template)"
        ) from error
    if len(text) > TEXT_CHARACTERS:
        raise TooLongError
    return str(text)


def _marked_tokens(conversation: Conversation, renderer: Renderer) -> list[bool]:
    """Return for each token whether it is inside the template's `{% generation %}`."""
    output: Any = renderer.tokenizer.apply_chat_template(
        list(conversation.messages),
        tools=list(conversation.tools) if conversation.tools else None,
        chat_template=renderer.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return [bool(mark) for mark in output["assistant_masks"]]


def _spans_from_marks(conversation: Conversation, renderer: Renderer, text: str) -> list[Span] | None:
    """Find the content of every message with a single additional rendering; return None if that is ambiguous.

    The additional rendering has a unique mark in place of each content. Its text between the marks, joined with the
    contents, must equal the text.
    """
    if conversation.tools or any("tool_calls" in message for message in conversation.messages):
        return None
    marks = [f"\ue000{index}\ue001" for index in range(len(conversation.messages))]
    with_marks = (message | {"content": mark} for message, mark in zip(conversation.messages, marks, strict=True))
    rest = apply(replace(conversation, messages=tuple(with_marks)), renderer)
    spans, end = [], 0
    for message, mark in zip(conversation.messages, marks, strict=True):
        between, found_mark, rest = rest.partition(mark)
        content = message["content"]
        begin = end + len(between)
        candidates = [form for form in (content, content.strip()) if text.startswith(between + form, end)]
        if not found_mark or not candidates or mark in rest:
            return None
        end = begin + len(candidates[0])
        spans.append(Span(begin, end))
    return spans if text[end:] == rest else None


def _spans_from_changes(conversation: Conversation, renderer: Renderer, text: str) -> list[Span]:
    """Find the content and tool calls of every message by rendering the conversation with each part changed.

    Raises:
        DataError: The template leaves out a part: changing it does not change the text.
    """
    remedy = "set data.template to a template that renders it, or remove it from the record"
    spans = []
    for index, message in enumerate(conversation.messages):
        begin, end = len(text), 0
        for part, changed in _changed_copies(message):
            messages = (*conversation.messages[:index], changed, *conversation.messages[index + 1 :])
            changed_text = apply(replace(conversation, messages=messages), renderer)
            if changed_text == text:
                name = f"messages[{index}].{part} (role {message['role']})"
                raise DataError(f"the chat template leaves out {name}; {remedy}")
            begin = min(begin, _common_prefix(text, changed_text))
            end = max(end, len(text) - _common_prefix(text[::-1], changed_text[::-1]))
        spans.append(Span(begin, end))
    if conversation.tools:
        changed_tools = tuple(tool | {"function": tool["function"] | {"name": "x" * 9}} for tool in conversation.tools)
        if apply(replace(conversation, tools=changed_tools), renderer) == text:
            raise DataError(f"the chat template leaves out `tools`; {remedy}")
    return spans


def _changed_copies(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a copy of a message for each of its parts, with only that part changed, and the part's name.

    The parts are the content and each tool call.
    """
    content, calls = message["content"], message.get("tool_calls", [])
    copies = []
    if content.strip() or not calls:
        copies.append(("content", message | {"content": _different_letter(content)}))
    for number, call in enumerate(calls):
        # only the arguments change, because some templates repeat the function's name with the response of the tool
        function = call["function"]
        arguments = {"x": "x"} if function["arguments"] != {"x": "x"} else {"y": "y"}
        changed = call | {"function": function | {"arguments": arguments}}
        changed_calls = [*calls[:number], changed, *calls[number + 1 :]]
        copies.append((f"tool_calls[{number}]", message | {"tool_calls": changed_calls}))
    return copies


def _different_letter(text: str) -> str:
    """Return a letter that is neither the first nor the last of the text."""
    taken = text.strip()[:1] + text.strip()[-1:]
    return next(letter for letter in "xyz" if letter not in taken)


def _find(
    conversation: Conversation, index: int, text: str, spans: list[Span], renderer: Renderer, has_marks: bool
) -> Answer:
    """Find the answer messages[index] in the rendered text.

    Args:
        conversation: The conversation.
        index: The index of the answer's message.
        text: The rendered conversation.
        spans: The content of every message in the text.
        renderer: Tokenizer and template.
        has_marks: Whether the template marks answers with `{% generation %}`.

    Raises:
        DataError: The text before the answer differs from the prompt that generation would start from.
    """
    label, own = f"messages[{index}]", spans[index]
    before = replace(conversation, messages=conversation.messages[:index])
    beginning = apply(before, renderer, prompting=True)
    if index + 1 < len(spans):
        limit = spans[index + 1].begin
    else:  # text that the template adds only without a generation prompt (as Phi's does) is not part of the answer
        limit = _common_prefix(text, apply(conversation, renderer, prompting=True))
    if not text.startswith(beginning):
        if has_marks:  # the marks tell the exact tokens; it is enough to start after the previous message
            return Answer(label, spans[index - 1].end, own.end, limit)
        raise DataError(
            f"the chat template renders what comes before {label} differently when the answer follows, so the "
            "beginning of the answer is ambiguous; train on later answers only (`weight: 0` in this message), or set "
            "data.template to a template with {% generation %}"
        )
    header = text[len(beginning) : own.begin]
    if header.strip() and not has_marks and beginning == apply(before, renderer):
        raise DataError(
            f"the chat template ignores add_generation_prompt and puts {header!r} before {label}; set data.template "
            "to a template that uses it"
        )
    return Answer(label, len(beginning), own.end, limit)


def _common_prefix(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts, by bisection, since comparing slices is fast."""
    lengths = range(1, min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length])
