"""Write an adapter in the layout that serving engines read.

The experts of a layer are one three-dimensional parameter in transformers 5, which peft adapts as `target_parameters`:
A of all experts in one matrix, B in another. vLLM ignores or rejects that. It reads an adapter for each expert and
projection, under the names of the base's files. A layer's gate and up projection share A, so no number changes.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_kit.artifacts.load import open_adapter
from lora_kit.artifacts.locate import checkpoint_at
from lora_kit.errors import CheckpointError, InputError
from lora_kit.runs.store import ADAPTER, ADAPTER_CONFIG

EXPERTS = re.compile(r"^(?P<layer>.*\.experts)(?P<inner>(\.base_layer)*)\.lora_(?P<letter>[AB])\.weight$")
NAMES = {  # names of gate, up and down in the files of a family whose experts peft converts
    "mixtral": ("w1", "w3", "w2"),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
}
# name of the experts' module in transformers and in the files
MOVED = {"mixtral": (".mlp.experts", ".block_sparse_moe.experts")}


@dataclass(frozen=True)
class Exported:
    """An exported adapter.

    Attributes:
        folder: Its folder.
        experts: The number of experts of a layer; 0 without adapted experts: the tensors are those of the checkpoint.
        tensors: The number of tensors.
    """

    folder: str
    experts: int
    tensors: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def export(
    path: str | Path, out: str | Path, *, base: str | Path | None = None, trust_remote_code: bool = False
) -> Exported:
    """Write an adapter for vLLM: with an adapter for each expert, if experts are adapted.

    Args:
        path: A checkpoint, run or Hub name, as for `lora_kit.load`.
        out: A new or empty folder.
        base: The base's folder, if it is not where it was in training.
        trust_remote_code: Whether transformers may run Python files of the base.

    Raises:
        InputError: `out` is not an empty folder.
        CheckpointError: No engine is known to read such an adapter; the message gives the reason.
    """
    out, checkpoint = Path(out), checkpoint_at(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: it exists and is not an empty folder; choose another --out")
    config = json.loads((checkpoint / ADAPTER_CONFIG).read_text())
    loaded = open_adapter(checkpoint, base=base, trust_remote_code=trust_remote_code)
    if loaded.recipe.adapter.variant == "dora":
        raise CheckpointError(f"{checkpoint}: vLLM reads no DoRA adapters; use `lora-kit merge`")
    tensors, facts = load_file(checkpoint / ADAPTER), loaded.model.config.get_text_config().to_dict()
    experts = 0
    if config.get("target_parameters"):
        experts = int(facts.get("num_experts") or facts.get("num_local_experts") or 0)
        family = family_of(str(facts["model_type"]))
        if family is None or not experts or loaded.recipe.adapter.rank_pattern:
            raise CheckpointError(
                f"{checkpoint}: the experts of {facts['model_type']} have no layout that vLLM reads for each expert, "
                "or adapter.rank_pattern gives them different ranks; use `lora-kit merge`"
            )
        tensors = dict(per_expert(tensors, experts, family, width=int(facts["hidden_size"])))
        leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".experts." in name}
        config |= {"target_modules": sorted({*config["target_modules"], *leaves}), "target_parameters": None}
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / ADAPTER, {"format": "pt"})
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return Exported(str(out), experts, len(tensors))


def family_of(model_type: str) -> str | None:
    """Return the key of `NAMES` for the experts of a model type; None if peft does not convert their names."""
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN

    family = model_type if model_type in NAMES else _MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return family if family in NAMES else None


def per_expert(tensors: Mapping[str, Tensor], experts: int, family: str, *, width: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an adapter, with separate tensors for each expert.

    Args:
        tensors: By PEFT's names; A of the experts is [experts * rank, inputs], B is [outputs, rank * experts].
        experts: The number of experts of a layer.
        family: A key of `NAMES`.
        width: The hidden size of the base, which is the width of the input of gate and up.
    """
    gate, up, down = NAMES[family]
    for name, tensor in tensors.items():
        match = EXPERTS.match(name)
        if match is None:
            yield name, tensor
            continue
        layer, letter = match["layer"].replace(*MOVED.get(family, ("", ""))), match["letter"]
        a = tensors[f"{match['layer']}{match['inner']}.lora_A.weight"]
        other = any(key.startswith(f"{match['layer']}.base_layer.") for key in tensors)
        # peft wraps the experts twice: gate and up are the inner wrapper
        into = bool(match["inner"]) if other else a.shape[1] == width
        if letter == "A":
            parts = tensor.view(experts, -1, tensor.shape[1]).unbind(0)
        else:
            parts = tensor.view(tensor.shape[0], -1, experts).unbind(2)
        for number, part in enumerate(parts):
            halves = part.chunk(2) if letter == "B" else (part, part)
            named = [(gate, halves[0]), (up, halves[1])] if into else [(down, part)]
            for leaf, value in named:
                yield f"{layer}.{number}.{leaf}.lora_{letter}.weight", value.clone()
