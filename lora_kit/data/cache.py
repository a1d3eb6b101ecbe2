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
import time
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import TypeAdapter

from lora_kit import randomness
from lora_kit.data import arrays, sources
from lora_kit.data.counts import DataCounts
from lora_kit.data.files import read_text
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import Prompt
from lora_kit.data.tokens import Entry, Prepared, Tokens
from lora_kit.errors import LoraKitError
from lora_kit.files import PARTIAL, PrivateFolder, private_folder, remembered_sha256, sha256_of
from lora_kit.recipe.schema import Data, Recipe
from lora_kit.version import VERSION

MAX_ENTRIES, MAX_BYTES = 20, 8 << 30  # the limits of the cache
ABANDONED_SECONDS = 3600  # age at which a file that was not completed is deleted
WORTH_REMEMBERING = 1 << 26  # bytes of a data file whose hash is remembered
SETTLED_SECONDS = 2
PACKAGES = ("transformers", "tokenizers", "datasets", "jinja2", "numpy", "pyarrow")
COMMIT = re.compile("[0-9a-f]{40}")
SUFFIX = ".safetensors"
TRAIN, VALIDATION = "train.", "validation."  # prefixes of the names of the arrays in a file
FIELDS, CHOSEN, KEPT = ("ids", "trained", "offsets"), "chosen", "kept"
DAMAGED = (OSError, ValueError, KeyError, TypeError)  # what reading a damaged or foreign file raises
ABOUT = TypeAdapter(tuple[tuple[Prompt, ...], DataCounts, tuple[str, ...]])  # prompts, counts and notes


