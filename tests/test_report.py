"""`status` says what is safe, what interrupted a run and what that cost, live and afterwards."""

import json
import os
import signal

import psutil
import pytest
from runs import gone, start, train, wait_for_lines, wait_until

from lora_kit.errors import InputError
from lora_kit.runs import live, store
from lora_kit.runs.journal import Journal
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
    return {
        "step": number,
        "tokens": 100,
        "tokens_per_second": 50.0,
        "stall_seconds": stall,
        "loss": 1 / number,
        "time": at,
    }


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
    assert status(tmp_path).state == "failed, resumable"
    journal.event("finished", step=10)
    assert status(tmp_path).to_dict()["state"] == "finished"


def test_it_tells_the_truth_while_a_run_trains_and_after_it_was_killed(recipe_file, tmp_path):
    out, more = tmp_path / "run", ["--set", "checkpoint.every_steps=100", "--set", "train.steps=300"]
    process = start(recipe_file, out, *more)
    wait_for_lines(out / "metrics.jsonl", 20, process)
    now = status(out)
    assert now.state == "training" and now.live["valid"] and now.live["behind"] == 0
    assert now.live["step"] >= now.step >= 20 and now.steps == 300 and 0 < now.goodput <= 1
    wait_for_lines(out / "metrics.jsonl", 105, process)
    wait_until(lambda: store.find(out).latest is not None, process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: gone(family) and status(out).durable["age_seconds"] > 0)
    now = status(out)
    assert now.state == "interrupted, resumable" and now.live["step"] >= now.step
    assert now.durable["step"] == 100 and now.durable["behind"] == now.step - 100 and now.durable["age_seconds"] > 0
    assert now.interruptions[-1]["cause"] == SILENT_END and now.interruptions[-1]["step"] == now.step
    region = live.open_region(out)
    region.payload(region.snapshots()[0].slot)[17] ^= 4
    assert not status(out).live["valid"]
    train(recipe_file, out, *more)
    now = status(out)
    assert (now.state, now.step, now.live, now.durable["step"], now.starts) == ("finished", 300, None, 300, 2)
    assert json.dumps(now.to_dict())
