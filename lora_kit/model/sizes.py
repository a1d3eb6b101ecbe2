"""Compute parameters, checkpoint size and memory of a run from the base's config.json, without loading weights.

A decoder layer consists of a few linear layers and norms, so their shapes determine every size. Parameter counts are
exact for the model families listed in FAMILIES. Memory is an estimate, slightly higher than the sum of the tensors. It
counts the tensors that the kernels of lora_kit (or, with `kernels: none`, transformers and peft) keep for the backward
pass. docs/estimate.md explains each category.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import BaseError
from lora_kit.kernels.limits import GATED_MLP, LOGITS, LOGITS_IN_CACHE, QUERIES, ROW_MULTIPLE
from lora_kit.model.patterns import named, narrowed, rank_of, refuse_unknown
from lora_kit.recipe.schema import Adapter, Recipe
from lora_kit.runs.layout import CONSTANTS, WEIGHTS, WITH_CONSTANTS, Layout
from lora_kit.runs.live import region_bytes

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
TIED = ("gemma", "gemma2")  # families whose embeddings are tied by default
HEAD_SIZES = {  # the default of transformers, if the configuration has no head_dim
    "gemma": 256,
    "gemma2": 256,
    "qwen3": 128,
}
BYTES = {"bfloat16": 2, "float32": 4}
FP8_BLOCK = 128 * 128  # weights with a common scale in the fp8 bases of the Hub
HEADER_BYTES = 320  # estimate of what a tensor takes in the header of a safetensors file
MANIFEST_BYTES = 8_000
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")  # names for the number of positions
STRETCHED = ("yarn", "linear", "dynamic")  # scalings of rotary embeddings by a factor
RUNTIME_BYTES = {  # libraries, code and workspaces of a training process
    "cpu": 600_000_000,  # Python, torch, transformers, peft and what the allocator holds; measured
    "cuda": 700_000_000,  # CUDA context, cuBLAS and Triton; an assumption, not measured
}
DEQUANTISED = {"nf4": 0, "int8": 4, "fp8": 8}  # bytes per weight of temporary tensors, beside the dequantised weight
OPTIMIZER_TEMPORARIES = 4  # fp32 tensors that an optimizer step makes for each value that it updates at once
OPTIMIZER_CHUNK = 1 << 22  # values that `adamw-8bit` updates at once
TEMPORARY = ("logits and loss", "layer in backward", "dequantised weights")  # categories of memory
NORMED = ("attention", "mlp")  # activations that are outputs of a norm, recomputed from its input in backward


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer.

    Attributes:
        name: Its name.
        reads: The activation that it reads: the input of attention or of the MLP (`attention`, `mlp`), or of their last
            layer (`attended`, `inner`). Layers that read the same activation have the same input.
        inputs: The width of its input.
        outputs: The width of its output.
        bias: Whether it has a bias.
    """

    name: str
    reads: str
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Shape:
    """The dimensions of a base.

    Attributes:
        layers: The number of decoder layers.
        width: The width of the residual stream (hidden_size).
        inner: The width inside the MLP (intermediate_size).
        vocabulary: The number of rows of the embedding.
        context: The maximum number of positions.
        tied: Whether input and output embedding share their weights.
        linears: The linear layers of a decoder layer.
        norms: The number of norm parameters in a decoder layer.
        heads: The number of attention heads.
        key_heads: The number of heads of keys and values.
        head: The width of a head.
        normed: The number of values per token that the norms of a decoder layer read.
        soft_cap: Whether attention scores are soft-capped; then the attention weights are materialised and kept.
    """

    layers: int
    width: int
    inner: int
    vocabulary: int
    context: int
    tied: bool
    linears: tuple[Linear, ...]
    norms: int
    heads: int
    key_heads: int
    head: int
    normed: int
    soft_cap: bool

    @property
    def parameters(self) -> int:
        """The number of parameters of the base."""
        linear = sum(layer.inputs * layer.outputs + layer.outputs * layer.bias for layer in self.linears)
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * (linear + self.norms) + embeddings + self.width

    @property
    def paths(self) -> dict[str, Linear]:
        """All linear layers of the base, by their full names."""
        blocks = {"attention": "self_attn", "attended": "self_attn", "mlp": "mlp", "inner": "mlp"}
        paths = {
            f"model.layers.{number}.{blocks[layer.reads]}.{layer.name}": layer
            for number in range(self.layers)
            for layer in self.linears
        }
        return paths | {"lm_head": Linear("lm_head", "output", self.width, self.vocabulary)}

    def selected(self, adapter: Adapter) -> dict[str, Linear]:
        """Return the layers of the whole base that get an adapter, by their full names.

        Raises:
            RecipeError: A name or a pattern of the section matches no layer.
        """
        paths, available = self.paths, [*(layer.name for layer in self.linears), "lm_head"]
        if isinstance(adapter.targets, str):
            matching = [path for path, layer in paths.items() if layer.name != "lm_head"]
        else:
            refuse_unknown("adapter.targets", adapter.targets, paths, available)
            matching = list(dict.fromkeys(path for target in adapter.targets for path in named(target, paths)))
        return {path: paths[path] for path in narrowed(adapter, matching, available)}

    def adapted(self, adapter: Adapter) -> list[Linear]:
        """Return the linear layers of a decoder layer that get an adapter in any decoder layer."""
        names = {layer.name for layer in self.selected(adapter).values()}
        return [layer for layer in self.linears if layer.name in names]


