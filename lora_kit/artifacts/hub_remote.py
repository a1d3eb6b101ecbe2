"""Copies of checkpoints in a repository of the Hugging Face Hub: `hf://user/name` or `hf://user/name@branch`.

A commit of the branch is a copy. It has a checkpoint's files and its manifest at the top, so `peft`, transformers and
`lora-kit generate user/name@branch` read the newest. A commit is atomic, and earlier commits are the older copies.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from lora_kit.artifacts.hub_errors import FAILURES, reason_of
from lora_kit.errors import CheckpointError, HubError, InputError
from lora_kit.runs import remote, store
from lora_kit.runs.manifest import MANIFEST, read_manifest
from lora_kit.runs.remote import Copy, Parcel, require_newer

PROTOCOL = "hf://"
NO_TOKEN = "not found without a valid token for the Hub; log in with `hf auth login` or set HF_TOKEN"
SECONDS = 60.0  # between the starts of two uploads: the Hub limits the commits of an hour


class HubRemote:
    """A `Remote` in a repository of the Hub."""

    def __init__(self, url: str) -> None:
        self.url, self.interval, self.damaged = url.rstrip("/"), SECONDS, dict[str, str]()
        self._repo, _, branch = self.url.removeprefix(PROTOCOL).partition("@")
        self._branch = branch or None

    def _api(self) -> HfApi:
        return HfApi(token=get_token())

    def copies(self, most: int) -> list[Copy]:
        """Return the checkpoints of the newest commits, newest first; each is read once."""
        self.damaged.clear()
        try:
            if most == 1:
                commits = [str(self._api().repo_info(self._repo, revision=self._branch).sha)]
            else:
                commits = [one.commit_id for one in self._api().list_repo_commits(self._repo, revision=self._branch)]
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if get_token() is None or error.response.status_code == 401:  # it may be there, and private
                raise HubError(f"{self.url}: {NO_TOKEN}") from None
            return []
        found = dict[bytes, Copy]()
        for commit in commits:
            if len(found) == most:
                break
            try:
                path = Path(hf_hub_download(self._repo, MANIFEST, revision=commit))
                content = path.read_bytes()
                manifest = read_manifest(path)
                if store.OPTIMIZER in manifest.files:  # else it was published by `push`
                    found.setdefault(content, Copy(commit, manifest, content))
            except RemoteEntryNotFoundError:
                continue
            except CheckpointError as error:
                self.damaged[commit] = str(error)
        return list(found.values())

    def upload(self, parcel: Parcel, require: Callable[[], None], *, again: bool) -> None:
        """Create the repository, always private, and the branch if they do not exist, and commit all files at once."""
        api, step = self._api(), parcel.manifest.progress.step
        if api.token is None:
            raise HubError(f"{self.url}: {NO_TOKEN}")
        api.create_repo(self._repo, private=True, exist_ok=True)
        if self._branch is not None:
            api.create_branch(self._repo, branch=self._branch, exist_ok=True)
        before = api.repo_info(self._repo, revision=self._branch)
        if not before.private:
            raise InputError(
                f"{self.url}: the repository is public, but checkpoints name paths of this machine; make it private on "
                "the Hub, or choose another"
            )
        newest = next(iter(self.copies(1)), None)
        if newest is not None and newest.content == parcel.content:
            return  # the answer to the commit was lost
        require_newer(parcel.manifest, newest, self.url)
        files: dict[str, str | bytes] = {**parcel.files, MANIFEST: parcel.content}
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        require()
        api.create_commit(
            self._repo,
            operations,
            commit_message=f"Checkpoint of step {step}",
            revision=self._branch,
            parent_commit=before.sha,
        )

    def prune(self, keep: int, leftover: str | None, require: Callable[[], None]) -> None:
        """Delete nothing: old copies are the history of the branch."""

    def download(self, copy: Copy, folder: Path) -> None:
        """Write the files of a commit into a folder.

        Raises:
            CheckpointError: The commit lacks a file that the manifest names.
        """
        for name in copy.manifest.files:
            try:
                shutil.copyfile(hf_hub_download(self._repo, name, revision=copy.name), folder / name)
            except RemoteEntryNotFoundError:
                raise CheckpointError(f"{name}: missing in commit {copy.name}") from None

    def describe(self, error: Exception) -> tuple[str, bool]:
        """Return an error as text without secrets, and whether a repetition may succeed."""
        return reason_of(error, get_token()) if isinstance(error, FAILURES) else remote.describe(error)
