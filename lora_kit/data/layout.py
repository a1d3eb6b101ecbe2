"""Find the parts of a conversation in its rendered text, and check that none is missing or changed.

It is an error if the template leaves out a message, tool or call, renders no reasoning at all, or changes an answer.
Other differences are remarks, e.g. a changed message that is not trained, or reasoning left out of earlier answers.
"""

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property

from lora_kit.data.messages import Conversation
from lora_kit.data.parts import Marker, Part, Place, missing_leaves, parameter_leaves
from lora_kit.data.remarks import CHANGED, CONTROL, HISTORY, KEYS, TOOLS, TRIMMED, Remark
from lora_kit.data.rendering import Renderer, apply
from lora_kit.errors import DataError

ATTEMPTS = 8  # times that a conversation is rendered with marks, each time with fewer
REMEDY = "set data.template to a template that renders it, or remove it from the record"


@dataclass
class Layout:
    """Where the parts of a conversation stand in its rendered text.

    Attributes:
        conversation: The conversation.
        renderer: Tokenizer and template.
        text: The rendered conversation.
        marker: The conversation with marks.
        marked_text: The rendering of the conversation with marks.
        places: The places of the marked parts, in the order of the text.
        changed: The parts without a mark, each with the characters [begin, end) of the text that it changes, or None.
        prompted: Whether the marked text ends with the generation prompt.
    """

    conversation: Conversation
    renderer: Renderer
    text: str
    marker: Marker
    marked_text: str
    places: list[Place]
    prompted: bool
    changed: list[tuple[Part, tuple[int, int] | None]] = field(default_factory=list)

    @cached_property
    def limit(self) -> int:
        """Where the texts with and without generation prompt begin to differ; without a prompt, Phi adds a token."""
        if not self.prompted:
            return common_prefix(self.text, apply(self.conversation, self.renderer, prompting=True))
        end, mark_end = (self.places[-1].end, self.places[-1].mark_end) if self.places else (0, 0)
        return end + common_prefix(self.text[end:], self.marked_text[mark_end:])

    @cached_property
    def own(self) -> dict[int, list[Place]]:
        """The places of each message's content, reasoning and calls, all after the end of the message before it."""
        own: dict[int, list[Place]] = {}
        for place in self.places:
            if place.part.kind not in ("tool", "key"):
                own.setdefault(place.part.message, []).append(place)
        cursor = 0
        for index in sorted(own):
            first: dict[int, Place] = {}
            later = [place for place in own[index] if place.mark_begin >= cursor]
            for place in later or own[index]:
                first.setdefault(id(place.part), place)
            own[index] = list(first.values())
            cursor = max(place.mark_end for place in own[index])
        return own

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """The characters [begin, end) of each message that has text."""
        found: dict[int, list[tuple[int, int]]] = {}
        for index, places in self.own.items():
            found[index] = [(place.begin, place.end) for place in places]
        for part, span in self.changed:
            if span and part.kind in ("content", "reasoning", "arguments"):
                found.setdefault(part.message, []).append(span)
        return {index: (min(begin for begin, _ in own), max(end for _, end in own)) for index, own in found.items()}

    @cached_property
    def called(self) -> set[str]:
        """The names of the called functions."""
        calls = (call for message in self.conversation.messages for call in message.get("tool_calls", ()))
        return {call["function"]["name"] for call in calls}

    @cached_property
    def order(self) -> list[int]:
        """The indices of the messages that have text, ascending."""
        return sorted(self.spans)

    def span(self, index: int) -> tuple[int, int] | None:
        """Return the characters [begin, end) of a message; None if none of the message is in the text."""
        return self.spans.get(index)

    def turn_end(self, end: int) -> int:
        """Return the end of the stop token between `end` and the next message; `end` if there is none."""
        following = min((begin for begin, _ in self.spans.values() if begin >= end), default=len(self.text))
        stop = self.text.find(self.renderer.stop, end, following)
        return end if stop < 0 else stop + len(self.renderer.stop)


