"""Rotary positions, x cos + rotate_half(x) sin, as one function with few passes.

A family's attention calls `apply_rotary_pos_emb` of its own file. A fused module runs the same code with our function
under that name; transformers itself is not changed, and our function hands calls that it does not support to the
family's function.
"""

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels import dispatch

NAME = "apply_rotary_pos_emb"
Rotation = Callable[..., tuple[Tensor, Tensor]]


class Rotary(Function):
    """`x` [heads, length, width] rotated by the angles of its positions, [length, width], which are not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate."""
        ctx.save_for_backward(cos, sin)
        return dispatch.backend_of(x).rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate back: the transposed rotation swaps the halves of sin and negates it."""
        cos, sin = ctx.saved_tensors
        transposed_sin = -sin.roll(sin.shape[-1] // 2, -1)
        return dispatch.backend_of(grad_output).rotate(grad_output, cos, transposed_sin), None, None


def rotation_of(attention: nn.Module) -> Rotation | None:
    """Return the function that a module's own forward rotates queries and keys with."""
    forward = type(attention).forward
    uses = isinstance(forward, FunctionType) and NAME in forward.__code__.co_names and "forward" not in vars(attention)
    return cast(Rotation | None, forward.__globals__.get(NAME)) if uses else None


def rotated(
    own: Rotation,
    query: Float[Tensor, "batch heads length width"],
    key: Float[Tensor, "batch key_heads length width"],
    cos: Float[Tensor, "cos_batch length angles"],
    sin: Float[Tensor, "cos_batch length angles"],
    *rest: object,
    **named: object,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; call `own` for several rows, angles of a part of the width, or angles in fp32."""
    supported = cos.dtype == sin.dtype == query.dtype == key.dtype and len(query) == 1
    supported &= cos.shape == sin.shape == (1, query.shape[2], query.shape[3])
    if rest or named or not supported:
        return own(query, key, cos, sin, *rest, **named)
    query, key = (Rotary.apply(x.squeeze(0), cos[0], sin[0])[None] for x in (query, key))
    return query, key


def fuse(attention: nn.Module) -> Callable[[], None]:
    """Let an attention module rotate queries and keys with `Rotary`; return a function that restores it."""
    own_forward = cast(FunctionType, type(attention).forward)
    names = own_forward.__globals__ | {NAME: partial(rotated, own_forward.__globals__[NAME])}
    forward = FunctionType(
        own_forward.__code__, names, own_forward.__name__, own_forward.__defaults__, own_forward.__closure__
    )
    forward.__kwdefaults__ = own_forward.__kwdefaults__
    attention.forward = MethodType(forward, attention)
    return lambda: delattr(attention, "forward")
