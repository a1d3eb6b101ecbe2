"""Read the rows of a data file (JSON, JSONL, CSV or Parquet) with `datasets`.

Values are not converted. Lines of JSONL are kept as text and parsed when they are read, because inferring column types
for a whole file changes data: a column of dates becomes datetimes, and a single odd record can alter thousands of
other records (datasets 5.2). CSV fields stay strings for the same reason.
"""

import codecs
import csv
import glob
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.data.messages import kind
from lora_kit.errors import DataError
from lora_kit.files import sha256_of

SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """The rows of a file, or of a split on the Hub.

    Attributes:
        label: Its name in error messages.
        path: The file; None for a split on the Hub.
        format: "jsonl", "json", "csv", "parquet" or "hub".
        rows: A `datasets.Dataset`, the list in a JSON file, or an empty list for a CSV file with only a header.
    """

    label: str
    path: Path | None
    format: str
    rows: Any

    def numbers(self) -> np.ndarray:
        """Return the indices of the rows that contain a record, that is, of all rows except blank lines."""
        if self.format != "jsonl":
            return np.arange(len(self.rows))
        import pyarrow.compute

        blank = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(self.rows.data.column("text")), "")
        return np.flatnonzero(~blank.to_numpy())

    def read(self, numbers: Sequence[int]) -> list[Record | DataError]:
        """Return the record in each of these rows, or the error if it cannot be read."""
        if self.format == "json":
            return [_object(self.rows[number]) for number in numbers]
        columns = self.rows[list(numbers)]
        if self.format == "jsonl":
            return [_parse(line) for line in columns["text"]]
        rows = zip(*columns.values(), strict=True)
        return [_without_nulls(dict(zip(columns, values, strict=True))) for values in rows]

    def where(self, number: int) -> str:
        """Return the place of a row for messages: file and line, or file and record number if the file has no lines."""
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
        path: The file. Its suffix gives the format, but .json and .jsonl may each contain either format.
        label: Its name in error messages.

    Raises:
        DataError: The file is empty, not UTF-8, or not of the format of its suffix.
    """
    if path.suffix not in SUFFIXES:
        found = f"has the suffix {path.suffix!r}" if path.suffix else "has no suffix"
        raise DataError(f"{label}: the file {found}; expected one of {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise DataError(f"{label}: the file is empty")
    if SUFFIXES[path.suffix] == "parquet":
        return Part(label, path, "parquet", _read("parquet", path, label))
    _check_utf8(path, label)
    if SUFFIXES[path.suffix] == "csv":
        return Part(label, path, "csv", _open_csv(path, label))
    values = _json_list(path, label)
    if values is not None:
        return Part(label, path, "json", values)
    return Part(label, path, "jsonl", _read("text", path, label))


def _read(builder: str, path: Path, label: str, **options: Any) -> Any:
    """Read a file with a builder of `datasets`, e.g. "csv".

    `datasets` caches files by path and modification time, and would return old rows after an edit that keeps the time
    (rsync, tar, a coarse clock). The hash of the content, given as the name of the configuration, prevents that.
    """
    load = partial(load_rows, label, builder, sha256_of(path), data_files=[glob.escape(str(path))], split="train")
    try:
        return load(**options)
    except DataError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) and not (cause and isinstance(cause.__cause__, OSError)):
            raise
    # its cache cannot be written; what it keeps there is mapped into memory, so its name is not needed any longer
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as folder:
        return load(cache_dir=folder, **options)


def load_rows(label: str, *arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset`, with its progress bars and log messages switched off.

    Args:
        label: The name of the source in the error message.
        arguments: Positional arguments of `load_dataset`.
        options: Keyword arguments of `load_dataset`.

    Raises:
        DataError: `load_dataset` raised an error.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # readers of many kinds are called here, each with its own errors
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
    """Return the list in a JSON file, or None if the file is JSONL.

    Raises:
        DataError: The file contains a single object, or begins like a list and is not JSON.
    """
    with path.open(encoding="utf-8-sig") as file:
        first = next((line.strip() for line in file if line.strip()), "")
    is_object = first.startswith("{")
    if not (is_object or first.startswith("[")) or (is_object and isinstance(_parse(first), dict)):
        return None
    try:
        value = _loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if is_object:  # JSONL with a wrong line, which will be reported by its number
            return None
        raise DataError(f"{label}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    if isinstance(value, dict):
        keys = list(value)
        found = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
        raise DataError(
            f"{label}: the file is one object ({found}); expected a list of records, or one record per line"
        )
    return list(value)


def _parse(line: str) -> Record | DataError:
    try:
        return _object(_loads(line.lstrip("\ufeff")))
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} (column {error.colno}): {line[:60]!r}")


def _loads(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        json.JSONDecodeError: The text is not JSON, is nested too deeply, or has half of a surrogate pair, which no
            tokenizer takes.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except UnicodeEncodeError as error:
        raise json.JSONDecodeError(f"{error.object[error.start]!a} is no character", text, 0) from None
    return value


def _object(value: Any) -> Record | DataError:
    return value if isinstance(value, dict) else DataError(f"the record is {kind(value)}; expected an object")


def _without_nulls(value: Any) -> Any:
    """Remove null fields: a typed table has them for every field that only other records have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _open_csv(path: Path, label: str) -> Any:
    """Return the rows of a CSV file, all values as strings.

    Raises:
        DataError: The header has an empty or repeated name, or a row has more fields than the header.
    """
    import datasets

    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header, has_rows = next(rows, []), any(rows)
    if len(set(header)) < len(header) or not all(header):
        raise DataError(f"{label}:1: the header has an empty or repeated name: {', '.join(header)}")
    if not has_rows:  # the reader of datasets refuses a file with only a header
        return []
    strings = datasets.Features(dict.fromkeys(header, datasets.Value("string")))
    try:
        return _read("csv", path, label, features=strings, keep_default_na=False)
    except DataError as error:
        problems = [
            f"{label}:{line}: {len(row)} fields, the header has {len(header)}; quote fields that contain commas"
            for line, row in _csv_rows(path)
            if len(row) > len(header)
        ]
        raise DataError("\n".join(problems[:20]) or str(error)) from error


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return each row after the header with the number of its first line."""
    rows, line = [], 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                if row:
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error:  # a field longer than the csv module allows; the rows before it are still right
            return rows[1:]
    return rows[1:]