def locate(conversation: Conversation, renderer: Renderer, text: str) -> Layout:
    """Find every part of a conversation in its rendered text.

    The marked text, with each mark replaced by its part, usually equals the text. It does not if the template changes a
    part, or tests its content and therefore renders a mark in another way. Then parts keep their text instead of a
    mark: first the part at the first difference, and the parts with a string that the template may test. For each of
    them, a rendering with another content shows which characters of the text depend on it.
    """
    kept: frozenset[str] = frozenset()
    leafwise: frozenset[str] = frozenset()
    prompted = True
    for attempt in range(ATTEMPTS):
        marker = Marker(conversation, text, kept, leafwise)
        found, marked_text = _match(marker, renderer, prompted=prompted)
        if isinstance(found, list):
            layout = Layout(conversation, renderer, text, marker, marked_text, found, prompted)
            unread = _unread(layout)
            layout.changed = [
                (part, None if part.kind == "key" and _key(part) in unread else changed_span(part, layout))
                for part in marker.unmarked
            ]
            return layout
        if isinstance(found, set):
            leafwise |= found
            continue
        everything = frozenset(part.label for part in (*marker.parts, *marker.unmarked))
        if attempt >= ATTEMPTS - 2:
            kept, prompted = everything, False
        else:
            if kept or found is None:
                prompted = False
            kept |= {found.label} if found else set()
            compared = ("key", "name") if attempt else ()
            kept |= {part.label for part in marker.parts if part.kind in compared or _triggers(part, renderer)}
    raise DataError(f"the chat template renders the same messages differently; {REMEDY}")


def _match(marker: Marker, renderer: Renderer, *, prompted: bool) -> tuple[list[Place] | set[str] | Part | None, str]:
    try:
        marked_text = marker.plain(apply(marker.conversation, renderer, prompting=prompted))
    except DataError:
        return None, ""
    if not_json := marker.not_json(marked_text):
        return not_json, ""
    return marker.match(marked_text, open_end=prompted), marked_text


def _key(part: Part) -> str:
    """Return the key that has this part as its value in the message."""
    return part.label.partition(".")[2]


def _unread(layout: Layout) -> set[str]:
    """Return the keys without a mark that several messages have and the template reads in none of them.

    The text is the same without such a key, so one rendering checks the key in all messages.
    """
    keys: dict[str, set[int]] = {}
    for part in layout.marker.unmarked:
        if part.kind == "key":
            keys.setdefault(_key(part), set()).add(part.message)
    return {key for key, indices in keys.items() if len(indices) > 1 and _same_without(key, indices, layout)}


def _same_without(key: str, indices: set[int], layout: Layout) -> bool:
    """Return whether the text is the same without a key of some messages."""
    messages = tuple(
        {name: value for name, value in message.items() if name != key} if index in indices else message
        for index, message in enumerate(layout.conversation.messages)
    )
    try:
        return apply(replace(layout.conversation, messages=messages), layout.renderer) == layout.text
    except DataError:
        return False


def _triggers(part: Part, renderer: Renderer) -> bool:
    """Return whether a part contains a string that the template may test for."""
    return isinstance(part.value, str) and bool(renderer.triggers.search(part.value))


def changed_span(part: Part, layout: Layout) -> tuple[int, int] | None:
    """Return the characters [begin, end) of the text that change with a part; None if the text does not change."""
    text = layout.text
    if part.kind == "name":  # a template may compare names, so a changed name tells nothing
        return (0, 0) if part.value in text and not _call_is_left_out(part, layout) else None
    changed = apply(_with_change(part, layout.conversation), layout.renderer)
    if changed == text:
        return None
    begin = common_prefix(text, changed)
    end = len(text) - common_prefix(text[begin:][::-1], changed[begin:][::-1])
    for form in part.forms(None) if isinstance(part.value, str) else ():
        if text.startswith(form, begin) and begin + len(form) >= end:
            return begin, begin + len(form)
        if end - len(form) >= begin and text.endswith(form, begin, end):  # text before the part depends on it too
            return end - len(form), end
    return begin, end


