"""Parse JSON strictly; errors say what is wrong and what to do.

Python's json module accepts text that other parsers reject (NaN, half of a surrogate pair, a repeated key), and raises
errors other than JSONDecodeError for huge numbers and deep nesting. Here all of these are a DataError.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from lora_kit.errors import DataError

Record = dict[str, Any]

MAX_DEPTH = 100  # most levels of lists and objects; chat templates and tokenizers recurse over them
EXCERPT = 60  # characters of the text that an error shows
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LONE_CARRIAGE_RETURN = re.compile(r"\r(?!\n)")
WORD_OF_PYTHON = re.compile(r"(True|False|None|nan|inf)\b")


def loads(text: str) -> Any:
    """Parse JSON.

    Raises:
        DataError: The text is not JSON, contains NaN, a number that is too large, a repeated key or half of a surrogate
            pair, or is nested too deep. The message says what to do.
    """
    try:
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(text)
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(not_json(text, error)) from error
    if SURROGATE.search(text) and (half := _half_pair(value)):
        raise DataError(
            f"the string escape {half} is half of a surrogate pair, so the text was cut inside a character; "
            "write the whole character, or remove it"
        )
    return value


def not_json(text: str, error: json.JSONDecodeError) -> str:
    """Describe a syntax error, with an excerpt and what to do."""
    start = max(0, error.colno - EXCERPT // 2)
    line = error.doc[error.pos - error.colno + 1 :].partition("\n")[0].rstrip("\r")
    excerpt = line[start if len(line) > EXCERPT else 0 :][:EXCERPT]
    return f"not JSON: {error.msg} (column {error.colno}): {excerpt!r}; {_remedy(text, error)}"


def _remedy(text: str, error: json.JSONDecodeError) -> str:
    before, rest = text[max(0, error.pos - EXCERPT) : error.pos].rstrip(), text[error.pos :].lstrip()
    if LONE_CARRIAGE_RETURN.search(before):
        return "if a carriage return alone ends its lines, convert the file with `tr '\\r' '\\n'`"
    if error.msg.startswith("Invalid control character"):
        return f"write the character inside the string as {json.dumps(text[error.pos])[1:-1]}"
    if "\\escape" in error.msg:
        return "write a backslash inside a string twice"
    if not rest or error.msg.startswith("Unterminated"):
        return "the file is cut off here, or the record continues in the next line; write each record on one line"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments; remove it"
    if rest.strip() == "," or (before.endswith(",") and rest[0] in "]}") or "trailing comma" in error.msg:
        return "remove the comma that nothing follows"
    if rest.startswith("{") and error.msg == "Extra data":
        return "put each record on its own line"
    if rest.startswith("'"):
        return "JSON has no single quotes; write records with json.dumps, not with str()"
    if WORD_OF_PYTHON.match(rest):
        return "JSON spells them true, false and null; write records with json.dumps, not with str()"
    if error.msg.startswith("Expecting property name"):
        return "put keys in double quotes"
    if error.msg.startswith("Expecting ',' delimiter") and rest[0] in '{["':
        return "put a comma before it"
    return "write records with json.dumps, each on one line"


def unwritable(value: Any, label: str) -> str | None:
    """Describe the first value inside `value` that JSON cannot represent, with its place; None if there is none.

    Tables (Parquet, Arrow, the Hub) contain such values: NaN, times, bytes. JSON may contain a number with more digits
    than a float holds (`Inexact`); it is reported too, because it would be written with other digits.
    """
    if isinstance(value, Mapping):
        parts: Iterable[tuple[str, Any]] = ((f"{label}.{key}", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        parts = ((f"{label}[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, Inexact):
        return f"{label} is {value.digits[:EXCERPT]}, which is read as {value}; write it as a string, or so"
    elif isinstance(value, float):
        return None if math.isfinite(value) else f"{label} is {value}, which is not JSON; write null or a string"
    elif value is None or isinstance(value, str | bool | int):
        return None
    else:
        return f"{label} is a {type(value).__name__}, which JSON has no type for; write it as a string"
    return next((found for name, item in parts if (found := unwritable(item, name))), None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the key {twice[:EXCERPT]!r} stands twice in one object; keep one of them")
    return result


class Inexact(float):
    """A number of JSON that is not equal to the text that Python writes for it.

    Attributes:
        digits: How JSON writes it.
    """

    digits: str


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise DataError(f"the number {digits[:EXCERPT]} is too large for JSON's readers; write it as a string")
    is_zero = not digits.lower().partition("e")[0].strip("-0.")
    if is_zero or (value and Decimal(digits) == Decimal(repr(value))):
        return value
    inexact = Inexact(value)
    inexact.digits = digits
    return inexact


def _int(digits: str) -> int:
    most = sys.get_int_max_str_digits()
    if len(digits) > most > 0:
        raise DataError(f"a number has {len(digits):,} digits, more than {most:,}; write it as a string")
    return int(digits)


def _constant(name: str) -> Any:
    raise DataError(f"{name} is not JSON, and other programs cannot read it; write null or a string")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise DataError(f"lists and objects are nested more than {MAX_DEPTH} deep; write a flatter record")


def _half_pair(value: Any) -> str | None:
    """Return the escape of a surrogate that is not part of a pair, anywhere in a value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None
