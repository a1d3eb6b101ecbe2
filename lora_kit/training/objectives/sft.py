"""Supervised fine-tuning: the cross-entropy of the trained tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lora_kit.data.packing import IGNORE, MicroBatch, pack
from lora_kit.data.tokens import Tokens
from lora_kit.kernels.attention import SEGMENT, attention_of, inner_of
from lora_kit.kernels.fusing import head_of, last_mlp_of
from lora_kit.kernels.limits import ROW_MULTIPLE
from lora_kit.kernels.loss import Head, summed_cross_entropy
from lora_kit.kernels.mlp import at_rows
from lora_kit.kernels.segments import moved
from lora_kit.model.forward import model_inputs
from lora_kit.training.objectives.objective import LossSum


class Sft:
    """Cross-entropy of every trained token; the weight is their number, and micro-batches may combine any examples.

    Args:
        sources: The names of the sources of a mixture. The loss of each is a metric of its own.
    """

    metrics: tuple[str, ...] = ()
    split = staticmethod(pack)

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self._sources = len(sources)
        if sources:
            self.metrics = tuple(map(metric_of, sources))

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
        groups = batch.by_source(trained, self._sources) if batch.sources else [trained]
        in_groups, sizes = np.concatenate(groups), [len(group) for group in groups]
        positions, targets = moved(in_groups, device), moved(labels[in_groups], device)
        if head is None:
            rows = model(**inputs).logits.flatten(0, 1)[positions]
        else:
            computed = np.append(trained, ignored[: -len(trained) % ROW_MULTIPLE if on_cpu else 0])
            with at_rows(last_mlp_of(model), moved(computed, device)):
                rows = inner_of(model).base_model(**inputs)[0].flatten(0, 1)[positions]
        if len(groups) == 1:
            total = _summed(rows, targets, head)
            return LossSum(total, len(trained), (total.detach(),) if batch.sources else ())
        parts = [
            _summed(part, target, head) if len(target) else rows.new_zeros((), dtype=torch.float32)
            for part, target in zip(rows.split(sizes), targets.split(sizes), strict=True)
        ]
        return LossSum(torch.stack(parts).sum(), len(trained), tuple(part.detach() for part in parts))


def metric_of(source: str) -> str:
    """Return the name of the metric that is the loss of a source."""
    return f"loss/{source}"


def _summed(rows: Float[Tensor, "rows width"], labels: Int64[Tensor, "rows"], head: Head | None) -> Float[Tensor, ""]:
    """Return the summed cross-entropy of hidden states, or of logits if there is no head to apply."""
    if head is None:
        return nn.functional.cross_entropy(rows.float(), labels, reduction="sum")
    return summed_cross_entropy(rows, head, labels)


def _padded(batch: MicroBatch) -> MicroBatch:
    """Append an untrained example to a packed micro-batch, so that its length is a multiple of `ROW_MULTIPLE`."""
    missing = -batch.ids.shape[1] % ROW_MULTIPLE
    if not missing:
        return batch
    parts = zip((batch.ids, batch.labels, batch.position_ids), (0, IGNORE, np.arange(missing)), strict=True)
    ids, labels, position_ids = (np.append(part, np.full((1, missing), fill), axis=1) for part, fill in parts)
    return replace(batch, ids=ids, labels=labels, position_ids=position_ids, segments=(*batch.segments, missing))
