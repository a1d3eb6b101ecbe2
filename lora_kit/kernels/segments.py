"""Where the examples of a packed row are, and how attention cuts them into tiles or blocks."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lora_kit.kernels.blocks import Blocks, blocks_of

TILED_DTYPES = (torch.bfloat16,)  # fp32 tiles take twice the shared memory of a GPU, and fp32 is for checking
TILED_WIDTH = 256  # the widest heads that compiled attention was tested with


@dataclass(frozen=True)
class Segments:
    """The examples of a packed row.

    Attributes:
        lengths: The lengths of the examples, in order; they are on the host, so reading them never waits for the GPU.
        device: The row's device.
        windows: The window of every attention that was computed. The probe (model/probe.py), a test of the
            base at the start of a run, checks that no sliding window is missing.
    """

    lengths: tuple[int, ...]
    device: torch.device
    windows: list[int | None] = field(default_factory=list)
    _blocks: dict[tuple[int | None, torch.dtype], Blocks] = field(default_factory=dict)
    _tiles: dict[int | None, Tensor] = field(default_factory=dict)

    def tiles(self, rows: int | None = None) -> Tensor:
        """Cut every example into tiles of consecutive positions.

        Args:
            rows: The largest number of positions in a tile; None makes every example one tile.

        Returns:
            int32 [tiles, 3]: the first position of the tile's example, the first of the tile, the end of the example.
        """
        if rows not in self._tiles:
            ends = np.cumsum(self.lengths, dtype=np.int32)
            spans = zip(ends - self.lengths, ends, strict=True)
            tiles = [
                (begin, first, end) for begin, end in spans for first in range(begin, end, rows or max(self.lengths))
            ]
            self._tiles[rows] = moved(np.array(tiles, dtype=np.int32), self.device)
        return self._tiles[rows]

    def blocks(self, window: int | None, dtype: torch.dtype) -> Blocks:
        """Return the row cut into blocks of queries, computed once for all layers with this window."""
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = blocks_of(self.lengths, window, dtype=dtype, device=self.device)
        return self._blocks[window, dtype]


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for the work that the device still has to do."""
    values = torch.from_numpy(array)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def fit_tiles(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether compiled attention, which works in tiles, computes tensors of these dtypes and widths."""
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return same and query.dtype in TILED_DTYPES and query.shape[-1] <= TILED_WIDTH
