"""The loop, top to bottom.

A step is a function of (recipe, step, state): which examples, in which micro-batches, with which random numbers and
which learning rate is computed, never remembered. The state is four flat buffers and the step's number; everything
else in this file moves it on by one, writes it down or shows it.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_kit.artifacts.answering import answer
from lora_kit.artifacts.hub import push_finished
from lora_kit.artifacts.locate import checkpoint_at
from lora_kit.data.order import micro_batch_seed
from lora_kit.data.packing import MicroBatch, collate, reduction_schedule
from lora_kit.errors import DivergenceError, Stopped
from lora_kit.model.state import LOSS, METRICS, STOP, refuse_unused
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import store
from lora_kit.runs.resume import OpenRun, open_run
from lora_kit.runs.run import Run, show, write_result
from lora_kit.runs.trackers import following, require
from lora_kit.supervise.stopping import Stop, stop_signals
from lora_kit.training import evaluation, optim
from lora_kit.training.job import Job, prepare_job
from lora_kit.training.processes import Processes
from lora_kit.training.profiling import part, profiled
from lora_kit.training.progress import (
    Numbers,
    give_up_when_stuck,
    settle,
    step_facts,
    step_values,
    tell,
    with_held_out,
)
from lora_kit.training.publisher import Publisher, publishing
from lora_kit.views.console import Console

AGREE_EVERY = 10  # steps between two comparisons of the processes' states
SAMPLES = 2  # answers that an evaluation on the way writes to the log


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    accept: Sequence[str] = (),
    start_from: str | Path | None = None,
    profile: bool = False,
) -> Run:
    """Train a recipe into a run's folder, going on where an earlier call stopped.

    Args:
        recipe: From `load_recipe`.
        out: The run's folder.
        accept: Keys of the resume contract whose change is wanted, e.g. `optim.learning_rate`.
        start_from: A checkpoint, a run or a Hub name whose adapter a new run begins with; or one of this run's own
            checkpoints to go back to (newer ones are set aside, not deleted).
        profile: Tell where the time of a few steps goes, in the run's folder `profile`.

    Raises:
        InputError: Recipe, data, base, launcher or folder cannot work; nothing was changed.
        Stopped: A signal came; the last finished step is durable and the same call goes on.
        CheckpointError: The final checkpoint could not be written.
    """
    processes = Processes.start(recipe.base.dtype)
    console = Console(silent=not processes.is_main)
    processes.main_decides(lambda: require(recipe.track.names))
    with (
        stop_signals() as stop_wish,
        held(processes, Path(out), start_from, console) as run,
        following(run.folder, console) as trackers,
        publishing(prepare_job(recipe, run, processes, console, trackers, accept=accept), stop_wish) as (job, live),
    ):
        state, plan, numbers = job.state, job.plan, None
        console.begin(plan.steps, job.start, job.journal.read_metrics())
        catch_up(job, live, console)
        for step in profiled(range(job.start, plan.steps), job, console, wanted=profile):
            began, done = time.perf_counter(), step + 1
            partial_sums: list[Tensor] = []
            # 1. this process's micro-batches; each gradient is divided by the weight of the whole step
            for batch, weight, merges in my_micro_batches(job, step):
                live.alive()
                loss = part("loss", job.objective.loss)(job.model, batch, processes.device).divided(weight)
                part("rest of backward", loss.total.backward)()
                state.sums[LOSS], state.sums[STOP] = loss.total.detach(), float(stop_wish.is_set() or live.stop)
                for place, metric in enumerate(loss.metrics, start=METRICS):
                    state.sums[place] = metric
                part("reduction", add_to_tree)(partial_sums, state.reduced, merges)
            # 2. the sum over processes, in the order in which one process would have added
            part("reduction", sum_up)(job, partial_sums, step)
            if step == 0:
                refuse_unused(state)
            # 3. one update of the flat state, once the copy of the one before has ended
            stall = part("publishing", live.release)()
            rate, norm, taken = part("optimizer", update)(job, step)
            # 4. the numbers of the step before, now that this one is queued: nobody waits for the device
            stop = numbers is not None and settle(job, numbers, live, console)
            values = step_values(state.sums, norm, taken, job.objective.metrics)
            numbers = Numbers(step, rate, values, time.perf_counter() - began, stall)
            give_up_when_stuck(job, numbers, live)
            agree(job, done)
            # 5. live while the next step computes; durable when that is due
            measured, last = due(done, recipe.evaluate.every_steps), stop or done == plan.steps
            save = due(done, recipe.checkpoint.every_steps) or last
            part("publishing", live.begin)(partial(step_facts, job, numbers), due=save and not measured)
            state.reduced.zero_()
            if measured:
                live.finished()
                numbers = replace(numbers, held_out_loss=measure(job, done, live, console))
                live.begin(partial(step_facts, job, numbers), due=True)
            if last:
                stop, numbers = settle(job, numbers, live, console) or stop, None
                live.written()
                if stop:
                    raise stopped(job, done)
        finish(job, live, console, stop_wish)
        live.no_more_steps()
        if processes.is_main:
            push_finished(recipe, job.run.folder, console, pause=stop_wish.wait)
        console.end()
    return Run(Path(out))


@contextmanager
def held(processes: Processes, folder: Path, start_from: str | Path | None, console: Console) -> Iterator[OpenRun]:
    """Hold a run's folder for writing; the progress bar is taken away whatever happens."""
    run = processes.main_decides(lambda: open_run(folder, checkpoint_at(start_from) if start_from else None))
    try:
        for notice in run.notices:
            console.warn(notice)
        yield run
    finally:
        console.end()
        if processes.is_main:
            run.lease.release()
        processes.leave()


