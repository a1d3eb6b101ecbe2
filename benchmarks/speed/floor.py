"""The least time that training some examples can take on this machine: its matmuls, at the rate measured here.

Every linear map is applied forward and to its gradient (4 FLOPs a weight and token), the head at trained tokens only,
and causal attention over l tokens costs 7 l^2 d a layer (2 forward, 5 backward). Nothing else is counted: no norm, no
optimizer, no adapter.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sizes import Counts

ROWS = {"cpu": 2048, "cuda": 8192}  # tokens of a matmul: the micro_batch_tokens that are best there
BEST_OF, PATIENCE = 10, 6.0  # seconds after which a shape is not tried again


@dataclass(frozen=True)
class Floor:
    """A base's matmuls, measured.

    Attributes:
        layers: Seconds of all linear maps of the layers for one token, both ways.
        head: Seconds of the head for one token, both ways.
        attention: FLOPs of all layers' attention for one pair of tokens.
        flops_per_second: The rate of all linear maps together.
        weights: Of the linear maps that a token goes through, without the head's.
        head_weights: The head's.
    """

    layers: float
    head: float
    attention: float
    flops_per_second: float
    weights: int
    head_weights: int

    def seconds(self, counts: Counts) -> float:
        """Return the least seconds for some examples."""
        pairs = sum(length * length for length in counts.lengths)
        linear = counts.tokens * self.layers + counts.supervised * self.head
        return linear + pairs * self.attention / self.flops_per_second

    def model_flops(self, counts: Counts, *, recomputed: bool = False) -> float:
        """Return 4 FLOPs a weight and token, 6 where the forward pass is done twice, without attention."""
        return (6 if recomputed else 4) * (counts.tokens * self.weights + counts.supervised * self.head_weights)


def linears(config: Mapping[str, Any]) -> Counter[tuple[int, int]]:
    """Return how often a token goes through a linear map of each shape (inputs, outputs), without the head."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    inner, experts = config.get("moe_intermediate_size") or config["intermediate_size"], config.get("num_experts")
    times = config["num_experts_per_tok"] if experts else 1
    layer = [(width, queries), (width, keys), (width, keys), (queries, width)]
    layer += times * [(width, inner), (width, inner), (inner, width)]
    layer += [(width, experts)] if experts else []
    return Counter(config["num_hidden_layers"] * layer)


def measure_floor(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.bfloat16, *, best_of: int = BEST_OF
) -> Floor:
    """Time the base's own shapes with all threads that this process has: the best of several times."""
    shapes, head_shape = linears(config), (config["hidden_size"], config["vocab_size"])
    rows = ROWS[device.type]
    seconds = {shape: _both_ways(rows, *shape, device, dtype, best_of) for shape in {*shapes, head_shape}}
    layers = sum(count * seconds[shape] for shape, count in shapes.items())
    weights = sum(count * inputs * outputs for (inputs, outputs), count in shapes.items())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    attended = heads * (config.get("head_dim") or width // heads)
    return Floor(
        layers=layers / rows,
        head=seconds[head_shape] / rows,
        attention=7 * attended * config["num_hidden_layers"],
        flops_per_second=4 * rows * (weights + math.prod(head_shape)) / (layers + seconds[head_shape]),
        weights=weights,
        head_weights=math.prod(head_shape),
    )


def _both_ways(rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype, best_of: int) -> float:
    """Return the best seconds of x W^T and y W for some tokens."""
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    x, y = (torch.randn(rows, width, dtype=dtype, device=device) for width in (inputs, outputs))
    output, gradient = torch.empty_like(y), torch.empty_like(x)  # no time of a product goes into new memory
    forward, backward, end = math.inf, math.inf, time.perf_counter() + PATIENCE
    for _ in range(best_of + 1):
        forward = min(forward, _timed(x, weight.T, output, device))
        backward = min(backward, _timed(y, weight, gradient, device))
        if time.perf_counter() > end:
            break
    return forward + backward


def _timed(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.mm(left, right, out=out)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
