"""The live region: the newest snapshot is whole at every moment, and a region never grows or comes from others."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from manifests import files_of, run_facts, step_facts

from lora_kit.errors import CheckpointError, LeaseError
from lora_kit.runs import lease, live, store
from lora_kit.runs.identity import own_identity
from lora_kit.runs.journal import Journal
from lora_kit.runs.live import Header, JobFile, Region, Word

FLOATS = 300  # weights and two moments
PARENT_FOLDERS = live._parent_folders


class Held:
    """A lease that nobody else knows of."""

    def __init__(self, run, *, run_id="r", token=0):
        run.mkdir(exist_ok=True)
        self.run, self.token = run, token
        self.record = lease.Record(token, run_id, 0.0, own_identity())
        lease._write(run / lease.FILE, self.record)


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """The folder that stands for /dev/shm."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(live, "_parent_folders", lambda: [folder])
    return folder


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def region(run):
    """A region that this process uses."""
    return live.create_region(Held(run), 4 * FLOATS)


def left(run, *steps, run_id="r"):
    """Let a job publish these steps and be killed; return the path of its region, which nobody uses then."""
    region = live.create_region(Held(run, run_id=run_id), 4 * FLOATS)
    for step in steps:
        publish(region, step)
    write_job(region, run_id=run_id)
    return region.path


def never():
    raise AssertionError("no slot was free")


def publish(region, step, *, due=False, value=None, waiting=never):
    """Publish a step whose every number says which it is; return the slot."""
    slot = region.acquire(waiting)
    source = np.full(FLOATS, step if value is None else value, np.float32)
    seal = live.copy_hashed(region.payload(slot), [source.view(np.uint8).data])
    region.publish(slot, Header(0, step, seal, due, step_facts(step)))
    return slot


def write_job(region, **facts):
    """Write what turns a region's snapshots into checkpoints of a run."""
    live.write_job(region, JobFile({}, "{}", run_facts(**facts), 60.0, 2, None, best=False))


HOLD = "import sys; from lora_kit.runs.live import Region; r = Region(__import__('pathlib').Path(sys.argv[1])); "
HOLD += "print(flush=True); input()"


