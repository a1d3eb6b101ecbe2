"""Read, record, log and show the numbers of each finished step.

The host reads the numbers of a step after it has queued the next step, so a GPU is never idle while the host waits. The
step's line of metrics.jsonl is also stored in its snapshot. If the process dies after the snapshot was published and
before the line was written, the line is written from the snapshot.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from lora_kit.errors import PoisonError
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import store
from lora_kit.runs.figures import Patience
from lora_kit.runs.formats import finite
from lora_kit.runs.manifest import StepFacts, Watch
from lora_kit.training.evaluation import HeldOutLoss
from lora_kit.training.job import Job
from lora_kit.training.objectives.objective import metric_of
from lora_kit.training.publisher import Publisher
from lora_kit.views.console import Console

LATE_LINES = 50  # after so many more lines that could not be written, the warning is repeated
MOST_SKIPPED = 5  # skipped steps in a row that a run survives


class StepValues(NamedTuple):
    """What a step computed, on the host.

    Attributes:
        loss: The mean loss of the step, over all processes.
        stop: Whether any process has received a stop signal.
        grad_norm: The norm of the gradient before clipping.
        taken: Whether the optimizer took the step.
        metrics: The means of the objective's metrics, by name.
    """

    loss: float
    stop: bool
    grad_norm: float
    taken: bool
    metrics: dict[str, float]


def step_values(
    sums: Float32[Tensor, "sums"], norm: Float32[Tensor, ""], taken: Bool[Tensor, ""], metrics: Sequence[str]
) -> Callable[[], StepValues]:
    """Copy what a step computed to the host; calling the result waits for the copy and nothing that is queued later."""
    # in pinned memory if it is copied from a GPU
    on_host = torch.stack([norm, taken, *sums]).to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream().record_event() if sums.is_cuda else None

    def wait() -> StepValues:
        if copied is not None:
            copied.synchronize()
        norm, taken, loss, stop, *means = on_host.tolist()
        return StepValues(loss, stop > 0, norm, taken > 0, dict(zip(metrics, means, strict=True)))

    return wait


@dataclass(frozen=True)
class QueuedStep:
    """A step whose work is queued on the device.

    Attributes:
        step: The step, counted from 0.
        learning_rate: Its learning rate.
        values: Waits for the device, then returns what the step computed.
        seconds: The time that the loop spent on the step.
        stall_seconds: The part of this time in which the loop waited for the copy of the previous state.
        held_out: The held-out loss after the step, if it was measured.
    """

    step: int
    learning_rate: float
    values: Callable[[], StepValues]
    seconds: float
    stall_seconds: float
    held_out: HeldOutLoss | None = None


def with_held_out(facts: StepFacts, loss: HeldOutLoss, patience: Patience) -> StepFacts:
    """Return the facts of a step with its held-out figures, which are counted and added to the line of metrics.jsonl.

    A figure that is not finite is stored as None. `facts.watch` must be the count before this evaluation.
    """
    known, sets = finite(loss.mean), {"held_out_sets": finite(loss.sets)} if loss.sets else {}
    metrics = {"held_out_metrics": finite(loss.metrics)} if loss.metrics else {}
    line = json.dumps(json.loads(facts.line) | {"held_out_loss": known} | sets | metrics)
    measured = replace(facts, held_out_loss=known, line=line)
    return replace(measured, watch=patience.after(facts.watch, measured))


def patience_of(recipe: Recipe) -> Patience:
    """Return when a run of a recipe ends early."""
    return Patience(recipe.evaluate.metric, recipe.evaluate.patience, recipe.evaluate.least_gain)


class StepLog:
    """Writes down every finished step, and remembers which steps were skipped."""

    def __init__(self, job: Job, publisher: Publisher, console: Console) -> None:
        self._job, self._publisher, self._console = job, publisher, console
        self._skipped = job.resumed.skipped_steps if job.resumed else ()
        self._watches = {job.start: job.resumed.watch if job.resumed else None}  # the watch after each step, by step
        self.patience = patience_of(job.recipe)

    def facts(self, queued: QueuedStep) -> StepFacts:
        """Return what the manifest records of a step; waits for the device."""
        values, plan, done = queued.values(), self._job.plan, queued.step + 1
        examples = plan.examples(queued.step)
        tokens = sum(self._job.inputs.data.train.lengths_of(examples))
        record = {
            "step": done,
            "examples": plan.examples_seen(done),
            "tokens": tokens,
            "loss": values.loss,
            "learning_rate": queued.learning_rate,
            "grad_norm": values.grad_norm,
            **self._metrics(values.metrics, examples),
            "tokens_per_second": round(tokens / queued.seconds, 1),
            "stall_seconds": round(queued.stall_seconds, 4),
            "time": round(time.time(), 3),
        }
        skipped = (*self._skipped, *(() if values.taken else (done,)))
        facts = StepFacts(
            done, plan.examples_seen(done), skipped, json.dumps(finite(record)), watch=self._watch(queued.step)
        )
        return facts if queued.held_out is None else with_held_out(facts, queued.held_out, self.patience)

    def _watch(self, step: int) -> Watch | None:
        """Return the count of `evaluate.patience` after the last evaluation up to a step."""
        return self._watches[max(counted for counted in self._watches if counted <= step)]

    def count(self, facts: StepFacts) -> bool:
        """Remember the count after a step's evaluation; return whether the run's patience is over."""
        self._watches[facts.step] = facts.watch
        return self.patience.is_over(facts.watch)

    def _metrics(self, means: Mapping[str, float], examples: Sequence[int]) -> dict[str, Any]:
        """Return the objective's metrics of a step, with those of the sources of a mixture under `sources`.

        The metric of a source is its summed loss divided by the weight of the whole step.
        """
        names, data, objective = [*self._job.facts.data.sources], self._job.inputs.data.train, self._job.objective
        figures = dict(objective.figures(means))
        if not names:
            return figures
        trained = dict.fromkeys(names, 0)
        for example, source in zip(examples, self._job.plan.sources_of(examples), strict=True):
            trained[names[source]] += objective.weight(data, [example])
        total = sum(trained.values())
        sources = {
            name: {"loss": means[metric_of(name)] * total / count if count else None, objective.unit: count}
            for name, count in trained.items()
        }
        others = {key: value for key, value in figures.items() if key not in map(metric_of, names)}
        return others | {"sources": sources}

    def settle(self, queued: QueuedStep) -> bool:
        """Write the line of a step once its snapshot is published; return whether any process wants to stop."""
        facts = self._publisher.wait_published() or self.facts(queued)
        self._skipped = facts.skipped_steps
        if self._job.processes.is_main:
            record, journal = json.loads(facts.line), self._job.journal
            if facts.skipped:
                self._report_skipped(queued)
            self.write(record)
            self.show_fault()
            if journal.trouble and len(journal.late) % LATE_LINES == 1:
                self._console.warn(journal.trouble)
        return queued.values().stop

    def show_fault(self) -> None:
        """Show the keeper's last fault if it is new."""
        if fault := self._publisher.new_fault():
            self._console.warn(fault)

    def _report_skipped(self, queued: QueuedStep) -> None:
        values, done = queued.values(), queued.step + 1
        loss, norm = str(values.loss), str(values.grad_norm)
        examples = sorted(example for group in self._job.plan.micro_batches(queued.step) for example in group)
        self._job.journal.event("skipped", step=done, loss=loss, grad_norm=norm, examples=examples)
        self._console.warn(
            f"step {done}: loss {loss}, gradient norm {norm}; the step is skipped and the adapter stays as it was; "
            "events.jsonl names its examples"
        )

    def write(self, record: dict[str, Any]) -> None:
        """Write a finished step's line to metrics.jsonl, the trackers and the console."""
        self._job.journal.metrics(record)
        self._job.trackers.log(record)
        self._console.step(record, self._job.plan.steps)

    def give_up_when_stuck(self, queued: QueuedStep) -> None:
        """End a run after more than `MOST_SKIPPED` skipped steps in a row, with the adapter from before them durable.

        Raises:
            PoisonError: This step and the `MOST_SKIPPED` steps before it were skipped.
        """
        job, good = self._job, queued.step - MOST_SKIPPED  # the last step before those that were skipped
        if self._skipped[-MOST_SKIPPED:] != tuple(range(good + 1, queued.step + 1)) or queued.values().taken:
            return
        if job.processes.is_main:
            job.journal.event("went back", step=good)  # later steps may be tried again with another recipe
        if good > job.start and not store.checkpoint_folder(job.run.folder, good).exists():
            self._skipped = self._skipped[:-MOST_SKIPPED]
            line = json.dumps(next(record for record in job.journal.read_metrics() if record["step"] == good))
            facts = StepFacts(good, job.plan.examples_seen(good), self._skipped, line, watch=self._watch(good))
            self._publisher.publish(lambda: facts, due=True)
            self._publisher.wait_durable()
        raise PoisonError(
            f"{job.run.folder}: no step from {good + 1} to {queued.step + 1} had a loss and a gradient that are finite "
            f"and within the recipe's bounds; the adapter is as after step {good}; lower optim.learning_rate, or look "
            "at the examples that events.jsonl names"
        )
