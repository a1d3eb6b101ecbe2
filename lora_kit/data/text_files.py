"""Read records from text files by byte offset: JSON Lines, JSON, CSV and plain text.

Opening a file scans it once and stores where each record begins and ends, 24 bytes per record. A record is parsed when
it is read. Lines end with a line feed and at no other character: JSON and text may contain U+2028 or a form feed.
"""

import csv
import io
import json
import mmap
import os
import re
import reprlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from lora_kit.data.messages import kind
from lora_kit.data.strict_json import EXCERPT, Record, loads, not_json
from lora_kit.errors import DataError

CARRIAGE_RETURNS = "a carriage return alone ends its lines; convert the file with `tr '\\r' '\\n'`"
LINES_OF_SAMPLE = 100  # lines read to distinguish JSON Lines with a damaged first line from objects over several lines
SMALL_BYTES = 1 << 18  # larger files are mapped
FIELD_BYTES = (1 << 31) - 1  # the longest field of a CSV file; the csv module's own limit is 128 KB
RECORD = 'an object, e.g. {"text": "..."}'
WHITESPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, eq=False)
class TextPart:
    """The records of a text file.

    Attributes:
        label: The file's name in messages.
        content: The file, mapped into memory, so that forked processes can read it; a small file as bytes, since a
            process can map about a thousand files.
        starts: Where each record begins, in bytes, int64 [records].
        stops: Where each record ends, int64 [records].
        lines: The line in which each record begins, from 1, int64 [records].
        parse: Returns the record that some bytes contain, or the error if they are not a record.
    """

    label: str
    content: mmap.mmap | bytes
    starts: np.ndarray
    stops: np.ndarray
    lines: np.ndarray
    parse: Callable[[bytes], Record | DataError]

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, numbers: Sequence[int]) -> list[Record | DataError]:
        """Return the record of each of these numbers, or the error if it cannot be read."""
        if not len(numbers):
            return []
        places = [(int(self.starts[number]), int(self.stops[number])) for number in numbers]
        records = [self.parse(self.content[start:stop]) for start, stop in places]
        first = places[0][0] - places[0][0] % mmap.PAGESIZE
        if isinstance(self.content, mmap.mmap):
            self.content.madvise(
                mmap.MADV_DONTNEED, first, places[-1][1] - first
            )  # without this all pages that were read stay in memory
        return records

    def where(self, number: int) -> str:
        """Return the file and line of a record; its number if several records begin in that line."""
        line = int(self.lines[number])
        alone = np.count_nonzero(self.lines[max(0, number - 1) : number + 2] == line) == 1
        return f"{self.label}:{line}" if alone else f"{self.label}:{line}, record {number + 1}"


class _Index:
    """Collects where records begin and end, in 24 bytes per record."""

    def __init__(self) -> None:
        self._columns = array("q"), array("q"), array("q")

    def add(self, start: int, stop: int, line: int) -> None:
        for column, value in zip(self._columns, (start, stop, line), strict=True):
            column.append(value)

    def part(self, label: str, file: BinaryIO, parse: Callable[[bytes], Record | DataError]) -> TextPart:
        starts, stops, lines = (np.frombuffer(column, np.int64) for column in self._columns)
        size = os.fstat(file.fileno()).st_size
        content = (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if size > SMALL_BYTES
            else os.pread(file.fileno(), SMALL_BYTES, 0)
        )
        return TextPart(label, content, starts, stops, lines, parse)


def open_json(label: str, file: BinaryIO, start: int) -> TextPart:
    """Index a file of JSON Lines, a JSON list, or objects over several lines.

    Args:
        label: The file's name in messages.
        file: The open file.
        start: The byte at which its text begins, after a byte order mark.

    Raises:
        DataError: The file begins like a list or an object over several lines, and is not JSON.
    """
    lines = _sample(file, start)
    first = lines[0].lstrip() if lines else b""
    if first.startswith(b"["):
        alone = len(lines) > 1 and isinstance(_value(first), list)  # JSON Lines whose records are lists
        return open_lines(label, file, start, parse_json) if alone else _open_values(label, file, start, in_list=True)
    if first.startswith(b"{") and (
        _spans_lines(lines) or not any(isinstance(_value(line), dict) for line in lines if line[:1] == b"{")
    ):
        return _open_values(label, file, start, in_list=False)
    return open_lines(label, file, start, parse_json)


