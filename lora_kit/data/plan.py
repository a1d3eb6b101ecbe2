"""Prepare a recipe's data, and plan the examples and micro-batches of every step."""

import math
from dataclasses import dataclass

from lora_kit.data import cache
from lora_kit.data.order import examples_of_step
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
        tell: Is told how many records are done, and how many there are, unless the data is in the cache.

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
class Plan:
    """The examples and micro-batches of every step, as pure functions of the step.

    Attributes:
        recipe: The recipe.
        tokens: All training examples.
        micro_batch_tokens: Maximum number of tokens in a micro-batch (the recipe's value may be auto).
        padded: Whether each example is a padded row of its micro-batch; otherwise they are packed into one row.
        split: How the objective groups the examples of a step into micro-batches.
    """

    recipe: Recipe
    tokens: Tokens
    micro_batch_tokens: int
    padded: bool
    split: Split = pack

    @property
    def total(self) -> int:
        """The number of examples of the whole run; an example counts once per epoch."""
        train = self.recipe.train
        if train.steps is not None:
            return train.steps * train.batch_size
        assert train.epochs is not None
        return max(1, round(train.epochs * len(self.tokens)))

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run; the last step may have fewer examples."""
        return math.ceil(self.total / self.recipe.train.batch_size)

    def examples_seen(self, step: int) -> int:
        """Return how many examples were trained on before a step, which counts from 0."""
        return min(self.total, step * self.recipe.train.batch_size)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the micro-batches of a step for all processes together, each as the indices of its examples."""
        train = self.recipe.train
        members = examples_of_step(
            step, batch_size=train.batch_size, examples=len(self.tokens), total=self.total, seed=train.seed
        )
        groups = self.split(self.tokens.lengths_of(members), self.micro_batch_tokens, padded=self.padded)
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
