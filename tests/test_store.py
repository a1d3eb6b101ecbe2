"""A checkpoint is there whole or not at all, and nothing that was damaged is ever taken for one."""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from manifests import files_of, run_facts, step_facts
from runs import WAIT_SECONDS, started
from safetensors.numpy import save
from typer.testing import CliRunner

from lora_kit import files
from lora_kit.cli import app
from lora_kit.errors import CheckpointError, ContractError, InputError, LeaseError, LoraKitError
from lora_kit.files import write_atomically
from lora_kit.runs import store
from lora_kit.runs.journal import Journal
from lora_kit.runs.layout import Layout
from lora_kit.runs.lease import is_held
from lora_kit.runs.live import Live
from lora_kit.runs.manifest import FORMAT, Manifest, manifest_bytes
from lora_kit.runs.resume import Candidate, choose_state, go_back, hold_run, open_run, take_over
from lora_kit.runs.status import checkpoints
from lora_kit.runs.store import find, folders, open_checkpoint, prune, set_aside, sweep

FILES = files_of()
SIZES = {name: sum(map(len, pieces)) for name, pieces in FILES.items()}


def commit(run, files, step, token=1, **changes):
    """Commit a checkpoint of a run that was never trained."""
    return store.commit(run, files, run_facts(fencing_token=token), step_facts(step, **changes))


