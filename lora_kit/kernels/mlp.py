"""A gated MLP, down(act(gate(x)) * up(x)), with adapters: its inner product is computed again instead of kept."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels.lora import Kept, Map, adapters_of, covered, map_of, project, project_back

Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # and what turns its gradient back
ACTIVATIONS: dict[str, Activation] = {
    "silu": (nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x, approximate="tanh"),
    ),
}
PARTS = ("gate_proj", "up_proj", "down_proj")


class GatedMlp(Function):
    """The whole MLP of a layer, for `x` [rows, width]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Activation, maps: Sequence[Map], *adapters: Tensor) -> Tensor:
        """Compute it; the maps are gate, up and down."""
        into, out = _of_parts(adapters)
        (gate, up), kept = project(x, maps[:2], into)
        (output,), inner = project(act[0](gate).mul_(up), maps[2:], out)
        masks = [one for one in (*kept.passed, *inner.passed) if one is not None]
        ctx.save_for_backward(kept.rows, kept.low, gate, up, inner.low, *adapters, *masks)
        ctx.act, ctx.maps = act, maps
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Make the inner product again and go back through all three maps."""
        x, low, gate, up, inner_low, *rest = ctx.saved_tensors
        adapters, masks = rest[:6], iter(rest[6:])
        passed = [next(masks) if one.dropout else None for one in ctx.maps]
        into, out = _of_parts(adapters)
        active = ctx.act[0](gate)
        inner = Kept(active * up, inner_low, passed[2:])
        of_inner, of_out = project_back([gradient], inner, ctx.maps[2:], out, to_input=True)
        assert of_inner is not None
        del inner
        of_up = active.mul_(of_inner)
        of_gate = ctx.act[1](of_inner.mul_(up), gate)
        del of_inner
        of_x, of_into = project_back(
            [of_gate, of_up], Kept(x, low, passed[:2]), ctx.maps[:2], into, to_input=ctx.needs_input_grad[0]
        )
        downs, ups = [*of_into[:2], of_out[0]], [*of_into[2:], of_out[1]]
        return of_x, None, None, *downs, *ups


def _of_parts(adapters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return gate's and up's A and B, and down's, of three A and three B."""
    return [*adapters[:2], *adapters[3:5]], [adapters[2], adapters[5]]


def gated(mlp: nn.Module) -> bool:
    """Return whether a module has the parts of a gated MLP, all of them with plain adapters."""
    return all(name in mlp._modules and covered(mlp.get_submodule(name)) for name in PARTS)


def fuse(mlp: nn.Module, activation: str) -> Callable[[], None]:
    """Let a gated MLP compute in one piece wherever its adapters are plain and on; return the way back."""
    own, parts, act = mlp.forward, [mlp.get_submodule(name) for name in PARTS], ACTIVATIONS[activation]

    def forward(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if not gated(mlp):
            return cast(Tensor, own(x))
        maps, rows = [map_of(one) for one in parts], x.reshape(-1, x.shape[-1])
        return cast(Tensor, GatedMlp.apply(rows, act, maps, *adapters_of(parts))).view(*x.shape[:-1], -1)

    mlp.forward = forward
    return lambda: setattr(mlp, "forward", own)
