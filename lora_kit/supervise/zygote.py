"""A process that has imported everything and only waits to fork: training starts and restarts without the imports.

It must own nothing that a fork would share: no CUDA context, no thread. Where importing has touched CUDA all the same,
its children begin anew as Python processes. Messages are JSON over a socket that keeps their borders.
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


def end_with_parent(last: signal.Signals) -> None:
    """Get this signal when the process that started this one ends, on Linux: an orphan would hold the GPU."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, last)


def main(descriptor: int, modules: Sequence[str]) -> None:
    """Import modules, then fork a training process for every message, and tell how each ended."""
    end_with_parent(signal.SIGKILL)
    orders = socket.socket(fileno=descriptor)
    orders.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keeper decides
    for module in modules:  # what takes seconds
        import_module(module)
    gc.freeze()  # else every collection in a child walks through what was imported, and copies its pages
    import torch

    touched = torch.cuda.is_initialized()
    while True:
        ready, _, _ = select.select([orders, wake], [], [])
        if wake in ready:
            wake.recv(4096)
            _tell_ends(orders)
        if orders in ready:
            message = orders.recv(MESSAGE_BYTES)
            if not message:  # the keeper is gone
                os._exit(0)
            order = json.loads(message)
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                _work(order["function"], order["argument"], order["environment"], orders, fresh=touched)
            _send(orders, {"started": process, "index": order["index"]})


def _tell_ends(orders: socket.socket) -> None:
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return
        _send(orders, {"ended": process, "code": os.waitstatus_to_exitcode(status)})


def _send(orders: socket.socket, message: Mapping[str, Any]) -> None:
    orders.send(json.dumps(message).encode())


def _work(function: str, argument: str, environment: Mapping[str, str], orders: socket.socket, *, fresh: bool) -> None:
    """Call `module:function` with an argument, in this process or, after exec, in a fresh interpreter; then exit."""
    module, _, name = function.partition(":")
    end_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)  # a signal ends it at once, whatever it is doing; the keeper sees which
    os.environ.update(environment)
    if fresh:
        code = f"import sys; from {module} import {name}; {name}(sys.argv[1])"
        os.execv(sys.executable, [sys.executable, "-c", code, argument])
    try:
        getattr(import_module(module), name)(argument)
    except Exception as error:
        kind = f"{type(error).__name__}: {error}".splitlines()[0]
        told = traceback.format_exc()[-TRACE_CHARACTERS:]
        _send(orders, {"failed": os.getpid(), "error": kind[:500], "trace": told})
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
