"""Find the answers in a rendered conversation.

The positions come from renderings; nothing here knows the strings of certain templates. `layout` gives the position of
every part of the messages. An answer begins where the messages before it end if they are rendered with the generation
prompt. An ambiguous position is an error.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from lora_kit.data.formats import Completion, Example
from lora_kit.data.layout import Layout, check, check_control, locate, next_begin
from lora_kit.data.messages import Conversation
from lora_kit.data.parts import TAG, THOUGHT, Place
from lora_kit.data.remarks import UNMASKED, Remark
from lora_kit.data.rendering import Renderer, apply
from lora_kit.errors import DataError


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
        context: Ranges of characters [begin, end) that are never trained, e.g. masked reasoning inside an answer.
        remarks: Differences between the record and the text that are no errors.
    """

    text: str
    answers: tuple[Answer, ...] = ()
    boundary: int | None = None
    marked: list[bool] | None = None
    context: tuple[tuple[int, int], ...] = ()
    remarks: tuple[Remark, ...] = ()

    @staticmethod
    def of(values: Any) -> "Rendered":
        """Rebuild a `Rendered` from the lists that JSON makes of its tuples."""
        text, answers, boundary, marked, context, remarks = values
        spans = tuple((begin, end) for begin, end in context)
        return Rendered(
            text,
            tuple(Answer(*answer) for answer in answers),
            boundary,
            marked,
            spans,
            tuple(Remark(*remark) for remark in remarks),
        )


def render(example: Example, renderer: Renderer) -> Rendered:
    """Render an example and find its answers.

    Raises:
        DataError: The template fails, leaves out a part of the example, or the position of an answer is ambiguous.
    """
    if isinstance(example, Completion):
        remarks = _unmasked("completion" if example.prompt else "text", example.completion, renderer)
        return Rendered(example.prompt + example.completion, boundary=len(example.prompt), remarks=tuple(remarks))
    text = apply(example, renderer)
    layout = locate(example, renderer, text)
    remarks = check(layout)
    trained = list(range(len(example.messages))) if renderer.train_on == "all" else example.answers
    remarks += check_control(layout, set(trained))
    chosen = trained[-1:] if renderer.train_on == "last" else trained
    masked, unmasked = _reasoning(layout, chosen)
    remarks += unmasked
    if renderer.train_on == "all":
        endings: dict[tuple[str, bool], str] = {}
        turns = tuple(_turn(layout, index, endings) for index in sorted(example.excluded))
        return Rendered(text, context=turns + masked, remarks=tuple(remarks))
    marked = _marked_tokens(example, renderer) if "endgeneration" in renderer.chat_template else None
    answers = _answers(layout, chosen, has_marks=marked is not None)
    return Rendered(text, tuple(answers), marked=marked, context=masked, remarks=tuple(remarks))


def _turn(layout: Layout, index: int, endings: dict[tuple[str, bool], str]) -> tuple[int, int]:
    """Return the characters [begin, end) of a message, with what the template writes around it after its header.

    An answer begins where generation would start; if that is ambiguous, or for another role, where its own text begins.
    `endings` has the text between two messages by their kind, as in `_answers`, and is extended.
    """
    span, messages = layout.span(index), layout.conversation.messages
    begin = span[0] if span else None
    if messages[index]["role"] == "assistant" and index:
        kind = (messages[index - 1]["role"], "tool_calls" in messages[index - 1])
        start = _known_start(layout, index, endings.get(kind))
        if start is None:
            try:
                start, endings[kind] = _start(layout, index, has_marks=False)
            except DataError:
                start = begin
        begin = start if begin is None or start is None else min(start, begin)
    if begin is None:
        begin = max((layout.turn_end(end) for at, (_, end) in layout.spans.items() if at < index), default=0)
    return begin, layout.turn_end(max(begin, span[1] if span else begin))


