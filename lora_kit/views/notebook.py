"""HTML for notebooks: a panel with progress and loss curve during a run, and tables.

The HTML has no scripts and no widgets, so it looks the same in Jupyter, in an exported page and in a notebook viewer.
"""

import html
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS_BETWEEN_UPDATES = 0.5
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 190, 44, 12, 18, 26  # size and margins of the curve, in pixels
MAX_POINTS = 400
TRAIN_COLOUR, VALIDATION_COLOUR = "#2a7fb8", "#d1495b"
STYLE = "font-family:system-ui,sans-serif;font-size:13px"
CELL = "padding:2px 14px 2px 0;text-align:left;vertical-align:top;background:none;border:none"

Record = Mapping[str, Any]


def curve(records: Sequence[Record], steps: int) -> str:
    """Return an SVG of the loss of each step, with the held-out loss as dots; an empty string for fewer than two steps.

    Args:
        records: Lines of metrics.jsonl.
        steps: The number of steps of the run, which is the right end of the horizontal axis.
    """
    shown = [record for record in records if _is_number(record["loss"])]
    if len(shown) < 2:
        return ""
    # counted from the end, so the last step is always shown
    shown = shown[:: -math.ceil(len(shown) / MAX_POINTS)][::-1]
    measured = [record for record in records if _is_number(record.get("held_out_loss"))]
    top = max([record["loss"] for record in shown] + [record["held_out_loss"] for record in measured]) or 1.0
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def point(step: int, loss: float) -> tuple[float, float]:
        x = LEFT + (right - LEFT) * step / max(1, steps, shown[-1]["step"])
        return round(x, 1), round(bottom - (bottom - TOP) * loss / top, 1)

    line = " ".join(f"{x},{y}" for x, y in (point(record["step"], record["loss"]) for record in shown))
    dots = (point(record["step"], record["held_out_loss"]) for record in measured)
    grid = [point(0, top * share)[1] for share in (0, 0.5, 1)]
    parts = [
        *(f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".15"/>' for y in grid),
        *(_label(LEFT - 6, y + 4, f"{top * share:.3g}", "end") for y, share in zip(grid, (0, 0.5, 1), strict=True)),
        _label(LEFT, HEIGHT - 8, "0", "middle"),
        _label(right, HEIGHT - 8, f"step {steps}", "end"),
        f'<polyline points="{line}" fill="none" stroke="{TRAIN_COLOUR}" stroke-width="1.6"/>',
        *(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{VALIDATION_COLOUR}"/>' for x, y in dots),
        _label(right, TOP - 6, "loss of each step", "end", TRAIN_COLOUR),
    ]
    if measured:
        parts.append(_label(right - 130, TOP - 6, "held-out loss", "end", VALIDATION_COLOUR))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:{WIDTH}px;width:100%;height:auto;display:block"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _label(x: float, y: float, text: str, anchor: str, colour: str = "currentColor") -> str:
    return f'<text x="{x}" y="{y}" font-size="11" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'


def table(title: str, rows: Sequence[tuple[str, str]], *, caption: str = "") -> str:
    """Return (name, value) rows as an HTML table."""
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
    """Display HTML below the cell, with a text for viewers without HTML, and return the handle for updates."""
    from IPython.display import display

    return display({"text/html": markup, "text/plain": text}, raw=True, display_id=True)


class Panel:
    """A progress bar, the metrics of the last step and the loss curve, displayed below the cell and updated in place.

    In a process forked from a notebook, Jupyter discards displays that precede the first printed line.

    Args:
        steps: The number of steps of the run.
        done: The number of steps done before this start.
        earlier: The lines of metrics.jsonl of these steps.
    """

    def __init__(self, steps: int, done: int, earlier: Sequence[Record]) -> None:
        self._steps, self._done, self._done_before = steps, done, done
        self._records = list(earlier)
        self._metrics = self._status = ""
        self._began = time.monotonic()
        self._handle: Any = None
        self._draw()

    def step(self, record: Record, metrics: str) -> None:
        """Add a finished step: its line in metrics.jsonl, and the text to show next to the bar."""
        self._records.append(record)
        self._done, self._metrics, self._status = record["step"], metrics, ""
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_UPDATES:
            self._draw()

    def status(self, activity: str) -> None:
        """Show an activity other than a step; an empty string shows the last state without an activity."""
        self._status = activity
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        parts = (f"step {self._done} of {self._steps}", self._metrics, self._times(), self._status)
        text = " · ".join(part for part in parts if part)
        bar = f'<progress max="{self._steps}" value="{self._done}" style="width:200px;margin-right:10px"></progress>'
        line = f'<div style="margin:4px 0">{bar}{html.escape(text)}</div>'
        markup = f'<div style="{STYLE}">{line}{curve(self._records, self._steps)}</div>'
        if self._handle is None:
            self._handle = show(markup, text)
        else:
            self._handle.update({"text/html": markup, "text/plain": text}, raw=True)

    def _times(self) -> str:
        steps, elapsed = self._done - self._done_before, time.monotonic() - self._began
        left = elapsed / steps * (self._steps - self._done) if steps else 0
        return f"{elapsed:.0f} s" + (f", about {left:.0f} s left" if left else "")
