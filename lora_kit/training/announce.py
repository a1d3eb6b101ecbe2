"""The beginning of a run: written to its logs, shown on the console, sent to the trackers."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lora_kit.artifacts.hub import push_notes
from lora_kit.data.plan import table as table_of_mixture
from lora_kit.files import read_regular, write_atomically
from lora_kit.kernels import fusing
from lora_kit.kernels.nf4 import Nf4Linear
from lora_kit.recipe.load import dump
from lora_kit.runs.lease import START_REQUESTED, borrowed_lease
from lora_kit.runs.live import Live
from lora_kit.runs.origin import PlainAdapter
from lora_kit.runs.resume import Row, table
from lora_kit.runs.trackers import STATE, Curves, tracker_id
from lora_kit.training.job import Job
from lora_kit.training.micro_batches import MicroBatches
from lora_kit.views.console import Console


def announce(job: Job, rows: Sequence[Row], accept: Sequence[str], console: Console) -> None:
    """Start the logs and the trackers of a run on the main process, and say what will be trained."""
    if not job.processes.is_main:
        return
    job.run.lease.require()  # loading may have taken so long that the lease is lost
    start_trackers(job)
    keep_recipe(job, console)
    log_start(job, rows, accept, console)
    describe(job, console)


def start_trackers(job: Job) -> None:
    """Cut the journal back to the step that the run goes on from, and let the trackers follow it from there."""
    run, settings, fingerprints = job.run, job.recipe.track, asdict(job.facts.fingerprints)
    run_id = run.run_id
    if settings.names or (run.folder / STATE).is_file():
        run_id = tracker_id(
            run.folder, run.run_id, start=job.start, reached=run.reached, recipe=job.recipe, fingerprints=fingerprints
        )
    measured = job.resumed is not None and job.resumed.measured
    job.journal.cut(job.start, samples=job.start if measured else job.start - 1)
    sections = job.facts.recipe | {"fingerprints": fingerprints, "versions": job.facts.versions}
    facts = {
        f"{section}.{key}": str(value) if isinstance(value, (list, dict)) else value
        for section, fields in sections.items()
        for key, value in fields.items()
    }
    name = settings.run or run.folder.resolve().name
    job.trackers.begin(settings.names, Curves(settings.project, name, run_id, run.folder, facts), job.journal)


def keep_recipe(job: Job, console: Console) -> None:
    """Write recipe.yaml, unless it exists with the same content. A failure is a warning: manifests have the recipe."""
    path, content = job.run.folder / "recipe.yaml", dump(job.recipe).encode()
    with suppress(OSError):
        if read_regular(path, len(content)) == content:
            return
    try:
        write_atomically(path, content)
    except OSError as error:
        console.warn(f"{path}: not written: {error.strerror}")


def log_start(job: Job, rows: Sequence[Row], accept: Sequence[str], console: Console) -> None:
    """Write the event of a start or a resume; show what a resume was compared with."""
    run, origin = job.run, job.facts.origin
    facts: dict[str, Any] = {
        "step": job.start,
        "steps": job.plan.steps,
        "processes": job.processes.count,
        "launched": run.lease.record.taken,
        "seconds": start_seconds(console.began),
        "reached": run.reached,
    }
    if run.latest is not None:
        job.journal.event("resumed", **facts, run_id=run.run_id, from_live=isinstance(run.latest, Live))
        console.say(
            f"resuming {run.folder} after step {job.start} of {job.plan.steps}; "
            "comparison with the checkpoint of that step:"
        )
        console.say(table(rows, accept))
        return
    job.journal.event("started", **facts, run_id=run.run_id, origin=origin and asdict(origin))
    if run.origin is not None:
        console.say(f"starts with the adapter of {run.origin.path}; its moments and steps are not taken over")
    if isinstance(run.origin, PlainAdapter):
        console.warn(
            f"{run.origin.path}: another program trained this adapter, so nothing verifies that its base was "
            f"{job.recipe.base.repo}; its adapter_config.json names {run.origin.base or 'no base'}"
        )


def start_seconds(began: Mapping[str, float]) -> dict[str, float]:
    """Return how long each part of the start took, in seconds.

    Args:
        began: The Unix time at which each part began, in order. Under `lora-kit train` a part `start` precedes them. It
            begins when the keeper requests this process, so it contains the fork or the imports.
    """
    marks = {"start": float(os.environ[START_REQUESTED])} if borrowed_lease() else {}
    marks |= began
    ends = [*list(marks.values())[1:], time.time()]
    return {name: round(end - begin, 3) for (name, begin), end in zip(marks.items(), ends, strict=True)}


def describe(job: Job, console: Console) -> None:
    """Show the base, the data, the processes and the choices of a run, with every warning about them."""
    resolved, counts = job.facts.resolved, job.facts.data.train
    trainable, total = job.model.get_nb_trainable_parameters()  # peft counts bitsandbytes' weights in 4 bits correctly
    total += sum(layer.uncounted for layer in job.model.modules() if isinstance(layer, Nf4Linear))
    share = trainable / (total - trainable)
    console.say(f"base {job.recipe.base.repo}: {trainable:,} trainable parameters ({share:.2%} of the base's)")
    console.say(
        f"data: {counts.examples:,} examples ({counts.format}), {counts.tokens:,} tokens, {counts.trained_share:.0%} "
        "of them trained"
    )
    if mixture := job.plan.mixed(job.facts.data.sources):
        console.say(table_of_mixture(mixture))
    unseen = job.plan.unseen_notes(job.facts.data.sources)
    for note in [*unseen, *job.inputs.data.notes, *push_notes(job.recipe)]:
        console.warn(note)
    if job.plan.padded:
        console.warn(
            "this model mixes examples that are packed into one row, so it trains on padded rows, which is slower"
        )
    if idleness := job.plan.idleness_note(job.processes.count):
        console.warn(idleness)
    threads = f", {resolved.threads} thread(s) each" if resolved.threads else ""
    rows = "packed rows with shared prompts" if resolved.layout == "shared" else f"{resolved.layout} rows"
    exact = "to the bit" if job.facts.claim.level == "bitwise" else "to rounding"
    console.say(
        f"{job.processes.count} process(es) on {job.processes.device.type}{threads}; {rows}, "
        f"{resolved.attention} attention; a resume is exact {exact}"
    )
    micro_batches = MicroBatches(job.plan.micro_batch_tokens, bool(resolved.activation_checkpointing))
    console.say(f"micro-batches: {micro_batches}; fast path: {fusing.about(job.model, resolved.kernels or ())}")
