"""Detect the format of records, and convert a record to an `Example`.

A record is an object from a data file, e.g. a line of JSONL. An example is either a conversation, which a chat template
will render, or raw text with a prompt. The modules after this one do not depend on the format.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_kit.data.messages import (
    EMPTY,
    TRAINS,
    Conversation,
    Labelled,
    asked,
    conversation,
    kind,
    labelled,
    parsed,
    to_continue,
)
from lora_kit.data.remarks import COLUMNS, Remark
from lora_kit.errors import DataError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")  # roles of ShareGPT whose value is a call as JSON
NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")  # columns of multimodal data
SWITCHED = (("0", "0.0", "false", "no"), ("1", "1.0", "true", "yes"))  # how 0 and 1 are written, also in a CSV file


@dataclass(frozen=True)
class Completion:
    """Raw text that no template renders. Only the completion is trained; plain text has an empty prompt."""

    prompt: str
    completion: str
    remarks: tuple[Remark, ...] = ()


Example = Conversation | Completion


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        read: Returns the example in the values of its columns; a column that a record lacks is None.
        required: The columns that every record has.
        optional: The other columns that are read.
    """

    read: Callable[[Mapping[str, Any]], Example]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([*self.required, *(f"[{name}]" for name in self.optional)])


def detect(columns: Collection[str], renames: Mapping[str, str], *, named: str | None = None) -> str:
    """Return the format that has these columns.

    Args:
        columns: The data's column names.
        renames: The recipe's `data.columns`, from the format's column names to the data's.
        named: The recipe's `data.format`. If given, it is only checked.

    Raises:
        DataError: No format matches, several match, or a renamed column does not exist.
    """
    found = ", ".join(columns)
    candidates = [named] if named else list(FORMATS)
    _check_renames(columns, renames, candidates)
    matching = [
        name for name in candidates if all(renames.get(column, column) in columns for column in FORMATS[name].required)
    ]
    if len(matching) > 1:  # datasets of other formats often have an additional column `text` with the rendered example
        matching = [name for name in matching if name != "text"]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise DataError(f"the columns {found} match {' and '.join(matching)}; set data.format")
    required = FORMATS[named or "prompt-completion"].required
    theirs = [*columns, *["..."] * len(required)]
    hint = ", ".join(f"{ours}: {name}" for ours, name in zip(required, theirs, strict=False))
    known = "; ".join(f"{name}: {FORMATS[name]}" for name in candidates)
    raise DataError(
        f"the columns are {found}; expected those of {'the format' if named else 'a format'} ({known}); "
        f"map them in data.columns, e.g. {{{hint}}}"
    )


def _check_renames(columns: Collection[str], renames: Mapping[str, str], candidates: Sequence[str]) -> None:
    known = {column for name in candidates for column in (*FORMATS[name].required, *FORMATS[name].optional)}
    for ours, theirs in renames.items():
        if ours not in known:
            raise DataError(
                f"data.columns: {ours!r} is not a column of {' or '.join(candidates)}; expected one of "
                f"{', '.join(sorted(known))} (the format's name first, then the file's)"
            )
        if theirs not in columns:
            found = ", ".join(columns)
            raise DataError(f"data.columns: {ours}: the data has no column {theirs!r}; its columns are {found}")


