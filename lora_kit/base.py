"""The frozen base: find it, name it by a hash, load it, and find out whether it can train packed examples.

A base is read-only input. It is never saved again: a checkpoint holds its fingerprint and resumes on no other.
"""

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lora_kit.data.packing import MicroBatch
from lora_kit.data.template import Renderer
from lora_kit.errors import BaseError, DataError
from lora_kit.objective import model_inputs
from lora_kit.recipe import Base, Recipe, resolve_path

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # leaks measure 0.4 and more, rounding 1e-6 and 1e-2


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
    def fingerprint(self) -> dict[str, Any]:
        """What a manifest keeps: equal fingerprints mean equal bytes."""
        return {"commit": self.commit, "files": self.files}


def locate(base: Base, folder: Path | None) -> Source:
    """Find a base, download it if it is a Hub name, and fingerprint its files.

    Args:
        base: The recipe's section.
        folder: Where it lies if it is no Hub name.

    Raises:
        BaseError: There is no such folder or repository, or it holds no weights.
    """
    found = folder or _download(base)
    if not (found / "config.json").is_file():
        raise BaseError(f"base.repo: {base.repo} has no config.json ({found}); expected a model folder or a Hub name")
    names = {path.name for pattern in WANTED for path in found.glob(pattern)}
    if not any(name.endswith(".safetensors") for name in names):
        raise BaseError(f"base.repo: {base.repo} has no .safetensors weights; lora_kit opens no pickled ones")
    hashes = {name: file_hash(found / name) for name in sorted(names)}
    return Source(base.repo if folder is None else str(folder), found, None if folder else found.name, hashes)


def _download(base: Base) -> Path:
    try:
        return Path(snapshot_download(base.repo, revision=base.revision, allow_patterns=WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseError(
            f"base.repo: {base.repo} (revision {base.revision or 'main'}) is no folder here and cannot be had from the "
            f"Hub: {reason}; check the name, the network and, for a gated model, `hf auth login`"
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
    remembered = Path(platformdirs.user_cache_dir("lora_kit")) / "sha256" / key
    if remembered.is_file() and len(known := remembered.read_text()) == 64:
        return known
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    remembered.parent.mkdir(parents=True, exist_ok=True)
    partial = remembered.with_suffix(f".{os.getpid()}")
    partial.write_text(digest)
    partial.replace(remembered)
    return digest


def load_renderer(source: Source, recipe: Recipe, *, template: str | None = None) -> Renderer:
    """Load the base's tokenizer, with the chat template and the stop token that the recipe names.

    Args:
        source: The base.
        recipe: Says how examples become tokens.
        template: The text of a chat template that replaces the one the recipe names.

    Raises:
        BaseError: The tokenizer's files do not load.
        DataError: The template's file does not exist.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=recipe.base.trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseError(f"base.repo: the tokenizer in {source.folder} does not load: {reason}") from error
    if template is None and recipe.data.template is not None:
        path = resolve_path(recipe, recipe.data.template)
        if path is None or not path.is_file():
            raise DataError(f"data.template: no file {recipe.data.template}; expected a jinja file beside the recipe")
        template = path.read_text()
    return Renderer(tokenizer, template, train_on=recipe.objective.train_on, stop_token=recipe.base.stop_token)


def load_base(source: Source, base: Base, device: torch.device) -> nn.Module:
    """Load the frozen base in the recipe's dtype onto a device, with its own dropouts off.

    Raises:
        BaseError: transformers cannot load it.
    """
    transformers_logging.disable_progress_bar()
    # peft still asks for the name that transformers 6 drops; can go with peft 0.22
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=base.trust_remote_code)
        for name, value in config.to_dict().items():
            if re.search(r"dropout|pdrop|_drop$", name) and isinstance(value, float):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=getattr(torch, base.dtype),
            attn_implementation=None if base.attention == "auto" else base.attention,
            trust_remote_code=base.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseError(f"base.repo: {source.name} does not load: {reason}") from error
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to(device).requires_grad_(False)


@torch.no_grad()
def leaks_when_packed(model: nn.Module, vocabulary: int, device: torch.device) -> bool:
    """Return whether examples packed into one row touch each other in this model.

    Two examples together are compared with each alone; only the model itself can tell. A model that takes no position
    ids counts as leaking.
    """
    first, second = (np.arange(start, start + length) * 7 % vocabulary for start, length in ((3, 17), (5, 30)))
    together = _probe([first, second])
    try:
        logits = model(**model_inputs(together, device)).logits[0]
    except TypeError:
        return True
    start = 0
    for example in (first, second):
        alone = model(**model_inputs(_probe([example]), device)).logits[0]
        difference = (logits[start : start + len(example)] - alone).abs().max() / alone.abs().max()
        if not difference <= PROBE_TOLERANCE[alone.dtype]:
            return True
        start += len(example)
    return False


def _probe(examples: list[np.ndarray]) -> MicroBatch:
    ids = np.concatenate(examples)[None]
    position_ids = np.concatenate([np.arange(len(example)) for example in examples])[None]
    return MicroBatch(ids, ids, position_ids, None, tuple(map(len, examples)))
