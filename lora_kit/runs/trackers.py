"""Trackers follow a run's own log: TensorBoard, Weights & Biases, trackio and MLflow, through accelerate.

metrics.jsonl is the truth; a tracker is a copy that may be behind it (what it had not written when it was killed) or
ahead of the newest checkpoint. So at every start a tracker is asked how far each of its curves reaches, gets from the
log what it lacks, and follows from there. Steps that it has are not sent again: an exact resume repeats their values.
Each tracker has a thread of its own, so a slow or broken one holds up no step and ends no run.
"""

import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lora_kit.errors import LaunchError
from lora_kit.files import write_atomically
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.journal import Journal
from lora_kit.views.console import Console

STATE = "trackers.json"
PACKAGES = {  # any of them will do
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
DECIDE_VALUES = {"base", "data", "adapter", "objective", "optim", "train", "evaluate"}  # sections of a recipe
END_SECONDS = 60.0  # how long the end of a run waits for its trackers, all together
STOP_SECONDS = 20.0  # the same after a signal or an error: a scheduler may kill after 30
SAMPLES = "samples"


def require(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        LaunchError: Names each.
    """
    missing = [name for name in names if not any(_installed(package) for package in PACKAGES[name])]
    if missing:
        raise LaunchError(
            f"track.names: {', '.join(missing)} not installed; pip install 'lora_kit[trackers]', or take the name out"
        )


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def claim_id(run: Path, run_id: str, *, start: int, reached: int, recipe: Recipe, fingerprints: Any) -> str:
    """Return what this run is called at its trackers: the same ever after, unless its steps will have other values.

    A tracker forgets nothing. When it may have steps after `start`, and what decides a step's values has changed since
    (with --accept, or before the first checkpoint), the run gets a new name there, and with it its whole curves.

    Args:
        run: The run's folder. Call this before its journal is cut.
        run_id: The first name.
        start: The step that the run goes on from.
        reached: The newest step in its journal.
        recipe: As of now.
        fingerprints: Of base and data, as of now.
    """
    sections = recipe.model_dump(mode="json", include=DECIDE_VALUES)
    values = hashlib.sha256(json.dumps([sections, fingerprints], sort_keys=True).encode()).hexdigest()
    path = run / STATE
    then: dict[str, Any] = {"id": run_id, "values": values, "sent": 0}
    if path.is_file():
        then = json.loads(path.read_text())
    now = then | {"values": values, "sent": max(then["sent"], reached)}
    if now["sent"] > start and then["values"] != values:
        now |= {"id": secrets.token_hex(8), "sent": start}
    write_atomically(path, json.dumps(now) + "\n")
    return str(now["id"])


@dataclass(frozen=True)
class Curves:
    """A run as its trackers know it.

    Attributes:
        project: What groups runs.
        name: For people.
        id: For trackers; see `claim_id`.
        folder: The run's.
        facts: Recipe, fingerprints and versions, flat.
    """

    project: str
    name: str
    id: str
    folder: Path
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Opened:
    """A tracker that was started.

    Attributes:
        newest: Returns the newest step that it has of a curve, 0 for none.
        log: Takes a step's values and its number.
        finish: Writes out what is left.
    """

    newest: Callable[[str], int]
    log: Callable[[dict[str, Any], int], None]
    finish: Callable[[], None]


def open_tensorboard(curves: Curves) -> Opened:
    """Add an event file to the run's folder; the others there tell how far the curves reach."""
    from accelerate.tracking import TensorBoardTracker
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    folder, newest = curves.folder / "tensorboard", dict[str, int]()
    for path in sorted((folder / curves.id).glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                curve = value.tag.removesuffix("/text_summary")
                newest[curve] = max(newest.get(curve, 0), event.step)
    tracker = TensorBoardTracker(curves.id, folder)
    tracker.start()
    if not newest:  # accelerate's way to note hyper-parameters makes another run's folder at each start
        rows = "".join(f"| {key} | {value} |\n" for key, value in curves.facts.items())
        tracker.log({"recipe": f"| {curves.name} | |\n|---|---|\n{rows}"}, step=0)
    return Opened(lambda curve: newest.get(curve, 0), tracker.log, tracker.finish)


def open_wandb(curves: Curves) -> Opened:
    """Go on with the run of this id; offline, the files of its earlier parts tell how far it reaches."""
    import wandb
    from accelerate.tracking import WandBTracker

    found = max(map(_wandb_step, curves.folder.glob(f"wandb/offline-run-*-{curves.id}/*.wandb")), default=0)
    waits = {"login_timeout": 10, "init_timeout": 60, "finish_timeout": END_SECONDS, "finish_timeout_raises": True}
    settings = wandb.Settings(console="off", **waits)  # our progress bar is no log
    tracker = WandBTracker(
        curves.project, name=curves.name, id=curves.id, resume="allow", dir=str(curves.folder), settings=settings
    )
    tracker.start()
    tracker.store_init_configuration(dict(curves.facts))
    newest = found if tracker.run.offline else tracker.run.starting_step - 1
    return Opened(lambda _: newest, lambda values, step: tracker.log(values, step, commit=True), tracker.finish)


def _wandb_step(path: Path) -> int:
    """Return the newest step in a .wandb file, by wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    return json.loads(told)["step"] or 0


def open_trackio(curves: Curves) -> Opened:
    """Go on with the run of this name; trackio knows runs by their names, so the id is part of it."""
    from accelerate.tracking import TrackioTracker

    name = f"{curves.name}-{curves.id[:8]}"
    tracker = TrackioTracker(curves.project, name=name, resume="allow", embed=False)
    tracker.start()
    tracker.store_init_configuration(dict(curves.facts))
    newest = tracker.run._next_step - 1  # local or on a Space; the public reader knows local runs only

    def log(values: dict[str, Any], step: int) -> None:
        from trackio import Markdown

        tracker.log({key: Markdown(one) if isinstance(one, str) else one for key, one in values.items()}, step)

    return Opened(lambda _: newest, log, tracker.finish)


def open_mlflow(curves: Curves) -> Opened:
    """Go on with the run that has this id in a tag: MLflow makes run ids itself."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    tag = "lora_kit.id"
    experiment = mlflow.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", curves.project))
    places = [experiment.experiment_id] if experiment else []
    wanted = f"tags.`{tag}` = '{curves.id}'"
    found = mlflow.search_runs(places, filter_string=wanted, output_format="list") if places else []
    run_id = found[0].info.run_id if found else None
    tracker = MLflowTracker(curves.project, run_id=run_id, run_name=curves.name, tags={tag: curves.id})
    tracker.start()
    if not run_id:  # parameters cannot change
        tracker.store_init_configuration(dict(curves.facts))
    active = tracker.tracker.info.run_id

    @cache
    def newest(curve: str) -> int:
        history = mlflow.MlflowClient().get_metric_history(active, "loss" if curve == SAMPLES else curve)
        return max((point.step for point in history), default=0)

    def log(values: dict[str, Any], step: int) -> None:
        texts = {key: one for key, one in values.items() if isinstance(one, str)}
        for key, text in texts.items():
            mlflow.log_text(text, f"{key}/step-{step:08d}.md")
        tracker.log({key: one for key, one in values.items() if key not in texts}, step)

    return Opened(newest, log, tracker.finish)


OPEN = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio, "mlflow": open_mlflow}


def follow(opened: Opened, records: Iterator[dict[str, Any]]) -> None:
    """Send a tracker what it lacks of each step: a step's samples, then its line of metrics.jsonl."""
    samples: list[str] = []
    for record in records:
        if "answer" in record:
            parts = ("prompt", "expected", "answer")
            samples.append("\n\n".join(f"**{part}**\n\n~~~~\n{record[part]}\n~~~~" for part in parts if part in record))
            continue
        step = record["step"]
        values = ({SAMPLES: "\n\n---\n\n".join(samples)} if samples else {}) | record
        lacking = {key: one for key, one in values.items() if key not in ("step", "time") and step > opened.newest(key)}
        if lacking:
            opened.log(lacking, step)
        samples.clear()
    opened.finish()


class Trackers:
    """The trackers of a run while it trains; without names, or on all processes but the main one, there are none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._failed: set[str] = set()
        self._threads: list[tuple[threading.Thread, SimpleQueue[dict[str, Any] | None]]] = []

    def begin(self, names: Sequence[str], curves: Curves, journal: Journal) -> None:
        """Start following a run whose journal was cut back to where it goes on."""
        samples = [event for event in journal.read_events() if event["kind"] == "sample"]
        known = sorted([*samples, *journal.read_metrics()], key=lambda one: int(one["step"]))
        for name in names:
            queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
            arguments = (name, curves, chain(known, iter(queue.get, None)), journal)
            thread = threading.Thread(target=self._follow, args=arguments, name=name, daemon=True)
            self._threads.append((thread, queue))
            thread.start()

    def _follow(self, name: str, curves: Curves, records: Iterator[dict[str, Any]], journal: Journal) -> None:
        try:
            follow(OPEN[name](curves), records)
        except (Exception, SystemExit) as error:  # whatever a tracker does, the run goes on
            self._fault(name, journal, without_secrets(f"{type(error).__name__}: {error}"))

    def _fault(self, name: str, journal: Journal, what: str) -> None:
        if name in self._failed:
            return
        self._failed.add(name)
        told = f"{name} failed: {what}; the run goes on, metrics.jsonl has every step, the next start sends the rest"
        journal.event("fault", what=told)
        self._console.warn(told)

    def log(self, record: dict[str, Any]) -> None:
        """Hand on a sample or a finished step."""
        for thread, queue in self._threads:
            if thread.is_alive():
                queue.put(record)

    def end(self, journal: Journal, seconds: float) -> None:
        """Wait, not for ever, until the trackers have all."""
        until = time.monotonic() + seconds
        for _, queue in self._threads:
            queue.put(None)
        for thread, _ in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self._fault(thread.name, journal, f"it has not taken everything {seconds:.0f} s after the end")


@contextmanager
def following(run: Path, console: Console) -> Iterator[Trackers]:
    """Keep a run's trackers; whatever ends the run, they get what was logged."""
    trackers, patience = Trackers(console), STOP_SECONDS
    try:
        yield trackers
        patience = END_SECONDS
    finally:
        trackers.end(Journal(run), patience)


SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a message without the credentials of an address and without the environment's secrets."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    return re.sub(r"(?i)((?:token|key|secret|password)=)[^&\s]+", r"\1***", text)
