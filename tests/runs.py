"""Start real runs for the tests: command line, environment, what they left behind.

A run is forked from a process that has imported everything (fork_server.py). It starts from a fresh interpreter where
the test asks for that, or where its environment has a value that may have decided something during the imports.
"""

import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
from fork_server import INJECT, MESSAGE_BYTES, NUMBER

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD", "LOCAL_"))}
READ_AFTER_IMPORTS = re.compile(
    r"FAULTS|AWS_|PYTEST_|WANDB_|TRACKIO_|MLFLOW_|HF_TOKEN$|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)$|MASTER_|NCCL_|GLOO_|OMPI_|SLURM_|PMI"
    r"|TORCHELASTIC_|LORA_KIT_(STORE|START_REQUESTED|CACHE)$|TORCHINDUCTOR_CACHE_DIR$|CC$|LD_PRELOAD$|ONEDNN_|CUDA_VISIBLE_DEVICES$"
)
SESSION = "LORA_KIT_TESTS"  # environment variable: the folder of a session of tests, for all its workers
WAIT_SECONDS = (
    300.0  # for anything that a test waits for: a guard against hangs, far above what a test takes under load
)
POLL_SECONDS, MOST_POLL_SECONDS = 0.005, 0.1


STARTED = []  # processes that the running test has started


