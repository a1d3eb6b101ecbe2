"""Measure how fast this machine computes the parts of a decoder layer, in a few seconds.

Each part is computed with the kernels that training uses, on random tensors with the widths of the base, and with as
many tokens as a micro-batch has. Widths and tokens are cut where a part would take too long; its time is then scaled by
its floating-point operations. Nothing of a model is loaded, and no generator that training uses is touched.
"""

import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import cycle
from statistics import median

import torch
from torch import Tensor, nn

from lora_kit.kernels import dispatch
from lora_kit.kernels.backend import GatedInputs
from lora_kit.kernels.dora import row_norms
from lora_kit.kernels.lora import AdaptedLinear, project, project_backward
from lora_kit.kernels.loss import Head, summed_cross_entropy
from lora_kit.kernels.segments import Segments
from lora_kit.model.sizes import Linear, Shape
from lora_kit.model.state import Kind
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.layout import BLOCK, WITH_CONSTANTS
from lora_kit.training import optim
from lora_kit.training.speed import Attention, BothWays, Rates

WIDEST = 4096  # most rows and columns of a timed weight
MOST_FLOPS = {"cpu": 4e11, "cuda": 4e13}  # most FLOPs of a timed pass through the linear layers of a decoder layer
MOST_PAIRS = {"cpu": 1 << 22, "cuda": 1 << 26}  # most (query, key) pairs of a head in a timed attention
FEWEST_TOKENS, MOST_HEAD_ROWS = 64, 512
SECONDS_EACH, MOST_TIMES = 0.08, 8  # a function is repeated for so long or so often; the median counts
COLD_BYTES, MOST_COPIES = 200_000_000, 64  # copies of weights that do not stay in the caches of a CPU
FP8_ROWS = 128  # rows and columns of a block of the fp8 bases of the Hub
DRAWN = (1 << 18) + 1  # random numbers in a tensor; the rows of a weight then differ
VALUES = 1 << 22  # trained values of a timed optimizer step


def measure(
    shape: Shape,
    recipe: Recipe,
    device: torch.device,
    *,
    tokens: int,
    longest: int,
    threads: int | None,
    tick: Callable[[], None] = lambda: None,
) -> Rates:
    """Measure the parts of a decoder layer, the head and the optimizer.

    Args:
        shape: The dimensions of the base.
        recipe: The recipe, for the dtype and the adapter.
        device: Where to compute.
        tokens: The tokens of a usual micro-batch.
        longest: The tokens of a long example.
        threads: The number of threads of a training process on a CPU; None leaves it as it is.
        tick: Called before every function that is timed, so that a run shows that it does not hang.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            bench = _Bench(device, getattr(torch, recipe.base.dtype), tick)
            return _measured(shape, recipe, bench, tokens, longest)
    finally:
        torch.set_num_threads(before)


class _Bench:
    """Makes random tensors on a device, and times functions there."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tick: Callable[[], None]) -> None:
        self.device, self.dtype, self._tick = device, dtype, tick
        self._generator = torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return random numbers that are small enough to be added up; in a large tensor they repeat."""
        size = math.prod(shape)
        drawn = torch.randn(min(size, DRAWN), generator=self._generator, device=self.device).mul_(0.02)
        return drawn.to(dtype or self.dtype).repeat(-(-size // len(drawn)))[:size].view(shape)

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the median of the times that a function takes."""
        self._tick()
        function()  # compiles kernels and borrows buffers
        found, end = list[float](), time.perf_counter() + SECONDS_EACH
        for _ in range(MOST_TIMES):
            self._wait()
            began = time.perf_counter()
            function()
            self._wait()
            found.append(time.perf_counter() - began)
            if time.perf_counter() > end:
                break
        return median(found)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _measured(shape: Shape, recipe: Recipe, bench: _Bench, tokens: int, longest: int) -> Rates:
    weights = sum(layer.inputs * layer.outputs for layer in shape.linears)
    rows = int(max(FEWEST_TOKENS, min(tokens, MOST_FLOPS[bench.device.type] / (4 * weights)))) // 32 * 32 or 32
    groups: dict[str, list[Linear]] = {}
    for linear in shape.linears:
        groups.setdefault(linear.reads, []).append(linear)
    of_groups = {name: _group(shape, recipe, group, rows, bench) for name, group in groups.items()}
    activation, norm = _gated(shape, rows, bench), _norm(shape, rows, bench)
    norms = max(1, round(shape.normed / shape.width / 2))  # norms before attention, and as many before the MLP
    mixing = [of_groups[name] for name in ("attention", "attended") if name in of_groups]
    mlp = [of_groups[name] for name in ("mlp", "inner") if name in of_groups]
    products = sum(each.forward + each.backward for each in of_groups.values())
    from_weights = [_from_weights(shape, recipe, layer, bench) for layer in shape.linears]
    return Rates(
        mixing=BothWays.total([*mixing, *[norm] * norms]),
        mlp=BothWays.total([*mlp, activation, *[norm] * norms]),
        head=_head(shape, bench),
        attention=_attention(shape, bench, longest),
        weights=BothWays.total(from_weights),
        optimizer=_optimizer(recipe, bench),
        flops_per_second=4 * weights / products,
    )


