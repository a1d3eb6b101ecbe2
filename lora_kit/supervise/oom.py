"""When memory runs out: the kernel takes a training process before the keeper, which saves its work, and is named."""

from contextlib import suppress
from pathlib import Path

MORE = 200  # of the 1000 that would make a process the first to go whatever it uses
WORDS = ("OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory")


def offer_to_the_oom_killer(process: int) -> int | None:
    """Let the kernel take this process sooner than those that are as they were; return its score before."""
    with suppress(OSError, ValueError):
        before = int(_score(process).read_text())
        set_score(process, min(1000, before + MORE))
        return before
    return None  # not Linux, or it is gone


def set_score(process: int, score: int) -> None:
    """Give a process a score that it has had before; anything lower takes a privilege."""
    with suppress(OSError):
        _score(process).write_text(str(score))


def _score(process: int) -> Path:
    return Path(f"/proc/{process}/oom_score_adj")


def _kills() -> int:
    """Return how many processes the kernel has killed for memory since it started; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


_BEFORE = _kills()


def kernel_has_killed() -> bool:
    """Return whether the kernel has killed for memory since this process began."""
    return _kills() > _BEFORE
