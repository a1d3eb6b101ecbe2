"""Whatever is killed, hung, poisoned or full, at whatever moment: no finished step is lost and the bytes are the same.

Real runs on real processes; faults come from inject/sitecustomize.py or from outside. The oracle is always a run of one
process that nothing disturbed.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import RECIPE, hold
from runs import (
    events,
    go_on,
    gone,
    nothing_was_lost,
    run_code,
    start,
    state_hash,
    steps_shown,
    train,
    wait_for_lines,
    wait_until,
)

from lora_kit.runs import store
from lora_kit.runs.manifest import MANIFEST
from lora_kit.supervise.stopping import FORWARDED_SECONDS, STOP_SIGNALS

STEPS = 12
EVERY = ["--set", "checkpoint.every_steps=5"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder, data_file):
    """A run with dropout whose steps have several micro-batches, and which evaluates on the way."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    text = RECIPE.format(base=base_folder, data=data_file).replace("steps: 8", f"steps: {STEPS}")
    text = text.replace("sequence_length: 256", "sequence_length: 256, validation: 0.2")
    path.write_text(text + "evaluate: {every_steps: 6}\n")
    return path


PHASES = ["forward", "backward", "reduce", "update", "updated", "copy", "publish", "line"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "placement"), [(1, "replicated"), (2, "sharded")])
def test_a_kill_in_any_phase_of_a_step_costs_no_finished_step(
    recipe, undisturbed, faults, tmp_path, processes, placement
):
    rng = random.Random(processes)
    steps = sorted(rng.sample(range(2, STEPS + 1), len(PHASES)))
    phases = rng.sample(PHASES, len(PHASES))
    ranks = [rng.randrange(processes) if phase not in ("copy", "publish") else 0 for phase in phases]
    plan = [
        {"rank": rank, "step": step, "phase": phase, "kind": "kill"}
        for rank, step, phase in zip(ranks, steps, phases, strict=True)
    ]
    out = tmp_path / "run"
    plan.append({"rank": processes - 1, "phase": "evaluate", "kind": "kill"})
    plan.append({"rank": processes - 1, "phase": "load", "kind": "kill"})
    placed = ["--set", f"base.placement={placement}"]
    printed = train(recipe, out, *EVERY, *placed, processes=processes, environment=faults(*plan))
    assert ("base sharded over 2 processes" in printed) == (placement == "sharded")
    assert faults.happened() == len(plan)
    # a process may come to its fault before the other's death has ended the attempt
    assert len(plan) // processes <= len(events(out, "restart")) <= len(plan)
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_random_kills_of_any_process_leave_the_bytes_as_they_were(recipe, undisturbed, faults, tmp_path):
    out, rng, done = tmp_path / "run", random.Random(5), set()
    process = start(recipe, out, *EVERY, processes=2, environment=faults(hold(6), sleep=0.05))
    launcher = psutil.Process(process.pid)
    wait_for_lines(out / "metrics.jsonl", 1, process)
    for _ in range(4):
        time.sleep(rng.uniform(0.02, 0.1))  # so that the kill comes at any moment of a step
        family = [one for one in launcher.children(recursive=True) if one.pid not in done]
        if family and len(steps_shown(out)) < STEPS - 3:
            chosen = rng.choice(family)  # the process that forks the others is among them
            done.add(chosen.pid)
            chosen.kill()
            faults.release()
            reached = len(steps_shown(out))
            wait_until(lambda: process.poll() is not None or len(steps_shown(out)) > reached)  # noqa: B023
    printed, _ = process.communicate()
    assert process.returncode == 0 and done, printed
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


