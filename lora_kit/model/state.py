"""The trainable state: weights, gradient and the two moments of AdamW, each a flat fp32 buffer.

The model's parameters and their gradients are views of the first two buffers. So the optimizer step, the gradient norm,
the all-reduce and a snapshot are each a single operation on a buffer.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from lora_kit.errors import CheckpointError, RecipeError

Arrays = Mapping[str, np.ndarray]
LOSS, STOP, METRICS = 0, 1, 2  # indices into `FlatState.sums`: the loss, the requests to stop, the first metric


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) for every parameter that requires a gradient."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def saved_name(parameter_name: str) -> str:
    """Return the name under which PEFT saves a parameter, which lacks the name of the adapter (`default`)."""
    return parameter_name.replace(".default.", ".")


@dataclass(frozen=True)
class FlatState:
    """Everything that training changes, as fp32 buffers on a device.

    Attributes:
        names: The names of the parameters in PEFT's files, in the order of the buffers.
        parameters: The model's trainable parameters: views of `weights`, with gradients that are views of `gradient`.
        weights: The master weights of the adapter.
        reduced: The buffer that the processes all-reduce: the gradient, followed by `sums`.
        moments: AdamW's first and second moment (exp_avg and exp_avg_sq).
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weights: Float32[Tensor, "size"]
    reduced: Float32[Tensor, "size_and_sums"]
    moments: tuple[Float32[Tensor, "size"], Float32[Tensor, "size"]]

    @property
    def size(self) -> int:
        """The number of trainable parameters."""
        return self.weights.numel()

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
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers that a snapshot contains: the weights and the two moments."""
        return self.weights, *self.moments

    def load_weights(self, adapter: Arrays) -> None:
        """Copy a saved adapter into the weights; the moments are unchanged.

        Raises:
            CheckpointError: A name or a shape does not match this run's adapter.
        """
        _fill(self.names, self._split(self.weights), adapter)

    def load(self, weights: Arrays, first: Arrays, second: Arrays) -> None:
        """Copy saved weights, first moments and second moments into the buffers.

        Raises:
            CheckpointError: A name or a shape does not match this run's adapter.
        """
        for buffer, arrays in zip(self.kept, (weights, first, second), strict=True):
            _fill(self.names, self._split(buffer), arrays)


def fill(model: nn.Module, adapter: Arrays) -> None:
    """Copy a saved adapter into the trainable parameters of a model.

    Raises:
        CheckpointError: The names or a shape do not match the model's adapter.
    """
    names, parameters = zip(*trainable(model), strict=True)
    _fill(tuple(map(saved_name, names)), [parameter.data for parameter in parameters], adapter)


def _fill(names: tuple[str, ...], views: list[Tensor], arrays: Arrays) -> None:
    if set(names) != set(arrays):
        different = sorted(set(names) ^ set(arrays))
        raise CheckpointError(
            f"checkpoint: {len(different)} tensor names differ from this adapter's, the first is {different[0]}; use a "
            "checkpoint of the same base and adapter.targets"
        )
    for name, view in zip(names, views, strict=True):
        if tuple(view.shape) != arrays[name].shape:
            raise CheckpointError(f"checkpoint: {name} has shape {arrays[name].shape}, expected {tuple(view.shape)}")
        view.copy_(torch.from_numpy(arrays[name]))


def flatten(model: nn.Module, *, metrics: int = 0) -> FlatState:
    """Move the trainable parameters into flat buffers and replace them in the model by views.

    Call this after the model was moved to its device and loaded, since both would replace the views.

    Args:
        model: Base and adapter.
        metrics: The number of metrics of the objective, which are summed over processes with the gradient.
    """
    named = list(trainable(model))
    parameters = tuple(parameter for _, parameter in named)
    assert parameters and all(parameter.dtype == torch.float32 for parameter in parameters)
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    reduced = torch.zeros(weights.numel() + METRICS + metrics, device=weights.device)
    state = FlatState(
        names=tuple(saved_name(name) for name, _ in named),
        parameters=parameters,
        weights=weights,
        reduced=reduced,
        moments=(torch.zeros_like(weights), torch.zeros_like(weights)),
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
