"""Faults from outside the processes, as the kernel makes them: clocks, disks, memory, containers and other users.

The jobs are those of tests/places.py. What the kernel does not allow here is skipped.
"""

import errno
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from conftest import Faults, hold
from filelock import FileLock
from places import LIVING_SECONDS, NOT_ALLOWED, Place, Shim, family, library, start_at
from runs import SESSION, WAIT_SECONDS, go_on, gone, state_hash, wait_for_lines, wait_until

from lora_kit.runs import live, store

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "resilience"
STEPS = 14
CGROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, for namespaces, limits and other users")


@pytest.fixture(scope="module")
def so():
    """The library that all jobs have preloaded, also those of other users."""
    folder = Path(os.environ[SESSION])
    with FileLock(folder / "shim.lock", timeout=WAIT_SECONDS):
        found = library(folder)
    if found is None:
        pytest.skip("needs a C compiler")
    return found


@pytest.fixture
def job(recipe, so, tmp_path):
    """A function that starts a job on this test's run, and its shim."""
    shim = Shim(tmp_path / "shim", "/run/")

    def start(*more, place=None, out=tmp_path / "run", shim=shim, faults=None):
        return start_at(place or Place(), recipe, out, *more, shim=shim, so=so, faults=faults, dead=LIVING_SECONDS)

    start.shim, start.out = shim, tmp_path / "run"
    return start


def ended(process):
    """Wait for a job; return its exit code and what it printed."""
    printed, _ = process.communicate()
    if process.returncode == NOT_ALLOWED:
        pytest.skip("the kernel does not allow this place here")
    assert "Traceback" not in printed, printed
    return process.returncode, printed


def reaches(process, out, count):
    """Wait until a job shows so many steps; skip if its place is not allowed."""
    metrics = out / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or metrics.exists())
    if process.poll() == NOT_ALLOWED:
        pytest.skip("the kernel does not allow this place here")
    wait_for_lines(metrics, count, process)


def shown(out):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def events(out, *kinds):
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["kind"] in kinds]


def nothing_was_lost(out, undisturbed):
    assert shown(out) == list(range(1, STEPS + 1)) and state_hash(out, STEPS) == undisturbed
    assert all(event["reached"] <= event["step"] for event in events(out, "resumed"))


def kill_all(process):
    members = family(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: gone(members))


