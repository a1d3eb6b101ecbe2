"""The zygote: a process that has imported everything and waits to fork, so that starts and restarts need no imports.

It must not own anything that is unsafe to fork: no CUDA context, no threads. If the imports initialised CUDA
nevertheless, its children exec a fresh interpreter. Messages are JSON over a SOCK_SEQPACKET socket, which keeps
message boundaries.
"""

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MESSAGE_BYTES = 120_000  # Linux: an argument of exec is at most 131,072 bytes
TRACE_CHARACTERS = 8000
BUFFER_BYTES = 1 << 20


def end_with_parent(number: signal.Signals) -> None:
    """Get this signal when the parent process ends, on Linux: an orphan would keep the GPU's memory."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def main(descriptor: int, modules: Sequence[str]) -> None:
    """Import modules, then fork a training process for every message and report how each ends.

    Args:
        descriptor: The file descriptor of the socket to the keeper.
        modules: The modules to import.
    """
    end_with_parent(signal.SIGKILL)
    keeper = socket.socket(fileno=descriptor)
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    wakeup, wakeup_writer = socket.socketpair()
    wakeup_writer.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the keeper, which ends the run
    for module in modules:
        import_module(module)
    gc.freeze()  # otherwise garbage collections in a child write to all imported objects and so copy their pages
    import torch

    cuda_initialized = torch.cuda.is_initialized()
    while True:
        ready, _, _ = select.select([keeper, wakeup], [], [])
        if wakeup in ready:
            wakeup.recv(4096)
            _report_ended_children(keeper)
        if keeper in ready:
            message = keeper.recv(MESSAGE_BYTES)
            if not message:  # the keeper has ended
                os._exit(0)
            start = json.loads(message)
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                _work(start["function"], start["argument"], start["environment"], keeper, fresh=cuda_initialized)
            _send(keeper, {"started": process, "index": start["index"]})


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
    keeper.send(json.dumps(message).encode())


def _work(function: str, argument: str, environment: Mapping[str, str], keeper: socket.socket, *, fresh: bool) -> None:
    """Call `module:function` with an argument, in this process or, after exec, in a fresh interpreter; then exit."""
    module, _, name = function.partition(":")
    end_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)  # a signal ends this process at once; the keeper sees which signal
    os.environ.update(environment)
    if fresh:
        code = f"import sys; from {module} import {name}; {name}(sys.argv[1])"
        os.execv(sys.executable, [sys.executable, "-c", code, argument])
    try:
        getattr(import_module(module), name)(argument)
    except Exception as error:
        kind = f"{type(error).__name__}: {error}".splitlines()[0]
        trace = traceback.format_exc()[-TRACE_CHARACTERS:]
        _send(keeper, {"failed": os.getpid(), "error": kind[:500], "trace": trace})
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
