"""Resume a run: acquire its lease, find the newest state and check the resume contract.

The contract compares what the manifest recorded with the recipe, the inputs and the machine of this start. Every
difference is a row with a verdict: harmless, needs `--accept KEY`, or refused. No difference is applied silently.
"""

import fnmatch
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lora_kit.errors import CheckpointError, ContractError, InputError
from lora_kit.recipe.load import difference
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import certificate, live, store
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import Fence, Lease, inherited, take
from lora_kit.runs.live import Live
from lora_kit.runs.manifest import ONCE_RECORDED, Environment, RunFacts, ScriptFacts
from lora_kit.runs.origin import PlainAdapter, begins_with, describe, open_origin
from lora_kit.runs.store import AnyCheckpoint, Checkpoint

Verdict = Literal["harmless", "accept", "refused"]

VERDICTS: dict[str, Verdict] = {  # the first pattern that matches a key decides
    "base.repo": "harmless",  # `fingerprints.base.files` compares the base's files
    "base.revision": "harmless",
    "base.trust_remote_code": "harmless",
    "base.stop_token": "harmless",  # `fingerprints.train` compares the tokens that result from it
    "base.attention": "accept",
    "base.placement": "harmless",  # weights are gathered before they are used, so no bit changes
    "base.*": "refused",
    "data.train.*.weight": "accept",  # decides the order of the examples, which no fingerprint covers
    "data.train.*.epochs": "accept",
    "data.*": "harmless",  # `fingerprints.train` and `fingerprints.template` compare the result
    "optim.name": "refused",  # adamw and adamw-8bit store other moments
    "optim.*": "accept",
    "train.steps": "accept",
    "train.epochs": "accept",
    "train.micro_batch_tokens": "accept",
    "train.activation_checkpointing": "accept",
    "train.kernels": "accept",
    "train.share_prompts": "accept",
    "train.step_timeout": "harmless",
    "launch.*": "harmless",
    "checkpoint.*": "harmless",
    "evaluate.*": "harmless",
    "preflight.*": "harmless",
    "hub.*": "harmless",
    "track.*": "harmless",
    "fingerprints.validation": "harmless",
    "fingerprints.base.commit": "harmless",  # `fingerprints.base.files` compares the files of the commit
    **{f"fingerprints.base.files.{name}": "harmless" for name in ONCE_RECORDED},
    "fingerprints.*": "refused",
    "versions.*": "harmless",
    "machine.processes": "harmless",
    "machine.*": "harmless",
    "computed_by.*": "harmless",
    "*": "refused",
}
ENDS_BITWISE = ("versions.", "machine.device", "computed_by.")  # a difference in these may change bits


@dataclass(frozen=True)
class Row:
    """A difference between a checkpoint and this start."""

    key: str
    then: Any
    now: Any
    verdict: Verdict


def contract(recorded: RunFacts, recipe: Recipe, environment: Environment) -> list[Row]:
    """Return every difference between a checkpoint and this start.

    Args:
        recorded: From the checkpoint's manifest.
        recipe: The recipe of this start.
        environment: The inputs, versions and machine of this start.
    """
    changes, before = list(difference(recorded.recipe, recipe)), asdict(recorded)
    for section, value in asdict(environment).items():
        then, now = dict(_flat(section, before[section])), dict(_flat(section, value))
        keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
        changes += [(key, then.get(key), now.get(key)) for key in keys]
    return [Row(key, then, now, _verdict(key)) for key, then, now in changes]


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with dotted keys, so that a row names the changed file of a base."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(f"{key}.{name}", inner)


def _verdict(key: str) -> Verdict:
    return next(verdict for pattern, verdict in VERDICTS.items() if fnmatch.fnmatchcase(key, pattern))


def table(rows: Sequence[Row], accepted: Sequence[str]) -> str:
    """Return the contract as text, one line per difference."""
    labels = {"harmless": "harmless", "accept": "needs --accept", "refused": "REFUSED"}
    lines = []
    for row in rows:
        verdict = "accepted" if row.verdict == "accept" and row.key in accepted else labels[row.verdict]
        lines.append(f"  {verdict:<15} {row.key}: {_short(row.then)} -> {_short(row.now)}")
    return "\n".join(lines) if lines else "  same recipe, base, data, versions and machine"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"


