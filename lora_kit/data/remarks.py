"""Remarks on examples: differences between a record and its tokens that are no errors.

For each source a kind of remark is shown once, as a note with the number of records and the place of the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_ITEMS = 10  # most items that a note names

COLUMNS = "columns of the data that are not read"
KEYS = "keys of messages that the chat template does not read"
HISTORY = (
    "the chat template leaves the reasoning of answers out by its own rules (most keep it after the last question "
    "only), so it is neither context nor trained"
)
TRIMMED = "the chat template trims blanks at the edges of messages"
CHANGED = "the chat template does not render these messages as they are; none of them is trained"
NULLS = (
    "null in a call and not in the tool's schema, which a table writes for missing fields when it is saved as JSON; "
    "the model learns to write it (save the table as Parquet, or remove the nulls)"
)
TOOLS = "the chat template leaves parts of the tools out"
CONTROL = "messages that are not trained contain control tokens of the tokenizer as text"
UNKNOWN = "the tokenizer does not know these characters and writes its unknown token"
LOST = "the tokenizer drops or changes characters"
UNMASKED = "objective.reasoning: mask does not mask these tags of reasoning, nor the text at them"
FIRST = (
    "the first token has the beginning of the answer and is never trained, because the tokenizer puts no BOS token "
    "before it"
)
BLANKS = "the tokenizer drops blanks or line feeds inside answers"


class Remark(NamedTuple):
    """A difference between a record and its tokens.

    Attributes:
        text: The kind of difference, one of the constants of this module.
        item: The key, column or character concerned, of which the note names the first ten; may be empty.
        place: The place in the record, e.g. `messages[2].content`; the note names the first.
    """

    text: str
    item: str
    place: str


@dataclass
class _Count:
    records: int
    first: int
    place: str
    items: dict[str, None] = field(default_factory=dict)


@dataclass
class Remarks:
    """The remarks on the examples of a source, counted."""

    counts: dict[str, _Count] = field(default_factory=dict)

    def add(self, index: int, remarks: tuple[Remark, ...]) -> None:
        """Count the remarks on the record `index`; records come in ascending order."""
        for text in dict.fromkeys(remark.text for remark in remarks):
            own = [remark for remark in remarks if remark.text == text]
            count = self.counts.setdefault(text, _Count(0, index, own[0].place))
            count.records += 1
            if len(count.items) <= MAX_ITEMS:
                count.items |= dict.fromkeys(remark.item for remark in own if remark.item)


def notes_of(parts: Sequence[tuple[Remarks, Callable[[int], str]]]) -> list[str]:
    """Return a note for each kind of remark on a source.

    Args:
        parts: The remarks on its training records, on its held-out records or on both, each with a function that
            returns the file and line of a record, given its index.
    """
    notes = []
    for text in dict.fromkeys(text for remarks, _ in parts for text in remarks.counts):
        found = [(remarks.counts[text], where) for remarks, where in parts if text in remarks.counts]
        first, where = found[0]
        items = dict.fromkeys(item for count, _ in found for item in count.items)
        records = sum(count.records for count, _ in found)
        named = [*items][:MAX_ITEMS] + ["..."] * (len(items) > MAX_ITEMS)
        what = f"{text}: {', '.join(named)}" if named else text
        place = f", {first.place}" if first.place else ""
        notes.append(f"{where(first.first)}{place}: {what} ({records:,} record{'s' * (records != 1)} in all)")
    return notes
