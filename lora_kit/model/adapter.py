"""Add the LoRA adapter to the base with peft, with a reproducible initialisation."""

import logging
import math
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import PreTrainedModel

from lora_kit.errors import RecipeError
from lora_kit.model.state import saved_name, trainable
from lora_kit.model.targets import find_targets, refuse_others
from lora_kit.randomness import mix
from lora_kit.recipe.schema import Adapter

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports bitsandbytes, which logs at import
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402


def inject(base: PreTrainedModel, adapter: Adapter, *, seed: int, name: str, revision: str | None) -> PeftModel:
    """Return the base with LoRA adapters on `adapter.targets`: B is zero, A is drawn from (seed, name of the
    parameter).

    Args:
        base: The frozen model, already on its device.
        adapter: The recipe's section.
        seed: The recipe's seed.
        name: The base's name, for adapter_config.json.
        revision: The base's commit, for adapter_config.json.

    Raises:
        RecipeError: A target matches no layer of the base, or peft cannot adapt it.
    """
    targets = find_targets(base, adapter)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.experts) or None,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise RecipeError(f"adapter.targets: peft cannot adapt {adapter.targets}: {error}") from error
    refuse_others(targets, (name.removeprefix("base_model.model.") for name, _ in trainable(model)))
    # peft would write the local path from which the base was loaded
    config.base_model_name_or_path, config.revision = name, revision
    for parameter_name, parameter in trainable(model):
        if ".lora_A." in parameter_name:
            parameter.data.copy_(initial_a(parameter, mix(seed, 3, *saved_name(parameter_name).encode())))
    return model


def initial_a(like: Tensor, seed: int) -> Float32[Tensor, "rank inputs"]:
    """Return PEFT's initialisation of A, uniform in +-1/sqrt(inputs).

    The numbers are drawn on the CPU, so they are the same for every device.
    """
    generator = torch.Generator().manual_seed(seed >> 1)
    bound = 1 / math.sqrt(like.shape[-1])
    return torch.empty(like.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def saved_config(model: PeftModel) -> dict[str, Any]:
    """Return the content of adapter_config.json. Sets are sorted, so the file is the same in every process."""
    config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}
