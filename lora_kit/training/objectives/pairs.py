"""DPO, ORPO and SimPO: objectives over pairs of a chosen and a rejected answer. A pair is never split."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lora_kit.data.packing import MicroBatch
from lora_kit.data.tokens import Tokens
from lora_kit.kernels.segments import moved
from lora_kit.recipe.schema import DpoObjective, OrpoObjective, SimpoObjective
from lora_kit.training.objectives.log_probs import log_probs_of_segments, sums_by_source
from lora_kit.training.objectives.objective import LossSum, Objective, metric_of
from lora_kit.training.objectives.preference_losses import Pairs, dpo, orpo, simpo

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class PairObjective(Objective):
    """The mean loss of the pairs; the weight is their number.

    Args:
        settings: The recipe's section.
        sources: The names of the sources of a mixture. The loss of each is a metric of its own.
    """

    unit = "pairs"

    def __init__(self, settings: DpoObjective | OrpoObjective | SimpoObjective, sources: Sequence[str] = ()) -> None:
        self._sources = len(sources)
        self.metrics = (*REWARDS, *map(metric_of, sources))
        if isinstance(settings, DpoObjective):
            self.columns, self._losses = 2, partial(dpo, settings=settings)
        elif isinstance(settings, OrpoObjective):
            self._losses = partial(orpo, settings=settings)
        else:
            self._losses = partial(simpo, settings=settings)

    def weight(self, tokens: Tokens, examples: Sequence[int]) -> int:
        """Return the number of pairs."""
        return len(examples)

    def loss(self, model: nn.Module, batch: MicroBatch, device: torch.device) -> LossSum:
        """Return the summed loss of the pairs, and the sums of their rewards, margins and accuracies."""
        losses, chosen, rejected = self._losses(pairs_of(model, batch, device))
        accurate = (chosen > rejected) + 0.5 * (chosen == rejected)
        sums = [each.sum() for each in (chosen, rejected, chosen - rejected, accurate)]
        sums += sums_by_source(losses, batch.sources, self._sources)
        return LossSum(losses.sum(), len(losses), tuple(sums))


def pairs_of(model: nn.Module, batch: MicroBatch, device: torch.device) -> Pairs:
    """Return the log-probabilities of the pairs of a micro-batch; those of the reference are 0 if there is none."""
    assert batch.sides is not None
    log_probs, counts = log_probs_of_segments(model, batch, device)
    sides: list[Tensor] = [values[moved(place, device)] for values in (log_probs, counts) for place in batch.sides.T]
    if batch.reference is None:
        return Pairs(*sides, *(torch.zeros_like(side) for side in sides[:2]))
    reference = moved(batch.reference.T.copy(), device)
    return Pairs(*sides, *reference)
