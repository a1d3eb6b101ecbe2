"""Linear maps with adapters, y = x W' + (x (s A)') B', with the fewest passes over memory.

Adapters are cast to the base's dtype, not activations to the adapter's; what an adapter adds is accumulated by the
product that computes it; and maps that read the same input (q, k, v; gate and up) share its reading, forward and back.
A frozen weight needs no gradient, so each map costs two large products a step instead of three, and nothing is kept but
the input and its few columns of x A'. Held in 4 or 8 bits, a weight is made whole where it is multiplied.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from transformers.pytorch_utils import Conv1D

from lora_kit.kernels.dispatch import multiplying

ADAPTER = "default"
KINDS = ("Linear", "Linear4bit", "Linear8bitLt")  # of peft's layers; those of bitsandbytes only exist where it does


@dataclass(frozen=True)
class Map:
    """A frozen linear map and what its adapter needs beside A and B.

    Attributes:
        base: The layer that holds the frozen weight [outputs, inputs] and perhaps a bias.
        scale: What the adapter's output is multiplied with, alpha / rank.
        rank: Rows of A.
        dropout: Of the adapter's input.
    """

    base: nn.Module
    scale: float
    rank: int
    dropout: float

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """Return the weight, made whole if it is held in fewer bits."""
        base = cast(Any, self.base)
        held = base.weight
        whole: Tensor = held
        if isinstance(base, Conv1D):
            whole = held.T
        elif type(held).__name__ == "Params4bit":
            import bitsandbytes.functional

            whole = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state).to(dtype)
        elif type(held).__name__ == "Int8Params":  # until the first call of its own the codes are in the weight
            codes, scales = (held.CB, held.SCB) if held.SCB is not None else (base.state.CB, base.state.SCB)
            whole = (codes * (scales[:, None] / 127)).to(dtype)
        return whole


def covered(module: nn.Module) -> bool:
    """Return whether a layer is one that this file computes: plain LoRA on a linear map, nothing else on it."""
    if not isinstance(module, LoraLayer) or type(module).__name__ not in KINDS:
        return False
    if module.active_adapters != [ADAPTER] or module.merged or module.disable_adapters:
        return False
    base = module.get_base_layer()
    plain_base = type(base) in (nn.Linear, Conv1D) and type(base.weight) is nn.Parameter  # a subclass may do otherwise
    known = plain_base or in_few_bits(base)
    plain = ADAPTER in module.lora_A and ADAPTER not in module.lora_variant and not module.lora_bias[ADAPTER]
    return known and plain


def in_few_bits(base: nn.Module) -> bool:
    """Return whether a layer is of bitsandbytes, which is not imported for it."""
    return isinstance(base, nn.Linear) and type(base.weight).__name__ in ("Params4bit", "Int8Params")


def map_of(module: nn.Module) -> Map:
    """Return what is fixed of a covered layer."""
    layer = cast(Any, module)
    dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0)
    return Map(layer.get_base_layer(), layer.scaling[ADAPTER], layer.r[ADAPTER], dropout if module.training else 0.0)


def adapters_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the layers' A, then their B."""
    layers = cast(Sequence[Any], modules)
    return [one.lora_A[ADAPTER].weight for one in layers] + [one.lora_B[ADAPTER].weight for one in layers]


@dataclass(frozen=True)
class Origin:
    """What a norm made an input of: rows * of_row * of_column. They are there anyway, so the input need not be kept.

    Attributes:
        rows: Of the residual stream.
        of_row: In fp32.
        of_column: The norm's weight.
    """

    rows: Float[Tensor, "rows inputs"]
    of_row: Float[Tensor, "rows one"]
    of_column: Float[Tensor, "inputs"]


ORIGIN = "_origin_in_lora_kit"  # where an output of a norm carries its origin


def origin_of(x: Tensor) -> Origin | None:
    """Return what a norm made an input of, if that is known."""
    found: Origin | None = vars(x).get(ORIGIN)
    return found


