"""The arguments with which a causal language model is called for a micro-batch."""

import torch
from torch import Tensor, nn

from lora_kit.data.packing import MicroBatch
from lora_kit.kernels.attention import SEGMENT, attention_of
from lora_kit.kernels.segments import Segments, moved

Inputs = dict[str, Tensor | Segments | bool]


def model_inputs(model: nn.Module, batch: MicroBatch, device: torch.device) -> Inputs:
    """Return the keyword arguments for a forward pass.

    Packed examples attend only to themselves because of `segments`, if the model uses attention by segments. Otherwise
    transformers separates them by position ids that restart at 0, but only without attention mask and cache; with
    either, examples would attend to each other without a warning (transformers issue 46634).

    Args:
        model: The base with or without its adapter.
        batch: The micro-batch.
        device: The device of the model.

    Raises:
        ValueError: An example forks, and the model does not attend by segment.
    """
    arrays = {"input_ids": batch.ids, "position_ids": batch.position_ids}
    if batch.attention_mask is not None:
        arrays["attention_mask"] = batch.attention_mask
    inputs: Inputs = {name: moved(array, device) for name, array in arrays.items()}
    if attention_of(model) == SEGMENT:
        inputs["segments"] = Segments(
            batch.segments, device, tuple(None if fork is None else (fork.shared, fork.second) for fork in batch.forks)
        )
    elif any(batch.forks):
        raise ValueError("both branches of an example would see each other: sharing needs attention by segment")
    return inputs | {"use_cache": False}
