"""Who a process is, and whether another process is alive.

The kernel gives the answers: boot id, PID namespace, process id, and the start in clock ticks since boot. Steps of the
wall clock change none of them. A process on another machine, in another PID namespace (a container) or hidden by the
mount option hidepid cannot be inspected from here; it is `ELSEWHERE`, and only its heartbeat shows that it is alive.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

ENDED = ("Z", "X")  # states in /proc/PID/stat: zombie, dead


@dataclass(frozen=True)
class Identity:
    """A process. No two processes are equal in all fields.

    Attributes:
        host: The name of its machine.
        boot: The machine's boot id, random at every boot.
        namespaces: Its PID namespace, in which `pid` counts, and its time namespace, in which `started` counts.
        pid: Its process id.
        started: Its start, in clock ticks since boot.
    """

    host: str
    boot: str
    namespaces: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    started: Annotated[int, Field(ge=0, lt=2**63)]

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


IDENTITY = TypeAdapter(Identity)


class Life(Enum):
    """Whether a process is alive, as far as this process can see."""

    ALIVE = "alive"
    DEAD = "dead"
    ELSEWHERE = "elsewhere"


def own_identity() -> Identity:
    """Return the identity of this process."""
    boot, links = "", list[str]()
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for name in ("pid", "time"):
        with suppress(OSError):  # a kernel without time namespaces
            links.append(str(Path(f"/proc/self/ns/{name}").readlink()))
    state = process_state("self")
    return Identity(socket.gethostname(), boot, " ".join(links), os.getpid(), state[1] if state else 0)


def life_of(other: Identity) -> Life:
    """Return whether a process is alive, dead, or cannot be inspected from here."""
    own = own_identity()
    if (other.host, other.boot, other.namespaces) != (own.host, own.boot, own.namespaces) or not _sees_own_namespace():
        return Life.ELSEWHERE
    state = process_state(other.pid)
    if state is not None:
        return Life.ALIVE if state[1] == other.started and state[0] not in ENDED else Life.DEAD
    try:
        os.kill(other.pid, 0)
    except ProcessLookupError:
        return Life.DEAD
    except PermissionError:
        pass  # the process of another user, whose /proc folder hidepid hides
    return Life.ELSEWHERE


def process_state(process: int | str) -> tuple[str, int] | None:
    """Return the state letter of a process and its start in clock ticks; None if /proc does not show it.

    Source: proc_pid_stat(5), fields 3 and 22. Field 2 is the program's name in parentheses, which may contain any
    character.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19])


def _sees_own_namespace() -> bool:
    """Return whether /proc counts processes as this process does. A container may have the /proc of its parent."""
    try:
        return Path("/proc/self").readlink().name == str(os.getpid())
    except OSError:
        return False
