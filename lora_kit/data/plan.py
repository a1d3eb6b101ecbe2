"""Prepare a recipe's data, and plan the examples and micro-batches of every step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from lora_kit.data import cache
from lora_kit.data.counts import Counts
from lora_kit.data.order import allotted, examples_at, mixed_examples_at
from lora_kit.data.packing import Split, pack
from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import Prepared, Tell, Tokens, prepare, silent
from lora_kit.files import cache_folder
from lora_kit.recipe.schema import Recipe


def prepare_data(recipe: Recipe, renderer: Renderer, tell: Tell = silent) -> Prepared:
    """Read, render and tokenise a recipe's training and validation data, or load it from the cache.

    Args:
        recipe: The recipe.
        renderer: Tokenizer, template and stop token.
        tell: Called with the number of records done and the number of all records, unless the data is in the cache.

    Raises:
        DataError: The data has problems; the message lists them.
    """
    key = cache.key_of(recipe, renderer)
    path = cache_folder("tokens") / f"{key}.safetensors"
    if key is not None and (prepared := cache.read(path)) is not None:
        return prepared
    seed, prompts = recipe.train.seed, recipe.evaluate.generate
    prepared = prepare(recipe.data, renderer, base_dir=recipe.folder, seed=seed, prompts=prompts, tell=tell)
    if key is not None and cache.key_of(recipe, renderer) == key:  # otherwise a file changed while it was read
        return cache.write(path, prepared)
    return prepared


@dataclass(frozen=True)
class SourceShare:
    """What a run takes from a source of a mixture.

    Attributes:
        counts: The statistics of the source's examples.
        seen: How many examples the run takes from the source; repeated examples count.
        share: `seen` as a share of all examples of the run.
    """

    counts: Counts
    seen: int
    share: float

    @property
    def epochs(self) -> float:
        """How often the run sees each example of the source."""
        return self.seen / self.counts.examples

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of a row of `table`."""
        counts = {name: getattr(self.counts, name) for name in ("records", "examples", "tokens", "trained_tokens")}
        return counts | {"share": round(self.share, 4), "seen": self.seen, "epochs": round(self.epochs, 3)}


def table(mixture: Mapping[str, SourceShare]) -> str:
    """Return what a run takes from each source as aligned text: a line with the names of the columns, then the rows."""
    rows: list[tuple[str, ...]] = [("source", "records", "examples", "tokens", "share", "seen", "epochs")]
    for name, source in mixture.items():
        numbers = (source.counts.records, source.counts.examples, source.counts.tokens)
        shares = (f"{source.share:.1%}", f"{source.seen:,}", f"{source.epochs:,.2f}")
        rows.append((name, *(f"{number:,}" for number in numbers), *shares))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


@dataclass(frozen=True)
class Plan:
    """The examples and micro-batches of every step, as pure functions of the step.

    Attributes:
        recipe: The recipe.
        tokens: All training examples.
        micro_batch_tokens: Maximum number of tokens in a micro-batch (the recipe's value may be auto).
        padded: Whether each example is a padded row of its micro-batch; otherwise they are packed into one row.
        split: How the objective groups the examples of a step into micro-batches.
        sizes: The number of examples of each source of a mixture; empty if `data.train` is a single source.
    """

    recipe: Recipe
    tokens: Tokens
    micro_batch_tokens: int
    padded: bool
    split: Split = pack
    sizes: tuple[int, ...] = ()

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """How often each source of a mixture is chosen: its examples in an epoch of the mixture, or its weight."""
        entries = self.recipe.data.mixture
        weights = [Fraction(str(entry.weight)) for entry in entries if entry.weight is not None]
        if weights:
            unit = math.lcm(*(weight.denominator for weight in weights))
            return tuple(int(weight * unit) for weight in weights)
        passes = (1.0 if entry.epochs is None else entry.epochs for entry in entries)
        return tuple(max(1, round(each * size)) for each, size in zip(passes, self.sizes, strict=True))

    @property
    def epoch(self) -> int:
        """The number of examples in an epoch."""
        return sum(self.shares) if self.sizes else len(self.tokens)

    @property
    def total(self) -> int:
        """The number of examples of the whole run; an example counts once per epoch."""
        train = self.recipe.train
        if train.steps is not None:
            return train.steps * train.batch_size
        assert train.epochs is not None
        return max(1, round(train.epochs * self.epoch))

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run; the last step may have fewer examples."""
        return math.ceil(self.total / self.recipe.train.batch_size)

    def examples_seen(self, step: int) -> int:
        """Return how many examples were trained on before a step, which counts from 0."""
        return min(self.total, step * self.recipe.train.batch_size)

    def examples(self, step: int) -> list[int]:
        """Return the examples of a step, in the order of their positions."""
        size, seed, total = self.recipe.train.batch_size, self.recipe.train.seed, self.total
        positions = range(step * size, min((step + 1) * size, total))
        if len(self.sizes) < 2:
            return examples_at(positions, len(self.tokens), seed)
        return mixed_examples_at(positions, self.sizes, self.shares, seed)

    def mixed(self, sources: Mapping[str, Counts]) -> dict[str, SourceShare]:
        """Return what the whole run takes from each source of a mixture, given their statistics."""
        shares = zip(sources.items(), self.seen(), strict=True)
        return {name: SourceShare(counts, seen, seen / self.total) for (name, counts), seen in shares}

    def unseen_notes(self, sources: Mapping[str, Counts]) -> list[str]:
        """Return a note for each source of a mixture of which the whole run sees no example."""
        return [
            f"{name}: the run is so short, or the source's share so small, that none of its examples is seen"
            for name, source in self.mixed(sources).items()
            if not source.seen
        ]

    def seen(self) -> list[int]:
        """Return how many examples of each source of a mixture the whole run trains on; repeated examples count."""
        return [int(count) for count in allotted(np.array([self.total]), self.shares)[:, 0]]

    def sources_of(self, examples: Sequence[int]) -> tuple[int, ...]:
        """Return the index of the source of each example; nothing if `data.train` is a single source."""
        if not self.sizes:
            return ()
        return tuple(np.searchsorted(np.cumsum(self.sizes), examples, side="right").tolist())

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the micro-batches of a step for all processes together, each as the indices of its examples."""
        members = self.examples(step)
        groups = self.split(
            self.tokens.places(members, padded=self.padded), self.micro_batch_tokens, padded=self.padded
        )
        return [[members[index] for index in group] for group in groups]

    def idle_share(self, processes: int) -> float:
        """Return the fraction of process time spent waiting because micro-batches do not divide evenly.

        It is the mean over the first 20 steps, and all micro-batches are assumed to take the same time.
        """
        counts = [len(self.micro_batches(step)) for step in range(min(20, self.steps))]
        slots = sum(-(-count // processes) * processes for count in counts)
        return 1 - sum(counts) / slots

    def idleness_note(self, processes: int) -> str | None:
        """Return a note for the user if a step has fewer micro-batches than there are processes, otherwise None."""
        count = len(self.micro_batches(0))
        if count >= processes:
            return None
        return (
            f"a step has {count} micro-batch{'es' if count > 1 else ''} for {processes} processes, so some are idle; "
            "raise train.batch_size or lower train.micro_batch_tokens"
        )
