"""Publish every finished step's state to the live region while the next step computes.

Weights and moments do not change between one update and the next, so a thread copies them meanwhile (on CUDA a side
stream, straight into the region's registered memory). The next update waits for the copy, and a step's line in the log
waits for its header: what metrics.jsonl shows can never be lost with a process.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from lora_kit.errors import CheckpointError
from lora_kit.model.adapter import saved_config
from lora_kit.runs import live
from lora_kit.runs.lease import inherited
from lora_kit.runs.live import Header, JobFile, Phase, Region, Word
from lora_kit.runs.manifest import StepFacts
from lora_kit.supervise import oom
from lora_kit.supervise.keeper import start_beside
from lora_kit.supervise.stopping import Stop
from lora_kit.training.job import Job


class Publisher:
    """The trainer's side of the live region; on a process that does not write it, one that does nothing."""

    def __init__(self, job: Job) -> None:
        self._state, self._run, self._token = job.state, job.run.folder, job.run.lease.token
        self._region: Region | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._job: Future[StepFacts] | None = None
        self._queued = threading.Event()
        self._copied: Any = None
        self._registered = False
        self._faults = 0
        self._alone = inherited(self._run) is None  # no keeper is this process's parent
        if job.processes.is_main:
            self._open(job)
        self._score = oom.offer_to_the_oom_killer(os.getpid()) if self._alone else None

    def _open(self, job: Job) -> None:
        region = live.make_region(self._run, 12 * self._state.size)
        words, recipe = region.words, job.recipe
        if job.progress is None:
            region.clear()
        words[Word.TOKEN], words[Word.STOP], words[Word.FAULTS] = self._token, 0, 0
        words[Word.PHASE] = Phase.LOADING
        self._sequence = max([words[Word.HANDLED], *(snapshot.header.sequence for snapshot in region.snapshots())])
        job_file = JobFile(
            run=str(self._run.resolve()),
            shapes={name: tuple(shape) for name, shape in self._state.shapes.items()},
            adapter_config=json.dumps(saved_config(job.model), indent=2) + "\n",
            facts=job.facts,
            every_seconds=recipe.checkpoint.every_seconds,
            keep=recipe.checkpoint.keep,
            keep_every=recipe.checkpoint.keep_every,
            best=recipe.checkpoint.best,
        )
        live.write_job(region, job_file)
        self._region = region
        self._targets = [region.payload(slot) for slot in range(live.SLOTS)]
        if self._state.weights.is_cuda:
            self._side, self._registered = torch.cuda.Stream(), _register(region.whole)
        if self._alone:
            self._keeper = start_beside(self._run)

    @property
    def stop(self) -> bool:
        """Whether the keeper, or a process that could not say so in time, has heard a stop signal."""
        return self._region is not None and self._region.words[Word.STOP] != 0

    def alive(self) -> None:
        """Show the keeper a sign of life."""
        if self._region is not None:
            self._region.words[Word.PHASE] = Phase.TRAINING
            self._region.words[Word.BEAT] += 1

    def no_more_steps(self) -> None:
        """Tell the keeper that what follows takes its time, such as an upload, and that no silence of it is a hang."""
        if self._region is not None:
            self._region.words[Word.PHASE] = Phase.LOADING

    def begin(self, progress: Callable[[], StepFacts], *, due: bool) -> None:
        """Start to publish the state as it is now, once what was begun before is published.

        Args:
            progress: Called in another thread; may wait for the device.
            due: Whether this step's checkpoint is written in any case.
        """
        if self._region is None:
            return
        self.finished()
        self._state.assert_views()
        self._queued.clear()
        ready = None
        if self._state.weights.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._sequence += 1
        self._job = self._thread.submit(self._publish, self._region, progress, self._sequence, due, ready)

    def _publish(
        self, region: Region, progress: Callable[[], StepFacts], sequence: int, due: bool, ready: Any
    ) -> StepFacts:
        try:
            slot = region.claim(self._keeper_lives)
            checksum = self._copy(slot, ready)
        finally:
            self._queued.set()
        facts = progress()
        if ready is not None:
            self._side.synchronize()
            checksum = live.checksum(self._targets[slot])
        region.publish(slot, Header(self._token, sequence, checksum, due, facts))
        return facts

    def _copy(self, slot: int, ready: Any) -> int:
        """Copy weights and moments into a slot; on CUDA only queue that, and return nothing of worth."""
        if ready is None:
            sources = [one.numpy().view(np.uint8).data for one in self._state.kept]
            return live.copy_hashed(self._targets[slot], sources)
        with torch.cuda.stream(self._side):
            self._side.wait_event(ready)
            target = torch.frombuffer(self._targets[slot], dtype=torch.float32)
            for part, source in zip(target.split(self._state.size), self._state.kept, strict=True):
                part.copy_(source, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return 0

    def release(self) -> float:
        """Wait until the state may change again; return the seconds that took. The device waits by itself."""
        if self._job is None:
            return 0.0
        began = time.perf_counter()
        if self._state.weights.is_cuda:
            self._queued.wait()
            if self._copied is not None:
                torch.cuda.current_stream().wait_event(self._copied)
        else:
            self._job.exception()
        return time.perf_counter() - began

    def finished(self) -> StepFacts | None:
        """Wait until what was begun is published; return what it was published with, None on other processes."""
        return None if self._job is None else self._job.result()

    def written(self) -> float:
        """Wait until the last due snapshot is a checkpoint; return the seconds that took.

        Raises:
            CheckpointError: It could not be written; it stays live, and earlier checkpoints are untouched.
        """
        if self._region is None:
            return 0.0
        self.finished()
        began, words = time.perf_counter(), self._region.words
        while words[Word.HANDLED] < self._sequence:
            self._keeper_lives()
            words[Word.BEAT] += 1
            time.sleep(0.001)
        if words[Word.COMMITTED] < self._sequence:
            raise CheckpointError(self._region.fault)
        return time.perf_counter() - began

    def new_fault(self) -> str:
        """Return what the keeper could not write since the last call; empty when all is well."""
        if self._region is None or self._region.words[Word.FAULTS] == self._faults:
            return ""
        self._faults = self._region.words[Word.FAULTS]
        return self._region.fault

    def _keeper_lives(self) -> None:
        """Start another keeper if ours has been killed."""
        if self._keeper is not None and self._keeper.poll() is not None:
            self._keeper = start_beside(self._run)
            oom.offer_to_the_oom_killer(os.getpid())  # it has the score of this process

    def end(self) -> None:
        """Let the keeper make what is left durable, and wait for that if it is this process's own."""
        if self._score is not None:
            oom.set_score(os.getpid(), self._score)
        self._thread.shutdown()
        if self._region is None:
            return
        if self._registered:
            _unregister(self._region.whole)
        self._region.words[Word.PHASE] = Phase.ENDED
        if self._keeper is not None:
            self._keeper_lives()
            self._keeper.wait()


def _register(whole: memoryview) -> bool:
    """Let CUDA copy straight into shared memory; without that it copies through a buffer of its own, only slower."""
    buffer = torch.frombuffer(whole, dtype=torch.uint8)
    failed = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
    if failed:  # CUDA shows the failure again at the next kernel, whose it is not: let that be this one
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
    return not failed


def _unregister(whole: memoryview) -> None:
    """End what `_register` began: once unmapped, CUDA would copy to where the memory was."""
    torch.cuda.cudart().cudaHostUnregister(torch.frombuffer(whole, dtype=torch.uint8).data_ptr())


@contextmanager
def publishing(job: Job, stop_wish: Stop) -> Iterator[tuple[Job, Publisher]]:
    """Publish a job's steps while it runs; stop signals reach its keeper even when the main thread hangs."""
    publisher, folder = Publisher(job), job.run.folder

    def pass_on() -> None:
        for number in stop_wish.heard():
            region = live.open_region(folder)
            if region is not None:
                region.words[Word.STOP] = number

    listener = threading.Thread(target=pass_on, daemon=True)
    listener.start()
    try:
        yield job, publisher
    finally:
        publisher.end()
        stop_wish.end()
        listener.join()
