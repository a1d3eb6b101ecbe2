"""The interface of a backend: an object that computes the parts of the fast path on one kind of device.

There are three: `plain.Plain` (PyTorch, everywhere), `cpu.backend.Cpu` (C) and `triton.backend.Triton`.
`dispatch.backend_of` chooses a backend by the device and the dtype of a tensor. Rows are the tokens of a micro-batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float, Int64
from torch import Tensor

from lora_kit.kernels.segments import Segments

Product = tuple[Tensor, Tensor, bool]
"""A summand of `Backend.linear`: x [rows, inner], its weight, and whether the weight is transposed: True for
[columns, inner] as in nn.Linear, False for [inner, columns]."""


@dataclass(frozen=True)
class GatedInputs:
    """The inputs of a gated activation, act(gate) * up.

    Attributes:
        gate: [rows, width].
        up: [rows, width].
        low: [rows, ranks], s * x @ A.T of gate's and of up's adapter, side by side.
        ups: B of gate's and B of up's adapter, each [width, rank], in the adapters' dtype.
        activation: A name of `plain.ACTIVATIONS`.
    """

    gate: Float[Tensor, "rows width"]
    up: Float[Tensor, "rows width"]
    low: Float[Tensor, "rows ranks"]
    ups: tuple[Tensor, Tensor]
    activation: str


class Backend(Protocol):
    """Computes the parts of the fast path.

    Attributes:
        pools_memory: Whether products are written to the buffer pool.
        adds_adapters: Whether `gated` adds low @ B.T to gate and up; if not, gate and up contain it already.
    """

    @property
    def pools_memory(self) -> bool: ...

    @property
    def adds_adapters(self) -> bool: ...

    def identity(self) -> dict[str, str]:
        """Return the backend's name and what its kernels were built with."""

    def linear(
        self, products: Iterable[Product], bias: Float[Tensor, "columns"] | None
    ) -> Float[Tensor, "rows columns"]:
        """Return the sum of the products and the bias.

        `products` may be a generator that dequantises each weight when its product is needed. A backend that adds the
        products one by one then holds a single dequantised weight at a time.
        """

    def weight_gradient(
        self, left: Float[Tensor, "rows outputs"], right: Float[Tensor, "rows inputs"]
    ) -> Float[Tensor, "outputs inputs"]:
        """Return left.T @ right in fp32."""

    def rms_norm(
        self, rows: Float[Tensor, "rows width"], weight: Float[Tensor, "width"], epsilon: float, *, gemma: bool
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows 1"]]:
        """Return the normalised rows in their dtype, and 1 / root mean square of each row in fp32.

        The normalised rows are multiplied by the weight, or by 1 + weight if `gemma`.
        """

    def rms_norm_backward(
        self, grad_output: Tensor, rows: Tensor, weight: Tensor, inverse_rms: Tensor, *, gemma: bool
    ) -> Float[Tensor, "rows width"]:
        """Return the gradient of the rows."""

    def gated(self, inputs: GatedInputs) -> Float[Tensor, "rows width"]:
        """Return act(gate) * up."""

    def gated_backward(
        self, grad_product: Float[Tensor, "rows width"], inputs: GatedInputs
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
        """Return the gradients of gate and up; `grad_product` may be overwritten."""

    def rotate(
        self,
        x: Float[Tensor, "heads length width"],
        cos: Float[Tensor, "length width"],
        sin: Float[Tensor, "length width"],
    ) -> Float[Tensor, "heads length width"]:
        """Return x cos + rotate_half(x) sin."""

    def summed_log_probs(
        self, logits: Float[Tensor, "rows vocabulary"], labels: Int64[Tensor, "rows"], *, to_gradient: bool
    ) -> Float[Tensor, ""]:
        """Return the sum of the labels' log-probabilities in fp32.

        If `to_gradient`, replace the logits by the gradient of the summed cross-entropy.
        """

    def supports_attention(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return whether `attention` computes tensors of these dtypes and widths."""

    def attention(
        self,
        query: Float[Tensor, "heads length width"],
        key: Float[Tensor, "key_heads length width"],
        value: Float[Tensor, "key_heads length value_width"],
        segments: Segments,
        scale: float,
        window: int | None,
    ) -> tuple[Float[Tensor, "length heads value_width"], Sequence[Tensor | None]]:
        """Attend causally inside each segment; return the output and what the backward pass needs.

        A segment may fork (see `Segments`): then no position sees the other branch.
        """

    def attention_backward(
        self,
        grad_output: Float[Tensor, "length heads value_width"],
        saved: Sequence[Any],
        segments: Segments,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value in their layouts."""
