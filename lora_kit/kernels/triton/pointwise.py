"""What is bound by memory on a GPU, in one pass each: norms, gated activations, rotary positions.

The blocks are fixed by the model's widths, never tuned by timing, so that a replay computes the same bits; a kernel is
compiled once for a width, in about a second, and Triton keeps it on disk. Only imported where there is a CUDA device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kit.kernels.triton.attention import attend, attend_back, tile_rows

choose = None  # unlike a CPU's: plain PyTorch

__all__ = ["Gated", "attend", "attend_back", "norm", "norm_back", "rotate", "tile_rows"]

TILE = 4096  # elements that a program holds, in rows of the width
MANY, WIDE = 16, 128  # rows and columns, where the width is cut too


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x, weight, output, inverse, rows, width, epsilon, gemma: tl.constexpr, many: tl.constexpr, wide: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many), tl.arange(0, wide)
    there = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    part = tl.load(x + at, there, 0.0).to(tl.float32)
    weighing = tl.load(weight + column, column < width, 0.0).to(tl.float32)[None, :]
    of_row = 1 / tl.sqrt_rn(tl.sum(part * part, 1) / width + epsilon)
    part = part * of_row[:, None]
    part = part * (1 + weighing) if gemma else part.to(output.dtype.element_ty).to(tl.float32) * weighing
    tl.store(output + at, part.to(output.dtype.element_ty), there)
    tl.store(inverse + row, of_row, row < rows)


@triton.jit(do_not_specialize=["rows"])
def _norm_back(
    gradient, x, weight, inverse, output, rows, width, gemma: tl.constexpr, many: tl.constexpr, wide: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many), tl.arange(0, wide)
    there = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    of_row = tl.load(inverse + row, row < rows, 0.0)[:, None]
    normal = tl.load(x + at, there, 0.0).to(tl.float32) * of_row
    weighing = tl.load(weight + column, column < width, 0.0).to(tl.float32)[None, :]
    if gemma:
        weighing = 1 + weighing
    above = tl.load(gradient + at, there, 0.0).to(tl.float32) * weighing
    along = tl.sum(above * normal, 1)[:, None] / width
    tl.store(output + at, ((above - normal * along) * of_row).to(output.dtype.element_ty), there)


@triton.jit
def _activated(x, activation: tl.constexpr):
    """Return the activation of x and its derivative."""
    if activation == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tanh = 2 * tl.sigmoid(2 * inner) - 1
    slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope


@triton.jit
def _with_adapter(x, low, up, row, column, rows, width, ranks, rank: tl.constexpr, step: tl.constexpr):
    """Return a tile of x + low up', in fp32."""
    there = (row < rows)[:, None] & (column < width)[None, :]
    whole = tl.load(x + row[:, None] * width + column[None, :], there, 0.0).to(tl.float32)
    added = tl.zeros_like(whole)
    for begin in tl.static_range(0, rank, step):
        inner = begin + tl.arange(0, step)
        some = (row < rows)[:, None] & (inner < rank)[None, :]
        left = tl.load(low + row[:, None] * ranks + inner[None, :], some, 0.0)
        some = (column < width)[None, :] & (inner < rank)[:, None]
        right = tl.load(up + column[None, :] * rank + inner[:, None], some, 0.0)
        added = tl.dot(left, right, added, input_precision="ieee")
    return whole + added


