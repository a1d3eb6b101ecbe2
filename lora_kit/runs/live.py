"""The live station: every finished step's state in shared memory, where it outlives the process that trained it.

A region is one mapped file, reserved in full when it is made: a page of words and three slots. The trainer fills the
oldest slot that nobody needs and publishes its header last, so the newest slot is whole at every moment. The keeper
marks the slot that it reads. Nothing is locked and nobody waits, but for a due checkpoint that is still unwritten.
"""

import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import xxhash

from lora_kit.runs.store import ADAPTER, ADAPTER_CONFIG, OPTIMIZER, Tensors, headers_of, split
from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.files import write_whole

MAGIC = int.from_bytes(b"lorakit1", "little")
PAGE, HEADER_BYTES, SLOTS = 4096, 65536, 3
FAULT_AT = 2048  # in the first page: what the keeper could not write
CHUNK = 1 << 20  # copied and hashed while it is in the cache
REGION, JOB = "region", "job.json"


class Word(IntEnum):
    """The first page's numbers, each with one writer: the trainer up to STOP, the keeper from READING on."""

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
    """What the trainer is doing; where no step is to be expected, as in an upload at the end, it counts as loading."""

    LOADING = 0
    TRAINING = 1
    ENDED = 2


@dataclass(frozen=True)
class Snapshot:
    """A published slot: where it is, and its header.

    The header has the fencing token and `sequence`, which never goes back, the `step`, the payload's `checksum`, if
    a checkpoint of exactly this step is `due`, and `moving`: the manifest's parts that change from step to step.
    """

    slot: int
    header: dict[str, Any]

    @property
    def order(self) -> tuple[int, int]:
        """What decides which of two is newer."""
        return self.header["token"], self.header["sequence"]

    @property
    def step(self) -> int:
        """How many steps were finished."""
        return int(self.header["moving"]["step"])


class Region:
    """A mapped region; words and slots are shared with every process that opened it."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = memoryview(mmap.mmap(file.fileno(), 0))
        self.path = path
        self.words = self._map[:FAULT_AT].cast("Q")
        self.payload_bytes = self.words[Word.PAYLOAD]

    @property
    def whole(self) -> memoryview:
        """All of its memory."""
        return self._map

    def _header(self, slot: int) -> memoryview:
        return self._map[PAGE + slot * HEADER_BYTES :][:HEADER_BYTES]

    def payload(self, slot: int) -> memoryview:
        """Return a slot's bytes: weights, then the two moments, fp32."""
        return self._map[PAGE + SLOTS * HEADER_BYTES + slot * self.payload_bytes :][: self.payload_bytes]

    def snapshots(self) -> list[Snapshot]:
        """Return what is published, newest first."""
        headers = ((slot, _read_cell(self._header(slot))) for slot in range(SLOTS))
        return sorted((Snapshot(slot, one) for slot, one in headers if one), key=lambda one: one.order, reverse=True)

    def verifies(self, snapshot: Snapshot) -> bool:
        """Return whether a slot still holds the bytes that its header was published for."""
        same = checksum(self.payload(snapshot.slot)) == snapshot.header["checksum"]
        return same and _read_cell(self._header(snapshot.slot)) == snapshot.header

    def claim(self, waiting: Callable[[], None]) -> int:
        """Return a slot to fill, its header made invalid; `waiting` is called while every slot is needed."""
        while (slot := self._free()) is None:
            waiting()
            time.sleep(0.001)
        _write_cell(self._header(slot), None)
        if self._being_read() == slot:  # marked in the same moment: its reader finds the header gone
            return self.claim(waiting)
        return slot

    def _free(self) -> int | None:
        """Return the oldest slot that is neither the newest, nor being read, nor due and unwritten."""
        published = self.snapshots()
        handled, reading = self.words[Word.HANDLED], self._being_read()
        needed = {one.slot for one in published if one.header["due"] and one.header["sequence"] > handled}
        needed |= {one.slot for one in published[:1]}
        if reading is not None:
            needed.add(reading)
        empty = set(range(SLOTS)) - {one.slot for one in published}
        oldest_first = [*sorted(empty), *(one.slot for one in reversed(published))]
        return next((slot for slot in oldest_first if slot not in needed), None)

    def _being_read(self) -> int | None:
        """Return the slot that a keeper reads; what a dead one has marked is nobody's."""
        mark = self.words[Word.READING]
        return mark - 1 if mark and psutil.pid_exists(self.words[Word.KEEPER]) else None

    def publish(self, slot: int, header: Mapping[str, Any]) -> None:
        """Make a filled slot the newest snapshot.

        Raises:
            LeaseError: Another job has taken the run over.
        """
        if header["token"] != self.words[Word.TOKEN]:
            raise LeaseError(f"{self.path}: another job has taken this run over; this one ends without a trace")
        _write_cell(self._header(slot), header)

    def clear(self) -> None:
        """Forget every snapshot."""
        for slot in range(SLOTS):
            _write_cell(self._header(slot), None)

    @property
    def fault(self) -> str:
        """What the keeper could not write; empty when all is well."""
        return str((_read_cell(self._map[FAULT_AT:PAGE]) or {}).get("fault", ""))

    def tell_fault(self, text: str) -> None:
        """Leave word of a failed write for the trainer to show."""
        _write_cell(self._map[FAULT_AT:PAGE], {"fault": text[:1500]})
        self.words[Word.FAULTS] += 1


