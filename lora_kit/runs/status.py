"""What a run's folder and its live region say about it, while it trains and afterwards."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from lora_kit.errors import CheckpointError, InputError
from lora_kit.runs import live, store
from lora_kit.runs.journal import EVENTS, Journal
from lora_kit.runs.lease import is_held

ENDS = {"finished": "finished", "stopped": "stopped, resumable", "failed": "failed, resumable"}
SILENT_END = "ended without a word: killed, or the machine went down"


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        state: `training`, `finished`, `stopped, resumable`, `failed, resumable` or, when it ended without a word,
            `interrupted, resumable`.
        step: The newest finished step.
        steps: How many the run has.
        loss: Of the newest step.
        tokens_per_second: The median step's.
        live: The newest snapshot in shared memory: `step`, `valid`, `behind` (finished steps that it lacks), `path`;
            None when there is none, as after a run's end.
        durable: The newest checkpoint that verifies: `step`, `behind`, and `age_seconds`, how much older than the
            newest step it is; None without one.
        steps_lost: Finished steps that were done again after an interruption.
        starts: How often processes began or went on with the run.
        interruptions: What ended them before their time: `cause`, `step`, and `times` in a row.
        faults: What went wrong without ending the run, such as a checkpoint that could not be written: `what`, `times`.
        stall_share: The share of the training time that the loop waited for snapshots and checkpoints.
        goodput: The share of the time since each start, loading and restarts included, that went into steps which
            stand; times between a run's end and the next start do not count.
    """

    state: str
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    live: dict[str, Any] | None
    durable: dict[str, Any] | None
    steps_lost: int
    starts: int
    interruptions: list[dict[str, Any]]
    faults: list[dict[str, Any]]
    stall_share: float
    goodput: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the status as plain values."""
        return asdict(self)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield names and values for a person."""
        yield "state", self.state
        yield "step", f"{self.step:,}" + (f" of {self.steps:,}" if self.steps else "")
        if self.loss is not None:
            yield "loss", f"{self.loss:.4g}"
        if self.tokens_per_second is not None:
            yield "speed", f"{self.tokens_per_second:,.0f} tokens/s"
        if self.live:
            what = "valid" if self.live["valid"] else "does not verify"
            yield "live snapshot", f"step {self.live['step']:,}, {self.live['behind']} behind, {what}"
        late = self.durable and f"step {self.durable['step']:,}, {self.durable['behind']} behind"
        yield "durable", f"{late} ({self.durable['age_seconds']:.1f} s), valid" if self.durable else "nothing yet"
        yield "steps lost", str(self.steps_lost)
        yield "starts", str(self.starts)
        for one in self.interruptions:
            yield "interrupted", f"after step {one['step']}: {one['cause']}" + _times(one)
        for one in self.faults:
            yield "fault", one["what"] + _times(one)
        yield "save stall", f"{self.stall_share:.2%} of the training time"
        if self.goodput is not None:
            yield "goodput", f"{self.goodput:.1%}"


def _times(one: Mapping[str, Any]) -> str:
    return f" ({one['times']} times)" if one["times"] > 1 else ""


def status(run: str | Path) -> Status:
    """Read a run's logs, checkpoints and live region; moves nothing.

    Raises:
        InputError: The folder has no log.
    """
    run = Path(run)
    journal = Journal(run)
    metrics, events = journal.read_metrics(), journal.read_events()
    if not events:
        raise InputError(f"{run}: not a run's folder (no {EVENTS}); give the folder that was named with --out")
    training = is_held(run)
    begun = [event for event in events if event["kind"] in ("started", "resumed")]
    seconds, stall = sum(map(_seconds, metrics)), sum(record["stall_seconds"] for record in metrics)
    spent = _spent(metrics, events, training=training)
    return Status(
        state="training" if training else _ended(events),
        step=metrics[-1]["step"] if metrics else 0,
        steps=begun[-1]["steps"] if begun else None,
        loss=metrics[-1]["loss"] if metrics else None,
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in metrics) if metrics else None,
        live=_live(run, metrics),
        durable=_durable(run, metrics),
        steps_lost=sum(max(0, event["reached"] - event["step"]) for event in begun if "reached" in event),
        starts=len(begun),
        interruptions=_counted(_interruptions(events, None if training else journal.last_step())),
        faults=_counted({"what": one["what"]} for one in events if one["kind"] == "fault"),
        stall_share=round(stall / seconds, 4) if seconds else 0.0,
        goodput=round(min(1.0, (seconds - stall) / spent), 4) if spent and metrics else None,
    )


