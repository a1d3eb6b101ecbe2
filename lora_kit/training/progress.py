"""What a step was: read from the device one step late, published with its state, and told once it is live.

A step's line in metrics.jsonl travels in its snapshot too, so that a run that ends between the two loses neither.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from lora_kit.errors import PoisonError
from lora_kit.runs import store
from lora_kit.runs.manifest import StepFacts
from lora_kit.training.job import Job
from lora_kit.training.publisher import Publisher
from lora_kit.views.console import Console

LATE_LINES = 50  # of the logs, between two warnings that they cannot be written
STUCK = 5  # so many skipped steps in a row, and one more, end a run


class StepValues(NamedTuple):
    """What a step computed, on the host.

    Attributes:
        loss: The mean loss of the step, over all processes.
        stop: Whether any process has heard a stop signal.
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
    read = copied_to_host(torch.stack([norm, taken, *sums]))

    def wait() -> StepValues:
        norm, taken, loss, stop, *more = read()
        return StepValues(loss, stop > 0, norm, taken > 0, dict(zip(metrics, more, strict=True)))

    return wait


def copied_to_host(on_device: Tensor) -> Callable[[], list[float]]:
    """Copy values from the device; calling the result waits for the copy and nothing that is queued later."""
    if not on_device.is_cuda:
        return on_device.tolist
    values, arrived = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True), torch.cuda.Event()
    values.copy_(on_device, non_blocking=True)
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        numbers: list[float] = values.tolist()
        return numbers

    return wait


@dataclass(frozen=True)
class Numbers:
    """A step that was queued: what is known of it at once, and `values`, which waits for the device."""

    step: int
    learning_rate: float
    values: Callable[[], StepValues]
    seconds: float
    stall_seconds: float
    held_out_loss: float | None = None


def step_facts(job: Job, numbers: Numbers) -> StepFacts:
    """Return the step's part of the manifest."""
    values = numbers.values()
    done = numbers.step + 1
    groups = job.plan.micro_batches(numbers.step)
    tokens = int(sum(job.data.train.lengths[group].sum() for group in groups))
    record = {
        "step": done,
        "examples": job.plan.examples_seen(done),
        "tokens": tokens,
        "loss": values.loss,
        "learning_rate": numbers.learning_rate,
        "grad_norm": values.grad_norm,
        **values.metrics,
        "tokens_per_second": round(tokens / numbers.seconds, 1),
        "stall_seconds": round(numbers.stall_seconds, 4),
        "time": round(time.time(), 3),
    }
    skipped = (*job.skipped, *(() if values.taken else (done,)))
    facts = StepFacts(done, job.plan.examples_seen(done), skipped, json.dumps(record))
    return facts if numbers.held_out_loss is None else with_held_out(facts, numbers.held_out_loss)


def with_held_out(facts: StepFacts, loss: float) -> StepFacts:
    """Return a step's facts with its held-out loss, in its line as well."""
    return replace(facts, held_out_loss=loss, line=json.dumps(json.loads(facts.line) | {"held_out_loss": loss}))


def settle(job: Job, numbers: Numbers, live: Publisher, console: Console) -> bool:
    """Write a step's line, now that it is live; return whether any process wants to stop."""
    facts = live.finished() or step_facts(job, numbers)
    done, record = numbers.step + 1, json.loads(facts.line)
    if facts.skipped:
        job.skipped.append(done)
        if job.processes.is_main:
            why = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
            ids = sorted(index for group in job.plan.micro_batches(numbers.step) for index in group)
            job.journal.event(
                "skipped", step=done, loss=str(record["loss"]), grad_norm=str(record["grad_norm"]), examples=ids
            )
            console.warn(
                f"step {done}: {why}; it is skipped and the adapter stays as it was; events.jsonl names its examples"
            )
    if job.processes.is_main:
        tell(job, record, console)
        if fault := live.new_fault():
            console.warn(fault)
        if job.journal.trouble and len(job.journal.late) % LATE_LINES == 1:
            console.warn(job.journal.trouble)
    return numbers.values().stop


def tell(job: Job, record: dict[str, Any], console: Console) -> None:
    """Write a finished step's line, and hand it to whoever follows."""
    job.journal.metrics(record)
    job.trackers.log(record)
    console.step(record, job.plan.steps)


def give_up_when_stuck(job: Job, numbers: Numbers, live: Publisher) -> None:
    """End a run in which no step has worked for a while; the adapter from before is durable.

    Raises:
        PoisonError: The last steps and this one were skipped.
    """
    first = numbers.step - STUCK  # so many steps were done before the first of them
    if job.skipped[-STUCK:] != list(range(first + 1, numbers.step + 1)) or numbers.values().taken:
        return
    if job.processes.is_main:
        job.journal.event("went back", step=first)  # what comes after it may be tried again with another recipe
    if first > job.start and not store.checkpoint_folder(job.run.folder, first).exists():
        job.skipped[-STUCK:] = []
        line = json.dumps(next(one for one in job.journal.read_metrics() if one["step"] == first))
        facts = StepFacts(first, job.plan.examples_seen(first), tuple(job.skipped), line)
        live.begin(lambda: facts, due=True)
        live.written()
    raise PoisonError(
        f"{job.run.folder}: no step from {first + 1} to {numbers.step + 1} had a loss and a gradient that are finite "
        f"and within the recipe's bounds; the adapter is as after step {first}; lower optim.learning_rate, or look at "
        "the examples that events.jsonl names"
    )
