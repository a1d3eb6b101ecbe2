"""The processes of a run, through accelerate: index, device, a sum in a fixed order, broadcast and gather.

Every process computes the same optimizer step from the same gradient, so processes exchange only the gradient. It is
summed in the tree order of `data.packing.reduction_schedule`, which makes the bits independent of the number of
processes if that number is a power of two; for other numbers the results are equal up to rounding.
"""

import atexit
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import wait_for_everyone
from jaxtyping import Float32
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lora_kit import errors
from lora_kit.errors import LaunchError, LoraKitError
from lora_kit.kernels.cpu.allocator import PRODUCTS_KEPT, keep_freed_memory
from lora_kit.kernels.cpu.buffers import pool
from lora_kit.recipe.schema import Launch
from lora_kit.runs import live
from lora_kit.training.meeting import meet

T = TypeVar("T")
COPIED_BYTES = 1 << 24  # bytes of a file in one message
LIMITS = Launch()
RESULT, ERROR = b"=", b"!"  # the first byte of a message tells what follows

CONTRADICTIONS = {  # settings of `accelerate launch`: the value that a recipe allows, and why
    "ACCELERATE_MIXED_PRECISION": ("no", "the recipe's base.dtype decides the precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1",
        "accumulation follows from train.batch_size and micro_batch_tokens",
    ),
    "ACCELERATE_USE_FSDP": ("false", "the recipe's base.placement: sharded shards the base, and never the adapter"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "lora_kit keeps the whole optimizer state itself"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "lora_kit does not train through Megatron-LM"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "the recipe does not compile the model"),
}


