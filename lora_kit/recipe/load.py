"""Read a recipe: YAML to a checked `Recipe`, reporting every problem at once.

schema.py defines what a recipe may contain. This module finds the file and line of every problem, applies overrides,
resolves paths and compares recipes.
"""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent

from lora_kit.errors import RecipeError
from lora_kit.files import path_in
from lora_kit.recipe.schema import OBJECTIVES, Recipe, Section, Source, TrainSource, kind_of, name_of

ASSETS = Path(__file__).parents[1] / "assets"
BUILTIN = "builtin:"
# user/name of a model, or name:config@revision of a dataset
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(:[^@]+)?(@.+)?")
SECRET = re.compile(
    r"hf_\w{20,}|\w://[^\s/@]+@|[?&][\w-]*(token|key|password|secret|credential|signature|sig)[\w-]*=", re.IGNORECASE
)
PATHS = (
    ("base", "repo"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "template"),
    ("evaluate", "forgetting"),
)  # fields that may be paths
PATHS_OF_SOURCE = ("source", "template")
MAX_BYTES, MAX_ALIASES = 100_000, 20  # limits of a recipe: a few aliases of aliases can expand to millions of values
FOUND = reprlib.Repr()  # shows a value that was found, shortened
FOUND.maxstring = FOUND.maxother = FOUND.maxlong = 200
OTHER_NAMES = {  # the names of fields in other programs
    "lr": "optim.learning_rate",
    "warmup_ratio": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_checkpointing": "train.activation_checkpointing",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "evaluate.every_steps",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "model": "base.repo",
    "model_name_or_path": "base.repo",
    "dataset": "data.train",
    "rpo_alpha": "objective.sft_weight",
    "simpo_gamma": "objective.gamma",
    "loss_type": "objective.loss",
}
# several classes for a section whose field `kind` decides between them
SECTIONS: dict[str, tuple[type[Section], ...]] = {
    name: tuple(OBJECTIVES.values()) if name == "objective" else (field.annotation,)  # type: ignore[misc]
    for name, field in Recipe.model_fields.items()
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: A YAML 1.2 file.
        overrides: Strings `section.field=value`, with the value in YAML.

    Raises:
        RecipeError: All problems, each on a line: file:line, field, value found, value expected.
    """
    path = Path(path)
    tree, content = _read(path)
    problems = []
    origins: dict[str, str] = {}  # the option that set a section or field, for messages
    for override in overrides:
        key, equals, text = override.partition("=")
        shown = "with a token or a password" if SECRET.search(override) else override
        if not equals or key.count(".") != 1:
            problems.append(f"--set {shown}: expected SECTION.FIELD=VALUE, e.g. optim.learning_rate=1e-4")
            continue
        section, field = key.split(".")
        origins[key] = f"--set {override}"
        if section not in content:
            origins[section] = origins[key]
        try:
            value = _plain(text)
        except RecipeError as error:
            problems.append(f"--set {shown}: {error}")
            continue
        except Exception:  # see `_read`
            problems.append(f"--set {shown}: {repr(text) if shown == override else 'it'} is not a YAML value")
            continue
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content[section][field] = value
    if secrets := list(_with_secrets(content)):  # checked first, because the other messages quote values
        raise RecipeError("\n".join(secrets))
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        # for a field with a union pydantic reports an error for each type of the union
        for _, errors in groupby(error.errors(include_url=False), key=lambda each: _keys(each["loc"])):
            problems.append(_message(list(errors), tree, path, origins))
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    recipe._folder = path.resolve().parent if path.is_file() else Path.cwd()  # a pipe has no folder of its own
    return recipe


def _with_secrets(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem for each field that contains credentials; the recipe is copied to manifests and model cards."""
    places = list[tuple[str, Any]]()
    for section, fields in content.items():
        nested = fields.items() if isinstance(fields, Mapping) else ()
        places += [(f"{section}.{field}", value) for field, value in nested] or [(str(section), fields)]
    for place, value in places:
        if SECRET.search(f"{place} {value}"):
            place = "a key" if SECRET.search(place) else place
            yield (
                f"{place}: it contains a token or a password, which would be copied to manifests and model cards; "
                "remove it and log in with `hf auth login` or set HF_TOKEN"
            )


def _read(path: Path) -> tuple[CommentedMap, dict[str, Any]]:
    """Parse a YAML file twice: as a tree with the line of every key, and as values of Python's built-in types.

    The file is read once, so it may be a pipe.

    Raises:
        RecipeError: The file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            read = file.read(MAX_BYTES + 1)
        text = read.decode(errors="strict" if len(read) <= MAX_BYTES else "replace")
        content = _plain(text)
        tree = YAML().load(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        similar = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")])
        hint = f"; did you mean {path.with_name(similar[0])}?" if similar else ""
        raise RecipeError(f"{path}: no such file{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from error
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        raise RecipeError(f"{path}:{line}: {str(error.problem).split(' with')[0]}; write each key once") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not YAML: {error.problem or error.context}") from error
    except Exception as error:  # ruamel: a character that YAML forbids, deep nesting, a number of 5,000 digits, ...
        reason = str(error).strip() or type(error).__name__
        raise RecipeError(f"{path}: not YAML: {reason.splitlines()[0]}") from error
    if not isinstance(tree, CommentedMap):
        found = "a token or a password" if SECRET.search(str(content)) else FOUND.repr(content)
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)}), found {found}"
        )
    return tree, content


def _plain(text: str) -> Any:
    """Parse YAML into Python's built-in types.

    Raises:
        RecipeError: The text is too long or has too many aliases.
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise RecipeError(f"longer than the {MAX_BYTES:,} bytes that a recipe may have")
    if "*" in text:
        aliases = sum(isinstance(event, AliasEvent) for event in YAML(pure=True).parse(text))
        if aliases > MAX_ALIASES:
            raise RecipeError(f"{aliases} aliases (*name), more than {MAX_ALIASES}; write the values out")
    return YAML(typ="safe", pure=True).load(text)


def _message(errors: Sequence[Any], tree: CommentedMap, path: Path, origins: Mapping[str, str]) -> str:
    """Return one message for pydantic's errors about one field.

    Args:
        errors: The errors; all have the same location.
        tree: The recipe as parsed, with line numbers.
        path: The recipe's file.
        origins: The override that set a section or field, for those that an override set.
    """
    error = errors[0]
    keys = _keys(error["loc"])
    if error["type"] == "union_tag_invalid":
        where, found = f"{path}:{_line(tree, [*keys, 'kind'])}", FOUND.repr(error["input"]["kind"])
        where = origins.get("objective.kind") or where
        return f"{where}: objective.kind: found {found}, expected one of {', '.join(OBJECTIVES)}"
    field, key = ".".join(map(str, keys[:2])), _written(keys)
    where = origins.get(field) or f"{path}:{_line(tree, keys)}"
    if error["type"] == "value_error":
        return f"{where}: {key + ': ' if key else ''}{error['ctx']['error']}"
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return f"{where}: {key}: unknown key; {_hint(keys)}"
    if error["type"] == "missing":
        return f"{where}: {key}: missing; {_description(keys)}"
    if error["type"] == "string_pattern_mismatch":
        return f"{where}: {key}: a name has at most 64 letters, digits and the characters . _ -"
    expected = [error["msg"].removeprefix("Input should be ").removeprefix("a valid ") for error in errors]
    given = field in origins and len(keys) <= 2
    found = origins[field].partition("=")[2] if given else FOUND.repr(error["input"])
    return f"{where}: {key}: found {found}, expected {' or '.join(dict.fromkeys(expected))}"


class Kind(str):
    """The key `objective` of a recipe, with the kind of the objective in an attribute.

    The known fields after this key depend on the kind.
    """

    kind = "sft"

    @classmethod
    def objective(cls, kind: str) -> "Kind":
        """Return the key `objective` with this kind."""
        key = cls("objective")
        key.kind = kind
        return key


def _keys(location: Sequence[int | str]) -> tuple[int | str, ...]:
    """Return the keys and indices that lead to the place of an error, without pydantic's names of types.

    Only inside `data.train` and `data.validation` are there further keys after the field: an index or a name, then a
    field of the source. The key `objective` is a `Kind`.
    """
    if location[:1] == ("objective",) and len(location) > 1:
        return Kind.objective(str(location[1])), *map(str, location[2:3])
    keys = tuple(str(part) for part in location[:2])
    if location[2:3] not in (("<list>",), ("<mapping>",)):
        return keys
    inner = [part for part in location[2:] if part not in ("<list>", "<mapping>", "<plain>", "[key]")]
    return (*keys, *inner[:2])


def _written(keys: Sequence[int | str]) -> str:
    """Return keys as a recipe's reader would write them, e.g. `data.train[0].weight`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def _hint(keys: Sequence[int | str]) -> str:
    """Return the field that an unknown key probably means, or all that are known in its place."""
    known, name = _known_keys(keys[:-1]), str(keys[-1])
    if similar := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {similar[0]!r}?"
    elsewhere = [
        f"{section}.{name}" for section, kinds in SECTIONS.items() if any(name in kind.model_fields for kind in kinds)
    ]
    if isinstance(keys[0], Kind) and f"objective.{name}" in elsewhere:
        kinds = [kind for kind, section in OBJECTIVES.items() if name in section.model_fields]
        return f"only objective.kind {' or '.join(kinds)} has {name}, not {keys[0].kind}"
    if meant := OTHER_NAMES.get(name.lower()) or " or ".join(elsewhere):
        return f"did you mean {meant}?"
    return f"expected one of {', '.join(known)}"


def _known_keys(keys: Sequence[int | str]) -> list[str]:
    """Return the names of all sections if `keys` is empty, otherwise of the fields of a section or a source."""
    return list(_fields_of(keys)) if keys else list(Recipe.model_fields)


def _fields_of(keys: Sequence[int | str]) -> dict[str, FieldInfo]:
    section = OBJECTIVES[keys[0].kind] if isinstance(keys[0], Kind) else SECTIONS[str(keys[0])][0]
    if len(keys) > 2:
        section = TrainSource if isinstance(keys[2], int) else Source
    return section.model_fields


def _description(keys: Sequence[int | str]) -> str:
    if len(keys) == 1:
        return f"a section with {', '.join(_known_keys(keys))}"
    return str(_fields_of(keys[:-1])[str(keys[-1])].description)


def _line(tree: Any, keys: Sequence[int | str]) -> int:
    """Return the line, from 1, of the last of these nested keys and indices that the file contains."""
    line = 0
    for key in keys:
        if isinstance(tree, CommentedMap) and key in tree:
            line = tree.lc.key(key)[0]
        elif isinstance(tree, CommentedSeq) and isinstance(key, int) and key < len(tree):
            line = tree.lc.item(key)[0]
        else:
            break
        tree = tree[key]
    return int(line) + 1


def resolve_path(recipe: Recipe, text: str) -> Path | None:
    """Return the path that a recipe's value names; None if that path does not exist and the value may be a Hub name.

    Raises:
        RecipeError: The path does not exist and the value is no Hub name either, or the path cannot be used.
    """
    if text.startswith(BUILTIN):
        files = {f"{BUILTIN}{file.name}": file for file in (*ASSETS.glob("base"), *ASSETS.glob("*.jsonl"))}
        if text not in files:
            raise RecipeError(f"{text}: not shipped with lora_kit; choose one of {', '.join(sorted(files))}")
        return files[text]
    path = _path(recipe, text)
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(text):
        hint = similar_path(recipe, text)
        hint = f"did you mean {hint}?" if hint else "relative paths start in the recipe's folder"
        raise RecipeError(f"{text}: {path} does not exist; {hint}")
    return None


def _path(recipe: Recipe, text: str) -> Path:
    try:
        return path_in(recipe.folder, text)
    except OSError as error:
        raise RecipeError(
            f"{text}: the path cannot be used: {error.strerror}; check its spelling and permissions"
        ) from error


def similar_path(recipe: Recipe, text: str) -> str | None:
    """Return an existing path in the same folder as a path that does not exist, with a similar name, or None."""
    path = _path(recipe, text)
    try:
        # the path itself may be here, as a broken link
        names = [entry.name for entry in path.parent.iterdir() if entry.name != path.name]
    except OSError:
        return None
    similar = difflib.get_close_matches(path.name, names, n=1)
    return str(Path(text).with_name(similar[0])) if similar else None


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML that can be loaded from any folder: relative paths are made absolute."""
    content = recipe.model_dump(mode="json")
    change_paths(content, lambda text: text if text.startswith(BUILTIN) else _absolute(recipe.folder, text))
    return as_yaml(content)


def change_paths(content: dict[str, dict[str, Any]], change: Callable[[str], str]) -> None:
    """Replace every value of a recipe's content that may be a path by what `change` returns for it."""
    places: list[tuple[Any, Any]] = [(content[section], field) for section, field in PATHS]
    for sources in (content["data"]["train"], content["data"]["validation"]):
        keys = range(len(sources)) if isinstance(sources, list) else list(sources) if isinstance(sources, dict) else []
        for key in keys:
            places.append((sources, key))
            places += [(sources[key], field) for field in PATHS_OF_SOURCE if isinstance(sources[key], dict)]
    for place, key in places:
        if isinstance(place[key], str):
            place[key] = change(place[key])


def as_yaml(content: Mapping[str, Any]) -> str:
    """Return a mapping of JSON values as YAML, keeping the order of its keys."""
    yaml, text = YAML(), StringIO()
    yaml.default_flow_style = False
    yaml.dump(content, text)
    return text.getvalue()


def _absolute(folder: Path, text: str) -> str:
    """Return an existing path, with or without a `[split]` after it, as absolute; any other text unchanged."""
    name, bracket, split = text.partition("[")
    for path, suffix in ((folder / text, ""), (folder / name, bracket + split)):
        if path.exists():
            return f"{path.resolve()}{suffix}"
    return text


def difference(old: Mapping[str, Any], new: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (section.field, old value, new value) for every field whose value differs.

    Args:
        old: A recipe from `model_dump(mode="json")`, perhaps of another version of lora_kit.
        new: The recipe to compare with it. A field that the old one lacks counts as its default, with which the other
            version trained; a field of another version counts as None in the new one.
    """
    kind = kind_of(old.get("objective", {}))
    sections = {
        name: OBJECTIVES.get(kind, kinds[0]) if name == "objective" else kinds[0] for name, kinds in SECTIONS.items()
    }
    whole = {name: _defaults(section) | dict(old.get(name, {})) for name, section in sections.items()}
    before, after = _fields({**old, **whole}), _fields(new.model_dump(mode="json"))
    keys = dict.fromkeys([*after, *before])
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _defaults(section: type[Section]) -> dict[str, Any]:
    """Return the default of every field of a section that has one."""
    fields = section.model_fields.items()
    return {name: to_jsonable_python(field.default) for name, field in fields if not field.is_required()}


def _fields(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values of a recipe's fields; a source of a mixture has the keys `data.train.NAME.FIELD`."""
    fields = {f"{section}.{field}": value for section, fields in recipe.items() for field, value in fields.items()}
    for key in ("data.train", "data.validation"):
        for name, source in _named(fields.get(key)):
            fields.pop(key, None)
            fields |= {f"{key}.{name}.{field}": value for field, value in source.items() if value is not None}
    return fields


def _named(sources: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the sources of a list or a mapping with their names, as far as they have the form of this version."""
    for entry in sources if isinstance(sources, list) else ():
        source = {"source": entry} if isinstance(entry, str) else entry
        if isinstance(source, Mapping) and isinstance(source.get("source"), str):
            yield source.get("name") or name_of(source["source"]), source
    for name, entry in sources.items() if isinstance(sources, Mapping) else ():
        yield name, entry if isinstance(entry, Mapping) else {"source": entry}
