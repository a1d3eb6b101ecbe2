"""What a run chooses by looking at the machine and the model: once, kept in the manifest, used again at every resume.

Each of these can change bits, so a second start must not choose again.
"""

import time
from collections.abc import Set

import numpy as np
import psutil
import torch
from torch import nn

from lora_kit.errors import BaseError
from lora_kit.kernels import fusing
from lora_kit.kernels.attention import inner_of
from lora_kit.kernels.cpu.allocator import LARGE, keep_freed_memory
from lora_kit.model.forward import model_inputs
from lora_kit.model.probe import probe_batch
from lora_kit.model.sizes import read_config
from lora_kit.model.source import Source
from lora_kit.model.state import FlatState
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.manifest import Resolved
from lora_kit.training import micro_batches
from lora_kit.training.objectives.objective import Objective
from lora_kit.training.processes import Processes

TINY_BASE_BYTES = 20_000_000  # below it, two threads spend more time meeting than computing
SMALL_BASE_BYTES = 100_000_000  # below it they may, and it is measured
PROBE_EXAMPLES, PROBE_TOKENS = 8, 128
WORTH_IT = (
    1.3  # so many times faster, or one thread it is: far from what noise does, so that a second run chooses alike
)


def choices(
    recipe: Recipe, before: Resolved | None, changed: Set[str], source: Source, processes: Processes
) -> micro_batches.MicroBatches:
    """Return the size of micro-batches and whether activations are recomputed; the same on all processes.

    Args:
        recipe: The recipe.
        before: What the run chose when it began; None when it begins.
        changed: Keys that a resume changes; such a field is read, or chosen, anew.
        source: The base.
        processes: That train together.
    """
    recorded = {
        "micro_batch_tokens": before and before.micro_batch_tokens,
        "activation_checkpointing": before and before.activation_checkpointing,
    }
    known = {key: one for key, one in recorded.items() if one is not None and f"train.{key}" not in changed}
    settled = recipe.model_copy(update={"train": recipe.train.model_copy(update=known)})
    try:
        shape = read_config(source.folder / "config.json")
    except BaseError:
        shape = None
    return micro_batches.choose(settled, shape, machine_of(processes))


def machine_of(processes: Processes) -> micro_batches.Machine:
    """Return what the processes compute on, with the memory of the one that has least."""
    if processes.device.type == "cuda":
        mine = torch.cuda.get_device_properties(processes.device).total_memory
        return micro_batches.Machine("cuda", min(processes.gather([mine])))
    return micro_batches.Machine("cpu", min(processes.gather([micro_batches.host_memory() // processes.count])))


def threads_for(source: Source, processes: Processes) -> int | None:
    """Return how many threads a process computes with on a CPU; 0 where that is to be measured, None elsewhere."""
    if processes.device.type != "cpu":
        return None
    weights = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
    return 1 if weights < TINY_BASE_BYTES else 0 if weights < SMALL_BASE_BYTES else _cores(processes)


def _cores(processes: Processes) -> int:
    return max(1, (psutil.cpu_count(logical=False) or 1) // processes.count)


def measured_threads(model: nn.Module, objective: Objective, state: FlatState, processes: Processes) -> int:
    """Return how many threads a tiny base is faster with: one, or all there are for a process."""
    many = _cores(processes)
    if many == 1:
        return 1
    vocabulary = inner_of(model).config.get_text_config().vocab_size
    examples = [np.arange(PROBE_TOKENS) * (number + 1) % vocabulary for number in range(PROBE_EXAMPLES)]
    seconds = {1: float("inf"), many: float("inf")}
    for _ in range(3):
        for threads in seconds:
            torch.set_num_threads(threads)
            began = time.perf_counter()
            objective.loss(model, probe_batch(examples), processes.device).total.backward()
            seconds[threads] = min(seconds[threads], time.perf_counter() - began)
    state.reduced.zero_()
    chosen: int = processes.main_decides(lambda: many if seconds[1] > WORTH_IT * seconds[many] else 1)
    torch.set_num_threads(chosen)
    return chosen


def fast_parts(
    model: nn.Module, recipe: Recipe, known: tuple[str, ...] | None, processes: Processes
) -> tuple[str, ...]:
    """Let the model compute with the kernels that fit it, or with those that the run began with."""
    if recipe.train.kernels == "none":
        return ()
    ids = np.arange(32) % inner_of(model).config.get_text_config().vocab_size
    inputs = None if known is not None else model_inputs(model, probe_batch([ids]), processes.device)
    used = tuple(fusing.use_kernels(model, known, inputs))
    if fusing.lends(model, used):
        keep_freed_memory(below=LARGE)  # malloc has few large tensors, and their holes cost more than their faults
    return used
