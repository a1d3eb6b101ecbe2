"""The reference of DPO and KTO: its log-probabilities, computed once per example before the first step.

The reference is the base without the adapter, or the adapter that the run begins with (`--from`). Its log-probabilities
are kept in the cache. The key is a hash of everything that determines their bits: the tokens, the base, the adapter,
the hardware and software that compute, and the resolved choices of the run. Each chunk of examples is written as soon
as it is computed, so that the next start continues after it, also after a kill. A step then needs no forward pass of
the reference.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from lora_kit.data import cache
from lora_kit.data.packing import MicroBatch, collate
from lora_kit.data.tokens import Prepared, Tokens
from lora_kit.errors import CheckpointError, ContractError, Stopped
from lora_kit.files import cache_folder, private_folder
from lora_kit.model.adapter import saved_weights
from lora_kit.model.state import FlatState, Kind
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.manifest import Environment, Origin, Resolved, RunFacts
from lora_kit.training.objectives.log_probs import log_probs_of_segments, mismatched
from lora_kit.training.objectives.objective import Computing

CHUNK = 256  # examples that all processes compute together; their packing, and so the bits, depends on this number
SUFFIX = ".logprobs"
DIGEST_BYTES = 32
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """Computes the log-probabilities of the reference.

    Attributes:
        computing: The model, used inside `as_reference`, and how its micro-batches are made.
        columns: The number of log-probabilities of each example, `Objective.columns`.
        limit: The recipe's `data.sequence_length`.
        facts: What the bits depend on besides the tokens, as JSON values.
        stopping: A function that returns whether a stop signal has come.
    """

    computing: Computing
    columns: int
    limit: int
    facts: dict[str, object]
    stopping: Callable[[], bool] = lambda: False

    def added_to(self, data: Prepared, tell: Tell) -> Prepared:
        """Return the data with the log-probabilities of the reference.

        Raises:
            Stopped: A stop signal came; the next start continues from here.
        """
        total = len(data.train) + len(data.validation or ())
        train = self.of(data.train, lambda done: tell(done, total))
        if data.validation is None:
            return replace(data, train=train)
        held_out = self.of(data.validation, lambda done: tell(len(train) + done, total))
        return replace(data, train=train, validation=held_out)

    def of(self, tokens: Tokens, tell: Callable[[int], None] = lambda done: None) -> Tokens:
        """Return the tokens with the log-probabilities of the reference, from the cache as far as they are there."""
        processes, path = self.computing.processes, self._path(tokens)
        done, found = processes.main_decides(lambda: read(path, len(tokens), self.columns), _dump, _load)
        table = found.copy()
        for start in range(done, len(tokens), CHUNK):
            stop = min(start + CHUNK, len(tokens))
            table[start:stop] = self.computed(tokens, range(start, stop))
            if processes.is_main:
                write(path, table[start:stop], start)
            tell(stop)
            if any(processes.gather([self.stopping()])):
                raise Stopped(
                    f"stopped by a signal after {stop:,} of {len(tokens):,} examples of the reference, which are kept; "
                    "the same command goes on"
                )
        return tokens.with_reference(table)

    def _path(self, tokens: Tokens) -> Path:
        facts = {"tokens": tokens.fingerprint, "columns": self.columns, "limit": self.limit, "chunk": CHUNK}
        key = hashlib.sha256(json.dumps(facts | self.facts, sort_keys=True).encode()).hexdigest()
        return cache_folder("reference") / f"{key}{SUFFIX}"

    @torch.no_grad()
    def computed(self, tokens: Tokens, examples: range) -> np.ndarray:
        """Return the log-probabilities of some examples, float32 [examples, columns]; NaN without a side."""
        table = np.full((len(examples), self.columns), np.nan, np.float32)
        parts = [(tokens, list(examples), 0)]
        if self.columns > 2:
            parts.append((mismatched(tokens, examples, self.limit), list(range(len(examples))), 2))
        own: list[tuple[int, int, float]] = []
        for source, indices, first_column in parts:
            lengths = source.places(indices, padded=self.computing.padded)
            groups = self.computing.groups(lengths)
            for members in self.computing.own(groups):
                batch, values = self._log_probs(source, [indices[member] for member in members])
                sides = np.arange(len(members))[:, None] if batch.sides is None else batch.sides
                own += [
                    (members[place], first_column + side, values[segment])
                    for (place, side), segment in np.ndenumerate(sides)
                    if segment >= 0
                ]
            for members in self.computing.for_nothing(groups):
                self._log_probs(source, [indices[member] for member in members])
        for place, column, value in self.computing.processes.gather(own):
            table[place, column] = value
        return table

    def _log_probs(self, source: Tokens, members: Sequence[int]) -> tuple[MicroBatch, list[float]]:
        """Return a micro-batch and the log-probability of each of its segments."""
        batch = collate(source, members, padded=self.computing.padded)
        log_probs, _ = log_probs_of_segments(self.computing.model, batch, self.computing.device)
        values: list[float] = log_probs.tolist()
        return batch, values


def facts_of(
    recipe: Recipe, environment: Environment | RunFacts, resolved: Resolved, origin: Origin | None
) -> dict[str, object]:
    """Return what decides the bits of the reference's log-probabilities besides the tokens."""
    return {
        "base": environment.fingerprints.base.files,
        "settings": [recipe.base.dtype, recipe.base.quantization],
        "adapter": [origin.adapter, recipe.adapter.alpha] if origin else None,
        "resolved": {name: value for name, value in asdict(resolved).items() if name != "placement"},
        "versions": environment.versions,
        "computed_by": environment.computed_by,
        "device": environment.machine.device,
    }


