"""A run's folder as an object: metrics, events, checkpoints and result, and the table shown at the end."""

import json
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, get_args

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic reads this one before Python 3.12

from lora_kit.data.counts import Count, Share
from lora_kit.errors import CheckpointError
from lora_kit.files import write_atomically
from lora_kit.recipe.load import BUILTIN
from lora_kit.recipe.schema import ANSWER_METRIC, LOSS, Recipe
from lora_kit.runs import formats, store
from lora_kit.runs.formats import Amount, Figure, finite
from lora_kit.runs.journal import Event, Journal, StepRecord
from lora_kit.runs.serving import serving
from lora_kit.runs.status import RECENT_STEPS, source_losses, status
from lora_kit.views import notebook
from lora_kit.views.console import Console, number

RESULT = "result.json"
FOLDER = "^checkpoints/step-[0-9]{8,20}$"


@with_config(ConfigDict(extra="allow"))
class Scores(TypedDict):
    """The fields of `evaluation.Score`; null stands for a number that is not finite."""

    loss: Figure
    perplexity: Figure
    exact_match: Share | None
    examples: Count
    answered: Count
    sets: NotRequired[dict[str, Figure]]
    metrics: NotRequired[dict[str, Figure]]


@with_config(ConfigDict(extra="allow"))
class Result(TypedDict):
    """The content of result.json.

    Attributes:
        step: The last step of the run.
        metrics: The scores of `base` and `adapter`; empty without validation data.
        sources: The loss of each source of a mixture over the last steps, as `status` has it; only with a mixture.
        tokens_per_second: The median over all steps.
        checkpoint_bytes: The size of the last checkpoint.
        base_bytes: The size of the base's weights.
        adapter: The last checkpoint, relative to the run's folder.
        best: The checkpoint with the best held-out figure (`evaluate.metric`); null if none was measured.
    """

    step: Count
    metrics: dict[str, Scores]
    sources: NotRequired[dict[str, Figure]]
    tokens_per_second: Amount
    checkpoint_bytes: Count
    base_bytes: Count
    adapter: Annotated[str, Field(pattern=FOLDER)]
    best: Annotated[str, Field(pattern=FOLDER)] | None


