"""A gated MLP with adapters, down(act(gate(x)) * up(x)); the backward pass computes the inner product again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels import dispatch, dora
from lora_kit.kernels.backend import GatedInputs
from lora_kit.kernels.limits import GATED_MLP
from lora_kit.kernels.lora import (
    AdaptedLinear,
    NormFactors,
    Saved,
    adapted_linear,
    adapters_of,
    factors_of,
    fusable,
    project,
    project_backward,
)

ROWS = "_rows_of_lora_kit"  # the attribute of an MLP in which `at_rows` puts the rows to compute


class GatedMlp(Function):
    """A layer's MLP for `x` [rows, width]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: NormFactors | None, act: str, linears: Sequence[AdaptedLinear], *adapters: Tensor
    ) -> Tensor:
        """Compute the MLP; `linears` are gate, up and down."""
        backend, (into, out) = dispatch.backend_of(x), _split(adapters)
        (gate, up), saved = project(x, linears[:2], into, factors=factors, add_adapters=not backend.adds_adapters)
        product = backend.gated(_gated_inputs(gate, up, saved.low, into, act))
        (output,), inner = project(product, linears[2:], out)
        masks = [mask for mask in (*saved.dropout_masks, *inner.dropout_masks) if mask is not None]
        source = (saved.rows, saved.row_factor, saved.column_factor)
        ctx.save_for_backward(*source, saved.low, gate, up, inner.low, *adapters, *masks)
        ctx.act, ctx.linears = act, linears
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the inner product again and return the gradients of the input and of the adapters."""
        rows, row_factor, column_factor, low, gate, up, inner_low, *rest = ctx.saved_tensors
        adapters, masks = rest[:6], iter(rest[6:])
        dropout_masks = [next(masks) if linear.dropout else None for linear in ctx.linears]
        backend, (into, out) = dispatch.backend_of(gate), _split(adapters)
        inputs = _gated_inputs(gate, up, low, into, ctx.act)
        inner = Saved(backend.gated(inputs), inner_low, dropout_masks[2:])
        grad_product, grad_out = project_backward([grad_output], inner, ctx.linears[2:], out, to_input=True)
        assert grad_product is not None
        del inner  # the next tensors can use the memory of the product
        grad_gate, grad_up = backend.gated_backward(grad_product, inputs)
        del grad_product
        saved = Saved(rows, low, dropout_masks[:2], row_factor, column_factor)
        to_input = ctx.needs_input_grad[0]
        grad_x, grad_into = project_backward([grad_gate, grad_up], saved, ctx.linears[:2], into, to_input=to_input)
        return grad_x, None, None, None, *grad_into[:2], grad_out[0], *grad_into[2:], grad_out[1]


def _gated_inputs(gate: Tensor, up: Tensor, low: Tensor, into: Sequence[Tensor], act: str) -> GatedInputs:
    b_gate, b_up = into[2:]
    return GatedInputs(gate, up, low, (b_gate, b_up), act)


def _split(adapters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return A and B of gate and up, and of down, from three A and three B."""
    return [*adapters[:2], *adapters[3:5]], [adapters[2], adapters[5]]


def gated(mlp: nn.Module) -> bool:
    """Return whether a module has the linear layers of a gated MLP, all of them fusable."""
    layers = [mlp.get_submodule(name) for name in GATED_MLP if name in mlp._modules]
    return len(layers) == len(GATED_MLP) and all(fusable(layer) and not dora.is_dora(layer) for layer in layers)


def fuse(mlp: nn.Module, activation: str) -> Callable[[], None]:
    """Replace a gated MLP's forward by `GatedMlp` while its layers are fusable; return a function that restores it."""
    own_forward, layers = mlp.forward, [mlp.get_submodule(name) for name in GATED_MLP]

    def forward(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if not gated(mlp):
            return cast(Tensor, own_forward(x))
        linears = [adapted_linear(layer) for layer in layers]
        rows, indices = x.reshape(-1, x.shape[-1]), vars(mlp)[ROWS]
        computed, factors = (rows, factors_of(x)) if indices is None else (rows.index_select(0, indices), None)
        output = cast(Tensor, GatedMlp.apply(computed, factors, activation, linears, *adapters_of(layers)))
        if indices is not None:
            output = output.new_zeros(len(rows), output.shape[1]).index_copy(0, indices, output)
        return output.view(*x.shape[:-1], -1)

    def undo() -> None:
        mlp.forward = own_forward
        del vars(mlp)[ROWS]

    mlp.forward, vars(mlp)[ROWS] = forward, None
    return undo


def fused(module: nn.Module) -> bool:
    """Return whether `fuse` has replaced the module's forward."""
    return ROWS in vars(module)


@contextmanager
def at_rows(mlp: nn.Module | None, rows: Int64[Tensor, "count"] | None) -> Iterator[None]:
    """Let a fused MLP, unless it is None, compute only these rows in this context; its other output rows are zeros."""
    if mlp is None:
        yield
        return
    vars(mlp)[ROWS] = rows
    try:
        yield
    finally:
        vars(mlp)[ROWS] = None
