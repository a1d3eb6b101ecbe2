"""Plain values as JSON: numbers, text, containers of them, small tensors and arrays, states of random generators.

This is how the state of a `Trainer` is stored without pickling. What is not plain is refused, never approximated.
A value that JSON does not have becomes an object with the key `!`, which names its kind.
"""

import base64
import math
import random
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lora_kit.errors import CheckpointError

MOST_BYTES = 1 << 16  # of a tensor or an array inside the JSON
MOST_DEPTH = 8
KIND, VALUE = "!", "v"
FACTORIES: dict[str, Callable[[], Any]] = {"list": list, "int": int, "float": float, "dict": dict, "set": set}
DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}

Keep = Callable[[str, torch.Tensor], bool]


class NotPlainError(Exception):
    """A value is not plain; the message names its type."""


def pack(value: Any, *, keep: Keep = lambda path, tensor: False, path: str = "", depth: int = 0) -> Any:
    """Return a plain value as JSON.

    Args:
        value: The value.
        keep: Called with the path of a tensor; returns whether the caller stores the tensor itself under this path.
        path: The path of the value.
        depth: How deep the value lies.

    Raises:
        NotPlainError: The value, or a value in it, is not plain, or a tensor in it is too large.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {KIND: "float", VALUE: repr(value)}
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value, keep, path)
    if isinstance(value, (np.ndarray, np.generic)):
        return _pack_array(value)
    if kind is bytes:
        return {KIND: "bytes", VALUE: _text(value)}
    if depth == MOST_DEPTH:
        raise NotPlainError(f"{kind.__name__} in {MOST_DEPTH} containers")

    def inner(item: Any, name: Any) -> Any:
        return pack(item, keep=keep, path=f"{path}.{name}" if path else str(name), depth=depth + 1)

    if kind in (list, tuple, set, deque):
        items = sorted(value, key=repr) if kind is set else value
        packed = [inner(item, place) for place, item in enumerate(items)]
        most = {"most": value.maxlen} if kind is deque else {}
        return packed if kind is list else {KIND: kind.__name__, VALUE: packed} | most
    if kind in (dict, OrderedDict, defaultdict):
        if kind is dict and all(type(key) is str and key != KIND for key in value):
            return {key: inner(item, key) for key, item in value.items()}
        pairs = [[inner(key, ""), inner(item, key)] for key, item in value.items()]
        return {KIND: kind.__name__, VALUE: pairs} | _factory(value)
    raise NotPlainError(f"{kind.__module__}.{kind.__qualname__}")


def _factory(value: Any) -> dict[str, str]:
    if not isinstance(value, defaultdict):
        return {}
    name = getattr(value.default_factory, "__name__", "None")
    if FACTORIES.get(name) is not value.default_factory:
        raise NotPlainError(f"defaultdict of {name}")
    return {"factory": name}


def _pack_tensor(value: torch.Tensor, keep: Keep, path: str) -> Any:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise NotPlainError(f"{type(value).__module__}.{type(value).__qualname__}")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise NotPlainError(f"a tensor of {dtype}")
    if keep(path, value):
        return {KIND: "kept", VALUE: path}
    if value.nbytes > MOST_BYTES:
        raise NotPlainError(f"a tensor of {value.nbytes:,} bytes")
    content = flat_bytes(value.cpu()).numpy().tobytes()
    device = value.device.type
    return {KIND: "tensor", VALUE: _text(content), "dtype": dtype, "shape": list(value.shape), "device": device}


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, of shape `[bytes]`; a view if the tensor is contiguous."""
    flat = tensor.detach().reshape(-1).contiguous()
    if flat.numel() < 2:  # contiguous whatever its stride is, but `view` wants a stride of 1
        flat = flat.as_strided(flat.shape, (1,))
    return flat.view(torch.uint8)


def _pack_array(value: "np.ndarray | np.generic") -> Any:
    if value.dtype.kind not in "biuf" or value.nbytes > MOST_BYTES:
        raise NotPlainError(f"an array of {value.dtype}, {value.nbytes:,} bytes")
    kind = "array" if isinstance(value, np.ndarray) else "number"
    return {KIND: kind, VALUE: _text(value.tobytes()), "dtype": value.dtype.str, "shape": list(value.shape)}


def unpack(packed: Any, kept: dict[str, torch.Tensor] | None = None, *, device: torch.device | None = None) -> Any:
    """Return the value that `pack` was given.

    Args:
        packed: JSON.
        kept: The tensors that the caller of `pack` has stored itself.
        device: Where tensors go that were on a GPU.

    Raises:
        CheckpointError: The JSON is not what `pack` returns.
    """
    try:
        return _unpack(packed, kept or {}, device)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"state of the trainer: not valid: {type(error).__name__}: {error}") from None


def _unpack(packed: Any, kept: dict[str, torch.Tensor], device: torch.device | None) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, kept, device) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if KIND not in packed:
        return {key: _unpack(item, kept, device) for key, item in packed.items()}
    kind, value = packed[KIND], packed[VALUE]
    if kind == "float":
        return float(value)
    if kind == "bytes":
        return _bytes(value)
    if kind == "kept":
        return kept[value]
    if kind == "tensor":
        flat = torch.frombuffer(bytearray(_bytes(value)) or bytearray(1), dtype=torch.uint8)[: len(_bytes(value))]
        tensor = flat.view(DTYPES[packed["dtype"]]).reshape(packed["shape"])
        return tensor if packed["device"] == "cpu" or device is None else tensor.to(device)
    if kind in ("array", "number"):
        array_ = np.frombuffer(_bytes(value), np.dtype(packed["dtype"])).reshape(packed["shape"]).copy()
        return array_ if kind == "array" else array_[()]
    items = [_unpack(item, kept, device) for item in value]
    if kind in ("tuple", "set"):
        return tuple(items) if kind == "tuple" else set(items)
    if kind == "deque":
        return deque(items, packed["most"])
    if kind == "defaultdict":
        return defaultdict(FACTORIES[packed["factory"]], items)
    return {"dict": dict, "OrderedDict": OrderedDict}[kind](items)


def random_states() -> dict[str, Any]:
    """Return the states of the global random generators of Python, numpy and torch, on the CPU and every GPU."""
    states = packed_states(random.getstate(), np.random.get_state(), torch.random.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = [_text(state.numpy().tobytes()) for state in torch.cuda.get_rng_state_all()]
    return states


def packed_states(of_python: Any, of_numpy: Any, of_torch: torch.Tensor) -> dict[str, Any]:
    """Return what the three libraries give as the states of their generators, as JSON."""
    version, words, gauss = of_python
    name, keys, place, has_gauss, cached = of_numpy
    return {
        "python": [version, _text(array("I", words).tobytes()), gauss],
        "numpy": [name, _text(np.asarray(keys).tobytes()), int(place), int(has_gauss), float(cached)],
        "torch": _text(of_torch.numpy().tobytes()),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set the global random generators to what `random_states` has returned.

    Raises:
        CheckpointError: The states are not valid, or there are fewer GPUs.
    """
    try:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(array("I", _bytes(words))), gauss))
        name, keys, place, has_gauss, cached = states["numpy"]
        np.random.set_state((name, np.frombuffer(_bytes(keys), np.uint32), place, has_gauss, cached))
        torch.random.set_rng_state(_tensor(states["torch"]))
        for index, state in enumerate(states.get("cuda", [])):
            torch.cuda.set_rng_state(_tensor(state), index)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"states of the random generators: not valid: {error}") from None


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_bytes(text)), dtype=torch.uint8)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
