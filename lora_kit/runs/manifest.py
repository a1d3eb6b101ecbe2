"""The manifest: what a checkpoint records of its run, its step and its files.

On disk it is one flat JSON object with a SHA-256 of itself (docs/checkpoint-format.md). In memory it has three parts,
because they come from three places: `RunFacts` stays the same while a process lives, `StepFacts` changes with every
step, and `files` is known once the files are written. A field that was added after format 1 has a default, so that
older checkpoints can be read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypeVar  # Python 3.13 has it with defaults

from lora_kit.data.counts import Count, DataCounts
from lora_kit.errors import CheckpointError
from lora_kit.runs import formats
from lora_kit.runs.formats import Digest, FileName, Finite, Json, RunId, Token
from lora_kit.runs.journal import METRICS, STEP_RECORD

FORMAT = 1
MANIFEST = "manifest.json"
ONCE_RECORDED = ("generation_config.json",)  # files of a base that older checkpoints name and that decide nothing


def _line(text: str) -> str:
    try:
        formats.parse(STEP_RECORD, text.encode(), METRICS)
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    return text


AtLeastOne = Annotated[int, Field(ge=1, lt=2**31)]
Attention = Annotated[str, Field(pattern="^(segment|sdpa|eager|flex_attention|flash_attention_[234])$")]
Layout = Annotated[str, Field(pattern="^(packed|padded|shared)$")]
Placement = Literal["replicated", "sharded"]
Kernel = Annotated[str, Field(pattern="^(lora|mlp|norm|rotary|loss|last mlp)$")]


@dataclass(frozen=True)
class BaseFingerprint:
    """The base's commit on the Hub (None for a local folder) and the SHA-256 of each file of model and tokenizer."""

    commit: str | None
    files: dict[str, str]

    def same_files(self, other: "BaseFingerprint") -> bool:
        """Return whether two bases have the same model and tokenizer, wherever their files are."""
        first, second = (
            {name: digest for name, digest in base.files.items() if name not in ONCE_RECORDED} for base in (self, other)
        )
        return first == second


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

    processes: AtLeastOne
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
    """What a run chose by looking at the machine or the model. Every resume uses the same values, except `placement`.

    Attributes:
        threads: OpenMP threads of a process on a CPU; None on a GPU.
        micro_batch_tokens: The most tokens of a micro-batch.
        activation_checkpointing: Whether activations are recomputed in the backward pass.
        attention: The attention implementation's name in the model's configuration.
        layout: `packed` (several examples in a row), `shared` (the same, and both sides of a pair share the computation
            of their beginning) or `padded` (one example in each row).
        kernels: The fused kernels in use; None in checkpoints from before they were recorded.
        placement: Whether the base is on every process or sharded. It changes no bit, so each start chooses again.
    """

    threads: AtLeastOne | None
    attention: Attention
    layout: Layout
    micro_batch_tokens: AtLeastOne | None = None
    activation_checkpointing: bool | None = None
    kernels: tuple[Kernel, ...] | None = None
    placement: Placement = "replicated"


@dataclass(frozen=True)
class Origin:
    """The adapter that a run began with.

    Attributes:
        run_id: The run that trained it; None if it was not trained by lora_kit.
        step: The step after which it was saved; None if it was not trained by lora_kit.
        adapter: The SHA-256 of its weights file.
        hub: `user/name@commit` if it came from the Hub.
    """

    run_id: RunId | None
    step: Count | None
    adapter: Digest
    hub: str | None = None


@dataclass(frozen=True)
class LineageEntry:
    """A change that `--accept` allowed: the step at which it came, the key, and its value before and after."""

    step: Count
    key: str
    then: Json
    now: Json


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

    run_id: RunId
    fencing_token: Token
    recipe: dict[str, dict[str, Json]]
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
class ScriptFacts:
    """The part of a manifest that stays the same while a process lives, for a script with a `Trainer` of transformers.

    Attributes:
        run_id: 16 hexadecimal digits, chosen at the run's first start.
        fencing_token: As in `RunFacts`.
        script: The program that was started.
        trainer: The class of the trainer, with its module.
        settings: What a resume must find unchanged, by name.
        versions: The versions of the packages that compute.
        machine: The number of training processes, and the device that each computes on.
        uncaptured: What changes from step to step and is not part of the state, so that a resume would lose it.
    """

    run_id: RunId
    fencing_token: Token
    script: str
    trainer: str
    settings: dict[str, Json]
    versions: dict[str, str]
    machine: Machine
    uncaptured: tuple[str, ...] = ()


Facts = TypeVar("Facts", bound=RunFacts | ScriptFacts, default=RunFacts)


