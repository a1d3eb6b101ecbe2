"""The cache folder, the SHA-256 of a file, reading only regular files, and writing a file atomically."""

import errno
import hashlib
import os
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

import platformdirs

CACHE = "LORA_KIT_CACHE"  # the environment variable that sets another cache folder


def cache_folder(name: str) -> Path:
    """Return the user's cache folder of this name; it may not exist yet."""
    return Path(os.environ.get(CACHE) or platformdirs.user_cache_dir("lora_kit")) / name


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Other kinds are refused: a FIFO would block, a link would lead elsewhere.

    Symbolic links are followed only in the Hub's local cache, where the files of `snapshots/COMMIT/` are links into
    `blobs/`.

    Raises:
        OSError: The file does not exist, cannot be opened or is not a regular file.
    """
    target = _hub_blob(path) or path
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from error
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def _hub_blob(path: Path) -> Path | None:
    """Return the file in the Hub's local cache that a link in its folder `snapshots` stands for; otherwise None."""
    folder = Path(os.path.realpath(path.parent))
    if folder.parent.name != "snapshots" or not path.is_symlink():
        return None
    target = Path(os.path.realpath(path))
    return target if target.parent == folder.parent.parent / "blobs" else None


def read_regular(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        OSError: The file does not exist, cannot be read, is not a regular file or is larger.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: a reader sees the old content or the new content, never a part of it.

    The new content is synced before it gets the file's name, so this also holds after a crash of the machine.

    Raises:
        OSError: The content could not be written; the old file is unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
