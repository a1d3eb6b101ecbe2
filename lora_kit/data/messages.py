"""Check a conversation and convert it to the structure that chat templates expect.

Chat templates of transformers expect a string `content` in every message, tool calls as {type, function: {name,
arguments}} with an object as arguments, and tool schemas as {type, function}. Common variants are converted; anything
else is an error that names its place in the record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kit.data.remarks import KEYS, Remark
from lora_kit.data.strict_json import loads, unwritable
from lora_kit.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

TRAINS = {  # keys of a message that say whether it is trained, and the value that trains it
    **dict.fromkeys(("weight", "loss_weight", "loss", "loss_scale", "loss_mask", "train", "training", "trainable"), 1),
    "masked": 0,
}
PARTLY = ("mask", "train_detail", "training_detail")  # keys of other toolkits with a meaning that lora_kit lacks
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of an answer
PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}  # types of an answer's parts, and their order
ARGUMENTS = ("arguments", "parameters", "input", "args")  # keys that toolkits write a call's arguments under
# keys with content that lora_kit cannot train on
UNUSABLE = ("refusal", "audio", "image", "images", "video", "videos", "audios")

FUNCTION = ("name", "arguments")  # keys of a called function

EMPTY: tuple[Any, ...] = (None, "", [], {})  # values that say nothing

VALUES = ("default", "const", "enum", "examples")  # keywords of JSON Schema that may have null as a value

Labelled = tuple[str, Any]
"""The name of a value for error messages, e.g. `messages[2]`, and the value."""


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: Each has `role` and a string `content`, and keeps other keys that a template may read.
        tools: JSON schemas of the functions that the assistant may call.
        untrained: Indices of assistant messages that are context only (`weight: 0`, or part of a prompt).
        excluded: Indices of messages that the record excludes by name (`weight: 0`), so that
            `objective.train_on: all` does not train them either.
        remarks: What is in the record and not in the conversation, e.g. columns that are not read.
        labels: The messages' names in the record for errors; `messages[0]` and so on if empty.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    untrained: frozenset[int] = frozenset()
    excluded: frozenset[int] = frozenset()
    remarks: tuple[Remark, ...] = ()
    labels: tuple[str, ...] = field(default=(), compare=False)

    def label(self, index: int) -> str:
        """Return the name of a message in the record."""
        return self.labels[index] if self.labels else f"messages[{index}]"

    @property
    def answers(self) -> list[int]:
        """The indices of the messages that are trained."""
        roles = enumerate(message["role"] for message in self.messages)
        return [index for index, role in roles if role == "assistant" and index not in self.untrained]


def conversation(parts: Sequence[Sequence[Labelled]], tools: Any) -> Conversation:
    """Build a conversation from a record's messages and tools, and check them.

    Args:
        parts: Lists of messages with their names, to be joined. Only assistant messages of the last part are trained.
        tools: The record's tool schemas: a list, a list as JSON, or None.

    Raises:
        DataError: A message or a tool is malformed, or nothing is trained.
    """
    messages = list[dict[str, Any]]()
    untrained, excluded, remarks = set[int](), set[int](), list[Remark]()
    for number, part in enumerate(parts):
        for label, raw in part:
            stated = _trained(raw, label)
            if stated and number < len(parts) - 1:
                raise DataError(
                    f"{label} says that it is trained, and only messages of the completion are trained; move it there, "
                    "or remove the key"
                )
            trained = stated is not False and number == len(parts) - 1
            if not trained:
                untrained.add(len(messages))
            if stated is False:
                excluded.add(len(messages))
            messages.append(_message(raw, label, remarks, trained=trained))
    if not messages:
        raise DataError("the record has no messages; expected at least a question and its answer")
    roles = [message["role"] for message in messages]
    context = frozenset(index for index in untrained if roles[index] == "assistant")
    labels = tuple(label for part in parts for label, _ in part)
    result = Conversation(
        tuple(messages), _tools(tools), context, frozenset(excluded), remarks=tuple(remarks), labels=labels
    )
    if not result.answers:
        raise DataError(
            f"no assistant message to train on; the roles are {', '.join(roles)}; add an answer or remove the record"
        )
    if result.answers[0] == 0:
        label = next(label for part in parts for label, _ in part)
        raise DataError(f"{label} is an assistant message; a message to answer must come before it")
    return result


def question(messages: Any, tools: Any = None) -> Conversation:
    """Build a conversation that the model shall continue, and check it; none of its messages is trained.

    Args:
        messages: A list of messages, as in a record.
        tools: Tool schemas, as in a record.

    Raises:
        DataError: A message or a tool is malformed, or there are no messages.
    """
    return to_continue(asked(messages), tools)


def asked(messages: Any) -> list[Labelled]:
    """Pair the messages of a question with their names.

    Raises:
        DataError: They are no list, or there are none.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages is {kind(messages)}; expected a list with at least one message")
    return labelled(messages, "messages")


