"""Which systems are measured, and with which settings: what they do by default, and the best that is known.

What decides what is learned (examples a step, adapter, optimizer, learning rate) is the same everywhere; settings only
decide how it is computed. `default` is what a user gets who names nothing else.
"""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One way to run a system.

    Attributes:
        rows: Rows of a batch on the device; examples a step are reached by accumulation.
        arguments: More arguments for the system's configuration.
        by_length: The examples of a step go through it ordered by length, so that rows of a batch are about equally
            long. transformers' own sampler mixes 50 batches, and so trains other examples in each step.
        flat: Batches are one row without padding (DataCollatorWithFlattening).
        adapter_in_bf16: peft's `autocast_adapter_dtype=False`.
        own_order: The system decides which examples a step trains on.
        requires: A package without which this setting is nothing.
    """

    rows: int = 8
    arguments: dict[str, Any] = field(default_factory=dict)
    by_length: bool = False
    flat: bool = False
    adapter_in_bf16: bool = False
    own_order: bool = False
    requires: str | None = None

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed twice."""
        names = ("gradient_checkpointing", "train.activation_checkpointing")
        return any(str(self.arguments.get(name)).lower() == "true" for name in names)


GROUPED = {"train_sampling_strategy": "group_by_length"}
PLAIN_TRL = {"gradient_checkpointing": False}
LIGER = {"use_liger_kernel": True}

# Our default is our best. The peers' `best` was found by measuring all others on two cores with AVX-512 bf16. One row
# at a time has no padding and lets attention be causal without a mask, so at 30m (tokens/s) it beats flat rows with
# their block mask (1,544), rows of like lengths (2: 1,604; 4: 1,245) and TRL's packing (1,035): 1,650, and compiled
# 1,892
SYSTEMS: dict[str, dict[str, Setting]] = {
    "lora_kit": {
        "default": Setting(),
    },
    "trainer": {
        "default": Setting(),
        "best": Setting(rows=1, adapter_in_bf16=True, arguments={"torch_compile": True}),
        "one": Setting(rows=1),
        "one-bf16": Setting(rows=1, adapter_in_bf16=True),
        "two": Setting(rows=2, by_length=True, adapter_in_bf16=True),
        "four": Setting(rows=4, by_length=True, adapter_in_bf16=True),
        "grouped": Setting(rows=4, arguments=GROUPED, adapter_in_bf16=True, own_order=True),
        "flat": Setting(rows=4, flat=True, adapter_in_bf16=True),
        "flat-16": Setting(rows=16, flat=True, adapter_in_bf16=True),
        "mixed": Setting(rows=1, arguments={"bf16": True}),
        "compiled-two": Setting(rows=2, by_length=True, adapter_in_bf16=True, arguments={"torch_compile": True}),
        "compiled-flat": Setting(rows=2, flat=True, adapter_in_bf16=True, arguments={"torch_compile": True}),
        "compiled-four": Setting(rows=4, by_length=True, adapter_in_bf16=True, arguments={"torch_compile": True}),
    },
    "trl": {
        "default": Setting(),
        "best": Setting(rows=1, arguments=PLAIN_TRL | {"bf16": False, "torch_compile": True}, adapter_in_bf16=True),
        "one-bf16": Setting(rows=1, arguments=PLAIN_TRL | {"bf16": False}, adapter_in_bf16=True),
        "one": Setting(rows=1, arguments=PLAIN_TRL),
        "four": Setting(rows=4, by_length=True, arguments=PLAIN_TRL | {"bf16": False}, adapter_in_bf16=True),
        "padding-free": Setting(
            rows=4,
            arguments=PLAIN_TRL | {"bf16": False, "padding_free": True, "max_length": None},
            adapter_in_bf16=True,
        ),
        "packed": Setting(
            rows=1,
            arguments=PLAIN_TRL | {"bf16": False, "packing": True, "packing_strategy": "bfd"},
            adapter_in_bf16=True,
            own_order=True,
        ),
    },
}

# The fastest peer comes first, in case the time runs out. On an H200 at 8B Trainer gives 6,940 tokens/s for 16 flat
# rows with Liger's kernels, 6,874 for 32, 2,592 for 4 padded rows of like lengths with them, 2,268 without
GPU: dict[str, dict[str, Setting]] = {
    "lora_kit": {
        "default": Setting(),
        "checkpointed": Setting(arguments={"train.micro_batch_tokens": 8192, "train.activation_checkpointing": "true"}),
    },
    "trainer": {
        "liger-flat": Setting(rows=16, flat=True, adapter_in_bf16=True, arguments=LIGER, requires="liger_kernel"),
        "liger-flat-32": Setting(rows=32, flat=True, adapter_in_bf16=True, arguments=LIGER, requires="liger_kernel"),
        "liger": Setting(rows=4, by_length=True, adapter_in_bf16=True, arguments=LIGER, requires="liger_kernel"),
        "four": Setting(rows=4, by_length=True, adapter_in_bf16=True),
        "flat": Setting(rows=16, flat=True, adapter_in_bf16=True),
        "default": Setting(),
    },
    "unsloth": {"best": Setting(rows=4, by_length=True, requires="unsloth")},
}


def setting_of(system: str, name: str, changes: list[str], *, on_gpu: bool = False) -> Setting:
    """Return a setting, with changes of a recipe (KEY=VALUE)."""
    setting = (GPU if on_gpu else SYSTEMS)[system][name]
    return replace(setting, arguments=setting.arguments | dict(one.split("=", 1) for one in changes))
