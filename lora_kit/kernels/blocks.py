"""Causal attention inside packed examples, as plain matrix products over blocks of queries.

A block's queries lie next to each other and see keys that do, so scores, weights and sums are batched products that
run at the speed of any other matrix product; nothing of the square of a row's length is kept, the backward pass
computes the weights again. Long examples are cut into several blocks, neighbouring short ones share one. On CPUs this
takes less time than torch's flash attention.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from lora_kit.kernels.limits import QUERIES

ALIGNED = 32  # softmax over bf16 takes half as long again where a row is not so many numbers, or a multiple


@dataclass(frozen=True)
class Block:
    """Queries that are computed together, and what they see.

    Attributes:
        first: The first query, counted in the packed row.
        last: The end of the queries.
        height: As many rows are computed; those after the queries are padding.
        keys: The first key that any of them sees, counted in the padded row.
        end: The end of the keys, which is the padded end of the queries.
        mask: 0 or minus infinity, added to the scores of the last keys, as many as it has columns.
    """

    first: int
    last: int
    height: int
    keys: int
    end: int
    mask: Float[Tensor, "height masked"]


@dataclass(frozen=True)
class Blocks:
    """A packed row with padding, so that blocks begin and end at multiples of ALIGNED, and its blocks.

    oneDNN compiles a product for every shape and keeps it (0.3 MB, 0.6 MB for an odd one), so there should be few.

    Attributes:
        spans: Where examples that are cut up together are: their first, their end, and their first in the padded row.
        length: Of the padded row.
        blocks: In order.
    """

    spans: list[tuple[int, int, int]]
    length: int
    blocks: list[Block]

    def spread(self, rows: Float[Tensor, "heads length width"]) -> Float[Tensor, "heads padded width"]:
        """Copy a packed row, padded with zeros."""
        spread = rows.new_zeros(len(rows), self.length, rows.shape[2])
        for first, last, place in self.spans:
            spread[:, place : place + last - first] = rows[:, first:last]
        return spread

    def gather(self, spread: Float[Tensor, "heads padded width"]) -> Float[Tensor, "heads length width"]:
        """Copy what was spread back, in the order of a linear layer's output."""
        heads, _, width = spread.shape
        rows = spread.new_empty(self.spans[-1][1], heads, width).transpose(0, 1)
        for first, last, place in self.spans:
            rows[:, first:last] = spread[:, place : place + last - first]
        return rows

    def most(self, heads: int) -> int:
        """Return how many scores a block has at most."""
        return max(heads * one.height * (one.end - one.keys) for one in self.blocks)


