"""`lora-kit train` and `launch`: the keeper as the parent of the training processes, which it restarts after a failure.

A stop signal to this process or to any training process ends all training processes at once, and the keeper writes the
newest finished step. If a training process is killed, crashes or hangs, the others are killed too, and all start again
from the newest step. No training process has to cooperate. Every attempt gets new ranks and a new store, so it cannot
meet a process of an earlier attempt.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lora_kit.errors import LeaseError, LoraKitError, Stopped
from lora_kit.host import end_with_parent
from lora_kit.runs.identity import ENDED, process_state
from lora_kit.runs.journal import short_cause
from lora_kit.runs.lease import KEEPER, START_REQUESTED, Lease
from lora_kit.runs.live import LEAST_TIMEOUT_SECONDS, TIMEOUT_FACTOR, Phase, Word
from lora_kit.supervise import oom
from lora_kit.supervise.keeper import POLL_SECONDS, Keeper
from lora_kit.supervise.stopping import FORWARDED_SECONDS, STOP_SIGNALS, name_of, signals_to_hear
from lora_kit.supervise.uploads import FINISHED_SECONDS, STOPPED_SECONDS
from lora_kit.supervise.zygote import STORE, Zygote
from lora_kit.views.console import Console, print_error

STOPPED, FAILED = Stopped.exit_code, LoraKitError.exit_code
PRELOAD = ("lora_kit.training.loop",)
WORKER = "lora_kit.cli:train_worker"  # the function that a training process calls with the request
AHEAD = "lora_kit.training.ahead"  # the module that prepares the data of a request while torch is imported
SAME_FAILURES = 3  # a run ends after so many equal failures at the same step
LOADING_TIMEOUT_SECONDS = 600.0  # limit for a silent start before its first step
LITTLE_WORK = 2.0  # CPU seconds in LOADING_TIMEOUT_SECONDS: less is a hang, more is loading a large base or dataset
REPORT_SECONDS = 2.0  # a zygote that has not reported the end of a process after so long is stopped
SIBLINGS_SECONDS = 0.3  # after a failure, to collect the errors of the other processes before choosing the cause
ENDING_SECONDS = 10.0  # how long a process that has raised an error of lora_kit may take to end
FORKS = "the process that forks the training processes"
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Connection refused")


def follow_launcher() -> None:
    """Get SIGTERM, and save, when the launcher of this process dies: `accelerate launch` does not forward that signal
    to a single process (accelerate issue 2741). Its processes know the store and the keeper of no other run."""
    for left in (STORE, KEEPER):
        os.environ.pop(left, None)
    end_with_parent(signal.SIGTERM)


@dataclass(frozen=True)
class Program:
    """What the training processes run.

    Attributes:
        worker: The function that each training process calls, as `module:name`.
        request: The argument of this function, the same for every process and every restart.
        preload: The modules that are imported before a process is forked.
        absent: Packages that training does not need and that must not be imported, because that takes long.
        ahead: The module that prepares the data of the request while torch is imported; None if there is none.
        step_timeout: Seconds without a sign of life that count as a hang; None to derive them from the longest step.
        least_timeout: The lower limit of a derived `step_timeout`, in seconds.
    """

    worker: str
    request: str
    preload: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    ahead: str | None = None
    step_timeout: float | None = None
    least_timeout: float = LEAST_TIMEOUT_SECONDS

    @classmethod
    def of_recipe(cls, request: str, *, absent: tuple[str, ...], step_timeout: float | None) -> "Program":
        """Return the program that trains a recipe; the request is a `TrainRequest` as JSON."""
        return cls(WORKER, request, PRELOAD, absent, AHEAD, step_timeout)

    def prepare(self, zygote: Zygote) -> None:
        """Let the zygote import what a training process needs, unless that is a fresh interpreter."""
        if not zygote.fresh:
            zygote.prepare(self.preload, self.absent)


@dataclass
class Attempt:
    """The training processes of an attempt.

    Attributes:
        running: The process id of each process index.
        failures: Process id and cause of each failure, in the order in which they were reported.
        traces: The traceback of each process that raised, by process id.
        refusals: The text of the LoraKitError that a process raised, by process id.
        codes: The exit code of each process that has ended, by process id.
    """

    running: dict[int, int] = field(default_factory=dict)
    failures: list[tuple[int, str]] = field(default_factory=list)
    traces: dict[int, str] = field(default_factory=dict)
    refusals: dict[int, str] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)

    def cause(self) -> tuple[int, str]:
        """Return the failure that caused the others: the first failure that is not a lost connection."""
        own = [failure for failure in self.failures if not any(word in failure[1] for word in LOST_PEER)]
        return (own or self.failures)[0]


def environments(processes: int) -> list[dict[str, str]]:
    """Return the environment variables of each training process of an attempt.

    The processes meet through a new file in memory, because the store of torch.distributed would listen to everyone who
    can reach this machine. The file has no name but that in /proc, under which only this user can open it, so a kill of
    this process leaves nothing behind. It stays open: a process of an earlier attempt that has not ended yet must not
    find the file of a later attempt under the same descriptor.
    """
    requested = {START_REQUESTED: str(time.time())}
    if processes == 1:
        return [requested]
    common = requested | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {STORE: f"/proc/{os.getpid()}/fd/{os.memfd_create(STORE)}"}
    common |= {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return [common | {"RANK": str(index), "LOCAL_RANK": str(index)} for index in range(processes)]


class Launch:
    """One call of `lora-kit train`, from the first start to the last exit."""

    def __init__(self, program: Program, zygote: Zygote, processes: int, run: Path, lease: Lease) -> None:
        self._program, self._processes, self._run = program, processes, run
        self._step_timeout = program.step_timeout
        self.keeper, self.console = Keeper(lease), Console(silent=False)
        self._signals: list[tuple[float, int]] = []
        self.zygote = zygote
        program.prepare(zygote)
        self._ahead = _start_ahead(program)
        self.attempt = Attempt()
        self._beats = self._beat()  # the counter when the last start ended
        self._unreported: float | None = None  # time since which a training process has ended without a report
        self._life = (0, 0, 0)  # the counters that show signs of life, as last seen
        self._silent, self._longest, self._cpu_seconds, self._looked = 0.0, 0.0, 0.0, time.monotonic()

    def handle_signal(self, number: int, frame: Any) -> None:
        """Record a stop signal; at the second signal, kill the training processes and exit without a checkpoint.

        A signal within `FORWARDED_SECONDS` of the first does not count as the second: a launcher such as srun may
        forward a signal that this process has also received directly.
        """
        self._signals.append((time.monotonic(), number))
        if self._signals[-1][0] - self._signals[0][0] > FORWARDED_SECONDS:
            self.zygote.process.kill()
            os._exit(128 + number)

    def run(self, max_restarts: int) -> int:
        """Train, restart after every failure but at most `max_restarts` times, and return the exit code."""
        for number in signals_to_hear():
            signal.signal(number, self.handle_signal)
        traces_by_failure: dict[tuple[str, int], list[str]] = {}
        try:
            for restart in range(max_restarts + 1):
                self._begin()
                code = self._watch()
                if code is not None:
                    return code
                process, cause = self.attempt.cause()
                step, trace = self._finished_step(), self.attempt.traces.get(process, "")
                traces = traces_by_failure.setdefault((cause.partition(": ")[2], step), [])  # for whichever process
                traces.append(trace)
                repeated = len(traces) == SAME_FAILURES and (trace or "memory" in cause)
                last = repeated or restart == max_restarts
                if trace and (len(traces) == 1 or last):
                    self.console.restore_terminal()
                    print(traces[0], file=sys.stderr, end="", flush=True)
                self.keeper.journal.event("restart" if not last else "failed", step=step, cause=cause)
                if last:
                    why = f"the same failure {SAME_FAILURES} times" if repeated else f"{restart} restart(s) made"
                    self.console.warn(f"{cause} after step {step}; {why}, so the run ends; the same command resumes it")
                    return self._exit_code(process)
                self.console.warn(f"{cause} after step {step}; restarting from there ({restart + 1}/{max_restarts})")
            raise AssertionError("the last attempt returns")
        finally:
            self.zygote.end()
            self._end_ahead()
            self.console.restore_terminal()
            self.keeper.end()
            self._finish_uploads()
            with suppress(OSError):  # the disk is full; the next start sees that this process is dead
                self.keeper.lease.release()

    def _finish_uploads(self) -> None:
        limit = FINISHED_SECONDS, STOPPED_SECONDS
        left = self.keeper.finish_uploads(lambda: limit[bool(self._signals)], self.console.tick)
        self.console.restore_terminal()
        if left:
            self.console.warn(left)

    def _begin(self) -> None:
        """Start the processes of an attempt."""
        if self.zygote.process.poll() is not None:
            self.zygote.end()
            self.zygote = Zygote(fresh=self.zygote.fresh)
            self._program.prepare(self.zygote)
        self.attempt, self._silent, self._longest, self._cpu_seconds = Attempt(), 0.0, 0.0, 0.0
        self._looked = time.monotonic()
        self.keeper.prepare_restart()
        keeper = {KEEPER: self.keeper.lease.to_json()}
        started = environments(self._processes)
        self.zygote.start(self._program.worker, self._program.request, [each | keeper for each in started])

    def _end_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.kill()
            self._ahead.wait()
            self._ahead = None

    def _watch(self) -> int | None:
        """Wait until the attempt ends; return the run's exit code, None if the attempt must be repeated."""
        failed_at = refused_at = None
        while True:
            self.keeper.poll()
            self._receive()
            if self._signals:
                return self._stop(self._signals[0][1])
            if self.attempt.failures and failed_at is None:
                failed_at = time.monotonic()
            wait = SIBLINGS_SECONDS if self._processes > 1 else 0.0
            # another process may still report the cause
            waiting = failed_at is not None and time.monotonic() - failed_at < wait
            codes, traces = self.attempt.codes.items(), self.attempt.traces
            # a process that ended without a traceback has raised an error of lora_kit, which a restart would repeat
            refused = {process: code for process, code in codes if code > 0 and process not in traces}
            if self.attempt.refusals and refused_at is None:
                refused_at = time.monotonic()
            if refused_at is not None and not self.attempt.refusals.keys() <= self.attempt.codes.keys():
                # wait until it has ended; an error of another process may only mean that it has lost this one
                waiting = time.monotonic() - refused_at < ENDING_SECONDS
                refused |= dict.fromkeys(self.attempt.refusals, FAILED) if not waiting else {}
            if refused and not waiting:
                self._show_refusals(refused)
                return max(refused.values())
            if failed_at is not None and not waiting:
                self._kill()
                return None
            if len(self.attempt.codes) == self._processes and not self.attempt.failures:
                return 0
            if failed_at is None and self._hangs():
                self.attempt.failures.append((0, f"no sign of life for {self._silent:.0f} s (a hang)"))
            time.sleep(POLL_SECONDS)

    def _receive(self) -> None:
        """Record which processes have started, failed and ended."""
        attempt = self.attempt
        for message in self.zygote.messages():
            if "started" in message:
                self._end_ahead()
                attempt.running[message["index"]] = message["started"]
                oom.offer_to_the_oom_killer(message["started"])
            elif "failed" in message:
                process, error = message["failed"], message["error"]
                attempt.traces[process] = message["trace"]
                kind = "out of memory: " if any(word in error for word in oom.WORDS) else ""
                attempt.failures.append((process, f"process {self._index(process)}: {kind}{error}"))
            elif "refused" in message:
                attempt.refusals[message["refused"]] = message["text"]
            else:
                self._ended(message["ended"], message["code"])
        if self._misses_reports():
            self.zygote.process.kill()
            self.zygote.process.wait()
        ended = self.zygote.process.poll()
        if ended is not None and len(attempt.codes) < self._processes and not attempt.failures:
            if -ended in STOP_SIGNALS:
                self._signals.append((time.monotonic(), -ended))
            elif ended > 0:  # an import failed
                attempt.codes[self.zygote.process.pid] = ended
            else:
                attempt.failures.append((self.zygote.process.pid, f"{FORKS}: {_died(-ended)}"))

    def _misses_reports(self) -> bool:
        """Return whether a training process ended `REPORT_SECONDS` ago and the zygote has not reported it."""
        running = [process for process in self.attempt.running.values() if process not in self.attempt.codes]
        if all((process_state(process) or ENDED)[0] not in ENDED for process in running):
            self._unreported = None
        elif self._unreported is None:
            self._unreported = time.monotonic()
        return self._unreported is not None and time.monotonic() - self._unreported > REPORT_SECONDS

    def _show_refusals(self, codes: Mapping[int, int]) -> None:
        """Print the errors with which processes ended. Where all processes raise the same error, it is printed once."""
        silent = "{}: ended with exit code {} and no message; the run can be started again"
        forks = self.zygote.process.pid
        names = {process: f"process {self._index(process)}" for process in codes} | {forks: FORKS}
        texts = [
            self.attempt.refusals.get(process, silent.format(names[process], code)) for process, code in codes.items()
        ]
        self.console.restore_terminal()
        for text in dict.fromkeys(texts):
            print_error(text)
        if self._beat() != self._beats:  # this start has trained, so the run has changed and its failure is logged
            with suppress(LeaseError):
                self.keeper.journal.event("failed", step=self._finished_step(), cause=short_cause(texts[0]))

    def _beat(self) -> int:
        return self.keeper.region.words[Word.BEAT] if self.keeper.region else 0

    def _index(self, process: int) -> int:
        return next((index for index, running in self.attempt.running.items() if running == process), -1)

    def _ended(self, process: int, code: int) -> None:
        self.attempt.codes[process] = code
        if -code in STOP_SIGNALS:
            self._signals.append((time.monotonic(), -code))
        elif code < 0:
            self.attempt.failures.append((process, f"process {self._index(process)}: {_died(-code)}"))

    def _hangs(self) -> bool:
        """Return whether the trainer has shown no sign of life for too long.

        Time in which this process itself was suspended (SIGSTOP, or sleep of the machine) does not count.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 1.0), now  # this process itself may have been suspended
        words = self.keeper.region.words if self.keeper.region else None
        life = (words[Word.PHASE], words[Word.BEAT], words[Word.HANDLED]) if words else (0, 0, 0)
        if life != self._life:
            if life[0] == self._life[0] == Phase.TRAINING:
                # the beat came at an unknown moment since the last look, so all of that time is counted
                self._longest = max(self._longest, self._silent + passed)
            self._life, self._silent = life, 0.0
            return False
        self._silent += passed
        limit = LOADING_TIMEOUT_SECONDS
        if life[0] == Phase.TRAINING and self._longest:
            limit = self._step_timeout or max(self._program.least_timeout, TIMEOUT_FACTOR * self._longest)
        elif life[0] == Phase.LOADING and (self._step_timeout or LEAST_TIMEOUT_SECONDS) < self._silent <= limit:
            return any(map(_suspended, [self.zygote.process.pid, *self.attempt.running.values()]))
        elif life[0] == Phase.LOADING and self._silent > limit and self._works():
            self._silent = 0.0
        return life[0] != Phase.ENDED and self._silent > limit

    def _works(self) -> bool:
        """Return whether the training processes have used the CPU since the last call, the only sign of loading."""
        before, self._cpu_seconds = self._cpu_seconds, sum(map(_cpu_seconds, self.attempt.running.values()))
        return self._cpu_seconds - before > LITTLE_WORK

    def _live_step(self) -> int:
        """Return the newest live step; 0 if there is none."""
        published = self.keeper.region.snapshots() if self.keeper.region else []
        return published[0].step if published else 0

    def _finished_step(self) -> int:
        """Return the newest finished step. After a resume from a checkpoint no step may be live yet."""
        return max(self._live_step(), self.keeper.journal.last_step())

    def _kill(self) -> None:
        """Kill the processes of an attempt that are still running and wait until they have ended."""
        for process in self.attempt.running.values():
            if process not in self.attempt.codes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        while len(self.attempt.codes) < len(self.attempt.running) and self.zygote.process.poll() is None:
            self._receive()
            time.sleep(POLL_SECONDS / 10)

    def _stop(self, signal_number: int) -> int:
        """End the run after a stop signal, and return the exit code.

        Unless all training processes have succeeded, kill them and write the newest finished step as a checkpoint.
        """
        self._receive()
        if len(self.attempt.codes) == self._processes and not any(self.attempt.codes.values()):
            return 0
        self.zygote.end()
        finished = self._finished_step()
        step = self.keeper.end()  # the step of the newest checkpoint, after its hashes were checked
        name = name_of(signal_number)
        self.console.restore_terminal()
        self.keeper.journal.event("stopped", step=step, signal=name)
        if step >= finished:
            self.console.say(
                f"stopped: {self._run}: {name} after step {step}, which is durable; the same command resumes it"
            )
            return STOPPED
        first, waiting = step + 1, self._live_step() >= finished
        missing = f"step {finished} is" if first == finished else f"steps {first} to {finished} are"
        print_error(
            f"{self._run}: {name} after step {finished}, but the newest checkpoint holds step {step}: {missing} not on "
            "disk. "
            + (
                f"Shared memory still holds step {finished}: free disk space and repeat the command before the machine "
                "restarts"
                if waiting
                else f"The same command goes on from step {step} and computes them again"
            )
        )
        return FAILED

    def _exit_code(self, process: int) -> int:
        code = 1 if process in self.attempt.traces else self.attempt.codes.get(process, 1)
        return code if code > 0 else 128 - code


def launch(
    program: Program,
    *,
    zygote: Zygote,
    processes: int,
    run: Path,
    lease: Lease,
    max_restarts: int,
) -> int:
    """Train in processes of their own under a keeper, and return the exit code.

    Args:
        program: What the processes run.
        zygote: The process that forks the training processes; it is ended at the end.
        processes: The number of training processes.
        run: The run's folder.
        lease: The lease that this process holds; it is released at the end.
        max_restarts: The most restarts after failures.
    """
    return Launch(program, zygote, processes, run, lease).run(max_restarts)


def _start_ahead(program: Program) -> "subprocess.Popen[bytes] | None":
    """Start to prepare the data of a request; return None if there is no processor or process to spare for that."""
    if program.ahead is None or len(os.sched_getaffinity(0)) < 2:
        return None
    nothing, command = subprocess.DEVNULL, [sys.executable, "-m", program.ahead, program.request]
    with suppress(OSError):  # a limit of processes or memory, which the training processes may just fit into
        return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
    return None


def _died(number: int) -> str:
    """Return the cause of death of a process that a signal killed."""
    return f"killed by {name_of(number)}" + (
        " (out of memory?)" if number == signal.SIGKILL and oom.kernel_has_killed() else ""
    )


def _cpu_seconds(process: int) -> float:
    """Return the CPU time of a process and of its children, which prepare the data."""
    seconds = 0.0
    with suppress(psutil.NoSuchProcess):
        owner = psutil.Process(process)
        for member in (owner, *owner.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = member.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _suspended(process: int) -> bool:
    state = process_state(process)
    return state is not None and state[0] == "T"
