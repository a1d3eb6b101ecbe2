"""Linear maps, attention, and what is bound by memory on a CPU: kernels.c.

Tensors are bf16; what kernels/triton/ says of shapes holds for the functions of the same names.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lora_kit.kernels.cpu.buffers import rooms
from lora_kit.kernels.cpu.build import library

LEAST_ROWS = 8  # of a product


class Attention(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "sums", "tiles")]
        + [(name, ctypes.c_long) for name in ("examples", "length", "heads", "key_heads", "width", "window")]
        + [("scale", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("gradient", "of_query", "of_key", "of_value")]
    )


class Part(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weight")] + [
        (name, ctypes.c_long) for name in ("inner", "apart", "turned")
    ]


WHOLE = 1 << 30  # rows of a tile: an example is never cut
Gated = None  # unlike a GPU's: `linear` adds adapters


def linear(parts: Sequence[tuple[Tensor, Tensor, bool]], bias: Tensor | None = None) -> Tensor:
    """Return the sum of products [rows, columns], rounded once.

    Args:
        parts: Each x [rows, inner], its weight, and whether that is turned, [columns, inner], or [inner, columns].
            There are at least LEAST_ROWS rows.
        bias: [columns].

    Raises:
        ValueError: They are not.
    """
    given, threads = [_in_pairs(*one) for one in parts], torch.get_num_threads()
    (x, weight, turned), inner = given[0], sum(x.shape[1] for x, _, _ in given)
    rows, columns = len(x), weight.shape[0 if turned else 1]
    shapes = [(len(x), x.shape[1], *(weight.t() if turned else weight).shape) for x, weight, turned in given]
    tensors = [one for x, weight, _ in given for one in (x, weight)] + ([] if bias is None else [bias])
    alike = all(shape == (rows, shape[1], shape[1], columns) for shape in shapes)
    if rows < LEAST_ROWS or not (columns and inner and alike) or any(one.dtype != torch.bfloat16 for one in tensors):
        raise ValueError(f"no products in bf16 to one sum: {shapes}, {[one.dtype for one in tensors]}")
    output, room = rooms.empty(rows, columns), library().kernels.linear_room(inner)
    scratch = rooms.scratch(threads * room)
    made = [Part(x.data_ptr(), weight.data_ptr(), x.shape[1], x.stride(0), turned) for x, weight, turned in given]
    rest = (output.data_ptr(), rows, columns, scratch.data_ptr(), room, threads)
    array = (Part * len(made))(*made)
    library().kernels.linear(ctypes.addressof(array), len(made), None if bias is None else bias.data_ptr(), *rest)
    return output


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Return left' right [few, columns] in fp32, of left [rows, few] and right [rows, columns].

    torch takes as long; but oneDNN would keep what it generates for every number of rows.

    Raises:
        ValueError: They have other numbers of rows, or another precision.
    """
    if len(left) != len(right) or not left.dtype == right.dtype == torch.bfloat16:
        raise ValueError(f"no products in bf16 over rows: {left.shape}, {right.shape}, {left.dtype}, {right.dtype}")
    if left.shape[1] > right.shape[1]:
        return outer(right, left).T
    left, right = (one if one.stride(1) == 1 else one.contiguous() for one in (left, right))
    (rows, few), columns, threads = left.shape, right.shape[1], torch.get_num_threads()
    output, room = left.new_empty(few, columns, dtype=torch.float32), library().kernels.outer_room(few)
    scratch = rooms.scratch(threads * room)
    given = (left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), output.data_ptr())
    library().kernels.outer(*given, rows, few, columns, scratch.data_ptr(), room, threads)
    return output


