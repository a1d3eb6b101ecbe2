"""The adapter that a run begins with (`--from`): a checkpoint, or a PEFT adapter that another program trained."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lora_kit.errors import CheckpointError, ContractError
from lora_kit.files import open_regular, read_regular
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import formats, store
from lora_kit.runs.manifest import MANIFEST, BaseFingerprint, Origin
from lora_kit.runs.store import Checkpoint

DEFAULTS: dict[str, Any] = {  # the keys of adapter_config.json with whose other values a run cannot begin
    "bias": "none",
    "fan_in_fan_out": None,
    "layer_replication": None,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "use_dora": False,
}


@dataclass(frozen=True)
class _Config:
    """The keys of adapter_config.json that are read; the targets follow from the tensors."""

    peft_type: Literal["LORA"]
    r: int
    lora_alpha: int | float
    use_rslora: bool = False
    base_model_name_or_path: str | None = None


_CONFIG = TypeAdapter(_Config)


@dataclass(frozen=True)
class PlainAdapter:
    """A PEFT adapter without a manifest, e.g. from TRL.

    Attributes:
        path: Its folder.
        rank: The rank of its matrices.
        alpha: Its scaling, as in the recipe.
        scaling: How the scaling follows from alpha, as in the recipe.
        others: The settings with which a run cannot begin, by their key in adapter_config.json.
        base: The base that adapter_config.json names; it is not verified.
        sha256: The SHA-256 of its weights file.
    """

    path: Path
    rank: int
    alpha: int | float
    scaling: str
    others: dict[str, Any]
    base: str | None
    sha256: str


def open_origin(path: Path) -> Checkpoint | PlainAdapter:
    """Open the adapter that a run begins with.

    Raises:
        CheckpointError: The files are missing, damaged or not a LoRA adapter.
    """
    if (path / MANIFEST).exists():
        return store.open_checkpoint(path)
    config = path / store.ADAPTER_CONFIG
    try:
        data = read_regular(config.resolve(), formats.MOST_BYTES)
        found, content = _CONFIG.validate_json(data), TypeAdapter(dict[str, Any]).validate_json(data)
        with open_regular((path / store.ADAPTER).resolve()) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise CheckpointError(f"{config}: not the configuration of a LoRA adapter: {'; '.join(problems)}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: an adapter needs {store.ADAPTER_CONFIG} and {store.ADAPTER}; pickles are never read: {error}"
        ) from error
    others = {key: content[key] for key, usual in DEFAULTS.items() if content.get(key) and content[key] != usual}
    scaling = "rslora" if found.use_rslora else "plain"
    return PlainAdapter(path, found.r, found.lora_alpha, scaling, others, found.base_model_name_or_path, digest)


def describe(origin: Checkpoint | PlainAdapter) -> Origin:
    """Return the `Origin` that a run records in its manifest if it begins with this adapter."""
    if isinstance(origin, PlainAdapter):
        return Origin(None, None, origin.sha256, hub_name(origin.path))
    manifest = origin.manifest
    return Origin(manifest.run.run_id, origin.step, manifest.files[store.ADAPTER].sha256, hub_name(origin.path))


def begins_with(recorded: Origin | None, origin: Checkpoint | PlainAdapter) -> bool:
    """Return whether a run has begun with this adapter, wherever the adapter lay then."""
    return recorded is not None and replace(describe(origin), hub=recorded.hub) == recorded


def hub_name(folder: Path) -> str | None:
    """Return `user/name@commit` of a folder in the Hub's local cache; None for another folder."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/', 1)}@{folder.name}"


def enforce_origin(origin: Checkpoint | PlainAdapter, recipe: Recipe, fingerprint: BaseFingerprint) -> None:
    """Refuse to begin with an adapter that was trained on another base or has other adapter settings.

    The base of an adapter that another program trained is not known; that the tensors fit is checked when they are
    loaded.

    Raises:
        ContractError: The base or a setting differs; the message names each difference.
        CheckpointError: The recipe of the checkpoint is not of this version.
    """
    now = recipe.model_dump(mode="json")["adapter"]
    problems = []
    if isinstance(origin, PlainAdapter):
        then: dict[str, Any] = {"rank": origin.rank, "alpha": origin.alpha, "scaling": origin.scaling}
        then |= {"rank_pattern": {}, "alpha_pattern": {}}  # peft's patterns cannot be compared, so they are in `others`
        problems = [
            f"{key}: {value} in the adapter, with which no run can begin" for key, value in origin.others.items()
        ]
    else:
        then = origin.recipe.model_dump(mode="json")["adapter"]
        if not origin.manifest.run.fingerprints.base.same_files(fingerprint):
            problems.append("base: the checkpoint was trained on a base with other files")
    changed = [key for key in then if key != "dropout" and then[key] != now[key]]
    settings = [f"adapter.{key}: {then[key]} in the checkpoint, {now[key]} in the recipe" for key in changed]
    if settings or problems:
        raise ContractError("\n  ".join([f"{origin.path}: this run cannot begin with it:", *settings, *problems]))
