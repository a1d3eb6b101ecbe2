"""What malloc and oneDNN keep of the memory that a run on a CPU frees."""

import ctypes
import os

PRODUCTS_KEPT = "128"
"""How many compiled products oneDNN keeps, some 0.3 MB each: a micro-batch of 2,048 tokens needs about 90, and the next
one mostly others. Of its own 1,024 most would never be used again, and lie between what could be freed."""

MMAP_THRESHOLD, TRIM_THRESHOLD, NEVER = -3, -1, 1 << 30  # of glibc's mallopt
LARGE = 1 << 19  # bytes of a tensor
MOST_BEFORE_2_35 = 1 << 25  # which those versions accept


def keep_freed_memory(*, below: int = NEVER) -> None:
    """Let glibc use again what is freed, instead of giving it to the system and asking for it a moment later.

    Every page of new memory is a fault. Activations of 32 MiB and more would be new each time.

    Args:
        below: Bytes of what is used again.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    if set_option(MMAP_THRESHOLD, below) or set_option(MMAP_THRESHOLD, MOST_BEFORE_2_35):
        set_option(TRIM_THRESHOLD, NEVER)
