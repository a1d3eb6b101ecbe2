"""Show the progress of a run: a progress bar on a terminal, a panel in a notebook, lines of text elsewhere."""

import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.control import Control
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import ControlType
from rich.table import Column, Table
from rich.text import Text

from lora_kit.views import notebook
from lora_kit.views.output import SafeStream

SECONDS_BETWEEN_LINES = 5.0
WORTH_GROUPING, SHOWN = 5, 3  # if five or more lines are of one kind, only the first three are shown
# a terminal would obey control characters; characters that reverse the direction of text would hide what is there
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SPECIFIC = re.compile(r"'[^']*'|\"[^\"]*\"|\S*\d\S*")  # the parts in which lines of one kind differ
CLEAR_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


def rich_console(*, stderr: bool = False, **options: Any) -> RichConsole:
    """Return a console of rich that prints texts literally and without errors.

    On a terminal long lines are broken between words; elsewhere, as in a log file, every line stays whole.
    """
    stream = SafeStream(sys.stderr if stderr else sys.stdout)
    console = RichConsole(file=stream, highlight=False, markup=False, emoji=False, **options)  # type: ignore[arg-type]
    console.soft_wrap = not console.is_terminal
    return console


def printable(text: str) -> str:
    """Return a text with control characters and lone surrogates escaped, except for tabs and ends of lines."""
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def grouped(lines: Sequence[str]) -> list[str]:
    """Return the lines of a message; of many that differ only in quoted text and numbers, only the first three."""
    kinds = [SPECIFIC.sub("#", line) for line in lines]
    count, seen, shown = Counter(kinds), Counter[str](), list[str]()
    for kind, line in zip(kinds, lines, strict=True):
        seen[kind] += 1
        if count[kind] < WORTH_GROUPING or seen[kind] <= SHOWN:
            shown.append(line)
        elif seen[kind] == SHOWN + 1:
            shown.append(f"... and {count[kind] - SHOWN:,} more like these {SHOWN}")
    return shown


def print_error(text: str, label: str = "error") -> None:
    """Print an error to stderr, with lines of one kind grouped; further lines of its text are indented."""
    lines = Text("\n  ".join(grouped(printable(text).splitlines())))
    rich_console(stderr=True).print(Text.assemble((f"{label}: ", "bold"), lines))


def number(value: float | None, spec: str) -> str:
    """Return a measured number as text; None stands for a number that is not finite."""
    return "not finite" if value is None else format(value, spec)


