"""`status` says what is safe, what interrupted a run and what that cost, live and afterwards."""

import json
import os
import re
import shutil
import signal
import time

import psutil
import pytest
from conftest import hold
from manifests import files_of, run_facts, step_facts, step_record
from runs import gone, start, train, wait_for_lines, wait_until

from lora_kit.errors import InputError
from lora_kit.runs import live, store
from lora_kit.runs.journal import Journal
from lora_kit.runs.lease import take
from lora_kit.runs.live import JobFile, Phase, Word
from lora_kit.runs.status import SILENT_END, status


@pytest.fixture
def clock(monkeypatch):
    """Return a function that sets the time of the events to come."""
    from lora_kit.runs import journal

    class Clock(journal.datetime):
        seconds = 1000.0

        @classmethod
        def now(cls, zone):
            return cls.fromtimestamp(cls.seconds, zone)

    monkeypatch.setattr(journal, "datetime", Clock)
    return lambda seconds: setattr(Clock, "seconds", seconds)


def step(number, at, *, stall=0.0):
    """Return a line of a step of two seconds."""
    return step_record(number, stall_seconds=stall, time=at)


def test_a_run_without_logs_is_none(tmp_path):
    with pytest.raises(InputError, match="not a run's folder"):
        status(tmp_path)
    assert Journal(tmp_path).last_step() == 0


@pytest.mark.quick
def test_it_counts_what_was_lost_and_what_it_cost(tmp_path, clock):
    journal = Journal(tmp_path)
    clock(1004)
    journal.event("started", step=0, steps=10, run_id="x", launched=1000.0)
    for number in range(1, 6):
        journal.metrics(step(number, 1004 + 2 * number, stall=0.5 if number == 3 else 0.0))
    clock(1015)
    journal.event("restart", step=5, cause="process 1: killed by SIGKILL")
    clock(1016)
    journal.event("resumed", step=5, steps=10, reached=6, launched=1000.0)
    journal.metrics(step(6, 1018))
    clock(1019)
    journal.event("restart", step=6, cause="process 1: killed by SIGKILL")
    clock(1020)
    journal.event("fault", step=6, what="disk full")
    journal.event("stopped", step=6, signal="SIGTERM")
    now = status(tmp_path)
    assert (now.state, now.step, now.steps, now.steps_lost, now.starts) == ("stopped, resumable", 6, 10, 1, 2)
    assert [(one["cause"], one["step"], one["times"]) for one in now.interruptions] == [
        ("process 1: killed by SIGKILL", 5, 1),
        ("process 1: killed by SIGKILL", 6, 1),
        ("stopped by SIGTERM", 6, 1),
    ]
    assert now.faults == [{"what": "disk full", "times": 1}]
    assert now.exit_code == 1, "step 6 is not durable"
    assert now.stall_share == pytest.approx(0.5 / 12, abs=1e-4)
    assert now.goodput == pytest.approx(11.5 / 20, abs=1e-4)

    clock(5002)  # hours later: the time between does not count
    journal.event("resumed", step=6, steps=10, reached=6, launched=5000.0)
    journal.metrics(step(7, 5004))
    now = status(tmp_path)
    assert now.state == "interrupted, resumable" and now.goodput == pytest.approx(13.5 / 24, abs=1e-4)
    assert now.interruptions[-1] == {"cause": SILENT_END, "step": 7, "times": 1}
    clock(5005)
    journal.event("failed", step=7, cause="ValueError: x")
    assert (status(tmp_path).state, status(tmp_path).exit_code) == ("failed, resumable", 1)
    store.commit(tmp_path, files_of(), run_facts(), step_facts(7))
    journal.event("stopped", step=7, signal="SIGTERM")
    assert (status(tmp_path).state, status(tmp_path).exit_code) == ("stopped, resumable", 75)
    journal.event("finished", step=10)
    assert (status(tmp_path).to_dict()["state"], status(tmp_path).exit_code) == ("finished", 0)


