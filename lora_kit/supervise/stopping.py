"""Stop signals where no keeper is the parent: under `accelerate launch`, `torchrun`, in a notebook or a script.

The main thread may be in a collective that never returns; then no Python signal handler runs. So a thread reads the
signals from the interpreter's wakeup descriptor and writes them into the live region (memory that the keeper shares),
and the keeper makes the newest step durable whatever this process does. A main thread that is not blocked finishes its
step, agrees with the other processes and raises `Stopped`.
"""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lora_kit.errors import Stopped
from lora_kit.runs.lease import borrowed_lease

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
FORWARDED_SECONDS = 2.0  # a signal so soon after the first was forwarded by a launcher; it is no second request


def signals_to_hear() -> list[signal.Signals]:
    """Return the stop signals without SIGHUP where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (number is signal.SIGHUP and ignored)]


def name_of(number: int) -> str:
    """Return the name of a signal, or its number: most real-time signals have no name."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def stop_before_training() -> None:
    """Raise `Stopped` at a stop signal until something else handles it: nothing is trained that could be lost.

    Without a handler the first process of a container, PID 1, would ignore the signal and begin to train.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped by {name_of(number)} before training began; the same command begins it")

    for number in signals_to_hear():
        signal.signal(number, stop)


class StopRequest(threading.Event):
    """An event that the first stop signal sets.

    `signals` yields the number of every stop signal, even if the main thread hangs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.writing = socket.socketpair()
        self.writing.setblocking(False)

    def signals(self) -> Iterator[int]:
        """Yield the numbers of stop signals until `end` is called."""
        while number := self.reading.recv(1)[0]:
            if number in STOP_SIGNALS:
                yield number

    def end(self) -> None:
        """Let `signals` return, so that its thread can be joined: a thread that is alive at exit aborts Python."""
        self.writing.send(b"\0")


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Let stop signals (SIGINT is a notebook's stop button) set a `StopRequest` inside this context.

    A process with a keeper installs no handlers: there the keeper receives the signals.
    """
    request, first = StopRequest(), time.monotonic()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not request.is_set():
            first = time.monotonic()
        elif time.monotonic() - first > FORWARDED_SECONDS:  # not a launcher's copy: end at once
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        request.set()

    if borrowed_lease() or threading.current_thread() is not threading.main_thread():
        with request.reading, request.writing:
            yield request
        return
    before = {number: signal.signal(number, handle) for number in signals_to_hear()}
    wakeup = signal.set_wakeup_fd(request.writing.fileno(), warn_on_full_buffer=False)
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        request.reading.close()
        request.writing.close()
