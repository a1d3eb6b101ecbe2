"""Find the checkpoint that a path names (its folder, a run, a Hub repository, a URL), and read its recipe."""

import warnings
from pathlib import Path

from huggingface_hub import get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from lora_kit.artifacts.hub_errors import FAILURES, reason_of
from lora_kit.artifacts.hub_remote import PROTOCOL
from lora_kit.artifacts.remotes import fetch_url
from lora_kit.data.urls import is_url
from lora_kit.errors import BaseError, CheckpointError, HubError
from lora_kit.recipe.schema import HUB_NAME, Recipe
from lora_kit.runs import store
from lora_kit.runs.manifest import MANIFEST, read_manifest
from lora_kit.runs.run import Run


def checkpoint_at(path: str | Path, *, plain: bool = False) -> Path:
    """Return the folder of a checkpoint.

    Args:
        path: A checkpoint's folder; a run's folder, for its newest valid checkpoint; or a Hub name `user/name` or
            `user/name@revision` or the URL of a `checkpoint.remote` or of a checkpoint in it, which are downloaded.
        plain: Whether the path may also name a PEFT adapter that lora_kit did not train.

    Raises:
        CheckpointError: The run has no valid checkpoint, or lora_kit did not train the adapter.
        HubError: The Hub name does not exist or cannot be downloaded.
        RemoteError: There is no valid checkpoint at the URL.
    """
    text = str(path)
    if is_url(text) and not text.startswith(PROTOCOL):
        return fetch_url(text, tell=warnings.warn)
    name, _, revision = text.removeprefix(PROTOCOL).partition("@")
    if not Path(path).exists() and HUB_NAME.fullmatch(name):
        return fetch(name, revision=revision or None, plain=plain)
    if (Path(path) / MANIFEST).exists():
        return Path(path)
    if (Path(path) / store.ADAPTER_CONFIG).exists():
        if plain:
            return Path(path)
        raise CheckpointError(f"{path}: it has no {MANIFEST}, so {_not_ours(path)}")
    return Run(Path(path)).latest


def _not_ours(path: str | Path) -> str:
    return (
        f"lora_kit did not train it; `lora-kit train --from {path}` begins a run with it, and "
        f'peft.AutoPeftModelForCausalLM.from_pretrained("{path}") loads it'
    )


def fetch(name: str, *, revision: str | None = None, plain: bool = False) -> Path:
    """Download an adapter that `push` published, if it is not in the Hub's local cache, and return its folder.

    Args:
        name: The repository, `user/name`.
        revision: A branch, tag or commit; None takes the default branch.
        plain: Whether it may be a PEFT adapter that lora_kit did not publish.

    Raises:
        HubError: The repository or revision does not exist, the download fails, or lora_kit did not publish it.
    """
    where = f"{name}: not a local folder; the Hub repository"
    try:
        path = Path(hf_hub_download(name, MANIFEST, revision=revision))
        manifest = read_manifest(path)
        return Path(snapshot_download(name, revision=path.parent.name, allow_patterns=[MANIFEST, *manifest.files]))
    except RemoteEntryNotFoundError:
        if plain:
            return _fetch_plain(name, revision)
        raise HubError(f"{where} has no {MANIFEST}, so {_not_ours(name)}") from None
    except RevisionNotFoundError:
        raise HubError(f"{where} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise HubError(f"{where} was not found; check the name and, if it is private, `hf auth login`") from None
    except FAILURES as error:
        reason, _ = reason_of(error, get_token())
        raise HubError(f"{where} cannot be downloaded: {reason}") from None


def _fetch_plain(name: str, revision: str | None) -> Path:
    try:
        for file in (store.ADAPTER_CONFIG, store.ADAPTER):
            path = Path(hf_hub_download(name, file, revision=revision))
    except FAILURES as error:
        reason, _ = reason_of(error, get_token())
        raise HubError(f"{name}: the Hub repository has no {file} that can be downloaded: {reason}") from None
    return path.parent


def recipe_of(checkpoint: store.Checkpoint, *, trust_remote_code: bool) -> Recipe:
    """Return the recipe of a checkpoint, in which the caller decides whether the base may run Python files.

    Raises:
        BaseError: The checkpoint was trained on such a base, and the caller does not allow it.
        CheckpointError: The recipe is not of this version.
    """
    recipe = checkpoint.recipe
    if recipe.base.trust_remote_code and not trust_remote_code:
        raise BaseError(
            f"{checkpoint.path}: it was trained with base.trust_remote_code, which runs Python files from the base "
            f"{recipe.base.repo}; if you have read and trust them: --trust-remote-code, in Python "
            "trust_remote_code=True"
        )
    base = recipe.base.model_copy(update={"trust_remote_code": trust_remote_code})
    return recipe.model_copy(update={"base": base})
