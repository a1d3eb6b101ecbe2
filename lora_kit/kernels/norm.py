"""Root mean square norms in few passes over memory: one if kernels are compiled, or some rows at a time in the cache.

Nothing is kept but the input, which the residual stream holds anyway, and a number for each row.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels.dispatch import compiled
from lora_kit.kernels.lora import ORIGIN, Origin

AT_ONCE = 1 << 18  # elements; a GPU takes all rows at once


class RmsNorm(Function):
    """weight * x / sqrt(mean(x^2) + epsilon), in fp32; the weight is frozen and may be meant as 1 + weight."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> tuple[Tensor, Tensor]:
        """Normalise every row of `rows` [rows, width]; return also what each was multiplied with."""
        ctx.gemma = gemma
        kernels = compiled(rows)
        if kernels:
            rows = rows.contiguous()
            output, inverse = kernels.norm(rows, weight, epsilon, gemma=gemma)
            ctx.save_for_backward(rows, weight, inverse)
            ctx.mark_non_differentiable(inverse)
            return output, inverse
        output, inverse = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for some in _portions(rows):
            part = rows[some].to(torch.float32, copy=True)
            of_row = torch.linalg.vecdot(part, part).div_(part.shape[1]).add_(epsilon).rsqrt_()[:, None]
            part.mul_(of_row)
            # Llama rounds before it weighs, Gemma after
            output[some] = part.mul_(1 + weight.float()) if gemma else weight * part.to(rows.dtype)
            inverse[some] = of_row
        ctx.save_for_backward(rows, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return output, inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Take the gradient of the rows."""
        rows, weight, inverse = ctx.saved_tensors
        kernels = compiled(rows)
        if kernels:
            return kernels.norm_back(gradient, rows, weight, inverse, gemma=ctx.gemma), None, None, None
        of_rows = torch.empty_like(rows)
        weight = 1 + weight.float() if ctx.gemma else weight
        for some in _portions(rows):
            normal = rows[some] * inverse[some]
            above = (gradient[some] * weight).float()
            along = torch.linalg.vecdot(above, normal)[:, None].div_(normal.shape[1])
            of_rows[some] = above.addcmul_(normal, along, value=-1).mul_(inverse[some])
        return of_rows, None, None, None


def _portions(rows: Tensor) -> list[slice]:
    many = len(rows) if rows.is_cuda else max(1, AT_ONCE // rows.shape[1])
    return [slice(begin, begin + many) for begin in range(0, len(rows), many)]


def fuse(norm: nn.Module, *, gemma: bool) -> Callable[[], None]:
    """Let a norm of this kind compute with few passes; return the way back."""
    own, weight = norm.forward, cast(Tensor, norm.weight)
    gain = 1 + weight.detach().float() if gemma else weight.detach()
    epsilon = cast(float, norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)

    def forward(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if x.dtype != weight.dtype:  # whose product has a dtype of its own
            return cast(Tensor, own(x))
        rows = x.reshape(-1, x.shape[-1])
        normal, inverse = RmsNorm.apply(rows, weight, epsilon, gemma)
        output = cast(Tensor, normal).view(x.shape)
        setattr(output, ORIGIN, Origin(rows.detach(), inverse, gain))
        return output

    norm.forward = forward
    return lambda: setattr(norm, "forward", own)
