"""Supervised fine-tuning: the cross-entropy of the trained tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lora_kit.data.packing import IGNORE, MicroBatch, pack
from lora_kit.data.tokens import Tokens
from lora_kit.kernels.attention import SEGMENT, attention_of, inner_of
from lora_kit.kernels.fusing import head_of, last_mlp_of
from lora_kit.kernels.limits import ROW_MULTIPLE
from lora_kit.kernels.loss import summed_cross_entropy
from lora_kit.kernels.mlp import at_rows
from lora_kit.kernels.segments import moved
from lora_kit.model.forward import model_inputs
from lora_kit.training.objectives.objective import LossSum


class Sft:
    """Cross-entropy of every trained token; the weight is their number, and micro-batches may combine any examples."""

    metrics: tuple[str, ...] = ()
    split = staticmethod(pack)

    def weight(self, tokens: Tokens, examples: Sequence[int]) -> int:
        """Return the number of trained tokens of some examples."""
        return sum(tokens.weight(example) for example in examples)

    def loss(self, model: nn.Module, batch: MicroBatch, device: torch.device) -> LossSum:
        """Return the summed cross-entropy; with the part `loss`, the head is applied only at trained positions."""
        on_cpu = device.type == "cpu"
        if on_cpu and attention_of(model) == SEGMENT:
            batch = _padded(batch)
        inputs, head, labels = model_inputs(model, batch, device), head_of(model), batch.labels.reshape(-1)
        trained, ignored = np.flatnonzero(labels != IGNORE), np.flatnonzero(labels == IGNORE)
        positions, targets = moved(trained, device), moved(labels[trained], device)
        if head is None:
            logits = model(**inputs).logits.flatten(0, 1)[positions]
            total = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            return LossSum(total, len(trained), ())
        computed = np.append(trained, ignored[: -len(trained) % ROW_MULTIPLE if on_cpu else 0])
        with at_rows(last_mlp_of(model), moved(computed, device)):
            hidden = inner_of(model).base_model(**inputs)[0].flatten(0, 1)
        return LossSum(summed_cross_entropy(hidden[positions], head, targets), len(trained), ())


def _padded(batch: MicroBatch) -> MicroBatch:
    """Append an untrained example to a packed micro-batch, so that its length is a multiple of `ROW_MULTIPLE`."""
    missing = -batch.ids.shape[1] % ROW_MULTIPLE
    if not missing:
        return batch
    parts = zip((batch.ids, batch.labels, batch.position_ids), (0, IGNORE, np.arange(missing)), strict=True)
    ids, labels, position_ids = (np.append(part, np.full((1, missing), fill), axis=1) for part, fill in parts)
    return MicroBatch(ids, labels, position_ids, None, (*batch.segments, missing))
