"""The keeper's side of uploads to `checkpoint.remote`: a process of its own, which is started, told and waited for.

The keeper never waits for a store while a run trains. A process that ends unasked is started again, later each time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.runs.lease import Lease
from lora_kit.runs.remote import Backoff, read_outbox, waiting

UPLOADER = "lora_kit.artifacts.remotes"  # the module of the process; it knows the Hub too
FINISHED_SECONDS = 60.0  # the longest wait for the last upload at the end of a run
STOPPED_SECONDS = 10.0  # the same limit after a stop signal: a scheduler may kill this process after 30 s


@dataclass(frozen=True)
class Request:
    """What a process that uploads is told.

    Attributes:
        lease: The run's lease as JSON.
        url: `checkpoint.remote`.
        keep: The number of newest copies that stay at the URL.
    """

    lease: str
    url: str
    keep: int


class Uploads:
    """The uploads of one run.

    Args:
        lease: The run's lease, which this process holds.
        url: `checkpoint.remote`.
        keep: The number of newest copies that stay there.
        on_upload: Called from a thread with the facts of an upload.
        on_fault: Called with a message when uploads fail.
    """

    def __init__(
        self,
        lease: Lease,
        url: str,
        keep: int,
        *,
        on_upload: Callable[..., object],
        on_fault: Callable[[str], object],
    ) -> None:
        self._request, self._run, self._url = Request(lease.to_json(), url, keep), lease.run, url
        self._on_upload, self._on_fault = on_upload, on_fault
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: Thread | None = None
        self._ends, self._not_before, self._backoff = 0, 0.0, Backoff()
        self._wanted = self._step_waiting() is not None  # an earlier start could not upload it

    def _start(self) -> None:
        """Start the process. It ends with the thread that starts it, so this is the main thread's to do."""
        self._wanted = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", UPLOADER, json.dumps(asdict(self._request)), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._reader = Thread(target=self._read, args=(self._process,), name="uploads", daemon=True)
        self._reader.start()

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        """Hand on what the process reports until it ends."""
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError, LeaseError):  # the last line may be cut, and who lost the lease ends anyway
                event: dict[str, Any] = json.loads(line)
                if "fault" in event:
                    self._on_fault(event["fault"])
                else:
                    self._ends = 0
                    self._on_upload(**event["uploaded"], to=self._url)

    def notify(self) -> None:
        """Say that there is a new checkpoint. Never waits. Any thread may call this."""
        process = self._process
        if process is None or process.stdin is None:
            self._wanted = True
            return
        with suppress(OSError, ValueError):  # the pipe is full, so it will read, or it has ended, which `poll` notices
            os.write(process.stdin.fileno(), b"\n")

    def poll(self) -> None:
        """Start the process if there is something to upload, or if it has ended unasked. For the main thread only."""
        if self._process is None:
            if self._wanted:
                self._start()
        elif self._not_before and time.monotonic() >= self._not_before:
            self._not_before = 0.0
            self._start()
        elif not self._not_before and (code := self._process.poll()) is not None:
            self._ends += 1
            self._not_before = time.monotonic() + self._backoff.seconds(self._ends + 2)
            if self._ends == 1:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                self._on_fault(
                    f"{self._url}: the process that uploads checkpoints has ended ({how}) and is started again"
                )

    def _step_waiting(self) -> int | None:
        with suppress(CheckpointError):
            if found := waiting(self._run, self._url):
                return found.manifest.progress.step
        return None

    def finish(self, seconds: Callable[[], float], tick: Callable[[str], object] = lambda text: None) -> str:
        """Wait for the last upload, but not for long; end the process.

        Args:
            seconds: Returns the longest wait in seconds; it may become shorter during the wait.
            tick: Called with what is being waited for.

        Returns:
            A message about what is still in the outbox; empty if all was uploaded.
        """
        if self._step_waiting() is not None and (self._process is None or self._process.poll() is not None):
            self._start()
        if self._process is not None:
            began = time.monotonic()
            assert self._process.stdin is not None
            self._process.stdin.close()
            if self._step_waiting() is not None:
                tick(f"upload to {self._url}")
            while self._process.poll() is None and time.monotonic() - began < seconds():
                time.sleep(0.02)
            self._process.kill()
            self._process.wait()
            if self._reader is not None:
                self._reader.join()
        step = self._step_waiting()
        return "" if step is None else not_uploaded(self._run, self._url, step)


def not_uploaded(run: Path, url: str, step: int) -> str:
    """Return what to tell about a checkpoint that was not uploaded before the end of a run."""
    problem = ""
    with suppress(CheckpointError):
        found = read_outbox(run, url)
        problem = f" ({found.problem})" if found and found.problem else ""
    return (
        f"{url}: step {step} is not uploaded yet{problem}. It is on disk in {run}: `lora-kit push {run}` uploads it, "
        "as does the next start of this run"
    )