def context_of(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a base was made for; None if its configuration does not say.

    Args:
        config: The content of config.json.
    """
    text = config.get("text_config")
    parts = [text, config] if isinstance(text, Mapping) else [config]
    found = ((part, part.get(name)) for part in parts for name in CONTEXT)
    return next((_stretched(value, part) for part, value in found if isinstance(value, int) and value > 0), None)


def _stretched(positions: int, config: Mapping[str, Any]) -> int:
    """Return the number of positions with the scaling of rotary embeddings, which some configurations leave out."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type", scaling.get("type")) not in STRETCHED:
        return positions
    original, factor = scaling.get("original_max_position_embeddings") or positions, scaling.get("factor") or 1
    usable = isinstance(original, int) and isinstance(factor, int | float) and math.isfinite(factor)
    return max(positions, int(original * factor)) if usable else positions


def read_config(path: Path) -> Shape:
    """Read the shape of a base from its config.json.

    Raises:
        BaseError: The family is not in FAMILIES, or the file is not JSON or lacks a key.
    """
    try:
        config = json.loads(path.read_text())
        if config.get("model_type") in FAMILIES:
            return _shape_of(config)
    except KeyError as error:
        raise BaseError(f"{path}: the key {error} is missing, so sizes cannot be computed") from error
    except ValueError as error:
        raise BaseError(f"{path}: not JSON: {error}") from error
    raise BaseError(
        f"sizes of model type {config.get('model_type')!r} cannot be computed; known types: {', '.join(FAMILIES)}"
    )


