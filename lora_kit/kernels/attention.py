"""Attention inside each packed example: the result of a block-diagonal causal mask, without its L x L scores.

transformers passes what a family needs besides query, key and value (window, soft cap, sinks, scaling) as keywords, and
hands on `segments`, which `model.forward.model_inputs` adds to a call of the model. No mask function is registered for
this attention's name: transformers then builds no mask and never waits for the device, and a caller that forgets
`segments`, as generation does, gets an error, not leakage between examples. Such calls are made inside `own_attention`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface, PreTrainedModel

from lora_kit.kernels import dispatch
from lora_kit.kernels.segments import Segments

SEGMENT = "segment"
"""The name of this attention in a model's configuration and in a run's manifest."""


def segment_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads length width"],
    key: Float[Tensor, "batch key_heads length width"],
    value: Float[Tensor, "batch key_heads length value_width"],
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, "heads"] | None = None,
    **_: object,
) -> tuple[Float[Tensor, "batch length heads value_width"], None]:
    """Attend causally inside each segment; the signature is that of transformers' attention functions.

    Args:
        module: Unused.
        query: The queries of all examples, one after the other.
        key: The keys of all examples; a group of query heads shares a key head.
        value: The values of all examples.
        attention_mask: Must be None.
        segments: The examples of the row.
        dropout: Must be 0: the dropout layers of a base are switched off.
        scaling: Factor of the scores; None for 1 / sqrt(width).
        sliding_window: How many positions a position sees, itself included; None or 0 for all.
        softcap: Scores become softcap * tanh(scores / softcap) (Gemma 2).
        s_aux: A score for each head that takes part in the softmax and has no value (sinks of gpt-oss).

    Raises:
        ValueError: `segments` is missing or does not fit the row, or there is a mask or dropout.
    """
    if segments is None or attention_mask is not None or dropout:
        raise ValueError("attention by segment takes packed examples, no mask and no dropout; see `own_attention`")
    if tuple(query.shape[::2]) != (1, sum(segments.lengths)) or key.shape[2] != query.shape[2]:
        raise ValueError(f"attention by segment: {segments.lengths} are not the lengths in {tuple(query.shape)}")
    segments.windows.append(sliding_window)
    window, scale = sliding_window or None, scaling or query.shape[-1] ** -0.5
    if softcap is None and s_aux is None:
        inputs = (tensor.squeeze(0) for tensor in (query, key, value))
        return SegmentAttention.apply(*inputs, segments, scale, window)[None], None
    attend = partial(_eager, scale=scale, window=window, softcap=softcap, sinks=s_aux)
    outputs = [attend(*tensors) for tensors in _sequences(query, key, value, segments)]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


class SegmentAttention(Function):
    """Attention of query [heads, length, width] over key and value by a backend; returns [length, heads, width]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        """Attend."""
        backend = dispatch.backend_of(query)
        ctx.backend = backend if backend.supports_attention(query, key, value) else dispatch.PLAIN
        output, saved = ctx.backend.attention(query, key, value, segments, scale, window)
        ctx.save_for_backward(*saved)
        ctx.rest = segments, scale, window
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        gradients = ctx.backend.attention_backward(grad_output, ctx.saved_tensors, *ctx.rest)
        return *gradients, None, None, None


def _sequences(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield query, key and value of each sequence; of a second branch only the queries that are not shared."""
    begin, end, shared, second = segments.spans.T
    sizes = np.stack([shared - begin, second - shared, end - second], axis=1).reshape(-1).tolist()
    q, k, v = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    for place in range(0, len(sizes), 3):
        if sizes[place + 2] == 0:
            yield q[place], k[place], v[place]
            continue
        first, rest = slice(place, place + 2), slice(place, place + 3, 2)
        yield torch.cat(q[first], dim=2), torch.cat(k[first], dim=2), torch.cat(v[first], dim=2)
        yield q[place + 2], torch.cat(k[rest], dim=2), torch.cat(v[rest], dim=2)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend inside one sequence with materialised scores: torch's own attention has neither soft cap nor sinks.

    The queries belong to the last positions of the sequence.
    """
    scores = (query @ _for_each_head(key, query).transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows, length = scores.shape[2:]
    scores = scores.masked_fill(~visible(length, window, query.device)[length - rows :], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(1, -1, rows, 1)], dim=-1)
    probs = scores.softmax(dim=-1)[..., :length].to(value.dtype)
    return probs @ _for_each_head(value, query)


def _for_each_head(key: Tensor, query: Tensor) -> Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys (columns) a query (row) sees: itself and the keys before it, at most `window` keys."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


AttentionInterface.register(SEGMENT, segment_attention)


def attention_of(model: nn.Module) -> str:
    """Return the name of the attention that a model, with or without an adapter, computes with."""
    return str(inner_of(model).config._attn_implementation)


def use_attention(model: nn.Module, name: str | None) -> bool:
    """Switch a model to an attention implementation; return whether the model supports it. None is its default."""
    inner = inner_of(model)
    if name != attention_of(model) and inner._can_set_attn_implementation():
        inner.set_attn_implementation(inner.get_correct_attn_implementation(name))
    return name in (None, attention_of(model))


@contextmanager
def own_attention(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Let a model that attends by segment compute padded rows, or generate with a cache, in this context.

    Args:
        model: The model. If it does not attend by segment and no name is given, nothing changes.
        name: The name of an attention implementation of transformers; None for the model's default.
    """
    before = attention_of(model)
    if name or before == SEGMENT:
        use_attention(model, name)
    try:
        yield
    finally:
        use_attention(model, before)


def inner_of(model: nn.Module) -> PreTrainedModel:
    """Return the language model itself, whatever wraps it."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
