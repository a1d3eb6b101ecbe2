"""The facts of a run and of a step, for tests that commit checkpoints without training."""

from dataclasses import replace

from lora_kit.data.counts import Counts, DataCounts
from lora_kit.runs.manifest import (
    BaseFingerprint,
    Claim,
    Fingerprints,
    Machine,
    Resolved,
    RunFacts,
    StepFacts,
)

COUNTS = Counts("text", 5, 50, 40, 0.8, 12, dropped=0, truncated=0, emptied=0, duplicates=0, merged=0)
RUN = RunFacts(
    run_id="r",
    fencing_token=1,
    recipe={"optim": {"learning_rate": 1e-4}},
    template=None,
    fingerprints=Fingerprints(BaseFingerprint(None, {"model.safetensors": "b" * 64}), "t" * 64, "d" * 64, None),
    data=DataCounts(COUNTS, None),
    versions={"torch": "1"},
    machine=Machine(1, "cpu"),
    resolved=Resolved(1, "sdpa", "packed"),
    lineage=(),
    claim=Claim("bitwise", "a test"),
)


def run_facts(**changes):
    """Return the run's part of a manifest."""
    return replace(RUN, **changes)


def step_facts(step, **changes):
    """Return the step's part of a manifest."""
    return replace(StepFacts(step, 5 * step, (), f'{{"step": {step}}}'), **changes)
