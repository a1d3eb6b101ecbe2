"""A gated MLP, down(act(gate(x)) * up(x)), with adapters: its inner product is computed again instead of kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels.dispatch import compiled
from lora_kit.kernels.limits import GATED_MLP
from lora_kit.kernels.lora import Kept, Map, Origin, adapters_of, covered, map_of, origin_of, project, project_back

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x, approximate="tanh"),
    ),
}
"""Of each name that configurations use: the activation, and what turns its gradient back."""
ASKED = "_rows_of_lora_kit"  # where an MLP finds what `at_rows` asks of it


class GatedMlp(Function):
    """The whole MLP of a layer, for `x` [rows, width]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, origin: Origin | None, act: str, maps: Sequence[Map], *adapters: Tensor) -> Tensor:
        """Compute it; the maps are gate, up and down."""
        into, out = _of_parts(adapters)
        (gate, up), kept = project(x, maps[:2], into, origin=origin, whole=not _adding(x))
        active = _gated(gate, up, kept.low, into, act)
        (output,), inner = project(active.product(), maps[2:], out)
        masks = [one for one in (*kept.passed, *inner.passed) if one is not None]
        made_of = (kept.rows, kept.of_row, kept.of_column)
        ctx.save_for_backward(*made_of, kept.low, gate, up, inner.low, *adapters, *masks)
        ctx.act, ctx.maps = act, maps
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Make the inner product again and go back through all three maps."""
        x, of_row, of_column, low, gate, up, inner_low, *rest = ctx.saved_tensors
        adapters, masks = rest[:6], iter(rest[6:])
        passed = [next(masks) if one.dropout else None for one in ctx.maps]
        into, out = _of_parts(adapters)
        active = _gated(gate, up, low, into, ctx.act)
        inner = Kept(active.product(), inner_low, passed[2:])
        of_inner, of_out = project_back([gradient], inner, ctx.maps[2:], out, to_input=True)
        assert of_inner is not None
        del inner
        of_gate, of_up = active.back(of_inner)
        del of_inner
        kept = Kept(x, low, passed[:2], of_row, of_column)
        of_x, of_into = project_back([of_gate, of_up], kept, ctx.maps[:2], into, to_input=ctx.needs_input_grad[0])
        downs, ups = [*of_into[:2], of_out[0]], [*of_into[2:], of_out[1]]
        return of_x, None, None, None, *downs, *ups


@dataclass(frozen=True)
class Gated:
    """A gated activation, act(gate) * up."""

    gate: Tensor
    up: Tensor
    activation: str

    def product(self) -> Tensor:
        """Return it."""
        kernels = compiled(self.gate)
        if kernels:
            product: Tensor = kernels.gate(self.gate, self.up, tanh=self.activation != "silu")
            return product
        return ACTIVATIONS[self.activation][0](self.gate).mul_(self.up)

    def back(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up from that of their product, which is used up."""
        kernels = compiled(self.gate)
        if kernels:
            of_gate, of_up = kernels.gate_back(gradient, self.gate, self.up, tanh=self.activation != "silu")
            return of_gate, of_up
        active, back = ACTIVATIONS[self.activation]
        of_up = active(self.gate).mul_(gradient)
        return back(gradient.mul_(self.up), self.gate), of_up


def _adding(x: Tensor) -> Any:
    """Return the gated activation that adds adapters on the way, where there is one."""
    kernels = compiled(x)
    return kernels.Gated if kernels else None


def _gated(gate: Tensor, up: Tensor, low: Tensor, into: Sequence[Tensor], act: str) -> Any:
    """Return the gated activation; on a GPU it adds what the adapters make of the input on the way."""
    adding = _adding(gate)
    if not adding:
        return Gated(gate, up, act)
    of_gate, of_up = (one.to(gate.dtype) for one in into[2:])
    return adding(gate, up, low, (of_gate, of_up), act)


def _of_parts(adapters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return gate's and up's A and B, and down's, of three A and three B."""
    return [*adapters[:2], *adapters[3:5]], [adapters[2], adapters[5]]


def gated(mlp: nn.Module) -> bool:
    """Return whether a module has the parts of a gated MLP, all of them with plain adapters."""
    return all(name in mlp._modules and covered(mlp.get_submodule(name)) for name in GATED_MLP)


def fuse(mlp: nn.Module, activation: str) -> Callable[[], None]:
    """Let a gated MLP compute in one piece wherever its adapters are plain and on; return the way back."""
    own, parts = mlp.forward, [mlp.get_submodule(name) for name in GATED_MLP]

    def forward(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if not gated(mlp):
            return cast(Tensor, own(x))
        maps, rows, asked = [map_of(one) for one in parts], x.reshape(-1, x.shape[-1]), vars(mlp)[ASKED]
        some, origin = (rows, origin_of(x)) if asked is None else (rows.index_select(0, asked), None)
        output = cast(Tensor, GatedMlp.apply(some, origin, activation, maps, *adapters_of(parts)))
        if asked is not None:
            output = output.new_zeros(len(rows), output.shape[1]).index_copy(0, asked, output)
        return output.view(*x.shape[:-1], -1)

    def undo() -> None:
        mlp.forward = own
        del vars(mlp)[ASKED]

    mlp.forward, vars(mlp)[ASKED] = forward, None
    return undo


def fused(module: nn.Module) -> bool:
    """Return whether `fuse` has been at a module."""
    return ASKED in vars(module)


@contextmanager
def at_rows(mlp: nn.Module | None, rows: Int64[Tensor, "asked"] | None) -> Iterator[None]:
    """Let a fused MLP, if there is one, compute these rows alone and leave zeros in the others."""
    if mlp is None:
        yield
        return
    vars(mlp)[ASKED] = rows
    try:
        yield
    finally:
        vars(mlp)[ASKED] = None
