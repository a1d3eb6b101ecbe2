"""Generate the documentation of recipes from the schema: docs/recipes.md and docs/recipe.schema.json.

python -m lora_kit.recipe.reference      writes both files
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_kit.recipe.load import SECTIONS
from lora_kit.recipe.schema import Recipe, Source, TrainSource


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, which editors use for completion and checks."""
    schema = Recipe.model_json_schema()
    for section in schema["$defs"].values():
        for described in (section, *section["properties"].values()):
            described["description"] = " ".join(described["description"].split())
    return schema


def reference() -> str:
    """Return the content of docs/recipes.md: every field with its type, default and description."""
    schema = json_schema()
    lines = [
        f"# Recipes\n\n{schema['description']}\n",
        "Generated from lora_kit/recipe/schema.py by `python -m lora_kit.recipe.reference`.\n",
    ]
    for name, kinds in SECTIONS.items():
        for section in kinds:
            definition = schema["$defs"][section.__name__]
            kind = definition["properties"]["kind"]["const"] if section is not kinds[0] else None
            lines += _table(f"### {name} of the kind {kind}" if kind else f"## {name}", definition)
        if name == "data":
            lines += _table("### a source of `data.train`", schema["$defs"][TrainSource.__name__])
            lines += _table("### a source of `data.validation`", schema["$defs"][Source.__name__])
    return "\n".join(lines)


def _table(title: str, definition: Mapping[str, Any]) -> list[str]:
    """Return the lines of a section: its title, its description and its fields."""
    lines = [f"{title}\n\n{definition['description']}\n", "| field | type | default | meaning |\n|---|---|---|---|"]
    for field, described in definition["properties"].items():
        default = f"`{json.dumps(described['default'])}`" if "default" in described else "required"
        lines.append(f"| `{field}` | {_type_name(described)} | {default} | {described['description']} |")
    return [*lines, ""]


def _type_name(schema: Mapping[str, Any]) -> str:
    """Return a field's type and bounds in words, from its JSON Schema."""
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type_name(choice) for choice in choices)
    if "$ref" in schema:
        return "source"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join(
        [schema["type"].replace("array", "list").replace("object", "mapping"), " and ".join(limits)]
    ).strip()


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs"
    (docs / "recipes.md").write_text(reference())
    (docs / "recipe.schema.json").write_text(json.dumps(json_schema(), indent=2) + "\n")