def test_a_commit_reads_back_as_it_was_written(tmp_path):
    made = commit(tmp_path, FILES, 120)
    assert made.path.name == "step-00000120"
    read = open_checkpoint(made.path)
    assert (read.step, read.manifest, read.size) == (120, made.manifest, sum(SIZES.values()))
    assert json.loads((made.path / "manifest.json").read_text())["format"] == FORMAT
    assert {name: (made.path / name).read_bytes() for name in FILES} == {name: b"".join(FILES[name]) for name in FILES}
    assert sorted(path.name for path in made.path.iterdir()) == sorted([*FILES, "manifest.json"])
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_every_single_bit_flip_is_found(tmp_path, name):
    path = commit(tmp_path, FILES, 1).path
    whole = (path / name).read_bytes()
    rng = random.Random(name)
    for _ in range(40):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(path)
    (path / name).write_bytes(whole)
    open_checkpoint(path)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_every_truncation_and_a_missing_file_are_found(tmp_path, name):
    path = commit(tmp_path, FILES, 1).path
    whole = (path / name).read_bytes()
    for length in {0, 1, len(whole) // 2, len(whole) - 1}:
        (path / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        open_checkpoint(path)


def test_the_message_names_the_file_and_both_sizes(tmp_path):
    path = commit(tmp_path, FILES, 1).path
    size = SIZES["optimizer.safetensors"]
    (path / "optimizer.safetensors").write_bytes(bytes(size - 1))
    with pytest.raises(CheckpointError, match=rf"optimizer\.safetensors: {size - 1} bytes, the manifest says {size}"):
        open_checkpoint(path)


@pytest.mark.quick
def test_latest_is_the_newest_that_verifies(tmp_path):
    for step in (10, 20, 30):
        commit(tmp_path, FILES, step)
    (tmp_path / "checkpoints/step-00000030/adapter_config.json").unlink()
    found = find(tmp_path)
    assert found.latest is not None and found.latest.step == 20
    assert [path.name for path in found.broken] == ["step-00000030"]
    assert (tmp_path / "checkpoints/step-00000030").exists(), "looking moves nothing"


@pytest.mark.quick
def test_a_newer_token_is_newer_than_a_later_step(tmp_path):
    commit(tmp_path, FILES, 10, token=5)
    for step in (11, 12, 13):
        commit(tmp_path, FILES, step, token=3)  # of a job that had been replaced
    assert find(tmp_path).latest.step == 10
    prune(tmp_path, 2)
    assert [path.name[-2:] for path in folders(tmp_path)] == ["13", "10"], "the newest stay, by token first"


def test_going_back_to_a_checkpoint_of_an_earlier_start_sets_aside_what_is_newer(tmp_path):
    commit(tmp_path, FILES, 10, token=5)
    target = commit(tmp_path, FILES, 12, token=3)
    run = open_run(tmp_path, target.path)
    notices = go_back(run)
    run.lease.release()
    assert len(notices) == 1 and "going back to step 12; step-00000010 is kept in" in notices[0]
    assert find(tmp_path).latest.step == 12


class Unreadable(io.BufferedReader):
    """A file on a disk that fails."""

    def read(self, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    readinto = readline = read


def failing_disk(monkeypatch, name):
    """Let every read of a file of this name in the newest checkpoint fail."""

    fdopen = os.fdopen

    def opened(descriptor, mode):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        broken = path.name == name and path.parent.name == "step-00000030"
        return Unreadable(io.FileIO(descriptor)) if broken else fdopen(descriptor, mode)

    monkeypatch.setattr(files.os, "fdopen", opened)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_disk_that_fails_makes_a_checkpoint_not_valid_and_the_next_older_is_used(tmp_path, monkeypatch, name):
    for step in (10, 20, 30):
        commit(tmp_path, FILES, step)
    failing_disk(monkeypatch, name)
    found = find(tmp_path)
    (reason,) = found.broken.values()
    assert found.latest.step == 20 and f"{name}: cannot be read: Input/output error" in reason
    assert [entry["valid"] for entry in checkpoints(tmp_path)] == [False, True, True]
    lease, notices = take_over(tmp_path)
    lease.release()
    assert len(notices) == 1 and "falling back to step 20" in notices[0]


def fifo(path):
    os.mkfifo(path)


def link(path):
    path.symlink_to("/etc/passwd")


def link_to_memory(path):
    path.symlink_to("/proc/self/mem")


def socket_file(path):
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(os.path.relpath(path))


@pytest.mark.parametrize("other", [fifo, link, link_to_memory, socket_file, Path.mkdir])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_what_is_no_regular_file_is_not_waited_for_and_not_followed(tmp_path, monkeypatch, name, other):
    monkeypatch.chdir(tmp_path)
    for step in (10, 20):
        commit(tmp_path, FILES, step)
    path = tmp_path / "checkpoints" / "step-00000020" / name
    path.unlink()
    other(path)
    found = find(tmp_path)
    (reason,) = found.broken.values()
    assert found.latest.step == 10 and f"{name}: cannot be read: not a regular file" in reason
    assert CliRunner().invoke(app, ["verify", str(path.parent)]).exit_code == 1


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path):
    cached, made = tmp_path / "models--me--x" / "snapshots" / "c0ffee", commit(tmp_path, FILES, 1).path
    blobs = cached.parents[1] / "blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    for file in made.iterdir():
        file.rename(blobs / f"{file.name}.blob")
        (cached / file.name).symlink_to(f"../../blobs/{file.name}.blob")
    assert open_checkpoint(cached).step == 1
    (tmp_path / "elsewhere").mkdir()
    for name in ("manifest.json", *FILES):
        (blobs / f"{name}.blob").rename(tmp_path / "elsewhere" / name)
        (blobs / f"{name}.blob").symlink_to(tmp_path / "elsewhere" / name)
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read: not a regular file"):
            open_checkpoint(cached)
        (blobs / f"{name}.blob").unlink()
        (tmp_path / "elsewhere" / name).rename(blobs / f"{name}.blob")


def forge(path, **changes):
    """Seal a manifest again after its keys were changed, as anyone can."""
    content = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(manifest_bytes(content | changes))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], r"adapter_model\.safetensors: not listed in the manifest"),
        (["adapter_model.safetensors", "adapter_config.json"], r"optimizer\.safetensors: not listed"),
        (["../../../outside"], "not the name of a file in this folder"),
        (["/proc/self/environ"], "not the name of a file in this folder"),
        ([".."], "not the name of a file in this folder"),
        (["a\0b"], "not the name of a file in this folder"),
    ],
)
def test_a_manifest_lists_the_required_files_by_plain_names(tmp_path, names, problem):
    path = commit(tmp_path, FILES, 1).path
    (tmp_path / "outside").write_bytes(b"")
    entries = json.loads((path / "manifest.json").read_bytes())["files"]
    empty = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    forge(path, files={name: entries.get(name, empty) for name in names})
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(path)


