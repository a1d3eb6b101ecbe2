"""The remote station: copies of a run's newest checkpoints at a URL (`checkpoint.remote`), which outlive the machine.

A process of its own, which the keeper starts, uploads the newest checkpoint after its commit, one at a time. What waits
is always the newest checkpoint of the run's folder, so there is never more than one, and a newer checkpoint replaces an
older one that waits. `outbox.json` in the run's folder says what was uploaded, so another process can continue.

A copy is complete or absent: its manifest is written last, and its name contains a hash of the manifest, so different
checkpoints never share a name. A copy is used only after every byte was verified. All copies at a URL are of one run.
"""

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import Field, TypeAdapter

from lora_kit.data.counts import Count
from lora_kit.errors import CheckpointError, InputError, LeaseError, LoraKitError, RemoteError, scrub
from lora_kit.files import open_regular, sync_folder, write_atomically
from lora_kit.runs import formats, store
from lora_kit.runs.formats import Token
from lora_kit.runs.manifest import MANIFEST, Manifest, parse_manifest
from lora_kit.runs.store import Checkpoint

OUTBOX = "outbox.json"
NAME = re.compile(r"step-([0-9]{8,20})-[0-9a-f]{8}")  # of a copy
FILES = {*store.PUBLISHED, store.OPTIMIZER}  # of a checkpoint beside the manifest
FIRST_SECONDS, MOST_SECONDS = 1.0, 300.0  # the pauses after the first failure, and after many
MOST_COPIES = 20  # are looked at if the newest is broken
TRIES = 4  # of one request, before the upload starts again
TOLD_FAILURES = 3  # so many failed uploads in a row are reported; a failure that no repetition will mend, at once

T = TypeVar("T")


class ConflictError(InputError):
    """The URL holds the checkpoints of another run, or newer checkpoints of this run."""


@dataclass(frozen=True)
class Copy:
    """A complete copy at a URL.

    Attributes:
        name: Its folder's name or, on the Hub, its commit.
        manifest: Its manifest.
        content: The bytes of the manifest.
    """

    name: str
    manifest: Manifest
    content: bytes

    @property
    def step(self) -> int:
        """The step after which the checkpoint was written."""
        return self.manifest.progress.step


def name_of(step: int, manifest: bytes) -> str:
    """Return the name of a checkpoint's copy: its step and the beginning of the SHA-256 of its manifest."""
    return f"step-{step:08d}-{hashlib.sha256(manifest).hexdigest()[:8]}"


def step_of(name: str) -> int:
    """Return the step in the name of a copy."""
    return int(name.split("-")[1])


@dataclass(frozen=True)
class Parcel:
    """A checkpoint that is being uploaded. Its files are open, so pruning the checkpoint does not disturb the upload.

    Attributes:
        name: The copy's name.
        manifest: The checkpoint's manifest.
        content: The bytes of the manifest.
        files: The path of each file but the manifest, by name.
    """

    name: str
    manifest: Manifest
    content: bytes
    files: Mapping[str, str]


class Remote(Protocol):
    """A place that keeps copies of checkpoints. Every method may raise what the place's library raises.

    Attributes:
        url: Its URL, without credentials.
        interval: The least seconds between the starts of two uploads.
        damaged: Why a copy that `copies` has found cannot be used, by its name.
    """

    url: str
    interval: float
    damaged: dict[str, str]

    def copies(self, most: int) -> list[Copy]:
        """Return the newest complete copies, at most so many, newest first by fencing token and step."""
        ...

    def upload(self, parcel: Parcel, require: Callable[[], None], *, again: bool) -> None:
        """Write a copy, its manifest last and after calling `require`; `again` after an incomplete upload of it."""
        ...

    def prune(self, keep: int, leftover: str | None, require: Callable[[], None]) -> None:
        """Delete all but the newest copies of a run, and what an incomplete upload has left under this name."""
        ...

    def download(self, copy: Copy, folder: Path) -> None:
        """Write the files of a copy, without its manifest, into a folder. Nothing is verified."""
        ...

    def describe(self, error: Exception) -> tuple[str, bool]:
        """Return an error as text without secrets, and whether a repetition may succeed."""
        ...


