"""The facts and files of a checkpoint and the lines of a log, for tests that do not train."""

import json
import math
from dataclasses import replace

from lora_kit.data.counts import Counts, DataCounts
from lora_kit.runs.layout import Layout
from lora_kit.runs.manifest import (
    BaseFingerprint,
    Claim,
    Fingerprints,
    Machine,
    Resolved,
    RunFacts,
    StepFacts,
)
from lora_kit.runs.store import ADAPTER, ADAPTER_CONFIG, OPTIMIZER, headers_of

COUNTS = Counts("text", 5, 50, 40, 0.8, 12, dropped=0, truncated=0, emptied=0, merged=0)
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


def step_record(step, **changes):
    """Return the record of a step in metrics.jsonl."""
    numbers = {"loss": 1 / step, "learning_rate": 1e-3, "grad_norm": 1.0}
    counts = {"step": step, "examples": 5 * step, "tokens": 100}
    return counts | numbers | {"tokens_per_second": 50.0, "stall_seconds": 0.0, "time": 1000.0 + step} | changes


def step_facts(step, **changes):
    """Return the step's part of a manifest."""
    return replace(StepFacts(step, 5 * step, (), json.dumps(step_record(step))), **changes)


SHAPES = {"base_model.model.q.lora_A.weight": (2, 10), "base_model.model.q.lora_B.weight": (30, 2)}


def files_of(seed=0, shapes=SHAPES):
    """Return the content of the files of a checkpoint, which is another one for another seed."""
    size, headers = 4 * sum(map(math.prod, shapes.values())), headers_of(Layout(shapes))
    return {
        ADAPTER: [headers[ADAPTER], bytes([seed % 256]) * size],
        ADAPTER_CONFIG: [b'{"base_model_name_or_path": "base %d"}\n' % seed],
        OPTIMIZER: [headers[OPTIMIZER], bytes([(seed + 1) % 256]) * size, memoryview(bytes(size))],
    }
