"""How long a step takes, from what its micro-batches contain and how fast a machine computes the parts of a layer.

A step computes every linear layer twice in the backward direction of its input only, because the weights are frozen:
2 floating-point operations for a weight and token forward, 2 backward, and 2 more forward where activations are
recomputed. Attention also grows with the square of the length of an example. The head, and the MLP of the last layer,
are computed at trained tokens only. Layers below the first one with an adapter need no backward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from lora_kit.data.plan import Plan
from lora_kit.model.sizes import Estimate, Shape
from lora_kit.recipe.schema import Recipe

FIRST_STEPS = 20  # the steps whose micro-batches are taken as typical of the run
LINK_BYTES_PER_SECOND = {"cpu": 1e9, "cuda": 20e9}  # between processes; assumptions: gloo on one machine, PCIe 4
# seconds of Python, autograd and small operations for a layer and a micro-batch
LAYER_SECONDS = {"cpu": 11e-3, "cuda": 4e-4}
# seconds to read a weight from memory in a micro-batch; it is in no cache
WEIGHT_SECONDS = {"cpu": 1.1e-9, "cuda": 0.0}
# LAYER_SECONDS and WEIGHT_SECONDS: for CPUs fitted to the seconds in docs/estimate.md, for GPUs guesses
STEP_SECONDS = 3e-3  # seconds of the parts of a step that do not depend on sizes
SNAPSHOT_BYTES_PER_SECOND = 2e9  # speed of the copy into the live region, which slows down the next step
BYTES_PER_THREAD = 4_000_000  # bytes of weights for each thread; measured in docs/design/0009
FEWEST_THREADS = 2  # on idle cores two threads are faster than one for every base


def threads_for(cores: int, weight_bytes: int) -> int:
    """Return how many threads a process computes with on a CPU: its share of the cores, fewer for a small base."""
    return max(1, min(cores, max(FEWEST_THREADS, weight_bytes // BYTES_PER_THREAD)))


@dataclass(frozen=True)
class BothWays:
    """The seconds of a part in the forward and in the backward pass, for a token or for a pair of tokens."""

    forward: float
    backward: float

    @classmethod
    def total(cls, parts: Sequence["BothWays"]) -> "BothWays":
        """Return the sum of parts."""
        return cls(sum(part.forward for part in parts), sum(part.backward for part in parts))


@dataclass(frozen=True)
class Attention:
    """The seconds of attention: a part for each token, and a part for each pair of tokens of an example."""

    token: BothWays
    pair: BothWays


@dataclass(frozen=True)
class Rates:
    """The speed of a machine, in seconds; see `rates.measure`.

    Attributes:
        mixing: The linear layers around attention of a decoder layer, with their norm, for a token.
        mlp: The MLP of a decoder layer, with its norm, for a token.
        head: Head and loss, both ways, for a trained token.
        attention: Attention of a decoder layer.
        weights: What a decoder layer computes from its weights alone, once in each pass of a micro-batch: dequantised
            weights, and the norms of DoRA.
        optimizer: The optimizer step, for a trained value.
        flops_per_second: The rate of the linear layers with their adapters, counting the base's operations only.
    """

    mixing: BothWays
    mlp: BothWays
    head: float
    attention: Attention
    weights: BothWays
    optimizer: float
    flops_per_second: float


@dataclass(frozen=True)
class MicroBatchWork:
    """What a micro-batch contains.

    Attributes:
        tokens: Tokens, with padding.
        trained: Trained tokens.
        pairs: The sum of the squares of the lengths of its examples.
    """

    tokens: int
    trained: int
    pairs: int


def work_of(plan: Plan, step: int) -> list[MicroBatchWork]:
    """Return the micro-batches of a step."""
    found = []
    for members in plan.micro_batches(step):
        lengths = plan.tokens.side_lengths(members)
        tokens = int(lengths.sum())
        if plan.padded:
            tokens = int(lengths.max()) * int((lengths > 0).sum())
        trained = sum(plan.tokens.weight(index) for index in members)
        found.append(MicroBatchWork(tokens, trained, int((lengths.astype(np.int64) ** 2).sum())))
    return found


@dataclass(frozen=True)
class Speed:
    """Computes the seconds of parts of a run.

    Attributes:
        shape: The dimensions of the base.
        recipe: The recipe.
        sizes: The estimate of memory, for the number of trained values and whether activations are recomputed.
        rates: The speed of the machine.
        device: "cpu" or "cuda".
        processes: The number of processes.
        sharded: Whether the base is sharded over the processes.
    """

    shape: Shape
    recipe: Recipe
    sizes: Estimate
    rates: Rates
    device: str
    processes: int = 1
    sharded: bool = False

    def forward(self, work: MicroBatchWork) -> float:
        """Return the seconds of a forward pass without gradients, such as an evaluation or a reference."""
        layers, rates = self.shape.layers, self.rates
        linear = work.tokens * layers * (rates.mixing.forward + rates.attention.token.forward)
        mlp = rates.mlp.forward * self._mlp_tokens(work)
        attention = work.pairs * layers * rates.attention.pair.forward
        once = layers * (rates.weights.forward + LAYER_SECONDS[self.device] / 3) + self._from_memory / 2
        return linear + mlp + attention + work.trained * rates.head / 2 + once

    def both_ways(self, work: MicroBatchWork) -> float:
        """Return the seconds of a micro-batch: forward, backward, and forward again if activations are recomputed."""
        layers, rates = self.shape.layers, self.rates
        reached = layers - self.first_layer  # layers that the backward pass reaches
        tokens = work.tokens * reached * (rates.mixing.backward + rates.attention.token.backward)
        mlp = rates.mlp.backward * max(0, self._mlp_tokens(work) - work.tokens * self.first_layer)
        pairs = work.pairs * reached * rates.attention.pair.backward
        forward = self.forward(work)
        again = forward - work.trained * rates.head / 2 if self.sizes.activation_checkpointing else 0.0
        once = reached * (rates.weights.backward + LAYER_SECONDS[self.device] * 2 / 3) + self._from_memory / 2
        return forward + again + tokens + mlp + pairs + work.trained * rates.head / 2 + once

    @property
    def _from_memory(self) -> float:
        """The seconds in which a forward and a backward pass read the weights from main memory; 0 on a GPU."""
        shape = self.shape
        linear = shape.layers * sum(layer.inputs * layer.outputs for layer in shape.linears)
        return (linear + shape.vocabulary * shape.width) * WEIGHT_SECONDS[self.device]

    def _mlp_tokens(self, work: MicroBatchWork) -> int:
        """Return for how many tokens an MLP is computed, over all layers: in the last layer only for trained tokens."""
        last = work.trained if self.recipe.train.kernels == "auto" else work.tokens
        return work.tokens * (self.shape.layers - 1) + last

    @property
    def first_layer(self) -> int:
        """The first decoder layer with an adapter."""
        selected = self.shape.selected(self.recipe.adapter)
        numbers = (int(path.split(".")[2]) for path in selected if path != "lm_head")
        return min(numbers, default=self.shape.layers)

    def step(self, work: Sequence[MicroBatchWork]) -> float:
        """Return the seconds of a step: the micro-batches of the slowest process, then sum, optimizer and snapshot."""
        each = [self.both_ways(one) for one in work]
        if self.recipe.objective.kind == "kto":  # mismatched answers, about as long, are computed forward first
            each = [seconds + self.forward(one) for seconds, one in zip(each, work, strict=True)]
        own = max(sum(each[index :: self.processes]) for index in range(self.processes))
        trained = self.sizes.trainable_parameters
        after = trained * self.rates.optimizer + STEP_SECONDS
        if self.device == "cpu":
            after += (self.sizes.adapter_bytes + self.sizes.moment_bytes) / SNAPSHOT_BYTES_PER_SECOND
        return own + after + self.communication(work)

    def communication_bytes(self, work: Sequence[MicroBatchWork]) -> int:
        """Return the bytes that a process sends in a step: the gradient, and of a sharded base its shard.

        Both sums of the gradient send all of it but the process's own part. A sharded base is gathered for the forward
        and for the backward pass of every micro-batch.
        """
        if self.processes == 1:
            return 0
        gradient = 2 * 4 * self.sizes.trainable_parameters * (self.processes - 1) // self.processes
        gathered = 2 * self.sizes.base_bytes * (self.processes - 1) * math.ceil(len(work) / self.processes)
        return gradient + (gathered if self.sharded else 0)

    def communication(self, work: Sequence[MicroBatchWork]) -> float:
        """Return the seconds of a step's communication, at the assumed rate."""
        return self.communication_bytes(work) / LINK_BYTES_PER_SECOND[self.device]

    def flops(self, work: Sequence[MicroBatchWork]) -> float:
        """Return the floating-point operations of a step's products with the base's weights, over all processes."""
        weights = sum(layer.inputs * layer.outputs for layer in self.shape.linears)
        tokens, trained = (sum(getattr(one, name) for one in work) for name in ("tokens", "trained"))
        head = 4 * trained * self.shape.vocabulary * self.shape.width
        return (6 if self.sizes.activation_checkpointing else 4) * tokens * weights * self.shape.layers + head


def usual(work: Sequence[MicroBatchWork]) -> MicroBatchWork:
    """Return the mean of micro-batches."""
    means = (round(mean(getattr(one, name) for one in work)) for name in ("tokens", "trained", "pairs"))
    return MicroBatchWork(*means)