@dataclass
class Backoff:
    """Exponential backoff with jitter, so that many runs do not meet again at a store that was down.

    Attributes:
        pause: Waits for so many seconds. If it returns a true value, nothing is repeated.
        draw: Returns a random number from [0, 1).
    """

    pause: Callable[[float], object] = time.sleep
    draw: Callable[[], float] = random.random

    def seconds(self, failures: int) -> float:
        """Return the pause after so many failures in a row."""
        most = min(MOST_SECONDS, FIRST_SECONDS * 2.0 ** min(failures - 1, 30))
        return most * (0.5 + self.draw() / 2)

    def repeat(self, call: Callable[[], T], describe: Callable[[Exception], tuple[str, bool]], *, tries: int) -> T:
        """Return what a call returns; repeat it after errors that may pass, until it has failed `tries` times."""
        for failures in range(1, tries + 1):
            try:
                return call()
            except Exception as error:
                if failures == tries or not describe(error)[1] or self.pause(self.seconds(failures)):
                    raise
        raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class Uploaded:
    """The newest checkpoint that is complete at the URL."""

    name: str
    token: Token
    step: Count


@dataclass(frozen=True)
class Outbox:
    """The content of outbox.json.

    Attributes:
        url: Where the checkpoints go.
        uploaded: The newest that is complete there; None before the first.
        uploading: The name of a copy whose upload has begun and not ended.
        failures: How often the upload has failed in a row.
        problem: Why the last upload failed; empty if it did not.
    """

    url: str
    uploaded: Uploaded | None = None
    uploading: Annotated[str, Field(pattern=NAME.pattern)] | None = None
    failures: Count = 0
    problem: str = ""


_OUTBOX = TypeAdapter(Outbox)


def read_outbox(run: Path, url: str | None = None) -> Outbox | None:
    """Return a run's outbox; None if there is none, or if it is for another URL than `url`.

    Raises:
        CheckpointError: The file is damaged.
    """
    found = formats.read(_OUTBOX, run / OUTBOX)
    return None if found is None or (url is not None and found.url != url) else found


@dataclass(frozen=True)
class Waiting:
    """The checkpoint that an upload would take: the newest of the run's folder.

    Attributes:
        path: Its folder.
        manifest: Its manifest.
        content: The bytes of the manifest.
    """

    path: Path
    manifest: Manifest
    content: bytes

    @property
    def name(self) -> str:
        """The name of its copy."""
        return name_of(self.manifest.progress.step, self.content)


def waiting(run: Path, url: str) -> Waiting | None:
    """Return the run's newest checkpoint if it is not at the URL yet. Only its manifest is verified.

    Raises:
        CheckpointError: The folder `checkpoints` cannot be listed.
    """
    for path in store.newest_first(run)[0]:
        with suppress(CheckpointError):  # it was pruned just now
            content = formats.read_bytes(path / MANIFEST) or b""
            found = Waiting(path, parse_manifest(content, path / MANIFEST), content)
            outbox = _outbox_of(run, url)
            return None if outbox.uploaded and outbox.uploaded.name == found.name else found
    return None


def _outbox_of(run: Path, url: str) -> Outbox:
    with suppress(CheckpointError):  # a damaged outbox only means that the newest copy is compared with the store again
        return read_outbox(run, url) or Outbox(url)
    return Outbox(url)


@contextmanager
def packed(found: Waiting) -> Iterator[Parcel]:
    """Verify a checkpoint and open its files.

    Raises:
        CheckpointError: The checkpoint is damaged, or it was pruned.
    """
    with ExitStack() as stack:
        files = {}
        for name in found.manifest.files:
            try:
                file = stack.enter_context(open_regular(found.path / name))
            except OSError as error:
                raise CheckpointError(f"{found.path / name}: cannot be read: {error.strerror}") from error
            files[name] = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        store.open_checkpoint(found.path)
        yield Parcel(found.name, found.manifest, found.content, files)


