"""Stop signals where no keeper is the parent: under `accelerate launch`, `torchrun`, in a notebook or a script.

The main thread may be in a collective that never returns, where no Python handler runs. So a thread reads the signals
from the interpreter's wakeup descriptor and leaves word in the live region, and the keeper makes the newest step safe
whatever this process does. One that is well ends its step, agrees with the others and raises `Stopped`.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_kit.runs.lease import KEEPER

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FORWARDED_SECONDS = 2.0  # a signal that comes again so soon is a launcher passing on what its processes had heard


class Stop(threading.Event):
    """Set by the first stop signal; `heard` yields every signal's number, whatever the main thread does."""

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.writing = socket.socketpair()
        self.writing.setblocking(False)

    def heard(self) -> Iterator[int]:
        """Yield signals until `end`."""
        while number := self.reading.recv(1)[0]:
            if number in SIGNALS:
                yield number

    def end(self) -> None:
        """Let `heard` return, so that its thread can be joined: one that outlives Python aborts it."""
        self.writing.send(b"\0")


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGTERM, SIGUSR1 and SIGINT (a notebook's stop button) into a wish while the run lasts."""
    wish, first = Stop(), time.monotonic()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not wish.is_set():
            first = time.monotonic()
        elif time.monotonic() - first > FORWARDED_SECONDS:  # a second signal does not wait for the step
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        wish.set()

    if KEEPER in os.environ or threading.current_thread() is not threading.main_thread():
        with wish.reading, wish.writing:
            yield wish
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(wish.writing.fileno(), warn_on_full_buffer=False)
    try:
        yield wish
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        wish.reading.close()
        wish.writing.close()
