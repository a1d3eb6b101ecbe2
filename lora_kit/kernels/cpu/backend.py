"""The backend in C, for bf16 on CPUs with AVX-512 bf16."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lora_kit.kernels.backend import GatedInputs, Product
from lora_kit.kernels.cpu import ops
from lora_kit.kernels.cpu.build import library
from lora_kit.kernels.plain import Plain
from lora_kit.kernels.segments import Segments, fit_tiles

FEWEST_ROWS = 32  # rows of a product; with fewer, as in generation, packing the weight costs more than the product
PLAIN = Plain()


def _multiplies(x: Tensor, other: Tensor) -> bool:
    return len(x) >= FEWEST_ROWS and x.dtype == other.dtype


class Cpu:
    """See `Backend`."""

    adds_adapters = False
    pools_memory = True

    def identity(self) -> dict[str, str]:
        """Return the hash of the compiled library, the compiler that made it and the instructions of its products."""
        compiled = library()
        instructions = "amx" if compiled.in_tiles else "avx512"
        return {
            "backend": "c",
            "library": compiled.sha256[:16],
            "compiler": compiled.compiler,
            "products": instructions,
        }

    def linear(self, products: Iterable[Product], bias: Tensor | None) -> Float[Tensor, "rows columns"]:
        """Return the sum of the products and the bias, rounded once."""
        products = iter(products)
        first = x, weight, _ = next(products)
        if not _multiplies(x, weight) or (bias is not None and bias.dtype != x.dtype):
            return PLAIN.linear(chain([first], products), bias)
        inputs, weights, transposed = zip(first, *products, strict=True)
        return ops.linear(inputs, weights, transposed, bias)

    def weight_gradient(
        self, left: Float[Tensor, "rows outputs"], right: Float[Tensor, "rows inputs"]
    ) -> Float[Tensor, "outputs inputs"]:
        """Return left.T @ right in fp32."""
        return (ops if _multiplies(left, right) else PLAIN).weight_gradient(left, right)

    def rms_norm(
        self, rows: Float[Tensor, "rows width"], weight: Float[Tensor, "width"], epsilon: float, *, gemma: bool
    ) -> tuple[Tensor, Tensor]:
        """Normalise in one pass."""
        return ops.rms_norm(rows, weight, epsilon, gemma)

    def rms_norm_backward(
        self, grad_output: Tensor, rows: Tensor, weight: Tensor, inverse_rms: Tensor, *, gemma: bool
    ) -> Float[Tensor, "rows width"]:
        """Return the gradient of the rows."""
        return ops.rms_norm_backward(grad_output, rows, weight, inverse_rms, gemma)

    def gated(self, inputs: GatedInputs) -> Float[Tensor, "rows width"]:
        """Return act(gate) * up."""
        return ops.gated(inputs.gate, inputs.up, inputs.activation != "silu")

    def gated_backward(self, grad_product: Tensor, inputs: GatedInputs) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate, in the memory of `grad_product`, and up."""
        return grad_product, ops.gated_backward(grad_product, inputs.gate, inputs.up, inputs.activation != "silu")

    def rotate(self, x: Float[Tensor, "heads length width"], cos: Tensor, sin: Tensor) -> Tensor:
        """Return x cos + rotate_half(x) sin."""
        return ops.rotate(x.transpose(0, 1), cos, sin).transpose(0, 1)

    def summed_log_probs(
        self, logits: Float[Tensor, "rows vocabulary"], labels: Int64[Tensor, "rows"], *, to_gradient: bool
    ) -> Float[Tensor, ""]:
        """Return the sum of the labels' log-probabilities; replace the logits by the gradient if it is wanted."""
        return ops.label_log_probs(logits, labels, to_gradient).sum()

    def supports_attention(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return whether the tensors fit tiles."""
        return fit_tiles(query, key, value)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Attend in tiles of 64 queries and keys, an example and a key head at a time."""
        query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (query, key, value))
        output, logsumexp = ops.attention(query, key, value, torch.from_numpy(segments.spans), scale, window)
        return output, (query, key, value, output, logsumexp)

    def attention_backward(
        self,
        grad_output: Tensor,
        saved: Sequence[Any],
        segments: Segments,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        query, key, value, output, logsumexp = saved
        inputs = (grad_output.contiguous(), query, key, value, output, logsumexp)
        gradients = ops.attention_backward(*inputs, torch.from_numpy(segments.spans), scale, window)
        grad_query, grad_key, grad_value = (grad.transpose(0, 1) for grad in gradients)
        return grad_query, grad_key, grad_value
