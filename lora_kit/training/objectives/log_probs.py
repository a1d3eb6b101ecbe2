"""The summed log-probabilities of answers, which all preference objectives are functions of."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_kit.data.packing import MicroBatch
from lora_kit.data.tokens import Tokens
from lora_kit.kernels.segments import moved
from lora_kit.training.objectives.cross_entropy import cross_entropy_of_groups


def log_probs_of_segments(
    model: nn.Module, batch: MicroBatch, device: torch.device
) -> tuple[Float[Tensor, "count"], Float[Tensor, "count"]]:
    """Return the summed log-probability of the trained tokens of each sequence of a micro-batch, and their number."""
    groups, labels = zip(*batch.sequences(), strict=True)
    counts = moved(np.array([len(group) for group in groups], np.float32), device)
    return -cross_entropy_of_groups(model, batch, device, groups, np.concatenate(labels)), counts


def sums_by_source(values: Float[Tensor, "count"], owners: Sequence[int], sources: int) -> list[Tensor]:
    """Return the detached sum of the values of each source; nothing if the owners are not known."""
    if not owners:
        return []
    places = [moved(np.flatnonzero(np.array(owners) == source), values.device) for source in range(sources)]
    return [values.detach()[place].sum() for place in places]


def mismatched(tokens: Tokens, examples: Sequence[int], limit: int) -> Tokens:
    """Return the prompt of each example with the answer of another example, from which KTO estimates a divergence.

    The other example is half of all examples further on, so that an example and the next one may share a prompt. It
    does not depend on the step.

    Args:
        tokens: All examples; of a pair, the chosen side counts.
        examples: The indices of examples.
        limit: The most tokens of a result.
    """
    made = []
    for index in examples:
        ids, trained = tokens.sides(index)[0]
        other_ids, other_trained = tokens.sides((index + len(tokens) // 2) % len(tokens))[0]
        first, other = int(trained.argmax()), int(other_trained.argmax())
        joined = zip((ids, trained & False), (other_ids, other_trained), strict=True)
        new_ids, new_trained = (np.concatenate([own[:first], theirs[other:]])[:limit] for own, theirs in joined)
        made.append((new_ids, new_trained))
    return Tokens.of(made)
