"""Select layers by the recipe's names and patterns. Nothing here needs torch, so `check` uses it too."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from lora_kit.errors import RecipeError
from lora_kit.recipe.schema import Adapter

T = TypeVar("T")


def named(target: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that a name or a pattern selects.

    Args:
        target: A path or its last parts, e.g. `q_proj` or `self_attn.q_proj`; or a pattern for them with `*`, `?` and
            `[...]`, e.g. `layers.1?.*.q_proj`.
        paths: The full names of layers.
    """
    return [path for path in paths if fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}")]


def refuse_unknown(field: str, targets: Iterable[str], paths: Iterable[str], available: Iterable[str]) -> None:
    """Check that each name or pattern of a field selects a layer.

    Args:
        field: The recipe's field, e.g. `adapter.targets`.
        targets: Names or patterns.
        paths: The full names of the layers to select from.
        available: Names to choose from, for the message.

    Raises:
        RecipeError: A name or pattern selects no layer.
    """
    paths = list(paths)
    if unknown := [target for target in targets if not named(target, paths)]:
        raise RecipeError(
            f"{field}: {unknown} match no layer of the base; choose from {list(available)}, or give a pattern such as "
            "'layers.1?.*.q_proj'"
        )


def narrowed(adapter: Adapter, paths: Sequence[str], available: Iterable[str]) -> list[str]:
    """Return the selected layers that `adapter.layers` and `adapter.exclude` leave, and check the patterns.

    Args:
        adapter: The recipe's section.
        paths: The full names of the layers that `adapter.targets` selects.
        available: Names to choose from, for messages.

    Raises:
        RecipeError: A layer or a pattern does not exist, or no layer is left.
    """
    wanted, numbers = _decoder_layers(adapter), {path: layer_number(path) for path in paths}
    existing = {number for number in numbers.values() if number is not None}
    if wanted is not None and not wanted <= existing:
        most = f"0 to {max(existing)}" if existing else "no numbers"
        raise RecipeError(
            f"adapter.layers: {min(wanted - existing)} is no decoder layer with a target; they have {most}"
        )
    refuse_unknown("adapter.exclude", adapter.exclude, paths, available)
    left_out = {path for pattern in adapter.exclude for path in named(pattern, paths)}
    kept = [
        path
        for path in paths
        if path not in left_out and (wanted is None or numbers[path] is None or numbers[path] in wanted)
    ]
    if not kept:
        raise RecipeError("adapter.exclude: it leaves no layer of adapter.targets; exclude fewer layers")
    refuse_unknown("adapter.rank_pattern", adapter.rank_pattern, kept, available)
    refuse_unknown("adapter.alpha_pattern", adapter.alpha_pattern, kept, available)
    return kept


def _decoder_layers(adapter: Adapter) -> set[int] | None:
    """Return the numbers that `adapter.layers` gives, with those inside of ranges; None for all."""
    if adapter.layers is None:
        return None
    ends = [str(entry).partition("-")[::2] for entry in adapter.layers]
    return {number for first, last in ends for number in range(int(first), int(last or first) + 1)}


def layer_number(path: str) -> int | None:
    """Return the number of the decoder layer in a path: its first part that is a number; None if it has none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def rank_of(adapter: Adapter, path: str) -> int:
    """Return the rank of a layer's adapter."""
    return _first_match(adapter.rank_pattern, path, adapter.rank)


def _first_match(patterns: Mapping[str, T], path: str, otherwise: T) -> T:
    return next((value for pattern, value in patterns.items() if named(pattern, [path])), otherwise)


def as_regex(pattern: str) -> str:
    """Return a name or pattern as the regular expression with which peft selects the same layers.

    Source: `get_pattern_key` in peft, which matches `(.*\\.)?(KEY)$`.
    """
    parts = re.split(r"(\*|\?|\[!?\]?[^\]]*\])", pattern)
    return "".join(_as_regex(part) for part in parts)


def _as_regex(part: str) -> str:
    if part in ("*", "?"):
        return {"*": ".*", "?": "."}[part]
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        inside = part[1:-1]
        negated = "^" if inside.startswith("!") else ""
        return f"[{negated}{inside.removeprefix('!').replace(chr(92), chr(92) * 2).replace('[', chr(92) + '[')}]"
    return re.escape(part)
