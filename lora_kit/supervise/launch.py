"""`lora-kit train`: the keeper as the parent of the training processes, which it starts again after a failure.

Nobody asks a training process anything. A stop signal to any of them, or to this process, ends them all at once and
makes the newest finished step durable; a killed, crashed or hung one does the same and starts them all again from it.
Ranks and addresses are handed out anew for every attempt, so nothing of a dead attempt is ever met again.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lora_kit.errors import LaunchError, Stopped
from lora_kit.runs.lease import KEEPER, ORDERED, Lease
from lora_kit.runs.live import Phase, Word
from lora_kit.supervise import oom
from lora_kit.supervise.keeper import LOOK_SECONDS, Keeper
from lora_kit.supervise.zygote import BUFFER_BYTES, MESSAGE_BYTES, end_with_parent
from lora_kit.views.console import Console

STOPPED = Stopped.exit_code
PRELOAD = ("lora_kit.training.loop", "datasets")
WORKER = "lora_kit.cli:train_worker"  # what a training process calls with the request
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FORWARDED_SECONDS = 2.0  # a signal that comes again so soon is a launcher passing on what its processes had heard
SAME_FAILURES = 3  # so often at the same step, and no restart will help
PATIENCE_SECONDS = 600.0  # without a sign of life before the first step
LITTLE_WORK = 2.0  # CPU-seconds in that time: less is a hang, more is a large base or dataset
LEAST_TIMEOUT_SECONDS, TIMEOUT_FACTOR = 60.0, 10.0  # of a step, when the recipe names none
SIBLINGS_SECONDS = 0.3  # when one has failed, the others' errors follow; the first cause is what counts
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Connection refused")


def follow_launcher() -> None:
    """Get SIGTERM, and save, when the launcher of this process dies: `accelerate launch` does not forward that signal
    to a single process (accelerate issue 2741)."""
    end_with_parent(signal.SIGTERM)


@dataclass
class Attempt:
    """The training processes of one start.

    Attributes:
        running: Process ids by index.
        failures: What went wrong, in the order in which it was heard: process id and cause.
        traces: The traceback of each process that raised.
        codes: How each ended.
    """

    running: dict[int, int] = field(default_factory=dict)
    failures: list[tuple[int, str]] = field(default_factory=list)
    traces: dict[int, str] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)

    def cause(self) -> tuple[int, str]:
        """Return the failure that the others follow from: the first that is not the loss of a peer."""
        own = [one for one in self.failures if not any(word in one[1] for word in LOST_PEER)]
        return (own or self.failures)[0]


class Zygote:
    """The process that has imported everything, and the training processes that it forks."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._socket.setblocking(False)
        # with this check torch's import leaves CUDA untouched, and a fork can use it
        environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", KEEPER: str(os.getpid())}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_kit.supervise.zygote", str(theirs.fileno()), *PRELOAD],
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()

    def start(self, request: str, environments: Sequence[Mapping[str, str]]) -> None:
        """Ask for a training process for every environment; if the zygote was just killed, `poll` will show that.

        Raises:
            LaunchError: The request is too long for a message.
        """
        for index, environment in enumerate(environments):
            order = {"index": index, "function": WORKER, "argument": request, "environment": dict(environment)}
            message = json.dumps(order).encode()
            if len(message) > MESSAGE_BYTES:
                raise LaunchError(
                    f"recipe and options: {len(message):,} bytes, more than the {MESSAGE_BYTES:,} that a training "
                    "process can be given; shorten the recipe's longest list"
                )
            with suppress(BrokenPipeError, ConnectionResetError):
                self._socket.send(message)

    def news(self) -> list[dict[str, Any]]:
        """Return what has been told since the last call."""
        heard = list[dict[str, Any]]()
        while True:
            try:
                message = self._socket.recv(MESSAGE_BYTES)
            except (BlockingIOError, ConnectionResetError):
                return heard
            if not message:
                return heard
            heard.append(json.loads(message))

    def end(self) -> None:
        """End it; its children follow at once."""
        self.process.kill()
        self.process.wait()
        self._socket.close()


def environments(processes: int) -> list[dict[str, str]]:
    """Return what each of the training processes of an attempt finds in its environment."""
    ordered = {ORDERED: str(time.time())}
    if processes == 1:
        return [ordered]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = ordered | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    return [common | {"RANK": str(index), "LOCAL_RANK": str(index)} for index in range(processes)]


