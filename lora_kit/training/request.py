"""The arguments of `loop.train` as text, for the processes that the keeper starts to call it.

They carry the recipe as it was read at the start, so that a restart does not depend on a file that was edited since.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from lora_kit.recipe.schema import Recipe


@dataclass(frozen=True)
class TrainRequest:
    """The arguments of `loop.train`, under their names."""

    recipe: Recipe
    out: Path
    accept: tuple[str, ...]
    start_from: Path | None
    profile: bool

    def to_json(self) -> str:
        """Return the request as JSON; `folder` is where the recipe's relative paths start."""
        content = {
            "recipe": self.recipe.model_dump(mode="json"),
            "folder": str(self.recipe.folder),
            "out": str(self.out),
            "accept": self.accept,
            "start_from": self.start_from and str(self.start_from),
            "profile": self.profile,
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> "TrainRequest":
        """Return what `to_json` wrote."""
        content = json.loads(text)
        recipe = Recipe.model_validate(content["recipe"])
        recipe._folder = Path(content["folder"])
        start_from = content["start_from"] and Path(content["start_from"])
        return cls(recipe, Path(content["out"]), tuple(content["accept"]), start_from, content["profile"])
