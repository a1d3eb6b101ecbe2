"""Sizes in closed form from a base's configuration: parameters, adapter, checkpoint and memory, without a weight.

A decoder layer is a handful of linear maps and norms; knowing their shapes is knowing everything that is counted here.
The counts are exact for the families listed; memory is an estimate, a little above what tensors take. It follows from
what each part in kernels/ keeps for its backward pass, or, with `kernels: none`, transformers and peft.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import BaseError
from lora_kit.kernels.limits import GATED_MLP, LOGITS, LOGITS_IN_CACHE, QUERIES, ROW_MULTIPLE
from lora_kit.recipe.schema import Recipe

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
READS = {  # the linear maps of a layer by what they read; those in one line share it
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "attended": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj"),
    "inner": ("down_proj",),
}
NORMED = ("attention", "mlp")  # what a norm gave out, which is made again from what the norm read


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
    heads: int
    normed: int
    """Numbers of one token that one layer's norms read."""
    soft_cap: bool
    """Attention scores are capped, so their weights are spelled out and kept."""

    @property
    def parameters(self) -> int:
        """All parameters of the base."""
        in_layer = sum(one.inputs * one.outputs + one.outputs * one.bias for one in self.linears) + self.norms
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * in_layer + embeddings + self.width

    def adapted(self, targets: str | tuple[str, ...]) -> list[Linear]:
        """Return one layer's linear maps that get an adapter."""
        return [one for one in self.linears if targets == "all-linear" or one.name in targets]

    def wide(self, reads: str, *, outputs: bool = False) -> int:
        """Return how wide an input of READS is, or all that the maps that read it give out."""
        maps = [one for one in self.linears if one.name in READS[reads]]
        return sum(one.outputs for one in maps) if outputs else maps[0].inputs


def read_config(path: Path) -> Shape:
    """Read the shape of a base from its config.json.

    Raises:
        BaseError: Its family is not counted, or the file says too little.
    """
    try:
        config = json.loads(path.read_text())
        if config.get("model_type") in FAMILIES:
            return _shape_of(config)
    except KeyError as error:
        raise BaseError(f"{path}: it leaves out {error}, so that nothing can be counted") from error
    except ValueError as error:
        raise BaseError(f"{path}: not JSON: {error}") from error
    raise BaseError(
        f"sizes of the family {config.get('model_type')!r} are not counted; these are: {', '.join(FAMILIES)}"
    )


