"""Render a conversation with a chat template, as the recipe and the tokenizer have it."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_kit.data.messages import REASONING, Conversation, reasoning_key
from lora_kit.errors import BaseError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_CHARACTERS = 1 << 26  # most characters of a rendered conversation


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
        train_on: "assistant" trains the answers, "last" the last answer, "all" every token except the first.
        reasoning: "train" trains the reasoning of answers, "mask" makes it context.
        stop_token: The token that ends an answer; None takes the tokenizer's end-of-sequence token.
        kind: The recipe's `objective.kind`, which decides the formats of records.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: str | None = None
    train_on: str = "assistant"
    reasoning: str = "train"
    stop_token: str | None = None
    kind: str = "sft"

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
        needs_date = "strftime_now" in template and not template.startswith(FIXED_DATE)
        return FIXED_DATE + template if needs_date else template

    @property
    def prints_date(self) -> bool:
        """Whether the chat template prints today's date, for which a fixed date is put.

        Raises:
            DataError: There is no chat template.
        """
        return self.chat_template.startswith(FIXED_DATE)

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
    def unknown_id(self) -> int | None:
        """The id of the token for characters that the tokenizer does not know; None if there is none."""
        number: int | None = self.tokenizer.unk_token_id
        return number

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches the text of a control token: a special token of the tokenizer, or the stop token."""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special} | {self.stop}
        texts = {text for text in texts if text.strip() and (len(text) > 1 or text in self.added.values())}
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def reasoning_key(self) -> str | None:
        """The key of a message from which the chat template reads reasoning; None if it reads none."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        for key in REASONING:
            for calls in ({}, {"tool_calls": [call]}):
                answer = {"role": "assistant", "content": "y", key: "Zq7Z", **calls}
                if "Zq7Z" in (self._probe(answer) or ""):
                    return key
        return None

    @cached_property
    def string_arguments(self) -> bool:
        """Whether the chat template expects the arguments of a call as JSON text: it fails for an object, or prints
        the object of Python."""
        found = []
        for arguments in ({"Zq7": "Zq7"}, '{"Zq7": "Zq7"}'):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            found.append(self._probe({"role": "assistant", "content": "", "tool_calls": [call]}))
        as_object, as_text = found
        return bool(as_text and '{"Zq7": "Zq7"}' in as_text and (as_object is None or "{'Zq7': 'Zq7'}" in as_object))

    @cached_property
    def triggers(self) -> re.Pattern[str]:
        """Matches what the template may look for in a message: the longer strings in its source."""
        texts = re.findall(r"""'([^'\\\n]{3,40})'|"([^"\\\n]{3,40})\"""", self.chat_template)
        found = {single or double for single, double in texts if not (single or double).isalnum()}
        return re.compile("|".join(map(re.escape, sorted(found))) or r"(?!)")

    @cached_property
    def prompts(self) -> bool:
        """Whether add_generation_prompt changes the rendering of a question."""
        question: Any = Conversation(({"role": "user", "content": "x"},))
        try:
            return apply(question, self) != apply(question, self, prompting=True)
        except DataError:
            return False

    def _probe(self, answer: dict[str, Any]) -> str | None:
        """Return the rendering of a question and an answer as they are; None if the template fails."""
        try:
            return _apply([{"role": "user", "content": "x"}, answer], None, self, prompting=False)
        except DataError:
            return None

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Return the messages with reasoning under the key, and call arguments in the form, that the template reads."""
        messages = list(conversation.messages)
        for index, message in enumerate(messages):
            if (key := reasoning_key(message)) and self.reasoning_key not in (None, key):
                reasoning = {str(self.reasoning_key): message[key]}
                message = {name: value for name, value in message.items() if name != key} | reasoning
            if "tool_calls" in message and self.string_arguments:
                message = message | {"tool_calls": [_with_text(call) for call in message["tool_calls"]]}
            messages[index] = message
        return messages

    @cached_property
    def bos(self) -> list[int]:
        """The ids that the tokenizer puts before raw text: its BOS token, or none."""
        whole: list[int] = self.tokenizer("a").input_ids  # not "": an appended EOS would stand where BOS does
        text: list[int] = self.tokenizer("a", add_special_tokens=False).input_ids
        first = whole[:1]
        return first if first == [self.tokenizer.bos_token_id] and whole[: len(text)] != text else []


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
    return _apply(renderer.messages(conversation), conversation.tools, renderer, prompting=prompting)


def _apply(
    messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...] | None, renderer: Renderer, *, prompting: bool
) -> str:
    try:
        text: Any = renderer.tokenizer.apply_chat_template(
            messages,
            tools=list(tools) if tools else None,
            chat_template=renderer.chat_template,
            add_generation_prompt=prompting,
            tokenize=False,
        )
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a template is a program and can raise any error
        roles = ", ".join(message["role"] for message in messages) or "no messages"
        raise DataError(
            f"the chat template cannot render {roles}: {str(error)[:1000]}; change the record, or set another template "
            "(data.template)"
        ) from error
    if len(text) > TEXT_CHARACTERS:
        raise TooLongError
    return str(text)


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments as JSON text."""
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