def to_continue(turns: Sequence[Labelled], tools: Any) -> Conversation:
    """Build a conversation that the model shall continue from messages with their names, and check it.

    Raises:
        DataError: A message or a tool is malformed.
    """
    remarks = list[Remark]()
    checked = tuple(_message(raw, label, remarks, trained=False) for label, raw in turns)
    labels = tuple(label for label, _ in turns)
    return Conversation(checked, _tools(tools), frozenset(range(len(checked))), remarks=tuple(remarks), labels=labels)


def _message(raw: Any, label: str, remarks: list[Remark], *, trained: bool) -> dict[str, Any]:
    """Check a message and return it as chat templates expect it.

    Args:
        raw: The message of the record.
        label: Its name for errors.
        remarks: The remarks on the record; those on keys that no template gets are appended.
        trained: Whether it is trained if it is an assistant message.

    Raises:
        DataError: The message is malformed, or is trained and has nothing to train.
    """
    role = _role(raw, label)
    remarks += _unread_of_parts(raw.get("content"), f"{label}.content")
    raw = _unfolded(raw, label) if role == "assistant" else raw
    message: dict[str, Any] = {"role": role, "content": ""}
    message |= {key: value for key, value in raw.items() if value is not None and key not in (*TRAINS, "content")}
    message["role"] = role
    _refuse_unusable(message, label)
    calls = _calls(message, label, remarks)
    if calls:
        message["tool_calls"] = calls
    reasoning = _reasoning(message, label) if role == "assistant" else None
    if reasoning is not None:
        message[reasoning[0]] = reasoning[1]
    optional = calls or (role == "assistant" and ((reasoning and reasoning[1]) or not trained))
    message["content"] = "" if optional and raw.get("content") is None else _content(raw.get("content"), label)
    if role == "assistant" and not optional and not message["content"].strip():
        raise DataError(f"{label} is an assistant message without content; add an answer or remove the record")
    return message


