"""The keeper: turns live snapshots into checkpoints, even if the training process has died. It imports no torch.

It polls the live region a hundred times a second and writes one checkpoint at a time, in a thread, so that slow storage
delays neither a step nor a signal. Every due step becomes a checkpoint; also, at least every
`checkpoint.every_seconds`, the newest step does. Under `lora-kit train` the keeper is the parent of the training
processes. Under other launchers the training process starts the keeper as its child; if the training process dies, the
keeper writes the newest snapshot and exits.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.runs import live, store
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import BEAT_SECONDS, FILE, Lease
from lora_kit.runs.live import JobFile, Phase, Region, Snapshot, Word
from lora_kit.supervise.stopping import STOP_SIGNALS

POLL_SECONDS = 0.01
RETRY_SECONDS = 5.0  # after a failed write
LAST_TRIES = 3  # attempts at the write that ends a run


class Keeper:
    """Polls one run's live region and writes its checkpoints; the trainer reads the result in the region's counters."""

    def __init__(self, run: Path, lease: Lease) -> None:
        self.run, self.lease, self.journal = run, lease, Journal(run)
        self.region: Region | None = None
        self._job: JobFile | None = None
        self._job_seen: tuple[int, int] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._written_at = self._not_before = time.monotonic()
        self._written = (0, 0)
        self._late = self._fenced = False
        self._beats, self._beat_at = 0, 0.0
        self._end: int | None = None

    def poll(self) -> None:
        """Look at the region once, and start a write if a snapshot is wanted and no write is running."""
        self._heartbeat()
        self._attach()
        if self.region is None or self._job is None or self._fenced or (self._writing and not self._writing.done()):
            return
        snapshot = self._wanted(self.region, self._job.every_seconds)
        if snapshot is not None:
            self._writing = self._writer.submit(self._write, self.region, self._job, snapshot)

    def _heartbeat(self) -> None:
        if time.monotonic() - self._beat_at > BEAT_SECONDS:
            self._beats, self._beat_at = self._beats + 1, time.monotonic()
            with contextlib.suppress(OSError):
                self.lease.beat(self._beats)

    def _attach(self) -> None:
        """Open the region when the trainer has written its job.json, and again when that file was replaced."""
        folder = self.region.path.parent if self.region else live.folder_of(self.run)
        seen = None if folder is None else _identity(folder / live.JOB)
        if seen == self._job_seen:
            return
        job = live.read_job(folder) if folder else None
        if job is None or job.facts.fencing_token != self.lease.token:
            self.region, self._job_seen = None, None
            return
        self.region, self._job, self._job_seen = live.open_region(self.run), job, seen
        if self.region is not None:
            self.region.words[Word.KEEPER], self.region.words[Word.READING] = os.getpid(), 0

    def _wanted(self, region: Region, every_seconds: float) -> Snapshot | None:
        published, now = region.snapshots(), time.monotonic()
        handled = region.words[Word.HANDLED]
        due = [snapshot for snapshot in published if snapshot.header.due and snapshot.header.sequence > handled]
        if due:
            return due[-1]
        old = now - self._written_at >= every_seconds or self._late
        if not published or not old or now < self._not_before or published[0].order <= self._written:
            return None
        return None if published[0].header.progress.skipped else published[0]

    def _write(self, region: Region, job: JobFile, snapshot: Snapshot) -> None:
        """Write a snapshot as a checkpoint and prune older checkpoints; report a failure to the trainer."""
        region.words[Word.READING] = snapshot.slot + 1
        began, sequence = time.monotonic(), snapshot.header.sequence
        try:
            if snapshot not in region.snapshots():
                return
            if not region.is_valid(snapshot):
                raise CheckpointError(
                    f"{region.path}: the live snapshot of step {snapshot.step} is damaged, so it is not written"
                )
            facts = replace(job.facts, fencing_token=self.lease.token)
            files = live.files_of(job, region.payload(snapshot.slot))
            made = store.commit(self.run, files, facts, snapshot.header.progress, ours=self.lease.is_ours)
            store.prune(self.run, job.keep, keep_every=job.keep_every, best=job.best)
            self._written, self._late = snapshot.order, False
            region.words[Word.COMMITTED] = sequence
            seconds = round(time.monotonic() - began, 4)
            self.journal.event("checkpoint", step=snapshot.step, bytes=made.size, seconds=seconds)
        except (CheckpointError, LeaseError, OSError) as error:
            self._fenced = isinstance(error, LeaseError)
            self._late, self._not_before = True, time.monotonic() + RETRY_SECONDS
            region.report_fault(str(error))
            with contextlib.suppress(OSError):  # the log may be on the same full disk
                self.journal.event("fault", step=snapshot.step, what=str(error))
        finally:
            region.words[Word.HANDLED] = max(region.words[Word.HANDLED], sequence)
            region.words[Word.READING] = 0
            self._written_at = time.monotonic()

    def flush(self) -> int:
        """Write the newest live snapshot now; return the step of the newest checkpoint, 0 if there is none."""
        for _ in range(LAST_TRIES):
            if self._writing is not None:
                self._writing.result()
            newest = self._unwritten()
            if newest is None or self._fenced:
                break
            self._writing = self._writer.submit(self._write, *newest)
        durable = store.find(self.run).latest
        return durable.step if durable else 0

    def _unwritten(self) -> tuple[Region, JobFile, Snapshot] | None:
        """Return the newest valid live snapshot, also of an earlier process, if it is newer than all checkpoints."""
        durable = store.find(self.run).latest
        run_id = durable.manifest.run.run_id if durable else self.journal.run_id()
        region = live.open_region(self.run)
        job = live.read_job(region.path.parent) if region else None
        if region is None or job is None or job.facts.run_id != run_id:
            return None
        order = durable.manifest.order if durable else (0, 0)
        newest = next((snapshot for snapshot in region.snapshots() if region.is_valid(snapshot)), None)
        if newest is None or (newest.header.token, newest.step) <= order:
            return None
        return region, job, newest

    def end(self) -> int:
        """Write the newest snapshot and delete the region if that worked; return the step of the newest checkpoint.

        Later calls only return the step. If the disk is full, the snapshot stays live for the next start.
        """
        if self._end is not None:
            return self._end
        step = self._end = self.flush()
        if not self._fenced and self._unwritten() is None:
            live.discard(self.run)
        self._writer.shutdown()
        durable = store.find(self.run).latest
        if durable and self.journal.last_step() < step:  # the trainer died before it logged the line
            self.journal.metrics(json.loads(durable.manifest.progress.line))
        return step


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def start_keeper(run: Path) -> "subprocess.Popen[bytes]":
    """Start a keeper as the child of this training process, for a run that `lora-kit train` did not start.

    The keeper gets its own session, so that Ctrl-C in the terminal does not reach it.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "lora_kit.supervise.keeper", str(run), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def run_keeper(run: Path, trainer: int) -> None:
    """Be the keeper of a training process until it has finished or died.

    Args:
        run: The run's folder.
        trainer: The process id of the training process. This process may already have another parent, if the training
            process has died.
    """
    stop = list[int]()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: stop.append(received))
    region = live.open_region(run)
    job = live.read_job(region.path.parent) if region else None
    if region is None or job is None:
        return
    keeper = Keeper(run, Lease(run / FILE, job.facts.fencing_token))
    flushed = False
    while True:
        keeper.poll()
        if stop:
            region.words[Word.STOP] = stop[0]
        if region.words[Word.STOP] and not flushed:
            keeper.flush()
            flushed = True
        if os.getppid() != trainer or region.words[Word.PHASE] == Phase.ENDED:
            break
        time.sleep(POLL_SECONDS)
    died, step = os.getppid() != trainer, keeper.end()
    if died and region.words[Word.STOP] and keeper.lease.is_ours():
        keeper.journal.event("stopped", step=step)


if __name__ == "__main__":
    run_keeper(Path(sys.argv[1]), int(sys.argv[2]))
