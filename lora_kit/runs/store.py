"""Checkpoints on disk: how a folder is committed, verified and pruned.

A checkpoint is a folder whose manifest, written last, lists the size and SHA-256 of every file. One rename puts the
complete folder in its place, so a crash leaves it complete or absent. The latest checkpoint is the newest valid
checkpoint, by fencing token and then by step. A damaged checkpoint is moved to quarantine with the reason, never
deleted. Whatever prevents reading a checkpoint (damage, a failing disk, a file of another kind) makes it not valid.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from typing_extensions import TypedDict  # pydantic reads this one before Python 3.12

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.files import open_regular, sync_folder
from lora_kit.recipe.schema import LOSS, Recipe
from lora_kit.runs import formats
from lora_kit.runs.figures import cost, figure_of
from lora_kit.runs.layout import BYTES, Dtype, Layout, State, Tensors, trained_shapes, without_constants
from lora_kit.runs.manifest import (
    MANIFEST,
    AnyManifest,
    Facts,
    FileEntry,
    Manifest,
    OtherFormatError,
    RunFacts,
    ScriptFacts,
    StepFacts,
    manifest_bytes,
    of_recipe,
    read_any_manifest,
)
from lora_kit.version import VERSION

ADAPTER, ADAPTER_CONFIG, OPTIMIZER = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
)
TRAINER = "trainer.json"  # of a script's run: the state beside weights and optimizer
PUBLISHED = (ADAPTER, ADAPTER_CONFIG)  # what every checkpoint has; one on the Hub has no moments
NAME = re.compile(r"step-([0-9]{8,20})")
STAGING = re.compile(r"\.tmp-[0-9]+")  # the name of a folder in which a checkpoint is written
QUARANTINE, REPLACED = ".quarantine", ".tmp-replaced-"
PIN = "pinned"  # a checkpoint with a file of this name is never deleted
Entry = tuple[Dtype, Sequence[int]]  # the dtype and the shape of a tensor of a file


@dataclass(frozen=True)
class Checkpoint(Generic[Facts]):
    """A committed folder and its manifest."""

    path: Path
    manifest: Manifest[Facts]

    @property
    def step(self) -> int:
        """The step after which the checkpoint was written."""
        return self.manifest.progress.step

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.manifest.files.values())

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run, read from this checkpoint's manifest.

        Raises:
            CheckpointError: The run has no recipe, or a field is unknown to this version of lora_kit, missing or of
                another type; the message names each field.
        """
        run = of_recipe(self.manifest, self.path).run
        try:
            return Recipe.model_validate(run.recipe)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            trained_with = run.versions.get("lora_kit", "another version")
            raise CheckpointError(
                f"{self.path}: its recipe is not one of lora_kit {VERSION}: {'; '.join(problems)}; use lora_kit "
                f"{trained_with}, which trained it"
            ) from error

    def weights(self) -> Tensors:
        """Return the weights by PEFT's names.

        Raises:
            CheckpointError: The file cannot be read.
        """
        return _load(self.path / ADAPTER)

    def state(self) -> State:
        """Return the trained tensors, the optimizer's buffers and the constants.

        Raises:
            CheckpointError: A file cannot be read.
        """
        found, constants = _load(self.path / ADAPTER), Tensors()
        # sorted by their order in the file, which is that of the moments
        tensors = {name: found[name] for name in _tensors(self.path / ADAPTER)}
        if Layout.of({}, of_recipe(self.manifest, self.path).run.recipe).constants:
            tensors, constants = without_constants(tensors)
        return State(tensors, _load(self.path / OPTIMIZER), constants)


if TYPE_CHECKING:
    AnyCheckpoint = Checkpoint[Any]
else:  # what pydantic reads
    AnyCheckpoint = Checkpoint[RunFacts] | Checkpoint[ScriptFacts]


@with_config(ConfigDict(extra="allow"))
class AdapterConfig(TypedDict):
    """What a reader may rely on in adapter_config.json, which PEFT defines."""

    base_model_name_or_path: str


_ADAPTER_CONFIG: TypeAdapter[AdapterConfig] = TypeAdapter(AdapterConfig)


def headers_of(layout: Layout) -> dict[str, bytes]:
    """Return the headers of the adapter's and the optimizer's file, whose values follow in the order of the layout.

    A moment is one flat tensor with the values in the order of the weights.

    Source: the safetensors format: 8 bytes of length, then JSON, padded with blanks so that the values are aligned.
    """
    saved: dict[str, Entry] = {name: ("F32", shape) for name, shape in layout.saved_shapes.items()}
    moments: dict[str, Entry] = {name: (dtype, (count,)) for name, (dtype, count) in layout.moments.items()}
    return {ADAPTER: header(saved, {"__metadata__": {"format": "pt"}}), OPTIMIZER: header(moments, {})}