@pytest.mark.parametrize("phase", ["write", "manifest"])
def test_a_kill_of_the_keeper_in_a_commit_ends_all_and_the_run_goes_on(recipe, undisturbed, faults, tmp_path, phase):
    out = tmp_path / "run"
    plan = [hold(4), {"phase": phase, "kind": "kill"}]
    process = start(recipe, out, *EVERY, processes=2, environment=faults(*plan))
    wait_for_lines(out / "metrics.jsonl", 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    faults.release()
    assert process.wait() == -signal.SIGKILL and faults.happened() == 2
    wait_until(lambda: gone(family))
    go_on(recipe, out, EVERY[1])
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


SITUATIONS = {
    "between steps": [hold(STEPS)],
    "in a collective that hangs": [{"rank": 1, "step": 4, "phase": "reduce", "kind": "stop"}],
    "in an evaluation": [{"rank": 1, "phase": "evaluate", "kind": "stop"}],
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("target", ["launcher", "process"])
def test_a_stop_signal_makes_the_last_finished_step_durable(recipe, undisturbed, faults, tmp_path, situation, target):
    out, plan = tmp_path / "run", SITUATIONS[situation]
    process = start(recipe, out, "--set", "checkpoint.every_steps=100", processes=2, environment=faults(*plan))
    wait_for_lines(out / "metrics.jsonl", 2, process)
    if situation != "between steps":
        wait_until(faults.happened, process)
    number = random.Random(situation + target).choice(STOP_SIGNALS)
    zygote = psutil.Process(process.pid).children()[0]
    workers = zygote.children()
    (psutil.Process(process.pid) if target == "launcher" else workers[0]).send_signal(number)
    printed, _ = process.communicate()
    assert process.returncode == 75, printed
    assert "the same command resumes it" in printed
    assert store.find(out).latest.step == steps_shown(out)[-1]
    assert gone(workers)
    go_on(recipe, out)
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_a_second_signal_ends_at_once_and_one_that_is_only_forwarded_does_not(recipe, undisturbed, faults, tmp_path):
    out, plan = tmp_path / "run", [{"phase": "write", "kind": "hold"}, hold(STEPS)]  # storage that hangs
    process = start(recipe, out, "--set", "checkpoint.every_steps=100", environment=faults(*plan))
    wait_for_lines(out / "metrics.jsonl", 2, process)
    process.terminate()
    process.send_signal(signal.SIGUSR1)  # at once, as a launcher does
    wait_until(lambda: (faults.folder / "0.0").exists(), process)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=FORWARDED_SECONDS + 0.1)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert store.find(out).latest is None
    go_on(recipe, out)
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


@pytest.mark.quick
def test_a_stop_signal_while_loading_keeps_what_was_live(recipe, undisturbed, faults, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out, "--set", "checkpoint.every_steps=100", environment=faults(hold(6)))
    wait_for_lines(out / "metrics.jsonl", 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shown = steps_shown(out)[-1]
    assert store.find(out).latest is None
    process = start(recipe, out, environment=faults(hold(6), {"phase": "load", "kind": "stop"}))
    wait_until(lambda: (faults.folder / "1.0").exists(), process)
    process.terminate()
    assert process.wait() == 75 and store.find(out).latest.step >= shown
    go_on(recipe, out)
    assert state_hash(out, STEPS) == undisturbed


def test_a_hung_process_is_found_by_the_keepers_clock_and_all_start_again(recipe, undisturbed, faults, tmp_path):
    out, plan = tmp_path / "run", {"rank": 1, "step": 7, "phase": "forward", "kind": "stop"}
    more = [*EVERY, "--set", "train.step_timeout=3"]
    process = start(recipe, out, *more, processes=2, environment=faults(plan))
    wait_until(faults.happened, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    printed, _ = process.communicate()
    assert process.returncode == 0 and "a hang" in printed, printed
    causes = [event["cause"] for event in events(out, "restart")]  # under load another step may take three seconds too
    assert causes and all("no sign of life" in cause for cause in causes)
    assert gone(workers)
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_the_same_exception_at_the_same_step_three_times_stops_with_its_traceback(recipe, faults, tmp_path):
    out, plan = tmp_path / "run", {"step": 7, "phase": "backward", "kind": "raise", "again": 9}
    printed = train(recipe, out, expect=1, environment=faults(plan))
    assert len(events(out, "restart")) == 2 and len(events(out, "failed")) == 1
    assert printed.count("ValueError: injected at step 7") >= 2 and "Traceback" in printed
    assert "after step 6; the same failure 3 times" in printed
    assert {event["step"] for event in events(out, "restart", "failed")} == {6}, "of which there is a checkpoint"


@pytest.mark.quick
def test_memory_that_runs_out_is_named_and_survived(recipe, undisturbed, faults, tmp_path):
    out, plan = tmp_path / "run", {"step": 5, "phase": "forward", "kind": "memory"}
    printed = train(recipe, out, environment=faults(plan))
    assert "out of memory" in printed and len(events(out, "restart")) == 1
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_the_kernel_takes_a_training_process_before_the_keeper(recipe, faults, tmp_path):
    process = start(recipe, tmp_path / "run", environment=faults(hold(STEPS)))
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1, process)
    (worker,) = psutil.Process(process.pid).children()[0].children()
    scores = [int(Path(f"/proc/{one}/oom_score_adj").read_text()) for one in (process.pid, worker.pid)]
    process.kill()
    assert scores[0] < scores[1]


def test_a_world_that_changes_all_the_time_gives_the_same_bytes(recipe, undisturbed, faults, tmp_path):
    out, plan = tmp_path / "run", [hold(step) for step in (5, 8, 11)]  # each start comes to the next
    for number, (lines, processes, placement) in enumerate(
        ((3, 2, "sharded"), (6, 1, "sharded"), (9, 4, "replicated"))
    ):
        placed = ["--set", f"base.placement={placement}"]
        process = start(recipe, out, *EVERY, *placed, processes=processes, environment=faults(*plan))
        wait_for_lines(out / "metrics.jsonl", lines, process)
        process.terminate()
        assert process.wait() == 75
        faults.release(number)
    printed = train(recipe, out, *EVERY, "--set", "base.placement=sharded", processes=2)
    assert "harmless        base.placement: replicated -> sharded" in printed
    assert json.loads((out / f"checkpoints/step-{STEPS:08d}" / MANIFEST).read_text())["claim"]["level"] == "bitwise"
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_a_disk_without_room_never_stops_training_and_is_told(recipe, undisturbed, faults, tmp_path):
    out = tmp_path / "run"
    plan = [{"phase": "write", "kind": "full"}, {"phase": "manifest", "kind": "full"}]
    printed = train(recipe, out, *EVERY, environment=faults(*plan))
    assert faults.happened() == 2 and printed.count("No space left on device") >= 1
    assert len(events(out, "fault")) == 2
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_a_disk_that_stays_full_fails_at_the_end_and_the_last_step_waits_in_memory(
    recipe, undisturbed, faults, tmp_path
):
    out, plan = tmp_path / "run", {"phase": "manifest", "kind": "full", "again": 99}
    printed = train(recipe, out, *EVERY, expect=1, environment=faults(plan))
    assert "No space left on device" in printed and "earlier checkpoints are unchanged" in printed
    assert not store.folders(out) and steps_shown(out) == list(range(1, STEPS + 1))
    go_on(recipe, out, EVERY[1])
    assert [one["step"] for one in events(out, "resumed")] == [STEPS]
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_a_nan_on_one_process_is_skipped_by_all_and_in_every_replay(recipe, faults, tmp_path, capsys):
    plan = {"rank": 1, "step": 5, "phase": "reduce", "kind": "nan"}
    printed = train(recipe, tmp_path / "one", *EVERY, processes=2, environment=faults(plan))
    assert "step 5: loss" in printed and "the step is skipped" in printed
    kill = {"rank": 0, "step": 9, "phase": "forward", "kind": "kill"}
    (faults.folder / "0.0").unlink()
    more = ["--set", "checkpoint.every_steps=4", "--set", "checkpoint.keep=20"]
    train(recipe, tmp_path / "two", *more, processes=2, environment=faults(plan, kill))
    assert store.find(tmp_path / "two").latest.manifest.progress.skipped_steps == (5,)
    assert state_hash(tmp_path / "one", STEPS) == state_hash(tmp_path / "two", STEPS)
    for path in store.folders(tmp_path / "two")[:-1]:
        (path / MANIFEST).write_text("{}")
    go_on(recipe, tmp_path / "two", *more[1::2])  # from step 4, and nothing is wrong with step 5 now
    printed = capsys.readouterr().out
    assert "falling back to step 4" in printed and "step 5: loss" in printed
    assert state_hash(tmp_path / "one", STEPS) == state_hash(tmp_path / "two", STEPS)


@pytest.mark.quick
def test_replicas_that_differ_are_found_and_named_before_it_is_kept(recipe, faults, tmp_path):
    plan = {"rank": 1, "step": 5, "phase": "updated", "kind": "flip"}
    printed = train(recipe, tmp_path / "run", *EVERY, processes=2, expect=1, environment=faults(plan))
    assert "after step 5 process 1 has another adapter" in printed
    assert not store.checkpoint_folder(tmp_path / "run", 5).exists()


def test_a_second_job_on_a_run_is_refused_and_the_first_goes_on(recipe, undisturbed, faults, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out, *EVERY, environment=faults(hold(STEPS)))
    wait_for_lines(out / "metrics.jsonl", 1, process)
    assert "is training here" in train(recipe, out, expect=2)
    faults.release()
    assert process.wait() == 0
    assert state_hash(out, STEPS) == undisturbed


AUDIT = """
import os, sys
found = []
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
import torch
torch.load = None
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop
found.clear()
loop.train(load_recipe(sys.argv[1]), sys.argv[2])
sys.exit(bool(found))
"""


def test_a_resume_unpickles_nothing(recipe, undisturbed, faults, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out, *EVERY, environment=faults(hold(STEPS)))
    wait_for_lines(out / "metrics.jsonl", 6, process)
    process.terminate()
    assert process.wait() == 75
    run_code(AUDIT, recipe, out)
    assert state_hash(out, STEPS) == undisturbed
