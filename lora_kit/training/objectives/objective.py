"""What a run minimises, as sums over examples.

A sum does not depend on how examples are packed, accumulated or dealt to processes. The loop divides once, by the
weight of the whole step, which is known from the data before the first forward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_kit.data.packing import MicroBatch, Split, pack
from lora_kit.data.tokens import Tokens
from lora_kit.kernels.gathered import is_sharded
from lora_kit.training.processes import Processes

T = TypeVar("T")


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


@dataclass(frozen=True)
class Computing:
    """What an objective needs to compute a number over all examples of a step, before the first backward pass.

    Attributes:
        model: The base with the adapter.
        micro_batch_tokens: The most tokens of a micro-batch.
        padded: Whether each segment is a row of its own.
        processes: The processes that share the work.
    """

    model: nn.Module
    micro_batch_tokens: int
    padded: bool
    processes: Processes

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the micro-batches of examples of these lengths; they do not depend on the number of processes."""
        return pack(lengths, self.micro_batch_tokens, padded=self.padded)

    def own(self, groups: Sequence[T]) -> Sequence[T]:
        """Return the micro-batches that this process computes."""
        return groups[self.processes.index :: self.processes.count]

    def for_nothing(self, groups: Sequence[T]) -> Sequence[T]:
        """Return the micro-batch that this process computes besides its own, without using the result; mostly none.

        With a sharded base every micro-batch gathers each layer, which needs every process. So a process that gets one
        micro-batch fewer than others computes the cheapest one too.
        """
        if self.processes.has_fewer(len(groups)) and is_sharded(self.model):
            return groups[-1:]
        return ()


class Objective(ABC):
    """A loss and what the loop must know about it.

    Attributes:
        metrics: The names of the metrics other than the loss, as in metrics.jsonl. None may be the name of a field of
            `StepRecord`.
        split: The function that groups the examples of a step into micro-batches.
        unit: What the weight counts, e.g. trained tokens.
        columns: How many log-probabilities of the reference an example needs: 0 for none, 2 for those of both sides, 3
            with that of its mismatched answer.
    """

    metrics: tuple[str, ...] = ()
    unit: str = "trained_tokens"
    columns: int = 0
    split: Split = staticmethod(pack)

    @abstractmethod
    def weight(self, tokens: Tokens, examples: Sequence[int]) -> int:
        """Return the weight of some examples: the sum of `LossSum.weight` over their micro-batches."""

    def for_examples(self, tokens: Tokens, examples: Sequence[int], computing: Computing) -> "Objective":
        """Return the objective for a step (or an evaluation) with these examples; it may compute numbers over them."""
        return self

    def figures(self, means: Mapping[str, float]) -> Mapping[str, float | None]:
        """Return what is logged of the metrics of a step, given their sums divided by the weight of the step."""
        return means

    @abstractmethod
    def loss(self, model: nn.Module, batch: MicroBatch, device: torch.device) -> LossSum:
        """Return the summed loss of a micro-batch."""


def metric_of(source: str) -> str:
    """Return the name of the metric that is the loss of a source of a mixture."""
    return f"loss/{source}"


def is_of_source(metric: str) -> bool:
    """Return whether a metric is the loss of a source."""
    return metric.startswith("loss/")
