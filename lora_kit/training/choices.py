"""What a run chooses by looking at the machine and the model.

Each choice except `placement` can change bits, so it is made once, kept in the manifest, and used at every resume.
"""

from collections.abc import Set

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lora_kit.errors import BaseError
from lora_kit.host import host_cores
from lora_kit.kernels import fusing
from lora_kit.kernels.attention import SEGMENT, inner_of
from lora_kit.kernels.cpu.allocator import LARGE, keep_freed_memory
from lora_kit.model.forward import model_inputs
from lora_kit.model.probe import choose_attention, probe_batch, shares_beginnings
from lora_kit.model.sizes import Shape, read_config
from lora_kit.model.source import Source
from lora_kit.recipe.schema import PairObjective, Recipe
from lora_kit.runs.manifest import Resolved
from lora_kit.training.micro_batches import Machine, MicroBatches, Placed, choose, host_memory, place
from lora_kit.training.processes import Processes
from lora_kit.training.speed import threads_for


def placement(recipe: Recipe, source: Source, processes: Processes) -> Placed:
    """Return where the base goes; the same on all processes. It changes no bit, so every start chooses again.

    Raises:
        BaseError: The recipe's quantisation cannot be sharded.
    """
    return place(recipe, shape_of(source), smallest_machine(processes), source.weight_bytes)


def shape_of(source: Source) -> Shape | None:
    """Return the dimensions of a base; None for a family whose sizes are not known."""
    try:
        return read_config(source.folder / "config.json")
    except BaseError:
        return None


def micro_batches(
    recipe: Recipe, before: Resolved | None, changed: Set[str], source: Source, processes: Processes, shards: int
) -> MicroBatches:
    """Return the size of micro-batches and whether activations are recomputed; the same on all processes.

    Args:
        recipe: The recipe.
        before: What the run chose when it began; None for a new run.
        changed: The keys that a resume changes; their values are taken from the recipe or chosen again.
        source: The files of the base.
        processes: The processes that train together.
        shards: The number of processes over which the base is sharded; 1 if each has the whole base.
    """
    recorded = {
        "micro_batch_tokens": before and before.micro_batch_tokens,
        "activation_checkpointing": before and before.activation_checkpointing,
    }
    kept = {key: value for key, value in recorded.items() if value is not None and f"train.{key}" not in changed}
    settled = recipe.model_copy(update={"train": recipe.train.model_copy(update=kept)})
    return choose(settled, shape_of(source), smallest_machine(processes), shards)


def smallest_machine(processes: Processes) -> Machine:
    """Return the device of the processes, with the memory of the process that has the least."""
    if processes.device.type == "cuda":
        memory = torch.cuda.get_device_properties(processes.device).total_memory
        return Machine("cuda", min(processes.gather([memory])), processes.count)
    return Machine("cpu", min(processes.gather([host_memory() // processes.count])), processes.count)


def threads(source: Source, processes: Processes) -> int | None:
    """Return how many threads each process computes with on a CPU: its share of the cores, fewer for a small base.

    All processes use the same number, which the manifest records; on several machines the one with the fewest cores
    decides.
    """
    if processes.device.type != "cpu":
        return None
    return threads_for(min(processes.gather([host_cores()])) // processes.count, source.weight_bytes)


def attention(
    base: PreTrainedModel, recipe: Recipe, before: Resolved | None, changed: Set[str], processes: Processes
) -> tuple[str, str]:
    """Return the attention implementation, and the layout of rows: `packed`, `padded` or `shared`.

    `shared` is packed rows in which both sides of a preference pair share the computation of their beginning.
    """
    if before is not None and not changed & {"base.attention", "train.share_prompts"}:
        return before.attention, before.layout
    name, layout = choose_attention(base, recipe.base, processes.device)
    may_share = isinstance(recipe.objective, PairObjective) and recipe.train.share_prompts == "auto"
    if (name, layout) == (SEGMENT, "packed") and may_share and shares_beginnings(base, processes.device):
        layout = "shared"
    return name, layout


def kernels(
    model: nn.Module, recipe: Recipe, before: Resolved | None, changed: Set[str], processes: Processes
) -> tuple[str, ...]:
    """Let the model compute with the fused kernels that the run began with, or find those that fit; return them."""
    if recipe.train.kernels == "none":
        return ()
    known = before.kernels if before and "train.kernels" not in changed else None
    ids = np.arange(32) % inner_of(model).config.get_text_config().vocab_size
    inputs = None if known is not None else model_inputs(model, probe_batch([ids]), processes.device)
    used = tuple(fusing.use_kernels(model, known, inputs))
    if fusing.pools_memory(model, used):
        # few large tensors are left to malloc; fragmentation by them would cost more than page faults
        keep_freed_memory(below=LARGE)
    return used