class Console:
    """Prints the progress of a run.

    Args:
        silent: Print nothing; for all processes except the main process.

    Attributes:
        began: The Unix time at which each activity passed to `tick` first began, by its name.
    """

    def __init__(self, *, silent: bool) -> None:
        self._rich = rich_console(quiet=silent)
        self._in_notebook = not silent and self._rich.is_jupyter
        if self._in_notebook:  # print plain text: Jupyter sets FORCE_COLOR, which rich takes for a terminal
            self._rich = rich_console(force_jupyter=False, force_terminal=False)
        self._live = not silent and self._rich.is_terminal
        self._progress: Progress | None = None
        self._bar: Progress | None = None  # the bar of an activity that shows a count
        self._counting: tuple[str, float, int] | None = None  # the activity, when it began, and the count at that time
        self._panel: notebook.Panel | None = None
        self._task: Any = None
        self._printed = 0.0
        self._status = ""
        self.began: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._begin_line()
        self._rich.print(printable(text))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._begin_line()
        self._rich.print(f"warning: {printable(text)}", style="yellow")

    def _begin_line(self) -> None:
        """Clear the terminal's line if it may hold the progress bar of another process."""
        if self._live and self._progress is None:
            self._rich.control(CLEAR_LINE)

    def restore_terminal(self) -> None:
        """Remove the progress bar that a killed process has left on the terminal, and show its cursor again."""
        if self._live:
            self._rich.control(CLEAR_LINE, Control.show_cursor(True))

    def table(self, title: str, rows: list[tuple[str, str]], *, caption: str = "") -> None:
        """Print a table of (name, value) rows."""
        if self._in_notebook:
            text = "\n".join([title, *(f"{name}: {value}" for name, value in rows), *([caption] if caption else [])])
            notebook.show(notebook.table(title, rows, caption=caption), text)
            return
        table = Table(
            title=Text(printable(title)),
            caption=caption,
            show_header=False,
            title_justify="left",
            caption_justify="left",
        )
        for name, value in rows:
            table.add_row(Text(printable(name)), Text(printable(value), overflow="fold"))
        self._begin_line()
        self._rich.print(table)

    def begin(self, steps: int, done: int, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        """Start to show progress.

        Args:
            steps: The number of steps of the run.
            done: The number of steps done before this start.
            earlier: The lines of metrics.jsonl of these steps, for the loss curve.
        """
        if self._in_notebook:
            self._panel = notebook.Panel(steps, done, earlier)
        elif self._live:
            fixed = Column(no_wrap=True, overflow="ignore")  # on a narrow terminal only the bar becomes shorter
            self._progress = Progress(
                BarColumn(),
                MofNCompleteColumn(table_column=fixed),
                TimeElapsedColumn(table_column=fixed.copy()),
                TimeRemainingColumn(table_column=fixed.copy()),
                TextColumn("{task.description}", table_column=fixed.copy(), markup=False),
                console=self._rich,
            )
            self._task = self._progress.add_task("", total=steps, completed=done)
            self._progress.start()

    def step(self, record: dict[str, Any], steps: int) -> None:
        """Show a finished step.

        Args:
            record: The step's line in metrics.jsonl.
            steps: The number of steps of the run.
        """
        loss, speed = number(record["loss"], ".4f"), f"{record['tokens_per_second']:,.0f} tokens/s"
        if self._panel is not None:
            self._panel.step(record, f"loss {loss} · {speed}")
        elif self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=f"loss {loss}  {speed}")
        elif record["step"] in (1, steps) or time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self.say(
                f"step {record['step']}/{steps}  loss {loss}  lr {number(record['learning_rate'], '.2e')}  "
                f"norm {number(record['grad_norm'], '.3f')}  {speed}"
            )
        if "held_out_loss" in record and self._panel is None:
            accuracy = record.get("held_out_metrics", {}).get("rewards/accuracies")
            more = "" if accuracy is None else f"  preference accuracy {accuracy:.1%}"
            self.say(f"step {record['step']}/{steps}  held-out loss {number(record['held_out_loss'], '.4f')}{more}")

    def tick(self, activity: str) -> None:
        """Show an activity other than a step, e.g. "load the base"; repeated calls show it only once."""
        if activity != self._status:
            self._status = activity
            self.began.setdefault(activity, time.time())
            if self._panel is not None:
                self._panel.status(activity)
            elif not self._live:
                self.say(f"{activity} ...")
            elif self._progress is not None:
                self._progress.update(self._task, description=activity)

    def count(self, activity: str, done: int, total: int) -> None:
        """Show how much of an activity is done and how long the rest will take; nothing if it ends within a second.

        The rest is assumed to go on as fast as everything since the first call.

        Args:
            activity: The activity, as for `tick`.
            done: How many of its items are done.
            total: How many there are.
        """
        now = time.monotonic()
        if self._counting is None or self._counting[0] != activity:
            self._counting = (activity, now, done)
            return
        _, began, before = self._counting
        if done == total:
            self._counting = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
        elif self._live and now - began > 1:
            if self._bar is None:
                self._bar = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    console=self._rich,
                    transient=True,
                    speed_estimate_period=3600,
                )
                self._task = self._bar.add_task(activity, total=total, completed=before)
                self._bar.start()
            self._bar.update(self._task, completed=done)
        elif not self._live and now - max(began, self._printed) > SECONDS_BETWEEN_LINES:
            self._printed = now
            left = (now - began) / max(1, done - before) * (total - done)
            self.say(f"{activity} {done:,}/{total:,}, {left:,.0f} s left")

    def end(self) -> None:
        """Stop the progress display; its last state stays visible."""
        if self._panel is not None:
            self._panel.status("")
            self._panel = None
        for progress in (self._progress, self._bar):
            if progress is not None:
                progress.stop()
        self._progress = self._bar = None
