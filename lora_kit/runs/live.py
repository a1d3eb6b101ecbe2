"""The live region: shared memory with the newest snapshots of a run's state, which outlives the training process.

A live region, or region for short, is one memory-mapped file, allocated in full when it is created: a page of counters
and three slots for snapshots. The trainer fills the oldest slot that is not in use and publishes the slot's header
last, so at every moment the newest slot is complete. The keeper marks the slot that it reads. The trainer waits only if
a step that must become a checkpoint is still unwritten when its slot is needed.

A region belongs to one run, whose id is in the name of the region's folder. Every process that uses a region holds a
shared lock (flock) on the region's file, so a region that can be locked exclusively is used by nobody.
"""

import errno
import fcntl
import json
import mmap
import os
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import numpy as np
import xxhash
from pydantic import Field, TypeAdapter

from lora_kit.data.counts import Count
from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.files import write_atomically
from lora_kit.runs import formats, lease, store
from lora_kit.runs.formats import Amount, Token
from lora_kit.runs.identity import IDENTITY, Identity, Life, life_of, own_identity
from lora_kit.runs.journal import Journal
from lora_kit.runs.layout import CONSTANTS, WEIGHTS, Layout, State, cut
from lora_kit.runs.manifest import AnyManifest, Manifest, RunFacts, ScriptFacts, StepFacts
from lora_kit.runs.scripts import ScriptJob
from lora_kit.runs.store import ADAPTER, ADAPTER_CONFIG, OPTIMIZER, headers_of

MAGIC = int.from_bytes(b"lorakit3", "little")
PAGE, HEADER_BYTES, SLOTS = 16384, 65536, 3
KEEPER_AT, FAULT_AT, OWNER_AT = 512, 1024, 4096  # offsets in the first page of the cells after the counters
SHARED_MEMORY = Path("/dev/shm")
CHUNK = 1 << 20  # bytes that are copied and then hashed, while they are in the CPU's cache
PATIENCE_SECONDS = 0.5  # wait for another process to release its exclusive lock, held for microseconds
TIMEOUT_FACTOR = 10.0  # without train.step_timeout a step hangs after this many longest steps
LEAST_TIMEOUT_SECONDS = 60.0  # least limit of a step, however short the steps are
REGION, JOB, PARTIAL, START = "region", "job.json", "region.partial", "start.json"


T = TypeVar("T")


class Word(IntEnum):
    """The 64-bit counters of the first page. The trainer writes the counters up to STOP, the keeper writes the others.

    MAGIC: 0 once the run has deleted the region. PAYLOAD: Bytes of a slot. TOKEN: The trainer's fencing token. PHASE: A
    `Phase`. BEAT: Grows with every sign of life. JOB, NEXT_JOB: The checksum of job.json, and while that file is being
    replaced the checksum of the next one. STOP: The number of a signal that asks the trainer to stop. READING: The slot
    that the keeper reads, plus one. HANDLED: Due snapshots up to this sequence number were written, or their write
    failed. COMMITTED: The sequence number of the last snapshot that became a checkpoint. FAULTS: The number of faults.
    SEEN: The time since boot, in milliseconds, at which BEAT grew last.
    """

    MAGIC = 0
    PAYLOAD = 1
    TOKEN = 2
    PHASE = 3
    BEAT = 4
    JOB = 5
    NEXT_JOB = 6
    STOP = 7
    READING = 8
    HANDLED = 9
    COMMITTED = 10
    FAULTS = 11
    SEEN = 12


class Phase(IntEnum):
    """What the trainer is doing. An upload at the end counts as loading: no step is to be expected."""

    LOADING = 0
    TRAINING = 1
    ENDED = 2


@dataclass(frozen=True)
class Header:
    """What is published with a slot's bytes.

    Attributes:
        token: The fencing token of the trainer.
        sequence: Grows with every publication, also after a return to an earlier step.
        checksum: The checksum of the slot's bytes.
        due: Whether exactly this step must become a checkpoint.
        progress: The step's part of the manifest.
    """

    token: Token
    sequence: Count
    checksum: Annotated[int, Field(ge=0, lt=2**64)]
    due: bool
    progress: StepFacts