def test_a_checkpoint_without_moments_is_valid_outside_of_a_run(tmp_path):
    path = commit(tmp_path, FILES, 1).path
    entries = json.loads((path / "manifest.json").read_bytes())["files"]
    forge(path, files={name: entry for name, entry in entries.items() if name != "optimizer.safetensors"})
    assert open_checkpoint(path.rename(tmp_path / "published")).step == 1


def test_a_checkpoint_in_the_folder_of_another_step_is_not_valid(tmp_path):
    path = commit(tmp_path, FILES, 1).path.rename(tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(CheckpointError, match=r"it is of step 1, not of the step in the folder's name"):
        open_checkpoint(path)


HALF = store.headers_of(Layout({"A": (30,), "B": (30,)}))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("adapter_model.safetensors", b"no tensors", r"adapter_model\.safetensors: cannot be read: "),
        ("adapter_model.safetensors", save({"A": np.zeros(4, np.float16)}), "its tensors are F16, expected F32"),
        ("adapter_model.safetensors", save({}), "its tensors are missing, expected F32"),
        ("optimizer.safetensors", HALF["optimizer.safetensors"] + bytes(480), r"expected the moments of 80 weights"),
        ("optimizer.safetensors", save({"exp_avg": np.zeros(80, np.float32)}), "expected the moments of 80 weights"),
        ("adapter_config.json", b"{}", "base_model_name_or_path: Field required"),
        ("adapter_config.json", b"[" * 100_000, "recursion limit exceeded"),
    ],
)
def test_the_files_of_a_checkpoint_hold_the_tensors_of_an_adapter(tmp_path, name, content, problem):
    path = commit(tmp_path, FILES | {name: [content]}, 1).path
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(path)


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(tmp_path, monkeypatch):
    commit(tmp_path, FILES, 1)

    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "iterdir", failing)
    with pytest.raises(CheckpointError, match="checkpoints: cannot be listed: Input/output error"):
        find(tmp_path)


