"""Show the progress of a run: a progress bar on a terminal, a panel in a notebook, lines of text elsewhere."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from lora_kit.views import notebook

SECONDS_BETWEEN_LINES = 5.0


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
        self._rich = RichConsole(quiet=silent, highlight=False, soft_wrap=True)
        self._in_notebook = not silent and self._rich.is_jupyter
        if self._in_notebook:  # print plain text: Jupyter sets FORCE_COLOR, which rich takes for a terminal
            self._rich = RichConsole(force_jupyter=False, force_terminal=False, highlight=False, soft_wrap=True)
        self._live = not silent and self._rich.is_terminal
        self._progress: Progress | None = None
        self._panel: notebook.Panel | None = None
        self._task: Any = None
        self._printed = 0.0
        self._status = ""
        self.began: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._rich.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._rich.print(f"warning: {text}", style="yellow", markup=False)

    def table(self, title: str, rows: list[tuple[str, str]], *, caption: str = "") -> None:
        """Print a table of (name, value) rows."""
        if self._in_notebook:
            text = "\n".join([title, *(f"{name}: {value}" for name, value in rows), *([caption] if caption else [])])
            notebook.show(notebook.table(title, rows, caption=caption), text)
            return
        table = Table(title=title, caption=caption, show_header=False, title_justify="left", caption_justify="left")
        for name, value in rows:
            table.add_row(name, value)
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
                TextColumn("{task.description}", table_column=fixed.copy()),
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
            self.say(f"step {record['step']}/{steps}  held-out loss {number(record['held_out_loss'], '.4f')}")

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

    def end(self) -> None:
        """Stop the progress display; its last state stays visible."""
        if self._panel is not None:
            self._panel.status("")
            self._panel = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
