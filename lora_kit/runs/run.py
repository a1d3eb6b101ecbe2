"""A run's folder as an object: metrics, events, checkpoints and result, and the table shown at the end."""

import json
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import CheckpointError
from lora_kit.files import write_atomically
from lora_kit.recipe.load import BUILTIN
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import store
from lora_kit.runs.journal import Journal
from lora_kit.runs.status import status
from lora_kit.views import notebook
from lora_kit.views.console import Console

RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run; `folder` may be given as a string."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A record for every finished step."""
        return Journal(self.folder).read_metrics()

    @property
    def events(self) -> list[dict[str, Any]]:
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
        """The content of result.json; empty before the run has finished."""
        path = self.folder / RESULT
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def best(self) -> Path | None:
        """The checkpoint with the lowest held-out loss; None when none was measured."""
        return store.best_of(self.folder)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: progress, scores and the loss curve."""
        if not self.events:
            return notebook.table(str(self.folder), [("state", "nothing was trained here yet")])
        state, checkpoints = status(self.folder), self.checkpoints
        rows = [
            ("state", f"{state.state}, step {state.step} of {state.steps}"),
            ("checkpoints", ", ".join(path.name for path in checkpoints) or "none yet"),
        ]
        if self.result:
            rows += scores(self.result)
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
    rates = [record["tokens_per_second"] for record in run.metrics]
    checkpoint = store.open_checkpoint(store.checkpoint_folder(run.folder, step))
    result = {
        "step": step,
        "metrics": metrics,
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
        rows.append((f"held-out, {name}", f"loss {score['loss']:.4f}, perplexity {score['perplexity']:.2f}{match}"))
    share = result["checkpoint_bytes"] / result["base_bytes"]
    return [
        *rows,
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s (median step)"),
        ("checkpoint", f"{result['checkpoint_bytes']:,} bytes; the base has {result['base_bytes']:,} ({share:.1%})"),
    ]


def show(run: Run, recipe: Recipe, console: Console) -> None:
    """Show the scores, the adapter's folder and the next commands to type."""
    result, folder = run.result, shlex.quote(str(run.folder))
    rows = [
        *scores(result),
        ("adapter", str(run.folder / result["adapter"])),
        ("try it", f'lora-kit generate {folder} "your prompt"'),
        ("look closer", f"lora-kit status {folder}"),
    ]
    if result["best"] and result["best"] != result["adapter"]:
        rows.insert(-2, ("lowest held-out loss", str(run.folder / result["best"])))
    embedded = [name.startswith(BUILTIN) for name in (recipe.base.repo, recipe.data.train)]
    note = "base and data are synthetic" if all(embedded) else "the base is synthetic" if embedded[0] else ""
    note += ", made for this demonstration (lora_kit/assets/README.md)" if note else ""
    console.table(f"{run.folder}: {result['step']} steps done", rows, caption=note)
