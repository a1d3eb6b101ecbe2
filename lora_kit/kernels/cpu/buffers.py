"""A pool of buffers for activations: memory is used again when no tensor refers to it any more.

malloc cannot reuse a hole for a tensor of exactly the hole's size, because torch asks for aligned memory; a third of
what malloc held were holes.
"""

import math
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
FIRST_ROWS = 2048  # rows that buffers are made for at first


class BufferPool:
    """Buffers that are borrowed by tensors and come back when the last view of a tensor is gone.

    Every buffer has room for the longest micro-batch so far, so any number of rows fits; the system only provides the
    pages that are written.
    """

    def __init__(self) -> None:
        self._rows, self._free = FIRST_ROWS, dict[int, list[np.ndarray]]()

    def release(self) -> None:
        """Give all free buffers to the system, and borrowed ones as soon as they come back."""
        self._free = {}

    def empty(self, rows: int, *shape: int) -> Tensor:
        """Return an uninitialised bf16 tensor [rows, *shape] in borrowed memory."""
        if rows > self._rows:
            self.release()
            self._rows = 1 << (rows - 1).bit_length()
        row_bytes = 2 * math.prod(shape)
        return self._borrow(rows * row_bytes, self._rows * row_bytes).view(torch.bfloat16).view(rows, *shape)

    def workspace(self, size: int) -> Tensor:
        """Return `size` uninitialised bytes."""
        return self._borrow(size, 1 << (size - 1).bit_length())

    def _borrow(self, size: int, capacity: int) -> Tensor:
        free = self._free.setdefault(capacity, [])
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.frombuffer(mmap.mmap(-1, max(1, capacity), flags=PRIVATE), np.uint8)
        borrowed = buffer[:size]
        weakref.finalize(borrowed, free.append, buffer).atexit = False
        return torch.from_numpy(borrowed)


pool = BufferPool()
