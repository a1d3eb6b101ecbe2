"""What is bound by memory on a GPU, in one pass each: norms, gated activations, rotary positions.

The blocks are fixed by the model's widths, never tuned by timing, so that a replay computes the same bits; a kernel is
compiled once for a width, in about a second, and Triton keeps it on disk. Only imported where there is a CUDA device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements that a program holds, in rows of the width


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


@triton.jit(do_not_specialize=["count"])
def _gate(gate, up, output, count, activation: tl.constexpr, many: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    there = at < count
    active, _ = _activated(tl.load(gate + at, there).to(tl.float32), activation)
    product = active * tl.load(up + at, there).to(tl.float32)
    tl.store(output + at, product.to(output.dtype.element_ty), there)


@triton.jit(do_not_specialize=["count"])
def _gate_back(gradient, gate, up, of_gate, of_up, count, activation: tl.constexpr, many: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    there = at < count
    above = tl.load(gradient + at, there).to(tl.float32)
    active, slope = _activated(tl.load(gate + at, there).to(tl.float32), activation)
    along = above * tl.load(up + at, there).to(tl.float32) * slope
    tl.store(of_gate + at, along.to(of_gate.dtype.element_ty), there)
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


def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up."""
    output = torch.empty_like(gate)
    _gate[triton.cdiv(gate.numel(), TILE),](
        gate, up, output, gate.numel(), activation=activation, many=TILE, num_warps=8
    )
    return output


def gate_back(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, the first in the place of the product's."""
    of_up, grid = torch.empty_like(up), (triton.cdiv(gate.numel(), TILE),)
    _gate_back[grid](gradient, gate, up, gradient, of_up, gate.numel(), activation=activation, many=TILE, num_warps=8)
    return gradient, of_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [length, heads, width] turned by the angles of its positions [length, width]."""
    length, heads, width = x.shape
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, block = _tiles(length * heads, width // 2)
    _rotate[grid](
        x.contiguous(), cos.contiguous(), sin.contiguous(), output, length * heads, heads, half=width // 2, **block
    )
    return output
