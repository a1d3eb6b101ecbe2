"""Make the preview of a recipe's data: the first examples, and the micro-batches of the first step."""

from collections.abc import Iterator

import numpy as np

from lora_kit.data.counts import TRAINING
from lora_kit.data.places import Where
from lora_kit.data.plan import Plan
from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import Tokens
from lora_kit.views.preview import Example, Piece, Preview, Row


def make_preview(plan: Plan, renderer: Renderer, where: Where, n: int, *, ids: bool) -> Preview:
    """Return a preview.

    Args:
        plan: The examples and the micro-batches.
        renderer: The tokenizer.
        where: Names the file and line of an example.
        n: The number of examples.
        ids: Whether to show each token with its id.
    """
    tokens, lengths = plan.tokens, plan.tokens.lengths
    examples = (
        Example(index, where(TRAINING, index), tuple(_pieces(*side, renderer)), name)
        for index in range(min(n, len(tokens)))
        for name, side in zip(_names(tokens, index), tokens.sides(index), strict=True)
    )
    batches = (
        tuple(Row(where(TRAINING, index), int(lengths[index])) for index in members)
        for members in plan.micro_batches(0)
    )
    return Preview(tuple(examples), tuple(batches), plan.micro_batch_tokens, ids=ids)


def _names(tokens: Tokens, index: int) -> list[str]:
    """Return a name for each side of an example.

    The sides of a pair are chosen and rejected. An answer with a label is one side, desirable or undesirable. An
    example without preferences is one side with an empty name.
    """
    if tokens.chosen is None:
        return [""]
    lengths = tokens.side_lengths([index])[0]
    names = ("chosen", "rejected") if all(lengths) else ("desirable", "undesirable")
    return [name for name, length in zip(names, lengths, strict=True) if length]


def _pieces(ids: np.ndarray, trained: np.ndarray, renderer: Renderer) -> Iterator[Piece]:
    """Yield the text of a side of an example in pieces that are trained or untrained as a whole."""
    start, before, tokenizer = 0, "", renderer.tokenizer
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            # decode from the first token each time, because many tokenizers drop a leading blank
            text = str(tokenizer.decode(ids[:end].tolist(), skip_special_tokens=False))
            own = tuple(ids[start:end].tolist())
            each = tuple(str(tokenizer.decode([number], skip_special_tokens=False)) for number in own)
            yield Piece(text[len(before) :], bool(trained[start]), own, each)
            start, before = end, text
