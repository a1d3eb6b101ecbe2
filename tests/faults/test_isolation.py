"""Two jobs on one run, wherever they are: containers, machines with one disk, pauses, and what disappears under a run.

A job that has lost its run ends with exit code 2, and a job that has not lost it goes on; no step is lost or repeated.
"""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from conftest import hold
from runs import go_on, gone, start, started, state_hash, wait_for_lines, wait_until

from lora_kit.runs import live, store

STEPS = 14
NOT_HERE = 77

INSIDE = """
import ctypes, json, os, subprocess, sys
place, tests, recipe, out = json.loads(sys.argv[1]), *sys.argv[2:5]
flags = 0x20000 | (0x20000000 if "pid" in place else 0) | (0x4000000 if "host" in place else 0)
if ctypes.CDLL(None).unshare(flags):
    sys.exit(77)
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
mounts = [["mount", "--make-rprivate", "/"]]
mounts += [["mount", "-t", "proc", "proc", "/proc"]] if "pid" in place else []
mounts += [["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]] if not place.get("shm") else []
mounts += [["mount", "--bind", place["boot"], "/proc/sys/kernel/random/boot_id"]] if "boot" in place else []
mounts += [["hostname", place["host"]]] if "host" in place else []
for command in mounts:
    if subprocess.run(command).returncode:
        sys.exit(77)
sys.path.insert(0, tests)
from lora_kit.errors import LoraKitError
from lora_kit.runs import lease
lease.DEAD_SECONDS = place["dead"]
if place.get("script"):
    from fork_server import inject
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training import loop
    inject("lora_kit.training.loop")
    try:
        loop.train(load_recipe(recipe), out)
    except LoraKitError as error:
        print(error)
        sys.exit(error.exit_code)
else:
    from fork_server import fork_the_zygote
    from lora_kit.cli import app
    fork_the_zygote()
    app(["train", recipe, "--out", out])
"""


def start_inside(place, recipe, out, environment=None):
    """Start a run in other namespaces than this process's."""
    arguments = [json.dumps(place), Path(__file__).parents[1], recipe, out]
    return started(arguments, environment, code=INSIDE)


def ended(process):
    """Wait for a process in other namespaces; return its exit code and what it printed."""
    printed, _ = process.communicate()
    if process.returncode == NOT_HERE:
        pytest.skip("the kernel allows no other namespaces here")
    return process.returncode, printed


def need_namespaces(process, out):
    """Wait until a run in other namespaces trains; skip if there can be none."""
    wait_until(lambda: process.poll() is not None or (out / "metrics.jsonl").exists())
    if process.poll() == NOT_HERE:
        pytest.skip("the kernel allows no other namespaces here")


def events(out, *kinds):
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["kind"] in kinds]


