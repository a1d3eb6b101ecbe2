"""The trainable state: weights, gradient and the two moments of AdamW, one flat fp32 buffer each.

The model's parameters are views into the first two. So the optimizer step, the norm, the reduction and a snapshot are
one operation on one buffer.
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
LOSS, STOP, METRICS = 0, 1, 2  # where `FlatState.sums` holds the loss, the wish to stop and the first metric


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are trained, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def saved_name(parameter_name: str) -> str:
    """Return the name under which PEFT saves a parameter: without the adapter's own name."""
    return parameter_name.replace(".default.", ".")


@dataclass(frozen=True)
class FlatState:
    """All that training changes, in one piece on one device, fp32.

    Attributes:
        names: PEFT's saved names, in the order of the buffers.
        parameters: The model's parameters; views into `weights`, their gradients views into `gradient`.
        weights: The master weights.
        reduced: What processes add up in one reduction: the gradient, then `sums`.
        moments: AdamW's running averages of the gradient and of its square.
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
        """The loss, how many processes want to stop, and the metrics of the objective."""
        return self.reduced[self.size :]

    def assert_views(self) -> None:
        """Check that the model still computes with these buffers; some loaders replace parameters in silence."""
        weight, gradient = self.weights.data_ptr(), self.gradient.data_ptr()
        for parameter in self.parameters:
            assert parameter.data_ptr() == weight, "an adapter tensor left the flat buffer"
            assert parameter.grad is not None and parameter.grad.data_ptr() == gradient
            weight, gradient = weight + parameter.nbytes, gradient + parameter.nbytes

    def _split(self, flat: Tensor) -> list[Tensor]:
        sizes = [parameter.numel() for parameter in self.parameters]
        pieces = flat.split(sizes)
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by PEFT's names, in the order of the buffers."""
        return {name: tuple(one.shape) for name, one in zip(self.names, self.parameters, strict=True)}

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a snapshot holds: the weights and the two moments."""
        return self.weights, *self.moments

    def load_weights(self, adapter: Arrays) -> None:
        """Copy a saved adapter into the weights alone.

        Raises:
            CheckpointError: A name or a shape does not match this run's adapter.
        """
        _fill(self.names, self._split(self.weights), adapter)

    def load(self, weights: Arrays, first: Arrays, second: Arrays) -> None:
        """Copy saved weights and moments into the buffers.

        Raises:
            CheckpointError: A name or a shape does not match this run's adapter.
        """
        for buffer, arrays in zip(self.kept, (weights, first, second), strict=True):
            _fill(self.names, self._split(buffer), arrays)


def _fill(names: tuple[str, ...], views: list[Tensor], arrays: Arrays) -> None:
    if set(names) != set(arrays):
        odd = sorted(set(names) ^ set(arrays))
        raise CheckpointError(f"checkpoint: its tensors are not this adapter's; {len(odd)} differ, first {odd[0]}")
    for name, view in zip(names, views, strict=True):
        if tuple(view.shape) != arrays[name].shape:
            raise CheckpointError(f"checkpoint: {name} has shape {arrays[name].shape}, expected {tuple(view.shape)}")
        view.copy_(torch.from_numpy(arrays[name]))


def flatten(model: nn.Module, *, metrics: int = 0) -> FlatState:
    """Move the trainable parameters into flat buffers and leave views in the model.

    Do this last, after every move and load.

    Args:
        model: Base and adapter.
        metrics: How many metrics of an objective are summed with the gradient.
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


def refuse_unreached(state: FlatState) -> None:
    """Check that the gradient of a run's first step reached every layer of the adapter.

    A's gradient is zero while B is zero, so a layer is unreached when neither has one. An expert that is a layer of its
    own may be without tokens in one step, and is let through.

    Raises:
        RecipeError: Names the tensors that would stay as they are.
    """
    touched = torch.stack([piece.any() for piece in state._split(state.gradient)]).tolist()
    layers = [name.partition(".lora_")[0] for name in state.names]
    reached = {layer for layer, any_of_it in zip(layers, touched, strict=True) if any_of_it}
    still = [
        name
        for name, layer in zip(state.names, layers, strict=True)
        if layer not in reached and not re.search(r"\.experts\.\d+\.", layer)
    ]
    if still:
        names = "\n".join(f"  {name}" for name in still[:20]) + ("\n  ..." if len(still) > 20 else "")
        raise RecipeError(
            f"adapter.targets: {len(still)} tensors got no gradient in the first step; the base does not use their "
            f"layers here, so leave them out:\n{names}"
        )
