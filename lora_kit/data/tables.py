"""Records in typed tables: Parquet and Arrow files, and datasets of the Hub.

A table has a null wherever a record lacks a field that another record has. Such nulls are removed. Nulls inside a map
or a JSON column (as `datasets` 5 writes them) are values of the record and are kept.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_kit.data.arrays import NO_SPACE, spill_file
from lora_kit.data.strict_json import Record, loads
from lora_kit.errors import DataError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 4096  # rows of a Parquet file that are in memory together while it is converted


@dataclass(frozen=True, eq=False)
class TablePart:
    """The rows of a table.

    Attributes:
        label: The table's name in messages.
        table: The table; its columns are mapped from a file, so that few of its rows are in memory.
    """

    label: str
    table: "pyarrow.Table"

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def read(self, numbers: Sequence[int]) -> list[Record | DataError]:
        """Return the record of each of these rows, or the error if it cannot be read."""
        if not len(numbers):
            return []
        first, last = int(numbers[0]), int(numbers[-1])
        rows = self.table.slice(first, last - first + 1)
        if len(rows) != len(numbers):
            rows = rows.take([int(number) - first for number in numbers])
        columns = []
        for column, field in zip(rows.columns, rows.schema, strict=True):
            columns.append([_attempt(_exact, value, field.type) for value in _values_of(column)])
        return [_record(rows.column_names, values) for values in zip(*columns, strict=True)]

    def where(self, number: int) -> str:
        """Return the table and the number of a row, from 1."""
        return f"{self.label}, record {number + 1}"


def open_parquet(label: str, file: BinaryIO) -> TablePart:
    """Open a Parquet file. Its rows are copied to an unnamed temporary Arrow file, which is deleted with the process.

    Raises:
        DataError: The file is damaged, or two columns have the same name.
    """
    import pyarrow.parquet

    copy = spill_file()  # the table keeps it open
    with _damage_of(label, "Parquet"):
        source = pyarrow.parquet.ParquetFile(file)
        with pyarrow.ipc.new_file(copy, source.schema_arrow) as writer:
            for batch in source.iter_batches(BATCH_ROWS):
                batch.validate(full=True)  # e.g. strings that are not UTF-8
                writer.write_batch(batch)
        copy.flush()
        return _part(label, pyarrow.ipc.open_file(_mapped(copy)).read_all())


def open_arrow(label: str, file: BinaryIO) -> TablePart:
    """Open an Arrow file, or a stream of Arrow in a file, as `Dataset.save_to_disk` writes it.

    Raises:
        DataError: The file is damaged, or two columns have the same name.
    """
    import pyarrow

    with _damage_of(label, "Arrow"):
        is_file = file.read(6) == b"ARROW1"
        open_table = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        table = open_table(_mapped(file)).read_all()
        table.validate(full=True)  # reading invalid offsets would crash the process
        return _part(label, table)


def hub_part(label: str, rows: Any) -> TablePart:
    """Return the part of a `datasets.Dataset`."""
    return _part(label, rows.flatten_indices().data.table if rows._indices is not None else rows.data.table)


def _part(label: str, table: "pyarrow.Table") -> TablePart:
    names = table.column_names
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"{label}: the table has the column {twice[0]!r} more than once; name each column once")
    return TablePart(label, table)


@contextmanager
def _damage_of(label: str, format: str) -> Iterator[None]:
    """Turn the errors of pyarrow into a DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        remedy = NO_SPACE if full else "the file is damaged or cut off: write, copy or download it again"
        raise DataError(f"{label}: cannot be read as {format}: {reason.rstrip('.')}; {remedy}") from error


def _mapped(file: BinaryIO) -> "pyarrow.MemoryMappedFile":
    """Map an open file into memory, also a file without a name."""
    import pyarrow

    return pyarrow.memory_map(f"/dev/fd/{file.fileno()}")


def _values_of(column: "pyarrow.ChunkedArray") -> list[Any]:
    """Return the values of a column; an error takes the place of a value that Python cannot represent."""
    try:
        return list(column.to_pylist())
    except _unreadable():
        return [_attempt(lambda scalar, _: scalar.as_py(), scalar, None) for scalar in column]


def _attempt(function: Callable[[Any, Any], Any], value: Any, kind: Any) -> Any:
    if isinstance(value, DataError):
        return value
    try:
        return function(value, kind)
    except DataError as error:
        return error
    except _unreadable() as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        return DataError(f"the value cannot be read: {reason}; cast or remove the column")


def _unreadable() -> tuple[type[Exception], ...]:
    """Return the exceptions for a value that Python cannot represent: a time after year 9999, a repeated field"""
    import pyarrow

    return ValueError, OverflowError, TypeError, pyarrow.ArrowException


def _record(names: Sequence[str], values: Sequence[Any]) -> Record | DataError:
    for name, value in zip(names, values, strict=True):
        if isinstance(value, DataError):
            return DataError(f"{name}: {value}")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _exact(value: Any, kind: "pyarrow.DataType") -> Any:
    """Return a value of a table as JSON would have it: without padding nulls, maps as objects, JSON columns parsed.

    Raises:
        DataError: A map has a key twice, or a JSON column holds no JSON.
    """
    from pyarrow import types

    if value is None:
        return None
    if isinstance(kind, _json_type()):
        return loads(value)
    if types.is_dictionary(kind):
        return _exact(value, kind.value_type)
    if types.is_struct(kind):
        items = ((field.name, _exact(value[field.name], field.type)) for field in kind)
        return {name: item for name, item in items if item is not None}
    if types.is_map(kind):
        result = {key: _exact(item, kind.item_type) for key, item in value}
        if len(result) < len(value):
            raise DataError("a map has a key twice; keep one of them")
        return result
    if types.is_nested(kind) and isinstance(value, list):
        return [_exact(item, kind.value_type) for item in value]
    return value


def _json_type() -> type:
    import pyarrow

    return pyarrow.JsonType
