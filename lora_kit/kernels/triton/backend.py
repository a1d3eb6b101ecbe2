"""The backend in Triton, for GPUs. Linear layers and the loss are computed by torch, which calls cuBLAS."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lora_kit.kernels.backend import GatedInputs, Product
from lora_kit.kernels.plain import Plain
from lora_kit.kernels.segments import Segments, fit_tiles
from lora_kit.kernels.triton import attention, pointwise

PLAIN = Plain()


class Triton:
    """See `Backend`; `gated` adds the adapters of gate and up while it has them in registers."""

    pools_memory = False
    adds_adapters = True

    def identity(self) -> dict[str, str]:
        """Return the version of Triton."""
        import triton

        return {"backend": "triton", "triton": triton.__version__}

    def linear(self, products: Iterable[Product], bias: Tensor | None) -> Float[Tensor, "rows columns"]:
        """Compute the first product with the bias, then add every further product to it in place."""
        return PLAIN.linear(products, bias)

    def weight_gradient(
        self, left: Float[Tensor, "rows outputs"], right: Float[Tensor, "rows inputs"]
    ) -> Float[Tensor, "outputs inputs"]:
        """Return left.T @ right in fp32."""
        return PLAIN.weight_gradient(left, right)

    def rms_norm(
        self, rows: Float[Tensor, "rows width"], weight: Float[Tensor, "width"], epsilon: float, *, gemma: bool
    ) -> tuple[Tensor, Tensor]:
        """Normalise in one pass."""
        return pointwise.rms_norm(rows, weight, epsilon, gemma=gemma)

    def rms_norm_backward(
        self, grad_output: Tensor, rows: Tensor, weight: Tensor, inverse_rms: Tensor, *, gemma: bool
    ) -> Float[Tensor, "rows width"]:
        """Return the gradient of the rows."""
        return pointwise.rms_norm_backward(grad_output, rows, weight, inverse_rms, gemma=gemma)

    def gated(self, inputs: GatedInputs) -> Float[Tensor, "rows width"]:
        """Return act(gate + low_gate @ B_gate.T) * (up + low_up @ B_up.T).

        `inputs.low` holds low_gate and low_up side by side.
        """
        return pointwise.gated(inputs)

    def gated_backward(self, grad_product: Tensor, inputs: GatedInputs) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up; the gradient of gate overwrites `grad_product`."""
        return pointwise.gated_backward(grad_product, inputs)

    def rotate(self, x: Float[Tensor, "heads length width"], cos: Tensor, sin: Tensor) -> Tensor:
        """Return x cos + rotate_half(x) sin."""
        return pointwise.rotate(x.transpose(0, 1), cos, sin).transpose(0, 1)

    def summed_log_probs(
        self, logits: Float[Tensor, "rows vocabulary"], labels: Int64[Tensor, "rows"], *, to_gradient: bool
    ) -> Float[Tensor, ""]:
        """Return the sum of the labels' log-probabilities; replace the logits by the gradient if it is wanted."""
        return PLAIN.summed_log_probs(logits, labels, to_gradient=to_gradient)

    def supports_attention(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return whether their dtype and widths suit the tiles of the attention kernel."""
        return fit_tiles(query, key, value)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Attend in tiles of rows that end where their example does."""
        query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (query, key, value))
        tiles = segments.tiles(attention.tile_rows(query.shape[-1]))
        output, logsumexp = attention.attend(query, key, value, tiles, scale, window)
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
        tiles = segments.tiles(attention.tile_rows(grad_output.shape[-1]))
        query, key, value, output, logsumexp = saved
        inputs = (grad_output.contiguous(), query, key, value, output, logsumexp)
        gradients = attention.attend_backward(*inputs, tiles, scale, window)
        grad_query, grad_key, grad_value = (grad.transpose(0, 1) for grad in gradients)
        return grad_query, grad_key, grad_value


def try_kernels(device: torch.device) -> None:
    """Compile and run every kernel once.

    Raises:
        Exception: Any error of Triton, its compilers or the driver.
    """
    backend, x = Triton(), torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    _, inverse_rms = backend.rms_norm(x, x[0], 1e-6, gemma=False)
    backend.rms_norm_backward(x, x, x[0], inverse_rms, gemma=False)
    inputs = GatedInputs(x, x, torch.cat([x, x], 1), (x, x), "silu")
    backend.gated_backward(backend.gated(inputs), inputs)
    heads, segments = backend.rotate(x[None], x, x), Segments((16,), x.device)
    output, saved = backend.attention(heads, heads, heads, segments, 1.0, None)
    backend.attention_backward(output, saved, segments, 1.0, None)
