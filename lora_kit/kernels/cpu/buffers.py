"""A pool of buffers for activations: a buffer is used again as soon as no tensor refers to it.

malloc reuses memory less well: torch asks for aligned memory, so a freed block of exactly the size of a tensor is too
small for it. At 160 M parameters such blocks were more than a quarter of the memory that malloc held.
"""

import math
import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
HUGE_PAGE = 1 << 21  # bytes
FIRST_ROWS = 2048  # rows of a new buffer; a longer micro-batch makes it larger


class BufferPool:
    """Buffers for the memory of tensors. A buffer belongs to one tensor until the last view of the tensor is deleted.

    Every buffer is long enough for the longest micro-batch so far, so a tensor with any number of rows fits. Pages that
    are never written take no memory.
    """

    def __init__(self) -> None:
        self._rows, self._free = FIRST_ROWS, dict[int, list[np.ndarray]]()

    def release(self) -> None:
        """Return all free buffers to the system now, and buffers in use as soon as their tensors are deleted."""
        self._free = {}

    def empty(self, rows: int, *shape: int) -> Tensor:
        """Return an uninitialised bf16 tensor [rows, *shape] in a buffer of the pool."""
        if rows > self._rows:
            self.release()
            self._rows = 1 << (rows - 1).bit_length()
        row_bytes = 2 * math.prod(shape)
        return self._borrow(rows * row_bytes, self._rows * row_bytes).view(torch.bfloat16).view(rows, *shape)

    def workspace(self, size: int) -> Tensor:
        """Return an uninitialised uint8 tensor of `size` bytes in a buffer of the pool."""
        return self._borrow(size, 1 << (size - 1).bit_length())

    def _borrow(self, size: int, capacity: int) -> Tensor:
        free = self._free.setdefault(capacity, [])
        try:
            buffer = free.pop()
        except IndexError:
            memory = mmap.mmap(-1, max(1, capacity), flags=PRIVATE)
            if capacity >= HUGE_PAGE:
                with suppress(OSError):  # a system without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            buffer = np.frombuffer(memory, np.uint8)
        borrowed = buffer[:size]
        weakref.finalize(borrowed, free.append, buffer).atexit = False
        return torch.from_numpy(borrowed)


pool = BufferPool()
