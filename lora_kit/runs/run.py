"""A run's folder, read back: its metrics, checkpoints and result, and the table that it ends with."""

import json
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
    """A run's folder, read back; a string will do."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A record for every finished step."""
        return Journal(self.folder).read_metrics()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened, oldest first."""
        return Journal(self.folder).read_events()

    @property
    def checkpoints(self) -> list[Path]:
        """The committed checkpoints, oldest first, valid or not."""
        return store.folders(self.folder)[::-1]

    @property
    def latest(self) -> Path:
        """The newest checkpoint that verifies.

        Raises:
            CheckpointError: There is none.
        """
        found = store.find(self.folder).latest
        if found is None:
            raise CheckpointError(f"{self.folder}: no checkpoint here verifies; train first, or ask `lora-kit verify`")
        return found.path

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
        """Return what a notebook shows: how far it is, what it gained and its losses."""
        if not self.events:
            return notebook.table(str(self.folder), [("state", "nothing was trained here yet")])
        state, checkpoints = status(self.folder), self.checkpoints
        rows = [
            ("state", f"{state.state}, step {state.step} of {state.steps}"),
            ("checkpoints", ", ".join(path.name for path in checkpoints) or "none yet"),
        ]
        if self.result:
            rows += gained(self.result)
        return notebook.table(str(self.folder), rows) + notebook.curve(self.metrics, state.steps or state.step)


def write_result(run: Run, step: int, metrics: dict[str, Any], *, base_bytes: int) -> None:
    """Write result.json for a run that has finished.

    Args:
        run: The run.
        step: Its last.
        metrics: Scores of `base` and `adapter`.
        base_bytes: Of the base's weights.

    Raises:
        CheckpointError: There is no room for it; the run's last checkpoint is durable.
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
            f"{run.folder / RESULT}: not written: {error.strerror}; the last checkpoint is durable, and "
            "the same command ends the run when there is room"
        ) from error


def gained(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the scores of a result, and what they took, as names and values."""
    rows = []
    for name, one in result["metrics"].items():
        match = "" if one["exact_match"] is None else f", exact match {one['exact_match']:.1%} of {one['answered']}"
        rows.append((f"held-out, {name}", f"loss {one['loss']:.4f}, perplexity {one['perplexity']:.2f}{match}"))
    share = result["checkpoint_bytes"] / result["base_bytes"]
    return [
        *rows,
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s (median step)"),
        ("checkpoint", f"{result['checkpoint_bytes']:,} bytes; the base has {result['base_bytes']:,} ({share:.1%})"),
    ]


def show(run: Run, recipe: Recipe, console: Console) -> None:
    """Show what was gained, what it cost, where it is and what to type next."""
    result = run.result
    rows = [
        *gained(result),
        ("adapter", str(run.folder / result["adapter"])),
        ("try it", f'lora-kit generate {run.folder} "your prompt"'),
        ("look closer", f"lora-kit status {run.folder}"),
    ]
    if result["best"] and result["best"] != result["adapter"]:
        rows.insert(-2, ("lowest held-out loss", str(run.folder / result["best"])))
    embedded = [name.startswith(BUILTIN) for name in (recipe.base.repo, recipe.data.train)]
    note = "base and data are synthetic" if all(embedded) else "the base is synthetic" if embedded[0] else ""
    note += ", made for this demonstration (lora_kit/assets/README.md)" if note else ""
    console.table(f"{run.folder}: {result['step']} steps done", rows, caption=note)
