"""Which tensors of a base get an adapter.

`all-linear` means what can be adapted for little: every linear layer but the head, and in a mixture of experts neither
the router (a handful of examples would unbalance the experts) nor the experts themselves, which are one tensor of three
dimensions and would need a copy of their own size in every forward pass. The experts are adapted when they are named.
What peft would put somewhere else than it was asked to is left out or refused, never done in silence.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lora_kit.errors import RecipeError
from lora_kit.recipe.schema import Adapter

ROUTER = re.compile(r"(^|[._])(gate|router)(\.|$)")
STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
READ_PAST_THE_LAYER = (".dt_proj", ".out_proj")  # their kernels take these weights and never call an adapter there


@dataclass(frozen=True)
class Targets:
    """Full names within the base.

    Attributes:
        modules: Linear layers.
        experts: Tensors of three dimensions.
        left_out: What all-linear could mean as well and does not, without layer numbers.
    """

    modules: tuple[str, ...]
    experts: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def find_targets(base: PreTrainedModel, adapter: Adapter) -> Targets:
    """Return what `adapter.targets` means in this base.

    Raises:
        RecipeError: A name stands for no linear layer and for no expert tensor.
    """
    linear = [path for path, module in base.named_modules() if is_linear(module)]
    experts = [name for name, tensor in base.named_parameters() if "experts" in name.split(".") and tensor.ndim == 3]
    if isinstance(adapter.targets, str):
        return _all_linear(base, linear, experts)
    unknown = [target for target in adapter.targets if not _named(target, [*linear, *experts])]
    if unknown:
        found = [*sorted({path.rpartition(".")[2] for path in linear}), *_without_numbers(experts)]
        raise RecipeError(f"adapter.targets: {unknown} fit no layer of the base; it has {found}")
    modules, tensors = (
        [one for target in adapter.targets for one in _named(target, all_)] for all_ in (linear, experts)
    )
    return Targets(tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(tensors)))


def is_linear(module: nn.Module) -> bool:
    """Return whether this is a linear layer; GPT-2 and kin have theirs transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _all_linear(base: PreTrainedModel, linear: list[str], experts: list[str]) -> Targets:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    head = base.get_output_embeddings()
    body = [path for path in linear if base.get_submodule(path) is not head]
    mixture = experts or [path for path in body if "experts" in path.split(".")]
    fit = [path for path in body if not (mixture and ROUTER.search(path))]
    if base.config.model_type in STATE_SPACE:
        fit = [path for path in fit if not path.endswith(READ_PAST_THE_LAYER)]
    # peft moves names that had a meaning in transformers 4 (a shared expert's gate_proj) to the experts' tensors
    config = LoraConfig(target_modules=fit)
    convert_peft_config_for_transformers(config, base, None)
    kept = [path for path in fit if path in set(config.target_modules or ())]
    routers = [path for path, _ in base.named_modules() if mixture and ROUTER.search(path)]
    left_out = dict.fromkeys([path for path in body if path not in kept] + routers + experts)
    return Targets(tuple(kept), (), tuple(_without_numbers(left_out)))


def _named(target: str, paths: list[str]) -> list[str]:
    return [path for path in paths if path == target or path.endswith(f".{target}")]


def _without_numbers(paths: Iterable[str]) -> list[str]:
    return sorted({re.sub(r"^.*\.\d+\.", "", path) for path in paths})


def refuse_others(targets: Targets, adapted: Iterable[str]) -> None:
    """Check that peft put adapters where they were asked for, and nowhere else.

    Args:
        targets: What was asked for.
        adapted: Names of the adapter's parameters within the base.

    Raises:
        RecipeError: It did not.
    """
    where = {re.split(r"(?:\.base_layer)*\.lora_", name)[0] for name in adapted}
    asked = {*targets.modules, *(name.rpartition(".")[0] for name in targets.experts)}
    if where != asked:
        wrong, missing = (", ".join(_without_numbers(paths)) or "nothing" for paths in (where - asked, asked - where))
        raise RecipeError(
            f"adapter.targets: peft adapts {wrong} instead of {missing} in this family; name other layers"
        )
