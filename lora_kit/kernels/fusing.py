"""Fast implementations of parts of a model. Each is compared with the model's own code before it is used.

A part replaces the `forward` of the modules that it fits, and is left out where its results differ. A model family that
lora_kit was not written for therefore trains with transformers' code, or with the parts that fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_kit.kernels import dispatch, mlp, norm, rotary
from lora_kit.kernels.attention import inner_of
from lora_kit.kernels.gathered import gathered, type_of, unit_of
from lora_kit.kernels.lora import SharedInput, adapted_linear, fusable, quantized
from lora_kit.kernels.loss import Head
from lora_kit.kernels.plain import ACTIVATIONS

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
HEAD = "_head_of_lora_kit"  # attribute of a model: its `Head`, if the part `loss` is in use
LAST_MLP = "_last_mlp_of_lora_kit"  # attribute of a model: the MLP of its last layer, if the part `last mlp` is in use
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the largest number of a row


def use_kernels(model: nn.Module, wanted: Sequence[str] | None, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """Let a model with an adapter compute with the fast parts that fit it.

    Args:
        model: The model, already on its device and in the precision of training.
        wanted: The parts that the run began with; None to choose.
        inputs: Arguments of a small call of the model, for comparing results.

    Returns:
        The parts in use, of `lora`, `mlp`, `norm`, `rotary`, `loss` and `last mlp`.
    """
    test_inputs = inputs if wanted is None else None
    parts: dict[str, Callable[[], bool]] = {
        "lora": lambda: _fuse_adapters(model),
        "mlp": lambda: _fuse_mlps(model),
        "norm": lambda: _fuse_norms(model),
        "rotary": lambda: _fuse_rotary(model),
        "loss": lambda: _fuse_loss(model, test_inputs),
        "last mlp": lambda: _narrow_last_mlp(model, test_inputs),
    }
    return [name for name, use in parts.items() if (wanted is None or name in wanted) and use()]


def about(model: nn.Module, used: Sequence[str]) -> str:
    """Describe the parts in use."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    left_to_peft = [name.removesuffix(".base_layer") for name in layers if not fusable(model.get_submodule(name))]
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in left_to_peft}))
    by_peft = f"; {kinds} by peft" if left_to_peft else ""
    names = {
        "lora": f"fused adapters ({len(layers) - len(left_to_peft)} of {len(layers)}{by_peft})",
        "mlp": "fused gated MLP",
        "norm": "fused norms",
        "rotary": "fused rotary positions",
        "loss": "loss at trained positions",
        "last mlp": "last MLP at trained positions",
    }
    return ", ".join(names[part] for part in used) or "none"


def pools_memory(model: nn.Module, used: Sequence[str]) -> bool:
    """Return whether nearly all activations of a micro-batch are in the kernels' buffer pool."""
    layers, head = [module for module in model.modules() if isinstance(module, LoraLayer)], head_of(model)
    if not {"lora", "mlp", "norm", "rotary", "loss"} <= set(used) or head is None or head.cap is not None:
        return False
    fused = all(
        fusable(layer) and not adapted_linear(layer).dropout and not quantized(layer.get_base_layer())
        for layer in layers
    )
    capped = inner_of(model).config.get_text_config().to_dict().get("attn_logit_softcapping")
    return fused and not capped and dispatch.backend_of(head.weight).pools_memory


def head_of(model: nn.Module) -> Head | None:
    """Return the head that the part `loss` applies to hidden states; None if the model computes its logits itself."""
    head: Head | None = vars(inner_of(model)).get(HEAD)
    return head


def last_mlp_of(model: nn.Module) -> nn.Module | None:
    """Return the MLP of the last layer if the part `last mlp` is in use, otherwise None.

    That part computes this MLP only at trained positions, because no later operation reads the other positions.
    """
    last_mlp: nn.Module | None = vars(inner_of(model)).get(LAST_MLP)
    return last_mlp


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let a model recompute the activations of its layers in the backward pass instead of keeping them."""
    settings = {"use_reentrant": False, "context_fn": partial(checkpoint_contexts, model)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def checkpoint_contexts(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the (forward, recompute) contexts for torch.utils.checkpoint.

    With the part `last mlp`, forward computes the last layer's MLP only at the rows that `mlp.at_rows` has set. The
    recompute context sets the same rows again, because `at_rows` may have ended before the backward pass.
    """
    last_mlp = last_mlp_of(model)
    return nullcontext(), mlp.at_rows(last_mlp, vars(last_mlp)[mlp.ROWS] if last_mlp else None)


def _fuse_adapters(model: nn.Module) -> bool:
    """Compute each layer and its adapter in one function, and layers that read the same input together.

    Returns:
        Whether the model has such layers.
    """
    grouped = set[nn.Module]()
    for parent in list(model.modules()):
        for names in SAME_INPUT:
            siblings = [child for name, child in parent.named_children() if name in names and fusable(child)]
            siblings = [child for child in siblings if child.in_features == siblings[0].in_features]
            grouped.update(siblings)
            if siblings:
                SharedInput(siblings)
    alone = [module for module in model.modules() if fusable(module) and module not in grouped]
    for module in alone:
        SharedInput([module])
    return bool(grouped or alone)


