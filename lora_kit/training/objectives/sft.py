"""Supervised fine-tuning: the cross-entropy of the trained tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lora_kit.data.packing import IGNORE, MicroBatch
from lora_kit.data.tokens import Tokens
from lora_kit.training.objectives.cross_entropy import cross_entropy_of_groups
from lora_kit.training.objectives.objective import LossSum, Objective, metric_of


class Sft(Objective):
    """Cross-entropy of every trained token; the weight is their number, and micro-batches may combine any examples.

    Args:
        sources: The names of the sources of a mixture. The loss of each is a metric of its own.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self._sources = len(sources)
        if sources:
            self.metrics = tuple(map(metric_of, sources))

    def weight(self, tokens: Tokens, examples: Sequence[int]) -> int:
        """Return the number of trained tokens of some examples."""
        return sum(tokens.weight(example) for example in examples)

    def loss(self, model: nn.Module, batch: MicroBatch, device: torch.device) -> LossSum:
        """Return the summed cross-entropy; with the part `loss`, the head is applied only at trained positions."""
        trained = np.flatnonzero(batch.labels != IGNORE)
        groups = batch.by_source(trained, self._sources) if batch.sources else [trained]
        sums = cross_entropy_of_groups(model, batch, device, groups)
        return LossSum(sums.sum(), len(trained), tuple(sums.detach()) if batch.sources else ())
