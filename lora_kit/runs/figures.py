"""The figures of an evaluation by name, and for each of them whether a higher value is better.

The figures of a step are in its line of metrics.jsonl, which its manifest has too. They decide which checkpoint is the
best and when a run ends early. So both are the same after a resume.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_kit.recipe.schema import LOSS, LOWER_IS_BETTER
from lora_kit.runs.manifest import StepFacts, Watch


def figures_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the figures of the evaluation in a line of metrics.jsonl, under the names of `evaluate.metric`."""
    sets = {f"{LOSS}/{name}": value for name, value in record.get("held_out_sets", {}).items()}
    return {LOSS: record.get("held_out_loss")} | sets | record.get("held_out_metrics", {})


def figure_of(facts: StepFacts, metric: str) -> float | None:
    """Return a figure of the evaluation after a step; None if it was not measured or is not finite."""
    if metric == LOSS:
        return facts.held_out_loss
    found = figures_of(json.loads(facts.line)).get(metric)
    return found if isinstance(found, float | int) and math.isfinite(found) else None


def higher_is_better(metric: str) -> bool:
    """Return whether a higher figure is better; for losses and forgetting a lower one is."""
    return metric.partition("/")[0] not in LOWER_IS_BETTER


def cost(metric: str, figure: float) -> float:
    """Return a figure such that a lower one is better."""
    return -figure if higher_is_better(metric) else figure


@dataclass(frozen=True)
class Patience:
    """When a run ends early: after `most` evaluations in a row without a gain of more than `least_gain`.

    Attributes:
        metric: The figure.
        most: The recipe's `evaluate.patience`; None never ends a run early.
        least_gain: The recipe's `evaluate.least_gain`.
    """

    metric: str
    most: int | None
    least_gain: float

    def after(self, watch: Watch | None, facts: StepFacts) -> Watch | None:
        """Return the count after the evaluation of a step, given the count before it; None without a patience.

        A count of another metric begins again. A figure that is not finite is no gain.
        """
        if self.most is None:
            return None
        if watch is None or watch.metric != self.metric:
            watch = Watch(self.metric, None, 0, 0)
        figure = figure_of(facts, self.metric)
        if figure is not None and (
            watch.best is None or cost(self.metric, figure) < cost(self.metric, watch.best) - self.least_gain
        ):
            return Watch(self.metric, figure, facts.step, 0)
        return Watch(self.metric, watch.best, watch.step, watch.waited + 1)

    def is_over(self, watch: Watch | None) -> bool:
        """Return whether a run with this count ends."""
        known = watch is not None and watch.metric == self.metric
        return self.most is not None and watch is not None and known and watch.waited >= self.most
