"""The keeper: turns live snapshots into checkpoints, even if the training process has died. It imports no torch.

The keeper polls the live region, the shared memory with the newest snapshots, a hundred times a second. It writes one
checkpoint at a time, in a thread, so that slow storage delays neither a step nor a signal. Every due step becomes a
checkpoint; also, at least every `checkpoint.every_seconds`, the newest step does. Under `lora-kit train` the keeper is
the parent of the training processes. Under other launchers the training process starts the keeper as its child; if the
training process dies, the keeper writes the newest snapshot and exits. A keeper that has lost the lease raises a
LeaseError, whatever it is doing.

Of several machines only one has the process that holds the lease. On each of the others a standby keeper waits. It
writes only after its training process has ended, if nobody else has saved what is in the memory of its machine.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.runs import live, store
from lora_kit.runs.identity import own_identity
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import FILE, Fence, Heart, Lease, lost, read, take
from lora_kit.runs.live import JobFile, Phase, Region, Snapshot, Word
from lora_kit.runs.manifest import RunFacts, ScriptFacts
from lora_kit.runs.scripts import ScriptJob
from lora_kit.supervise.stopping import signals_to_hear
from lora_kit.supervise.uploads import FINISHED_SECONDS, STOPPED_SECONDS, Uploads

POLL_SECONDS = 0.01
LOOK_SECONDS = 0.1  # time between two searches for a live region
RETRY_SECONDS = 5.0  # after a failed write
STANDBY, STANDBY_SECONDS, STANDBY_LOOK_SECONDS = "standby", 60.0, 0.5
LAST_TRIES = 3  # attempts at the write that ends a run


class Keeper:
    """Polls one run's live region and writes its checkpoints; the trainer reads the result in the region's counters.

    Attributes:
        region: The run's live region; None until this process has found it. The mapping is used even if the region's
            file is removed.
    """

    def __init__(self, lease: Lease) -> None:
        self.run, self.lease, self.journal = lease.run, lease, Journal(lease.run, Fence(lease))
        self.region: Region | None = None
        self._heart = Heart(lease)
        self._job: JobFile | ScriptJob | None = None
        self._job_seen = 0
        self._removed = False
        self._look_at = 0.0
        self._writer: Thread | None = None
        self._written_at = self._not_before = time.monotonic()
        self._written = (0, 0)
        self._late = False
        self._end: int | None = None
        self._uploads: Uploads | None = None
        self._look()

    def poll(self) -> None:
        """Look at the live region once, and start a write if a snapshot is wanted and no write is running.

        Raises:
            LeaseError: The lease is lost.
            CheckpointError: The process trains, but nothing can be written without job.json, which is damaged.
        """
        self._require()
        self._look()
        job = self._job
        if self.region is not None and job is None and self.region.words[Word.PHASE] == Phase.TRAINING:
            live.read_job(self.region)
        if self.region is None or job is None or job.facts.fencing_token != self.lease.token or self._is_writing():
            return
        if self._uploads is not None:
            self._uploads.poll()
        elif isinstance(job, JobFile) and job.remote is not None:
            self._uploads = Uploads(self.lease, job.remote, job.keep, on_upload=self._uploaded, on_fault=self.tell)
        snapshot = self._wanted(self.region, job.every_seconds)
        if snapshot is not None:
            self._write_in_thread(self.region, job, snapshot)

    def _require(self) -> None:
        """Raise a LeaseError if the heartbeat's thread or a write has noticed that the lease is lost."""
        if self._heart.loss:
            raise lost(self.run, self._heart.loss)

    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _write_in_thread(self, region: Region, job: JobFile | ScriptJob, snapshot: Snapshot) -> None:
        """Start to write. The thread does not keep this process alive: a start that lost its lease ends at once."""
        self._writer = Thread(target=self._write, args=(region, job, snapshot), name="checkpoint", daemon=True)
        self._writer.start()

    def _look(self) -> None:
        """Find the run's live region, again if it was deleted or replaced, and read job.json if that has changed."""
        gone = self.region is None or self.region.words[Word.MAGIC] != live.MAGIC or self.region.is_removed()
        if gone and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_SECONDS
            found = live.open_region(self.run, run_id=self.lease.record.run_id, most=self.lease.token)
            if found is not None:
                self.region, self._job, self._job_seen, self._removed = found, None, 0, False
                found.keeper = own_identity()
            elif self.region is not None and self.region.words[Word.MAGIC] == live.MAGIC and not self._removed:
                self._removed = True
                self.tell(
                    f"{self.region.path}: removed while the run uses it. Checkpoints are still written from its "
                    "memory, but steps that are newer than the last checkpoint are lost if this start is killed"
                )
        if self.region is not None and self.region.words[Word.JOB] != self._job_seen:
            self._job_seen = self.region.words[Word.JOB]
            try:
                self._job = live.read_job(self.region)
            except CheckpointError as error:
                self.tell(str(error))

    def prepare_restart(self) -> None:
        """Prepare for new training processes.

        They cannot find a region whose file was removed, so the newest snapshot in such a region becomes a checkpoint.

        Raises:
            LeaseError: The lease is lost.
        """
        if self.region is not None:
            if self.region.is_removed():
                self.flush()
            self.region.words[Word.PHASE] = Phase.LOADING

    def tell(self, what: str, **facts: int) -> None:
        """Report a fault to the trainer, which shows it, and in the event log."""
        if self.region is not None:
            self.region.report_fault(what)
        with contextlib.suppress(OSError):  # the log may be on the same full disk
            self.journal.event("fault", **facts, what=what)

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

    def _write(self, region: Region, job: JobFile | ScriptJob, snapshot: Snapshot) -> None:
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
            facts: RunFacts | ScriptFacts = replace(job.facts, fencing_token=self.lease.token)
            files = live.files_of(job, region.payload(snapshot.slot))
            require = self.lease.require_now
            made = store.commit(self.run, files, facts, snapshot.header.progress, require=require)
            store.prune(self.run, job.keep, keep_every=job.keep_every, best=job.best, require=require)
            self._written, self._late = snapshot.order, False
            region.words[Word.COMMITTED] = sequence
            seconds = round(time.monotonic() - began, 4)
            self.journal.event("checkpoint", step=snapshot.step, bytes=made.size, seconds=seconds)
            if self._uploads is not None:
                self._uploads.notify()
        except LeaseError:
            self._heart.loss = self.lease.loss()
        except Exception as error:
            self._late, self._not_before = True, time.monotonic() + RETRY_SECONDS
            with contextlib.suppress(LeaseError):
                self.tell(_cause(error), step=snapshot.step)
        finally:
            region.words[Word.HANDLED] = max(region.words[Word.HANDLED], sequence)
            region.words[Word.READING] = 0
            self._written_at = time.monotonic()

    def _uploaded(self, **facts: Any) -> None:
        with contextlib.suppress(OSError, LeaseError):
            self.journal.event("uploaded", **facts)

    def finish_uploads(self, seconds: Callable[[], float], tick: Callable[[str], object] = lambda text: None) -> str:
        """Wait for the last upload to `checkpoint.remote`, at most as many seconds as `seconds` returns.

        Returns:
            A message about what is not uploaded yet; it is also reported as a fault. Empty if nothing is missing.
        """
        left = "" if self._uploads is None else self._uploads.finish(seconds, tick)
        self._uploads = None
        if left:
            self.tell(left)
        return left

    def flush(self) -> int:
        """Write the newest live snapshot now; return the step of the newest checkpoint, 0 if there is none.

        Raises:
            LeaseError: The lease is lost.
        """
        for _ in range(LAST_TRIES):
            while self._writer is not None and self._writer.is_alive():
                self._require()
                self._writer.join(POLL_SECONDS)
            self.lease.require()
            newest = self._unwritten()
            if newest is None:
                break
            self._write_in_thread(*newest)
        durable = store.find(self.run).latest
        return durable.step if durable else 0

    def _unwritten(self) -> tuple[Region, JobFile | ScriptJob, Snapshot] | None:
        """Return the newest valid live snapshot, also of an earlier start, if it is newer than all checkpoints."""
        self._look()
        region, job, durable = self.region, self._job, store.find(self.run).latest
        if region is None or job is None:
            return None
        order = durable.manifest.order if durable else (0, 0)
        newest = next((snapshot for snapshot in region.snapshots() if region.is_valid(snapshot)), None)
        if newest is None or (newest.header.token, newest.step) <= order:
            return None
        return region, job, newest

    def end(self) -> int:
        """Write the newest snapshot and delete the region if that worked; return the step of the newest checkpoint.

        Later calls only return the step. If the disk is full, the snapshot stays live for the next start.

        Raises:
            LeaseError: The lease is lost; nothing was written.
        """
        if self._end is not None:
            return self._end
        step = self._end = self.flush()
        unwritten = self._unwritten() is not None or (self._job is None and self.region and self.region.snapshots())
        if self.region is not None and not unwritten:
            live.discard(self.region)
        durable = store.find(self.run).latest
        if durable and self.journal.last_step() < step:  # the trainer died before it logged the line
            self.journal.metrics(json.loads(durable.manifest.progress.line))
        return step


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, (CheckpointError, OSError)) else f"{type(error).__name__}: {error}"