def enforce(rows: Sequence[Row], accepted: Sequence[str], run: Path) -> None:
    """Refuse a resume if a difference is not permitted, or needs an `--accept` that is missing.

    Raises:
        ContractError: A difference is refused, or its `--accept` is missing; the message lists all differences.
    """
    refused = [row.key for row in rows if row.verdict == "refused"]
    missing = [row.key for row in rows if row.verdict == "accept" and row.key not in accepted]
    if not refused and not missing:
        return
    advice = []
    if refused:
        advice.append(f"{', '.join(refused)} cannot change within a run; use another --out for a new one")
    if commit := _commit_to_return_to(rows):
        advice.append(f"the base's repository on the Hub has changed; to resume: --set base.revision={commit}")
    if missing:
        advice.append("to resume with the change: " + " ".join(f"--accept {key}" for key in missing))
    raise ContractError(
        f"{run}: this start differs from the run's checkpoint:\n{table(rows, accepted)}\n" + "\n".join(advice)
    )


def _commit_to_return_to(rows: Sequence[Row]) -> str | None:
    """Return the commit of the checkpoint's base if files of the base differ because its repository has changed."""
    commit = next((row for row in rows if row.key == "fingerprints.base.commit" and row.then and row.now), None)
    changed = any(row.key.startswith("fingerprints.base.files.") and row.verdict == "refused" for row in rows)
    return str(commit.then) if commit and changed else None


def refuse_fewer_steps(folder: Path, finished: int, steps: int) -> None:
    """Check that the recipe has at least as many steps as the run has finished.

    Args:
        folder: The run's folder.
        finished: The number of finished steps.
        steps: The number of steps of the recipe.

    Raises:
        ContractError: More steps are finished; the message names a checkpoint to go back to, if there is one.
    """
    if finished <= steps:
        return
    kept = next((path for path in store.folders(folder) if store.step_of(path) <= steps), None)
    way = f"--from {shlex.quote(str(kept))} goes back" if kept else f"no checkpoint up to step {steps} is kept"
    raise ContractError(
        f"{folder}: {finished} steps are finished, and the recipe has only {steps}; {way}. Otherwise set train.steps "
        "or train.epochs to what the run has, or use another --out"
    )


def still_bitwise(rows: Sequence[Row]) -> bool:
    """Return whether a resume with these differences still gives the bytes of an uninterrupted run."""
    return not any(row.verdict == "accept" or row.key.startswith(ENDS_BITWISE) for row in rows)


@dataclass(frozen=True)
class OpenRun:
    """A run's folder, opened for writing.

    Attributes:
        folder: The run's folder.
        lease: The right to write to the folder, with the fencing token.
        latest: The checkpoint or live snapshot to resume from; None for a new run.
        loaded_by: The index of the process that can read `latest`: a live snapshot is in the memory of one machine.
        goes_back: Whether `latest` is an older checkpoint that `--from` names; `go_back` then sets aside newer ones.
        origin: The checkpoint or PEFT adapter that a new run begins with; None for a fresh adapter.
        reached: The newest step in metrics.jsonl at the time of opening.
        notices: Messages for the user about opening the run, such as a checkpoint that was set aside.
    """

    folder: Path
    lease: Lease
    latest: AnyCheckpoint | Live | None
    loaded_by: int
    goes_back: bool
    origin: Checkpoint[RunFacts] | PlainAdapter | None
    reached: int
    notices: tuple[str, ...]

    @property
    def run_id(self) -> str:
        """The run's id, chosen at the first start; every resume keeps it."""
        return self.lease.record.run_id


def no_remote() -> None:
    """Restore nothing: the run has no remote."""


