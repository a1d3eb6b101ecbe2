"""Linear layers with adapters, y = x @ W.T + s * (x @ A.T) @ B.T, with the fewest passes over memory.

Adapters are cast to the base's dtype, and activations are not cast to the adapter's. The product with B accumulates
into the output of W. Layers that read the same input (q, k, v; gate and up) are computed together, forward and
backward. A frozen weight needs no gradient, so a step costs each layer two large products instead of three, and only
the input and the few columns of x @ A.T are kept. A weight in 4 or 8 bits is dequantised where it is multiplied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lora_kit.kernels import dispatch, dora
from lora_kit.kernels.dora import ADAPTER
from lora_kit.kernels.fp8 import BlockFp8Linear
from lora_kit.kernels.gathered import gathered, type_of
from lora_kit.kernels.nf4 import Nf4Linear

KINDS = ("Linear", "Linear4bit", "Linear8bitLt")  # class names of peft's layers; the last two need bitsandbytes


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer and the settings of its adapter.

    Attributes:
        base: The frozen layer, with a weight [outputs, inputs] and perhaps a bias.
        scale: alpha / rank.
        rank: The number of rows of A.
        dropout: The probability of zeroing an element of the adapter's input; 0 outside training.
        adds_bias: Whether the bias is added; DoRA adds it after it has scaled the sum of both products.
    """

    base: nn.Module
    scale: float
    rank: int
    dropout: float
    adds_bias: bool = True

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer, if the product adds it."""
        return cast(Tensor | None, self.base.bias) if self.adds_bias else None

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """Return the weight, dequantised if it is quantised."""
        base = cast(Any, self.base)
        weight = base.weight
        dense: Tensor = weight
        if isinstance(base, Conv1D):
            dense = weight.T
        elif isinstance(base, BlockFp8Linear):
            dense = base.dequantized(dtype)
        elif isinstance(base, Nf4Linear):
            dense = base.dequantized().to(dtype)
        elif type(weight).__name__ == "Params4bit":
            import bitsandbytes.functional

            dense = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        elif type(weight).__name__ == "Int8Params":  # until the layer's own first call the codes are in the weight
            in_weight = weight.SCB is not None
            codes, scales = (weight.CB, weight.SCB) if in_weight else (base.state.CB, base.state.SCB)
            dense = (codes * (scales[:, None] / 127)).to(dtype)
        return dense


def fusable(module: nn.Module) -> bool:
    """Return whether this file can compute a layer: a linear layer with a single adapter that is plain LoRA, or DoRA
    without dropout."""
    if not isinstance(module, LoraLayer) or type(module).__name__ not in KINDS:
        return False
    if module.active_adapters != [ADAPTER] or module.merged or module.disable_adapters:
        return False
    base = module.get_base_layer()
    # compare exact types: a subclass may have another forward. A sharded weight is a DTensor
    dense = type_of(base) in (nn.Linear, Conv1D) and type(base.weight) in (nn.Parameter, DTensor)
    plain = ADAPTER in module.lora_A and not module.lora_bias[ADAPTER]
    known = ADAPTER not in module.lora_variant or (
        dora.is_dora(module) and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
    )
    known |= constants_of(module) is not None
    return plain and known and (dense or quantized(base))


def quantized(base: nn.Module) -> bool:
    """Return whether the weight of a layer is dequantised where it is multiplied; this does not import bitsandbytes."""
    by_bitsandbytes = isinstance(base, nn.Linear) and type(base.weight).__name__ in ("Params4bit", "Int8Params")
    return by_bitsandbytes or isinstance(base, BlockFp8Linear | Nf4Linear)


def adapted_linear(module: nn.Module) -> AdaptedLinear:
    """Return the frozen layer inside a `fusable` layer of peft, and the settings of its adapter."""
    layer = cast(Any, module)
    dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0) if module.training else 0.0  # nn.Identity has no p
    base, scale, rank = layer.get_base_layer(), layer.scaling[ADAPTER], layer.r[ADAPTER]
    rank = rank if constants_of(module) is None else 2 * rank
    return AdaptedLinear(base, scale, rank, dropout, adds_bias=not dora.is_dora(module))


def adapters_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the A of every layer, then the B of every layer.

    Of a layer with constants they are [A; A0] and [B, -B0], whose product is B A - B0 A0.
    """
    return [tensor for place in (0, 1) for tensor in (_adapter_of(module, place) for module in modules)]


def _adapter_of(module: nn.Module, place: int) -> Tensor:
    layer, constants = cast(Any, module), constants_of(module)
    trained: Tensor = (layer.lora_A, layer.lora_B)[place][ADAPTER].weight
    return trained if constants is None else torch.cat([trained, constants[place]], dim=place)


CONSTANTS = "_constants_of_lora_kit"  # attribute of a layer: its A0 and -B0, if it has the start pissa or olora


