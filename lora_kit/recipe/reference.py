"""The reference of a recipe: docs/recipes.md and the JSON Schema, both made from the schema.

python -m lora_kit.recipe.reference      writes both anew
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_kit.recipe.load import SECTIONS
from lora_kit.recipe.schema import Recipe


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def reference() -> str:
    """Return docs/recipes.md: every field with its type, default and meaning."""
    lines = [REFERENCE_HEAD]
    for name, kind in SECTIONS.items():
        lines += [
            f"## {name}",
            "",
            f"{kind.__doc__}",
            "",
            "| field | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for field, info in kind.model_fields.items():
            shape = Recipe.model_json_schema()["$defs"][kind.__name__]["properties"][field]
            default = "required" if info.is_required() else f"`{json.dumps(info.default)}`"
            meaning = " ".join(str(info.description).split())
            lines.append(f"| `{field}` | {_type_name(shape)} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _type_name(shape: Mapping[str, Any]) -> str:
    if "anyOf" in shape:
        return " or ".join(_type_name(one) for one in shape["anyOf"])
    if "enum" in shape:
        return ", ".join(f"`{one}`" for one in shape["enum"])
    if "const" in shape:
        return f"`{shape['const']}`"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {shape[key]:g}" for key, sign in bounds.items() if key in shape]
    return " ".join([shape["type"].replace("array", "list").replace("object", "mapping"), *limits])


REFERENCE_HEAD = """# Recipes

A recipe is one YAML 1.2 file (so `1e-4` is a number and `no` is a string). An unknown key, a wrong type or a key that
stands twice is an error, and all errors are told at once. `--set SECTION.FIELD=VALUE` overrides a field. Relative paths
start from the recipe's folder; `builtin:NAME` is what ships with lora_kit; a Hub dataset is
`name:config@revision[split]`.

For completion and checks in an editor, put this on the first line of a recipe:
`# yaml-language-server: $schema=../docs/recipe.schema.json`

Generated from lora_kit/recipe/schema.py by `python -m lora_kit.recipe.reference`.
"""


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs"
    (docs / "recipes.md").write_text(reference())
    (docs / "recipe.schema.json").write_text(json.dumps(json_schema(), indent=2) + "\n")
