"""Make the preview of a recipe's data: the first examples, and the micro-batches of the first step."""

from collections.abc import Iterator

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
        Example(index, where(TRAINING, index), tuple(_pieces(tokens, index, renderer)))
        for index in range(min(n, len(tokens)))
    )
    batches = (
        tuple(Row(where(TRAINING, index), int(lengths[index])) for index in members)
        for members in plan.micro_batches(0)
    )
    return Preview(tuple(examples), tuple(batches), plan.micro_batch_tokens, ids=ids)


def _pieces(tokens: Tokens, index: int, renderer: Renderer) -> Iterator[Piece]:
    """Yield the text of an example in pieces that are trained or untrained as a whole."""
    ids, trained = tokens.example(index)
    start, before, tokenizer = 0, "", renderer.tokenizer
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            # decode from the first token each time, because many tokenizers drop a leading blank
            text = str(tokenizer.decode(ids[:end].tolist(), skip_special_tokens=False))
            own = tuple(ids[start:end].tolist())
            each = tuple(str(tokenizer.decode([number], skip_special_tokens=False)) for number in own)
            yield Piece(text[len(before) :], bool(trained[start]), own, each)
            start, before = end, text
