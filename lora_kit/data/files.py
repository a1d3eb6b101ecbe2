"""Open a data file: find out what it is by its content and suffix, decompress it, and index its records.

The values of JSON Lines, JSON and CSV keep exactly what the file says: no reader infers the types of columns, which
changes data (a column of dates becomes datetimes, and a single odd record can alter thousands of other records).
"""

import codecs
import errno
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from lora_kit.data import tables, text_files
from lora_kit.data.arrays import NO_SPACE, spill_file
from lora_kit.data.strict_json import Record
from lora_kit.errors import DataError

SUFFIXES = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **{".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"},
}
COMPRESSED = (".gz", ".zst", ".bz2")  # suffixes that may follow these
CODECS = {  # patterns of the first bytes of a file; a text may begin with the letters BZh, PAR1 or ARROW1
    rb"\x1f\x8b": "gzip",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bz2",
}
TABLES = {rb"PAR1\x15": "parquet", rb"ARROW1\0\0": "arrow", rb"\xff\xff\xff\xff": "arrow"}
OTHERS = (  # the first bytes of files that are not read, and what to do
    (b"PK\x03\x04", "is a zip archive or an Excel table; unpack it, or save it as CSV"),
    (b"\xfd7zXZ", "is compressed by xz; decompress it with `xz -d`"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it"),
    (b"SQLite format 3\0", "is a SQLite database; export the table as CSV"),
    (b"%PDF-", "is a PDF; extract its text"),
    (b"\x80\x02", "is a pickle, which could run code; write JSON Lines or Parquet instead"),
    (b"\x80\x04", "is a pickle, which could run code; write JSON Lines or Parquet instead"),
    (b"version https://git-lfs", "is a pointer of Git LFS, without the data; fetch it with `git lfs pull`"),
)
WEB_PAGE = re.compile(rb"<(!doctype|html)", re.IGNORECASE)
TEXT_BYTES = 10_000_000  # most bytes of a chat template
HEAD_BYTES = 4096  # the beginning of a file that tells its format
BYTE_ORDER_MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Part(Protocol):
    """The records of a file, or of a split on the Hub, read by their number."""

    @property
    def label(self) -> str:
        """Its name in messages."""

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> list[Record | DataError]:
        """Return the record of each of these ascending numbers, or the error if it cannot be read."""

    def where(self, number: int) -> str:
        """Return the place of a record for messages: file and line, or file and number if the file has no lines."""


def suffix_of(path: str | Path) -> str:
    """Return a file's suffix in lower case, without that of its compression, e.g. `.jsonl` for `A.JSONL.gz`."""
    return _decompressed_name(path).suffix.lower()


def stem_of(path: Path) -> str:
    """Return a file's name without its suffixes, e.g. `a.train` for `a.train.jsonl.gz`."""
    return _decompressed_name(path).stem


def _decompressed_name(path: str | Path) -> Path:
    return Path(path).with_suffix("") if Path(path).suffix.lower() in COMPRESSED else Path(path)


def open_file(path: Path, label: str, *, documents: bool = False) -> Part:
    """Open a data file.

    Args:
        path: The file. The suffix gives its format, except where the content is plainly another.
        label: Its name in messages.
        documents: Whether a .txt file is a single record; otherwise each of its lines is.

    Raises:
        DataError: The file cannot be read, is empty, not UTF-8, or not of the format of its suffix.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        found = f"has the suffix {suffix!r}" if suffix else "has no suffix"
        known, packed = ", ".join(SUFFIXES), ", ".join(COMPRESSED)
        raise DataError(f"{label}: the file {found}; expected one of {known}, also compressed ({packed})")
    file = open_input(path, label)
    head = os.pread(file.fileno(), HEAD_BYTES, 0)
    if codec := _match(CODECS, head):
        file = _decompressed(file, codec, label)
        head = os.pread(file.fileno(), HEAD_BYTES, 0)
    if not head:
        raise DataError(f"{label}: the file is empty; write it again, or remove it")
    try:
        return _open(file, head, suffix, label, documents=documents)
    except OSError as error:
        remedy = "raise the limit with `ulimit -n`" if error.errno == errno.EMFILE else "check the disk"
        raise DataError(f"{label}: cannot be read: {error.strerror}; {remedy}") from error


def open_input(path: Path, label: str) -> BinaryIO:
    """Open a regular file. Another kind is refused: a FIFO would block, and can be read only once.

    Raises:
        DataError: The file cannot be opened, or is not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{label}: cannot be opened: {error.strerror}; check the file and its permissions") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{label}: not a regular file (perhaps a pipe); write the records to a file first")
    return os.fdopen(descriptor, "rb", buffering=1 << 20)