def test_it_shows_the_held_out_loss_the_best_checkpoint_and_the_time_that_is_left(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.event("started", step=0, steps=10, run_id="x")
    for number, loss in ((2, 0.75), (4, 0.5), (6, None)):
        journal.metrics(step_record(number, held_out_loss=loss))
        store.commit(tmp_path, files_of(), run_facts(), step_facts(number, held_out_loss=loss))
    now = status(tmp_path)
    assert now.held_out == {"step": 6, "loss": None} and now.seconds_left is None
    assert now.best == {"step": 4, "loss": 0.5, "path": "checkpoints/step-00000004"}
    assert ("held-out loss", "not finite after step 6") in now.rows()
    assert ("best", "checkpoints/step-00000004, held-out loss 0.5000") in now.rows()
    monkeypatch.setattr("lora_kit.runs.status.is_held", lambda run: True)
    journal.metrics(step_record(7, held_out_loss=0.25))
    now = status(tmp_path)
    assert now.seconds_left == 6.0 and ("time left", "about 0:00:06") in now.rows(), "three steps of two seconds"
    assert ("held-out loss", "0.2500 after step 7") in now.rows()


def test_the_time_left_of_a_log_that_says_anything_is_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_kit.runs.status.is_held", lambda run: True)
    Journal(tmp_path).event("started", step=0, steps=2**63 - 2, run_id="x")
    Journal(tmp_path).metrics(step_record(1, tokens=2**62, tokens_per_second=1e-300))
    assert ("time left", "about 11574 days, 1:46:40") in status(tmp_path).rows()


@pytest.fixture
def held(tmp_path):
    """A run whose lease this process holds, with its live region."""
    lease = take(tmp_path, run_id="r")
    Journal(tmp_path).event("started", step=0, steps=10, run_id="r", launched=time.time())
    region = live.create_region(lease, 12)
    region.words[Word.TOKEN] = lease.token
    yield tmp_path, region
    live.discard(region)
    lease.release()


@pytest.mark.quick
def test_a_run_without_signs_of_life_is_not_said_to_train(held):
    run, region = held
    assert status(run).state == "starting or ending"
    region.words[Word.PHASE] = Phase.TRAINING
    region.beat()
    assert status(run).state == "training"
    region.words[Word.SEEN] -= 59_000
    assert status(run).state == "training"
    region.words[Word.SEEN] -= 2_000
    assert re.fullmatch(r"not responding for 6\d s", status(run).state)
    Journal(run).metrics(step_record(1, tokens_per_second=5.0, time=time.time()))
    assert status(run).state == "training", "a step of this run takes 20 s"
    facts = run_facts(recipe={"train": {"step_timeout": 30.0}})
    live.write_job(region, JobFile({}, "{}", facts, 60.0, 2, None, best=False))
    assert status(run).state.startswith("not responding for 6"), "the recipe allows 30 s"


def test_without_its_live_region_a_runs_log_shows_its_signs_of_life(held):
    run, region = held
    shutil.rmtree(region.path.parent)
    assert status(run).state == "starting or ending"
    Journal(run).metrics(step_record(1, time=time.time()))
    assert status(run).state == "training"
    (run / "metrics.jsonl").unlink()
    Journal(run).event("resumed", step=0, steps=10, run_id="r", launched=time.time() - 100)
    (run / "events.jsonl").write_text("".join((run / "events.jsonl").read_text().splitlines(keepends=True)[1:]))
    Journal(run).metrics(step_record(1, time=time.time() - 90))
    assert status(run).state.startswith("not responding for 9")


def test_it_tells_the_truth_while_a_run_trains_and_after_it_was_killed(recipe_file, tmp_path, faults):
    out, more = tmp_path / "run", ["--set", "checkpoint.every_steps=20", "--set", "train.steps=40"]
    process = start(recipe_file, out, *more, environment=faults(hold(12), hold(30)))
    wait_for_lines(out / "metrics.jsonl", 10, process)
    now = status(out)
    assert now.state == "training" and now.live["valid"] and now.live["behind"] == 0
    assert now.live["step"] >= now.step >= 10 and now.steps == 40 and 0 < now.goodput <= 1
    faults.release()
    wait_for_lines(out / "metrics.jsonl", 25, process)
    wait_until(lambda: store.find(out).latest is not None, process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: gone(family) and status(out).durable["age_seconds"] > 0)
    now = status(out)
    assert now.state == "interrupted, resumable" and now.live["step"] >= now.step
    assert now.durable["step"] == 20 and now.durable["behind"] == now.step - 20 and now.durable["age_seconds"] > 0
    assert now.interruptions[-1]["cause"] == SILENT_END and now.interruptions[-1]["step"] == now.step
    region = live.open_region(out)
    region.payload(region.snapshots()[0].slot)[17] ^= 4
    assert not status(out).live["valid"]
    del region  # while a process uses it, a start copies it
    train(recipe_file, out, *more)
    now = status(out)
    assert (now.state, now.step, now.live, now.durable["step"], now.starts) == ("finished", 40, None, 40, 2)
    assert json.dumps(now.to_dict())
