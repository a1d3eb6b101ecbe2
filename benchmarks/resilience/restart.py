"""One of two processes is killed or gets SIGTERM: does the run go on by itself, is its work safe, can it resume?"""

import os
import random
import signal
import time
from pathlib import Path

import psutil
from ground import (
    finish,
    kill_all,
    lines,
    make_base,
    make_data,
    make_recipe,
    median,
    ours,
    peer,
    start,
    state_hash,
    wait_for,
)

STEPS = 40


def measure(folder: Path, *, trials: int = 30, peer_trials: int = 8, seed: int = 0) -> dict:
    """Return in how many trials the death of one of two processes was survived without a hand."""
    base, data, rng = make_base(folder, "tiny"), make_data(folder, 200), random.Random(seed)
    recipe = make_recipe(folder, "restart", "tiny", data, steps=STEPS, every=20)
    assert finish(ours(recipe, folder / "restart-undisturbed")) == 0
    expected, survived, equal = state_hash(folder / "restart-undisturbed", STEPS), 0, 0
    for trial in range(trials):
        out = folder / f"restart-{trial}"
        process = start(ours(recipe, out, processes=2), folder / "restart.log")
        _one_dies(process, out / "metrics.jsonl", rng.randrange(2, STEPS - 10), rng, signal.SIGKILL)
        survived += process.wait(300) == 0
        equal += state_hash(out, STEPS) == expected
    found = {"ours": {"trials": trials, "went_on_by_themselves": survived, "final_bytes_equal": equal}}
    survived = 0
    for trial in range(peer_trials):
        out = folder / f"restart-peer-{trial}"
        command = peer(base, data, out, "--steps", 200, "--save-steps", 5, processes=2, restarts=3)
        process = start(command, folder / "restart-peer.log")
        _one_dies(process, out / "steps.0.jsonl", 20, rng, signal.SIGKILL)
        try:
            survived += process.wait(180) == 0
        except Exception:
            kill_all(process)
    found["trainer"] = {"trials": peer_trials, "went_on_by_themselves": survived}
    return found


def sigterm(folder: Path, *, trials: int = 3, peer_trials: int = 3, seed: int = 0) -> dict:
    """Return what SIGTERM to one of two processes leads to, with 17 MB of state."""
    make_base(folder, "tiny")
    base, data, rng = make_base(folder, "30M"), make_data(folder, 200), random.Random(seed)
    recipe = make_recipe(folder, "sigterm", "30M", data, steps=10, rank=18)
    assert finish(ours(recipe, folder / "sigterm-undisturbed")) == 0
    expected, own = state_hash(folder / "sigterm-undisturbed", 10), []
    for trial in range(trials):
        out = folder / f"sigterm-{trial}"
        process = start(ours(recipe, out, processes=2), folder / "sigterm.log")
        at = _one_dies(process, out / "metrics.jsonl", rng.randrange(2, 7), rng, signal.SIGTERM)
        code, seconds = process.wait(300), time.time() - at
        shown = len(lines(out / "metrics.jsonl"))
        durable = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in (out / "checkpoints" / f"step-{durable:08d}").iterdir())
        again = finish(ours(recipe, out, processes=2), folder / "sigterm.log")
        one = {"exit_code": code, "seconds_to_exit": round(seconds, 3), "steps_shown": shown, "durable": durable}
        equal = again == 0 and state_hash(out, 10) == expected
        own.append(one | {"bytes": size, "resume_exit_code": again, "final_bytes_equal": equal})
    other = []
    for trial in range(peer_trials):
        out = folder / f"sigterm-peer-{trial}"
        command = peer(base, data, out, "--steps", 30, "--save-steps", 5, "--rank", 18, processes=2)
        process = start(command, folder / "sigterm-peer.log")
        _one_dies(process, out / "steps.0.jsonl", 7, rng, signal.SIGTERM)
        code = process.wait(300)
        reached = max(one["step"] for one in lines(out / "steps.0.jsonl"))
        saved = max((int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")), default=0)
        again = finish(command, folder / "sigterm-peer.log")
        other.append({"exit_code": code, "reached": reached, "saved": saved, "resume_exit_code": again})
    return {"ours": own, "ours_median_seconds": median([one["seconds_to_exit"] for one in own]), "trainer": other}


def _one_dies(process: object, log: Path, shown: int, rng: random.Random, number: int) -> float:
    """Send one of two training processes a signal once a log has so many lines; return when."""
    assert wait_for(lambda: len(lines(log)) >= shown, process), f"{log}: the run ended too early"
    everyone = psutil.Process(process.pid).children(recursive=True)
    workers = [one for one in everyone if not any(child.is_running() for child in one.children())]
    at = time.time()
    os.kill(rng.choice(workers).pid, number)
    return at
