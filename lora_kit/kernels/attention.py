"""Attention inside each packed example: what a mask of all pairs gives, without its L x L pairs.

The examples of a packed row are attended to one after the other, so that no mask between them exists. transformers
passes what a family needs beside queries, keys and values (window, soft cap, sinks, scaling) as keywords, and hands on
`segments`, which `objective.model_inputs` adds to a call of the model. This name has no mask function, on purpose:
without one transformers makes no mask at all (and asks the device nothing), and a call without `segments`, as in
generation, is an error instead of a leak. `own_attention` is the way back for such calls.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface, PreTrainedModel

from lora_kit.kernels.blocks import BlockAttention, Blocks, blocks_of
from lora_kit.kernels.dispatch import compiled

SEGMENT = "segment"
"""The name of this attention in a model's configuration and in a run's manifest."""

TILED_DTYPES = (torch.bfloat16,)  # fp32 tiles take twice the shared memory, and fp32 is for checking
TILED_WIDTH = 256  # wider heads were not tried


@dataclass(frozen=True)
class Segments:
    """Where the examples of a packed row are.

    Attributes:
        lengths: Their lengths, in order; on the host, so that nobody waits for the device.
        device: Of the row.
        windows: The window of every attention that was computed: what the probe reads.
    """

    lengths: tuple[int, ...]
    device: torch.device
    windows: list[int | None] = field(default_factory=list)
    _blocks: dict[tuple[int | None, torch.dtype], Blocks] = field(default_factory=dict)
    _tiles: dict[int, Tensor] = field(default_factory=dict)

    def tiles(self, many: int) -> Tensor:
        """Return int32 [tiles, 3]: the begin of an example, of at most `many` of its rows, and the example's end."""
        if many not in self._tiles:
            ends = np.cumsum(self.lengths, dtype=np.int32)
            whole = zip(ends - self.lengths, ends, strict=True)
            rows = [(begin, first, end) for begin, end in whole for first in range(begin, end, many)]
            self._tiles[many] = moved(np.array(rows, dtype=np.int32), self.device)
        return self._tiles[many]

    def blocks(self, window: int | None, dtype: torch.dtype) -> Blocks:
        """Return the row cut into blocks of queries; made once for all layers with this window."""
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = blocks_of(self.lengths, window, dtype=dtype, device=self.device)
        return self._blocks[window, dtype]


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array's values on a device; nobody waits for what the device has still to do."""
    values = torch.from_numpy(array)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def segment_attention(
    module: nn.Module,
    query: Float[Tensor, "one heads length width"],
    key: Float[Tensor, "one key_heads length width"],
    value: Float[Tensor, "one key_heads length value_width"],
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, "heads"] | None = None,
    **_: object,
) -> tuple[Float[Tensor, "one length heads value_width"], None]:
    """Attend causally inside each segment; the signature is that of transformers' attention functions.

    Args:
        module: Unused.
        query: Of all examples, end to end.
        key: Likewise; fewer heads than queries are shared by groups.
        value: Likewise.
        attention_mask: None.
        segments: Where each example is.
        dropout: 0; a base's own dropouts are off.
        scaling: Of the scores; by default 1 / sqrt(width).
        sliding_window: How many positions, its own included, a position sees; None or 0 for all.
        softcap: Scores are squeezed into +-softcap by tanh (Gemma 2).
        s_aux: A score for each head that takes part in the softmax and has no value (gpt-oss's sinks).

    Raises:
        ValueError: The call is not one of packed examples alone.
    """
    if segments is None or attention_mask is not None or dropout:
        raise ValueError("attention by segment takes packed examples, no mask and no dropout; see `own_attention`")
    if tuple(query.shape[::2]) != (1, sum(segments.lengths)) or key.shape[2] != query.shape[2]:
        raise ValueError(f"attention by segment: {segments.lengths} are not the lengths in {tuple(query.shape)}")
    segments.windows.append(sliding_window)
    window, scale = sliding_window or None, scaling or query.shape[-1] ** -0.5
    plain = softcap is None and s_aux is None
    if plain and _tiled(query, key, value):
        parts = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
        return TiledAttention.apply(*parts, segments, scale, window)[None], None
    if plain:
        row = segments.blocks(window, query.dtype)
        return BlockAttention.apply(*(one.squeeze(0) for one in (query, key, value)), row, scale)[None], None
    outputs = [
        _spelled_out(*parts, scale=scale, window=window, softcap=softcap, sinks=s_aux)
        for parts in zip(*(one.split(segments.lengths, dim=2) for one in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _tiled(query: Tensor, key: Tensor, value: Tensor) -> bool:
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    fits = alike and query.dtype in TILED_DTYPES and query.shape[-1] <= TILED_WIDTH
    return fits and compiled(query) is not None


class TiledAttention(Function):
    """Attention by compiled kernels, over [length, heads, width]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        """Attend."""
        kernels = cast(ModuleType, compiled(query))
        tiles = segments.tiles(kernels.tile_rows(query.shape[-1]))
        query, key, value = (one.contiguous() for one in (query, key, value))
        output, sums = kernels.attend(query, key, value, tiles, scale, window)
        ctx.save_for_backward(query, key, value, output, sums, tiles)
        ctx.kernels, ctx.rest = kernels, (scale, window)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Take the gradients of the three inputs."""
        gradients = ctx.kernels.attend_back(gradient.contiguous(), *ctx.saved_tensors, *ctx.rest)
        return *gradients, None, None, None


def _spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend inside one segment by the formula: torch's own attention knows neither soft cap nor sinks."""
    scores = (query @ _for_each_head(key, query).transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = query.shape[2]
    scores = scores.masked_fill(~visible(length, window, query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(1, -1, length, 1)], dim=-1)
    shares = scores.softmax(dim=-1)[..., :length].to(value.dtype)
    return shares @ _for_each_head(value, query)


def _for_each_head(shared: Tensor, query: Tensor) -> Tensor:
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return which key (column) a query (row) sees: those before it and itself, at most `window` of them."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


AttentionInterface.register(SEGMENT, segment_attention)


def attention_of(model: nn.Module) -> str:
    """Return the name of the attention that a model, with or without an adapter, computes with."""
    return str(inner_of(model).config._attn_implementation)


def use_attention(model: nn.Module, name: str | None) -> bool:
    """Switch a model to an attention of this name, None for its own default; return whether it can."""
    inner = inner_of(model)
    if name != attention_of(model) and inner._can_set_attn_implementation():
        inner.set_attn_implementation(inner.get_correct_attn_implementation(name))
    return name in (None, attention_of(model))


@contextmanager
def own_attention(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Let a model that attends by segment compute calls of another kind: padded rows, generation with a cache.

    Args:
        model: Any; one with another attention keeps it, unless a name is given.
        name: Of transformers' implementation; by default the model's own choice.
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
