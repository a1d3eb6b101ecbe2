"""Where the examples of a packed row are, and how attention cuts them into tiles or blocks."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from lora_kit.kernels.blocks import Blocks, Fork, blocks_of

TILED_DTYPES = (torch.bfloat16,)  # fp32 tiles take twice the shared memory of a GPU, and fp32 is for checking
TILED_WIDTH = 256  # the widest heads that compiled attention was tested with


@dataclass(frozen=True)
class Segments:
    """The examples of a packed row.

    An example may fork: two sequences with the same beginning are one example, [beginning, rest of the first, rest of
    the second]. Positions of the second rest see the beginning and their own rest, and not the first rest. A window
    counts positions in their own sequence.

    Attributes:
        lengths: The lengths of the examples, in order; they are on the host, so reading them never waits for the GPU.
        device: The row's device.
        forks: For each example that forks, the length of the beginning and where the second rest begins, which is less
            than the length; for each other example None. Examples after the last entry do not fork.
        windows: The window of every attention that was computed. The probe (model/probe.py), a test of the
            base at the start of a run, checks that no sliding window is missing.
    """

    lengths: tuple[int, ...]
    device: torch.device
    forks: tuple[Fork | None, ...] = ()
    windows: list[int | None] = field(default_factory=list)
    _blocks: dict[tuple[int | None, torch.dtype], Blocks] = field(default_factory=dict)
    _tiles: dict[int, Tensor] = field(default_factory=dict)

    def tiles(self, rows: int) -> Tensor:
        """Cut every example into tiles of consecutive positions.

        Args:
            rows: The largest number of positions in a tile.

        Returns:
            int32 [tiles, 6]: the begin of the tile's example, the begin of the tile, the end of the tile's part of the
            example, and the other three columns of the example in `spans`. The parts are what both branches share and
            the rest of each branch. An example that does not fork has one part.
        """
        if rows not in self._tiles:
            tiles = [
                (begin, first, stop, end, shared, second)
                for begin, end, shared, second in self.spans.tolist()
                for start, stop in ((begin, shared), (shared, second), (second, end))
                for first in range(start, stop, rows)
            ]
            self._tiles[rows] = moved(np.array(tiles, dtype=np.int32), self.device)
        return self._tiles[rows]

    @cached_property
    def spans(self) -> np.ndarray:
        """int32 [examples, 4]: the begin and the end of an example, the end of what its branches share, and the begin
        of the rest of its second branch; the last two are the end of an example that does not fork."""
        spans, begin = [], 0
        for length, fork in zip_longest(self.lengths, self.forks):
            shared, second = fork or (length, length)
            spans.append((begin, begin + length, begin + shared, begin + second))
            begin += length
        return np.array(spans, dtype=np.int32)

    def blocks(self, window: int | None, dtype: torch.dtype) -> Blocks:
        """Return the row cut into blocks of queries, computed once for all layers with this window."""
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = blocks_of(
                self.lengths, window, forks=self.forks, dtype=dtype, device=self.device
            )
        return self._blocks[window, dtype]


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for the work that the device still has to do."""
    values = torch.from_numpy(array)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def fit_tiles(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether compiled attention, which works in tiles, computes tensors of these dtypes and widths."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return same and query.dtype in TILED_DTYPES and query.shape[-1] <= TILED_WIDTH