def blocks_of(lengths: Sequence[int], window: int | None, *, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Cut a packed row into blocks.

    Args:
        lengths: Of the examples, in order.
        window: How many positions, its own included, a position sees; None for all.
        dtype: Of the scores.
        device: Where they are computed.
    """
    masks: dict[tuple[int, ...], Tensor] = {}
    blocks, spans, place = list[Block](), list[tuple[int, int, int]](), 0
    window = window if window is not None and window < max(lengths) else None
    for start, members in _shared(lengths):
        length = sum(members)
        padded = _aligned(length)
        whole = window is not None or len(members) > 1
        rows = _aligned(-(-padded // -(-padded // QUERIES)))
        for begin in range(0, padded, rows):
            end = min(padded, begin + rows)
            seen = 0 if window is None else max(0, begin - window + 1) // ALIGNED * ALIGNED
            columns = end - seen if whole else end - begin
            shape = (begin, end, columns, *members) if whole else (end - begin,)
            if shape not in masks:
                masks[shape] = _mask(members, range(begin, end), columns, window).to(device, dtype)
            last = start + min(length, end)
            blocks.append(Block(start + begin, last, end - begin, place + seen, place + end, masks[shape]))
        spans.append((start, start + length, place))
        place += padded
    return Blocks(spans, place, blocks)


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


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
    """Return what the queries of some examples, counted from the first one's start, see of the last `columns` keys.

    Padding goes on with the last example: nobody before it sees it, and it has something to see.
    """
    ends = torch.tensor(members).cumsum(0)[:-1]
    query, key = torch.arange(queries.start, queries.stop)[:, None], torch.arange(queries.stop - columns, queries.stop)
    seen = (torch.bucketize(query, ends, right=True) == torch.bucketize(key, ends, right=True)) & (query >= key)
    if window is not None:
        seen &= query - key < window
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


class BlockAttention(Function):
    """Attention of `query` [heads, length, width] over `key` and `value` [key_heads, length, width]; returns
    [length, heads, value_width]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Blocks, scale: float) -> Tensor:
        """Attend, block by block."""
        (heads, length, _), groups = query.shape, len(key)
        output = query.new_empty(length, heads, value.shape[2]).transpose(0, 1)
        key, value = row.spread(key), row.spread(value)
        room = query.new_empty(2, row.most(heads))
        kept = []
        for one in row.blocks:
            keys = slice(one.keys, one.end)
            asking, asked = _rows(query, one, groups), key[:, keys].transpose(1, 2)
            scores, weights = _rooms(room, asking, asked)
            top = None
            if query.dtype != torch.float32:
                top = _scores(asking, asked, one, scale, None, scores).amax(-1, keepdim=True)
            torch.softmax(_scores(asking, asked, one, scale, top, scores), -1, out=weights)
            part = torch.bmm(weights, value[:, keys]).view(heads, one.height, -1)
            output[:, one.first : one.last] = part[:, : one.last - one.first]
            kept += [asking, top]
        ctx.save_for_backward(key, value, *kept)
        ctx.row, ctx.scale = row, scale
        return output.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the weights again and take the gradients of the three inputs."""
        key, value, *kept = ctx.saved_tensors
        (length, heads, _), (groups, _, width) = gradient.shape, key.shape
        of_query = key.new_empty(length, heads, width).transpose(0, 1)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        room, by_head = key.new_empty(3, ctx.row.most(heads)), gradient.transpose(0, 1)
        for one, asking, top in zip(ctx.row.blocks, kept[::2], kept[1::2], strict=True):
            keys = slice(one.keys, one.end)
            asked, above = key[:, keys].transpose(1, 2), _rows(by_head, one, groups)
            scores, weights, of_weights = _rooms(room, asking, asked)
            torch.softmax(_scores(asking, asked, one, ctx.scale, top, scores), -1, out=weights)
            of_value[:, keys].baddbmm_(weights.transpose(1, 2), above)
            torch.bmm(above, value[:, keys].transpose(1, 2), out=of_weights)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype, grad_input=scores)
            of_key[:, keys].baddbmm_(of_scores.transpose(1, 2), asking, alpha=ctx.scale)
            part = _product(of_scores, key[:, keys], ctx.scale).view(heads, one.height, width)
            of_query[:, one.first : one.last] = part[:, : one.last - one.first]
        return of_query, ctx.row.gather(of_key), ctx.row.gather(of_value), None, None


def _rows(heads: Tensor, block: Block, groups: int) -> Tensor:
    """Return a block's rows [groups, rows, width], padded with zeros: those of heads that share keys one after the
    other."""
    count, many = block.last - block.first, len(heads)
    rows = heads.new_empty(many, block.height, heads.shape[2])
    rows[:, :count] = heads[:, block.first : block.last]
    rows[:, count:] = 0
    return rows.view(groups, many // groups * block.height, -1)


def _rooms(room: Tensor, asking: Tensor, asked: Tensor) -> list[Tensor]:
    """Return the beginning of each room as one of [groups, rows, keys]."""
    shape = (*asking.shape[:2], asked.shape[2])
    return [one[: math.prod(shape)].view(shape) for one in room]


def _scores(asking: Tensor, asked: Tensor, block: Block, scale: float, top: Tensor | None, scores: Tensor) -> Tensor:
    """Fill `scores` [groups, rows, keys] with those of a block, less each row's top.

    Softmax is the same whatever is taken from a row, but bf16 is not: it rounds a score of 30 by as much as 0.06. Taken
    inside the product, before it rounds, the top leaves those that matter near zero, where bf16 is fine.
    """
    groups, _, keys = scores.shape
    rows, columns = block.mask.shape
    whole, masked = scores, scores.view(groups, -1, rows, keys)[..., keys - columns :]
    if top is None:
        torch.baddbmm(whole, asking, asked, beta=0, alpha=scale, out=whole)
        masked.add_(block.mask)
        return scores
    scores[..., : keys - columns] = -top
    torch.sub(block.mask, top.view(groups, -1, rows, 1), out=masked)
    return scores.baddbmm_(asking, asked, alpha=scale)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(()).expand(1, 1, 1), left, right, beta=0, alpha=scale)