@dataclass
class Kept:
    """What a group of maps keeps for its backward pass: its input, s x A' and where dropout let through.

    Attributes:
        rows: The input, or its origin's rows.
        low: s x A'.
        passed: Of each map.
        of_row: The origin's; None where `rows` is the input itself.
        of_column: Likewise.
    """

    rows: Float[Tensor, "rows inputs"]
    low: Float[Tensor, "rows ranks"]
    passed: list[Tensor | None]
    of_row: Float[Tensor, "rows one"] | None = None
    of_column: Float[Tensor, "inputs"] | None = None

    def of_downs(self, of_low: Float[Tensor, "rows ranks"]) -> Float[Tensor, "ranks inputs"]:
        """Return the gradient of s A from that of s x A', in fp32."""
        if self.of_row is None or self.of_column is None:
            return across(of_low, self.rows)
        return across((of_low * self.of_row).to(of_low.dtype), self.rows).mul_(self.of_column)


def project(
    x: Float[Tensor, "rows inputs"],
    maps: Sequence[Map],
    adapters: Sequence[Tensor],
    *,
    origin: Origin | None = None,
    whole: bool = True,
) -> tuple[list[Tensor], Kept]:
    """Return every map's output for one input, or the frozen weight's part of it, and what the way back needs."""
    ranks, ups = [one.rank for one in maps], adapters[len(maps) :]
    passed, down = [_draw(x, one.dropout) for one in maps], _scaled(maps, adapters, x.dtype)
    if any(mask is not None for mask in passed):
        several = zip(maps, down.split(ranks), passed, strict=True)
        low = torch.cat([summed([(_through(x, mask, one), part, True)]) for one, part, mask in several], dim=1)
    else:
        low = summed([(x, down, True)])
    outputs = []
    for one, up, part in zip(maps, ups, low.split(ranks, dim=1), strict=True):
        bias = cast(Tensor | None, one.base.bias)
        added = [(part, up.to(x.dtype), True)] if whole else []
        outputs.append(summed([(x, one.weight(x.dtype), True), *added], bias))
    if origin is None or any(mask is not None for mask in passed):
        return outputs, Kept(x, low, passed)
    return outputs, Kept(origin.rows, low, passed, origin.of_row, origin.of_column)


