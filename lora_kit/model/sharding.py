"""Shard the base over the processes with FSDP2; each process loads only its shard.

The units that are gathered and freed together are the decoder layers, the embedding and the head. The adapter is added
after the sharding, so FSDP never manages it: it stays whole on every process. So do the small tensors of the base
(norms and biases). Since the base is frozen, FSDP only gathers weights, at most twice for each unit and micro-batch,
and reduces no gradient.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from threading import Lock
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.torch_version import TorchVersion
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers import AutoHfQuantizer

from lora_kit.errors import BaseError
from lora_kit.kernels.nf4 import PARTS, Nf4Linear, quantize
from lora_kit.model.source import Source

GENERATION = "generation_config.json"
OLDEST = {"torch": "2.13", "transformers": "5.23"}  # oldest versions with which sharding was tested


class LoadReport(NamedTuple):
    """What transformers reports after loading.

    Attributes:
        missing: Tensors of the model that the files do not have.
        mismatched: Tensors with another shape in the files: name, shape there, shape in the model.
    """

    missing: set[str]
    mismatched: set[tuple[str, Any, Any]]


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a base by rows. Its modules hold gathered weights while they compute, and shards at any other time.

    Args:
        model: The base, on the device `meta` or on that of the mesh.
        mesh: The processes, in one dimension.

    Raises:
        BaseError: The family does not name its decoder layers, or torch or transformers is too old.
    """
    for package, oldest in OLDEST.items():
        if TorchVersion(version(package)) < oldest:
            raise BaseError(f"base.placement: sharded needs {package} {oldest}, found {version(package)}; upgrade it")
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise BaseError(
            f"base.placement: {type(model).__name__} does not name its layers (_no_split_modules), so it cannot be "
            "sharded; set base.placement: replicated"
        )
    # torch warns of any output that is a view; nothing here changes an output in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    tied = len({id(module.weight) for module in ends}) < len(ends)
    units: list[Any] = [*reversed(layers), *([ends] if tied else ends)]
    # the fast path calls only the body of the model; every other caller, e.g. generation, calls the whole model
    units += [model] if model.base_model is model else [model.base_model, model]
    small = {parameter for parameter in model.parameters() if parameter.ndim < 2}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=small)