def to_example(record: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> Example:
    """Convert a record to an example.

    Args:
        record: The record.
        format: A key of FORMATS.
        columns: The recipe's `data.columns`, from the format's column names to the data's.

    Raises:
        DataError: The record does not fit the format. The message starts with the field inside the record.
    """
    expected = FORMATS[format]
    names = {name: columns.get(name, name) for name in (*expected.required, *expected.optional)}
    fields = {name: record.get(theirs) for name, theirs in names.items()}
    for name in expected.required:
        if fields[name] is None:
            raise DataError(
                f"{names[name]} is missing; found {', '.join(map(str, record)) or 'nothing'}; "
                f"the format {format} needs {' and '.join(names[column] for column in expected.required)}"
            )
    unread = [name for name in record if name not in names.values() and record[name] not in EMPTY]
    _refuse_columns({name: record[name] for name in unread})
    example = expected.read(fields)
    return replace(example, remarks=(*example.remarks, *(Remark(COLUMNS, str(name), "") for name in unread)))


def _refuse_columns(unread: Mapping[str, Any]) -> None:
    """Refuse columns that change what is trained or seen, and that lora_kit does not read."""
    for name, value in unread.items():
        if name in NOT_TEXT:
            raise DataError(
                f"{name} is {kind(value)}, and lora_kit trains on text only; remove the record or the column"
            )
        if name == "chat_template_kwargs":
            raise DataError(
                f"{name} is {kind(value)}, and lora_kit renders every record alike; set the variables in the first "
                "line of a copy of the template, e.g. {% set enable_thinking = false %}, and set data.template to it"
            )
        if name in TRAINS and (isinstance(value, list) or str(value).strip().lower() in SWITCHED[1 - TRAINS[name]]):
            raise DataError(
                f"{name} is {value!r} for the whole record, which lora_kit does not read; remove the record, or say "
                "it in a message, e.g. `train: false`"
            )


def _from_messages(fields: Mapping[str, Any]) -> Example:
    return _conversation([labelled(fields["messages"], "messages")], fields)


def to_question(record: Mapping[str, Any]) -> Conversation:
    """Convert a record of the format `messages` to a conversation that the model shall continue.

    Raises:
        DataError: A message or a tool is malformed, or there are no messages.
    """
    fields = {name: record.get(name) for name in CONTEXT}
    (turns,), tools = _with_context([asked(record.get("messages"))], fields)
    return to_continue(turns, tools)


def _conversation(parts: list[list[Labelled]], fields: Mapping[str, Any]) -> Conversation:
    return conversation(*_with_context(parts, fields))


def _with_context(parts: list[list[Labelled]], fields: Mapping[str, Any]) -> tuple[list[list[Labelled]], Any]:
    """Add the column `system` to lists of messages; return them and the tools, of the column `tools` or `functions`."""
    system, turns = _system(fields["system"]), [turn for part in parts for turn in part]
    if system and turns and isinstance(turns[0][1], Mapping) and turns[0][1].get("role") in ("system", "developer"):
        if turns[0][1].get("content") != fields["system"]:
            raise DataError(f"the column system and {turns[0][0]} are different system prompts; keep one of them")
        system = []
    tools, functions = fields["tools"], fields.get("functions")
    if tools and functions:
        raise DataError("the record has both tools and functions; keep tools")
    return [[*system, *parts[0]], *parts[1:]], tools or functions


def _from_prompt_completion(fields: Mapping[str, Any]) -> Example:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if given := [name for name in ("system", "tools", "functions") if fields[name]]:
            raise DataError(
                f"{given[0]} is given, and prompt is raw text that no template renders; write it into the prompt, or "
                "write prompt and completion as lists of messages"
            )
        if not completion.strip():
            raise DataError("completion is empty; add an answer or remove the record")
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(
            f"prompt is {kind(prompt)} and completion is {kind(completion)}; expected both to be strings or "
            "both to be lists of messages"
        )
    parts = [labelled(fields[name], name) for name in ("prompt", "completion")]
    return _conversation(parts, fields)


def _from_alpaca(fields: Mapping[str, Any]) -> Example:
    for name in ("instruction", "output", "input", "system"):
        if not isinstance(fields[name], str | None):
            raise DataError(f"{name} is {kind(fields[name])}; expected a string")
    turns: list[Labelled] = []
    for label, pair in labelled(fields["history"] or [], "history"):
        if len(labelled(pair, label)) != 2:
            raise DataError(f"{label} has {len(pair)} items; expected two: instruction and answer")
        turns.append((f"{label}[0]", {"role": "user", "content": pair[0]}))
        turns.append((f"{label}[1]", {"role": "assistant", "content": pair[1]}))
    question = "\n\n".join(part for part in (fields["instruction"], fields["input"]) if part)
    turns.append(("instruction", {"role": "user", "content": question}))
    turns.append(("output", {"role": "assistant", "content": fields["output"]}))
    return _conversation([turns], fields)


def _from_text(fields: Mapping[str, Any]) -> Example:
    if not isinstance(fields["text"], str):
        raise DataError(f"text is {kind(fields['text'])}; expected a string")
    if not fields["text"].strip():
        raise DataError("text is empty; remove the record")
    return Completion("", fields["text"])


def _from_sharegpt(fields: Mapping[str, Any]) -> Example:
    turns = [
        (label, _sharegpt_message(turn, label)) for label, turn in labelled(fields["conversations"], "conversations")
    ]
    return _conversation([turns], fields)


def _system(text: Any) -> list[Labelled]:
    if not isinstance(text, str | None):
        raise DataError(f"system is {kind(text)}; expected a string")
    return [("system", {"role": "system", "content": text})] if text else []


def _sharegpt_message(turn: Any, label: str) -> dict[str, Any]:
    """Return a turn as a message; keys other than from and value are those of a message."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        hint = ""
        if isinstance(turn, Mapping) and {"role", "content"} <= set(turn):
            hint = "; for role and content, set data.format: messages and data.columns: {messages: conversations}"
        raise DataError(f"{label} is {kind(turn)}; expected an object with from and value{hint}")
    if turn["from"] not in SHAREGPT_ROLES:
        raise DataError(f"{label}.from is {turn['from']!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(turn["value"], str):
        raise DataError(f"{label}.value is {kind(turn['value'])}; expected a string")
    role, content = SHAREGPT_ROLES[turn["from"]], turn.get("content")
    if content not in (None, "", turn["value"]) or SHAREGPT_ROLES.get(str(turn.get("role")), role) != role:
        raise DataError(f"{label} has from and value beside a role or content that differs; keep from and value")
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    message = {"role": role, "content": turn["value"], **others}
    if turn["from"] not in CALLS:
        return message
    calls = parsed(turn["value"], f"{label}.value", 'a call such as {"name": "f", "arguments": {}}')
    return message | {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


CONTEXT = ("system", "tools", "functions")  # columns beside the messages; `functions` is OpenAI's older `tools`

FORMATS = {
    "messages": Format(_from_messages, ("messages",), CONTEXT),
    "sharegpt": Format(_from_sharegpt, ("conversations",), CONTEXT),
    "prompt-completion": Format(_from_prompt_completion, ("prompt", "completion"), CONTEXT),
    "alpaca": Format(_from_alpaca, ("instruction", "output"), ("input", "history", *CONTEXT)),
    "text": Format(_from_text, ("text",)),
}