def _shape_of(config: Mapping[str, Any]) -> Shape:
    family = config["model_type"]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or HEAD_SIZES.get(family, width // heads)
    norms = {"gemma2": 4 * width, "qwen3": 2 * width + 2 * head}.get(family, 2 * width)
    linears = tuple(_linears(config, family, head))
    queries_and_keys = sum(layer.outputs for layer in linears if layer.name in ("q_proj", "k_proj"))
    return Shape(
        layers=config["num_hidden_layers"],
        width=width,
        inner=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", family in TIED),
        linears=linears,
        norms=norms,
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head=head,
        normed={"gemma2": 4 * width, "qwen3": 2 * width + queries_and_keys}.get(family, 2 * width),
        soft_cap=family == "gemma2" and bool(config.get("attn_logit_softcapping", 50.0)),
    )


def _linears(config: Mapping[str, Any], family: str, head: int) -> Iterator[Linear]:
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    if family == "phi3":
        yield Linear("qkv_proj", "attention", width, queries + 2 * keys)
        yield Linear("o_proj", "attended", queries, width)
        yield Linear("gate_up_proj", "mlp", width, 2 * inner)
        yield Linear("down_proj", "inner", inner, width)
        return
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield Linear(name, "attention", width, outputs, bias or family == "qwen2")
    yield Linear("o_proj", "attended", queries, width, bias)
    yield Linear("gate_proj", "mlp", width, inner, mlp_bias)
    yield Linear("up_proj", "mlp", width, inner, mlp_bias)
    yield Linear("down_proj", "inner", inner, width, mlp_bias)


@dataclass(frozen=True)
class Estimate:
    """The sizes of a run on a device.

    The device holds weights, adapter, gradient, moments and activations at once, and beside them the temporary tensors
    of the loss, or of a layer's backward pass with its dequantised weights. The optimizer has temporary tensors too,
    but no activations are held then.

    Attributes:
        base_parameters: The number of parameters of the base, exact.
        trainable_parameters: The number of parameters of the adapter, exact.
        base_bytes: Memory of the frozen weights; of a sharded base, of this device's shard.
        gathered_bytes: Memory of the layers of a sharded base that are gathered at a time, estimated; otherwise 0.
        adapter_bytes: Memory of the adapter's master weights, and of the constants of the starts pissa and olora.
        gradient_bytes: Memory of the gradient and of the partial sums of gradients.
        moment_bytes: Memory of the optimizer's moments.
        micro_batch_tokens: The number of tokens of a micro-batch, for which the activations are estimated.
        activation_checkpointing: Whether activations are recomputed in the backward pass.
        activation_bytes: Memory of the tensors kept for the backward pass, estimated.
        loss_bytes: Peak memory of temporary tensors of the loss: hidden states, logits and their gradients, estimated.
        layer_bytes: Peak memory of temporary tensors of a layer's backward pass, estimated.
        dequantized_bytes: Memory of the weights that are dequantised at a time, estimated; 0 without quantisation.
        optimizer_bytes: Peak memory of temporary tensors of an optimizer step, when no activations are held.
        runtime_bytes: Memory of libraries, code and workspaces of the process, from measurements.
        live_bytes: The size of the live region, which is in the memory of the machine, not of a GPU.
        checkpoint_bytes: The size of a checkpoint on disk.
        vocabulary: The number of rows of the embedding.
        context: The base's maximum number of positions.
    """

    base_parameters: int
    trainable_parameters: int
    base_bytes: int
    gathered_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    moment_bytes: int
    micro_batch_tokens: int
    activation_checkpointing: bool
    activation_bytes: int
    loss_bytes: int
    layer_bytes: int
    dequantized_bytes: int
    optimizer_bytes: int
    runtime_bytes: int
    live_bytes: int
    checkpoint_bytes: int
    vocabulary: int
    context: int

    @property
    def state_bytes(self) -> int:
        """The memory of the adapter's weights, their gradient and the moments."""
        return self.adapter_bytes + self.gradient_bytes + self.moment_bytes

    @property
    def working_bytes(self) -> int:
        """The peak memory of temporary tensors while activations are held."""
        return max(self.loss_bytes, self.layer_bytes + self.dequantized_bytes)

    @property
    def device_bytes(self) -> int:
        """The estimated peak memory of the tensors on a device."""
        weights = self.base_bytes + self.gathered_bytes
        passes = self.activation_bytes + self.working_bytes
        return weights + self.state_bytes + max(passes, self.optimizer_bytes)

    def process_bytes(self, device: str) -> int:
        """Return the estimated peak memory of the process on a device; on a CPU it includes the live region."""
        return self.device_bytes + self.runtime_bytes + (self.live_bytes if device == "cpu" else 0)

    @property
    def categories(self) -> dict[str, int]:
        """The bytes of each category by its name. The last three do not exist at the same time."""
        gathered = {"gathered layers": self.gathered_bytes} if self.gathered_bytes else {}
        dequantized = {"dequantised weights": self.dequantized_bytes} if self.dequantized_bytes else {}
        return {
            "base weights": self.base_bytes,
            **gathered,
            "adapter": self.adapter_bytes,
            "gradient": self.gradient_bytes,
            "moments": self.moment_bytes,
            "activations": self.activation_bytes,
            "runtime": self.runtime_bytes,
            "logits and loss": self.loss_bytes,
            "layer in backward": self.layer_bytes,
            **dequantized,
        }

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        share = self.trainable_parameters / self.base_parameters
        parts = {name: format_bytes(size) for name, size in self.categories.items()}
        held = ", ".join(f"{name} {size}" for name, size in parts.items() if name not in TEMPORARY)
        layer = " with ".join(f"{name} {parts[name]}" for name in TEMPORARY[1:] if name in parts)
        return [
            f"base: {self.base_parameters:,} parameters; trainable: {self.trainable_parameters:,} ({share:.2%})",
            f"estimated memory per device: {format_bytes(self.device_bytes + self.runtime_bytes)}",
            f"  {held}",
            f"  at its peak the larger of {TEMPORARY[0]} {parts[TEMPORARY[0]]}, and {layer}",
            f"checkpoint size: {format_bytes(self.checkpoint_bytes)}",
        ]


def format_bytes(count: int) -> str:
    """Return a number of bytes with a decimal unit, e.g. "1.01 MB"."""
    number, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}" if number < 100 else f"{number:.0f} {units[0]}"


