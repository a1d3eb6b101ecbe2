"""One data file to rows: JSON, JSONL, CSV and Parquet, read through `datasets`.

Every value arrives as it stands in the file. Lines of JSON are kept as text and parsed when they are asked
for, because guessing column types for a whole file changes data: a column of dates becomes datetimes, and one
odd record can alter thousands of others (datasets 5.2). CSV fields stay strings for the same reason.
"""

import codecs
import csv
import glob
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lora_kit.data.messages import kind
from lora_kit.errors import DataError
from lora_kit.files import sha256_of

SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """The rows of one file, or of one split on the Hub.

    Attributes:
        label: Its name in messages.
        path: The file; None on the Hub.
        format: "jsonl", "json", "csv", "parquet" or "hub".
        rows: A `datasets.Dataset`, or the list that a JSON file holds.
    """

    label: str
    path: Path | None
    format: str
    rows: Any

    def numbers(self) -> np.ndarray:
        """Return the numbers of the rows that hold a record: all but blank lines."""
        if self.format != "jsonl":
            return np.arange(len(self.rows))
        import pyarrow.compute

        blank = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(self.rows.data.column("text")), "")
        return np.flatnonzero(~blank.to_numpy())

    def read(self, numbers: Sequence[int]) -> list[Record | DataError]:
        """Return the records of these numbers, or what is wrong with them."""
        if self.format == "json":
            return [_object(self.rows[number]) for number in numbers]
        columns = self.rows[list(numbers)]
        if self.format == "jsonl":
            return [_parse(line) for line in columns["text"]]
        rows = zip(*columns.values(), strict=True)
        return [_without_nulls(dict(zip(columns, values, strict=True))) for values in rows]

    def where(self, number: int) -> str:
        """Return the place of a record: file and line where there are lines."""
        if self.format == "jsonl":
            return f"{self.label}:{number + 1}"
        if self.format == "csv" and self.path is not None:
            rows = _csv_rows(self.path)
            if number < len(rows):
                return f"{self.label}:{rows[number][0]}"
        return f"{self.label}, record {number + 1}"


def open_file(path: Path, label: str) -> Part:
    """Open a data file.

    Args:
        path: The file; its suffix says what it is, but JSONL may be named .json and the other way round.
        label: Its name in messages.

    Raises:
        DataError: It is empty, not UTF-8, or not what its suffix says.
    """
    if path.suffix not in SUFFIXES:
        found = f"has the suffix {path.suffix!r}" if path.suffix else "has no suffix"
        raise DataError(f"{label}: the file {found}; expected one of {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise DataError(f"{label}: the file is empty")
    source = glob.escape(str(path))
    if SUFFIXES[path.suffix] == "parquet":
        rows = read_with(label, _reader("parquet", path, source))
        return Part(label, path, "parquet", rows)
    _check_utf8(path, label)
    if SUFFIXES[path.suffix] == "csv":
        return Part(label, path, "csv", _open_csv(path, label, source))
    values = _json_list(path, label)
    if values is not None:
        return Part(label, path, "json", values)
    rows = read_with(label, _reader("text", path, source))
    return Part(label, path, "jsonl", rows)


def _reader(kind: str, path: Path, source: str, **how: Any) -> Callable[[ModuleType], Any]:
    """Return a reader of one file; `datasets` keeps what it read by path and time, so its content gives it a name: an
    edit that leaves the time as it was (rsync, tar, a coarse clock) would bring back the old rows."""
    name = sha256_of(path)
    return lambda library: library.load_dataset(kind, name, data_files=[source], split="train", **how)


def read_with(label: str, read: Callable[[ModuleType], Any]) -> Any:
    """Call a reader with `datasets`, which is kept quiet.

    Raises:
        DataError: The reader failed.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        return read(datasets)
    except Exception as error:  # readers of every kind are behind this, each with its own errors
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{label}: cannot be read: {reason[0]}") from error


def _check_utf8(path: Path, label: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n") + 1
                utf16 = lines == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                guess = "utf-16" if utf16 else "windows-1252"
                raise DataError(
                    f"{label}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8, maybe {guess}; "
                    f"convert the file: `iconv -f {guess} -t utf-8 {path.name} > utf8-{path.name}`"
                ) from error
            lines += chunk.count(b"\n")


def _json_list(path: Path, label: str) -> list[Any] | None:
    """Return the list that a JSON file holds, or None when it has a record a line.

    Raises:
        DataError: It is JSON of another shape, or begins as a list and is not JSON.
    """
    with path.open(encoding="utf-8-sig") as file:
        first = next((line.strip() for line in file if line.strip()), "")
    if first.startswith("{") and not isinstance(_parse(first), dict):  # an object over several lines, perhaps
        try:
            keys = list(json.loads(path.read_text(encoding="utf-8-sig")))
        except json.JSONDecodeError:
            return None
        found = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
        raise DataError(f"{label}: the file is one object ({found}); expected a list of records, or one a line")
    if not first.startswith("["):
        return None
    try:
        return list(json.loads(path.read_text(encoding="utf-8-sig")))
    except json.JSONDecodeError as error:
        raise DataError(f"{label}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error


def _parse(line: str) -> Record | DataError:
    try:
        return _object(json.loads(line.lstrip("\ufeff")))
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} (column {error.colno}): {line[:60]!r}")


def _object(value: Any) -> Record | DataError:
    return value if isinstance(value, dict) else DataError(f"the record is {kind(value)}; expected an object")


def _without_nulls(value: Any) -> Any:
    """Drop the null fields with which typed tables fill in what other records have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _open_csv(path: Path, label: str, source: str) -> Any:
    """Return a CSV's rows.

    Raises:
        DataError: The header repeats a name, or a row has more fields than it.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header, filled = next(rows, []), any(rows)
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"{label}:1: the header has an empty or a repeated name: {', '.join(header)}")

    def read(library: ModuleType) -> Any:
        if not filled:  # the reader takes a header alone for a mistake
            return library.Dataset.from_dict({name: [] for name in header})
        strings = library.Features(dict.fromkeys(header, library.Value("string")))
        return _reader("csv", path, source, features=strings, keep_default_na=False)(library)

    try:
        return read_with(label, read)
    except DataError as error:
        wrong = [
            f"{label}:{line}: {len(row)} fields, the header has {len(header)}; quote fields with commas"
            for line, row in _csv_rows(path)
            if len(row) > len(header)
        ]
        raise DataError("\n".join(wrong[:20]) or str(error)) from error


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return each row after the header with the line at which it begins."""
    rows, begins = [], 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                if row:
                    rows.append((begins, row))
                begins = reader.line_num + 1
        except csv.Error:  # a field longer than the module reads; the rows before it are still right
            return rows[1:]
    return rows[1:]
