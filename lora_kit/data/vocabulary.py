"""Do tokenizer, data and base fit together: is there an embedding for every token, and was it ever trained?

LoRA on the linear layers cannot teach a token whose frozen embedding was never trained: the loss falls, and
the token still never comes. That is worth a look before the first step, not after the last.
"""

from typing import TYPE_CHECKING

import numpy as np

from lora_kit.data.tokens import Tokens
from lora_kit.errors import BaseError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

NEAR = 0.1  # of the typical distance between two rows
MOST = 512  # labels that are looked at, the most frequent first
DIMENSIONS = 256  # of a row that are compared; distances are the same to a few percent
AT_ONCE = 64  # labels that are compared with all rows together; bounds the memory
NEARLY_EMPTY = 4  # a tokenizer with fewer than a quarter of the base's tokens is another one, or a broken one


def check_tokenizer_fits(
    tokenizer: "PreTrainedTokenizerBase", vocabulary_size: int, *, used: Tokens | None = None
) -> None:
    """Raise when the base has no embedding for a token.

    Markers that were added to a tokenizer may lie beyond the base's embeddings (Gemma 3 has one), as long as
    the data does not use them.

    Args:
        tokenizer: The base's.
        vocabulary_size: Rows of the base's embedding.
        used: The data.

    Raises:
        BaseError: Tokenizer or data and base do not fit.
    """
    if len(tokenizer) * NEARLY_EMPTY < vocabulary_size:
        raise BaseError(
            f"base.repo: its tokenizer has {len(tokenizer):,} tokens and the base {vocabulary_size:,} "
            "embeddings; tokenizer files are missing or are another model's (tokenizer.json holds all of it)"
        )
    if tokenizer.vocab_size > vocabulary_size:
        raise BaseError(
            f"base.repo: its tokenizer has {tokenizer.vocab_size:,} tokens and the base only "
            f"{vocabulary_size:,} embeddings; they belong to different models"
        )
    largest = int(used.ids.max()) if used is not None and len(used.ids) else 0
    if largest >= vocabulary_size:
        name = tokenizer.convert_ids_to_tokens(largest)
        raise BaseError(
            f"base.repo: the data uses the token {name!r} ({largest:,}), and the base has only "
            f"{vocabulary_size:,} embeddings; take a base that has one for it, or a chat template without it "
            "(data.template)"
        )


def untrained_labels(tokens: Tokens, embedding: "np.ndarray | Tensor") -> list[int]:
    """Return the labels whose row of the head looks untrained, the most frequent first.

    Training moves a token's row away from all others. A row that was never trained stays with its like: in a
    tied embedding all such rows are pushed the same way and end up nearly equal; in an untied one weight
    decay shrinks them to zero; rows added by `resize_token_embeddings` equal the mean. So a row counts as
    untrained when it is within a tenth of the typical distance between two rows of zero, of the mean row, or
    of at least two other rows. A base that was not trained at all has no such rows.

    Args:
        tokens: The data; its 512 most frequent labels are looked at.
        embedding: The base's output embedding, [vocabulary, width]: the rows that write a token. (Of the input
            embedding, torch never trains the row that a base calls its padding, which often is the stop token.)

    Source: the idea follows Land and Bartolo 2024, "Fishing for Magikarp".
    """
    labels, counts = np.unique(tokens.labels, return_counts=True)
    labels = labels[np.argsort(-counts, kind="stable")][:MOST]
    rows = _rows(embedding)
    near = NEAR * _typical_distance(rows)
    mean = rows.mean(axis=0)
    rows = rows - mean  # a copy: the rows may be the base itself; distances stay the same and lose less to rounding
    squares = np.square(rows).sum(axis=1)
    to_zero = np.square(rows[labels] + mean).sum(axis=1)
    alone = np.minimum(to_zero, squares[labels]) < near**2
    for start in range(0, len(labels), AT_ONCE):
        some = labels[start : start + AT_ONCE]
        distances = squares[some, None] + squares - 2 * rows[some] @ rows.T
        alone[start : start + AT_ONCE] |= (distances < near**2).sum(axis=1) >= 3  # two others and itself
    return [int(label) for label in labels[alone]]


def _rows(embedding: "np.ndarray | Tensor") -> np.ndarray:
    """Return float32 rows, [vocabulary, at most DIMENSIONS], every so-manieth dimension."""
    step = -(-embedding.shape[1] // DIMENSIONS)
    if isinstance(embedding, np.ndarray):
        return embedding[:, ::step].astype(np.float32)
    return embedding.detach()[:, ::step].float().cpu().numpy()


def _typical_distance(rows: np.ndarray) -> float:
    """Return the distance between two trained rows: a high quantile, as most pairs may be untrained."""
    first, second = np.random.default_rng(0).integers(0, len(rows), (2, 2048))
    return float(np.quantile(np.linalg.norm(rows[first] - rows[second], axis=1), 0.9))
