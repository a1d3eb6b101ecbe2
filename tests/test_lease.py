"""Two jobs never write to one run; a dead job's lease is free at once, and a job that lost its lease ends."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import PIPE

import pytest
from runs import WAIT_SECONDS, wait_until

from lora_kit.errors import CheckpointError, InputError, LeaseError
from lora_kit.runs import identity, lease
from lora_kit.runs.identity import Life, life_of, own_identity
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import Fence, Heart, Lease, inherited
from lora_kit.runs.resume import open_run, take_over

HOLDER = """
import sys
from pathlib import Path
from lora_kit.runs.lease import take
print(take(Path(sys.argv[1]), run_id="r").token, flush=True)
input()
"""


def take(run, **more):
    return lease.take(run, run_id="r", **more)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=PIPE, stdout=PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait(timeout=WAIT_SECONDS)


@pytest.fixture
def quick(monkeypatch):
    """A heartbeat every 20 ms, and a holder that is dead after a second without one."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 1.0)


def change_holder(run, **changes):
    """Let the lease file name another holder."""
    content = json.loads((run / "lease.json").read_text())
    content["holder"] |= changes
    (run / "lease.json").write_text(json.dumps(content))


def test_a_second_job_is_refused_and_told_who_holds_the_run(tmp_path, holder):
    with pytest.raises(LeaseError, match=f"process {holder.pid} on .* is training here"):
        take(tmp_path)


def test_a_killed_jobs_lease_is_taken_over_at_once_with_a_higher_token(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=WAIT_SECONDS)
    assert take(tmp_path).token == 2


def test_a_released_lease_is_free_and_its_token_is_never_given_again(tmp_path):
    for expected in (1, 2, 3):
        held = take(tmp_path)
        assert held.token == expected
        held.release()


def test_a_reused_process_id_does_not_hold_a_lease(tmp_path):
    take(tmp_path)
    change_holder(tmp_path, started=1)  # an earlier process had this id
    assert take(tmp_path).token == 2


ELSEWHERE = {"host": "another", "boot": "another", "namespaces": "pid:[1]"}


@pytest.mark.quick
@pytest.mark.parametrize("field", ELSEWHERE)
def test_a_holder_elsewhere_is_respected_until_its_heartbeat_stops(tmp_path, quick, field):
    mine, told = take(tmp_path), []
    change_holder(tmp_path, **{field: ELSEWHERE[field]})
    beating, stop = threading.Event(), threading.Event()

    def beat():
        for count in range(10**6):
            lease._beat(tmp_path, mine.token, count)
            beating.set()
            if stop.wait(0.02):
                return

    beats = threading.Thread(target=beat)
    beats.start()
    beating.wait()
    with pytest.raises(LeaseError, match="is training here; wait for it, stop it, or use another --out"):
        take(tmp_path, tell=told.append)
    assert "waiting up to 1 s for its heartbeat" in told[0]
    stop.set()
    beats.join()
    assert take(tmp_path, above=7).token == 8


def test_who_watches_a_heartbeat_and_is_paused_meanwhile_does_not_take_the_run(tmp_path, quick, monkeypatch):
    mine, clock = take(tmp_path), iter([0.0, 1000.0, 1000.1, 1000.2, 1000.3, 1000.4])
    monkeypatch.setattr(lease, "DEAD_SECONDS", 2.0)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: lease._beat(tmp_path, mine.token, int(seconds * 100)))
    monkeypatch.setattr(lease.time, "monotonic", lambda: next(clock))
    assert lease._beats(tmp_path, mine.token, 2.0)


def test_a_clock_that_is_changed_changes_nobody(tmp_path, monkeypatch):
    me = own_identity()
    monkeypatch.setattr(lease.time, "time", lambda: 0.0)
    assert own_identity() == me and life_of(me) is Life.ALIVE
    take(tmp_path)
    with pytest.raises(LeaseError):
        take(tmp_path)


