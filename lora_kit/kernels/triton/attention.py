"""Causal attention inside packed examples on a GPU, in tiles of rows that end where their example does.

Most examples are no longer than one or two of flash attention's tiles, so a tile here is small. Heads that
share keys add to their gradients in one program, and no two programs add to the same number, so that a replay has the
same bits. Scores are in units of log 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG_2 = 1.4426950408889634


@triton.jit
def _tile(tensor, rows, heads, head, end, width: tl.constexpr, wide: tl.constexpr):
    """Return some rows of one head of a tensor [length, heads, width]; zeros from `end` on."""
    column = tl.arange(0, wide)
    at = rows[:, None].to(tl.int64) * (heads * width) + head * width + column[None, :]
    return tl.load(tensor + at, (rows < end)[:, None] & (column < width)[None, :], 0.0)


@triton.jit
def _put(tensor, value, rows, heads, head, end, width: tl.constexpr, wide: tl.constexpr):
    column = tl.arange(0, wide)
    at = rows[:, None].to(tl.int64) * (heads * width) + head * width + column[None, :]
    tl.store(tensor + at, value.to(tensor.dtype.element_ty), (rows < end)[:, None] & (column < width)[None, :])


@triton.jit
def _seen(query, key, window):
    """Return which keys some queries of the same example see."""
    return (key <= query) & ((window == 0) | (query - key < window))


@triton.jit(do_not_specialize=["length"])
def _forward(
    query, key, value, output, sums, tiles, scale, window, length, heads,
    group: tl.constexpr, width: tl.constexpr, wide: tl.constexpr, many: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0) * 3, tl.program_id(1)
    begin, first, end = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + tile + 2)
    row = first + tl.arange(0, many)
    q = _tile(query, row, heads, head, end, width, wide)
    top = tl.full([many], float("-inf"), tl.float32)
    total, result = tl.zeros([many], tl.float32), tl.zeros([many, wide], tl.float32)
    low = tl.where(window == 0, begin, tl.maximum(begin, first - window + 1))
    for start in range(low, tl.minimum(first + many, end), many):
        at = start + tl.arange(0, many)
        k = _tile(key, at, heads // group, head // group, end, width, wide)
        v = _tile(value, at, heads // group, head // group, end, width, wide)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(_seen(row[:, None], at[None, :], window), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shares, before = tl.exp2(scores - finite[:, None]), tl.exp2(top - finite)
        total = total * before + tl.sum(shares, 1)
        result = tl.dot(shares.to(v.dtype), v, result * before[:, None], input_precision="ieee")
        top = higher
    _put(output, result / total[:, None], row, heads, head, end, width, wide)
    tl.store(sums + head * length + row, top + tl.log2(total), row < end)


@triton.jit(do_not_specialize=["length"])
def _of_queries(
    gradient, query, key, value, output, sums, of_query, along, tiles, scale, window, length, heads,
    group: tl.constexpr, width: tl.constexpr, wide: tl.constexpr, many: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0) * 3, tl.program_id(1)
    begin, first, end = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + tile + 2)
    row = first + tl.arange(0, many)
    q, above = _tile(query, row, heads, head, end, width, wide), _tile(gradient, row, heads, head, end, width, wide)
    own = _tile(output, row, heads, head, end, width, wide)
    inside = tl.sum(own.to(tl.float32) * above.to(tl.float32), 1)
    tl.store(along + head * length + row, inside, row < end)
    summed = tl.load(sums + head * length + row, row < end, 0.0)
    result = tl.zeros([many, wide], tl.float32)
    low = tl.where(window == 0, begin, tl.maximum(begin, first - window + 1))
    for start in range(low, tl.minimum(first + many, end), many):
        at = start + tl.arange(0, many)
        k = _tile(key, at, heads // group, head // group, end, width, wide)
        v = _tile(value, at, heads // group, head // group, end, width, wide)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = _seen(row[:, None], at[None, :], window)
        shares = tl.where(seen, tl.exp2(scores - summed[:, None]), 0.0)
        of_shares = tl.dot(above, tl.trans(v), input_precision="ieee")
        of_scores = shares * (of_shares - inside[:, None])
        result = tl.dot(of_scores.to(k.dtype), k, result, input_precision="ieee")
    _put(of_query, result * (scale * 0.6931471805599453), row, heads, head, end, width, wide)


@triton.jit(do_not_specialize=["length"])
def _of_keys(
    gradient, query, key, value, sums, along, of_key, of_value, tiles, scale, window, length, heads,
    group: tl.constexpr, width: tl.constexpr, wide: tl.constexpr, many: tl.constexpr,
):  # fmt: skip
    tile, shared = tl.program_id(0) * 3, tl.program_id(1)
    first, end = tl.load(tiles + tile + 1), tl.load(tiles + tile + 2)
    at = first + tl.arange(0, many)
    k = _tile(key, at, heads // group, shared, end, width, wide)
    v = _tile(value, at, heads // group, shared, end, width, wide)
    result, result_value = tl.zeros([many, wide], tl.float32), tl.zeros([many, wide], tl.float32)
    last = tl.where(window == 0, end, tl.minimum(end, first + many + window - 1))
    for member in range(group):
        head = shared * group + member
        for start in range(first, last, many):
            row = start + tl.arange(0, many)
            q = _tile(query, row, heads, head, end, width, wide)
            above = _tile(gradient, row, heads, head, end, width, wide)
            summed = tl.load(sums + head * length + row, row < end, 0.0)
            inside = tl.load(along + head * length + row, row < end, 0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            seen = _seen(row[None, :], at[:, None], window)
            shares = tl.where(seen, tl.exp2(scores - summed[None, :]), 0.0)
            result_value = tl.dot(shares.to(above.dtype), above, result_value, input_precision="ieee")
            of_shares = tl.dot(v, tl.trans(above), input_precision="ieee")
            of_scores = shares * (of_shares - inside[None, :])
            result = tl.dot(of_scores.to(q.dtype), q, result, input_precision="ieee")
    _put(of_key, result * (scale * 0.6931471805599453), at, heads // group, shared, end, width, wide)
    _put(of_value, result_value, at, heads // group, shared, end, width, wide)


def tile_rows(width: int) -> int:
    """Return how many rows a tile has, of heads this wide."""
    return 64 if width <= 128 else 32


def _fixed(query: Tensor, key: Tensor) -> dict[str, object]:
    width = query.shape[-1]
    return {
        "group": query.shape[1] // key.shape[1],
        "width": width,
        "wide": max(16, triton.next_power_of_2(width)),
        "many": tile_rows(width),
        "num_warps": 4,
        "num_stages": 2,
    }


def attend(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output [length, heads, width] and the logarithm of each row's sum.

    Args:
        query: [length, heads, width].
        key: [length, key_heads, width].
        value: Likewise.
        tiles: int32 [tiles, 3]: where its example begins, its first row, where its example ends.
        scale: Of the scores.
        window: How many positions, its own included, a position sees; None for all.
    """
    length, heads, _ = query.shape
    output, sums = torch.empty_like(query), query.new_empty(heads, length, dtype=torch.float32)
    rest = (tiles, scale * LOG_2, window or 0, length, heads)
    _forward[len(tiles), heads](query, key, value, output, sums, *rest, **_fixed(query, key))
    return output, sums


def attend_back(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    tiles: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    length, heads, _ = query.shape
    of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    along, rest, fixed = torch.empty_like(sums), (tiles, scale * LOG_2, window or 0, length, heads), _fixed(query, key)
    _of_queries[len(tiles), heads](gradient, query, key, value, output, sums, of_query, along, *rest, **fixed)
    shared = (len(tiles), key.shape[1])
    _of_keys[shared](gradient, query, key, value, sums, along, of_key, of_value, *rest, **fixed)
    return of_query, of_key, of_value
