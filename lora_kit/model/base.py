"""Load the frozen base.

The base is only read. A checkpoint records the hashes of its files, and a run resumes only on the same base. Every
tensor of the base comes from these files: transformers draws a tensor that they lack at random, so such a base is
refused.
"""

import logging
import re
import warnings
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lora_kit.errors import BaseError
from lora_kit.model import fp8
from lora_kit.model.sharding import LoadReport, load_shards
from lora_kit.model.source import Source, reason_of
from lora_kit.model.weights import file_with, published_quantization
from lora_kit.recipe.schema import Base

RANDOM = re.compile(r"drop|jitter|noise")  # names of settings that make a model draw random numbers in training


def require_quantization(base: Base) -> None:
    """Check that the package for the recipe's quantisation is installed.

    Raises:
        BaseError: bitsandbytes is missing.
    """
    if base.by_bitsandbytes and find_spec("bitsandbytes") is None:
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
    if not base.by_bitsandbytes:
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
    layer: Any
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":  # compared by name, because bitsandbytes may not be installed
            layer.support_avx512bf16_for_cpu = False


def load_base(
    source: Source, base: Base, device: torch.device, mesh: DeviceMesh | None = None, *, quantized: bool = True
) -> PreTrainedModel:
    """Load the frozen base onto a device in the recipe's dtype, with everything random in it switched off.

    Args:
        source: The files of the base.
        base: The recipe's section.
        device: The device to load onto.
        mesh: The processes over which to shard the base; None loads the whole base.
        quantized: False loads the base without the recipe's quantisation, and dequantises weights that were published
            quantised.

    Raises:
        BaseError: transformers cannot load the base, its files lack tensors or have tensors of another shape, it was
            published with another quantisation, it cannot be sharded, or the GPU has no bfloat16.
    """
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_report)
    if device.type == "cuda":
        refuse_without_bfloat16(
            base.dtype, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        )
    published = published_quantization(source.folder, base)
    attention = None if base.attention == "auto" else base.attention
    if not quantized and published is None:
        base = base.model_copy(update={"quantization": "none"})
    # peft uses an attribute that transformers 6 removes; this line can be removed with peft 0.22
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    if mesh is not None and published is not None:
        raise BaseError(
            f"base.placement: {source.name} was published in {published}, and only plain weights can be sharded; "
            "choose the base in bfloat16, or set base.placement: replicated"
        )
    try:
        if mesh is not None:
            model = empty_base(source.folder, base, attention=attention)
            loaded = load_shards(model, source, device, mesh, _quantized(base))
        else:
            model, loaded = _load_whole(source.folder, base, device, published, attention)
    except (BaseError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a damaged or foreign configuration can raise any error in transformers
        if "allocate memory" in str(error):
            raise
        raise _cannot_load(source.name, error) from error
    refuse_incomplete(source, loaded.missing, loaded.mismatched)
    extra = (name for name in getattr(type(model.config), "extra_files", ()) if (source.folder / name).exists())
    if unknown := next((name for name in extra if name not in source.files), None):
        raise BaseError(
            f"base.repo: {source.folder / unknown}: the model reads weights from this file, which lora_kit does not "
            "compare at a resume; choose another base"
        )
    model.config.use_cache = False
    for module in model.modules():
        _switch_off_randomness(vars(module))
    _forbid_repacking(model)
    if not quantized and published is not None:
        model = _dequantized(model, getattr(torch, base.dtype))
    if mesh is None:
        torch.nn.Module.to(model, device)
    return model.requires_grad_(False)


def _load_whole(
    folder: Path, base: Base, device: torch.device, published: str | None, attention: str | None
) -> tuple[PreTrainedModel, LoadReport]:
    """Return the whole base, and what was not loaded. `published` is the quantisation of its files."""
    config, quantization = read_config(folder, base), _quantized(base)
    if published is not None and quantization is not None:
        config.quantization_config |= _kept_settings(quantization)
    if published == "fp8":
        config.quantization_config |= {"quant_method": fp8.METHOD}
    loading: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, base.dtype),
        quantization_config=quantization if published is None else None,
        device_map={"": device} if quantization and device.type == "cuda" else None,
        attn_implementation=attention,
        trust_remote_code=base.trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # refused by the caller
        output_loading_info=True,
    )
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], loading)
    return model, LoadReport(found["missing_keys"], found["mismatched_keys"])


