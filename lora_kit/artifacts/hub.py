"""The Hub: a checkpoint goes there in one commit, and comes back as a checkpoint that verifies.

What is published is a checkpoint's folder without the optimizer, with the tokenizer, the recipe and a card, under a
manifest of its own; so what comes back is read by the same code as any other checkpoint. Equal checkpoints make equal
files, so a push may be repeated at any time: what is there already is not committed again.
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
from lora_kit.artifacts.hub_errors import FAILURES, TOKEN, reason_of, scrub
from lora_kit.artifacts.locate import checkpoint_at
from lora_kit.errors import BaseError, HubError, InputError, LoraKitError
from lora_kit.model.source import Source, base_folder, file_hash, pinned_base
from lora_kit.model.tokenizer import load_renderer, set_up_tokenizer
from lora_kit.recipe.load import PATHS, as_yaml
from lora_kit.recipe.schema import HUB_NAME, Recipe
from lora_kit.runs import store
from lora_kit.runs.journal import Journal
from lora_kit.runs.manifest import MANIFEST, FileEntry, manifest_bytes
from lora_kit.runs.run import Run
from lora_kit.views.console import Console

CARD, RECIPE = "README.md", "recipe.yaml"
PAUSES = (2.0, 10.0)  # seconds before a push is repeated by itself
HERE_ONLY = ("is_local", "local_files_only")  # what transformers notes about this machine in tokenizer_config.json


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub.

    Attributes:
        repo: The repository.
        revision: The branch, None for the main one.
        commit: Its newest commit.
        made: Whether this push made that commit; False if everything was there already.
        url: Where a person can look at it.
    """

    repo: str
    revision: str | None
    commit: str
    made: bool
    url: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def push(
    path: str | Path,
    to: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pause: Callable[[float], object] = time.sleep,
) -> Pushed:
    """Publish an adapter in one commit: weights, configuration, tokenizer, template, recipe and a model card.

    A fault that may pass (too many requests, another commit in between, a cut connection) is met by two more tries.

    Args:
        path: A checkpoint, or a run for its newest valid one.
        to: `user/name`; the repository is made if there is none.
        private: Make it private; refused if it is there and public.
        revision: A branch, made if there is none; by default the main one.
        pause: Waits so many seconds between two tries; a true result gives up.

    Raises:
        HubError: The Hub refused or could not be reached; says how to repeat it.
        CheckpointError: There is no checkpoint that verifies.
        InputError: `to` is no Hub name, the base's tokenizer is not here, or the repository is public.
    """
    if not HUB_NAME.fullmatch(to):
        raise InputError(f"{to!r} is no Hub name; expected user/name, e.g. me/first-adapter")
    files = publication(store.open_checkpoint(checkpoint_at(path)), to, revision=revision)
    options = "".join([" --private" if private else "", f" --revision {revision}" if revision else ""])
    again = f"to repeat it: lora-kit push {path} --to {to}{options} (what is there already is not committed again)"
    token = None
    for seconds in (*PAUSES, None):
        try:
            token = token or get_token()
            if token is None:
                raise HubError(f"{to}: no token here; log in with `hf auth login` or set HF_TOKEN; {again}")
            _refuse_secrets(files, token)
            return _commit(HfApi(token=token), files, to, private=private, revision=revision)
        except FAILURES as error:
            reason, passing = reason_of(error, token)
            if seconds is None or not passing or pause(seconds):
                # without its cause: that names signed addresses, which let anyone write for a while
                raise HubError(f"{to}: {reason}; {again}") from None
    raise AssertionError("the last try returns or raises")