_HEADER = TypeAdapter(Header)


@dataclass(frozen=True)
class Snapshot:
    """A published slot: its index and its header."""

    slot: int
    header: Header

    @property
    def order(self) -> tuple[int, int]:
        """The token and the sequence number; a newer snapshot has a larger pair."""
        return self.header.token, self.header.sequence

    @property
    def step(self) -> int:
        """The step after which the snapshot was published."""
        return self.header.progress.step


@dataclass(frozen=True)
class Owner:
    """The run that a region belongs to.

    Attributes:
        run_id: The run's id.
        folder: The device and the inode number of the run's folder.
        parent: The device and the inode number of the folder that contains the run's folder.
        path: The run's folder as an absolute path.
    """

    run_id: str
    folder: tuple[int, int]
    parent: tuple[int, int]
    path: str

    @classmethod
    def of(cls, run: Path, run_id: str) -> "Owner":
        """Describe a run's folder, which exists."""
        path = run.resolve()
        return cls(run_id, _inode(path), _inode(path.parent), str(path))

    def is_there(self) -> bool | None:
        """Return whether the path leads to a folder of this run; None if that cannot be found out."""
        with suppress(CheckpointError, OSError):
            return run_id_of(Path(self.path)) == self.run_id
        return None

    def is_gone(self) -> bool:
        """Return whether the folder is known to be deleted.

        A missing path proves nothing, because its disk may not be mounted here. The run is gone if its parent folder
        exists on the same disk and no folder in it, whatever its name, is the run.
        """
        parent = Path(self.path).parent
        with suppress(CheckpointError, OSError):
            leases = [lease.read(sibling / lease.FILE) for sibling in parent.iterdir()]
            renamed = any(record is not None and record.run_id == self.run_id for record in leases)
            same = _inode(parent) == self.parent and self.parent[0] == self.folder[0]
            return same and self.is_there() is False and not renamed
        return False


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


_OWNER = TypeAdapter(Owner)


