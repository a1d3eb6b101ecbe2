"""Publish every finished step's state to the live region, shared memory for snapshots, while the next step computes.

Weights and moments do not change between two optimizer steps, so a thread copies them while forward and backward run.
On CUDA a side stream copies them straight into the registered memory of the region. The next optimizer step waits for
the copy. The line of a step in the log waits until its snapshot is published, so a step that metrics.jsonl shows cannot
be lost with the process.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lora_kit.errors import CheckpointError, LaunchError, LoraKitError
from lora_kit.model.adapter import saved_config
from lora_kit.runs import live
from lora_kit.runs.identity import process_state
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import Fence, Lease
from lora_kit.runs.live import Header, JobFile, Live, Phase, Region, Word
from lora_kit.runs.manifest import StepFacts
from lora_kit.runs.resume import OpenRun
from lora_kit.runs.scripts import ScriptJob
from lora_kit.supervise import oom
from lora_kit.supervise.keeper import start_keeper, start_standby
from lora_kit.supervise.stopping import StopRequest, name_of
from lora_kit.training.job import Job
from lora_kit.views.console import Console

FEW_BUFFERS = 8  # up to so many are copied and hashed together, while they are in the CPU's cache
MOST_KEEPERS = 3  # after so many keepers in a row without a checkpoint, the run ends instead of starting another


class Publishable(Protocol):
    """A state that training changes."""

    @property
    def kept(self) -> Sequence[Tensor]:
        """The flat buffers that a snapshot contains, in its order; their number and their sizes never change."""
        ...

    @property
    def on_cuda(self) -> bool:
        """Whether buffers are in the memory of a GPU."""
        ...

    def assert_views(self) -> None:
        """Check that the buffers are still what the model trains."""
        ...


class Publisher:
    """Writes the live region of a run, on one process of each machine. On other processes, which have no job file, it
    does nothing.

    Only the snapshots of the main process become checkpoints. A region on another machine is for a start after the loss
    of the main process's machine.

    Args:
        lease: The run's lease.
        state: The state to publish.
        job_file: The facts that are needed to turn a snapshot into a checkpoint; None on a process that publishes
            nothing.
        keep: Whether the run resumes from a live snapshot; otherwise the region is cleared.
        is_main: Whether this is the main process.
    """

    def __init__(
        self, lease: Lease, state: Publishable, job_file: JobFile | ScriptJob | None, *, keep: bool, is_main: bool
    ) -> None:
        self._lease, self._fence, self._state = lease, Fence(lease), state
        self._region: Region | None = None
        self._left: Region | None = None  # what `grow` has replaced
        self._keeper: subprocess.Popen[bytes] | None = None
        self._keepers_ended, self._committed = 0, 0  # keepers that ended since this snapshot was committed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._pending: Future[StepFacts] | None = None
        self._copy_queued = threading.Event()
        self._registered = False
        self._faults, self._replaced = 0, ""
        self._is_main = is_main
        self._starts_keeper = not lease.borrowed  # the parent of this process is not the keeper
        if job_file is not None:
            self._open(job_file, keep=keep)
        self._oom_score = oom.offer_to_the_oom_killer(os.getpid()) if self._starts_keeper else None

    def _open(self, job_file: JobFile | ScriptJob, *, keep: bool) -> None:
        self._lease.require()
        region = live.create_region(self._lease, sum(buffer.nbytes for buffer in self._state.kept))
        words, self._token = region.words, self._lease.token
        self._sequence = max([words[Word.HANDLED], *(snapshot.header.sequence for snapshot in region.snapshots())])
        if not keep:
            region.clear()
        words[Word.TOKEN], words[Word.STOP], words[Word.FAULTS] = self._token, 0, 0
        words[Word.PHASE] = Phase.LOADING
        live.write_job(region, job_file)
        self._use(region, job_file)
        if self._starts_keeper:
            self._keeper = start_keeper(self._lease) if self._is_main else start_standby(self._lease)

    def _use(self, region: Region, job_file: JobFile | ScriptJob) -> None:
        self._region, self._job_file = region, job_file
        self._slots = [region.payload(slot) for slot in range(live.SLOTS)]
        if self._state.on_cuda:
            self._side_stream, self._registered = torch.cuda.Stream(), _register(region.memory)

    def grow(self, state: Publishable, job_file: JobFile | ScriptJob) -> None:
        """Publish a state that is larger from now on. The region so far is deleted after the next publication."""
        if self._region is None:
            return
        self.wait_published()
        if self._registered:
            _unregister(self._region.memory)
        self._state, self._left = state, self._region
        region = live.create_successor(self._lease, self._region, sum(buffer.nbytes for buffer in state.kept))
        live.write_job(region, job_file)
        self._use(region, job_file)

    @property
    def region(self) -> Region | None:
        """The live region; None on a process that publishes nothing."""
        return self._region

    def change_job(self, job_file: JobFile | ScriptJob) -> None:
        """Give the keeper other facts for the next checkpoints; the layout of a snapshot stays the same."""
        if self._region is not None:
            live.write_job(self._region, job_file)
            self._job_file = job_file

    @property
    def stop_requested(self) -> bool:
        """Whether a stop signal is noted in the live region; always False on a process that publishes nothing."""
        return self._region is not None and self._region.words[Word.STOP] != 0

    def has(self, state: Live) -> bool:
        """Return whether this process publishes nothing, or this snapshot is in the shared memory of its machine."""
        published = self._region.snapshots() if self._region else []
        orders = [(snapshot.header.token, snapshot.step) for snapshot in published]
        return self._region is None or state.manifest.order in orders

    def heartbeat(self) -> None:
        """Show the keeper that this process is training and has not stopped."""
        if self._region is not None:
            self._region.words[Word.PHASE] = Phase.TRAINING
            self._region.beat()

    def expect_no_steps(self) -> None:
        """Tell the keeper that no steps follow, so that a long silence, as in an upload, does not count as a hang."""
        if self._region is not None:
            self._region.words[Word.PHASE] = Phase.LOADING

    def publish(self, facts: Callable[[], StepFacts], *, due: bool) -> None:
        """Start to publish the state as it is now, once the publication before it has ended.

        Args:
            facts: Returns the step's part of the manifest; called in another thread, may wait for the device.
            due: Whether a checkpoint of exactly this step must be written, if this is the main process.
        """
        if self._region is None:
            return
        self.wait_published()
        self._state.assert_views()
        self._copy_queued.clear()
        if self._state.on_cuda:
            self._side_stream.wait_stream(torch.cuda.current_stream())
        self._sequence += 1
        self._pending = self._thread.submit(self._fill_slot, self._region, facts, self._sequence, due and self._is_main)

    def _fill_slot(self, region: Region, facts: Callable[[], StepFacts], sequence: int, due: bool) -> StepFacts:
        on_cuda = self._state.on_cuda
        try:
            self._check()
            slot = region.acquire(self._check)
            checksum = self._copy_on_cuda(slot) if on_cuda else self._copy_on_cpu(slot)
        finally:
            self._copy_queued.set()
        found = facts()
        if on_cuda:
            self._side_stream.synchronize()
            checksum = live.checksum(self._slots[slot])
        self._fence()
        region.publish(slot, Header(self._token, sequence, checksum, due, found))
        if self._left is not None:
            live.discard(self._left)
            self._left = None
        return found

    def _copy_on_cpu(self, slot: int) -> int:
        """Copy the state from this process's memory into a slot, and return its checksum.

        Many buffers are copied in one call of torch, which does not hold the GIL, as a loop over them would.
        """
        kept = self._state.kept
        if len(kept) > FEW_BUFFERS:
            target = torch.frombuffer(self._slots[slot], dtype=torch.uint8)
            torch._foreach_copy_(target.split([buffer.nbytes for buffer in kept]), [*kept])
            return live.checksum(self._slots[slot])
        sources = [buffer.numpy().view(np.uint8).data for buffer in kept]
        return live.copy_hashed(self._slots[slot], sources)

    def _copy_on_cuda(self, slot: int) -> int:
        """Queue the copy of weights and moments from the GPU into a slot on the side stream.

        Returns:
            0: the checksum is computed after the copy has ended.
        """
        with torch.cuda.stream(self._side_stream):
            target, kept = torch.frombuffer(self._slots[slot], dtype=torch.uint8), self._state.kept
            for part, buffer in zip(target.split([buffer.nbytes for buffer in kept]), kept, strict=True):
                part.copy_(buffer.view(torch.uint8), non_blocking=True)
        return 0

    def wait_copied(self) -> float:
        """Wait until the state may change again; return how many seconds the host waited.

        On CUDA the host waits only until the copy is queued, and the current stream waits for the copy itself.
        """
        if self._pending is None:
            return 0.0
        began = time.perf_counter()
        if self._state.on_cuda:
            self._copy_queued.wait()
            torch.cuda.current_stream().wait_stream(self._side_stream)
        else:
            self._pending.exception()
        return time.perf_counter() - began

    def wait_published(self) -> StepFacts | None:
        """Wait until the last publication has ended; return its facts; None if nothing was published."""
        return None if self._pending is None else self._pending.result()

    def wait_durable(self) -> None:
        """Wait until the last snapshot that was due is a checkpoint.

        Raises:
            CheckpointError: The checkpoint could not be written. The snapshot stays live, and earlier checkpoints are
                unchanged.
            LeaseError: Another process has taken over the run.
        """
        if self._region is None:
            return
        self.wait_published()
        if not self._is_main:
            return
        words = self._region.words
        while words[Word.HANDLED] < self._sequence:
            self._check()
            if all(snapshot.header.sequence < self._sequence for snapshot in self._region.snapshots()):
                raise CheckpointError(f"{self._region.path}: the header of the newest live snapshot is damaged")
            self._region.beat()
            time.sleep(0.001)
        if words[Word.COMMITTED] < self._sequence:
            raise CheckpointError(self._region.fault)

    def new_fault(self) -> str:
        """Return a message about a replaced keeper or a failed write that was not shown yet; empty if none."""
        replaced, self._replaced = self._replaced, ""
        return replaced or self._keepers_fault()

    def _keepers_fault(self) -> str:
        if self._region is None or self._region.words[Word.FAULTS] == self._faults:
            return ""
        self._faults = self._region.words[Word.FAULTS]
        return self._region.fault

    def _check(self) -> None:
        """Check that the lease is held and that the keeper works; replace this process's keeper if it has ended.

        Raises:
            LeaseError: The lease is lost.
            LaunchError: The keeper has ended, and another keeper could not find the region.
            CheckpointError: `MOST_KEEPERS` keepers have ended without a checkpoint.
        """
        self._fence()
        if self._keeper is None or self._region is None or not self._is_main:
            return
        state = process_state(self._keeper.pid)
        if state is not None and state[0] == "T":  # SIGSTOP: this process would wait for the keeper for ever
            self._keeper.kill()
            self._keeper.wait()
        if (code := self._keeper.poll()) is not None:
            self._lease.require()
            how = f"killed by {name_of(-code)}" if code < 0 else f"exit code {code}"
            self._replace_keeper(self._region, how)

    def _replace_keeper(self, region: Region, how: str) -> None:
        """Start another keeper, and log how the last one has ended. It raises the errors of `_check`."""
        if region.is_removed():
            raise LaunchError(
                f"{region.path}: the live region was removed, and the process that wrote checkpoints from its "
                "memory was killed, so nothing can be saved any more; the same command resumes the run"
            )
        committed = region.words[Word.COMMITTED]
        self._keepers_ended = 1 if committed != self._committed else self._keepers_ended + 1
        self._committed = committed
        if fault := self._keepers_fault():
            how += f", {fault}"
        if self._keepers_ended == MOST_KEEPERS:
            self._keeper = None
            raise CheckpointError(
                f"{self._lease.run}: the keeper, which writes the checkpoints, has ended {MOST_KEEPERS} times without "
                f"a checkpoint, so the run ends ({how}); earlier checkpoints are unchanged, and the same command "
                "resumes from the newest finished step"
            )
        live.write_job(region, self._job_file)
        self._keeper = start_keeper(self._lease)
        oom.offer_to_the_oom_killer(os.getpid())  # again: the new keeper has inherited the raised score
        self._replaced = f"the keeper, which writes the checkpoints, has ended ({how}); another one was started"
        Journal(self._lease.run, self._fence).event("fault", what=self._replaced)

    def end(self) -> None:
        """Let the keeper write the newest snapshot as a checkpoint, and wait for it if this process started it."""
        if self._oom_score is not None:
            oom.set_score(os.getpid(), self._oom_score)
        self._thread.shutdown()
        if self._region is None:
            return
        if self._registered:
            _unregister(self._region.memory)
        self._region.words[Word.PHASE] = Phase.ENDED
        if self._keeper is not None and self._is_main:
            with suppress(LoraKitError):  # then only the live region, if it still exists, has the newest step
                self._check()
                self._keeper.wait()


def _register(memory: memoryview) -> bool:
    """Register shared memory with CUDA, so that copies go straight into it; return whether that worked.

    Without registration copies are slower, but correct.

    A failed cudaHostRegister leaves an error that the next launch reports: launch a dummy kernel to clear it.
    """
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    failed = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
    if failed:
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
    return not failed


def _unregister(memory: memoryview) -> None:
    """Undo `_register` before the memory is unmapped."""
    torch.cuda.cudart().cudaHostUnregister(torch.frombuffer(memory, dtype=torch.uint8).data_ptr())


@contextmanager
def publishing(job: Job, stop: StopRequest) -> Iterator[Publisher]:
    """Open the publisher that writes a snapshot of each finished step to the live region; close it after the block."""
    is_main, resumes_live = job.processes.is_main, isinstance(job.run.latest, Live)
    job_file = job_file_of(job) if job.processes.publishes else None
    publisher = Publisher(job.run.lease, job.state, job_file, keep=resumes_live, is_main=is_main)
    if publisher.region is not None and (notice := live.disk_notice(publisher.region)):
        Console(silent=False).warn(notice)
    with forwarding_signals(stop, job.run, lambda: publisher.region):
        try:
            yield publisher
        finally:
            publisher.end()


@contextmanager
def forwarding_signals(stop: StopRequest, run: OpenRun, region: Callable[[], Region | None]) -> Iterator[None]:
    """Write stop signals to the live region from a thread, so the keeper sees them even if the main thread hangs.

    Args:
        stop: Gets the signals.
        run: The run's folder.
        region: Returns the region if this process has opened it.
    """

    def forward_signals() -> None:
        for number in stop.signals():
            found = region() or live.open_region(run.folder, most=run.lease.token)
            if found is not None:
                found.words[Word.STOP] = number

    listener = threading.Thread(target=forward_signals, daemon=True)
    listener.start()
    try:
        yield
    finally:
        stop.end()
        listener.join()


def job_file_of(job: Job) -> JobFile:
    """Return everything that the keeper needs to turn a snapshot of this job into a checkpoint."""
    checkpoint = job.recipe.checkpoint
    return JobFile(
        shapes={name: tuple(shape) for name, shape in job.state.shapes.items()},
        adapter_config=json.dumps(saved_config(job.model), indent=2) + "\n",
        facts=job.facts,
        every_seconds=checkpoint.every_seconds,
        keep=checkpoint.keep,
        keep_every=checkpoint.keep_every,
        best=checkpoint.best,
        remote=checkpoint.remote,
    )
