"""The live region: every finished step's state in shared memory, where it outlives the training process.

A region is one memory-mapped file, allocated in full when it is created: a page of counters and three slots. The
trainer fills the oldest slot that is not in use and publishes its header last, so at every moment the newest slot is
complete. The keeper marks the slot that it reads. There are no locks; the trainer waits only if a step that must become
a checkpoint is still unwritten when its slot is needed.
"""

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path

import numpy as np
import psutil
import xxhash
from pydantic import TypeAdapter

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.files import write_atomically
from lora_kit.runs.manifest import Manifest, RunFacts, StepFacts
from lora_kit.runs.store import ADAPTER, ADAPTER_CONFIG, OPTIMIZER, Tensors, headers_of, split

MAGIC = int.from_bytes(b"lorakit2", "little")
PAGE, HEADER_BYTES, SLOTS = 4096, 65536, 3
FAULT_AT = 2048  # offset in the first page of the text about the keeper's last failed write
CHUNK = 1 << 20  # bytes that are copied and then hashed, while they are in the CPU's cache
REGION, JOB = "region", "job.json"


class Word(IntEnum):
    """The 64-bit counters of the first page. The trainer writes the counters up to STOP, the keeper writes the others.

    PAYLOAD: Bytes of a slot. TOKEN: The trainer's fencing token. PHASE: A `Phase`. BEAT: Grows with every sign of life.
    STOP: The number of a signal that asks the trainer to stop. READING: The slot that the keeper reads, plus one.
    HANDLED: Due snapshots up to this sequence number were written, or their write failed. COMMITTED: The sequence
    number of the last snapshot that became a checkpoint. FAULTS: The number of failed writes. KEEPER: The keeper's
    process id.
    """

    MAGIC = 0
    PAYLOAD = 1
    TOKEN = 2
    PHASE = 3
    BEAT = 4
    STOP = 5
    READING = 6
    HANDLED = 7
    COMMITTED = 8
    FAULTS = 9
    KEEPER = 10


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

    token: int
    sequence: int
    checksum: int
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


class Region:
    """A memory-mapped region; counters and slots are shared with every process that has opened it."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = memoryview(mmap.mmap(file.fileno(), 0))
        self.path = path
        self.words = self._map[:FAULT_AT].cast("Q")
        self.payload_bytes = self.words[Word.PAYLOAD]

    @property
    def memory(self) -> memoryview:
        """The memory of the region from its first byte to its last."""
        return self._map

    def _header(self, slot: int) -> memoryview:
        return self._map[PAGE + slot * HEADER_BYTES :][:HEADER_BYTES]

    def payload(self, slot: int) -> memoryview:
        """Return the memory of a slot: the weights, then AdamW's two moments, all fp32."""
        return self._map[PAGE + SLOTS * HEADER_BYTES + slot * self.payload_bytes :][: self.payload_bytes]

    def snapshots(self) -> list[Snapshot]:
        """Return the published snapshots, newest first; their bytes are not checked (see `is_valid`)."""
        headers = ((slot, self._read_header(slot)) for slot in range(SLOTS))
        published = (Snapshot(slot, header) for slot, header in headers if header)
        return sorted(published, key=lambda snapshot: snapshot.order, reverse=True)

    def _read_header(self, slot: int) -> Header | None:
        text = _read_cell(self._header(slot))
        return _HEADER.validate_json(text, strict=True) if text else None

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
        if self._slot_being_read() == slot:  # marked at the same moment: its reader will find no header
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
        """Return the slot that a living keeper reads; the mark of a dead keeper does not count."""
        mark = self.words[Word.READING]
        return mark - 1 if mark and psutil.pid_exists(self.words[Word.KEEPER]) else None

    def publish(self, slot: int, header: Header) -> None:
        """Make a filled slot the newest snapshot.

        Raises:
            LeaseError: Another process has taken over the run.
        """
        if header.token != self.words[Word.TOKEN]:
            raise LeaseError(
                f"{self.path}: another process has taken over this run; this process ends and writes nothing"
            )
        _write_cell(self._header(slot), json.dumps(asdict(header)).encode())

    def clear(self) -> None:
        """Erase the headers of all slots."""
        for slot in range(SLOTS):
            _write_cell(self._header(slot), None)

    @property
    def fault(self) -> str:
        """The text about the keeper's last failed write; empty if there was none."""
        return _read_cell(self._map[FAULT_AT:PAGE]).decode()

    def report_fault(self, text: str) -> None:
        """Store a text about a failed write, for the trainer to show."""
        _write_cell(self._map[FAULT_AT:PAGE], text.encode()[:1500].decode(errors="ignore").encode())
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
    return [folder for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())) if folder.is_dir()]


def _name(run: Path) -> str:
    return f"lora_kit-{os.getuid()}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]}"


def folder_of(run: Path) -> Path | None:
    """Return the folder of a run's region; None if there is none. Folders of other users are ignored."""
    for parent in _parent_folders():
        folder = parent / _name(run)
        if (folder / REGION).is_file() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
            return folder
    return None


def open_region(run: Path) -> Region | None:
    """Open a run's region for reading and writing; None if there is none."""
    folder = folder_of(run)
    if folder is None:
        return None
    region = Region(folder / REGION)
    return region if region.words[Word.MAGIC] == MAGIC else None