@torch.no_grad()
def load_shards(
    model: PreTrainedModel,
    source: Source,
    device: torch.device,
    mesh: DeviceMesh,
    quantization: BitsAndBytesConfig | None = None,
) -> LoadReport:
    """Shard a base without weights and load this process's shards.

    transformers copies from each tensor, in files that are mapped into memory, the rows that belong to this process.
    For nf4 each process quantises every matrix, one after the other, and keeps its rows of the codes: the scales of a
    matrix are quantised around their mean, so they need all of it.

    Args:
        model: The base, on the device `meta`; loaded in place.
        source: The files of the base.
        device: The device of this process.
        mesh: The processes, in one dimension.
        quantization: The settings of nf4; None for plain weights.

    Raises:
        BaseError: The base cannot be sharded.
    """
    conversions = get_model_conversion_mapping(model)  # found by the names of classes, which `shard` changes
    if quantization is not None:
        _use_nf4(model, quantization)
    shard(model, mesh)
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        ignore_mismatched_sizes=True,  # refused by the caller
        weight_mapping=cast(Any, conversions),
        use_safetensors=True,
    )
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for name in (name for name in source.files if name.endswith(".safetensors")):
            file = stack.enter_context(safe_open(source.folder / name, "pt"))
            tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        made = [entry for entry in _renamed(tensors, model, conversions) if entry[2] is not None]
        if quantization is not None:
            tensors = dict(_with_nf4(tensors, model, conversions, device))
        found, _ = model._load_pretrained_model(model, tensors, None, settings)
    if found.missing_keys and made:
        raise BaseError(
            f"base.placement: sharded: {type(model).__name__} makes {min(found.missing_keys)} from several tensors of "
            "its files, which is supported only for the whole base; set base.placement: replicated"
        )
    found = model._finalize_model_loading(model, settings, found)
    if model.can_generate() and (source.folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    if not (found.missing_keys or found.mismatched_keys):
        # make the whole model FSDP's root, though the fast path calls only its body; a forward pass would do so too,
        # but gathers weights
        cast(Any, model)._get_fsdp_state()._lazy_init()
    return LoadReport(found.missing_keys, found.mismatched_keys)


def _use_nf4(model: PreTrainedModel, settings: BitsAndBytesConfig) -> None:
    """Replace the linear layers that transformers would hold in nf4, in a base on the device `meta`.

    Raises:
        BaseError: The family has transposed layers (Conv1D).
    """
    AutoHfQuantizer.from_config(settings, pre_quantized=False).preprocess_model(model=model, device_map=None)
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear4bit":
            continue
        layer = cast(Any, module)
        if layer.source_cls is not nn.Linear:
            raise BaseError(
                f"base.placement: sharded with base.quantization: nf4: {name} of {type(model).__name__} is a "
                f"{layer.source_cls.__name__}, whose weight is transposed; set base.quantization: none, or "
                "base.placement: replicated"
            )
        model.set_submodule(name, Nf4Linear(layer.in_features, layer.out_features, layer.bias, model.dtype))


def _renamed(
    tensors: Mapping[str, Any], model: PreTrainedModel, conversions: Sequence[Any]
) -> Iterator[tuple[str, str, str | None]]:
    """Yield for each tensor its name in the files, its name in the model, and the pattern of its converter or None."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    names = model.state_dict()
    for key in tensors:
        yield key, *rename_source_key(key, renamings, converters, model.base_model_prefix, names)


def _with_nf4(
    tensors: Mapping[str, Any], model: PreTrainedModel, conversions: Sequence[Any], device: torch.device
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of the files, with the parameters of the nf4 layers in place of their weights.

    Raises:
        BaseError: transformers makes the weight of an nf4 layer from other tensors of the files.
    """
    names, layers = model.state_dict(), dict(model.named_modules())
    for key, name, pattern in list(_renamed(tensors, model, conversions)):
        tensor, (layer, _, kind) = tensors[key], name.rpartition(".")
        if not isinstance(layers.get(layer), Nf4Linear) or kind != "weight":
            yield key, tensor
            continue
        if pattern is not None:
            raise BaseError(
                f"base.placement: sharded with base.quantization: nf4: {type(model).__name__} makes {name} from other "
                "tensors, which is not supported; set base.quantization: none, or base.placement: replicated"
            )
        quantized = _Quantized(tensor, device, model.dtype)
        for part in PARTS:
            shape = tuple(names[f"{layer}.{part}"].shape)
            yield f"{key.removesuffix('weight')}{part}", _Part(quantized, part, shape)


class _Quantized:
    """A matrix of a file. It is quantised when the first of its `PARTS` is read, and freed when the last is read."""

    def __init__(self, tensor: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._tensor, self._device, self._dtype = tensor, device, dtype
        self._parts: dict[str, Tensor] = {}

    def take(self, part: str) -> Tensor:
        """Return one of the `PARTS`; each is taken once."""
        with _ONE_AT_A_TIME:
            if not self._parts:
                self._parts = quantize(self._tensor[...].to(self._device, self._dtype))
            return self._parts.pop(part)


_ONE_AT_A_TIME = Lock()  # transformers reads tensors in several threads, and each would hold a whole matrix


class _Part:
    """A parameter of an nf4 layer, with the interface by which transformers reads a tensor of a file."""

    def __init__(self, quantized: _Quantized, name: str, shape: tuple[int, ...]) -> None:
        self._quantized, self._name, self._shape = quantized, name, shape

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, rows: Any) -> Tensor:
        return self._quantized.take(self._name)[rows].clone()  # a view would keep the whole matrix
