"""Which fast parts a model computes with: each is tried against the model's own before it is used.

A part replaces the `forward` of the modules that it fits and is left out where its numbers differ, so a family that
nobody thought of trains by its own code, or by as much of it as is needed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_kit.kernels import mlp, norm, rotary
from lora_kit.kernels.attention import inner_of
from lora_kit.kernels.dispatch import multiplying
from lora_kit.kernels.lora import Together, covered, in_few_bits, map_of
from lora_kit.kernels.loss import Head

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
HEAD = "_head_of_lora_kit"  # where a model keeps what `head_of` returns
LAST = "_last_mlp_of_lora_kit"  # and what `last_mlp_of` does
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def use_kernels(model: nn.Module, wanted: Sequence[str] | None, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """Let a model with an adapter compute with the fast parts that fit it.

    Args:
        model: In the place and precision that it trains in.
        wanted: The parts that a run began with; None to find out.
        inputs: Of a small call of the model, for finding out.

    Returns:
        The parts in use, of `lora`, `mlp`, `norm`, `rotary`, `loss` and `last mlp`.
    """
    parts: dict[str, Callable[[], bool]] = {
        "lora": lambda: _fuse_adapters(model),
        "mlp": lambda: _fuse_mlps(model),
        "norm": lambda: _fuse_norms(model),
        "rotary": lambda: _fuse_rotary(model),
        "loss": lambda: _fuse_loss(model, None if wanted else inputs),
        "last mlp": lambda: _narrow_last_mlp(model, None if wanted else inputs),
    }
    return [name for name, use in parts.items() if (wanted is None or name in wanted) and use()]


def about(model: nn.Module, used: Sequence[str]) -> str:
    """Return the parts in use in words."""
    layers = [name for name, one in model.named_modules() if isinstance(one, LoraLayer)]
    others = [name.removesuffix(".base_layer") for name in layers if not covered(model.get_submodule(name))]
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in others}))
    by_peft = f"; {kinds} by peft" if others else ""
    names = {
        "lora": f"fused adapters ({len(layers) - len(others)} of {len(layers)}{by_peft})",
        "mlp": "gated MLP in one piece",
        "norm": "norms in few passes",
        "rotary": "rotary positions likewise",
        "loss": "loss at trained positions",
        "last mlp": "last MLP there alone",
    }
    return ", ".join(names[one] for one in used) or "none fits"


def lends(model: nn.Module, used: Sequence[str]) -> bool:
    """Return whether kernels lend the memory of nearly all that a micro-batch computes."""
    layers, head = [one for one in model.modules() if isinstance(one, LoraLayer)], head_of(model)
    if not {"lora", "mlp", "norm", "rotary", "loss"} <= set(used) or head is None or head.cap is not None:
        return False
    plain = all(covered(one) and not map_of(one).dropout and not in_few_bits(one.get_base_layer()) for one in layers)
    capped = inner_of(model).config.get_text_config().to_dict().get("attn_logit_softcapping")
    return plain and not capped and multiplying(head.weight) is not None


def head_of(model: nn.Module) -> Head | None:
    """Return the head that `loss` applies to the hidden states; None where the model makes its logits itself."""
    found: Head | None = vars(inner_of(model)).get(HEAD)
    return found


def last_mlp_of(model: nn.Module) -> nn.Module | None:
    """Return the MLP of the last layer, if only the rows whose hidden states are asked for matter to it."""
    found: nn.Module | None = vars(inner_of(model)).get(LAST)
    return found


def compute_twice(model: PreTrainedModel) -> None:
    """Let a model's layers be computed again on the way back instead of keeping what they computed."""
    settings = {"use_reentrant": False, "context_fn": partial(alike, model)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def alike(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return in what layers are computed now, and again on the way back, for torch.utils.checkpoint."""
    last = last_mlp_of(model)
    return nullcontext(), mlp.at_rows(last, vars(last)[mlp.ASKED] if last else None)


def _fuse_adapters(model: nn.Module) -> bool:
    """Compute plain adapters in one function with their layer, siblings that read the same input together."""
    taken = set[nn.Module]()
    for parent in list(model.modules()):
        for names in SAME_INPUT:
            fitting = [one for name, one in parent.named_children() if name in names and covered(one)]
            together = [one for one in fitting if one.in_features == fitting[0].in_features]
            taken.update(together)
            if together:
                Together(together)
    alone = [one for one in model.modules() if covered(one) and one not in taken]
    for one in alone:
        Together([one])
    return bool(taken or alone)


def _fuse_mlps(model: nn.Module) -> bool:
    facts = inner_of(model).config.get_text_config().to_dict()
    activation = facts.get("hidden_activation") or facts.get("hidden_act") or ""
    fitting = [one for one in model.modules() if activation in mlp.ACTIVATIONS and mlp.gated(one)]
    return _use_where_equal(fitting, lambda one: mlp.fuse(one, activation), lambda one: one.gate_proj.in_features)


def _fuse_norms(model: nn.Module) -> bool:
    named = [one for one in model.modules() if type(one).__name__.endswith("RMSNorm")]
    found = [one for one in named if {"variance_epsilon", "eps"} & vars(one).keys() and "weight" in one._parameters]
    llama, gemma = (
        _use_where_equal(found, partial(norm.fuse, gemma=gemma), lambda one: len(one.weight)) for gemma in (False, True)
    )
    return llama or gemma


@torch.no_grad()
def _fuse_rotary(model: nn.Module) -> bool:
    used = False
    for one in model.modules():
        own, width = rotary.rotation_of(one), getattr(one, "head_dim", None)
        if own is not None and width is not None and _turn_alike(own, width, next(one.parameters())):
            rotary.fuse(one)
            used = True
    return used


def _turn_alike(own: rotary.Rotation, width: int, like: Tensor) -> bool:
    """Return whether a family turns queries and keys as we do."""
    heads, angles = _some_rows(3 * width, like).view(1, 5, 3, width).transpose(1, 2), _some_rows(width, like)
    given = (heads[:, :2], heads[:, 2:], angles.cos(), angles.sin())
    try:
        both = zip(own(*given), rotary.rotated(own, *given), strict=True)
        return all(_equal(*row) for pair in both for row in zip(*(one.unbind(2) for one in pair), strict=True))
    except (TypeError, ValueError, RuntimeError):
        return False


@torch.no_grad()
def _use_where_equal(
    modules: Sequence[nn.Module], fuse: Callable[[Any], Callable[[], None]], width: Callable[[Any], int]
) -> bool:
    """Fuse the modules that compute the same with it."""
    used = False
    for one in modules:
        x = _some_rows(width(one), next(one.parameters()))
        before, undo = one(x), fuse(one)
        same = all(_equal(*rows) for rows in zip(before[0], one(x)[0], strict=True))
        used |= same
        if not same:
            undo()
    return used


def _some_rows(width: int, like: Tensor) -> Tensor:
    """Return rows of very different sizes: a small one shows an epsilon, a large one where a family clips."""
    generator = torch.Generator().manual_seed(0)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    sizes = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1000.0])[:, None]
    return (torch.randn((1, 5, width), generator=generator) * sizes).to(like.device, dtype)


def _equal(theirs: Tensor, ours: Tensor) -> bool:
    if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    return bool((theirs - ours).abs().max() <= TOLERANCE.get(theirs.dtype, 0.0) * theirs.abs().max())


def _fuse_loss(model: nn.Module, inputs: Mapping[str, Any] | None) -> bool:
    """Apply the head only where tokens are trained, if the model's logits are its head's, scaled or capped."""
    inner = inner_of(model)
    head = next((one for one in _heads(inner) if inputs is None or _makes_the_logits(one, inner, inputs)), None)
    if head is not None:
        setattr(inner, HEAD, head)
    return head is not None


def _heads(inner: PreTrainedModel) -> Iterator[Head]:
    output, facts = inner.get_output_embeddings(), inner.config.get_text_config().to_dict()
    if type(output) is not nn.Linear or inner.base_model is inner:
        return
    cap = facts.get("final_logit_softcapping")
    scale = facts.get("logit_scale") or 1 / (facts.get("logits_scaling") or 1)
    yield Head(output.weight, cast(Tensor | None, output.bias), scale, cap)


@torch.no_grad()
def _makes_the_logits(head: Head, inner: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    try:
        return _equal(inner(**inputs).logits, head.logits(inner.base_model(**inputs)[0]))
    except (TypeError, ValueError, RuntimeError):
        return False


@torch.no_grad()
def _narrow_last_mlp(model: nn.Module, inputs: Mapping[str, Any] | None) -> bool:
    """Compute the last layer's MLP only where tokens are trained: what follows it does not mix rows."""
    inner = inner_of(model)
    layers = getattr(inner.base_model, "layers", None)
    last = [one for one in layers[-1].children() if mlp.fused(one)] if layers else []
    if head_of(model) is None or len(last) != 1:
        return False
    if inputs is not None:
        asked = torch.arange(0, inputs["input_ids"].numel(), 3, device=inputs["input_ids"].device)
        whole = inner.base_model(**inputs)[0].flatten(0, 1)[asked]
        with mlp.at_rows(last[0], asked):
            narrow = inner.base_model(**inputs)[0].flatten(0, 1)[asked]
        if not _equal(whole, narrow):
            return False
    vars(inner)[LAST] = last[0]
    return True
