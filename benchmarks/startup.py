"""Measure how long a user waits for the first line and the first step of a training, and for two other commands.

    python benchmarks/startup.py [--before COMMIT]

Training is measured by the clock, from the start of the command to the first line that it prints and to the first step
of the quickstart; `lora_kit`'s cache is empty at each start. With --before, the same is measured of another commit, in
turns with this one, and the first step must take at most half of that commit's time. The other numbers are user plus
system time of a fresh process. All numbers are medians of several starts. The exit code is 1 if a limit is exceeded.
"""

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
STARTS, TRAININGS = 7, 5
LIMITS = {"--help": 0.5, "check recipes/quickstart.yaml": 4.0}  # CPU-seconds
FIRST_LINE, SHARE_OF_BEFORE = 0.5, 0.5  # seconds; the share of the time to the first step that --before takes
WAIT_SECONDS = 120.0


def cpu_seconds(command: list[str]) -> float:
    """Run a command and return the CPU time that it needed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_training(checkout: Path) -> tuple[float, float]:
    """Start the quickstart of a checkout; return the seconds to its first line and to its first step, then kill it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics = folder / "run" / "metrics.jsonl"
        environment = os.environ | {"PYTHONPATH": str(checkout), "LORA_KIT_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "lora_kit", "train", "recipes/quickstart.yaml", "--out", str(folder / "run")]
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            first_line = time.perf_counter() - began
            while not (metrics.is_file() and metrics.stat().st_size):
                if not line or process.poll() is not None or time.perf_counter() - began > WAIT_SECONDS:
                    raise RuntimeError(f"{checkout}: the quickstart does not train")
                time.sleep(0.002)
            return first_line, time.perf_counter() - began
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def summary(values: list[float]) -> dict[str, Any]:
    """Return the median and all values."""
    return {"seconds": round(statistics.median(values), 3), "all": sorted(round(value, 3) for value in values)}


def measure_training(before: Path | None) -> dict[str, Any]:
    """Measure starts of this checkout and, in turns with them, of another checkout."""
    checkouts = {"now": ROOT} | ({"before": before} if before else {})
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    for turn in range(TRAININGS + 1):
        for name, checkout in checkouts.items():
            measured = start_training(checkout)
            if turn:  # the first start writes the bytecode
                times[name].append(measured)
    measures: dict[str, Any] = {}
    for place, what in enumerate(("first line", "first step")):
        entry: dict[str, Any] = {name: summary([each[place] for each in found]) for name, found in times.items()}
        if what == "first line":
            entry |= {"limit": FIRST_LINE, "reached": entry["now"]["seconds"] <= FIRST_LINE}
        elif before:
            share = round(entry["now"]["seconds"] / entry["before"]["seconds"], 3)
            entry |= {"share": share, "limit": SHARE_OF_BEFORE, "reached": share <= SHARE_OF_BEFORE}
        measures[f"train: {what}"] = entry
        shown = ", ".join(f"{name} {entry[name]['seconds']:.2f} s" for name in checkouts)
        print(f"lora-kit train, {what}: {shown}")
    return measures


def measure_commands() -> dict[str, Any]:
    """Measure the CPU time of the commands of `LIMITS`."""
    measures = {}
    for arguments, limit in LIMITS.items():
        command = [sys.executable, "-m", "lora_kit", *arguments.split()]
        cpu_seconds(command)  # writes the bytecode
        seconds = sorted(round(cpu_seconds(command), 3) for _ in range(STARTS))
        median = statistics.median(seconds)
        measures[arguments] = {"cpu_seconds": median, "all": seconds, "limit": limit, "reached": median <= limit}
        print(f"lora-kit {arguments}: {median:.2f} s of CPU, limit {limit:.1f} s")
    return measures


def main() -> int:
    """Measure, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", metavar="COMMIT", help="also measure the starts of this commit")
    before = parser.parse_args().before
    commit = None
    if before:
        commit = subprocess.check_output(["git", "rev-parse", "--short", before], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as name:
        checkout = Path(name) / "before" if before else None
        if checkout:
            subprocess.run(["git", "worktree", "add", "-q", "--detach", checkout, before], cwd=ROOT, check=True)
        try:
            measures = measure_training(checkout) | measure_commands()
        finally:
            if checkout:
                subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=ROOT, check=True)
    machine = {"processor": platform.machine(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    machine |= {"cores": len(os.sched_getaffinity(0)), "before": commit}
    command = "python benchmarks/startup.py" + (f" --before {commit}" if commit else "")
    RESULTS.write_text(json.dumps({"machine": machine | {"command": command}, "measures": measures}, indent=1) + "\n")
    return int(not all(measure.get("reached", True) for measure in measures.values()))


if __name__ == "__main__":
    sys.exit(main())
