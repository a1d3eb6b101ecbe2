"""A recipe's data, and which of it each step trains on: a pure function of the step."""

from dataclasses import dataclass

from lora_kit.data.cache import remembered
from lora_kit.data.order import examples_of_step, total_examples, total_steps
from lora_kit.data.packing import Split, pack
from lora_kit.data.template import Renderer
from lora_kit.data.tokens import Prepared, Tokens, prepare
from lora_kit.recipe.schema import Recipe


def prepare_data(recipe: Recipe, renderer: Renderer) -> Prepared:
    """Read, render and tokenise what a recipe trains on and holds out, or take it from an earlier call."""

    def make() -> Prepared:
        prompts = recipe.evaluate.generate
        return prepare(recipe.data, renderer, base_dir=recipe.folder, seed=recipe.train.seed, prompts=prompts)

    return remembered(recipe, renderer, make)


@dataclass(frozen=True)
class Plan:
    """Which examples each step trains on, and in which micro-batches: a pure function of the step.

    Attributes:
        recipe: Says which examples.
        tokens: Of all examples.
        micro_batch_tokens: What the run has settled on; the recipe may say auto.
        padded: Whether micro-batches are rows of one example each.
        split: How the objective groups the examples of a step into micro-batches.
    """

    recipe: Recipe
    tokens: Tokens
    micro_batch_tokens: int
    padded: bool
    split: Split = pack

    @property
    def total(self) -> int:
        """The examples of the whole run, each epoch's visit counted."""
        train = self.recipe.train
        return total_examples(len(self.tokens), batch_size=train.batch_size, steps=train.steps, epochs=train.epochs)

    @property
    def steps(self) -> int:
        """The optimizer steps of the whole run."""
        return total_steps(self.total, self.recipe.train.batch_size)

    def examples_seen(self, step: int) -> int:
        """Return how many examples were trained on before a step."""
        return min(self.total, step * self.recipe.train.batch_size)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the step's micro-batches as indices of examples, over all processes."""
        train = self.recipe.train
        positions = examples_of_step(
            step, batch_size=train.batch_size, examples=len(self.tokens), total=self.total, seed=train.seed
        )
        members = [position.example for position in positions]
        lengths = self.tokens.lengths[members].tolist()
        groups = self.split(lengths, self.micro_batch_tokens, padded=self.padded)
        return [[members[index] for index in group] for group in groups]

    def idle_share(self, processes: int) -> float:
        """Return the share of the processes' turns in which there is no micro-batch for them, over the first steps."""
        counts = [len(self.micro_batches(step)) for step in range(min(20, self.steps))]
        turns = sum(-(-count // processes) * processes for count in counts)
        return 1 - sum(counts) / turns

    def about_idleness(self, processes: int) -> str | None:
        """Return what to say when a step has fewer micro-batches than there are processes; None when it has enough."""
        count = len(self.micro_batches(0))
        if count >= processes:
            return None
        return (
            f"a step has {count} micro-batches for {processes} processes, so some are idle; raise train.batch_size or "
            "lower train.micro_batch_tokens"
        )
