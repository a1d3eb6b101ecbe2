"""One writer for a run's folder, proven by a lease with a fencing token.

The lease names its holder by process id, that process's start time and the machine's boot id, so a dead holder is known
to be dead at once, without clocks. Each new holder gets a higher token, and every manifest carries it.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lora_kit.errors import LeaseError

FILE = "lease.json"
PATIENCE_SECONDS = 0.5  # a killed holder takes a moment to be gone


@dataclass(frozen=True)
class Lease:
    """The right to write to a run's folder."""

    path: Path
    token: int

    def release(self) -> None:
        """Leave the token behind, so that the next one is higher, but no holder."""
        if _read(self.path).get("token") == self.token:
            _write(self.path, {"token": self.token, "holder": None})


def take(run: Path) -> Lease:
    """Take the lease of a run's folder for this process.

    Raises:
        LeaseError: A living process holds it, here or on another machine.
    """
    path = run / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = time.monotonic() + PATIENCE_SECONDS
    while _alive((current := _read(path)).get("holder")) and time.monotonic() < patience:
        time.sleep(0.02)
    holder = current.get("holder") or {}
    if _alive(holder):
        raise LeaseError(
            f"{run}: process {holder['pid']} on {holder['host']} is training here; wait for it, stop it, or use "
            f"another --out (if that machine is gone, delete {path})"
        )
    token = int(current.get("token", 0)) + 1
    claim = run / f".lease-{token}"  # of two that see the same dead holder, only one can create this
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError as error:
        raise LeaseError(
            f"{run}: another process is starting here at this moment (it made {claim}); try again"
        ) from error
    _write(path, {"token": token, "holder": _me()})
    claim.unlink()
    return Lease(path, token)


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
    if not holder:
        return False
    if holder["host"] != socket.gethostname():
        return True
    if holder["boot"] != _boot_id():
        return False
    try:
        process = psutil.Process(holder["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder["started"]) < 1
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)
