"""How much freed memory glibc's malloc and oneDNN keep in a run on a CPU."""

import ctypes
import os

PRODUCTS_KEPT = "128"
"""ONEDNN_PRIMITIVE_CACHE_CAPACITY: how many compiled products oneDNN keeps, about 0.3 MB each.

A micro-batch of 2,048 tokens needs about 90 and the next micro-batch mostly others. Most of the default 1,024 would
never be used again, and they fragment the heap."""

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of glibc's mallopt
NO_LIMIT = 1 << 30  # bytes
MOST_BEFORE_2_35 = 1 << 25  # bytes: the largest MMAP_THRESHOLD that glibc before 2.35 accepts
LARGE = 1 << 19  # bytes of a tensor


def keep_freed_memory(*, below: int = NO_LIMIT) -> None:
    """Let malloc reuse freed memory instead of returning it to the system, where every page of new memory is a fault.

    By default malloc returns large tensors at once and asks for them again at every step. Nothing changes without glibc
    or if the user has set malloc's thresholds in the environment.

    Args:
        below: Tensors of this many bytes or more still go back to the system.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    if mallopt(MMAP_THRESHOLD, below) or mallopt(MMAP_THRESHOLD, MOST_BEFORE_2_35):
        mallopt(TRIM_THRESHOLD, NO_LIMIT)
