"""Compare the estimate of a run with what it has measured, once, after its first steps."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

from lora_kit.errors import BaseError
from lora_kit.model.sizes import format_bytes, read_config
from lora_kit.training.estimate import contents_of, memory_of
from lora_kit.training.job import Job
from lora_kit.training.micro_batches import Machine, MicroBatches, host_memory
from lora_kit.training.rates import measure
from lora_kit.training.speed import FIRST_STEPS, Speed
from lora_kit.views.console import Console

ROOM_BYTES = 1_000_000_000  # free memory that a measurement needs on a host, for copies of weights
WARM_UP = 2  # steps of a process that are not timed: kernels are compiled, and buffers grow


@dataclass(frozen=True)
class Comparison:
    """The estimate and the measurement of a run.

    Attributes:
        memory_estimated_bytes: The peak memory of the main process on its device; on a GPU, of its tensors.
        memory_measured_bytes: The same, measured.
        seconds_per_step_estimated: The mean over the steps that were measured; None if there are none.
        seconds_per_step_measured: The same, measured.
    """

    memory_estimated_bytes: int
    memory_measured_bytes: int
    seconds_per_step_estimated: float | None
    seconds_per_step_measured: float | None

    def __str__(self) -> str:
        estimated, measured = self.memory_estimated_bytes, self.memory_measured_bytes
        line = f"memory: estimated {format_bytes(estimated)}, measured {format_bytes(measured)}"
        if self.seconds_per_step_estimated is None or self.seconds_per_step_measured is None:
            return line
        seconds = f"estimated {self.seconds_per_step_estimated:.3g}, measured {self.seconds_per_step_measured:.3g}"
        return f"{line}; seconds a step: {seconds}"


def compare_estimate(job: Job, done: int, tick: Callable[[], None], console: Console) -> None:
    """After step `FIRST_STEPS`, log and show the estimate beside the measurement. This takes a few seconds.

    Whatever fails here is a warning and does not end the run, which needs none of it.

    Args:
        job: The job.
        done: The number of finished steps.
        tick: Called again and again, so that the keeper does not take the comparison for a hang.
        console: Shows the comparison.
    """
    if done != FIRST_STEPS or not job.processes.is_main:
        return
    try:
        compared = comparison(job, tick)
    except Exception as error:
        console.warn(f"the estimate could not be compared with the measurement: {type(error).__name__}: {error}")
        return
    if compared is not None:
        job.journal.event("estimate", step=done, **asdict(compared))
        console.say(f"after {done} steps: {compared}")


def comparison(job: Job, tick: Callable[[], None]) -> Comparison | None:
    """Return the comparison; None for a base whose sizes are not known."""
    tick()
    try:
        shape = read_config(job.inputs.source.folder / "config.json")
    except BaseError:
        return None
    measured, device, resolved = peak_memory(job.processes.device), job.processes.device, job.facts.resolved
    machine = Machine("cuda" if device.type == "cuda" else "cpu", 0)
    micro_batches = MicroBatches(job.plan.micro_batch_tokens, bool(resolved.activation_checkpointing))
    contents, processes = contents_of(job.plan, job.inputs.data), job.processes.count
    sharded = resolved.placement == "sharded"
    memory = memory_of(
        shape,
        job.recipe,
        micro_batches,
        machine,
        contents=contents,
        processes=processes,
        shards=processes if sharded else 1,
    )
    estimated = memory.device_bytes if machine.device == "cuda" else memory.process_bytes("cpu")
    timed = {
        line["step"]: line["tokens"] / line["tokens_per_second"]
        for line in job.journal.read_metrics()
        if job.start + WARM_UP < line["step"] <= len(contents.first) and line["tokens_per_second"]
    }
    crowded = device.type == "cpu" and measured * processes + ROOM_BYTES > host_memory()
    if not timed or crowded:
        return Comparison(estimated, measured, None, None)
    tokens, longest = contents.usual.tokens, contents.longest
    try:
        rates = measure(shape, job.recipe, device, tokens=tokens, longest=longest, threads=resolved.threads, tick=tick)
    except torch.OutOfMemoryError:  # the run leaves no room for a measurement
        return Comparison(estimated, measured, None, None)
    speed = Speed(shape, job.recipe, memory, rates, machine.device, processes, sharded=sharded)
    expected = mean(speed.step(contents.first[step - 1]) for step in timed)
    return Comparison(estimated, measured, expected, mean(timed.values()))


def peak_memory(device: torch.device) -> int:
    """Return the peak of the tensors on a GPU, or of the resident memory of this process on a CPU.

    Resident memory counts everything that the process has done so far, in a notebook also before the run.
    """
    if device.type == "cuda":
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
