"""Held-out loss, preference accuracy, figures of answers and forgetting, of the base and of the adapter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel

from lora_kit.artifacts.answering import Answering, answer, new_tokens, positions_of, stop_ids
from lora_kit.artifacts.load import Loaded, open_adapter
from lora_kit.data.packing import collate
from lora_kit.data.plan import Plan, prepare_data
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import Prompt
from lora_kit.data.tokens import Prepared, Tokens, check_context
from lora_kit.errors import ContractError, DataError, RecipeError
from lora_kit.kernels.attention import use_attention
from lora_kit.kernels.fusing import use_kernels
from lora_kit.kernels.gathered import is_sharded
from lora_kit.model.state import FlatState
from lora_kit.model.tokenizer import for_objective, read_template
from lora_kit.recipe.load import resolve_path
from lora_kit.recipe.schema import EXACT_MATCH, Data, Evaluate, Recipe, SftObjective
from lora_kit.runs.formats import finite
from lora_kit.training.answer_metrics import Answered, figures_of_answers, require_packages
from lora_kit.training.objectives.choose import objective_of
from lora_kit.training.objectives.objective import Computing, LossSum, Objective
from lora_kit.training.objectives.sft import Sft
from lora_kit.training.processes import Processes
from lora_kit.training.reference import Reference, as_reference, facts_of

Tick = Callable[[str], None]  # called often during an evaluation, with the name of the current activity


@dataclass(frozen=True)
class Score:
    """Held-out quality of one model.

    Attributes:
        loss: Mean loss: the cross-entropy of the trained tokens, in nats, or the loss of the preference objective.
        perplexity: exp(loss) of a cross-entropy, otherwise None.
        exact_match: Share of answers equal to the expected text; None if no answers were generated.
        examples: How many examples the loss covers.
        answered: How many prompts were answered.
        too_long: How many of these prompts leave no position of the base for an answer; each counts as no match.
        sets: The loss of each named validation set; empty if they have no names.
        metrics: Other figures: those of a preference objective, such as `rewards/accuracies` and `rewards/margins`, of
            the answers (`evaluate.metrics`), and `text_loss` and `forgetting` of `evaluate.forgetting`.
    """

    loss: float
    perplexity: float | None
    exact_match: float | None
    examples: int
    answered: int
    too_long: int = 0
    sets: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)


class HeldOutLoss(NamedTuple):
    """A held-out loss in nats.

    Attributes:
        mean: The mean over the trained tokens (or the pairs or answers) of all validation examples.
        sets: The same mean for each named validation set; empty if the sets have no names.
        metrics: Other figures, as in `Score.metrics`.
    """

    mean: float
    sets: dict[str, float]
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class BaseText:
    """The text of `evaluate.forgetting`.

    Attributes:
        tokens: The text, cut into pieces of at most `data.sequence_length` tokens.
        loss: The base's mean loss over the tokens of the text.
    """

    tokens: Tokens
    loss: float


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
        settings: The recipe's section.
        text: The text on which forgetting is measured; None if the recipe names none.
        state: The model's state; None if it has an adapter that is not trained here.
    """

    model: PeftModel
    renderer: Renderer
    data: Prepared
    plan: Plan
    objective: Objective
    processes: Processes
    settings: Evaluate
    text: BaseText | None = None
    state: FlatState | None = None

    def compare(self, tick: Tick = lambda _: None) -> dict[str, Score]:
        """Measure the base and the adapter on the same examples; without validation data return nothing."""
        if self.data.validation is None:
            return {}
        with as_reference(self.model, self.state):
            base = self._score(self.data.validation, lambda what: tick(f"base: {what}"))
        adapter = self._score(self.data.validation, lambda what: tick(f"adapter: {what}"))
        return {"base": base, "adapter": adapter}

    def _score(self, examples: Tokens, tick: Tick) -> Score:
        (loss, sets, metrics), prompts = self.measure(examples, tick, answers=True), self.data.prompts
        match = metrics.pop(EXACT_MATCH, None)
        too_long = sum(not self.has_room(prompt) for prompt in prompts)
        perplexity = math.exp(min(loss, 700)) if self.objective.unit == "trained_tokens" else None
        return Score(loss, perplexity, match, len(examples), len(prompts), too_long, sets, metrics)

    def measure(self, examples: Tokens, tick: Tick, *, answers: bool) -> HeldOutLoss:
        """Return the held-out loss with all other figures of the model; without those of answers if not `answers`."""
        found = self.loss(examples, tick)
        metrics = found.metrics
        if answers and self.data.prompts:
            metrics = metrics | self.figures_of_answers(tick)
        if self.text is not None:
            loss = self.text_loss(self.text.tokens, tick)
            metrics = metrics | {"text_loss": loss, "forgetting": loss - self.text.loss}
        return found._replace(metrics=metrics)

    def figures_of_answers(self, tick: Tick) -> dict[str, float | None]:
        """Return exact match and the recipe's metrics of the answers to all prompts.

        The processes divide them up, unless the base is sharded.
        """
        prompts, size, own = self.data.prompts, self.answering.batch_size, list[tuple[int, list[str]]]()
        # the same batches for any number of processes, so that rounding is the same
        starts = range(0, len(prompts), size)
        for start in starts if self.in_step else starts[self.processes.index :: self.processes.count]:
            tick("answering")
            own.append((start, self.answers(prompts[start : start + size])))
        every = own if self.in_step else sorted(self.processes.gather(own))
        texts = [text for _, batch in every for text in batch]
        answered = [
            Answered(text if self.has_room(prompt) else None, prompt.expected)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        return figures_of_answers(answered, self.settings)

    def with_text(self, tokens: Tokens, tick: Tick = lambda _: None) -> "HeldOut":
        """Return the measurement with a text for forgetting, on which the base is measured here."""
        with as_reference(self.model, self.state):
            return replace(self, text=BaseText(tokens, self.text_loss(tokens, tick)))

    def text_loss(self, tokens: Tokens, tick: Tick) -> float:
        """Return the mean loss of the tokens of a text."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            weight, loss = self._summed(Sft(), tokens, [range(len(tokens))], tick)[0]
        self.model.train(was_training)
        return loss / max(1, weight)

    def has_room(self, prompt: Prompt) -> bool:
        """Return whether a prompt leaves a position of the base for an answer."""
        return new_tokens(prompt.ids, self.positions, self.answering) > 0

    @cached_property
    def in_step(self) -> bool:
        """Whether the base is sharded, so that all processes must compute equally often and all answer every prompt.

        A token of an answer costs the gathering of the whole base, so sharing out the prompts would save little.
        """
        return is_sharded(self.model)

    @cached_property
    def positions(self) -> int | None:
        """The number of positions that the base was made for, if its configuration says it."""
        return positions_of(self.model)

    @torch.no_grad()
    def loss(self, examples: Tokens, tick: Tick) -> HeldOutLoss:
        """Return the mean loss and the metrics of the validation examples, which the processes divide up.

        The examples of each named set are packed on their own.
        """
        was_training = self.model.training
        self.model.eval()
        sets = self.data.counts.sets
        sizes = [counts.examples for counts in sets.values()] or [len(examples)]
        ends = np.cumsum(sizes).tolist()
        sums = self._summed(
            self.objective, examples, [range(end - size, end) for end, size in zip(ends, sizes, strict=True)], tick
        )
        self.model.train(was_training)
        weight, loss_sum, *metric_sums = (math.fsum(column) for column in zip(*sums, strict=True))
        means = (total / max(1, count) for count, total, *_ in sums)
        metrics = dict(zip(self.objective.metrics, (each / max(1, weight) for each in metric_sums), strict=False))
        figures = dict(self.objective.figures(metrics)) if metric_sums else {}
        return HeldOutLoss(loss_sum / max(1, weight), dict(zip(sets, means, strict=False)), figures)

    def _summed(self, objective: Objective, examples: Tokens, parts: Sequence[range], tick: Tick) -> list[list[float]]:
        """Return the weight, the summed loss and the summed metrics of each part of the examples.

        The sums are exact (`math.fsum`), so they do not depend on the number of processes.
        """
        own = [self._of_micro_batches(objective, examples, part, tick) for part in parts]
        everywhere = self.processes.gather([own])
        rows = [[row for one in part for row in one] for part in zip(*everywhere, strict=True)]
        return [[math.fsum(column) for column in zip(*part, strict=True)] for part in rows]

    def _of_micro_batches(self, objective: Objective, examples: Tokens, chosen: range, tick: Tick) -> list[list[float]]:
        """Return the weight, the summed loss and the summed metrics of each micro-batch that this process computes."""
        padded, rows = self.plan.padded, list[list[float]]()
        tick("held-out loss")
        objective = objective.for_examples(examples, chosen, self.computing)
        lengths = examples.places(slice(chosen.start, chosen.stop), padded=padded)
        groups = objective.split(lengths, self.plan.micro_batch_tokens, padded=padded)

        def loss_of(members: Sequence[int]) -> LossSum:
            tick("held-out loss")
            batch = collate(examples, [chosen[member] for member in members], padded=padded)
            return objective.loss(self.model, batch, self.processes.device)

        for members in self.computing.own(groups):
            loss = loss_of(members)
            numbers = torch.stack([torch.full_like(loss.total, loss.weight), loss.total, *loss.metrics])
            rows.append(numbers.tolist())
        for members in self.computing.for_nothing(groups):
            loss_of(members)
        return rows

    @property
    def computing(self) -> Computing:
        """How the model computes."""
        return Computing(self.model, self.plan.micro_batch_tokens, self.plan.padded, self.processes)

    @cached_property
    def answering(self) -> Answering:
        """The settings of generation: a text much longer than the longest expected answer cannot match any."""
        expected = (self.renderer.tokenizer(prompt.expected)["input_ids"] for prompt in self.data.prompts)
        return Answering(stop_ids(self.renderer), max_new_tokens=max(map(len, expected), default=0) + 8)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the model's answers to some prompts."""
        return answer(self.model, self.renderer.tokenizer, [prompt.ids for prompt in prompts], self.answering)


def text_recipe(recipe: Recipe, positions: int | None) -> Recipe:
    """Return a recipe whose training data is the text of `evaluate.forgetting`, in pieces that fit the base."""
    text = str(recipe.evaluate.forgetting)
    if resolve_path(recipe, text) is None:
        raise RecipeError(f"evaluate.forgetting: {text} does not exist; expected a text file")
    length = min(recipe.data.sequence_length, positions or recipe.data.sequence_length)
    data = Data(train=text, format="text", overlong="split", sequence_length=length)
    changes = {"data": data, "objective": SftObjective(train_on="all"), "evaluate": Evaluate()}
    return recipe.model_copy(update=changes)


def plain(scores: dict[str, Score]) -> dict[str, dict[str, Any]]:
    """Return the scores as plain values for result.json; None stands for a number that is not finite."""
    found = {name: finite(asdict(score)) for name, score in scores.items()}
    return {name: {key: value for key, value in score.items() if value != {}} for name, score in found.items()}


def evaluate(
    recipe: Recipe, checkpoint: str | Path, *, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Score]:
    """Measure a checkpoint's base and adapter on a recipe's validation data.

    The examples become tokens as in training, with the chat template and the stop token of the run. The recipe's
    `objective.train_on` decides which of them count.

    Args:
        recipe: The recipe, with the validation data and the base; its `base.trust_remote_code` decides whether the base
            may run Python files.
        checkpoint: A checkpoint, a run for its newest checkpoint, or a Hub name.
        tell: Called with notes for the user: where the recipe differs from the run in what decides the tokens.

    Raises:
        DataError: The recipe has no validation data, or an example is longer than the base's context.
    """
    require_packages(recipe.evaluate)
    processes = Processes.start(recipe.base.dtype, recipe.launch)
    try:
        loaded = open_adapter(
            checkpoint,
            base=resolve_path(recipe, recipe.base.repo),
            device=str(processes.device),
            trust_remote_code=recipe.base.trust_remote_code,
        )
        model, resolved = loaded.model, loaded.facts.resolved
        use_attention(model, resolved.attention)
        use_kernels(model, resolved.kernels or ())
        renderer = for_objective(loaded.renderer, recipe)
        for note in differences(recipe, loaded):
            tell(note)
        data = prepare_data(recipe, renderer).sharing(resolved.layout == "shared")
        check_context(data, positions_of(model))
        sizes = (recipe.train.micro_batch_tokens, resolved.micro_batch_tokens, loaded.recipe.train.micro_batch_tokens)
        tokens = next((size for size in sizes if isinstance(size, int)), None)
        if tokens is None:
            raise RecipeError(f"train.micro_batch_tokens: {checkpoint} does not record it; set a number")
        if data.validation is None:
            raise DataError("data.validation: the recipe names none; add a file, a Hub name or a fraction such as 0.05")
        plan = Plan(recipe, data.train, tokens, resolved.layout == "padded", sizes=data.counts.sizes)
        objective = objective_of(recipe)
        held_out = HeldOut(model, renderer, data, plan, objective, processes, recipe.evaluate)
        if recipe.evaluate.forgetting:
            text = text_recipe(recipe, positions_of(model))
            pieces = prepare_data(text, for_objective(renderer, text)).train
            held_out = held_out.with_text(pieces)
        if objective.columns:
            held_out = replace(held_out, data=_with_reference(held_out, recipe, loaded, objective.columns))
        return held_out.compare()
    finally:
        processes.leave()


def _with_reference(held_out: HeldOut, recipe: Recipe, loaded: Loaded, columns: int) -> Prepared:
    """Return the data with the log-probabilities that the base gives to the validation examples."""
    data, facts, limit = held_out.data, loaded.facts, recipe.data.sequence_length
    assert data.validation is not None
    if facts.origin is not None:
        raise ContractError(
            "objective.kind: the reference of this run is the adapter that it began with, which the checkpoint does "
            "not contain; the run's own result.json has its scores"
        )
    found = facts_of(recipe, facts, facts.resolved, None)
    with as_reference(held_out.model):
        return replace(data, validation=Reference(held_out.computing, columns, limit, found).of(data.validation))


def differences(recipe: Recipe, loaded: Loaded) -> list[str]:
    """Return where a recipe and a run differ in what decides the tokens, and which of the two counts."""
    notes, theirs, template = [], loaded.recipe, loaded.facts.template
    trained = theirs.objective.model_dump()
    for name, value in recipe.objective.model_dump().items():
        if name in trained and value != trained[name]:
            notes.append(
                f"objective.{name}: the loss is measured with {value!r}, as in this recipe; the run was trained with "
                f"{trained[name]!r}"
            )
    if recipe.base.stop_token != theirs.base.stop_token:
        notes.append(f"base.stop_token: answers end with {loaded.renderer.stop!r} as in the run, not as in this recipe")
    if read_template(recipe) != template:
        notes.append("data.template: the chat template is that of the run, not that of this recipe")
    return notes
