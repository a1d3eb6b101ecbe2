"""The loop, top to bottom.

A step is a function of (recipe, step, state): which examples, in which micro-batches, with which random numbers and
which learning rate is computed, never remembered. The state is four flat buffers and the step's number; everything
else in this file moves it on by one, writes it down or shows it.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from safetensors.numpy import save as safetensors_bytes
from torch import Tensor

from lora_kit import evaluation, optim
from lora_kit.adapter import LOSS, STOP, refuse_unreached, saved_config
from lora_kit.checkpoint import store
from lora_kit.checkpoint.resume import OpenRun, open_run
from lora_kit.checkpoint.store import ADAPTER, ADAPTER_CONFIG, OPTIMIZER
from lora_kit.console import Console
from lora_kit.data.order import micro_batch_seed
from lora_kit.data.packing import MicroBatch, collate, reduction_schedule
from lora_kit.errors import CheckpointError, PoisonError, Stopped
from lora_kit.generation import answer
from lora_kit.hub import checkpoint_at, push_finished
from lora_kit.job import Job, prepare_job
from lora_kit.objective import sft
from lora_kit.processes import Processes
from lora_kit.recipe import Recipe
from lora_kit.run import Run, show, write_result
from lora_kit.trackers import following, require

FORWARDED_SECONDS = 2.0  # a signal that comes again so soon is a launcher passing on what its processes had heard
STUCK = 5  # so many skipped steps in a row, and one more, end a run
SAMPLES = 2  # answers that an evaluation on the way writes to the log


def train(recipe: Recipe, out: str | Path, *, accept: Sequence[str] = (), start_from: str | Path | None = None) -> Run:
    """Train a recipe into a run's folder, going on where an earlier call stopped.

    Args:
        recipe: From `load_recipe`.
        out: The run's folder.
        accept: Keys of the resume contract whose change is wanted, e.g. `optim.learning_rate`.
        start_from: A checkpoint, a run or a Hub name whose adapter a new run begins with; or one of this run's own
            checkpoints to go back to (newer ones are set aside, not deleted).

    Raises:
        InputError: Recipe, data, base, launcher or folder cannot work; nothing was changed.
        Stopped: A signal came; the last finished step is durable and the same call goes on.
        CheckpointError: The final checkpoint could not be written.
    """
    processes = Processes.start(recipe.base.dtype)
    console = Console(silent=not processes.is_main)
    processes.main_decides(lambda: require(recipe.track.names))
    with (
        stop_signals() as stop_wanted,
        held(processes, Path(out), start_from, console) as run,
        following(run.folder, console) as trackers,
    ):
        job = prepare_job(recipe, run, processes, console, trackers, accept=accept)
        state, plan = job.state, job.plan
        numbers, stall = None, 0.0
        console.begin(plan.steps, job.start, job.journal.read_metrics())
        for step in range(job.start, plan.steps):
            began = time.perf_counter()
            partial_sums: list[Tensor] = []
            # 1. this process's micro-batches; each gradient is divided by the weight of the whole step
            for batch, weight, merges in my_micro_batches(job, step):
                loss = sft(job.model, batch, processes.device) / weight
                loss.backward()
                state.gradient[LOSS] = loss.detach()
                state.gradient[STOP] = float(stop_wanted.is_set())
                add_to_tree(partial_sums, state.gradient, merges)
            # 2. the sum over processes, in the order in which one process would have added
            if partial_sums:
                state.gradient.copy_(partial_sums.pop())
            processes.tree_sum(state.gradient, contributors=min(processes.count, len(plan.micro_batches(step))))
            if step == 0:
                refuse_unreached(state)
            # 3. one update of the flat state
            norm, rate = update(job, step)
            # 4. the numbers of the step before, now that this one is queued: nobody waits for the device
            stop = numbers is not None and settle(job, numbers, console)
            numbers = Numbers(step, rate, norm, state.gradient[[LOSS, STOP]], time.perf_counter() - began, stall)
            give_up_when_stuck(job, numbers, console)
            state.gradient.zero_()
            # 5. durable
            stall, done = 0.0, step + 1
            held_out = measure(job, done, console) if due(done, recipe.evaluate.every_steps) else None
            if stop or held_out or due(done, recipe.checkpoint.every_steps) or done == plan.steps:
                stop, numbers = settle(job, numbers, console, held_out) or stop, None
                stall = save(job, done, console, held_out)
                if stop:
                    raise stopped(job, done)
        finish(job, console, stop_wanted)
        if processes.is_main:
            push_finished(recipe, job.run.folder, console, pause=stop_wanted.wait)
        console.end()
    return Run(Path(out))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn SIGTERM, SIGUSR1 and SIGINT (a notebook's stop button) into an event while the run lasts."""
    wanted, first = threading.Event(), time.monotonic()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not wanted.is_set():
            first = time.monotonic()
        elif time.monotonic() - first > FORWARDED_SECONDS:  # a second signal does not wait for the step
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        wanted.set()

    if threading.current_thread() is not threading.main_thread():
        yield wanted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    groups = job.plan.micro_batches(step)
    weight = sum(job.data.train.weight(index) for group in groups for index in group)
    mine = range(job.processes.index, len(groups), job.processes.count)
    for place, merges in reduction_schedule(len(mine)):
        number = mine[place]
        torch.manual_seed(micro_batch_seed(job.recipe.train.seed, step, number))
        yield collate(job.data.train, groups[number], padded=job.plan.padded), weight, merges


