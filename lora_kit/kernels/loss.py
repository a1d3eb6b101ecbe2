"""Cross-entropy at the positions that are trained, without the logits of a whole micro-batch.

The head is applied to a few hundred rows at a time. The gradient with respect to their hidden states is computed in the
forward pass, while their logits exist, so that no logits outlive their rows. The head is frozen and needs no gradient.
The rows are divided into consecutive groups, each with a sum of its own: the examples of a micro-batch, or its sources.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels import dispatch
from lora_kit.kernels.gathered import gathered
from lora_kit.kernels.limits import LOGITS, ROW_MULTIPLE
from lora_kit.kernels.segments import moved


@dataclass(frozen=True)
class Head:
    """The output layer: logits = cap * tanh(scale * (x @ W.T + bias) / cap).

    Attributes:
        layer: The linear layer, whose weight is [vocabulary, width].
        scale: 1 in most families.
        cap: None in most families: no tanh.
    """

    layer: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> Float[Tensor, "vocabulary width"]:
        """The weight; if the base is sharded, this process has all of it only inside `gathered(head.layer)`."""
        return self.layer.weight

    @property
    def bias(self) -> Float[Tensor, "vocabulary"] | None:
        """The bias, or None."""
        return cast(Tensor | None, self.layer.bias)

    def logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits of hidden states, with bias, scale and cap."""
        return self.capped(self.before_cap(hidden))

    def before_cap(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits; with a cap, their tanh: tanh(logits / cap), to be multiplied by the cap."""
        rows = hidden.flatten(0, -2)
        logits = dispatch.backend_of(rows).linear([(rows, self.weight, True)], self.bias)
        logits = logits.view(*hidden.shape[:-1], len(self.weight))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap)

    def capped(self, before: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows vocabulary"]:
        """Return the logits, given the result of `before_cap`."""
        return before if self.cap is None else before * self.cap

    def backward(self, grad_logits: Float[Tensor, "rows vocabulary"], before: Tensor) -> Float[Tensor, "rows width"]:
        """Return the gradient of the hidden states; `grad_logits` is overwritten."""
        if self.cap is not None:
            grad_logits = torch.ops.aten.tanh_backward(grad_logits, before)
        grad_logits = grad_logits.mul_(self.scale) if self.scale != 1.0 else grad_logits
        return dispatch.backend_of(grad_logits).linear([(grad_logits, self.weight, False)], None)


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, labels: Tensor, sizes: Sequence[int], to_gradient: bool
    ) -> Tensor:
        totals, grad_hidden = torch.zeros(len(sizes), device=hidden.device), torch.empty_like(hidden)
        rows = max(ROW_MULTIPLE, LOGITS[hidden.device.type] // len(head.weight) // ROW_MULTIPLE * ROW_MULTIPLE)
        with gathered(head.layer):
            for begin in range(0, len(hidden), rows):
                chunk = slice(begin, begin + rows)
                label = labels[chunk]
                count = len(label)
                before = head.before_cap(_padded(hidden[chunk]))
                logits = head.capped(before)
                backend = dispatch.backend_of(logits)
                for group, part in _parts(sizes, begin, count):
                    totals[group] -= backend.summed_log_probs(logits[part], label[part], to_gradient=to_gradient)
                if to_gradient:
                    logits[count:] = 0
                    grad_hidden[chunk] = head.backward(logits, before)[:count]
                del before, logits  # frees their memory before the next chunk needs it
        ctx.save_for_backward(grad_hidden)
        ctx.sizes = sizes
        return totals

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        factors, sizes = gradient.to(grad_hidden.dtype), moved(np.array(ctx.sizes, np.int64), gradient.device)
        of_rows = factors.repeat_interleave(sizes, output_size=len(grad_hidden))
        return grad_hidden * of_rows[:, None], None, None, None, None


def _parts(sizes: Sequence[int], begin: int, count: int) -> Iterator[tuple[int, slice]]:
    """Yield each group with rows in [begin, begin + count), and which of these rows are the group's."""
    start = 0
    for group, size in enumerate(sizes):
        first, last = max(start, begin), min(start + size, begin + count)
        if first < last:
            yield group, slice(first - begin, last - begin)
        start += size


def _padded(rows: Float[Tensor, "rows width"]) -> Float[Tensor, "padded width"]:
    """On a CPU, append rows of zeros up to a multiple of ROW_MULTIPLE; on a GPU, return the rows as they are."""
    missing = -len(rows) % ROW_MULTIPLE
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing and not rows.is_cuda else rows


def summed_cross_entropy(
    hidden: Float[Tensor, "rows width"], head: Head, labels: Int64[Tensor, "rows"], sizes: Sequence[int]
) -> Float[Tensor, "sums"]:
    """Return the cross-entropy (nats) of each group of rows, summed in fp32.

    Args:
        hidden: The hidden states.
        head: The output layer.
        labels: Token ids, none of them IGNORE.
        sizes: The number of rows of each group, in the order of the rows; they add up to all rows.
    """
    to_gradient = torch.is_grad_enabled() and hidden.requires_grad
    totals: Tensor = _CrossEntropy.apply(hidden, head, labels, sizes, to_gradient)
    return totals
