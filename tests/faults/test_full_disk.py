"""A real file system that fills up while a run trains on it: the run lives, what was there stays, nothing is lost."""

import json
import signal
import subprocess

import pytest
from conftest import hold
from runs import go_on, start, state_hash, wait_for_lines, wait_until

from lora_kit.runs import live, store
from lora_kit.runs.live import Word

STEPS = 14


@pytest.fixture
def disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk):
    """Take every byte that is left."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@pytest.fixture
def filled(recipe, disk, faults):
    """A run whose disk was filled once it had a checkpoint, waiting after two writes have failed; and its folder."""
    out = disk / "run"
    process = start(recipe, out, environment=faults(hold(5), hold(10), hold(STEPS)))
    wait_for_lines(out / "metrics.jsonl", 3, process)
    wait_until(lambda: store.find(out).latest is not None, process)
    fill(disk)
    faults.release(0)
    region = live.open_region(out)
    wait_until(lambda: region.words[Word.FAULTS] >= 2, process)
    return process, out


def shown(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_disk_that_fills_up_and_is_emptied_costs_nothing(filled, faults, undisturbed, disk):
    process, out = filled
    assert store.find(out).latest.step >= 3, "what was durable before is untouched"
    faults.release(1)
    wait_until(lambda: live.open_region(out).snapshots()[0].step == STEPS - 1, process)
    (disk / "ballast").unlink()
    faults.release(2)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert printed.count("No space left on device") >= 1 and "earlier checkpoints are unchanged" in printed
    assert state_hash(out, STEPS) == undisturbed and shown(out) == list(range(1, STEPS + 1))


def test_a_disk_that_stays_full_keeps_the_last_step_in_memory_until_there_is_room(
    filled, faults, recipe, undisturbed, disk
):
    process, out = filled
    faults.release(1)
    faults.release(2)
    printed, _ = process.communicate()
    assert process.returncode == 1 and "Traceback" not in printed, printed
    assert "No space left on device" in printed and store.find(out).latest.step < STEPS
    (disk / "ballast").unlink()
    go_on(recipe, out)
    resumed = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()][-2:]
    assert any(one["kind"] == "resumed" and one["step"] == STEPS for one in resumed) or shown(out)[-1] == STEPS
    assert state_hash(out, STEPS) == undisturbed


def test_a_stop_signal_on_a_full_disk_ends_with_1_names_the_missing_steps_and_loses_nothing(
    filled, recipe, undisturbed, disk
):
    process, out = filled
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 1 and "Traceback" not in printed, printed
    reached, durable = live.open_region(out).snapshots()[0].step, store.find(out).latest.step
    assert f"the newest checkpoint holds step {durable}: steps {durable + 1} to {reached} are not on disk" in printed
    assert "Shared memory still holds" in printed and "durable" not in printed
    (disk / "ballast").unlink()
    go_on(recipe, out)
    assert f'"kind": "resumed", "step": {reached}' in (out / "events.jsonl").read_text()
    assert state_hash(out, STEPS) == undisturbed