def key_of(recipe: Recipe, renderer: Renderer) -> str | None:
    """Return the hash of everything that determines a recipe's tokens; None if a part cannot be hashed."""
    tokenizer = renderer.tokenizer
    if not type(tokenizer).__module__.startswith("transformers."):
        return None
    try:
        contents = [_contents(source.source, recipe.folder) for source in recipe.data.sources]
        templates = [source.template and _template(source.template, recipe.folder) for source in recipe.data.sources]
    except (LoraKitError, OSError):  # the caller will read the data and report the error
        return None
    if None in contents:
        return None
    facts = {
        "contents": contents,
        "templates": templates,
        "data": _settings(recipe.data),
        # only a split into training and validation uses it
        "seed": recipe.train.seed if isinstance(recipe.data.validation, float) else None,
        "prompts": recipe.evaluate.generate,
        "rendering": [renderer.template, renderer.train_on, renderer.reasoning, renderer.stop_token, renderer.kind],
        "tokenizer": [type(tokenizer).__qualname__, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template],
        "special": [tokenizer.special_tokens_map, tokenizer.init_kwargs],
        "code": _code(),
        "versions": {"lora_kit": VERSION} | {name: version(name) for name in PACKAGES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()


def _settings(data: Data) -> dict[str, Any]:
    """Return the fields of the section that decide the tokens: weights and epochs of sources decide only the order."""
    unused = {"overlap"} if data.overlong != "split" else set()  # `overlap` is used only where texts are split
    settings = data.model_dump(mode="json", exclude=unused)
    for source in settings["train"] if data.mixture else ():
        if isinstance(source, dict):
            del source["weight"], source["epochs"]
    return settings


def _template(name: str, base_dir: Path) -> str:
    """Return the chat template of a source, read as the source itself will read it: a FIFO would block."""
    return read_text(sources.path_of(name, base_dir, name), name)


def _contents(source: str, base_dir: Path) -> list[str] | None:
    """Return the names and hashes of a source's files, or its name if it names a commit; None if it may change."""
    files = sources.files(source, base_dir)
    if files is not None:
        return [part for name, file in files.items() for part in (name, _content_hash(file))]
    name = sources.parse_hub_name(source)
    return [source] if name and COMMIT.fullmatch(name.revision or "") else None


def _content_hash(path: Path) -> str:
    """Return the SHA-256 of a data file. That of a large file is remembered if the file has not just been changed.

    A clock that ticks slowly could otherwise give a second change the time of the first.
    """
    stat = path.stat()
    settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_SECONDS * 1e9
    return remembered_sha256(path) if stat.st_size > WORTH_REMEMBERING and settled else sha256_of(path)


def _code() -> list[str]:
    return [sha256_of(path) for path in sorted([*Path(__file__).parent.rglob("*.py"), Path(randomness.__file__)])]


def read(path: Path, checksum: str | None = None) -> Prepared | None:
    """Return the prepared data that `write` saved; None if the file is missing, damaged, or may be another user's.

    Args:
        path: The file.
        checksum: The checksum that the file must have; None accepts any file without damage.
    """
    try:
        with private_folder(path.parent) as folder, os.fdopen(folder.open(path.name), "rb") as file:
            os.utime(file.fileno())  # the time of last use
            prepared = _load(file.fileno(), path)
    except DAMAGED:
        return None
    assert prepared.entry is not None
    return prepared if checksum in (None, prepared.entry.checksum) else None


def write(path: Path, prepared: Prepared) -> Prepared:
    """Save prepared data, and delete the least recently used entries; return the data as it was saved.

    A failure is a warning, and the data itself is returned; the cache is optional.
    """
    try:
        with private_folder(path.parent) as folder:
            descriptor = folder.write(path.name, lambda file: save(file, prepared))
            try:
                saved = _load(descriptor, path, verify=False)
            finally:
                os.close(descriptor)
            prune(folder)
    except OSError as error:  # e.g. a full or read-only disk, or a folder of another user
        warnings.warn(f"prepared data is not kept for the next start: {error}", stacklevel=2)
        return prepared
    return saved


def save(file: BinaryIO, prepared: Prepared) -> None:
    """Write prepared data to an empty file, with a checksum."""
    about = ABOUT.dump_json((prepared.prompts, prepared.counts, prepared.notes)).decode()
    named, facts = dict[str, np.ndarray](), dict[str, Any]()
    for part, tokens, kept in zip(
        (TRAIN, VALIDATION), (prepared.train, prepared.validation), prepared.kept, strict=False
    ):
        if tokens is not None:
            named |= {part + name: getattr(tokens, name) for name in FIELDS} | {part + KEPT: kept}
            if tokens.chosen is not None:
                named[part + CHOSEN] = tokens.chosen
            facts[part] = {"fingerprint": tokens.fingerprint, "largest": tokens.largest}
    arrays.write(file, named, {"about": about, "facts": json.dumps(facts)})


def load(file: BinaryIO) -> Prepared:
    """Return the prepared data in an open file of `save`.

    Raises:
        ValueError, KeyError, TypeError: The file does not contain such data, or is damaged.
    """
    return _load(file.fileno(), None)


def name_entry(prepared: Prepared | None) -> bytes:
    """Return, for `open_entry` in another process, which entry of the cache has this data."""
    entry = prepared and prepared.entry
    return json.dumps(entry and [str(entry.path), entry.checksum]).encode()


def open_entry(name: bytes) -> Prepared | None:
    """Return the data that `name_entry` named in another process; None if this process cannot open the same entry."""
    entry = json.loads(name)
    return read(Path(entry[0]), entry[1]) if entry else None


def _load(descriptor: int, path: Path | None, *, verify: bool = True) -> Prepared:
    """Return the prepared data in an open file. A path could lead to another file by now."""
    named, metadata = arrays.read(descriptor, verify=verify)
    facts = json.loads(metadata["facts"])
    train, validation = (
        Tokens.restored(*(named[part + name] for name in FIELDS), chosen=named.get(part + CHOSEN), **facts[part])
        if part in facts
        else None
        for part in (TRAIN, VALIDATION)
    )
    if train is None:
        raise ValueError("there is no training data")
    prompts, counts, notes = ABOUT.validate_json(metadata["about"])
    entry = Entry(path, metadata[arrays.CHECKSUM]) if path else None
    kept = tuple(named[part + KEPT] for part in (TRAIN, VALIDATION) if part in facts)
    return Prepared(train, validation, prompts, counts, notes, kept, entry)


def prune(folder: PrivateFolder, suffix: str = SUFFIX) -> None:
    """Delete the least recently used entries until the cache is within its limits; the newest entry always stays.

    The names of the entries end with `suffix`.
    """
    names = [name for name in os.listdir(folder.descriptor) if name.endswith((suffix, PARTIAL))]  # noqa: PTH208
    found = [(name, os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)) for name in names]
    for name, stat in found:
        if name.endswith(PARTIAL) and time.time() - stat.st_mtime > ABANDONED_SECONDS:  # its process was killed
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder.descriptor)
    entries = sorted((each for each in found if each[0].endswith(suffix)), key=lambda entry: -entry[1].st_mtime_ns)
    total = 0
    for rank, (name, stat) in enumerate(entries):
        total += stat.st_size
        if rank and (rank >= MAX_ENTRIES or total > MAX_BYTES):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder.descriptor)
