"""The buffers of a training state, in the order of a snapshot, and the tensors of the files that are made of them.

A snapshot is the concatenation of these buffers. The file of the optimizer holds its buffers as they are. So does the
file of the adapter, except with the starts `pissa` and `olora`: then A and B of a layer are saved together with the
constants A0 and -B0 that are subtracted from them, as one adapter of twice the rank, which any program can load.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import numpy as np

Buffer = memoryview | np.ndarray
Shapes = Mapping[str, Sequence[int]]
Tensors = dict[str, np.ndarray]
Dtype = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]  # names of safetensors

BLOCK = 256  # values that share a scale in `adamw-8bit`
WITH_CONSTANTS = ("pissa", "olora")  # the starts whose A0 and -B0 are part of the state
WEIGHTS, CONSTANTS = "weights", "constants"
BYTES: dict[Dtype, int] = dict(zip(get_args(Dtype), (8, 4, 2, 2, 8, 4, 2, 1, 1, 1), strict=True))
NUMPY = {"F32": np.float32, "U8": np.uint8}


@dataclass(frozen=True)
class Layout:
    """The buffers of a run's state.

    Attributes:
        shapes: The shapes of the trained tensors by PEFT's names, in the order of the buffers.
        eight_bit: Whether the moments have 8 bits a value, with a scale for every `BLOCK` values.
        constants: Whether A0 and -B0 are part of the state.
    """

    shapes: Shapes
    eight_bit: bool = False
    constants: bool = False

    @classmethod
    def of(cls, shapes: Shapes, recipe: Mapping[str, Mapping[str, Any]]) -> "Layout":
        """Return the layout of a run, from the JSON of its recipe."""
        optimizer, start = (recipe.get(section, {}).get(field) for section, field in (("optim", "name"), START))
        return cls(shapes, optimizer == "adamw-8bit", start in WITH_CONSTANTS)

    @property
    def size(self) -> int:
        """The number of trained values."""
        return _count(self.shapes)

    @property
    def paired(self) -> Shapes:
        """The shapes of the tensors that have a constant of the same shape."""
        return {name: shape for name, shape in self.shapes.items() if _axis(name) is not None and self.constants}

    @property
    def moments(self) -> dict[str, tuple[Dtype, int]]:
        """The dtype and the length of the optimizer's buffers, by their names in its file."""
        blocks = -(-self.size // BLOCK)
        if self.eight_bit:
            scales: dict[str, tuple[Dtype, int]] = dict.fromkeys((*SCALES,), ("F32", blocks))
            return scales | dict.fromkeys(MOMENTS, ("U8", BLOCK * blocks))
        return dict.fromkeys(MOMENTS, ("F32", self.size))

    @property
    def buffers(self) -> dict[str, tuple[Dtype, int]]:
        """The dtype and the length of all buffers, in the order of a snapshot."""
        last: dict[str, tuple[Dtype, int]] = {CONSTANTS: ("F32", _count(self.paired))} if self.constants else {}
        return {WEIGHTS: ("F32", self.size), **self.moments, **last}

    @property
    def bytes(self) -> int:
        """The size of a snapshot."""
        return self.bytes_of(*self.buffers)

    def bytes_of(self, *names: str) -> int:
        """Return the size of some buffers; one that the layout does not have counts as empty."""
        return sum(BYTES[dtype] * count for name, (dtype, count) in self.buffers.items() if name in names)

    @property
    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of the adapter's file."""
        saved = {name: list(shape) for name, shape in self.shapes.items()}
        for name in self.paired:
            saved[name][_axis(name) or 0] *= 2
        return {name: tuple(shape) for name, shape in saved.items()}

    def split(self, snapshot: memoryview) -> dict[str, np.ndarray]:
        """Return views of the buffers of a snapshot."""
        ends = accumulate((BYTES[dtype] * count for dtype, count in self.buffers.values()), initial=0)
        return {
            name: np.frombuffer(snapshot[begin:end], NUMPY[dtype])
            for (name, (dtype, _)), (begin, end) in zip(self.buffers.items(), pairwise(ends), strict=True)
        }

    def adapter_pieces(self, buffers: Mapping[str, np.ndarray]) -> list[memoryview]:
        """Return the bytes of the adapter's file after its header. Only the B of layers with constants are copied."""
        weights = buffers[WEIGHTS]
        if not self.constants:
            return [weights.data.cast("B")]
        trained, constants = cut(weights, self.shapes), cut(buffers[CONSTANTS], self.paired)
        pieces: list[np.ndarray] = []
        for name, tensor in trained.items():
            axis = _axis(name)
            if axis is None:
                pieces.append(tensor)
            elif axis == 0:
                pieces += [tensor, constants[name]]
            else:
                pieces.append(np.concatenate([tensor, constants[name]], axis=1))
        return [np.ascontiguousarray(piece).data.cast("B") for piece in pieces]


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's moments, by torch's names
SCALES = ("exp_avg_absmax", "exp_avg_sq_absmax")
START = ("adapter", "init")


@dataclass(frozen=True)
class State:
    """A saved state.

    Attributes:
        weights: The trained tensors by PEFT's names.
        moments: The optimizer's buffers by their names, flat, in the order of the weights.
        constants: A0 and -B0 by the names of A and B; empty without them.
    """

    weights: Tensors
    moments: dict[str, np.ndarray]
    constants: Tensors


def without_constants(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the trained tensors of an adapter's file, and the constants, which are the second half of A and B."""
    halves = {name: np.split(tensor, 2, axis=_axis(name) or 0) for name, tensor in tensors.items() if _is_pair(name)}
    trained = {name: halves[name][0] if name in halves else tensor for name, tensor in tensors.items()}
    return trained, {name: half[1] for name, half in halves.items()}


def trained_shapes(saved: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained tensors, from those of a file that holds the constants too."""
    return {
        name: tuple(size // 2 if place == _axis(name) else size for place, size in enumerate(shape))
        for name, shape in saved.items()
    }


def cut(flat: np.ndarray, shapes: Shapes) -> Tensors:
    """Cut a flat buffer into the tensors that it holds one after the other."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    return {
        name: piece.reshape(shape)
        for (name, shape), piece in zip(shapes.items(), np.split(flat, ends[:-1]), strict=True)
    }


def _axis(name: str) -> int | None:
    """Return the axis of the rank in A or B; None for another tensor."""
    return 0 if ".lora_A." in name else 1 if ".lora_B." in name else None


def _is_pair(name: str) -> bool:
    return _axis(name) is not None


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