class Region:
    """A memory-mapped region; counters and slots are shared with every process that has opened it.

    The mapping stays when the file is deleted. It also keeps the shared lock on the file.

    Raises:
        OSError: The file does not exist any more, or it is not a region.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        weakref.finalize(self, os.close, self._file)  # the mapping has a descriptor of its own
        patience = time.monotonic() + PATIENCE_SECONDS
        while _lock(self._file, fcntl.LOCK_SH) is False and time.monotonic() < patience:
            # another process holds the exclusive lock: it tests whether the region is in use, or deletes it
            time.sleep(0.01)
        found = os.fstat(self._file)
        if found.st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "deleted", str(path))
        if not stat.S_ISREG(found.st_mode) or found.st_size < PAGE:
            raise OSError(errno.EINVAL, "not a live region", str(path))
        self._map = memoryview(mmap.mmap(self._file, 0))
        self.path, self._inode = path, (found.st_dev, found.st_ino)
        self.words = self._map[:KEEPER_AT].cast("Q")
        self.payload_bytes = self.words[Word.PAYLOAD]
        if self.words[Word.MAGIC] != MAGIC or len(self._map) != region_bytes(self.payload_bytes):
            raise OSError(errno.EINVAL, "not a live region", str(path))

    @property
    def memory(self) -> memoryview:
        """The memory of the region from its first byte to its last."""
        return self._map

    def _header(self, slot: int) -> memoryview:
        return self._map[PAGE + slot * HEADER_BYTES :][:HEADER_BYTES]

    def payload(self, slot: int) -> memoryview:
        """Return the memory of a slot: the buffers of a `Layout`, one after the other."""
        return self._map[PAGE + SLOTS * HEADER_BYTES + slot * self.payload_bytes :][: self.payload_bytes]

    def snapshots(self) -> list[Snapshot]:
        """Return the published snapshots, newest first; their bytes are not checked (see `is_valid`)."""
        headers = ((slot, self._read_header(slot)) for slot in range(SLOTS))
        published = (Snapshot(slot, header) for slot, header in headers if header)
        return sorted(published, key=lambda snapshot: snapshot.order, reverse=True)

    def _read_header(self, slot: int) -> Header | None:
        return self._parse_cell(_HEADER, self._header(slot))

    def _parse_cell(self, expected: TypeAdapter[T], cell: memoryview) -> T | None:
        text = _read_cell(cell)
        with suppress(CheckpointError):
            return formats.parse(expected, text, self.path) if text else None
        return None

    def is_valid(self, snapshot: Snapshot) -> bool:
        """Return whether the slot still holds this header, and bytes that match its checksum."""
        unchanged = checksum(self.payload(snapshot.slot)) == snapshot.header.checksum
        return unchanged and self._read_header(snapshot.slot) == snapshot.header

    def acquire(self, waiting: Callable[[], None]) -> int:
        """Return a slot to fill, after erasing its header; call `waiting` repeatedly while all slots are in use."""
        while (slot := self._free_slot()) is None:
            waiting()
            time.sleep(0.001)
        _write_cell(self._header(slot), None)
        if self._slot_being_read() == slot:  # the keeper chose this slot at the same moment; it will find no header
            return self.acquire(waiting)
        return slot

    def _free_slot(self) -> int | None:
        """Return the oldest slot that is neither the newest, nor being read, nor due and unwritten."""
        published, handled = self.snapshots(), self.words[Word.HANDLED]
        in_use: set[int | None] = {
            snapshot.slot for snapshot in published if snapshot.header.due and snapshot.header.sequence > handled
        }
        in_use |= {snapshot.slot for snapshot in published[:1]} | {self._slot_being_read()}
        empty = set(range(SLOTS)) - {snapshot.slot for snapshot in published}
        oldest_first = [*sorted(empty), *(snapshot.slot for snapshot in reversed(published))]
        return next((slot for slot in oldest_first if slot not in in_use), None)

    def _slot_being_read(self) -> int | None:
        """Return the slot that a keeper reads; the mark of a dead keeper does not count."""
        mark, keeper = self.words[Word.READING], self.keeper if self.words[Word.READING] else None
        return mark - 1 if keeper and life_of(keeper) is not Life.DEAD else None

    def beat(self) -> None:
        """Show that the trainer is alive."""
        self.words[Word.BEAT] += 1
        self.words[Word.SEEN] = _since_boot()

    @property
    def silent_seconds(self) -> float:
        """The time since the trainer's last sign of life."""
        return max(0, _since_boot() - self.words[Word.SEEN]) / 1000

    @property
    def keeper(self) -> Identity | None:
        """The process that writes checkpoints from this region; None before a keeper has opened it."""
        return self._parse_cell(IDENTITY, self._map[KEEPER_AT:FAULT_AT])

    @keeper.setter
    def keeper(self, keeper: Identity) -> None:
        _write_cell(self._map[KEEPER_AT:FAULT_AT], IDENTITY.dump_json(keeper))
        self.words[Word.READING] = 0

    @property
    def owner(self) -> Owner:
        """The run that the region belongs to.

        Raises:
            CheckpointError: The region is damaged.
        """
        return formats.parse(_OWNER, _read_cell(self._map[OWNER_AT:PAGE]), self.path)

    @owner.setter
    def owner(self, owner: Owner) -> None:
        _write_cell(self._map[OWNER_AT:PAGE], _owner_text(owner))

    @property
    def newest_token(self) -> int:
        """The highest fencing token in the region."""
        return max([self.words[Word.TOKEN], *(snapshot.header.token for snapshot in self.snapshots())])

    def is_removed(self) -> bool:
        """Return whether the region's file has been deleted or replaced. The mapping can still be used."""
        try:
            return _inode(self.path) != self._inode
        except OSError:
            return True

    def is_shared(self, *, otherwise: bool = False) -> bool:
        """Return whether another process uses the region; `otherwise` if the file system has no locks."""
        alone = _lock(self._file, fcntl.LOCK_EX)
        _lock(self._file, fcntl.LOCK_SH)  # shared again: if LOCK_EX was refused, the shared lock is lost too
        return otherwise if alone is None else not alone

    def publish(self, slot: int, header: Header) -> None:
        """Make a filled slot the newest snapshot.

        Raises:
            LeaseError: Another process has taken over the run.
            CheckpointError: No reader would accept the header, so the keeper would never see the snapshot.
        """
        if header.token != self.words[Word.TOKEN]:
            raise LeaseError(
                f"{self.path}: another process has taken over this run; this process ends and writes nothing"
            )
        text = json.dumps(asdict(header)).encode()
        formats.parse(_HEADER, text, f"{self.path}: the snapshot of step {header.progress.step}")
        _write_cell(self._header(slot), text)

    def clear(self) -> None:
        """Erase the headers of all slots."""
        for slot in range(SLOTS):
            _write_cell(self._header(slot), None)

    @property
    def fault(self) -> str:
        """The text of the keeper's last fault, e.g. a failed write; empty if there was none."""
        return _read_cell(self._map[FAULT_AT:OWNER_AT]).decode()

    def report_fault(self, text: str) -> None:
        """Store the text of a keeper's fault, e.g. a failed write, in the region; the trainer shows it to the user."""
        _write_cell(self._map[FAULT_AT:OWNER_AT], text.encode()[:1500].decode(errors="ignore").encode())
        self.words[Word.FAULTS] += 1


