"""Durable checkpoints: commit whole folders, believe only what verifies.

A checkpoint is a folder whose manifest, written last, lists the size and SHA-256 of every file. It appears under its
name in one rename, so it is there whole or not at all. "Latest" is the newest that verifies; what does not verify is
moved aside with the reason, never deleted.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
ADAPTER, ADAPTER_CONFIG, OPTIMIZER = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
)
NAME = re.compile(r"step-(\d{8,})")
QUARANTINE = ".quarantine"


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """How many steps were finished."""
        return int(self.manifest["step"])

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry["size"] for entry in self.manifest["files"].values())


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies in a run."""
    return run / "checkpoints" / f"step-{step:08d}"


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """Serialise a manifest with a SHA-256 of its own content, so that a flipped bit in it is found too."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(_canonical(plain)).hexdigest()
    return _canonical(plain | {"sha256": digest})


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def commit(run: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> Checkpoint:
    """Write a checkpoint so that a crash at any moment leaves it whole or absent.

    Files are written and synced under `.tmp-<token>`, the manifest last; the folder is synced, renamed into place and
    its parent synced. A folder that is already there is moved to quarantine first, never written over.

    Args:
        run: The run's folder.
        files: Content of every file but the manifest.
        manifest: Has `step` and `fencing_token`; format, files and checksum are added here.

    Raises:
        CheckpointError: It could not be written; the reason is in the message and nothing earlier was touched.
    """
    final = checkpoint_folder(run, manifest["step"])
    staging = final.parent / f".tmp-{manifest['fencing_token']}"
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    whole = {"format": FORMAT, **manifest, "files": entries}
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name, data in files.items():
            _write_synced(staging / name, data)
        _write_synced(staging / MANIFEST, manifest_bytes(whole))
        _sync_folder(staging)
        if final.exists():
            set_aside(run, final, "another commit of the same step")
        staging.rename(final)
        _sync_folder(final.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"{final}: not written: {error.strerror} ({sum(map(len, files.values())):,} bytes needed); "
            "earlier checkpoints are untouched"
        ) from error
    return Checkpoint(final, json.loads(manifest_bytes(whole)))


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify every byte of a checkpoint and return it.

    Raises:
        CheckpointError: Names each file that is missing, too long, too short or changed.
    """
    manifest = _read_manifest(path / MANIFEST)
    problems = []
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif (size := file.stat().st_size) != entry["size"]:
            problems.append(f"{file}: {size:,} bytes, the manifest says {entry['size']:,}")
        elif _sha256(file) != entry["sha256"]:
            problems.append(f"{file}: its SHA-256 is not the manifest's")
    if problems:
        raise CheckpointError("\n".join(problems))
    return Checkpoint(path, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        if data != manifest_bytes(manifest):
            raise CheckpointError(f"{path}: changed since it was written; its own checksum does not match")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the folder was never committed") from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error})") from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {manifest['format']}, this lora_kit reads {FORMAT}")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first, valid or not."""
    found = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and the newer ones that do not, with the reasons."""

    latest: Checkpoint | None
    broken: dict[Path, str]


def find(run: Path) -> Found:
    """Look for the newest checkpoint that verifies; moves nothing."""
    broken: dict[Path, str] = {}
    for path in folders(run):
        try:
            return Found(open_checkpoint(path), broken)
        except CheckpointError as error:
            broken[path] = str(error)
    return Found(None, broken)


def set_aside(run: Path, path: Path, reason: str) -> Path:
    """Move a folder to quarantine and write the reason beside it; only the run's writer may."""
    quarantine = run / "checkpoints" / QUARANTINE
    quarantine.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := quarantine / f"{path.name}.{number}").exists():
        number += 1
    path.rename(target)
    (quarantine / f"{target.name}.reason.txt").write_text(reason + "\n")
    return target


def best_of(run: Path) -> Path | None:
    """Return the checkpoint whose manifest has the lowest held-out loss, the newest of equals; None without any."""
    losses: dict[Path, float] = {}
    for path in folders(run):
        with contextlib.suppress(CheckpointError):
            loss = _read_manifest(path / MANIFEST).get("held_out_loss")
            if loss is not None:
                losses[path] = loss
    return min(losses, key=lambda path: losses[path]) if losses else None


def prune(run: Path, keep: int, *, best: bool = False) -> None:
    """Delete all but the newest `keep` checkpoints and, if wanted, the best; the newest must verify."""
    newest_first = folders(run)
    if newest_first:
        open_checkpoint(newest_first[0])
    spared = best_of(run) if best else None
    for old in newest_first[max(2, keep) :]:
        if old == spared:
            continue
        doomed = old.with_name(f".tmp-old-{old.name}")  # a half-deleted folder must not look like a checkpoint
        with contextlib.suppress(OSError):
            old.rename(doomed)
            shutil.rmtree(doomed)


def sweep(run: Path) -> None:
    """Delete what interrupted commits and deletions left behind; only the run's writer may."""
    for leftover in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