@dataclass(frozen=True)
class Watch:
    """The count of `evaluate.patience` after an evaluation.

    Attributes:
        metric: The figure that is watched.
        best: The best value of the figure so far; None if no value was finite.
        step: The step after which it had this value; 0 if there is none.
        waited: How many evaluations since then have brought no gain.
    """

    metric: str
    best: Finite | None
    step: Count
    waited: Count


@dataclass(frozen=True)
class StepFacts:
    """The part of a manifest that changes from step to step.

    Attributes:
        step: The number of finished steps.
        examples_seen: The number of examples that these steps trained on.
        skipped_steps: The steps that left the adapter unchanged: their loss or gradient was not finite or too large.
        held_out_loss: The loss on the validation data after this step; None if it was not measured or is not finite.
        line: This step's line of metrics.jsonl.
        watch: The count of `evaluate.patience` after the newest evaluation, which may be earlier than this step.
    """

    step: Count
    examples_seen: Count
    skipped_steps: tuple[Count, ...]
    line: Annotated[str, AfterValidator(_line)]
    held_out_loss: Finite | None = None
    watch: Watch | None = None

    @property
    def measured(self) -> bool:
        """Whether the validation data was measured after this step."""
        return self.held_out_loss is not None or "held_out_loss" in json.loads(self.line)

    @property
    def skipped(self) -> bool:
        """Whether this step itself left the adapter unchanged."""
        return self.step in self.skipped_steps


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and its SHA-256."""

    size: Count
    sha256: Digest


@dataclass(frozen=True)
class Manifest(Generic[Facts]):
    """What a checkpoint records; a live snapshot has the same without `files`."""

    run: Facts
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


if TYPE_CHECKING:
    AnyManifest = Manifest[Any]
else:  # what pydantic reads
    AnyManifest = Manifest[RunFacts] | Manifest[ScriptFacts]


class OtherFormatError(CheckpointError):
    """A checkpoint of another version of lora_kit: intact, but not readable by this version."""


@dataclass(frozen=True)
class _Format:
    format: Json = None
    script: Json = None


@dataclass(frozen=True)
class _Files:
    files: dict[FileName, FileEntry]


_FORMAT, _RUN, _STEP, _FILES = TypeAdapter(_Format), TypeAdapter(RunFacts), TypeAdapter(StepFacts), TypeAdapter(_Files)
_SCRIPT = TypeAdapter(ScriptFacts)


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """Serialise a manifest with a SHA-256 of its own content, so that a flipped bit in it is found too.

    Raises:
        CheckpointError: A value is not JSON, such as a number that is not finite.
    """
    return formats.seal(content)


def read_any_manifest(path: Path) -> AnyManifest:
    """Read a manifest of a recipe's or a script's run and check it against its own SHA-256.

    Raises:
        CheckpointError: The manifest is missing, damaged or of another format, or a field is missing, of wrong type or
            out of range.
    """
    data = formats.read_bytes(path)
    if data is None:
        raise CheckpointError(f"{path}: missing; the folder was never committed")
    return _parse(data, path)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest of a recipe's run.

    Raises:
        CheckpointError: As for `read_any_manifest`, or it is of a script's run.
    """
    return of_recipe(read_any_manifest(path), path)


def parse_manifest(data: bytes, where: Path | str) -> Manifest:
    """Return the manifest of a recipe's run in a file's content; `where` names the file in messages.

    Raises:
        CheckpointError: As for `read_manifest`.
    """
    return of_recipe(_parse(data, where), where)


def of_recipe(manifest: AnyManifest, where: Path | str) -> Manifest:
    """Return a manifest of a recipe's run.

    Raises:
        CheckpointError: It is of a script's run.
    """
    if isinstance(manifest.run, ScriptFacts):
        raise CheckpointError(
            f"{where}: of a run of the script {formats.short(manifest.run.script)}, not of a recipe; resume it with "
            "`lora-kit launch` or its own command. `lora-kit status` and `lora-kit verify` read both kinds of runs"
        )
    return manifest


def _parse(data: bytes, where: Path | str) -> AnyManifest:
    formats.require_seal(data, where)
    found = formats.parse(_FORMAT, data, where)
    if found.format != FORMAT:
        raise OtherFormatError(f"{where}: format {formats.short(found.format)}, this lora_kit reads {FORMAT}")
    run: RunFacts | ScriptFacts = (
        formats.parse(_RUN, data, where) if found.script is None else formats.parse(_SCRIPT, data, where)
    )
    return Manifest(run, formats.parse(_STEP, data, where), formats.parse(_FILES, data, where).files)
