"""AdamW on flat state, and the learning rate as a function of the examples seen.

Neither has a counter, because the step is an argument of both. So a resume restores only the two moments.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from lora_kit.recipe.schema import Optim

Flat = Float32[Tensor, "parameters"]


def learning_rate(optim: Optim, examples_seen: int, total: int) -> float:
    """Return the learning rate of a step that begins after `examples_seen` of `total` examples.

    It rises linearly over the first `optim.warmup` of the run, from a value above zero, and then follows the schedule;
    linear and cosine end at zero. Progress is counted in examples, so that another batch size keeps the curve.

    Args:
        optim: The learning rate, the warm-up (a fraction of the run) and the schedule.
        examples_seen: Examples that earlier steps have trained on.
        total: Examples of the whole run, counting each epoch.
    """
    warmup = optim.warmup * total
    if examples_seen < warmup:
        return optim.learning_rate * (examples_seen + 1) / (warmup + 1)
    progress = (examples_seen - warmup) / max(1.0, total - warmup)
    return optim.learning_rate * _decay(optim.schedule, min(1.0, progress))


def _decay(schedule: Literal["constant", "linear", "cosine"], progress: float) -> float:
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def clip(gradient: Flat, norm: Float32[Tensor, ""], max_norm: float) -> None:
    """Scale the gradient in place so that its norm is at most `max_norm`; the host does not wait for the norm."""
    gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def adamw(
    weights: Flat,
    gradient: Flat,
    moments: tuple[Flat, Flat],
    *,
    step: int,
    learning_rate: float,
    optim: Optim,
    taken: Bool[Tensor, ""],
) -> None:
    """Update weights and moments in place by one step of AdamW, unless the step is skipped.

    Args:
        weights: The fp32 master weights.
        gradient: The gradient of the weights; not changed.
        moments: The running averages of the gradient and of its square.
        step: The step's number from 0; the bias correction uses step + 1.
        learning_rate: The learning rate of this step.
        optim: Betas and weight decay.
        taken: If false, weights and moments stay, even if the gradient holds NaN; the host does not wait for the value.

    Source: Loshchilov and Hutter 2019, algorithm 2, with epsilon 1e-8 as in torch.
    """
    beta1, beta2 = optim.betas
    mean, square = moments
    _write_if(mean, mean.lerp(gradient, 1 - beta1), taken)
    _write_if(square, (square * beta2).addcmul_(gradient, gradient, value=1 - beta2), taken)
    denominator = (square.sqrt() / math.sqrt(1 - beta2 ** (step + 1))).add_(1e-8)
    decayed = weights * (1 - learning_rate * optim.weight_decay)
    _write_if(weights, decayed.addcdiv_(mean, denominator, value=-learning_rate / (1 - beta1 ** (step + 1))), taken)


def _write_if(buffer: Flat, new: Flat, taken: Bool[Tensor, ""]) -> None:
    torch.where(taken, new, buffer, out=buffer)
