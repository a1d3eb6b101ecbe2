"""Losses as pure functions that return sums.

A sum does not depend on how examples were packed, accumulated or dealt to processes; the trainer divides once, by the
weight of the whole step.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lora_kit.data.packing import IGNORE, MicroBatch
from lora_kit.kernels.attention import SEGMENT, Segments, attention_of

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
    inputs: Inputs = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    if attention_of(model) == SEGMENT:
        inputs["segments"] = Segments.of(batch.segments, device)
    return inputs | {"use_cache": False}


def summed_cross_entropy(
    logits: Float[Tensor, "rows length vocab"], labels: Int64[Tensor, "rows length"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy (nats) summed over the labels that are not IGNORE, in fp32."""
    trained = labels != IGNORE
    return nn.functional.cross_entropy(logits[trained].float(), labels[trained], reduction="sum")


def sft(model: nn.Module, batch: MicroBatch, device: torch.device) -> Float[Tensor, ""]:
    """Return the summed loss of a micro-batch under supervised fine-tuning; its weight is `batch.weight`."""
    logits = model(**model_inputs(model, batch, device)).logits
    return summed_cross_entropy(logits, torch.from_numpy(batch.labels).to(device))