def _call_is_left_out(name: Part, layout: Layout) -> bool:
    """Return whether the text is the same without a call; False if it has arguments, which are looked for themselves.

    Args:
        name: The name of the called function, which may also stand in the text as that of a tool.
        layout: The conversation and its text.
    """
    messages = list(layout.conversation.messages)
    calls = list(messages[name.message]["tool_calls"])
    number = int(re.findall(r"\d+", name.label.partition(".")[2])[0])
    if calls.pop(number)["function"]["arguments"]:
        return False
    messages[name.message] = messages[name.message] | {"tool_calls": calls}
    try:
        return apply(replace(layout.conversation, messages=tuple(messages)), layout.renderer) == layout.text
    except DataError:  # e.g. the template refuses the response to a call that is not there
        return False


def _with_change(part: Part, conversation: Conversation) -> Conversation:
    """Return the conversation with a part changed.

    A key of a message is removed, if that is the part. The text of a message and the arguments of a call are replaced.
    If the part belongs to a tool, the names and descriptions of all tools are replaced.
    """
    if part.kind == "tool":
        tools = tuple(
            tool | {"function": tool["function"] | {"name": "x" * 9, "description": "x" * 9}}
            for tool in conversation.tools or ()
        )
        return replace(conversation, tools=tools)
    message, path = dict(conversation.messages[part.message]), part.label.partition(".")[2]
    if part.kind == "arguments":
        calls = list(message["tool_calls"])
        number = int(re.findall(r"\d+", path)[0])
        function = calls[number]["function"]
        arguments = {"x": "x"} if function["arguments"] != {"x": "x"} else {"y": "y"}
        calls[number] = calls[number] | {"function": function | {"arguments": arguments}}
        message["tool_calls"] = calls
    elif part.kind == "key":
        del message[_key(part)]
    else:
        message[path] = _different_letter(part.value)
    messages = (*conversation.messages[: part.message], message, *conversation.messages[part.message + 1 :])
    return replace(conversation, messages=messages)


def check(layout: Layout) -> list[Remark]:
    """Check that the text has every part, and return remarks on differences that are no errors.

    Raises:
        DataError: The template leaves out a message, a call, a tool or the reasoning of a trained answer, or changes
            an answer.
    """
    conversation, renderer, remarks = layout.conversation, layout.renderer, list[Remark]()
    rendered = {id(place.part) for place in layout.places}
    lost = [part for part in layout.marker.parts if id(part) not in rendered]
    lost += [part for part, span in layout.changed if span is None]
    for part in sorted(lost, key=lambda part: part.message < 0):  # report messages before tools
        role = conversation.messages[part.message]["role"] if part.message >= 0 else ""
        if part.kind == "key":
            # no remark for the name of a tool that its call shows
            if _key(part) != "name" or part.value not in [*layout.called]:
                remarks.append(Remark(KEYS, _key(part), part.label))
        elif part.kind == "tool":
            if part.label.endswith(".description"):
                remarks.append(Remark(TOOLS, "description", part.label))
            else:
                raise DataError(f"the chat template leaves out `tools`; {REMEDY}")
        elif part.kind == "reasoning":
            remarks.append(_reasoning_left_out(part, conversation, renderer))
        else:
            raise DataError(f"the chat template leaves out {part.label.removesuffix('.name')} (role {role}); {REMEDY}")
    for part, span in layout.changed:
        if span is not None and part.kind not in ("key", "tool", "name") and not _is_whole(part, span, layout):
            remarks.append(_not_whole(part, span, layout))
    remarks += _trimmed(layout) + _blank(layout) + _tool_remarks(layout)
    _check_leaves(layout)
    return remarks


