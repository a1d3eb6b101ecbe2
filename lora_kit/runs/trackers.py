"""Trackers: a copy of a run's metrics in TensorBoard, Weights & Biases, trackio or MLflow, through accelerate.

metrics.jsonl is the reference. A tracker may be behind it (values that were not written when the process was killed) or
ahead of the newest checkpoint. So at every start each tracker reports the newest step of each of its curves, gets the
missing steps from the log, and then follows the run. Steps that a tracker has are not sent again, because an exact
resume repeats their values. Each tracker has a thread of its own, so a slow or failing tracker neither delays a step
nor ends a run.
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
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic reads this one before Python 3.12

from lora_kit.data.counts import Count
from lora_kit.errors import CheckpointError, LaunchError
from lora_kit.files import write_atomically
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import formats
from lora_kit.runs.formats import RunId
from lora_kit.runs.journal import Journal
from lora_kit.views.console import Console

STATE = "trackers.json"
# sections of a recipe that affect metrics
SECTIONS = {"base", "data", "adapter", "objective", "optim", "train", "evaluate"}
END_SECONDS = 60.0  # the longest wait for all trackers at the end of a run
STOP_SECONDS = 20.0  # the same limit after a signal or an error: a scheduler may kill the process after 30 s
SAMPLES = "samples"


class TrackerState(TypedDict):
    """The content of trackers.json.

    Attributes:
        id: The run's id at its trackers.
        values: A hash of everything that the metrics depend on.
        sent: The newest step that a tracker may have.
    """

    id: RunId
    values: str
    sent: Count


_STATE: TypeAdapter[TrackerState] = TypeAdapter(TrackerState)


def require(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        LaunchError: A tracker's package is missing; the message names each such tracker.
    """
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise LaunchError(
            f"track.names: {', '.join(missing)} not installed; pip install 'lora_kit[trackers]', or remove the name"
        )


def _installed(name: str) -> bool:
    found = find_spec(name)
    return found is not None and found.origin is not None  # a folder of that name, e.g. of wandb's files, has no origin


def tracker_id(run: Path, run_id: str, *, start: int, reached: int, recipe: Recipe, fingerprints: Any) -> str:
    """Return the id of this run at its trackers. It stays the same unless repeated steps will have other values.

    A tracker cannot delete steps. If it may have steps after `start`, and the recipe or the inputs have changed since
    then (with --accept, or before the first checkpoint), the run gets a new id, under which all its curves are sent.

    Args:
        run: The run's folder. Call this before its journal is cut.
        run_id: The id to use at first.
        start: The step that the run resumes from.
        reached: The newest step in the journal.
        recipe: The recipe of this start.
        fingerprints: The fingerprints of base and data of this start.
    """
    sections = recipe.model_dump(mode="json", include=SECTIONS)
    values = hashlib.sha256(json.dumps([sections, fingerprints], sort_keys=True).encode()).hexdigest()
    path = run / STATE
    try:
        then = formats.read(_STATE, path) or {"id": run_id, "values": values, "sent": 0}
    except CheckpointError:  # unknown what was sent: send everything under a new id
        then = {"id": secrets.token_hex(8), "values": values, "sent": 0}
    now = then | {"values": values, "sent": max(then["sent"], reached)}
    if now["sent"] > start and then["values"] != values:
        now |= {"id": secrets.token_hex(8), "sent": start}
    write_atomically(path, json.dumps(now) + "\n")
    return now["id"]


@dataclass(frozen=True)
class Curves:
    """A run as a tracker shows it.

    Attributes:
        project: The tracker's project, which groups runs.
        name: The name that a person sees.
        id: The id at the tracker; see `tracker_id`.
        folder: The run's folder.
        facts: Recipe, fingerprints and versions, with dotted keys.
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
        newest: Returns the newest step that the tracker has of a curve; 0 if it has none.
        log: Takes the values of a step and its number.
        finish: Sends the remaining values.
    """

    newest: Callable[[str], int]
    log: Callable[[dict[str, Any], int], None]
    finish: Callable[[], None]


def open_tensorboard(curves: Curves) -> Opened:
    """Add an event file to the run's folder; the earlier event files show the newest step of each curve."""
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
    if not newest:  # accelerate's store_init_configuration would create another run folder at each start
        rows = "".join(f"| {key} | {value} |\n" for key, value in curves.facts.items())
        tracker.log({"recipe": f"| {curves.name} | |\n|---|---|\n{rows}"}, step=0)
    return Opened(lambda curve: newest.get(curve, 0), tracker.log, tracker.finish)


def open_wandb(curves: Curves) -> Opened:
    """Resume the run with this id; offline, its earlier .wandb files show the newest step."""
    import wandb
    from accelerate.tracking import WandBTracker

    offline = max(map(_wandb_step, curves.folder.glob(f"wandb/offline-run-*-{curves.id}/*.wandb")), default=0)
    timeouts = {"login_timeout": 10, "init_timeout": 60, "finish_timeout": END_SECONDS, "finish_timeout_raises": True}
    settings = wandb.Settings(console="off", **timeouts)  # otherwise wandb would record the progress bar
    tracker = WandBTracker(
        curves.project, name=curves.name, id=curves.id, resume="allow", dir=str(curves.folder), settings=settings
    )
    tracker.start()
    tracker.store_init_configuration(dict(curves.facts))
    newest = offline if tracker.run.offline else tracker.run.starting_step - 1
    return Opened(lambda _: newest, lambda values, step: tracker.log(values, step, commit=True), tracker.finish)


