"""Add the LoRA adapter to the base with peft: a new one with a reproducible initialisation, or a saved one."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lora_kit.errors import CheckpointError, RecipeError
from lora_kit.kernels.gathered import is_sharded
from lora_kit.kernels.lora import constants_of
from lora_kit.kernels.nf4 import Nf4Linear
from lora_kit.model.patterns import as_regex
from lora_kit.model.state import fill, saved_name, trainable
from lora_kit.model.targets import find_targets, refuse_others
from lora_kit.model.variants import add_dora, set_magnitudes, widened
from lora_kit.randomness import mix
from lora_kit.recipe.schema import Adapter
from lora_kit.runs.layout import WITH_CONSTANTS
from lora_kit.runs.store import ADAPTER, ADAPTER_CONFIG

PICKLED = "adapter_model.bin"
MOST_SHOWN = 500  # characters of an error that quotes names from a file

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
    if adapter.init != "default" and targets.experts:
        raise RecipeError(
            f"adapter.init: {adapter.init} needs linear layers, and adapter.targets names experts, whose weights are "
            "three-dimensional; take the default"
        )
    config = lora_config(adapter, targets.modules, targets.experts)
    if any(isinstance(module, Nf4Linear) for module in base.modules()):
        from peft.tuners.lora.bnb import Linear4bit

        config._register_custom_module({Nf4Linear: Linear4bit})  # rounds as peft does for bitsandbytes' own layers
    dora_later = adapter.variant == "dora" and is_sharded(base)
    config.use_dora = adapter.variant == "dora" and not dora_later
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise RecipeError(f"adapter.targets: peft cannot adapt {adapter.targets}: {error}") from error
    if dora_later:
        config.use_dora = True
        add_dora(model)
    refuse_others(targets, (name.removeprefix("base_model.model.") for name, _ in trainable(model)))
    # peft would write the local path from which the base was loaded
    config.base_model_name_or_path, config.revision = name, revision
    for parameter_name, parameter in trainable(model):
        if ".lora_A." in parameter_name:
            parameter.data.copy_(initial_a(parameter, mix(seed, 3, *saved_name(parameter_name).encode())))
    set_magnitudes(model)
    return model


def lora_config(adapter: Adapter, modules: Sequence[str], experts: Sequence[str]) -> LoraConfig:
    """Return peft's configuration of an adapter.

    Args:
        adapter: The recipe's section.
        modules: The linear layers to adapt.
        experts: The expert parameters to adapt.
    """
    rank_pattern, alpha_pattern = (
        {as_regex(pattern): value for pattern, value in patterns.items()}
        for patterns in (adapter.rank_pattern, adapter.alpha_pattern)
    )
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.scaling == "rslora",
        use_dora=adapter.variant == "dora",
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        target_modules=list(modules),
        target_parameters=list(experts) or None,
        task_type="CAUSAL_LM",
    )


def restore(base: PreTrainedModel, adapter: Adapter, folder: Path) -> PeftModel:
    """Return the base with the adapter of a checkpoint.

    Anyone may have written the checkpoint. So of adapter_config.json only the adapted layers are read, because peft
    also finds names of modules to import and of pickles there. The weights are read as safetensors and nothing else.
    The adapter is made on the meta device: a rank that the file does not have must not decide how much is allocated.

    Args:
        base: The frozen model, already on its device.
        adapter: The section of the checkpoint's recipe.
        folder: The checkpoint.

    Raises:
        CheckpointError: The files do not describe an adapter of this base, or a tensor is missing, superfluous or of
            another shape.
    """
    where = folder / ADAPTER_CONFIG
    saved = json.loads(where.read_text())
    targets = [saved.get(key) or [] for key in ("target_modules", "target_parameters")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in targets):
        raise CheckpointError(f"{where}: target_modules and target_parameters are not lists of names")
    config = lora_config(adapter, *targets)
    if adapter.init in WITH_CONSTANTS:
        config = replace(config, **widened(config))
    try:
        with torch.device("meta"):
            model = get_peft_model(base, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise CheckpointError(f"{where}: it does not fit the base: {str(error)[:MOST_SHOWN]}") from error
    config.base_model_name_or_path, config.revision = saved.get("base_model_name_or_path"), saved.get("revision")
    fill(model, saved_weights(folder), base.device)
    return model.requires_grad_(False)


def saved_weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a saved adapter as float32. A pickle (adapter_model.bin) is never read.

    Raises:
        CheckpointError: There is no adapter_model.safetensors, or it cannot be read.
    """
    path = folder / ADAPTER
    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        pickled = "; adapter_model.bin is a pickle, which is never read" if (folder / PICKLED).exists() else ""
        raise CheckpointError(f"{path}: cannot be read: {error}{pickled}; save the adapter as safetensors") from error


def initial_a(like: Tensor, seed: int) -> Float32[Tensor, "rank inputs"]:
    """Return PEFT's initialisation of A, uniform in +-1/sqrt(inputs).

    The numbers are drawn on the CPU, so they are the same for every device.
    """
    generator = torch.Generator().manual_seed(seed >> 1)
    bound = 1 / math.sqrt(like.shape[-1])
    return torch.empty(like.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def saved_config(model: PeftModel) -> dict[str, Any]:
    """Return the content of adapter_config.json. Sets are sorted, so the file is the same in every process."""
    settings = cast(LoraConfig, model.peft_config["default"])
    wide = widened(settings) if any(constants_of(module) for module in model.modules()) else {}
    config = settings.to_dict() | wide | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}
