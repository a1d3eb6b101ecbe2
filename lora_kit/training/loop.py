"""The loop, top to bottom.

A step is a function of (recipe, step, state): its examples, their micro-batches, its random numbers and its learning
rate are computed from the step's number, never remembered. The state is the weights and two moments, in flat buffers.
Everything else in this file advances the state by one step, records it or shows it.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_kit.artifacts.hub import push_finished
from lora_kit.artifacts.remotes import require_remote
from lora_kit.data.order import micro_batch_seed
from lora_kit.data.packing import MicroBatch, collate, reduction_schedule
from lora_kit.errors import CheckpointError, DivergenceError, LeaseError, LoraKitError, Stopped
from lora_kit.model.state import LOSS, METRICS, STOP, refuse_unused
from lora_kit.recipe.schema import EXACT_MATCH, Recipe
from lora_kit.runs import store
from lora_kit.runs.journal import short_cause
from lora_kit.runs.live import Live
from lora_kit.runs.run import Run, show, write_result
from lora_kit.runs.trackers import following, require
from lora_kit.supervise.stopping import StopRequest, stop_signals
from lora_kit.training import optim
from lora_kit.training.announce import announce
from lora_kit.training.answer_metrics import require_packages
from lora_kit.training.comparison import compare_estimate
from lora_kit.training.evaluation import HeldOut, HeldOutLoss, plain
from lora_kit.training.job import Job
from lora_kit.training.objectives.choose import objective_of
from lora_kit.training.objectives.objective import Objective
from lora_kit.training.processes import Processes
from lora_kit.training.profiling import part, profiled
from lora_kit.training.progress import QueuedStep, StepLog, step_values, with_held_out
from lora_kit.training.publisher import Publisher, publishing
from lora_kit.training.setup import (
    add_reference,
    add_text,
    build_model,
    check_contract,
    check_tokens,
    make_job,
    open_folder,
    read_inputs,
)
from lora_kit.views.console import Console

COMPARE_EVERY = 10  # steps between two comparisons of the states of all processes
SAMPLES = 2  # answers that an evaluation during training writes to the log


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    accept: Sequence[str] = (),
    start_from: str | Path | None = None,
    profile: bool = False,
) -> Run:
    """Train a recipe into a run's folder, resuming where an earlier call stopped.

    Args:
        recipe: From `load_recipe`.
        out: The run's folder.
        accept: Keys of the resume contract that may change, e.g. `optim.learning_rate`.
        start_from: A checkpoint, a run or a Hub name whose adapter a new run starts with; or a checkpoint of this run
            to go back to (newer checkpoints are moved aside, not deleted).
        profile: Profile a few steps and write the result to the folder `profile` of the run.

    Raises:
        InputError: Recipe, data, base, launcher or folder cannot work; nothing was trained, and no checkpoint moved.
        Stopped: A stop signal came; the last finished step is durable and the same call resumes.
        CheckpointError: The final checkpoint could not be written.
    """
    processes = Processes.start(recipe.base.dtype, recipe.launch)
    console = Console(silent=not processes.is_main)
    objective = objective_of(recipe)
    processes.main_decides(lambda: require(recipe.track.names))
    processes.main_decides(lambda: require_remote(recipe))
    processes.main_decides(lambda: require_packages(recipe.evaluate))
    with (
        stop_signals() as stop,
        open_folder(processes, Path(out), recipe, start_from, console) as run,
        following(run.folder, console) as trackers,
    ):
        # 1. the inputs: the files of the base, the tokenizer, the tokens
        inputs = read_inputs(recipe, processes, console)
        # 2. the resume contract: what has changed since the checkpoint, and whether it may
        rows = check_contract(recipe, run, inputs, processes, accept, console)
        check_tokens(recipe, run, inputs, processes, console)
        # 3. the base with the adapter, and the choices that depend on both
        changed = {row.key for row in rows}
        adapted = build_model(recipe, run, inputs, changed, objective, processes, console)
        inputs = add_reference(recipe, run, inputs, adapted, objective, processes, console, stop)
        inputs = add_text(recipe, inputs, adapted, objective, processes, console, console.tick)
        job = make_job(recipe, run, inputs, rows, adapted, objective, processes, trackers)
        announce(job, rows, accept, console)
        with logged_failures(job), publishing(job, stop) as publisher:
            state, plan, log, queued = job.state, job.plan, StepLog(job, publisher, console), None
            console.begin(plan.steps, job.start, job.journal.read_metrics())
            # 4. do what an interruption left undone after the last finished step
            ended = catch_up(job, log, publisher, console)
            end = job.start if ended else plan.steps
            processes.expect_steps()
            for step in profiled(range(job.start, end), job, console, wanted=profile):
                began, done = time.perf_counter(), step + 1
                partial_sums: list[Tensor] = []
                # 5. this process's micro-batches; each gradient is divided by the weight of the whole step
                publisher.heartbeat()
                of_step = objective.for_examples(inputs.data.train, plan.examples(step), job.computing)
                for batch, weight, merges in own_micro_batches(job, step):
                    publisher.heartbeat()
                    loss = part("loss", of_step.loss)(job.model, batch, processes.device).divided(weight)
                    part("rest of backward", loss.total.backward)()
                    state.sums[LOSS] = loss.total.detach()
                    state.sums[STOP] = float(stop.is_set() or publisher.stop_requested)
                    for place, metric in enumerate(loss.metrics, start=METRICS):
                        state.sums[place] = metric
                    part("reduction", add_to_tree)(partial_sums, state.reduced, merges)
                keep_pace(job, of_step, step)
                # 6. the sum over processes, in the order in which a single process would add
                part("reduction", reduce)(job, partial_sums, step)
                if step == 0:
                    refuse_unused(state)
                # 7. one optimizer step, once the snapshot of the step before is copied
                stall = part("publishing", publisher.wait_copied)()
                rate, norm, taken = part("optimizer", update)(job, step)
                # 8. the numbers of the step before, read after this step is queued, so that the device is never idle
                stopping = queued is not None and log.settle(queued)
                values = step_values(state.sums, norm, taken, objective.metrics)
                queued = QueuedStep(step, rate, values, time.perf_counter() - began, stall)
                log.give_up_when_stuck(queued)
                compare_states(job, done)
                # 9. a live snapshot, copied while the next step computes; a checkpoint when it is due
                evaluating, last = due(done, recipe.evaluate.every_steps), stopping or done == plan.steps
                saving = due(done, recipe.checkpoint.every_steps) or last
                part("publishing", publisher.publish)(partial(log.facts, queued), due=saving and not evaluating)
                state.reduced.zero_()
                if evaluating:
                    publisher.wait_published()
                    processes.expect_no_steps()
                    queued = replace(queued, held_out=held_out_loss(job, done, publisher, console))
                    ended = log.count(log.facts(queued))
                    publisher.publish(partial(log.facts, queued), due=True)
                    processes.expect_steps()
                compare_estimate(job, done, publisher.heartbeat, console)
                if last or ended:
                    stopping, queued = log.settle(queued) or stopping, None
                    publisher.wait_durable()
                    log.show_fault()
                    if stopping:
                        raise stopped(job, done)
                if ended:
                    end = done
                    break
            # 10. the end: the final evaluation, result.json, the Hub
            processes.expect_no_steps()
            finish(job, end, publisher, console, stop)
            publisher.expect_no_steps()
            if processes.is_main:
                push_finished(recipe, run.folder, console, pause=stop.wait)
            console.end()
        if fault := publisher.new_fault():  # after the last step, e.g. an upload that did not end in time
            console.warn(fault)
    return Run(Path(out))


@contextmanager
def logged_failures(job: Job) -> Iterator[None]:
    """Write an error that ends the run to events.jsonl, unless `lora-kit train` is the keeper, which does that."""
    try:
        yield
    except (Stopped, LeaseError):
        raise
    except Exception as error:
        if job.processes.is_main and not job.run.lease.borrowed:
            with suppress(LoraKitError):
                kind = "" if isinstance(error, LoraKitError) else f"{type(error).__name__}: "
                job.journal.event("failed", step=job.journal.last_step(), cause=short_cause(f"{kind}{error}"))
        raise


def own_micro_batches(job: Job, step: int) -> Iterator[tuple[MicroBatch, int, int]]:
    """Yield the micro-batches of this process, each with the weight of the whole step and a number of merges.

    The merges are those of `reduction_schedule`. Torch's random generator is seeded before each micro-batch, so dropout
    does not depend on the process that computes it.
    """
    data = job.inputs.data.train
    groups = part("data", job.plan.micro_batches)(step)
    weight = job.objective.weight(data, [example for group in groups for example in group])
    own = range(job.processes.index, len(groups), job.processes.count)
    for place, merges in reduction_schedule(len(own)):
        number = own[place]
        torch.manual_seed(micro_batch_seed(job.recipe.train.seed, step, number))
        sources = job.plan.sources_of(groups[number])
        yield part("data", collate)(data, groups[number], padded=job.plan.padded, sources=sources), weight, merges


def keep_pace(job: Job, objective: Objective, step: int) -> None:
    """Compute an extra micro-batch if the base is sharded and other processes have one more in this step.

    Gathering the layers needs every process. The gradient is not used: `reduce` overwrites or leaves it out.
    """
    for group in job.computing.for_nothing(job.plan.micro_batches(step)):
        batch = collate(job.inputs.data.train, group, padded=job.plan.padded, sources=job.plan.sources_of(group))
        objective.loss(job.model, batch, job.processes.device).total.backward()


def add_to_tree(partial_sums: list[Tensor], reduced: Tensor, merges: int) -> None:
    """Add a leaf to the binary tree of `reduction_schedule`, and zero the buffer for the next leaf."""
    total = partial_sums.pop().add_(reduced) if merges else reduced.clone()
    for _ in range(merges - 1):
        total = partial_sums.pop().add_(total)
    partial_sums.append(total)
    reduced.zero_()


def reduce(job: Job, partial_sums: list[Tensor], step: int) -> None:
    """Put the sum over all micro-batches of the step into the state, on every process."""
    if partial_sums:
        job.state.reduced.copy_(partial_sums.pop())
    contributors = min(job.processes.count, len(job.plan.micro_batches(step)))
    job.processes.tree_sum(job.state.reduced, contributors=contributors)


def update(job: Job, step: int) -> tuple[float, Tensor, Tensor]:
    """Clip the gradient and take one optimizer step, unless the step is skipped.

    A step is skipped if its loss or gradient is not finite or exceeds the recipe's bounds, or if it was skipped before
    an interruption.

    Returns:
        The learning rate, the norm of the gradient before clipping, and whether the step was taken.
    """
    recipe, settings, state = job.recipe, job.recipe.optim, job.state
    gradient, loss = state.gradient, state.sums[LOSS]
    norm = torch.linalg.vector_norm(gradient)
    if settings.max_grad_norm:
        optim.clip(gradient, norm, settings.max_grad_norm)
    rate = optim.learning_rate(settings, job.plan.examples_seen(step), job.plan.total)
    taken = torch.isfinite(norm) & torch.isfinite(loss)
    for value, bound in ((loss, recipe.train.max_loss), (norm, recipe.train.max_norm)):
        if bound is not None:
            taken &= value <= bound
    if step + 1 in job.replayed:
        taken &= False
    take_step = optim.adamw_8bit if settings.name == "adamw-8bit" else optim.adamw
    take_step(
        state.weights,
        gradient,
        state.moments,
        step=step,
        learning_rate=rate,
        optim=settings,
        taken=taken,
        ranges=state.ranges,
    )
    return rate, norm, taken


def due(done: int, every: int | None) -> bool:
    """Return whether `done` finished steps are a multiple of `every`; None is never due."""
    return every is not None and done % every == 0


def held_out_loss(job: Job, done: int, publisher: Publisher, console: Console) -> HeldOutLoss:
    """Return the adapter's held-out loss after `done` steps, and log its answers to the first prompts."""

    def tick(what: str) -> None:
        publisher.heartbeat()
        console.tick(what)

    held_out, data = held_out_of(job), job.inputs.data
    assert data.validation is not None
    measures_answers = job.recipe.evaluate.metric in (EXACT_MATCH, *job.recipe.evaluate.metrics)
    found, prompts = held_out.measure(data.validation, tick, answers=measures_answers), data.prompts[:SAMPLES]
    answers = held_out.answers(prompts) if prompts and (job.processes.is_main or held_out.in_step) else []
    if job.processes.is_main:
        for prompt, text in zip(prompts, answers, strict=True):
            rendered = job.inputs.renderer.tokenizer.decode(prompt.ids)
            sample = {"step": done, "prompt": rendered, "expected": prompt.expected, "answer": text}
            job.journal.event("sample", **sample)
            job.trackers.log(sample)
    if not math.isfinite(found.mean):
        told = f"step {done}: the held-out loss is {found.mean}; it is stored as null, and training continues"
        console.warn(told)
        if job.processes.is_main:
            job.journal.event("fault", step=done, what=told)
    return found