@contextmanager
def as_reference(model: PeftModel, state: FlatState | None = None, origin: Path | None = None) -> Iterator[None]:
    """Let the model compute as the reference does: without its adapter, or with the adapter that the run began with.

    Plain LoRA computes as the base alone if every B is zero. Then the fused kernels compute the reference too, with the
    rounding of the first step, so that rewards begin at exactly zero. Other variants switch their adapter off.

    Args:
        model: The base with the adapter.
        state: The model's state; None if it has an adapter that is not trained here.
        origin: The adapter that the run began with; None for the base alone.

    Raises:
        ContractError: The adapter cannot be read, or does not fit.
    """
    was_training = model.training
    model.eval()
    try:
        if state is None or (origin is None and not _is_plain(state)):
            with model.disable_adapter():
                yield
            return
        before = state.weights.clone()
        try:
            if origin is None:
                state.weights[state.ranges[Kind.B]] = 0
            else:
                state.load_weights(saved_weights(origin))
        except CheckpointError as error:
            raise ContractError(f"{origin}: it cannot be the reference: {error}") from error
        try:
            yield
        finally:
            state.weights.copy_(before)
    finally:
        model.train(was_training)


def _is_plain(state: FlatState) -> bool:
    """Return whether the adapter is A and B alone: no magnitudes of DoRA, no constants of a start."""
    magnitudes = state.ranges[Kind.MAGNITUDE]
    return state.constants is None and magnitudes.start == magnitudes.stop


def read(path: Path, examples: int, columns: int) -> tuple[int, np.ndarray]:
    """Return how many examples of a file of the cache are done, and the table; 0 if there is no such file.

    Reading stops at a chunk that is damaged or incomplete; the examples from there on are not done.
    """
    table, done = np.full((examples, columns), np.nan, np.float32), 0
    with (
        suppress(OSError),
        private_folder(path.parent) as folder,
        os.fdopen(folder.open(path.name), "rb") as file,
    ):
        os.utime(file.fileno())  # the time of last use
        while done < examples:
            chunk = table[done : done + CHUNK]
            content, digest = file.read(chunk.nbytes), file.read(DIGEST_BYTES)
            if digest != _digest(content, done):
                break
            chunk[:] = np.frombuffer(content, np.float32).reshape(chunk.shape)
            done += len(chunk)
    return done, table


def write(path: Path, chunk: np.ndarray, first: int) -> None:
    """Write a chunk, whose first example has the index `first`, to its place in a file of the cache, with a digest.

    Another run that computes the same file writes the same bytes to this place. A failure is a warning, since a later
    start can compute the chunk again.
    """
    content = chunk.tobytes()
    place = first * chunk.itemsize * chunk.shape[1] + first // CHUNK * DIGEST_BYTES
    try:
        with private_folder(path.parent) as folder:
            file = folder.open_to_update(path.name)
            try:
                os.pwrite(file, content + _digest(content, first), place)
            finally:
                os.close(file)
            if first == 0:
                cache.prune(folder, SUFFIX)
    except OSError as error:
        warnings.warn(f"the reference's log-probabilities are not kept for the next start: {error}", stacklevel=2)


def _digest(content: bytes, first: int) -> bytes:
    return hashlib.sha256(f"{first} ".encode() + content).digest()


def _dump(found: tuple[int, np.ndarray]) -> bytes:
    done, table = found
    return json.dumps([done, *table.shape]).encode() + b"\n" + table.tobytes()


def _load(message: bytes) -> tuple[int, np.ndarray]:
    head, _, content = message.partition(b"\n")
    done, *shape = json.loads(head)
    return done, np.frombuffer(content, np.float32).reshape(shape)
