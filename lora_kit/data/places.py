"""Name the file and line of an example."""

from collections.abc import Callable
from functools import cache

from lora_kit.data.tokens import Prepared, open_data
from lora_kit.errors import LoraKitError
from lora_kit.recipe.schema import Recipe

TRAINING, VALIDATION = "training", "validation"

Where = Callable[[str, int], str]
"""Returns the file and line of an example, given its part (`training` or `validation`) and its index."""


def places(recipe: Recipe, data: Prepared) -> Where:
    """Return a function that names examples. It opens the data when it is first called."""
    parts = {TRAINING: data.counts.train, VALIDATION: data.counts.validation}
    opened = cache(lambda: open_data(recipe.data, recipe.folder, recipe.train.seed))

    def where(part: str, index: int) -> str:
        counts = parts[part]
        assert counts is not None
        if counts.dropped or counts.emptied:
            return f"{part} example {index}"
        try:
            return opened()[part == VALIDATION].where(index)
        except LoraKitError:  # e.g. the network is gone, and the tokens were in the cache
            return f"{part} example {index}"

    return where
