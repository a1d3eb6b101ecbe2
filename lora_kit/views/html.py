"""HTML of previews and reports, for notebooks and for a page in a file. It has no scripts, and all text is escaped."""

from collections.abc import Iterable
from html import escape

COLOUR = "#b7e4c0"
TRAINED = f"background-color:{COLOUR};color:#10391a;border-radius:2px"
TITLE = "opacity:.65;font-size:12px;margin:14px 0 3px"
TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace;font-size:13px;margin:0"
CELL = "padding:0 14px 0 0;text-align:right;border:none;background:none"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root{{color-scheme:light dark}}
body{{font-family:system-ui,sans-serif;max-width:960px;margin:24px auto;padding:0 16px}}
</style>
</head>
<body>
<h1 style="font-size:18px">{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, body: str) -> str:
    """Return a complete page; `body` is HTML."""
    return PAGE.format(title=escape(title), body=body)


def block(content: str) -> str:
    """Return HTML as a block with the font of notebooks' output."""
    return f'<div style="font-family:system-ui,sans-serif;font-size:13px">{content}</div>'


def legend() -> str:
    """Return the legend of the colour."""
    style = f"{TITLE};border-left:14px solid {COLOUR};padding-left:6px"
    return f'<div style="{style}">tokens that the model is trained on</div>'


def example(title: str, pieces: Iterable[tuple[str, bool]], tokens: Iterable[tuple[str, int, bool]] = ()) -> str:
    """Return an example: its text with the trained parts coloured and, if given, a collapsed table of its tokens.

    Args:
        title: A line above the text.
        pieces: Parts of the text, each with whether it is trained.
        tokens: The text and the id of each token, and whether it is trained.
    """
    text = "".join(_coloured(piece, trained) for piece, trained in pieces)
    rows = "".join(
        f'<tr style="background:none"><td style="{CELL}">{number}</td><td style="{CELL};text-align:left">'
        f"{_coloured(token, trained)}</td></tr>"
        for token, number, trained in tokens
    )
    table = f'<table style="{TEXT};border:none">{rows}</table>'
    ids = f'<details><summary style="{TITLE}">token ids</summary>{table}</details>' if rows else ""
    return f'<div style="{TITLE}">{escape(title)}</div><pre style="{TEXT}">{text}</pre>{ids}'


def lines(text: str) -> str:
    """Return lines of text in a monospaced font."""
    return f'<pre style="{TEXT};margin-top:14px">{escape(text)}</pre>'


def _coloured(text: str, trained: bool) -> str:
    return f'<span style="{TRAINED}">{escape(text)}</span>' if trained else escape(text)
