"""The kernels in C as operators of torch, `torch.ops.lora_kit.*`: visible to profilers, FakeTensor and torch.compile.

Each function checks what the C code relies on (dtype, device, shape and layout of every tensor), borrows memory for its
results from the buffer pool and calls the library. Tensors are bf16 unless a docstring says otherwise.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lora_kit.kernels.cpu.buffers import pool
from lora_kit.kernels.cpu.build import library

Operator = TypeVar("Operator", bound=Callable[..., Any])

BF16, FP32 = torch.bfloat16, torch.float32
LEAST_ROWS = 8  # the kernel computes this many rows at a time
OPERATORS = torch.library.Library("lora_kit", "DEF")


def operator(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Operator], Operator]:
    """Register a function as `torch.ops.lora_kit.<its name>` for tensors on CPUs and return that operator.

    Args:
        fake: Returns tensors of the results' shapes and dtypes without computing them.
        mutates: The arguments that are written to.
    """

    def register(function: Operator) -> Operator:
        name = function.__name__
        OPERATORS.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        OPERATORS.impl(name, function, "CPU")
        torch.library.register_fake(f"lora_kit::{name}", fake, lib=OPERATORS)
        return cast(Operator, getattr(torch.ops.lora_kit, name).default)

    return register


def _check(operator: str, *expected: tuple[str, Tensor, torch.dtype, tuple[int, ...]]) -> None:
    """Check tensors, each given with its name, dtype and shape; all are contiguous and on the CPU.

    Raises:
        TypeError: A tensor has another dtype or device.
        ValueError: A tensor has another shape or is not contiguous.
    """
    for name, tensor, dtype, shape in expected:
        if tensor.dtype != dtype or not tensor.is_cpu:
            raise TypeError(f"{operator}: {name} is {tensor.dtype} on {tensor.device}; expected {dtype} on cpu")
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{operator}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
                f"expected contiguous {shape}"
            )


def _sizes(operator: str, name: str, tensor: Tensor, dimensions: int) -> torch.Size:
    """Return a tensor's shape; raise ValueError if it has another number of dimensions."""
    if tensor.dim() != dimensions:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}; expected {dimensions} dimensions")
    return tensor.shape


def _fake_linear(
    x: Sequence[Tensor], weight: Sequence[Tensor], transposed: Sequence[bool], bias: Tensor | None
) -> Tensor:
    return x[0].new_empty(x[0].shape[0], weight[0].shape[0 if transposed[0] else 1])


@operator(_fake_linear)
def linear(x: Sequence[Tensor], weight: Sequence[Tensor], transposed: Sequence[bool], bias: Tensor | None) -> Tensor:
    """Return the sum of products of x and weight, plus the bias, [rows, columns], rounded once.

    Args:
        x: The left matrix of each product, [rows, inner]. All have the same number of rows, at least LEAST_ROWS.
        weight: The right matrix of each product: [columns, inner], as nn.Linear keeps it, if transposed; else [inner,
            columns].
        transposed: Whether each weight is transposed.
        bias: [columns].

    Raises:
        TypeError: A tensor is not bf16 on the CPU.
        ValueError: The shapes do not fit each other.
    """
    tensors = [*x, *weight] + ([] if bias is None else [bias])
    if not 0 < len(x) == len(weight) == len(transposed) or any(tensor.dim() != 2 for tensor in (*x, *weight)):
        dimensions = [tuple(tensor.shape) for tensor in (*x, *weight)]
        raise ValueError(f"linear: x and weights have shapes {dimensions}; expected as many x as weights, all matrices")
    shapes = [(*a.shape, *(b.t() if t else b).shape) for a, b, t in zip(x, weight, transposed, strict=True)]
    rows, inner, columns = shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][-1]
    if any(tensor.dtype != BF16 or not tensor.is_cpu for tensor in tensors):
        kinds = [f"{tensor.dtype} on {tensor.device}" for tensor in tensors]
        raise TypeError(f"linear: tensors are {kinds}; expected {BF16} on cpu")
    fits = all(shape == (rows, shape[1], shape[1], columns) for shape in shapes)
    if not fits or rows < LEAST_ROWS or not columns or not inner or (bias is not None and bias.shape != (columns,)):
        products = ", ".join(f"x {shape[:2]} times weight {shape[2:]}" for shape in shapes)
        biased = "" if bias is None else f" plus bias {tuple(bias.shape)}"
        raise ValueError(
            f"linear: {products}{biased}; expected x (rows, inner) times weight (inner, columns) plus bias (columns,), "
            f"with the same rows and columns in all products, and at least {LEAST_ROWS} rows"
        )
    prepared = [_prepared(*product) for product in zip(x, weight, transposed, strict=True)]
    x, weight, transposed = zip(*prepared, strict=True)
    bias = None if bias is None else bias.contiguous()
    count, threads, kernels = len(prepared), torch.get_num_threads(), library().kernels
    size = kernels.linear_workspace(sum(tensor.shape[1] for tensor in x), count)
    output, workspace, pointers = pool.empty(rows, columns), pool.workspace(threads * size), ctypes.c_void_p * count
    kernels.linear(
        pointers(*[tensor.data_ptr() for tensor in x]),
        (ctypes.c_long * count)(*[tensor.stride(0) for tensor in x]),
        pointers(*[tensor.data_ptr() for tensor in weight]),
        (ctypes.c_long * count)(*[tensor.shape[1] for tensor in x]),
        (ctypes.c_int * count)(*transposed),
        count,
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        rows,
        columns,
        workspace.data_ptr(),
        size,
        threads,
    )
    return output


