"""A run's two logs, and what they say: metrics.jsonl has a line a step, events.jsonl what happened and when.

A line is written in one call, so it is there whole or not at all; a torn last line, left by a machine that died, is
skipped. A resume cuts the metrics back to its checkpoint, so that no step stands there twice.
"""

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_kit.errors import InputError

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


@dataclass(frozen=True)
class Journal:
    """The logs of the run in a folder."""

    run: Path

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append a finished step's line."""
        _append(self.run / METRICS, record)

    def event(self, kind: str, **facts: Any) -> None:
        """Append what happened: started, resumed, checkpoint, fault, stopped, finished or pushed."""
        _append(
            self.run / EVENTS,
            {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **facts},
        )

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
    partial = path.with_suffix(".partial")
    partial.write_text("".join(_text(record) for record in records))
    partial.replace(path)


def _append(path: Path, record: Mapping[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, _text(record).encode())
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


@dataclass(frozen=True)
class Status:
    """How far a run is, read from its logs.

    Attributes:
        state: `finished`, `stopped, resumable`, or `training or interrupted`: the logs cannot tell these two apart.
        step: The newest finished step.
        steps: How many the run has.
        loss: Of the newest step.
        tokens_per_second: The median step's.
        restarts: How often it was resumed.
        steps_lost: Steps that were done again after an interruption.
        faults: What went wrong without ending the run.
        stall_share: The share of the training time that the loop waited for checkpoints.
    """

    state: str
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    restarts: int
    steps_lost: int
    faults: int
    stall_share: float

    def to_dict(self) -> dict[str, Any]:
        """Return the status as plain values."""
        return asdict(self)


AFTERWARDS = ("pushed", "fault")  # may come after a run's end: a push, or what a tracker met
STATES = {"finished": "finished", "stopped": "stopped, resumable"}


def summary(run: Path) -> Status:
    """Read a run's logs.

    Raises:
        InputError: The folder has none.
    """
    journal = Journal(run)
    metrics, events = journal.read_metrics(), journal.read_events()
    if not events:
        raise InputError(f"{run}: not a run's folder (no {EVENTS}); give the folder that was named with --out")
    resumed = [event for event in events if event["kind"] == "resumed"]
    begun = [event for event in events if event["kind"] in ("started", "resumed")]
    seconds = sum(record["tokens"] / record["tokens_per_second"] for record in metrics if record["tokens_per_second"])
    stall = sum(record["stall_seconds"] for record in metrics)
    return Status(
        state=_state(events),
        step=metrics[-1]["step"] if metrics else 0,
        steps=begun[-1]["steps"] if begun else None,
        loss=metrics[-1]["loss"] if metrics else None,
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in metrics) if metrics else None,
        restarts=len(resumed),
        steps_lost=sum(max(0, event["reached"] - event["step"]) for event in resumed),
        faults=sum(event["kind"] == "fault" for event in events),
        stall_share=round(stall / (stall + seconds), 4) if seconds else 0.0,
    )


def _state(events: Sequence[Mapping[str, Any]]) -> str:
    kinds = [event["kind"] for event in events if event["kind"] not in AFTERWARDS]
    return STATES.get(kinds[-1] if kinds else "", "training or interrupted")