@dataclass
class Uploader:
    """Uploads the newest checkpoint of a run's folder whenever it is not at the URL yet.

    Attributes:
        run: The run's folder.
        remote: Where to.
        keep: The number of newest copies that stay there.
        require: Raises a LeaseError if this process does not hold the run's lease, OSError if that is not known now.
        on_upload: Called after an upload with its step, bytes and seconds.
        on_fault: Called with a message when uploads keep failing, once for each series of failures.
        backoff: The pauses after failures.
        clock: Returns seconds.
    """

    run: Path
    remote: Remote
    keep: int
    require: Callable[[], None] = lambda: None
    on_upload: Callable[..., object] = lambda **facts: None
    on_fault: Callable[[str], object] = lambda text: None
    backoff: Backoff = field(default_factory=Backoff)
    clock: Callable[[], float] = time.monotonic
    _not_before: float = field(default=0.0, init=False)
    _told: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._outbox = _outbox_of(self.run, self.remote.url)
        self._not_before = self.clock()

    def seconds_left(self) -> float | None:
        """Return the seconds until the next upload should be tried; None if nothing waits."""
        if waiting(self.run, self.remote.url) is None:
            return None
        return max(0.0, self._not_before - self.clock())

    def hurry(self) -> None:
        """Prepare for the end of the run: the next upload need not wait."""
        self._outbox, self._not_before = replace(self._outbox, failures=0), self.clock()

    def attempt(self) -> bool:
        """Upload what waits; return whether nothing waits any more.

        Raises:
            LeaseError: The lease is lost; nothing more may be written.
        """
        found, began = waiting(self.run, self.remote.url), self.clock()
        if found is None:
            return True
        step = found.manifest.progress.step
        try:
            with packed(found) as parcel:
                self._upload(parcel)
        except LeaseError:
            raise
        except Exception as error:
            if isinstance(error, CheckpointError) and not (found.path / MANIFEST).exists():
                return False  # pruned: a newer one waits
            self._failed(step, error)
            return False
        size = sum(entry.size for entry in found.manifest.files.values())
        self._not_before, self._told = began + self.remote.interval, False
        self.on_upload(step=step, bytes=size, seconds=round(self.clock() - began, 3))
        return waiting(self.run, self.remote.url) is None

    def _upload(self, parcel: Parcel) -> None:
        newest = next(iter(self.backoff.repeat(lambda: self.remote.copies(1), self.remote.describe, tries=TRIES)), None)
        leftover = self._outbox.uploading if self._outbox.uploading != parcel.name else None
        if newest is None or newest.content != parcel.content:
            require_newer(parcel.manifest, newest, self.remote.url)
            again = self._outbox.uploading == parcel.name
            self._note(uploading=parcel.name)

            def upload() -> None:
                nonlocal again
                repeated, again = again, True
                self.remote.upload(parcel, self.require, again=repeated)

            self.backoff.repeat(upload, self.remote.describe, tries=TRIES)
        done = Uploaded(parcel.name, *parcel.manifest.order)
        self._note(uploaded=done, uploading=leftover, failures=0, problem="")
        try:
            self.remote.prune(self.keep, leftover, self.require)
            self._note(uploading=None)
        except LeaseError:
            raise
        except Exception:  # what stays is deleted after the next upload
            pass

    def _failed(self, step: int, error: Exception) -> None:
        """Note a failure, and report it if it lasts or if no repetition will help."""
        reason, transient = self.remote.describe(error)
        failures = self._outbox.failures + 1
        pause = MOST_SECONDS if isinstance(error, ConflictError) else self.backoff.seconds(failures)
        self._not_before = self.clock() + pause
        with suppress(OSError):
            self._note(failures=failures, problem=reason)
        if not self._told and (not transient or failures >= TOLD_FAILURES):
            self._told = True
            self.on_fault(
                f"{self.remote.url}: step {step} is not uploaded yet, {failures} attempt(s) failed: {reason}. Training "
                "goes on, and the newest checkpoint is tried again"
            )

    def _note(self, **changes: Any) -> None:
        self._outbox = replace(self._outbox, **changes)
        write_atomically(self.run / OUTBOX, json.dumps(asdict(self._outbox), indent=1) + "\n")


def require_newer(own: Manifest, newest: Copy | None, url: str) -> None:
    """Check that a checkpoint may become the newest copy at a URL.

    Raises:
        ConflictError: The URL holds another run, or a newer checkpoint of this run.
    """
    if newest is None:
        return
    theirs = newest.manifest
    if theirs.run.run_id != own.run.run_id:
        raise ConflictError(
            f"{url}: it holds checkpoints of another run ({theirs.run.run_id}, step {newest.step}; this is "
            f"{own.run.run_id}); nothing is written there. Give each run a URL of its own"
        )
    if theirs.order > own.order:
        raise ConflictError(
            f"{url}: it holds step {newest.step} of a later start of this run (fencing token {theirs.order[0]}; this "
            f"start has {own.order[0]}); nothing is written there. To go on from that step, train into an empty --out"
        )