def _shape_of(config: Mapping[str, Any]) -> Shape:
    family = config["model_type"]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or HEAD_SIZES.get(family, width // heads)
    norms = {"gemma2": 4 * width, "qwen3": 2 * width + 2 * head}.get(family, 2 * width)
    linears = tuple(_linears(config, family, head))
    of_heads = sum(one.outputs for one in linears if one.name in ("q_proj", "k_proj"))
    return Shape(
        layers=config["num_hidden_layers"],
        width=width,
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", family in TIED),
        linears=linears,
        norms=norms,
        heads=heads,
        normed={"gemma2": 4 * width, "qwen3": 2 * width + of_heads}.get(family, 2 * width),
        soft_cap=family == "gemma2" and bool(config.get("attn_logit_softcapping", 50.0)),
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
        micro_batch_tokens: Of the micro-batch that the next three are of.
        activation_checkpointing: Whether its activations are computed twice.
        activation_bytes: What it keeps for the backward pass, estimated.
        working_bytes: What the loss or the backward pass of a layer holds for a moment, estimated.
        checkpoint_bytes: On disk.
        vocabulary: Rows of the embedding.
        context: Positions that the base was made for.
    """

    base_parameters: int
    trainable_parameters: int
    base_bytes: int
    state_bytes: int
    micro_batch_tokens: int
    activation_checkpointing: bool
    activation_bytes: int
    working_bytes: int
    checkpoint_bytes: int
    vocabulary: int
    context: int

    @property
    def device_bytes(self) -> int:
        """All of it together."""
        return self.base_bytes + self.state_bytes + self.activation_bytes + self.working_bytes

    def lines(self) -> list[str]:
        """Return the estimate as text."""
        share = self.trainable_parameters / self.base_parameters
        parts = (
            f"weights {in_words(self.base_bytes)}, adapter state {in_words(self.state_bytes)}, "
            f"activations {in_words(self.activation_bytes)}, working space {in_words(self.working_bytes)}"
        )
        return [
            f"base: {self.base_parameters:,} parameters; trainable: {self.trainable_parameters:,} ({share:.2%})",
            f"memory a device, estimated: {in_words(self.device_bytes)} ({parts})",
            f"a checkpoint: {in_words(self.checkpoint_bytes)}",
        ]


def in_words(count: int) -> str:
    """Return a number of bytes as people read it."""
    number, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}" if number < 100 else f"{number:.0f} {units[0]}"


def estimate_memory(shape: Shape, recipe: Recipe, *, tokens: int, recompute: bool, device: str = "cpu") -> Estimate:
    """Return what a recipe weighs on a base of this shape.

    Args:
        shape: Of the base.
        recipe: Its own micro_batch_tokens and activation_checkpointing may be auto, and are not looked at.
        tokens: Of a micro-batch.
        recompute: Compute activations twice.
        device: cpu or cuda.
    """
    adapted = shape.adapted(recipe.adapter.targets)
    trainable = shape.layers * recipe.adapter.rank * sum(one.inputs + one.outputs for one in adapted)
    size = BYTES[recipe.base.dtype]
    sums = max(1, (recipe.train.batch_size - 1).bit_length())
    layer = _kept_by_layer(shape, recipe, tokens)
    layers = shape.layers * shape.width * size * tokens + layer if recompute else layer * shape.layers
    around = (3 * shape.width + QUERIES) * size * tokens  # last norm, head, and the masks that all layers share
    return Estimate(
        base_parameters=shape.parameters,
        trainable_parameters=trainable,
        base_bytes=_base_bytes(shape, recipe),
        state_bytes=trainable * 4 * (4 + sums),
        micro_batch_tokens=tokens,
        activation_checkpointing=recompute,
        activation_bytes=layers + around,
        working_bytes=_working_bytes(shape, recipe, tokens, device),
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


def _kept_by_layer(shape: Shape, recipe: Recipe, tokens: int) -> int:
    """Return the bytes that a micro-batch leaves in one layer for the backward pass.

    What a frozen linear map read is not kept; what its adapter read is, once where adapters share it.
    """
    size, rank, fused = BYTES[recipe.base.dtype], recipe.adapter.rank, recipe.train.kernels == "auto"
    adapted = shape.adapted(recipe.adapter.targets)
    names, inner = {one.name for one in adapted}, shape.wide("inner")
    in_one_piece = fused and names.issuperset(GATED_MLP)
    if fused:
        kept = [place for place in READS if recipe.adapter.dropout or place not in NORMED]
        read = sum(shape.wide(place) for place in kept if names.intersection(READS[place]))
        own = size * (shape.normed + read - in_one_piece * inner + rank * len(adapted))
    else:  # norms are computed in fp32, and peft casts what each adapter reads to it
        own = 4 * (shape.normed + sum(one.inputs for one in adapted) + rank * len(adapted))
    gate = size * inner * (2 if in_one_piece else 3)
    attention = size * shape.wide("attention", outputs=True) + 4 * shape.heads
    masks = sum(one.inputs for one in adapted) * (1 if fused else 4) if recipe.adapter.dropout else 0
    numbers = 4 * (shape.normed // shape.width + 1)  # what each norm divided a row by
    weights = _spelled_out(shape, recipe, tokens, size + (8 if shape.soft_cap else 4))
    return tokens * (own + gate + attention + masks + numbers + weights)


def _working_bytes(shape: Shape, recipe: Recipe, tokens: int, device: str) -> int:
    """Return the bytes that are held for a moment: by the loss, or on the way back through attention or an MLP."""
    size, width, inner = BYTES[recipe.base.dtype], shape.width, shape.wide("inner")
    longest = min(tokens, recipe.data.sequence_length)
    logits = tokens * shape.vocabulary
    if recipe.train.kernels == "auto":
        logits = min(logits, max(LOGITS[device], ROW_MULTIPLE * shape.vocabulary))
        in_fp32 = logits if device == "cuda" else min(logits, max(LOGITS_IN_CACHE, shape.vocabulary))
        loss = logits * size + in_fp32 * (4 + size)
    else:
        loss = logits * (8 + 3 * size)
    loss += 2 * tokens * width * size
    blocks = shape.heads * min(QUERIES, longest) * longest * 3 * size
    attention = tokens * _spelled_out(shape, recipe, tokens, 4) or blocks
    mlp = tokens * 5 * inner * size
    layer = max(attention, mlp) + 6 * tokens * width * size
    whole = max(one.inputs * one.outputs for one in shape.linears) * (4 + size)  # a quantised weight in use
    return max(loss, layer) + (0 if recipe.base.quantization == "none" else whole)


def _spelled_out(shape: Shape, recipe: Recipe, tokens: int, each: int) -> int:
    """Return the bytes for one token's attention weights, of `each` bytes, where they are kept."""
    eager = recipe.base.attention == "eager"  # which weighs every pair of a row, of one example or of many
    if not (shape.soft_cap or eager):
        return 0
    longest = tokens if eager else min(tokens, recipe.data.sequence_length)
    return (shape.heads * each + 1) * longest + 4 * shape.width * BYTES["float32"]