def _write_cell(cell: memoryview, content: Mapping[str, Any] | None) -> None:
    """Replace a cell's content; a reader sees the old, nothing or the new, since the length comes last."""
    words = cell[:16].cast("Q")
    words[0] = 0
    if content is not None:
        text = json.dumps(content).encode()
        if len(text) > len(cell) - 16:
            raise CheckpointError(f"live region: {len(text):,} bytes of header, there is room for {len(cell) - 16:,}")
        cell[16 : 16 + len(text)] = text
        words[1] = xxhash.xxh3_64_intdigest(text)
        words[0] = len(text)


def _read_cell(cell: memoryview) -> dict[str, Any] | None:
    length, digest = cell[:16].cast("Q")
    text = bytes(cell[16 : 16 + length]) if 0 < length <= len(cell) - 16 else b""
    if not text or xxhash.xxh3_64_intdigest(text) != digest:
        return None
    content: dict[str, Any] = json.loads(text)
    return content


def checksum(payload: memoryview) -> int:
    """Return what a header says of its slot's bytes."""
    return xxhash.xxh3_64_intdigest(payload)


def copy_hashed(target: memoryview, sources: Sequence[memoryview]) -> int:
    """Copy buffers one after the other and return the checksum of them all; other threads run meanwhile."""
    digest, at, written = xxhash.xxh3_64(), 0, np.frombuffer(target, np.uint8)
    for source in sources:
        whole = np.frombuffer(source, np.uint8)
        for begin in range(0, len(whole), CHUNK):
            piece = whole[begin : begin + CHUNK]
            np.copyto(written[at : at + len(piece)], piece)  # numpy lets go of the interpreter, a memoryview does not
            digest.update(target[at : at + len(piece)])
            at += len(piece)
    return digest.intdigest()


def _places() -> list[Path]:
    return [place for place in (Path("/dev/shm"), Path(tempfile.gettempdir())) if place.is_dir()]


def _name(run: Path) -> str:
    return f"lora_kit-{os.getuid()}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]}"


def folder_of(run: Path) -> Path | None:
    """Return where a run's region is; None if it has none. A folder that another user made is not ours."""
    for place in _places():
        folder = place / _name(run)
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


