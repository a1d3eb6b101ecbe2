"""Detect the format of records, and convert a record to an `Example`.

A record is an object from a data file, e.g. a line of JSONL. An example is either a conversation, which a chat template
will render, or raw text with a prompt. The modules after this one do not depend on the format.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit.data.messages import Conversation, conversation, kind, labelled, parsed
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
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Completion:
    """Raw text that no template renders. Only the completion is trained; plain text has an empty prompt."""

    prompt: str
    completion: str


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
    fields = {name: record.get(columns.get(name, name)) for name in (*expected.required, *expected.optional)}
    for name in expected.required:
        if fields[name] is None:
            raise DataError(
                f"{columns.get(name, name)} is missing; found {', '.join(map(str, record)) or 'nothing'}; "
                f"the format {format} needs {' and '.join(columns.get(column, column) for column in expected.required)}"
            )
    return expected.read(fields)


def _from_messages(fields: Mapping[str, Any]) -> Example:
    return conversation([labelled(fields["messages"], "messages")], fields["tools"])


def _from_prompt_completion(fields: Mapping[str, Any]) -> Example:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise DataError("completion is empty; add an answer or remove the record")
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(
            f"prompt is {kind(prompt)} and completion is {kind(completion)}; expected both to be strings or "
            "both to be lists of messages"
        )
    parts = [labelled(fields[name], name) for name in ("prompt", "completion")]
    return conversation(parts, fields["tools"])


def _from_alpaca(fields: Mapping[str, Any]) -> Example:
    for name in ("instruction", "output", "input", "system"):
        if not isinstance(fields[name], str | None):
            raise DataError(f"{name} is {kind(fields[name])}; expected a string")
    turns = _system(fields["system"])
    for label, pair in labelled(fields["history"] or [], "history"):
        if len(labelled(pair, label)) != 2:
            raise DataError(f"{label} has {len(pair)} items; expected two: instruction and answer")
        turns.append((f"{label}[0]", {"role": "user", "content": pair[0]}))
        turns.append((f"{label}[1]", {"role": "assistant", "content": pair[1]}))
    question = "\n\n".join(part for part in (fields["instruction"], fields["input"]) if part)
    turns.append(("instruction", {"role": "user", "content": question}))
    turns.append(("output", {"role": "assistant", "content": fields["output"]}))
    return conversation([turns], None)


def _from_text(fields: Mapping[str, Any]) -> Example:
    if not isinstance(fields["text"], str):
        raise DataError(f"text is {kind(fields['text'])}; expected a string")
    if not fields["text"].strip():
        raise DataError("text is empty; remove the record")
    return Completion("", fields["text"])


def _from_sharegpt(fields: Mapping[str, Any]) -> Example:
    turns = _system(fields["system"])
    for label, turn in labelled(fields["conversations"], "conversations"):
        turns.append((label, _sharegpt_message(turn, label)))
    return conversation([turns], fields["tools"])


def _system(text: str | None) -> list[tuple[str, Any]]:
    return [("system", {"role": "system", "content": text})] if text else []


def _sharegpt_message(turn: Any, label: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        hint = ""
        if isinstance(turn, Mapping) and {"role", "content"} <= set(turn):
            hint = "; for role and content, set data.format: messages and data.columns: {messages: conversations}"
        raise DataError(f"{label} is {kind(turn)}; expected an object with from and value{hint}")
    if turn["from"] not in SHAREGPT_ROLES:
        raise DataError(f"{label}.from is {turn['from']!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    if not isinstance(turn["value"], str):
        raise DataError(f"{label}.value is {kind(turn['value'])}; expected a string")
    weight = {key: turn[key] for key in ("weight", "loss_weight") if key in turn}
    message = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"], **weight}
    if turn["from"] != "function_call":
        return message
    calls = parsed(turn["value"], f"{label}.value", 'a call such as {"name": "f", "arguments": {}}')
    return message | {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


FORMATS = {
    "messages": Format(_from_messages, ("messages",), ("tools",)),
    "sharegpt": Format(_from_sharegpt, ("conversations",), ("system", "tools")),
    "prompt-completion": Format(_from_prompt_completion, ("prompt", "completion"), ("tools",)),
    "alpaca": Format(_from_alpaca, ("instruction", "output"), ("input", "system", "history")),
    "text": Format(_from_text, ("text",)),
}