def checkpoints(run: str | Path) -> list[dict[str, Any]]:
    """Return every checkpoint of a run, newest first: its name, and its step and bytes, or what is wrong with it."""
    return [validity(path) for path in store.folders(Path(run))]


def validity(path: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its name, and its step and bytes, or what is wrong with it."""
    try:
        found = store.open_checkpoint(path)
    except CheckpointError as error:
        return {"path": path.name, "valid": False, "problem": str(error)}
    return {"path": path.name, "valid": True, "step": found.step, "bytes": found.size}


def _seconds(record: Mapping[str, Any]) -> float:
    return record["tokens"] / record["tokens_per_second"] if record["tokens_per_second"] else 0.0


def _live(run: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    region = live.open_region(run)
    published = region.snapshots() if region else []
    if region is None or not published:
        return None
    newest, reached = published[0], metrics[-1]["step"] if metrics else 0
    valid = region.verifies(newest) or region.snapshots()[0].order > newest.order  # the next has come meanwhile
    return {"step": newest.step, "valid": valid, "behind": max(0, reached - newest.step), "path": str(region.path)}


def _durable(run: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    found = store.find(run).latest
    if found is None:
        return None
    later = [record for record in metrics if record["step"] > found.step]
    age = sum(map(_seconds, later))
    return {"step": found.step, "behind": len(later), "age_seconds": round(age, 3)}


def _ended(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the state of a run that nobody holds: how its last start that came to training ended."""
    kinds = [event["kind"] for event in events if event["kind"] in (*ENDS, "started", "resumed", "restart")]
    return ENDS.get(kinds[-1] if kinds else "", "interrupted, resumable")


def _interruptions(events: Sequence[Mapping[str, Any]], ended_at: int | None) -> Iterator[dict[str, Any]]:
    """Yield what ended attempts before their time, also those that could not say so; None: the last one lives."""
    step, told = 0, True
    for event in events:
        if event["kind"] in ("restart", "failed"):
            yield {"cause": event["cause"], "step": event["step"]}
        elif event["kind"] == "stopped":
            yield {"cause": f"stopped by {event.get('signal', 'a signal')}", "step": event["step"]}
        elif event["kind"] in ("started", "resumed"):
            if not told:
                yield {"cause": SILENT_END, "step": event.get("reached", step)}
            step = event["step"]
        if event["kind"] in (*ENDS, "restart"):
            told = True
        elif event["kind"] in ("started", "resumed"):
            told = False
    if not told and ended_at is not None:
        yield {"cause": SILENT_END, "step": ended_at}


def _counted(found: "Iterator[dict[str, Any]]") -> list[dict[str, Any]]:
    return [one | {"times": len(list(same))} for one, same in groupby(found)]


def _spent(metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], *, training: bool) -> float:
    """Return the seconds from each launch to its last sign of life."""
    times = sorted([record["time"] for record in metrics] + [_time(event) for event in events])
    launches = sorted({event["launched"] for event in events if "launched" in event})
    seconds = 0.0
    for begin, end in pairwise([*launches, float("inf")]):
        signs = [one for one in times if begin <= one < end]
        last = time.time() if training and end == float("inf") else max(signs, default=begin)
        seconds += last - begin
    return seconds


def _time(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