def bring(
    remote: Remote,
    parent: Path,
    folder_name: Callable[[Copy], str],
    *,
    tell: Callable[[str], object],
    only: str | None = None,
    backoff: Backoff | None = None,
) -> Path | None:
    """Download the newest copy whose every byte is right; return its folder, None if the URL holds no copy.

    Args:
        remote: Where from.
        parent: The folder in which the checkpoint's folder is made. A folder that exists is used if it is valid.
        folder_name: Returns the name of the folder for a copy.
        tell: Called with a message for each copy that is not used.
        only: Take only the copy of this name.
        backoff: The pauses after failures.

    Raises:
        RemoteError: The URL cannot be read, or no copy there is valid.
    """
    backoff, broken = backoff or Backoff(), dict[str, str]()
    try:
        for most in (1, MOST_COPIES):  # usually the newest is whole, and none else is looked at
            copies = backoff.repeat(lambda: remote.copies(most), remote.describe, tries=TRIES)  # noqa: B023
            for name, reason in remote.damaged.items() - broken.items():
                broken[name] = reason
                tell(f"{remote.url}: {reason}; this copy is not used")
            for copy in copies:
                if copy.name in broken or (only is not None and copy.name != only):
                    continue
                try:
                    place = partial(_bring, remote, copy, parent, parent / folder_name(copy))
                    return backoff.repeat(place, remote.describe, tries=TRIES)
                except CheckpointError as error:
                    broken[copy.name] = str(error)
                    tell(f"{remote.url}, {copy.name}: {error}; the next older copy is tried")
    except LoraKitError:
        raise
    except Exception as error:
        raise RemoteError(f"{remote.url}: it cannot be read: {remote.describe(error)[0]}") from None
    if broken or only is not None:
        what = "no copy there is whole" if broken else f"it holds no complete copy {only}"
        problems = [f"{name}: {reason}" for name, reason in broken.items()]
        raise RemoteError("\n  ".join([f"{remote.url}: {what}", *problems]))
    return None


def _bring(remote: Remote, copy: Copy, parent: Path, final: Path) -> Path:
    """Download and verify a copy beside its place, and rename it into its place."""
    with suppress(CheckpointError):
        return store.open_checkpoint(final).path
    unknown = copy.manifest.files.keys() - FILES
    if unknown or FILES - copy.manifest.files.keys():
        raise CheckpointError(f"its manifest lists {sorted(copy.manifest.files)}, expected {sorted(FILES)}")
    parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(entry.size for entry in copy.manifest.files.values()), shutil.disk_usage(parent).free
    if needed > free:
        raise RemoteError(f"{parent}: {needed:,} bytes are needed, and {free:,} are free; free disk space")
    staging = parent / f".tmp-remote-{os.getpid()}"
    store.remove(staging)
    staging.mkdir()
    try:
        remote.download(copy, staging)
        (staging / MANIFEST).write_bytes(copy.content)
        store.open_checkpoint(staging)
        for path in (*staging.iterdir(), staging):
            _sync(path)
        if final.exists():  # damaged, or another process was quicker
            store.remove(final)
        staging.rename(final)
        sync_folder(parent)
    finally:
        store.remove(staging)
    return store.open_checkpoint(final).path


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def restore(remote: Remote, run: Path, *, tell: Callable[[str], object], backoff: Backoff | None = None) -> None:
    """Download the newest checkpoint at a URL into a run's folder that has none.

    Raises:
        RemoteError: The URL cannot be read. To begin anew although its checkpoints cannot be read would lose them.
    """
    if store.newest_first(run)[0]:
        return
    tell(f"{run} has no checkpoint; looking for one at {remote.url}")
    path = bring(
        remote,
        run / "checkpoints",
        lambda copy: store.checkpoint_folder(run, copy.step).name,
        tell=tell,
        backoff=backoff,
    )
    if path is None:
        return
    checkpoint = store.open_checkpoint(path)
    done = Uploaded(name_of(checkpoint.step, (path / MANIFEST).read_bytes()), *checkpoint.manifest.order)
    write_atomically(run / OUTBOX, json.dumps(asdict(Outbox(remote.url, done)), indent=1) + "\n")
    tell(f"step {checkpoint.step} was downloaded from {remote.url} and verified")


def describe(error: Exception) -> tuple[str, bool]:
    """Return an error of a file system or its library as text without secrets, and whether a repetition may succeed."""
    if isinstance(error, LoraKitError):
        return str(error), False
    permanent = isinstance(error, FileNotFoundError | PermissionError | ImportError | NotImplementedError | TypeError)
    text = scrub(str(error)) or "no message"
    return f"{type(error).__name__}: {text}", not permanent


def checkpoint_of(run: Path) -> Checkpoint:
    """Return the newest valid checkpoint of a run.

    Raises:
        CheckpointError: There is none.
    """
    found = store.find(run).latest
    if found is None:
        raise CheckpointError(f"{run}: it has no valid checkpoint to upload")
    return found