def _reasoning_left_out(part: Part, conversation: Conversation, renderer: Renderer) -> Remark:
    """Return a remark on reasoning that the template leaves out of an earlier answer by its own rules.

    Raises:
        DataError: The template reads no reasoning at all.
    """
    in_content = part.label.endswith(".content")
    if not in_content and renderer.reasoning_key is None and part.message in conversation.answers:
        raise DataError(
            f"the chat template leaves out {part.label} (role assistant); set data.template to a template that renders "
            "it, write it into content as <think>...</think>, or remove it from the record"
        )
    return Remark(HISTORY, "", part.label)


def _is_whole(part: Part, span: tuple[int, int], layout: Layout) -> bool:
    """Return whether the characters that depend on a part without a mark are the complete part."""
    begin, end = span
    if part.kind == "arguments":
        region = layout.text[max(0, begin - 2) : end + 2]  # the changed arguments may share a letter with these
        return not missing_leaves(part.value, region, everything=True)
    return layout.text[begin:end] in part.forms(None)


def _not_whole(part: Part, span: tuple[int, int], layout: Layout) -> Remark:
    """Return a remark on a message that the template changes.

    Raises:
        DataError: The message is trained.
    """
    if part.message not in layout.conversation.answers and layout.renderer.train_on != "all":
        return Remark(CHANGED, "", part.label)
    found = layout.text[span[0] : span[1]]
    raise DataError(
        f"the chat template does not render {part.label} (role {layout.conversation.messages[part.message]['role']}) "
        f"as it is, but {found[:60]!r}; set data.template to a template that renders it as it is, or change the record"
    )


def _tool_remarks(layout: Layout) -> list[Remark]:
    """Return remarks on tools whose parameters, or a description that is no string, the template leaves out.

    Both are looked for only in the text between the parts of messages, since calls contain names of parameters too.
    """
    tools = layout.conversation.tools or ()
    if not tools:
        return []
    spans = sorted((place.begin, place.end) for place in layout.places if place.part.message >= 0)
    between = zip([0, *(end for _, end in spans)], [*(begin for begin, _ in spans), len(layout.text)], strict=True)
    region, remarks = "\n".join(layout.text[begin:end] for begin, end in between), list[Remark]()
    for number, tool in enumerate(tools):
        function, label = tool["function"], f"tools[{number}]"
        if missing_leaves(parameter_leaves(function.get("parameters")), region, everything=True):
            remarks.append(Remark(TOOLS, "parameters", f"{label}.parameters"))
        description = function.get("description")
        if not isinstance(description, str | None) and missing_leaves(description, region, everything=True):
            remarks.append(Remark(TOOLS, "description", f"{label}.description"))
    return remarks


def _trimmed(layout: Layout) -> list[Remark]:
    """Return remarks on messages whose leading or trailing blanks the template removes.

    The conversation is rendered once more, with marks but without these blanks. If the template keeps blanks, each text
    between two marks becomes shorter by the number of its blanks.
    """
    if not any(part.kind == "content" and any(part.edges) for part in layout.marker.parts):
        return []
    marker = replace(layout.marker, edges=False, parts=[], unmarked=[], styles={})
    bare = marker.plain(apply(marker.conversation, layout.renderer, prompting=layout.prompted))
    marks = list(marker.marks(bare))
    numbers = {id(part): number for number, part in enumerate(layout.marker.parts)}
    if [number for number, _, _ in marks] != [numbers[id(place.part)] for place in layout.places]:
        return []
    remarks, places = list[Remark](), layout.places
    for order, place in enumerate(places):
        before, after = place.part.edges
        if place.part.kind != "content" or not (before or after):
            continue
        previous, bare_previous = (places[order - 1].mark_end, marks[order - 1][2]) if order else (0, 0)
        last = order + 1 == len(places)
        following = len(layout.marked_text) if last else places[order + 1].mark_begin
        bare_following = len(bare) if last else marks[order + 1][1]
        shorter_before = (place.mark_begin - previous) - (marks[order][1] - bare_previous)
        shorter_after = (following - place.mark_end) - (bare_following - marks[order][2])
        others = (
            len(places[order - 1].part.edges[1]) if order else 0,
            0 if last else len(places[order + 1].part.edges[0]),
        )
        if shorter_before < len(before) + others[0] or shorter_after < len(after) + others[1]:
            remarks.append(Remark(TRIMMED, "", place.part.label))
    return remarks


