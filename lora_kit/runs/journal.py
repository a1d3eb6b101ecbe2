"""A run's two logs: metrics.jsonl has a line per step, events.jsonl a line per event.

A line is appended in one write. An incomplete last line, as a machine that crashed may leave, is skipped when reading.
A line that cannot be written because the disk is full is kept in memory and written before the next line, so a log
never ends a run. A resume cuts the metrics back to its checkpoint, so that no step appears twice.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from lora_kit.files import write_atomically

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


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
            kind: started, resumed, went back, checkpoint, sample, skipped, fault, restart, failed, stopped, finished or
                pushed.
            facts: The event's other fields.
        """
        self._append(EVENTS, {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **facts})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self.fence()
        with self._lock:
            self.late.append((name, _text(record)))
            self.trouble = ""
            while self.late and not self.trouble:
                name, line = self.late[0]
                try:
                    _append(self.run / name, line.encode())
                    del self.late[0]
                except OSError as error:
                    self.trouble = f"{self.run / name}: {error.strerror}; {len(self.late)} line(s) wait in memory"

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records of finished steps, oldest first."""
        return list(_lines(self.run / METRICS))

    def read_events(self) -> list[dict[str, Any]]:
        """Return the events, oldest first."""
        return list(_lines(self.run / EVENTS))

    def last_step(self) -> int:
        """Return the newest step in the metrics; 0 if there is none."""
        return max((record["step"] for record in _lines(self.run / METRICS)), default=0)

    def run_id(self) -> str | None:
        """Return the run id of the last `started` event; None if there is none."""
        started = [event["run_id"] for event in self.read_events() if event["kind"] == "started"]
        return started[-1] if started else None

    def skipped_after(self, step: int) -> frozenset[int]:
        """Return the skipped steps after `step`, which a resume skips again; a start or going back clears them."""
        skipped = set[int]()
        for event in self.read_events():
            if event["kind"] in ("started", "went back"):
                skipped.clear()
            elif event["kind"] == "skipped" and event["step"] > step:
                skipped.add(event["step"])
        return frozenset(skipped)

    def cut(self, step: int, *, samples: int) -> None:
        """Delete metrics after `step`, sampled answers after `samples`, and incomplete lines; each log in one rename.

        An incomplete event must go too: the next event would be appended to its line and be lost with it.
        """
        self.fence()
        _rewrite(self.run / METRICS, [record for record in _lines(self.run / METRICS) if record["step"] <= step])
        events = _lines(self.run / EVENTS)
        _rewrite(
            self.run / EVENTS, [event for event in events if event["kind"] != "sample" or event["step"] <= samples]
        )


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _rewrite(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(_text(record) for record in records)
    if path.is_file() and path.read_text(errors="replace") == text:
        return  # unchanged, as nearly always: a full disk would not take a copy
    write_atomically(path, text)


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, line)
        if written < len(line):  # the disk is full: remove the part that it took
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # incomplete: the machine crashed while it was written
            continue
        if isinstance(record, dict):
            yield record
