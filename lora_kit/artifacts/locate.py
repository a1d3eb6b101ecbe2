"""Where a checkpoint is: a folder, the newest of a run, or a download from the Hub."""

from pathlib import Path

from huggingface_hub import get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from lora_kit.artifacts.hub_errors import FAILURES, reason_of
from lora_kit.errors import CheckpointError, HubError
from lora_kit.recipe.schema import HUB_NAME
from lora_kit.runs import store
from lora_kit.runs.manifest import MANIFEST, read_manifest


def checkpoint_at(path: str | Path) -> Path:
    """Return a checkpoint's folder as it is, of a run its newest that verifies, of a Hub name its download.

    Raises:
        CheckpointError: No checkpoint there verifies.
        HubError: A Hub name that is not there, or cannot be had.
    """
    name, _, revision = str(path).partition("@")
    if not Path(path).exists() and HUB_NAME.fullmatch(name):
        return fetch(name, revision=revision or None)
    if (Path(path) / MANIFEST).exists():
        return Path(path)
    found = store.find(Path(path)).latest
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint here verifies; train first, or see `lora-kit verify {path}`")
    return found.path


def fetch(name: str, *, revision: str | None = None) -> Path:
    """Download an adapter that `push` published, or take it from the Hub's local cache; return its folder.

    Raises:
        HubError: It is not there, cannot be had, was not published by lora_kit, or wants to run code.
    """
    where = f"{name}: no folder here, and on the Hub"
    try:
        path = Path(hf_hub_download(name, MANIFEST, revision=revision))
        manifest = read_manifest(path)
        folder = Path(snapshot_download(name, revision=path.parent.name, allow_patterns=[MANIFEST, *manifest.files]))
        foreign_code = manifest.run.recipe["base"]["trust_remote_code"]
    except RemoteEntryNotFoundError:
        raise HubError(
            f"{where} it has no {MANIFEST}, so lora_kit did not make it; load it with "
            f'peft.AutoPeftModelForCausalLM.from_pretrained("{name}")'
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{where} it has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise HubError(f"{where} not found; check the name and, if it is private, `hf auth login`") from None
    except FAILURES as error:
        reason, _ = reason_of(error, get_token())
        raise HubError(f"{where} not to be had: {reason}") from None
    if foreign_code:
        raise HubError(
            f"{name}: asks to run the Python files of its base's repository; if you trust them, load it from {folder}"
        )
    return folder
