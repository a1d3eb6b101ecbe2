"""The state that a script's run resumes from, read from shared memory or from a checkpoint."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lora_kit.errors import LaunchError
from lora_kit.integrations import capture
from lora_kit.runs import formats, live, store
from lora_kit.runs.live import Live
from lora_kit.runs.manifest import ScriptFacts, StepFacts
from lora_kit.runs.resume import OpenRun
from lora_kit.runs.scripts import TRAINABLE, ScriptJob

STATE_FILE = "trainer_state.json"  # what `Trainer.train(resume_from_checkpoint)` reads itself


@dataclass(frozen=True)
class Saved:
    """A state to resume from.

    Attributes:
        step: The number of finished steps.
        facts: What the run has recorded of itself.
        progress: The step's part of the manifest.
        document: Everything that is no tensor of weights or optimizer.
        weights: The trained tensors by their names in the checkpoint.
        optimizer: The optimizer's tensors by their paths in its state.
    """

    step: int
    facts: ScriptFacts
    progress: StepFacts
    document: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def load_saved(run: OpenRun) -> Saved | None:
    """Return the state that a run resumes from; None for a new run.

    Raises:
        CheckpointError: The state cannot be read.
    """
    latest = run.latest
    if latest is None:
        return None
    manifest: Any = latest.manifest
    if isinstance(latest, Live):
        region = live.Region(latest.path)
        job = live.read_job(region)
        assert isinstance(job, ScriptJob)
        text, weights, optimizer = job.split(region.payload(latest.slot))
        tensors = [
            {name: capture.from_bytes(*layout[name], content) for name, content in found.items()}
            for layout, found in ((job.weights, weights), (job.optimizer, optimizer))
        ]
    else:
        content = formats.read_bytes(latest.path / store.TRAINER)
        adapter = latest.path / store.ADAPTER
        weights_file = adapter if adapter.exists() else latest.path / TRAINABLE
        text, tensors = content or b"", [load_file(weights_file), load_file(latest.path / store.OPTIMIZER)]
    document = capture.Documents.decode(text)
    return Saved(latest.step, manifest.run, manifest.progress, document, tensors[0], tensors[1])


def load_saved_here(run: OpenRun) -> Saved | None:
    """Return `load_saved`, on every process.

    Raises:
        LaunchError: The process is on another machine than the state.
    """
    try:
        return load_saved(run)
    except OSError as error:
        raise LaunchError(
            f"{run.folder}: process {os.environ.get('RANK', 0)} cannot read the run's state ({error.strerror}); a "
            "resume needs all processes on the machine of the state"
        ) from error


class StateFolder(tempfile.TemporaryDirectory[str]):
    """A folder in memory with `trainer_state.json`, deleted when the block ends."""

    def __init__(self, state: str) -> None:
        memory = Path("/dev/shm")
        super().__init__(prefix="lora_kit-resume-", dir=memory if os.access(memory, os.W_OK) else None)
        (Path(self.name) / STATE_FILE).write_text(state)
