"""The closed-world check: what changes from step to step and is not part of the captured state.

It walks everything that can be reached from a trainer (model, optimizer, scheduler, callbacks, data loader, collator,
custom objects) and takes the value of every number, array, tensor and random generator. A value that differs from that
after the first step, and that no snapshot contains, would be lost by a resume: its path is named. The check runs after
steps 1, 2, 4, 8 and so on, because some values change rarely.

Left out, with the reason: what only shows progress or measures time, what is computed again from the position in the
data (the counters of accelerate's data loaders and samplers), tokens and tables of a dataset, and the code itself. Of a
container with many items the first `MOST_ITEMS` are looked at, of a large tensor `SAMPLED` values and its version.
"""

import random
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState

from lora_kit.integrations import plain
from lora_kit.integrations.capture import Attributes, owners, trainable

MOST_ITEMS, MOST_OBJECTS = 256, 300_000
WHOLE_BYTES, SAMPLED = 1 << 20, 4096
SHOWN = 12  # paths in a message
NOT_STATE = (  # modules whose objects are no state of the training; see the module's docstring
    *("tqdm", "logging", "threading", "_thread", "concurrent", "multiprocessing", "asyncio", "importlib", "weakref"),
    *("datasets", "pyarrow", "pandas", "tokenizers", "lora_kit", "rich", "transformers.trainer_utils"),
    *("accelerate.state", "accelerate.tracking", "accelerate.utils", "torch._dynamo", "torch._inductor"),
    *("torch.distributed", "torch._C", "transformers.utils", "transformers.integrations", "torch.utils.hooks"),
)
OF_MODULE = re.compile(r"\._(modules|buffers|parameters)\['([^']*)'\]")  # to be shown as an attribute
PYTHON = ("builtins", "collections", "functools")  # containers and functions, of which only the content counts
COUNTS_ITSELF = ("accelerate.data_loader", "torch.utils.data.dataloader")  # numbers that follow from the position
LEAVES = (int, float, complex)
CODE = (type, ModuleType, BuiltinFunctionType, CodeType, str, bytes, bool, type(None))


