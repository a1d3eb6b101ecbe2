"""Check that the base has an embedding for every token of the data, and that these embeddings were trained.

LoRA on the linear layers cannot teach the model to generate a token whose frozen output embedding was never trained:
the loss falls, but the token is never generated. This is worth a check before the first step.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import Tokens
from lora_kit.errors import BaseError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

NEAR = 0.1  # two rows are near if they are closer than this fraction of the typical distance
MAX_LABELS = 512  # labels to check, the most frequent first
MAX_DIMENSIONS = 256  # dimensions of a row to compare; the distances change by a few percent
BATCH = 64  # labels to compare with all rows at the same time; limits the memory
MIN_SHARE = 1 / 4  # refuse a tokenizer with fewer tokens than this share of the embeddings: it does not fit the base


def check_tokenizer_fits(
    tokenizer: "PreTrainedTokenizerBase", vocabulary_size: int, *, used: Tokens | None = None
) -> None:
    """Check that the base has an embedding for every token.

    Added tokens of the tokenizer may be without an embedding (Gemma 3 has such a token) if the data does not use them.

    Args:
        tokenizer: The base's tokenizer.
        vocabulary_size: The number of rows of the base's embedding.
        used: The tokenised data; None checks the tokenizer alone.

    Raises:
        BaseError: The tokenizer or the data does not fit the base.
    """
    if len(tokenizer) < vocabulary_size * MIN_SHARE:
        raise BaseError(
            f"base.repo: its tokenizer has {len(tokenizer):,} tokens and the base {vocabulary_size:,} "
            "embeddings; tokenizer files are missing or belong to another model (tokenizer.json is enough)"
        )
    if tokenizer.vocab_size > vocabulary_size:
        raise BaseError(
            f"base.repo: its tokenizer has {tokenizer.vocab_size:,} tokens and the base only "
            f"{vocabulary_size:,} embeddings; use the tokenizer of this base"
        )
    largest = used.largest if used is not None else 0
    if largest >= vocabulary_size:
        name = tokenizer.convert_ids_to_tokens(largest)
        raise BaseError(
            f"base.repo: the data uses the token {name!r} ({largest:,}), but the base has only "
            f"{vocabulary_size:,} embeddings; use another base, or a chat template without this token (data.template)"
        )


def untrained_labels(tokens: Tokens, embedding: "np.ndarray | Tensor") -> list[int]:
    """Return the labels that the base has apparently not learned in pretraining, the most frequent first.

    Pretraining moves the row of a token in the output embedding away from all other rows. Rows of tokens that the
    pretraining data lacks stay close together: in a tied embedding they all receive the same gradient and end up nearly
    equal, in an untied embedding weight decay shrinks them to zero, and rows added by `resize_token_embeddings` equal
    the mean row. So a row counts as untrained if it is near the zero vector, the mean row or at least two other rows.
    Two rows are near if they are closer than `NEAR` times the typical distance between rows. (In a base with random
    weights no row counts as untrained.)

    Args:
        tokens: The data; its 512 most frequent labels are checked.
        embedding: The base's output embedding, [vocabulary, width]. (The input embedding would be misleading: torch
            never trains the row of the padding token, which is often also the stop token.)

    Returns:
        The token ids of the labels.

    Source: the idea follows Land and Bartolo 2024, "Fishing for Magikarp".
    """
    counts = tokens.label_counts()
    labels = np.flatnonzero(counts)
    counts = counts[labels]
    labels = labels[np.argsort(-counts, kind="stable")][:MAX_LABELS]
    rows = _rows(embedding)
    near = NEAR * _typical_distance(rows)
    mean = rows.mean(axis=0)
    rows = rows - mean  # the distances stay the same, with smaller rounding errors
    squares = np.square(rows).sum(axis=1)
    to_zero = np.square(rows[labels] + mean).sum(axis=1)
    untrained = np.minimum(to_zero, squares[labels]) < near**2
    for start in range(0, len(labels), BATCH):
        batch = labels[start : start + BATCH]
        distances = squares[batch, None] + squares - 2 * rows[batch] @ rows.T
        untrained[start : start + BATCH] |= (distances < near**2).sum(axis=1) >= 3  # the row itself and two others
    return [int(label) for label in labels[untrained]]


def untrained_notes(labels: Sequence[int], renderer: Renderer, *, raw: bool) -> list[str]:
    """Return what the user should know about labels that the base has not learned, and what to do about it.

    Args:
        labels: From `untrained_labels`.
        renderer: The tokenizer, with the stop token and the template of the recipe.
        raw: Whether all examples are raw text, without the template.
    """
    tokenizer, stop, notes = renderer.tokenizer, renderer.stop, []
    others = [label for label in labels if label != renderer.stop_id]
    if renderer.stop_id in labels:
        known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        eos = tokenizer.eos_token
        example = eos if eos and eos != stop and known.get(str(eos)) not in labels else "TOKEN"
        in_template = (
            f", copy the chat template to a file, write {example!r} where it ends an answer with {stop!r}, and set "
            "data.template to the file"
        )
        notes.append(
            f"base.stop_token: {stop!r} looks untrained in the base, and LoRA on linear layers cannot teach it, so "
            f"answers may never stop; choose a token that the base knows: set base.stop_token: {example!r}"
            f"{'' if raw else in_template}"
        )
    if others:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(label)) for label in others[:5])
        notes.append(
            f"{len(others)} label token(s) look untrained in the base ({names}): LoRA on linear layers cannot teach "
            "them; write them as tokens that the base knows"
        )
    return notes


def _rows(embedding: "np.ndarray | Tensor") -> np.ndarray:
    """Return the rows as float32 [vocabulary, at most MAX_DIMENSIONS], with evenly spaced dimensions."""
    step = -(-embedding.shape[1] // MAX_DIMENSIONS)
    if isinstance(embedding, np.ndarray):
        return embedding[:, ::step].astype(np.float32)
    # a copy, because torch could not free the memory of a gathered weight that numpy has seen
    return embedding.detach()[:, ::step].clone().float().cpu().numpy()


def _typical_distance(rows: np.ndarray) -> float:
    """Return the typical distance between two trained rows: a high quantile, because most rows may be untrained."""
    first, second = np.random.default_rng(0).integers(0, len(rows), (2, 2048))
    return float(np.quantile(np.linalg.norm(rows[first] - rows[second], axis=1), 0.9))
