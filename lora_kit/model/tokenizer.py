"""Load the base's tokenizer, with the chat template and stop token of the recipe."""

import json
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_kit.data.files import read_text
from lora_kit.data.rendering import Renderer
from lora_kit.errors import BaseError, DataError
from lora_kit.model.source import Source, reason_of
from lora_kit.model.weights import POINTER_REMEDY, is_pointer
from lora_kit.recipe.load import resolve_path
from lora_kit.recipe.schema import Recipe, SftObjective

GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that tokenizer.json describes completely


def load_renderer(source: Source, recipe: Recipe, *, template: str | None = None) -> Renderer:
    """Load the base's tokenizer, with the chat template and stop token of the recipe.

    Args:
        source: The base.
        recipe: The recipe.
        template: A chat template that replaces the recipe's.

    Raises:
        BaseError: The tokenizer cannot be loaded.
        DataError: The recipe's template file does not exist, is empty, or is not UTF-8.
    """
    try:
        tokenizer = _load_tokenizer(source.folder, trust_remote_code=recipe.base.trust_remote_code)
    except Exception as error:  # a damaged tokenizer.json raises a plain Exception in tokenizers
        if pointers := [path for path in sorted(source.folder.iterdir()) if is_pointer(path)]:
            raise BaseError(f"base.repo: {pointers[0]}: {POINTER_REMEDY}") from error
        reason = reason_of(error, "download it again")
        raise BaseError(f"base.repo: the tokenizer in {source.folder} cannot be loaded: {reason}") from error
    template = read_template(recipe) if template is None else template
    return for_objective(Renderer(tokenizer, template, stop_token=recipe.base.stop_token), recipe)


def for_objective(renderer: Renderer, recipe: Recipe) -> Renderer:
    """Return a renderer that trains the tokens and reads the formats that the recipe's objective needs."""
    objective = recipe.objective
    if isinstance(objective, SftObjective):
        return replace(renderer, kind=objective.kind, train_on=objective.train_on, reasoning=objective.reasoning)
    return replace(renderer, kind=objective.kind, train_on="assistant", reasoning="train")


def read_template(recipe: Recipe) -> str | None:
    """Return the content of the recipe's template file; None if it names none.

    Raises:
        DataError: The file does not exist, or cannot be read.
    """
    if recipe.data.template is None:
        return None
    path = resolve_path(recipe, recipe.data.template)
    if path is None or not path.is_file():
        raise DataError(f"data.template: {recipe.data.template} is not a file; expected a Jinja file")
    return read_text(path, recipe.data.template)


def set_up_tokenizer(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, template: str | None
) -> PreTrainedTokenizerBase:
    """Set the chat template (None keeps the tokenizer's) and the recipe's stop token on a tokenizer, and return it."""
    if template is not None:
        tokenizer.chat_template = template
    if recipe.base.stop_token is not None:
        tokenizer.eos_token = recipe.base.stop_token
    return tokenizer


def _load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("tokenizer_class") in GENERIC and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)  # as AutoTokenizer returns, without importing torch
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
