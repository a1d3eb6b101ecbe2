"""KTO: an objective over answers that are each labelled as desirable or undesirable."""

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor, nn

from lora_kit.data.packing import MicroBatch, collate
from lora_kit.data.tokens import Tokens
from lora_kit.kernels.segments import moved
from lora_kit.recipe.schema import KtoObjective
from lora_kit.training.objectives.log_probs import log_probs_of_segments, mismatched, sums_by_source
from lora_kit.training.objectives.objective import Computing, LossSum, Objective, metric_of
from lora_kit.training.objectives.preference_losses import kto
from lora_kit.training.processes import tree

MISMATCHED = 2  # the column of the reference with the log-probability of an example's mismatched answer
DESIRABLE = "desirable"


class Kto(Objective):
    """The mean loss of the answers; the weight is their number.

    The loss compares each answer with a divergence between model and reference that is a mean over all examples of the
    step. It is estimated before the first backward pass of the step, without gradients, from answers that belong to
    other prompts. So it depends neither on packing nor on the number of processes.

    Args:
        settings: The recipe's section.
        limit: The recipe's `data.sequence_length`.
        sources: The names of the sources of a mixture. The loss of each is a metric of its own.
    """

    unit, columns = "answers", 3

    def __init__(self, settings: KtoObjective, limit: int, sources: Sequence[str] = ()) -> None:
        self._settings, self._limit, self._sources = settings, limit, len(sources)
        self._kl: Tensor | None = None
        self.metrics = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", DESIRABLE, "kl")
        self.metrics += tuple(map(metric_of, sources))

    def weight(self, tokens: Tokens, examples: Sequence[int]) -> int:
        """Return the number of answers: a pair has two."""
        return int((tokens.side_lengths(examples) > 0).sum())

    @torch.no_grad()
    def for_examples(self, tokens: Tokens, examples: Sequence[int], computing: Computing) -> "Kto":
        """Return the objective with the divergence that is estimated over these examples."""
        assert tokens.reference is not None
        others, was_training = mismatched(tokens, examples, self._limit), computing.model.training
        computing.model.eval()
        parts, groups = [], computing.groups(others.places(slice(None), padded=computing.padded))

        def log_probs_of(members: Sequence[int]) -> Tensor:
            batch = collate(others, members, padded=computing.padded)
            return log_probs_of_segments(computing.model, batch, computing.device)[0]

        for members in computing.own(groups):
            log_probs = log_probs_of(members)
            reference = tokens.reference[[examples[member] for member in members], MISMATCHED]
            parts.append((log_probs - moved(reference, computing.device)).sum()[None])
        for members in computing.for_nothing(groups):
            log_probs_of(members)
        computing.model.train(was_training)
        total = tree(parts) if parts else torch.zeros(1, device=computing.device)
        computing.processes.tree_sum(total, contributors=min(computing.processes.count, len(groups)))
        result = copy(self)
        result._kl = (total[0] / len(examples)).clamp(min=0)
        return result

    def loss(self, model: nn.Module, batch: MicroBatch, device: torch.device) -> LossSum:
        """Return the summed loss of the answers, and the sums of their metrics."""
        assert batch.sides is not None and batch.reference is not None and self._kl is not None
        log_probs, _ = log_probs_of_segments(model, batch, device)
        present = batch.sides >= 0
        places, reference = moved(batch.sides[present], device), moved(batch.reference[:, :2][present], device)
        desirable = moved(np.broadcast_to([True, False], present.shape)[present], device)
        losses, rewards = kto(log_probs[places] - reference, desirable, self._kl, self._settings)
        gains = rewards - self._settings.beta * self._kl
        accurate = torch.where(desirable, gains > 0, gains < 0) + 0.5 * (gains == 0)
        of_sides = [torch.where(side, rewards, 0).sum() for side in (desirable, ~desirable)]
        sums = [*of_sides, accurate.sum(), desirable.sum().float()]
        owners = np.repeat(batch.sources, present.sum(axis=1)).tolist() if batch.sources else ()
        sums += [self._kl * len(losses), *sums_by_source(losses, owners, self._sources)]
        return LossSum(losses.sum(), len(losses), tuple(sums))

    def figures(self, means: Mapping[str, float]) -> dict[str, float | None]:
        """Return the metrics, with the mean reward of the desirable and of the undesirable answers."""
        found: dict[str, float | None] = {name: mean for name, mean in means.items() if name != DESIRABLE}
        share = means[DESIRABLE]
        for name, part in (("rewards/chosen", share), ("rewards/rejected", 1 - share)):
            found[name] = means[name] / part if part > 0 else None
        chosen, rejected = found["rewards/chosen"], found["rewards/rejected"]
        found["rewards/margins"] = None if chosen is None or rejected is None else chosen - rejected
        return found