def start_keeper(lease: Lease) -> "subprocess.Popen[bytes]":
    """Start a keeper as the child of this training process, for a run that `lora-kit train` did not start.

    The keeper gets its own session, so that Ctrl-C in the terminal does not reach it.
    """
    return _start(lease)


def start_standby(lease: Lease) -> "subprocess.Popen[bytes]":
    """Start a standby keeper as the child of this training process, which does not hold the lease."""
    return _start(lease, STANDBY)


def _start(lease: Lease, *more: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "lora_kit.supervise.keeper", lease.to_json(), str(os.getpid()), *more],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def run_keeper(lease: Lease, trainer: int) -> None:
    """Be the keeper of a training process until it has finished or died.

    Args:
        lease: The lease, which the training process holds.
        trainer: The process id of the training process. This process may already have another parent, if the training
            process has died.

    Raises:
        LeaseError: The lease is lost.
    """
    stop = list[int]()
    for number in signals_to_hear():
        signal.signal(number, lambda received, _: stop.append(received))
    keeper = Keeper(lease)
    if keeper.region is None:
        sys.exit(f"{lease.run}: the live region of this run cannot be found")
    try:
        _keep(keeper, trainer, stop)
    except LeaseError:
        raise
    except Exception as error:  # the keeper has no terminal of its own; the trainer shows why the keeper has ended
        keeper.region.report_fault(_cause(error))
        raise


