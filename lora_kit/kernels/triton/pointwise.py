"""The operations that are bound by memory on a GPU, each in one pass: norms, gated activations, rotary positions.

Tile sizes depend only on the model's widths and are never tuned by timing, so a replay computes the same bits. A kernel
is compiled once for a width, in about a second, and Triton keeps it on disk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kit.kernels.backend import GatedInputs

TILE = 4096  # elements that a program holds, in complete rows
GATED_ROWS, GATED_COLUMNS = 16, 128  # tile of a gated activation; a tile holds a part of each row


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x, weight, output, inverse_rms, rows, width, epsilon,
    gemma: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows), tl.arange(0, tile_columns)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    offset = row[:, None] * width + column[None, :]
    part = tl.load(x + offset, mask, 0.0).to(tl.float32)
    gain = tl.load(weight + column, column < width, 0.0).to(tl.float32)[None, :]
    inverse = 1 / tl.sqrt_rn(tl.sum(part * part, 1) / width + epsilon)
    part = part * inverse[:, None]
    part = part * (1 + gain) if gemma else part.to(output.dtype.element_ty).to(tl.float32) * gain
    tl.store(output + offset, part.to(output.dtype.element_ty), mask)
    tl.store(inverse_rms + row, inverse, row < rows)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward(
    grad_output, x, weight, inverse_rms, output, rows, width,
    gemma: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows), tl.arange(0, tile_columns)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    offset = row[:, None] * width + column[None, :]
    inverse = tl.load(inverse_rms + row, row < rows, 0.0)[:, None]
    normalized = tl.load(x + offset, mask, 0.0).to(tl.float32) * inverse
    gain = tl.load(weight + column, column < width, 0.0).to(tl.float32)[None, :]
    if gemma:
        gain = 1 + gain
    grads = tl.load(grad_output + offset, mask, 0.0).to(tl.float32) * gain
    mean = tl.sum(grads * normalized, 1)[:, None] / width
    tl.store(output + offset, ((grads - normalized * mean) * inverse).to(output.dtype.element_ty), mask)


@triton.jit
def _activation(x, activation: tl.constexpr):
    """Return the activation of x and its derivative."""
    if activation == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tanh = 2 * tl.sigmoid(2 * inner) - 1
    derivative = 0.7978845608028654 * (1 + 0.134145 * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * derivative


@triton.jit
def _with_adapter(x, low, up, row, column, rows, width, ranks, rank: tl.constexpr, step: tl.constexpr):
    """Return a tile of x + low @ up.T in fp32, for low [rows, ranks] and up [width, rank]."""
    mask = (row < rows)[:, None] & (column < width)[None, :]
    complete = tl.load(x + row[:, None] * width + column[None, :], mask, 0.0).to(tl.float32)
    added = tl.zeros_like(complete)
    for begin in tl.static_range(0, rank, step):
        inner = begin + tl.arange(0, step)
        part_mask = (row < rows)[:, None] & (inner < rank)[None, :]
        left = tl.load(low + row[:, None] * ranks + inner[None, :], part_mask, 0.0)
        part_mask = (column < width)[None, :] & (inner < rank)[:, None]
        right = tl.load(up + column[None, :] * rank + inner[:, None], part_mask, 0.0)
        added = tl.dot(left, right, added, input_precision="ieee")
    return complete + added


@triton.jit
def _gate_and_up(
    gate, up, low, b_gate, b_up, rows, width, ranks,
    rank: tl.constexpr, up_rank: tl.constexpr, step: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    """Return the tile of gate and up that this Triton program computes, with their adapters added.

    Also return the offsets of the tile's elements in the matrix, and the mask of the elements that lie inside it.
    """
    row = tl.program_id(1).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)
    g = _with_adapter(gate, low, b_gate, row, column, rows, width, ranks, rank, step)
    u = _with_adapter(up, low + rank, b_up, row, column, rows, width, ranks, up_rank, step)
    return g, u, row[:, None] * width + column[None, :], (row < rows)[:, None] & (column < width)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _gated(
    gate, up, low, b_gate, b_up, output, rows, width, ranks,
    activation: tl.constexpr, rank: tl.constexpr, up_rank: tl.constexpr, step: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    g, u, offset, mask = _gate_and_up(
        gate, up, low, b_gate, b_up, rows, width, ranks,
        rank, up_rank, step, tile_rows, tile_columns,
    )  # fmt: skip
    active, _ = _activation(g, activation)
    tl.store(output + offset, (active * u).to(output.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def _gated_backward(
    grad_output, gate, up, low, b_gate, b_up, grad_gate, grad_up, rows, width, ranks,
    activation: tl.constexpr, rank: tl.constexpr, up_rank: tl.constexpr, step: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    g, u, offset, mask = _gate_and_up(
        gate, up, low, b_gate, b_up, rows, width, ranks,
        rank, up_rank, step, tile_rows, tile_columns,
    )  # fmt: skip
    active, derivative = _activation(g, activation)
    grads = tl.load(grad_output + offset, mask, 0.0).to(tl.float32)
    tl.store(grad_gate + offset, (grads * u * derivative).to(grad_gate.dtype.element_ty), mask)
    tl.store(grad_up + offset, (grads * active).to(grad_up.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def _rotate(x, cos, sin, output, rows, heads, half: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr):
    row, column = (
        tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows),
        tl.arange(0, tile_columns)[None, :],
    )
    mask = (row < rows)[:, None] & (column < half)
    offset, angle = row[:, None] * (2 * half) + column, (row // heads)[:, None] * (2 * half) + column
    first, second = tl.load(x + offset, mask).to(tl.float32), tl.load(x + offset + half, mask).to(tl.float32)
    cos_1, cos_2 = tl.load(cos + angle, mask).to(tl.float32), tl.load(cos + angle + half, mask).to(tl.float32)
    sin_1, sin_2 = tl.load(sin + angle, mask).to(tl.float32), tl.load(sin + angle + half, mask).to(tl.float32)
    first_out, second_out = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    tl.store(output + offset, first_out.to(output.dtype.element_ty), mask)
    tl.store(output + offset + half, second_out.to(output.dtype.element_ty), mask)


def _tiles(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the block sizes of a kernel that works on complete rows."""
    columns = triton.next_power_of_2(width)
    tile_rows = max(1, TILE // columns)
    sizes = {"tile_rows": tile_rows, "tile_columns": columns, "num_warps": 4 if columns <= TILE else 8}
    return (triton.cdiv(rows, tile_rows),), sizes


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float, *, gemma: bool) -> tuple[Tensor, Tensor]:
    """Return the normalised rows in their dtype [rows, width], and 1 / root mean square of each in fp32 [rows, 1]."""
    output, inverse_rms = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
    grid, sizes = _tiles(*rows.shape)
    _rms_norm[grid](rows, weight, output, inverse_rms, *rows.shape, epsilon, gemma=gemma, **sizes)
    return output, inverse_rms