def my_micro_batches(job: Job, step: int) -> Iterator[tuple[MicroBatch, int, int]]:
    """Yield this process's micro-batches with the step's weight and the merges that follow each.

    The generator is seeded before each, so that dropout is the same whichever process runs it.
    """
    groups = part("data", job.plan.micro_batches)(step)
    weight = job.objective.weight(job.data.train, [index for group in groups for index in group])
    mine = range(job.processes.index, len(groups), job.processes.count)
    for place, merges in reduction_schedule(len(mine)):
        number = mine[place]
        torch.manual_seed(micro_batch_seed(job.recipe.train.seed, step, number))
        batch = part("data", collate)(job.data.train, groups[number], padded=job.plan.padded)
        yield batch, weight, merges


def add_to_tree(partial_sums: list[Tensor], gradient: Tensor, merges: int) -> None:
    """Add a leaf to the binary tree of `reduction_schedule` and empty the gradient for the next one."""
    total = partial_sums.pop().add_(gradient) if merges else gradient.clone()
    for _ in range(merges - 1):
        total = partial_sums.pop().add_(total)
    partial_sums.append(total)
    gradient.zero_()


def sum_up(job: Job, partial_sums: list[Tensor], step: int) -> None:
    """Replace the gradient by the sum over all micro-batches of the step, on every process."""
    if partial_sums:
        job.state.reduced.copy_(partial_sums.pop())
    sharing = min(job.processes.count, len(job.plan.micro_batches(step)))
    job.processes.tree_sum(job.state.reduced, contributors=sharing)


def update(job: Job, step: int) -> tuple[float, Tensor, Tensor]:
    """Clip and take one optimizer step, or none if it is poisoned.

    Returns:
        The learning rate, the gradient's norm before clipping, and whether the step was taken.
    """
    recipe, settings, state = job.recipe, job.recipe.optim, job.state
    gradient, loss = state.gradient, state.sums[LOSS]
    norm = optim.gradient_norm(gradient)
    if settings.max_grad_norm:
        optim.clip(gradient, norm, settings.max_grad_norm)
    rate = optim.learning_rate(settings, job.plan.examples_seen(step), job.plan.total)
    taken = torch.isfinite(norm) & torch.isfinite(loss)
    for value, most in ((loss, recipe.train.max_loss), (norm, recipe.train.max_norm)):
        if most is not None:
            taken &= value <= most
    if step + 1 in job.replayed:
        taken &= False
    optim.adamw(state.weights, gradient, state.moments, step=step, learning_rate=rate, optim=settings, taken=taken)
    return rate, norm, taken


def due(done: int, every: int | None) -> bool:
    """Return whether something that happens every so many steps happens after `done` steps."""
    return every is not None and done % every == 0


