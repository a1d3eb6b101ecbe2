"""One writer for a run's folder, proven by a lease with a fencing token.

The lease names its holder by process id, that process's start time and the machine's boot id, so a dead holder on the
same machine is known to be dead at once, without clocks. One of another machine is dead when its heartbeat, a counter
in a file of its own, has not moved for a minute by the reader's clock: no file times and no locks, which network file
systems do not keep. Each new holder gets a higher token, and every manifest carries it.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lora_kit.errors import LeaseError
from lora_kit.files import write_atomically

FILE = "lease.json"
KEEPER = "LORA_KIT_KEEPER"  # set for processes whose keeper holds the lease: its process id
ORDERED = "LORA_KIT_ORDERED"  # set for them, too: the Unix time at which the keeper asked for them
PATIENCE_SECONDS = 0.25  # a killed holder takes a moment to be gone
BEAT_SECONDS, DEAD_SECONDS = 10.0, 60.0  # how often the holder's heartbeat moves, and when another machine's is dead


@dataclass(frozen=True)
class Lease:
    """The right to write to a run's folder, `taken` at a Unix time; a borrowed one is its keeper's to release."""

    path: Path
    token: int
    borrowed: bool = False
    taken: float = 0.0

    def is_ours(self) -> bool:
        """Return whether nobody has taken the run over."""
        return bool(_read(self.path).get("token") == self.token)

    def beat(self, count: int) -> None:
        """Show other machines that the holder lives."""
        _write(_beat_file(self.path, self.token), {"beat": count})

    def release(self) -> None:
        """Leave the token behind, so that the next one is higher, but no holder."""
        if self.borrowed:
            return
        if self.is_ours():
            _write(self.path, {"token": self.token, "holder": None})
        _beat_file(self.path, self.token).unlink(missing_ok=True)


def inherited(run: Path) -> Lease | None:
    """Return the lease that this process's keeper holds for it; None without a keeper."""
    keeper, current = os.environ.get(KEEPER), _read(run / FILE)
    if keeper and (current.get("holder") or {}).get("pid") == int(keeper):
        return Lease(run / FILE, current["token"], borrowed=True, taken=current["taken"])
    return None


def take(run: Path, *, above: int = 0) -> Lease:
    """Take the lease of a run's folder for this process.

    Args:
        run: The folder.
        above: The new token is higher than this and than every earlier one.

    Raises:
        LeaseError: A living process holds it, here or on another machine.
    """
    path = run / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = time.monotonic() + PATIENCE_SECONDS
    while _alive((current := _read(path)).get("holder")) and time.monotonic() < patience:
        time.sleep(0.02)
    holder = current.get("holder") or {}
    if _alive(holder) or (_elsewhere(holder) and _beats(path, current["token"])):
        raise LeaseError(
            f"{run}: process {holder['pid']} on {holder['host']} is training here; wait for it, stop it, or use "
            "another --out"
        )
    token, claim = _claim(run, 1 + max(int(current.get("token", 0)), above))
    try:
        if _read(path) != current:
            raise LeaseError(f"{run}: another process has just begun to train here; wait for it, or use another --out")
        taken = round(time.time(), 3)
        _write(path, {"token": token, "taken": taken, "holder": _me()})
        for left in run.glob(".lease-*"):  # by those who were killed
            left.unlink(missing_ok=True)
    finally:
        claim.unlink(missing_ok=True)
    return Lease(path, token, taken=taken)


def _claim(run: Path, token: int) -> tuple[int, Path]:
    """Make the file that only one of several who see the same dead holder can make; return its token too.

    A process that was killed between making its claim and becoming the holder leaves it behind: its token is passed by.
    """
    while True:
        claim = run / f".lease-{token}"
        try:
            descriptor = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError as error:
            if _claimant_lives(claim):
                raise LeaseError(
                    f"{run}: another process is starting here at this moment (it made {claim}); try again, and delete "
                    "that file if its machine is gone"
                ) from error
            token += 1
            continue
        with os.fdopen(descriptor, "w") as file:
            json.dump(_me(), file)
        return token, claim


def _claimant_lives(claim: Path) -> bool:
    """Return whether who made a claim still has it after a moment; one that does not even say its name has died."""
    patience, maker = time.monotonic() + PATIENCE_SECONDS, dict[str, Any]()
    while time.monotonic() < patience:
        with suppress(ValueError):
            maker = _read(claim)
            if not _alive(maker) and not _elsewhere(maker):
                return False
        time.sleep(0.02)
    return bool(maker)


def is_held(run: Path) -> bool:
    """Return whether a living process of this machine, or one of another machine, holds a run's lease."""
    holder = _read(run / FILE).get("holder") or {}
    return _alive(holder) or _elsewhere(holder)


def _beat_file(path: Path, token: int) -> Path:
    return path.with_name(f".lease-{token}.beat")


def _beats(path: Path, token: int) -> bool:
    """Watch another machine's heartbeat; return whether it moves within `DEAD_SECONDS`."""
    first, dead_at = _read(_beat_file(path, token)), time.monotonic() + DEAD_SECONDS
    while time.monotonic() < dead_at:
        if _read(_beat_file(path, token)) != first:
            return True
        time.sleep(0.5)
    return False


def _me() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "boot": _boot_id(),
        "host": socket.gethostname(),
    }


def _boot_id() -> str:
    linux = Path("/proc/sys/kernel/random/boot_id")
    return linux.read_text().strip() if linux.exists() else str(int(psutil.boot_time()))


def _alive(holder: dict[str, Any] | None) -> bool:
    if not holder or _elsewhere(holder) or holder["boot"] != _boot_id():
        return False
    try:
        process = psutil.Process(holder["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder["started"]) < 1
    except psutil.NoSuchProcess:
        return False


def _elsewhere(holder: dict[str, Any]) -> bool:
    return bool(holder) and holder["host"] != socket.gethostname()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content) + "\n")