def _role(raw: Any, label: str) -> str:
    """Return a message's role; OpenAI's older role `function` is `tool`."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{label} is {kind(raw)}; expected an object with role and content")
    if "role" not in raw:
        hint = "; if the keys are from and value, set data.format: sharegpt" if "from" in raw else ""
        raise DataError(f"{label} has no role, only {', '.join(map(str, raw)) or 'nothing'}{hint}")
    role = "tool" if raw["role"] == "function" else raw["role"]
    if role not in ROLES:
        raise DataError(f"{label}.role is {raw['role']!r}; expected one of {', '.join(ROLES)}")
    return str(role)


def _refuse_unusable(message: Mapping[str, Any], label: str) -> None:
    """Refuse keys whose content would be trained or seen by the model, and that no template renders."""
    for key in UNUSABLE:
        if message.get(key):
            raise DataError(
                f"{label}.{key} is {kind(message[key])}, and lora_kit trains on the text of content, reasoning and "
                "tool_calls only; move it to content, or remove it from the record"
            )


def _calls(message: dict[str, Any], label: str, remarks: list[Remark]) -> list[dict[str, Any]]:
    """Remove the tool calls from a message and return them; OpenAI's older `function_call` is a tool call.

    An empty list is removed too, because some templates would render it as a tool call.
    """
    calls, older = message.pop("tool_calls", None), message.pop("function_call", None)
    if not calls and not older:
        return []
    if message["role"] != "assistant":
        key = "tool_calls" if calls else "function_call"
        raise DataError(f"{label}.{key}: only an assistant message may call tools; the role is {message['role']!r}")
    if calls and older:
        raise DataError(f"{label} has both tool_calls and function_call; keep tool_calls")
    if older:
        return [_tool_call(older, f"{label}.function_call", remarks)]
    return [_tool_call(call, name, remarks) for name, call in labelled(calls, f"{label}.tool_calls")]


def reasoning_key(message: Mapping[str, Any]) -> str | None:
    """Return the key under which a message has its reasoning; None if it has none."""
    return next((key for key in REASONING if key in message), None) if message["role"] == "assistant" else None


def _reasoning(message: dict[str, Any], label: str) -> tuple[str, str] | None:
    """Remove the reasoning from a message, and return the first key that has it and the text; None if there is none."""
    found = {key: message.pop(key) for key in REASONING if key in message}
    for key, value in found.items():
        if not isinstance(value, str):
            raise DataError(f"{label}.{key} is {kind(value)}; expected a string")
    filled = {key: value for key, value in found.items() if value}
    if len(set(filled.values())) > 1:
        raise DataError(f"{label} has different reasoning in {' and '.join(filled)}; keep one of them")
    return next(iter((filled or found).items()), None)


def _unread_of_parts(content: Any, label: str) -> list[Remark]:
    """Return remarks on the keys of a content's parts that are not read; empty values are ignored.

    Raises:
        DataError: A key says whether the part is trained.
    """
    remarks = list[Remark]()
    for name, part in labelled(content, label) if isinstance(content, list) else ():
        if not isinstance(part, Mapping):
            continue
        stated = next((key for key in (*TRAINS, *PARTLY) if part.get(key) is not None), None)
        if stated:
            raise _partly(f"{name}.{stated}")
        known = ("type", "text", "value", "cache_control", part.get("type"))
        unread = [key for key, value in part.items() if key not in known and value not in EMPTY]
        remarks += [Remark(KEYS, key, f"{name}.{key}") for key in unread]
    return remarks


def _partly(label: str) -> DataError:
    return DataError(
        f"{label} is not supported: a message is trained as a whole or not at all; "
        "write `train: true` or `train: false` as a key of the message"
    )


def _unfolded(raw: Mapping[str, Any], label: str) -> Mapping[str, Any]:
    """Return an answer with keys for the reasoning and the calls that are parts of its content.

    Raises:
        DataError: Templates would render the parts in another order: reasoning, text, calls.
    """
    parts = labelled(raw["content"], f"{label}.content") if isinstance(raw.get("content"), list) else []
    kinds = [PARTS.get(str(part.get("type")) if isinstance(part, Mapping) else "", 1) for _, part in parts]
    if set(kinds) <= {1}:
        return raw
    if kinds != sorted(kinds):
        raise DataError(
            f"{label}.content has parts in another order than reasoning, text, calls; write a message for each of them"
        )
    reasoning, calls = list[str](), list[Any]()
    for (name, part), order in zip(parts, kinds, strict=True):
        value = part.get("value", part.get("text", part.get(part["type"]))) if order != 1 else None
        if order == 0:
            if not isinstance(value, str):
                raise DataError(f"{name}.value is {kind(value)}; expected a string")
            reasoning.append(value)
        elif order == 2:
            calls.append(parsed(value, f"{name}.value", "a call") if isinstance(value, str) else value)
    message = dict(raw) | {
        "content": [part for (_, part), order in zip(parts, kinds, strict=True) if order == 1] or None
    }
    if reasoning:
        message[REASONING[0]] = "".join([*([raw[REASONING[0]]] if raw.get(REASONING[0]) else []), *reasoning])
    if calls:
        message["tool_calls"] = [*(raw.get("tool_calls") or []), *calls]
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
            raise DataError(f"{name}{found}; expected a part of type 'text', lora_kit trains on text only")
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise DataError(f"{name}.text is {kind(text)}; expected a string")
        texts.append(text)
    return "".join(texts)


def _trained(raw: Any, label: str) -> bool | None:
    """Return whether a message is trained according to a key such as `weight`; None if it has no such key.

    Raises:
        DataError: The value is not 0 or 1, two keys contradict each other, a message of another role than assistant is
            to be trained, or a key marks only a part of the text.
    """
    role, said = _role(raw, label), dict[str, bool]()
    for key in PARTLY:
        if raw.get(key) is not None:
            raise _partly(f"{label}.{key}")
    for key, trains in TRAINS.items():
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"{label}.{key} is {value!r}; expected {1 - trains} (context) or {trains} (trained)")
        said[key] = value == trains
        if said[key] and role != "assistant":
            raise DataError(
                f"{label}.{key} is {value!r} for the role {raw['role']!r}; only assistant messages are trained"
            )
    if len(set(said.values())) > 1:
        raise DataError(f"{label}: {' and '.join(said)} contradict each other; keep one of them")
    return next(iter(said.values()), None)


def _tool_call(call: Any, label: str, remarks: list[Remark]) -> dict[str, Any]:
    function = _function(call, label, "arguments")
    remarks += _unread(call, ("id", "type", "index", *(FUNCTION if function is call else ("function",))), label)
    if function is not call:
        remarks += _unread(function, FUNCTION, f"{label}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{label}.function.arguments", "an object")
    if not isinstance(arguments, Mapping | None):
        raise DataError(f"{label}.function.arguments is {kind(arguments)}; expected an object")
    if found := unwritable(arguments, f"{label}.function.arguments"):
        raise DataError(found)
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _unread(call: Mapping[str, Any], known: Sequence[str], label: str) -> list[Remark]:
    """Return remarks on the other keys of a call or its function; empty values are ignored.

    Raises:
        DataError: A key has the arguments in another toolkit's spelling.
    """
    unread = [key for key, value in call.items() if key not in known and value not in EMPTY]
    for key in unread:
        if key in ARGUMENTS:
            raise DataError(
                f"{label}.{key} is {kind(call[key])}, which lora_kit does not read; "
                "write the function's arguments beside its name, as `arguments`"
            )
    return [Remark(KEYS, key, f"{label}.{key}") for key in unread]


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    tools = parsed(value, "tools", "a list of tool schemas") if isinstance(value, str) else value
    if found := unwritable(tools, "tools"):
        raise DataError(found)
    tools = without_padding(tools)
    checked = []
    for label, tool in labelled(tools, "tools"):
        _function(tool, label, "parameters")
        checked.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(checked) or None


def without_padding(schema: Any) -> Any:
    """Remove the nulls that a typed table put into tool schemas, where it has a field that another schema has.

    JSON Schema has null only as a value in `default`, `const`, `enum` and `examples`. A null in `default` or `const`
    stays, unless there are nulls elsewhere, which only a table can have put there.
    """
    return _without_nulls(schema, at_property=False) if _is_padded(schema, at_property=False) else schema


def _is_padded(schema: Any, *, at_property: bool) -> bool:
    if isinstance(schema, list):
        return any(_is_padded(item, at_property=False) for item in schema if item is not None)
    if not isinstance(schema, Mapping):
        return schema is None
    # both keywords hold lists of values
    if not at_property and None in (schema.get("enum", ...), schema.get("examples", ...)):
        return True
    parts = ((key, value) for key, value in schema.items() if at_property or key not in VALUES)
    return any(_is_padded(value, at_property=not at_property and key == "properties") for key, value in parts)


def _without_nulls(schema: Any, *, at_property: bool) -> Any:
    if isinstance(schema, list):
        return [_without_nulls(item, at_property=False) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    parts = {key: value for key, value in schema.items() if value is not None}
    return {
        key: value
        if not at_property and key in VALUES
        else _without_nulls(value, at_property=not at_property and key == "properties")
        for key, value in parts.items()
    }


def unknown_nulls(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Return the keys in arguments of calls that are null and that the called tool's schema lacks, e.g. `w.ticker`.

    A typed table writes such nulls when it is saved as JSON, and a model would learn to write them. A call of a tool
    without a schema has only such keys. What a schema names by `$ref` is not looked up, and its keys are not returned.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
    functions = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    return [
        name
        for function in functions
        for name in _unknown_nulls(function["arguments"], [schemas.get(function["name"])], function["name"])
    ]


def _unknown_nulls(value: Any, schemas: Sequence[Any], name: str) -> list[str]:
    """Return the null keys in a value of the name `name` that none of its schemas has as a property."""
    schemas = [part for schema in schemas for part in _alternatives(schema)]
    if any("$ref" in schema for schema in schemas):
        return []
    if isinstance(value, list):
        items = [schema.get("items") for schema in schemas]
        return [found for item in value for found in _unknown_nulls(item, items, name)]
    if not isinstance(value, Mapping):
        return []
    properties, names = [schema.get("properties") for schema in schemas], list[str]()
    for key, part in value.items():
        own = [each[key] for each in properties if isinstance(each, Mapping) and key in each]
        if part is None and not own:
            names.append(f"{name}.{key}")
        names += _unknown_nulls(part, own, f"{name}.{key}")
    return names


def _alternatives(schema: Any) -> list[Mapping[str, Any]]:
    """Return a schema and the schemas that it combines."""
    if not isinstance(schema, Mapping):
        return []
    lists = [schema.get(key) for key in ("anyOf", "oneOf", "allOf")]
    combined = [each for part in lists if isinstance(part, list) for each in part]
    return [schema, *(found for each in combined for found in _alternatives(each))]


def _function(value: Any, label: str, other: str) -> Mapping[str, Any]:
    """Return the function that a tool or a call describes, in its field `function` or directly.

    Raises:
        DataError: The value is not an object with a function's name.
    """
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{label} is {kind(value)}; expected an object with a function's name and {other}")
    return function


def parsed(text: str, label: str, expected: str) -> Any:
    """Parse a string field that contains JSON.

    Args:
        text: The field.
        label: Its name for the error message.
        expected: The expected value for the error message, e.g. "an object".

    Raises:
        DataError: The text is not JSON, repeats a key of an object, or has a number that JSON lacks.
    """
    try:
        return loads(text)
    except DataError as error:
        problem = str(error)
        if not problem.startswith("not JSON"):
            raise DataError(f"{label}: {problem}") from error
        raise DataError(f"{label} is {problem.rpartition('; ')[0]}; expected {expected}") from error


def labelled(values: Any, name: str) -> list[Labelled]:
    """Pair each value of a list with its name for error messages: `name[0]`, `name[1]`, ...

    Raises:
        DataError: The values are not a list.
    """
    if not isinstance(values, list):
        raise DataError(f"{name} is {kind(values)}; expected a list")
    return [(f"{name}[{number}]", value) for number, value in enumerate(values)]


def kind(value: Any) -> str:
    """Describe a value's JSON type for an error message, e.g. "a string"."""
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}")