def constants_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the constants A0 and -B0 of a layer; None if it has none."""
    constants: tuple[Tensor, Tensor] | None = vars(module).get(CONSTANTS)
    return constants


@dataclass(frozen=True)
class NormFactors:
    """The factors of a fused norm's output, which is rows * row_factor * column_factor.

    The factors are in memory anyway, so a layer that reads the output keeps them for its backward pass instead of the
    output.

    Attributes:
        rows: The norm's input.
        row_factor: 1 / root mean square of each row, in fp32.
        column_factor: The norm's gain.
    """

    rows: Float[Tensor, "rows inputs"]
    row_factor: Float[Tensor, "rows 1"]
    column_factor: Float[Tensor, "inputs"]


NORM_FACTORS = "_norm_factors_of_lora_kit"  # the attribute of a norm's output that holds its factors


def factors_of(x: Tensor) -> NormFactors | None:
    """Return the factors of x if it is the output of a fused norm, otherwise None."""
    factors: NormFactors | None = vars(x).get(NORM_FACTORS)
    return factors


@dataclass
class Saved:
    """What layers that read the same input keep for their backward pass.

    Attributes:
        rows: The input; if a fused norm computed the input, the input of that norm (see `NormFactors`).
        low: The product s * x @ A.T of every layer, side by side; x is the input and s the layer's scaling.
        dropout_masks: A mask for each layer; None without dropout.
        row_factor: `NormFactors.row_factor`, so that input = rows * row_factor * column_factor; None if `rows` is the
            input.
        column_factor: `NormFactors.column_factor`; None if `rows` is the input.
    """

    rows: Float[Tensor, "rows inputs"]
    low: Float[Tensor, "rows ranks"]
    dropout_masks: list[Tensor | None]
    row_factor: Float[Tensor, "rows 1"] | None = None
    column_factor: Float[Tensor, "inputs"] | None = None

    def grad_a(self, grad_low: Float[Tensor, "rows ranks"]) -> Float[Tensor, "ranks inputs"]:
        """Return the gradient of s * A in fp32, from the gradient of s * x @ A.T."""
        backend = dispatch.backend_of(grad_low)
        if self.row_factor is None or self.column_factor is None:
            return backend.weight_gradient(grad_low, self.rows)
        scaled = (grad_low * self.row_factor).to(grad_low.dtype)
        return backend.weight_gradient(scaled, self.rows).mul_(self.column_factor)


def project(
    x: Float[Tensor, "rows inputs"],
    linears: Sequence[AdaptedLinear],
    adapters: Sequence[Tensor],
    *,
    factors: NormFactors | None = None,
    add_adapters: bool = True,
) -> tuple[list[Tensor], Saved]:
    """Return the output of every layer that reads an input, and what the backward pass needs.

    Args:
        x: The input.
        linears: The layers that read it.
        adapters: The A of every layer, then the B of every layer.
        factors: The factors of x, if a fused norm computed it.
        add_adapters: Whether to add the adapters to the outputs.
    """
    backend, ranks, b_matrices = dispatch.backend_of(x), [linear.rank for linear in linears], adapters[len(linears) :]
    masks, scaled_a = [_draw_mask(x, linear.dropout) for linear in linears], _scaled_a(linears, adapters, x.dtype)
    dropped = any(mask is not None for mask in masks)
    if dropped:
        by_linear = zip(linears, scaled_a.split(ranks), masks, strict=True)
        low = torch.cat(
            [backend.linear([(_dropped(x, mask, linear), a, True)], None) for linear, a, mask in by_linear], dim=1
        )
    else:
        low = backend.linear([(x, scaled_a, True)], None)
    outputs = []
    for linear, b, low_part in zip(linears, b_matrices, low.split(ranks, dim=1), strict=True):
        added = [(low_part, b.to(x.dtype), True)] if add_adapters else []
        outputs.append(backend.linear([(x, linear.weight(x.dtype), True), *added], linear.bias))
    if factors is None or dropped:
        return outputs, Saved(x, low, masks)
    return outputs, Saved(factors.rows, low, masks, factors.row_factor, factors.column_factor)


def project_backward(
    grad_outputs: Sequence[Float[Tensor, "rows _"]],
    saved: Saved,
    linears: Sequence[AdaptedLinear],
    adapters: Sequence[Tensor],
    *,
    to_input: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradient of the input, None unless `to_input`, and the fp32 gradients of every A, then of every B."""
    x, ranks, b_matrices = saved.rows, [linear.rank for linear in linears], adapters[len(linears) :]
    backend, grads = dispatch.backend_of(x), [grad.contiguous() for grad in grad_outputs]
    lows = saved.low.split(ranks, dim=1)
    grads_b = [backend.weight_gradient(grad, low) for grad, low in zip(grads, lows, strict=True)]
    grad_lows = [
        backend.linear([(grad, b.to(x.dtype), False)], None) for grad, b in zip(grads, b_matrices, strict=True)
    ]
    grad_low = torch.cat(grad_lows, dim=1) if len(linears) > 1 else grad_lows[0]
    scaled_a = _scaled_a(linears, adapters, x.dtype)
    by_linear = list(
        zip(linears, scaled_a.split(ranks), grad_low.split(ranks, dim=1), saved.dropout_masks, strict=True)
    )
    dropped = any(mask is not None for mask in saved.dropout_masks)
    if dropped:
        grads_a = [backend.weight_gradient(part, _dropped(x, mask, linear)) for linear, _, part, mask in by_linear]
    else:
        grads_a = list(saved.grad_a(grad_low).split(ranks))
    grads_a = [grad.mul_(linear.scale) for linear, grad in zip(linears, grads_a, strict=True)]
    if not to_input:
        return None, grads_a + grads_b
    through_weights = ((grad, linear.weight(x.dtype), False) for linear, grad in zip(linears, grads, strict=True))
    if dropped:
        grad_x = backend.linear(through_weights, None)
        for linear, a, part, mask in by_linear:
            grad_x += _dropped(backend.linear([(part, a, False)], None), mask, linear)
    else:
        grad_x = backend.linear(chain([(grad_low, scaled_a, False)], through_weights), None)
    return grad_x, grads_a + grads_b


