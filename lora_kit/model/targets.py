"""Find the layers of a base that get an adapter.

`all-linear` selects the layers that are cheap to adapt: every linear layer except the output head and, in a
mixture-of-experts model, the routers and the experts. A router trained on few examples would unbalance the experts. The
experts of a layer are a single three-dimensional tensor, and adapting it needs a copy of the tensor in every forward
pass; so experts are adapted only if the recipe names them. Layers for which peft would adapt a different layer are left
out of `all-linear`, and are an error if the recipe names them. In a base that also sees or hears, only the language
model is adapted, because examples are text: the layers of its other towers would get no gradient.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from lora_kit.errors import RecipeError
from lora_kit.model.patterns import named, narrowed, refuse_unknown
from lora_kit.recipe.schema import Adapter

ROUTER = re.compile(r"(^|[._])(gate|router)(\.|$)")
STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
READ_BY_KERNELS = (".dt_proj", ".out_proj")  # kernels of these families use the weights directly, without an adapter


@dataclass(frozen=True)
class Targets:
    """The layers to adapt, by their full names in the base.

    Attributes:
        modules: Linear layers.
        experts: Three-dimensional expert parameters.
        left_out: Layers of the language model that all-linear does not select; without layer numbers.
        towers: The modules outside of the language model that have linear layers, e.g. `model.vision_tower`.
    """

    modules: tuple[str, ...]
    experts: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What the user should know about layers without an adapter."""
        notes = []
        if self.left_out:
            notes.append(
                f"adapter.targets: all-linear leaves out {', '.join(self.left_out)}; routers stay as they are, experts "
                "are trained when adapter.targets names them"
            )
        if self.towers:
            notes.append(
                f"adapter.targets: {', '.join(self.towers)} get no adapter, because text does not reach these layers; "
                "only the language model is adapted"
            )
        if self.experts:
            notes.append(
                "adapter.targets: it names experts, which peft and transformers serve as they are saved; vLLM needs "
                "`lora-kit export RUN --to vllm`, or `lora-kit merge`"
            )
        return notes


def find_targets(base: PreTrainedModel, adapter: Adapter) -> Targets:
    """Return the layers of a base that `adapter.targets`, `adapter.layers` and `adapter.exclude` select.

    Raises:
        RecipeError: A name or pattern matches neither a linear layer nor an expert parameter of the language model.
    """
    found = _matching(base, adapter)
    kept = set(narrowed(adapter, [*found.modules, *found.experts], _without_numbers([*found.modules, *found.experts])))
    modules, experts = (tuple(path for path in paths if path in kept) for paths in (found.modules, found.experts))
    return replace(found, modules=modules, experts=experts)


def _matching(base: PreTrainedModel, adapter: Adapter) -> Targets:
    """Return the layers that `adapter.targets` selects."""
    every = [path for path, module in base.named_modules() if is_linear(module)]
    linear = _in_language_model(base, every)
    tensors = [name for name, tensor in base.named_parameters() if "experts" in name.split(".") and tensor.ndim == 3]
    experts = _in_language_model(base, tensors)
    outside = [path for path in every if path not in set(linear)]
    towers = tuple(dict.fromkeys(".".join(path.split(".")[:2]) for path in outside))
    if isinstance(adapter.targets, str):
        return replace(_all_linear(base, linear, experts), towers=towers)
    if only_outside := [name for name in adapter.targets if named(name, outside) and not named(name, linear + experts)]:
        raise RecipeError(
            f"adapter.targets: {only_outside} match only layers that text does not reach ({', '.join(towers)}); choose "
            "layers of the language model"
        )
    available = [*sorted({path.rpartition(".")[2] for path in linear}), *_without_numbers(experts)]
    refuse_unknown("adapter.targets", adapter.targets, [*linear, *experts], available)
    modules, parameters = (
        [name for target in adapter.targets for name in named(target, names)] for names in (linear, experts)
    )
    return Targets(tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(parameters)), towers=towers)


def _in_language_model(base: PreTrainedModel, names: list[str]) -> list[str]:
    """Return the layers or parameters that belong to the language model, or to its head: all of them in most bases."""
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    if base.config.get_text_config() is base.config:
        return names
    own = [path for path, module in base.named_modules() if path and (module is decoder or module is head)]
    if not any(base.get_submodule(path) is decoder for path in own):
        return names
    return [name for name in names if name.startswith(tuple(f"{path}." for path in own)) or name in own]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, including the transposed Conv1D of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _all_linear(base: PreTrainedModel, linear: list[str], experts: list[str]) -> Targets:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    head = base.get_output_embeddings()
    body = [path for path in linear if base.get_submodule(path) is not head]
    mixture = experts or [path for path in body if "experts" in path.split(".")]
    selected = [path for path in body if not (mixture and ROUTER.search(path))]
    if base.config.model_type in STATE_SPACE:
        selected = [path for path in selected if not path.endswith(READ_BY_KERNELS)]
    # peft replaces targets by their names in transformers 5, and takes e.g. `gate_proj` of a shared expert for the
    # `gate_proj` of an expert; let it convert the targets here, and leave out those that it replaces
    config = LoraConfig(target_modules=selected)
    convert_peft_config_for_transformers(config, base, None)
    kept = [path for path in selected if path in set(config.target_modules or ())]
    routers = [path for path, _ in base.named_modules() if mixture and ROUTER.search(path)]
    left_out = dict.fromkeys([path for path in body if path not in kept] + routers + experts)
    return Targets(tuple(kept), (), tuple(_without_numbers(left_out)))


def _without_numbers(paths: Iterable[str]) -> list[str]:
    """Return the distinct names after the layer number, e.g. `self_attn.q_proj`, sorted."""
    return sorted({re.sub(r"^.*\.\d+\.", "", path) for path in paths})


def refuse_others(targets: Targets, adapted: Iterable[str]) -> None:
    """Check that peft adapted exactly the layers that were selected.

    Args:
        targets: The layers that were selected.
        adapted: The names of the adapter's parameters in the base.

    Raises:
        RecipeError: peft adapted other layers.
    """
    found = {re.split(r"(?:\.base_layer)*\.lora_", name)[0] for name in adapted}
    expected = {*targets.modules, *(name.rpartition(".")[0] for name in targets.experts)}
    if found != expected:
        differences = (found - expected, expected - found)
        wrong, missing = (", ".join(_without_numbers(paths)) or "nothing" for paths in differences)
        raise RecipeError(
            f"adapter.targets: peft adapts {wrong} instead of {missing} in this model family; choose other layers"
        )
