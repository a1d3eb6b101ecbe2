"""The backend in plain PyTorch: for every device and dtype, and where nothing compiles.

On a CPU, norms and the loss compute a few rows at a time, which stay in the cache; on a GPU, all rows at once.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lora_kit.kernels.backend import GatedInputs, Product
from lora_kit.kernels.blocks import attend_blocks, attend_blocks_backward
from lora_kit.kernels.limits import LOGITS_IN_CACHE
from lora_kit.kernels.segments import Segments

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x, approximate="tanh"),
    ),
}
"""The activations by their names in configurations, each with its backward function."""
ELEMENTS_IN_CACHE = 1 << 18  # on a CPU a norm is computed in chunks of so many elements, which stay in its cache


class Plain:
    """See `Backend`; this class supports every dtype and device."""

    pools_memory = False
    adds_adapters = False

    def identity(self) -> dict[str, str]:
        """Return the backend's name."""
        return {"backend": "plain"}

    def linear(self, products: Iterable[Product], bias: Tensor | None) -> Float[Tensor, "rows columns"]:
        """Compute the first product with the bias, then add every further product to it in place."""
        products = iter(products)
        x, weight, transposed = next(products)
        output = nn.functional.linear(x, weight if transposed else weight.T, bias)
        for x, weight, transposed in products:
            output.addmm_(x, weight.T if transposed else weight)
        return output

    def weight_gradient(
        self, left: Float[Tensor, "rows outputs"], right: Float[Tensor, "rows inputs"]
    ) -> Float[Tensor, "outputs inputs"]:
        """Return left.T @ right, rounded to the inputs' dtype and cast to fp32."""
        return (left.T @ right).float()

    def rms_norm(
        self, rows: Float[Tensor, "rows width"], weight: Float[Tensor, "width"], epsilon: float, *, gemma: bool
    ) -> tuple[Tensor, Tensor]:
        """Normalise in fp32; Llama rounds before it multiplies by the weight, Gemma after."""
        output, inverse_rms = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for chunk in _in_cache(rows, ELEMENTS_IN_CACHE):
            part = rows[chunk].to(torch.float32, copy=True)
            inverse = torch.linalg.vecdot(part, part).div_(part.shape[1]).add_(epsilon).rsqrt_()[:, None]
            part.mul_(inverse)
            output[chunk] = part.mul_(1 + weight.float()) if gemma else weight * part.to(rows.dtype)
            inverse_rms[chunk] = inverse
        return output, inverse_rms

    def rms_norm_backward(
        self, grad_output: Tensor, rows: Tensor, weight: Tensor, inverse_rms: Tensor, *, gemma: bool
    ) -> Float[Tensor, "rows width"]:
        """Return the gradient of the rows."""
        grad_rows, gain = torch.empty_like(rows), 1 + weight.float() if gemma else weight
        for chunk in _in_cache(rows, ELEMENTS_IN_CACHE):
            normalized = rows[chunk] * inverse_rms[chunk]
            grad_normalized = (grad_output[chunk] * gain).float()
            mean = torch.linalg.vecdot(grad_normalized, normalized)[:, None].div_(normalized.shape[1])
            grad_rows[chunk] = grad_normalized.addcmul_(normalized, mean, value=-1).mul_(inverse_rms[chunk])
        return grad_rows

    def gated(self, inputs: GatedInputs) -> Float[Tensor, "rows width"]:
        """Return act(gate) * up."""
        return ACTIVATIONS[inputs.activation][0](inputs.gate).mul_(inputs.up)

    def gated_backward(self, grad_product: Tensor, inputs: GatedInputs) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up; `grad_product` is overwritten."""
        activation, backward = ACTIVATIONS[inputs.activation]
        grad_up = activation(inputs.gate).mul_(grad_product)
        return backward(grad_product.mul_(inputs.up), inputs.gate), grad_up

    def rotate(self, x: Float[Tensor, "heads length width"], cos: Tensor, sin: Tensor) -> Tensor:
        """Return x cos + rotate_half(x) sin in three passes."""
        half = x.shape[-1] // 2
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(x, cos, out=output)
        output[..., :half].addcmul_(x[..., half:], sin[:, :half], value=-1)
        output[..., half:].addcmul_(x[..., :half], sin[:, half:])
        return output

    def summed_log_probs(
        self, logits: Float[Tensor, "rows vocabulary"], labels: Int64[Tensor, "rows"], *, to_gradient: bool
    ) -> Float[Tensor, ""]:
        """Return the sum of the labels' log-probabilities; replace the logits by the gradient if it is wanted."""
        total = torch.zeros((), device=logits.device)
        for chunk in _in_cache(logits, LOGITS_IN_CACHE):
            part, label = logits[chunk], labels[chunk, None]
            log_probs = torch.log_softmax(part, -1, dtype=torch.float32).gather(1, label)
            total += log_probs.sum()
            if to_gradient:
                part.copy_(torch.softmax(part, -1))
                part.scatter_(1, label, torch.expm1(log_probs).to(part.dtype))  # p - 1, accurate where p is near 1
        return total

    def supports_attention(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return True: all dtypes and widths are supported."""
        return True

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Attend by batched products over blocks of queries."""
        return attend_blocks(query, key, value, segments.blocks(window, query.dtype), scale)

    def attention_backward(
        self,
        grad_output: Tensor,
        saved: Sequence[Any],
        segments: Segments,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        return attend_blocks_backward(grad_output, saved, segments.blocks(window, grad_output.dtype), scale)


def _in_cache(rows: Float[Tensor, "rows width"], elements: int) -> list[slice]:
    """Return slices of rows: on a CPU with at most `elements` elements each, on a GPU all rows in one slice."""
    step = max(1, len(rows) if rows.is_cuda else elements // rows.shape[1])
    return [slice(begin, begin + step) for begin in range(0, len(rows), step)]
