"""A run's two logs, and what they say: metrics.jsonl has a line a step, events.jsonl what happened and when.

A line is written in one call, so it is there whole or not at all; a torn last line, left by a machine that died, is
skipped. What a full disk does not take waits for the next line: no log ever ends a run. A resume cuts the metrics back
to its checkpoint, so that no step stands there twice.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
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
        late: The lines that could not be written yet, each with its log's name.
        trouble: Why; empty when all is well.
    """

    run: Path
    late: list[tuple[str, str]] = field(default_factory=list)
    trouble: str = ""
    _turn: Lock = field(default_factory=Lock, repr=False)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append a finished step's line."""
        self._append(METRICS, record)

    def event(self, kind: str, **facts: Any) -> None:
        """Append what happened: started, resumed, went back, checkpoint, sample, skipped, fault, restart,
        failed, stopped, finished or pushed."""
        self._append(EVENTS, {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **facts})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with self._turn:
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
        """Return the finished steps' lines."""
        return list(_lines(self.run / METRICS))

    def read_events(self) -> list[dict[str, Any]]:
        """Return what happened, oldest first."""
        return list(_lines(self.run / EVENTS))

    def last_step(self) -> int:
        """Return the newest step that the metrics show, 0 without any."""
        return max((record["step"] for record in _lines(self.run / METRICS)), default=0)

    def run_id(self) -> str | None:
        """Return what the run was named when it last began from nothing; None before that."""
        return next((one["run_id"] for one in reversed(self.read_events()) if one["kind"] == "started"), None)

    def skipped_after(self, step: int) -> frozenset[int]:
        """Return the later steps that this run has skipped once, and so skips again, unless it went back since."""
        skipped = set[int]()
        for event in self.read_events():
            if event["kind"] in ("started", "went back"):
                skipped.clear()
            elif event["kind"] == "skipped" and event["step"] > step:
                skipped.add(event["step"])
        return frozenset(skipped)

    def cut(self, step: int, *, samples: int) -> None:
        """Drop metrics after `step`, answers after `samples`, and torn lines of both logs; each log in one rename.

        A torn event must go too: the next one would be written onto its line and be lost with it.
        """
        _rewrite(self.run / METRICS, [record for record in _lines(self.run / METRICS) if record["step"] <= step])
        kept = [one for one in _lines(self.run / EVENTS) if one["kind"] != "sample" or one["step"] <= samples]
        _rewrite(self.run / EVENTS, kept)


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _rewrite(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(_text(record) for record in records)
    if path.is_file() and path.read_text(errors="replace") == text:
        return  # as nearly always; and a full disk would not take it
    write_atomically(path, text)


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, line)
        if written < len(line):  # the disk had room for a part of it
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
        except ValueError:  # torn by a machine that died
            continue
        if isinstance(record, dict):
            yield record
