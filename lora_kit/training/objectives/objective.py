"""What a run minimises, as sums over examples.

A sum does not depend on how examples are packed, accumulated or dealt to processes. The loop divides once, by the
weight of the whole step, which is known from the data before the first forward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_kit.data.packing import MicroBatch, Split
from lora_kit.data.tokens import Tokens


class LossSum(NamedTuple):
    """The loss of a micro-batch.

    Attributes:
        total: The summed loss, in nats; backward starts here.
        weight: What the sum is divided by to give a mean.
        metrics: A sum for each name in `Objective.metrics`, in that order; divided by the weight of the step.
    """

    total: Float[Tensor, ""]
    weight: int
    metrics: tuple[Float[Tensor, ""], ...]

    def divided(self, weight: int) -> "LossSum":
        """Return the loss and its metrics divided by the weight of a whole step."""
        return LossSum(self.total / weight, self.weight, tuple(metric / weight for metric in self.metrics))


class Objective(Protocol):
    """A loss and what the loop must know about it.

    Attributes:
        metrics: The names of the metrics other than the loss, as in metrics.jsonl. They differ from the fields of
            `StepRecord`.
        split: The function that groups the examples of a step into micro-batches.
    """

    metrics: tuple[str, ...]
    split: Split

    def weight(self, tokens: Tokens, examples: Sequence[int]) -> int:
        """Return the weight of some examples: the sum of `LossSum.weight` over their micro-batches."""

    def loss(self, model: nn.Module, batch: MicroBatch, device: torch.device) -> LossSum:
        """Return the summed loss of a micro-batch."""
