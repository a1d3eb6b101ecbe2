"""Copies of checkpoints in an object store or on a file system that fsspec reaches: s3://, gs://, file://, memory://.

URL/step-00000120-1f2e3d4c/adapter_model.safetensors ...
URL/step-00000120-1f2e3d4c/manifest.json              written last: without it the folder is no copy
"""

import errno
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from lora_kit.data.urls import open_url
from lora_kit.errors import CheckpointError
from lora_kit.runs import remote
from lora_kit.runs.formats import MOST_BYTES
from lora_kit.runs.manifest import MANIFEST, FileEntry, parse_manifest
from lora_kit.runs.remote import NAME, Copy, Parcel, name_of, step_of

WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "oci", "tos"}  # there `makedirs` may make a bucket
SECONDS = 0.0  # between the starts of two uploads


class FileRemote:
    """A `Remote` on a file system of fsspec."""

    def __init__(self, url: str) -> None:
        self.url, self.interval, self.damaged = url.rstrip("/"), SECONDS, dict[str, str]()
        self._files, self._root = open_url(self.url, "checkpoint.remote")
        self._known, self._names = dict[str, Copy](), list[str]()

    def copies(self, most: int) -> list[Copy]:
        """Return the newest complete copies, newest first. Each manifest is read once: it never changes."""
        self._names = [name for name in self._list(self._root) if NAME.fullmatch(name)]
        new = [name for name in self._names if name not in self._known]
        paths = [f"{self._root}/{name}/{MANIFEST}" for name in new]
        self.damaged.clear()
        found = self._files.cat_ranges(paths, 0, MOST_BYTES + 1, on_error="return") if paths else []
        for name, path, content in zip(new, paths, found, strict=True):
            if isinstance(content, FileNotFoundError):
                continue
            if isinstance(content, OSError) and content.errno == errno.EINVAL:  # S3 gives no range of an empty file
                content = b""
            if isinstance(content, Exception):
                raise content
            try:
                copy = Copy(name, parse_manifest(content, path), content)
            except CheckpointError as error:
                self.damaged[name] = str(error)
                continue
            if name_of(copy.step, content) == name:
                self._known[name] = copy
            else:
                self.damaged[name] = f"{path}: not the manifest that the folder's name promises"
        self._known = {name: copy for name, copy in self._known.items() if name in self._names}
        return self._newest_first()[:most]

    def upload(self, parcel: Parcel, require: Callable[[], None], *, again: bool) -> None:
        """Write the files that are not there yet, compare their sizes, and write the manifest."""
        folder = f"{self._root}/{parcel.name}"
        there = self._list(folder) if again else {}
        if not WITHOUT_FOLDERS & {*self._protocols}:
            self._files.makedirs(folder, exist_ok=True)
        missing = _differing(parcel.manifest.files, there)
        self._files.put([parcel.files[name] for name in missing], [f"{folder}/{name}" for name in missing])
        if wrong := _differing(parcel.manifest.files, self._list(folder)):
            raise OSError(errno.EIO, f"{folder}: {', '.join(wrong)}: not there or of another size after the upload")
        require()
        self._files.pipe_file(f"{folder}/{MANIFEST}", parcel.content)
        self._known[parcel.name] = Copy(parcel.name, parcel.manifest, parcel.content)

    @property
    def _protocols(self) -> tuple[str, ...]:
        found = self._files.protocol
        return (found,) if isinstance(found, str) else tuple(found)

    def prune(self, keep: int, leftover: str | None, require: Callable[[], None]) -> None:
        """Delete old copies, the manifest of each first, and the files of an upload that was given up."""
        for old in self._newest_first()[max(2, keep) :]:
            require()
            self._files.rm_file(f"{self._root}/{old.name}/{MANIFEST}")
            del self._known[old.name]
            self._remove(old.name)
        oldest = min(copy.step for copy in self._known.values())
        incomplete = {name for name in self._names if name == leftover or step_of(name) < oldest}
        for name in incomplete - self._known.keys():  # also of a deletion that was interrupted
            require()
            self._remove(name)

    def _newest_first(self) -> list[Copy]:
        return sorted(self._known.values(), key=lambda copy: copy.manifest.order, reverse=True)

    def _remove(self, name: str) -> None:
        if self._list(f"{self._root}/{name}"):
            self._files.rm(f"{self._root}/{name}", recursive=True)

    def download(self, copy: Copy, folder: Path) -> None:
        """Write the files of a copy into a folder, if all are there and have the sizes that the manifest names.

        Raises:
            CheckpointError: A file is missing or of another size.
        """
        source = f"{self._root}/{copy.name}"
        if wrong := _differing(copy.manifest.files, self._list(source)):
            raise CheckpointError(f"{', '.join(wrong)}: missing, or not of the size that the manifest names")
        names = list(copy.manifest.files)
        self._files.get([f"{source}/{name}" for name in names], [str(folder / name) for name in names])

    def describe(self, error: Exception) -> tuple[str, bool]:
        """Return an error as text without secrets, and whether a repetition may succeed."""
        return remote.describe(error)

    def _list(self, folder: str) -> dict[str, int]:
        """Return the names in a folder with their sizes; nothing if there is no such folder."""
        self._files.invalidate_cache()
        try:
            found: list[dict[str, Any]] = self._files.ls(folder, detail=True)
        except FileNotFoundError:
            return {}
        return {PurePosixPath(entry["name"].rstrip("/")).name: int(entry.get("size") or 0) for entry in found}


def _differing(entries: dict[str, FileEntry], sizes: dict[str, int]) -> list[str]:
    """Return the names of the files that are missing or of another size."""
    return [name for name, entry in entries.items() if sizes.get(name) != entry.size]
