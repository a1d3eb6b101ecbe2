"""Detect the format of records, and convert a record to an `Example`.

A record is an object from a data file, e.g. a line of JSONL. An example is either a conversation, which a chat template
will render, or raw text with a prompt. The modules after this one do not depend on the format.
"""

import re
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
NUMBERING = re.compile(r"(^|[_\W])(id|idx|index)$", re.IGNORECASE)  # names of columns that a message does not suggest
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
class Preference:
    """A pair of answers to the same prompt, or one answer with a label; each side is the prompt with its answer.

    Attributes:
        chosen: The side with the preferred or desirable answer; None for an undesirable answer.
        rejected: The side with the other or undesirable answer; None for a desirable answer.
        remarks: What is in the record and not in the sides, e.g. columns that are not read.
    """

    chosen: Example | None
    rejected: Example | None
    remarks: tuple[Remark, ...] = ()

    @property
    def sides(self) -> tuple[Example, ...]:
        """The sides that there are, the chosen one first."""
        return tuple(side for side in (self.chosen, self.rejected) if side is not None)


# kinds of objectives whose data has such a format
SFT, PAIRS, ANSWERS = ("sft",), ("dpo", "orpo", "simpo", "kto"), ("kto",)


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        read: Returns the example in the values of its columns; a column that a record lacks is None.
        required: The columns that every record has.
        optional: The other columns that are read.
        kinds: The kinds of objectives (`objective.kind`) that train on it.
    """

    read: Callable[[Mapping[str, Any]], Example | Preference]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    kinds: tuple[str, ...] = SFT

    def __str__(self) -> str:
        return ", ".join([*self.required, *(f"[{name}]" for name in self.optional)])


def detect(columns: Collection[str], renames: Mapping[str, str], *, named: str | None = None, kind: str = "sft") -> str:
    """Return the format that has these columns.

    Args:
        columns: The data's column names.
        renames: The recipe's `data.columns`, from the format's column names to the data's.
        named: The recipe's `data.format`. If given, it is only checked.
        kind: The recipe's `objective.kind`; only formats that it trains on are candidates.

    Raises:
        DataError: No format matches, several match, a renamed column does not exist, or the objective does not train on
            the named format.
    """
    found = ", ".join(columns)
    if named and kind not in FORMATS[named].kinds:
        raise DataError(
            f"the format {named} needs objective.kind {' or '.join(FORMATS[named].kinds)}, not {kind}; "
            "change data.format or objective.kind"
        )
    candidates = [named] if named else [name for name, format in FORMATS.items() if kind in format.kinds]
    _check_renames(columns, renames, candidates)

    def fits(name: str) -> bool:
        return all(renames.get(column, column) in columns for column in FORMATS[name].required)

    matching = [name for name in candidates if fits(name)]
    if len(matching) > 1:  # datasets of other formats often have an additional column `text` with the rendered example
        matching = [name for name in matching if name != "text"]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise DataError(f"the columns {found} match {' and '.join(matching)}; set data.format")
    for name, format in FORMATS.items():
        if kind not in format.kinds and fits(name):
            raise DataError(
                f"the columns {found} fit the format {name}, which needs objective.kind "
                f"{' or '.join(format.kinds)}, not {kind}; change objective.kind, or map other columns in data.columns"
            )
    required = FORMATS[named or ("prompt-completion" if kind == "sft" else "preference")].required
    theirs = [*(name for name in columns if not NUMBERING.search(name)), *["..."] * len(required)]
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


def to_example(record: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> Example | Preference:
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


def _conversation(parts: Sequence[list[Labelled]], fields: Mapping[str, Any]) -> Conversation:
    return conversation(*_with_context(parts, fields))


def _with_context(parts: Sequence[list[Labelled]], fields: Mapping[str, Any]) -> tuple[list[list[Labelled]], Any]:
    """Put the column `system` before the first list of messages; return the lists and the tools of the record."""
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
        example = _raw(prompt, completion, fields)
        if not completion.strip():
            raise DataError("completion is empty; add an answer or remove the record")
        return example
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(
            f"prompt is {kind(prompt)} and completion is {kind(completion)}; expected both to be strings or "
            "both to be lists of messages"
        )
    parts = [labelled(fields[name], name) for name in ("prompt", "completion")]
    return _conversation(parts, fields)


def _from_preference(fields: Mapping[str, Any]) -> Preference:
    """Read a pair of answers: strings, or conversations with a column prompt or with a common beginning."""
    column, texts = _prompt_column(fields), (fields["chosen"], fields["rejected"])
    prompt = fields[column]
    if not isinstance(prompt, str | list | None):
        raise DataError(f"{column} is {kind(prompt)}; expected a string or a list of messages")
    if all(isinstance(text, str) for text in texts) and not isinstance(prompt, list):
        chosen, rejected = _raw_pair(prompt, *texts, fields)
        return Preference(chosen, rejected)
    sides = [_side(fields[name], name) for name in ("chosen", "rejected")]
    if _turns(sides[0]) == _turns(sides[1]):
        raise DataError(EQUAL)
    question = _question(prompt, sides, column)
    begins = [_common(_turns(question), _turns(side)) == len(question) for side in sides]
    answers = [side[len(question) :] if repeats else side for side, repeats in zip(sides, begins, strict=True)]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer:
            raise DataError(f"{name} has no answer after the prompt; add one, or remove the record")
        if isinstance(answer[0][1], Mapping) and answer[0][1].get("role") != "assistant":
            raise DataError(
                f"{answer[0][0]} is not an answer of the assistant, so the prompts of chosen and rejected differ; a "
                "pair has two answers to the same prompt"
            )
    first, second = (_conversation([question, answer], fields) for answer in answers)
    if first.messages == second.messages:
        raise DataError(EQUAL)
    return Preference(first, second)


def _prompt_column(fields: Mapping[str, Any]) -> str:
    """Return which of the columns that may hold the messages before the answers a record has."""
    given = [name for name in PROMPTS if fields.get(name) not in EMPTY]
    if len(given) > 1:
        raise DataError(
            f"{' and '.join(given)} may both be the prompt of chosen and rejected; remove one of the columns"
        )
    return given[0] if given else PROMPTS[0]


EQUAL = "chosen and rejected are equal, so the pair states no preference; remove the record"


def _raw_pair(prompt: str | None, chosen: str, rejected: str, fields: Mapping[str, Any]) -> list[Completion]:
    """Return both sides as raw text. Without a prompt, it is their common beginning, up to the end of a word."""
    if chosen == rejected:
        raise DataError(EQUAL)
    if prompt is None:
        length = _common(chosen, rejected)
        length = next((end for end in range(length, 0, -1) if chosen[end - 1].isspace()), 0)
        length -= chosen[length - 1 : length] == " "  # a blank belongs to the word after it
        if not length:
            raise DataError(
                "chosen and rejected begin differently, so they have no common prompt; add a column prompt, or write "
                "the prompt at the beginning of both"
            )
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    sides = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise DataError(f"{name} is empty after the prompt; add an answer or remove the record")
        sides.append(_raw(prompt, answer, fields))
    return sides


def _side(value: Any, name: str) -> list[Labelled]:
    """Return a side as messages with their names, made of a list, of a single message, or of the text of an answer."""
    if isinstance(value, str):
        return [(name, {"role": "assistant", "content": value})]
    turns = _messages_of([(name, value)] if isinstance(value, Mapping) else labelled(value, name))
    if not turns:
        raise DataError(f"{name} has no messages; expected at least an answer")
    return turns


def _messages_of(turns: Sequence[Labelled]) -> list[Labelled]:
    """Return turns with their names; those with the keys of ShareGPT become messages."""
    return [
        (label, _sharegpt_message(turn, label) if isinstance(turn, Mapping) and "from" in turn else turn)
        for label, turn in turns
    ]


def _turns(side: Sequence[Labelled]) -> list[Any]:
    return [turn for _, turn in side]


def _question(prompt: Any, sides: Sequence[list[Labelled]], column: str) -> list[Labelled]:
    """Return the messages before the answers: those of the prompt's column, or those with which both sides begin.

    Raises:
        DataError: The column is a text that is not among the messages with which both sides begin.
    """
    if isinstance(prompt, list):
        return _messages_of(labelled(prompt, column))
    most = min(len(side) for side in sides) - 1
    question = sides[0][: min(most, _common(_turns(sides[0]), _turns(sides[1])))]
    if prompt is None:
        return question
    if not question:
        return [(column, {"role": "user", "content": prompt})]
    contents = [turn.get("content") for turn in _turns(question) if isinstance(turn, Mapping)]
    if not any(isinstance(content, str) and content.strip() == prompt.strip() for content in contents):
        raise DataError(
            f"{column} is not among the messages with which chosen and rejected begin; remove the column, or "
            "write it as the list of messages before the answers"
        )
    return question


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return with how many equal messages, or characters, two sequences begin."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _from_unpaired(fields: Mapping[str, Any]) -> Preference:
    """Read a prompt and an answer with the label whether it is desirable."""
    return _with_label(_from_prompt_completion(fields), fields["label"])


def _from_unpaired_messages(fields: Mapping[str, Any]) -> Preference:
    """Read a conversation with the label whether its last message, an answer, is desirable."""
    turns = _messages_of(labelled(fields["messages"], "messages"))
    if turns and isinstance(turns[-1][1], Mapping) and turns[-1][1].get("role") != "assistant":
        raise DataError(
            f"{turns[-1][0]} is not an answer of the assistant, so the label says nothing; remove the record"
        )
    return _with_label(_conversation([turns[:-1], turns[-1:]], fields), fields["label"])


def _with_label(example: Example, label: Any) -> Preference:
    stated = next((value for value, texts in enumerate(SWITCHED) if str(label).strip().lower() in texts), None)
    if stated is None:
        raise DataError(f"label is {label!r}; expected true for a desirable answer, or false")
    return Preference(example, None) if stated else Preference(None, example)


def _raw(prompt: str, answer: str, fields: Mapping[str, Any]) -> Completion:
    """Return raw text with a prompt.

    Raises:
        DataError: The record has columns that only a chat template could render.
    """
    if given := [name for name in CONTEXT if fields[name]]:
        raise DataError(
            f"{given[0]} is given, and prompt is raw text that no template renders; write it into the prompt, or "
            "write prompt and completion as lists of messages"
        )
    return Completion(prompt, answer)


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


PROMPTS = ("prompt", "conversations", "messages")  # columns for the common beginning of chosen and rejected
CONTEXT = ("system", "tools", "functions")  # columns beside the messages; `functions` is OpenAI's older `tools`

FORMATS = {
    "messages": Format(_from_messages, ("messages",), CONTEXT),
    "sharegpt": Format(_from_sharegpt, ("conversations",), CONTEXT),
    "prompt-completion": Format(_from_prompt_completion, ("prompt", "completion"), CONTEXT),
    "alpaca": Format(_from_alpaca, ("instruction", "output"), ("input", "history", *CONTEXT)),
    "text": Format(_from_text, ("text",)),
    "preference": Format(_from_preference, ("chosen", "rejected"), (*PROMPTS, *CONTEXT), PAIRS),
    "unpaired": Format(_from_unpaired, ("prompt", "completion", "label"), CONTEXT, ANSWERS),
    "unpaired-messages": Format(_from_unpaired_messages, ("messages", "label"), CONTEXT, ANSWERS),
}