def _marked_tokens(conversation: Conversation, renderer: Renderer) -> list[bool]:
    """Return for each token whether it is inside the template's `{% generation %}`."""
    output: Any = renderer.tokenizer.apply_chat_template(
        renderer.messages(conversation),
        tools=list(conversation.tools) if conversation.tools else None,
        chat_template=renderer.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return [bool(mark) for mark in output["assistant_masks"]]


def _reasoning(layout: Layout, trained: Iterable[int]) -> tuple[tuple[tuple[int, int], ...], list[Remark]]:
    """Return the characters [begin, end) of the reasoning of trained messages, and remarks on tags outside of it.

    Both are empty unless reasoning is masked.

    Raises:
        DataError: The reasoning that a content begins with is not in the text as it is.
    """
    if layout.renderer.reasoning != "mask":
        return (), []
    spans, remarks = list[tuple[int, int]](), list[Remark]()
    parts = [(place.part, place.begin, place.end) for index in trained for place in layout.own.get(index, [])]
    kept = [(part, *span) for part, span in layout.changed if span and part.message in trained]
    for part, begin, end in parts + kept:
        if part.kind == "reasoning":
            spans.append((begin, end))
        elif part.kind == "content" and layout.conversation.messages[part.message]["role"] == "assistant":
            if THOUGHT.fullmatch(part.value):
                if not (found := THOUGHT.match(layout.text, begin, end)):
                    raise DataError(
                        f"the reasoning inside {part.label} cannot be masked, because the chat template changes it; "
                        "write it into reasoning_content"
                    )
                spans.append(found.span(2))
                begin = found.start(4)
            remarks += _unmasked(part.label, layout.text[begin:end], layout.renderer)
    return tuple(sorted((begin, end) for begin, end in spans if begin < end)), remarks


def _unmasked(label: str, text: str, renderer: Renderer) -> list[Remark]:
    """Return a remark if a trained text has a tag of reasoning although reasoning is masked."""
    found = TAG.search(text) if renderer.reasoning == "mask" else None
    return [Remark(UNMASKED, repr(found[0]), label)] if found else []


def _answers(layout: Layout, chosen: list[int], *, has_marks: bool) -> list[Answer]:
    """Find trained answers in the rendered text.

    An answer begins where the messages before it end if they are rendered with the generation prompt. To save time,
    only the last answer of each kind is found in this way; the kind is the role of the message before the answer, and
    whether that message calls tools. The text between the two messages, e.g. a header, is then expected before the
    earlier answers of the same kind.

    Args:
        layout: The parts in the text.
        chosen: The indices of the answers.
        has_marks: Whether the template marks answers with `{% generation %}`.

    Raises:
        DataError: The text before the answer differs from the prompt that generation would start from.
    """
    endings: dict[tuple[str, bool], str] = {}
    answers = []
    for index in reversed(chosen):
        before = layout.conversation.messages[index - 1]
        kind = (before["role"], "tool_calls" in before)
        start = _known_start(layout, index, endings.get(kind)) if index else None
        if start is None:
            try:
                start, endings[kind] = _start(layout, index, has_marks=has_marks)
            except DataError:
                _start(layout, chosen[0], has_marks=has_marks)  # if the first answer has this error too, name it
                raise
        begin, end = layout.span(index) or (start, start)
        limit = next_begin(layout, index, layout.limit)
        if begin < start and not has_marks:
            raise _ambiguous(layout.conversation.label(index))
        _check_no_other(layout, index, start, end)
        answers.append(Answer(layout.conversation.label(index), start, end, limit))
    return answers[::-1]


def _check_no_other(layout: Layout, index: int, start: int, end: int) -> None:
    """Check that no part of another message stands between the beginning and the end of an answer.

    Raises:
        DataError: The template renders a message inside an answer, where it would be trained.
    """
    first = bisect_left(layout.places, start, key=lambda place: place.begin)
    for place in layout.places[first:]:
        if place.begin >= end:
            return
        if place.part.message not in (index, -1):
            raise DataError(
                f"the chat template renders {place.part.label} inside the answer {layout.conversation.label(index)}, "
                "so it would be trained; set data.template to a template that renders messages one after the other"
            )


def _known_start(layout: Layout, index: int, ending: str | None) -> int | None:
    """Return where an answer begins if the text after the message before it begins with `ending`, otherwise None."""
    own, before = layout.own.get(index), layout.own.get(index - 1)
    if ending is None or not own or not before:
        return None
    last = max(before, key=lambda place: place.mark_end)
    first = min(place.mark_begin for place in own)
    between = layout.marked_text[last.mark_end : first]
    if next(layout.marker.marks(between), None):  # e.g. Gemma renders a tool's response before the content of its call
        return None
    return last.end + len(ending) if between.startswith(ending) else None


def _start(layout: Layout, index: int, *, has_marks: bool) -> tuple[int, str]:
    """Return where an answer begins, and the text between the message before it and the answer."""
    marked, renderer = layout.marker.conversation, layout.renderer
    before = replace(marked, messages=marked.messages[:index])
    prompt = layout.marker.plain(apply(before, renderer, prompting=True))
    marks = list(layout.marker.marks(prompt))
    number, _, last = marks[-1] if marks else (-1, 0, 0)
    ending = prompt[last:]
    place = _place_before(layout, index, number)
    whole = layout.marked_text.startswith(prompt)
    history = any(part.kind == "reasoning" for part in layout.marker.parts)
    if not whole and not (place and history and layout.marked_text.startswith(ending, place.mark_end)):
        own = layout.span(index - 1)
        if has_marks and own:  # a rough start is enough, because `{% generation %}` marks the exact tokens
            return own[1], ""
        raise _ambiguous(layout.conversation.label(index))
    start = (place.end if place else 0) + len(ending)
    span = layout.span(index)
    header = layout.text[start : span[0]] if span else ""
    if (
        header.strip()
        and not has_marks
        and not renderer.prompts
        and prompt == layout.marker.plain(apply(before, renderer))
    ):
        label = layout.conversation.label(index)
        raise DataError(
            f"the chat template ignores add_generation_prompt and puts {header!r} before {label}; set data.template "
            "to a template that uses it"
        )
    return start, ending


def _place_before(layout: Layout, index: int, number: int) -> Place | None:
    """Return the last place of `marker.parts[number]` before message `index` in the marked text; None without one."""
    own = layout.own.get(index)
    first = min(place.mark_begin for place in own) if own else len(layout.marked_text)
    found = [p for p in layout.places if number >= 0 and p.part is layout.marker.parts[number] and p.mark_end <= first]
    return found[-1] if found else None


def _ambiguous(label: str) -> DataError:
    return DataError(
        f"the chat template renders what comes before {label} differently when the answer follows, so the "
        "beginning of the answer is ambiguous; train on later answers only (`weight: 0` in this message), or set "
        "data.template to a template with {% generation %}"
    )
