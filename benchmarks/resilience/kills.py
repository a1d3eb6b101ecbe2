"""SIGKILL at random moments: of one process, of the keeper, of everything; then resume, until the run is done."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
from ground import finish, kill_all, lines, make_base, make_data, make_recipe, ours, peer, start, state_hash

STEPS = 120
BY_HAND = 0.35  # of our kills take the keeper too, and somebody has to start the run again


def measure(folder: Path, *, kills: int = 300, peer_kills: int = 40, seed: int = 0) -> dict:
    """Return how many kills both sides survived, and what was lost."""
    base, data = make_base(folder, "tiny"), make_data(folder, 200)
    recipe = make_recipe(folder, "kills", "tiny", data, steps=STEPS, every=5, seconds=0.2)
    undisturbed = folder / "kills-undisturbed"
    assert finish(ours(recipe, undisturbed)) == 0
    return {
        "ours": _ours(folder, recipe, state_hash(undisturbed, STEPS), kills, random.Random(seed)),
        "trainer": _peer(folder, base, data, peer_kills, random.Random(seed)),
    }


def _ours(folder: Path, recipe: Path, expected: str, kills: int, rng: random.Random) -> dict:
    done = runs = equal = lost = failures = by_hand = 0
    while done < kills:
        runs += 1
        out, command = folder / f"kills-{runs}", ours(recipe, folder / f"kills-{runs}", "--max-restarts", "1000")
        process, shown = start(command, folder / "kills.log"), 0
        while done < kills and process.poll() is None and shown < STEPS - 2:
            if not _progress(out, process, shown):
                break
            time.sleep(rng.uniform(0, 0.25))
            shown = len(lines(out / "metrics.jsonl"))
            everything = rng.random() < BY_HAND
            if not _kill(process, rng, everything=everything):
                continue
            done += 1
            if everything:
                by_hand += 1
                process = start(command, folder / "kills.log")
        code = process.wait(600)
        failures += code != 0
        equal += code == 0 and state_hash(out, STEPS) == expected
        resumed = [one for one in lines(out / "events.jsonl") if one["kind"] == "resumed"]
        lost += sum(max(0, one["reached"] - one["step"]) for one in resumed)
    return {
        "kills": done,
        "of_them_with_the_keeper": by_hand,
        "runs": runs,
        "resumes_that_failed": failures,
        "finished_steps_lost": lost,
        "runs_with_the_bytes_of_the_undisturbed_one": equal,
    }


def _progress(out: Path, process: object, shown: int) -> bool:
    """Wait until a run shows another step; False when it ended before."""
    while len(lines(out / "metrics.jsonl")) <= shown:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True


def _kill(process: object, rng: random.Random, *, everything: bool) -> bool:
    """Kill one of a run's processes, or all; False when there was none."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        if everything:
            kill_all(process)
            psutil.wait_procs(family, 5)
        else:
            os.kill(rng.choice(family).pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError, IndexError):
        return False
    return True


def _peer(folder: Path, base: Path, data: Path, kills: int, rng: random.Random) -> dict:
    out, crashes, lost, done = folder / "kills-peer", 0, 0, 0
    command = peer(base, data, out, "--steps", 4000, "--save-steps", 1)
    process = start(command, folder / "kills-peer.log")
    steps = out / "steps.0.jsonl"
    while done < kills:
        before = len(lines(steps))
        if not _progress_of_peer(steps, before, process):
            crashes += 1
            _remove_newest(out)  # what a person would do by hand
            process = start(command, folder / "kills-peer.log")
            continue
        time.sleep(rng.uniform(0, 0.5))
        kill_all(process)
        reached = max(one["step"] for one in lines(steps))
        done += 1
        count = len(lines(steps))
        process = start(command, folder / "kills-peer.log")
        if _progress_of_peer(steps, count, process):
            lost += max(0, reached + 1 - next(one["step"] for one in lines(steps)[count:]))
    kill_all(process)
    return {"kills": done, "resumes_that_failed": crashes, "finished_steps_done_again": lost, "saving": "every step"}


def _progress_of_peer(steps: Path, before: int, process: object) -> bool:
    while len(lines(steps)) <= before:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def _remove_newest(out: Path) -> None:
    import shutil

    found = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if found:
        shutil.rmtree(found[-1])
