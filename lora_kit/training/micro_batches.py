"""How many tokens a process computes at once, and whether it keeps their activations or computes them twice.

`auto` is settled once a run, from the recipe, the base's shape and the memory there is. On a CPU it is 2,048 tokens,
whose activations its caches hold. On a GPU it is the most of a short ladder that fits with all activations kept; where
fewer than 4,096 would, activations are computed twice, which costs a third more time, and the ladder is tried again.
"""

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lora_kit.model.sizes import Shape, estimate_memory, in_words
from lora_kit.recipe.schema import Recipe

ON_CPU = 2048  # at 160 M 1.5 times as fast as 8,192
ON_GPU = (2048, 4096, 8192, 16384)
FULL = 8192  # a GPU is busy with these while the next ones are launched, except with narrow bases
NARROW = 4096  # the width below which it waits for them: a 1B Llama reached 30% of its products' rate
ENOUGH = 4096  # more are not worth computing activations twice
ROOM = {  # of the memory, for what is estimated; the rest is for libraries, fragments and other programs
    "cpu": 0.5,  # malloc held 1.6 times what the tensors of a step of 160 M took
    "cuda": 0.85,
}


@dataclass(frozen=True)
class Machine:
    """What is computed on.

    Attributes:
        device: cpu or cuda.
        memory: Bytes that one process has.
    """

    device: Literal["cpu", "cuda"]
    memory: int


@dataclass(frozen=True)
class Portions:
    """The two values that a recipe may leave to `auto`."""

    micro_batch_tokens: int
    activation_checkpointing: bool

    def __str__(self) -> str:
        how = "computed twice" if self.activation_checkpointing else "kept"
        return f"at most {self.micro_batch_tokens:,} tokens, activations {how}"


def choose(recipe: Recipe, shape: Shape | None, machine: Machine) -> Portions:
    """Return what the recipe names, and what is best of what it leaves open.

    Args:
        recipe: The recipe.
        shape: Of the base; None where its family is not counted, and then a GPU is not filled.
        machine: The least that any process has.
    """
    tokens, twice = recipe.train.micro_batch_tokens, recipe.train.activation_checkpointing
    sizes = [tokens] if isinstance(tokens, int) else _ladder(recipe, shape, machine)
    ways = [twice] if isinstance(twice, bool) else [False, True]
    if shape is None:
        return Portions(sizes[0], ways[0] if machine.device == "cpu" else ways[-1])
    enough = min(sizes[-1], max(ENOUGH, recipe.data.sequence_length))
    for way in ways:
        estimates = [estimate_memory(shape, recipe, tokens=one, recompute=way, device=machine.device) for one in sizes]
        fitting = [one for one in estimates if one.device_bytes <= ROOM[machine.device] * machine.memory]
        most = max((one.micro_batch_tokens for one in fitting), default=0)
        if most >= enough or (most and way is ways[-1]):
            return Portions(most, way)
    return Portions(sizes[0], ways[-1])


def _ladder(recipe: Recipe, shape: Shape | None, machine: Machine) -> list[int]:
    """Return the sizes to choose from, ascending; an example is never split, so none is below the longest allowed."""
    if machine.device == "cpu":
        sizes = [ON_CPU]
    elif shape is None:
        sizes = [ENOUGH]
    else:
        sizes = [size for size in ON_GPU if size <= FULL or shape.width < NARROW]
    return sorted({max(size, recipe.data.sequence_length) for size in sizes})


def this_machine(processes: int = 1) -> Machine:
    """Return what a run on this machine would compute on, without touching a GPU."""
    gpus = _memory_of_gpus()
    return Machine("cuda", min(gpus)) if gpus else Machine("cpu", host_memory() // processes)


def _memory_of_gpus() -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    command += [f"--id={visible}"] if visible else []
    told = ""
    if visible != "":
        with suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    return [int(line) << 20 for line in told.split() if line.isdigit()]


def host_memory() -> int:
    """Return the bytes of memory that this machine has, or this container may use."""
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def described(portions: Portions, machine: Machine) -> str:
    """Return a line about what was chosen, and for what."""
    return f"micro-batches: {portions} ({machine.device} with {in_words(machine.memory)})"
