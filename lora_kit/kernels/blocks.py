"""Causal attention inside packed examples, as plain matrix products over blocks of queries.

A block's queries lie next to each other and see keys that do, so scores, weights and sums are batched products that
run at the speed of any other matrix product; nothing of the square of a row's length is kept, the backward pass
computes the weights again. Long examples are cut into several blocks, neighbouring short ones share one. On CPUs this
takes less time than torch's flash attention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

QUERIES = 256  # of a block, at most: fewer make small products, more compute scores that the mask then hides
ALIGNED = 32  # softmax over bf16 takes half as long again where a row is not so many numbers, or a multiple


@dataclass(frozen=True)
class Block:
    """Queries that are computed together, and what they see.

    Attributes:
        keys: The first key that any of them sees; the last is the last query's own.
        first: The first query.
        last: The end of the queries.
        mask: 0 or minus infinity, added to the scores of the last keys, as many as it has columns.
    """

    keys: int
    first: int
    last: int
    mask: Float[Tensor, "queries masked"]


def blocks_of(lengths: Sequence[int], window: int | None, *, dtype: torch.dtype, device: torch.device) -> list[Block]:
    """Cut a packed row into blocks.

    Args:
        lengths: Of the examples, in order.
        window: How many positions, its own included, a position sees; None for all.
        dtype: Of the scores.
        device: Where they are computed.
    """
    masks: dict[tuple[int, ...], Tensor] = {}
    blocks = []
    window = window if window is not None and window < max(lengths) else None
    for start, members in _shared(lengths):
        length = sum(members)
        rows = -(-length // -(-length // QUERIES))
        for begin in range(0, length, rows := -(-rows // ALIGNED) * ALIGNED):
            end = min(length, begin + rows)
            seen = 0 if window is None else max(0, begin - window + 1)
            before = -(end - seen) % ALIGNED  # keys of earlier examples, hidden by the mask
            before = before if before <= start + seen else 0
            whole = bool(before) or window is not None or len(members) > 1
            columns = end - seen + before if whole else end - begin
            shape = (begin, end, columns, *members) if whole else (end - begin,)
            if shape not in masks:
                masks[shape] = _mask(members, range(begin, end), columns, window).to(device, dtype)
            blocks.append(Block(start + seen - before, start + begin, start + end, masks[shape]))
    return blocks


def _shared(lengths: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield where examples begin that are cut up together: a long one by itself, short ones as many as fit a block."""
    start, members = 0, tuple[int, ...]()
    for length in lengths:
        if members and sum(members) + length > QUERIES:
            yield start, members
            start, members = start + sum(members), ()
        members = (*members, length)
    if members:
        yield start, members


def _mask(members: Sequence[int], queries: range, columns: int, window: int | None) -> Tensor:
    """Return what the queries of some examples, counted from the first one's start, see of the last `columns` keys."""
    example = torch.repeat_interleave(torch.arange(len(members)), torch.tensor(members))
    query, key = torch.arange(queries.start, queries.stop)[:, None], torch.arange(queries.stop - columns, queries.stop)
    seen = (example[query] == example[key.clamp(min=0)]) & (query >= key) & (key >= 0)
    if window is not None:
        seen &= query - key < window
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


class BlockAttention(Function):
    """Attention of `query` [heads, length, width] over `key` and `value` [key_heads, length, width]; returns
    [length, heads, value_width]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        """Attend, block by block."""
        (heads, length, _), (groups, _, width) = query.shape, value.shape
        output = query.new_empty(length, heads, width)
        by_group = output.view(length, groups, heads // groups, width)
        tops = []
        for one in blocks:
            top = _scores(query, key, one, scale, None).amax(-1, keepdim=True)
            part = torch.bmm(torch.softmax(_scores(query, key, one, scale, top), -1), value[:, one.keys : one.last])
            tops.append(top)
            by_group[one.first : one.last] = part.view(groups, heads // groups, -1, width).permute(2, 0, 1, 3)
        ctx.save_for_backward(query, key, value, *tops)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the weights again and take the gradients of the three inputs."""
        query, key, value, *tops = ctx.saved_tensors
        (heads, length, width), groups = query.shape, key.shape[0]
        of_query = query.new_empty(length, groups, heads // groups, width)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        by_head = gradient.transpose(0, 1).contiguous()
        for one, top in zip(ctx.blocks, tops, strict=True):
            keys = slice(one.keys, one.last)
            weights = torch.softmax(_scores(query, key, one, ctx.scale, top), -1)
            above, asking = (_rows(part, one, groups) for part in (by_head, query))
            of_value[:, keys].baddbmm_(weights.transpose(1, 2), above)
            of_weights = torch.bmm(above, value[:, keys].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_key[:, keys].baddbmm_(of_scores.transpose(1, 2), asking, alpha=ctx.scale)
            part = _product(of_scores, key[:, keys], ctx.scale)
            of_query[one.first : one.last] = part.view(groups, heads // groups, -1, width).permute(2, 0, 1, 3)
        return of_query.view(length, heads, width).transpose(0, 1), of_key, of_value, None, None


def _rows(heads: Tensor, block: Block, groups: int) -> Tensor:
    """Return a block's rows [groups, rows, width]: those of heads that share keys one after the other."""
    return heads[:, block.first : block.last].reshape(groups, -1, heads.shape[2])


def _scores(query: Tensor, key: Tensor, block: Block, scale: float, top: Tensor | None) -> Tensor:
    """Return the scores [groups, rows, keys] of a block, less each row's top.

    Softmax is the same whatever is taken from a row, but bf16 is not: it rounds a score of 30 by as much as 0.06. Taken
    inside the product, before it rounds, the top leaves those that matter near zero, where bf16 is fine.
    """
    groups, keys = key.shape[0], block.last - block.keys
    asking, asked = _rows(query, block, groups), key[:, block.keys : block.last].transpose(1, 2)
    if top is None:
        scores = _product(asking, asked, scale)
    else:
        scores = torch.baddbmm(-top.expand(-1, -1, keys), asking, asked, alpha=scale)
    rows, columns = block.mask.shape
    scores.view(groups, -1, rows, keys)[..., keys - columns :].add_(block.mask)
    return scores


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(()).expand(1, 1, 1), left, right, beta=0, alpha=scale)