def project_back(
    gradients: Sequence[Float[Tensor, "rows _"]],
    kept: Kept,
    maps: Sequence[Map],
    adapters: Sequence[Tensor],
    *,
    to_input: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradient of the input, if it is wanted, and of every A, then of every B, in fp32."""
    x, ranks, ups = kept.rows, [one.rank for one in maps], adapters[len(maps) :]
    gradients = [one.contiguous() for one in gradients]
    of_ups = [across(one, low) for one, low in zip(gradients, kept.low.split(ranks, dim=1), strict=True)]
    of_lows = [summed([(one, up.to(x.dtype), False)]) for one, up in zip(gradients, ups, strict=True)]
    of_low = torch.cat(of_lows, dim=1) if len(maps) > 1 else of_lows[0]
    down = _scaled(maps, adapters, x.dtype)
    several = list(zip(maps, down.split(ranks), of_low.split(ranks, dim=1), kept.passed, strict=True))
    dropped = any(mask is not None for mask in kept.passed)
    if dropped:
        of_downs = [across(low, _through(x, mask, one)) for one, _, low, mask in several]
    else:
        of_downs = list(kept.of_downs(of_low).split(ranks))
    of_downs = [whole.mul_(one.scale) for one, whole in zip(maps, of_downs, strict=True)]
    if not to_input:
        return None, of_downs + of_ups
    through_weights = ((gradient, one.weight(x.dtype), False) for one, gradient in zip(maps, gradients, strict=True))
    if dropped:
        of_x = summed(through_weights)
        for one, part, low, mask in several:
            of_x += _through(summed([(low, part, False)]), mask, one)
    else:
        of_x = summed(chain([(of_low, down, False)], through_weights))
    return of_x, of_downs + of_ups


def summed(parts: Iterable[tuple[Tensor, Tensor, bool]], bias: Tensor | None = None) -> Float[Tensor, "rows columns"]:
    """Return the sum of some products.

    Args:
        parts: Each x [rows, inner], its weight, and whether that is turned, [columns, inner], else [inner, columns].
            One is asked for after the other where they are not computed together: weights may have to be made.
        bias: [columns].
    """
    parts = iter(parts)
    x, weight, turned = first = next(parts)
    kernels = multiplying(x)
    if kernels and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        whole: Tensor = kernels.linear([first, *parts], bias)
        return whole
    output = nn.functional.linear(x, weight if turned else weight.T, bias)
    for x, weight, turned in parts:
        output.addmm_(x, weight.T if turned else weight)
    return output


def across(left: Float[Tensor, "rows few"], right: Float[Tensor, "rows columns"]) -> Float[Tensor, "few columns"]:
    """Return left' right in fp32."""
    kernels = multiplying(left)
    if kernels and left.dtype == right.dtype:
        whole: Tensor = kernels.outer(left, right)
        return whole
    return (left.T @ right).float()


def _scaled(maps: Sequence[Map], adapters: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "ranks inputs"]:
    """Return every s A, so that nothing larger needs the scale."""
    ranks = [one.rank for one in maps]
    whole = adapters[0].new_empty(sum(ranks), adapters[0].shape[1], dtype=dtype)
    for one, down, part in zip(maps, adapters[: len(maps)], whole.split(ranks), strict=True):
        torch.mul(down, one.scale, out=part)
    return whole


def _draw(x: Tensor, dropout: float) -> Tensor | None:
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None


def _through(x: Tensor, passed: Tensor | None, one: Map) -> Tensor:
    """Return what dropout lets through."""
    return x if passed is None else torch.where(passed, x, 0).div_(1 - one.dropout)


class LoraLinear(Function):
    """Several maps of one input [rows, inputs]; an output for each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, origin: Origin | None, maps: Sequence[Map], *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute every map."""
        outputs, kept = project(x, maps, adapters, origin=origin)
        masks = [one for one in kept.passed if one is not None]
        ctx.save_for_backward(kept.rows, kept.of_row, kept.of_column, kept.low, *masks, *adapters)
        ctx.maps, ctx.masks = maps, len(masks)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Take the gradients of the input and of the adapters."""
        x, of_row, of_column, low, *rest = ctx.saved_tensors
        passed = iter(rest[: ctx.masks])
        kept = Kept(x, low, [next(passed) if one.dropout else None for one in ctx.maps], of_row, of_column)
        adapters, to_input = rest[ctx.masks :], ctx.needs_input_grad[0]
        used = [one is not None for one in gradients]  # an output that nobody read trains nothing
        whole = [
            x.new_zeros(len(x), len(up)) if one is None else one
            for one, up in zip(gradients, adapters[len(ctx.maps) :], strict=True)
        ]
        of_x, of_adapters = project_back(whole, kept, ctx.maps, adapters, to_input=to_input)
        return of_x, None, None, *(one if there else None for one, there in zip(of_adapters, used * 2, strict=True))


class Together:
    """Layers that read the same input, computed at the first one's call; the others find their output ready.

    Which input that was is remembered, so a layer that is called with another is computed by itself.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._own = [module.forward for module in modules]
        self._x: Tensor | None = None
        self._to_train = False
        self._ready: dict[int, Tensor] = {}
        for place, module in enumerate(modules):
            module.forward = self._forward_of(place)

    def _forward_of(self, place: int) -> Any:
        own = self._own[place]

        def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
            if rest or named or not all(covered(one) for one in self._modules):
                return cast(Tensor, own(x, *rest, **named))
            return self._output(x, place)

        return forward

    def _output(self, x: Tensor, place: int) -> Tensor:
        if self._x is not x or self._to_train != torch.is_grad_enabled() or place not in self._ready:
            maps = [map_of(module) for module in self._modules]
            outputs = LoraLinear.apply(x.reshape(-1, x.shape[-1]), origin_of(x), maps, *adapters_of(self._modules))
            self._to_train = torch.is_grad_enabled()
            self._x, self._ready = x, {at: one.view(*x.shape[:-1], -1) for at, one in enumerate(outputs)}
        output = self._ready.pop(place)
        if not self._ready:
            self._x = None
        return output
