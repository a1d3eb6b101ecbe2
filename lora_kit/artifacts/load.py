"""Load a trained adapter with its base and tokenizer."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_kit.artifacts.locate import checkpoint_at, recipe_of
from lora_kit.data.rendering import Renderer
from lora_kit.errors import BaseError
from lora_kit.model.adapter import restore
from lora_kit.model.base import load_base
from lora_kit.model.source import locate, pinned_base
from lora_kit.model.tokenizer import load_renderer, set_up_tokenizer
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import store
from lora_kit.runs.manifest import RunFacts


class Loaded(NamedTuple):
    """A trained adapter on its base, with what its checkpoint records.

    Attributes:
        model: The model in evaluation mode.
        renderer: The tokenizer, the template and the stop token of the training.
        recipe: The recipe of the training.
        facts: The other facts of the run.
    """

    model: PeftModel
    renderer: Renderer
    recipe: Recipe
    facts: RunFacts

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the chat template and the stop token of the training."""
        return set_up_tokenizer(self.renderer.tokenizer, self.recipe, self.facts.template)


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantized: bool = True,
    trust_remote_code: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base and adapter of a checkpoint for generation, with the tokenizer and template of its training.

    The tokenizer of a run on raw text has no chat template, even if the base has one, so that `lora_kit.generate`
    continues a text as training did.

    Args:
        path: A checkpoint, a run (for its newest valid checkpoint), or a Hub name `user/name` or `user/name@revision`.
        base: The base's folder, if it is not where it was in training.
        device: The device; None takes a GPU if there is one.
        dtype: `bfloat16` or `float32`; None takes the dtype of the training.
        quantized: False loads a quantised base without quantisation.
        trust_remote_code: Whether transformers may run Python files of the base. What the checkpoint says about it
            does not count, because anyone may have written the checkpoint.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, its recipe is not of this version, or its tensors are
            not exactly those of its adapter.
        HubError: The Hub name does not exist or cannot be downloaded.
        BaseError: The base is missing, its files differ from those of the training, or it needs `trust_remote_code`.
    """
    loaded = open_adapter(
        path, base=base, device=device, dtype=dtype, quantized=quantized, trust_remote_code=trust_remote_code
    )
    tokenizer = loaded.tokenizer
    if loaded.facts.data.train.is_raw:
        tokenizer.chat_template = None
    return loaded.model, tokenizer


def open_adapter(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantized: bool = True,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load the base and adapter of a checkpoint, with what the checkpoint records. See `load`."""
    path = checkpoint_at(path)
    checkpoint = store.open_checkpoint(path)
    facts, recipe = checkpoint.manifest.run, recipe_of(checkpoint, trust_remote_code=trust_remote_code)
    name = json.loads((path / store.ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    recorded = facts.fingerprints.base
    source = locate(*pinned_base(recipe, recorded.commit, name, base=Path(base) if base else None))
    if not source.fingerprint.same_files(recorded):
        raise BaseError(
            f"{path}: the base {source.name} in {source.folder} differs from the base of the training; name the folder "
            "of the original base: --base-path FOLDER, in Python base=FOLDER"
        )
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    section = recipe.base.model_copy(update={"dtype": dtype} if dtype else {})
    model = restore(load_base(source, section, target, quantized=quantized), recipe.adapter, path)
    return Loaded(model.eval(), load_renderer(source, recipe, template=facts.template), recipe, facts)