def test_a_damaged_checkpoint_that_cannot_be_moved_is_told_and_the_one_before_is_used(tmp_path, monkeypatch):
    for step in (10, 20):
        commit(tmp_path, FILES, step)
    (tmp_path / "checkpoints" / "step-00000020" / "adapter_config.json").unlink()

    def failing(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(store, "set_aside", failing)
    lease, (notice,) = take_over(tmp_path)
    lease.release()
    assert "could not be moved to quarantine (Operation not permitted), falling back to step 10" in notice


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    monkeypatch.setattr(Path, "replace", lambda one, other: (calls.append(other), replace(one, other)))
    write_atomically(tmp_path / "lease.json", "{}")
    assert [path.name[:7] for path in calls] == [".lease.", "lease.j"]


def test_a_folder_that_was_never_committed_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    assert find(tmp_path).latest is None


def test_a_manifest_of_another_format_is_refused_with_both_versions(tmp_path):
    path = commit(tmp_path, FILES, 1).path
    content = json.loads((path / "manifest.json").read_bytes()) | {"format": 99}
    (path / "manifest.json").write_bytes(manifest_bytes(content))
    with pytest.raises(CheckpointError, match="format 99, this lora_kit reads 1"):
        open_checkpoint(path)


def test_a_run_with_a_newer_checkpoint_of_another_version_is_not_resumed_from_an_older_one(tmp_path):
    commit(tmp_path, FILES, 1)
    path = commit(tmp_path, FILES, 2).path
    content = json.loads((path / "manifest.json").read_bytes()) | {"format": 99}
    (path / "manifest.json").write_bytes(manifest_bytes(content))
    with pytest.raises(InputError, match=r"format 99, .*resume with the version that wrote it, .*go on from step 1"):
        open_run(tmp_path)
    assert path.is_dir() and not is_held(tmp_path)
    path.rename(tmp_path / "elsewhere")
    run = open_run(tmp_path)
    run.lease.release()
    assert run.latest.step == 1


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    commit(one, FILES, 1)
    open_run(one).lease.release()
    store.commit(other, FILES, run_facts(run_id="other", fencing_token=9), step_facts(2))
    copied = shutil.copytree(other / "checkpoints/step-00000002", one / "checkpoints/step-00000002")
    with pytest.raises(ContractError, match=r"step-00000002: a checkpoint of another run \(other; .* the run r\)"):
        open_run(one)
    assert copied.is_dir() and not is_held(one)
    with pytest.raises(ContractError, match="a checkpoint of another run"):
        open_run(one, copied)


@pytest.mark.parametrize(
    ("memories", "expected"),  # (fencing token, step) of the snapshot of each machine; a checkpoint has (1, 4)
    [
        ([None, (1, 5)], (5, 1)),
        ([(1, 6), (1, 5)], (6, 0)),
        ([(1, 5), (1, 6)], (6, 1)),
        ([(2, 3), (1, 9)], (3, 0)),
        ([None, (1, 3)], (4, 0)),
        ([None, None], (4, 0)),
    ],
)
def test_of_all_machines_the_newest_state_by_token_and_step_is_used(tmp_path, memories, expected):
    commit(tmp_path, FILES, 4)
    held = hold_run(tmp_path)
    candidates = []
    for process, order in enumerate(memories):
        found = None
        if order:
            manifest = Manifest(run_facts(fencing_token=order[0]), step_facts(order[1]), {})
            found = Live(tmp_path / "region", 0, {}, manifest)
        candidates.append(Candidate(process, found, ()))
    run = choose_state(held, candidates)
    run.lease.release()
    assert (run.latest.step, run.loaded_by) == expected


def test_a_recipe_of_another_version_is_refused_by_its_fields(tmp_path):
    recipe = {"base": {"repo": "a/b"}, "data": {"train": "c"}, "train": {"steps": 1}}
    assert store.commit(tmp_path, FILES, run_facts(recipe=recipe), step_facts(1)).recipe.base.repo == "a/b"
    later = recipe | {"adapter": {"shape": "wide"}, "train": {}}
    made = store.commit(tmp_path, FILES, run_facts(recipe=later, versions={"lora_kit": "9.0"}), step_facts(2))
    with pytest.raises(CheckpointError, match=r"adapter\.shape: Extra inputs .*train: .*use lora_kit 9\.0, which"):
        assert made.recipe


def test_a_second_commit_of_the_same_state_takes_the_firsts_place(tmp_path):
    commit(tmp_path, FILES, 7)
    commit(tmp_path, FILES, 7, held_out_loss=0.5)
    assert open_checkpoint(tmp_path / "checkpoints/step-00000007").manifest.progress.held_out_loss == 0.5
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]


def test_a_second_commit_of_a_step_with_another_state_sets_the_first_aside(tmp_path):
    commit(tmp_path, files_of(1), 7, token=1)
    commit(tmp_path, FILES, 7, token=2)
    assert open_checkpoint(tmp_path / "checkpoints/step-00000007").manifest.run.fencing_token == 2
    quarantine = tmp_path / "checkpoints/.quarantine"
    assert open_checkpoint(quarantine / "step-00000007.1").manifest.run.fencing_token == 1
    assert "same step" in (quarantine / "step-00000007.1.reason.txt").read_text()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_power_cut_in_a_repeated_commit_never_loses_both_copies(tmp_path, monkeypatch, exchange, same):
    """Every rename of the commit is the last one before the cut once."""
    before, after = (FILES, FILES if same else files_of(1))
    if not exchange:
        monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    cut = 0
    while True:
        run, done = tmp_path / str(cut), []

        def counted(function, done=done, cut=cut):
            def call(*arguments, **named):
                if len(done) == cut:
                    raise PowerCut
                done.append(arguments)
                return function(*arguments, **named)

            return call

        commit(run, before, 7)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", counted(Path.rename))
            patched.setattr(store, "_exchange", counted(store._exchange))
            patched.setattr(store.shutil, "rmtree", counted(shutil.rmtree))
            try:
                commit(run, after, 7, token=2, held_out_loss=0.5)
                ended = True
            except PowerCut:
                ended = False
        sweep(run)
        assert open_checkpoint(run / "checkpoints/step-00000007")
        assert not list((run / "checkpoints").glob(".tmp-*"))
        if ended:
            break
        cut += 1
    assert cut >= 3  # renames, exchanges and deletions