def _scaled_a(
    linears: Sequence[AdaptedLinear], adapters: Sequence[Tensor], dtype: torch.dtype
) -> Float[Tensor, "ranks inputs"]:
    """Return every s A. A is scaled because it is smaller than the activations."""
    ranks = [linear.rank for linear in linears]
    scaled = adapters[0].new_empty(sum(ranks), adapters[0].shape[1], dtype=dtype)
    for linear, a, part in zip(linears, adapters[: len(linears)], scaled.split(ranks), strict=True):
        torch.mul(a, linear.scale, out=part)
    return scaled


def _draw_mask(x: Tensor, dropout: float) -> Tensor | None:
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None


def _dropped(x: Tensor, mask: Tensor | None, linear: AdaptedLinear) -> Tensor:
    """Return x after dropout."""
    return x if mask is None else torch.where(mask, x, 0).div_(1 - linear.dropout)


class LoraLinear(Function):
    """Layers that read the same input [rows, inputs]; returns the output of each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: NormFactors | None, linears: Sequence[AdaptedLinear], *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute every layer."""
        with gathered(linears[0].base):  # gathers a head with an adapter, which is a unit of its own
            outputs, saved = project(x, linears, adapters, factors=factors)
        masks = [mask for mask in saved.dropout_masks if mask is not None]
        ctx.save_for_backward(saved.rows, saved.row_factor, saved.column_factor, saved.low, *masks, *adapters)
        ctx.linears, ctx.masks = linears, len(masks)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input and of the adapters; None for an adapter whose output was not used."""
        rows, row_factor, column_factor, low, *rest = ctx.saved_tensors
        masks = iter(rest[: ctx.masks])
        dropout_masks = [next(masks) if linear.dropout else None for linear in ctx.linears]
        saved = Saved(rows, low, dropout_masks, row_factor, column_factor)
        adapters, to_input = rest[ctx.masks :], ctx.needs_input_grad[0]
        used = [grad is not None for grad in grad_outputs]
        grads = [
            rows.new_zeros(len(rows), len(b)) if grad is None else grad
            for grad, b in zip(grad_outputs, adapters[len(ctx.linears) :], strict=True)
        ]
        with gathered(ctx.linears[0].base):
            grad_x, grad_adapters = project_backward(grads, saved, ctx.linears, adapters, to_input=to_input)
        wanted = zip(grad_adapters, used * 2, strict=True)
        return grad_x, None, None, *(grad if was_used else None for grad, was_used in wanted)


def scaled(module: nn.Module, linear: AdaptedLinear, output: Tensor) -> Tensor:
    """Return the output of a layer with DoRA, from W x + s B A x; the output of another layer stays as it is."""
    if not dora.is_dora(module):
        return output
    a, b = adapters_of([module])
    with torch.no_grad():
        norms = dora.row_norms(linear.weight(output.dtype), a, b, linear.scale)
    return dora.Scaled.apply(output, dora.magnitude_of(module), norms, linear.base.bias)


class SharedInput:
    """Layers that read the same input: the first call computes all layers, the other calls return their output.

    The input is remembered, so a layer that is called with another input is not given a wrong output.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._own_forwards = [module.forward for module in modules]
        self._x: Tensor | None = None
        self._with_grad = False
        self._ready: dict[int, Tensor] = {}
        for index, module in enumerate(modules):
            module.forward = self._forward_of(index)

    def _forward_of(self, index: int) -> Any:
        own_forward = self._own_forwards[index]

        def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
            if rest or named or not all(fusable(module) for module in self._modules):
                return cast(Tensor, own_forward(x, *rest, **named))
            return self._output(x, index)

        return forward

    def _output(self, x: Tensor, index: int) -> Tensor:
        if self._x is not x or self._with_grad != torch.is_grad_enabled() or index not in self._ready:
            linears = [adapted_linear(module) for module in self._modules]
            sums = LoraLinear.apply(x.reshape(-1, x.shape[-1]), factors_of(x), linears, *adapters_of(self._modules))
            outputs = [scaled(*each) for each in zip(self._modules, linears, sums, strict=True)]
            self._with_grad = torch.is_grad_enabled()
            self._x, self._ready = x, {at: output.view(*x.shape[:-1], -1) for at, output in enumerate(outputs)}
        output = self._ready.pop(index)
        if not self._ready:
            self._x = None
        return output
