"""Where a base comes from, and what it is: its files, their hashes and its tokenizer. No weight is loaded here."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lora_kit.errors import BaseError
from lora_kit.files import cache_folder, sha256_of, write_whole
from lora_kit.recipe.load import BUILTIN, resolve_path
from lora_kit.recipe.schema import Base, Recipe
from lora_kit.runs.manifest import BaseFingerprint

LIGHT = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
WANTED = [*LIGHT, "*.safetensors"]


@dataclass(frozen=True)
class Source:
    """Where a base lies and what it is.

    Attributes:
        name: As the recipe names it; what adapter_config.json says.
        folder: Its files on this machine.
        commit: The Hub's commit, None for a local folder.
        files: The SHA-256 of every file that decides the model or its tokenizer.
    """

    name: str
    folder: Path
    commit: str | None
    files: dict[str, str]

    @property
    def fingerprint(self) -> BaseFingerprint:
        """What a manifest records: equal fingerprints mean equal bytes."""
        return BaseFingerprint(self.commit, self.files)


def locate(base: Base, folder: Path | None) -> Source:
    """Find a base, download it if it is a Hub name, and fingerprint its files.

    Args:
        base: The recipe's section.
        folder: Where it lies if it is no Hub name.

    Raises:
        BaseError: There is no such folder or repository, or it holds no weights.
    """
    found = base_folder(base, folder)
    names = {path.name for pattern in WANTED for path in found.glob(pattern)}
    if not any(name.endswith(".safetensors") for name in names):
        raise BaseError(f"base.repo: {base.repo} has no .safetensors weights; lora_kit opens no pickled ones")
    ordered = sorted(names)
    with ThreadPoolExecutor() as threads:  # a large base has many files, and hashing leaves Python alone
        hashes = dict(zip(ordered, threads.map(file_hash, [found / name for name in ordered]), strict=True))
    return Source(base.repo if folder is None else str(folder), found, None if folder else found.name, hashes)


def pinned_base(recipe: Recipe, commit: str | None, name: str, *, base: Path | None = None) -> tuple[Base, Path | None]:
    """Return where a checkpoint's base is: the recipe's section at the commit of its training, and the folder, if any.

    Args:
        recipe: The checkpoint's.
        commit: The base's commit on the Hub, from the checkpoint's manifest; None for a local folder.
        name: The base's name in adapter_config.json.
        base: A folder to look in instead.

    Raises:
        BaseError: The base was a local folder on another machine.
    """
    if base is not None:
        return recipe.base, base
    if commit is not None:
        return recipe.base.model_copy(update={"revision": commit}), None
    if recipe.base.repo.startswith(BUILTIN):
        return recipe.base, resolve_path(recipe, recipe.base.repo)
    if not Path(name).is_absolute():
        raise BaseError(
            f"base {name}: was a local folder where the adapter was trained, and is not on the Hub; say where it lies "
            "here: lk.load(..., base=FOLDER)"
        )
    return recipe.base, Path(name)


def base_folder(base: Base, folder: Path | None, *, weights: bool = True, offline: bool = False) -> Path:
    """Return the folder with a base's files, downloading them if it is a Hub name.

    Args:
        base: The recipe's section.
        folder: Where it lies if it is no Hub name.
        weights: Whether the weights are wanted, or only configuration and tokenizer.
        offline: Take them from the Hub's local cache or not at all.

    Raises:
        BaseError: There is no such folder or repository.
    """
    found = folder or _download(base, WANTED if weights else LIGHT, offline=offline)
    if not (found / "config.json").is_file():
        raise BaseError(f"base.repo: {base.repo} has no config.json ({found}); expected a model folder or a Hub name")
    return found


def _download(base: Base, patterns: list[str], *, offline: bool) -> Path:
    try:
        return Path(
            snapshot_download(base.repo, revision=base.revision, allow_patterns=patterns, local_files_only=offline)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        where = f"base.repo: {base.repo} (revision {base.revision or 'main'}) is no folder here and"
        if offline:
            raise BaseError(f"{where} not in the Hub's local cache") from error
        reason = str(error).strip().splitlines()[0]
        raise BaseError(
            f"{where} cannot be had from the Hub: {reason}; check the name, the network and, for a gated model, "
            "`hf auth login`"
        ) from error


def file_hash(path: Path) -> str:
    """Return a file's SHA-256, remembered by path, size, time and inode, so that a resume reads no base twice.

    A file in the Hub's cache that is named by its SHA-256 is not read at all.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    key = hashlib.sha256(repr((str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino)).encode()).hexdigest()
    remembered = cache_folder("sha256") / key
    if remembered.is_file() and len(known := remembered.read_text()) == 64:
        return known
    digest = sha256_of(real)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    write_whole(remembered, digest)
    return digest