def make_region(run: Path, payload_bytes: int) -> Region:
    """Return a run's region: the one that is there if it has the size, else a new one in /dev/shm or on local disk.

    Every byte is written now, so that a full memory or disk is found at the start and not in the middle of a run.

    Raises:
        CheckpointError: There is no room anywhere.
    """
    region = open_region(run)
    if region is not None and region.payload_bytes == payload_bytes:
        return region
    discard(run)
    problems = []
    for place in _places():
        folder = place / _name(run)
        try:
            folder.mkdir(mode=0o700)
            _reserve(folder / REGION, payload_bytes)
            return Region(folder / REGION)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            problems.append(f"{place}: {error.strerror}")
    needed = SLOTS * payload_bytes / 1e9
    raise CheckpointError(f"live region: {needed:.2f} GB of room needed, found in none of: {'; '.join(problems)}")


def _reserve(path: Path, payload_bytes: int) -> None:
    partial = path.with_suffix(".partial")
    left, zeros = PAGE + SLOTS * (HEADER_BYTES + payload_bytes), bytes(1 << 22)
    with partial.open("xb") as file:
        first = np.zeros(PAGE // 8, np.uint64)
        first[Word.MAGIC], first[Word.PAYLOAD] = MAGIC, payload_bytes
        left -= file.write(first.tobytes())
        while left:
            left -= file.write(zeros[:left])
    partial.rename(path)


def discard(run: Path) -> None:
    """Delete a run's region, also one that a kill left half reserved."""
    for place in _places():
        shutil.rmtree(place / _name(run), ignore_errors=True)


def reap_orphans() -> None:
    """Delete this user's regions whose runs are gone; a crashed run's own region waits for its resume."""
    for place in _places():
        for folder in place.glob(f"lora_kit-{os.getuid()}-*"):
            job = read_job(folder)
            if job is not None and not Path(job["run"]).is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def write_job(region: Region, job: Mapping[str, Any]) -> None:
    """Leave beside the region all that its snapshots need to become checkpoints, in one rename."""
    write_whole(region.path.with_name(JOB), json.dumps(job))


def read_job(folder: Path) -> dict[str, Any] | None:
    """Return what `write_job` left in a region's folder."""
    try:
        job: dict[str, Any] = json.loads((folder / JOB).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return job


def files_of(job: Mapping[str, Any], payload: memoryview) -> dict[str, list[bytes | memoryview]]:
    """Return the content of a checkpoint's files, pieces in order, without a copy of a tensor."""
    weights, headers = len(payload) // 3, headers_of(job["shapes"])
    return {
        ADAPTER: [headers[ADAPTER], payload[:weights]],
        ADAPTER_CONFIG: [job["adapter_config"].encode()],
        OPTIMIZER: [headers[OPTIMIZER], payload[weights:]],
    }


@dataclass(frozen=True)
class Live:
    """A snapshot that a run can go on from, as a checkpoint would be.

    Attributes:
        path: The region's.
        slot: Where in it.
        manifest: As a checkpoint's, but for `files`.
        job: What `write_job` left.
    """

    path: Path
    slot: int
    manifest: dict[str, Any]
    job: dict[str, Any]

    @property
    def step(self) -> int:
        """How many steps were finished."""
        return int(self.manifest["step"])

    def state(self) -> tuple[Tensors, Tensors, Tensors]:
        """Return the weights and the two moments, by PEFT's names."""
        flat = np.frombuffer(Region(self.path).payload(self.slot), np.float32).copy()
        weights, first, second = (split(one, self.job["shapes"]) for one in np.split(flat, 3))
        return weights, first, second


def newest(run: Path, run_id: str) -> tuple[Live | None, list[str]]:
    """Return the newest live snapshot of a run that verifies, and what is wrong with newer ones."""
    region, problems = open_region(run), list[str]()
    job = read_job(region.path.parent) if region else None
    if region is None or job is None or job["manifest"]["run_id"] != run_id:
        return None, []
    for one in region.snapshots():
        if region.verifies(one):
            manifest = job["manifest"] | one.header["moving"] | {"fencing_token": one.header["token"]}
            return Live(region.path, one.slot, manifest, job), problems
        problems.append(f"{region.path}: the live snapshot of step {one.step} does not verify")
    return None, problems