def _blank(layout: Layout) -> list[Remark]:
    """Return remarks on what the template leaves out and no mark shows: answers of blanks, thoughts without text."""
    conversation, remarks = layout.conversation, list[Remark]()
    messages, blanks = list(conversation.messages), dict[str, int]()
    for index, message in enumerate(conversation.messages):
        label, content = f"{conversation.label(index)}.content", message["content"]
        thought, own = Marker.thought(message), layout.own.get(index)
        if thought and not thought[1] and own and label not in layout.marker.kept:
            first = bisect_left(layout.places, min(place.begin for place in own), key=lambda place: place.begin)
            before = layout.places[first - 1].end if first else 0
            if "<think>" not in layout.text[before : layout.places[first].begin]:
                remarks.append(Remark(HISTORY, "", label))
        elif message["role"] == "assistant" and content.isspace():
            messages[index], blanks[label] = message | {"content": ""}, len(content)
    if blanks:
        bare = apply(replace(conversation, messages=tuple(messages)), layout.renderer)
        if len(layout.text) - len(bare) < sum(blanks.values()):
            remarks.append(Remark(TRIMMED, "", next(iter(blanks))))
    return remarks


def _check_leaves(layout: Layout) -> None:
    """Check the keys, booleans and nulls of arguments whose values are marked one by one.

    Raises:
        DataError: A key or a value is not in the text.
    """
    for index, message in enumerate(layout.conversation.messages):
        for number, call in enumerate(message.get("tool_calls", ())):
            label = f"{layout.conversation.label(index)}.tool_calls[{number}]"
            if label not in layout.marker.leafwise or label in layout.marker.kept:
                continue
            own = [place for place in layout.own.get(index, []) if place.part.label in (label, f"{label}.name")]
            later = [p.begin for p in layout.own.get(index, []) if own and p.begin >= own[-1].end]
            end = min(later, default=next_begin(layout, index, layout.limit))
            if not own or missing_leaves(call["function"]["arguments"], layout.text[own[0].begin : end]):
                raise DataError(f"the chat template leaves out a part of {label} (role assistant); {REMEDY}")


def next_begin(layout: Layout, index: int, default: int) -> int:
    """Return where the next message with text begins; `default` if there is none."""
    later = bisect_right(layout.order, index)
    return layout.spans[layout.order[later]][0] if later < len(layout.order) else default


def check_control(layout: Layout, trained: set[int]) -> list[Remark]:
    """Return remarks on control tokens in the text of messages: the tokenizer would take the text for the token.

    Raises:
        DataError: The message is trained.
    """
    control, remarks = layout.renderer.control, list[Remark]()
    texts = [(place.part, layout.text[place.begin : place.end]) for place in layout.places]
    texts += [(part, str(part.value)) for part, span in layout.changed if span]
    for part, text in texts:
        if not (found := control.search(text)):
            continue
        if part.message in trained:
            raise DataError(
                f"{part.label} contains {found[0]!r}, which the tokenizer takes for its control token; remove it from "
                "the record, e.g. write a blank inside it"
            )
        remarks.append(Remark(CONTROL, repr(found[0]), part.label))
    return remarks


def _different_letter(text: str) -> str:
    """Return a letter that is neither the first nor the last of the text."""
    taken = text.strip()[:1] + text.strip()[-1:]
    return next(letter for letter in "xyz" if letter not in taken)


def common_prefix(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts, by bisection, since comparing slices is fast."""
    lengths = range(1, min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length])
