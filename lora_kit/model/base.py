"""Load the frozen base.

The base is only read. A checkpoint records the hashes of its files, and a run resumes only on the same base.
"""

import re
import warnings
from importlib.util import find_spec

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lora_kit.errors import BaseError
from lora_kit.model.source import Source
from lora_kit.recipe.schema import Base


def require_quantization(base: Base) -> None:
    """Check that the package for the recipe's quantisation is installed.

    Raises:
        BaseError: bitsandbytes is missing.
    """
    if base.quantization != "none" and find_spec("bitsandbytes") is None:
        raise BaseError(
            f"base.quantization: {base.quantization} needs bitsandbytes, which is missing; pip install 'lora_kit[bnb]'"
        )


def refuse_without_bfloat16(dtype: str, name: str, capability: tuple[int, int]) -> None:
    """Check that a GPU computes in bfloat16. float16 is no alternative: its loss scale would be additional state.

    Args:
        dtype: The recipe's dtype.
        name: The name of the GPU.
        capability: Its compute capability. GPUs from (8, 0), Ampere, have bfloat16.

    Raises:
        BaseError: The dtype is bfloat16 and the GPU only emulates it.
    """
    if dtype == "bfloat16" and capability < (8, 0):
        raise BaseError(
            f"base.dtype: {name} (compute capability {capability[0]}.{capability[1]}) has no bfloat16 arithmetic; set "
            "base.dtype=float32, also base.quantization=nf4 if memory is short, or use a GPU of Ampere or later"
        )


def _quantized(base: Base) -> BitsAndBytesConfig | None:
    """Return the quantisation settings for loading the base; None for no quantisation.

    The threshold 0 switches off the separate handling of outliers in int8: bitsandbytes detects outlier columns over
    all rows of a call, so packed examples would influence each other.
    """
    if base.quantization == "none":
        return None
    require_quantization(base)
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    if base.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, base.dtype),
    )


def _forbid_repacking(model: PreTrainedModel) -> None:
    """Prevent bitsandbytes from changing the layout of 4-bit weights.

    On CPUs with AVX-512 bf16, bitsandbytes 0.50 repacks the weights in the first evaluation and keeps them so, and all
    later gradients are wrong. state_dict() then converts them permanently.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_base(source: Source, base: Base, device: torch.device) -> PreTrainedModel:
    """Load the frozen base onto a device in the recipe's dtype, with its dropout switched off.

    Args:
        source: The files of the base.
        base: The recipe's section.
        device: The device to load onto.

    Raises:
        BaseError: transformers cannot load the base, or the GPU has no bfloat16.
    """
    transformers_logging.disable_progress_bar()
    if device.type == "cuda":
        refuse_without_bfloat16(
            base.dtype, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        )
    quantization = _quantized(base)
    # peft uses an attribute that transformers 6 removes; this line can be removed with peft 0.22
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
            quantization_config=quantization,
            device_map={"": device} if quantization and device.type == "cuda" else None,
            attn_implementation=None if base.attention == "auto" else base.attention,
            trust_remote_code=base.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseError(f"base.repo: {source.name} cannot be loaded: {reason}") from error
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if quantization is not None:
        _forbid_repacking(model)
    torch.nn.Module.to(model, device)
    return model.requires_grad_(False)
