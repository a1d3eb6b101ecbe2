"""Durable checkpoints: commit whole folders, believe only what verifies.

A checkpoint is a folder whose manifest, written last, lists the size and SHA-256 of every file. It appears under its
name in one rename, so it is there whole or not at all. "Latest" is the newest that verifies; what does not verify is
moved aside with the reason, never deleted.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.files import sha256_of
from lora_kit.runs.manifest import MANIFEST, FileEntry, Manifest, RunFacts, StepFacts, manifest_bytes, read_manifest

ADAPTER, ADAPTER_CONFIG, OPTIMIZER = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
)
NAME = re.compile(r"step-(\d{8,})")
QUARANTINE = ".quarantine"
PIN = "pinned"  # a file of this name in a checkpoint keeps it for ever
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self.manifest.progress.step

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.manifest.files.values())

    def state(self) -> "tuple[Tensors, Tensors, Tensors]":
        """Return the weights and the two moments, by PEFT's names."""
        with safe_open(self.path / ADAPTER, "numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
        moments = load_file(self.path / OPTIMIZER)
        first, second = (split(moments[name], shapes) for name in MOMENTS)
        return load_file(self.path / ADAPTER), first, second


Tensors = dict[str, np.ndarray]


def split(flat: np.ndarray, shapes: Mapping[str, Sequence[int]]) -> Tensors:
    """Cut a flat buffer into tensors, which lie in it one after the other.

    Raises:
        CheckpointError: They do not fill it exactly.
    """
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    if flat.shape != (ends[-1],):
        raise CheckpointError(f"checkpoint: {flat.shape} values of moments for {ends[-1]:,} of weights")
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(shapes.items(), np.split(flat, ends[:-1]), strict=True)
    }


def headers_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, bytes]:
    """Return how the adapter's and the optimizer's file begin when their fp32 values follow in the order of `shapes`.

    The moments need no names of their own: they lie as the weights do.

    Source: the safetensors format; 8 bytes of length, then JSON, padded so that the values are aligned.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    return {
        ADAPTER: _header(shapes, {"__metadata__": {"format": "pt"}}),
        OPTIMIZER: _header(dict.fromkeys(MOMENTS, (total,)), {}),
    }


def _header(shapes: Mapping[str, Sequence[int]], entries: dict[str, Any]) -> bytes:
    at = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies in a run."""
    return run / "checkpoints" / f"step-{step:08d}"


Pieces = Sequence[bytes | memoryview]


def commit(
    run: Path,
    files: Mapping[str, Pieces],
    facts: RunFacts,
    progress: StepFacts,
    *,
    ours: Callable[[], bool] = lambda: True,
) -> Checkpoint:
    """Write a checkpoint so that a crash at any moment leaves it whole or absent.

    Files are written and synced under `.tmp-<token>`, the manifest last; the folder is synced, renamed into place and
    its parent synced, with the first one also what leads there. A folder that is already there is moved to quarantine
    first, never written over.

    Args:
        run: The run's folder.
        files: Content of every file but the manifest, in pieces that follow each other.
        facts: The run's part of the manifest.
        progress: The step's part of the manifest.
        ours: Asked last, whether the run is still this writer's.

    Raises:
        CheckpointError: It could not be written; the reason is in the message and nothing earlier was touched.
        LeaseError: Another job has taken the run over; nothing was touched.
    """
    final = checkpoint_folder(run, progress.step)
    staging = final.parent / f".tmp-{facts.fencing_token}"
    predicted = {name: sum(map(len, pieces)) for name, pieces in files.items()}
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        if not folders(run):  # the first: what leads to it must be on the disk too
            _sync_folder(run)
            _sync_folder(run.absolute().parent)
        entries = {name: _write_synced(staging / name, pieces) for name, pieces in files.items()}
        if (written := {name: entry.size for name, entry in entries.items()}) != predicted:
            raise CheckpointError(f"{staging}: {written} bytes are there, {predicted} were expected")
        manifest = Manifest(facts, progress, entries)
        _write_synced(staging / MANIFEST, [manifest_bytes(manifest.to_dict())])
        _sync_folder(staging)
        if not ours():
            shutil.rmtree(staging, ignore_errors=True)
            raise LeaseError(f"{run}: another job has taken this run over; step {progress.step} is not written")
        if final.exists() and _holds(final, entries):  # the same state, of which more is known now
            final.rename(final.with_name(f".tmp-old-{final.name}"))
        elif final.exists():
            set_aside(run, final, "another commit of the same step")
        staging.rename(final)
        _sync_folder(final.parent)
        shutil.rmtree(final.with_name(f".tmp-old-{final.name}"), ignore_errors=True)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"{final}: not written: {error.strerror} ({sum(predicted.values()):,} bytes needed); "
            "earlier checkpoints are untouched"
        ) from error
    return Checkpoint(final, manifest)


def _holds(folder: Path, entries: Mapping[str, FileEntry]) -> bool:
    try:
        return read_manifest(folder / MANIFEST).files == entries
    except CheckpointError:
        return False


def _write_synced(path: Path, pieces: Pieces) -> FileEntry:
    """Write a file, fsync it, and return its entry in the manifest."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path.stat().st_size, digest.hexdigest())


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
    manifest = read_manifest(path / MANIFEST)
    problems = []
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif (size := file.stat().st_size) != entry.size:
            problems.append(f"{file}: {size:,} bytes, the manifest says {entry.size:,}")
        elif sha256_of(file) != entry.sha256:
            problems.append(f"{file}: its SHA-256 is not the manifest's")
    if problems:
        raise CheckpointError("\n".join(problems))
    return Checkpoint(path, manifest)


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
            if path.is_dir():  # else its writer has deleted it in the meantime
                broken[path] = str(error)
    return Found(None, broken)


def newest_token(run: Path) -> int:
    """Return the highest fencing token of a run's checkpoints, 0 without any."""
    tokens = [0]
    for path in folders(run):
        with contextlib.suppress(CheckpointError):
            tokens.append(read_manifest(path / MANIFEST).run.fencing_token)
    return max(tokens)


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
            loss = read_manifest(path / MANIFEST).progress.held_out_loss
            if loss is not None:
                losses[path] = loss
    return min(losses, key=lambda path: losses[path]) if losses else None


def prune(run: Path, keep: int, *, keep_every: int | None = None, best: bool = False) -> None:
    """Delete all but the newest `keep` checkpoints and those worth keeping; the newest must read back first.

    Args:
        run: The run's folder.
        keep: How many of the newest stay, two at least.
        keep_every: Those of every so many steps stay too.
        best: The one with the lowest held-out loss stays too.

    Raises:
        CheckpointError: The newest does not verify; nothing was deleted.
    """
    newest_first = folders(run)
    if newest_first:
        open_checkpoint(newest_first[0])
    spared = best_of(run) if best else None
    for old in newest_first[max(2, keep) :]:
        step = int(old.name.removeprefix("step-"))
        if old == spared or (old / PIN).exists() or (keep_every and step % keep_every == 0):
            continue
        doomed = old.with_name(f".tmp-old-{old.name}")  # a half-deleted folder must not look like a checkpoint
        with contextlib.suppress(OSError):
            old.rename(doomed)
            shutil.rmtree(doomed)


def sweep(run: Path) -> None:
    """Delete what interrupted commits and deletions left behind; only the run's writer may."""
    for leftover in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
