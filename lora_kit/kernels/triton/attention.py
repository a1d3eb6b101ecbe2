"""Causal attention inside packed examples on a GPU, in tiles of rows that end where their part of an example does.

Most examples are no longer than one or two tiles of flash attention, so a tile here is small. Heads that share a key
head add to its gradients in one program, and no two programs write the same number, so a replay has the same bits.
Scores are in units of log 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def _load(tensor, rows, heads, head, end, width: tl.constexpr, padded: tl.constexpr):
    """Load rows of one head of a tensor [length, heads, width]; rows from `end` on are zeros."""
    column = tl.arange(0, padded)
    at = rows[:, None].to(tl.int64) * (heads * width) + head * width + column[None, :]
    return tl.load(tensor + at, (rows < end)[:, None] & (column < width)[None, :], 0.0)


@triton.jit
def _store(tensor, value, rows, heads, head, end, width: tl.constexpr, padded: tl.constexpr):
    column = tl.arange(0, padded)
    at = rows[:, None].to(tl.int64) * (heads * width) + head * width + column[None, :]
    tl.store(tensor + at, value.to(tensor.dtype.element_ty), (rows < end)[:, None] & (column < width)[None, :])


@triton.jit
def _visible(query, key, window):
    """Return whether a query at one position sees the key at another: not a later key, and none outside the window.

    The positions are of the same sequence, since the caller loads only keys of that sequence. Window 0 means no limit.
    """
    return (key <= query) & ((window == 0) | (query - key < window))


@triton.jit
def _key_tiles(begin, first, stop, shared, second, window, tile: tl.constexpr):
    """Return where to find the keys that a tile of queries sees, in up to two ranges.

    The first range is what the branches of the example share, for queries of the second branch only: its begin, its
    number of tiles, and the number of rows that the queries jump over. Then the begin of the second range, and the
    number of tiles of both.
    """
    jump = tl.where(first >= second, second - shared, 0)
    low = tl.where(window == 0, begin, tl.maximum(begin, first - jump - window + 1))
    own = tl.where(first >= second, tl.where(window == 0, second, tl.maximum(second, first - window + 1)), low)
    in_shared = tl.where(first >= second, tl.cdiv(tl.maximum(shared - low, 0), tile), 0)
    return low, in_shared, jump, own, in_shared + tl.cdiv(tl.minimum(first + tile, stop) - own, tile)


@triton.jit(do_not_specialize=["length"])
def _forward(
    query, key, value, output, logsumexp, tiles, scale, window, length, heads,
    group: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    entry, head = tiles + tl.program_id(0) * 6, tl.program_id(1)
    begin, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    shared, second = tl.load(entry + 4), tl.load(entry + 5)
    row = first + tl.arange(0, tile)
    q = _load(query, row, heads, head, end, width, padded)
    row_max = tl.full([tile], float("-inf"), tl.float32)
    total, result = tl.zeros([tile], tl.float32), tl.zeros([tile, padded], tl.float32)
    low, in_shared, jump, own, count = _key_tiles(begin, first, end, shared, second, window, tile)
    for step in range(count):
        start = tl.where(step < in_shared, low + step * tile, own + (step - in_shared) * tile)
        bound, jumped = tl.where(step < in_shared, shared, end), tl.where(step < in_shared, jump, 0)
        at = start + tl.arange(0, tile)
        k = _load(key, at, heads // group, head // group, bound, width, padded)
        v = _load(value, at, heads // group, head // group, bound, width, padded)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = _visible(row[:, None] - jumped, at[None, :], window) & (at < bound)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        probs, rescale = tl.exp2(scores - finite[:, None]), tl.exp2(row_max - finite)
        total = total * rescale + tl.sum(probs, 1)
        result = tl.dot(probs.to(v.dtype), v, result * rescale[:, None], input_precision="ieee")
        row_max = new_max
    _store(output, result / total[:, None], row, heads, head, end, width, padded)
    tl.store(logsumexp + head * length + row, row_max + tl.log2(total), row < end)


@triton.jit(do_not_specialize=["length"])
def _grad_queries(
    grad_output, query, key, value, output, logsumexp, grad_query, delta, tiles, scale, window, length, heads,
    group: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    entry, head = tiles + tl.program_id(0) * 6, tl.program_id(1)
    begin, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    shared, second = tl.load(entry + 4), tl.load(entry + 5)
    row = first + tl.arange(0, tile)
    q = _load(query, row, heads, head, end, width, padded)
    grads = _load(grad_output, row, heads, head, end, width, padded)
    out = _load(output, row, heads, head, end, width, padded)
    row_delta = tl.sum(out.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + head * length + row, row_delta, row < end)
    row_logsumexp = tl.load(logsumexp + head * length + row, row < end, 0.0)
    result = tl.zeros([tile, padded], tl.float32)
    low, in_shared, jump, own, count = _key_tiles(begin, first, end, shared, second, window, tile)
    for step in range(count):
        start = tl.where(step < in_shared, low + step * tile, own + (step - in_shared) * tile)
        bound, jumped = tl.where(step < in_shared, shared, end), tl.where(step < in_shared, jump, 0)
        at = start + tl.arange(0, tile)
        k = _load(key, at, heads // group, head // group, bound, width, padded)
        v = _load(value, at, heads // group, head // group, bound, width, padded)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = _visible(row[:, None] - jumped, at[None, :], window) & (at < bound)[None, :]
        probs = tl.where(visible, tl.exp2(scores - row_logsumexp[:, None]), 0.0)
        grad_probs = tl.dot(grads, tl.trans(v), input_precision="ieee")
        grad_scores = probs * (grad_probs - row_delta[:, None])
        result = tl.dot(grad_scores.to(k.dtype), k, result, input_precision="ieee")
    _store(grad_query, result * (scale * 0.6931471805599453), row, heads, head, end, width, padded)


@triton.jit(do_not_specialize=["length"])
def _grad_keys(
    grad_output, query, key, value, logsumexp, delta, grad_key, grad_value, tiles, scale, window, length, heads,
    group: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    entry, key_head = tiles + tl.program_id(0) * 6, tl.program_id(1)
    first, stop, end = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    shared, second = tl.load(entry + 4), tl.load(entry + 5)
    at = first + tl.arange(0, tile)
    k = _load(key, at, heads // group, key_head, stop, width, padded)
    v = _load(value, at, heads // group, key_head, stop, width, padded)
    result, result_value = tl.zeros([tile, padded], tl.float32), tl.zeros([tile, padded], tl.float32)
    # loop over the later queries of the same branch and, for keys that both branches share, over the second branch
    jump, own = second - shared, tl.where(first < second, second, end)
    last = tl.where(window == 0, own, tl.minimum(own, first + tile + window - 1))
    other = tl.where(window == 0, end, tl.minimum(end, first + tile + jump + window - 1))
    in_own = tl.cdiv(last - first, tile)
    count = in_own + tl.where(first < shared, tl.cdiv(tl.maximum(other - second, 0), tile), 0)
    for member in range(group):
        head = key_head * group + member
        for step in range(count):
            start = tl.where(step < in_own, first + step * tile, second + (step - in_own) * tile)
            bound, jumped = tl.where(step < in_own, own, end), tl.where(step < in_own, 0, jump)
            row = start + tl.arange(0, tile)
            q = _load(query, row, heads, head, bound, width, padded)
            grads = _load(grad_output, row, heads, head, bound, width, padded)
            row_logsumexp = tl.load(logsumexp + head * length + row, row < bound, 0.0)
            row_delta = tl.load(delta + head * length + row, row < bound, 0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            visible = _visible(row[None, :] - jumped, at[:, None], window)
            probs = tl.where(visible, tl.exp2(scores - row_logsumexp[None, :]), 0.0)
            result_value = tl.dot(probs.to(grads.dtype), grads, result_value, input_precision="ieee")
            grad_probs = tl.dot(v, tl.trans(grads), input_precision="ieee")
            grad_scores = probs * (grad_probs - row_delta[None, :])
            result = tl.dot(grad_scores.to(q.dtype), q, result, input_precision="ieee")
    _store(grad_key, result * (scale * 0.6931471805599453), at, heads // group, key_head, stop, width, padded)
    _store(grad_value, result_value, at, heads // group, key_head, stop, width, padded)


def tile_rows(head_dim: int) -> int:
    """Return the rows of a tile."""
    return 64 if head_dim <= 128 else 32


def _constants(query: Tensor, key: Tensor) -> dict[str, object]:
    head_dim = query.shape[-1]
    return {
        "group": query.shape[1] // key.shape[1],
        "width": head_dim,
        "padded": max(16, triton.next_power_of_2(head_dim)),
        "tile": tile_rows(head_dim),
        "num_warps": 4,
        "num_stages": 2,
    }


def attend(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attend causally inside each example of a packed micro-batch.

    Args:
        query: [length, heads, head_dim].
        key: [length, key_heads, head_dim].
        value: [length, key_heads, head_dim].
        tiles: `Segments.tiles(rows)`, int32 [tiles, 6].
        scale: Factor of the scores.
        window: How many positions a position sees, itself included; None for all.

    Returns:
        The output [length, heads, head_dim], and log2 of each position's softmax denominator in fp32 [heads, length].
    """
    length, heads, _ = query.shape
    output, logsumexp = torch.empty_like(query), query.new_empty(heads, length, dtype=torch.float32)
    rest = (tiles, scale * LOG2_E, window or 0, length, heads)
    _forward[len(tiles), heads](query, key, value, output, logsumexp, *rest, **_constants(query, key))
    return output, logsumexp


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    tiles: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    length, heads, _ = query.shape
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    delta, rest = torch.empty_like(logsumexp), (tiles, scale * LOG2_E, window or 0, length, heads)
    constants, saved = _constants(query, key), (query, key, value, output, logsumexp)
    _grad_queries[len(tiles), heads](grad_output, *saved, grad_query, delta, *rest, **constants)
    inputs = (grad_output, query, key, value, logsumexp, delta)
    _grad_keys[len(tiles), key.shape[1]](*inputs, grad_key, grad_value, *rest, **constants)
    return grad_query, grad_key, grad_value