def steps_shown(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def nothing_was_lost(out, undisturbed):
    assert steps_shown(out) == list(range(1, STEPS + 1))
    assert state_hash(out, STEPS) == undisturbed


LIVING = {"dead": 600.0}  # a living holder is seen at its next beat, however slow it is
STOPPED = {"dead": 1.0}  # nobody else holds the run, but a process that was stopped
PLACES = {
    "another PID namespace": {"pid": True},
    "another host name": {"host": "other"},
    "another boot id": {"boot": True},
    "another PID namespace with the same shared memory": {"pid": True, "shm": True},
}


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    found = PLACES[request.param] | LIVING
    if "boot" in found:
        (tmp_path / "boot").write_text("00000000-0000-0000-0000-000000000000\n")
        found["boot"] = str(tmp_path / "boot")
    return found


def test_a_second_job_elsewhere_is_refused_and_the_first_is_untouched(recipe, undisturbed, faults, tmp_path, place):
    out = tmp_path / "run"
    process = start(recipe, out, environment=faults(hold(5)))
    wait_for_lines(out / "metrics.jsonl", 1, process)
    code, printed = ended(start_inside(place, recipe, out))
    faults.release()
    assert code == 2 and "is training here; wait for it, stop it, or use another --out" in printed, printed
    assert process.wait() == 0
    nothing_was_lost(out, undisturbed)
    assert len(events(out, "started", "resumed")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", [False, True])
@pytest.mark.parametrize("same_memory", [False, True])
def test_a_job_that_was_overtaken_in_a_pause_writes_nothing_more(
    recipe, undisturbed, faults, tmp_path, script, same_memory
):
    out, place = tmp_path / "run", STOPPED | {"pid": True, "script": script, "shm": same_memory}
    first = start_inside(place, recipe, out, faults(hold(STEPS - 1)))
    need_namespaces(first, out)
    wait_for_lines(out / "metrics.jsonl", random.Random(f"{script}{same_memory}").randint(3, 6), first)
    family = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    code, printed = ended(start_inside(place | {"script": False}, recipe, out))
    assert code == 0, printed
    faults.release()
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    for process in reversed(family):
        process.send_signal(signal.SIGCONT)
    code, printed = ended(first)
    assert code == 2 and "has taken over this run" in printed, printed
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    assert gone(family)
    nothing_was_lost(out, undisturbed)


LOSSES = {
    "lease.json deleted": lambda out: (out / "lease.json").unlink(),
    "lease.json overwritten": lambda out: (out / "lease.json").write_bytes(bytes(100)),
    "the folder deleted": lambda out: out.rename(out.with_name("old")) and shutil.rmtree(out.with_name("old")),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_launch_that_loses_its_lease_ends_with_exit_code_2(recipe, undisturbed, faults, tmp_path, loss):
    out = tmp_path / "run"
    process = start(recipe, out, environment=faults(hold(STEPS)))
    wait_for_lines(out / "metrics.jsonl", 3, process)
    family = psutil.Process(process.pid).children(recursive=True)
    LOSSES[loss](out)
    printed, _ = process.communicate()
    assert process.returncode == 2 and "the lease of this start is lost: " in printed, printed
    assert "Traceback" not in printed and gone(family)
    if loss == "the folder deleted":
        assert not out.exists()
    else:
        go_on(recipe, out)
        nothing_was_lost(out, undisturbed)
        assert events(out, "resumed")[-1]["reached"] <= events(out, "resumed")[-1]["step"]


def region_folder(out):
    return live.open_region(out).path.parent


def test_a_region_that_is_removed_is_told_and_costs_nothing(recipe, undisturbed, faults, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out, environment=faults(hold(4), hold(10)))
    wait_for_lines(out / "metrics.jsonl", 2, process)
    shutil.rmtree(region_folder(out))
    wait_until(lambda: events(out, "fault"), process)
    faults.release(0)
    wait_for_lines(out / "metrics.jsonl", 5, process)
    psutil.Process(process.pid).children(recursive=True)[-1].kill()
    faults.release(1)
    printed, _ = process.communicate()
    assert process.returncode == 0 and "removed while the run uses it" in printed, printed
    nothing_was_lost(out, undisturbed)
    assert all(event["reached"] <= event["step"] for event in events(out, "resumed"))


def test_after_its_region_was_removed_a_run_is_still_stopped_without_a_loss(recipe, faults, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out, "--set", "checkpoint.every_steps=100", environment=faults(hold(STEPS)))
    wait_for_lines(out / "metrics.jsonl", 2, process)
    shutil.rmtree(region_folder(out))
    wait_for_lines(out / "metrics.jsonl", 5, process)
    process.terminate()
    printed, _ = process.communicate()
    assert process.returncode == 75, printed
    assert store.find(out).latest.step == steps_shown(out)[-1]


def test_a_run_restored_from_a_backup_goes_on_from_the_newest_live_state(recipe, undisturbed, faults, tmp_path):
    out, backup = tmp_path / "run", tmp_path / "backup"
    for start_number, lines in enumerate((3, 6)):  # the live state has a higher token than the backup
        environment = faults(hold(6), hold(9))
        process = start(recipe, out, "--set", "checkpoint.every_steps=100", environment=environment)
        wait_for_lines(out / "metrics.jsonl", lines, process)
        if lines == 3:
            shutil.copytree(out, backup)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        faults.release(start_number)
    reached = steps_shown(out)[-1]
    shutil.rmtree(out)
    shutil.copytree(backup, out)
    go_on(recipe, out)
    (resumed,) = events(out, "resumed")
    assert resumed["step"] >= reached and store.find(out).latest.manifest.run.fencing_token == 3
    assert state_hash(out, STEPS) == undisturbed


KEEPER_KILLED = """
import os, signal, sys, threading
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import live
from lora_kit.training import loop
sys.path.insert(0, sys.argv[3])
from fork_server import inject
inject("lora_kit.training.loop")

def kill():
    from pathlib import Path
    import time
    out = Path(sys.argv[2])
    while (region := live.open_region(out)) is None or region.keeper is None:
        time.sleep(0.01)
    os.kill(region.keeper.pid, signal.SIGKILL)
    Path(os.environ["FAULTS_DONE"], "0.released").touch()

threading.Thread(target=kill).start()
loop.train(load_recipe(sys.argv[1], ["checkpoint.every_steps=100"]), sys.argv[2])
"""


def test_a_keeper_beside_a_script_that_is_killed_is_told_at_the_next_step_and_another_goes_on(
    recipe, undisturbed, faults, tmp_path
):
    out = tmp_path / "run"
    process = started([recipe, out, Path(__file__).parents[1]], faults(hold(3)), code=KEEPER_KILLED)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    told = "the keeper, which writes the checkpoints, has ended (killed by SIGKILL); another one was started"
    assert f"warning: {told}" in printed and [event["what"] for event in events(out, "fault")] == [told], printed
    nothing_was_lost(out, undisturbed)


def test_a_zygote_that_is_stopped_does_not_keep_the_run_waiting(recipe, undisturbed, faults, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out, environment=faults(hold(4)))
    wait_for_lines(out / "metrics.jsonl", 2, process)
    zygote = psutil.Process(process.pid).children()[0]
    (worker,) = zygote.children()
    zygote.send_signal(signal.SIGSTOP)
    worker.kill()
    faults.release()
    printed, _ = process.communicate()
    assert process.returncode == 0 and "restarting from there (1/10)" in printed, printed
    nothing_was_lost(out, undisturbed)


def test_two_containers_that_start_at_the_same_moment_are_one_run(recipe, undisturbed, faults, tmp_path):
    out, place = tmp_path / "run", LIVING | {"pid": True}
    both = [start_inside(place, recipe, out, faults(hold(2))) for _ in range(2)]
    wait_until(lambda: any(process.poll() is not None for process in both))
    faults.release()
    codes = sorted(ended(process)[0] for process in both)
    assert codes == [0, 2]
    nothing_was_lost(out, undisturbed)
    assert len(events(out, "started", "resumed")) == 1