def create_region(run: Path, payload_bytes: int) -> Region:
    """Return a run's region: the existing region if its size is right, else a new region in /dev/shm or on local disk.

    Every byte is written now, so that a full memory or disk shows at the start and not in the middle of a run.

    Raises:
        CheckpointError: Neither shared memory nor the temporary folder has enough space.
    """
    region = open_region(run)
    if region is not None and region.payload_bytes == payload_bytes:
        return region
    discard(run)
    problems = []
    for parent in _parent_folders():
        folder = parent / _name(run)
        try:
            folder.mkdir(mode=0o700)
            _allocate(folder / REGION, payload_bytes)
            return Region(folder / REGION)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            problems.append(f"{parent}: {error.strerror}")
    needed = SLOTS * payload_bytes / 1e9
    raise CheckpointError(
        f"live region: {needed:.2f} GB are needed in shared memory or in the temporary folder, and neither has them "
        f"({'; '.join(problems)}); free that much, or set TMPDIR to a folder on a larger local disk"
    )


def _allocate(path: Path, payload_bytes: int) -> None:
    """Write a region of zeros. The file gets its name when it is complete."""
    partial = path.with_suffix(".partial")
    remaining, zeros = PAGE + SLOTS * (HEADER_BYTES + payload_bytes), bytes(1 << 22)
    with partial.open("xb") as file:
        first = np.zeros(PAGE // 8, np.uint64)
        first[Word.MAGIC], first[Word.PAYLOAD] = MAGIC, payload_bytes
        remaining -= file.write(first.tobytes())
        while remaining:
            remaining -= file.write(zeros[:remaining])
    partial.rename(path)


def discard(run: Path) -> None:
    """Delete a run's region, even if it is incomplete."""
    for parent in _parent_folders():
        shutil.rmtree(parent / _name(run), ignore_errors=True)


def delete_orphans() -> None:
    """Delete this user's regions whose run folder no longer exists; a crashed run's region stays for its resume."""
    for parent in _parent_folders():
        for folder in parent.glob(f"lora_kit-{os.getuid()}-*"):
            job = read_job(folder)
            if job is not None and not Path(job.run).is_dir():
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class JobFile:
    """The content of job.json beside a region: everything that is needed to turn its snapshots into checkpoints.

    Attributes:
        run: The absolute path of the run's folder.
        shapes: The adapter's tensors in the order in which they lie in a slot.
        adapter_config: The text of adapter_config.json.
        facts: The part of the manifest that is the same for every step.
        every_seconds: The longest time between two checkpoints.
        keep: How many of the newest checkpoints stay.
        keep_every: Checkpoints whose step is a multiple of this stay too.
        best: Whether the checkpoint with the lowest held-out loss stays too.
    """

    run: str
    shapes: dict[str, tuple[int, ...]]
    adapter_config: str
    facts: RunFacts
    every_seconds: float
    keep: int
    keep_every: int | None
    best: bool


_JOB = TypeAdapter(JobFile)


def write_job(region: Region, job: JobFile) -> None:
    """Write job.json beside a region, in one rename."""
    write_atomically(region.path.with_name(JOB), json.dumps(asdict(job)))


def read_job(folder: Path) -> JobFile | None:
    """Return the content of job.json in a region's folder; None when it is missing or not as `write_job` writes it."""
    try:
        return _JOB.validate_json((folder / JOB).read_bytes(), strict=True)
    except (FileNotFoundError, ValueError):
        return None


def files_of(job: JobFile, payload: memoryview) -> dict[str, list[bytes | memoryview]]:
    """Return the content of a checkpoint's files, pieces in order, without a copy of a tensor."""
    weights, headers = len(payload) // 3, headers_of(job.shapes)
    return {
        ADAPTER: [headers[ADAPTER], payload[:weights]],
        ADAPTER_CONFIG: [job.adapter_config.encode()],
        OPTIMIZER: [headers[OPTIMIZER], payload[weights:]],
    }


@dataclass(frozen=True)
class Live:
    """A snapshot that a run can resume from like a checkpoint; its manifest lists no files.

    Attributes:
        path: The region's file.
        slot: The slot's index.
        shapes: The adapter's tensors in the order in which they lie in the slot.
    """

    path: Path
    slot: int
    shapes: Mapping[str, Sequence[int]]
    manifest: Manifest

    @property
    def step(self) -> int:
        """The step after which the snapshot was published."""
        return self.manifest.progress.step

    def state(self) -> tuple[Tensors, Tensors, Tensors]:
        """Return the weights and the two moments, by PEFT's names."""
        flat = np.frombuffer(Region(self.path).payload(self.slot), np.float32).copy()
        weights, first, second = (split(part, self.shapes) for part in np.split(flat, 3))
        return weights, first, second


def newest(run: Path, run_id: str) -> tuple[Live | None, list[str]]:
    """Return a run's newest valid live snapshot, and a message about each newer snapshot that is damaged."""
    region, problems = open_region(run), list[str]()
    job = read_job(region.path.parent) if region else None
    if region is None or job is None or job.facts.run_id != run_id:
        return None, []
    for snapshot in region.snapshots():
        if region.is_valid(snapshot):
            facts = replace(job.facts, fencing_token=snapshot.header.token)
            return Live(region.path, snapshot.slot, job.shapes, Manifest(facts, snapshot.header.progress, {})), problems
        problems.append(f"{region.path}: the live snapshot of step {snapshot.step} is damaged, so it is not used")
    return None, problems
