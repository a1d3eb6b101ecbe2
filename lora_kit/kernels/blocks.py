"""Causal attention inside packed examples in plain PyTorch, as batched products over blocks of queries.

The queries of a block are adjacent and see adjacent keys, so scores, probabilities and sums are batched products that
run at the speed of any other matrix product. Nothing quadratic in the row's length is kept; the backward pass computes
the probabilities again. Long examples are cut into several blocks, short neighbours share a block. On CPUs this takes
less time than torch's flash attention.

A long example that forks (see `Segments`) is cut as two: its beginning with the first branch, and its beginning with
the second branch. The keys of the beginning are copied for the second, whose queries are only those of the branch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lora_kit.kernels.limits import QUERIES

Fork = tuple[int, int]
"""The number of positions that both branches of an example share, and where its second branch begins."""

ALIGNED = 32  # rows of scores are padded to a multiple of this: otherwise softmax over bf16 takes 1.5 times as long


@dataclass(frozen=True)
class Block:
    """A range of queries that are computed together, and the range of keys that they see.

    Queries are indexed in the packed row. Keys are indexed in the padded row of `Blocks`: the packed row with zeros
    inserted, so that ranges of keys begin and end at multiples of ALIGNED.

    Attributes:
        first: Index of the first query, in the packed row.
        last: Index after the last query, in the packed row.
        height: The number of rows of scores: `lead` of padding, one for each query, then padding up to a multiple of
            ALIGNED.
        lead: The number of rows before the first query.
        keys: Index of the first key, in the padded row; no query of the block sees an earlier key.
        end: Index after the last key, in the padded row.
        mask: Added to the scores of the last `masked` keys: 0 where a query sees a key, minus infinity elsewhere. Every
            query sees all earlier keys, so they need no mask.
    """

    first: int
    last: int
    height: int
    lead: int
    keys: int
    end: int
    mask: Float[Tensor, "height masked"]

    @property
    def queries(self) -> slice:
        """The rows of scores that belong to queries."""
        return slice(self.lead, self.lead + self.last - self.first)


@dataclass(frozen=True)
class Blocks:
    """A packed row, padded so that blocks begin and end at multiples of ALIGNED, and its blocks.

    oneDNN compiles code for every shape of a product and keeps it (0.3 MB, 0.6 MB for an odd shape), so few shapes are
    better.

    Attributes:
        spans: Ranges that are the packed row in order: start and end in the packed row, and start in the padded row.
        copies: The ranges that the padded row contains a second time, in the same form.
        length: Length of the padded row.
        blocks: The blocks, in order.
    """

    spans: list[tuple[int, int, int]]
    copies: list[tuple[int, int, int]]
    length: int
    blocks: list[Block]

    def pad(self, rows: Float[Tensor, "heads length width"]) -> Float[Tensor, "heads padded width"]:
        """Copy a packed row into a padded row; the padding is zeros."""
        padded = rows.new_zeros(len(rows), self.length, rows.shape[2])
        for first, last, offset in (*self.spans, *self.copies):
            padded[:, offset : offset + last - first] = rows[:, first:last]
        return padded

    def unpad(self, padded: Float[Tensor, "heads padded width"]) -> Float[Tensor, "heads length width"]:
        """Copy a padded row without its padding, laid out as [length, heads, width] like a linear layer's output.

        What the padded row contains twice is added.
        """
        heads, _, width = padded.shape
        rows = padded.new_empty(self.spans[-1][1], heads, width).transpose(0, 1)
        for first, last, offset in self.spans:
            rows[:, first:last] = padded[:, offset : offset + last - first]
        for first, last, offset in self.copies:
            rows[:, first:last] += padded[:, offset : offset + last - first]
        return rows

    def most_scores(self, heads: int) -> int:
        """Return the number of scores of the largest block."""
        return max(heads * block.height * (block.end - block.keys) for block in self.blocks)


def blocks_of(
    lengths: Sequence[int],
    window: int | None,
    *,
    forks: Sequence[Fork | None] = (),
    dtype: torch.dtype,
    device: torch.device,
) -> Blocks:
    """Cut a packed row into blocks.

    Args:
        lengths: Lengths of the examples, in order.
        window: How many positions a position sees, itself included; None for all.
        forks: `Segments.forks`.
        dtype: Dtype of the scores.
        device: Device of the scores.
    """
    masks: dict[tuple[object, ...], Tensor] = {}
    blocks, spans, copies, offset = list[Block](), list[tuple[int, int, int]](), list[tuple[int, int, int]](), 0
    window = window if window is not None and window < max(lengths) else None
    for group in _groups(lengths, forks):
        length, base = sum(group.lengths), group.end - sum(group.lengths)
        padded, lead = _aligned(length), group.shared // ALIGNED * ALIGNED
        # otherwise only the keys of the block itself need a mask
        mask_all = window is not None or len(group.lengths) > 1 or any(group.forks)
        jump = max(second - shared for shared, second in (fork or (0, 0) for fork in group.forks))
        rows = _aligned(-(-(padded - lead) // -(-(padded - lead) // QUERIES)))
        for begin in range(lead, padded, rows):
            end = min(padded, begin + rows)
            first_key = 0 if window is None else max(0, begin - jump - window + 1) // ALIGNED * ALIGNED
            columns = end - first_key if mask_all else end - begin
            shape = (begin, end, columns, group.lengths, group.forks) if mask_all else (end - begin,)
            if shape not in masks:
                masks[shape] = _mask(group, range(begin, end), columns, window).to(device, dtype)
            first, last = max(begin, group.shared), min(length, end)
            place = (base + first, base + last, end - begin, first - begin)
            blocks.append(Block(*place, offset + first_key, offset + end, masks[shape]))
        if group.shared:
            copies.append((group.start, group.start + group.shared, offset))
        spans.append((base + group.shared, group.end, offset + group.shared))
        offset += padded
    return Blocks(spans, copies, offset, blocks)


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


class _Group(NamedTuple):
    """Keys that are cut together: a long example, one branch of a long example, or several short examples.

    Attributes:
        start: Index of the first key, in the packed row.
        end: Index after the last key, in the packed row.
        lengths: The lengths of the examples.
        forks: Where they fork, as in `Segments.forks`.
        shared: The number of keys from `start` on whose queries are in the group before; what follows them in the
            packed row is the first branch, which this group leaves out.
    """

    start: int
    end: int
    lengths: tuple[int, ...]
    forks: tuple[Fork | None, ...]
    shared: int = 0


def _groups(lengths: Sequence[int], forks: Sequence[Fork | None]) -> Iterator[_Group]:
    """Yield the groups of examples that are cut into blocks together, in the order of the packed row."""
    group = _Group(0, 0, (), ())
    for length, fork in zip_longest(lengths, forks):
        if group.lengths and group.end - group.start + length > QUERIES:
            yield group
            group = _Group(group.end, group.end, (), ())
        if fork is not None and length > QUERIES:
            start, (shared, second) = group.end, fork
            yield _Group(start, start + second, (second,), (None,))
            yield _Group(start, start + length, (shared + length - second,), (None,), shared)
            group = _Group(start + length, start + length, (), ())
        else:
            group = _Group(group.start, group.end + length, (*group.lengths, length), (*group.forks, fork))
    if group.lengths:
        yield group


def _mask(group: _Group, queries: range, columns: int, window: int | None) -> Tensor:
    """Return 0 where a query sees a key and minus infinity elsewhere, [queries, columns].

    Args:
        group: The group of the queries and the keys.
        queries: The queries, as indices of keys of the group.
        columns: The number of keys; the last key is at the position of the last query.
        window: How many positions a position sees; None for all.

    Padding counts as part of the last example: attention is causal, so no query before the padding sees it. Each padded
    row sees at least one key, so softmax gives no NaN.
    """
    count = queries.stop
    example, branch, position = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
    start = 0
    for index, (length, fork) in enumerate(zip(group.lengths, group.forks, strict=True)):
        example[start:], branch[start:] = index, 0
        position[start:] = torch.arange(max(0, count - start))
        if fork is not None:
            shared, second = fork
            branch[start + shared :], branch[start + second :] = 1, 2
            position[start + second :] -= second - shared
        start += length
    query, key = torch.arange(queries.start, count)[:, None], torch.arange(count - columns, count)
    seen = (example[query] == example[key]) & (query >= key) & ((branch[key] == 0) | (branch[key] == branch[query]))
    if window is not None:
        seen &= position[query] - position[key] < window
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def attend_blocks(
    query: Float[Tensor, "heads length width"],
    key: Float[Tensor, "key_heads length width"],
    value: Float[Tensor, "key_heads length value_width"],
    row: Blocks,
    scale: float,
) -> tuple[Float[Tensor, "length heads value_width"], list[Tensor | None]]:
    """Attend block by block; return the output and what `attend_blocks_backward` needs."""
    (heads, length, _), key_heads = query.shape, len(key)
    output = query.new_empty(length, heads, value.shape[2]).transpose(0, 1)
    key, value = row.pad(key), row.pad(value)
    workspace = query.new_empty(2, row.most_scores(heads))
    saved: list[Tensor | None] = [key, value]
    for block in row.blocks:
        keys = slice(block.keys, block.end)
        queries, keys_transposed = _queries(query, block, key_heads), key[:, keys].transpose(1, 2)
        scores, probs = _views(workspace, queries, keys_transposed)
        highest = None
        if query.dtype != torch.float32:
            highest = _scores(queries, keys_transposed, block, scale, None, scores).amax(-1, keepdim=True)
        torch.softmax(_scores(queries, keys_transposed, block, scale, highest, scores), -1, out=probs)
        part = torch.bmm(probs, value[:, keys]).view(heads, block.height, -1)
        output[:, block.first : block.last] = part[:, block.queries]
        saved += [queries, highest]
    return output.transpose(0, 1), saved


def attend_blocks_backward(
    grad_output: Float[Tensor, "length heads value_width"], saved: Sequence[Any], row: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the probabilities again and return the gradients of query, key and value."""
    key, value, *of_blocks = saved
    (length, heads, _), (key_heads, _, width) = grad_output.shape, key.shape
    grad_query = key.new_empty(length, heads, width).transpose(0, 1)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    workspace, by_head = key.new_empty(3, row.most_scores(heads)), grad_output.transpose(0, 1)
    for block, queries, highest in zip(row.blocks, of_blocks[::2], of_blocks[1::2], strict=True):
        keys = slice(block.keys, block.end)
        keys_transposed, grads = key[:, keys].transpose(1, 2), _queries(by_head, block, key_heads)
        scores, probs, grad_probs = _views(workspace, queries, keys_transposed)
        torch.softmax(_scores(queries, keys_transposed, block, scale, highest, scores), -1, out=probs)
        grad_value[:, keys].baddbmm_(probs.transpose(1, 2), grads)
        torch.bmm(grads, value[:, keys].transpose(1, 2), out=grad_probs)
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype, grad_input=scores)
        grad_key[:, keys].baddbmm_(grad_scores.transpose(1, 2), queries, alpha=scale)
        part = _product(grad_scores, key[:, keys], scale).view(heads, block.height, width)
        grad_query[:, block.first : block.last] = part[:, block.queries]
    return grad_query, row.unpad(grad_key), row.unpad(grad_value)


