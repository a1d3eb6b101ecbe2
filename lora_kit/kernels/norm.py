"""RMS norms in few passes over memory.

For the backward pass only the input is saved, which is in memory anyway as the residual stream, and one number per row.
"""

from collections.abc import Callable
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels import dispatch
from lora_kit.kernels.lora import NORM_FACTORS, NormFactors


class RmsNorm(Function):
    """weight * x / sqrt(mean(x^2) + epsilon), computed in fp32. The weight is frozen.

    Gemma multiplies by 1 + weight instead of weight.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> tuple[Tensor, Tensor]:
        """Return the normalised `rows` [rows, width], and 1 / root mean square of each row in fp32 [rows, 1]."""
        ctx.gemma, rows = gemma, rows.contiguous()
        output, inverse_rms = dispatch.backend_of(rows).rms_norm(rows, weight, epsilon, gemma=gemma)
        ctx.save_for_backward(rows, weight, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        return output, inverse_rms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the rows."""
        rows, weight, inverse_rms = ctx.saved_tensors
        backend = dispatch.backend_of(rows)
        return backend.rms_norm_backward(grad_output, rows, weight, inverse_rms, gemma=ctx.gemma), None, None, None


def fuse(norm: nn.Module, *, gemma: bool) -> Callable[[], None]:
    """Replace a norm's forward by `RmsNorm`; return a function that restores it."""
    own_forward, weight = norm.forward, cast(Tensor, norm.weight)
    gain = 1 + weight.detach().float() if gemma else weight.detach()
    epsilon = cast(float, norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)

    def forward(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if x.dtype != weight.dtype:  # torch would promote the product of both to another dtype
            return cast(Tensor, own_forward(x))
        rows = x.reshape(-1, x.shape[-1])
        normalized, inverse_rms = RmsNorm.apply(rows, weight, epsilon, gemma)
        output = cast(Tensor, normalized).view(x.shape)
        setattr(output, NORM_FACTORS, NormFactors(rows.detach(), inverse_rms, gain))
        return output

    norm.forward = forward
    return lambda: setattr(norm, "forward", own_forward)