def _write_cell(cell: memoryview, text: bytes | None) -> None:
    """Replace the text of a cell. A reader sees the old text, no text or the new text: the length is written last."""
    words = cell[:16].cast("Q")
    words[0] = 0
    if text is not None:
        if len(text) > len(cell) - 16:
            raise CheckpointError(
                f"live region: {len(text):,} bytes of header, more than the {len(cell) - 16:,} reserved"
            )
        cell[16 : 16 + len(text)] = text
        words[1] = xxhash.xxh3_64_intdigest(text)
        words[0] = len(text)


def _read_cell(cell: memoryview) -> bytes:
    """Return the text of a cell; empty if there is none, or while it is being replaced."""
    length, digest = cell[:16].cast("Q")
    text = bytes(cell[16 : 16 + length]) if 0 < length <= len(cell) - 16 else b""
    return text if xxhash.xxh3_64_intdigest(text) == digest else b""


def checksum(payload: memoryview) -> int:
    """Return the checksum of a slot's bytes that its header records."""
    return xxhash.xxh3_64_intdigest(payload)


def copy_hashed(target: memoryview, sources: Sequence[memoryview]) -> int:
    """Copy buffers one after the other and return the checksum of all bytes. The GIL is released meanwhile."""
    digest, offset, copied = xxhash.xxh3_64(), 0, np.frombuffer(target, np.uint8)
    for source in sources:
        values = np.frombuffer(source, np.uint8)
        for begin in range(0, len(values), CHUNK):
            chunk = values[begin : begin + CHUNK]
            end = offset + len(chunk)
            np.copyto(copied[offset:end], chunk)  # numpy releases the GIL, a memoryview does not
            digest.update(target[offset:end])
            offset = end
    return digest.intdigest()


def _parent_folders() -> list[Path]:
    """Return the folders in which a region may be, best first."""
    folders = [SHARED_MEMORY]
    with suppress(FileNotFoundError):  # no temporary folder can be written
        folders.append(Path(tempfile.gettempdir()))
    return [folder for folder in folders if folder.is_dir()]


def memory_id() -> str:
    """Return a text that is equal for two processes exactly if they see the same shared memory.

    The boot id tells machines apart, and the device number of /dev/shm tells containers of a machine apart.
    """
    return " ".join([own_identity().boot, *(str(folder.stat().st_dev) for folder in _parent_folders()[:1])])


