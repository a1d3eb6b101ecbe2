"""The lease: only one process at a time may write to a run's folder.

The lease names its holder by process id, start time and the machine's boot id, so on the same machine a dead holder is
recognised at once. A holder on another machine counts as dead when its heartbeat, a counter in a file, has not changed
for a minute by the reader's clock. File times and locks are not used, because network file systems do not keep them.
Each new holder gets a higher fencing token, which every manifest records.
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
KEEPER = "LORA_KIT_KEEPER"  # environment variable of training processes: the id of the keeper that holds the lease
START_REQUESTED = "LORA_KIT_START_REQUESTED"
"""Environment variable of training processes: the Unix time at which the keeper requested them. From it the start event
in events.jsonl gets the seconds that the fork or the imports took."""
PATIENCE_SECONDS = 0.25  # a killed process takes a moment to disappear
BEAT_SECONDS = 10.0  # the time between two heartbeats
DEAD_SECONDS = 60.0  # a holder on another machine counts as dead after so long without a heartbeat


@dataclass(frozen=True)
class Lease:
    """The right to write to a run's folder.

    Attributes:
        path: The lease file.
        token: The fencing token.
        borrowed: Whether the keeper of this process holds the lease and releases it.
        taken: The Unix time at which it was acquired.
    """

    path: Path
    token: int
    borrowed: bool = False
    taken: float = 0.0

    def is_ours(self) -> bool:
        """Return whether no other process has taken over the run."""
        return bool(_read(self.path).get("token") == self.token)

    def beat(self, count: int) -> None:
        """Show other machines that the holder is alive."""
        _write(_beat_file(self.path, self.token), {"beat": count})

    def release(self) -> None:
        """Remove the holder from the lease file; the token stays, so that the next token is higher."""
        if self.borrowed:
            return
        if self.is_ours():
            _write(self.path, {"token": self.token, "holder": None})
        _beat_file(self.path, self.token).unlink(missing_ok=True)


def inherited(run: Path) -> Lease | None:
    """Return the lease that the keeper of this process holds.

    The keeper announces itself in the environment variable `KEEPER`. None if this process has no keeper.
    """
    keeper, current = os.environ.get(KEEPER), _read(run / FILE)
    if keeper and (current.get("holder") or {}).get("pid") == int(keeper):
        return Lease(run / FILE, current["token"], borrowed=True, taken=current["taken"])
    return None


def take(run: Path, *, above: int = 0) -> Lease:
    """Acquire the lease of a run's folder for this process.

    Args:
        run: The run's folder.
        above: The newest fencing token in the run's checkpoints. The new token is higher than this token and than the
            token in the lease file, which may have been deleted.

    Raises:
        LeaseError: A living process holds the lease, on this machine or on another machine.
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
    token, reservation = _reserve_token(run, 1 + max(int(current.get("token", 0)), above))
    try:
        if _read(path) != current:
            raise LeaseError(f"{run}: another process has just begun to train here; wait for it, or use another --out")
        taken = round(time.time(), 3)
        _write(path, {"token": token, "taken": taken, "holder": _me()})
        for leftover in run.glob(".lease-*"):  # files of processes that were killed
            leftover.unlink(missing_ok=True)
    finally:
        reservation.unlink(missing_ok=True)
    return Lease(path, token, taken=taken)


def _reserve_token(run: Path, token: int) -> tuple[int, Path]:
    """Create the reservation file of the next free token; return the token and the file.

    Of several processes that see the same dead holder, only one can create the file. A process that is killed before it
    becomes the holder leaves its file behind; its token is then skipped.
    """
    while True:
        reservation = run / f".lease-{token}"
        try:
            descriptor = os.open(reservation, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError as error:
            if _owner_is_alive(reservation):
                raise LeaseError(
                    f"{run}: another process is just starting to train in this folder (it created {reservation}); "
                    "try again, or delete that file if the machine of that process no longer exists"
                ) from error
            token += 1
            continue
        with os.fdopen(descriptor, "w") as file:
            json.dump(_me(), file)
        return token, reservation


def _owner_is_alive(reservation: Path) -> bool:
    """Return whether the process that created a reservation file is alive; if the file stays empty, it is not."""
    patience, owner = time.monotonic() + PATIENCE_SECONDS, dict[str, Any]()
    while time.monotonic() < patience:
        with suppress(ValueError):
            owner = _read(reservation)
            if not _alive(owner) and not _elsewhere(owner):
                return False
        time.sleep(0.02)
    return bool(owner)


def is_held(run: Path) -> bool:
    """Return whether a living process on this machine, or any process on another machine, holds a run's lease."""
    holder = _read(run / FILE).get("holder") or {}
    return _alive(holder) or _elsewhere(holder)


def _beat_file(path: Path, token: int) -> Path:
    return path.with_name(f".lease-{token}.beat")


def _beats(path: Path, token: int) -> bool:
    """Watch the heartbeat of a holder on another machine; return whether it changes within `DEAD_SECONDS`."""
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