def add_to_tree(partial_sums: list[Tensor], gradient: Tensor, merges: int) -> None:
    """Add a leaf to the binary tree of `reduction_schedule` and empty the gradient for the next one."""
    total = partial_sums.pop().add_(gradient) if merges else gradient.clone()
    for _ in range(merges - 1):
        total = partial_sums.pop().add_(total)
    partial_sums.append(total)
    gradient.zero_()


def update(job: Job, step: int) -> tuple[Tensor, float]:
    """Clip and take one optimizer step; return the gradient's norm before clipping and the learning rate."""
    settings, state = job.recipe.optim, job.state
    gradient = state.gradient[: state.size]
    norm = optim.gradient_norm(gradient)
    if settings.max_grad_norm:
        optim.clip(gradient, norm, settings.max_grad_norm)
    rate = optim.learning_rate(settings, job.plan.examples_seen(step), job.plan.total)
    taken = torch.isfinite(norm) & torch.isfinite(state.gradient[LOSS])
    optim.adamw(state.weights, gradient, state.moments, step=step, learning_rate=rate, optim=settings, taken=taken)
    return norm, rate


@dataclass(frozen=True)
class Numbers:
    """What one step was, still on the device."""

    step: int
    learning_rate: float
    grad_norm: Tensor
    loss_and_stop: Tensor
    seconds: float
    stall_seconds: float


def due(done: int, every: int | None) -> bool:
    """Return whether something that happens every so many steps happens after `done` steps."""
    return every is not None and done % every == 0


def measure(job: Job, done: int, console: Console) -> float:
    """Return the adapter's held-out loss after `done` steps, and log its first answers."""
    held_out = evaluation.held_out_of(job.recipe, job.data, job.renderer, padded=job.plan.padded)
    assert held_out is not None
    loss_alone, few = replace(held_out, prompts=()), held_out.prompts[:SAMPLES]
    score = evaluation.score(job.model, job.renderer, loss_alone, processes=job.processes, tick=console.tick)
    if job.processes.is_main and few:
        texts = answer(job.model, job.renderer.tokenizer, [one.ids for one in few], held_out.how)
        for one, text in zip(few, texts, strict=True):
            prompt = job.renderer.tokenizer.decode(one.ids)
            sample = {"step": done, "prompt": prompt, "expected": one.expected, "answer": text}
            job.journal.event("sample", **sample)
            job.trackers.log(sample)
    return score.loss


