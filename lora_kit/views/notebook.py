"""What a notebook shows: a panel with progress and the loss so far while a run goes on, and tables that stay.

All of it is HTML made from a run's records, without scripts or widgets, so it looks the same in Jupyter, on a page that
a notebook was exported to, and wherever else it is opened.
"""

import html
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS_BETWEEN_UPDATES = 0.5
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 190, 44, 12, 18, 26  # of a curve and its margins, pixels
MOST_POINTS = 400
TRAINED, HELD_OUT = "#2a7fb8", "#d1495b"
STYLE = "font-family:system-ui,sans-serif;font-size:13px"
CELL = "padding:2px 14px 2px 0;text-align:left;vertical-align:top;background:none;border:none"

Record = Mapping[str, Any]


def curve(records: Sequence[Record], steps: int) -> str:
    """Return the loss of each step as an SVG picture, the held-out loss as dots; nothing before two steps.

    Args:
        records: Lines of metrics.jsonl.
        steps: How many the run will have: where the picture ends on the right.
    """
    shown = [one for one in records if math.isfinite(one["loss"])]
    if len(shown) < 2:
        return ""
    shown = shown[:: -math.ceil(len(shown) / MOST_POINTS)][::-1]  # the last always
    measured = [one for one in records if math.isfinite(one.get("held_out_loss", math.nan))]
    top = max([one["loss"] for one in shown] + [one["held_out_loss"] for one in measured]) or 1.0
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(step: int, loss: float) -> tuple[float, float]:
        x = LEFT + (right - LEFT) * step / max(1, steps, shown[-1]["step"])
        return round(x, 1), round(floor - (floor - TOP) * loss / top, 1)

    line = " ".join(f"{x},{y}" for x, y in (place(one["step"], one["loss"]) for one in shown))
    dots = (place(one["step"], one["held_out_loss"]) for one in measured)
    grid = [place(0, top * share)[1] for share in (0, 0.5, 1)]
    parts = [
        *(f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".15"/>' for y in grid),
        *(_label(LEFT - 6, y + 4, f"{top * share:.3g}", "end") for y, share in zip(grid, (0, 0.5, 1), strict=True)),
        _label(LEFT, HEIGHT - 8, "0", "middle"),
        _label(right, HEIGHT - 8, f"step {steps}", "end"),
        f'<polyline points="{line}" fill="none" stroke="{TRAINED}" stroke-width="1.6"/>',
        *(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{HELD_OUT}"/>' for x, y in dots),
        _label(right, TOP - 6, "loss of each step", "end", TRAINED),
    ]
    if measured:
        parts.append(_label(right - 130, TOP - 6, "held-out loss", "end", HELD_OUT))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:{WIDTH}px;width:100%;height:auto;display:block"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


def _label(x: float, y: float, text: str, anchor: str, colour: str = "currentColor") -> str:
    return f'<text x="{x}" y="{y}" font-size="11" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'


def table(title: str, rows: Sequence[tuple[str, str]], *, caption: str = "") -> str:
    """Return names and values as an HTML table."""
    lines = "".join(
        f'<tr style="background:none"><td style="{CELL};opacity:.65;white-space:nowrap">{html.escape(name)}</td>'
        f'<td style="{CELL}">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    note = f'<div style="opacity:.65;font-style:italic">{html.escape(caption)}</div>' if caption else ""
    head = f'<div style="font-weight:600;margin:6px 0 2px">{html.escape(title)}</div>'
    body = f'<table style="margin:0;border:none;border-collapse:collapse"><tbody>{lines}</tbody></table>'
    return f'<div style="{STYLE}">{head}{body}{note}</div>'


def show(markup: str, text: str) -> Any:
    """Put HTML below the cell, with the text for where HTML cannot be shown; return a handle to change it with."""
    from IPython.display import display

    return display({"text/html": markup, "text/plain": text}, raw=True, display_id=True)


class Panel:
    """A progress bar, the newest numbers and the loss so far, in one place below the cell.

    In a process that a notebook forked, Jupyter drops what is displayed before the first line was printed.
    """

    def __init__(self, steps: int, done: int, earlier: Sequence[Record]) -> None:
        self._steps, self._done, self._began_at = steps, done, done
        self._records = list(earlier)
        self._numbers = self._status = ""
        self._began = time.monotonic()
        self._handle: Any = None
        self._draw()

    def step(self, record: Record, numbers: str) -> None:
        """Add a finished step."""
        self._records.append(record)
        self._done, self._numbers, self._status = record["step"], numbers, ""
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_UPDATES:
            self._draw()

    def status(self, what: str) -> None:
        """Say what is being done when no step can be shown; nothing, to leave the last state on the page."""
        self._status = what
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        parts = (f"step {self._done} of {self._steps}", self._numbers, self._times(), self._status)
        text = " · ".join(part for part in parts if part)
        bar = f'<progress max="{self._steps}" value="{self._done}" style="width:200px;margin-right:10px"></progress>'
        line = f'<div style="margin:4px 0">{bar}{html.escape(text)}</div>'
        markup = f'<div style="{STYLE}">{line}{curve(self._records, self._steps)}</div>'
        if self._handle is None:
            self._handle = show(markup, text)
        else:
            self._handle.update({"text/html": markup, "text/plain": text}, raw=True)

    def _times(self) -> str:
        here, passed = self._done - self._began_at, time.monotonic() - self._began
        left = passed / here * (self._steps - self._done) if here else 0
        return f"{passed:.0f} s" + (f", about {left:.0f} s left" if left else "")
