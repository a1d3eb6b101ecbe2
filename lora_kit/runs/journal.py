"""A run's two logs: metrics.jsonl has a line per step, events.jsonl a line per event.

A line is appended in one write. A line that is not valid, such as the incomplete last line that a machine that crashed
may leave, is skipped when reading.
A line that cannot be written because the disk is full is kept in memory and written before the next line, so a log
never ends a run. A resume cuts the metrics back to its checkpoint, so that no step appears twice.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic reads this one before Python 3.12

from lora_kit.data.counts import Count
from lora_kit.files import write_atomically
from lora_kit.runs import formats
from lora_kit.runs.formats import Amount, Figure, Finite, RunId, Token, finite

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
REQUIRED = {  # the fields that an event of a kind must have
    "started": ("step", "steps", "run_id"),
    "resumed": ("step", "steps"),
    "went back": ("step",),
    "sample": ("step", "prompt", "answer"),
    "skipped": ("step",),
    "estimate": ("step",),
    "fault": ("what",),
    "restart": ("step", "cause"),
    "failed": ("step", "cause"),
    "stopped": ("step",),
    "uploaded": ("step",),
}

MOST_CHARACTERS = 500  # limit for the cause of a failure

T = TypeVar("T")


class SourceRecord(TypedDict):
    """The loss of a source in a step (null if it has none, or is not finite), and what it is the mean over."""

    loss: Figure
    trained_tokens: NotRequired[Count]
    pairs: NotRequired[Count]
    answers: NotRequired[Count]


@with_config(ConfigDict(extra="allow"))
class StepRecord(TypedDict):
    """A line of metrics.jsonl: the numbers of a finished step; null stands for a number that is not finite.

    The metrics of an objective are further keys.
    """

    step: Count
    examples: Count
    tokens: Count
    loss: Figure
    learning_rate: Figure
    grad_norm: Figure
    tokens_per_second: Amount
    stall_seconds: Amount
    time: Amount
    held_out_loss: NotRequired[Figure]
    held_out_sets: NotRequired[dict[str, Figure]]
    held_out_metrics: NotRequired[dict[str, Figure]]
    sources: NotRequired[dict[str, SourceRecord]]


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without a time zone")
    return text


def _complete(event: "Event") -> "Event":
    missing = [name for name in REQUIRED.get(event["kind"], ()) if name not in event]
    if missing:
        raise ValueError(f"an event of this kind needs {', '.join(missing)}")
    return event


@with_config(ConfigDict(extra="allow"))
class Event(TypedDict):
    """A line of events.jsonl. `REQUIRED` names the fields that a kind always has."""

    time: Annotated[str, AfterValidator(_moment)]
    kind: str
    step: NotRequired[Count]
    steps: NotRequired[Count]
    run_id: NotRequired[RunId]
    reached: NotRequired[Count]
    from_live: NotRequired[bool]
    launched: NotRequired[Finite]
    token: NotRequired[Token]
    signal: NotRequired[str]
    cause: NotRequired[str]
    what: NotRequired[str]
    prompt: NotRequired[str]
    expected: NotRequired[str]
    answer: NotRequired[str]


STEP_RECORD: TypeAdapter[StepRecord] = TypeAdapter(Annotated[StepRecord, AfterValidator(finite)])
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, AfterValidator(_complete), AfterValidator(finite)])


@dataclass
class Journal:
    """The logs of the run in a folder.

    Attributes:
        run: The folder.
        fence: Called before every write; raises a LeaseError if another process has taken over the run.
        late: Lines that could not be written yet, each with the name of its log.
        trouble: The reason why late lines could not be written; empty if there are no late lines.
    """

    run: Path
    fence: Callable[[], None] = lambda: None
    late: list[tuple[str, str]] = field(default_factory=list)
    trouble: str = ""
    _lock: Lock = field(default_factory=Lock, repr=False)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append the line of a finished step."""
        self._append(METRICS, record)

    def event(self, kind: str, **facts: Any) -> None:
        """Append an event.

        Args:
            kind: started, resumed, went back, checkpoint, sample, skipped, fault, restart, failed, stopped, finished,
                pushed or uploaded.
            facts: The event's other fields.
        """
        self._append(EVENTS, {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **facts})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self.fence()
        with self._lock:
            self.late.append((name, _text(record)))
            # a log may fail every time, e.g. if it belongs to another user
            self.trouble, failed = "", dict[str, OSError]()
            for entry in tuple(self.late):
                name, line = entry
                try:
                    if name not in failed:
                        _append(self.run / name, line.encode())
                        self.late.remove(entry)
                except OSError as error:
                    failed[name] = error
            for name, reason in failed.items():
                self.trouble = f"{self.run / name}: {reason.strerror}; {len(self.late)} line(s) wait in memory"

    def read_metrics(self) -> list[StepRecord]:
        """Return the records of finished steps, oldest first.

        Raises:
            CheckpointError: The log cannot be read.
        """
        return [record for _, record in formats.read_lines(STEP_RECORD, self.run / METRICS)]

    def read_events(self) -> list[Event]:
        """Return the events, oldest first.

        Raises:
            CheckpointError: The log cannot be read.
        """
        return [event for _, event in formats.read_lines(EVENT, self.run / EVENTS)]

    def last_step(self) -> int:
        """Return the newest step in the metrics; 0 if there is none."""
        return max((record["step"] for record in self.read_metrics()), default=0)

    def run_id(self) -> str | None:
        """Return the run id of the last `started` event; None if there is none."""
        started = [event["run_id"] for event in self.read_events() if event["kind"] == "started"]
        return started[-1] if started else None

    def went_back(self, token: int) -> bool:
        """Return whether the start with this fencing token has gone back to an older checkpoint already."""
        return any(event["kind"] == "went back" and event.get("token") == token for event in self.read_events())

    def skipped_after(self, step: int) -> frozenset[int]:
        """Return the logged skipped steps after `step`, which a resume skips again. A new start or a return to an older
        checkpoint clears them."""
        skipped = set[int]()
        for event in self.read_events():
            if event["kind"] in ("started", "went back"):
                skipped.clear()
            elif event["kind"] == "skipped" and event["step"] > step:
                skipped.add(event["step"])
        return frozenset(skipped)

    def cut(self, step: int, *, samples: int) -> None:
        """Delete metrics and comparisons with the estimate after `step`, sampled answers after `samples`, and invalid
        lines; each log in one rename.

        An incomplete event must go too: the next event would be appended to its line and be lost with it.
        """
        self.fence()
        _cut(self.run / METRICS, STEP_RECORD, lambda record: record["step"] <= step)
        last = {"sample": samples, "estimate": step}
        _cut(self.run / EVENTS, EVENT, lambda event: event.get("step", 0) <= last.get(event["kind"], math.inf))


def short_cause(text: str) -> str:
    """Return the first line of an error for an event's `cause`."""
    return (text.splitlines() or ["unknown"])[0][:MOST_CHARACTERS]


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _cut(path: Path, expected: TypeAdapter[T], stays: Callable[[T], bool]) -> None:
    """Delete the invalid lines of a log and those that do not stay."""
    kept = [line.rstrip(b"\n") + b"\n" for line, value in formats.read_lines(expected, path) if stays(value)]
    if path.exists() and path.stat().st_size == sum(map(len, kept)):
        return  # nothing to delete, as nearly always; a rewrite would fail on a full disk
    write_atomically(path, b"".join(kept))


def _append(path: Path, line: bytes) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)  # no link, and no waiting at a FIFO
    try:
        written = os.write(descriptor, line)
        if written < len(line):  # the disk is full: remove the part that it took
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