RESULT_FILE: TypeAdapter[Result] = TypeAdapter(Annotated[Result, AfterValidator(finite)])


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run; `folder` may be given as a string."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def metrics(self) -> list[StepRecord]:
        """A record for every finished step."""
        return Journal(self.folder).read_metrics()

    @property
    def events(self) -> list[Event]:
        """The events, oldest first."""
        return Journal(self.folder).read_events()

    @property
    def checkpoints(self) -> list[Path]:
        """The committed checkpoints, oldest first, valid or not."""
        return store.folders(self.folder)[::-1]

    @property
    def latest(self) -> Path:
        """The newest valid checkpoint.

        Raises:
            CheckpointError: There is no valid checkpoint.
        """
        latest = store.find(self.folder).latest
        if latest is None:
            raise CheckpointError(
                f"{self.folder}: it has no valid checkpoint; train first, or run `lora-kit verify {self.folder}` for "
                "the reason"
            )
        return latest.path

    @property
    def result(self) -> dict[str, Any]:
        """The content of result.json; empty before the run has finished.

        Raises:
            CheckpointError: The file is damaged; repeating the training command writes it again.
        """
        return dict(formats.read(RESULT_FILE, self.folder / RESULT) or {})

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best held-out figure (`evaluate.metric`); None when none was measured."""
        best = store.best_of(self.folder)
        return best.path if best else None

    def _repr_html_(self) -> str:
        """Return what a notebook shows: progress, scores and the loss curve."""
        if not self.events:
            return notebook.table(str(self.folder), [("state", "nothing was trained here yet")])
        state, checkpoints = status(self.folder), self.checkpoints
        rows = [
            ("state", f"{state.state}, step {state.step} of {state.steps}"),
            ("checkpoints", ", ".join(path.name for path in checkpoints) or "none yet"),
        ]
        try:
            rows += scores(self.result) if self.result else []
        except CheckpointError as error:
            rows.append(("result", str(error)))
        return notebook.table(str(self.folder), rows) + notebook.curve(self.metrics, state.steps or state.step)


def write_result(run: Run, step: int, metrics: dict[str, Any], *, base_bytes: int) -> None:
    """Write result.json for a run that has finished.

    Args:
        run: The run.
        step: Its last step.
        metrics: The scores of `base` and `adapter` as plain values.
        base_bytes: The size of the base's weights.

    Raises:
        CheckpointError: The disk is full; the run's last checkpoint is safe.
    """
    steps = run.metrics
    rates = [record["tokens_per_second"] for record in steps] or [0.0]  # someone may have deleted the log
    sources = source_losses(steps)
    checkpoint = store.open_checkpoint(store.checkpoint_folder(run.folder, step))
    result = {
        "step": step,
        "metrics": metrics,
        **({"sources": sources} if sources else {}),
        "tokens_per_second": round(statistics.median(rates), 1),
        "checkpoint_bytes": checkpoint.size,
        "base_bytes": base_bytes,
        "adapter": str(checkpoint.path.relative_to(run.folder)),
        "best": str(run.best.relative_to(run.folder)) if run.best else None,
    }
    try:
        write_atomically(run.folder / RESULT, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{run.folder / RESULT}: not written: {error.strerror}; the last checkpoint is safe; free "
            "disk space and repeat the command to finish the run"
        ) from error


def scores(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the scores, the speed and the sizes of a result as names and values."""
    rows = []
    for name, score in result["metrics"].items():
        exact = score["exact_match"]
        match = "" if exact is None else f", exact match {exact:.1%} of {score['answered']}"
        if too_long := score.get("too_long"):
            match += f" ({too_long} left no position for an answer)"
        metrics = score.get("metrics", {})
        parts = [f"loss {number(score['loss'], '.4f')}", *preferences(metrics)]
        if "rewards/margins" not in metrics:
            parts.append(f"perplexity {number(score['perplexity'], '.2f')}")
        rows.append((f"held-out, {name}", f"{', '.join(parts)}{match}"))
        if answers := [f"{each} {number(metrics[each], '.1%')}" for each in get_args(ANSWER_METRIC) if each in metrics]:
            rows.append((f"answers, {name}", ", ".join(answers)))
        rows += [
            (f"held-out, {name}, {each}", f"loss {number(loss, '.4f')}") for each, loss in score.get("sets", {}).items()
        ]
    texts = [score["metrics"] for score in result["metrics"].values() if "forgetting" in score.get("metrics", {})]
    if texts:
        before, after = (number(texts[place]["text_loss"], ".4f") for place in (0, -1))
        change = number(texts[-1]["forgetting"], "+.4f")
        rows.append(("forgetting", f"{change}: loss on evaluate.forgetting {before} before, {after} after"))
    rows += [
        (f"trained, {name}", f"loss {number(loss, '.4f')} over the last {min(RECENT_STEPS, result['step'])} steps")
        for name, loss in result.get("sources", {}).items()
    ]
    base_bytes = result["base_bytes"]
    share = f"{result['checkpoint_bytes'] / base_bytes:.1%}" if base_bytes else "unknown"
    return [
        *rows,
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s (median step)"),
        ("checkpoint", f"{result['checkpoint_bytes']:,} bytes; the base has {base_bytes:,} ({share})"),
    ]


def preferences(metrics: Mapping[str, float | None]) -> list[str]:
    """Return the accuracy and the margin of a preference objective as two texts; none if the metrics lack them."""
    names = {"rewards/accuracies": ("preference accuracy", ".1%"), "rewards/margins": ("margin", ".4f")}
    return [f"{name} {number(metrics[key], spec)}" for key, (name, spec) in names.items() if key in metrics]


def show(run: Run, recipe: Recipe, console: Console) -> None:
    """Show the scores, the adapter's folder and the next commands to type."""
    result, folder = run.result, shlex.quote(str(run.folder))
    rows = [
        *scores(result),
        ("adapter", str(run.folder / result["adapter"])),
        ("try it", f'lora-kit generate {folder} "your prompt"'),
        ("look closer", f"lora-kit status {folder}"),
    ]
    rows.insert(-1, ("serve", serving(recipe.adapter, folder)))
    if result["best"] and result["best"] != result["adapter"]:
        metric = recipe.evaluate.metric
        name = "lowest held-out loss" if metric == LOSS else f"best held-out {metric}"
        rows.insert(-2, (name, str(run.folder / result["best"])))
    used = [recipe.base.repo, *(source.source for source in recipe.data.train_sources.values())]
    embedded = [name.startswith(BUILTIN) for name in used]
    note = "base and data are synthetic" if all(embedded) else "the base is synthetic" if embedded[0] else ""
    note += ", made for this demonstration (lora_kit/assets/README.md)" if note else ""
    console.table(f"{run.folder}: {result['step']} steps done", rows, caption=note)