def _group(shape: Shape, recipe: Recipe, group: Sequence[Linear], rows: int, bench: _Bench) -> BothWays:
    """Time linear layers that read the same input, with their adapters; seconds for a token."""
    adapted = {layer.name for layer in shape.adapted(recipe.adapter)}
    inputs = min(WIDEST, group[0].inputs)
    outputs = [min(WIDEST, layer.outputs) for layer in group]
    share = sum(layer.inputs * layer.outputs for layer in group) / sum(inputs * width for width in outputs)
    x, grads = bench.randn(rows, inputs), [bench.randn(rows, width) for width in outputs]
    copies = [[bench.randn(width, inputs) for width in outputs] for _ in range(_copies(inputs * sum(outputs), bench))]
    with_adapter = [place for place, layer in enumerate(group) if layer.name in adapted]
    rank = recipe.adapter.rank * (2 if recipe.adapter.init in WITH_CONSTANTS else 1)
    layers = cycle([(dense, [_adapted(dense[place], rank) for place in with_adapter]) for dense in copies])
    adapters = [bench.randn(rank, inputs, dtype=torch.float32) for _ in with_adapter]
    adapters += [bench.randn(outputs[place], rank, dtype=torch.float32) for place in with_adapter]
    backend, own = dispatch.backend_for(bench.device, bench.dtype), [grads[place] for place in with_adapter]
    others = [place for place in range(len(group)) if place not in with_adapter]
    saved = project(x, next(layers)[1], adapters)[1] if with_adapter else None

    def forward() -> None:
        dense, linears = next(layers)
        if linears:
            project(x, linears, adapters)
        for place in others:
            backend.linear([(x, dense[place], True)], None)

    def backward() -> None:
        dense, linears = next(layers)
        if saved is not None:
            project_backward(own, saved, linears, adapters, to_input=True)
        for place in others:
            backend.linear([(grads[place], dense[place], False)], None)

    return BothWays(bench.seconds(forward) * share / rows, bench.seconds(backward) * share / rows)


