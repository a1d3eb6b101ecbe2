"""The cache folder, the SHA-256 of a file, and writing a file atomically."""

import hashlib
import os
from contextlib import suppress
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
