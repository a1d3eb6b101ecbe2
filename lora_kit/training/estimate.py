"""What a run takes: memory on each device, disk, time and money, and which GPUs it fits on.

The parts are computed from the base's configuration, the recipe and the examples; only the time needs measured rates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from lora_kit.data.plan import Plan
from lora_kit.data.tokens import Prepared, Tokens
from lora_kit.model.sizes import Estimate, Shape, estimate_memory, format_bytes
from lora_kit.recipe.schema import Recipe
from lora_kit.training.micro_batches import MEMORY_SHARE, Machine, MicroBatches, choose, smallest
from lora_kit.training.speed import FIRST_STEPS, MicroBatchWork, Rates, Speed, usual, work_of

GPU_GB = (16, 24, 48, 80, 141)
SHORTEST = 256  # the shortest sequence_length that is proposed
LINE_BYTES = 300  # bytes of the line of a step in metrics.jsonl
REFERENCE_COLUMNS = {"dpo": 2, "kto": 3}  # log-probabilities of the reference for each example


@dataclass(frozen=True)
class Disk:
    """What a run writes.

    Attributes:
        checkpoint_bytes: The size of a checkpoint.
        checkpoints: The most checkpoints that exist at a time, with the one that is being written.
        run_bytes: The size of the run's folder, with its logs.
        live_region_bytes: The size of the live region in /dev/shm, or in the temporary folder.
        cache_bytes: The size of the tokens in the cache, and of the log-probabilities of a reference; None if the data
            is not known.
    """

    checkpoint_bytes: int
    checkpoints: int
    run_bytes: int
    live_region_bytes: int
    cache_bytes: int | None


@dataclass(frozen=True)
class Duration:
    """How long a run takes on this machine, without starts and without answers by generation.

    Attributes:
        steps: Optimizer steps.
        seconds_per_step: The mean over the first steps, with communication.
        communication_bytes_per_step: What each process sends.
        communication_seconds_per_step: The same at the rate that `speed.LINK_BYTES_PER_SECOND` assumes.
        flops_per_step: Products with the base's weights, over all processes.
        matmul_flops_per_second: The measured rate of these products.
        tokens_per_second: Trained and untrained tokens.
        reference_seconds: Log-probabilities of the reference, once before the first step.
        evaluation_seconds: All held-out losses.
        total_hours: Steps, reference and evaluations.
        price_per_hour: The price of the machine; None if it is not given.
        cost: `total_hours` at that price.
    """

    steps: int
    seconds_per_step: float
    communication_bytes_per_step: int
    communication_seconds_per_step: float
    flops_per_step: float
    matmul_flops_per_second: float
    tokens_per_second: float
    reference_seconds: float
    evaluation_seconds: float
    total_hours: float
    price_per_hour: float | None
    cost: float | None


@dataclass(frozen=True)
class Fit:
    """Whether a recipe fits on a GPU.

    Attributes:
        gpu_gigabytes: The memory of the GPU.
        micro_batch_tokens: The value that `auto` gives `train.micro_batch_tokens` on this GPU; None if no value fits.
        activation_checkpointing: Whether activations are recomputed with that value; None if no value fits.
        change: What to change in the recipe so that it fits; None if it fits, or if nothing proposed is enough.
    """

    gpu_gigabytes: int
    micro_batch_tokens: int | None
    activation_checkpointing: bool | None
    change: str | None

    def __str__(self) -> str:
        if self.micro_batch_tokens is None:
            return f"no; {self.change or 'choose a smaller base'}"
        return f"{self.micro_batch_tokens:,} tokens{', activations recomputed' * bool(self.activation_checkpointing)}"


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes.

    Attributes:
        device: "cpu" or "cuda".
        processes: The number of processes.
        memory: The memory of a device, by category.
        process_bytes: The peak memory of a process on its device, with libraries and, on a CPU, the live region.
        disk: Disk and shared memory.
        duration: How long the run takes; None if this was not asked for, or if the data is not known.
        gpus: Which usual GPUs the recipe fits on.
    """

    device: str
    processes: int
    memory: Estimate
    process_bytes: int
    disk: Disk
    duration: Duration | None
    gpus: tuple[Fit, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values; the name of each number ends with its unit."""
        memory = asdict(self.memory) | {"device_bytes": self.memory.device_bytes, "process_bytes": self.process_bytes}
        return asdict(self) | {"memory": memory}

    def lines(self) -> Iterator[str]:
        """Yield the estimate as lines of text."""
        yield from self.memory.lines()
        disk, duration = self.disk, self.duration
        cache = "" if disk.cache_bytes is None else f", prepared data in the cache {format_bytes(disk.cache_bytes)}"
        yield (
            f"disk: run's folder {format_bytes(disk.run_bytes)} ({disk.checkpoints} checkpoints of "
            f"{format_bytes(disk.checkpoint_bytes)}), live region in /dev/shm "
            f"{format_bytes(disk.live_region_bytes)}{cache}"
        )
        if duration is not None:
            yield from _lines(duration)
        fits = (f"{fit.gpu_gigabytes} GB: {fit}" for fit in self.gpus)
        yield f"fits on a GPU with {' | '.join(fits)}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _lines(duration: Duration) -> Iterator[str]:
    sent = duration.communication_bytes_per_step
    communication = (
        f", {format_bytes(sent)} sent by each process in about {duration.communication_seconds_per_step:.2g} s"
        if sent
        else ""
    )
    yield (
        f"estimated time: {duration.seconds_per_step:.3g} s a step ({duration.tokens_per_second:,.0f} tokens/s; matrix "
        f"products at {duration.matmul_flops_per_second / 1e12:.3g} TFLOP/s, measured here{communication})"
    )
    once = {"reference": duration.reference_seconds, "evaluations": duration.evaluation_seconds}
    parts = "".join(f", {name} {seconds / 3600:.2g} h" for name, seconds in once.items() if seconds)
    price = f"; at {duration.price_per_hour:g} per hour: {duration.cost:,.2f}" if duration.price_per_hour else ""
    yield f"estimated total: {duration.total_hours:.2g} h for {duration.steps:,} steps{parts}{price}"


@dataclass(frozen=True)
class Contents:
    """What the examples of a run contain, as far as an estimate needs it.

    Attributes:
        steps: Optimizer steps of the run.
        first: The micro-batches of the first steps.
        training: All training examples together.
        held_out: All validation examples together; None if there are none.
        longest: The tokens of the longest training example; of a pair, of its longer side.
        examples: Training and validation examples.
        cache_bytes: The size of the tokens in the cache.
    """

    steps: int
    first: tuple[tuple[MicroBatchWork, ...], ...]
    training: MicroBatchWork
    held_out: MicroBatchWork | None
    longest: int
    examples: int
    cache_bytes: int

    @property
    def largest(self) -> int:
        """The tokens of the largest micro-batch of the first steps."""
        return max(work.tokens for work in chain(*self.first))

    @property
    def usual(self) -> MicroBatchWork:
        """A micro-batch of the usual size."""
        return usual(list(chain(*self.first)))

    def micro_batches(self, processes: int) -> int:
        """Return the most micro-batches of a process in a step."""
        return max(-(-len(step) // processes) for step in self.first)


def contents_of(plan: Plan, data: Prepared) -> Contents:
    """Return what the examples of a run contain."""
    parts = [part for part in (data.train, data.validation) if part is not None]
    whole = [_all_of(part) for part in parts]
    return Contents(
        steps=plan.steps,
        first=tuple(tuple(work_of(plan, step)) for step in range(min(FIRST_STEPS, plan.steps))),
        training=whole[0],
        held_out=whole[1] if len(whole) > 1 else None,
        longest=data.train.longest,
        examples=sum(map(len, parts)),
        cache_bytes=sum(part.ids.nbytes + part.trained.nbytes + part.offsets.nbytes for part in parts),
    )


def _all_of(tokens: Tokens) -> MicroBatchWork:
    lengths = tokens.side_lengths()
    return MicroBatchWork(int(lengths.sum()), int(tokens.trained.sum()), int((lengths**2).sum()))


def memory_of(
    shape: Shape,
    recipe: Recipe,
    micro_batches: MicroBatches,
    machine: Machine,
    *,
    contents: Contents | None = None,
    processes: int = 1,
    shards: int = 1,
) -> Estimate:
    """Return the memory of a device: of the largest micro-batch of the first steps if the data is known.

    Args:
        shape: The dimensions of the base.
        recipe: The recipe.
        micro_batches: The size of micro-batches, and whether activations are recomputed.
        machine: The device.
        contents: What the examples contain; None if they are not known.
        processes: The number of processes.
        shards: The number of processes over which the base is sharded; 1 if each has the whole base.
    """
    tokens = micro_batches.micro_batch_tokens
    return estimate_memory(
        shape,
        recipe,
        tokens=tokens if contents is None else min(tokens, contents.largest),
        recompute=micro_batches.activation_checkpointing,
        device=machine.device,
        shards=shards,
        micro_batches=None if contents is None else contents.micro_batches(processes),
    )


def estimate_run(
    shape: Shape,
    recipe: Recipe,
    micro_batches: MicroBatches,
    machine: Machine,
    *,
    contents: Contents | None = None,
    rates: Rates | None = None,
    price_per_hour: float | None = None,
    processes: int = 1,
    shards: int = 1,
) -> RunEstimate:
    """Estimate what a run takes.

    Args:
        shape: The dimensions of the base.
        recipe: The recipe.
        micro_batches: The size of micro-batches, and whether activations are recomputed.
        machine: The device of a process.
        contents: What the examples contain; None if they are not known.
        rates: The speed of the machine; None leaves the time out.
        price_per_hour: The price of the machine.
        processes: The number of processes.
        shards: The number of processes over which the base is sharded; 1 if each has the whole base.
    """
    memory = memory_of(shape, recipe, micro_batches, machine, contents=contents, processes=processes, shards=shards)
    duration = None
    if contents is not None and rates is not None:
        speed = Speed(shape, recipe, memory, rates, machine.device, processes, sharded=shards > 1)
        duration = duration_of(speed, contents, price_per_hour)
    return RunEstimate(
        device=machine.device,
        processes=processes,
        memory=memory,
        process_bytes=memory.process_bytes(machine.device),
        disk=disk_of(recipe, memory, contents),
        duration=duration,
        gpus=fits(shape, recipe),
    )


def disk_of(recipe: Recipe, memory: Estimate, contents: Contents | None) -> Disk:
    """Return what a run writes. Without its examples, the number of its steps may be unknown."""
    settings, steps = recipe.checkpoint, contents.steps if contents else recipe.train.steps
    kept = settings.keep + settings.best + 1  # a new checkpoint is complete before the oldest is deleted
    if settings.keep_every and steps:
        kept += steps // settings.keep_every
    columns = REFERENCE_COLUMNS.get(recipe.objective.kind, 0)
    return Disk(
        checkpoint_bytes=memory.checkpoint_bytes,
        checkpoints=kept,
        run_bytes=kept * memory.checkpoint_bytes + LINE_BYTES * (steps or 0),
        live_region_bytes=memory.live_bytes,
        cache_bytes=None if contents is None else contents.cache_bytes + 4 * columns * contents.examples,
    )


def duration_of(speed: Speed, contents: Contents, price_per_hour: float | None = None) -> Duration:
    """Return the time of a run, whose steps are assumed to be like the first ones."""
    steps, first = contents.steps, contents.first
    seconds = sum(map(speed.step, first)) / len(first)
    typical = contents.usual
    reference = 0.0
    if speed.recipe.objective.kind in REFERENCE_COLUMNS:
        passes = REFERENCE_COLUMNS[speed.recipe.objective.kind] - 1  # kto also needs the mismatched answers
        wholes = [contents.training, *([contents.held_out] if contents.held_out else [])]
        reference = passes * sum(_forward(speed, whole, typical) for whole in wholes)
    every = speed.recipe.evaluate.every_steps
    evaluations = 2 + (steps // every if every else 0)  # base and adapter are evaluated at the end
    evaluation = evaluations * _forward(speed, contents.held_out, typical) if contents.held_out else 0.0
    hours = (steps * seconds + reference + evaluation) / 3600
    tokens = sum(work.tokens for work in chain(*first))
    return Duration(
        steps=steps,
        seconds_per_step=seconds,
        communication_bytes_per_step=sum(map(speed.communication_bytes, first)) // len(first),
        communication_seconds_per_step=sum(map(speed.communication, first)) / len(first),
        flops_per_step=sum(map(speed.flops, first)) / len(first),
        matmul_flops_per_second=speed.rates.flops_per_second,
        tokens_per_second=tokens / (seconds * len(first)),
        reference_seconds=reference,
        evaluation_seconds=evaluation,
        total_hours=hours,
        price_per_hour=price_per_hour,
        cost=None if price_per_hour is None else hours * price_per_hour,
    )


def _forward(speed: Speed, whole: MicroBatchWork, typical: MicroBatchWork) -> float:
    """Return the seconds of a forward pass over all examples, in micro-batches of the usual size."""
    count = max(1, round(whole.tokens / typical.tokens))
    parts = (getattr(whole, name) // count for name in ("tokens", "trained", "pairs"))
    return count * speed.forward(MicroBatchWork(*parts)) / speed.processes


def fits(shape: Shape, recipe: Recipe, gigabytes: Sequence[int] = GPU_GB) -> tuple[Fit, ...]:
    """Return for each size of GPU the micro-batch that `auto` takes, or what to change so that the recipe fits."""
    open_ = {"micro_batch_tokens": "auto", "activation_checkpointing": "auto"}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=open_)})
    smaller, found = list[tuple[str, int]](), list[Fit]()
    for size in gigabytes:
        machine = Machine("cuda", size * 10**9)
        limit = MEMORY_SHARE["cuda"] * machine.memory
        if _least(shape, recipe) <= limit:
            chosen = choose(recipe, shape, machine)
            found.append(Fit(size, chosen.micro_batch_tokens, chosen.activation_checkpointing, None))
            continue
        smaller = smaller or [(changes, _least(shape, changed)) for changes, changed in _smaller(recipe)]
        change = next((changes for changes, needed in smaller if needed <= limit), None)
        found.append(Fit(size, None, None, change))
    return tuple(found)


def _least(shape: Shape, recipe: Recipe) -> int:
    """Return the bytes of the smallest micro-batch that `auto` takes on a GPU."""
    chosen = smallest(recipe, shape, Machine("cuda", 0))
    return estimate_memory(shape, recipe, tokens=chosen.micro_batch_tokens, recompute=True, device="cuda").device_bytes


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield changes of a recipe that take less memory, those that change least first, each with the changed recipe."""
    quantizations = ["none", "int8", "nf4"] if recipe.base.quantization == "none" else [recipe.base.quantization]
    for quantization in quantizations:
        length = recipe.data.sequence_length
        while length >= min(SHORTEST, recipe.data.sequence_length):
            changes, changed = [], recipe
            if quantization != recipe.base.quantization:
                changes.append(f"base.quantization: {quantization}")
                base = recipe.base.model_copy(update={"quantization": quantization})
                changed = changed.model_copy(update={"base": base})
            if length != recipe.data.sequence_length:
                changes.append(f"data.sequence_length: {length}")
                changed = changed.model_copy(
                    update={"data": recipe.data.model_copy(update={"sequence_length": length})}
                )
            if changes:
                yield " and ".join(changes), changed
            length //= 2
