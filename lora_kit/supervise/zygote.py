"""The zygote: a process that has imported everything and waits to fork, so that starts and restarts need no imports.

The zygote must not own anything that is unsafe to fork: no CUDA context, no threads. If the imports initialised CUDA
nevertheless, its children exec a fresh interpreter. Messages are JSON over a SOCK_SEQPACKET socket, which keeps message
boundaries. The zygote begins with the import of torch, which every run needs and which takes a second, before the
keeper has read the recipe; the keeper's first message names the other modules.
"""

import atexit
import ctypes
import gc
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from lora_kit.errors import LaunchError, LoraKitError
from lora_kit.host import end_with_parent
from lora_kit.views.output import make_output_safe

MESSAGE_BYTES = 120_000  # Linux: an argument of exec is at most 131,072 bytes
TRACE_CHARACTERS = 8000
ERROR_CHARACTERS = 15_000
BUFFER_BYTES = 1 << 20
STORE = "LORA_KIT_STORE"  # environment variable of training processes: the file through which they meet
RANKS = re.compile(  # variables by which torch, accelerate and MPI libraries find out that a process is one of several
    r"(LOCAL_|NODE_|GROUP_|ROLE_|CROSS_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|OMPI|PMIX?|PMI2|MV2|I_MPI)_.*"
    rf"|MPI_LOCAL(RANKID|NRANKS)|{STORE}|SLURM_(PROCID|LOCALID|NODEID|NTASKS|NPROCS|STEP_.*)"
)


