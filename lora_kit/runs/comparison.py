"""Compare two runs of a recipe after a step: the files of their checkpoints, the state in them, and their metrics.

If both runs claim equal bytes, every byte of the checkpoints and every number of the metrics that does not measure time
must be equal. Otherwise each buffer of the state must be close in norm, and the metrics must name the same steps and
examples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.errors import CheckpointError
from lora_kit.runs.formats import Digest, Figure, FileName, finite
from lora_kit.runs.journal import Journal
from lora_kit.runs.layout import WEIGHTS
from lora_kit.runs.manifest import Claim
from lora_kit.runs.store import ADAPTER, ADAPTER_CONFIG, OPTIMIZER, Checkpoint, checkpoint_folder, open_checkpoint

TOLERANCE = 0.01  # most norm of a difference / norm of the buffer, where no bitwise equality is claimed
MEASURED = ("tokens_per_second", "stall_seconds", "time")  # measured: these differ between runs that do the same
COUNTED = ("step", "examples", "tokens")  # counted: these are equal even if rounding differs
SHOWN = 3


@dataclass(frozen=True)
class ComparedFile:
    """A file of both checkpoints: its size in bytes and both SHA-256."""

    size: int
    undisturbed: Digest
    disturbed: Digest

    @property
    def equal(self) -> bool:
        """Whether the files have the same bytes."""
        return self.undisturbed == self.disturbed


@dataclass(frozen=True)
class Comparison:
    """What a comparison has found.

    Attributes:
        claim: What both runs claim: the weaker claim of the two.
        files: The files that hold the state.
        differences: The buffers of the state that differ: the norm of the difference, relative to the buffer's norm;
            None if it is not finite.
        problems: What contradicts the claim; empty if the runs are equal.
    """

    claim: Claim
    files: dict[FileName, ComparedFile]
    differences: dict[str, Figure]
    problems: tuple[str, ...]


def compare(undisturbed: Path, disturbed: Path, step: int) -> Comparison:
    """Compare two runs after a step of which both have a checkpoint.

    Raises:
        CheckpointError: A checkpoint is missing or damaged, or a log cannot be read.
    """
    first, second = (open_checkpoint(checkpoint_folder(run, step)) for run in (undisturbed, disturbed))
    claim = next((each.manifest.run.claim for each in (second, first) if not _bitwise(each)), first.manifest.run.claim)
    files = {name: _compared(first, second, name) for name in (ADAPTER, OPTIMIZER, ADAPTER_CONFIG)}
    differences = dict(_differences(first, second))
    problems = [
        *_problems_of_state(files, differences, bitwise=claim.level == "bitwise"),
        *_problems_of_progress(first, second),
        *_problems_of_metrics(undisturbed, disturbed, step, bitwise=claim.level == "bitwise"),
    ]
    return Comparison(claim, files, finite(differences), tuple(problems))


def _bitwise(checkpoint: Checkpoint) -> bool:
    return checkpoint.manifest.run.claim.level == "bitwise"


def _compared(first: Checkpoint, second: Checkpoint, name: str) -> ComparedFile:
    one, other = first.manifest.files[name], second.manifest.files[name]
    return ComparedFile(one.size, one.sha256, other.sha256)


def _differences(first: Checkpoint, second: Checkpoint) -> Iterator[tuple[str, float]]:
    """Yield the buffers that differ, with the norm of the difference relative to that of the undisturbed buffer."""
    one, other = _buffers(first), _buffers(second)
    for name, expected in one.items():
        found = other.get(name)
        if found is None or found.shape != expected.shape:
            raise CheckpointError(f"{second.path}: {name} has another shape than in {first.path}")
        if expected.tobytes() != found.tobytes():
            difference = expected.astype(np.float64) - found.astype(np.float64)
            scale = float(np.linalg.norm(expected.astype(np.float64)))
            yield name, float(np.linalg.norm(difference)) / (scale or 1.0)


def _buffers(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return the buffers of a state, each flat, with the tensors of the adapter in the order of their names."""
    state = checkpoint.state()
    parts = {WEIGHTS: state.weights, "constants": state.constants}
    joined = {
        name: np.concatenate([tensors[key].ravel() for key in sorted(tensors)])
        for name, tensors in parts.items()
        if tensors
    }
    return joined | state.moments


def _problems_of_state(
    files: dict[str, ComparedFile], differences: dict[str, float], *, bitwise: bool
) -> Iterator[str]:
    if not bitwise:
        for name, difference in differences.items():
            if not difference <= TOLERANCE:  # written so that NaN is reported too
                yield f"{name}: the difference is {difference:.2g} of its norm; {TOLERANCE:g} is allowed"
        return
    for name, compared in files.items():
        if not compared.equal:
            yield f"{name}: the bytes differ"
    for name, difference in differences.items():
        yield f"{name}: the difference is {difference:.2g} of its norm"


def _problems_of_progress(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    one, other = first.manifest.progress, second.manifest.progress
    if one.examples_seen != other.examples_seen:
        yield f"examples seen: {one.examples_seen} undisturbed, {other.examples_seen} disturbed"
    if one.skipped_steps != other.skipped_steps:
        yield f"skipped steps: {list(one.skipped_steps)} undisturbed, {list(other.skipped_steps)} disturbed"


def _problems_of_metrics(undisturbed: Path, disturbed: Path, step: int, *, bitwise: bool) -> Iterator[str]:
    """Yield what is wrong with the two metrics.jsonl: a step that is missing or repeated, and numbers that differ."""
    records = dict[str, dict[int, dict[str, Any]]]()
    for run in (undisturbed, disturbed):
        found = [record for record in Journal(run).read_metrics() if record["step"] <= step]
        if (steps := [record["step"] for record in found]) != list(range(1, step + 1)):
            yield f"metrics.jsonl, {run.name}: its steps are {steps}, expected 1 to {step}, each once"
        records[run.name] = {record["step"]: dict(record) for record in found}
    one, other = records[undisturbed.name], records[disturbed.name]
    different = [
        f"step {number}, {key}: {one[number].get(key)} undisturbed, {other[number].get(key)} disturbed"
        for number in sorted(one.keys() & other.keys())
        for key in sorted(one[number].keys() | other[number].keys())
        if key not in MEASURED and (bitwise or key in COUNTED) and one[number].get(key) != other[number].get(key)
    ]
    yield from (f"metrics.jsonl, {text}" for text in different[:SHOWN])
    if len(different) > SHOWN:
        yield f"metrics.jsonl: {len(different) - SHOWN} more numbers differ"