class ClosedWorld:
    """Compares a trainer with what it was after the first step.

    Args:
        trainer: The trainer.
        but: The callback that captures its state.
        attributes: What the callback captures of trainer, control and callbacks.
    """

    def __init__(self, trainer: Trainer, but: TrainerCallback, attributes: Attributes) -> None:
        self._trainer: Any = trainer
        self._but, self._attributes = but, attributes
        self._first: dict[str, Any] | None = None
        self._named = set[str]()
        self._next = 0
        self._owners = set[int]()

    @property
    def is_due(self) -> bool:
        """Whether the next call of `look` looks, if a step follows the last one."""
        return self._trainer.state.global_step + 1 >= self._next

    def look(self, step: int) -> list[str]:
        """Look at the trainer after a step, if it is time; return the paths that were not named before."""
        if step < self._next:
            return []
        found = dict(self._values())
        if self._first is None:
            self._first, self._next = found, step + 1
            return []
        self._next = 2 * step
        before = self._first
        changed = [path for path, value in found.items() if path in before and before[path] != value]
        new = [path for path in changed if path not in self._named]
        self._named |= set(new)
        new = [OF_MODULE.sub(r".\2", path) for path in new]
        return [*new[:SHOWN], *([f"{len(new) - SHOWN} more"] if len(new) > SHOWN else [])]

    def _values(self) -> Iterator[tuple[str, Any]]:
        """Yield path and value of everything that can be reached and is not captured."""
        self._owners = {id(owner) for _, owner in owners(self._trainer, self._but)}
        shown = {id(callback) for callback in self._trainer.callback_handler.callbacks}
        captured = (shown - self._owners) | {id(parameter) for parameter in trainable(self._trainer.model).values()}
        queue, seen = deque[tuple[str, Any]]([("trainer", self._trainer)]), dict[int, Any]()
        while queue and len(seen) < MOST_OBJECTS:
            path, value = queue.popleft()
            if id(value) in captured or isinstance(value, CODE):
                continue
            if isinstance(value, (*LEAVES, np.generic)):
                yield path, value if value == value else "nan"
                continue
            if id(value) in seen:
                continue
            seen[id(value)] = value  # kept, so that no other object gets its id
            digest = _digest(value)
            if digest is not None:
                yield path, digest
            else:
                queue.extend(self._inside(path, value))

    def _inside(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield the parts of an object that are worth a look, with their paths."""
        if isinstance(value, Mapping):
            yield f"len({path})", len(value)
            for place, key in enumerate([*value]):
                if place < MOST_ITEMS:
                    yield f"{path}[{key!r}]"[:200], value[key]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            yield f"len({path})", len(value)
            for place, item in enumerate(value):
                if place == MOST_ITEMS:
                    break
                if not isinstance(value, Set):
                    yield f"{path}[{place}]", item
        elif isinstance(value, FunctionType):
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
                try:
                    yield f"{path}.<{name}>", cell.cell_contents
                except ValueError:  # an empty cell
                    continue
        elif isinstance(value, MethodType):
            yield path.rpartition(".")[0] or path, value.__self__
        elif isinstance(value, partial):
            yield from ((f"{path}.{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
        if _module(value) not in PYTHON and not _module(value).startswith(NOT_STATE):
            yield from self._attributes_of(path, value)

    def _attributes_of(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (TrainerState, LRScheduler, PreTrainedTokenizerBase)):
            return  # captured whole, or never changing
        names = dict(getattr(value, "__dict__", {}))
        slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
        names |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
        if isinstance(value, Accelerator):
            names = {"_custom_objects": names.get("_custom_objects")}
        elif isinstance(value, DistributedDataParallel):
            names = {"module": value.module}
        elif isinstance(value, Optimizer):
            names = {name: part for name, part in names.items() if name not in ("state", "param_groups", "defaults")}
        elif isinstance(value, torch.nn.Module):
            names = {name: part for name, part in names.items() if "hook" not in name}  # code, which comes and goes
        counts = _module(value).startswith(COUNTS_ITSELF)
        for name, part in list(names.items()):
            number = isinstance(part, (*LEAVES, torch.Generator))
            captured = id(value) in self._owners and self._attributes.captures(value, name)
            if captured or (counts and number):
                continue
            yield f"{path}.{name}", part


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if not name.startswith("__")]


def _module(value: Any) -> str:
    return str(type(value).__module__)


def _digest(value: Any) -> Any:
    """Return a value that stands for the content of a tensor, an array or a generator; None for another object."""
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray):
        return (value.shape, xxhash.xxh3_64_intdigest(np.ascontiguousarray(value.reshape(-1)[:SAMPLED]).tobytes()))
    if isinstance(value, torch.Generator):
        return xxhash.xxh3_64_intdigest(value.get_state().numpy().tobytes())
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, (np.random.Generator, np.random.RandomState)):
        generator = value if isinstance(value, np.random.RandomState) else value.bit_generator
        state = generator.get_state() if isinstance(generator, np.random.RandomState) else generator.state
        return xxhash.xxh3_64_intdigest(repr(state).encode())
    return None


def _of_tensor(tensor: torch.Tensor) -> Any:
    shape = tuple(tensor.shape)
    if tensor.device.type == "meta" or tensor.layout != torch.strided or not tensor.numel():
        return shape
    flat = tensor.detach().reshape(-1)
    if tensor.nbytes > WHOLE_BYTES:
        flat = flat[:: max(1, flat.numel() // SAMPLED)]
    content = plain.flat_bytes(flat.cpu()).numpy().tobytes()
    version = tensor._version if tensor.nbytes > WHOLE_BYTES and not tensor.is_inference() else 0
    return shape, xxhash.xxh3_64_intdigest(content), version
