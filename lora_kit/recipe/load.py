"""Read recipes: YAML to a checked `Recipe`, with all that is wrong told at once.

The schema is in schema.py; this module finds the file and line of every problem, applies overrides, resolves paths, and
compares recipes.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lora_kit.errors import RecipeError
from lora_kit.recipe.schema import (
    Recipe,
    Section,
)

ASSETS = Path(__file__).parents[1] / "assets"
BUILTIN = "builtin:"
PATHS = (("base", "repo"), ("data", "train"), ("data", "validation"), ("data", "template"))  # fields that may be one
SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in Recipe.model_fields.items()}  # type: ignore[misc]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: A YAML 1.2 file.
        overrides: Each `section.field=value`, the value in YAML.

    Raises:
        RecipeError: Everything that is wrong, a line each: file:line, key, what was found, what was expected.
    """
    tree, problems = _read(Path(path)), []
    content = _plain(tree)
    origins: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or key.count(".") != 1:
            problems.append(f"--set {override}: expected SECTION.FIELD=VALUE, e.g. optim.learning_rate=1e-4")
            continue
        section, field = key.split(".")
        origins[key] = f"--set {override}"
        if section not in content:
            origins[section] = origins[key]
        try:
            _put(content, section, field, _plain(YAML().load(text)))
        except YAMLError:
            problems.append(f"--set {override}: {text!r} is not a YAML value")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        for same in _by_key(error.errors(include_url=False)):
            problems.append(_told(same, tree, Path(path), origins))
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    recipe._folder = Path(path).resolve().parent
    return recipe


def _read(path: Path) -> CommentedMap:
    try:
        tree = YAML().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*.yaml")])
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise RecipeError(f"{path}: no such file{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from error
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        raise RecipeError(f"{path}:{line}: {str(error.problem).split(' with')[0]}; each key may stand once") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not YAML: {error.problem or error.context}") from error
    if not isinstance(tree, CommentedMap):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)}), found {tree!r}"
        )
    return tree


def _plain(value: Any) -> Any:
    """Return a YAML value as Python's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _put(content: dict[str, Any], section: str, field: str, value: Any) -> None:
    if not isinstance(content.get(section), dict):
        content[section] = {}
    content[section][field] = value


def _by_key(errors: Sequence[Any]) -> list[list[Any]]:
    """Group pydantic's errors by field: it tells one for every type that a field may have."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for error in errors:
        groups.setdefault(tuple(map(str, error["loc"][:2])), []).append(error)
    return list(groups.values())


def _told(errors: Sequence[Any], tree: CommentedMap, path: Path, origins: Mapping[str, str]) -> str:
    """Turn pydantic's errors about one field into one of ours."""
    error = errors[0]
    keys = [str(part) for part in error["loc"][:2]]
    key = ".".join(keys)
    where = origins.get(key) or f"{path}:{_line(tree, keys)}"
    if error["type"] == "value_error":
        return f"{where}: {key + ': ' if key else ''}{error['ctx']['error']}"
    if error["type"] == "extra_forbidden":
        known = _known(keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        return f"{where}: {key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: {key}: missing; {_description(keys)}"
    wanted = [one["msg"].removeprefix("Input should be ").removeprefix("a valid ") for one in errors]
    found = origins[key].partition("=")[2] if key in origins else repr(error["input"])
    return f"{where}: {key}: found {found}, expected {' or '.join(dict.fromkeys(wanted))}"


def _known(keys: Sequence[str]) -> list[str]:
    if not keys:
        return list(Recipe.model_fields)
    return list(SECTIONS[keys[0]].model_fields) if keys[0] in SECTIONS else []


def _description(keys: Sequence[str]) -> str:
    if len(keys) == 1:
        return f"a section with {', '.join(_known(keys))}"
    return str(SECTIONS[keys[0]].model_fields[keys[1]].description)


def _line(tree: Any, keys: Sequence[str]) -> int:
    line = 0
    for key in keys:
        if not isinstance(tree, CommentedMap) or key not in tree:
            break
        line = tree.lc.key(key)[0]
        tree = tree[key]
    return int(line) + 1


def resolve_path(recipe: Recipe, text: str) -> Path | None:
    """Return the path that a value of a recipe names; None when it can only be a Hub name.

    Raises:
        RecipeError: It can only be a path, and nothing is there.
    """
    if text.startswith(BUILTIN):
        path = ASSETS / text.removeprefix(BUILTIN)
        if not path.exists():
            raise RecipeError(f"{text}: lora_kit ships no such thing; it has {', '.join(sorted(_shipped()))}")
        return path
    path = recipe.folder / Path(text).expanduser()
    if path.exists():
        return path
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise RecipeError(f"{text}: there is no {path}; relative paths start from the recipe's folder")
    return None


def _shipped() -> Iterator[str]:
    return (f"{BUILTIN}{path.name}" for path in ASSETS.iterdir() if path.suffix == ".jsonl" or path.name == "base")


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML that loads back equal from any folder: its relative paths become absolute."""
    content = recipe.model_dump(mode="json")
    for section, field in PATHS:
        value = content[section][field]
        if isinstance(value, str) and not value.startswith(BUILTIN):
            content[section][field] = _absolute(recipe.folder, value)
    return as_yaml(content)


def as_yaml(content: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in their order."""
    yaml, text = YAML(), StringIO()
    yaml.default_flow_style = False
    yaml.dump(content, text)
    return text.getvalue()


def _absolute(folder: Path, text: str) -> str:
    """Return an existing path, also one with a `[split]`, as absolute; anything else as it is."""
    name, bracket, split = text.partition("[")
    for path, rest in ((folder / text, ""), (folder / name, bracket + split)):
        if path.exists():
            return f"{path.resolve()}{rest}"
    return text


def difference(old: Mapping[str, Any], new: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (key, then, now) for every field whose value is another one than in `old`, a dumped recipe."""
    return [
        (f"{section}.{field}", old.get(section, {}).get(field), value)
        for section, fields in new.model_dump(mode="json").items()
        for field, value in fields.items()
        if old.get(section, {}).get(field) != value
    ]
