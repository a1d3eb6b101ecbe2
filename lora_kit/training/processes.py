"""The few things asked of accelerate: who am I, which device, sum in one fixed order, agree.

Every process computes the same optimizer step from the same gradient, so the only thing they must exchange is the
gradient. It is summed in the tree order of `data.packing.reduction_schedule`, which makes the bits independent of how
many processes there are (1, 2, 4, 8, ...; for other numbers the result is equal to rounding).
"""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import broadcast_object_list, gather_object
from jaxtyping import Float32
from torch import Tensor

from lora_kit.errors import LaunchError, LoraKitError
from lora_kit.kernels.cpu.allocator import PRODUCTS_KEPT, keep_freed_memory
from lora_kit.kernels.cpu.buffers import rooms

T = TypeVar("T")

CONTRADICTIONS = {  # what `accelerate launch` asks for through the environment, and what a recipe can stand
    "ACCELERATE_MIXED_PRECISION": ("no", "the recipe's base.dtype decides the precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1",
        "accumulation follows from train.batch_size and micro_batch_tokens",
    ),
    "ACCELERATE_USE_FSDP": ("false", "the adapter is never sharded and the base is replicated"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "lora_kit keeps the whole optimizer state itself"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "lora_kit does not train through Megatron-LM"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "the recipe does not compile the model"),
}


def refuse_contradictions(environment: dict[str, str], dtype: str) -> None:
    """Refuse launcher settings that the recipe contradicts.

    Raises:
        LaunchError: Names each setting, its value and what the recipe says.
    """
    problems = []
    for name, (allowed, reason) in CONTRADICTIONS.items():
        found = environment.get(name, allowed).lower()
        same_precision = name == "ACCELERATE_MIXED_PRECISION" and (found, dtype) == ("bf16", "bfloat16")
        if found != allowed and not same_precision:
            setting = name.removeprefix("ACCELERATE_").lower()
            problems.append(f"launcher: {setting} is {found!r}, the recipe needs {allowed!r}: {reason}")
    if problems:
        raise LaunchError("\n".join(problems) + "\n(change it in `accelerate config`, or launch with `lora-kit train`)")


@dataclass(frozen=True)
class Processes:
    """The processes of this run, seen from one of them.

    Attributes:
        accelerator: What they are reached through.
        guest: Whether someone else in this process had set accelerate up before.
        threads: How many threads torch had before the run chose.
        determinism: torch's debug mode of determinism before, likewise.
        fills: Whether torch filled new memory in that mode, likewise.
    """

    accelerator: Accelerator
    guest: bool
    threads: int
    determinism: int
    fills: bool

    @classmethod
    def start(cls, dtype: str) -> "Processes":
        """Join the other processes of this launch, or be the only one."""
        refuse_contradictions(dict(os.environ), dtype)
        if torch.cuda.is_available():
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
        else:
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRODUCTS_KEPT)
            keep_freed_memory()
        guest, threads, determinism = is_initialized(), torch.get_num_threads(), torch.get_deterministic_debug_mode()
        fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        if accelerator.device.type == "cuda":
            torch.set_deterministic_debug_mode("warn")
            _fill_new_memory(False)  # else every buffer is filled before its use
        atexit.unregister(_end_group)  # an earlier call's
        atexit.register(_end_group)
        return cls(accelerator, guest, threads, determinism, fills)

    def leave(self) -> None:
        """Leave this process as it was found: a notebook may train again, alone or with others.

        accelerate remembers who was alone, and then starts no others from the same notebook.
        """
        torch.set_num_threads(self.threads)
        torch.set_deterministic_debug_mode(self.determinism)
        _fill_new_memory(self.fills)
        rooms.release()
        if self.count == 1 and not self.guest:
            AcceleratorState._reset_state(reset_partial_state=True)  # as transformers does between two trainers

    @property
    def index(self) -> int:
        """This process's number, from 0."""
        return self.accelerator.process_index

    @property
    def count(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def main_decides(self, decide: Callable[[], T]) -> T:
        """Run `decide` on the main process and return its result on all; its lora_kit error is raised on all."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = decide()
            except LoraKitError as error:
                outcome[1] = error
        if self.count > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return every process's items, in the order of the processes."""
        return gather_object(list(items)) if self.count > 1 else list(items)

    def tree_sum(self, flat: Float32[Tensor, "length"], contributors: int) -> None:
        """Replace `flat` on every process by the sum over the first `contributors` processes, in tree order.

        Each process receives one shard of every partial sum, adds them up and hands the result round: the traffic of a
        ring all-reduce, in a fixed order.
        """
        if self.count == 1:
            return
        length = flat.numel()
        padded = torch.nn.functional.pad(flat, (0, -length % self.count))
        received = torch.empty_like(padded)
        dist.all_to_all_single(received, padded)
        shard = _tree(list(received.view(self.count, -1)[:contributors]))
        dist.all_gather(list(padded.chunk(self.count)), shard.contiguous())
        flat.copy_(padded[:length])

    def different(self, buffers: Sequence[Tensor]) -> list[int]:
        """Return the processes whose buffers have not the bits that most have; of two, those unlike process 0."""
        mine = torch.stack([one.view(torch.int32).sum(dtype=torch.int64) for one in buffers])
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(all_of_them, mine)
        sums = [tuple(one.tolist()) for one in all_of_them]
        most = max(sums, key=lambda one: (sums.count(one), one == sums[0]))
        return [index for index, one in enumerate(sums) if one != most]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()


def _fill_new_memory(wanted: bool) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = wanted  # type: ignore[attr-defined]


def _end_group() -> None:
    """End this process's connections while Python still lives: threads of theirs that outlive it abort at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _tree(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else _tree(parts[0::2]) + _tree(parts[1::2])