def held_out_of(job: Job) -> HeldOut:
    """Return the measurement of a job's model on its validation data."""
    inputs, settings = job.inputs, job.recipe.evaluate
    measured = (job.model, inputs.renderer, inputs.data, job.plan, job.objective, job.processes, settings)
    return HeldOut(*measured, inputs.text, job.state)


def catch_up(job: Job, log: StepLog, publisher: Publisher, console: Console) -> bool:
    """Do what an interruption left undone for the step that the run resumes after: evaluation, log line, checkpoint.

    Returns:
        Whether the run has ended early after this step.
    """
    facts = job.resumed
    if facts is None:
        return False
    restored = facts
    if isinstance(job.run.latest, Live) and not publisher.has(job.run.latest):  # the snapshot is another machine's
        publisher.publish(lambda: restored, due=False)
    if due(job.start, job.recipe.evaluate.every_steps) and not facts.measured:
        facts = with_held_out(facts, held_out_loss(job, job.start, publisher, console), log.patience)
        publisher.publish(lambda: facts, due=True)
    ended = log.count(facts)
    if job.processes.is_main and job.journal.last_step() < job.start:
        log.write(json.loads(facts.line))
    is_last = ended or job.start == job.plan.steps
    if is_last and not store.checkpoint_folder(job.run.folder, job.start).exists():
        publisher.publish(lambda: facts, due=True)
        publisher.wait_durable()
    return ended


