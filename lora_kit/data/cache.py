"""A cache of tokenised data, so that a resumed run does not render and tokenise again.

The key is a hash of everything that determines the tokens: the content of the data files, the tokenizer, the template,
the recipe's section `data`, and the code of this package. An entry can therefore never be stale. The least recently
used entries are deleted when the cache is full. If something cannot be hashed (a Hub dataset without a commit, a
tokenizer with custom code) there is no key, and nothing is cached.
"""

import hashlib
import json
import os
import re
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lora_kit import randomness
from lora_kit.data import sources
from lora_kit.data.counts import DataCounts
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import Prompt
from lora_kit.data.tokens import Prepared, Tokens
from lora_kit.errors import LoraKitError
from lora_kit.files import PrivateFolder, private_folder, sha256_of
from lora_kit.recipe.schema import Recipe
from lora_kit.version import VERSION

MAX_ENTRIES, MAX_BYTES = 20, 8 << 30  # the limits of the cache
PACKAGES = ("transformers", "tokenizers", "datasets", "jinja2", "numpy", "pyarrow")
COMMIT = re.compile("[0-9a-f]{40}")
SUFFIX = ".safetensors"
TRAIN, VALIDATION = "train.", "validation."  # prefixes of the names of the arrays in a file
ABOUT = TypeAdapter(tuple[tuple[Prompt, ...], DataCounts, tuple[str, ...]])  # prompts, counts and notes


def key_of(recipe: Recipe, renderer: Renderer) -> str | None:
    """Return the hash of everything that determines a recipe's tokens; None if a part cannot be hashed."""
    tokenizer = renderer.tokenizer
    if not type(tokenizer).__module__.startswith("transformers."):
        return None
    names = [recipe.data.train, *([recipe.data.validation] if isinstance(recipe.data.validation, str) else [])]
    try:
        contents = [_contents(source, recipe.folder) for source in names]
    except (LoraKitError, OSError):  # the caller will read the data and report the error
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
    """Return the suffixes and hashes of a source's files, or its name if it names a commit; None if it may change."""
    files = sources.files(source, base_dir)
    if files is not None:
        return [part for file in files.values() for part in (file.suffix, sha256_of(file))]
    name = sources.parse_hub_name(source)
    return [source] if name and COMMIT.fullmatch(name.revision or "") else None


def _code() -> list[str]:
    return [sha256_of(path) for path in sorted([*Path(__file__).parent.rglob("*.py"), Path(randomness.__file__)])]


def read(path: Path) -> Prepared | None:
    """Return the prepared data that `write` saved; None if the file is missing, damaged, or may be another user's."""
    try:
        with private_folder(path.parent) as folder, os.fdopen(folder.open(path.name), "rb") as file:
            os.utime(file.fileno())  # the time of last use
            return _read(file.fileno())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, prepared: Prepared) -> None:
    """Save prepared data, and delete the least recently used entries. A failure is a warning; the cache is optional."""
    try:
        with private_folder(path.parent) as folder:
            os.close(folder.write(path.name, pack(prepared)))
            _prune(folder)
    except OSError as error:  # e.g. a full or read-only disk, or a folder of another user
        warnings.warn(f"prepared data is not kept for the next start: {error}", stacklevel=2)


def pack(prepared: Prepared) -> bytes:
    """Return prepared data as the bytes of a safetensors file with a checksum."""
    about = ABOUT.dump_json((prepared.prompts, prepared.counts, prepared.notes)).decode()
    arrays = {TRAIN + name: array for name, array in vars(prepared.train).items()}
    if prepared.validation is not None:
        arrays |= {VALIDATION + name: array for name, array in vars(prepared.validation).items()}
    checksum = _checksum(about, prepared.train, prepared.validation)
    return save(arrays, {"about": about, "checksum": checksum})


def unpack(content: bytes) -> Prepared:
    """Return the prepared data of the bytes of `pack`.

    Raises:
        ValueError, KeyError, TypeError: The bytes are not such data, or are damaged.
    """
    with os.fdopen(os.memfd_create("tokens"), "wb") as file:
        file.write(content)
        file.flush()
        return _read(file.fileno())


def _read(descriptor: int) -> Prepared:
    """Return the prepared data in an open file. A path could lead to another file by now."""
    try:
        with safe_open(f"/proc/self/fd/{descriptor}", "numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    train, validation = _tokens(arrays, TRAIN), _tokens(arrays, VALIDATION)
    if train is None or metadata["checksum"] != _checksum(metadata["about"], train, validation):
        raise ValueError("the checksum does not match")
    prompts, counts, notes = ABOUT.validate_json(metadata["about"])
    return Prepared(train, validation, prompts, counts, notes)


def _prune(folder: PrivateFolder) -> None:
    """Delete the least recently used entries until the cache is within its limits; the newest entry always stays."""
    names = [name for name in os.listdir(folder.descriptor) if name.endswith(SUFFIX)]  # noqa: PTH208  (a descriptor)
    entries = [(name, os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)) for name in names]
    entries.sort(key=lambda entry: -entry[1].st_mtime_ns)
    total = 0
    for rank, (name, stat) in enumerate(entries):
        total += stat.st_size
        if rank and (rank >= MAX_ENTRIES or total > MAX_BYTES):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder.descriptor)


def _checksum(about: str, train: Tokens, validation: Tokens | None) -> str:
    parts = [about, train.fingerprint, validation.fingerprint if validation else ""]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tokens(arrays: dict[str, np.ndarray], part: str) -> Tokens | None:
    named = {name.removeprefix(part): array for name, array in arrays.items() if name.startswith(part)}
    return Tokens(**named) if named else None
