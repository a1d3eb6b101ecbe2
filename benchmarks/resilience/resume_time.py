"""Seconds from a SIGKILL of the training process to the beginning of the next step, and where they go.

Ours restarts by itself; the peer is started again by hand, at once, in the same moment that it dies.
"""

import os
import re
import signal
import time
from pathlib import Path

import psutil
from ground import SHAPES, kill_all, lines, make_base, make_data, make_recipe, median, ours, peer, start, wait_for


def measure(folder: Path, *, shapes: tuple[str, ...] = ("30M", "160M"), trials: int = 5) -> dict:
    """Return the medians of both sides and the ratio, for every shape."""
    make_base(folder, "tiny")
    data, found = make_data(folder, 400), {}
    for shape in shapes:
        base = make_base(folder, shape)
        own, parts = _ours(folder, shape, data, trials)
        other = _peer(folder, base, shape, data, trials)
        found[shape] = {
            "ours_seconds": round(median(own), 3),
            "ours_all": own,
            "ours_parts": parts,
            "trainer_seconds": round(median(other), 3),
            "trainer_all": other,
            "times_shorter": round(median(other) / median(own), 2),
            "must_be": 4.0,
        }
    return found


def _ours(folder: Path, shape: str, data: Path, trials: int) -> tuple[list[float], dict]:
    recipe = make_recipe(folder, f"time-{shape}", shape, data, steps=4000, batch=4)
    out = folder / f"time-ours-{shape}"
    process = start(ours(recipe, out, "--max-restarts", "100"), folder / f"time-ours-{shape}.log")
    seconds = list[float]()
    for _ in range(trials):
        reached = len(lines(out / "metrics.jsonl"))
        assert wait_for(lambda done=reached: len(lines(out / "metrics.jsonl")) >= done + 3, process)
        (zygote,) = psutil.Process(process.pid).children()
        (worker,) = zygote.children()
        killed_at = time.time()
        os.kill(worker.pid, signal.SIGKILL)
        assert wait_for(lambda at=killed_at: next_step(out, at), process)
        line = next_step(out, killed_at)
        seconds.append(round(line["began"] - killed_at, 3))
    kill_all(process)
    return seconds, _parts(out)


def next_step(out: Path, at: float) -> dict | None:
    """Return the first step that began after a moment; a line has the time when its step had ended."""
    for line in lines(out / "metrics.jsonl"):
        began = line["time"] - line["tokens"] / line["tokens_per_second"]
        if began > at:
            return line | {"began": began}
    return None


def _parts(out: Path) -> dict:
    marks = [event for event in lines(out / "events.jsonl") if event["kind"] == "resumed" and "seconds" in event]
    names = sorted({name for event in marks for name in event["seconds"]})
    return {name: round(median([event["seconds"][name] for event in marks]), 3) for name in names}


def _peer(folder: Path, base: Path, shape: str, data: Path, trials: int) -> list[float]:
    seconds, out, dtype = list[float](), folder / f"time-peer-{shape}", SHAPES[shape][4]
    command = peer(base, data, out, "--steps", 4000, "--save-steps", 5, "--dtype", dtype)
    process = start(command, folder / f"time-peer-{shape}.log")
    steps = out / "steps.0.jsonl"
    for _ in range(trials):
        done = len(lines(steps))
        assert wait_for(lambda done=done: len(lines(steps)) >= done + 12 and _saved(out), process)
        kill_all(process)
        killed_at = time.time()
        process = start(command, folder / f"time-peer-{shape}.log")
        first = wait_for(lambda at=killed_at: any((one["began"] or 0) > at for one in lines(steps)), process)
        if not first:  # a checkpoint that it cannot open: by hand, again
            process = start(command, folder / f"time-peer-{shape}.log")
            continue
        seconds.append(
            round(next(one["began"] for one in lines(steps) if (one["began"] or 0) > killed_at) - killed_at, 3)
        )
    kill_all(process)
    return seconds


def _saved(out: Path) -> bool:
    return any(re.fullmatch(r"checkpoint-\d+", path.name) for path in out.iterdir())
