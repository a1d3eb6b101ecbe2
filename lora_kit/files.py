"""The cache folder, which no other user may change; SHA-256 of files; reading only regular files; atomic writes."""

import errno
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import platformdirs

CACHE = "LORA_KIT_CACHE"  # the environment variable that sets another cache folder
PARTIAL = ".partial"  # the end of the name of a file that is being written


def cache_folder(name: str) -> Path:
    """Return the user's cache folder of this name; it may not exist yet."""
    try:
        folder = os.environ.get(CACHE) or platformdirs.user_cache_dir("lora_kit")
    except RuntimeError:  # the user has no home: a container with a user id of its own
        folder = f"/tmp/lora_kit-{os.getuid()}"
    return Path(folder) / name


@dataclass(frozen=True)
class PrivateFolder:
    """An open folder that only this user can change.

    Its files are opened by the folder's descriptor and checked by their own, so nobody can exchange the folder or a
    file between the check and the use.
    """

    path: Path
    descriptor: int

    def open(self, name: str) -> int:
        """Return a descriptor of a file, for reading.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: Another user owns the file or may write to it, or it is a link.
        """
        return self._open(name, os.O_RDONLY)

    def open_to_update(self, name: str) -> int:
        """Return a descriptor of a file, for writing in place; the file is created if it is missing.

        Raises:
            OSError: The file cannot be opened, another user owns it or may write to it, or it is a link.
        """
        return self._open(name, os.O_RDWR | os.O_CREAT)

    def _open(self, name: str, flags: int) -> int:
        file = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.descriptor)
        try:
            _require_private(file, self.path / name)
        except OSError:
            os.close(file)
            raise
        return file

    def write(self, name: str, content: bytes | Callable[[BinaryIO], object]) -> int:
        """Write a file in one rename; return a descriptor of it, for reading.

        Args:
            name: The file's name.
            content: Its content, or a function that writes the content to the file.

        Raises:
            OSError: The file could not be written; an old file is unchanged.
        """
        partial, flags = f".{name}.{os.getpid()}{PARTIAL}", os.O_RDWR | os.O_CREAT | os.O_TRUNC
        file = os.open(partial, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.descriptor)
        try:
            with os.fdopen(file, "wb", closefd=False) as writer:
                if isinstance(content, bytes):
                    writer.write(content)
                else:
                    content(writer)
            os.replace(partial, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            os.close(file)
            with suppress(OSError):
                os.unlink(partial, dir_fd=self.descriptor)
            raise
        return file


@contextmanager
def private_folder(path: Path) -> Iterator[PrivateFolder]:
    """Open a folder for this user alone; create it if it is missing.

    Raises:
        OSError: The folder cannot be created or opened, or another user owns it or may write to it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _require_private(descriptor, path)
        yield PrivateFolder(path, descriptor)
    finally:
        os.close(descriptor)


def _require_private(descriptor: int, path: Path) -> None:
    """Raise OSError if another user owns an open file or folder or may write to it."""
    status = os.fstat(descriptor)
    if status.st_uid != os.getuid():
        raise OSError(f"{path} belongs to another user (uid {status.st_uid}); remove it or set {CACHE}")
    if status.st_mode & 0o022:
        raise OSError(f"other users may write to {path} (mode {status.st_mode & 0o777:o}); run chmod go-w on it")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, remembered in the cache by path, size, times and inode.

    The time of the last change of the inode is among them, which no program can set back.
    """
    real = path.resolve()
    stat = real.stat()
    facts = (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino)
    key, digest = hashlib.sha256(repr(facts).encode()).hexdigest(), ""
    try:
        with private_folder(cache_folder("sha256")) as folder:
            with suppress(FileNotFoundError), os.fdopen(folder.open(key), encoding="ascii", errors="replace") as kept:
                digest = kept.read(65)
            if not re.fullmatch("[0-9a-f]{64}", digest):
                digest = sha256_of(real)
                os.close(folder.write(key, digest.encode()))
    except OSError as error:  # the cache is optional
        warnings.warn(f"hashes of large files are not remembered: {error}", stacklevel=3)
    return digest or sha256_of(real)


def path_in(folder: Path, text: str) -> Path:
    """Return the path of a text, which may begin with `~` and may not exist; relative paths start in `folder`.

    Raises:
        OSError: The home folder is not known, the name is too long, or a folder of the path cannot be searched.
    """
    try:
        path = folder / Path(text).expanduser()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, str(error).rstrip("."), text) from error
    path.exists()  # a name that is too long or a folder without permission raises OSError here
    return path


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


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that the names in it survive a crash of the machine.

    Raises:
        OSError: The folder could not be synced. File systems that sync no folders raise nothing.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
