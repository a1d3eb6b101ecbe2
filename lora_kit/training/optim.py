"""AdamW on flat state, and the learning rate as a function of the examples seen.

Neither has a counter, because the step is an argument of both. So a resume restores only the two moments.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from lora_kit.model.state import Kind
from lora_kit.recipe.schema import Optim
from lora_kit.runs.layout import BLOCK

CHUNK = 1 << 22  # values of the 8-bit moments that are dequantised at once
Flat = Float32[Tensor, "parameters"]


def learning_rate(optim: Optim, examples_seen: int, total: int) -> float:
    """Return the learning rate of a step that begins after `examples_seen` of `total` examples.

    It rises linearly over the first `optim.warmup` of the run, from a value above zero, and then follows the schedule;
    all but constant end at zero. Progress is counted in examples, so that another batch size keeps the curve.

    Args:
        optim: The learning rate, the warm-up (a fraction of the run) and the schedule.
        examples_seen: Examples that earlier steps have trained on.
        total: Examples of the whole run, counting each epoch.
    """
    warmup = optim.warmup * total
    if examples_seen < warmup:
        return optim.learning_rate * (examples_seen + 1) / (warmup + 1)
    if optim.schedule == "wsd":
        return optim.learning_rate * min(1.0, max(0.0, total - examples_seen) / (optim.decay * total))
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
    moments: Sequence[Tensor],
    *,
    step: int,
    learning_rate: float,
    optim: Optim,
    taken: Bool[Tensor, ""],
    ranges: Mapping[Kind, slice],
) -> None:
    """Update weights and moments in place by one step of AdamW, unless the step is skipped.

    Args:
        weights: The fp32 master weights.
        gradient: The gradient of the weights; not changed.
        moments: The running averages of the gradient and of its square.
        step: The step's number from 0; the bias correction uses step + 1.
        learning_rate: The learning rate of this step; B has `optim.b_ratio` times this rate.
        optim: Betas, weight decay and the ratio of the learning rates.
        taken: If false, weights and moments stay, even if the gradient holds NaN; the host does not wait for the value.
        ranges: The range of each kind of weights. Magnitudes do not decay: without them there would be no base.

    Source: Loshchilov and Hutter 2019, algorithm 2, with epsilon 1e-8 as in torch. The ratio: Hayou et al. 2024
    (LoRA+), equation 4.
    """
    beta1, beta2 = optim.betas
    mean, square = moments
    _write_if(mean, mean.lerp(gradient, 1 - beta1), taken)
    _write_if(square, (square * beta2).addcmul_(gradient, gradient, value=1 - beta2), taken)
    denominator = (square.sqrt() / math.sqrt(1 - beta2 ** (step + 1))).add_(1e-8)
    for kind, part in ranges.items():
        rate = learning_rate * (optim.b_ratio if kind == Kind.B else 1.0)
        decayed = weights[part] * (1 - rate * (optim.weight_decay if kind != Kind.MAGNITUDE else 0.0))
        updated = decayed.addcdiv_(mean[part], denominator[part], value=-rate / (1 - beta1 ** (step + 1)))
        _write_if(weights[part], updated, taken)


@torch.no_grad()
def adamw_8bit(
    weights: Flat,
    gradient: Flat,
    moments: Sequence[Tensor],
    *,
    step: int,
    learning_rate: float,
    optim: Optim,
    taken: Bool[Tensor, ""],
    ranges: Mapping[Kind, slice],
) -> None:
    """Update weights and moments in place by one step of AdamW on moments in 8 bits, unless the step is skipped.

    The moments are dequantised, updated by `adamw` and quantised again, `CHUNK` values at a time.

    Args:
        weights: The fp32 master weights.
        gradient: The gradient of the weights; not changed.
        moments: The scales of both moments (a value for each `BLOCK`), then their codes.
        step: As for `adamw`; so are the other arguments.
        learning_rate: The learning rate of this step.
        optim: Betas, weight decay and the ratio of the learning rates.
        taken: If false, weights and moments stay.
        ranges: The range of each kind of weights.

    Source: Dettmers et al. 2022, arXiv 2110.02861; block-wise dynamic quantisation as in bitsandbytes.
    """
    scales, codes = moments[:2], moments[2:]
    for begin in range(0, len(weights), CHUNK):
        end = min(begin + CHUNK, len(weights))
        blocks = slice(begin // BLOCK, -(-end // BLOCK))
        parts = [
            (scale[blocks], code.view(-1, BLOCK)[blocks], code_map(signed=signed).to(weights.device))
            for scale, code, signed in zip(scales, codes, (True, False), strict=True)
        ]
        dense = [table[code.int()].mul_(scale[:, None]) for scale, code, table in parts]
        adamw(
            weights[begin:end],
            gradient[begin:end],
            (dense[0].view(-1)[: end - begin], dense[1].view(-1)[: end - begin]),
            step=step,
            learning_rate=learning_rate,
            optim=optim,
            taken=taken,
            ranges={kind: _clipped(part, begin, end) for kind, part in ranges.items()},
        )
        for values, (scale, code, table) in zip(dense, parts, strict=True):
            new_scale, new_code = quantise(values, table)
            torch.where(taken, new_scale, scale, out=scale)
            torch.where(taken, new_code, code, out=code)


def _clipped(part: slice, begin: int, end: int) -> slice:
    """Return the part of a range inside of another range, counted from its begin."""
    return slice(min(max(part.start, begin), end) - begin, min(max(part.stop, begin), end) - begin)


def quantise(
    values: Float32[Tensor, "rows width"], table: Float32[Tensor, "count"]
) -> tuple[Float32[Tensor, "rows"], UInt8[Tensor, "rows width"]]:
    """Return the scale of each block, its largest absolute value, and for each value the code of the nearest number."""
    scale = values.abs().amax(1)
    normal = values / torch.where(scale > 0, scale, 1.0)[:, None]
    middles = (table[1:] + table[:-1]) / 2
    return scale, torch.bucketize(normal, middles).to(torch.uint8)


@cache
def code_map(*, signed: bool) -> Float32[Tensor, "count"]:
    """Return the 256 numbers in [-1, 1], or [0, 1], that the codes stand for, ascending.

    For every power of ten from 1e-6 to 1, the numbers are the middles of equal parts of [0.1, 1], twice as many for
    each larger power; 0 and 1 are added.

    Source: `create_dynamic_map` in bitsandbytes.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        parts = 2 ** (exponent if signed else exponent + 1)
        edges = torch.linspace(0.1, 1, parts + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        numbers += [*middles.tolist(), *((-middles).tolist() if signed else [])]
    return torch.tensor(sorted(numbers))


def _write_if(buffer: Flat, new: Flat, taken: Bool[Tensor, ""]) -> None:
    torch.where(taken, new, buffer, out=buffer)
