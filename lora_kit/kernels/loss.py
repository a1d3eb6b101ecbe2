"""Cross-entropy at the positions that are trained, without the logits of a whole micro-batch.

The head is applied to a few hundred rows at a time. The gradient with respect to their hidden states is computed in the
forward pass, while their logits exist, so that no logits outlive their rows. The head is frozen and needs no gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd import Function

from lora_kit.kernels import dispatch
from lora_kit.kernels.limits import LOGITS, ROW_MULTIPLE


@dataclass(frozen=True)
class Head:
    """The output layer: logits = cap * tanh(scale * (x @ W.T + bias) / cap).

    Attributes:
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        scale: 1 in most families.
        cap: None in most families: no tanh.
    """

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, "vocabulary"] | None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits of hidden states, with bias, scale and cap."""
        return self.capped(self.before_cap(hidden))

    def before_cap(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits in units of the cap, if there is a cap."""
        rows = hidden.flatten(0, -2)
        logits = dispatch.backend_of(rows).linear([(rows, self.weight, True)], self.bias)
        logits = logits.view(*hidden.shape[:-1], len(self.weight))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap)

    def capped(self, before: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows vocabulary"]:
        """Convert logits in units of the cap to logits."""
        return before if self.cap is None else before * self.cap

    def backward(self, grad_logits: Float[Tensor, "rows vocabulary"], before: Tensor) -> Float[Tensor, "rows width"]:
        """Return the gradient of the hidden states; `grad_logits` is overwritten."""
        if self.cap is not None:
            grad_logits = torch.ops.aten.tanh_backward(grad_logits, before)
        grad_logits = grad_logits.mul_(self.scale) if self.scale != 1.0 else grad_logits
        return dispatch.backend_of(grad_logits).linear([(grad_logits, self.weight, False)], None)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, labels: Tensor, to_gradient: bool) -> Tensor:
        total, grad_hidden = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        rows = max(ROW_MULTIPLE, LOGITS[hidden.device.type] // len(head.weight) // ROW_MULTIPLE * ROW_MULTIPLE)
        chunks = zip(hidden.split(rows), labels.split(rows), grad_hidden.split(rows), strict=True)
        for hidden_chunk, label, target in chunks:
            count = len(hidden_chunk)
            before = head.before_cap(_padded(hidden_chunk))
            logits = head.capped(before)
            backend = dispatch.backend_of(logits)
            total -= backend.summed_log_probs(logits[:count], label, to_gradient=to_gradient)
            if to_gradient:
                logits[count:] = 0
                target.copy_(head.backward(logits, before)[:count])
            del before, logits  # frees their memory before the next chunk needs it
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * gradient.to(grad_hidden.dtype), None, None, None


def _padded(rows: Float[Tensor, "rows width"]) -> Float[Tensor, "padded width"]:
    """On a CPU, append rows of zeros up to a multiple of ROW_MULTIPLE; on a GPU, return the rows as they are."""
    missing = -len(rows) % ROW_MULTIPLE
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing and not rows.is_cuda else rows


def summed_cross_entropy(
    hidden: Float[Tensor, "rows width"], head: Head, labels: Int64[Tensor, "rows"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy (nats) summed over all rows, in fp32; every label is a token id, not IGNORE."""
    total: Tensor = _CrossEntropy.apply(hidden, head, labels, torch.is_grad_enabled() and hidden.requires_grad)
    return total
