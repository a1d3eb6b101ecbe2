"""The arguments of `loop.train` as text, for the processes that the keeper starts to call it.

They carry the recipe as it was read at the start, so that a restart does not depend on a file that was edited since.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

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
        """Return the request as JSON, with the folder to which the recipe's relative paths refer."""
        arguments = _ARGUMENTS.dump_python(self, mode="json")
        return json.dumps({"arguments": arguments, "folder": str(self.recipe.folder)})

    @staticmethod
    def from_json(text: str) -> "TrainRequest":
        """Return what `to_json` wrote."""
        content = json.loads(text)
        request = _ARGUMENTS.validate_python(content["arguments"])
        request.recipe._folder = Path(content["folder"])
        return request


_ARGUMENTS = TypeAdapter(TrainRequest)
