"""Files at a URL: in an object store, on another file system, or anywhere else that fsspec reaches.

fsspec and the package of a protocol read their credentials from the environment or from their own configuration. A URL
with credentials or a query is refused, because recipes and messages are shown, logged and published.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_kit.errors import DataError, InputError, scrub
from lora_kit.files import PARTIAL, cache_folder, private_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

URL = re.compile(r"([a-z][a-z0-9+.-]*)://\S+", re.IGNORECASE)
Facts = dict[str, dict[str, Any]]  # what fsspec knows of each file, by its name
MOST_DEPTH = 32  # of folders in a folder
EXTRAS = {"s3fs": "'lora_kit[remote]'"}  # packages that an extra of lora_kit installs in a tested version


def is_url(text: str) -> bool:
    """Return whether a text has the form of a URL, e.g. `s3://bucket/folder`."""
    return URL.fullmatch(text) is not None


def require_no_secret(url: str, where: str) -> None:
    """Refuse a URL with a password, a query or a fragment; the message does not quote it.

    Raises:
        InputError: The URL has one of them.
    """
    if re.search(r"[?#]|://[^/]*:[^/]*@", url):
        raise InputError(
            f"{where}: a URL with a password, `?` or `#`, which would be shown and logged; write only protocol and "
            "path, and give credentials by the environment or the configuration of the protocol's package"
        )


def require_package(url: str, where: str) -> None:
    """Refuse a URL whose protocol is unknown or needs a package that is not installed. Connects to nothing.

    Args:
        url: The URL.
        where: What the message names, e.g. the recipe's field.

    Raises:
        InputError: The message says which package to install.
    """
    import fsspec  # not at the top: most commands read no URL
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0].lower()
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        module = known_implementations[protocol]["class"].partition(".")[0] if protocol in known_implementations else ""
        if module in ("", "fsspec"):  # fsspec has the file system, whose own package is missing
            raise InputError(f"{where}: {protocol}:// cannot be used: {error}") from error
        package = EXTRAS.get(module, module)
        raise InputError(
            f"{where}: {protocol}:// needs the package {module}, which is not installed; pip install {package}"
        ) from error
    except ValueError as error:
        usual = ["s3", "gs", "az", "file", "hf"]
        similar = difflib.get_close_matches(protocol, [*usual, *known_implementations], n=1, cutoff=0.5)
        hint = f"did you mean {similar[0]}://?" if similar else "fsspec has no such protocol"
        raise InputError(f"{where}: {protocol}:// is not known; {hint}") from error


def open_url(url: str, where: str) -> "tuple[AbstractFileSystem, str]":
    """Return the file system of a URL, and the URL's path on it.

    Raises:
        InputError: As for `require_package` and `require_no_secret`.
        Exception: Whatever the protocol's package raises, e.g. because it finds no credentials.
    """
    require_no_secret(url, where)
    require_package(url, where)
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    return system, str(path).rstrip("/")


def download(url: str) -> Path:
    """Download a file, or a folder with all files in it, into the cache; return its path there.

    What the cache has is used if names, sizes, times and tags at the URL are still the same.

    Raises:
        DataError: The URL cannot be used or read, or there is nothing.
    """
    try:
        system, root = open_url(url, url)
        system.invalidate_cache()
        facts = system.info(root)
        found = {root: facts} if facts["type"] == "file" else _files_below(system, root)
    except InputError as error:
        raise DataError(str(error)) from error
    except FileNotFoundError:
        found = {}
    except Exception as error:
        raise DataError(f"{url}: cannot be read: {type(error).__name__}: {scrub(str(error))}") from None
    if not found:
        raise DataError(f"{url}: there is no such file or folder, or it is empty")
    single = list(found) == [root]
    names = {name: PurePosixPath(PurePosixPath(root).name if single else name[len(root) + 1 :]) for name in found}
    if outside := [name for name, part in names.items() if ".." in part.parts or part.is_absolute() or not part.name]:
        raise DataError(f"{url}: {outside[0]!a} leads out of the folder; remove it")
    key = hashlib.sha256(json.dumps([url, found], sort_keys=True, default=str).encode()).hexdigest()[:32]
    try:
        with private_folder(cache_folder("urls")) as folder:
            target = folder.path / key
            if not target.exists():
                _download(system, names, found, target)
    except Exception as error:
        raise DataError(f"{url}: not downloaded: {type(error).__name__}: {scrub(str(error))}") from None
    return target / PurePosixPath(root).name if single else target


def _files_below(system: "AbstractFileSystem", root: str) -> Facts:
    """Return the files in a folder and its subfolders. fsspec's `find` leaves out what cannot be listed."""
    found, folders = Facts(), [(root, 0)]
    while folders:
        folder, depth = folders.pop()
        if depth > MOST_DEPTH:
            raise OSError(f"{folder}: more than {MOST_DEPTH} folders deep, perhaps a link to a folder above it")
        for entry in system.ls(folder, detail=True):
            name = entry["name"].rstrip("/")
            if name != folder and entry["type"] == "directory":
                folders.append((name, depth + 1))
            elif name != folder:
                found[name] = entry
    return dict(sorted(found.items()))


def _download(system: "AbstractFileSystem", names: dict[str, PurePosixPath], found: Facts, target: Path) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for part in names.values():
            (partial / part).parent.mkdir(parents=True, exist_ok=True)
        system.get(list(names), [str(partial / part) for part in names.values()])
        for name, part in names.items():
            size = found[name].get("size")
            if size is not None and (partial / part).stat().st_size != size:
                raise OSError(f"{part} has another size than the store says; try again")
        with suppress(FileExistsError):  # another process was quicker
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
