"""Memory of activations that is used again."""

import math
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Rooms:
    """Memory that is lent to tensors and kept when they are gone.

    malloc cannot use a hole again for a tensor of the hole's size, since torch asks for aligned memory, so a third of
    what it held was holes. A room is as long as any micro-batch; only what is written takes memory.
    """

    def __init__(self) -> None:
        self._rows, self._free = 2048, dict[int, list[np.ndarray]]()

    def release(self) -> None:
        """Keep nothing, not even what is lent now."""
        self._free = {}

    def empty(self, rows: int, *shape: int) -> Tensor:
        """Return new memory for [rows, *shape] in bf16."""
        if rows > self._rows:
            self.release()
            self._rows = 1 << (rows - 1).bit_length()
        width = 2 * math.prod(shape)
        return self._lend(rows * width, self._rows * width).view(torch.bfloat16).view(rows, *shape)

    def scratch(self, size: int) -> Tensor:
        """Return so many bytes."""
        return self._lend(size, 1 << (size - 1).bit_length())

    def _lend(self, size: int, whole: int) -> Tensor:
        free = self._free.setdefault(whole, [])
        try:
            room = free.pop()
        except IndexError:
            room = np.frombuffer(mmap.mmap(-1, max(1, whole), flags=PRIVATE), np.uint8)
        lent = room[:size]
        weakref.finalize(lent, free.append, room).atexit = False
        return torch.from_numpy(lent)


rooms = Rooms()
