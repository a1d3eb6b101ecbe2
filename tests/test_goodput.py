"""The model of goodput against a simulation that only knows when failures come, and the command that shows it."""

import json
import random
from itertools import pairwise

import pytest
from test_cli import ask
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.runs.goodput import Policy, best_interval, goodput, job_mttf, measured

HOUR = 3600.0


def simulated(policy, mttf, *, seconds, seed=0):
    """Return the goodput of a job whose failures are drawn one after the other.

    A failure may come while it computes, saves or recovers. Only what a finished save holds counts.
    """
    rng = random.Random(seed)
    now, kept, failure = 0.0, 0.0, rng.expovariate(1 / mttf)
    ready = 0.0  # when it computes again
    while now < seconds:
        saved = max(now, ready) + policy.interval + policy.stall
        if failure < saved:
            now = failure
            ready = now + policy.resume
            failure = now + rng.expovariate(1 / mttf)
        else:
            now, kept = saved, kept + policy.interval
    return kept / now


@pytest.mark.parametrize(
    ("policy", "mttf"),
    [
        (Policy("periodic", 1000.0, 2.0, 180.0), 1.8 * HOUR),
        (Policy("periodic, many failures", 100.0, 5.0, 60.0), 120.0),
        (Policy("every step", 2.0, 0.01, 5.0), 0.1 * HOUR),
        (Policy("every step, many failures", 1.0, 0.0, 3.0), 15.0),
    ],
    ids=lambda value: value.name if isinstance(value, Policy) else "",
)
def test_the_model_says_what_a_simulation_of_failures_gives(policy, mttf):
    assert goodput(policy, mttf) == pytest.approx(simulated(policy, mttf, seconds=3_000 * mttf), abs=0.01)


def test_no_interval_is_better_than_the_best():
    mttf, stall = 7.9 * HOUR, 2.0
    at_best = goodput(Policy("", best_interval(stall, mttf), stall, 180.0), mttf)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert goodput(Policy("", factor * best_interval(stall, mttf), stall, 180.0), mttf) < at_best


def test_a_job_that_fails_before_every_save_keeps_nothing():
    assert goodput(Policy("", 1e6, 2.0, 180.0), 1.0) == 0.0


def test_the_time_between_failures_is_the_published_one_and_falls_with_every_device():
    assert job_mttf(1_024) == pytest.approx(7.9 * HOUR) and job_mttf(16_384) == pytest.approx(1.8 * HOUR)
    times = [job_mttf(2**power) for power in range(20)]
    assert all(few > many for few, many in pairwise(times))
    assert job_mttf(8, hours_of_a_device=8_000) == 1_000 * HOUR


def test_the_command_takes_the_times_of_a_run_and_a_drill(trained_run):
    run = trained_run
    told = json.loads(ask("goodput", run, "--resume", "5", "--devices", "8,1024", "--json"))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert told["step_seconds"] == measured(run).step
    assert told["stall_seconds"] == pytest.approx(sum(step["stall_seconds"] for step in steps) / len(steps))
    row = told["rows"][1]
    policy = Policy("", told["step_seconds"], told["stall_seconds"], 5.0)
    assert (row["devices"], row["mttf_hours"]) == (1024, pytest.approx(7.9))
    assert row["every step, back in 5 s"] == goodput(policy, 7.9 * HOUR)
    shown = ask("goodput", run, "--resume", "5", "--resume", "20", "--save-steps", "50")
    assert all(text in shown.replace("\n", " ") for text in ("16,384", "1.8 h"))


def test_a_plot_is_an_svg_with_a_line_for_each_policy(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    ask("goodput", "--step", "2", "--resume", "5", "--plot", tmp_path / "goodput.svg")
    text = (tmp_path / "goodput.svg").read_text()
    assert text.count('id="line2d_') >= 3 and "<svg" in text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--step: give the seconds of a step, or the folder of a run"),
        (["--step", "2"], "--resume: give the seconds from a failure"),
        (["--step", "2", "--resume", "5", "--devices", "8,many"], "not whole numbers of GPUs"),
        (["--step", "2", "--resume", "5", "--devices", "0"], "not whole numbers of GPUs"),
        (["nowhere", "--resume", "5"], "no finished step and no certificate"),
    ],
)
def test_what_is_missing_is_named(arguments, problem):
    result = CliRunner().invoke(app, ["goodput", *arguments])
    assert result.exit_code == 2 and problem in " ".join(result.stderr.split()), result.stderr