def run_standby(lease: Lease, trainer: int) -> None:
    """Be the standby keeper of a training process until nothing in its live region is left to be saved.

    Once the training process has ended, a new start has `STANDBY_SECONDS` to come and to find the snapshot. After that
    this process acquires the lease, as soon as its holder has released it or counts as dead, and writes the snapshot.

    Args:
        lease: The lease, which a process on another machine holds.
        trainer: The process id of the training process.
    """
    for number in signals_to_hear():
        signal.signal(number, signal.SIG_IGN)
    region = live.open_region(lease.run, run_id=lease.record.run_id, most=lease.token)
    while region is not None and os.getppid() == trainer and region.words[Word.PHASE] != Phase.ENDED:
        time.sleep(LOOK_SECONDS)
    del region  # a start copies a region that another process uses, and takes over the others
    patience = time.monotonic() + STANDBY_SECONDS
    while _has_unsaved(lease):
        if time.monotonic() > patience:
            with contextlib.suppress(LeaseError, OSError):  # the holder is alive, or the disk cannot be reached
                _save(lease)
        time.sleep(STANDBY_LOOK_SECONDS)


def _has_unsaved(lease: Lease) -> bool:
    """Return whether the region of the start with this lease has a snapshot that nobody has saved or taken over."""
    with contextlib.suppress(CheckpointError, OSError):
        record = read(lease.run / FILE)
        if record is None or record.token != lease.token:
            return False
    region = live.open_region(lease.run, run_id=lease.record.run_id, most=lease.token)
    if region is None or region.words[Word.TOKEN] != lease.token:
        return False
    if live.is_written(region, lease.run):
        live.discard(region)
        return False
    return True


def _save(lease: Lease) -> None:
    """Acquire the lease after its holder, and write the newest snapshot, unless a start has begun on this machine.

    Raises:
        LeaseError: The holder is alive.
    """
    if live.is_starting(lease.run, lease.record.run_id):
        return
    held = take(lease.run, run_id=lease.record.run_id, above=lease.token)
    if not live.is_starting(lease.run, lease.record.run_id):
        live.adopt(held)
        Keeper(held).end()
    held.release()


def _keep(keeper: Keeper, trainer: int, stop: list[int]) -> None:
    flushed = False
    while keeper.region is not None:
        keeper.poll()
        words = keeper.region.words
        if stop:
            words[Word.STOP] = stop[0]
        if words[Word.STOP] and not flushed:
            keeper.flush()
            flushed = True
        if os.getppid() != trainer or words[Word.PHASE] == Phase.ENDED:
            break
        time.sleep(POLL_SECONDS)
    died, step = os.getppid() != trainer, keeper.end()
    stopped = bool(words[Word.STOP]) or died
    keeper.finish_uploads(lambda: STOPPED_SECONDS if stopped or stop else FINISHED_SECONDS)
    if died and words[Word.STOP]:
        keeper.journal.event("stopped", step=step)


if __name__ == "__main__":
    try:
        run = run_standby if STANDBY in sys.argv[3:] else run_keeper
        run(Lease.borrowed_from(sys.argv[1]), int(sys.argv[2]))
    except LeaseError as error:
        sys.exit(error.exit_code)
