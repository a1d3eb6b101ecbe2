"""Held-out loss and exact match, of the base and of the adapter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel

from lora_kit.artifacts.answering import Answering, answer, stop_ids
from lora_kit.artifacts.load import load
from lora_kit.artifacts.locate import checkpoint_at
from lora_kit.data.packing import collate
from lora_kit.data.plan import Plan, prepare_data
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import Prompt
from lora_kit.data.tokens import Prepared, Tokens
from lora_kit.errors import DataError, RecipeError
from lora_kit.kernels.attention import use_attention
from lora_kit.kernels.fusing import use_kernels
from lora_kit.recipe.load import resolve_path
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.formats import finite
from lora_kit.runs.manifest import MANIFEST, read_manifest
from lora_kit.runs.store import Checkpoint
from lora_kit.training.objectives.objective import Objective
from lora_kit.training.objectives.sft import Sft
from lora_kit.training.processes import Processes

Tick = Callable[[str], None]  # is told what is being done, again and again


@dataclass(frozen=True)
class Score:
    """Held-out quality of one model.

    Attributes:
        loss: Mean cross-entropy of the trained tokens, in nats.
        perplexity: exp(loss).
        exact_match: Share of answers equal to the expected text; None if no answers were generated.
        examples: How many examples the loss covers.
        answered: How many answers were generated.
    """

    loss: float
    perplexity: float
    exact_match: float | None
    examples: int
    answered: int


@dataclass(frozen=True)
class HeldOut:
    """Measures a model on held-out data. Packing and objective are the same as in training.

    Attributes:
        model: The base with the adapter.
        renderer: The tokenizer with the chat template.
        data: The validation examples, and the prompts to answer by generation.
        plan: The size and the layout of micro-batches.
        objective: The loss.
        processes: The processes that share the work.
    """

    model: PeftModel
    renderer: Renderer
    data: Prepared
    plan: Plan
    objective: Objective
    processes: Processes

    def compare(self, tick: Tick = lambda _: None) -> dict[str, Score]:
        """Measure the base and the adapter on the same examples; without validation data return nothing."""
        if self.data.validation is None:
            return {}
        with self.model.disable_adapter():
            base = self._score(self.data.validation, lambda what: tick(f"base: {what}"))
        adapter = self._score(self.data.validation, lambda what: tick(f"adapter: {what}"))
        return {"base": base, "adapter": adapter}

    def _score(self, examples: Tokens, tick: Tick) -> Score:
        loss, prompts, matches = self.loss(examples, tick), self.data.prompts, 0
        own_prompts = prompts[self.processes.index :: self.processes.count]
        for start in range(0, len(own_prompts), self.answering.batch_size):
            tick("answering")
            batch = own_prompts[start : start + self.answering.batch_size]
            texts = zip(self.answers(batch), batch, strict=True)
            matches += sum(text.strip() == prompt.expected.strip() for text, prompt in texts)
        match = sum(self.processes.gather([matches])) / len(prompts) if prompts else None
        return Score(loss, math.exp(min(loss, 700)), match, len(examples), len(prompts))

    @torch.no_grad()
    def loss(self, examples: Tokens, tick: Tick) -> float:
        """Return the mean loss of the trained tokens of some examples, which are divided over the processes."""
        was_training = self.model.training
        self.model.eval()
        padded, loss_sum, weight = self.plan.padded, 0.0, 0
        groups = self.objective.split(examples.lengths.tolist(), self.plan.micro_batch_tokens, padded=padded)
        for members in groups[self.processes.index :: self.processes.count]:
            tick("held-out loss")
            batch = collate(examples, members, padded=padded)
            loss = self.objective.loss(self.model, batch, self.processes.device)
            loss_sum, weight = loss_sum + float(loss.total), weight + loss.weight
        self.model.train(was_training)
        loss_sum, weight = (sum(column) for column in zip(*self.processes.gather([(loss_sum, weight)]), strict=True))
        return loss_sum / max(1, weight)

    @cached_property
    def answering(self) -> Answering:
        """The settings of generation: a text much longer than the longest expected answer cannot match any."""
        expected = (self.renderer.tokenizer(prompt.expected)["input_ids"] for prompt in self.data.prompts)
        return Answering(stop_ids(self.renderer), max_new_tokens=max(map(len, expected), default=0) + 8)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the model's answers to some prompts."""
        return answer(self.model, self.renderer.tokenizer, [prompt.ids for prompt in prompts], self.answering)


def plain(scores: dict[str, Score]) -> dict[str, dict[str, float | None]]:
    """Return the scores as plain values for result.json; None stands for a number that is not finite."""
    return {name: finite(asdict(score)) for name, score in scores.items()}


def evaluate(recipe: Recipe, checkpoint: str | Path) -> dict[str, Score]:
    """Measure a checkpoint's base and adapter on a recipe's validation data.

    Args:
        recipe: The recipe, with the validation data and the base; its `base.trust_remote_code` decides whether the base
            may run Python files.
        checkpoint: A checkpoint, a run for its newest checkpoint, or a Hub name.

    Raises:
        DataError: The recipe has no validation data.
    """
    processes = Processes.start(recipe.base.dtype)
    try:
        checkpoint = checkpoint_at(checkpoint)
        model, tokenizer = load(
            checkpoint,
            base=resolve_path(recipe, recipe.base.repo),
            device=str(processes.device),
            trust_remote_code=recipe.base.trust_remote_code,
        )
        opened = Checkpoint(checkpoint, read_manifest(checkpoint / MANIFEST))
        resolved = opened.manifest.run.resolved
        use_attention(model, resolved.attention)
        use_kernels(model, resolved.kernels or ())
        renderer = Renderer(tokenizer, stop_token=recipe.base.stop_token)
        data = prepare_data(recipe, renderer)
        sizes = (recipe.train.micro_batch_tokens, resolved.micro_batch_tokens, opened.recipe.train.micro_batch_tokens)
        tokens = next((size for size in sizes if isinstance(size, int)), None)
        if tokens is None:
            raise RecipeError(f"train.micro_batch_tokens: {checkpoint} does not record it; set a number")
        if data.validation is None:
            raise DataError("data.validation: the recipe names none; add a file, a Hub name or a fraction such as 0.05")
        plan = Plan(recipe, data.train, tokens, resolved.layout == "padded")
        return HeldOut(model, renderer, data, plan, Sft(), processes).compare()
    finally:
        processes.leave()
