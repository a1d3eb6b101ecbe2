"""The status of a run, while it trains and afterwards.

The status is read from the run's folder and from the live region, the shared memory with the run's newest snapshots.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from lora_kit.errors import CheckpointError, InputError, LoraKitError, Stopped
from lora_kit.recipe.schema import LOSS
from lora_kit.runs import live, store
from lora_kit.runs.figures import figure_of
from lora_kit.runs.journal import EVENTS, Event, Journal, StepRecord
from lora_kit.runs.lease import is_held
from lora_kit.runs.live import LEAST_TIMEOUT_SECONDS, TIMEOUT_FACTOR, Phase, Word
from lora_kit.runs.remote import read_outbox, waiting
from lora_kit.views.console import number

ENDS = {"finished": "finished", "stopped": "stopped, resumable", "failed": "failed, resumable"}
RECENT_STEPS = 100
MOST_SECONDS = 1e9  # most seconds of a step or of the remaining steps; an edited log may say more
SILENT_END = "ended without an event: killed, or the machine crashed"


@dataclass(frozen=True)
class Status:
    """The progress of a run, its newest safe states and its interruptions.

    Attributes:
        state: `training`; `starting or ending` while no step is expected; `not responding` with the seconds since the
            last sign of life, if they are more than a step may take; `finished`; `stopped, resumable`; `failed,
            resumable`; or `interrupted, resumable` if the last start ended without an event.
        exit_code: The exit code of `lora-kit train` for such an end, which other launchers turn into 1: 0 if the run
            has finished, 75 if it was stopped and its newest finished step is durable, otherwise 1; None while it
            trains.
        step: The newest finished step.
        steps: The number of steps of the run.
        loss: The loss of the newest step; None if it was not finite.
        tokens_per_second: The median over all steps.
        seconds_left: While it trains, the time that the remaining steps will take at the speed of the last steps.
        held_out: The newest held-out loss: `step`, `loss` (None if it was not finite), `sets` (the loss of each named
            validation set, if they have names); None if none was measured.
        sources: The loss of each source of a mixture over the last `RECENT_STEPS` steps; empty without a mixture.
        best: The checkpoint with the best held-out figure: `step`, `loss`, `path`, and `metric` and `value` of a figure
            other than the loss; None if there is none.
        live: The newest snapshot in shared memory: `step`, `valid`, `behind` (the number of newer finished steps),
            `path`; None if there is none, as after the end of a run.
        durable: The newest valid checkpoint: `step`, `behind`, `age_seconds` (training time of the newer
            steps); None if there is none.
        remote: What is at `checkpoint.remote`: `url`, `step` (None before the first upload), `waiting` (a newer step
            that is not uploaded yet) and `problem` (why the last upload failed; else empty); None without a remote.
        steps_lost: Finished steps that had to be repeated after an interruption.
        starts: How often training processes started or resumed the run.
        interruptions: What ended a start early: `cause`, `step`, and how many `times` in a row.
        faults: Failures that did not end the run, such as a checkpoint that could not be written: `what`, `times`.
        stall_share: The share of the training time that the loop waited for snapshots and checkpoints.
        goodput: The share of the time since each start, loading and restarts included, that went into steps that were
            kept. The time between the end of a start and the next one does not count.
    """

    state: str
    exit_code: int | None
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    held_out: dict[str, Any] | None
    sources: dict[str, float | None]
    best: dict[str, Any] | None
    live: dict[str, Any] | None
    durable: dict[str, Any] | None
    remote: dict[str, Any] | None
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
        """Yield names and values as text."""
        yield "state", self.state
        yield "step", f"{self.step:,}" + (f" of {self.steps:,}" if self.steps else "")
        if self.step:
            yield "loss", number(self.loss, ".4g")
        for name, loss in self.sources.items():
            yield f"loss, {name}", number(loss, ".4g")
        if self.held_out:
            yield "held-out loss", f"{number(self.held_out['loss'], '.4f')} after step {self.held_out['step']:,}"
            for name, loss in self.held_out.get("sets", {}).items():
                yield f"held-out loss, {name}", number(loss, ".4f")
        if self.best:
            name, value = self.best.get("metric", "loss"), self.best.get("value", self.best["loss"])
            yield "best", f"{self.best['path']}, held-out {name} {value:.4f}"
        if self.tokens_per_second is not None:
            yield "speed", f"{self.tokens_per_second:,.0f} tokens/s"
        if self.seconds_left is not None:
            yield "time left", f"about {timedelta(seconds=round(self.seconds_left))}"
        if self.live:
            validity = "valid" if self.live["valid"] else "damaged"
            yield "live snapshot", f"step {self.live['step']:,}, {self.live['behind']} behind, {validity}"
        durable = self.durable and f"step {self.durable['step']:,}, {self.durable['behind']} behind"
        yield "durable", f"{durable} ({self.durable['age_seconds']:.1f} s), valid" if self.durable else "nothing yet"
        if self.remote:
            uploaded = "nothing yet" if self.remote["step"] is None else f"step {self.remote['step']:,}"
            left = self.remote["waiting"] and f"; step {self.remote['waiting']:,} waits"
            problem = self.remote["problem"] and f" ({self.remote['problem']})"
            yield "remote", f"{uploaded} at {self.remote['url']}{left or ''}{problem}"
        yield "steps lost", str(self.steps_lost)
        yield "starts", str(self.starts)
        for interruption in self.interruptions:
            yield "interrupted", f"after step {interruption['step']}: {interruption['cause']}" + _times(interruption)
        for fault in self.faults:
            yield "fault", fault["what"] + _times(fault)
        yield "save stall", f"{self.stall_share:.2%} of the training time"
        if self.goodput is not None:
            yield "goodput", f"{self.goodput:.1%}"


def _times(entry: Mapping[str, Any]) -> str:
    return f" ({entry['times']} times)" if entry["times"] > 1 else ""


def status(run: str | Path) -> Status:
    """Return the status of a run. Changes nothing.

    Raises:
        InputError: The folder has no event log.
        CheckpointError: A log or the folder of the checkpoints cannot be read.
    """
    run = Path(run)
    journal = Journal(run)
    metrics, events = journal.read_metrics(), journal.read_events()
    if not events:
        raise InputError(f"{run}: not a run's folder (no {EVENTS}); give the folder that --out named")
    training = is_held(run)
    starts = [event for event in events if event["kind"] in ("started", "resumed")]
    seconds, stall = sum(map(_seconds, metrics)), sum(record["stall_seconds"] for record in metrics)
    spent = _spent(metrics, events, training=training)
    state = _activity(run, metrics, events) if training else _ended(events)
    step, durable = metrics[-1]["step"] if metrics else 0, _durable(run, metrics)
    return Status(
        state=state,
        exit_code=None if training else _exit_code(state, step, durable),
        step=step,
        steps=starts[-1]["steps"] if starts else None,
        loss=metrics[-1]["loss"] if metrics else None,
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in metrics) if metrics else None,
        seconds_left=_seconds_left(metrics, starts[-1]["steps"]) if training and starts else None,
        held_out=_held_out(metrics),
        sources=source_losses(metrics),
        best=_best(run),
        live=_live(run, metrics),
        durable=durable,
        remote=_remote(run),
        steps_lost=sum(max(0, event["reached"] - event["step"]) for event in starts if "reached" in event),
        starts=len(starts),
        interruptions=_counted(_interruptions(events, None if training else journal.last_step())),
        faults=_counted({"what": event["what"]} for event in events if event["kind"] == "fault"),
        stall_share=round(stall / seconds, 4) if seconds else 0.0,
        goodput=round(min(1.0, (seconds - stall) / spent), 4) if spent and metrics else None,
    )


def checkpoints(run: str | Path) -> list[dict[str, Any]]:
    """Return the `validity` of every checkpoint of a run, newest first."""
    return [validity(path) for path in store.folders(Path(run))]


def validity(path: Path) -> dict[str, Any]:
    """Verify every byte of a checkpoint; return its name with its step and bytes, or with the problem."""
    try:
        checkpoint = store.open_any_checkpoint(path)
    except CheckpointError as error:
        return {"path": path.name, "valid": False, "problem": str(error)}
    return {"path": path.name, "valid": True, "step": checkpoint.step, "bytes": checkpoint.size}


def _seconds(record: StepRecord) -> float:
    speed = record["tokens_per_second"]
    return min(record["tokens"] / speed, MOST_SECONDS) if speed else 0.0


def _seconds_left(metrics: Sequence[StepRecord], steps: int) -> float | None:
    if not metrics:
        return None
    each = statistics.median(map(_seconds, metrics[-RECENT_STEPS:]))
    return round(min(each * max(0, steps - metrics[-1]["step"]), MOST_SECONDS), 1)


def _held_out(metrics: Sequence[StepRecord]) -> dict[str, Any] | None:
    measured = [record for record in metrics if "held_out_loss" in record]
    if not measured:
        return None
    newest = measured[-1]
    parts = {"sets": newest.get("held_out_sets"), "metrics": newest.get("held_out_metrics")}
    known = {name: part for name, part in parts.items() if part}
    return {"step": newest["step"], "loss": newest["held_out_loss"], **known}


def source_losses(metrics: Sequence[StepRecord]) -> dict[str, float | None]:
    """Return the mean loss of each source over the trained tokens of the last `RECENT_STEPS` steps.

    Steps whose loss was not finite are left out; None stands for a source without any other step.
    """
    sums, tokens = dict[str, float](), Counter[str]()
    for record in metrics[-RECENT_STEPS:]:
        for name, source in record.get("sources", {}).items():
            sums.setdefault(name, 0.0)
            if source["loss"] is not None:
                weight = next(source[unit] for unit in ("trained_tokens", "pairs", "answers") if unit in source)
                sums[name] += source["loss"] * weight
                tokens[name] += weight
    return {name: total / tokens[name] if tokens[name] else None for name, total in sums.items()}


def _best(run: Path) -> dict[str, Any] | None:
    best = store.best_of(run)
    if best is None:
        return None
    progress, metric = best.manifest.progress, store.metric_of(best.manifest)
    other = {} if metric == LOSS else {"metric": metric, "value": figure_of(progress, metric)}
    return {"step": best.step, "loss": progress.held_out_loss, "path": str(best.path.relative_to(run)), **other}


def _live(run: Path, metrics: Sequence[StepRecord]) -> dict[str, Any] | None:
    region = live.open_region(run)
    published = region.snapshots() if region else []
    if region is None or not published:
        return None
    newest, reached = published[0], metrics[-1]["step"] if metrics else 0
    # or a newer one replaced it while it was read
    valid = region.is_valid(newest) or region.snapshots()[0].order > newest.order
    return {"step": newest.step, "valid": valid, "behind": max(0, reached - newest.step), "path": str(region.path)}


def _durable(run: Path, metrics: Sequence[StepRecord]) -> dict[str, Any] | None:
    latest = store.find(run).latest
    if latest is None:
        return None
    later = [record for record in metrics if record["step"] > latest.step]
    age = sum(map(_seconds, later))
    return {"step": latest.step, "behind": len(later), "age_seconds": round(age, 3)}


def _remote(run: Path) -> dict[str, Any] | None:
    with suppress(CheckpointError):
        if outbox := read_outbox(run):
            left = waiting(run, outbox.url)
            step = outbox.uploaded.step if outbox.uploaded else None
            newer = left.manifest.progress.step if left else None
            return {"url": outbox.url, "step": step, "waiting": newer, "problem": outbox.problem}
    return None


def _activity(run: Path, metrics: Sequence[StepRecord], events: Sequence[Event]) -> str:
    """Return what a run does while a living process holds its lease.

    The trainer's signs of life are in the live region. If this machine has none of the run, the logs show them.
    """
    region, launched = live.open_region(run), max((event.get("launched", 0.0) for event in events), default=0.0)
    seconds = [_seconds(record) for record in metrics if record["time"] >= launched]
    limit = _step_timeout(region) or max(LEAST_TIMEOUT_SECONDS, TIMEOUT_FACTOR * max(seconds, default=0.0))
    if region is not None:
        if region.words[Word.PHASE] != Phase.TRAINING:
            return "starting or ending"
        silent = region.silent_seconds
    else:
        if not seconds:
            return "starting or ending"
        silent = max(0.0, time.time() - metrics[-1]["time"])
    return "training" if silent <= limit else f"not responding for {silent:.0f} s"


def _step_timeout(region: live.Region | None) -> float | None:
    """Return `train.step_timeout` of the recipe of the job that writes to a live region, if it is set."""
    with suppress(CheckpointError):
        job = live.read_job(region) if region else None
        found = job.facts.recipe.get("train", {}).get("step_timeout") if isinstance(job, live.JobFile) else None
        return found if isinstance(found, float) else None
    return None


def _ended(events: Sequence[Event]) -> str:
    """Return how the last start ended, for a run that is not training."""
    kinds = [event["kind"] for event in events if event["kind"] in (*ENDS, "started", "resumed", "restart")]
    return ENDS.get(kinds[-1] if kinds else "", "interrupted, resumable")


def _exit_code(state: str, step: int, durable: dict[str, Any] | None) -> int:
    """Return the exit code of `lora-kit train` for a run that has ended in this state."""
    if state == ENDS["finished"]:
        return 0
    saved = durable is not None and durable["step"] >= step
    return Stopped.exit_code if state == ENDS["stopped"] and saved else LoraKitError.exit_code


def _interruptions(events: Sequence[Event], ended_at: int | None) -> Iterator[dict[str, Any]]:
    """Yield the cause and step of every start that ended early, also of starts that ended without an event.

    Args:
        events: The event log.
        ended_at: The newest finished step; None while the run is training.
    """
    step, explained = 0, True  # whether an event explains the end of the last start
    for event in events:
        if event["kind"] in ("restart", "failed"):
            yield {"cause": event["cause"], "step": event["step"]}
        elif event["kind"] == "stopped":
            yield {"cause": f"stopped by {event.get('signal', 'a signal')}", "step": event["step"]}
        elif event["kind"] in ("started", "resumed"):
            if not explained:
                yield {"cause": SILENT_END, "step": event.get("reached", step)}
            step = event["step"]
        if event["kind"] in (*ENDS, "restart"):
            explained = True
        elif event["kind"] in ("started", "resumed"):
            explained = False
    if not explained and ended_at is not None:
        yield {"cause": SILENT_END, "step": ended_at}


def _counted(entries: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge equal neighbours and count them as `times`."""
    return [entry | {"times": len(list(equal))} for entry, equal in groupby(entries)]


def _spent(metrics: Sequence[StepRecord], events: Sequence[Event], *, training: bool) -> float:
    """Return the sum of the seconds from each launch to its last line in a log."""
    times = sorted([record["time"] for record in metrics] + [_time(event) for event in events])
    launches = sorted({event["launched"] for event in events if "launched" in event})
    seconds = 0.0
    for begin, end in pairwise([*launches, float("inf")]):
        lines = [moment for moment in times if begin <= moment < end]
        last = time.time() if training and end == float("inf") else max(lines, default=begin)
        seconds += last - begin
    return seconds


def _time(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
