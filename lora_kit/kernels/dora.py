"""DoRA: the rows of W + s B A are scaled to trained norms, y = m / |W + s B A| * (W x + s B A x) + bias.

|W + s B A| is the norm of each row. It counts as a constant in the backward pass, as in peft (section 4.3 of the
paper). W + s B A itself is never computed: the square of the norm of row j is
|W_j|^2 + 2 s B_j (W A.T)_j + s^2 B_j (A A.T) B_j.

Source: Liu et al. 2024, arXiv 2402.09353, equation 5.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Float32
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function

ADAPTER = "default"


def is_dora(module: nn.Module) -> bool:
    """Return whether a layer of peft has DoRA."""
    return isinstance(module, LoraLayer) and ADAPTER in module.lora_magnitude_vector


def magnitude_of(module: nn.Module) -> Float32[Tensor, "columns"]:
    """Return the trained norms of a layer with DoRA."""
    return cast(Tensor, cast(Any, module).lora_magnitude_vector[ADAPTER].weight)


def row_norms(
    weight: Float[Tensor, "columns inputs"],
    a: Float[Tensor, "rank inputs"],
    b: Float[Tensor, "columns rank"],
    scale: float,
) -> Float32[Tensor, "columns"]:
    """Return the norms of the rows of W + s B A, in fp32.

    A and B are rounded to the dtype of the weight first, as where they are multiplied.
    """
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()
    a, b = a.to(weight.dtype), b.to(weight.dtype).float()
    mixed = torch.mm(weight, a.T).float().mul_(2 * scale)
    inner = torch.mm(a.float(), a.T.float()).mul_(scale**2)
    return (squares + (b * torch.addmm(mixed, b, inner)).sum(1)).clamp_(min=0).sqrt_()


class Scaled(Function):
    """The last step of DoRA: m / norms * z + bias, for z = W x + s B A x."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
        """Scale the columns of z [rows, columns]; the factor is fp32 also where z is bf16."""
        ctx.save_for_backward(z, magnitude, norms)
        output = z * (magnitude / norms)
        return (output if bias is None else output.add_(bias)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of z and of the magnitude."""
        (grad,), (z, magnitude, norms) = grad_outputs, ctx.saved_tensors
        grad_magnitude = (grad * z).sum(0, dtype=torch.float32) / norms
        return (grad * (magnitude / norms)).to(z.dtype), grad_magnitude, None, None