def _prepared(x: Tensor, weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor, bool]:
    """Return a product in the layout that the kernel reads, with an even number of summands."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if weight.t().is_contiguous():
        weight, transposed = weight.t(), not transposed
    weight = weight.contiguous()
    if x.shape[1] % 2:
        x, weight = functional.pad(x, (0, 1)), functional.pad(weight, (0, 1) if transposed else (0, 0, 0, 1))
    return x, weight, transposed


def _fake_weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[1] > right.shape[1]:
        return _fake_weight_gradient(right, left).T
    return left.new_empty(left.shape[1], right.shape[1], dtype=FP32)


@operator(_fake_weight_gradient)
def weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    """Return left.T @ right [outputs, inputs] in fp32, for left [rows, outputs] and right [rows, inputs].

    torch is as fast, but oneDNN would compile and keep code for every distinct number of rows.

    Raises:
        TypeError: A tensor is not bf16 on the CPU.
        ValueError: The numbers of rows differ.
    """
    (rows, outputs), (right_rows, inputs) = (
        _sizes("weight_gradient", name, tensor, 2) for name, tensor in (("left", left), ("right", right))
    )
    if not left.dtype == right.dtype == BF16 or not (left.is_cpu and right.is_cpu):
        raise TypeError(f"weight_gradient: left is {left.dtype}, right {right.dtype}; expected {BF16} on cpu")
    if rows != right_rows:
        raise ValueError(f"weight_gradient: left has {rows} rows, right {right_rows}; expected the same number")
    swapped = outputs > inputs  # the kernel wants the narrower matrix on the left
    if swapped:
        left, right, outputs, inputs = right, left, inputs, outputs
    left, right = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (left, right))
    threads, kernels = torch.get_num_threads(), library().kernels
    gradient, size = left.new_empty(outputs, inputs, dtype=FP32), kernels.weight_gradient_workspace(outputs)
    workspace = pool.workspace(threads * size)
    pointers = (left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), gradient.data_ptr())
    kernels.weight_gradient(*pointers, rows, outputs, inputs, workspace.data_ptr(), size, threads)
    return gradient.T if swapped else gradient


@operator(lambda rows, weight, epsilon, gemma: (torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=FP32)))
def rms_norm(rows: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """Return the normalised rows in bf16 [rows, width], and 1 / root mean square of each row in fp32 [rows, 1]."""
    count, width = _sizes("rms_norm", "rows", rows, 2)
    _check("rms_norm", ("rows", rows, BF16, (count, width)), ("weight", weight, BF16, (width,)))
    output, inverse_rms = pool.empty(count, width), rows.new_empty(count, 1, dtype=FP32)
    pointers = (tensor.data_ptr() for tensor in (rows, weight, output, inverse_rms))
    library().kernels.rms_norm(*pointers, count, width, epsilon, gemma, torch.get_num_threads())
    return output, inverse_rms


@operator(lambda grad_output, rows, weight, inverse_rms, gemma: torch.empty_like(rows))
def rms_norm_backward(grad_output: Tensor, rows: Tensor, weight: Tensor, inverse_rms: Tensor, gemma: bool) -> Tensor:
    """Return the gradient of a norm's rows."""
    grad_output, (count, width) = grad_output.contiguous(), _sizes("rms_norm_backward", "rows", rows, 2)
    _check(
        "rms_norm_backward",
        ("grad_output", grad_output, BF16, (count, width)),
        ("rows", rows, BF16, (count, width)),
        ("weight", weight, BF16, (width,)),
        ("inverse_rms", inverse_rms, FP32, (count, 1)),
    )
    grad_rows = pool.empty(count, width)
    pointers = (tensor.data_ptr() for tensor in (grad_output, rows, weight, inverse_rms, grad_rows))
    library().kernels.rms_norm_backward(*pointers, count, width, gemma, torch.get_num_threads())
    return grad_rows