def take_over(
    folder: Path,
    *,
    restore: Callable[[], None] = no_remote,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Lease, list[str]]:
    """Acquire a run's lease; set aside damaged checkpoints.

    Args:
        folder: The run's folder.
        restore: Called first if the folder can be a run's folder: downloads a checkpoint of the run from its remote if
            the folder has none.
        tell: Called with messages for the user that must not wait, such as the reason for waiting.

    Returns:
        The lease, and messages for the user.

    Raises:
        InputError: The folder cannot be a run's folder or cannot be written, or its newest checkpoint is of another
            version of lora_kit.
        LeaseError: Another process is training there.
        RemoteError: The remote cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, not a folder; choose another --out")
    try:
        str(folder.resolve()).encode()
    except ValueError as error:
        wrong = "is not UTF-8" if isinstance(error, UnicodeEncodeError) else "contains NUL"
        raise InputError(f"{str(folder)!a}: its path {wrong}; choose another --out") from None
    except RuntimeError:  # pathlib raises it for a loop of links before Python 3.13
        raise InputError(f"{folder}: its symbolic links form a loop; choose another --out") from None
    known = {"checkpoints", "recipe.yaml", "lease.json", "events.jsonl"}
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = {name for name in names if not name.startswith(".lease")}  # left by a start that was killed at once
    names.discard(certificate.FOLDER)  # `lora-kit drill` may have written it before the run
    if names and not names & known:
        raise InputError(f"{folder}: not empty and not a run's folder (it holds {min(names)}); choose another --out")
    restore()
    try:
        run_id = live.run_id_of(folder) or secrets.token_hex(8)
        above = max(store.newest_token(folder), live.newest_token(run_id))
        lease = take(folder, run_id=run_id, above=above, tell=tell)
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"{where}: cannot be written: {error.strerror}; fix that or choose another --out") from error
    with ExitStack() as on_error:
        on_error.callback(lease.release)
        store.sweep(folder)
        try:
            store.try_rename(folder)
        except OSError as error:
            raise InputError(
                f"{folder}: a folder in it cannot be made and renamed ({error.strerror}), but every checkpoint needs "
                "that; choose an --out on another file system, or with a shorter path"
            ) from error
        live.adopt(lease)
        live.delete_orphans()
        found, notices = store.find(folder), list[str]()
        for path, reason in found.broken.items():
            fallback = f"step {found.latest.step}" if found.latest else "the start"
            if store.is_of_other_format(path):
                raise InputError(
                    f"{reason}. It is not damaged and newer than all that this version reads; resume with the version "
                    f"that wrote it, or move it to another place to go on from {fallback}"
                )
            if _still_broken(path):
                try:
                    moved = f"moved to {store.set_aside(folder, path, reason)}"
                except OSError as error:
                    moved = f"it could not be moved to quarantine ({error.strerror})"
                notices.append(f"{reason}; {moved}, falling back to {fallback}")
        on_error.pop_all()
    return lease, notices


def is_own(folder: Path, checkpoint: Path) -> bool:
    """Return whether a checkpoint is in this run's folder."""
    return checkpoint.resolve().parent == (folder / "checkpoints").resolve()


@dataclass(frozen=True)
class HeldRun:
    """A run's folder whose lease is held, before the state to resume from is known.

    Attributes:
        folder: The run's folder.
        lease: The right to write to the folder, with the fencing token.
        target: The checkpoint of this run that `--from` names, to go back to.
        origin: The checkpoint or PEFT adapter that `--from` names, for a new run to begin with.
        notices: Messages for the user.
    """

    folder: Path
    lease: Lease
    target: Checkpoint | None
    origin: Checkpoint | PlainAdapter | None
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """What the shared memory of a machine has of a run.

    Attributes:
        process: The index of a process on that machine.
        snapshot: The newest valid live snapshot; None if there is none.
        problems: Messages about snapshots that cannot be used.
    """

    process: int
    snapshot: Live | None
    problems: tuple[str, ...]

    @classmethod
    def of(cls, lease: Lease, process: int = 0) -> "Candidate":
        """Look at the shared memory of this machine."""
        snapshot, problems = live.newest(lease)
        return cls(process, snapshot, tuple(problems))


def open_run(
    folder: Path,
    start_from: Path | None = None,
    *,
    script: bool = False,
    restore: Callable[[], None] = no_remote,
    tell: Callable[[str], None] = lambda text: None,
) -> OpenRun:
    """Open a run whose processes are all on this machine: see `hold_run` and `choose_state`."""
    held = hold_run(folder, start_from, restore=restore, tell=tell)
    return choose_state(held, [Candidate.of(held.lease)], script=script)


def hold_run(
    folder: Path,
    start_from: Path | None = None,
    *,
    restore: Callable[[], None] = no_remote,
    tell: Callable[[str], None] = lambda text: None,
) -> HeldRun:
    """Acquire a run's lease, unless this process's keeper holds it already.

    Args:
        folder: The run's folder.
        start_from: A checkpoint of this run to go back to, or a checkpoint of another run, for a new run to begin with.
        restore: As for `take_over`.
        tell: Called with messages for the user that must not wait.

    Raises:
        InputError: The folder cannot be a run's folder.
        LeaseError: Another process is training there.
        CheckpointError: `start_from` is damaged.
    """
    lease, notices = inherited(folder), list[str]()
    if lease and start_from and is_own(folder, start_from) and Journal(folder).went_back(lease.token):
        start_from = None  # this process is a restart: going back again would repeat what has been trained since
    origin, target = None if start_from is None else open_origin(start_from), None
    if lease is None:
        lease, notices = take_over(folder, restore=restore, tell=tell)
    if isinstance(origin, Checkpoint) and is_own(folder, origin.path):
        origin, target = None, origin
    return HeldRun(folder, lease, target, origin, tuple(notices))