def header(tensors: "Mapping[str, Entry]", entries: dict[str, Any]) -> bytes:
    """Return the header of a safetensors file with these tensors, whose values follow in this order."""
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


Pieces = Sequence[bytes | memoryview]


def commit(
    run: Path,
    files: Mapping[str, Pieces],
    facts: Facts,
    progress: StepFacts,
    *,
    require: Callable[[], None] = lambda: None,
) -> Checkpoint[Facts]:
    """Write a checkpoint so that a crash at any moment leaves it complete or absent.

    Files are written and synced under `.tmp-<token>`, the manifest last. Then the folder is synced, renamed into place,
    and its parent synced; for a run's first checkpoint, the folders above it too. An existing checkpoint of this step
    is exchanged with the new one, then deleted if it has the same files, otherwise moved to quarantine.

    Args:
        run: The run's folder.
        files: The content of every file but the manifest, as pieces to be concatenated.
        facts: The run's part of the manifest.
        progress: The step's part of the manifest.
        require: Raises a LeaseError if this process does not hold the run's lease; called first and just before the
            rename.

    Raises:
        CheckpointError: The checkpoint could not be written; earlier checkpoints are unchanged.
        LeaseError: Another process has taken over the run; nothing was changed.
    """
    final = checkpoint_folder(run, progress.step)
    staging = final.parent / f".tmp-{facts.fencing_token}"
    predicted = {name: sum(map(len, pieces)) for name, pieces in files.items()}
    try:
        require()
        remove(staging)
        staging.mkdir(parents=True)
        if not folders(run):  # the first checkpoint: the folders above it must be on disk too
            sync_folder(run)
            sync_folder(run.absolute().parent)
        entries = {name: _write_synced(staging / name, pieces) for name, pieces in files.items()}
        if (written := {name: entry.size for name, entry in entries.items()}) != predicted:
            raise CheckpointError(f"{staging}: {written} bytes written, expected {predicted}")
        manifest = Manifest(facts, progress, entries)
        _write_synced(staging / MANIFEST, [manifest_bytes(manifest.to_dict())])
        sync_folder(staging)
        require()
        _put(run, staging, final)
    except (OSError, LeaseError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, LeaseError):
            raise
        raise CheckpointError(
            f"{final}: not written: {error.strerror} ({sum(predicted.values()):,} bytes needed); "
            "earlier checkpoints are unchanged"
        ) from error
    return Checkpoint(final, manifest)


def _put(run: Path, staging: Path, final: Path) -> None:
    """Rename a complete folder into its place. A checkpoint that is there stays until the new one has its place."""
    earlier = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        _settle(run, earlier)
        staging.rename(earlier)
        if not _exchange(earlier, final):
            sync_folder(final.parent)
            _move(final, staging)  # after a crash here, `sweep` puts the new one in its place
            earlier.rename(final)
            staging.rename(earlier)
    else:
        staging.rename(final)
    sync_folder(final.parent)
    _settle(run, earlier)