def measure(job: Job, done: int, live: Publisher, console: Console) -> float:
    """Return the adapter's held-out loss after `done` steps, and log its first answers."""

    def tick(what: str) -> None:
        live.alive()
        console.tick(what)

    held_out = evaluation.held_out_of(job.plan, job.objective, job.data, job.renderer)
    assert held_out is not None
    loss_alone, few = replace(held_out, prompts=()), held_out.prompts[:SAMPLES]
    score = evaluation.score(job.model, job.renderer, loss_alone, processes=job.processes, tick=tick)
    if job.processes.is_main and few:
        texts = answer(job.model, job.renderer.tokenizer, [one.ids for one in few], held_out.how)
        for one, text in zip(few, texts, strict=True):
            prompt = job.renderer.tokenizer.decode(one.ids)
            sample = {"step": done, "prompt": prompt, "expected": one.expected, "answer": text}
            job.journal.event("sample", **sample)
            job.trackers.log(sample)
    return score.loss


def catch_up(job: Job, live: Publisher, console: Console) -> None:
    """Do what an end in the middle left undone after the step that we go on from: its measurement and its line."""
    progress = job.progress
    if progress is None:
        return
    if due(job.start, job.recipe.evaluate.every_steps) and progress.held_out_loss is None:
        progress = with_held_out(progress, measure(job, job.start, live, console))
        live.begin(lambda: progress, due=True)
    if job.processes.is_main and job.journal.last_step() < job.start:
        tell(job, json.loads(progress.line), console)
    if job.start == job.plan.steps and not store.checkpoint_folder(job.run.folder, job.start).exists():
        live.begin(lambda: progress, due=True)
        live.written()


def agree(job: Job, done: int) -> None:
    """Compare the processes' states now and then, and before every checkpoint that is due.

    Raises:
        DivergenceError: They differ; says whose.
    """
    if job.processes.count == 1 or not (done % AGREE_EVERY == 0 or due(done, job.recipe.checkpoint.every_steps)):
        return
    different = job.processes.different(job.state.kept)
    if different:
        names = " and ".join(str(index) for index in different)
        raise DivergenceError(
            f"{job.run.folder}: after step {done} process {names} has another adapter or other moments than the rest, "
            "though all are computed from the same gradient: memory or a device is failing there; this step is not "
            "kept. Replace it, then go on from a checkpoint before it with --from"
        )


def stopped(job: Job, done: int) -> Stopped:
    """Note that a signal ended the run and return the error that says so."""
    if job.processes.is_main:
        job.journal.event("stopped", step=done)
    job.processes.barrier()
    return Stopped(
        f"{job.run.folder}: stopped by a signal after step {done} of {job.plan.steps}, which is durable; "
        "the same command goes on"
    )


def finish(job: Job, live: Publisher, console: Console, stop_wish: Stop) -> None:
    """Evaluate base and adapter, write result.json and show the table; done already, say so."""
    known = Run(job.run.folder).result
    if known.get("step") == job.plan.steps:
        console.say(
            f"{job.run.folder} has finished its {job.plan.steps} steps; nothing is left to do. To go on: "
            f"--set train.steps={2 * job.plan.steps} --accept train.steps"
        )
        if job.processes.is_main:
            job.journal.event("finished", step=job.plan.steps)
        show(Run(job.run.folder), job.recipe, console)
        return

    def tick(what: str) -> None:
        if stop_wish.is_set() or live.stop:
            raise stopped(job, job.plan.steps)
        live.alive()
        console.tick(what)

    held_out = evaluation.held_out_of(job.plan, job.objective, job.data, job.renderer)
    scores = {}
    if held_out is not None:
        scores = evaluation.compare(job.model, job.renderer, held_out, processes=job.processes, tick=tick)
    if job.processes.is_main:
        weights = sum(file.stat().st_size for file in job.source.folder.glob("*.safetensors"))
        write_result(Run(job.run.folder), job.plan.steps, evaluation.plain(scores), base_bytes=weights)
        job.journal.event("finished", step=job.plan.steps)
        console.end()
        show(Run(job.run.folder), job.recipe, console)
