"""Out of memory: make Linux kill a training process rather than the keeper, and notice that it has killed a process."""

from contextlib import suppress
from pathlib import Path

SCORE_INCREASE = 200  # added to oom_score_adj; the maximum of 1000 makes a process the first to be killed
WORDS = ("OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory")


def offer_to_the_oom_killer(process: int) -> int | None:
    """Raise a process's oom_score_adj, so that Linux kills this process rather than the keeper.

    Return the previous value; None if the system does not allow the change.
    """
    with suppress(OSError, ValueError):
        before = int(_score(process).read_text())
        set_score(process, min(1000, before + SCORE_INCREASE))
        return before
    return None  # not Linux, or the process has ended


def set_score(process: int, score: int) -> None:
    """Set a process's oom_score_adj if the system allows it; a lower score may need CAP_SYS_RESOURCE."""
    with suppress(OSError):
        _score(process).write_text(str(score))


def _score(process: int) -> Path:
    return Path(f"/proc/{process}/oom_score_adj")


def _kills() -> int:
    """Return the number of out-of-memory kills since the system's start; 0 where the system does not count them."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


_BEFORE = _kills()


def kernel_has_killed() -> bool:
    """Return whether Linux has killed any process of this machine for lack of memory since this module was imported."""
    return _kills() > _BEFORE