def _settle(run: Path, earlier: Path) -> None:
    """End a replacement, if there is one: delete the checkpoint that was replaced, or set it aside if it differs."""
    final = earlier.with_name(earlier.name.removeprefix(REPLACED))
    if not earlier.exists():
        return
    if not (final / MANIFEST).exists():
        shutil.rmtree(final, ignore_errors=True)
        earlier.rename(final)
        return
    with contextlib.suppress(CheckpointError):
        # other weights, and not only other facts such as a held-out loss
        if not _holds(final, read_any_manifest(earlier / MANIFEST).files):
            set_aside(run, earlier, "another commit of the same step", name=final.name)
    shutil.rmtree(earlier, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically; return False where the kernel or the file system cannot do that."""
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (os.fsencode(path.absolute()) for path in (one, other))
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE, renameat2(2)
    return function is not None and function(here, next(names), here, next(names), exchange) == 0


def _move(source: Path, target: Path) -> None:
    """Rename a folder, or copy and delete it where it cannot be renamed: in a lower layer of an overlay.

    The manifest is deleted first, so a source that is deleted only in part is no checkpoint.
    """
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(source, target, symlinks=True)
        (source / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(source)


def _holds(folder: Path, entries: Mapping[str, FileEntry]) -> bool:
    try:
        return read_any_manifest(folder / MANIFEST).files == entries
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


def remove(path: Path) -> None:
    """Delete a file or a folder as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def try_rename(run: Path) -> None:
    """Make and rename a folder where checkpoints will be, as every checkpoint needs it; a full disk is no error here.

    Raises:
        OSError: Folders cannot be made or renamed there.
    """
    before, after = (run / "checkpoints" / f".tmp-try-{name}" for name in ("before", "after"))
    remove(before)
    remove(after)
    try:
        before.mkdir(parents=True)
        before.rename(after)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        remove(before)
        remove(after)


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify every byte of a checkpoint of a recipe's run and return it.

    Raises:
        CheckpointError: As for `open_any_checkpoint`, or it is of a script's run.
    """
    checkpoint = open_any_checkpoint(path)
    of_recipe(checkpoint.manifest, path)
    return checkpoint


def open_any_checkpoint(path: Path) -> AnyCheckpoint:
    """Verify every byte of a checkpoint of a recipe's or a script's run and return it.

    A folder with the name of a run's checkpoint must have the moments too and be of the step in its name.

    Raises:
        CheckpointError: A file is missing, cannot be read, is not a regular file or has other content than the manifest
            says, or the tensors are not those of an adapter; the message names it.
    """
    manifest = read_any_manifest(path / MANIFEST)
    of_run, of_script = NAME.fullmatch(path.name), isinstance(manifest.run, ScriptFacts)
    needed = (TRAINER, OPTIMIZER) if of_script else (*PUBLISHED, OPTIMIZER) if of_run else PUBLISHED
    problems = [f"{path / name}: not listed in the manifest" for name in needed if name not in manifest.files]
    if of_run and step_of(path) != manifest.progress.step:
        problems.append(
            f"{path / MANIFEST}: it is of step {manifest.progress.step}, not of the step in the folder's name"
        )
    for name, entry in manifest.files.items():
        problems += _differences(path / name, entry)
    if problems:
        raise CheckpointError("\n".join(problems))
    if not of_script:
        _require_adapter(path, of_recipe(manifest, path))
    return Checkpoint(path, manifest)


def _require_adapter(path: Path, manifest: Manifest) -> None:
    """Raise a CheckpointError if the tensors of a checkpoint are not an adapter and its moments."""
    formats.read(_ADAPTER_CONFIG, path / ADAPTER_CONFIG)
    shapes = {name: shape for name, (_, shape) in _tensors(path / ADAPTER, only="F32").items()}
    if OPTIMIZER in manifest.files:
        recipe = manifest.run.recipe
        layout = Layout.of(trained_shapes(shapes) if Layout.of({}, recipe).constants else shapes, recipe)
        found, expected = _tensors(path / OPTIMIZER), layout.moments
        if found != {name: (dtype, (count,)) for name, (dtype, count) in expected.items()}:
            raise CheckpointError(
                f"{path / OPTIMIZER}: it has {found}, expected the moments of {layout.size:,} weights"
            )


def _differences(path: Path, entry: FileEntry) -> list[str]:
    """Return what is wrong with a file of a checkpoint: one message, or none."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) != entry.size:
                return [f"{path}: {size:,} bytes, the manifest says {entry.size:,}"]
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
            return [] if same else [f"{path}: its SHA-256 is not the manifest's"]
    except FileNotFoundError:
        return [f"{path}: missing"]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]


