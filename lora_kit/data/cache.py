"""Tokenised data kept between starts, so that a resume renders and tokenises nothing again.

The key is a hash of everything that decides the tokens: the bytes of the files, not their names and times, the
tokenizer, the template, the recipe's section and the code that makes tokens of them. So nothing here is ever out of
date, only unused: an entry that nobody asks for goes when newer ones need its place. Where something cannot be hashed
(a Hub dataset without a commit, a tokenizer with code of its own) there is no key, and nothing is kept.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_kit import randomness
from lora_kit.data import sources
from lora_kit.data.template import Prompt, Renderer
from lora_kit.data.tokens import Prepared, Tokens
from lora_kit.errors import LoraKitError
from lora_kit.files import cache_folder, sha256_of
from lora_kit.recipe.schema import Recipe
from lora_kit.version import VERSION

KEPT, KEPT_BYTES = 20, 8 << 30  # entries, and what they may take together
PACKAGES = ("transformers", "tokenizers", "datasets", "jinja2", "numpy", "pyarrow")
COMMIT = re.compile("[0-9a-f]{40}")
VALIDATION = "validation."  # before the names of its arrays


def remembered(recipe: Recipe, renderer: Renderer, make: Callable[[], Prepared]) -> Prepared:
    """Return what `make` would, from an earlier call of the same key or by calling it."""
    key = key_of(recipe, renderer)
    if key is None:
        return make()
    path = cache_folder("tokens") / f"{key}.safetensors"
    known = read(path)
    if known is not None:
        return known
    made = make()
    if key_of(recipe, renderer) == key:  # else a file changed while it was read
        write(path, made)
    return made


def key_of(recipe: Recipe, renderer: Renderer) -> str | None:
    """Return the hash of everything that decides a recipe's tokens; None when something cannot be told."""
    tokenizer = renderer.tokenizer
    if not type(tokenizer).__module__.startswith("transformers."):
        return None
    named = [recipe.data.train, *([recipe.data.validation] if isinstance(recipe.data.validation, str) else [])]
    try:
        contents = [_contents(source, recipe.folder) for source in named]
    except (LoraKitError, OSError):  # whoever reads the data says what is wrong with it
        return None
    if None in contents:
        return None
    facts = {
        "contents": contents,
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.train.seed,
        "prompts": recipe.evaluate.generate,
        "rendering": [renderer.template, renderer.train_on, renderer.stop_token],
        "tokenizer": [type(tokenizer).__qualname__, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template],
        "special": [tokenizer.special_tokens_map, tokenizer.init_kwargs],
        "code": _code(),
        "versions": {"lora_kit": VERSION} | {name: version(name) for name in PACKAGES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()


def _contents(source: str, base_dir: Path) -> list[str] | None:
    """Return the hashes of a source's files with their suffixes, or the name of what can never change."""
    files = sources.files(source, base_dir)
    if files is not None:
        return [part for file in files for part in (file.suffix, sha256_of(file))]
    name = sources.parse_hub_name(source)
    return [source] if name and COMMIT.fullmatch(name.revision or "") else None


def _code() -> list[str]:
    return [sha256_of(path) for path in sorted([*Path(__file__).parent.rglob("*.py"), Path(randomness.__file__)])]


def read(path: Path) -> Prepared | None:
    """Return what `write` kept; None when there is nothing, or it is not as it was written."""
    try:
        with safe_open(path, framework="numpy") as file:
            about, checksum = (file.metadata()[name] for name in ("about", "checksum"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        train, validation = _tokens(arrays, ""), _tokens(arrays, VALIDATION)
        if train is None or checksum != _checksum(about, train, validation):
            return None
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    with suppress(OSError):  # of another user, perhaps: it is only used earlier than it seems
        os.utime(path)
    facts = json.loads(about)
    return Prepared(train, validation, tuple(Prompt(*one) for one in facts["prompts"]), facts["summary"])


def write(path: Path, made: Prepared) -> None:
    """Keep prepared data, whole or not at all, and let go of what was not used for longest."""
    about = json.dumps({"prompts": made.prompts, "summary": made.summary})
    arrays = dict(_arrays(made.train, ""))
    if made.validation is not None:
        arrays |= _arrays(made.validation, VALIDATION)
    checksum = _checksum(about, made.train, made.validation)
    with suppress(OSError, SafetensorError):  # a full or read-only disk: the next start tokenises again, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            save_file(arrays, Path(folder) / path.name, {"about": about, "checksum": checksum})
            (Path(folder) / path.name).replace(path)
        prune(path.parent)


def prune(folder: Path) -> None:
    """Remove the entries that were not used for longest, until the rest is within bounds; the newest stays."""
    found = [(path, path.stat()) for path in folder.glob("*.safetensors")]
    found.sort(key=lambda one: -one[1].st_mtime_ns)
    total = 0
    for place, (path, stat) in enumerate(found):
        total += stat.st_size
        if place and (place >= KEPT or total > KEPT_BYTES):
            path.unlink(missing_ok=True)


def _checksum(about: str, train: Tokens, validation: Tokens | None) -> str:
    parts = [about, train.fingerprint, validation.fingerprint if validation else ""]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _arrays(tokens: Tokens, prefix: str) -> Iterator[tuple[str, Any]]:
    yield from ((f"{prefix}{name}", getattr(tokens, name)) for name in ("ids", "trained", "offsets"))


def _tokens(arrays: dict[str, Any], prefix: str) -> Tokens | None:
    if f"{prefix}ids" not in arrays:
        return None
    return Tokens(*(arrays[f"{prefix}{name}"] for name in ("ids", "trained", "offsets")))
