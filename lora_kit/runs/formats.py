"""Read the files of a run. Any content gives a value of the expected type, or an error that says why it is not valid.

All files of a run (lease.json, result.json, manifest.json, job.json, events.jsonl, metrics.jsonl) are read by the
functions of this module. A file may be damaged, from another version, or written by anyone. So types and ranges are
checked here, once, and no caller has to check them again.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from lora_kit.errors import CheckpointError
from lora_kit.files import open_regular, read_regular

MOST_BYTES = 1 << 25  # most bytes of a file that is read at once, or of a line of a log
SHOWN_PROBLEMS = 3
SHOWN_CHARACTERS = 80  # most characters shown of a text that comes from a file
SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}\n\Z')

T = TypeVar("T")


def finite(value: Any) -> Any:
    """Return a JSON value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\") or len(name.encode()) > 255:
        raise ValueError("not the name of a file in this folder")
    return name


Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number."""
Figure = Annotated[Finite | None, BeforeValidator(finite)]
"""A measured number; None if it was not finite."""
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number that is not negative."""
FileName = Annotated[str, AfterValidator(_plain_name)]
"""The name of a file, without a folder."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 as hexadecimal digits."""
RunId = Annotated[str, Field(pattern="^[0-9a-z]{1,32}$")]
"""The id of a run. Names of files contain it."""
Token = Annotated[int, Field(ge=0, lt=2**62)]
"""A fencing token."""
Json = Annotated[Any, AfterValidator(finite)]
"""Any JSON value; None stands for a number that was not finite."""


def read(expected: TypeAdapter[T], path: Path) -> T | None:
    """Return the content of a file as a typed value; None if there is no file.

    Raises:
        CheckpointError: The file cannot be read, is not a regular file, or its content is not valid.
    """
    data = read_bytes(path)
    return None if data is None else parse(expected, data, path)


def read_bytes(path: Path) -> bytes | None:
    """Return the content of a file; None if there is no file.

    Raises:
        CheckpointError: The file cannot be read, is not a regular file, or is larger than `MOST_BYTES`.
    """
    try:
        return read_regular(path, MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse(expected: TypeAdapter[T], data: bytes, where: Path | str) -> T:
    """Return JSON as a typed value.

    Raises:
        CheckpointError: The data is not JSON, or a value is missing, of another type or out of range; the message
            names the first such values.
    """
    try:
        return expected.validate_json(data, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        shown = [
            f"{'.'.join(short(part) for part in problem['loc']) or 'content'}: {short(problem['msg'])}"
            for problem in problems[:SHOWN_PROBLEMS]
        ]
        more = len(problems) - len(shown)
        shown += [f"{more} more"] if more else []
        raise CheckpointError(f"{where}: not valid: {'; '.join(shown)}") from None


def read_lines(expected: TypeAdapter[T], path: Path) -> Iterator[tuple[bytes, T]]:
    """Yield the valid lines of a log, each as it is and as a typed value; nothing if there is no file.

    Raises:
        CheckpointError: The file cannot be read or is not a regular file.
    """
    try:
        with open_regular(path) as file:
            yield from valid_lines(expected, file)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def valid_lines(expected: TypeAdapter[T], file: BinaryIO) -> Iterator[tuple[bytes, T]]:
    """Yield the valid lines of an open log, each as it is and as a typed value."""
    while line := file.readline(MOST_BYTES):
        with suppress(CheckpointError):
            yield line, parse(expected, line, "line")


def short(value: object) -> str:
    """Return text that may come from a file, shortened and without control characters."""
    text = str(value).encode("unicode_escape").decode()
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def seal(content: Mapping[str, Any]) -> bytes:
    """Serialise a JSON object with a SHA-256 of its own text as its last key, so that any changed byte is detected.

    Raises:
        CheckpointError: A value is not JSON, such as a number that is not finite.
    """
    plain = {key: value for key, value in content.items() if key != "sha256"}
    try:
        text = _text(plain)
        return _text(plain | {"sha256": hashlib.sha256(text).hexdigest()})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"a value cannot be stored as JSON: {error}") from error


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def require_seal(data: bytes, where: Path | str) -> None:
    """Check data that `seal` has written.

    Raises:
        CheckpointError: A byte has changed, or there is no checksum.
    """
    end = SEAL.search(data, max(0, len(data) - 100))
    if end is None:
        raise CheckpointError(f"{where}: not valid: there is no checksum at its end")
    if hashlib.sha256(data[: end.start()] + b"\n}\n").hexdigest().encode() != end[1]:
        raise CheckpointError(f"{where}: changed since it was written; its own checksum does not match")
