"""A run of a drill: `lora-kit train` in processes of its own, watched and interrupted from outside.

A drill knows only what is in the run's folder, and does only what an operator can do: start the command, send a signal
to a process, change a file.
"""

import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from lora_kit.errors import InputError, LoraKitError, Stopped
from lora_kit.host import end_with_parent
from lora_kit.runs.certificate import Resumption
from lora_kit.runs.identity import ENDED, process_state
from lora_kit.runs.journal import Journal, StepRecord
from lora_kit.runs.manifest import MANIFEST
from lora_kit.runs.store import STAGING, checkpoint_folder

POLL_SECONDS = 0.002
WATCH_SECONDS = 0.0002  # pause between two looks for a write, which takes milliseconds
LAST_LINES = 20  # lines at the end of the log that an error quotes


class DrillRun:
    """The commands of one run, from the first start to the last stop.

    Args:
        command: The training command, without `--out` and `--processes`.
        run: The run's folder.
        processes: The number of training processes.
        log: Where the output of the commands goes.
        last: The step after which the run is stopped.
        rng: The random generator for the moments of faults and the processes that they hit.
        step_seconds: How long a step takes; an interruption comes at a random moment of such a time.
        tell: Called with a line about every interruption.

    Attributes:
        resumptions: Every interruption and how the run went on.
        problems: Promises that were not kept.
    """

    def __init__(
        self,
        command: Sequence[str],
        run: Path,
        log: Path,
        last: int,
        rng: random.Random,
        *,
        processes: int,
        step_seconds: float = 0.0,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._command = [*command, "--out", str(run), "--processes", str(processes)]
        self._processes, self._log, self._tell = processes, log, tell
        self.run, self.last, self.rng, self._step_seconds = run, last, rng, step_seconds
        self._journal = Journal(run)
        self._process: subprocess.Popen[bytes] | None = None
        self.resumptions: list[Resumption] = []
        self.problems: list[str] = []

    def start(self, *options: str) -> None:
        """Start the command, with more options than usual if some are given."""
        command = [sys.executable, "-m", "lora_kit", *self._command, *options]
        with self._log.open("a") as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(end_with_parent, signal.SIGTERM),
            )

    def stop(self) -> None:
        """Send SIGTERM to the command, wait for its end, and note it if the exit code is not what a stop promises."""
        self.keeper.terminate()
        if (code := self.keeper.wait()) != Stopped.exit_code:
            self.problems.append(f"{self.run.name}: exit code {code} after SIGTERM, expected {Stopped.exit_code}")

    @property
    def keeper(self) -> "subprocess.Popen[bytes]":
        """The process of the command, which is the keeper."""
        assert self._process is not None
        return self._process

    @property
    def other_processes(self) -> tuple[str, str]:
        """The option for another number of training processes: one, or two instead of one."""
        return "--processes", "2" if self._processes == 1 else "1"

    def trainers(self) -> list[psutil.Process]:
        """Return the training processes: children of the keeper's child, the zygote."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.keeper.pid).children()
            return [each for child in children for each in child.children() if _alive(each.pid)]
        return []

    def family(self) -> list[psutil.Process]:
        """Return the keeper and all processes below it."""
        with suppress(psutil.NoSuchProcess):
            keeper = psutil.Process(self.keeper.pid)
            return [keeper, *keeper.children(recursive=True)]
        return []

    def kill(self, victims: Sequence[psutil.Process]) -> None:
        """Send SIGKILL to processes."""
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()

    def steps(self) -> int:
        """Return the number of the newest finished step."""
        return self._journal.last_step()

    def metrics(self) -> list[StepRecord]:
        """Return the records of the finished steps."""
        return self._journal.read_metrics()

    def step_seconds(self) -> list[float]:
        """Return how long each finished step took."""
        return [each["tokens"] / (each["tokens_per_second"] or 1.0) for each in self.metrics()]

    def unfinished_writes(self) -> list[str]:
        """Return the names of the folders in which checkpoints are being written or were left by a kill."""
        with suppress(FileNotFoundError):
            return [each.name for each in (self.run / "checkpoints").iterdir() if STAGING.fullmatch(each.name)]
        return []

    def until(self, condition: Callable[[], bool], *, poll: float = POLL_SECONDS) -> None:
        """Wait for a condition.

        Raises:
            LoraKitError: The command has ended before; the message quotes its last lines.
        """
        while not condition():
            code = self.keeper.poll()
            if code is not None and not condition():
                kind = InputError if code == InputError.exit_code else LoraKitError
                lines = self._log.read_text(errors="replace").splitlines()[-LAST_LINES:]
                raise kind("\n".join([f"{self.run}: the command ended with exit code {code}; {self._log}:", *lines]))
            time.sleep(poll)

    def reach(self, step: int) -> None:
        """Wait until a step is finished, and then for a random part of the time that a step takes."""
        self.until(lambda: self.steps() >= step)
        time.sleep(self.rng.random() * self._step_seconds)

    def interrupt(self, fault: str, act: Callable[[], str], *, when: Callable[[], bool] | None = None) -> None:
        """Interrupt the run, wait until it has finished one more step, and record the fault and the time until then.

        Args:
            fault: The fault's name.
            act: Interrupts the run, starts the command again if that has ended, and returns what was done.
            when: Interrupt as soon as this is true, which is checked often; None interrupts at once.

        Raises:
            LoraKitError: The run reached its last step before the interruption, or did not continue after it.
        """
        starts = len(self._starts())
        if when is not None:
            self.until(when, poll=WATCH_SECONDS)
        began = time.time()
        step, what = self.steps(), act()
        self.until(lambda: len(self._starts()) > starts and self._goes_on())
        event = self._starts()[-1]
        if event["step"] >= self.last:
            raise LoraKitError(f"{fault}: it came after step {event['step']}, too late; give more --steps")
        record = next(each for each in self.metrics() if each["step"] > event["step"])
        parts, at = dict[str, float](event["seconds"]), datetime.fromisoformat(event["time"]).timestamp()
        found = max(0.0, at - sum(parts.values()) - began)
        made = Resumption(
            fault=fault,
            what=what,
            step=step,
            resumed=event["step"],
            lost=max(0, event.get("reached", step) - event["step"]),
            seconds=round(max(0.0, record["time"] - began), 3),
            parts={"found": round(found, 3), **parts, "step": round(max(0.0, record["time"] - at), 3)},
        )
        self.resumptions.append(made)
        self._tell(f"{fault}: {what} after step {step}; the next step came after {made.seconds:.1f} s")

    def _starts(self) -> list[dict[str, Any]]:
        return [dict(event) for event in self._journal.read_events() if event["kind"] in ("started", "resumed")]

    def _goes_on(self) -> bool:
        return self.steps() > int(self._starts()[-1]["step"])

    def finish(self) -> None:
        """Wait for the last step and its checkpoint, then stop the run unless it has ended by itself.

        A recipe in epochs may have fewer steps; then `last` becomes the last of them.
        """
        written = checkpoint_folder(self.run, self.last) / MANIFEST
        self.until(lambda: written.exists() or self.keeper.poll() == 0)
        if self.keeper.poll() is None:
            self.keeper.terminate()
        if self.keeper.wait() == 0:
            self.last = min(self.last, self.steps())

    def end(self) -> None:
        """Kill what is still running."""
        if self._process is not None and self._process.poll() is None:
            self.kill(self.family())
            self._process.wait()


def _alive(process: int) -> bool:
    return (process_state(process) or ENDED)[0] not in ENDED


def typical(seconds: Sequence[float]) -> float:
    """Return the median; 0 of nothing."""
    return statistics.median(seconds) if seconds else 0.0
