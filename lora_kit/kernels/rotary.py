"""Rotary position embeddings, x cos + rotate_half(x) sin, in few passes over memory.

The attention of a model family calls `apply_rotary_pos_emb` from its own modeling file. A fused module runs a copy of
its forward in which this name refers to `rotated`; transformers itself is not changed. `rotated` passes calls that it
does not support on to the family's function.
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
    """`x` [heads, length, width], rotated by an angle per position; cos and sin [length, width] get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate."""
        ctx.save_for_backward(cos, sin)
        return dispatch.backend_of(x).rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Apply the transposed rotation to the gradient: the same cos, and sin negated with its halves swapped."""
        cos, sin = ctx.saved_tensors
        transposed_sin = -sin.roll(sin.shape[-1] // 2, -1)
        return dispatch.backend_of(grad_output).rotate(grad_output, cos, transposed_sin), None, None


def rotation_of(attention: nn.Module) -> Rotation | None:
    """Return the `apply_rotary_pos_emb` that a module's own forward calls.

    None if its class's forward calls no function of this name, or if the module's forward has already been replaced.
    """
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
    """Rotate queries and keys with `Rotary`.

    Call `own` instead for a batch of several rows, for angles of only a part of the width, and for cos and sin in
    another dtype than queries and keys.
    """
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
