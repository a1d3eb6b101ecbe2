"""A checkpoint is there whole or not at all, and nothing that was damaged is ever taken for one."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from manifests import run_facts, step_facts
from runs import WAIT_SECONDS

from lora_kit.errors import CheckpointError
from lora_kit.runs import store
from lora_kit.runs.manifest import FORMAT, manifest_bytes
from lora_kit.runs.store import find, folders, open_checkpoint, prune, set_aside, sweep

FILES = {
    "adapter_model.safetensors": [b"a" * 2000, memoryview(b"a" * 3000)],
    "optimizer.safetensors": [b"o" * 9000],
    "adapter_config.json": [b"{}\n"],
}


def commit(run, files, step, token=1, **changes):
    """Commit a checkpoint of a run that was never trained."""
    return store.commit(run, files, run_facts(fencing_token=token), step_facts(step, **changes))


def test_a_commit_reads_back_as_it_was_written(tmp_path):
    made = commit(tmp_path, FILES, 120)
    assert made.path.name == "step-00000120"
    read = open_checkpoint(made.path)
    assert (read.step, read.manifest, read.size) == (120, made.manifest, 14003)
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
    (path / "optimizer.safetensors").write_bytes(b"o" * 8999)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: 8,999 bytes, the manifest says 9,000"):
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


def test_a_folder_that_was_never_committed_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    assert find(tmp_path).latest is None


def test_a_manifest_of_another_format_is_refused_with_both_versions(tmp_path):
    path = commit(tmp_path, FILES, 1).path
    content = json.loads((path / "manifest.json").read_bytes()) | {"format": 99}
    (path / "manifest.json").write_bytes(manifest_bytes(content))
    with pytest.raises(CheckpointError, match="format 99, this lora_kit reads 1"):
        open_checkpoint(path)


def test_a_recipe_of_another_version_is_refused_by_its_fields(tmp_path):
    recipe = {"base": {"repo": "a/b"}, "data": {"train": "c"}, "train": {"steps": 1}}
    assert store.commit(tmp_path, FILES, run_facts(recipe=recipe), step_facts(1)).recipe.base.repo == "a/b"
    later = recipe | {"adapter": {"variant": "dora"}, "train": {}}
    made = store.commit(tmp_path, FILES, run_facts(recipe=later, versions={"lora_kit": "9.0"}), step_facts(2))
    with pytest.raises(CheckpointError, match=r"adapter\.variant: Extra inputs .*train: .*use lora_kit 9\.0, which"):
        assert made.recipe


def test_a_second_commit_of_the_same_state_takes_the_firsts_place(tmp_path):
    commit(tmp_path, FILES, 7)
    commit(tmp_path, FILES, 7, held_out_loss=0.5)
    assert open_checkpoint(tmp_path / "checkpoints/step-00000007").manifest.progress.held_out_loss == 0.5
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]


def test_a_second_commit_of_a_step_with_another_state_sets_the_first_aside(tmp_path):
    commit(tmp_path, FILES | {"optimizer.safetensors": [b"p" * 9000]}, 7, token=1)
    commit(tmp_path, FILES, 7, token=2)
    assert open_checkpoint(tmp_path / "checkpoints/step-00000007").manifest.run.fencing_token == 2
    quarantine = tmp_path / "checkpoints/.quarantine"
    assert open_checkpoint(quarantine / "step-00000007.1").manifest.run.fencing_token == 1
    assert "same step" in (quarantine / "step-00000007.1.reason.txt").read_text()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_power_cut_in_a_repeated_commit_never_loses_both_copies(tmp_path, monkeypatch, exchange, same):
    """Every rename of the commit is the last one before the cut once."""
    before, after = (FILES, FILES if same else FILES | {"optimizer.safetensors": [b"p" * 9000]})
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
    assert cut >= 4


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
        commit(merged, FILES | {"optimizer.safetensors": [b"p" * 9000]}, 7)
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
    with pytest.raises(CheckpointError, match=r"No space left on device \(14,003 bytes needed\); earlier"):
        commit(tmp_path, FILES, 2)
    assert find(tmp_path).latest.step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITER = """
import sys
from pathlib import Path
from manifests import run_facts, step_facts
from lora_kit.runs import store
files = {"adapter_model.safetensors": [b"a" * 300_000], "optimizer.safetensors": [b"o" * 600_000]}
for step in range(1, 10**6):
    store.commit(Path(sys.argv[1]), files, run_facts(), step_facts(step))
    store.prune(Path(sys.argv[1]), 2)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_last_commit_or_a_newer_one(tmp_path):
    rng = random.Random(0)
    for kill in range(12):
        run = tmp_path / str(kill)
        command = [sys.executable, "-c", WRITER, str(run)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
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
