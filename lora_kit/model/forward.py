"""What a causal language model is called with for a micro-batch."""

import torch
from torch import Tensor, nn

from lora_kit.data.packing import MicroBatch
from lora_kit.kernels.attention import SEGMENT, Segments, attention_of, moved

Inputs = dict[str, Tensor | Segments | bool]


def model_inputs(model: nn.Module, batch: MicroBatch, device: torch.device) -> Inputs:
    """Return the keyword arguments that this causal language model takes for a micro-batch.

    Packed examples are kept apart by segments, where the model attends by them, or else by position ids that restart.
    transformers reads that only when there is no attention mask and no cache, and leaks between the examples in silence
    otherwise (transformers issue 46634).
    """
    arrays = {"input_ids": batch.ids, "position_ids": batch.position_ids}
    if batch.attention_mask is not None:
        arrays["attention_mask"] = batch.attention_mask
    inputs: Inputs = {name: moved(array, device) for name, array in arrays.items()}
    if attention_of(model) == SEGMENT:
        inputs["segments"] = Segments(batch.segments, device)
    return inputs | {"use_cache": False}