def _fuse_mlps(model: nn.Module) -> bool:
    facts = inner_of(model).config.get_text_config().to_dict()
    activation = facts.get("hidden_activation") or facts.get("hidden_act") or ""
    fitting = [module for module in model.modules() if activation in ACTIVATIONS and mlp.gated(module)]
    return _use_where_equal(
        model, fitting, lambda module: mlp.fuse(module, activation), lambda module: module.gate_proj.in_features
    )


def _fuse_norms(model: nn.Module) -> bool:
    named = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    norms = [
        module
        for module in named
        if {"variance_epsilon", "eps"} & vars(module).keys() and "weight" in module._parameters
    ]
    llama, gemma = (
        _use_where_equal(model, norms, partial(norm.fuse, gemma=gemma), lambda module: len(module.weight))
        for gemma in (False, True)
    )
    return llama or gemma


@torch.no_grad()
def _fuse_rotary(model: nn.Module) -> bool:
    used = False
    for module in model.modules():
        own, width = rotary.rotation_of(module), getattr(module, "head_dim", None)
        if own is not None and width is not None and _rotates_equally(own, width, next(module.parameters())):
            rotary.fuse(module)
            used = True
    return used


def _rotates_equally(own: rotary.Rotation, width: int, like: Tensor) -> bool:
    """Return whether a family rotates queries and keys as `Rotary` does."""
    heads, angles = _test_rows(3 * width, like).view(1, 5, 3, width).transpose(1, 2), _test_rows(width, like)
    arguments = (heads[:, :2], heads[:, 2:], angles.cos(), angles.sin())
    try:
        pairs = zip(own(*arguments), rotary.rotated(own, *arguments), strict=True)
        return all(_equal(*row) for pair in pairs for row in zip(*(x.unbind(2) for x in pair), strict=True))
    except (TypeError, ValueError, RuntimeError):
        return False


@torch.no_grad()
def _use_where_equal(
    model: nn.Module,
    modules: Sequence[nn.Module],
    fuse: Callable[[Any], Callable[[], None]],
    width: Callable[[Any], int],
) -> bool:
    """Fuse each module whose output for test rows stays the same up to `TOLERANCE`.

    Args:
        model: The model.
        modules: The modules of the model to try.
        fuse: Replaces a module's forward; returns a function that restores it.
        width: Returns the width of a module's input.

    Returns:
        Whether any module is fused now.
    """
    used = False
    for module in modules:
        with gathered(unit_of(model, module)):
            x = _test_rows(width(module), next(module.parameters()))
            before, undo = module(x), fuse(module)
            equal = all(_equal(*rows) for rows in zip(before[0], module(x)[0], strict=True))
        used |= equal
        if not equal:
            undo()
    return used


def _test_rows(width: int, like: Tensor) -> Tensor:
    """Return rows [1, 5, width] of very different sizes: small rows reveal another epsilon, large rows clipping."""
    generator = torch.Generator().manual_seed(0)
    dtype = like.dtype if like.is_floating_point() and like.itemsize > 1 else torch.float32  # not that of codes
    sizes = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1000.0])[:, None]
    return (torch.randn((1, 5, width), generator=generator) * sizes).to(like.device, dtype)


def _equal(theirs: Tensor, ours: Tensor) -> bool:
    if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    return bool((theirs - ours).abs().max() <= TOLERANCE.get(theirs.dtype, 0.0) * theirs.abs().max())


def _fuse_loss(model: nn.Module, inputs: Mapping[str, Any] | None) -> bool:
    """Compute logits only at trained positions if a `Head` reproduces the model's logits; return whether it does."""
    inner = inner_of(model)
    head = next(
        (candidate for candidate in _heads(inner) if inputs is None or _makes_the_logits(candidate, inner, inputs)),
        None,
    )
    if head is not None:
        setattr(inner, HEAD, head)
    return head is not None


def _heads(inner: PreTrainedModel) -> Iterator[Head]:
    output, facts = inner.get_output_embeddings(), inner.config.get_text_config().to_dict()
    if type_of(output) is not nn.Linear or inner.base_model is inner:
        return
    cap = facts.get("final_logit_softcapping")
    scale = facts.get("logit_scale") or 1 / (facts.get("logits_scaling") or 1)
    yield Head(output, scale, cap)


@torch.no_grad()
def _makes_the_logits(head: Head, inner: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    try:
        logits, hidden = inner(**inputs).logits, inner.base_model(**inputs)[0]
        with gathered(head.layer):
            return _equal(logits, head.logits(hidden))
    except (TypeError, ValueError, RuntimeError):
        return False


@torch.no_grad()
def _narrow_last_mlp(model: nn.Module, inputs: Mapping[str, Any] | None) -> bool:
    """Compute the last layer's MLP only at trained positions, because no later operation mixes positions.

    Returns:
        Whether the outputs at those positions stay the same, so that it is done.
    """
    inner = inner_of(model)
    layers = getattr(inner.base_model, "layers", None)
    last = [module for module in layers[-1].children() if mlp.fused(module)] if layers else []
    if head_of(model) is None or len(last) != 1:
        return False
    if inputs is not None:
        rows = torch.arange(0, inputs["input_ids"].numel(), 3, device=inputs["input_ids"].device)
        complete = inner.base_model(**inputs)[0].flatten(0, 1)[rows]
        with mlp.at_rows(last[0], rows):
            narrow = inner.base_model(**inputs)[0].flatten(0, 1)[rows]
        if not _equal(complete, narrow):
            return False
    vars(inner)[LAST_MLP] = last[0]
    return True
