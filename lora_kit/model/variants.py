"""The starts of the variants of LoRA, for which peft's own are not exact enough or change the base.

PiSSA and OLoRA start A and B with the strongest directions of a weight. peft subtracts their product from the weight,
which rounds the base and is impossible where it is quantised. Here the base stays as it is: the layer computes
W x + s (B A - B0 A0) x, where A0 and B0 are A and B of the start. They are constants, and part of every snapshot, since
a singular value decomposition has other bits on another machine.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lora_kit.errors import DataError, RecipeError
from lora_kit.kernels.dora import ADAPTER, is_dora, magnitude_of, row_norms
from lora_kit.kernels.gathered import gathered, unit_of
from lora_kit.kernels.lora import CONSTANTS, adapted_linear, adapters_of, constants_of
from lora_kit.kernels.nf4 import Nf4Linear
from lora_kit.model.state import FlatState, saved_name
from lora_kit.recipe.schema import Adapter

PREFIX = "base_model.model."
EXACT = 1024  # the smaller side of a weight up to which its singular values are computed exactly


@torch.no_grad()
def set_magnitudes(model: PeftModel) -> None:
    """Set the magnitudes of a fresh adapter to the norms of the rows of the weights, so that it changes nothing.

    peft computes them too, but in the dtype of the weights: in bf16 each row would change by up to 0.4%.
    """
    dtype = cast(Any, model.get_base_model()).dtype
    for module in (module for module in model.modules() if is_dora(module)):
        linear, (a, b) = adapted_linear(module), adapters_of([module])
        with gathered(unit_of(model, module)):
            magnitude_of(module).copy_(row_norms(linear.weight(dtype), a, b, linear.scale))


def add_dora(model: PeftModel) -> None:
    """Add DoRA to the LoRA layers of a sharded base; `set_magnitudes` gives the values.

    peft would compute them while it makes a layer, from the shard of a weight.

    Raises:
        RecipeError: A layer is gathered on its own and not inside of a larger unit.
    """
    for name, module in _layers(model):
        base = module.get_base_layer()
        if isinstance(base, FSDPModule):
            raise RecipeError(
                f"adapter.variant: dora with base.placement: sharded: {name.removeprefix(PREFIX)} is gathered only "
                "while its own product is computed, and DoRA reads its weight afterwards; take it out of "
                "adapter.targets, or set adapter.variant: lora or base.placement: replicated"
            )
        layer = (_DoraOfNf4 if isinstance(base, Nf4Linear) else DoraLinearLayer)(fan_in_fan_out=module.fan_in_fan_out)
        layer.weight = nn.Parameter(torch.empty(module.out_features, device=module.lora_A[ADAPTER].weight.device))
        module.lora_magnitude_vector[ADAPTER] = layer
        module.adapter_layer_names += ("lora_magnitude_vector",)
        module.lora_variant[ADAPTER], module.use_dora[ADAPTER] = DoraLinearVariant(), True


class _DoraOfNf4(DoraLinearLayer):
    """What peft computes for DoRA where the fast path does not, on the dequantised weight of an `Nf4Linear`."""

    def forward(self, x: Tensor, *, base_layer: Nf4Linear, **rest: Any) -> Tensor:
        """Return what is added to the output of the base."""
        whole = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False, device="meta")
        whole.weight, whole.bias = nn.Parameter(base_layer.dequantized(), requires_grad=False), base_layer.bias
        return cast(Tensor, super().forward(x, base_layer=whole, **rest))


class WithConstants(LoraVariant):
    """What peft computes for a layer with constants, where the fast path does not: W x + s (B A - B0 A0) x."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return the output of the layer from `result`, the output of its base."""
        a, b = adapters_of([module])
        dropped = module.lora_dropout[active_adapter](x.to(a.dtype))
        return result + (dropped @ a.T @ b.T * module.scaling[active_adapter]).to(result.dtype)


