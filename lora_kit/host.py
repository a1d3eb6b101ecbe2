"""This machine and this process on it: the cores that it may use, and its end together with its parent."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def host_cores() -> int:
    """Return how many cores this process may use; the affinity mask and the CPU limit of a container count."""
    import psutil

    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # no such limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def end_with_parent(number: signal.Signals) -> None:
    """Get this signal when the parent process ends, on Linux: an orphan would keep the GPU's memory."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