def _spans_lines(lines: Sequence[bytes]) -> bool:
    """Return whether the first lines of a file begin with an object over several lines, perhaps without its end."""
    text = b"".join(lines).decode(errors="replace").lstrip()
    try:
        end = _SCANNER.raw_decode(text)[1]
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip())
    except RecursionError:
        return False
    return "\n" in text[:end]


def has_objects(file: BinaryIO, start: int) -> bool:
    """Return whether the first line of a file is a JSON object, whatever its suffix says."""
    first = next((line for _, line in _lines(file, start) if not line.isspace()), b"")
    return first.lstrip().startswith(b"{") and isinstance(_value(first), dict)


def open_lines(label: str, file: BinaryIO, start: int, parse: Callable[[bytes], Record | DataError]) -> TextPart:
    """Index a file with a record in each line; blank lines are skipped."""
    index = _Index()
    for number, (position, line) in enumerate(_lines(file, start), 1):
        if not line.isspace():
            index.add(position, position + len(line), number)
    return index.part(label, file, parse)


def open_document(label: str, file: BinaryIO, start: int) -> TextPart:
    """Index a text file that is a single record."""
    index = _Index()
    index.add(start, os.fstat(file.fileno()).st_size, 1)
    return index.part(label, file, parse_document)


def open_csv(label: str, file: BinaryIO, start: int, *, tabs: bool) -> TextPart:
    """Index a CSV file, whose first row names the columns. All values are strings.

    Args:
        label: The file's name in messages.
        file: The open file.
        start: The byte at which its text begins, after a byte order mark.
        tabs: Whether the suffix says that tabs separate the fields. Otherwise commas do, or the semicolons or tabs of
            a header without commas.

    Raises:
        DataError: The header is empty or repeats a name, or the quotes of a row make the rows after it ambiguous.
    """
    csv.field_size_limit(FIELD_BYTES)
    separator = _separator(next((line for _, line in _lines(file, start)), b""), tabs=tabs)
    position = begin = start
    number, header = 0, list[str]()
    index = _Index()

    def decoded() -> Iterator[str]:
        nonlocal position
        for offset, line in _lines(file, start):
            position = offset + len(line)
            yield line.decode(errors="surrogateescape")  # the row that holds other bytes reports them when it is read

    reader = csv.reader(decoded(), delimiter=separator, strict=True)
    try:
        for row in reader:
            if row and header:
                index.add(begin, position, number + 1)
            elif row:
                header = _header(row, label, number + 1)
            number, begin = reader.line_num, position
    except csv.Error as error:
        raise DataError(f"{label}:{number + 1}: {_quotes(error, reader.line_num)}") from error
    return index.part(label, file, partial(parse_row, header=header, separator=separator))


def decode(raw: bytes) -> str | DataError:
    """Decode UTF-8; return an error if the bytes are not UTF-8 or contain a NUL byte."""
    if b"\0" in raw:
        place = raw.index(b"\0")
        return DataError(f"a NUL byte (column {place + 1}): the file is damaged, or not UTF-8; write it again")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return DataError(not_utf8(raw[error.start], "windows-1252"))


def not_utf8(byte: int, guess: str) -> str:
    """Describe a byte that is not UTF-8, and how to convert the file."""
    return f"byte 0x{byte:02x} is not UTF-8, maybe {guess}; convert the file with `iconv -f {guess} -t utf-8`"


def parse_json(raw: bytes) -> Record | DataError:
    """Return the object that some bytes contain as JSON."""
    text = decode(raw)
    if isinstance(text, DataError):
        return text
    try:
        value = loads(text.strip(" \t\r\n\ufeff"))  # a file joined from several files contains byte order marks
    except DataError as error:
        return error
    return value if isinstance(value, dict) else DataError(f"the record is {kind(value)}; expected {RECORD}")


def parse_line(raw: bytes) -> Record | DataError:
    """Return a line of plain text as a record of the format text."""
    text = decode(raw.removesuffix(b"\n").removesuffix(b"\r"))
    if isinstance(text, str) and "\r" in text:
        return DataError(CARRIAGE_RETURNS)
    return text if isinstance(text, DataError) else {"text": text}


