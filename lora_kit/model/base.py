"""The frozen base: load it, and find out whether it can train packed examples.

A base is read-only input. It is never saved again: a checkpoint holds its fingerprint and resumes on no other.
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
    """Refuse a quantised base without the package that holds it.

    Raises:
        BaseError: Says what to install.
    """
    if base.quantization != "none" and find_spec("bitsandbytes") is None:
        raise BaseError(f"base.quantization: {base.quantization} needs bitsandbytes; pip install 'lora_kit[bnb]'")


def refuse_without_bfloat16(dtype: str, name: str, capability: tuple[int, int]) -> None:
    """Refuse bfloat16 on a GPU that only emulates it; fp16 would need a loss scale, which is state to lose.

    Args:
        dtype: The recipe's.
        name: The GPU's.
        capability: Its compute capability, (8, 0) for the first that has bfloat16.

    Raises:
        BaseError: Says what to do.
    """
    if dtype == "bfloat16" and capability < (8, 0):
        raise BaseError(
            f"base.dtype: {name} (compute capability {capability[0]}.{capability[1]}) has no bfloat16 arithmetic; set "
            "base.dtype=float32, with base.quantization=nf4 where memory is short, or use a GPU from Ampere on"
        )


def _quantized(base: Base) -> BitsAndBytesConfig | None:
    """Return how transformers is to quantise the linear layers while it loads them.

    int8 has no outliers apart: they are looked for over all rows of a call, so packed examples would touch each other.
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


def _never_repack(model: PreTrainedModel) -> None:
    """Keep 4-bit weights as they are.

    On CPUs with AVX-512 bf16, bitsandbytes 0.50 repacks them in the first evaluation and never back, and every gradient
    after it is wrong; state_dict then changes them for good.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_base(source: Source, base: Base, device: torch.device) -> PreTrainedModel:
    """Load the frozen base in the recipe's dtype onto a device, with its own dropouts off.

    Raises:
        BaseError: transformers cannot load it.
    """
    transformers_logging.disable_progress_bar()
    if device.type == "cuda":
        refuse_without_bfloat16(
            base.dtype, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        )
    quantization = _quantized(base)
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
            quantization_config=quantization,
            device_map={"": device} if quantization and device.type == "cuda" else None,
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
    if quantization is not None:
        _never_repack(model)
    torch.nn.Module.to(model, device)
    return model.requires_grad_(False)