class Zygote:
    """The zygote as its keeper sees it: the process, and the socket to it. Making one starts the process.

    Args:
        fresh: Whether its children are fresh interpreters, so that nothing is imported before they run.
    """

    def __init__(self, *, fresh: bool = False) -> None:
        self.fresh = fresh
        self._socket, zygote_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._socket.setblocking(False)
        # variables that a shell or another launcher has left would make a training process wait for others
        environment = {name: value for name, value in os.environ.items() if not RANKS.fullmatch(name)}
        # with this check the import of torch does not initialise CUDA, so that a forked process can use it
        environment |= {} if fresh else {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        command = [sys.executable, "-m", "lora_kit.supervise.zygote", str(zygote_socket.fileno()), *["fresh"] * fresh]
        try:
            self.process = subprocess.Popen(command, pass_fds=[zygote_socket.fileno()], env=environment)
        except OSError as error:
            raise LoraKitError(_cannot_start(error)) from error
        zygote_socket.close()

    def prepare(self, modules: Sequence[str], absent: Sequence[str] = ()) -> None:
        """Let the zygote import what its children need.

        Args:
            modules: The modules to import.
            absent: Packages that are not imported and look as if they were not installed.
        """
        self._send({"modules": list(modules), "absent": list(absent)})

    def start(self, function: str, argument: str, environments: Sequence[Mapping[str, str]]) -> None:
        """Ask the zygote to start a process for each environment.

        If the zygote has ended, nothing is raised here; `poll()` of the attribute `process` returns its exit code.

        Args:
            function: The function that each process calls, as `module:name`.
            argument: The argument of the function, the same for every process.
            environments: The environment variables of each process.

        Raises:
            LaunchError: The argument and the environment variables are too long for a message.
        """
        for index, environment in enumerate(environments):
            self._send({"index": index, "function": function, "argument": argument, "environment": dict(environment)})

    def _send(self, message: Mapping[str, Any]) -> None:
        text = json.dumps(message).encode()
        if len(text) > MESSAGE_BYTES:
            raise LaunchError(
                f"recipe and options: {len(text):,} bytes, more than the {MESSAGE_BYTES:,} that a training "
                "process can be given; shorten the recipe's longest list"
            )
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(text)

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived since the last call."""
        received = list[dict[str, Any]]()
        while True:
            try:
                message = self._socket.recv(MESSAGE_BYTES)
            except (BlockingIOError, ConnectionResetError):
                return received
            if not message:
                return received
            received.append(json.loads(message))

    def end(self) -> None:
        """Kill the zygote; the kernel then kills its children."""
        self.process.kill()
        self.process.wait()
        self._socket.close()


def main(descriptor: int, *, fresh: bool = False) -> None:
    """Import torch and the modules of the first message, then fork a process for every further message.

    Args:
        descriptor: The file descriptor of the socket to the keeper.
        fresh: Whether the processes are fresh interpreters; then nothing is imported.
    """
    end_with_parent(signal.SIGKILL)
    make_output_safe()
    keeper = socket.socket(fileno=descriptor)
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    wakeup, wakeup_writer = socket.socketpair()
    wakeup_writer.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the keeper, which ends the run
    fresh = fresh or _prepare(keeper)
    while True:
        ready, _, _ = select.select([keeper, wakeup], [], [])
        if wakeup in ready:
            wakeup.recv(4096)
            _report_ended_children(keeper)
        if keeper in ready:
            start = _receive(keeper)
            try:
                process = os.fork()
            except OSError as error:
                _send(keeper, {"refused": os.getpid(), "text": _cannot_start(error)})
                sys.exit(LoraKitError.exit_code)
            if process == 0:
                signal.set_wakeup_fd(-1)
                _work(start["function"], start["argument"], start["environment"], keeper, fresh=fresh)
            _send(keeper, {"started": process, "index": start["index"]})


def _prepare(keeper: socket.socket) -> bool:
    """Import torch and the modules of the first message; return whether that has initialised CUDA."""
    gc.disable()  # imports free next to nothing, and collections would take a third of their time
    import torch

    _import(_receive(keeper))
    gc.freeze()  # otherwise garbage collections in a child write to all imported objects and so copy their pages
    gc.enable()
    return bool(torch.cuda.is_initialized())


def _cannot_start(error: OSError) -> str:
    reason = f"a process for training cannot be started: {error.strerror}"
    return f"{reason}; raise the limit of processes (ulimit -u) or of memory"


def _receive(keeper: socket.socket) -> dict[str, Any]:
    """Return the keeper's next message; end this process if the keeper has ended."""
    message = keeper.recv(MESSAGE_BYTES)
    if not message:
        os._exit(0)
    content: dict[str, Any] = json.loads(message)
    return content


def _import(order: Mapping[str, Any]) -> None:
    """Import modules, with some packages absent."""
    for package in order["absent"]:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # its import fails, find_spec finds nothing
    for module in order["modules"]:
        import_module(module)


def _report_ended_children(keeper: socket.socket) -> None:
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return
        _send(keeper, {"ended": process, "code": os.waitstatus_to_exitcode(status)})


def _send(keeper: socket.socket, message: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # the keeper was killed, and this process ends with it
        keeper.send(json.dumps(message).encode())


def _work(function: str, argument: str, environment: Mapping[str, str], keeper: socket.socket, *, fresh: bool) -> None:
    """Call `module:function` with an argument, in this process or, after exec, in a fresh interpreter; then exit.

    An error is reported to the keeper: one of lora_kit by its text, which the keeper prints once for all processes, and
    any other by its traceback.
    """
    end_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)  # a signal ends this process at once; the keeper sees which signal
    os.environ.update(environment)
    if fresh:
        keeper.set_inheritable(True)
        code = "import sys; from lora_kit.supervise.zygote import work; work(int(sys.argv[1]), *sys.argv[2:])"
        os.execv(sys.executable, [sys.executable, "-c", code, str(keeper.fileno()), function, argument])
    module, _, name = function.partition(":")
    try:
        getattr(import_module(module), name)(argument)
    except LoraKitError as error:
        text = (str(error) or type(error).__name__)[:ERROR_CHARACTERS]
        _send(keeper, {"refused": os.getpid(), "text": text})
        end_process(error.exit_code)
    except Exception as error:
        kind = f"{type(error).__name__}: {error}".splitlines()[0]
        trace = traceback.format_exc()[-TRACE_CHARACTERS:]
        _send(keeper, {"failed": os.getpid(), "error": kind[:500], "trace": trace})
        end_process(1)
    end_process(0)


def end_process(code: int) -> NoReturn:
    """End this process as Python does, but do not take its modules apart.

    That would copy most pages of the process from which this process was forked, which takes half a second of a core.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120  # Python's own exit code if a flush fails
    ctypes.CDLL(None).fflush(None)  # writes the stdio buffers of libraries in C
    os._exit(code & 0xFF)


def work(descriptor: int, function: str, argument: str) -> None:
    """Be a process of the zygote in a fresh interpreter."""
    make_output_safe()
    _work(function, argument, {}, socket.socket(fileno=descriptor), fresh=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), fresh="fresh" in sys.argv)
