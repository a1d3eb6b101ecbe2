"""Kill unmodified scripts of transformers and TRL at random moments; compare each with the run that nobody disturbed.

    python benchmarks/resilience/trainer_scripts.py                # 50 runs, about 15 minutes on one core
    python benchmarks/resilience/trainer_scripts.py --runs 3       # one of each script
    python benchmarks/resilience/trainer_scripts.py --overhead     # what attaching costs a step, both sides in one run

The undisturbed run is `python SCRIPT`, without lora_kit. The others run under `lora-kit launch SCRIPT` with
`save_strategy="no"`: the training process is killed, or all processes are, and the same command goes on. Weights,
optimizer, random generators and everything logged but times must be equal at the end. Results are added to the JSON
file, so the measurement may be interrupted. The exit code is 1 if a run differs or a finished step was lost.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from ground import ENVIRONMENT, HERE, kill_all, lines, machine, make_base, start

RESULTS = HERE.parent / "results" / "trainer_scripts.json"
SCRIPTS = ("trainer", "sft", "dpo")
EVERYTHING = 0.3  # of the kills take the keeper too, and the same command is given again
KILLS = (1, 1, 2)  # in a run, drawn at random
LONGEST_SECONDS = 0.15  # after a random step, before the kill
SECONDS = 600
MOST_RATIO = 1.03  # of a step with a LiveCheckpoint to one without


def command(script: str, base: Path, out: Path, run: Path | None = None) -> list[str]:
    """Return the command of a script: under `lora-kit launch` if it has a run's folder."""
    rest = [str(HERE / "scripts" / f"{script}.py"), "--base", str(base), "--out", str(out)]
    launched = ["-m", "lora_kit", "launch", "--out", str(run)]
    return [sys.executable, *(launched if run else []), *rest]


def outcome(out: Path) -> dict:
    """Return what a script wrote at its end; empty if it has not come so far."""
    with suppress(FileNotFoundError):
        return json.loads((out / "outcome.json").read_text())
    return {}


def disturbed(folder: Path, script: str, base: Path, expected: dict, seed: int) -> dict:
    """Run a script, kill it at random moments, and return what became of it."""
    rng, out, run = random.Random(seed), folder / f"{script}-{seed}-out", folder / f"{script}-{seed}"
    process = start(command(script, base, out, run), folder / "log")
    kills = with_keeper = 0
    for _ in range(rng.choice(KILLS)):
        reached = len(lines(run / "metrics.jsonl"))
        target = rng.randint(reached, max(reached, expected["step"] - 2))
        while process.poll() is None and len(lines(run / "metrics.jsonl")) < target:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, LONGEST_SECONDS))
        if process.poll() is not None:
            break
        everything = rng.random() < EVERYTHING
        if everything:
            kill_all(process)
            process = start(command(script, base, out, run), folder / "log")
        elif not kill_trainer(process):
            continue
        kills, with_keeper = kills + 1, with_keeper + everything
    code = process.wait(SECONDS)
    resumed = [event for event in lines(run / "events.jsonl") if event["kind"] == "resumed"]
    found = outcome(out)
    return {
        "script": script,
        "seed": seed,
        "kills": kills,
        "with_keeper": with_keeper,
        "resumed_at": [event["step"] for event in resumed],
        "steps_lost": sum(max(0, event["reached"] - event["step"]) for event in resumed),
        "code": code,
        "differs": sorted(key for key in expected if found.get(key) != expected[key]),
    }


def kill_trainer(process: "subprocess.Popen[bytes]") -> bool:
    """Kill the training process of a launch; return whether there was one."""
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            if "supervise.zygote import work" in " ".join(child.cmdline()):
                child.kill()
                return True
    return False


def storm(runs: int, results: Path) -> bool:
    """Disturb so many runs, the scripts in turn; return whether all are as the undisturbed ones."""
    found = json.loads(results.read_text()) if results.exists() else {}
    done = found.setdefault("runs", [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, expected = make_base(folder, "tiny"), {}
        for number in range(len(done), runs):
            script = SCRIPTS[number % len(SCRIPTS)]
            if script not in expected:
                subprocess.run(command(script, base, folder / script), env=ENVIRONMENT, check=True, capture_output=True)
                expected[script] = outcome(folder / script)
            done.append(disturbed(folder, script, base, expected[script], number))
            print(json.dumps(done[-1]), flush=True)
            found |= {"machine": machine(), "summary": summary(done)}
            results.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["summary"], indent=1))
    return found["summary"]["equal"] == len(done) and not found["summary"]["steps_lost"]


def summary(done: list[dict]) -> dict:
    """Return the counts over all runs."""
    return {
        "runs": len(done),
        "equal": sum(not one["differs"] and one["code"] == 0 for one in done),
        "kills": sum(one["kills"] for one in done),
        "of_them_with_the_keeper": sum(one["with_keeper"] for one in done),
        "steps_lost": sum(one["steps_lost"] for one in done),
    }


def overhead(results: Path, *, steps: int, shape: str) -> bool:
    """Train with and without a LiveCheckpoint, in turn in one training; write the ratios of the median steps."""
    from overhead import measure

    with tempfile.TemporaryDirectory() as name:
        seconds = measure(Path(name), make_base(Path(name), shape), steps=steps)
    row = {"base": shape, "steps_of_each_side": min(map(len, seconds.values()))}
    for place, name in enumerate(("", "cpu_")):
        plain, attached = (statistics.median(step[place] for step in seconds[side]) for side in ("plain", "attached"))
        row |= {f"{name}plain_ms": round(1000 * plain, 2), f"{name}attached_ms": round(1000 * attached, 2)}
        row[f"{name}ratio"] = round(attached / plain, 4)
    found = json.loads(results.read_text()) if results.exists() else {}
    found.setdefault("overhead", {})[shape] = row | {"machine": machine()}
    results.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    return row["ratio"] <= MOST_RATIO


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shape", default="30M")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.overhead:
        right = overhead(options.json, steps=options.steps, shape=options.shape)
    else:
        right = storm(options.runs, options.json)
    sys.exit(not right)
