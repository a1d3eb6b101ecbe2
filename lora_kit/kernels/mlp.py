"""A gated MLP with adapters, down(act(gate(x)) * up(x)); the backward pass computes the inner product again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels import dispatch
from lora_kit.kernels.backend import GatedInputs
from lora_kit.kernels.limits import GATED_MLP
from lora_kit.kernels.lora import Map, Origin, Saved, adapters_of, covered, map_of, origin_of, project, project_backward

ROWS = "_rows_of_lora_kit"  # the attribute of an MLP in which `at_rows` puts the rows to compute


class GatedMlp(Function):
    """A layer's MLP for `x` [rows, width]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, origin: Origin | None, act: str, maps: Sequence[Map], *adapters: Tensor) -> Tensor:
        """Compute the MLP; the maps are gate, up and down."""
        backend, (into, out) = dispatch.backend_of(x), _split(adapters)
        (gate, up), saved = project(x, maps[:2], into, origin=origin, add_adapters=not backend.adds_adapters)
        product = backend.gated(_gated_inputs(gate, up, saved.low, into, act))
        (output,), inner = project(product, maps[2:], out)
        masks = [mask for mask in (*saved.dropout_masks, *inner.dropout_masks) if mask is not None]
        source = (saved.rows, saved.row_factor, saved.column_factor)
        ctx.save_for_backward(*source, saved.low, gate, up, inner.low, *adapters, *masks)
        ctx.act, ctx.maps = act, maps
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the inner product again and return the gradients of the input and of the adapters."""
        rows, row_factor, column_factor, low, gate, up, inner_low, *rest = ctx.saved_tensors
        adapters, masks = rest[:6], iter(rest[6:])
        dropout_masks = [next(masks) if linear.dropout else None for linear in ctx.maps]
        backend, (into, out) = dispatch.backend_of(gate), _split(adapters)
        inputs = _gated_inputs(gate, up, low, into, ctx.act)
        inner = Saved(backend.gated(inputs), inner_low, dropout_masks[2:])
        grad_product, grad_out = project_backward([grad_output], inner, ctx.maps[2:], out, to_input=True)
        assert grad_product is not None
        del inner  # the product's memory is free for what follows
        grad_gate, grad_up = backend.gated_backward(grad_product, inputs)
        del grad_product
        saved = Saved(rows, low, dropout_masks[:2], row_factor, column_factor)
        to_input = ctx.needs_input_grad[0]
        grad_x, grad_into = project_backward([grad_gate, grad_up], saved, ctx.maps[:2], into, to_input=to_input)
        return grad_x, None, None, None, *grad_into[:2], grad_out[0], *grad_into[2:], grad_out[1]


def _gated_inputs(gate: Tensor, up: Tensor, low: Tensor, into: Sequence[Tensor], act: str) -> GatedInputs:
    b_gate, b_up = into[2:]
    return GatedInputs(gate, up, low, (b_gate, b_up), act)


def _split(adapters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return A and B of gate and up, and of down, from three A and three B."""
    return [*adapters[:2], *adapters[3:5]], [adapters[2], adapters[5]]


def gated(mlp: nn.Module) -> bool:
    """Return whether a module has the linear maps of a gated MLP, all of them with plain adapters."""
    return all(name in mlp._modules and covered(mlp.get_submodule(name)) for name in GATED_MLP)


def fuse(mlp: nn.Module, activation: str) -> Callable[[], None]:
    """Let a gated MLP compute by `GatedMlp` where its adapters are plain and on; return a function that undoes it."""
    own_forward, linears = mlp.forward, [mlp.get_submodule(name) for name in GATED_MLP]

    def forward(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if not gated(mlp):
            return cast(Tensor, own_forward(x))
        maps, rows, indices = [map_of(linear) for linear in linears], x.reshape(-1, x.shape[-1]), vars(mlp)[ROWS]
        computed, origin = (rows, origin_of(x)) if indices is None else (rows.index_select(0, indices), None)
        output = cast(Tensor, GatedMlp.apply(computed, origin, activation, maps, *adapters_of(linears)))
        if indices is not None:
            output = output.new_zeros(len(rows), output.shape[1]).index_copy(0, indices, output)
        return output.view(*x.shape[:-1], -1)

    def undo() -> None:
        mlp.forward = own_forward
        del vars(mlp)[ROWS]

    mlp.forward, vars(mlp)[ROWS] = forward, None
    return undo


def fused(module: nn.Module) -> bool:
    """Return whether a module computes by `fuse`."""
    return ROWS in vars(module)


@contextmanager
def at_rows(mlp: nn.Module | None, rows: Int64[Tensor, "count"] | None) -> Iterator[None]:
    """Let a fused MLP, if one is given, compute these rows only; its other rows are zeros."""
    if mlp is None:
        yield
        return
    vars(mlp)[ROWS] = rows
    try:
        yield
    finally:
        vars(mlp)[ROWS] = None