def _as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def refuse_contradictions(environment: dict[str, str], dtype: str) -> None:
    """Refuse launcher settings that contradict the recipe.

    Raises:
        LaunchError: Settings contradict the recipe; the message names each of them, its value and what the recipe says.
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
    """The training processes of a run, from the point of view of this process.

    Attributes:
        index: The index of this process, from 0.
        count: How many processes train together.
        device: Where this process computes.
        undo: Restores the settings of this process from before the run.
        publisher: The index of the process that publishes snapshots to the shared memory of this machine: its first.
        machines: On how many machines the processes are.
        launch: How long a process waits for the others.
        group: The group over which messages go; None for the default group.
    """

    index: int
    count: int
    device: torch.device
    undo: ExitStack
    publisher: int = 0
    machines: int = 1
    launch: Launch = LIMITS
    group: dist.ProcessGroup | None = None

    @classmethod
    def start(cls, dtype: str, launch: Launch = LIMITS) -> "Processes":
        """Join the other processes of this launch, or start as the only process.

        Args:
            dtype: The recipe's `base.dtype`.
            launch: The recipe's section `launch`.

        Raises:
            LaunchError: A setting of the launcher contradicts the recipe, or the processes do not meet.
        """
        refuse_contradictions(dict(os.environ), dtype)
        if torch.cuda.is_available():
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        else:
            os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRODUCTS_KEPT)
            # read by MKL at its first product; without it the bits of a sum depend on the number of threads
            os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
            keep_freed_memory()
        was_initialized, undo = is_initialized(), ExitStack()
        memory: Any = torch.utils.deterministic  # torch's annotations lack the setting
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        undo.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        undo.callback(setattr, memory, "fill_uninitialized_memory", memory.fill_uninitialized_memory)
        undo.callback(pool.release)
        meet(os.environ, launch.rendezvous_timeout)
        # accelerate chooses a number of threads and says so; the run's setup then sets its own
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        if accelerator.device.type == "cuda":
            torch.set_deterministic_debug_mode("warn")
            memory.fill_uninitialized_memory = False  # filling every new buffer would cost a pass over memory
        if accelerator.num_processes == 1 and not was_initialized:
            # accelerate remembers that a process was alone; its `notebook_launcher` then refuses to start more
            undo.callback(AcceleratorState._reset_state, reset_partial_state=True)
        atexit.unregister(_end_group)  # an earlier call may have registered it
        atexit.register(_end_group)
        joined = cls(accelerator.process_index, accelerator.num_processes, accelerator.device, undo, launch=launch)
        joined.expect_no_steps()
        memories = joined.gather([live.memory_id()])
        return replace(joined, publisher=memories.index(memories[joined.index]), machines=len(set(memories)))

    def leave(self) -> None:
        """Restore the settings of this process, so that a notebook can train again with any number of processes."""
        self.undo.close()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.index == 0

    @property
    def publishes(self) -> bool:
        """Whether this process publishes snapshots to the shared memory of its machine."""
        return self.index == self.publisher

    def expect_steps(self) -> None:
        """From now on a process waits at most `launch.collective_timeout` for another one."""
        self._limit_waiting(self.launch.collective_timeout)

    def expect_no_steps(self) -> None:
        """From now on a process waits at most `launch.start_timeout` for another one."""
        self._limit_waiting(self.launch.start_timeout)

    def _limit_waiting(self, seconds: float) -> None:
        """Change the timeout of the process group, after a barrier, which still waits with the old timeout."""
        if self.count > 1:
            self.barrier()
            _set_pg_timeout(timedelta(seconds=seconds))

    def main_decides(
        self,
        decide: Callable[[], T],
        dump: Callable[[T], bytes] = _as_json,
        load: Callable[[bytes], T] = json.loads,
        *,
        main: int = 0,
    ) -> T:
        """Run `decide` on the main process, and return its result on all processes.

        If `decide` raises a LoraKitError, all processes raise it. Any other error is raised on the main process only.

        Args:
            decide: The function.
            dump: Serialises its result. Nothing is pickled, since unpickling would run the code of whoever can write
                to a connection between processes.
            load: Returns the result from what `dump` returned.
            main: The index of the process that decides.
        """
        if self.count == 1:
            return decide()
        result, error, message = list[T](), None, b""
        if self.index == main:
            try:
                result.append(decide())
                message = RESULT + dump(result[0])
            except LoraKitError as raised:
                error, message = raised, ERROR + _as_json([type(raised).__name__, str(raised)])
        message = self._broadcast(message, main)
        if error is not None:
            raise error
        if message.startswith(ERROR):
            name, text = json.loads(message.removeprefix(ERROR))
            raise getattr(errors, name)(text)
        return result[0] if self.index == main else load(message.removeprefix(RESULT))

    def _broadcast(self, message: bytes, source: int) -> bytes:
        """Return the message of a process, which is not empty."""
        size = torch.tensor([len(message)], device=self.device)
        dist.broadcast(size, source, group=self.group)
        content = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.index == source:
            content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        dist.broadcast(content, source, group=self.group)
        return content.cpu().numpy().tobytes()

    def broadcast(self, buffers: Sequence[Tensor], source: int = 0) -> None:
        """Copy a process's buffers to the other processes, which have buffers of the same sizes."""
        for buffer in buffers if self.count > 1 else ():
            dist.broadcast(buffer, source)

    def copy_to_all(self, file: BinaryIO) -> None:
        """Copy the main process' file in pieces to the empty files of the other processes."""
        file.seek(0)
        while piece := self.main_decides(lambda: file.read(COPIED_BYTES), bytes, bytes):
            if not self.is_main:
                file.write(piece)
        file.flush()

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return the items of all processes, in the order of the processes; they are values of JSON."""
        if self.count == 1:
            return list(items)
        message = _as_json(list(items))
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(message)], device=self.device), group=self.group)
        longest = int(torch.cat(sizes).max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(message)].copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        contents = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(contents, padded, group=self.group)
        messages = (content[: int(size)].cpu().numpy().tobytes() for content, size in zip(contents, sizes, strict=True))
        return [item for message in messages for item in json.loads(message)]

    def tree_sum(self, flat: Float32[Tensor, "length"], contributors: int) -> None:
        """Replace `flat` on every process by the sum over the first `contributors` processes, in tree order.

        Each process receives one shard of all processes, adds it up and sends the sum to all: the traffic of a ring
        all-reduce, with a fixed order of addition.
        """
        if self.count == 1:
            return
        length = flat.numel()
        padded = torch.nn.functional.pad(flat, (0, -length % self.count))
        received = torch.empty_like(padded)
        dist.all_to_all_single(received, padded)
        shard = tree(list(received.view(self.count, -1)[:contributors]))
        dist.all_gather(list(padded.chunk(self.count)), shard.contiguous())
        flat.copy_(padded[:length])

    def different(self, buffers: Sequence[Tensor]) -> list[int]:
        """Return the processes whose buffers differ from the majority's; of two processes, from process 0's."""
        own = torch.stack([buffer.view(torch.uint8).view(torch.int32).sum(dtype=torch.int64) for buffer in buffers])
        gathered = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(gathered, own)
        checksums = [tuple(checksum.tolist()) for checksum in gathered]
        majority = max(checksums, key=lambda checksum: (checksums.count(checksum), checksum == checksums[0]))
        return [index for index, checksum in enumerate(checksums) if checksum != majority]

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Refuse processes that would not compute the same bits from the same inputs.

        Args:
            facts: What this process computes with: versions, backend, processor.

        Raises:
            LaunchError: A process differs from process 0; all processes raise it, with a list of the differences.
        """
        first, *others = self.gather([dict(facts)])
        problems = [
            f"process {index} has {name} {theirs.get(name, 'absent')!r}, process 0 has {first.get(name, 'absent')!r}"
            for index, theirs in enumerate(others, 1)
            for name in sorted({*first, *theirs})
            if first.get(name) != theirs.get(name)
        ]
        if problems:
            raise LaunchError(
                "launcher: the processes compute with different kernels, so their states would drift apart:\n"
                + "\n".join(problems)
                + "\ngive all processes the same packages, C compiler, environment and settings of torch, on one kind "
                "of machine"
            )

    def has_fewer(self, count: int) -> bool:
        """Return whether this process gets fewer than others of `count` items that are dealt out in turn."""
        return len(range(self.index, count, self.count)) < -(-count // self.count)

    def mesh(self) -> DeviceMesh:
        """Return all processes as the one dimension over which a base is sharded."""
        return init_device_mesh(self.device.type, (self.count,))

    def barrier(self) -> None:
        """Wait for all processes."""
        wait_for_everyone()


def _end_group() -> None:
    """Close the process group before Python exits: threads of the group that outlive the interpreter abort it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def tree(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors in the order of `data.packing.reduction_schedule`."""
    return parts[0] if len(parts) == 1 else tree(parts[0::2]) + tree(parts[1::2])
