"""Choose the remote of a URL; download a run from it, and upload to it: also the process that uploads during a run.

    python -m lora_kit.artifacts.remotes REQUEST

A process of its own, because a store may hang, and a library of a store may take the interpreter's lock for long: the
keeper must go on in both cases. The keeper writes a byte to its stdin when there is a new checkpoint. The end of stdin
asks it to upload what waits and to end. It reports on stdout, a line of JSON for each event.
"""

import json
import os
import re
import secrets
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lora_kit.artifacts.hub_remote import PROTOCOL, HubRemote
from lora_kit.data.urls import require_package
from lora_kit.errors import InputError, LeaseError, RemoteError
from lora_kit.files import cache_folder, private_folder
from lora_kit.host import end_with_parent
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import lease, live, store
from lora_kit.runs.file_remote import FileRemote
from lora_kit.runs.lease import Lease
from lora_kit.runs.remote import (
    NAME,
    Remote,
    Uploader,
    bring,
    checkpoint_of,
    read_outbox,
    restore,
)
from lora_kit.runs.remote import waiting as waiting_in
from lora_kit.supervise import oom
from lora_kit.supervise.stopping import STOP_SIGNALS
from lora_kit.supervise.uploads import Request

PUSH_FAILURES = 3  # after so many failed uploads `lora-kit push` gives up
LEAST_BYTES_PER_SECOND, LEAST_SECONDS = 50_000, 600  # an upload that is slower than this hangs, and its process ends
NICE = 10  # the priority of an upload: lower than that of training


def remote_at(url: str) -> Remote:
    """Return the remote of a URL.

    Raises:
        InputError: The protocol is unknown, or its package is not installed.
    """
    return HubRemote(url) if url.startswith(PROTOCOL) else FileRemote(url)


def require_remote(recipe: Recipe) -> None:
    """Refuse a recipe whose `checkpoint.remote` needs a package that is not installed. Connects to nothing.

    Raises:
        InputError: The message says which package to install.
    """
    if recipe.checkpoint.remote is not None:
        require_package(recipe.checkpoint.remote, "checkpoint.remote")


def restorer(recipe: Recipe, folder: Path, *, tell: Callable[[str], object]) -> Callable[[], None]:
    """Return a function that downloads the newest checkpoint of `checkpoint.remote` if the run's folder has no state.

    The function raises an InputError for a package that is missing, and a RemoteError if the URL cannot be read.
    """

    def download() -> None:
        url, region = recipe.checkpoint.remote, live.open_region(folder) if folder.is_dir() else None
        if url is None or (region is not None and region.snapshots()):
            return
        restore(remote_at(url), folder, tell=tell)

    return download


def fetch_url(url: str, *, tell: Callable[[str], object]) -> Path:
    """Download a checkpoint into the cache, verified, and return its folder.

    Args:
        url: A `checkpoint.remote`, for its newest valid checkpoint, or one of the folders in it.
        tell: Called with a message for each copy that is not used.

    Raises:
        RemoteError: There is no valid checkpoint, or the URL cannot be read.
    """
    place, _, name = url.rstrip("/").rpartition("/")
    one = NAME.fullmatch(name) is not None
    with private_folder(cache_folder("remote")) as folder:
        path = bring(
            remote_at(place if one else url),
            folder.path,
            lambda copy: re.sub(r"[^\w-]", "-", copy.name),
            tell=tell,
            only=name if one else None,
        )
    if path is None:
        raise RemoteError(f"{url}: no checkpoint there")
    return path


@dataclass(frozen=True)
class Sent:
    """The result of `send`: the step that is at the URL now, and whether this call has uploaded it."""

    step: int
    url: str
    made: bool


def send(run: Path, *, tell: Callable[[str], None]) -> Sent:
    """Upload the newest checkpoint of a run to its `checkpoint.remote`, as the run itself would have done.

    Args:
        run: The run's folder.
        tell: Called with messages for the user.

    Raises:
        InputError: The run has no `checkpoint.remote`, or trains at the moment.
        CheckpointError: The run has no valid checkpoint.
        RemoteError: The URL refuses the checkpoint or cannot be reached; the checkpoint stays in the outbox.
    """
    checkpoint = checkpoint_of(run)
    url = checkpoint.recipe.checkpoint.remote
    if url is None:
        raise InputError(
            f"{run}: its recipe has no checkpoint.remote; name a Hub repository to publish the adapter: --to user/name"
        )
    run_id = live.run_id_of(run) or secrets.token_hex(8)
    above = max(store.newest_token(run), live.newest_token(run_id))
    held = lease.take(run, run_id=run_id, above=above, tell=tell)
    try:
        remote, made = remote_at(url), list[int]()
        uploader = Uploader(
            run,
            remote,
            checkpoint.recipe.checkpoint.keep,
            require=held.require_now,
            on_upload=lambda **facts: made.append(facts["step"]),
        )
        uploader.hurry()
        for failures in range(1, PUSH_FAILURES + 1):
            if uploader.attempt():
                return Sent(checkpoint.step, url, bool(made))
            problem = outbox.problem if (outbox := read_outbox(run, url)) else ""
            tell(f"{problem}; attempt {failures} of {PUSH_FAILURES}")
            uploader.backoff.pause(uploader.backoff.seconds(failures) if failures < PUSH_FAILURES else 0)
    finally:
        held.release()
    raise RemoteError(f"{url}: step {checkpoint.step} was not uploaded: {problem}; to repeat it: lora-kit push {run}")


def upload_for(request: Request, parent: int) -> None:
    """Upload the checkpoints of a run until stdin ends, and then what waits.

    Args:
        request: What to upload, and where.
        parent: The process id of the keeper.
    """
    for number in STOP_SIGNALS:  # the keeper decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the keeper has ended")
    os.nice(NICE)
    oom.offer_to_the_oom_killer(os.getpid())  # rather than training, which it can do without
    held = Lease.borrowed_from(request.lease)
    uploader = Uploader(
        held.run,
        remote_at(request.url),
        request.keep,
        require=held.require_now,
        on_upload=lambda **facts: _report(uploaded=facts),
        on_fault=lambda text: _report(fault=text),
    )
    ending = False
    while True:
        seconds = uploader.seconds_left()
        if ending and seconds is None:
            return
        if seconds != 0:
            if ending:
                select.select([], [], [], seconds)
            elif select.select([sys.stdin], [], [], seconds)[0] and not os.read(sys.stdin.fileno(), 1 << 16):
                ending = True
                uploader.hurry()
            continue
        found = waiting_in(held.run, request.url)
        size = sum(entry.size for entry in found.manifest.files.values()) if found else 0
        signal.alarm(LEAST_SECONDS + size // LEAST_BYTES_PER_SECOND)  # SIGALRM ends this process
        uploader.attempt()
        signal.alarm(0)


def _report(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    try:
        upload_for(TypeAdapter(Request).validate_json(sys.argv[1]), int(sys.argv[2]))
    except LeaseError as error:
        sys.exit(error.exit_code)
