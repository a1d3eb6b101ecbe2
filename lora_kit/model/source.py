"""Find a base (folder, Hub download or shipped) and hash the files that determine model and tokenizer.

No weights are loaded here. Files that transformers does not read, or that decide neither model nor tokenizer (licences,
`generation_config.json`, weights in other formats), are neither downloaded nor hashed.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lora_kit.errors import BaseError
from lora_kit.files import remembered_sha256
from lora_kit.model.weights import INDEX_ENDING, WEIGHTS, check_weights, read_json, weight_files
from lora_kit.recipe.load import BUILTIN, resolve_path
from lora_kit.recipe.schema import Base, Recipe
from lora_kit.runs.manifest import BaseFingerprint

DECIDING = [  # besides the weights
    *("config.json", "config.*.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.codes", "dict.txt", "emoji.json"),
]
SMALL_FILES = [*DECIDING, f"*{INDEX_ENDING}", "generation_config.json", "*.py"]
ADAPTER_CONFIG = "adapter_config.json"  # transformers loads an adapter with the base whose folder has this file


@dataclass(frozen=True)
class Source:
    """The files of a base on this machine.

    Attributes:
        name: The Hub name or path, as written to adapter_config.json.
        folder: The folder with the files.
        commit: The commit of the Hub repository; None for a local folder.
        files: The SHA-256 of every file that determines the model or its tokenizer, by file name.
    """

    name: str
    folder: Path
    commit: str | None
    files: dict[str, str]

    @property
    def weight_bytes(self) -> int:
        """The size of the weights on disk."""
        return sum((self.folder / name).stat().st_size for name in self.files if name.endswith(".safetensors"))

    @property
    def fingerprint(self) -> BaseFingerprint:
        """The identity of the base in a manifest: equal fingerprints mean equal files."""
        return BaseFingerprint(self.commit, self.files)


def locate(base: Base, folder: Path | None) -> Source:
    """Find a base, download it if necessary, and hash its files.

    Args:
        base: The recipe's section.
        folder: The base's local folder; None if `base.repo` is a Hub name.

    Raises:
        BaseError: The folder or repository does not exist, or its weights are missing, damaged, not safetensors or not
            readable.
    """
    path = base_folder(base, folder)
    try:
        weights = check_weights(path)
        patterns = [*DECIDING, *(["*.py"] if base.trust_remote_code and _names_code(path) else [])]
        others = {file.name for pattern in patterns for file in path.glob(pattern) if file.is_file()}
        ordered = sorted(others.union(weights))
        with ThreadPoolExecutor() as threads:  # a large base has many files, and hashlib releases the GIL
            hashes = dict(zip(ordered, threads.map(file_hash, [path / name for name in ordered]), strict=True))
    except OSError as error:
        raise BaseError(
            f"base.repo: {error.filename or path} cannot be read: {error.strerror or error}; see that this user may "
            "read the base's files"
        ) from error
    commit = None if folder else path.name
    return Source(base.repo if folder is None else str(folder), path, commit, hashes)


def _names_code(folder: Path) -> bool:
    """Return whether a base has Python files that transformers runs if it may.

    Raises:
        BaseError: They are in another repository, so neither its revision nor its files are those of the base.
    """
    paths = [folder / name for name in ("config.json", "tokenizer_config.json") if (folder / name).is_file()]
    found = {path: str(code) for path in paths if (code := read_json(path).get("auto_map"))}
    for path, code in found.items():
        if "--" in code:
            raise BaseError(
                f"{path}: it takes Python files from another repository on the Hub, which may change at any time "
                f"({code}); copy them into this folder, and name them without the repository"
            )
    return bool(found)


def pinned_base(recipe: Recipe, commit: str | None, name: str, *, base: Path | None = None) -> tuple[Base, Path | None]:
    """Return the arguments of `locate` for the base on which a checkpoint was trained.

    Args:
        recipe: The checkpoint's recipe.
        commit: The base's commit on the Hub, from the checkpoint's manifest; None for a local folder.
        name: The base's name in adapter_config.json.
        base: A folder to use instead.

    Returns:
        The recipe's section with that commit as revision, and the local folder or None.

    Raises:
        BaseError: The base was a local folder on another machine, and `base` is None.
    """
    if base is not None:
        return recipe.base, base
    if commit is not None:
        return recipe.base.model_copy(update={"revision": commit}), None
    if recipe.base.repo.startswith(BUILTIN):
        return recipe.base, resolve_path(recipe, recipe.base.repo)
    if not Path(name).is_absolute():
        raise BaseError(
            f"base {name}: it was a local folder on another machine, and is not on the Hub; name its folder here: "
            "--base-path FOLDER, in Python base=FOLDER"
        )
    return recipe.base, Path(name)


def base_folder(base: Base, folder: Path | None, *, weights: bool = True, offline: bool = False) -> Path:
    """Return the folder with a base's files, after downloading them if necessary.

    Args:
        base: The recipe's section.
        folder: The base's local folder; None if `base.repo` is a Hub name.
        weights: Whether to download the weights as well as configuration and tokenizer.
        offline: Whether to use only files that are already in the local cache of the Hub.

    Raises:
        BaseError: The folder or repository does not exist, has no config.json, or has an adapter beside the base.
    """
    path = folder or _download(base, SMALL_FILES, base.revision, offline=offline)
    if not (path / "config.json").is_file():
        raise BaseError(f"base.repo: {base.repo} has no config.json ({path}); expected a model folder or a Hub name")
    if folder is None and weights:  # the weights of the commit found above, even if the branch has moved since
        _download(base, [WEIGHTS], path.name, offline=offline)
        _download(base, weight_files(path), path.name, offline=offline)
    if (path / ADAPTER_CONFIG).is_file():
        stray = ", ".join(sorted(file.name for file in path.glob("adapter_*")))
        raise BaseError(
            f"base.repo: {path} also has an adapter ({stray}), which transformers would load as a part of the base; "
            "move these files to a folder of their own, or merge the adapter into the base first"
        )
    return path


def _download(base: Base, names: list[str], revision: str | None, *, offline: bool) -> Path:
    """Download files of the repository's top folder and return the folder with them."""
    try:
        return Path(
            snapshot_download(
                base.repo,
                revision=revision,
                allow_patterns=names,
                ignore_patterns=["*/*", "adapter_*"],
                local_files_only=offline,
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        where = f"base.repo: {base.repo} (revision {base.revision or 'main'}) is not a local folder and"
        if offline:
            raise BaseError(f"{where} not in the Hub's local cache") from error
        reason = str(error).strip().splitlines()[0]
        raise BaseError(
            f"{where} cannot be downloaded from the Hub: {reason}; check the name, the network and, for a gated model, "
            "`hf auth login`"
        ) from error


def reason_of(error: Exception, advice: str) -> str:
    """Return why transformers cannot load a part of a base, and `advice`; an error about Python files has its own."""
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return (
            "it needs Python files of its own, which run only with base.trust_remote_code=true in the recipe, or "
            "--trust-remote-code for a checkpoint; read them first"
        )
    return f"{text.splitlines()[0]}; {advice}"


def file_hash(path: Path) -> str:
    """Return a file's SHA-256, remembered by path, size, times and inode, because a base is large.

    A file in this user's cache of the Hub whose name is its SHA-256 is not read.
    """
    real = path.resolve()
    stat = real.stat()
    own = Path(constants.HF_HUB_CACHE).resolve() in real.parents and stat.st_uid == os.getuid()
    if own and not stat.st_mode & 0o022 and re.fullmatch("blobs/[0-9a-f]{64}", f"{real.parent.name}/{real.name}"):
        return real.name
    return remembered_sha256(real)