def _since_boot() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def region_bytes(payload_bytes: int) -> int:
    """Return the size of a live region for states of so many bytes."""
    return PAGE + SLOTS * (HEADER_BYTES + payload_bytes)


def _owner_text(owner: Owner) -> bytes:
    return json.dumps(asdict(owner), ensure_ascii=False).encode()


def _open(path: Path) -> int:
    """Open a file, but no link, and without waiting at a FIFO; return its descriptor."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _lock(file: BinaryIO | int, kind: int) -> bool | None:
    """Try to lock a file, shared or exclusively; return whether that worked, None if its file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _folders(run_id: str = "") -> Iterator[Path]:
    """Yield this user's folders of regions, of all runs or of one; ignore links and folders that others can access."""
    prefix = f"lora_kit-{os.getuid()}-{run_id}"
    for parent in _parent_folders():
        with suppress(OSError):
            for folder in sorted(path for path in parent.iterdir() if path.name.startswith(prefix)):
                with suppress(OSError):
                    found = folder.lstat()
                    own = found.st_uid == os.getuid() and not found.st_mode & 0o077
                    if own and stat.S_ISDIR(found.st_mode):
                        yield folder


def _regions(run_id: str = "") -> Iterator[tuple[Region, Owner]]:
    """Yield this user's regions, of all runs or of one."""
    for folder in _folders(run_id):
        with suppress(OSError, CheckpointError):
            region = Region(folder / REGION)
            owner = region.owner
            if not run_id or owner.run_id == run_id:
                yield region, owner


def run_id_of(run: Path) -> str | None:
    """Return the id of the run in a folder; None if no run has begun there."""
    with suppress(CheckpointError, OSError):
        if found := lease.read(run / lease.FILE):
            return found.run_id
    for manifest in store.newest_first(run)[0].values():
        return manifest.run.run_id
    return Journal(run).run_id()


def newest_token(run_id: str) -> int:
    """Return the highest fencing token in the regions of a run; 0 if there are none."""
    return max((region.newest_token for region, _ in _regions(run_id)), default=0)


def open_region(run: Path, *, run_id: str | None = None, most: int = 2**63) -> Region | None:
    """Open a run's region for reading and writing; None if there is none.

    Args:
        run: The run's folder.
        run_id: The run's id, if it is known.
        most: The highest fencing token that the region may have; a higher token belongs to another start.
    """
    least, path = 0, str(run.resolve())
    if run_id is None:
        run_id = run_id_of(run)
        with suppress(CheckpointError, OSError):
            if record := lease.read(run / lease.FILE):
                least = record.token  # ignore the region of an earlier holder of the lease, which was paused
    found = [region for region, owner in _regions(run_id) if owner.path == path] if run_id else []
    found = [region for region in found if least <= region.words[Word.TOKEN] <= most]
    return max(found, key=_order, default=None)


def _order(region: Region) -> tuple[int, tuple[int, int]]:
    """Return the region's token, and the order of its newest snapshot: a region that replaces another begins empty."""
    newest = region.snapshots()[:1]
    return region.words[Word.TOKEN], newest[0].order if newest else (0, 0)


def announce_start(run: Path) -> None:
    """Note beside the regions of a run on this machine that this process will go on from them if it gets the lease."""
    if run_id := run_id_of(run):
        for region, _ in _regions(run_id):
            with suppress(OSError):
                write_atomically(region.path.with_name(START), IDENTITY.dump_json(own_identity()))


def is_starting(run: Path, run_id: str) -> bool:
    """Return whether a living process of this machine has announced a start of a run."""
    for region, owner in _regions(run_id):
        with suppress(CheckpointError):
            starter = formats.read(IDENTITY, region.path.with_name(START))
            if starter is not None and life_of(starter) is not Life.DEAD and owner.path == str(run.resolve()):
                return True
    return False


