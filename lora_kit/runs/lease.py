"""The lease: only one process at a time may write to a run's folder.

`lease.json` names the holder by its `Identity` and a fencing token, which grows with every lease and which every
manifest records. The holder also counts in the file `.lease-TOKEN`: its heartbeat. A holder that can be inspected is
alive or dead at once. A holder elsewhere, such as on another machine or in another container, counts as dead when its
heartbeat has not changed for a minute. Such a holder may only have been paused, so it reads `lease.json` again before
it writes: if the file does not say exactly what the holder wrote, the lease is lost and the holder ends. File times,
clocks and file locks are not used, because machines do not agree on them.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.files import read_regular, sync_folder, write_atomically
from lora_kit.runs import formats
from lora_kit.runs.formats import Amount, RunId, Token
from lora_kit.runs.identity import IDENTITY, Identity, Life, life_of, own_identity

FILE = "lease.json"
KEEPER = "LORA_KIT_KEEPER"  # environment variable of training processes: the lease that their keeper holds, as JSON
START_REQUESTED = "LORA_KIT_START_REQUESTED"
"""Environment variable of training processes: the Unix time at which the keeper requested them. From it the start event
in events.jsonl gets the seconds that the fork or the imports took."""
PATIENCE_SECONDS = 0.25  # a killed process takes a moment to disappear
BEAT_SECONDS = 2.0  # the time between two heartbeats
DEAD_SECONDS = 60.0  # a holder elsewhere counts as dead after so long without a heartbeat
FENCE_SECONDS = 1.0  # a lease that was held so recently is still held: nobody can take it over that fast
MOST_BYTES = 1 << 16
MOST_TOKEN = 1 << 61


@dataclass(frozen=True)
class Record:
    """The content of lease.json.

    Attributes:
        token: The fencing token.
        run_id: The run's id.
        taken: The Unix time at which the lease was acquired.
        holder: Who holds it; None after its release.
    """

    token: Token
    run_id: RunId
    taken: Amount
    holder: Identity | None


@dataclass(frozen=True)
class Lease:
    """The right to write to a run's folder.

    Attributes:
        path: The lease file.
        record: What this lease wrote into the file. While the file says exactly this, the lease is held.
        borrowed: Whether the keeper of this process holds the lease and releases it.
    """

    path: Path
    record: Record
    borrowed: bool = False

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.parent

    @property
    def token(self) -> int:
        """The fencing token."""
        return self.record.token

    def to_json(self) -> str:
        """Return the lease as JSON, for a process that works for its holder."""
        return _LEASE.dump_json(replace(self, path=self.path.absolute())).decode()

    @staticmethod
    def borrowed_from(text: str) -> "Lease":
        """Return the lease that its holder has given to this process as JSON."""
        return replace(_LEASE.validate_json(text), borrowed=True)

    def loss(self) -> str:
        """Return why the lease is not held any more; empty while it is held.

        Raises:
            OSError: The file cannot be read at the moment.
        """
        try:
            current = read(self.path)
        except CheckpointError as error:
            return str(error)
        if current is None:
            return f"{self.path} was deleted"
        if current == self.record:
            return ""
        return f"{current.holder or 'another process, which has ended,'} has taken over this run"

    def is_ours(self) -> bool:
        """Return whether the lease is still held."""
        return not self.loss()

    def require(self) -> None:
        """Check that the lease is still held. A file that cannot be read at the moment is no evidence that it is not.

        Raises:
            LeaseError: The lease is lost.
        """
        with suppress(OSError):
            self.require_now()

    def require_now(self) -> None:
        """Check that the lease is still held, and that this is certain.

        Raises:
            LeaseError: The lease is lost.
            OSError: The file cannot be read at the moment.
        """
        if loss := self.loss():
            raise lost(self.run, loss)

    def release(self) -> None:
        """Remove the holder from the lease file; the token stays, so that the next token is higher."""
        if self.borrowed or not self.is_ours():
            return
        _write(self.path, replace(self.record, holder=None))
        _beat_file(self.run, self.token).unlink(missing_ok=True)


RECORD, _LEASE = TypeAdapter(Record), TypeAdapter(Lease)


def lost(run: Path, loss: str) -> LeaseError:
    """Return the error that ends every process that worked under a lease."""
    return LeaseError(
        f"{run}: the lease of this start is lost: {loss}; this start ends and writes nothing more. If no other job "
        "trains here, the same command resumes the run"
    )


class Fence:
    """Raises a LeaseError once a lease is lost. Calling it is cheap: it reads the file at most once a second."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._held = lease, -FENCE_SECONDS

    def __call__(self) -> None:
        """Check the lease.

        Raises:
            LeaseError: The lease is lost.
        """
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # also counts while the machine sleeps
        if now - self._held >= FENCE_SECONDS:
            self._lease.require()
            self._held = now


