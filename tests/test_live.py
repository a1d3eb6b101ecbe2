"""The live region: the newest snapshot is whole at every moment, and a region never grows or comes from others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from manifests import run_facts, step_facts

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.runs import live
from lora_kit.runs.live import Header, JobFile, Region, Word

FLOATS = 300  # weights and two moments


@pytest.fixture
def region(tmp_path):
    yield live.create_region(tmp_path, 4 * FLOATS)
    live.discard(tmp_path)


def never():
    raise AssertionError("no slot was free")


def publish(region, step, *, due=False, value=None, waiting=never):
    """Publish a step whose every number says which it is; return the slot."""
    slot = region.acquire(waiting)
    source = np.full(FLOATS, step if value is None else value, np.float32)
    seal = live.copy_hashed(region.payload(slot), [source.view(np.uint8).data])
    region.publish(slot, Header(0, step, seal, due, step_facts(step)))
    return slot


def write_job(region, run, **facts):
    """Write what turns a region's snapshots into checkpoints of a run."""
    live.write_job(region, JobFile(str(run), {}, "{}", run_facts(**facts), 60.0, 2, None, best=False))


def test_what_was_published_last_is_the_newest_and_verifies(region):
    for step in range(1, 8):
        publish(region, step)
        newest = region.snapshots()[0]
        assert newest.step == step and region.is_valid(newest)
        assert np.all(np.frombuffer(region.payload(newest.slot), np.float32) == step)
    assert len(region.snapshots()) == live.SLOTS


def test_the_slot_that_is_being_filled_is_no_snapshot_and_the_newest_stays(region):
    publish(region, 1)
    slot = region.acquire(never)
    region.payload(slot)[:4] = b"torn"
    assert [one.step for one in region.snapshots()] == [1]


@pytest.mark.quick
def test_a_flipped_bit_is_found(region):
    slot = publish(region, 1)
    region.payload(slot)[17] ^= 4
    assert not region.is_valid(region.snapshots()[0])


def test_a_slot_that_the_keeper_reads_is_left_alone_unless_the_keeper_is_dead(region):
    first = publish(region, 1)
    region.words[Word.KEEPER], region.words[Word.READING] = os.getpid(), first + 1
    for step in range(2, 9):
        assert publish(region, step) != first
    assert region.snapshots()[-1].step == 1
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    region.words[Word.KEEPER] = gone.pid
    assert publish(region, 9) == first, "a dead keeper's mark is void"


def test_a_due_step_is_never_overwritten_before_it_is_handled(region):
    due, waited = publish(region, 1, due=True), []
    for step in (2, 3, 4):
        assert publish(region, step) != due
    publish(region, 5, due=True)

    def handle():
        waited.append(True)
        region.words[Word.HANDLED] = 1

    publish(region, 6, due=True)
    publish(region, 7, waiting=handle)
    assert waited, "with every slot needed the trainer waits"


def test_another_jobs_token_ends_the_publishing(region):
    region.words[Word.TOKEN] = 7
    with pytest.raises(LeaseError, match="another process has taken over this run"):
        publish(region, 1)
    assert not region.snapshots()


def test_a_header_without_room_is_refused(region):
    slot = region.acquire(never)
    with pytest.raises(CheckpointError, match="bytes of header, more than the"):
        region.publish(slot, Header(0, 1, 0, False, step_facts(1, skipped_steps=tuple(range(20_000)))))


def test_a_region_is_reserved_whole_and_does_not_grow(region):
    size = region.path.stat().st_size
    assert size == live.PAGE + live.SLOTS * (live.HEADER_BYTES + 4 * FLOATS)
    assert region.path.stat().st_blocks * 512 >= size, "a hole would be a full memory found out too late"
    for step in range(1, 50):
        publish(region, step)
    assert region.path.stat().st_size == size and len(list(region.path.parent.iterdir())) == 1


def test_a_region_of_the_right_size_is_used_again_and_another_is_made_anew(tmp_path, region):
    publish(region, 3)
    assert live.create_region(tmp_path, 4 * FLOATS).snapshots()[0].step == 3
    assert not live.create_region(tmp_path, 8 * FLOATS).snapshots()


def test_where_memory_has_no_room_local_disk_takes_the_region(tmp_path, monkeypatch):
    full = Path("/proc")  # where nobody can make a folder
    monkeypatch.setattr(live, "_parent_folders", lambda: [full, tmp_path / "disk"])
    (tmp_path / "disk").mkdir()
    assert live.create_region(tmp_path, 400).path.is_relative_to(tmp_path / "disk")
    monkeypatch.setattr(live, "_parent_folders", lambda: [full])
    with pytest.raises(
        CheckpointError, match=r"0\.00 GB are needed in shared memory .*, and neither has them \(/proc: .*\); free that"
    ):
        live.create_region(tmp_path / "other", 400)


def test_a_kill_while_the_region_is_reserved_leaves_nothing_that_is_in_the_way(tmp_path, region):
    live.discard(tmp_path)
    region.path.parent.mkdir()
    region.path.with_suffix(".partial").write_bytes(b"half")
    again = live.create_region(tmp_path, 4 * FLOATS)
    assert again.path == region.path and [path.name for path in again.path.parent.iterdir()] == ["region"]


def test_regions_of_runs_that_are_gone_are_reaped_and_others_are_kept(tmp_path, region):
    gone = tmp_path / "gone"
    gone.mkdir()
    orphan = live.create_region(gone, 400)
    for one, run in ((orphan, gone), (region, tmp_path)):
        write_job(one, run)
    gone.rmdir()
    live.delete_orphans()
    assert not orphan.path.exists() and region.path.exists()


def test_a_region_of_another_run_at_the_same_place_never_wins(tmp_path, region):
    publish(region, 9)
    write_job(region, tmp_path, run_id="an earlier one")
    assert live.newest(tmp_path, "this one") == (None, [])
    assert live.newest(tmp_path, "an earlier one")[0].step == 9


def test_a_damaged_newest_snapshot_is_told_and_the_one_before_is_used(tmp_path, region):
    publish(region, 1)
    slot = publish(region, 2)
    write_job(region, tmp_path)
    region.payload(slot)[0] ^= 1
    found, problems = live.newest(tmp_path, "r")
    assert found.step == 1 and "the live snapshot of step 2 is damaged" in problems[0]


def test_a_torn_job_file_is_none(tmp_path, region):
    (region.path.parent / live.JOB).write_text(json.dumps({"run": "x"})[:-2])
    assert live.read_job(region.path.parent) is None
    assert isinstance(live.open_region(tmp_path), Region)