def adopt(held: lease.Lease) -> None:
    """Make the newest live region of a run the run's only one, after this process has acquired the run's lease.

    The earlier holder of the lease may only be paused, and would write to its region when it continues. A region in use
    is therefore left to that process, and this process takes a copy. A region that names another folder of the run,
    because the run was moved, counts if no process uses it and the run is not in that folder any more.

    Raises:
        CheckpointError: There is no space for a copy of the region.
    """
    me, mine = Owner.of(held.run, held.record.run_id), list[tuple[tuple[int, int], Region, bool]]()
    for region, owner in _regions(me.run_id):
        shared, newest = region.is_shared(), region.snapshots()[:1]
        if owner.path == me.path or owner.folder == me.folder or (not shared and owner.is_there() is False):
            mine.append((newest[0].order if newest else (0, 0), region, shared))
    mine.sort(key=lambda entry: entry[0])
    for _, region, shared in mine[:-1]:
        if not shared:
            discard(region)
    for _, region, shared in mine[-1:]:
        adopted = _copy(region, me) if shared else region
        adopted.owner, adopted.words[Word.TOKEN] = me, held.token


def _copy(region: Region, owner: Owner) -> Region:
    copy = _create(owner, region.payload_bytes)
    copy.memory[:], job = region.memory, region.path.with_name(JOB)
    with suppress(FileNotFoundError):
        shutil.copyfile(job, copy.path.with_name(JOB))
    return copy


def create_region(held: lease.Lease, payload_bytes: int) -> Region:
    """Return a run's region: the existing region if its size is right, else a new region in /dev/shm or on local disk.

    Raises:
        CheckpointError: Neither shared memory nor the temporary folder has enough space.
    """
    run, run_id = held.run, held.record.run_id
    region = open_region(run, run_id=run_id, most=held.token)
    if region is not None and region.payload_bytes == payload_bytes:
        return region
    if region is not None:
        discard(region)
    return _create(Owner.of(run, run_id), payload_bytes)


def create_successor(held: lease.Lease, region: Region, payload_bytes: int) -> Region:
    """Return a new region with larger slots, for a state that has grown. The old region stays, with what it holds.

    Until the first snapshot is published in the new region, `open_region` returns the old one.

    Raises:
        CheckpointError: Neither shared memory nor the temporary folder has enough space.
    """
    successor = _create(Owner.of(held.run, held.record.run_id), payload_bytes)
    for word in (Word.PHASE, Word.BEAT, Word.SEEN, Word.STOP, Word.HANDLED, Word.COMMITTED):
        successor.words[word] = region.words[word]
    successor.words[Word.TOKEN] = held.token
    return successor


def _create(owner: Owner, payload_bytes: int) -> Region:
    """Create an empty region. Every byte is written now, so that a full memory or disk shows at the start of a run."""
    problems = []
    for parent in _parent_folders():
        folder = parent / f"lora_kit-{os.getuid()}-{owner.run_id}-{secrets.token_hex(4)}"
        try:
            folder.mkdir(mode=0o700)
            _allocate(folder, payload_bytes, owner)
            return Region(folder / REGION)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            problems.append(f"{parent}: {error.strerror}")
    needed = SLOTS * payload_bytes
    raise CheckpointError(
        f"live region: {needed / 1e9:.2f} GB are needed in shared memory or in the temporary folder, and neither has "
        f"them ({'; '.join(problems) or 'neither can be used'}); free that much, enlarge {SHARED_MEMORY} "
        f"({enlarging(needed)}), or set TMPDIR to a folder on a larger disk"
    )


def enlarging(needed: int) -> str:
    """Return how /dev/shm of a container, which by default has 64 MB, gets space for so many bytes more."""
    return f"in Docker --shm-size={needed // (1 << 30) + 1}g, in Kubernetes an emptyDir with medium: Memory"


