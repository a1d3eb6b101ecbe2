"""The tokenizer of a base, with the chat template and the stop token that the recipe names."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_kit.data.template import Renderer
from lora_kit.errors import BaseError, DataError
from lora_kit.model.source import Source
from lora_kit.recipe.load import resolve_path
from lora_kit.recipe.schema import Recipe

GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # all that they are is in tokenizer.json


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
        tokenizer = _load_tokenizer(source.folder, trust_remote_code=recipe.base.trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseError(f"base.repo: the tokenizer in {source.folder} does not load: {reason}") from error
    if template is None and recipe.data.template is not None:
        path = resolve_path(recipe, recipe.data.template)
        if path is None or not path.is_file():
            raise DataError(f"data.template: no file {recipe.data.template}; expected a jinja file beside the recipe")
        template = path.read_text()
    return Renderer(tokenizer, template, train_on=recipe.objective.train_on, stop_token=recipe.base.stop_token)


def set_up_tokenizer(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, template: str | None
) -> PreTrainedTokenizerBase:
    """Give a tokenizer the chat template and the stop token of its training, and return it."""
    if template is not None:
        tokenizer.chat_template = template
    if recipe.base.stop_token is not None:
        tokenizer.eos_token = recipe.base.stop_token
    return tokenizer


def _load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    named = (
        json.loads((folder / "tokenizer_config.json").read_text())
        if (folder / "tokenizer_config.json").is_file()
        else {}
    )
    if named.get("tokenizer_class") in GENERIC and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)  # what AutoTokenizer gives too, but it imports torch
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
