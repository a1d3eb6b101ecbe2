"""The manifest: what a checkpoint records of its run, its step and its files.

On disk it is one flat JSON object with a SHA-256 of itself (docs/checkpoint-format.md). In memory it has three parts,
because they come from three places: `RunFacts` stays the same while a process lives, `StepFacts` changes with every
step, and `files` is known once the files are written. A field that was added after format 1 has a default, so that
older checkpoints can be read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from lora_kit.data.counts import DataCounts
from lora_kit.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"

T = TypeVar("T")


@dataclass(frozen=True)
class BaseFingerprint:
    """The base's commit on the Hub (None for a local folder) and the SHA-256 of each of its files."""

    commit: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class Fingerprints:
    """The inputs that decide what is trained; all but `base` are SHA-256 digests."""

    base: BaseFingerprint
    template: str
    train: str
    validation: str | None


@dataclass(frozen=True)
class Machine:
    """The number of training processes, and the device that each computes on."""

    processes: int
    device: str


@dataclass(frozen=True)
class Environment:
    """Everything except the recipe that a resume compares with the checkpoint; see `RunFacts`."""

    fingerprints: Fingerprints
    versions: dict[str, str]
    machine: Machine
    computed_by: dict[str, str]


@dataclass(frozen=True)
class Resolved:
    """What a run chose by looking at the machine or the model. Every resume uses the same values.

    Attributes:
        threads: OpenMP threads of a process on a CPU; None on a GPU.
        micro_batch_tokens: The most tokens of a micro-batch.
        activation_checkpointing: Whether activations are recomputed in the backward pass.
        attention: The attention implementation's name in the model's configuration.
        layout: `packed` (several examples in a row) or `padded` (one example in each row).
        kernels: The fused kernels in use; None in checkpoints from before they were recorded.
    """

    threads: int | None
    attention: str
    layout: str
    micro_batch_tokens: int | None = None
    activation_checkpointing: bool | None = None
    kernels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Origin:
    """The checkpoint whose adapter a run began with; `adapter` is the SHA-256 of its weights file."""

    run_id: str
    step: int
    adapter: str


@dataclass(frozen=True)
class LineageEntry:
    """A change that `--accept` allowed: the step at which it came, the key, and its value before and after."""

    step: int
    key: str
    then: Any
    now: Any


@dataclass(frozen=True)
class Claim:
    """What a checkpoint promises.

    Attributes:
        level: `bitwise` promises the bytes of an uninterrupted run, `rounding` its values up to rounding errors.
        holds_for: The numbers of processes, and the versions and devices, for which this holds.
    """

    level: Literal["bitwise", "rounding"]
    holds_for: str


@dataclass(frozen=True)
class RunFacts:
    """The part of a manifest that stays the same while a process lives.

    Attributes:
        run_id: 16 hexadecimal digits, chosen at the run's first start.
        fencing_token: Grows with every start. Of two writers, the writer with the higher token holds the lease.
        recipe: Every field of the recipe as JSON, defaults included.
        template: The chat template, None for raw text.
        computed_by: Facts besides the versions that decide which kernels run, and so the exact bits: the backend, its
            compiler, the processor, and environment variables that restrict its instructions, under the names of
            `kernels.identity`. Empty in older checkpoints.
    """

    run_id: str
    fencing_token: int
    recipe: dict[str, dict[str, Any]]
    template: str | None
    fingerprints: Fingerprints
    data: DataCounts
    versions: dict[str, str]
    machine: Machine
    resolved: Resolved
    lineage: tuple[LineageEntry, ...]
    claim: Claim
    origin: Origin | None = None
    computed_by: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepFacts:
    """The part of a manifest that changes from step to step.

    Attributes:
        step: The number of finished steps.
        examples_seen: The number of examples that these steps trained on.
        skipped_steps: The steps that left the adapter unchanged: their loss or gradient was not finite or too large.
        held_out_loss: The loss on the validation data after this step, if it was measured.
        line: This step's line of metrics.jsonl.
    """

    step: int
    examples_seen: int
    skipped_steps: tuple[int, ...]
    line: str
    held_out_loss: float | None = None

    @property
    def skipped(self) -> bool:
        """Whether this step itself left the adapter unchanged."""
        return self.step in self.skipped_steps


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint records; a live snapshot has the same without `files`."""

    run: RunFacts
    progress: StepFacts
    files: dict[str, FileEntry]

    @property
    def order(self) -> tuple[int, int]:
        """The fencing token and the step; a newer state has a larger pair."""
        return self.run.fencing_token, self.progress.step

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object as it is on disk, without its checksum."""
        files = {name: asdict(entry) for name, entry in self.files.items()}
        return {"format": FORMAT} | asdict(self.run) | asdict(self.progress) | {"files": files}


@dataclass(frozen=True)
class _Files:
    files: dict[str, FileEntry]


_RUN, _STEP, _FILES = TypeAdapter(RunFacts), TypeAdapter(StepFacts), TypeAdapter(_Files)


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """Serialise a manifest with a SHA-256 of its own content, so that a flipped bit in it is found too."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(_canonical(plain)).hexdigest()
    return _canonical(plain | {"sha256": digest})


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check it against its own SHA-256.

    Raises:
        CheckpointError: The manifest is missing, damaged or of another format, or a field is missing or of wrong type.
    """
    try:
        data = path.read_bytes()
        content = json.loads(data)
        unchanged = data == manifest_bytes(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the folder was never committed") from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error})") from error
    if not unchanged:
        raise CheckpointError(f"{path}: changed since it was written; its own checksum does not match")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {content.get('format')}, this lora_kit reads {FORMAT}")
    run, progress = parse(_RUN, data, path), parse(_STEP, data, path)
    return Manifest(run, progress, parse(_FILES, data, path).files)


def parse(expected: TypeAdapter[T], data: bytes | str, path: Path) -> T:
    """Return JSON as a typed value.

    Raises:
        CheckpointError: A field is missing or has another type; the message names the file and each such field.
    """
    try:
        return expected.validate_json(data, strict=True)
    except ValidationError as error:
        fields = [".".join(map(str, problem["loc"])) or "content" for problem in error.errors()]
        problems = [f"{field}: {problem['msg']}" for field, problem in zip(fields, error.errors(), strict=True)]
        raise CheckpointError(f"{path}: not a manifest of this format: {'; '.join(problems)}") from error
