"""Rotary positions, x cos + rotate_half(x) sin, in few passes and one function.

A family's attention calls `apply_rotary_pos_emb` of its own file. A module that is fused runs the same code with ours
in that name's place; nothing of transformers is changed, and a call of another kind goes to the family's own.
"""

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from lora_kit.kernels.dispatch import compiled

NAME = "apply_rotary_pos_emb"
Rotation = Callable[..., tuple[Tensor, Tensor]]


class Rotary(Function):
    """`x` [heads, length, width] turned by the angles of its positions, [length, width], which are not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn."""
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Turn back: halves change their places, and so does the sign."""
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin.roll(sin.shape[-1] // 2, -1)), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    kernels = compiled(x)
    if kernels:
        return kernels.rotate(x.transpose(0, 1), cos, sin).transpose(0, 1)
    half = x.shape[-1] // 2
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x, cos, out=output)
    output[..., :half].addcmul_(x[..., half:], sin[:, :half], value=-1)
    output[..., half:].addcmul_(x[..., :half], sin[:, half:])
    return output


def rotation_of(attention: nn.Module) -> Rotation | None:
    """Return the function that a module's own forward turns queries and keys with."""
    forward = type(attention).forward
    uses = isinstance(forward, FunctionType) and NAME in forward.__code__.co_names and "forward" not in vars(attention)
    return cast(Rotation | None, forward.__globals__.get(NAME)) if uses else None


def rotated(
    own: Rotation,
    query: Float[Tensor, "batch heads length width"],
    key: Float[Tensor, "batch key_heads length width"],
    cos: Float[Tensor, "some length angles"],
    sin: Float[Tensor, "some length angles"],
    *rest: object,
    **named: object,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys; by their own function if they are of several rows, turned in part, or by fp32 angles."""
    alike = cos.dtype == sin.dtype == query.dtype == key.dtype and len(query) == 1
    alike &= cos.shape == sin.shape == (1, query.shape[2], query.shape[3])
    if rest or named or not alike:
        return own(query, key, cos, sin, *rest, **named)
    query, key = (Rotary.apply(one.squeeze(0), cos[0], sin[0])[None] for one in (query, key))
    return query, key


def fuse(attention: nn.Module) -> Callable[[], None]:
    """Let an attention turn its queries and keys in one function; return the way back."""
    own = cast(FunctionType, type(attention).forward)
    names = own.__globals__ | {NAME: partial(rotated, own.__globals__[NAME])}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    attention.forward = MethodType(forward, attention)
    return lambda: delattr(attention, "forward")
