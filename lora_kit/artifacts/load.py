"""Load a trained adapter and let it answer: greedy or sampled text from prompts, batched by length."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_kit.artifacts.locate import checkpoint_at
from lora_kit.errors import BaseError
from lora_kit.model.base import load_base
from lora_kit.model.source import locate, pinned_base
from lora_kit.model.tokenizer import load_renderer, set_up_tokenizer
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import store


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantized: bool = True,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a checkpoint's base and adapter, ready to answer, with the tokenizer and template of its training.

    Args:
        path: A checkpoint's folder, a run's for its newest, or a Hub name, `user/name` or `user/name@revision`.
        base: The base's folder, if it is not where the training had it.
        device: Where to put it; by default a GPU if there is one.
        dtype: `bfloat16` or `float32`; by default as in training.
        quantized: False loads whole weights where the training had quantised ones.

    Raises:
        CheckpointError: The checkpoint does not verify.
        HubError: There is no such Hub name, or it cannot be had.
        BaseError: Its base is not here, or is no longer the one that it was trained on.
    """
    path = checkpoint_at(path)
    facts = store.open_checkpoint(path).manifest.run
    recipe = Recipe.model_validate(facts.recipe)
    name = json.loads((path / store.ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    recorded = facts.fingerprints.base
    source = locate(*pinned_base(recipe, recorded.commit, name, base=Path(base) if base else None))
    if source.fingerprint != recorded:
        raise BaseError(f"{path}: was trained on other bytes of {source.name} than lie in {source.folder} now")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    changes = ({"dtype": dtype} if dtype else {}) | ({} if quantized else {"quantization": "none"})
    wanted = recipe.base.model_copy(update=changes)
    model = PeftModel.from_pretrained(load_base(source, wanted, where), str(path))
    tokenizer = load_renderer(source, recipe, template=facts.template).tokenizer
    return model.eval(), set_up_tokenizer(tokenizer, recipe, facts.template)
