"""Statistics of the examples that were made from the records of a dataset."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Statistics of the examples of a source. All but the first, `trained_share` and `longest` are counts.

    Attributes:
        format: The format of the records.
        examples: Examples to train or evaluate on.
        tokens: Tokens of these examples.
        trained_tokens: Trained tokens of these examples.
        trained_share: trained_tokens / tokens.
        longest: The number of tokens of the longest example.
        dropped: Records left out because they are longer than `data.sequence_length`.
        truncated: Examples cut to `data.sequence_length`.
        emptied: Records left out because no trained token was left after the cut.
        duplicates: Examples with the same tokens as an earlier example; they are kept.
        merged: Examples whose first trained token also contains characters of the prompt.
    """

    format: str
    examples: int
    tokens: int
    trained_tokens: int
    trained_share: float
    longest: int
    dropped: int
    truncated: int
    emptied: int
    duplicates: int
    merged: int


@dataclass(frozen=True)
class DataCounts:
    """Statistics of the training data, and of the validation data if there is any."""

    train: Counts
    validation: Counts | None