@pytest.fixture
def open_to_all(recipe, base_folder, data_file):
    """A folder with a recipe and all that it names, where every user may read and write.

    It is not among pytest's own folders: every start of pytest on this machine closes those to other users.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name), recipe.read_text()
        shutil.copytree(base_folder, folder / "base")
        shutil.copy(data_file, folder / "train.jsonl")
        text = text.replace(str(base_folder), f"{name}/base").replace(str(data_file), f"{name}/train.jsonl")
        (folder / "recipe.yaml").write_text(text)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        yield folder


@pytest.mark.slow
def test_random_pairs_of_jobs_never_write_at_once_and_lose_nothing(undisturbed, so, open_to_all, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK)
    import pairs

    assert pairs.STEPS == STEPS
    recipe = open_to_all / "recipe.yaml"
    found = pairs.run_pairs(open_to_all, so, recipe, undisturbed, pairs=4, seed=24, together=2)  # four other blows
    assert not found["skipped"] and found["ran"] == 4
    assert not found["wrong"], json.dumps(found, indent=1)
    assert not found["two_writers"] and not found["finished_steps_lost"] and not found["finished_steps_repeated"]


def test_the_order_of_writers_shows_a_second_one(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK)
    from pairs import writers

    claims = "A /x/run/metrics.jsonl\nB /x/run/.lease-2\nB /x/run/.lease.json.7.partial\nA /x/run/events.jsonl\n"
    assert writers(claims) == ["A"]
    assert writers(claims + "B /x/run/lease.json\nA /x/run/metrics.jsonl\n") == ["A", "B", "A"]


@pytest.mark.parametrize("seconds", [-86400.0, 5.0, 1e8])
def test_a_step_of_the_clock_frees_no_run_and_costs_nothing(job, undisturbed, faults, tmp_path, seconds):
    first = job(faults=faults(hold(6)))
    reaches(first, job.out, 3)
    job.shim.set(clock=seconds)
    second = Shim(tmp_path / "other", "/run/")
    code, printed = ended(job(place=Place(container=True), shim=second))
    assert code == 2 and "is training here" in printed, printed
    faults.release()
    assert ended(first)[0] == 0
    nothing_was_lost(job.out, undisturbed)
    assert len(events(job.out, "started", "resumed")) == 1


def test_another_users_job_on_a_living_run_is_refused_though_proc_hides_it(undisturbed, so, faults, open_to_all):
    recipe, out, shim = open_to_all / "recipe.yaml", open_to_all / "run", Shim(open_to_all / "shim", "/run/")
    first = start_at(Place(), recipe, out, shim=shim, so=so, faults=faults(hold(5)))
    reaches(first, out, 2)
    another = start_at(Place(user=20001, hidden=True), recipe, out, shim=shim, so=so, dead=LIVING_SECONDS)
    code, printed = ended(another)
    assert code == 2 and ("is training here" in printed or "lease.json" in printed), printed
    faults.release()
    assert ended(first)[0] == 0
    nothing_was_lost(out, undisturbed)


def test_a_container_with_a_root_that_cannot_be_written_and_an_unknown_user_is_stopped_and_goes_on(
    undisturbed, so, open_to_all
):
    recipe, out, shim = open_to_all / "recipe.yaml", open_to_all / "run", Shim(open_to_all / "shim", "/run/")
    faults = Faults(open_to_all / "faults")
    faults.folder.chmod(0o777)
    place = Place(container=True, host="box", user=20001, sealed=str(open_to_all))
    process = start_at(place, recipe, out, shim=shim, so=so, faults=faults(hold(5)), dead=LIVING_SECONDS)
    reaches(process, out, 2)
    family(process)[0].terminate()  # PID 1 of the container
    code, printed = ended(process)
    assert code == 75 and "is durable; the same command resumes it" in printed, printed
    code, printed = ended(start_at(place, recipe, out, shim=shim, so=so, dead=LIVING_SECONDS))
    assert code == 0, printed
    nothing_was_lost(out, undisturbed)


FAILING = {"sync": errno.EIO, "folder_sync": errno.EIO, "rename": errno.ENOSPC}


@pytest.mark.parametrize("call", FAILING)
def test_a_disk_whose_syncs_or_renames_fail_for_a_while_costs_nothing(job, undisturbed, faults, call):
    job.shim.set(match="/run/checkpoints/")
    process = job("--set", "checkpoint.every_seconds=0.2", faults=faults(hold(4), hold(STEPS)))
    reaches(process, job.out, 2)
    job.shim.set(**{call: FAILING[call]})
    faults.release(0)
    before = wait_until(lambda: events(job.out, "fault"), process)
    job.shim.set(**{call: 0})
    faults.release(1)
    code, printed = ended(process)
    assert code == 0 and os.strerror(FAILING[call]) in before[0]["what"], (before, printed)
    nothing_was_lost(job.out, undisturbed)


def test_a_file_system_that_syncs_no_folders_gets_checkpoints(job, undisturbed):
    job.shim.set(folder_sync=errno.EINVAL)
    assert ended(job())[0] == 0
    nothing_was_lost(job.out, undisturbed)


@pytest.fixture(scope="module")
def killed(recipe, so, shared):
    """A run that was killed after two checkpoints and has no live state."""

    def fill(folder):
        out, shim, faults = folder / "run", Shim(folder / "shim", "/run/"), Faults(folder / "faults")
        more = ["--set", "checkpoint.every_steps=2"]
        process = start_at(Place(), recipe, out, *more, shim=shim, so=so, faults=faults(hold(8)))
        reaches(process, out, 4)
        wait_until(lambda: len(store.folders(out)) >= 2, process)
        kill_all(process)
        live.discard(live.open_region(out))

    return shared("killed", fill) / "run"


@pytest.mark.parametrize("file", [store.ADAPTER, store.OPTIMIZER, store.ADAPTER_CONFIG, "manifest.json"])
def test_a_newest_checkpoint_that_cannot_be_read_falls_back_to_the_one_before(job, killed, undisturbed, file):
    shutil.copytree(killed, job.out)
    newest = store.folders(job.out)[0]
    job.shim.set(match=f"{newest.name}/{file}", read=errno.EIO)
    code, printed = ended(job())
    assert code == 0 and newest.name in printed and os.strerror(errno.EIO) in printed, printed
    assert shown(job.out) == list(range(1, STEPS + 1)) and state_hash(job.out, STEPS) == undisturbed


@pytest.fixture
def small_memory():
    """A cgroup whose limit a test sets by a function; the folder is its attribute."""
    root = next((path for path in CGROUPS if (path / "memory.limit_in_bytes").exists()), None)
    if root is None:
        pytest.skip("no cgroup of version 1 limits memory here")
    try:
        folder = Path(tempfile.mkdtemp(prefix="lora-kit-test-", dir=root))
    except OSError as error:
        pytest.skip(f"a cgroup cannot be made here: {error.strerror}")
    yield folder
    for process in (folder / "cgroup.procs").read_text().split():
        os.kill(int(process), signal.SIGKILL)
    wait_until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_a_trainer_that_exceeds_the_memory_of_its_container_is_killed_and_nothing_is_lost(
    job, undisturbed, small_memory, faults
):
    plan = {"step": 5, "phase": "forward", "kind": "grow"}
    (small_memory / "memory.limit_in_bytes").write_text(str(2 << 30))
    code, printed = ended(job(place=Place(memory=str(small_memory)), faults=faults(plan)))
    assert code == 0 and "killed by SIGKILL (out of memory?)" in printed, printed
    assert "restarting from there (1/10)" in printed
    nothing_was_lost(job.out, undisturbed)


def test_a_start_where_the_disk_of_another_run_is_not_mounted_leaves_its_live_state(
    job, recipe, undisturbed, faults, tmp_path
):
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    out = elsewhere / "run"
    process = job("--set", "checkpoint.every_steps=100", out=out, faults=faults(hold(9)))
    reaches(process, out, 5)
    kill_all(process)
    other = job(place=Place(container=True, covered=str(elsewhere)), out=tmp_path / "other")
    assert ended(other)[0] == 0
    go_on(recipe, out)
    nothing_was_lost(out, undisturbed)