def attach_constants(model: nn.Module, state: FlatState) -> None:
    """Let the layers of a model subtract the constants of its state, which are views of it."""
    constants = state.constants_by_name()
    for name, module in _layers(model):
        a, b = (constants.get(f"{name}.lora_{letter}.weight") for letter in "AB")
        if a is not None and b is not None:
            vars(module)[CONSTANTS] = (a, b)
            module.lora_variant[ADAPTER] = WithConstants()


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((saved_name(name), module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def start_from_weights(model: nn.Module, adapter: Adapter, *, computes: bool = True) -> None:
    """Set A and B to the strongest directions of the weights, and the constants to A and -B.

    Args:
        model: The model with a fresh adapter.
        adapter: The recipe's section.
        computes: False only gathers the weights of a sharded base, for the process that computes.

    Raises:
        RecipeError: The rank is larger than a side of a weight.

    Source: PiSSA, Meng et al. 2024, arXiv 2404.02948, equations 2 and 3; OLoRA, Büyükakyüz 2024, arXiv 2406.01775.
    """
    for _, module in _layers(model):
        rank, scale, constants = module.r[ADAPTER], module.scaling[ADAPTER], constants_of(module)
        directions = min(module.in_features, module.out_features)
        if directions < rank:
            raise RecipeError(f"adapter.rank: {rank} is more than the {directions} directions of a layer")
        with gathered(unit_of(model, module)):
            weight = adapted_linear(module).weight(torch.float32).float().clone() if computes else None
        if weight is None:
            continue
        a, b = _of_singular_values(weight, rank, scale) if adapter.init == "pissa" else _of_qr(weight, rank)
        module.lora_A[ADAPTER].weight.copy_(a)
        module.lora_B[ADAPTER].weight.copy_(b)
        assert constants is not None
        constants[0].copy_(a)
        constants[1].copy_(-b)


def _of_singular_values(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B with s B A = the part of the weight with its largest singular values."""
    if min(weight.shape) <= EXACT:
        u, values, v = torch.linalg.svd(weight, full_matrices=False)
    else:  # a randomised SVD with 16 iterations, like peft's `pissa_niter_16`
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(weight, q=rank, niter=16)
        v = v.T
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _of_qr(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


Call = tuple[Mapping[str, Any], Tensor]
"""The arguments of a call of a model, and the trained positions as a mask [rows, length]."""


@torch.no_grad()
def start_from_inputs(model: nn.Module, calls: Iterable[Call]) -> None:
    """Set A to the principal directions of the inputs of its layer at trained positions; B stays zero.

    Args:
        model: The model with a fresh adapter, before its kernels are fused.
        calls: The calls of the first step.

    Raises:
        DataError: The first step has fewer trained tokens than twice the rank.

    Source: EVA, Paischer et al. 2024, arXiv 2410.07170; without its redistribution of ranks over the layers.
    """
    layers = dict(_layers(model))
    # follow more directions than the rank: one that is weak in this micro-batch may be strong in the next
    counts = {name: min(2 * module.r[ADAPTER], module.in_features) for name, module in layers.items()}
    found = {name: IncrementalPCA(n_components=count, lowrank=False) for name, count in counts.items()}
    with ExitStack() as hooks:
        rows: dict[str, list[Tensor]] = {name: [] for name in layers}
        trained = [torch.empty(0)]
        for name, module in layers.items():
            hooks.enter_context(_reading(module, rows[name], trained))
        for arguments, mask in calls:
            trained[0] = mask
            model(**arguments)
            for name, kept in rows.items():
                if sum(map(len, kept)) >= counts[name]:
                    found[name].partial_fit(torch.cat(kept).float())
                    kept.clear()
    for name, module in layers.items():
        if not hasattr(found[name], "components_"):
            raise DataError(
                f"adapter.init: eva needs {counts[name]} trained tokens in the first step; raise train.batch_size"
            )
        module.lora_A[ADAPTER].weight.copy_(found[name].components_[: module.r[ADAPTER]])


@contextmanager
def _reading(module: nn.Module, rows: list[Tensor], trained: list[Tensor]) -> Iterator[None]:
    """Append the input of a layer at trained positions to `rows` in every call."""

    def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(inputs[0].flatten(0, -2)[trained[0].flatten()])

    handle = module.register_forward_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()


def widened(config: LoraConfig) -> dict[str, Any]:
    """Return the changes of peft's configuration for an adapter that is saved with its constants: twice the rank.

    Source: `path_initial_model_for_weight_conversion` of `save_pretrained` in peft.
    """
    factor = 2**0.5 if config.use_rslora else 2
    return {
        "r": 2 * config.r,
        "lora_alpha": factor * config.lora_alpha,
        "rank_pattern": {pattern: 2 * rank for pattern, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {pattern: factor * alpha for pattern, alpha in (config.alpha_pattern or {}).items()},
    }