def _wandb_step(path: Path) -> int:
    """Return the newest step in a .wandb file, read by wandb itself."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
    summary = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    return json.loads(summary)["step"] or 0


def open_trackio(curves: Curves) -> Opened:
    """Resume the run with this name; trackio identifies runs by name, so the name contains the id."""
    from accelerate.tracking import TrackioTracker

    name = f"{curves.name}-{curves.id[:8]}"
    tracker = TrackioTracker(curves.project, name=name, resume="allow", embed=False)
    tracker.start()
    tracker.store_init_configuration(dict(curves.facts))
    newest = tracker.run._next_step - 1  # the public reader does not know runs on a Space

    def log(values: dict[str, Any], step: int) -> None:
        from trackio import Markdown

        tracker.log({key: Markdown(value) if isinstance(value, str) else value for key, value in values.items()}, step)

    return Opened(lambda _: newest, log, tracker.finish)


def open_mlflow(curves: Curves) -> Opened:
    """Resume the run that has this id in a tag: MLflow chooses run ids itself."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    tag = "lora_kit.id"
    experiment = mlflow.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", curves.project))
    experiments = [experiment.experiment_id] if experiment else []
    same_id = f"tags.`{tag}` = '{curves.id}'"
    runs = mlflow.search_runs(experiments, filter_string=same_id, output_format="list") if experiments else []
    run_id = runs[0].info.run_id if runs else None
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
        texts = {key: value for key, value in values.items() if isinstance(value, str)}
        for key, text in texts.items():
            mlflow.log_text(text, f"{key}/step-{step:08d}.md")
        tracker.log({key: value for key, value in values.items() if key not in texts}, step)

    return Opened(newest, log, tracker.finish)


OPEN = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio, "mlflow": open_mlflow}


def follow(opened: Opened, records: Iterator[dict[str, Any]]) -> None:
    """Send a tracker the values that it lacks of each step: the step's samples, then its line of metrics.jsonl."""
    samples: list[str] = []
    for record in records:
        if "answer" in record:
            parts = ("prompt", "expected", "answer")
            samples.append("\n\n".join(f"**{part}**\n\n~~~~\n{record[part]}\n~~~~" for part in parts if part in record))
            continue
        step = record["step"]
        values = ({SAMPLES: "\n\n---\n\n".join(samples)} if samples else {}) | curves_of(record)
        curves = [
            key
            for key, value in values.items()
            if key not in ("step", "time") and value is not None and step > opened.newest(key)
        ]
        if curves:
            opened.log({key: values[key] for key in curves}, step)
        samples.clear()
    opened.finish()


def curves_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl with a curve for each source of a mixture, named validation set and metric."""
    nested = ("sources", "held_out_sets", "held_out_metrics")
    sources, sets, metrics = (record.get(key, {}) for key in nested)
    values = {key: value for key, value in record.items() if key not in nested}
    values |= {f"loss/{name}": source["loss"] for name, source in sources.items()}
    values |= {f"held_out_loss/{name}": loss for name, loss in sets.items()}
    return values | {f"held_out/{name}": value for name, value in metrics.items()}


class Trackers:
    """The trackers of a run while it trains: a thread each on the main process, none on other processes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._failed: set[str] = set()
        self._threads: list[tuple[threading.Thread, SimpleQueue[dict[str, Any] | None]]] = []

    def begin(self, names: Sequence[str], curves: Curves, journal: Journal) -> None:
        """Start a thread for each tracker, which sends it the journal.

        The caller has cut the journal to the step to resume from.
        """
        samples = [event for event in journal.read_events() if event["kind"] == "sample"]
        logged = sorted([*samples, *journal.read_metrics()], key=lambda record: int(record["step"]))
        for name in names:
            queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
            arguments = (name, curves, chain(logged, iter(queue.get, None)), journal)
            thread = threading.Thread(target=self._follow, args=arguments, name=name, daemon=True)
            self._threads.append((thread, queue))
            thread.start()

    def _follow(self, name: str, curves: Curves, records: Iterator[dict[str, Any]], journal: Journal) -> None:
        try:
            follow(OPEN[name](curves), records)
        except (Exception, SystemExit) as error:  # no failure of a tracker ends the run
            self._fault(name, journal, without_secrets(f"{type(error).__name__}: {error}"))

    def _fault(self, name: str, journal: Journal, cause: str) -> None:
        if name in self._failed:
            return
        self._failed.add(name)
        message = (
            f"{name} failed: {cause}; training continues, metrics.jsonl has every step, the next start sends the rest"
        )
        journal.event("fault", what=message)
        self._console.warn(message)

    def log(self, record: dict[str, Any]) -> None:
        """Send a sampled answer, or the line of a finished step, to all trackers."""
        for thread, queue in self._threads:
            if thread.is_alive():
                queue.put(record)

    def end(self, journal: Journal, seconds: float) -> None:
        """Wait until the trackers have sent everything, but at most `seconds`."""
        until = time.monotonic() + seconds
        for _, queue in self._threads:
            queue.put(None)
        for thread, _ in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self._fault(thread.name, journal, f"it has not sent everything {seconds:.0f} s after the end")


@contextmanager
def following(run: Path, console: Console) -> Iterator[Trackers]:
    """Yield a run's trackers. However the run ends, they send what was logged."""
    trackers, seconds = Trackers(console), STOP_SECONDS
    try:
        yield trackers
        seconds = END_SECONDS
    finally:
        trackers.end(Journal(run), seconds)


SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a message without the secrets of the environment and without credentials in URLs."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    return re.sub(r"(?i)((?:token|key|secret|password)=)[^&\s]+", r"\1***", text)