def _copies(weights: int, bench: _Bench) -> int:
    """Return how many copies of weights are used in turns: a base is larger than the caches of a CPU."""
    if bench.device.type == "cuda":
        return 1
    return max(1, min(MOST_COPIES, COLD_BYTES // (weights * bench.dtype.itemsize)))


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _adapted(weight: Tensor, rank: int) -> AdaptedLinear:
    return AdaptedLinear(_linear(weight), 1.0, rank, 0.0)


def _from_weights(shape: Shape, recipe: Recipe, layer: Linear, bench: _Bench) -> BothWays:
    """Measure the seconds of dequantising a weight and of its norms for DoRA, for each pass of a micro-batch."""
    how = recipe.base.quantization
    dora = recipe.adapter.variant == "dora" and layer in shape.adapted(recipe.adapter)
    if how == "none" and not dora:
        return BothWays(0.0, 0.0)
    inputs, outputs = min(WIDEST, layer.inputs), min(WIDEST, layer.outputs)
    weight, share = bench.randn(outputs, inputs), layer.inputs * layer.outputs / (inputs * outputs)
    once = bench.seconds(_dequantising(how, weight)) * share if how != "none" else 0.0
    norms = 0.0
    if dora:
        rank = recipe.adapter.rank
        a, b = bench.randn(rank, inputs, dtype=torch.float32), bench.randn(outputs, rank, dtype=torch.float32)
        # the norms dequantise the weight again
        norms = bench.seconds(lambda: row_norms(weight, a, b, 1.0)) * share + once
    return BothWays(once + norms, once)


def _dequantising(how: str, weight: Tensor) -> Callable[[], Tensor]:
    """Return a function that dequantises a weight as `AdaptedLinear.weight` and `BlockFp8Linear` do."""
    outputs, inputs = weight.shape
    if how == "nf4" and find_spec("bitsandbytes") is not None:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return lambda: functional.dequantize_4bit(codes, state).to(weight.dtype)
    bytes_, scales = torch.ones_like(weight, dtype=torch.int8), torch.ones(outputs, 1, device=weight.device)
    if how == "int8":
        return lambda: (bytes_ * (scales / 127)).to(weight.dtype)
    blocks = torch.ones(-(-outputs // FP8_ROWS), -(-inputs // FP8_ROWS), device=weight.device)

    def dequantise() -> Tensor:
        factors = blocks.repeat_interleave(FP8_ROWS, 0)[:outputs].repeat_interleave(FP8_ROWS, 1)[:, :inputs]
        return bytes_.float().mul_(factors).to(weight.dtype)

    return dequantise


def _gated(shape: Shape, rows: int, bench: _Bench) -> BothWays:
    """Time the gated activation, whose product is computed again in the backward pass; seconds for a token."""
    width = min(WIDEST, shape.inner)
    backend, low = dispatch.backend_for(bench.device, bench.dtype), bench.randn(rows, 2)
    ups = (bench.randn(width, 1, dtype=torch.float32), bench.randn(width, 1, dtype=torch.float32))
    inputs = GatedInputs(bench.randn(rows, width), bench.randn(rows, width), low, ups, "silu")
    share = shape.inner / width / rows
    forward = bench.seconds(lambda: backend.gated(inputs)) * share
    gradient = bench.randn(rows, width)  # the backward pass may overwrite it, each time with smaller numbers
    backward = bench.seconds(lambda: backend.gated_backward(gradient, inputs)) * share
    return BothWays(forward, backward + forward)


def _norm(shape: Shape, rows: int, bench: _Bench) -> BothWays:
    """Time a norm and the addition to the residual stream; seconds for a token."""
    backend, x = dispatch.backend_for(bench.device, bench.dtype), bench.randn(rows, shape.width)
    weight = bench.randn(shape.width)
    _, inverse_rms = backend.rms_norm(x, weight, 1e-5, gemma=False)
    added = bench.seconds(lambda: x + x)
    forward = bench.seconds(lambda: backend.rms_norm(x, weight, 1e-5, gemma=False))
    backward = bench.seconds(lambda: backend.rms_norm_backward(x, x, weight, inverse_rms, gemma=False))
    return BothWays((forward + added) / rows, (backward + added) / rows)


def _head(shape: Shape, bench: _Bench) -> float:
    """Time the head and the cross-entropy, with the gradient of the hidden states; seconds for a trained token."""
    vocabulary, rows = min(shape.vocabulary, 1 << 15), MOST_HEAD_ROWS
    head = Head(_linear(bench.randn(vocabulary, shape.width)))
    labels = torch.zeros(rows, dtype=torch.int64, device=bench.device)
    hidden = bench.randn(rows, shape.width)

    def both_ways() -> None:
        with torch.enable_grad():
            summed_cross_entropy(hidden.clone().requires_grad_(), head, labels, [rows])

    return bench.seconds(both_ways) * shape.vocabulary / vocabulary / rows


def _attention(shape: Shape, bench: _Bench, longest: int) -> Attention:
    """Time attention with rotary positions over examples of two lengths, and solve for its time per token and pair."""
    longest = int(max(64, min(longest, MOST_PAIRS[bench.device.type] ** 0.5))) // 32 * 32
    shorter = max(32, longest // 4 // 32 * 32)
    found = [_attended(shape, bench, [longest]), _attended(shape, bench, [shorter] * (longest // shorter))]
    tokens, pairs = longest // shorter * shorter, [longest**2, longest // shorter * shorter**2]
    parts = []
    for place in (0, 1):
        long, short = found[0][place], found[1][place] * longest / tokens
        of_pair = max(0.0, long - short) / max(1, pairs[0] - pairs[1] * longest / tokens)
        parts.append((max(0.0, long - of_pair * pairs[0]) / longest, of_pair))
    (token_forward, pair_forward), (token_backward, pair_backward) = parts
    return Attention(BothWays(token_forward, token_backward), BothWays(pair_forward, pair_backward))


def _attended(shape: Shape, bench: _Bench, lengths: Sequence[int]) -> tuple[float, float]:
    tokens, width = sum(lengths), shape.head
    backend, segments = dispatch.backend_for(bench.device, bench.dtype), Segments(tuple(lengths), bench.device)
    query, key, value = (
        bench.randn(tokens, heads, width).transpose(0, 1) for heads in (shape.heads, shape.key_heads, shape.key_heads)
    )
    backend = backend if backend.supports_attention(query, key, value) else dispatch.PLAIN
    cos, sin, scale = bench.randn(tokens, width), bench.randn(tokens, width), width**-0.5
    output, saved = backend.attention(query, key, value, segments, scale, None)

    def rotated() -> None:
        for rows in (query, key):
            backend.rotate(rows, cos, sin)

    rotating = bench.seconds(rotated)
    forward = bench.seconds(lambda: backend.attention(query, key, value, segments, scale, None))
    backward = bench.seconds(lambda: backend.attention_backward(output, saved, segments, scale, None))
    return forward + rotating, backward + rotating


def _optimizer(recipe: Recipe, bench: _Bench) -> float:
    """Time a step of AdamW with clipping; seconds for a trained value."""
    weights, gradient, taken = (
        torch.zeros(VALUES, device=bench.device),
        torch.ones(VALUES, device=bench.device),
        torch.tensor(True, device=bench.device),
    )
    if recipe.optim.name == "adamw-8bit":
        scales = [torch.zeros(VALUES // BLOCK, device=bench.device) for _ in range(2)]
        codes = [torch.zeros(VALUES, dtype=torch.uint8, device=bench.device) for _ in range(2)]
        moments, take_step = [*scales, *codes], optim.adamw_8bit
    else:
        moments, take_step = [torch.zeros_like(weights) for _ in range(2)], optim.adamw

    def step() -> None:
        optim.clip(gradient, torch.linalg.vector_norm(gradient), 1.0)
        take_step(
            weights,
            gradient,
            moments,
            step=0,
            learning_rate=1e-4,
            optim=recipe.optim,
            taken=taken,
            ranges={Kind.A: slice(0, VALUES)},
        )

    return bench.seconds(step) / VALUES
