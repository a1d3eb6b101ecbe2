"""Find the parts of a conversation in its rendered text, and show that the text has all of them.

A part is a text of the record: the content or the reasoning of a message, the name or the arguments of a tool call, the
name of a tool, or another key of a message. `Marker` makes a copy of the conversation with a unique mark in place of
each part. The rendering of the copy, with every mark replaced by its part, must be the rendered text. Then the text has
every part whose mark was rendered, whole and at a known place. This takes one rendering for any number of parts.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from lora_kit.data.messages import Conversation, reasoning_key

TAGS = ("think", "thinking", "thought", "reasoning")  # around reasoning
TAG = re.compile(rf"</?(?:{'|'.join(TAGS)})>|\[/?THINK\]")
THOUGHT = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.S)
IDENTITY = ("id", "tool_call_id")  # keys that connect a call with its response; templates compare them
FIXED = ("role", "content", "tool_calls", *IDENTITY)

Style = Callable[[Any], str]


def _encoded_twice(value: Any) -> str:
    return json.dumps(json.dumps(value, ensure_ascii=False), ensure_ascii=False)[1:-1]


STYLES: tuple[Style, ...] = (  # how templates write an object
    partial(json.dumps, ensure_ascii=False),
    partial(json.dumps, ensure_ascii=False, separators=(",", ":")),
    partial(json.dumps, ensure_ascii=False, indent=2),
    partial(json.dumps, ensure_ascii=False, indent=4),
    _encoded_twice,
)


@dataclass(frozen=True)
class Part:
    """A text of the record that the rendered text should have.

    Attributes:
        label: The part's name in errors, e.g. `messages[1].content`. Of parts with one label all or none are marked.
        kind: "content", "reasoning", "name", "arguments", "tool" or "key".
        message: The index of its message; -1 for a tool.
        value: The text without blanks at its edges, a number, or the arguments of a call.
        edges: The blanks before and after the text.
    """

    label: str
    kind: str
    message: int
    value: Any
    edges: tuple[str, str] = ("", "")

    def forms(self, style: Style | None) -> Iterator[str]:
        """Yield the texts that may stand in place of the part: as it is, and as JSON writes it inside a string."""
        if style is not None:
            yield style(self.value)
            yield _keywords(style, ensure_ascii=True)(self.value)
            for ascii_only in (False, True):
                yield _keywords(style, ensure_ascii=ascii_only, sort_keys=True)(self.value)
        elif isinstance(self.value, str):
            yield self.value
            yield json.dumps(self.value, ensure_ascii=False)[1:-1]
            yield json.dumps(self.value)[1:-1]
        else:
            yield json.dumps(self.value)
            yield str(self.value)


def _keywords(style: Style, **keywords: Any) -> Style:
    return partial(style, **keywords) if isinstance(style, partial) else style


class Place(NamedTuple):
    """Where a part stands: characters [begin, end) of the text and [mark_begin, mark_end) of the marked text."""

    part: Part
    begin: int
    end: int
    mark_begin: int
    mark_end: int


@dataclass
class Marker:
    """A conversation with marks in place of its parts.

    Attributes:
        source: The conversation.
        text: Its rendered text, in which no mark may occur.
        kept: Labels of the parts that are not replaced by a mark.
        leafwise: Labels of the arguments whose values get a mark each, because the template writes no JSON.
        edges: Whether the blanks at the edges of a text are kept around its mark.
        parts: The marked parts; the number of a mark is its index.
        unmarked: The parts that are not replaced by a mark.
        styles: How the template writes the arguments with a mark, by the number of the mark.
    """

    source: Conversation
    text: str
    kept: frozenset[str] = frozenset()
    leafwise: frozenset[str] = frozenset()
    edges: bool = True
    parts: list[Part] = field(default_factory=list)
    unmarked: list[Part] = field(default_factory=list)
    styles: dict[int, Style] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._prefix, self._digits = "Zq7", "739"
        while self._prefix in self.text:
            self._prefix += "q"
        while self._digits in self.text:
            self._digits += "7"
        self._mark = re.compile(rf"{self._prefix}(\d+)Z|{self._digits}(\d{{6}})(?:\.5)?")
        self._half = re.compile(rf"{self._prefix}(\d+)[KV]")
        tools = self.source.tools and tuple(self._tool(number, tool) for number, tool in enumerate(self.source.tools))
        messages = tuple(self._message(index, message) for index, message in enumerate(self.source.messages))
        self.conversation = replace(self.source, messages=messages, tools=tools)

    def _text(self, label: str, kind: str, message: int, text: str, *, blank: bool = False) -> str:
        """Return a text with a mark between its blanks; `blank` also marks a text of blanks only."""
        core = text.strip()
        before, after = (text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]) if core else (text, "")
        part = Part(label, kind, message, core, (before, after))
        if not core and not blank:
            return text
        if label in self.kept:
            self.unmarked.append(part)
            return text
        mark = self._add(part)
        return before + mark + after if self.edges else mark

    def _add(self, part: Part) -> str:
        self.parts.append(part)
        return f"{self._prefix}{len(self.parts) - 1}Z"

    def _tool(self, number: int, tool: dict[str, Any]) -> dict[str, Any]:
        function, label = tool["function"], f"tools[{number}]"
        changed = {"name": self._text(label, "tool", -1, function["name"])}
        if isinstance(function.get("description"), str):
            changed["description"] = self._text(f"{label}.description", "tool", -1, function["description"])
        return tool | {"function": function | changed}

    def _message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        label, changed = self.source.label(index), dict(message)
        if reasoning := reasoning_key(message):
            changed[reasoning] = self._text(f"{label}.{reasoning}", "reasoning", index, message[reasoning])
        changed["content"] = self._content(f"{label}.content", index, message)
        for key in message:
            if key not in (*FIXED, reasoning) and message[key] not in ("", [], {}):
                changed[key] = self._key(f"{label}.{key}", index, message[key])
        if "tool_calls" in message:
            calls = enumerate(message["tool_calls"])
            changed["tool_calls"] = [self._call(f"{label}.tool_calls[{number}]", index, call) for number, call in calls]
        return changed

    def _content(self, label: str, index: int, message: dict[str, Any]) -> str:
        content = message["content"]
        if thought := self.thought(message):
            if label in self.kept:
                return self._text(label, "content", index, content)
            opening, reasoning, closing, answer = thought
            reasoning = self._text(label, "reasoning", index, reasoning)
            return opening + reasoning + closing + self._text(label, "content", index, answer)
        return self._text(label, "content", index, content, blank=message["role"] != "assistant")

    @staticmethod
    def thought(message: dict[str, Any]) -> tuple[str, ...] | None:
        """Return an assistant's content as (opening, reasoning, closing, answer) if it begins with `<think>`."""
        if message["role"] != "assistant" or reasoning_key(message) or "<think>" not in message["content"]:
            return None
        found = THOUGHT.fullmatch(message["content"])
        return found.groups() if found else None

    def _key(self, label: str, index: int, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(label, "key", index, value)
        self.unmarked.append(Part(label, "key", index, value))
        return value

    def _call(self, label: str, index: int, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name = self._text(f"{label}.name", "name", index, function["name"])
        arguments = function["arguments"]
        part = Part(label, "arguments", index, arguments)
        if not arguments:
            pass
        elif label in self.kept:
            self.unmarked.append(part)
        elif label in self.leafwise:
            arguments = self._leaves(label, index, arguments)
        else:
            mark = self._add(part)[:-1]
            arguments = {f"{mark}K": f"{mark}V"}
        return call | {"function": function | {"name": name, "arguments": arguments}}

    def _leaves(self, label: str, index: int, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._leaves(label, index, inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._leaves(label, index, inner) for inner in value]
        if isinstance(value, str):
            return self._text(label, "arguments", index, value)
        if isinstance(value, bool) or value is None:
            return value
        self._add(Part(label, "arguments", index, value))
        number = f"{self._digits}{len(self.parts) - 1:06d}"
        return float(f"{number}.5") if isinstance(value, float) else int(number)

    def plain(self, rendered: str) -> str:
        """Return a rendering of the marked conversation with a single mark for the arguments of each call."""
        for style in STYLES if self._half.search(rendered) else ():
            sample = re.escape(style({"@K": "@V"}))
            pattern = sample.replace("@K", rf"{self._prefix}(\d+)K").replace("@V", rf"{self._prefix}\1V")

            def single(found: re.Match[str], style: Style = style) -> str:
                self.styles[int(found[1])] = style
                return f"{self._prefix}{found[1]}Z"

            rendered = re.sub(pattern, single, rendered)
            if not self._half.search(rendered):
                break
        return rendered

    def not_json(self, rendered: str) -> set[str]:
        """Return the labels of the arguments that the template does not write as JSON."""
        return {self.parts[int(number)].label for number in self._half.findall(rendered)}

    def marks(self, rendered: str) -> Iterator[tuple[int, int, int]]:
        """Yield the number, the beginning and the end of every mark in a rendering."""
        for found in self._mark.finditer(rendered):
            number = int(found[1] or found[2])
            if number < len(self.parts):
                yield number, found.start(), found.end()

    def match(self, marked_text: str, *, open_end: bool) -> list[Place] | Part | None:
        """Find every mark's part in the text.

        Args:
            marked_text: The rendering of the marked conversation, after `plain`.
            open_end: Whether the texts may differ after the last mark.

        Returns:
            The places in the order of the text; or, if the texts do not agree, the part at the first difference. None
            if they differ before the first mark.
        """
        text, position, before = self.text, 0, 0
        places: list[Place] = []
        marks = list(self.marks(marked_text))
        ends = [begin for _, begin, _ in marks[1:]] + [len(marked_text)]
        if not marks:
            return [] if open_end or text == marked_text else None
        first = marked_text[: marks[0][1]]
        if not text.startswith(first):
            return None
        position = len(first)
        for order, ((number, mark_begin, mark_end), following) in enumerate(zip(marks, ends, strict=True)):
            part, last = self.parts[number], order == len(marks) - 1
            after = marked_text[mark_end:following]
            for form in part.forms(self.styles.get(number)):
                before = position + len(form)
                exact = text[before:] == after if last else text.startswith(after, before)
                if text.startswith(form, position) and (exact or (last and open_end)):
                    break
            else:
                return part
            places.append(Place(part, position, before, mark_begin, mark_end))
            position = before + len(after)
        return places


def missing_leaves(arguments: Any, region: str, *, everything: bool = False) -> bool:
    """Return whether a leaf of a call's arguments does not occur in a part of the text.

    Args:
        arguments: The arguments.
        region: The part of the text.
        everything: Whether strings and numbers are looked for too, beside keys, true, false and null.
    """
    return any(not any(form in region for form in forms) for forms in _leaf_forms(arguments, everything))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def parameter_leaves(schema: Any) -> list[str]:
    """Return the names and the descriptions of the parameters in a tool's schema, and of those inside them."""
    leaves = list[str]()
    for name, inner in _mapping(_mapping(schema).get("properties")).items():
        leaves += [name, *parameter_leaves(inner), *parameter_leaves(_mapping(inner).get("items"))]
        if isinstance(description := _mapping(inner).get("description"), str):
            leaves.append(description.strip())
    return leaves


def _leaf_forms(value: Any, everything: bool) -> Iterable[tuple[str, ...]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield (key, json.dumps(key, ensure_ascii=False)[1:-1], json.dumps(key)[1:-1])
            yield from _leaf_forms(inner, everything)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaf_forms(inner, everything)
    elif value is None or isinstance(value, bool):
        yield (json.dumps(value), str(value))
    elif everything:
        yield tuple(Part("", "arguments", -1, value).forms(None))