def compare_states(job: Job, done: int) -> None:
    """Compare the states of all processes every `COMPARE_EVERY` steps and before every checkpoint that is due.

    Raises:
        DivergenceError: The states differ; the message names the processes.
    """
    if job.processes.count == 1 or not (done % COMPARE_EVERY == 0 or due(done, job.recipe.checkpoint.every_steps)):
        return
    different = job.processes.different(job.state.kept)
    if different:
        names = " and ".join(str(index) for index in different)
        raise DivergenceError(
            f"{job.run.folder}: after step {done} process {names} has another adapter or other moments than the rest, "
            "though all are computed from the same gradient: memory or a device is failing there; this step is not "
            "kept. Replace the faulty hardware, then go on from an earlier checkpoint with --from"
        )


def stopped(job: Job, done: int) -> Stopped:
    """Log that a signal ended the run, and return the error that says so."""
    if job.processes.is_main:
        job.journal.event("stopped", step=done)
    job.processes.barrier()
    return Stopped(
        f"{job.run.folder}: stopped by a signal after step {done} of {job.plan.steps}, which is durable; "
        "the same command resumes it"
    )


def finished_step(run: Run, console: Console) -> int | None:
    """Return the step of result.json; None if it is missing, or damaged so that it must be written again."""
    try:
        return run.result.get("step")
    except CheckpointError as error:
        console.warn(f"{error}; it is written again")
        return None