def disk_notice(region: Region) -> str | None:
    """Return what a region in the temporary folder costs and how to avoid that; None if it is in shared memory."""
    if region.path.is_relative_to(SHARED_MEMORY) or not SHARED_MEMORY.is_dir():
        return None
    needed, folder = len(region.memory), region.path.parents[1]
    return (
        f"live region: {SHARED_MEMORY} has no space for {needed / 1e9:.2f} GB, so it is in {folder}; if that is a "
        f"disk, every step is written to it. Enlarge {SHARED_MEMORY} ({enlarging(needed)})"
    )


def _allocate(folder: Path, payload_bytes: int, owner: Owner) -> None:
    """Write a region of zeros. The file gets its name when it is complete."""
    remaining, zeros, page = region_bytes(payload_bytes), bytes(1 << 22), bytearray(PAGE)
    words = memoryview(page)[:KEEPER_AT].cast("Q")
    words[Word.MAGIC], words[Word.PAYLOAD] = MAGIC, payload_bytes
    _write_cell(memoryview(page)[OWNER_AT:], _owner_text(owner))
    with (folder / PARTIAL).open("xb") as file:
        _lock(file, fcntl.LOCK_EX)
        remaining -= file.write(page)
        while remaining:
            remaining -= file.write(zeros[:remaining])
    (folder / PARTIAL).rename(folder / REGION)


def discard(region: Region) -> None:
    """Delete a region that its run does not need any more."""
    region.words[Word.MAGIC] = 0
    shutil.rmtree(region.path.parent, ignore_errors=True)


def delete_orphans() -> None:
    """Delete this user's regions that nobody uses and whose run is deleted or finished, and incomplete regions.

    A crashed run's region stays for its resume.
    """
    for folder in _folders():
        with suppress(OSError):
            file = _open(folder / PARTIAL)
            if _lock(file, fcntl.LOCK_EX):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(file)
    for region, owner in _regions():
        if not region.is_shared(otherwise=True) and (owner.is_gone() or _is_finished(region, owner)):
            discard(region)


def _is_finished(region: Region, owner: Owner) -> bool:
    """Return whether a region's run has a result, and a checkpoint no older than the newest snapshot in the region."""
    run = Path(owner.path)
    return bool(owner.is_there()) and (run / "result.json").is_file() and is_written(region, run)


def is_written(region: Region, run: Path) -> bool:
    """Return whether a run has a checkpoint that is no older than the newest snapshot in a region."""
    newest = region.snapshots()[:1]
    with suppress(CheckpointError):
        written = max((manifest.order for manifest in store.newest_first(run)[0].values()), default=(0, 0))
        return not newest or written >= (newest[0].header.token, newest[0].step)
    return False


@dataclass(frozen=True)
class JobFile:
    """The content of job.json beside a region: everything that is needed to turn its snapshots into checkpoints.

    Attributes:
        shapes: The adapter's tensors in the order in which they lie in a slot.
        adapter_config: The text of adapter_config.json.
        facts: The part of the manifest that is the same for every step.
        every_seconds: The longest time between two checkpoints.
        keep: How many of the newest checkpoints stay.
        keep_every: Checkpoints whose step is a multiple of this stay too.
        best: Whether the checkpoint with the best held-out figure stays too.
        remote: The URL to which checkpoints are copied; None for none.
    """

    shapes: dict[str, tuple[Count, ...]]
    adapter_config: str
    facts: RunFacts
    every_seconds: Amount
    keep: Count
    keep_every: Annotated[int, Field(ge=1, lt=2**63)] | None
    best: bool
    remote: str | None = None


@dataclass(frozen=True)
class _Kind:
    document_bytes: formats.Json = None  # only the file of a script's run has it


JOB_FILE, _SCRIPT_JOB, _KIND = TypeAdapter(JobFile), TypeAdapter(ScriptJob), TypeAdapter(_Kind)


