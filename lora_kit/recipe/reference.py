"""Generate the documentation of recipes from the schema: docs/recipes.md and docs/recipe.schema.json.

python -m lora_kit.recipe.reference      writes both files
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_kit.recipe.load import SECTIONS
from lora_kit.recipe.schema import Recipe


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, which editors use for completion and checks."""
    schema = Recipe.model_json_schema()
    for section in schema["$defs"].values():
        for described in (section, *section["properties"].values()):
            described["description"] = _one_line(described["description"])
    return schema


def reference() -> str:
    """Return the content of docs/recipes.md: every field with its type, default and description."""
    lines, definitions = [HEADER], json_schema()["$defs"]
    for name, section in SECTIONS.items():
        lines += [
            f"## {name}",
            "",
            _one_line(section.__doc__),
            "",
            "| field | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for field, info in section.model_fields.items():
            schema = definitions[section.__name__]["properties"][field]
            default = "required" if info.is_required() else f"`{json.dumps(info.default)}`"
            lines.append(f"| `{field}` | {_type_name(schema)} | {default} | {schema['description']} |")
        lines.append("")
    return "\n".join(lines)


def _one_line(text: str | None) -> str:
    return " ".join(str(text).split())


def _type_name(schema: Mapping[str, Any]) -> str:
    """Return a field's type and bounds in words, from its JSON Schema."""
    if "anyOf" in schema:
        return " or ".join(_type_name(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join(
        [schema["type"].replace("array", "list").replace("object", "mapping"), " and ".join(limits)]
    ).strip()


HEADER = """# Recipes

A recipe is a YAML 1.2 file (so `1e-4` is a number and `no` is a string). An unknown key, a repeated key or a value of
the wrong type is an error; all errors are reported at once. `--set SECTION.FIELD=VALUE` overrides a field.

Relative paths start in the recipe's folder. `builtin:NAME` names a file or model that ships with lora_kit. A Hub
dataset is written `name:config@revision[split]`; config, revision and split are optional.

For completion and checks in an editor, put this on the first line of a recipe:
`# yaml-language-server: $schema=../docs/recipe.schema.json`

Generated from lora_kit/recipe/schema.py by `python -m lora_kit.recipe.reference`.
"""


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs"
    (docs / "recipes.md").write_text(reference())
    (docs / "recipe.schema.json").write_text(json.dumps(json_schema(), indent=2) + "\n")
