"""Find out by trying whether a base can train on packed examples, and with which attention."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lora_kit.data.packing import MicroBatch
from lora_kit.kernels.attention import SEGMENT, Segments, attention_of, own_attention, use_attention
from lora_kit.model.forward import model_inputs
from lora_kit.recipe.schema import Base

PROBE_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
}  # leaks measure 0.4 and more, rounding 1e-6 and 1e-2
PROBE_LARGEST = 0.25  # where a base is so wide, deep or untrained that rounding alone comes near


def choose_attention(model: PreTrainedModel, base: Base, device: torch.device) -> tuple[str, str]:
    """Find out how this model trains fastest among the ways that are right, and leave it set so.

    Returns:
        What a run resolves: `attention`, and `layout` (packed or padded).
    """
    own, vocabulary = attention_of(model), model.config.get_text_config().vocab_size
    if base.attention == "auto" and use_attention(model, SEGMENT):
        if not leaks_when_packed(model, vocabulary, device):
            return SEGMENT, "packed"
        use_attention(model, own)
    leaks = leaks_when_packed(model, vocabulary, device)
    return own, "padded" if leaks else "packed"


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
