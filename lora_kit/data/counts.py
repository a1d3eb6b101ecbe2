"""Statistics of the examples that were made from the records of a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of steps, examples, tokens or bytes."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
TRAINING, VALIDATION = "training", "validation"


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
        merged: Examples whose first trained token also contains characters of the prompt.
        split: Texts cut into several examples.
        bad: Records left out because they cannot be read, do not fit the format or cannot be rendered.
        raw: Examples of raw text, without a chat template; None in older checkpoints.
        records: Records that were read; 0 in older checkpoints.
    """

    format: str
    examples: Count
    tokens: Count
    trained_tokens: Count
    trained_share: Share
    longest: Count
    dropped: Count
    truncated: Count
    emptied: Count
    merged: Count
    split: Count = 0
    bad: Count = 0
    raw: Count | None = None
    records: Count = 0

    @property
    def is_raw(self) -> bool:
        """Whether no example is a conversation, so that generation continues text without a chat template."""
        return self.format == "text" if self.raw is None else self.raw == self.examples


SUMMED = (
    "examples",
    "tokens",
    "trained_tokens",
    "dropped",
    "truncated",
    "emptied",
    "merged",
    "split",
    "bad",
    "records",
)


def summed(parts: Sequence[Counts]) -> Counts:
    """Return the statistics of several sources together."""
    sums = {name: sum(getattr(part, name) for part in parts) for name in SUMMED}
    return Counts(
        format=", ".join(dict.fromkeys(part.format for part in parts)),
        trained_share=round(sums["trained_tokens"] / max(1, sums["tokens"]), 4),
        longest=max(part.longest for part in parts),
        raw=sum(part.raw or 0 for part in parts),
        **sums,
    )


@dataclass(frozen=True)
class DataCounts:
    """Statistics of the examples.

    Attributes:
        train: All training examples.
        validation: All validation examples; None if there are none.
        sources: The examples of each source of a mixture, in the order of their numbers; empty if `data.train` is a
            single source.
        sets: The examples of each named validation set, in the order of their numbers; empty if they have no names.
    """

    train: Counts
    validation: Counts | None
    sources: dict[str, Counts] = field(default_factory=dict)
    sets: dict[str, Counts] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, tuple[Counts, ...]]:
        """The statistics of each source of the training data, and of each source of the validation data."""
        held_out = () if self.validation is None else (self.validation,)
        return {
            TRAINING: tuple(self.sources.values()) or (self.train,),
            VALIDATION: tuple(self.sets.values()) or held_out,
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of examples of each source of a mixture."""
        return tuple(counts.examples for counts in self.sources.values())
