"""Go on where a run stopped, or say why not.

A resume compares what the manifest recorded with what is asked for now and sorts every difference: harmless, needing
`--accept KEY`, or refused. Nothing that changes what the run is happens in silence.
"""

import fnmatch
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lora_kit.errors import CheckpointError, ContractError, InputError
from lora_kit.recipe.load import difference
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import live, store
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import Lease, inherited, take
from lora_kit.runs.live import Live
from lora_kit.runs.manifest import BaseFingerprint, Environment, Origin, RunFacts
from lora_kit.runs.store import Checkpoint

Verdict = Literal["harmless", "accept", "refused"]

VERDICTS: dict[str, Verdict] = {  # the first pattern that fits a key decides
    "base.repo": "harmless",  # the bytes of what the name stands for are compared instead
    "base.revision": "harmless",
    "base.trust_remote_code": "harmless",
    "base.stop_token": "harmless",  # trained tokens are compared below
    "base.attention": "accept",
    "base.*": "refused",
    "data.*": "harmless",  # likewise: the tokens that all of it leads to are compared
    "optim.*": "accept",
    "train.steps": "accept",
    "train.epochs": "accept",
    "train.micro_batch_tokens": "accept",
    "train.activation_checkpointing": "accept",
    "train.kernels": "accept",
    "checkpoint.*": "harmless",
    "evaluate.*": "harmless",
    "hub.*": "harmless",
    "track.*": "harmless",
    "fingerprints.validation": "harmless",
    "fingerprints.base.commit": "harmless",  # the bytes of its files decide
    "fingerprints.*": "refused",
    "versions.*": "harmless",
    "machine.processes": "harmless",
    "machine.*": "harmless",
    "computed_by.*": "harmless",
    "*": "refused",
}
ENDS_BITWISE = ("versions.", "machine.device", "computed_by.")  # such a difference may change bits


@dataclass(frozen=True)
class Row:
    """One difference between a checkpoint and what is asked for now."""

    key: str
    then: Any
    now: Any
    verdict: Verdict


