"""The state of a script's run, as it lies in the live region and in a checkpoint; see `lora_kit.integrations`.

A snapshot is a document and the values of the tensors, one after the other. The document is JSON: whatever is no
tensor, or is a small one. Its size changes from step to step, so it has a fixed space at the beginning of the slot,
after its length. A checkpoint has the tensors in the files of weights and optimizer, and the document in
`trainer.json`. Nothing is pickled.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated

from pydantic import Field

from lora_kit.data.counts import Count
from lora_kit.errors import CheckpointError
from lora_kit.runs import store
from lora_kit.runs.formats import Amount
from lora_kit.runs.layout import BYTES, Dtype
from lora_kit.runs.manifest import ScriptFacts

TRAINABLE = "trainable.safetensors"  # the weights of a model that is not one of PEFT
LENGTH_BYTES = 8

Tensors = dict[str, tuple[Dtype, tuple[Count, ...]]]


@dataclass(frozen=True)
class ScriptJob:
    """The content of job.json beside the region of a script's run; see `live.JobFile`.

    Attributes:
        document_bytes: The space of the document in a slot, its length included.
        weights: The dtype and the shape of the trained tensors, by their names in the checkpoint's file.
        optimizer: The same for the optimizer's tensors.
        adapter_config: The text of adapter_config.json; None if the model is not one of PEFT.
        facts: The part of the manifest that is the same for every step.
        every_seconds: The longest time between two checkpoints.
        keep: How many of the newest checkpoints stay.
        keep_every: As in `live.JobFile`.
        best: As in `live.JobFile`.
    """

    document_bytes: Annotated[int, Field(ge=LENGTH_BYTES, lt=2**40)]
    weights: Tensors
    optimizer: Tensors
    adapter_config: str | None
    facts: ScriptFacts
    every_seconds: Amount
    keep: Count
    keep_every: None = None
    best: bool = False

    @property
    def weights_file(self) -> str:
        """The name of the file of the weights."""
        return TRAINABLE if self.adapter_config is None else store.ADAPTER

    def sizes(self) -> list[int]:
        """Return the bytes of the document's space and of each tensor, in the order of a slot."""
        tensors = [*self.weights.values(), *self.optimizer.values()]
        return [self.document_bytes, *(BYTES[dtype] * math.prod(shape) for dtype, shape in tensors)]

    def split(self, payload: memoryview) -> tuple[bytes, dict[str, memoryview], dict[str, memoryview]]:
        """Return the document, and the bytes of the tensors of weights and optimizer.

        Raises:
            CheckpointError: The document's length is not possible.
        """
        pieces = [payload[begin:end] for begin, end in pairwise(accumulate(self.sizes(), initial=0))]
        length = int.from_bytes(pieces[0][:LENGTH_BYTES], "little")
        if length > self.document_bytes - LENGTH_BYTES:
            raise CheckpointError(f"live snapshot: {length:,} bytes of document in {self.document_bytes:,}")
        document, tensors = bytes(pieces[0][LENGTH_BYTES:][:length]), pieces[1:]
        weights = dict(zip(self.weights, tensors[: len(self.weights)], strict=True))
        return document, weights, dict(zip(self.optimizer, tensors[len(self.weights) :], strict=True))

    def files(self, payload: memoryview) -> dict[str, list[bytes | memoryview]]:
        """Return the content of a checkpoint's files, pieces in order."""
        document, weights, optimizer = self.split(payload)
        files: dict[str, list[bytes | memoryview]] = {
            self.weights_file: [store.header(self.weights, {"__metadata__": {"format": "pt"}}), *weights.values()],
            store.OPTIMIZER: [store.header(self.optimizer, {}), *optimizer.values()],
            store.TRAINER: [document],
        }
        if self.adapter_config is not None:
            files[store.ADAPTER_CONFIG] = [self.adapter_config.encode()]
        return files