def _in_pairs(x: Tensor, weight: Tensor, turned: bool) -> tuple[Tensor, Tensor, bool]:
    """Return a product whose numbers lie as the kernel reads them, an even number of them to sum over."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not weight.is_contiguous():
        weight, turned = (weight.t(), not turned) if weight.t().is_contiguous() else (weight.contiguous(), turned)
    if x.shape[1] % 2:
        x, weight = functional.pad(x, (0, 1)), functional.pad(weight, (0, 1) if turned else (0, 0, 0, 1))
    return x, weight, turned


def norm(rows: Tensor, weight: Tensor, epsilon: float, *, gemma: bool) -> tuple[Tensor, Tensor]:
    """Return the normalised rows [rows, width] and 1 / root mean square of each, in fp32."""
    output, inverse = rooms.empty(*rows.shape), rows.new_empty(len(rows), 1, dtype=torch.float32)
    given = (one.data_ptr() for one in (rows, weight, output, inverse))
    library().kernels.norm(*given, *rows.shape, epsilon, gemma, torch.get_num_threads())
    return output, inverse


def norm_back(gradient: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor, *, gemma: bool) -> Tensor:
    """Return the gradient of a norm's rows."""
    gradient, output = gradient.contiguous(), rooms.empty(*rows.shape)
    given = (one.data_ptr() for one in (gradient, rows, weight, inverse, output))
    library().kernels.norm_back(*given, *rows.shape, gemma, torch.get_num_threads())
    return output


def gate(gates: Tensor, ups: Tensor, *, tanh: bool) -> Tensor:
    """Return silu(gates) * ups, or gelu's approximation with tanh."""
    output = rooms.empty(*gates.shape)
    given = (one.data_ptr() for one in (gates, ups, output))
    library().kernels.gate(*given, gates.numel(), tanh, torch.get_num_threads())
    return output


def gate_back(gradient: Tensor, gates: Tensor, ups: Tensor, *, tanh: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of gates and ups; the first takes the place of the product's."""
    of_up = rooms.empty(*ups.shape)
    given = (one.data_ptr() for one in (gradient, gates, ups, gradient, of_up))
    library().kernels.gate_back(*given, gates.numel(), tanh, torch.get_num_threads())
    return gradient, of_up


def choose(logits: Tensor, labels: Tensor, *, to_gradient: bool) -> Tensor:
    """Return each label's log-probability [rows, 1], NaN if there is no such label; turn the logits into their loss's
    gradient."""
    chosen = logits.new_empty(len(logits), 1, dtype=torch.float32)
    labels = labels.contiguous()
    given = (one.data_ptr() for one in (logits, labels, chosen))
    library().kernels.choose(*given, *logits.shape, to_gradient, torch.get_num_threads())
    return chosen


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [length, heads, width] turned by the angles of its positions [length, width]."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    output = rooms.empty(*x.shape)
    given = (one.data_ptr() for one in (x, cos, sin, output))
    library().kernels.rotate(*given, *x.shape, torch.get_num_threads())
    return output


def tile_rows(_: int) -> int:
    """Return how many rows a tile has: those of an example."""
    return WHOLE


def attend(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output [length, heads, width] and the logarithm of each row's sum."""
    output, sums = rooms.empty(*query.shape), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    _attention(tiles, scale, window, query, key, value, output, sums)
    return output, sums


def attend_back(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    tiles: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    found = rooms.empty(*query.shape), rooms.empty(*key.shape), rooms.empty(*value.shape)
    _attention(tiles, scale, window, query, key, value, output, sums, gradient, *found)
    return found


def _attention(tiles: Tensor, scale: float, window: int | None, query: Tensor, key: Tensor, *others: Tensor) -> None:
    (length, heads, width), (value, output, sums, *back) = query.shape, others
    threads = min(torch.get_num_threads(), len(tiles) * key.shape[1])
    tiles = tiles[(tiles[:, 0] - tiles[:, 2]).argsort(stable=True)]  # the longest first, or threads wait for it
    given = [one.data_ptr() for one in (query, key, value, output, sums, tiles)]
    rest = (len(tiles), length, heads, key.shape[1], width, window or 0, scale)
    room = library().kernels.attention_room(int(tiles[0, 2] - tiles[0, 0]), width)
    scratch = rooms.scratch(threads * room)
    all_of_it = Attention(*given, *rest, *(one.data_ptr() for one in back))
    library().kernels.attention(ctypes.addressof(all_of_it), bool(back), scratch.data_ptr(), room, threads)
