"""The adapter: injected by peft, owned as four flat buffers, named as PEFT names it.

Weights, gradient and the two moments are one fp32 tensor each; the model's parameters are views into the first two. So
the optimizer step, the norm, the reduction and a snapshot are one operation on one buffer.
"""

import logging
import math
from enum import Enum
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

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where installed, and it talks
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402


def inject(base: PreTrainedModel, adapter: Adapter, *, seed: int, name: str, revision: str | None) -> PeftModel:
    """Return the base with LoRA adapters on `adapter.targets`, B at zero and A drawn on the CPU from (seed, name).

    Args:
        base: The frozen model, already where it computes.
        adapter: The recipe's section.
        seed: The recipe's seed.
        name: The base's name, written to adapter_config.json.
        revision: The base's commit, likewise.

    Raises:
        RecipeError: A target names no layer of this base, or one that peft cannot adapt.
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
        raise RecipeError(f"adapter.targets: peft refuses {adapter.targets}: {error}") from error
    refuse_others(targets, (name.removeprefix("base_model.model.") for name, _ in trainable(model)))
    # peft would write the path that was loaded
    config.base_model_name_or_path, config.revision = name, revision
    for parameter_name, parameter in trainable(model):
        if ".lora_A." in parameter_name:
            parameter.data.copy_(initial_a(parameter, mix(seed, 3, *saved_name(parameter_name).encode())))
    return model


def initial_a(like: Tensor, seed: int) -> Float32[Tensor, "rank inputs"]:
    """Return PEFT's start for A, uniform in +-1/sqrt(inputs), drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed >> 1)
    bound = 1 / math.sqrt(like.shape[-1])
    return torch.empty(like.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def saved_config(model: PeftModel) -> dict[str, Any]:
    """Return the content of adapter_config.json; its sets are sorted, so that the bytes are stable."""
    config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    return {key: _plain(value) for key, value in sorted(config.items())}


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
