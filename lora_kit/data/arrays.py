"""Arrays that may be larger than memory: they are appended to a file, saved to a file, and mapped into memory.

A saved file has the format of safetensors. It is written and checked in chunks, and the pages of a mapped array are
released after each pass over it, so no array has to fit into memory.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from lora_kit.files import cache_folder, private_folder

SPILL_BYTES = 1 << 24  # an array or a saved file up to this size is kept in memory
CHUNK_BYTES = 1 << 24  # bytes that are read or written at a time
HEADER_BYTES = 100_000_000  # the largest header of the format
DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "BOOL": np.dtype("?"),
    "F32": np.dtype("<f4"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUM, NO_CHECKSUM = "checksum", "0" * 32
NO_SPACE = "free space for temporary files, or set LORA_KIT_CACHE to a folder on another disk"


def spill_folder() -> Path | None:
    """Return the folder for temporary files: the cache, which is on a disk; None for the system's if that fails."""
    try:
        with private_folder(cache_folder("tokens")) as folder:
            return folder.path
    except OSError:
        return None


def spill_file() -> BinaryIO:
    """Return an unnamed temporary file in `spill_folder`, which is deleted with the process."""
    return tempfile.TemporaryFile(dir=spill_folder())


class Growing:
    """An array to append to, in memory or, if it is large, in an unnamed file that is deleted with the process.

    Args:
        dtype: The type of its elements.
        folder: Where the file is created, from `spill_folder`.
    """

    def __init__(self, dtype: type[np.generic], folder: Path | None) -> None:
        self._dtype = np.dtype(dtype)
        directory = None if folder is None else str(folder)
        self._file = tempfile.SpooledTemporaryFile(SPILL_BYTES, dir=directory)  # noqa: SIM115  (closed with this object)
        self._bytes = 0

    def append(self, array: np.ndarray) -> None:
        """Append the elements of an array."""
        self._bytes += self._file.write(np.ascontiguousarray(array, self._dtype).data)

    def finish(self) -> np.ndarray:
        """Return the complete array, read-only."""
        self._file.seek(0)
        if self._bytes <= SPILL_BYTES:
            return np.frombuffer(self._file.read(), self._dtype)
        self._file.flush()
        return np.frombuffer(mmap.mmap(self._file.fileno(), self._bytes, access=mmap.ACCESS_READ), self._dtype)


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array of one dimension in chunks, and release the pages of a mapped array after each chunk."""
    length = max(1, CHUNK_BYTES // array.itemsize)
    for start in range(0, len(array), length):
        yield array[start : start + length]
        release(array)


def release(*arrays: np.ndarray) -> None:
    """Release the memory of the pages of mapped arrays; they are read from the file again when they are used."""
    for array in arrays:
        if isinstance(mapped := getattr(array.base, "obj", None), mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Write arrays of one dimension to an empty file; return its checksum.

    Args:
        file: An unbuffered or buffered file that is open for reading and writing.
        arrays: The arrays by their names.
        metadata: Texts for the header, by name.
    """
    # the widest dtype first, so that each array is aligned
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    header, end = dict[str, Any](), 0
    for name, array in ordered:
        entry = {"dtype": NAMES[array.dtype], "shape": [len(array)], "data_offsets": [end, end + array.nbytes]}
        header[name], end = entry, end + array.nbytes
    blank = _header(header, {**metadata, CHECKSUM: NO_CHECKSUM})
    digest = xxhash.xxh3_128(blank)
    file.write(blank)
    for _, array in ordered:
        for chunk in chunks(array):
            digest.update(chunk.data)
            file.write(chunk.data)
    file.seek(0)
    file.write(_header(header, {**metadata, CHECKSUM: digest.hexdigest()}))
    file.flush()
    return digest.hexdigest()


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(descriptor: int, *, verify: bool = True) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays and the metadata of an open file of `write`. Arrays of a large file are mapped into memory.

    Args:
        descriptor: The open file.
        verify: Whether to compare the checksum, for which the whole file is read.

    Raises:
        ValueError, KeyError, TypeError: The file was not written by `write`, or is damaged.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 0 < length <= min(HEADER_BYTES, size - 8):
        raise ValueError("the file has no header")
    header = os.pread(descriptor, 8 + length, 0)
    entries: dict[str, Any] = dict(json.loads(header[8:]))
    metadata: dict[str, str] = entries.pop("__metadata__")
    if verify and _checksum(descriptor, header, metadata[CHECKSUM], size) != metadata[CHECKSUM]:
        raise ValueError("the checksum does not match")
    content: bytes | mmap.mmap = os.pread(descriptor, size, 0) if size <= SPILL_BYTES else b""
    content = content or mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    arrays = {
        name: np.frombuffer(content, DTYPES[entry["dtype"]], entry["shape"][0], 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    return arrays, metadata


def _checksum(descriptor: int, header: bytes, recorded: str, size: int) -> str:
    digest = xxhash.xxh3_128(header.replace(recorded.encode(), NO_CHECKSUM.encode(), 1))
    for place in range(len(header), size, CHUNK_BYTES):
        digest.update(os.pread(descriptor, CHUNK_BYTES, place))
    return digest.hexdigest()