@triton.jit
def _gate_and_up(
    gate, up, low, up_of_gate, up_of_up, rows, width, ranks,
    rank: tl.constexpr, rank_of_up: tl.constexpr, step: tl.constexpr,
    many: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Return this program's tile of gate and of up with their adapters, where it is, and what of it is there."""
    row = tl.program_id(1).to(tl.int64) * many + tl.arange(0, many)
    column = tl.program_id(0) * wide + tl.arange(0, wide)
    g = _with_adapter(gate, low, up_of_gate, row, column, rows, width, ranks, rank, step)
    u = _with_adapter(up, low + rank, up_of_up, row, column, rows, width, ranks, rank_of_up, step)
    return g, u, row[:, None] * width + column[None, :], (row < rows)[:, None] & (column < width)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _gate(
    gate, up, low, up_of_gate, up_of_up, output, rows, width, ranks,
    activation: tl.constexpr, rank: tl.constexpr, rank_of_up: tl.constexpr, step: tl.constexpr,
    many: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    g, u, at, there = _gate_and_up(
        gate, up, low, up_of_gate, up_of_up, rows, width, ranks,
        rank, rank_of_up, step, many, wide,
    )  # fmt: skip
    active, _ = _activated(g, activation)
    tl.store(output + at, (active * u).to(output.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def _gate_back(
    gradient, gate, up, low, up_of_gate, up_of_up, of_gate, of_up, rows, width, ranks,
    activation: tl.constexpr, rank: tl.constexpr, rank_of_up: tl.constexpr, step: tl.constexpr,
    many: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    g, u, at, there = _gate_and_up(
        gate, up, low, up_of_gate, up_of_up, rows, width, ranks,
        rank, rank_of_up, step, many, wide,
    )  # fmt: skip
    active, slope = _activated(g, activation)
    above = tl.load(gradient + at, there, 0.0).to(tl.float32)
    tl.store(of_gate + at, (above * u * slope).to(of_gate.dtype.element_ty), there)
    tl.store(of_up + at, (above * active).to(of_up.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def _rotate(x, cos, sin, output, rows, heads, half: tl.constexpr, many: tl.constexpr, wide: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many), tl.arange(0, wide)[None, :]
    there = (row < rows)[:, None] & (column < half)
    at, angle = row[:, None] * (2 * half) + column, (row // heads)[:, None] * (2 * half) + column
    first, second = tl.load(x + at, there).to(tl.float32), tl.load(x + at + half, there).to(tl.float32)
    cos_1, cos_2 = tl.load(cos + angle, there).to(tl.float32), tl.load(cos + angle + half, there).to(tl.float32)
    sin_1, sin_2 = tl.load(sin + angle, there).to(tl.float32), tl.load(sin + angle + half, there).to(tl.float32)
    one, two = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    tl.store(output + at, one.to(output.dtype.element_ty), there)
    tl.store(output + at + half, two.to(output.dtype.element_ty), there)


def _tiles(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the block of a kernel that goes by rows."""
    block = triton.next_power_of_2(width)
    at_once = max(1, TILE // block)
    return (triton.cdiv(rows, at_once),), {"many": at_once, "wide": block, "num_warps": 4 if block <= TILE else 8}


def norm(rows: Tensor, weight: Tensor, epsilon: float, *, gemma: bool) -> tuple[Tensor, Tensor]:
    """Return the normalised rows [rows, width] and 1 / root mean square of each, in fp32."""
    output, inverse = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
    grid, block = _tiles(*rows.shape)
    _norm[grid](rows, weight, output, inverse, *rows.shape, epsilon, gemma=gemma, **block)
    return output, inverse


def norm_back(gradient: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor, *, gemma: bool) -> Tensor:
    """Return the gradient of a norm's rows."""
    output = torch.empty_like(rows)
    grid, block = _tiles(*rows.shape)
    _norm_back[grid](gradient.contiguous(), rows, weight, inverse, output, *rows.shape, gemma=gemma, **block)
    return output


@dataclass(frozen=True)
class Gated:
    """The inputs of a gated activation act(gate + low up') * (up + ...), whose adapters are added on the way.

    Attributes:
        gate: [rows, width], of the frozen weight alone.
        up: Likewise.
        low: [rows, ranks], what both A make of the input, gate's first.
        ups: Both B, [width, rank], in the same dtype.
        activation: One of `mlp.ACTIVATIONS`.
    """

    gate: Tensor
    up: Tensor
    low: Tensor
    ups: tuple[Tensor, Tensor]
    activation: str

    def product(self) -> Tensor:
        """Return act(gate) * up."""
        output = torch.empty_like(self.gate)
        _gate[self._grid()](self.gate, self.up, self.low, *self.ups, output, *self._rest(), **self._fixed())
        return output

    def back(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up; the first takes the place of the product's."""
        of_up = torch.empty_like(self.up)
        inputs = (gradient, self.gate, self.up, self.low, *self.ups)
        _gate_back[self._grid()](*inputs, gradient, of_up, *self._rest(), **self._fixed())
        return gradient, of_up

    def _grid(self) -> tuple[int, int]:
        rows, width = self.gate.shape
        return triton.cdiv(width, WIDE), triton.cdiv(rows, MANY)

    def _rest(self) -> tuple[int, ...]:
        return *self.gate.shape, self.low.stride(0)

    def _fixed(self) -> dict[str, object]:
        ranks = [one.shape[1] for one in self.ups]
        return {
            "activation": self.activation,
            "rank": ranks[0],
            "rank_of_up": ranks[1],
            "step": min(32, max(16, triton.next_power_of_2(max(ranks)))),
            "many": MANY,
            "wide": WIDE,
            "num_warps": 4,
        }


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [length, heads, width] turned by the angles of its positions [length, width]."""
    length, heads, width = x.shape
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, block = _tiles(length * heads, width // 2)
    _rotate[grid](
        x.contiguous(), cos.contiguous(), sin.contiguous(), output, length * heads, heads, half=width // 2, **block
    )
    return output
