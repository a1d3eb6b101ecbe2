"""Cross-entropy at the positions that are trained, without the logits of a whole micro-batch.

The head is applied to a few hundred rows at a time; their gradient with respect to the hidden states is made in the
forward pass, while their logits are there, so that no logits outlive their rows. The frozen head needs none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd import Function

from lora_kit.kernels.dispatch import compiled
from lora_kit.kernels.limits import LOGITS, LOGITS_IN_CACHE, ROW_MULTIPLE
from lora_kit.kernels.lora import summed


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: cap * tanh(scale * (x W' + bias) / cap).

    Attributes:
        weight: [vocabulary, width].
        bias: [vocabulary], or none.
        scale: 1 in most families.
        cap: None in most families.
    """

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, "vocabulary"] | None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits of some rows."""
        return self.capped(self.before_cap(hidden))

    def before_cap(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits in units of the cap, if there is one."""
        logits = summed([(hidden.flatten(0, -2), self.weight, True)], self.bias).view(
            *hidden.shape[:-1], len(self.weight)
        )
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap)

    def capped(self, before: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits themselves."""
        return before if self.cap is None else before * self.cap

    def back(self, of_logits: Float[Tensor, "rows vocabulary"], before: Tensor) -> Float[Tensor, "rows width"]:
        """Return the gradient of the hidden states from that of the logits, which is used up."""
        if self.cap is not None:
            of_logits = torch.ops.aten.tanh_backward(of_logits, before)
        of_logits = of_logits.mul_(self.scale) if self.scale != 1.0 else of_logits
        return summed([(of_logits, self.weight, False)])


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, labels: Tensor, wanted: bool) -> Tensor:
        total, of_hidden = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        rows = max(ROW_MULTIPLE, LOGITS[hidden.device.type] // len(head.weight) // ROW_MULTIPLE * ROW_MULTIPLE)
        for some, label, target in zip(hidden.split(rows), labels.split(rows), of_hidden.split(rows), strict=True):
            before = head.before_cap(_filled(some))
            logits = head.capped(before)
            total -= _chosen(logits[: len(some)], label[:, None], to_gradient=wanted)
            if wanted:
                logits[len(some) :] = 0
                target.copy_(head.back(logits, before)[: len(some)])
            del before, logits  # or the next ones find their room taken
        ctx.save_for_backward(of_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), None, None, None


def _filled(rows: Tensor) -> Tensor:
    """Return rows whose number is a multiple, with zeros, on a CPU, where each number costs memory."""
    more = -len(rows) % ROW_MULTIPLE
    return torch.nn.functional.pad(rows, (0, 0, 0, more)) if more and not rows.is_cuda else rows


def _chosen(logits: Tensor, labels: Tensor, *, to_gradient: bool) -> Tensor:
    """Return the sum of the labels' log-probabilities, a few rows at a time; turn logits into their loss's gradient."""
    kernels = compiled(logits)
    if kernels and kernels.choose:
        chosen: Tensor = kernels.choose(logits, labels, to_gradient=to_gradient)
        return chosen.sum()
    total = torch.zeros((), device=logits.device)
    few = len(logits) if logits.is_cuda else max(1, LOGITS_IN_CACHE // logits.shape[1])
    for part, label in zip(logits.split(few), labels.split(few), strict=True):
        chosen = torch.log_softmax(part, -1, dtype=torch.float32).gather(1, label)
        total += chosen.sum()
        if to_gradient:
            part.copy_(torch.softmax(part, -1))
            part.scatter_(1, label, torch.expm1(chosen).to(part.dtype))  # p - 1, of a p near 1 too
    return total


def summed_cross_entropy(
    hidden: Float[Tensor, "rows width"], head: Head, labels: Int64[Tensor, "rows"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy (nats) of the labels, summed, in fp32."""
    total: Tensor = _CrossEntropy.apply(hidden, head, labels, torch.is_grad_enabled() and hidden.requires_grad)
    return total