class PowerCut(BaseException):
    """The machine goes down."""


def test_a_checkpoint_in_a_lower_layer_of_an_overlay_is_set_aside_by_copying(tmp_path):
    below, upper, work, merged = (tmp_path / name for name in ("below", "upper", "work", "merged"))
    for folder in (upper, work, merged):
        folder.mkdir()
    for step in (1, 7):
        commit(below, FILES, step)
    options = f"lowerdir={below},upperdir={upper},workdir={work},redirect_dir=off"
    command = ["mount", "-t", "overlay", "-o", options, "overlay", merged]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no overlay can be mounted here: {mounted.stderr.strip()}")
    try:
        checkpoints = merged / "checkpoints"
        with pytest.raises(OSError, match="Invalid cross-device link"):
            (checkpoints / "step-00000001").rename(checkpoints / "x")
        assert open_checkpoint(set_aside(merged, checkpoints / "step-00000001", "test")).step == 1
        commit(merged, FILES, 7, held_out_loss=0.5)
        assert open_checkpoint(checkpoints / "step-00000007").manifest.progress.held_out_loss == 0.5
        commit(merged, files_of(1), 7)
        assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000007"]
    finally:
        subprocess.run(["umount", merged], check=True)


def test_setting_aside_never_overwrites(tmp_path):
    for _ in range(3):
        (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
        set_aside(tmp_path, tmp_path / "checkpoints/step-00000001", "test")
    assert len(list((tmp_path / "checkpoints/.quarantine").glob("step-*.[123]"))) == 3


@pytest.mark.quick
def test_pruning_keeps_the_newest_and_never_fewer_than_two(tmp_path):
    for step in range(1, 6):
        commit(tmp_path, FILES, step)
    prune(tmp_path, 3)
    assert [path.name[-1] for path in folders(tmp_path)] == ["5", "4", "3"]
    prune(tmp_path, 1)
    assert [path.name[-1] for path in folders(tmp_path)] == ["5", "4"]


def test_a_job_that_is_overtaken_while_it_prunes_deletes_nothing_more(tmp_path):
    """It may be paused between two deletions."""
    checks = iter([None, LeaseError("overtaken")])

    def require():
        if (error := next(checks)) is not None:
            raise error

    for step in range(1, 6):
        commit(tmp_path, FILES, step)
    with pytest.raises(LeaseError, match="overtaken"):
        store.prune(tmp_path, 2, require=require)
    assert [path.name[-1] for path in store.folders(tmp_path)] == ["5", "4", "2", "1"]


def test_nothing_is_pruned_while_the_newest_does_not_verify(tmp_path):
    for step in range(1, 6):
        commit(tmp_path, FILES, step)
    (tmp_path / "checkpoints/step-00000005/optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError):
        prune(tmp_path, 2)
    assert len(folders(tmp_path)) == 5


def test_a_full_disk_says_so_and_leaves_what_was_there(tmp_path, monkeypatch):
    commit(tmp_path, FILES, 1)
    monkeypatch.setattr(os, "fsync", full_disk)
    needed = sum(SIZES.values())
    with pytest.raises(CheckpointError, match=rf"No space left on device \({needed:,} bytes needed\); earlier"):
        commit(tmp_path, FILES, 2)
    assert find(tmp_path).latest.step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from manifests import files_of, run_facts, step_facts
from lora_kit.runs import store
files = files_of(shapes={"A": (75_000,)})
for step in range(1, 10**6):
    store.commit(Path(sys.argv[1]), files, run_facts(), step_facts(step))
    store.prune(Path(sys.argv[1]), 2)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_last_commit_or_a_newer_one(tmp_path):
    rng = random.Random(0)
    for kill in range(12):
        run = tmp_path / str(kill)
        writer = started([run, Path(__file__).parent], None, code=WRITER)
        writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))  # so that the kill comes at any moment of a commit
        writer.send_signal(signal.SIGKILL)
        told = [1, *map(int, writer.stdout.read().split())][-1]
        writer.wait(timeout=WAIT_SECONDS)
        found = find(run)
        assert found.latest is not None and found.latest.step in (told, told + 1)
        assert not found.broken
        sweep(run)
        assert not list((run / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_gets_checkpoints(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    store.commit(tmp_path, {store.ADAPTER: [b"a"]}, run_facts(), step_facts(1))
    assert [folder.name for folder in store.folders(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_whatever_stands_where_a_checkpoint_is_written_is_removed(tmp_path, kind):
    facts, outside = run_facts(), tmp_path / "outside"
    staging = tmp_path / "run" / "checkpoints" / f".tmp-{facts.fencing_token}"
    staging.parent.mkdir(parents=True)
    outside.mkdir()
    (outside / "precious").write_text("")
    make = {"file": staging.touch, "link": lambda: staging.symlink_to(outside), "folder": staging.mkdir}
    make[kind]()
    store.commit(tmp_path / "run", {store.ADAPTER: [b"a"]}, facts, step_facts(1))
    assert not staging.is_symlink() and not staging.exists() and (outside / "precious").exists()
    make[kind]()
    store.sweep(tmp_path / "run")
    assert not staging.is_symlink() and not staging.exists() and (outside / "precious").exists()


def test_a_file_system_that_cannot_rename_folders_is_found_out_at_the_start(tmp_path, monkeypatch):
    rename = Path.rename

    def refuse(path, target):
        if path.is_dir():
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"cannot be made and renamed \(Operation not supported\)"):
        take_over(tmp_path / "run")
    monkeypatch.undo()
    lease, _ = take_over(tmp_path / "run")
    assert lease.token > 1 and not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_full_quota_at_the_start_is_no_error_and_a_file_in_place_of_the_checkpoints_is(tmp_path, monkeypatch):
    def refuse(path, **named):
        if path.name.startswith(".tmp-try"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        make(path, **named)

    make = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", refuse)
    store.try_rename(tmp_path)
    monkeypatch.undo()
    (tmp_path / "checkpoints").touch()
    with pytest.raises(NotADirectoryError):
        store.try_rename(tmp_path)


STRANGE = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("/nowhere/x"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a file": lambda path: path.write_text("x"),
}
PLACES = ["metrics.jsonl", "events.jsonl", "lease.json", ".lease-1", ".lease-9", "result.json", "checkpoints"]
PLACES += [f"checkpoints/{name}" for name in ("step-00000002", "step-00000009", store.QUARANTINE, ".tmp-2")]


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", PLACES)
def test_whatever_stands_in_a_runs_folder_every_command_ends_with_a_message(tmp_path, name, kind, monkeypatch):
    monkeypatch.setattr("lora_kit.runs.lease.DEAD_SECONDS", 0.1)  # for the heartbeat of a claim that nobody made
    run = tmp_path / "run"
    held, _ = take_over(run)
    for step in (1, 2):
        store.commit(run, files_of(step), run_facts(fencing_token=held.token), step_facts(step))
    Journal(run).event("started", step=0, steps=4, run_id=held.record.run_id)
    held.release()
    store.remove(run / name)
    STRANGE[kind](run / name)
    for command in ("status", "verify"):
        assert isinstance(CliRunner().invoke(app, [command, str(run)]).exception, SystemExit | None)
    try:
        opened = open_run(run)
    except LoraKitError as error:
        assert str(run) in str(error)
        return
    Journal(run).cut(2, samples=2)
    assert opened.latest is None or opened.latest.step in (1, 2)
    opened.lease.release()
