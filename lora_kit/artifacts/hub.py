"""Publish a checkpoint on the Hugging Face Hub in a single commit.

The published files are a checkpoint without optimizer state, plus tokenizer, recipe and model card, with a manifest of
their own. A downloaded repository is therefore verified and loaded like any other checkpoint. The files depend only on
the checkpoint, so a push can be repeated at any time; a push of unchanged files makes no commit.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from lora_kit.artifacts.card import model_card
from lora_kit.artifacts.hub_errors import FAILURES, reason_of
from lora_kit.artifacts.locate import checkpoint_at, recipe_of
from lora_kit.errors import TOKEN, BaseError, HubError, InputError, LoraKitError, scrub
from lora_kit.model.source import Source, base_folder, file_hash, pinned_base
from lora_kit.model.tokenizer import load_renderer, set_up_tokenizer
from lora_kit.recipe.load import as_yaml, change_paths
from lora_kit.recipe.schema import HUB_NAME, Recipe
from lora_kit.runs import store
from lora_kit.runs.certificate import certificate_of
from lora_kit.runs.journal import Journal
from lora_kit.runs.manifest import MANIFEST, FileEntry, manifest_bytes
from lora_kit.runs.run import Run
from lora_kit.views.console import Console

CARD, RECIPE = "README.md", "recipe.yaml"
RETRY_PAUSES = (2.0, 10.0)  # seconds before the first and the second retry
LOCAL_SETTINGS = ("is_local", "local_files_only")  # local settings that transformers writes to tokenizer_config.json


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        repo: The repository, `user/name`.
        revision: The branch; None for the default branch.
        commit: The newest commit of the branch.
        made: Whether this push made the commit; False if the files were already there.
        url: The page of the branch.
    """

    repo: str
    revision: str | None
    commit: str
    made: bool
    url: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def push(
    path: str | Path,
    to: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    pause: Callable[[float], object] = time.sleep,
) -> Pushed:
    """Publish an adapter in a single commit: weights, configuration, tokenizer, template, recipe and model card.

    Transient errors (too many requests, a concurrent commit, a lost connection) are retried twice.

    Args:
        path: A checkpoint, or a run for its newest valid checkpoint.
        to: The repository, `user/name`; it is created if it does not exist.
        private: Whether to create it as private. An existing public repository is then an error.
        revision: The branch; it is created if it does not exist. None takes the default branch.
        base: The base's folder, if it is not where it was in training.
        trust_remote_code: Whether the base's tokenizer may run Python files of the base.
        pause: Called with the seconds to wait before a retry. If it returns a true value, there is no retry.

    Raises:
        HubError: There is no token, or the Hub refused or could not be reached; the message says how to repeat the
            push.
        CheckpointError: There is no valid checkpoint.
        InputError: `to` is not a Hub name, the base's tokenizer is missing, a file contains a token, or the repository
            is public.
    """
    if not HUB_NAME.fullmatch(to):
        raise InputError(f"{to!r} is not a Hub name; expected user/name, e.g. me/first-adapter")
    checkpoint = store.open_checkpoint(checkpoint_at(path))
    recipe = recipe_of(checkpoint, trust_remote_code=trust_remote_code)
    files = publication(checkpoint, recipe, to, base=Path(base) if base else None, revision=revision)
    options = "".join([" --private" if private else "", f" --revision {revision}" if revision else ""])
    options += (f" --base-path {base}" if base else "") + (" --trust-remote-code" if trust_remote_code else "")
    again = f"to repeat the push: lora-kit push {path} --to {to}{options}"
    token = None
    for seconds in (*RETRY_PAUSES, None):
        try:
            token = token or get_token()
            if token is None:
                raise HubError(
                    f"{to}: no token for the Hub was found; log in with `hf auth login` or set HF_TOKEN; {again}"
                )
            _refuse_secrets(files, token)
            return _commit(HfApi(token=token), files, to, private=private, revision=revision)
        except FAILURES as error:
            reason, transient = reason_of(error, token)
            if seconds is None or not transient or pause(seconds):
                # from None: the original error contains signed URLs, which allow anyone to write for some time
                raise HubError(f"{to}: {reason}; {again}") from None
    raise AssertionError("the last attempt returns or raises")