@operator(lambda gate, up, tanh: torch.empty_like(gate))
def gated(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """Return silu(gate) * up [rows, width], or with GELU's approximation by tanh instead of SiLU."""
    shape = _sizes("gated", "gate", gate, 2)
    _check("gated", ("gate", gate, BF16, shape), ("up", up, BF16, shape))
    product = pool.empty(*shape)
    pointers = (tensor.data_ptr() for tensor in (gate, up, product))
    library().kernels.gated(*pointers, gate.numel(), tanh, torch.get_num_threads())
    return product


@operator(lambda grad_product, gate, up, tanh: torch.empty_like(up), mutates=("grad_product",))
def gated_backward(grad_product: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """Return the gradient of up; replace the gradient of the product by the gradient of gate."""
    shape = _sizes("gated_backward", "gate", gate, 2)
    given = (("grad_product", grad_product), ("gate", gate), ("up", up))
    _check("gated_backward", *((name, tensor, BF16, shape) for name, tensor in given))
    grad_up = pool.empty(*shape)
    pointers = (tensor.data_ptr() for tensor in (grad_product, gate, up, grad_product, grad_up))
    library().kernels.gated_backward(*pointers, gate.numel(), tanh, torch.get_num_threads())
    return grad_up


@operator(lambda logits, labels, to_gradient: logits.new_empty(len(logits), 1, dtype=FP32), mutates=("logits",))
def label_log_probs(logits: Tensor, labels: Tensor, to_gradient: bool) -> Tensor:
    """Return the log-probability of each row's label, fp32 [rows, 1]; NaN for a label outside [0, vocabulary).

    Args:
        logits: [rows, vocabulary]. If `to_gradient`, they are replaced by the gradient of the summed cross-entropy,
            except in rows whose label is outside [0, vocabulary).
        labels: int64 [rows].
        to_gradient: Whether to replace the logits by the gradient.
    """
    labels, (rows, vocabulary) = labels.contiguous(), _sizes("label_log_probs", "logits", logits, 2)
    _check("label_log_probs", ("logits", logits, BF16, (rows, vocabulary)), ("labels", labels, torch.int64, (rows,)))
    log_probs = logits.new_empty(rows, 1, dtype=FP32)
    pointers = (tensor.data_ptr() for tensor in (logits, labels, log_probs))
    library().kernels.label_log_probs(*pointers, rows, vocabulary, to_gradient, torch.get_num_threads())
    return log_probs


@operator(lambda x, cos, sin: x.new_empty(x.shape))
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [length, heads, head_dim] rotated by the angles of its positions [length, head_dim]."""
    length, heads, head_dim = _sizes("rotate", "x", x, 3)
    if head_dim % 2:
        raise ValueError(f"rotate: x has shape {tuple(x.shape)}; expected an even last dimension")
    x, cos, sin, angles = x.contiguous(), cos.contiguous(), sin.contiguous(), (length, head_dim)
    _check("rotate", ("x", x, BF16, (length, heads, head_dim)), ("cos", cos, BF16, angles), ("sin", sin, BF16, angles))
    output = pool.empty(length, heads, head_dim)
    pointers = (tensor.data_ptr() for tensor in (x, cos, sin, output))
    library().kernels.rotate(*pointers, length, heads, head_dim, torch.get_num_threads())
    return output


@operator(
    lambda query, key, value, spans, scale, window: (
        torch.empty_like(query),
        query.new_empty(query.shape[1], query.shape[0], dtype=FP32),
    )
)
def attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attend causally inside each example of a packed micro-batch.

    Args:
        query: [length, heads, head_dim].
        key: [length, key_heads, head_dim]; heads / key_heads query heads share each key head.
        value: [length, key_heads, head_dim].
        spans: `Segments.spans`, int32 [examples, 4].
        scale: Factor of the scores.
        window: How many positions a position sees, itself included; None for all.

    Returns:
        The output [length, heads, head_dim], and log2 of each position's softmax denominator in fp32 [heads, length].
    """
    sizes = _check_attention("attention", query, key, value, spans, window)
    output, logsumexp = pool.empty(*query.shape), query.new_empty(query.shape[1], len(query), dtype=FP32)
    _attend("attention", (query, key, value, output, logsumexp), spans, (*sizes, window or 0, scale))
    return output, logsumexp


@operator(
    lambda grad_output, query, key, value, output, logsumexp, spans, scale, window: tuple(
        torch.empty_like(tensor) for tensor in (query, key, value)
    )
)
def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    spans: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    sizes = _check_attention("attention_backward", query, key, value, spans, window)
    _check(
        "attention_backward",
        ("grad_output", grad_output, BF16, query.shape),
        ("output", output, BF16, query.shape),
        ("logsumexp", logsumexp, FP32, (query.shape[1], len(query))),
    )
    gradients = pool.empty(*query.shape), pool.empty(*key.shape), pool.empty(*value.shape)
    tensors = (grad_output, query, key, value, output, logsumexp, *gradients)
    _attend("attention_backward", tensors, spans, (*sizes, window or 0, scale))
    return gradients


def _check_attention(
    operator: str, query: Tensor, key: Tensor, value: Tensor, spans: Tensor, window: int | None
) -> tuple[int, int, int, int]:
    """Check the inputs of attention; return length, heads, key_heads and head_dim."""
    length, heads, head_dim = _sizes(operator, "query", query, 3)
    key_heads = _sizes(operator, "key", key, 3)[1]
    shared = (length, key_heads, head_dim)
    _check(operator, ("query", query, BF16, (length, heads, head_dim)), ("key", key, BF16, shared))
    _check(operator, ("value", value, BF16, shared), ("spans", spans, torch.int32, (len(spans), 4)))
    if not key_heads or heads % key_heads:
        raise ValueError(f"{operator}: {heads} heads cannot share {key_heads} key heads evenly")
    if window is not None and window < 1:
        raise ValueError(f"{operator}: window is {window}; expected None or at least 1")
    begin, end, shared, second = spans.numpy().T
    bounds = np.append(0, end)  # each example begins where the previous example ends
    in_order = (begin == bounds[:-1]).all() and (begin < end).all()
    if not in_order or bounds[-1] != length or not ((begin <= shared) & (shared <= second) & (second <= end)).all():
        raise ValueError(
            f"{operator}: spans are {spans.tolist()[:8]}; expected examples in order that fill {length} rows"
        )
    return length, heads, key_heads, head_dim


def _attend(
    operator: str, tensors: Sequence[Tensor], spans: Tensor, rest: tuple[int, int, int, int, int, float]
) -> None:
    """Call an attention kernel of kernels.c.

    Each task of the kernel computes one example for one key head. The longest examples come first, so that no thread
    begins a long task when the others are almost done.

    Args:
        operator: `attention` or `attention_backward`.
        tensors: The tensors that the kernel takes before `spans`, in its order.
        spans: `Segments.spans`.
        rest: Length, heads, key_heads, head_dim, window (0 for none) and scale.
    """
    begin, end, _, _ = spans.numpy().T
    order = np.argsort(begin - end, kind="stable")
    spans, kernels, (_, _, key_heads, head_dim, *_) = spans[torch.from_numpy(order)], library().kernels, rest
    threads = min(torch.get_num_threads(), len(spans) * key_heads)
    size = kernels.attention_workspace(int((end - begin).max()), head_dim)
    workspace, pointers = pool.workspace(threads * size), [tensor.data_ptr() for tensor in (*tensors, spans)]
    kernel = kernels.attention if operator == "attention" else kernels.attention_backward
    kernel(*pointers, len(spans), *rest, workspace.data_ptr(), size, threads)