def rms_norm_backward(grad_output: Tensor, rows: Tensor, weight: Tensor, inverse_rms: Tensor, *, gemma: bool) -> Tensor:
    """Return the gradient of a norm's rows."""
    grad_rows, inputs = torch.empty_like(rows), (grad_output.contiguous(), rows, weight, inverse_rms)
    grid, sizes = _tiles(*rows.shape)
    _rms_norm_backward[grid](*inputs, grad_rows, *rows.shape, gemma=gemma, **sizes)
    return grad_rows


def gated(inputs: GatedInputs) -> Tensor:
    """Return act(gate + low_gate @ B_gate.T) * (up + low_up @ B_up.T).

    `inputs.low` holds low_gate and low_up side by side.
    """
    product, tensors = torch.empty_like(inputs.gate), _gated_tensors(inputs)
    _gated[_gated_grid(inputs)](*tensors, product, *_gated_sizes(inputs), **_gated_constants(inputs))
    return product


def gated_backward(grad_product: Tensor, inputs: GatedInputs) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up; the gradient of gate overwrites `grad_product`."""
    grad_up, tensors = torch.empty_like(inputs.up), _gated_tensors(inputs)
    _gated_backward[_gated_grid(inputs)](
        grad_product, *tensors, grad_product, grad_up, *_gated_sizes(inputs), **_gated_constants(inputs)
    )
    return grad_product, grad_up


def _gated_tensors(inputs: GatedInputs) -> tuple[Tensor, ...]:
    return inputs.gate, inputs.up, inputs.low, *(b.to(inputs.gate.dtype) for b in inputs.ups)


def _gated_grid(inputs: GatedInputs) -> tuple[int, int]:
    rows, width = inputs.gate.shape
    return triton.cdiv(width, GATED_COLUMNS), triton.cdiv(rows, GATED_ROWS)


def _gated_sizes(inputs: GatedInputs) -> tuple[int, ...]:
    return *inputs.gate.shape, inputs.low.stride(0)


def _gated_constants(inputs: GatedInputs) -> dict[str, object]:
    rank, up_rank = (b.shape[1] for b in inputs.ups)
    return {
        "activation": inputs.activation,
        "rank": rank,
        "up_rank": up_rank,
        "step": min(32, max(16, triton.next_power_of_2(max(rank, up_rank)))),
        "tile_rows": GATED_ROWS,
        "tile_columns": GATED_COLUMNS,
        "num_warps": 4,
    }


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [length, heads, head_dim] rotated by the angles of its positions [length, head_dim]."""
    length, heads, head_dim = x.shape
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, sizes = _tiles(length * heads, head_dim // 2)
    inputs = (x.contiguous(), cos.contiguous(), sin.contiguous())
    _rotate[grid](*inputs, output, length * heads, heads, half=head_dim // 2, **sizes)
    return output