class Forked:
    """The part of `subprocess.Popen` that the tests use, for a process that the fork server has started."""

    def __init__(self, arguments, environment, code=None):
        reading, output = os.pipe()
        self._told, tell = os.pipe()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        request = {"arguments": arguments, "environment": environment, "folder": str(Path.cwd()), "code": code}
        message = json.dumps(request | {"cores": cores}).encode()
        assert len(message) < MESSAGE_BYTES
        socket.send_fds(fork_server(environment.get("LD_PRELOAD", "")), [message], [output, tell])
        os.close(output)
        os.close(tell)
        self.stdout = os.fdopen(reading, encoding="utf-8")
        self.returncode = None
        self.pid = self._number(WAIT_SECONDS)

    def _number(self, timeout):
        """Return the next number that the server tells, None when none comes in time."""
        if not select.select([self._told], [], [], timeout)[0]:
            return None
        number = os.read(self._told, NUMBER.size)
        assert number, "the fork server is gone"
        return NUMBER.unpack(number)[0]

    def poll(self):
        if self.returncode is None:
            self.returncode = self._number(0)
        return self.returncode

    def wait(self, timeout=WAIT_SECONDS):
        if self.returncode is None:
            self.returncode = self._number(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.pid, timeout)
        return self.returncode

    def communicate(self, timeout=WAIT_SECONDS):
        """Return all that was printed, once the process and those that share its stdout have ended."""
        end, printed = time.monotonic() + timeout, b""
        while True:
            if not select.select([self.stdout], [], [], max(0, end - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired(self.pid, timeout, printed)
            part = os.read(self.stdout.fileno(), 1 << 16)
            if not part:
                self.wait(max(0.1, end - time.monotonic()))
                return printed.decode(), None
            printed += part

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __del__(self):
        self.stdout.close()
        os.close(self._told)


@cache
def fork_server(preload):
    """Return a socket to the fork server of this session, which the first process that needs it starts.

    Args:
        preload: Libraries for LD_PRELOAD, which a process can only get at its start.
    """
    address = f"\0{os.environ.get(SESSION, os.getpid())} {preload}"  # a name that is in no folder
    end = time.monotonic() + WAIT_SECONDS
    while True:
        mine, listening = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
        try:
            mine.connect(address)
            listening.close()
            return mine
        except ConnectionRefusedError:
            mine.close()
        try:
            listening.bind(address)
        except OSError:  # another process is starting it
            assert time.monotonic() < end, "the fork server of this session does not listen"
            time.sleep(POLL_SECONDS)
        else:
            listening.listen()
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("fork_server.py"), str(listening.fileno())],
                stdin=subprocess.DEVNULL,
                # with this check the import of torch leaves CUDA alone
                env=ENVIRONMENT | {"LD_PRELOAD": preload, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                pass_fds=[listening.fileno()],
                start_new_session=True,
            )
        finally:
            listening.close()


def same_imports(environment):
    """Return whether a process with this environment imports what the fork server has imported."""
    changed = {key for key, value in (environment.items() ^ ENVIRONMENT.items()) if not READ_AFTER_IMPORTS.match(key)}
    return not changed or (changed == {"PYTHONPATH"} and environment["PYTHONPATH"] == with_faults())


def with_faults():
    """Return the PYTHONPATH on which Python finds the faults that tests inject."""
    return os.pathsep.join([str(INJECT.parent), ENVIRONMENT.get("PYTHONPATH", "")])


def started(arguments, environment, *, code=None, fresh=False):
    """Start `lora-kit ARGUMENTS` or `python -c CODE ARGUMENTS`; return the process, whose stderr is its stdout."""
    arguments, environment = [str(argument) for argument in arguments], ENVIRONMENT | (environment or {})
    if not fresh and same_imports(environment):
        process = Forked(arguments, environment, code)
    else:
        process = subprocess.Popen(
            [sys.executable, *(("-m", "lora_kit") if code is None else ("-c", code)), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
    STARTED.append(process)
    return process


def kill_all():
    """Kill every process that `started` returned and that has not ended, with its session."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            with suppress(ProcessLookupError):  # it may not have its session yet
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):  # it has just ended
                process.kill()
            process.wait(WAIT_SECONDS)


KEEPER = "import os, sys; from runpy import run_module; sys.argv.append(str(os.getppid())); "
KEEPER += "run_module('lora_kit.supervise.keeper', run_name='__main__')"


def fork_keeper(lease):
    """Do what `lora_kit.supervise.keeper.start_keeper` does, for a process that ends only after its runs."""
    return started([lease.to_json()], os.environ, code=KEEPER)


def run_code(code, *arguments, environment=None, fresh=False):
    """Run Python code in a process that has imported everything or a `fresh` one; return what it printed."""
    process = started(arguments, environment, code=code, fresh=fresh)
    printed, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, f"exit code {process.returncode}\n{printed}"
    return printed


def start(recipe, out, *more, processes=1, environment=None, fresh=False):
    """Start a training command and return the process; `fresh` is its true command line, with all imports."""
    several = ["--processes", processes] if processes > 1 else []
    return started(["train", recipe, "--out", out, *several, *more], environment, fresh=fresh)


def train(recipe, out, *more, processes=1, expect=0, environment=None, fresh=False):
    """Train to the end and return what was printed."""
    process = start(recipe, out, *more, processes=processes, environment=environment, fresh=fresh)
    printed, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == expect, f"exit code {process.returncode}\n{printed}"
    return printed


def go_on(recipe, out, *changes):
    """Train to the end in this process, which has imported everything; return what that returns."""
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training import loop

    return loop.train(load_recipe(recipe, changes), out)


def state_hash(run, step):
    """Return a hash of the adapter's and the optimizer's bytes after a step."""
    folder = Path(run) / "checkpoints" / f"step-{step:08d}"
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def events(out, *kinds):
    """Return the events of these kinds of a run."""
    lines = [json.loads(line) for line in (Path(out) / "events.jsonl").read_text().splitlines()]
    return [one for one in lines if one["kind"] in kinds]


def records(out):
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def steps_shown(out):
    """Return the steps in a run's metrics.jsonl."""
    return [record["step"] for record in records(out)]


def nothing_was_lost(out, steps):
    """Check that a finished run shows every step once, that no resume did one again, and that its region is gone."""
    from lora_kit.runs import live

    assert steps_shown(out) == list(range(1, steps + 1))
    assert all(one["reached"] <= one["step"] for one in events(out, "resumed"))
    assert live.open_region(out) is None, "the region is still there"


def wait_until(condition, process=None, *, limit=WAIT_SECONDS):
    """Block until a condition holds and return its value; fail after `limit` seconds or if the process has ended."""
    begin = time.monotonic()
    end = begin + limit
    while True:
        ended = process is not None and process.poll() is not None
        if value := condition():
            return value
        assert not ended, f"the process has ended with {process.returncode}\n{process.stdout.read()}"
        now = time.monotonic()
        assert now < end, f"the condition does not hold after {limit} s"
        # a condition may take milliseconds: the longer the wait, the rarer the look
        time.sleep(min(POLL_SECONDS + (now - begin) / 20, MOST_POLL_SECONDS))


def gone(processes):
    """Return whether all these psutil processes have ended."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def wait_for_lines(path, count, process):
    """Block until a run's metrics have `count` lines; fail if the run ends before."""
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= count, process)