def _commit(api: HfApi, files: Mapping[str, bytes | Path], to: str, *, private: bool, revision: str | None) -> Pushed:
    """Create the repository and the branch if they do not exist, and commit the files if they changed."""
    api.create_repo(to, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(to, branch=revision, exist_ok=True)
    before = api.repo_info(to, revision=revision)
    if private and not before.private:
        raise InputError(
            f"{to}: the repository exists and is public; make it private on the Hub, or push without --private"
        )
    done = api.create_commit(
        to,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message="Adapter trained with lora_kit",
        revision=revision,
        parent_commit=before.sha,
    )
    branch = f"/tree/{revision}" if revision else ""
    return Pushed(to, revision, done.oid, done.oid != before.sha, f"{api.endpoint}/{to}{branch}")


def publication(
    checkpoint: store.Checkpoint, recipe: Recipe, to: str, *, base: Path | None = None, revision: str | None = None
) -> dict[str, bytes | Path]:
    """Return the files to publish by name: their content, or for the weights the path.

    Args:
        checkpoint: The checkpoint.
        recipe: Its recipe, from `recipe_of`.
        to: The repository, for the model card.
        base: The base's folder, if it is not where it was in training.
        revision: The branch, for the model card.

    Raises:
        BaseError: The base's tokenizer is missing or differs from that of the training.
    """
    manifest, facts = checkpoint.manifest, checkpoint.manifest.run
    config = json.loads((checkpoint.path / store.ADAPTER_CONFIG).read_text())
    files = tokenizer_files(checkpoint, recipe, config["base_model_name_or_path"], base=base)
    public = without_paths(checkpoint.recipe)
    if facts.fingerprints.base.commit is None:
        config["base_model_name_or_path"] = public["base"]["repo"]  # replaces a path on this machine
    files[store.ADAPTER_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    files[RECIPE] = as_yaml(public).encode()
    entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    entries[store.ADAPTER] = manifest.files[store.ADAPTER]
    published = replace(manifest, run=replace(facts, recipe=public), files=dict(sorted(entries.items())))
    drill = certificate_of(checkpoint.path.resolve().parents[1], checkpoint.recipe)
    card = model_card(to, published, revision=revision, scores=_scores(checkpoint), drill=drill)
    texts = {MANIFEST: manifest_bytes(published.to_dict()), CARD: card.encode()}
    return {store.ADAPTER: checkpoint.path / store.ADAPTER, **files, **texts}


def without_paths(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON values, with absolute paths shortened to their last component."""
    public = recipe.model_dump(mode="json")
    change_paths(
        public,
        lambda text: PurePath(text).name if PurePath(text).is_absolute() or text.startswith("~") else text,
    )
    public["checkpoint"]["remote"] = None  # else a stranger's run would look for its checkpoints there
    return public


def tokenizer_files(
    checkpoint: store.Checkpoint, recipe: Recipe, base_name: str, *, base: Path | None = None
) -> dict[str, bytes]:
    """Return the files of the tokenizer of a checkpoint's training, with its chat template, as transformers saves it.

    Args:
        checkpoint: The checkpoint.
        recipe: Its recipe, from `recipe_of`.
        base_name: The base's name in adapter_config.json.
        base: The base's folder, if it is not where it was in training.

    Raises:
        BaseError: The base is missing, or its tokenizer changed after the training.
    """
    facts = checkpoint.manifest.run
    section, folder = pinned_base(recipe, facts.fingerprints.base.commit, base_name, base=base)
    path = base_folder(section, folder, weights=False)
    for name, digest in facts.fingerprints.base.files.items():
        if name.startswith(("tokenizer", "chat_template")) and file_hash(path / name) != digest:
            raise BaseError(
                f"{path / name}: the file changed after the training; push from a machine with the original base"
            )
    source = Source(section.repo, path, path.name, {})
    tokenizer = load_renderer(source, recipe, template=facts.template).tokenizer
    with tempfile.TemporaryDirectory() as temporary:
        set_up_tokenizer(tokenizer, recipe, facts.template).save_pretrained(temporary)
        files = {file.name: file.read_bytes() for file in sorted(Path(temporary).iterdir())}
    settings = json.loads(files["tokenizer_config.json"])
    kept = {key: value for key, value in settings.items() if key not in LOCAL_SETTINGS}
    return files | {"tokenizer_config.json": (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()}


def _scores(checkpoint: store.Checkpoint) -> dict[str, Any] | None:
    """Return the scores of the run's result if they are of this checkpoint, otherwise None."""
    result = Run(checkpoint.path.resolve().parents[1]).result
    return result["metrics"] if result.get("step") == checkpoint.step else None


def _refuse_secrets(files: Mapping[str, bytes | Path], token: str) -> None:
    for name, data in files.items():
        if isinstance(data, bytes) and (token.encode() in data or TOKEN.search(data.decode(errors="replace"))):
            raise InputError(
                f"{name}: the file contains a Hub token, so it is not published; remove the token from the recipe"
            )


def push_notes(recipe: Recipe) -> list[str]:
    """Return a warning if the run will end with a push but no token for the Hub is found; otherwise an empty list."""
    if recipe.hub.repo is None or get_token() is not None:
        return []
    return [
        f"hub.repo: no token was found for the push to {recipe.hub.repo} after the run; log in with `hf auth login`, "
        "set HF_TOKEN, or publish the run later with `lora-kit push`"
    ]


def push_finished(
    recipe: Recipe, folder: Path, console: Console, *, pause: Callable[[float], object] = time.sleep
) -> None:
    """Publish the last checkpoint of a finished run if its recipe says so and it was not published yet.

    An error does not fail the run: it is written to events.jsonl and printed as a warning.

    Args:
        recipe: The recipe of the run.
        folder: The run's folder.
        console: Prints progress and the result.
        pause: As for `push`.
    """
    hub, journal, latest = recipe.hub, Journal(folder), store.find(folder).latest
    if hub.repo is None or latest is None:
        return
    target = {"step": latest.step, "to": hub.repo, "revision": hub.revision}
    if any(event["kind"] == "pushed" and target.items() <= event.items() for event in journal.read_events()):
        return
    console.tick(f"hub: push to {hub.repo}")
    try:
        pushed = push(
            folder,
            hub.repo,
            private=hub.private,
            revision=hub.revision,
            trust_remote_code=recipe.base.trust_remote_code,
            pause=pause,
        )
    except Exception as error:  # the checkpoint is on disk, so the run succeeded
        message = str(error)
        if not isinstance(error, LoraKitError):
            message = f"{hub.repo}: push failed: {type(error).__name__}: {scrub(message, None)}"
        journal.event("fault", what=message, **target)
        console.warn(message)
    else:
        journal.event("pushed", commit=pushed.commit, made=pushed.made, **target)
        console.say(f"pushed to {pushed.url}")
