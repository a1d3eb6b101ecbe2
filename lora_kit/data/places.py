"""Name the file and line of an example."""

from collections.abc import Callable
from functools import cache

from lora_kit.data.counts import VALIDATION
from lora_kit.data.tokens import Prepared, open_data
from lora_kit.errors import LoraKitError
from lora_kit.recipe.schema import Recipe

Where = Callable[[str, int], str]
"""Returns the file and line of an example, given its part (`training` or `validation`) and its index."""


def places(recipe: Recipe, data: Prepared) -> Where:
    """Return a function that names examples. It opens the data when it is first called."""
    sizes = {part: [source.examples for source in sources] for part, sources in data.counts.parts.items()}
    opened = cache(lambda: open_data(recipe.data, recipe.folder, recipe.train.seed, recipe.objective.kind))

    def where(part: str, index: int) -> str:
        held_out = part == VALIDATION
        try:
            return opened().where(index, data.kept[held_out], sizes[part], validation=held_out)
        except LoraKitError:  # e.g. no network, and the tokens came from the cache
            return f"{part} example {index}"

    return where