def choose_state(held: HeldRun, candidates: Sequence[Candidate], *, script: bool = False) -> OpenRun:
    """Find the state to resume from.

    Of the newest checkpoint and the newest live snapshot of every machine, the state with the highest (fencing token,
    step) is used. So a region that a machine kept while another machine trained on is never used.

    Args:
        held: The run, whose lease is released if this raises.
        candidates: What the shared memory of each machine has.
        script: Whether the run is one of a script, not of a recipe.

    Raises:
        ContractError: The run in the folder has begun with another adapter, its newest checkpoint is of another run, or
            a recipe would resume a script's run or the other way round.
    """
    folder, lease, target, origin, notices = held.folder, held.lease, held.target, held.origin, [*held.notices]
    problems = [problem for candidate in candidates for problem in candidate.problems]
    with ExitStack() as on_error:
        on_error.callback(lease.release)
        found = [(candidate.snapshot, candidate.process) for candidate in candidates if candidate.snapshot]
        states: list[tuple[AnyCheckpoint | Live, int]] = [*found]
        if durable := store.find(folder).latest:
            states.insert(0, (durable, 0))
        newest = max(states, key=lambda state: state[0].manifest.order, default=(None, 0))
        latest, loaded_by = (target, 0) if target else newest
        if latest and latest.manifest.run.run_id != lease.record.run_id:
            raise ContractError(
                f"{latest.path}: a checkpoint of another run ({latest.manifest.run.run_id}; this folder has the run "
                f"{lease.record.run_id}); move it away, or begin a new run with it: --from, another --out"
            )
        if latest and isinstance(latest.manifest.run, ScriptFacts) is not script:
            kinds = ("a recipe", "a script") if script else ("a script", "a recipe")
            raise ContractError(f"{folder}: it holds a run of {kinds[0]}, so {kinds[1]} needs another --out")
        if origin is not None and latest and not begins_with(latest.manifest.run.origin, origin):
            raise ContractError(
                f"{folder}: this run began with {latest.manifest.run.origin or 'a fresh adapter'}, not with "
                f"{describe(origin)}; leave --from out to resume it, or use another --out"
            )
        reached = Journal(folder).last_step()
        notices += problems
        if target is None:
            notices += _steps_lost(folder, latest.step if latest else 0, problems)
        on_error.pop_all()
    return OpenRun(folder, lease, latest, loaded_by, target is not None, origin, reached, tuple(notices))


def _steps_lost(folder: Path, start: int, problems: Sequence[str]) -> Iterator[str]:
    """Yield a warning if a start begins at an earlier step than the logs show, unless the run went back before."""
    journal = Journal(folder)
    kinds = [event for event in journal.read_events() if event["kind"] in ("started", "resumed", "went back")]
    went_back = bool(kinds) and kinds[-1]["kind"] == "went back"
    reached = kinds[-1]["step"] if went_back else journal.last_step()
    if reached > start:
        why = (
            "shared memory has no newer state of this run: the machine or its container was started again, /dev/shm "
            "was cleared, or this folder is a copy"
        )
        if problems:
            why = "the warnings above say why newer states cannot be used"
        yield (
            f"{folder}: {reached - start} finished step(s) are lost and computed again: the logs reach step {reached}, "
            f"the newest state that can be used is of {f'step {start}' if start else 'the start'}; {why}"
        )


def go_back(run: OpenRun) -> list[str]:
    """Set aside every checkpoint that is newer than the one that the run goes back to. No checkpoint is deleted.

    Called once the contract holds, so that a start that is refused has moved nothing.

    Returns:
        Messages for the user: where each checkpoint is kept.
    """
    folder, target, notices = run.folder, run.latest, list[str]()
    assert target is not None
    region = live.open_region(folder, run_id=run.run_id, most=run.lease.token)
    if region is not None:
        region.clear()
    readable, _ = store.newest_first(folder)
    for path in store.folders(folder):
        newer = path in readable and readable[path].order > target.manifest.order
        if newer or store.step_of(path) > target.step:
            kept = store.set_aside(folder, path, "went back")
            notices.append(f"going back to step {target.step}; {path.name} is kept in {kept}")
    store.remove(folder / "result.json")
    Journal(folder, Fence(run.lease)).event("went back", step=target.step, token=run.lease.token)
    return notices


def _still_broken(path: Path) -> bool:
    time.sleep(0.05)  # a network file system may show a folder before its files
    try:
        store.open_any_checkpoint(path)
    except CheckpointError:
        return True
    return False
