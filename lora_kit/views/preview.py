"""The preview: examples with their trained tokens marked, and how they are packed; for terminals, notebooks and pages.

The texts of records and tokens are untrusted. They are shown literally: markup of rich or HTML has no effect, and
control characters are escaped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from lora_kit.views import html
from lora_kit.views.console import printable

TRAINED = "black on green"
SHOWN_BATCHES, SHOWN_ROWS = 4, 8  # micro-batches shown of a step, rows shown of a micro-batch
BAR = 32  # characters


class Piece(NamedTuple):
    """A part of an example that is trained or untrained as a whole.

    Attributes:
        text: Its text.
        trained: Whether its tokens are trained.
        ids: The ids of its tokens.
        tokens: The text of each token.
    """

    text: str
    trained: bool
    ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """An example, or a side of a pair, with its index in the training data, and its file and line."""

    index: int
    place: str
    pieces: tuple[Piece, ...]
    side: str = ""

    @property
    def title(self) -> str:
        """The index, the place, and the numbers of tokens and of trained tokens."""
        tokens = sum(len(piece.ids) for piece in self.pieces)
        trained = sum(len(piece.ids) for piece in self.pieces if piece.trained)
        side = f"{self.side} · " if self.side else ""
        return f"example {self.index} · {side}{printable(self.place)} · {tokens:,} tokens, {trained:,} trained"


class Row(NamedTuple):
    """An example of a micro-batch: its file and line, and its number of tokens."""

    place: str
    tokens: int


@dataclass(frozen=True, repr=False)
class Preview:
    """The first training examples with their trained parts marked, and the micro-batches of the first step.

    Attributes:
        examples: The examples.
        batches: The examples of each micro-batch of the first step.
        limit: The maximum number of tokens of a micro-batch.
        ids: Whether to show each token with its id.
    """

    examples: tuple[Example, ...]
    batches: tuple[tuple[Row, ...], ...] = ()
    limit: int = 0
    ids: bool = field(default=False, kw_only=True)

    def __repr__(self) -> str:
        texts = (
            "".join(_in_brackets(piece.text, piece.trained) for piece in example.pieces) for example in self.examples
        )
        return "\n\n".join(texts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        colours = not console.no_color and console.color_system is not None  # a pipe has no colours
        for example in self.examples:
            yield Text(example.title, style="dim")
            yield Text.assemble(*(part for piece in example.pieces for part in self._parts(piece, colours)))
        for line, is_title in self._packing():
            yield Text(line, style="dim" if is_title else "")

    def _parts(self, piece: Piece, colours: bool) -> Iterator[tuple[str, str]]:
        style = TRAINED if piece.trained and colours else ""
        if not self.ids:
            text = printable(piece.text)
            yield text if colours else _in_brackets(text, piece.trained), style
            return
        for number, token in zip(piece.ids, piece.tokens, strict=True):
            text = visible(token)
            yield text if colours else _in_brackets(text, piece.trained), style
            yield f" {number}\n", "dim"

    def _packing(self) -> Iterator[tuple[str, bool]]:
        """Yield lines that show how the examples of the first step are packed, each with whether it is a title."""
        if self.batches:
            yield self.packing_title, True
        for number, rows in enumerate(self.batches[:SHOWN_BATCHES], 1):
            tokens = sum(row.tokens for row in rows)
            full = round(BAR * tokens / self.limit)
            yield f"micro-batch {number} [{'#' * full}{'.' * (BAR - full)}] {tokens:,} of {self.limit:,} tokens", False
            for row in rows[:SHOWN_ROWS]:
                yield f"  {printable(row.place)}: {row.tokens:,} tokens", False
            if len(rows) > SHOWN_ROWS:
                yield f"  and {len(rows) - SHOWN_ROWS:,} more of {len(rows):,} examples", False
        if len(self.batches) > SHOWN_BATCHES:
            yield f"and {len(self.batches) - SHOWN_BATCHES:,} more of {len(self.batches):,} micro-batches", False

    @property
    def packing_title(self) -> str:
        """The title of the lines about packing."""
        examples = sum(map(len, self.batches))
        packed = f"{len(self.batches):,} micro-batch{'es' if len(self.batches) > 1 else ''}"
        return f"step 1: {examples:,} examples, packed into {packed}"

    def _repr_html_(self) -> str:
        examples = "".join(self._html_of(example) for example in self.examples)
        lines = "\n".join(line for line, _ in self._packing())
        return html.block(html.legend() + examples + (html.lines(lines) if lines else ""))

    def _html_of(self, example: Example) -> str:
        marked = ((printable(piece.text), piece.trained) for piece in example.pieces)
        tokens = (
            (visible(token), number, piece.trained)
            for piece in example.pieces
            for token, number in zip(piece.tokens, piece.ids, strict=True)
        )
        return html.example(example.title, marked, tokens if self.ids else ())


def visible(token: str) -> str:
    """Return the text of a token with its blanks and ends of lines visible."""
    return printable(token).replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·")


def _in_brackets(text: str, trained: bool) -> str:
    return f"⟦{text}⟧" if trained else text