def write_job(region: Region, job: JobFile | ScriptJob) -> None:
    """Write job.json beside a region, in one rename, and its checksum into the region.

    Raises:
        CheckpointError: The file could not be written.
    """
    content, path = json.dumps(asdict(job)).encode(), region.path.with_name(JOB)
    digest = xxhash.xxh3_64_intdigest(content)
    with suppress(CheckpointError):
        if region.words[Word.JOB] == digest and formats.read_bytes(path) == content:
            return  # a restart changes nothing: do not write, shared memory may have become full
    region.words[Word.NEXT_JOB] = digest  # a kill between these lines leaves a file with one of the two checksums
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"{path}: not written: {error.strerror}; free shared memory") from error
    region.words[Word.JOB] = digest


def read_job(region: Region) -> JobFile | ScriptJob | None:
    """Return the content of job.json beside a region; None if it was not written yet.

    Raises:
        CheckpointError: The file is damaged or missing.
    """
    path, digests = region.path.with_name(JOB), (region.words[Word.JOB], region.words[Word.NEXT_JOB])
    if not digests[0]:
        return None
    content = formats.read_bytes(path)
    if content is None:
        raise CheckpointError(f"{path}: missing; live snapshots cannot be used without it")
    if xxhash.xxh3_64_intdigest(content) not in digests:
        raise CheckpointError(f"{path}: changed since it was written; its checksum does not match")
    of_script = formats.parse(_KIND, content, path).document_bytes is not None
    return formats.parse(_SCRIPT_JOB, content, path) if of_script else formats.parse(JOB_FILE, content, path)


def files_of(job: JobFile | ScriptJob, payload: memoryview) -> dict[str, list[bytes | memoryview]]:
    """Return the content of a checkpoint's files, pieces in order."""
    if isinstance(job, ScriptJob):
        return job.files(payload)
    layout = Layout.of(job.shapes, job.facts.recipe)
    headers, buffers = headers_of(layout), layout.split(payload)
    return {
        ADAPTER: [headers[ADAPTER], *layout.adapter_pieces(buffers)],
        ADAPTER_CONFIG: [job.adapter_config.encode()],
        OPTIMIZER: [headers[OPTIMIZER], *(buffers[name].data.cast("B") for name in layout.moments)],
    }


@dataclass(frozen=True)
class Live:
    """A snapshot that a run can resume from like a checkpoint; its manifest lists no files.

    Attributes:
        path: The region's file.
        slot: The slot's index.
        shapes: The adapter's tensors in the order in which they lie in the slot; empty for a script's run.
    """

    path: Path
    slot: int
    shapes: Mapping[str, Sequence[int]]
    manifest: AnyManifest

    @property
    def step(self) -> int:
        """The step after which the snapshot was published."""
        return self.manifest.progress.step

    def state(self) -> State:
        """Return a copy of the state in the slot."""
        layout = Layout.of(self.shapes, self.manifest.run.recipe)
        buffers = {name: part.copy() for name, part in layout.split(Region(self.path).payload(self.slot)).items()}
        constants = cut(buffers[CONSTANTS], layout.paired) if layout.constants else {}
        return State(cut(buffers[WEIGHTS], self.shapes), {name: buffers[name] for name in layout.moments}, constants)


def newest(held: lease.Lease) -> tuple[Live | None, list[str]]:
    """Return a run's newest valid live snapshot, and a message about everything that cannot be used."""
    region, problems = open_region(held.run, run_id=held.record.run_id, most=held.token), list[str]()
    try:
        job = read_job(region) if region else None
    except CheckpointError as error:
        return None, [str(error)]
    if region is None or job is None:
        return None, []
    for snapshot in region.snapshots():
        if region.is_valid(snapshot):
            facts: RunFacts | ScriptFacts = replace(job.facts, fencing_token=snapshot.header.token)
            shapes = job.shapes if isinstance(job, JobFile) else {}
            return Live(region.path, snapshot.slot, shapes, Manifest(facts, snapshot.header.progress, {})), problems
        problems.append(f"{region.path}: the live snapshot of step {snapshot.step} is damaged, so it is not used")
    return None, problems
