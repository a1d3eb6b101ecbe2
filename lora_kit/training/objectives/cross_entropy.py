"""The summed cross-entropy of groups of trained tokens, on the fast path: what every objective is computed from."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_kit.data.packing import IGNORE, MicroBatch
from lora_kit.kernels.attention import SEGMENT, attention_of, inner_of
from lora_kit.kernels.fusing import head_of, last_mlp_of
from lora_kit.kernels.limits import ROW_MULTIPLE
from lora_kit.kernels.loss import summed_cross_entropy
from lora_kit.kernels.mlp import at_rows
from lora_kit.kernels.segments import moved
from lora_kit.model.forward import model_inputs


def cross_entropy_of_groups(
    model: nn.Module,
    batch: MicroBatch,
    device: torch.device,
    groups: Sequence[np.ndarray],
    targets: np.ndarray | None = None,
) -> Float[Tensor, "sums"]:
    """Return the cross-entropy (nats) of each group of positions, summed in fp32.

    Args:
        model: The base with or without its adapter.
        batch: The micro-batch.
        device: The device of the model.
        groups: Trained positions of the flattened rows, int64. A position may be in two groups.
        targets: The labels of the positions of all groups, one after the other; None for those of the micro-batch.
    """
    on_cpu = device.type == "cpu"
    if on_cpu and attention_of(model) == SEGMENT:
        batch = _padded(batch)
    inputs, head, trained = model_inputs(model, batch, device), head_of(model), np.concatenate(groups)
    sizes, own = [len(group) for group in groups], batch.labels.reshape(-1)[trained] if targets is None else targets
    positions, labels = moved(trained, device), moved(own, device)
    if head is None:
        logits = model(**inputs).logits.flatten(0, 1)[positions].float()
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        return torch.stack([part.sum() for part in each.split(sizes)])
    # the head is applied only at trained positions, and the last MLP computes only these and a few to fill up its rows
    needed = np.unique(trained)
    others = np.setdiff1d(np.arange(batch.ids.size), needed, assume_unique=True)
    computed = np.append(needed, others[: -len(needed) % ROW_MULTIPLE if on_cpu else 0])
    with at_rows(last_mlp_of(model), moved(computed, device)):
        rows = inner_of(model).base_model(**inputs)[0].flatten(0, 1)[positions]
    return summed_cross_entropy(rows, head, labels, sizes)


def _padded(batch: MicroBatch) -> MicroBatch:
    """Append an untrained example to a packed micro-batch, so that its length is a multiple of `ROW_MULTIPLE`."""
    missing = -batch.ids.shape[1] % ROW_MULTIPLE
    if not missing:
        return batch
    parts = zip((batch.ids, batch.labels, batch.position_ids), (0, IGNORE, np.arange(missing)), strict=True)
    ids, labels, position_ids = (np.append(part, np.full((1, missing), fill), axis=1) for part, fill in parts)
    return replace(batch, ids=ids, labels=labels, position_ids=position_ids, segments=(*batch.segments, missing))
