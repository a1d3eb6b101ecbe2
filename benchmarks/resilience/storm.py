"""Training under a storm: a SIGKILL every 15 s on average, for 10 minutes, and how much of the time was kept.

Both sides get the same kills at the same moments. Ours restarts by itself; the peer is started again by hand, at once.
What was kept is the number of steps that are finished at the end, times the duration of an undisturbed step of the same
side, divided by the time. `model` is what `lora-kit goodput` says for the same failures.
"""

import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from ground import SHAPES, kill_all, lines, make_base, make_data, make_recipe, median, ours, peer, start, wait_for
from resume_time import next_step

from lora_kit.runs.goodput import Policy, goodput

SHAPE, SAVE_STEPS, STEPS = "30M", 50, 1_000_000


def measure(folder: Path, *, seconds: float = 600, mean: float = 15, undisturbed: float = 30, seed: int = 0) -> dict:
    """Return the goodput of both sides, and of ours by the model.

    Args:
        folder: Where the runs are.
        seconds: The duration of the storm.
        mean: The mean time between two kills, in seconds.
        undisturbed: For how long each side first trains without kills, in seconds.
        seed: Decides the moments of the kills.
    """
    make_base(folder, "tiny")
    base, data, rng = make_base(folder, SHAPE), make_data(folder, 400), random.Random(seed)
    moments, at = list[float](), rng.expovariate(1 / mean)
    while at < seconds:
        moments.append(at)
        at += rng.expovariate(1 / mean)
    found = {"kills": len(moments), "seconds": seconds, "mean_seconds_between_kills": mean}
    recipe = make_recipe(folder, "storm", SHAPE, data, steps=STEPS, batch=4)
    out = folder / "storm-ours"
    calm = folder / "calm-ours"
    step = _undisturbed(ours(recipe, calm), calm / "metrics.jsonl", _step_of_ours, undisturbed)
    resumes = _ours(ours(recipe, out, "--max-restarts", "100000"), out, moments, seconds)
    steps = [line["step"] for line in lines(out / "metrics.jsonl")]
    stall = sum(line["stall_seconds"] for line in lines(out / "metrics.jsonl")) / len(steps)
    policy = Policy("every step", step, stall, median(resumes))
    found["ours"] = {
        "steps": len(steps),
        "steps_shown_twice": len(steps) - len(set(steps)),
        "step_seconds": round(step, 4),
        "resume_seconds": round(median(resumes), 3),
        "goodput": round(len(set(steps)) * step / seconds, 4),
        "model": round(goodput(policy, mean), 4),
    }
    arguments = ("--steps", STEPS, "--save-steps", SAVE_STEPS, "--dtype", SHAPES[SHAPE][4])
    calm = folder / "calm-peer"
    step = _undisturbed(peer(base, data, calm, *arguments), calm / "steps.0.jsonl", _step_of_peer, undisturbed)
    out = folder / "storm-peer"
    broken = _peer(peer(base, data, out, *arguments), out, moments, seconds)
    reached = max((line["step"] for line in lines(out / "steps.0.jsonl")[-1:]), default=0)
    found["trainer"] = {
        "save_steps": SAVE_STEPS,
        "steps": reached,
        "step_seconds": round(step, 4),
        "resumes_that_failed": broken,
        "goodput": round(reached * step / seconds, 4),
    }
    return found


def _step_of_ours(line: dict) -> float:
    return line["tokens"] / line["tokens_per_second"]


def _step_of_peer(line: dict) -> float:
    return line["time"] - line["began"] if line["began"] else float("nan")


def _undisturbed(command: list[str], log: Path, step_of: Callable[[dict], float], seconds: float) -> float:
    """Return the median duration of the steps of a run that nothing disturbs."""
    process = start(command)
    assert wait_for(lambda: len(lines(log)) >= 5, process), f"{log}: no steps"
    time.sleep(seconds)
    kill_all(process)
    return median([duration for line in lines(log)[5:] if (duration := step_of(line)) == duration])


def _ours(command: list[str], out: Path, moments: list[float], seconds: float) -> list[float]:
    """Kill the training process at each moment; return the seconds from each kill to the next step."""
    process = start(command, out.with_suffix(".log"))
    assert wait_for(lambda: lines(out / "metrics.jsonl"), process), "no first step"
    began, killed = time.time(), list[float]()
    for moment in moments:
        _sleep_until(began + moment)
        if wait_for(lambda: _worker(process.pid), process) and (worker := _worker(process.pid)):
            killed.append(time.time())
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGKILL)
    _sleep_until(began + seconds)
    kill_all(process)
    resumed = [(next_step(out, at), at) for at in killed]
    return [line["began"] - at for line, at in resumed if line]


def _worker(launcher: int) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess, ValueError):
        (zygote,) = psutil.Process(launcher).children()
        (worker,) = zygote.children()
        return worker
    return None


def _peer(command: list[str], out: Path, moments: list[float], seconds: float) -> int:
    """Kill the peer at each moment and start it again; return how often it could not be resumed.

    A checkpoint that it cannot open is deleted, which somebody would have to do by hand.
    """
    log, broken = out.with_suffix(".log"), 0
    process = start(command, log)
    assert wait_for(lambda: lines(out / "steps.0.jsonl"), process), "no first step"
    began = time.time()
    for moment in [*moments, seconds]:
        while time.time() < began + moment:
            if process.poll() is not None:
                broken += 1
                saved = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
                if saved:
                    shutil.rmtree(saved[-1])
                process = start(command, log)
            time.sleep(0.05)
        kill_all(process)
        if moment < seconds:
            process = start(command, log)
    return broken


def _sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - time.time()))