@pytest.fixture
def used_by_another():
    """A function that lets another process use a region until the test ends."""
    started = []

    def use(path):
        command = [sys.executable, "-c", HOLD, str(path)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        started[-1].stdout.readline()
        return started[-1]

    yield use
    for process in started:
        process.kill()
        process.wait()


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
    region.keeper = own_identity()
    region.words[Word.READING] = first + 1
    for step in range(2, 9):
        assert publish(region, step) != first
    assert region.snapshots()[-1].step == 1
    region.keeper = replace(own_identity(), started=1)  # a keeper that is dead, and whose id is another process's
    region.words[Word.READING] = first + 1
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


def test_a_header_that_no_reader_accepts_is_refused(region):
    slot, facts = region.acquire(never), step_facts(1)
    wrong = replace(facts, line=json.dumps(json.loads(facts.line) | {"examples": 0.5}))
    with pytest.raises(CheckpointError, match=r"the snapshot of step 1: not valid: progress\.line: .*examples"):
        region.publish(slot, Header(0, 1, 0, False, wrong))
    assert not region.snapshots()


def test_a_region_is_reserved_whole_and_does_not_grow(region):
    size = region.path.stat().st_size
    assert size == live.PAGE + live.SLOTS * (live.HEADER_BYTES + 4 * FLOATS)
    assert region.path.stat().st_blocks * 512 >= size, "a hole would be a full memory found out too late"
    for step in range(1, 50):
        publish(region, step)
    assert region.path.stat().st_size == size and len(list(region.path.parent.iterdir())) == 1


def test_a_region_of_the_right_size_is_used_again_and_another_is_made_anew(run, region):
    publish(region, 3)
    assert live.create_region(Held(run), 4 * FLOATS).snapshots()[0].step == 3
    assert not live.create_region(Held(run), 8 * FLOATS).snapshots()
    assert not region.path.exists() and region.words[Word.MAGIC] == 0, "whoever has it mapped knows"


def test_where_memory_has_no_room_local_disk_takes_the_region(run, tmp_path, monkeypatch):
    full = Path("/proc")  # where nobody can make a folder
    monkeypatch.setattr(live, "_parent_folders", lambda: [full, tmp_path / "disk"])
    (tmp_path / "disk").mkdir()
    assert live.create_region(Held(run), 400).path.is_relative_to(tmp_path / "disk")
    monkeypatch.setattr(live, "_parent_folders", lambda: [full])
    with pytest.raises(
        CheckpointError, match=r"0\.00 GB are needed in shared memory .*, and neither has them \(/proc: .*\); free that"
    ):
        live.create_region(Held(tmp_path / "other"), 400)
    with pytest.raises(
        CheckpointError, match=r"enlarge /dev/shm \(in Docker --shm-size=2g, in Kubernetes an emptyDir with"
    ):
        live.create_region(Held(tmp_path / "other"), 500_000_000)


def test_a_region_on_disk_says_what_that_costs_and_how_to_give_it_memory(run, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "_parent_folders", lambda: [tmp_path])
    region = live.create_region(Held(run), 4 * FLOATS)
    told = live.disk_notice(region)
    assert f"so it is in {tmp_path}; if that is a disk" in told
    assert "(in Docker --shm-size=1g, in Kubernetes an emptyDir with medium: Memory)" in told


def test_a_region_that_was_never_completed_goes_at_the_next_start(run, memory):
    path, half = left(run), memory / f"lora_kit-{os.getuid()}-other"
    half.mkdir(mode=0o700)
    (half / live.PARTIAL).write_bytes(b"half")
    with (half / live.PARTIAL).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        live.delete_orphans()
        assert half.exists(), "somebody is writing it"
    live.delete_orphans()
    assert not half.exists() and path.exists()


def test_regions_of_runs_that_are_deleted_are_deleted_and_others_are_kept(tmp_path, run):
    gone = tmp_path / "gone"
    path, orphan = left(run), left(gone, run_id="s")
    shutil.rmtree(gone)
    live.delete_orphans()
    assert not orphan.exists() and path.exists()


def test_a_region_in_use_is_never_deleted_by_another_start(run, used_by_another):
    orphan = left(run)
    process = used_by_another(orphan)
    shutil.rmtree(run)
    live.delete_orphans()
    assert orphan.exists()
    process.kill()
    process.wait()
    live.delete_orphans()
    assert not orphan.exists()


@pytest.mark.quick
@pytest.mark.parametrize("situation", ["not mounted", "another disk at its place", "renamed", "lease deleted"])
def test_a_missing_path_proves_nothing(tmp_path, situation):
    """The first two are also what another container sees that shares /dev/shm and not the disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = disk / "run"
    path = left(run)
    Journal(run).event("started", step=0, steps=1, run_id="r")
    if situation == "renamed":
        run.rename(disk / "other name")
    elif situation == "lease deleted":
        (run / "lease.json").unlink()
    else:
        disk.rename(tmp_path / "elsewhere")
        if situation == "another disk at its place":
            disk.mkdir()
    live.delete_orphans()
    assert path.exists()


def test_a_run_at_the_path_of_a_deleted_run_lets_its_region_go(run):
    path = left(run)
    shutil.rmtree(run)
    Held(run, run_id="another")
    live.delete_orphans()
    assert not path.exists()


def test_the_region_of_a_finished_run_is_deleted_once_its_newest_step_is_a_checkpoint(run):
    path = left(run, 2)
    (run / "result.json").write_text("{}")
    live.delete_orphans()
    assert path.exists()
    store.commit(run, files_of(), run_facts(fencing_token=0), step_facts(2))
    live.delete_orphans()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file", "a FIFO inside", "another user's"])
def test_whatever_others_leave_in_shared_memory_fails_no_start(run, memory, kind):
    path, foreign = left(run), memory / f"lora_kit-{os.getuid()}-r-x"
    if kind == "a link":
        foreign.symlink_to(run)
    elif kind == "a file":
        foreign.write_text("x")
    else:
        foreign.mkdir(mode=0o755 if kind == "open to others" else 0o700)
        if kind == "a FIFO inside":
            os.mkfifo(foreign / live.REGION)
            os.mkfifo(foreign / live.PARTIAL)
        if kind == "another user's":
            if os.getuid() != 0:
                pytest.skip("only root can give a folder to another user")
            os.chown(foreign, 65534, 65534)
    held = Held(run, token=1)
    live.adopt(held)
    live.delete_orphans()
    assert live.create_region(held, 4 * FLOATS).path == path


def test_a_region_of_another_run_at_the_same_place_never_wins(run):
    left(run, 9)
    assert live.newest(Held(run, run_id="another")) == (None, [])
    assert live.newest(Held(run))[0].step == 9


def test_a_start_after_a_moved_or_restored_folder_finds_the_newest_state(tmp_path, run):
    left(run, 9)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    run.rename(moved)
    held = Held(moved, token=1)
    live.adopt(held)
    live.delete_orphans()
    assert live.newest(held)[0].step == 9
    shutil.rmtree(moved)
    held = Held(moved, token=2)  # from a backup
    live.adopt(held)
    assert live.newest(held)[0].step == 9 and live.newest_token("r") == 2


def test_a_copy_of_a_run_does_not_take_the_region_of_the_run(tmp_path, run):
    path = left(run, 9)
    shutil.copytree(run, tmp_path / "copy")
    held = Held(tmp_path / "copy", token=1)
    live.adopt(held)
    assert live.newest(held) == (None, [])
    assert live.create_region(held, 400).path != path and live.open_region(run).path == path


def test_a_region_that_a_paused_job_still_uses_is_copied_and_left_to_it(run, used_by_another):
    paused = left(run, 9)
    used_by_another(paused)
    held = Held(run, token=1)
    live.adopt(held)
    copy, region = live.open_region(run), Region(paused)
    assert copy.path != paused and (copy.words[Word.TOKEN], region.words[Word.TOKEN]) == (1, 0)
    assert live.newest(held)[0].step == 9
    publish(region, 10)  # the paused job goes on
    assert copy.snapshots()[0].step == 9


def test_a_region_without_another_user_is_taken_over_and_its_earlier_trainer_refused(run):
    path = left(run, 9)
    live.adopt(Held(run, token=1))
    with pytest.raises(LeaseError, match="another process has taken over this run"):
        publish(Region(path), 10)
    left(run, run_id="other")
    assert len(list(live._regions("r"))) == 1


def test_of_several_regions_of_a_run_the_newest_stays(run):
    older = left(run, 3)
    older.parent.rename(hidden := run / "hidden")
    newer = left(run, 4)
    hidden.rename(older.parent)
    held = Held(run, token=1)
    live.adopt(held)
    assert live.newest(held)[0].step == 4 and newer.exists() and not older.exists()


def test_the_newest_token_counts_what_was_published(run, region):
    region.words[Word.TOKEN] = 6
    slot = region.acquire(never)
    region.publish(slot, Header(6, 1, 0, False, step_facts(1)))
    region.words[Word.TOKEN] = 0
    assert live.newest_token("r") == 6


def test_a_damaged_newest_snapshot_is_told_and_the_one_before_is_used(run, region):
    publish(region, 1)
    slot = publish(region, 2)
    write_job(region)
    region.payload(slot)[0] ^= 1
    found, problems = live.newest(Held(run))
    assert found.step == 1 and "the live snapshot of step 2 is damaged" in problems[0]


@pytest.mark.parametrize("damage", ["one bit", "cut", "deleted"])
def test_a_damaged_job_file_is_told_and_no_snapshot_is_used(run, region, damage):
    assert live.read_job(region) is None
    publish(region, 1)
    write_job(region)
    path = region.path.with_name(live.JOB)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(content if damage == "one bit" else content[:-5])
    found, problems = live.newest(Held(run))
    assert found is None and len(problems) == 1 and str(path) in problems[0]


def test_a_kill_while_the_job_file_is_replaced_leaves_one_that_is_valid(run, region, monkeypatch):
    write_job(region)
    replaced, write = [], live.write_atomically
    for killed_after in (False, True):

        def killed(path, content, late=killed_after):
            if late:
                write(path, content)
            raise KeyboardInterrupt

        monkeypatch.setattr(live, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            write_job(region, template="a new one")
        replaced.append(live.read_job(region).facts.template)
    assert replaced == [None, "a new one"]


def test_a_restart_needs_no_space_for_the_same_job_file(run, region, monkeypatch):
    write_job(region)

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(live, "write_atomically", full)
    write_job(region)
    with pytest.raises(CheckpointError, match="No space left"):
        write_job(region, template="another one")
    region.path.with_name(live.JOB).write_text("damaged")
    with pytest.raises(CheckpointError, match="No space left"):
        write_job(region)


def test_shared_memory_is_enough_where_no_temporary_folder_can_be_written(run, monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(live.tempfile, "gettempdir", nowhere)
    assert PARENT_FOLDERS() == [Path("/dev/shm")]
    monkeypatch.setattr(live, "_parent_folders", list)
    with pytest.raises(
        CheckpointError,
        match=r"neither has them \(neither can be used\); free that much, enlarge /dev/shm .* or set TMPDIR",
    ):
        live.create_region(Held(run), 4 * FLOATS)
