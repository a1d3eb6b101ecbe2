"""The losses of preference tuning as pure functions of summed log-probabilities; docs/objectives.md has the equations.

Rewards are what the losses compare, detached: the implied rewards of DPO and KTO, the scaled mean log-probabilities of
ORPO and SimPO.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_kit.recipe.schema import DpoObjective, KtoObjective, OrpoObjective, SimpoObjective


class Pairs(NamedTuple):
    """Pairs of answers, fp32 [pairs] each.

    Attributes:
        chosen: The summed log-probability of the tokens of each chosen answer.
        rejected: The same of each rejected answer.
        chosen_tokens: The number of tokens of each chosen answer.
        rejected_tokens: The same of each rejected answer.
        reference_chosen: The summed log-probability that the reference gives to each chosen answer.
        reference_rejected: The same of each rejected answer.
    """

    chosen: Float[Tensor, "count"]
    rejected: Float[Tensor, "count"]
    chosen_tokens: Float[Tensor, "count"]
    rejected_tokens: Float[Tensor, "count"]
    reference_chosen: Float[Tensor, "count"]
    reference_rejected: Float[Tensor, "count"]


class PairLosses(NamedTuple):
    """The loss of each pair, and the rewards of its sides, fp32 [pairs] each."""

    losses: Float[Tensor, "count"]
    chosen_rewards: Float[Tensor, "count"]
    rejected_rewards: Float[Tensor, "count"]


def dpo(pairs: Pairs, settings: DpoObjective) -> PairLosses:
    """Return the loss of direct preference optimisation.

    Source: Rafailov et al. 2023 (arXiv 2305.18290); hinge: Zhao et al. 2023 (2305.10425); ipo: Azar et al. 2024
    (2310.12036), length-normalised as its authors do; smoothing: Mitchell 2023 (conservative DPO).
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    chosen, rejected = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
    if settings.length_normalised or settings.loss == "ipo":
        margin = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
    else:
        margin = chosen - rejected
    if settings.loss == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif settings.loss == "hinge":
        losses = torch.relu(1 - beta * margin)
    else:
        losses = -(1 - smoothing) * logsigmoid(beta * margin) - smoothing * logsigmoid(-beta * margin)
    if settings.sft_weight:
        losses = losses - settings.sft_weight * pairs.chosen / pairs.chosen_tokens
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def orpo(pairs: Pairs, settings: OrpoObjective) -> PairLosses:
    """Return the loss of odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691)."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    losses = -chosen - settings.beta * logsigmoid(log_odds)
    return PairLosses(losses, settings.beta * chosen.detach(), settings.beta * rejected.detach())


def simpo(pairs: Pairs, settings: SimpoObjective) -> PairLosses:
    """Return the loss of simple preference optimisation (Meng et al. 2024, arXiv 2405.14734)."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    losses = -logsigmoid(settings.beta * (chosen - rejected) - settings.gamma)
    return PairLosses(losses, settings.beta * chosen.detach(), settings.beta * rejected.detach())


class AnswerLosses(NamedTuple):
    """The loss and the reward of each answer, fp32 [answers] each."""

    losses: Float[Tensor, "count"]
    rewards: Float[Tensor, "count"]


def kto(
    log_ratios: Float[Tensor, "count"], desirable: Bool[Tensor, "count"], kl: Float[Tensor, ""], settings: KtoObjective
) -> AnswerLosses:
    """Return the loss of Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306).

    Args:
        log_ratios: The summed log-probability of each answer minus that of the reference.
        desirable: Whether each answer is desirable.
        kl: The estimate of the divergence from the reference over the whole step, at least 0, without a gradient.
        settings: The recipe's section.
    """
    gains = settings.beta * (log_ratios - kl)
    gains = torch.where(desirable, gains, -gains)
    weights = torch.where(desirable, settings.desirable_weight, settings.undesirable_weight)
    return AnswerLosses(weights * (1 - torch.sigmoid(gains)), settings.beta * log_ratios.detach())


def _log1mexp(x: Float[Tensor, "count"]) -> Float[Tensor, "count"]:
    """Return log(1 - exp(x)) for x < 0; the mean log-probability of an answer that is certain counts as the next one.

    Source: Maechler 2012, Accurately Computing log(1 - exp(-|a|)).
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