def test_a_process_is_alive_dead_or_elsewhere(monkeypatch):
    me, child = own_identity(), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = replace(me, pid=child.pid, started=identity.process_state(child.pid)[1])
    assert life_of(other) is Life.ALIVE
    assert life_of(replace(other, started=other.started - 1)) is Life.DEAD, "its id was given to another"
    child.kill()
    wait_until(lambda: identity.process_state(child.pid)[0] == "Z")
    assert life_of(other) is Life.DEAD, "a zombie"
    child.wait()
    assert life_of(other) is Life.DEAD
    assert all(life_of(replace(me, **{field: "x"})) is Life.ELSEWHERE for field in ("host", "boot", "namespaces"))
    monkeypatch.setattr(identity, "process_state", lambda process: None)  # as hidepid does
    assert life_of(replace(me, pid=1)) is Life.ELSEWHERE
    monkeypatch.setattr(identity, "_sees_own_namespace", lambda: False)
    assert life_of(other) is Life.ELSEWHERE


HIDDEN = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from lora_kit.runs import identity
other = replace(identity.own_identity(), pid=int(sys.argv[2]), started=int(sys.argv[3]))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(identity.life_of(other).value)
"""


def test_a_process_that_hidepid_hides_is_elsewhere(tmp_path):
    pid, root = os.getpid(), Path(lease.__file__).parents[2]
    started = identity.process_state(pid)[1]
    command = f"mount -t proc -o hidepid=2 proc /proc && exec {sys.executable} -c '{HIDDEN}' {root} {pid} {started}"
    private = ["unshare", "-m", "--propagation", "private", "sh", "-c", command]
    done = subprocess.run(private, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no other mounts and users here: {done.stderr.strip()[-200:]}")
    assert done.stdout == "elsewhere\n"


def test_a_released_lease_that_was_taken_over_is_left_alone(tmp_path):
    old = take(tmp_path)
    change_holder(tmp_path, started=1)
    new = take(tmp_path)
    old.release()
    assert new.is_ours() and "process" in old.loss()


@pytest.mark.quick
def test_of_two_that_see_the_same_dead_holder_one_gets_the_run(tmp_path, monkeypatch):
    take(tmp_path)
    change_holder(tmp_path, started=1)
    claim = lease._claim

    def overtaken(run, token, holder):
        monkeypatch.setattr(lease, "_claim", claim)
        assert take(run).token == 2  # another sees the dead holder too, and is quicker
        return claim(run, token, holder)

    monkeypatch.setattr(lease, "_claim", overtaken)
    with pytest.raises(LeaseError, match="is training here"):
        take(tmp_path)
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lease-2", "lease.json"]


def test_who_was_paused_while_it_took_a_lease_that_another_claims_by_now_ends(tmp_path, monkeypatch):
    write = lease._write

    def late(path, record):
        assert lease._claim(tmp_path, 2, own_identity()), "another took this process for dead"
        write(path, record)

    monkeypatch.setattr(lease, "_write", late)
    with pytest.raises(LeaseError, match="another process is just starting"):
        take(tmp_path)


@pytest.mark.parametrize("written", [b"", b"00000000000000000000\n{", b"garbage"])
def test_a_claim_whose_process_was_killed_is_skipped(tmp_path, written, quick):
    (tmp_path / ".lease-1").write_bytes(written)
    assert take(tmp_path).token == 2
    assert [path.name for path in tmp_path.glob(".lease-*")] == [".lease-2"]


def test_a_start_that_was_killed_while_it_wrote_its_lease_refuses_no_other(tmp_path, quick):
    (tmp_path / ".lease-1").touch()
    (tmp_path / ".lease.json.17.partial").touch()
    assert take_over(tmp_path)[0].token == 2


def test_a_living_process_that_is_taking_the_lease_is_respected(tmp_path):
    lease._claim(tmp_path, 1, own_identity())
    with pytest.raises(LeaseError, match="is training here"):
        take(tmp_path)


CONTENTS = [
    b"",
    bytes(300),
    b"{}",
    b"[]",
    b"null",
    b'{"token": 1',
    b"\xff\xfe",
    b'{"token": true, "holder": 3}',
    b"[" * 9999,
]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_lease_file_that_a_power_cut_destroyed_counts_as_absent_and_is_told(tmp_path, content):
    told = []
    (tmp_path / "lease.json").write_bytes(content)
    assert take(tmp_path, above=4, tell=told.append).token == 5
    assert len(told) == 1 and "lease.json: not valid: " in told[0] and told[0].endswith("; it counts as absent")


def test_what_decides_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    take(tmp_path)
    assert "lease.json" in synced[0] and synced[1] == str(tmp_path)


@pytest.mark.parametrize("damage", ["deleted", "garbage", "folder deleted", "taken over"])
def test_a_holder_that_lost_its_lease_writes_no_line_more(tmp_path, damage):
    run = tmp_path / "run"
    held = take(run)
    journal = Journal(run, Fence(held))
    journal.event("started", step=0, steps=1, run_id="r")
    journal.fence._held = -1000.0  # a second later
    if damage == "deleted":
        (run / "lease.json").unlink()
    elif damage == "garbage":
        (run / "lease.json").write_text("garbage")
    elif damage == "folder deleted":
        for path in run.iterdir():
            path.unlink()
        run.rmdir()
    else:
        change_holder(run, started=1)
    with pytest.raises(LeaseError, match="the lease of this start is lost"):
        journal.metrics({"step": 1})
    assert not (run / "metrics.jsonl").exists() and not journal.late
    with pytest.raises(LeaseError):
        held.require()
    assert held.release() is None


def test_a_lease_file_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path, monkeypatch):
    held = take(tmp_path)
    monkeypatch.setattr(lease, "read", lambda path: (_ for _ in ()).throw(OSError(5, os.strerror(5))))
    held.require()
    with pytest.raises(OSError, match="Input/output error"):
        held.require_now()


def test_the_heart_ends_when_the_lease_is_lost_and_says_why(tmp_path, quick):
    held = take(tmp_path)
    heart = Heart(held)
    before = lease._heartbeat(tmp_path, 1)
    wait_until(lambda: lease._heartbeat(tmp_path, 1) != before)
    (tmp_path / "lease.json").unlink()
    wait_until(lambda: not heart.is_alive())
    assert heart.loss.endswith("lease.json was deleted")


def test_training_processes_have_the_lease_of_their_own_keeper_only(tmp_path, monkeypatch):
    held = take(tmp_path)
    assert inherited(tmp_path) is None
    monkeypatch.setenv(lease.KEEPER, held.to_json())
    assert inherited(tmp_path) == replace(held, borrowed=True)
    assert inherited(tmp_path / "another") is None
    change_holder(tmp_path, namespaces="another container, where the keeper has the same id")
    with pytest.raises(LeaseError, match="the lease of this start is lost"):
        open_run(tmp_path)


def test_a_lease_goes_to_another_process_and_back_unchanged(tmp_path):
    held = take(tmp_path)
    assert asdict(Lease.borrowed_from(held.to_json()).record) == asdict(held.record) == asdict(lease.read(held.path))


def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(lease, "_write", full)
    with pytest.raises(InputError, match=r"run: cannot be written: No space left on device; fix that or choose"):
        take_over(tmp_path / "run")


def test_a_start_that_fails_gives_its_lease_back(tmp_path, monkeypatch):
    def broken(*_):
        raise CheckpointError("no space")

    monkeypatch.setattr("lora_kit.runs.live.adopt", broken)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no space"):
            take_over(tmp_path / "run")


@pytest.mark.parametrize("left", ["", "garbage", "{}", '{"path": "/nowhere", "record": null}'])
def test_a_variable_that_is_no_lease_is_not_inherited(left, tmp_path, monkeypatch):
    monkeypatch.setenv(lease.KEEPER, left)
    assert inherited(tmp_path / "run") is None


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_heartbeat_is_written_into_no_link_and_waits_for_no_reader(kind, tmp_path):
    held = take(tmp_path / "run")
    beat, other = tmp_path / "run" / f".lease-{held.token}", tmp_path / "other"
    other.write_text("another file")
    beat.unlink()
    beat.symlink_to(other) if kind == "link" else os.mkfifo(beat)
    with pytest.raises(OSError):
        lease._beat(tmp_path / "run", held.token, 5)
    assert other.read_text() == "another file"


def test_a_path_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="its symbolic links form a loop; choose another --out"):
        take_over(tmp_path / "loop")
    with pytest.raises(InputError, match="its path contains NUL; choose another --out"):
        take_over(tmp_path / "a\0b")


def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"udcff': its path is not UTF-8; choose another --out"):
        take_over(tmp_path / os.fsdecode(b"run\xff"))


@pytest.mark.parametrize("name", ["a\nb", "[bold]x[/bold]".replace("/", ""), 'it\'s "q" $x', "läuft 🚀", "d" * 255])
def test_a_run_may_have_any_other_name(name, tmp_path):
    held, _ = take_over(tmp_path / name)
    assert Lease.borrowed_from(held.to_json()).run == tmp_path / name
    held.release()