def settle(job: Job, numbers: Numbers, console: Console, held_out_loss: float | None = None) -> bool:
    """Write a finished step's line; return whether any process wants to stop."""
    loss, stop = numbers.loss_and_stop.tolist()
    groups = job.plan.micro_batches(numbers.step)
    tokens = int(sum(job.data.train.lengths[group].sum() for group in groups))
    norm = float(numbers.grad_norm)
    if not math.isfinite(loss + norm):
        job.skipped.append(numbers.step + 1)
        if job.processes.is_main:
            ids = sorted(index for group in groups for index in group)
            job.journal.event("skipped", step=numbers.step + 1, loss=str(loss), grad_norm=str(norm), examples=ids)
            console.warn(
                f"step {numbers.step + 1}: loss {loss}, gradient norm {norm}; it is skipped and the adapter stays as "
                "it was; events.jsonl names its examples"
            )
    if job.processes.is_main:
        record = {
            "step": numbers.step + 1,
            "examples": job.plan.examples_seen(numbers.step + 1),
            "tokens": tokens,
            "loss": loss,
            "learning_rate": numbers.learning_rate,
            "grad_norm": norm,
            "tokens_per_second": round(tokens / numbers.seconds, 1),
            "stall_seconds": round(numbers.stall_seconds, 4),
        }
        if held_out_loss is not None:
            record["held_out_loss"] = held_out_loss
        job.journal.metrics(record)
        job.trackers.log(record)
        console.step(record, job.plan.steps)
    return stop > 0


def give_up_when_stuck(job: Job, numbers: Numbers, console: Console) -> None:
    """End a run in which no step has worked for a while; the adapter from before is durable.

    Raises:
        PoisonError: The last steps and this one had a loss or a gradient that is no number.
    """
    first = numbers.step - STUCK  # so many steps were done before the first of them
    if job.skipped[-STUCK:] != list(range(first + 1, numbers.step + 1)):
        return
    if math.isfinite(sum(numbers.loss_and_stop[:1].tolist()) + float(numbers.grad_norm)):
        return
    if first > job.start and not store.checkpoint_folder(job.run.folder, first).exists():
        job.skipped[-STUCK:] = []
        save(job, first, console)
    raise PoisonError(
        f"{job.run.folder}: no finite loss or gradient in steps {first + 1} to {numbers.step + 1}; the adapter is as "
        f"after step {first}; lower optim.learning_rate, or look at the examples that events.jsonl names"
    )


def save(job: Job, done: int, console: Console, held_out_loss: float | None = None) -> float:
    """Commit a checkpoint after `done` steps; return the seconds the loop waited.

    A full or failing disk does not end the run: the earlier checkpoints are untouched, the failure is said each time.
    """
    began = time.perf_counter()
    job.state.assert_views()
    if job.processes.is_main:
        files = {
            ADAPTER: safetensors_bytes(job.state.adapter_arrays(), metadata={"format": "pt"}),
            ADAPTER_CONFIG: (json.dumps(saved_config(job.model), indent=2) + "\n").encode(),
            OPTIMIZER: safetensors_bytes(job.state.optimizer_arrays()),
        }
        moving = {
            "step": done,
            "examples_seen": job.plan.examples_seen(done),
            "skipped_steps": job.skipped,
            "held_out_loss": held_out_loss,
        }
        try:
            committed = store.commit(job.run.folder, files, job.manifest | moving)
            store.prune(job.run.folder, job.recipe.checkpoint.keep, best=job.recipe.checkpoint.best)
            job.journal.event("checkpoint", step=done, bytes=committed.size, seconds=time.perf_counter() - began)
        except CheckpointError as error:
            job.journal.event("fault", step=done, what=str(error))
            console.warn(str(error))
            if done == job.plan.steps:
                raise
    return time.perf_counter() - began


def stopped(job: Job, done: int) -> Stopped:
    """Note that a signal ended the run and return the error that says so."""
    if job.processes.is_main:
        job.journal.event("stopped", step=done)
    job.processes.barrier()
    return Stopped(
        f"{job.run.folder}: stopped by a signal after step {done} of {job.plan.steps}, which is durable; "
        "the same command goes on"
    )


def finish(job: Job, console: Console, stop_wanted: threading.Event) -> None:
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
        if stop_wanted.is_set():
            raise stopped(job, job.plan.steps)
        console.tick(what)

    held_out = evaluation.held_out_of(job.recipe, job.data, job.renderer, padded=job.plan.padded)
    scores = {}
    if held_out is not None:
        scores = evaluation.compare(job.model, job.renderer, held_out, processes=job.processes, tick=tick)
    if job.processes.is_main:
        weights = sum(file.stat().st_size for file in job.source.folder.glob("*.safetensors"))
        write_result(Run(job.run.folder), job.plan.steps, evaluation.plain(scores), base_bytes=weights)
        job.journal.event("finished", step=job.plan.steps)
        console.end()
        show(Run(job.run.folder), job.recipe, console)
