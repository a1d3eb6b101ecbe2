"""The certificate of a drill: what happened to a run, what that cost, and what was compared with an undisturbed run.

`certificate.json` ends with a SHA-256 of its own text; `certificate.txt` is a readable copy. `recipe` is the hash of
the recipe for which the certificate holds.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from lora_kit.data.counts import Count
from lora_kit.errors import CheckpointError
from lora_kit.files import write_atomically
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import formats
from lora_kit.runs.comparison import Comparison
from lora_kit.runs.formats import Amount, Digest, Json
from lora_kit.views.console import number

FOLDER, FILE, TEXT = "drill", "certificate.json", "certificate.txt"


@dataclass(frozen=True)
class Resumption:
    """A fault, and how the run went on.

    Attributes:
        fault: The fault's name.
        what: What was done.
        step: The number of finished steps when it was done.
        resumed: The step after which the run went on.
        lost: The finished steps that were computed again.
        seconds: The time from the fault to the next finished step.
        parts: These seconds by name, in order: until the run started again (`found`), the parts of the start that the
            event `resumed` lists, and the step.
    """

    fault: str
    what: str
    step: Count
    resumed: Count
    lost: Count
    seconds: Amount
    parts: dict[str, Amount]


@dataclass(frozen=True)
class Certificate:
    """The result of a drill.

    Attributes:
        equal: Whether every fault was done and the disturbed run is equal to the undisturbed run.
        problems: Why it is not equal; empty if it is.
        command: The command that repeats the drill.
        recipe: `hash_of` the recipe.
        changed: The recipe's fields that the drill has set, for both runs; `train.step_timeout` for the disturbed run.
        steps: The step after which the runs are compared.
        seed: The seed of the random moments of the faults.
        faults: What was done, in order.
        left_out: The faults that were not done, with the reason.
        comparison: What was compared; None if a run did not come so far.
        versions: From the manifest of the undisturbed run, and Python's.
        machine: The device and what decides the exact bits, from the same manifest; the system and its cores.
        time: When the drill ended (UTC).
    """

    equal: bool
    problems: tuple[str, ...]
    command: str
    recipe: Digest
    changed: tuple[str, ...]
    steps: Count
    seed: int
    faults: tuple[Resumption, ...]
    left_out: dict[str, str]
    comparison: Comparison | None
    versions: dict[str, str]
    machine: dict[str, Json]
    time: str

    def write(self, folder: Path) -> None:
        """Write both files of the certificate into a folder."""
        write_atomically(folder / FILE, formats.seal(asdict(self)))
        write_atomically(folder / TEXT, self.text())

    def text(self) -> str:
        """Return the certificate as text."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        done, lost = len(self.faults), sum(each.lost for each in self.faults)
        yield f"EQUAL: {self.summary()}" if self.equal else "NOT EQUAL"
        yield from (f"  {problem}" for problem in self.problems)
        if self.comparison:
            claim = self.comparison.claim
            yield f"claim: {claim.level} ({claim.holds_for})"
        yield f"{done} interruption{'s' if done != 1 else ''} in {self.steps} steps, {lost} finished steps lost:"
        for each in self.faults:
            parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in each.parts.items())
            yield (
                f"  {each.fault}: {each.what} after step {each.step}; resumed after step {each.resumed}, "
                f"{each.lost} lost, next step in {each.seconds:.2f} s ({parts})"
            )
        yield from (f"  {fault}: left out, {reason}" for fault, reason in self.left_out.items())
        if self.comparison:
            yield f"after step {self.steps}:"
            for name, file in self.comparison.files.items():
                yield f"  {name}: {file.size:,} bytes, {'equal' if file.equal else 'DIFFERENT'}"
                yield f"    undisturbed {file.undisturbed}"
                yield f"    disturbed   {file.disturbed}"
            for name, difference in self.comparison.differences.items():
                yield f"  {name}: differs by {number(difference, '.2g')} of its norm"
        yield "versions: " + ", ".join(f"{name} {version}" for name, version in self.versions.items())
        yield "machine:"
        yield from (f"  {name}: {value}" for name, value in self.machine.items())
        yield f"recipe: {self.recipe}"
        yield f"set for the drill: {', '.join(self.changed) or 'nothing'}"
        yield f"repeat: {self.command}"
        yield f"time: {self.time}"

    def summary(self) -> str:
        """Return one sentence: what the run survived, and what was equal."""
        names = dict.fromkeys(each.fault for each in self.faults)
        bitwise = self.comparison is not None and self.comparison.claim.level == "bitwise"
        how = "to the bit" if bitwise else "up to rounding"
        return f"a run of {self.steps} steps with {', '.join(names)} equals an undisturbed run {how}"


CERTIFICATE: TypeAdapter[Certificate] = TypeAdapter(Certificate)


def hash_of(recipe: Recipe) -> str:
    """Return the SHA-256 of all fields of a recipe, defaults included."""
    content = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_certificate(path: Path) -> Certificate | None:
    """Return the certificate in a file; None if there is no file.

    Raises:
        CheckpointError: The file cannot be read, was changed, or is not a certificate of this version.
    """
    data = formats.read_bytes(path)
    if data is None:
        return None
    formats.require_seal(data, path)
    return formats.parse(CERTIFICATE, data, path)


def certificate_of(run: Path, recipe: Recipe) -> Certificate | None:
    """Return the certificate in a run's folder if it is of this recipe and says that the runs were equal."""
    try:
        found = read_certificate(run / FOLDER / FILE)
    except CheckpointError:
        return None
    return found if found and found.equal and found.recipe == hash_of(recipe) else None
