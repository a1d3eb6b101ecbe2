"""The job: what setup prepares for the training loop, e.g. the model, the data, the plan of the steps and the logs."""

from dataclasses import dataclass

from peft import PeftModel

from lora_kit.data.plan import Plan
from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import Prepared
from lora_kit.model.source import Source
from lora_kit.model.state import FlatState
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.journal import Journal
from lora_kit.runs.manifest import Environment, Resolved, RunFacts, StepFacts
from lora_kit.runs.resume import OpenRun
from lora_kit.runs.trackers import Trackers
from lora_kit.training.evaluation import BaseText
from lora_kit.training.objectives.objective import Computing, Objective
from lora_kit.training.processes import Processes


@dataclass(frozen=True)
class Inputs:
    """What a run reads before any weight is loaded.

    Attributes:
        source: The files of the base and their hashes.
        renderer: The tokenizer with the chat template.
        data: The tokens of the training and validation examples.
        environment: What a resume compares in addition to the recipe: fingerprints, versions and the machine.
        text: The text of `evaluate.forgetting`; None if the recipe names none.
    """

    source: Source
    renderer: Renderer
    data: Prepared
    environment: Environment
    text: BaseText | None = None


@dataclass(frozen=True)
class AdaptedModel:
    """The base with the adapter.

    Attributes:
        model: The model.
        state: The model's trainable state.
        resolved: What was chosen by looking at the machine and the model.
    """

    model: PeftModel
    state: FlatState
    resolved: Resolved


@dataclass(frozen=True)
class Job:
    """Everything that a run needs between its first and its last step; nothing in it changes but the state.

    Attributes:
        recipe: What the user asked for.
        run: The run's folder, held for writing.
        processes: The processes that train together.
        inputs: The files of the base, the tokenizer and the data.
        model: The base with the adapter.
        state: The adapter's weights, their gradient and the moments; the only part that changes.
        objective: The loss.
        plan: Which examples each step trains on.
        facts: The part of every manifest that stays the same while this process lives.
        resumed: The part of the manifest about the step that the run resumes from; None for a new run.
        replayed: Steps after `start` that were skipped before an interruption and are skipped again.
        journal: The logs of the run.
        trackers: Services that follow the metrics.
    """

    recipe: Recipe
    run: OpenRun
    processes: Processes
    inputs: Inputs
    model: PeftModel
    state: FlatState
    objective: Objective
    plan: Plan
    facts: RunFacts
    resumed: StepFacts | None
    replayed: frozenset[int]
    journal: Journal
    trackers: Trackers

    @property
    def computing(self) -> Computing:
        """How the model of the job computes."""
        return Computing(self.model, self.plan.micro_batch_tokens, self.plan.padded, self.processes)

    @property
    def start(self) -> int:
        """How many steps are finished when this process begins."""
        return self.resumed.step if self.resumed else 0
