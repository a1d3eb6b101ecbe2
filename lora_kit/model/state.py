"""The trainable state: weights, gradient and the two moments of AdamW, each a flat fp32 buffer.

The model's parameters and their gradients are views of the first two buffers. So the optimizer step, the gradient norm,
the all-reduce and a snapshot are each a single operation on a buffer.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from lora_kit.errors import CheckpointError, RecipeError
from lora_kit.runs.layout import CONSTANTS, WEIGHTS, Layout, State, cut, without_constants

Arrays = Mapping[str, np.ndarray]
DTYPES = {"F32": torch.float32, "U8": torch.uint8}
MAGNITUDE = "lora_magnitude_vector"  # peft's name of the magnitudes of DoRA
LOSS, STOP, METRICS = 0, 1, 2  # indices into `FlatState.sums`: the loss, the requests to stop, the first metric


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) for every parameter that requires a gradient."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


class Kind(IntEnum):
    """The kinds of trainable parameters, in their order in the buffers."""

    MAGNITUDE = 0
    A = 1
    B = 2


def kind_of(name: str) -> Kind:
    """Return the kind of a parameter."""
    if ".lora_B." in name:
        return Kind.B
    return Kind.MAGNITUDE if MAGNITUDE in name else Kind.A


def saved_name(parameter_name: str) -> str:
    """Return the name under which PEFT saves a parameter, which lacks the name of the adapter (`default`)."""
    name = parameter_name.replace(".default.", ".")
    return name.removesuffix(".weight") if name.endswith(f".{MAGNITUDE}.weight") else name


@dataclass(frozen=True)
class FlatState:
    """Everything that training changes, as fp32 buffers on a device.

    The tensors of a kind are adjacent: first the magnitudes of DoRA, then every A, then every B. So a kind can have its
    own learning rate and weight decay, as a range of the buffers.

    Attributes:
        names: The names of the parameters in PEFT's files, in the order of the buffers.
        parameters: The model's trainable parameters: views of `weights`, with gradients that are views of `gradient`.
        weights: The master weights of the adapter.
        reduced: The buffer that the processes all-reduce: the gradient, followed by `sums`.
        moments: The optimizer's buffers in the order of `Layout.moments`: AdamW's first and second moment in fp32, or
            the scales and then the codes of both moments in 8 bits.
        constants: A0 and -B0 of the starts `pissa` and `olora`, with the shapes of A and B; None without them.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weights: Float32[Tensor, "size"]
    reduced: Float32[Tensor, "size_and_sums"]
    moments: tuple[Tensor, ...]
    constants: Float32[Tensor, "size"] | None

    @property
    def size(self) -> int:
        """The number of trainable parameters."""
        return self.weights.numel()

    @property
    def on_cuda(self) -> bool:
        """Whether the buffers are in the memory of a GPU."""
        return self.weights.is_cuda

    @property
    def ranges(self) -> dict[Kind, slice]:
        """The range of each kind of parameters in the buffers."""
        sizes = dict.fromkeys(Kind, 0)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            sizes[kind_of(name)] += parameter.numel()
        ends = np.cumsum([*sizes.values()]).tolist()
        return {kind: slice(end - sizes[kind], end) for kind, end in zip(Kind, ends, strict=True)}

    @property
    def gradient(self) -> Float32[Tensor, "size"]:
        """The gradient of the weights."""
        return self.reduced[: self.size]

    @property
    def sums(self) -> Float32[Tensor, "sums"]:
        """The sum of the loss, the number of processes that want to stop, and the metrics of the objective."""
        return self.reduced[self.size :]

    def assert_views(self) -> None:
        """Check that parameters and gradients are still views of the buffers, since some loaders replace parameters."""
        weight, gradient = self.weights.data_ptr(), self.gradient.data_ptr()
        for parameter in self.parameters:
            assert parameter.data_ptr() == weight, "an adapter tensor left the flat buffer"
            assert parameter.grad is not None and parameter.grad.data_ptr() == gradient
            weight, gradient = weight + parameter.nbytes, gradient + parameter.nbytes

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Return a view of each parameter's part of a flat buffer."""
        sizes = [parameter.numel() for parameter in self.parameters]
        pieces = flat.split(sizes)
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters by PEFT's names, in the order of the buffers."""
        return {name: tuple(parameter.shape) for name, parameter in zip(self.names, self.parameters, strict=True)}

    @property
    def layout(self) -> Layout:
        """The layout of a snapshot of this state."""
        eight_bit = any(moment.dtype == torch.uint8 for moment in self.moments)
        return Layout(self.shapes, eight_bit, self.constants is not None)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """The buffers that a snapshot contains, in the order of `layout`."""
        return self.weights, *self.moments, *(() if self.constants is None else (self.constants,))

    def constants_by_name(self) -> dict[str, Tensor]:
        """Return views of A0 and -B0 by the names of A and B; empty without them."""
        if self.constants is None:
            return {}
        shapes = self.layout.paired
        pieces = self.constants.split([math.prod(shape) for shape in shapes.values()])
        return {name: piece.view(*shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}

    def load_weights(self, adapter: Arrays) -> None:
        """Copy a saved adapter into the weights; the moments are unchanged.

        Raises:
            CheckpointError: A name or a shape does not match this run's adapter.
        """
        _fill(self.names, self._split(self.weights), adapter)

    def load_adapter(self, adapter: Arrays) -> None:
        """Copy the tensors of an adapter's file into the weights and the constants; the moments are unchanged.

        Raises:
            CheckpointError: A name or a shape does not match this run's adapter.
        """
        trained, constants = without_constants(dict(adapter)) if self.constants is not None else (adapter, {})
        self.load_weights(trained)
        by_name = self.constants_by_name()
        _fill(tuple(by_name), [*by_name.values()], constants)

    def load(self, saved: State) -> None:
        """Copy a saved state into the buffers.

        Raises:
            CheckpointError: A name or a shape does not match this run's adapter.
        """
        layout, order = self.layout, {name: array.shape for name, array in saved.weights.items()}
        self.load_weights(saved.weights)
        if layout.eight_bit and tuple(order) != self.names:
            raise CheckpointError("checkpoint: its tensors have another order, which moments in 8 bits cannot change")
        for name, buffer in zip(layout.moments, self.moments, strict=True):
            array = saved.moments[name]
            if array.size != buffer.numel():
                raise CheckpointError(f"checkpoint: {name} has {array.size:,} values, expected {buffer.numel():,}")
            if layout.eight_bit:
                buffer.copy_(torch.from_numpy(array))
            else:
                _fill(self.names, self._split(buffer), cut(array, order))
        constants = self.constants_by_name()
        _fill(tuple(constants), [*constants.values()], saved.constants)


def fill(model: nn.Module, adapter: Arrays, device: torch.device) -> None:
    """Give the trainable parameters of a model, which may be on the meta device, the values of a saved adapter.

    Raises:
        CheckpointError: The names or a shape do not match the model's adapter; nothing was allocated.
    """
    names, parameters = zip(*trainable(model), strict=True)
    saved = tuple(map(saved_name, names))
    _require_same(saved, parameters, adapter)
    values = {name: torch.from_numpy(adapter[key]).to(device) for name, key in zip(names, saved, strict=True)}
    model.load_state_dict(values, strict=False, assign=True)


def _fill(names: tuple[str, ...], views: list[Tensor], arrays: Arrays) -> None:
    _require_same(names, views, arrays)
    for name, view in zip(names, views, strict=True):
        view.copy_(torch.from_numpy(arrays[name]))


def _require_same(names: Sequence[str], tensors: Sequence[Tensor], arrays: Arrays) -> None:
    """Raise a CheckpointError if the arrays do not have exactly these names and the tensors' shapes."""
    if different := sorted(set(names) ^ set(arrays)):
        raise CheckpointError(
            f"checkpoint: {len(different)} tensor names differ from this adapter's, the first is {different[0]}; use a "
            "checkpoint of the same base and adapter.targets"
        )
    for name, tensor in zip(names, tensors, strict=True):
        if (shape := tuple(tensor.shape)) != arrays[name].shape:
            raise CheckpointError(f"checkpoint: {name} has shape {arrays[name].shape}, expected {shape}")


def flatten(model: nn.Module, *, metrics: int = 0, eight_bit: bool = False, constants: bool = False) -> FlatState:
    """Move the trainable parameters into flat buffers and replace them in the model by views.

    Call this after the model was moved to its device and loaded, since both would replace the views.

    Args:
        model: Base and adapter.
        metrics: The number of metrics of the objective, which are summed over processes with the gradient.
        eight_bit: Whether the moments have 8 bits a value.
        constants: Whether the state has A0 and -B0; they are zero until they are set.
    """
    named = sorted(trainable(model), key=lambda pair: kind_of(pair[0]))
    parameters = tuple(parameter for _, parameter in named)
    assert parameters and all(parameter.dtype == torch.float32 for parameter in parameters)
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    reduced = torch.zeros(weights.numel() + METRICS + metrics, device=weights.device)
    names = tuple(saved_name(name) for name, _ in named)
    shapes = {name: tuple(parameter.shape) for name, parameter in zip(names, parameters, strict=True)}
    layout = Layout(shapes, eight_bit, constants)
    zeros = {
        name: weights.new_zeros(count, dtype=DTYPES[dtype])
        for name, (dtype, count) in layout.buffers.items()
        if name != WEIGHTS
    }
    state = FlatState(
        names=names,
        parameters=parameters,
        weights=weights,
        reduced=reduced,
        moments=tuple(zeros[name] for name in layout.moments),
        constants=zeros.get(CONSTANTS),
    )
    for parameter, weight, grad in zip(parameters, state._split(weights), state._split(state.gradient), strict=True):
        parameter.data, parameter.grad = weight, grad
    state.assert_views()
    return state


def refuse_unused(state: FlatState) -> None:
    """Check that every adapted layer got a gradient in the first step of a run.

    While B is zero, the gradient of A is zero too, so a layer counts as unused only if neither has a gradient. Separate
    layers of experts are not checked, because an expert may receive no token in a step.

    Raises:
        RecipeError: Some layers got no gradient; the message lists their tensors.
    """
    nonzero = torch.stack([piece.any() for piece in state._split(state.gradient)]).tolist()
    layers = [name.partition(".lora_")[0] for name in state.names]
    reached = {layer for layer, has_gradient in zip(layers, nonzero, strict=True) if has_gradient}
    unused = [
        name
        for name, layer in zip(state.names, layers, strict=True)
        if layer not in reached and not re.search(r"\.experts\.\d+\.", layer)
    ]
    if unused:
        names = "\n".join(f"  {name}" for name in unused[:20]) + ("\n  ..." if len(unused) > 20 else "")
        raise RecipeError(
            f"adapter.targets: {len(unused)} tensors got no gradient in the first step, because the base does not use "
            f"their layers; remove these layers from the targets:\n{names}"
        )
