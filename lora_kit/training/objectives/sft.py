"""Losses as pure functions that return sums.

A sum does not depend on how examples were packed, accumulated or dealt to processes; the trainer divides once, by the
weight of the whole step.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_kit.data.packing import IGNORE, MicroBatch
from lora_kit.kernels.attention import SEGMENT, attention_of, inner_of, moved
from lora_kit.kernels.fusing import head_of, last_mlp_of
from lora_kit.kernels.loss import ROWS, summed_cross_entropy
from lora_kit.kernels.mlp import at_rows
from lora_kit.model.forward import model_inputs


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
