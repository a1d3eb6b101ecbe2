"""Files: the folder of what is kept between runs, the hash of a file, and writing one whole or not at all."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import platformdirs

CACHE = "LORA_KIT_CACHE"  # the environment variable that names another cache folder


def cache_folder(name: str) -> Path:
    """Return this user's folder for one kind of thing that is kept between runs; it may not exist yet."""
    return Path(os.environ.get(CACHE) or platformdirs.user_cache_dir("lora_kit")) / name


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file's content in one rename, so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: The content could not be written; the old file is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