def parse_document(raw: bytes) -> Record | DataError:
    """Return a text file as a record of the format text, with line feeds as the ends of its lines."""
    text = decode(raw)
    if isinstance(text, DataError):
        return text
    return {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def parse_row(raw: bytes, header: Sequence[str], separator: str) -> Record | DataError:
    """Return a row of a CSV file by the names of its columns."""
    text = decode(raw)
    if isinstance(text, DataError):
        return text
    row = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    if len(row) == len(header):
        return dict(zip(header, row, strict=True))
    name = {",": "commas", ";": "semicolons", "\t": "tabs"}[separator]
    remedy = f"quote fields that contain {name}" if len(row) > len(header) else "write empty fields too"
    if f'{separator} "' in text:
        remedy = "remove the blanks before quotes, which do not count as quotes there"
    return DataError(f"{len(row)} field{'s' * (len(row) != 1)}, the header has {len(header)}; {remedy}")


def _lines(file: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield every line of a file with the position of its first byte."""
    file.seek(start)
    for line in file:
        yield start, line
        start += len(line)


def _sample(file: BinaryIO, start: int) -> list[bytes]:
    """Return the first lines of a file that are not blank."""
    lines = (line for _, line in _lines(file, start) if not line.isspace())
    return [line for line, _ in zip(lines, range(LINES_OF_SAMPLE), strict=False)]


def _value(line: bytes) -> Any:
    """Parse a line of JSON without the strict checks; None if it is not JSON."""
    try:
        return _SCANNER.decode(line.decode())
    except (ValueError, RecursionError):
        return None


_SCANNER = json.JSONDecoder(parse_int=float)  # `int` raises ValueError for a number with thousands of digits


def _open_values(label: str, file: BinaryIO, start: int, *, in_list: bool) -> TextPart:
    """Index the elements of a JSON list, or objects that follow each other over several lines.

    Raises:
        DataError: The text is not JSON; the message names the line.
    """
    file.seek(start)
    raw = file.read()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{label}:{line}: {not_utf8(raw[error.start], 'windows-1252')}") from error
    del raw
    index, at, byte, line = _Index(), 0, start, 1
    for begin, end in _values(text, label, in_list=in_list):
        byte += len(text[at:begin].encode())
        line += text.count("\n", at, begin)
        size = len(text[begin:end].encode())
        index.add(byte, byte + size, line)
        at, byte, line = end, byte + size, line + text.count("\n", begin, end)
    return index.part(label, file, parse_json)


def _values(text: str, label: str, *, in_list: bool) -> Iterator[tuple[int, int]]:
    """Yield where each value begins and ends, in characters."""

    def skip(position: int) -> int:
        match = WHITESPACE.match(text, position)
        assert match
        return match.end()

    def line(position: int) -> str:
        return f"{label}:{text.count(chr(10), 0, position) + 1}"

    at = skip(skip(0) + in_list)
    if in_list and text[at : at + 1] == "]":
        return
    while at < len(text):
        try:
            _, end = _SCANNER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{label}:{error.lineno}: {not_json(text, error)}") from error
        except RecursionError as error:
            raise DataError(f"{line(at)}: lists and objects are nested too deep; write a flatter record") from error
        yield at, end
        at = skip(end)
        if not in_list:
            continue
        if text[at : at + 1] == "]":
            if (rest := skip(at + 1)) < len(text):
                found = text[rest : rest + EXCERPT].partition("\n")[0]
                raise DataError(f"{line(rest)}: {found!r} follows the end of the list; put every record into one list")
            return
        if text[at : at + 1] != ",":
            missing = json.JSONDecodeError("Expecting ',' delimiter", text, at)
            raise DataError(f"{label}:{missing.lineno}: {not_json(text, missing)}")
        at = skip(at + 1)
    if in_list:
        raise DataError(f"{line(at)}: the list does not end: the file is cut off; copy or download it again")


def _separator(header: bytes, *, tabs: bool) -> str:
    candidates = (b"\t", b",", b";") if tabs else (b",", b";", b"\t")
    return next((candidate for candidate in candidates if candidate in header), candidates[0]).decode()


def _header(row: list[str], label: str, line: int) -> list[str]:
    try:
        ",".join(row).encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00  # the error handler `surrogateescape` adds 0xDC00 to a byte
        raise DataError(f"{label}:{line}: {not_utf8(byte, 'windows-1252')}") from error
    if len(set(row)) < len(row) or not all(name.strip() for name in row):
        names = reprlib.repr(", ".join(row))
        raise DataError(f"{label}:{line}: the header has an empty or repeated name: {names}; name each column once")
    return row


def _quotes(error: csv.Error, line: int) -> str:
    """Describe a row that the csv module cannot parse."""
    if "new-line character" in str(error):
        return CARRIAGE_RETURNS
    if "unexpected end" in str(error):
        return "a quote opens in this row and never closes; close it, or write a quote inside a field twice"
    return f"text follows a closing quote in line {line}; write a quote inside a field twice"
