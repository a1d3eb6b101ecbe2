"""Find the checkpoint that a path names: a checkpoint's folder, a run, or a Hub repository."""

from pathlib import Path

from huggingface_hub import get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from lora_kit.artifacts.hub_errors import FAILURES, reason_of
from lora_kit.errors import HubError
from lora_kit.recipe.schema import HUB_NAME
from lora_kit.runs import store
from lora_kit.runs.manifest import MANIFEST, read_manifest
from lora_kit.runs.run import Run


def checkpoint_at(path: str | Path) -> Path:
    """Return the folder of a checkpoint.

    Args:
        path: A checkpoint's folder; a run's folder, for its newest valid checkpoint; or a Hub name `user/name`
            or `user/name@revision`, which is downloaded.

    Raises:
        CheckpointError: The run has no valid checkpoint.
        HubError: The Hub name does not exist or cannot be downloaded.
    """
    name, _, revision = str(path).partition("@")
    if not Path(path).exists() and HUB_NAME.fullmatch(name):
        return fetch(name, revision=revision or None)
    if (Path(path) / MANIFEST).exists():
        return Path(path)
    return Run(Path(path)).latest


def fetch(name: str, *, revision: str | None = None) -> Path:
    """Download an adapter that `push` published, if it is not in the Hub's local cache, and return its folder.

    Args:
        name: The repository, `user/name`.
        revision: A branch, tag or commit; None takes the default branch.

    Raises:
        HubError: The repository or revision does not exist, the download fails, or lora_kit did not publish it. Also if
            the adapter's base needs `trust_remote_code`: then only its downloaded folder can be loaded.
    """
    where = f"{name}: not a local folder; the Hub repository"
    try:
        path = Path(hf_hub_download(name, MANIFEST, revision=revision))
        manifest = read_manifest(path)
        folder = Path(snapshot_download(name, revision=path.parent.name, allow_patterns=[MANIFEST, *manifest.files]))
        remote_code = store.Checkpoint(folder, manifest).recipe.base.trust_remote_code
    except RemoteEntryNotFoundError:
        raise HubError(
            f"{where} has no {MANIFEST}, so lora_kit did not publish it; load it with "
            f'peft.AutoPeftModelForCausalLM.from_pretrained("{name}")'
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{where} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise HubError(f"{where} was not found; check the name and, if it is private, `hf auth login`") from None
    except FAILURES as error:
        reason, _ = reason_of(error, get_token())
        raise HubError(f"{where} cannot be downloaded: {reason}") from None
    if remote_code:
        raise HubError(
            f"{name}: its base needs Python files from the base's repository; if you trust them, load it from {folder}"
        )
    return folder
