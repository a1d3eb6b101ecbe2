"""The frozen base: load it, and find out whether it can train packed examples.

A base is read-only input. It is never saved again: a checkpoint holds its fingerprint and resumes on no other.
"""

import re
import warnings
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lora_kit.data.packing import MicroBatch
from lora_kit.errors import BaseError
from lora_kit.kernels.attention import SEGMENT, Segments, attention_of, own_attention, use_attention
from lora_kit.model.forward import model_inputs
from lora_kit.model.source import Source
from lora_kit.recipe.schema import Base

PROBE_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
}  # leaks measure 0.4 and more, rounding 1e-6 and 1e-2
PROBE_LARGEST = 0.25  # where a base is so wide, deep or untrained that rounding alone comes near


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


def choose_attention(model: PreTrainedModel, base: Base, device: torch.device) -> dict[str, str]:
    """Find out how this model trains fastest among the ways that are right, and leave it set so.

    Returns:
        What a run resolves: `attention`, and `layout` (packed or padded).
    """
    own, vocabulary = attention_of(model), model.config.get_text_config().vocab_size
    if base.attention == "auto" and use_attention(model, SEGMENT):
        if not leaks_when_packed(model, vocabulary, device):
            return {"attention": SEGMENT, "layout": "packed"}
        use_attention(model, own)
    leaks = leaks_when_packed(model, vocabulary, device)
    return {"attention": own, "layout": "padded" if leaks else "packed"}


@torch.no_grad()
def leaks_when_packed(model: PreTrainedModel, vocabulary: int, device: torch.device) -> bool:
    """Return whether examples packed into one row touch each other in this model, or see other than they should.

    Two examples together are compared with each alone under the model's own attention; only the model itself can tell.
    A model that takes no position ids, or whose windows attention by segment is not told of, counts as leaking.
    """
    first, second = (np.arange(start, start + length) * 7 % vocabulary for start, length in ((3, 17), (5, 30)))
    inputs = model_inputs(model, probe_batch([first, second]), device)
    try:
        logits = model(**inputs).logits[0]
    except (TypeError, ValueError):
        return True
    segments = inputs.get("segments")
    if isinstance(segments, Segments) and not _knows_windows(model.config.get_text_config(), segments.windows):
        return True
    start = 0
    for example in (first, second):
        one = probe_batch([example])
        with own_attention(model):
            alone = model(**model_inputs(model, one, device)).logits[0]
        difference = _apart(logits[start : start + len(example)], alone)
        if not difference <= PROBE_TOLERANCE[alone.dtype]:
            with own_attention(model, "eager"):  # the same by other operations: what rounding makes of it here
                rounding = _apart(model(**model_inputs(model, one, device)).logits[0], alone)
            if not difference <= min(2 * rounding, PROBE_LARGEST):
                return True
        start += len(example)
    return False


def _apart(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def _knows_windows(config: PreTrainedConfig, told: list[int | None]) -> bool:
    """Return whether every layer that the configuration gives a window told its attention so.

    Windows are longer than the probe's examples, so that it cannot see them; some families (phimoe, qwen2_moe) keep
    theirs in the mask alone.
    """
    facts = config.to_dict()
    layers = facts.get("layer_types") or []
    windowed = facts.get("sliding_window") is not None and facts.get("use_sliding_window", True)
    expected = layers.count("sliding_attention") if layers else len(told) * windowed
    return "chunked_attention" not in layers and sum(window is not None for window in told) >= expected


def probe_batch(examples: list[np.ndarray]) -> MicroBatch:
    """Return some examples (token ids) as a packed micro-batch."""
    ids = np.concatenate(examples)[None]
    position_ids = np.concatenate([np.arange(len(example)) for example in examples])[None]
    return MicroBatch(ids, ids, position_ids, None, tuple(map(len, examples)))
