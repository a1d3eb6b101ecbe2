"""What a conversation must be, and the one shape in which chat templates get it.

The shape is the one that the templates of transformers read: a string `content` in every message, tool calls
as {type, function: {name, arguments}} with the arguments an object, tool schemas as {type, function}. What
people bring in other shapes is turned into it here, or refused with its place in the record.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

WEIGHTS = ("weight", "loss_weight")  # two names for: 1 trains an assistant turn, 0 shows it as context

Labelled = tuple[str, Any]
"""A value of a record and its name for error messages, e.g. `messages[2]`."""


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: Each with `role` and a string `content`; whatever else a template may read is kept.
        tools: JSON schemas of the functions that may be called.
        untrained: Positions of assistant messages that are context only (`weight: 0`, or part of a prompt).
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    untrained: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """Positions of the messages that are trained."""
        roles = enumerate(message["role"] for message in self.messages)
        return [index for index, role in roles if role == "assistant" and index not in self.untrained]


def conversation(parts: Sequence[Sequence[Labelled]], tools: Any) -> Conversation:
    """Check a record's messages and tools; only the assistant turns of the last part are trained.

    Raises:
        DataError: A message or a tool is not what it should be, or there is nothing to train.
    """
    messages, untrained = [], set()
    for number, part in enumerate(parts):
        for label, raw in part:
            trained = number == len(parts) - 1
            messages.append(_message(raw, label))
            if not (_weight(raw, label) and trained):
                untrained.add(len(messages) - 1)
    if not messages:
        raise DataError("there are no messages; expected at least a question and its answer")
    roles = [message["role"] for message in messages]
    context = frozenset(index for index in untrained if roles[index] == "assistant")
    made = Conversation(tuple(messages), _tools(tools), context)
    if not made.answers:
        raise DataError(f"no assistant turn to train on; the roles are {', '.join(roles)}")
    if made.answers[0] == 0:
        label = next(label for part in parts for label, _ in part)
        raise DataError(f"{label} is an assistant turn; the message that it answers must come before it")
    return made


def _message(raw: Any, label: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise DataError(f"{label} is {kind(raw)}; expected an object with role and content")
    if "role" not in raw:
        hint = "; for from and value set data.format: sharegpt" if "from" in raw else ""
        raise DataError(f"{label} has no role, only {', '.join(map(str, raw)) or 'nothing'}{hint}")
    if raw["role"] not in ROLES:
        raise DataError(f"{label}.role is {raw['role']!r}; expected one of {', '.join(ROLES)}")
    message = {key: value for key, value in raw.items() if value is not None and key not in WEIGHTS}
    calls = message.pop("tool_calls", None)  # an empty list would make some templates call nothing
    if calls:
        if message["role"] != "assistant":
            raise DataError(f"{label}.tool_calls: only the assistant calls tools; the role is {message['role']!r}")
        named = labelled(items(calls, f"{label}.tool_calls"), f"{label}.tool_calls")
        message["tool_calls"] = [_tool_call(call, name) for name, call in named]
    message["content"] = "" if calls and raw.get("content") is None else _content(raw.get("content"), label)
    if message["role"] == "assistant" and not calls and not message["content"].strip():
        raise DataError(f"{label} is an assistant turn with nothing in it; there is nothing to learn from it")
    return message


def _content(value: Any, label: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise DataError(f"{label}.content is missing; expected a string")
    if not isinstance(value, list):
        raise DataError(f"{label}.content is {kind(value)}; expected a string")
    texts = []
    for name, part in labelled(value, f"{label}.content"):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            found = f".type is {part.get('type')!r}" if isinstance(part, Mapping) else f" is {kind(part)}"
            raise DataError(f"{name}{found}; expected a part of type 'text': other kinds are not trained")
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise DataError(f"{name}.text is {kind(text)}; expected a string")
        texts.append(text)
    return "".join(texts)


def _weight(raw: Mapping[str, Any], label: str) -> bool:
    values = {key: raw[key] for key in WEIGHTS if raw.get(key) is not None}
    for key, value in values.items():
        if value not in (0, 1):
            raise DataError(f"{label}.{key} is {value!r}; expected 0 (context) or 1 (trained)")
        if value == 1 and raw["role"] != "assistant":
            raise DataError(f"{label}.{key} is 1 for the role {raw['role']!r}; only assistant turns are trained")
    return 0 not in values.values()


def _tool_call(call: Any, label: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{label} is {kind(call)}; expected an object with a function's name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{label}.function.arguments", "an object")
    if not isinstance(arguments, Mapping | None):
        raise DataError(f"{label}.function.arguments is {kind(arguments)}; expected an object")
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return identity | {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments or {}},
    }


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    tools = parsed(value, "tools", "a list of tool schemas") if isinstance(value, str) else value
    checked = []
    for label, tool in labelled(items(tools, "tools"), "tools"):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{label} is {kind(tool)}; expected an object with a function's name and parameters")
        checked.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(checked) or None


def parsed(text: str, label: str, expected: str) -> Any:
    """Return JSON that a record holds as a string.

    Raises:
        DataError: It is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{label} is not JSON ({error}): {text[:60]!r}; expected {expected}") from error


def items(value: Any, label: str) -> list[Any]:
    """Return a list of a record.

    Raises:
        DataError: It is not a list.
    """
    if not isinstance(value, list):
        raise DataError(f"{label} is {kind(value)}; expected a list")
    return value


def labelled(values: Sequence[Any], name: str) -> list[Labelled]:
    """Return each value with its name for error messages."""
    return [(f"{name}[{number}]", value) for number, value in enumerate(values)]


def kind(value: Any) -> str:
    """Name a value's type in the words of JSON."""
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}")