class Launch:
    """One call of `lora-kit train`, from the first start to the last exit."""

    def __init__(self, request: str, processes: int, run: Path, lease: Lease, *, step_timeout: float | None) -> None:
        self._request, self._processes, self._run = request, processes, run
        self._step_timeout = step_timeout
        self.keeper, self.console = Keeper(run, lease), Console(silent=False)
        self._heard: list[tuple[float, int]] = []
        self.zygote = Zygote()
        self.attempt = Attempt()
        self._life = (0, 0, 0)
        self._silent, self._longest, self._worked, self._looked = 0.0, 0.0, 0.0, time.monotonic()

    def hear(self, number: int, frame: Any) -> None:
        """Note a signal; a second that was not only forwarded ends everything at once."""
        self._heard.append((time.monotonic(), number))
        if self._heard[-1][0] - self._heard[0][0] > FORWARDED_SECONDS:
            self.zygote.process.kill()
            os._exit(128 + number)

    def run(self, max_restarts: int) -> int:
        """Train, and start again after every failure, `max_restarts` times at most; return the exit code."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.hear)
        seen: dict[tuple[str, int], list[str]] = {}
        try:
            for restart in range(max_restarts + 1):
                self._begin()
                code = self._watch()
                if code is not None:
                    return code
                process, what = self.attempt.cause()
                step, trace = self._newest(), self.attempt.traces.get(process, "")
                same = seen.setdefault((what.partition(": ")[2], step), [])  # whichever process it is in
                same.append(trace)
                hopeless = len(same) == SAME_FAILURES and (trace or "memory" in what)
                last = hopeless or restart == max_restarts
                if trace and (len(same) == 1 or last):
                    print(same[0], file=sys.stderr, end="")
                self.keeper.journal.event("restart" if not last else "failed", step=step, cause=what)
                if last:
                    why = "the same again and again" if hopeless else f"{restart} restart(s) made"
                    self.console.warn(f"{what} after step {step}; {why}, so the run ends; the same command goes on")
                    return self._exit_code(process)
                self.console.warn(f"{what} after step {step}; starting again from there ({restart + 1}/{max_restarts})")
            raise AssertionError("the last attempt returns")
        finally:
            self.zygote.end()
            self._restore_cursor()
            self.keeper.end()
            with suppress(OSError):  # a full disk; the next one sees that this process is dead
                self.keeper.lease.release()

    def _begin(self) -> None:
        if self.zygote.process.poll() is not None:
            self.zygote.end()
            self.zygote = Zygote()
        self.attempt, self._silent, self._longest, self._worked = Attempt(), 0.0, 0.0, 0.0
        self._looked = time.monotonic()
        if self.keeper.region is not None:
            self.keeper.region.words[Word.PHASE] = Phase.LOADING
        self.zygote.start(self._request, environments(self._processes))

    def _watch(self) -> int | None:
        """Return the exit code of an attempt that ended the run, None for one that is to be repeated."""
        failed_at = None
        while True:
            self.keeper.turn()
            self._listen()
            if self._heard:
                return self._stop(self._heard[0][1])
            if self.attempt.failures and failed_at is None:
                failed_at = time.monotonic()
            patience = SIBLINGS_SECONDS if self._processes > 1 else 0.0
            waited = failed_at is not None and time.monotonic() - failed_at >= patience
            told = [code for one, code in self.attempt.codes.items() if code > 0 and one not in self.attempt.traces]
            if told and (waited or failed_at is None):  # it has said what is wrong itself, and would again
                return max(told)
            if waited:
                self._kill()
                return None
            if len(self.attempt.codes) == self._processes and not self.attempt.failures:
                return 0
            if failed_at is None and self._hangs():
                self.attempt.failures.append((0, f"no sign of life for {self._silent:.0f} s (a hang)"))
            time.sleep(LOOK_SECONDS)

    def _listen(self) -> None:
        """Take in who has started, failed and ended."""
        attempt = self.attempt
        for one in self.zygote.news():
            if "started" in one:
                attempt.running[one["index"]] = one["started"]
                oom.offer_to_the_oom_killer(one["started"])
            elif "failed" in one:
                attempt.traces[one["failed"]] = one["trace"]
                kind = "out of memory: " if any(word in one["error"] for word in oom.WORDS) else ""
                attempt.failures.append((one["failed"], f"process {self._index(one['failed'])}: {kind}{one['error']}"))
            else:
                self._ended(one["ended"], one["code"])
        ended = self.zygote.process.poll()
        if ended is not None and len(attempt.codes) < self._processes and not attempt.failures:
            if -ended in STOP_SIGNALS:
                self._heard.append((time.monotonic(), -ended))
            elif ended > 0:  # it could not even import
                attempt.codes[self.zygote.process.pid] = ended
            else:
                attempt.failures.append((self.zygote.process.pid, f"the process that starts others: {_died(-ended)}"))

    def _index(self, process: int) -> int:
        return next((index for index, one in self.attempt.running.items() if one == process), -1)

    def _ended(self, process: int, code: int) -> None:
        self.attempt.codes[process] = code
        if -code in STOP_SIGNALS:
            self._heard.append((time.monotonic(), -code))
        elif code < 0:
            self.attempt.failures.append((process, f"process {self._index(process)}: {_died(-code)}"))

    def _hangs(self) -> bool:
        """Return whether the trainer has shown no sign of life for too long, by this process's own clock."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 1.0), now  # this process may have been suspended itself
        words = self.keeper.region.words if self.keeper.region else None
        life = (words[Word.PHASE], words[Word.BEAT], words[Word.HANDLED]) if words else (0, 0, 0)
        if life != self._life:
            if life[0] == self._life[0] == Phase.TRAINING:
                self._longest = max(self._longest, self._silent)
            self._life, self._silent = life, 0.0
            return False
        self._silent += passed
        limit = PATIENCE_SECONDS
        if life[0] == Phase.TRAINING and self._longest:
            limit = self._step_timeout or max(LEAST_TIMEOUT_SECONDS, TIMEOUT_FACTOR * self._longest)
        elif life[0] == Phase.LOADING and (self._step_timeout or LEAST_TIMEOUT_SECONDS) < self._silent <= limit:
            return any(_suspended(process) for process in self.attempt.running.values())
        elif life[0] == Phase.LOADING and self._silent > limit and self._works():
            self._silent = 0.0
        return life[0] != Phase.ENDED and self._silent > limit

    def _works(self) -> bool:
        """Return whether the training processes have computed since this was last asked: loading shows no more."""
        before, self._worked = self._worked, sum(map(_cpu_seconds, self.attempt.running.values()))
        return self._worked - before > LITTLE_WORK

    def _newest(self) -> int:
        published = self.keeper.region.snapshots() if self.keeper.region else []
        return published[0].step if published else 0

    def _kill(self) -> None:
        """Kill what is left of an attempt and wait until it is gone."""
        for process in self.attempt.running.values():
            if process not in self.attempt.codes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        while len(self.attempt.codes) < len(self.attempt.running) and self.zygote.process.poll() is None:
            self._listen()
            time.sleep(LOOK_SECONDS / 10)

    def _stop(self, number: int) -> int:
        """End everything, make the newest finished step durable and say so."""
        self._listen()
        if len(self.attempt.codes) == self._processes and not any(self.attempt.codes.values()):
            return 0
        self.zygote.end()
        step = self.keeper.end()
        name = signal.Signals(number).name
        self._restore_cursor()
        self.keeper.journal.event("stopped", step=step, signal=name)
        self.console.say(f"stopped: {self._run}: {name} after step {step}, which is durable; the same command goes on")
        return STOPPED

    def _exit_code(self, process: int) -> int:
        code = 1 if process in self.attempt.traces else self.attempt.codes.get(process, 1)
        return code if code > 0 else 128 - code

    def _restore_cursor(self) -> None:
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")
            sys.stdout.flush()


def launch(
    request: str, *, processes: int, run: Path, lease: Lease, max_restarts: int, step_timeout: float | None
) -> int:
    """Train in processes of their own under a keeper, and return the exit code.

    Args:
        request: A `TrainRequest` as JSON, the same for every process and every restart.
        processes: The number of training processes.
        run: The run's folder.
        lease: Held by this process; released at the end.
        max_restarts: How often failures lead to another start.
        step_timeout: Seconds without a sign of life that are a hang; None to take it from the run's own steps.
    """
    return Launch(request, processes, run, lease, step_timeout=step_timeout).run(max_restarts)


def _died(number: int) -> str:
    """Say how a process died of a signal."""
    name = signal.Signals(number).name
    return f"killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL and oom.kernel_has_killed() else "")


def _cpu_seconds(process: int) -> float:
    try:
        times = psutil.Process(process).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _suspended(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False
