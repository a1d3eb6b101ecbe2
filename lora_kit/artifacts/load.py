"""Load a trained adapter with its base and tokenizer."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_kit.artifacts.locate import checkpoint_at, recipe_of
from lora_kit.errors import BaseError
from lora_kit.model.adapter import restore
from lora_kit.model.base import load_base
from lora_kit.model.source import locate, pinned_base
from lora_kit.model.tokenizer import load_renderer, set_up_tokenizer
from lora_kit.runs import store


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
    tokenizer = load_renderer(source, recipe, template=facts.template).tokenizer
    return model.eval(), set_up_tokenizer(tokenizer, recipe, facts.template)