def read_text(path: Path, label: str) -> str:
    """Return the content of a small text file, e.g. a chat template, without a byte order mark.

    Raises:
        DataError: The file cannot be read, is empty, too large, or not UTF-8.
    """
    with open_input(path, label) as file:
        raw = file.read(TEXT_BYTES + 1)
    if not raw.strip() or len(raw) > TEXT_BYTES:
        found = "is empty; write it again, or remove data.template" if len(raw) <= TEXT_BYTES else "is too large"
        raise DataError(f"{label}: the file {found}")
    start = text_start(raw[:HEAD_BYTES], label)
    for number, line in enumerate(raw[start:].split(b"\n"), 1):
        if isinstance(problem := text_files.decode(line), DataError):
            raise DataError(f"{label}:{number}: {problem}")
    return raw[start:].decode().replace("\r\n", "\n").replace("\r", "\n")


def text_start(head: bytes, label: str, *, plain: bool = False) -> int:
    """Return where the text of a file begins, after a byte order mark of UTF-8.

    Args:
        head: The first bytes of the file.
        label: Its name in messages.
        plain: Whether any text is expected, also that of a web page.

    Raises:
        DataError: The file is UTF-16, UTF-32, or of a kind that is no text.
    """
    for magic, found in OTHERS:
        if head.startswith(magic):
            raise DataError(f"{label}: the file {found}")
    if WEB_PAGE.match(head) and not plain:
        remedy = "download the file itself (on the Hub, its /resolve/ address)"
        raise DataError(f"{label}: the file is a web page; {remedy}")
    if head[257:262] == b"ustar":
        raise DataError(f"{label}: the file is a tar archive; unpack it")
    for mark, name in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            raise DataError(f"{label}:1: {text_files.not_utf8(head[0], name)}")
    zeros = head[:64].count(0)
    if zeros > len(head[:64]) / 4:  # without a mark, half or three quarters of the bytes of Latin text are zeros
        name = f"utf-{32 if zeros > len(head[:64]) * 0.6 else 16}{'le' if head[0] else 'be'}"
        raise DataError(f"{label}:1: {text_files.not_utf8(0, name)}")
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _open(file: BinaryIO, head: bytes, suffix: str, label: str, *, documents: bool) -> Part:
    """Index an open file of a format."""
    format = _match(TABLES, head) or SUFFIXES[suffix]
    if format == "parquet":
        return tables.open_parquet(label, file)
    if format == "arrow":
        return tables.open_arrow(label, file)
    start = text_start(head, label, plain=format == "text")
    if format == "json" or text_files.has_objects(file, start):
        return text_files.open_json(label, file, start)
    if format == "csv":
        return text_files.open_csv(label, file, start, tabs=suffix == ".tsv")
    if documents:
        return text_files.open_document(label, file, start)
    return text_files.open_lines(label, file, start, text_files.parse_line)


def _match(magic: dict[bytes, str], head: bytes) -> str | None:
    return next((name for first, name in magic.items() if re.match(first, head)), None)


def _decompressed(file: BinaryIO, codec: str, label: str) -> BinaryIO:
    """Return a temporary file with the decompressed content; it has no name and ends with the process.

    Raises:
        DataError: The file is damaged or cut off, or the disk is full.
    """
    import pyarrow

    copy = spill_file()
    try:
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec) as stream:
            shutil.copyfileobj(stream, copy, 1 << 22)
        copy.flush()
    except (OSError, pyarrow.ArrowException) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        raise DataError(
            f"{label}: cannot be decompressed ({codec}): {error}; "
            + (NO_SPACE if full else "the file is damaged or cut off: copy it again")
        ) from error
    return copy