def _is_no_report(record: logging.LogRecord) -> bool:
    """Return False for transformers' table of missing tensors: `refuse_incomplete` reports them as an error."""
    return "LOAD REPORT" not in record.getMessage()


def read_config(path: Path, base: Base) -> PreTrainedConfig:
    """Return the configuration of a base, with everything random in it switched off.

    Args:
        path: The folder of the base, or its config.json under any name.
        base: The recipe's section.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=base.trust_remote_code)
    _switch_off_randomness(vars(config))
    return config


def empty_base(path: Path, base: Base, *, attention: str | None = None) -> PreTrainedModel:
    """Return a base without weights (on the device `meta`), to look at its layers or to load them later.

    Args:
        path: The folder of the base, or its config.json under any name.
        base: The recipe's section.
        attention: The attention implementation; None takes the default of the family.

    Raises:
        BaseError: transformers cannot make a causal language model of this configuration.
    """
    try:
        config = read_config(path, base)
        is_remote = base.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        if not is_remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise BaseError(
                f"base.repo: {base.repo} (model type {config.model_type}) is not a causal language model of "
                "transformers; choose another base"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, base.dtype),
                attn_implementation=attention,
                trust_remote_code=base.trust_remote_code,
            )
        causal = any(getattr(module, "is_causal", False) for module in model.modules())
        if getattr(model.config, "is_decoder", None) is False and not causal:
            raise BaseError(
                f"base.repo: {base.repo} (model type {config.model_type}) is not causal, since its configuration says "
                "is_decoder: false; choose a causal language model"
            )
        return cast(PreTrainedModel, model)
    except BaseError:
        raise
    except Exception as error:  # a damaged or foreign configuration can raise any error in transformers
        raise _cannot_load(base.repo, error) from error


def _cannot_load(name: str, error: Exception) -> BaseError:
    advice = "if its files are whole, choose a base that this version of transformers loads"
    return BaseError(f"base.repo: {name} cannot be loaded: {reason_of(error, advice)}")


def refuse_incomplete(source: Source, missing: Collection[str], mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Refuse a base if tensors of the model were not loaded from its files. A head tied to the embedding needs none.

    Args:
        source: The files of the base.
        missing: The tensors that the files do not have.
        mismatched: The tensors that have another shape in the files: name, shape there, shape in the model.

    Raises:
        BaseError: There is such a tensor.
    """
    if mismatched:
        name, found, expected = min(mismatched)
        raise BaseError(
            f"base.repo: {file_with(name, source.folder, source.files)}: {name} has the shape {list(found)}, and "
            f"{list(expected)} in the model of config.json ({len(mismatched)} such tensor(s)); the two files do not "
            "belong together, so download the base again"
        )
    if missing:
        names = sorted(missing)
        raise BaseError(
            f"base.repo: {source.folder}: the weights lack {len(names)} tensor(s) of the model ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}), which would be random numbers, other ones at each start; choose a "
            "causal language model with all its weights (embedding and classification models have no lm_head)"
        )


def _switch_off_randomness(settings: dict[str, Any]) -> None:
    """Set every dropout, layer drop and router noise among the settings of a configuration or a module to zero."""
    for name, value in settings.items():
        if isinstance(value, PreTrainedConfig):
            _switch_off_randomness(vars(value))
        elif isinstance(value, dict) and not name.startswith("_"):
            _switch_off_randomness(value)
        elif isinstance(value, float) and RANDOM.search(name):
            settings[name] = 0.0
    if "p" in settings and "inplace" in settings:  # nn.Dropout and its variants
        settings["p"] = 0.0


def _dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Dequantise the weights of a base that was published quantised, so that it is a plain model and can be saved."""
    plain: Any = model.dequantize(dtype)
    conversions = getattr(plain, "_weight_conversions", None) or []
    # save_pretrained would try to revert the reading of quantised weights, which bitsandbytes does not support
    plain._weight_conversions = [
        conversion
        for conversion in conversions
        if not any("bitsandbytes" in type(operation).__module__ for operation in getattr(conversion, "operations", ()))
    ]
    return cast(PreTrainedModel, plain)


def _kept_settings(quantization: BitsAndBytesConfig) -> Mapping[str, Any]:
    """Return the settings of the recipe's quantisation that hold for published weights too; they change no weight."""
    kept = ("llm_int8_threshold", "bnb_4bit_compute_dtype")
    return {key: value for key, value in quantization.to_dict().items() if key in kept}