def estimate_memory(
    shape: Shape,
    recipe: Recipe,
    *,
    tokens: int,
    recompute: bool,
    device: str = "cpu",
    shards: int = 1,
    micro_batches: int | None = None,
) -> Estimate:
    """Estimate the sizes of a run.

    Args:
        shape: The dimensions of the base.
        recipe: The recipe. Its micro_batch_tokens and activation_checkpointing are ignored, since they may be auto.
        tokens: The number of tokens of a micro-batch.
        recompute: Whether activations are recomputed in the backward pass.
        device: "cpu" or "cuda".
        shards: The number of processes over which the base is sharded; 1 if each has the whole base.
        micro_batches: The most micro-batches of a process in a step; None for one for each example.
    """
    selected = shape.selected(recipe.adapter)
    ranks = {path: rank_of(recipe.adapter, path) for path in selected}
    pairs = sum(ranks[path] * (layer.inputs + layer.outputs) for path, layer in selected.items())
    magnitudes = sum(layer.outputs for layer in selected.values()) if recipe.adapter.variant == "dora" else 0
    trainable = pairs + magnitudes
    shapes = {".lora_A.": (pairs,)} | ({"magnitudes": (magnitudes,)} if magnitudes else {})
    layout = Layout.of(shapes, recipe.model_dump())
    kept = layout.bytes_of(WEIGHTS, CONSTANTS)
    leaves = recipe.train.batch_size if micro_batches is None else micro_batches
    sums = max(1, (leaves - 1).bit_length())
    size = BYTES[recipe.base.dtype]
    activations = _kept_by_layers(shape, recipe, tokens, recompute=recompute)
    # the last norm, the head, and the attention masks that all layers share
    outside = (3 * shape.width + QUERIES) * size * tokens
    updated = trainable if recipe.optim.name == "adamw" else min(trainable, OPTIMIZER_CHUNK)
    return Estimate(
        base_parameters=shape.parameters,
        trainable_parameters=trainable,
        base_bytes=-(-_base_bytes(shape, recipe) // shards),
        gathered_bytes=_gathered_bytes(shape, recipe) if shards > 1 else 0,
        adapter_bytes=kept,
        gradient_bytes=trainable * 4 * (1 + sums),
        moment_bytes=layout.bytes - kept,
        micro_batch_tokens=tokens,
        activation_checkpointing=recompute,
        activation_bytes=activations + outside,
        loss_bytes=_loss_bytes(shape, recipe, tokens, device),
        layer_bytes=_layer_bytes(shape, recipe, tokens),
        dequantized_bytes=_dequantized_bytes(shape, recipe, device),
        optimizer_bytes=OPTIMIZER_TEMPORARIES * 4 * updated,
        runtime_bytes=RUNTIME_BYTES[device],
        live_bytes=region_bytes(layout.bytes),
        checkpoint_bytes=layout.bytes + 6 * HEADER_BYTES * len(selected) + MANIFEST_BYTES,
        vocabulary=shape.vocabulary,
        context=shape.context,
    )


def _base_bytes(shape: Shape, recipe: Recipe) -> int:
    """Return the bytes of the frozen weights, including the scales of quantised weights."""
    size = BYTES[recipe.base.dtype]
    linear = shape.layers * sum(layer.inputs * layer.outputs for layer in shape.linears)
    rows = shape.layers * sum(layer.outputs for layer in shape.linears)
    linear_bytes = {
        "none": linear * size,
        "nf4": linear // 2 + linear // 64 + 4 * (linear // (64 * 256)),  # 1 byte per 64 weights, 4 per 256 such bytes
        "int8": linear + 4 * rows,
        "fp8": linear + 4 * (linear // FP8_BLOCK),
    }
    return (shape.parameters - linear) * size + linear_bytes[recipe.base.quantization]


def _gathered_bytes(shape: Shape, recipe: Recipe) -> int:
    """Return the most bytes that FSDP holds of gathered units.

    A unit is received into one buffer and copied from there into its tensors, while the unit before it still computes.
    The embedding and the head are gathered alone.
    """
    embedding = shape.vocabulary * shape.width * BYTES[recipe.base.dtype]
    layer = (_base_bytes(shape, recipe) - embedding * (1 if shape.tied else 2)) // shape.layers
    return max(3 * layer, 2 * embedding)


def _kept_by_layers(shape: Shape, recipe: Recipe, tokens: int, *, recompute: bool) -> int:
    """Return the bytes that the decoder layers keep for the backward pass of a micro-batch.

    With the starts pissa and olora, a layer also keeps A with A0 and B with B0, each pair in one tensor.
    """
    layer = _kept_by_layer(shape, recipe, tokens)
    if recipe.adapter.init in WITH_CONSTANTS and recipe.train.kernels == "auto":
        widths = sum(linear.inputs + linear.outputs for linear in shape.adapted(recipe.adapter))
        layer += 4 * 2 * recipe.adapter.rank * widths
    if recompute:
        return shape.layers * shape.width * BYTES[recipe.base.dtype] * tokens + layer
    return layer * shape.layers


def _kept_by_layer(shape: Shape, recipe: Recipe, tokens: int) -> int:
    """Return the bytes that a decoder layer keeps for the backward pass of a micro-batch.

    The input of a frozen linear layer is not kept, because its weight needs no gradient. The input of an adapter is
    kept, once if several adapters read the same input. DoRA keeps the output of a layer before it is scaled.
    """
    size, dora = BYTES[recipe.base.dtype], recipe.adapter.variant == "dora"
    rank = recipe.adapter.rank * (2 if recipe.adapter.init in WITH_CONSTANTS else 1)
    fused = recipe.train.kernels == "auto"
    fused_adapters = fused and not (dora and recipe.adapter.dropout)
    adapted = shape.adapted(recipe.adapter)
    outputs = sum(layer.outputs for layer in adapted)
    fused_mlp = fused and not dora and {layer.name for layer in adapted}.issuperset(GATED_MLP)
    if fused_adapters:
        kept = {layer.reads: layer.inputs for layer in adapted if recipe.adapter.dropout or layer.reads not in NORMED}
        adapters = size * (shape.normed + sum(kept.values()) - fused_mlp * shape.inner + rank * len(adapted))
    else:  # transformers computes norms in fp32, and peft casts the input of every adapter to fp32
        adapters = 4 * (shape.normed + sum(layer.inputs for layer in adapted) + rank * len(adapted))
    scaled = 0
    if dora:  # peft keeps the output of the base, that of the adapter in fp32, and their factors
        scaled = outputs * (size if fused_adapters else 2 * size + 8)
    gate = size * shape.inner * (2 if fused_mlp else 3)
    queries_keys_values = sum(layer.outputs for layer in shape.linears if layer.reads == "attention")
    attention = size * queries_keys_values + 4 * shape.heads
    masks = sum(layer.inputs for layer in adapted) * (1 if fused_adapters else 4) if recipe.adapter.dropout else 0
    norm_scales = 4 * (shape.normed // shape.width + 1)  # each norm saves the root mean square by which it divides
    weights = _attention_weights(shape, recipe, tokens, size + (8 if shape.soft_cap else 4))
    return tokens * (adapters + scaled + gate + attention + masks + norm_scales + weights)


def _loss_bytes(shape: Shape, recipe: Recipe, tokens: int, device: str) -> int:
    """Return the peak bytes of temporary tensors of the loss."""
    size = BYTES[recipe.base.dtype]
    logits = tokens * shape.vocabulary
    if recipe.train.kernels == "auto":
        logits = min(logits, max(LOGITS[device], ROW_MULTIPLE * shape.vocabulary))
        in_fp32 = logits if device == "cuda" else min(logits, max(LOGITS_IN_CACHE, shape.vocabulary))
        loss = logits * size + in_fp32 * (4 + size)
    else:
        loss = logits * (8 + 3 * size)
    return loss + 2 * tokens * shape.width * size


def _layer_bytes(shape: Shape, recipe: Recipe, tokens: int) -> int:
    """Return the peak bytes of temporary tensors of a layer's backward pass, without dequantised weights."""
    size = BYTES[recipe.base.dtype]
    longest = min(tokens, recipe.data.sequence_length)
    blocks = shape.heads * min(QUERIES, longest) * longest * 3 * size
    attention = tokens * _attention_weights(shape, recipe, tokens, 4) or blocks
    mlp = tokens * 5 * shape.inner * size
    return max(attention, mlp) + 6 * tokens * shape.width * size


def _dequantized_bytes(shape: Shape, recipe: Recipe, device: str) -> int:
    """Return the peak bytes of dequantised weights and of the temporary tensors that dequantising makes.

    DoRA dequantises a weight also where nothing is quantised: its norms are computed in fp32 from a copy.
    The kernels in C, in bf16, add all products of layers that read the same input at once, so they hold the weights of
    all these layers; elsewhere a weight is held alone.
    """
    size, how = BYTES[recipe.base.dtype], recipe.base.quantization
    if how == "none":
        return 0
    together = device == "cpu" and recipe.base.dtype == "bfloat16" and recipe.train.kernels == "auto"
    groups: dict[str, list[int]] = {}
    for linear in shape.linears:
        groups.setdefault(linear.reads if together else linear.name, []).append(linear.inputs * linear.outputs)
    return max(sum(group) * size + max(group) * DEQUANTISED[how] for group in groups.values())


def _attention_weights(shape: Shape, recipe: Recipe, tokens: int, each: int) -> int:
    """Return the bytes of a token's materialised attention weights; 0 if the attention does not materialise them.

    Args:
        shape: The dimensions of the base.
        recipe: The recipe.
        tokens: The number of tokens of a micro-batch.
        each: Bytes per attention weight.
    """
    # eager attention computes weights between all tokens of a row, also across examples
    eager = recipe.base.attention == "eager"
    if not (shape.soft_cap or eager):
        return 0
    longest = tokens if eager else min(tokens, recipe.data.sequence_length)
    return (shape.heads * each + 1) * longest + 4 * shape.width * BYTES["float32"]
