"""How much a process holds at once: tokens of a micro-batch, their activations, and the base or a shard of it.

`auto` is settled once for a run, from the recipe, the shape of the base and the memory of the machine. On a CPU a
micro-batch has 2,048 tokens, whose activations fit into the caches. On a GPU it is the largest of a few sizes that fits
with all activations kept. Where fewer than 4,096 tokens would fit, activations are recomputed in the backward pass,
which costs a third more time, and the sizes are tried again. The base is sharded if all this does not fit beside the
whole base.
"""

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lora_kit.errors import BaseError
from lora_kit.model.sizes import Shape, estimate_memory, format_bytes
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.manifest import Placement

CPU_TOKENS = 2048  # 1.5 times as fast as 8,192 tokens at 160 M parameters
GPU_TOKENS = (2048, 4096, 8192, 16384)
SATURATING_TOKENS = 8192  # enough to keep a GPU busy while the next kernels are launched, unless the base is narrow
NARROW_WIDTH = 4096  # below this hidden size kernel launches are the limit: a 1B Llama reached 30% of the GEMM rate
ENOUGH_TOKENS = 4096  # if so many fit, activations are not recomputed in order to fit more
MEMORY_SHARE = {  # the share of the memory to plan for; the rest is for libraries, fragmentation and other programs
    "cpu": 0.5,  # malloc held 1.6 times what the tensors of a step took at 160 M parameters
    "cuda": 0.85,
}
UNSHARDED = {  # the quantisations that cannot be sharded, and why
    "int8": "bitsandbytes keeps the codes of int8 layers outside of parameters; set base.quantization: nf4 or none",
    "fp8": "only a base with plain weights is divided while it is loaded; choose the base in bfloat16",
}


@dataclass(frozen=True)
class Machine:
    """The device that a process computes on.

    Attributes:
        device: cpu or cuda.
        memory: Bytes that one process may use.
        processes: How many processes train together.
    """

    device: Literal["cpu", "cuda"]
    memory: int
    processes: int = 1

    @property
    def limit(self) -> float:
        """The bytes to plan for."""
        return MEMORY_SHARE[self.device] * self.memory


@dataclass(frozen=True)
class MicroBatches:
    """The size of micro-batches and whether activations are recomputed, both of which a recipe may leave to `auto`."""

    micro_batch_tokens: int
    activation_checkpointing: bool

    def __str__(self) -> str:
        activations = "recomputed in backward" if self.activation_checkpointing else "kept"
        return f"at most {self.micro_batch_tokens:,} tokens, activations {activations}"


@dataclass(frozen=True)
class Placed:
    """Where the weights of the base are.

    Attributes:
        placement: On every process, or sharded over them.
        why: The reason.
        shards: The number of processes over which the base is sharded; 1 if each has the whole base.
    """

    placement: Placement
    why: str
    shards: int = 1

    def __str__(self) -> str:
        where = "whole on every process" if self.shards == 1 else f"sharded over {self.shards} processes"
        return f"{where}: {self.why}"


def place(recipe: Recipe, shape: Shape | None, machine: Machine, weight_bytes: int) -> Placed:
    """Return where the base goes: as the recipe says, or for `auto` sharded if it is estimated not to fit whole.

    Args:
        recipe: The recipe.
        shape: The dimensions of the base; None for a family whose sizes are not known. Then its files must fit.
        machine: The device, with the memory of the process that has the least, so that all processes choose the same.
        weight_bytes: The size of the base's files.

    Raises:
        BaseError: The recipe says sharded, and its quantisation cannot be.
    """
    wanted, quantization = recipe.base.placement, recipe.base.quantization
    if wanted == "sharded" and quantization in UNSHARDED:
        raise BaseError(f"base.placement: sharded with base.quantization: {quantization}: {UNSHARDED[quantization]}")
    if machine.processes == 1:
        return Placed("replicated", "there is one process")
    if wanted == "replicated":
        return Placed("replicated", "base.placement")
    if wanted == "sharded":
        return Placed("sharded", "base.placement", machine.processes)
    if quantization in UNSHARDED:
        return Placed("replicated", UNSHARDED[quantization])
    needed = weight_bytes
    if shape is not None:
        chosen = choose(recipe, shape, machine)
        tokens, recompute = chosen.micro_batch_tokens, chosen.activation_checkpointing
        needed = estimate_memory(shape, recipe, tokens=tokens, recompute=recompute, device=machine.device).device_bytes
    compared = f"{format_bytes(needed)} of the {format_bytes(int(machine.limit))} to plan for in each process"
    if needed <= machine.limit:
        return Placed("replicated", f"it is estimated to take {compared}")
    return Placed("sharded", f"whole it would take {compared}", machine.processes)