class Heart(threading.Thread):
    """Shows others that the holder is alive, and notices when the lease is lost. It ends when the lease is released.

    It is a thread of its own because writing a checkpoint to slow storage may take minutes.

    Attributes:
        loss: Why the lease is lost; empty while it is held.
    """

    def __init__(self, lease: Lease) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._lease, self.loss = lease, ""
        self.start()

    def run(self) -> None:
        """Count in the heartbeat's file while the lease is held."""
        beats = 0
        while not self.loss:
            with suppress(OSError):
                self.loss = self._lease.loss()
                if not self.loss:
                    beats += 1
                    _beat(self._lease.run, self._lease.token, beats)
            time.sleep(BEAT_SECONDS)


def read(path: Path) -> Record | None:
    """Return the content of a lease file; None if there is none.

    Raises:
        CheckpointError: The content is not valid.
        OSError: The file cannot be read.
    """
    try:
        return formats.parse(RECORD, read_regular(path, MOST_BYTES), path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def borrowed_lease() -> Lease | None:
    """Return the lease that the environment names; None if this process has no keeper that holds one."""
    try:
        return Lease.borrowed_from(os.environ.get(KEEPER, ""))
    except ValidationError:
        return None


def inherited(run: Path) -> Lease | None:
    """Return the lease that the keeper of this process holds; None if this process has no keeper for this run.

    Raises:
        LeaseError: The keeper has lost the lease.
    """
    lease = borrowed_lease()
    if lease is None or lease.run.resolve() != run.resolve():
        return None
    lease.require()
    return lease


def take(run: Path, *, run_id: str, above: int = 0, tell: Callable[[str], None] = lambda text: None) -> Lease:
    """Acquire the lease of a run's folder for this process, and start its heartbeat.

    Of several processes that see the same dead holder only one gets the next token: it creates the file
    `.lease-TOKEN`, and then checks again that `lease.json` is unchanged.

    Args:
        run: The run's folder.
        run_id: The run's id.
        above: The highest fencing token in the run's checkpoints and live region. The new token is higher than this
            token and than the token in the lease file, which may have been deleted or restored from a backup.
        tell: Called with a message for the user, also before a long wait.

    Raises:
        LeaseError: A living process holds the lease, here or elsewhere.
        OSError: The folder cannot be read or written.
    """
    path = run / FILE
    run.mkdir(parents=True, exist_ok=True)
    while True:
        before = _read_or_tell(path, tell)
        token = before.token if before else 0
        claims = sorted(number for file in run.glob(".lease-*") if (number := _number(file)) > token)
        for claim in claims:
            _refuse_if_alive(run, _claimant(run, claim), claim, tell)
        if before and before.holder:
            _refuse_if_alive(run, before.holder, token, tell)
        token = 1 + max(token, above, *claims)
        if token >= MOST_TOKEN:
            raise LeaseError(f"{run}: it has seen the fencing token {token - 1}, above which there is none; remove it")
        record = Record(token, run_id, round(time.time(), 3), own_identity())
        if not _claim(run, token, own_identity()):
            continue  # another process was quicker
        if _read_or_tell(path, lambda text: None) != before:
            _beat_file(run, token).unlink(missing_ok=True)
            continue
        _write(path, record)
        lease = Lease(path, record)
        # another process took the lease while this one was paused above
        if any(_number(file) > token for file in run.glob(".lease-*")):
            raise lost(run, "another process is just starting to train here")
        Heart(lease)
        for file in run.glob(".lease-*"):  # files of processes that were killed
            if _number(file) < token:
                file.unlink(missing_ok=True)
        return lease


def is_held(run: Path) -> bool:
    """Return whether a living process holds a run's lease; for a holder elsewhere, wait for a heartbeat."""
    with suppress(CheckpointError, OSError):
        record = read(run / FILE)
        if record and record.holder:
            life = life_of(record.holder)
            return life is Life.ALIVE or (life is Life.ELSEWHERE and _beats(run, record.token, 2.5 * BEAT_SECONDS))
    return False


def _read_or_tell(path: Path, tell: Callable[[str], None]) -> Record | None:
    try:
        return read(path)
    except CheckpointError as error:
        tell(f"{error}; it counts as absent")
        return None


def _refuse_if_alive(run: Path, holder: Identity | None, token: int, tell: Callable[[str], None]) -> None:
    """Raise a LeaseError if a holder is alive; for a holder elsewhere, watch its heartbeat."""
    who, patience = holder or "another process", time.monotonic() + PATIENCE_SECONDS
    while (life := life_of(holder) if holder else Life.ELSEWHERE) is Life.ALIVE and time.monotonic() < patience:
        time.sleep(0.02)
    if life is Life.ELSEWHERE:
        tell(f"{run}: {who} has trained here and cannot be inspected from here; waiting up to {DEAD_SECONDS:.0f} s "
             "for its heartbeat")  # fmt: skip
    if life is Life.ALIVE or (life is Life.ELSEWHERE and _beats(run, token, DEAD_SECONDS)):
        raise LeaseError(f"{run}: {who} is training here; wait for it, stop it, or use another --out")


def _beats(run: Path, token: int, seconds: float) -> bool:
    """Watch the heartbeat of a holder elsewhere; return whether it changes within so many seconds.

    Time in which this process was paused does not count. A heartbeat that disappears shows a release.
    """
    first, silent, looked = _heartbeat(run, token), 0.0, time.monotonic()
    while silent < seconds:
        time.sleep(min(0.5, seconds))
        silent, looked = silent + min(time.monotonic() - looked, 1.0), time.monotonic()
        if (current := _heartbeat(run, token)) != first:
            return current != b""
    return False


def _beat_file(run: Path, token: int) -> Path:
    return run / f".lease-{token}"


def _number(path: Path) -> int:
    text = path.name.removeprefix(".lease-")
    return int(text) if text.isdecimal() and len(text) < 19 else 0


def _claim(run: Path, token: int, holder: Identity) -> bool:
    """Create the file of a token; return False if it exists."""
    try:
        descriptor = os.open(_beat_file(run, token), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, f"{0:020d}\n".encode() + IDENTITY.dump_json(holder))
    finally:
        os.close(descriptor)
    return True


def _claimant(run: Path, token: int) -> Identity | None:
    with suppress(CheckpointError):
        return formats.parse(IDENTITY, _heartbeat(run, token).partition(b"\n")[2], _beat_file(run, token))
    return None  # the process was killed before it wrote its identity


def _beat(run: Path, token: int, count: int) -> None:
    """Write a count over the last one, which needs no space on a full disk. It is not synced, which may be slow."""
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no link, and no waiting at a FIFO
    descriptor = os.open(_beat_file(run, token), flags)
    try:
        os.write(descriptor, f"{count:020d}".encode())
    finally:
        os.close(descriptor)


def _heartbeat(run: Path, token: int) -> bytes:
    """Return the content of a heartbeat's file; empty if there is none."""
    try:
        return read_regular(_beat_file(run, token), MOST_BYTES)
    except FileNotFoundError:
        return b""


def _write(path: Path, record: Record) -> None:
    write_atomically(path, RECORD.dump_json(record) + b"\n")
    with suppress(OSError):  # the lease is held even if only the file itself is synced
        sync_folder(path.parent)