def _tensors(path: Path, *, only: str | None = None) -> "dict[str, Entry]":
    """Return the dtypes and shapes of the tensors of a file, in the order of their bytes.

    Raises:
        CheckpointError: The file cannot be read, is not in the safetensors format, or has other dtypes than `only`.
    """
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            found: dict[str, Entry] = {
                name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    kinds = {dtype for dtype, _ in found.values()}
    if only is not None and kinds != {only}:
        raise CheckpointError(f"{path}: its tensors are {', '.join(sorted(kinds)) or 'missing'}, expected {only}")
    return found


def _load(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, those of the highest step first, valid or not.

    Raises:
        CheckpointError: The folder `checkpoints` cannot be listed.
    """
    parent = run / "checkpoints"
    try:
        paths = [path for path in parent.iterdir() if NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{parent}: cannot be listed: {error.strerror}") from error
    return sorted(paths, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, and each newer checkpoint that is damaged, with the reason.

    If a manifest cannot be read, the step in the folder's name decides whether the checkpoint is newer.
    """

    latest: AnyCheckpoint | None
    broken: dict[Path, str]


def find(run: Path) -> Found:
    """Find the newest valid checkpoint: of those with the highest fencing token, that of the highest step.

    Changes nothing on disk. A checkpoint that cannot be read is not valid, whatever the reason.

    Raises:
        CheckpointError: The folder `checkpoints` cannot be listed.
    """
    readable, unreadable = newest_first(run)
    latest, broken = None, dict[Path, str]()
    for path in readable:
        try:
            latest = open_any_checkpoint(path)
            break
        except CheckpointError as error:
            broken[path] = str(error)
    step = latest.step if latest else -1
    broken |= {path: reason for path, reason in unreadable.items() if step_of(path) > step}
    # a folder that is not there any more was deleted by the keeper since it was listed
    return Found(latest, {path: reason for path, reason in broken.items() if os.path.lexists(path)})


def newest_first(run: Path) -> tuple[dict[Path, AnyManifest], dict[Path, str]]:
    """Return the checkpoints of a run.

    Returns:
        The manifest of each checkpoint, newest first, by fencing token and step; and for the checkpoints whose manifest
        cannot be read, the reason. No other file is read.
    """
    readable, unreadable = dict[Path, AnyManifest](), dict[Path, str]()
    for path in folders(run):
        try:
            readable[path] = read_any_manifest(path / MANIFEST)
        except CheckpointError as error:
            unreadable[path] = str(error)
    ordered = sorted(readable.items(), key=lambda item: item[1].order, reverse=True)
    return dict(ordered), unreadable


def is_of_other_format(path: Path) -> bool:
    """Return whether a checkpoint is intact, but of another version of lora_kit."""
    try:
        read_any_manifest(path / MANIFEST)
    except CheckpointError as error:
        return isinstance(error, OtherFormatError)
    return False


def newest_token(run: Path) -> int:
    """Return the highest fencing token of a run's checkpoints; 0 if there are none."""
    return max((manifest.run.fencing_token for manifest in newest_first(run)[0].values()), default=0)


def set_aside(run: Path, path: Path, reason: str, *, name: str | None = None) -> Path:
    """Move a checkpoint to quarantine and write the reason beside it. Only the holder of the lease may call this."""
    quarantine = run / "checkpoints" / QUARANTINE
    quarantine.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := quarantine / f"{name or path.name}.{number}").exists():
        number += 1
    _move(path, target)
    (quarantine / f"{target.name}.reason.txt").write_text(reason + "\n")
    return target


def best_of(run: Path) -> AnyCheckpoint | None:
    """Return the checkpoint with the best held-out figure, the newest on a tie; None if none was measured.

    The newest checkpoint's recipe names the figure (`evaluate.metric`). Only manifests are verified.
    """
    readable = newest_first(run)[0]
    metric = next((metric_of(manifest) for manifest in readable.values()), "")
    measured = [
        (cost(metric, figure), Checkpoint(path, manifest))
        for path, manifest in readable.items()
        if (figure := figure_of(manifest.progress, metric)) is not None
    ]
    return min(measured, key=lambda pair: pair[0])[1] if measured else None


def metric_of(manifest: AnyManifest) -> str:
    """Return the name of the figure that compares the checkpoints of a run: `evaluate.metric`, or the loss."""
    recipe = {} if isinstance(manifest.run, ScriptFacts) else manifest.run.recipe
    found = recipe.get("evaluate", {}).get("metric")
    return found if isinstance(found, str) else LOSS


def prune(
    run: Path,
    keep: int,
    *,
    keep_every: int | None = None,
    best: bool = False,
    require: Callable[[], None] = lambda: None,
) -> None:
    """Verify the newest checkpoint, then delete older checkpoints that are neither recent, pinned nor selected.

    Checkpoints whose manifest cannot be read are neither counted nor deleted.

    Args:
        run: The run's folder.
        keep: The number of newest checkpoints that stay, at least two.
        keep_every: Checkpoints whose step is a multiple of this stay too.
        best: Whether the checkpoint with the best held-out figure stays too.
        require: Called right before each deletion; raises if the run belongs to another process by now.

    Raises:
        CheckpointError: The newest checkpoint is damaged; nothing was deleted.
    """
    readable, unreadable = newest_first(run)
    ordered = list(readable)
    for path in [*ordered[:1], *(path for path in unreadable if not ordered or step_of(path) > step_of(ordered[0]))]:
        open_any_checkpoint(path)
    best_one = best_of(run) if best else None
    for folder in ordered[max(2, keep) :]:
        kept = (folder / PIN).exists() or (keep_every and step_of(folder) % keep_every == 0)
        if kept or (best_one and folder == best_one.path):
            continue
        # a half-deleted folder must not look like a checkpoint
        renamed = folder.with_name(f".tmp-pruned-{folder.name}")
        with contextlib.suppress(OSError):
            require()
            folder.rename(renamed)
            shutil.rmtree(renamed)


def sweep(run: Path) -> None:
    """Delete the remains of interrupted commits and deletions. Only the holder of the lease may call this.

    If an interrupted commit has left two checkpoints of a step, one of them takes its place.
    """
    for earlier in (run / "checkpoints").glob(f"{REPLACED}*"):
        _settle(run, earlier)
    for leftover in (run / "checkpoints").glob(".tmp-*"):
        remove(leftover)
