"""Two jobs never write to one run; a dead job's lease is free at once."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from runs import WAIT_SECONDS

from lora_kit.errors import InputError, LeaseError
from lora_kit.runs import lease
from lora_kit.runs.lease import take
from lora_kit.runs.resume import take_over

HOLDER = """
import sys, time
from pathlib import Path
from lora_kit.runs.lease import take
print(take(Path(sys.argv[1])).token, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait(timeout=WAIT_SECONDS)


def test_a_second_job_is_refused_and_told_who_holds_the_run(tmp_path, holder):
    with pytest.raises(LeaseError, match=f"process {holder.pid} on .* is training here"):
        take(tmp_path)


def test_a_killed_jobs_lease_is_taken_over_at_once_with_a_higher_token(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=WAIT_SECONDS)
    assert take(tmp_path).token == 2


def test_a_released_lease_is_free_and_its_token_is_never_given_again(tmp_path):
    for expected in (1, 2, 3):
        lease = take(tmp_path)
        assert lease.token == expected
        lease.release()


def test_a_reused_process_id_does_not_hold_a_lease(tmp_path):
    take(tmp_path)
    content = json.loads((tmp_path / "lease.json").read_text())
    content["holder"]["started"] -= 1000  # an earlier process had this id
    (tmp_path / "lease.json").write_text(json.dumps(content))
    assert take(tmp_path).token == 2


def test_a_lease_from_before_a_reboot_is_free(tmp_path):
    take(tmp_path)
    content = json.loads((tmp_path / "lease.json").read_text())
    content["holder"]["boot"] = "another"
    (tmp_path / "lease.json").write_text(json.dumps(content))
    assert take(tmp_path).token == 2


def test_a_lease_of_another_machine_is_respected_until_its_heartbeat_stops(tmp_path, monkeypatch):
    mine = take(tmp_path)
    mine.beat(1)
    content = json.loads((tmp_path / "lease.json").read_text())
    content["holder"]["host"] = "elsewhere"
    (tmp_path / "lease.json").write_text(json.dumps(content))
    monkeypatch.setattr(lease, "DEAD_SECONDS", 2.0)
    beat = threading.Timer(0.8, mine.beat, [2])
    beat.start()
    with pytest.raises(LeaseError, match="on elsewhere"):
        take(tmp_path)
    beat.join()
    assert take(tmp_path, above=7).token == 8


def test_a_released_lease_that_was_taken_over_is_left_alone(tmp_path):
    old = take(tmp_path)
    (tmp_path / "lease.json").write_text(json.dumps({"token": 9, "holder": {"pid": os.getpid()}}))
    old.release()
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == 9


@pytest.mark.quick
def test_of_two_that_see_the_same_dead_holder_one_gets_the_run(tmp_path, monkeypatch):
    take(tmp_path)
    content = json.loads((tmp_path / "lease.json").read_text())
    content["holder"]["boot"] = "another"
    (tmp_path / "lease.json").write_text(json.dumps(content))
    reserve = lease._reserve_token

    def overtaken(run, token):
        monkeypatch.setattr(lease, "_reserve_token", reserve)
        assert take(run).token == 2  # another sees the dead holder too, and is quicker
        return reserve(run, token)

    monkeypatch.setattr(lease, "_reserve_token", overtaken)
    with pytest.raises(LeaseError, match="another process has just begun to train here"):
        take(tmp_path)
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


@pytest.mark.parametrize("written", ["", '{"pid": 1'])
def test_a_reservation_whose_owner_was_killed_is_skipped(tmp_path, written, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.1)
    (tmp_path / ".lease-1").write_text(written)
    assert take(tmp_path).token == 2
    assert not list(tmp_path.glob(".lease-*"))


def test_a_living_owner_of_a_reservation_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.1)
    (tmp_path / ".lease-1").write_text(json.dumps(lease._me()))
    with pytest.raises(LeaseError, match=r"another process is just starting to train in this folder \(it created "):
        take(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(lease, "_write", full)
    with pytest.raises(InputError, match=r"run: cannot be written: No space left on device; fix that or choose"):
        take_over(tmp_path / "run")
