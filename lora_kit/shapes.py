"""Sizes in closed form from a base's configuration: parameters, adapter, checkpoint and memory, without a weight.

A decoder layer is a handful of linear maps and norms; knowing their shapes is knowing everything that is counted here.
The counts are exact for the families listed; memory is an estimate.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import BaseError
from lora_kit.recipe import Recipe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
TIED = ("gemma", "gemma2")  # tied unless the configuration says otherwise
HEAD_SIZES = {
    "gemma": 256,
    "gemma2": 256,
    "qwen3": 128,
}  # what transformers takes when the configuration is silent
BYTES = {"bfloat16": 2, "float32": 4}
HEADER_BYTES = 320  # of a safetensors header, for each tensor of the adapter and its two moments
MANIFEST_BYTES = 8_000


@dataclass(frozen=True)
class Linear:
    """One linear map of a layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Shape:
    """What the counts need to know of a base."""

    layers: int
    width: int
    vocabulary: int
    context: int
    tied: bool
    linears: tuple[Linear, ...]
    norms: int
    """Norm parameters of one layer."""

    @property
    def parameters(self) -> int:
        """All parameters of the base."""
        in_layer = sum(one.inputs * one.outputs + one.outputs * one.bias for one in self.linears) + self.norms
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * in_layer + embeddings + self.width

    def adapted(self, targets: str | tuple[str, ...]) -> list[Linear]:
        """Return one layer's linear maps that get an adapter."""
        return [one for one in self.linears if targets == "all-linear" or one.name in targets]


def read_config(path: Path) -> Shape:
    """Read the shape of a base from its config.json.

    Raises:
        BaseError: Its family is not counted.
    """
    config = json.loads(path.read_text())
    family = config.get("model_type")
    if family not in FAMILIES:
        raise BaseError(f"sizes of the family {family!r} are not counted; these are: {', '.join(FAMILIES)}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or HEAD_SIZES.get(family, width // heads)
    norms = {"gemma2": 4 * width, "qwen3": 2 * width + 2 * head}.get(family, 2 * width)
    return Shape(
        layers=config["num_hidden_layers"],
        width=width,
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", family in TIED),
        linears=tuple(_linears(config, family, head)),
        norms=norms,
    )


def _linears(config: Mapping[str, Any], family: str, head: int) -> Iterator[Linear]:
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    if family == "phi3":
        yield Linear("qkv_proj", width, queries + 2 * keys)
        yield Linear("o_proj", queries, width)
        yield Linear("gate_up_proj", width, 2 * inner)
        yield Linear("down_proj", inner, width)
        return
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield Linear(name, width, outputs, bias or family == "qwen2")
    yield Linear("o_proj", queries, width, bias)
    yield Linear("gate_proj", width, inner, mlp_bias)
    yield Linear("up_proj", width, inner, mlp_bias)
    yield Linear("down_proj", inner, width, mlp_bias)


@dataclass(frozen=True)
class Estimate:
    """What a run weighs; bytes are for one device unless they say otherwise.

    Attributes:
        base_parameters: Exact.
        trainable_parameters: Exact.
        base_bytes: The frozen weights.
        state_bytes: Master weights, gradient, two moments and the sums of the reduction.
        activation_bytes: Of one micro-batch, estimated.
        logits_bytes: Of one micro-batch, estimated.
        checkpoint_bytes: On disk.
        vocabulary: Rows of the embedding.
        context: Positions that the base was made for.
    """

    base_parameters: int
    trainable_parameters: int
    base_bytes: int
    state_bytes: int
    activation_bytes: int
    logits_bytes: int
    checkpoint_bytes: int
    vocabulary: int
    context: int

    @property
    def device_bytes(self) -> int:
        """All of it together."""
        return self.base_bytes + self.state_bytes + self.activation_bytes + self.logits_bytes

    def lines(self) -> list[str]:
        """Return the estimate as text."""
        share = self.trainable_parameters / self.base_parameters
        parts = (
            f"weights {_size(self.base_bytes)}, adapter state {_size(self.state_bytes)}, "
            f"activations {_size(self.activation_bytes)}, logits {_size(self.logits_bytes)}"
        )
        return [
            f"base: {self.base_parameters:,} parameters; trainable: {self.trainable_parameters:,} ({share:.2%})",
            f"memory a device, estimated: {_size(self.device_bytes)} ({parts})",
            f"a checkpoint: {_size(self.checkpoint_bytes)}",
        ]


def _size(count: int) -> str:
    number, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}" if number < 100 else f"{number:.0f} {units[0]}"


def estimate_memory(shape: Shape, recipe: Recipe) -> Estimate:
    """Return what a recipe weighs on a base of this shape."""
    adapted = shape.adapted(recipe.adapter.targets)
    trainable = shape.layers * recipe.adapter.rank * sum(one.inputs + one.outputs for one in adapted)
    tokens, size = recipe.train.micro_batch_tokens, BYTES[recipe.base.dtype]
    sums = max(1, (recipe.train.batch_size - 1).bit_length())
    layer = _layer_activations(shape, adapted, size) * tokens + tokens * tokens * size  # and the packed mask
    checkpointed = shape.layers * shape.width * size * tokens + layer
    return Estimate(
        base_parameters=shape.parameters,
        trainable_parameters=trainable,
        base_bytes=_base_bytes(shape, recipe),
        state_bytes=trainable * 4 * (4 + sums),
        activation_bytes=checkpointed if recipe.train.activation_checkpointing else layer * shape.layers,
        logits_bytes=tokens * shape.vocabulary * (size + 12),  # and fp32 logits, log-probabilities, their gradient
        checkpoint_bytes=12 * trainable + 6 * HEADER_BYTES * shape.layers * len(adapted) + MANIFEST_BYTES,
        vocabulary=shape.vocabulary,
        context=shape.context,
    )


def _base_bytes(shape: Shape, recipe: Recipe) -> int:
    """Return the bytes of the frozen weights; quantised ones keep their scales beside them."""
    size = BYTES[recipe.base.dtype]
    linear = shape.layers * sum(one.inputs * one.outputs for one in shape.linears)
    rows = shape.layers * sum(one.outputs for one in shape.linears)
    held = {
        "none": linear * size,
        "nf4": linear // 2 + linear // 64 + 4 * (linear // (64 * 256)),  # a byte for 64, four for 256 of those
        "int8": linear + 4 * rows,
    }
    return (shape.parameters - linear) * size + held[recipe.base.quantization]


def _layer_activations(shape: Shape, adapted: list[Linear], size: int) -> int:
    """Return the bytes that one token leaves in one layer for the backward pass.

    What a frozen linear map read is not kept; what its adapter read is, in fp32 where peft casts it.
    """
    outputs = sum(one.outputs for one in shape.linears)
    inner = max(one.inputs for one in shape.linears)
    cast = sum(one.inputs for one in adapted) * (4 if size < 4 else 0)
    return size * (4 * shape.width + outputs + 2 * inner) + cast