def choose(recipe: Recipe, shape: Shape | None, machine: Machine, shards: int = 1) -> MicroBatches:
    """Return the settings of the recipe; for a setting that is `auto`, the fastest value that fits the memory.

    Args:
        recipe: The recipe.
        shape: The dimensions of the base; None for a family whose sizes are not known. On a GPU, `auto` then takes
            `ENOUGH_TOKENS` and recomputes activations, because nothing can be estimated.
        machine: The device, with the memory of the process that has the least, so that all processes choose the same.
        shards: The number of processes over which the base is sharded; 1 if each has the whole base.
    """
    tokens, recompute = recipe.train.micro_batch_tokens, recipe.train.activation_checkpointing
    sizes = [tokens] if isinstance(tokens, int) else _sizes_to_try(recipe, shape, machine)
    recompute_choices = [recompute] if isinstance(recompute, bool) else [False, True]
    if shape is None:
        return MicroBatches(sizes[0], recompute_choices[0 if machine.device == "cpu" else -1])
    enough = min(sizes[-1], max(ENOUGH_TOKENS, recipe.longest_example))
    for recomputed in recompute_choices:
        estimates = [
            estimate_memory(shape, recipe, tokens=size, recompute=recomputed, device=machine.device, shards=shards)
            for size in sizes
        ]
        largest = max(
            (fitting.micro_batch_tokens for fitting in estimates if fitting.device_bytes <= machine.limit), default=0
        )
        if largest >= enough or (largest and recomputed is recompute_choices[-1]):
            return MicroBatches(largest, recomputed)
    return MicroBatches(sizes[0], recompute_choices[-1])


def smallest(recipe: Recipe, shape: Shape | None, machine: Machine) -> MicroBatches:
    """Return the settings that take least memory where both are `auto`."""
    return MicroBatches(_sizes_to_try(recipe, shape, machine)[0], activation_checkpointing=True)


def _sizes_to_try(recipe: Recipe, shape: Shape | None, machine: Machine) -> list[int]:
    """Return the sizes of micro-batches to choose from, ascending.

    Each is at least the length of the longest example, because an example is not split.
    """
    if machine.device == "cpu":
        sizes = [CPU_TOKENS]
    elif shape is None:
        sizes = [ENOUGH_TOKENS]
    else:
        sizes = [size for size in GPU_TOKENS if size <= SATURATING_TOKENS or shape.width < NARROW_WIDTH]
    return sorted({max(size, recipe.longest_example) for size in sizes})


def this_machine(processes: int = 1) -> Machine:
    """Return the device that each of some processes on this machine would compute on, without touching a GPU."""
    gpus = _gpu_memory()
    return Machine("cuda", min(gpus), processes) if gpus else Machine("cpu", host_memory() // processes, processes)


def _gpu_memory() -> list[int]:
    """Return the bytes of memory of every visible GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    command += [f"--id={visible}"] if visible else []
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in printed.split() if line.isdigit()]


def host_memory() -> int:
    """Return the bytes of memory that this machine has, or that this container may use."""
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