def finish(job: Job, end: int, publisher: Publisher, console: Console, stop: StopRequest) -> None:
    """Evaluate base and adapter, write result.json and show the table; for a run that is finished already, say so.

    Args:
        job: The job.
        end: The last step, which is before the last of the plan if `evaluate.patience` has ended the run.
        publisher: Gets signs of life.
        console: Shows the table.
        stop: Whether a stop signal has come.
    """
    run, early, patience = Run(job.run.folder), end < job.plan.steps, job.recipe.evaluate.patience
    if early:
        console.say(
            f"{run.folder} ends after step {end} of {job.plan.steps}: {patience} evaluations in a row without a better "
            f"{job.recipe.evaluate.metric} (evaluate.patience)"
        )
    if finished_step(run, console) == end:
        epochs = job.recipe.train.epochs
        key, value = ("train.steps", 2 * job.plan.steps) if epochs is None else ("train.epochs", 2 * epochs)
        more = f"--set evaluate.patience={2 * (patience or 1)}" if early else f"--set {key}={value} --accept {key}"
        console.say(f"{run.folder} has finished its {end} steps; nothing is left to do. To go on: {more}")
        if job.processes.is_main:
            job.journal.event("finished", step=end)
        show(run, job.recipe, console)
        return

    def tick(what: str) -> None:
        if stop.is_set() or publisher.stop_requested:
            raise stopped(job, end)
        publisher.heartbeat()
        console.tick(what)

    scores = held_out_of(job).compare(tick)
    if job.processes.is_main:
        job.run.lease.require()
        write_result(run, end, plain(scores), base_bytes=job.inputs.source.weight_bytes)
        job.journal.event("finished", step=end)
        console.end()
        show(run, job.recipe, console)
