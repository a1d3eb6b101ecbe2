"""Losses as pure functions that return sums.

A sum does not depend on how examples were packed, accumulated or dealt to processes; the trainer divides once, by the
weight of the whole step.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_kit.data.packing import IGNORE, MicroBatch
from lora_kit.kernels.attention import SEGMENT, Segments, attention_of, inner_of, moved
from lora_kit.kernels.choice import head_of, last_mlp_of
from lora_kit.kernels.loss import ROWS, summed_cross_entropy
from lora_kit.kernels.mlp import at_rows

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


def sft(model: nn.Module, batch: MicroBatch, device: torch.device) -> Float[Tensor, ""]:
    """Return the summed loss of a micro-batch under supervised fine-tuning; its weight is `batch.weight`."""
    on_cpu = device.type == "cpu"
    if on_cpu and attention_of(model) == SEGMENT:
        batch = _filled(batch)
    inputs, head, flat = model_inputs(model, batch, device), head_of(model), batch.labels.reshape(-1)
    trained, others = np.flatnonzero(flat != IGNORE), np.flatnonzero(flat == IGNORE)
    asked = np.append(trained, others[: -len(trained) % ROWS if on_cpu else 0])
    places, labels = (moved(one, device) for one in (trained, flat[trained]))
    if head is None:
        logits = model(**inputs).logits.flatten(0, 1)[places]
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    with at_rows(last_mlp_of(model), moved(asked, device)):
        hidden = inner_of(model).base_model(**inputs)[0].flatten(0, 1)
    return summed_cross_entropy(hidden[places], head, labels)


def _filled(batch: MicroBatch) -> MicroBatch:
    """Return a packed micro-batch with one more example, which is not trained, so that its rows are a multiple."""
    more = -batch.ids.shape[1] % ROWS
    if not more:
        return batch
    parts = zip((batch.ids, batch.labels, batch.position_ids), (0, IGNORE, np.arange(more)), strict=True)
    ids, labels, position_ids = (np.append(one, np.full((1, more), fill), axis=1) for one, fill in parts)
    return MicroBatch(ids, labels, position_ids, None, (*batch.segments, more))
