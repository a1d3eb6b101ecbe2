"""Held-out loss and exact match, of the base and of the adapter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from lora_kit.errors import DataError
from lora_kit.kernels.attention import use_attention
from lora_kit.kernels.fusing import use_kernels
from lora_kit.recipe.load import resolve_path
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.manifest import MANIFEST, read_manifest
from lora_kit.training.objectives.objective import Objective
from lora_kit.training.objectives.sft import Sft
from lora_kit.training.processes import Processes


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
    """Held-out data and the settings for running the model on it. Packing and objective are the same as in training.

    Attributes:
        tokens: The validation examples.
        prompts: The prompts to answer by generation.
        micro_batch_tokens: The most tokens of a micro-batch.
        padded: Whether micro-batches are padded rows instead of one packed row.
        objective: The loss.
        answering: The settings of generation.
    """

    tokens: Tokens
    prompts: Sequence[Prompt]
    micro_batch_tokens: int
    padded: bool
    objective: Objective
    answering: Answering


def held_out_of(plan: Plan, objective: Objective, data: Prepared, renderer: Renderer) -> HeldOut | None:
    """Return the held-out data of a plan; None without validation data."""
    if data.validation is None:
        return None
    # the limit for generation: a text that is much longer than the longest expected answer cannot match any
    longest = max((len(renderer.tokenizer(prompt.expected)["input_ids"]) for prompt in data.prompts), default=0)
    answering = Answering(stop_ids(renderer), max_new_tokens=longest + 8)
    return HeldOut(data.validation, data.prompts, plan.micro_batch_tokens, plan.padded, objective, answering)


def score(
    model: PeftModel,
    renderer: Renderer,
    held_out: HeldOut,
    *,
    processes: Processes,
    tick: Callable[[str], None] = lambda _: None,
) -> Score:
    """Measure the model on the held-out data, divided over the processes."""
    loss_sum, weight = _loss(model, held_out, processes, tick)
    own_prompts = held_out.prompts[processes.index :: processes.count]
    matches = 0
    for start in range(0, len(own_prompts), held_out.answering.batch_size):
        tick("answering")
        batch = own_prompts[start : start + held_out.answering.batch_size]
        texts = answer(model, renderer.tokenizer, [prompt.ids for prompt in batch], held_out.answering)
        matches += sum(text.strip() == prompt.expected.strip() for text, prompt in zip(texts, batch, strict=True))
    totals = [sum(column) for column in zip(*processes.gather([(loss_sum, weight, matches)]), strict=True)]
    loss = totals[0] / max(1, totals[1])
    match = totals[2] / len(held_out.prompts) if held_out.prompts else None
    return Score(loss, math.exp(min(loss, 700)), match, len(held_out.tokens), len(held_out.prompts))


@torch.no_grad()
def _loss(model: PeftModel, held_out: HeldOut, processes: Processes, tick: Callable[[str], None]) -> tuple[float, int]:
    was_training = model.training
    model.eval()
    lengths, objective = held_out.tokens.lengths.tolist(), held_out.objective
    groups = objective.split(lengths, held_out.micro_batch_tokens, padded=held_out.padded)
    loss_sum, weight = 0.0, 0
    for members in groups[processes.index :: processes.count]:
        tick("held-out loss")
        batch = collate(held_out.tokens, members, padded=held_out.padded)
        loss = objective.loss(model, batch, processes.device)
        loss_sum, weight = loss_sum + float(loss.total), weight + loss.weight
    model.train(was_training)
    return loss_sum, weight


def compare(
    model: PeftModel,
    renderer: Renderer,
    held_out: HeldOut,
    *,
    processes: Processes,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Score]:
    """Measure the base and the adapter on the same examples."""
    with model.disable_adapter():
        base = score(model, renderer, held_out, processes=processes, tick=lambda what: tick(f"base: {what}"))
    adapter = score(model, renderer, held_out, processes=processes, tick=lambda what: tick(f"adapter: {what}"))
    return {"base": base, "adapter": adapter}


def plain(scores: dict[str, Score]) -> dict[str, dict[str, float | None]]:
    """Return the scores as plain values for result.json."""
    return {name: asdict(score) for name, score in scores.items()}


def evaluate(recipe: Recipe, checkpoint: str | Path) -> dict[str, Score]:
    """Measure a checkpoint's base and adapter on a recipe's validation data.

    Args:
        recipe: The recipe, with the validation data and the base.
        checkpoint: A checkpoint, a run for its newest checkpoint, or a Hub name.

    Raises:
        DataError: The recipe has no validation data.
    """
    processes = Processes.start(recipe.base.dtype)
    try:
        checkpoint = checkpoint_at(checkpoint)
        model, tokenizer = load(checkpoint, base=resolve_path(recipe, recipe.base.repo), device=str(processes.device))
        facts = read_manifest(checkpoint / MANIFEST).run
        resolved = facts.resolved
        use_attention(model, resolved.attention)
        use_kernels(model, resolved.kernels or ())
        renderer = Renderer(tokenizer, stop_token=recipe.base.stop_token)
        data, named = prepare_data(recipe, renderer), recipe.train.micro_batch_tokens
        recorded = resolved.micro_batch_tokens or facts.recipe["train"]["micro_batch_tokens"]
        tokens = named if isinstance(named, int) else recorded
        plan, objective = Plan(recipe, data.train, tokens, resolved.layout == "padded"), Sft()
        held_out = held_out_of(plan, objective, data, renderer)
        if held_out is None:
            raise DataError("data.validation: the recipe names none; add a file, a Hub name or a fraction such as 0.05")
        return compare(model, renderer, held_out, processes=processes)
    finally:
        processes.leave()