def _commit(api: HfApi, files: Mapping[str, bytes | Path], to: str, *, private: bool, revision: str | None) -> Pushed:
    """Make the repository, the branch and the commit, each only if it is not there."""
    api.create_repo(to, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(to, branch=revision, exist_ok=True)
    before = api.repo_info(to, revision=revision)
    if private and not before.private:
        raise InputError(f"{to}: is there already and public; make it private on the Hub, or push without --private")
    done = api.create_commit(
        to,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message="Adapter trained with lora_kit",
        revision=revision,
        parent_commit=before.sha,
    )
    branch = f"/tree/{revision}" if revision else ""
    return Pushed(to, revision, done.oid, done.oid != before.sha, f"{api.endpoint}/{to}{branch}")


def publication(checkpoint: store.Checkpoint, to: str, *, revision: str | None = None) -> dict[str, bytes | Path]:
    """Return the files of a repository, by name; the weights as a path.

    Raises:
        BaseError: The base's tokenizer is not here, or is no longer the one of the training.
    """
    manifest, facts = checkpoint.manifest, checkpoint.manifest.run
    config = json.loads((checkpoint.path / store.ADAPTER_CONFIG).read_text())
    files = tokenizer_files(checkpoint, config["base_model_name_or_path"])
    public = without_paths(Recipe.model_validate(facts.recipe))
    if facts.fingerprints.base.commit is None:
        config["base_model_name_or_path"] = public["base"]["repo"]  # was the folder's place on this machine
    files[store.ADAPTER_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    files[RECIPE] = as_yaml(public).encode()
    entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    entries[store.ADAPTER] = manifest.files[store.ADAPTER]
    published = replace(manifest, run=replace(facts, recipe=public), files=dict(sorted(entries.items())))
    card = model_card(to, published, revision=revision, scores=_scores(checkpoint))
    texts = {MANIFEST: manifest_bytes(published.to_dict()), CARD: card.encode()}
    return {store.ADAPTER: checkpoint.path / store.ADAPTER, **files, **texts}


def without_paths(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values, in which an absolute path is only its last name."""
    public = recipe.model_dump(mode="json")
    for section, field in PATHS:
        value = public[section][field]
        if isinstance(value, str) and (PurePath(value).is_absolute() or value.startswith("~")):
            public[section][field] = PurePath(value).name
    return public


def tokenizer_files(checkpoint: store.Checkpoint, base_name: str) -> dict[str, bytes]:
    """Return the tokenizer of a checkpoint's training, chat template included, as transformers saves it.

    Raises:
        BaseError: The base is not here, or its tokenizer has changed since the training.
    """
    facts = checkpoint.manifest.run
    recipe = Recipe.model_validate(facts.recipe)
    section, folder = pinned_base(recipe, facts.fingerprints.base.commit, base_name)
    found = base_folder(section, folder, weights=False)
    for name, digest in facts.fingerprints.base.files.items():
        if name.startswith(("tokenizer", "chat_template")) and file_hash(found / name) != digest:
            raise BaseError(f"{found / name}: changed since the training; push from where the base is as it was")
    source = Source(section.repo, found, found.name, {})
    tokenizer = load_renderer(source, recipe, template=facts.template).tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        set_up_tokenizer(tokenizer, recipe, facts.template).save_pretrained(scratch)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    settings = json.loads(files["tokenizer_config.json"])
    kept = {key: value for key, value in settings.items() if key not in HERE_ONLY}
    return files | {"tokenizer_config.json": (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()}


def _scores(checkpoint: store.Checkpoint) -> dict[str, Any] | None:
    """Return what the run measured of this very checkpoint at its end."""
    result = Run(checkpoint.path.resolve().parents[1]).result
    return result["metrics"] if result.get("step") == checkpoint.step else None


def _refuse_secrets(files: Mapping[str, bytes | Path], token: str) -> None:
    for name, data in files.items():
        if isinstance(data, bytes) and (token.encode() in data or TOKEN.search(data.decode(errors="replace"))):
            raise InputError(f"{name}: a Hub token stands in it, so it is not published; take it out of the recipe")


def unready(recipe: Recipe) -> list[str]:
    """Return what a person should know before a run that ends with a push."""
    if recipe.hub.repo is None or get_token() is not None:
        return []
    return [
        f"hub.repo: no token here to push to {recipe.hub.repo} at the end; log in with `hf auth login`, set HF_TOKEN, "
        "or publish the run later with `lora-kit push`"
    ]


def push_finished(
    recipe: Recipe, folder: Path, console: Console, *, pause: Callable[[float], object] = time.sleep
) -> None:
    """Publish a finished run if its recipe says so and it is not published yet; whatever fails is noted and told."""
    hub, journal, latest = recipe.hub, Journal(folder), store.find(folder).latest
    if hub.repo is None or latest is None:
        return
    done = {"step": latest.step, "to": hub.repo, "revision": hub.revision}
    if any(event["kind"] == "pushed" and done.items() <= event.items() for event in journal.read_events()):
        return
    console.tick(f"hub: push to {hub.repo}")
    try:
        pushed = push(folder, hub.repo, private=hub.private, revision=hub.revision, pause=pause)
    except Exception as error:  # the adapter is safe on disk, and the run has done its work
        ours = isinstance(error, LoraKitError)
        what = str(error) if ours else f"{hub.repo}: push failed: {type(error).__name__}: {scrub(str(error), None)}"
        journal.event("fault", what=what, **done)
        console.warn(what)
    else:
        journal.event("pushed", commit=pushed.commit, made=pushed.made, **done)
        console.say(f"pushed to {pushed.url}")
