"""The objective that a recipe asks for."""

from lora_kit.recipe.schema import KtoObjective, Recipe, SftObjective
from lora_kit.training.objectives.kto import Kto
from lora_kit.training.objectives.objective import Objective
from lora_kit.training.objectives.pairs import PairObjective
from lora_kit.training.objectives.sft import Sft


def objective_of(recipe: Recipe) -> Objective:
    """Return the objective of a recipe; for a mixture it also measures the loss of each source."""
    settings, sources = recipe.objective, [*recipe.data.train_sources] if recipe.data.mixture else []
    if isinstance(settings, SftObjective):
        return Sft(sources)
    if isinstance(settings, KtoObjective):
        return Kto(settings, recipe.data.sequence_length, sources)
    return PairObjective(settings, sources)
