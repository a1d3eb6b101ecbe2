"""Go on where a run stopped, or say why not.

A resume compares what the manifest recorded with what is asked for now and sorts every difference: harmless, needing
`--accept KEY`, or refused. Nothing that changes what the run is happens in silence.
"""

import fnmatch
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_kit.checkpoint import store
from lora_kit.checkpoint.lease import Lease, take
from lora_kit.checkpoint.store import Checkpoint
from lora_kit.errors import CheckpointError, ContractError, InputError
from lora_kit.journal import Journal
from lora_kit.recipe import Recipe, difference

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
    "checkpoint.*": "harmless",
    "evaluate.*": "harmless",
    "hub.*": "harmless",
    "track.*": "harmless",
    "fingerprints.validation": "harmless",
    "fingerprints.*": "refused",
    "versions.*": "harmless",
    "machine.processes": "harmless",
    "machine.*": "harmless",
    "*": "refused",
}
ENDS_BITWISE = ("versions.", "machine.device")


@dataclass(frozen=True)
class Row:
    """One difference between a checkpoint and what is asked for now."""

    key: str
    then: Any
    now: Any
    verdict: Verdict


def contract(manifest: Mapping[str, Any], recipe: Recipe, facts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return every difference that matters to a resume.

    Args:
        manifest: Of the checkpoint.
        recipe: What is asked for now.
        facts: The manifest's other sections as they are now: `fingerprints`, `versions`, `machine`.
    """
    found = list(difference(manifest["recipe"], recipe))
    for section, now in facts.items():
        then = manifest[section]
        found += [(f"{section}.{key}", then.get(key), now[key]) for key in now if then.get(key) != now[key]]
    return [Row(key, then, now, _verdict(key)) for key, then, now in found]


def _verdict(key: str) -> Verdict:
    return next(verdict for pattern, verdict in VERDICTS.items() if fnmatch.fnmatchcase(key, pattern))


def table(rows: Sequence[Row], accepted: Sequence[str]) -> str:
    """Return the contract as plain text, a line a difference."""
    words = {"harmless": "harmless", "accept": "needs --accept", "refused": "REFUSED"}
    lines = []
    for row in rows:
        verdict = "accepted" if row.verdict == "accept" and row.key in accepted else words[row.verdict]
        lines.append(f"  {verdict:<15} {row.key}: {_short(row.then)} -> {_short(row.now)}")
    return "\n".join(lines) if lines else "  same recipe, base, data and machine"


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
        latest: Where to go on; None for a new run.
        reached: The newest step that metrics.jsonl showed when the run was opened.
        notices: What a person should know about opening it, such as a checkpoint that was set aside.
    """

    folder: Path
    lease: Lease
    run_id: str
    latest: Checkpoint | None
    reached: int
    notices: tuple[str, ...]


def open_run(folder: Path) -> OpenRun:
    """Take a run's lease, set aside what does not verify, and find where to go on.

    Raises:
        InputError: The folder holds something else.
        LeaseError: Another process is training there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, not a folder; choose another --out")
    known = {"checkpoints", "recipe.yaml", "lease.json", "events.jsonl"}
    if folder.is_dir() and (inside := {path.name for path in folder.iterdir()}) and not inside & known:
        raise InputError(f"{folder}: not empty and not a run's folder (it holds {min(inside)}); choose another --out")
    lease = take(folder)
    store.sweep(folder)
    found = store.find(folder)
    notices = []
    for path, reason in found.broken.items():
        if _still_broken(path):
            target = store.set_aside(folder, path, reason)
            going_on = f"step {found.latest.step}" if found.latest else "the start"
            notices.append(f"{reason}; moved to {target}, falling back to {going_on}")
    run_id = found.latest.manifest["run_id"] if found.latest else secrets.token_hex(8)
    return OpenRun(folder, lease, run_id, found.latest, Journal(folder).last_step(), tuple(notices))


def _still_broken(path: Path) -> bool:
    time.sleep(0.05)  # a network file system may show a folder before its files
    try:
        store.open_checkpoint(path)
    except CheckpointError:
        return True
    return False
