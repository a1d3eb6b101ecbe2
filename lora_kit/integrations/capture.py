"""The state of a transformers `Trainer`: what is captured after a step, and how a new process gets it back.

Tensors of weights and optimizer lie in a snapshot as they are. Everything else is a document of JSON: the optimizer's
and the scheduler's other values, the scaler, `TrainerState`, and for each process its random generators and the
attributes of trainer and callbacks that have changed since training began. Not all attributes are stored, so a resume
does not bring back what the script or the machine decides.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_kit.errors import CheckpointError, ContractError
from lora_kit.integrations import plain
from lora_kit.model.adapter import saved_config
from lora_kit.runs.layout import BYTES, Dtype
from lora_kit.runs.scripts import LENGTH_BYTES, Tensors

RUNNING = (  # attributes of a trainer that `train()` sets to 0 before training, also in a resume
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_global_step",
    "_initial_num_input_tokens_seen",
)
OF_THE_PROCESS = re.compile("initialized|_setup|_created|is_in_train|_signature_columns|_mixed_mesh_grads")
SHOWING = (ProgressCallback, PrinterCallback)
SHOWN_BY = ("transformers.integrations", "transformers.utils.notebook", "trl.trainer.callbacks.Rich")
NAMES: dict[torch.dtype, Dtype] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH = {name: dtype for dtype, name in NAMES.items()}
SMALLEST_DOCUMENT = 1 << 18


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by the names under which a checkpoint has them: PEFT's for an adapter of PEFT."""
    names = {}
    if isinstance(model, PeftModel):
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
        names = {tensor.data_ptr(): name for name, tensor in saved.items() if tensor.numel()}
    return {
        names.get(parameter.data_ptr(), name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapter_config_of(model: torch.nn.Module) -> str | None:
    """Return the text of adapter_config.json; None if the model is not one of PEFT."""
    return json.dumps(saved_config(model), indent=2) + "\n" if isinstance(model, PeftModel) else None


def layout_of(tensors: dict[str, Tensor]) -> Tensors:
    """Return the dtype and the shape of each tensor."""
    return {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def from_bytes(dtype: Dtype, shape: Sequence[int], content: memoryview) -> Tensor:
    """Return a tensor with a copy of these values."""
    flat = torch.empty(len(content) // BYTES[dtype], dtype=TORCH[dtype])
    flat.view(torch.uint8).numpy()[:] = np.frombuffer(content, np.uint8)
    return flat.reshape(tuple(shape))


def owners(trainer: Trainer, but: TrainerCallback) -> Iterator[tuple[str, Any]]:
    """Yield trainer, control and callbacks with their names, without callbacks that only show or report progress."""
    yield "trainer", trainer
    yield "control", trainer.control
    for place, callback in enumerate(trainer.callback_handler.callbacks):
        kind = type(callback)
        shows = isinstance(callback, SHOWING) or f"{kind.__module__}.{kind.__qualname__}".startswith(SHOWN_BY)
        if callback is not but and not shows:
            yield f"callback {place} {kind.__name__}", callback


class Attributes:
    """The plain attributes of trainer, control and callbacks that have changed since training began."""

    def __init__(self, trainer: Trainer, but: TrainerCallback) -> None:
        self._trainer, self._but = trainer, but
        self._begin = {owner: dict(self._plain(value)) for owner, value in owners(trainer, but)}

    def _plain(self, owner: Any) -> Iterator[tuple[str, str]]:
        for name, value in vars(owner).items():
            if not OF_THE_PROCESS.search(name):
                try:
                    yield name, json.dumps(plain.pack(value))
                except plain.NotPlainError:
                    continue

    def changed(self) -> dict[str, dict[str, Any]]:
        """Return the attributes as JSON, by owner and name."""
        found = dict[str, dict[str, Any]]()
        for owner, value in owners(self._trainer, self._but):
            before = self._begin.get(owner, {})
            always = RUNNING if value is self._trainer else tuple(vars(value)) if owner == "control" else ()
            found[owner] = {
                name: json.loads(text)
                for name, text in self._plain(value)
                if before.get(name) != text or name in always
            }
        return found

    def captures(self, owner: Any, name: str) -> bool:
        """Return whether a change of this attribute of one of the `owners` is captured."""
        if OF_THE_PROCESS.search(name):
            return False
        try:
            plain.pack(vars(owner).get(name))
        except plain.NotPlainError:
            return False
        return True

    def restore(self, saved: dict[str, dict[str, Any]]) -> list[str]:
        """Set the attributes as they were; return the owners that this process does not have."""
        here = dict(owners(self._trainer, self._but))
        for owner, attributes in saved.items():
            for name, packed in attributes.items():
                if owner in here:
                    setattr(here[owner], name, plain.unpack(packed, device=self._trainer.args.device))
        return sorted(owner for owner, attributes in saved.items() if owner not in here and attributes)


def optimizer_state(trainer: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the optimizer's state as JSON, and the tensors in it by their paths.

    Raises:
        ContractError: A value in the state is not plain.
    """
    tensors = dict[str, Tensor]()

    def keep(path: str, tensor: Tensor) -> bool:
        tensors[path] = tensor
        return True

    try:
        return plain.pack(trainer.optimizer.state_dict(), keep=keep), tensors
    except plain.NotPlainError as error:
        raise ContractError(
            f"{type(trainer.optimizer).__name__}: its state holds {error}, which cannot be stored without pickling; "
            "use another optimizer"
        ) from None


def shared_document(trainer: Any, optimizer: Any) -> dict[str, Any]:
    """Return the part of the document that is the same for all processes.

    Raises:
        ContractError: A value in the scheduler's or the scaler's state is not plain.
    """
    scaler = getattr(trainer.accelerator, "scaler", None)
    try:
        return {
            "optimizer": optimizer,
            "scheduler": plain.pack(trainer.lr_scheduler.state_dict()),
            "scaler": plain.pack(scaler.state_dict()) if scaler is not None else None,
            "state": {name: value for name, value in vars(trainer.state).items() if name != "log_history"},
        }
    except plain.NotPlainError as error:
        raise ContractError(
            f"{type(trainer.lr_scheduler).__name__}: its state holds {error}, which cannot be stored without pickling"
        ) from None


class Documents:
    """Writes documents as JSON. The log of a training only grows, so each entry of it is encoded once."""

    def __init__(self) -> None:
        self._entries = list[str]()

    def encode(self, document: dict[str, Any], log: Sequence[Any]) -> bytes:
        """Return a document with the log, which is `TrainerState.log_history`."""
        if len(log) < len(self._entries):
            self._entries.clear()
        self._entries += [json.dumps(entry, default=_number) for entry in log[len(self._entries) :]]
        text = json.dumps(document, default=_number)
        return f'{text[:-1]}, "log": [{", ".join(self._entries)}]}}'.encode()

    @staticmethod
    def decode(text: bytes) -> dict[str, Any]:
        """Return the document, with the log in the state.

        Raises:
            CheckpointError: It is not a document.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            document["state"]["log_history"] = document.pop("log")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"state of the trainer: not valid: {error}") from None
        return document


def _number(value: Any) -> Any:
    """Return a number of numpy or torch in the log as a plain number."""
    if isinstance(value, (np.generic, Tensor)):
        return value.item()
    raise TypeError(f"TrainerState: {type(value).__name__} is not JSON")


def load_weights(model: torch.nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy saved weights into the trained parameters.

    Raises:
        ContractError: The names or a shape differ.
    """
    parameters = trainable(model)
    here, there = layout_of(parameters), layout_of(saved)  # type: ignore[arg-type]
    if here != there:
        different = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
        raise ContractError(
            f"the model trains other parameters than the run: {len(different)} differ, the first is {different[0]} "
            f"({there.get(different[0], 'absent')} -> {here.get(different[0], 'absent')}); use another --out"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


class Buffers:
    """The buffers of a snapshot: the document and the tensors as flat bytes; see `Publishable`.

    Args:
        tensors: Weights and optimizer.
        space: The bytes that the document may have.
    """

    def __init__(self, tensors: Sequence[Tensor], space: int) -> None:
        self.space = space
        self._document = torch.zeros(space, dtype=torch.uint8)
        self._tensors, self._flat = list(tensors), [plain.flat_bytes(tensor) for tensor in tensors]
        self._sizes = [tensor.nbytes for tensor in tensors]
        self._on_cuda = any(tensor.is_cuda for tensor in tensors)

    @property
    def kept(self) -> Sequence[Tensor]:
        """The buffers in the order of a snapshot."""
        return self._document, *self._flat

    @property
    def on_cuda(self) -> bool:
        """Whether a tensor is on a GPU."""
        return self._on_cuda

    def assert_views(self) -> None:
        """Nothing: `set` has compared the tensors."""

    def takes(self, document: bytes) -> bool:
        """Return whether there is space for a document."""
        return LENGTH_BYTES + len(document) <= self.space

    def set(self, document: bytes, tensors: Sequence[Tensor]) -> None:
        """Take the document and the tensors of the next snapshot; the copy of the last one has ended.

        Raises:
            ContractError: There are other tensors than at the beginning, as when more layers are trained.
        """
        if [tensor.nbytes for tensor in tensors] != self._sizes:
            raise ContractError(
                "the trained parameters or the optimizer's state have another size than after the first step; such a "
                "training cannot be captured"
            )
        size, content = LENGTH_BYTES + len(document), self._document.numpy()
        content[:LENGTH_BYTES] = np.frombuffer(len(document).to_bytes(LENGTH_BYTES, "little"), np.uint8)
        content[LENGTH_BYTES:size] = np.frombuffer(document, np.uint8)
        for place, tensor in enumerate(tensors):
            if tensor is not self._tensors[place] or tensor.data_ptr() != self._flat[place].data_ptr():
                self._tensors[place], self._flat[place] = tensor, plain.flat_bytes(tensor)


def space_for(document: bytes) -> int:
    """Return a space in which a document of this size can grow."""
    space = SMALLEST_DOCUMENT
    while space < 2 * (len(document) + LENGTH_BYTES):
        space *= 2
    return space
