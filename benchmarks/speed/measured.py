"""What every system leaves behind, and the memory that its process took above the weights of its base."""

import ctypes
import gc
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from sizes import Counts

RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4


@dataclass
class Measured:
    """One run: a loss and an end (seconds of some clock) for each step, what it trained on, how long it waited for a
    save, and the pause before each step, if there were pauses."""

    began: float = 0.0
    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    threads: int = 0
    stalls: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        pauses = [0.0, *self.pauses[1:]] if self.pauses else [0.0] * len(self.ends)  # the first is before `began`
        spans = pairwise([self.began, *self.ends])
        return [later - sooner - pause for (sooner, later), pause in zip(spans, pauses, strict=True)]


class Memory:
    """The peak of this process's memory, from when its base is loaded and resident, and what others did meanwhile."""

    def __init__(self) -> None:
        self.base = 0
        self._began = (0.0, 0.0, 0.0)
        self._peak = 0
        self._exact = True

    def watch_loading(self) -> None:
        """Let every base that transformers loads from now on be the ground that the peak is counted from."""
        from transformers import AutoModelForCausalLM

        load = AutoModelForCausalLM.from_pretrained

        def watched(*arguments: Any, **named: Any) -> Any:
            loaded = load(*arguments, **named)
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # a pair with `output_loading_info`
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()  # in memory now, and no file that is mapped
            self._begin(sum(one.nbytes for one in model.parameters()))
            return loaded

        AutoModelForCausalLM.from_pretrained = watched

    def _begin(self, weights: int) -> None:
        self._began = _clocks()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.base = weights  # a model may still go to the device
            return
        _give_back()
        self.base = psutil.Process().memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak starts anew
        except OSError:
            self._exact = False
            threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, psutil.Process().memory_info().rss)
            time.sleep(0.01)

    def above_base(self) -> int:
        """Return the peak so far above the base's weights, in bytes."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.base
        if self._exact:
            status = Path("/proc/self/status").read_text()
            self._peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        return self._peak - self.base

    def others(self) -> float:
        """Return which share of the machine's time other processes have taken since the base was loaded."""
        wall, all_of_them, own = (now - then for now, then in zip(_clocks(), self._began, strict=True))
        return max(0.0, all_of_them - own) / (wall * (psutil.cpu_count() or 1))


def _clocks() -> tuple[float, float, float]:
    """Return seconds: of a clock, of all processors at work, of this process and those that it started."""
    times, process = psutil.cpu_times(), psutil.Process()
    own = sum(sum(one.cpu_times()[:4]) for one in (process, *process.children(recursive=True)))  # compilers too
    return time.perf_counter(), sum(times) - times.idle - getattr(times, "iowait", 0.0), own


def _give_back() -> None:
    """Let the allocator return what loading has freed."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def limit_memory(share: float = 0.9) -> None:
    """Let an allocation beyond what the machine has free fail, before the machine kills somebody else."""
    import resource

    if not torch.cuda.is_available() and hasattr(resource, "RLIMIT_DATA"):
        most = int(psutil.virtual_memory().available * share)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