def _queries(
    heads: Float[Tensor, "heads length width"], block: Block, key_heads: int
) -> Float[Tensor, "key_heads rows width"]:
    """Return a block's rows, padded with zeros; the query heads that share a key head are adjacent."""
    width, own = heads.shape[2], block.queries
    rows = heads.new_empty(len(heads), block.height, width)
    rows[:, : own.start] = 0
    rows[:, own] = heads[:, block.first : block.last]
    rows[:, own.stop :] = 0
    return rows.view(key_heads, -1, width)


def _views(workspace: Tensor, queries: Tensor, keys_transposed: Tensor) -> list[Tensor]:
    """Return the beginning of each row of the workspace as [key_heads, rows, keys]."""
    shape = (*queries.shape[:2], keys_transposed.shape[2])
    return [buffer[: math.prod(shape)].view(shape) for buffer in workspace]


def _scores(
    queries: Tensor, keys_transposed: Tensor, block: Block, scale: float, highest: Tensor | None, scores: Tensor
) -> Float[Tensor, "key_heads rows keys"]:
    """Fill `scores` with a block's scores, minus each row's highest score if that is given.

    Softmax does not change when a constant is subtracted from a row, but bf16 rounds a score of 30 by up to 0.06.
    `baddbmm` subtracts the highest score before it rounds, so the scores that matter are near zero, where bf16 is exact
    enough.
    """
    key_heads, _, keys = scores.shape
    rows, columns = block.mask.shape
    masked = scores.view(key_heads, -1, rows, keys)[..., keys - columns :]
    if highest is None:
        torch.baddbmm(scores, queries, keys_transposed, beta=0, alpha=scale, out=scores)
        masked.add_(block.mask)
        return scores
    scores[..., : keys - columns] = -highest
    torch.sub(block.mask, highest.view(key_heads, -1, rows, 1), out=masked)
    return scores.baddbmm_(queries, keys_transposed, alpha=scale)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(()).expand(1, 1, 1), left, right, beta=0, alpha=scale)