def contract(recorded: RunFacts, recipe: Recipe, environment: Environment) -> list[Row]:
    """Return every difference that matters to a resume.

    Args:
        recorded: From the checkpoint's manifest.
        recipe: The recipe of this start.
        environment: The inputs, versions and machine of this start.
    """
    found, before = list(difference(recorded.recipe, recipe)), asdict(recorded)
    for section, value in asdict(environment).items():
        then, now = dict(_flat(section, before[section])), dict(_flat(section, value))
        found += [(key, then.get(key), now.get(key)) for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    return [Row(key, then, now, _verdict(key)) for key, then, now in found]


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested facts with dotted keys, so that a changed file of a base is named."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, one in value.items():
        yield from _flat(f"{key}.{name}", one)


def _verdict(key: str) -> Verdict:
    return next(verdict for pattern, verdict in VERDICTS.items() if fnmatch.fnmatchcase(key, pattern))


def table(rows: Sequence[Row], accepted: Sequence[str]) -> str:
    """Return the contract as plain text, a line a difference."""
    words = {"harmless": "harmless", "accept": "needs --accept", "refused": "REFUSED"}
    lines = []
    for row in rows:
        verdict = "accepted" if row.verdict == "accept" and row.key in accepted else words[row.verdict]
        lines.append(f"  {verdict:<15} {row.key}: {_short(row.then)} -> {_short(row.now)}")
    return "\n".join(lines) if lines else "  same recipe, base, data, versions and machine"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def enforce(rows: Sequence[Row], accepted: Sequence[str], run: Path) -> None:
    """Refuse a resume that would change what the run is.

    Raises:
        ContractError: A row is refused, or needs an `--accept` that was not given; shows the whole table.
    """
    refused = [row.key for row in rows if row.verdict == "refused"]
    missing = [row.key for row in rows if row.verdict == "accept" and row.key not in accepted]
    if not refused and not missing:
        return
    advice = []
    if refused:
        advice.append(f"{', '.join(refused)} cannot change within a run; use another --out for a new one")
    if missing:
        advice.append("to go on with the change: " + " ".join(f"--accept {key}" for key in missing))
    raise ContractError(f"{run}: this is a run of another recipe:\n{table(rows, accepted)}\n" + "\n".join(advice))


def still_bitwise(rows: Sequence[Row]) -> bool:
    """Return whether a resume with these differences still gives the bits of an undisturbed run."""
    return not any(row.verdict == "accept" or row.key.startswith(ENDS_BITWISE) for row in rows)


@dataclass(frozen=True)
class OpenRun:
    """A run's folder, held for writing.

    Attributes:
        folder: The run's folder.
        lease: The right to write to it, with the fencing token.
        run_id: Made at the first start, the same ever after.
        latest: Where to go on, a checkpoint or what is live; None for a new run.
        origin: Whose adapter a new run begins with; None for a fresh one.
        reached: The newest step that metrics.jsonl showed when the run was opened.
        notices: What a person should know about opening it, such as a checkpoint that was set aside.
    """

    folder: Path
    lease: Lease
    run_id: str
    latest: Checkpoint | Live | None
    origin: Checkpoint | None
    reached: int
    notices: tuple[str, ...]


def take_over(folder: Path, origin: Checkpoint | None = None) -> tuple[Lease, list[str]]:
    """Take a run's lease, and set aside what does not verify or what a step back leaves behind.

    Returns:
        The lease, and what a person should know.

    Raises:
        InputError: The folder holds something else.
        LeaseError: Another process is training there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, not a folder; choose another --out")
    known = {"checkpoints", "recipe.yaml", "lease.json", "events.jsonl"}
    if folder.is_dir() and (inside := {path.name for path in folder.iterdir()}) and not inside & known:
        raise InputError(f"{folder}: not empty and not a run's folder (it holds {min(inside)}); choose another --out")
    try:
        lease = take(folder, above=store.newest_token(folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}; mend that or choose another --out") from error
    store.sweep(folder)
    live.reap_orphans()
    notices = list(_go_back(folder, origin)) if origin and is_own(folder, origin) else []
    found = store.find(folder)
    for path, reason in found.broken.items():
        if _still_broken(path):
            target = store.set_aside(folder, path, reason)
            going_on = f"step {found.latest.step}" if found.latest else "the start"
            notices.append(f"{reason}; moved to {target}, falling back to {going_on}")
    return lease, notices


def is_own(folder: Path, origin: Checkpoint) -> bool:
    """Return whether a checkpoint is one of this run's."""
    return origin.path.resolve().parent == (folder / "checkpoints").resolve()


def open_run(folder: Path, start_from: Path | None = None) -> OpenRun:
    """Hold a run for writing, unless this process's keeper does already, and find where to go on.

    Of all stations the highest (fencing token, step) wins, so what another machine left behind long ago never does.

    Args:
        folder: The run's.
        start_from: A checkpoint: of this run, to go back to; of another, whose adapter a new run begins with.

    Raises:
        InputError: The folder holds something else.
        LeaseError: Another process is training there.
        CheckpointError: `start_from` does not verify.
        ContractError: The run there has begun with another adapter.
    """
    origin = None if start_from is None else store.open_checkpoint(start_from)
    lease, notices = inherited(folder), list[str]()
    if lease is None:
        lease, notices = take_over(folder, origin)
    if origin is not None and is_own(folder, origin):
        origin = None
    durable = store.find(folder).latest
    run_id = durable.manifest.run.run_id if durable else Journal(folder).run_id()
    running, problems = live.newest(folder, run_id) if run_id else (None, [])
    latest = max((one for one in (durable, running) if one), key=lambda one: one.manifest.order, default=None)
    if origin is not None and latest and latest.manifest.run.origin != describe(origin):
        lease.release()
        raise ContractError(
            f"{folder}: a run that began with {latest.manifest.run.origin or 'a fresh adapter'}, not with "
            f"{describe(origin)}; leave --from out to go on with it, or use another --out"
        )
    new_id = latest.manifest.run.run_id if latest else secrets.token_hex(8)
    reached = Journal(folder).last_step()
    return OpenRun(folder, lease, new_id, latest, origin, reached, (*notices, *problems))


def describe(checkpoint: Checkpoint) -> Origin:
    """Return what the manifest of a run records of the checkpoint that the run began with."""
    manifest = checkpoint.manifest
    return Origin(manifest.run.run_id, checkpoint.step, manifest.files[store.ADAPTER].sha256)


def _go_back(folder: Path, target: Checkpoint) -> Iterator[str]:
    """Set aside every checkpoint that is newer than the target; nothing is deleted."""
    Journal(folder).event("went back", step=target.step)
    region = live.open_region(folder)
    if region is not None:
        region.clear()
    for path in store.folders(folder):
        if int(path.name.removeprefix("step-")) > target.step:
            kept = store.set_aside(folder, path, "went back")
            yield f"going back to step {target.step}; {path.name} is kept in {kept}"
    (folder / "result.json").unlink(missing_ok=True)


def enforce_origin(origin: Checkpoint, recipe: Recipe, fingerprint: BaseFingerprint) -> None:
    """Refuse to begin with an adapter that was made for another base or has another shape.

    Raises:
        ContractError: Names each difference.
    """
    then, now = origin.manifest.run.recipe["adapter"], recipe.model_dump(mode="json")["adapter"]
    changed = [key for key in now if key != "dropout" and then[key] != now[key]]
    wrong = [f"adapter.{key}: {then[key]} there, {now[key]} here" for key in changed]
    if origin.manifest.run.fingerprints.base != fingerprint:
        wrong.append("base: other bytes there")
    if wrong:
        told = "\n  ".join(wrong)
        raise ContractError(f"{origin.path}: cannot be what this run begins with:\n  {told}")


def _still_broken(path: Path) -> bool:
    time.sleep(0.05)  # a network file system may show a folder before its files
    try:
        store.open_checkpoint(path)
    except CheckpointError:
        return True
    return False
