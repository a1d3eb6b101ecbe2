"""Measure the CPU time of the two commands that a user waits for most often, against their limits.

    python benchmarks/startup.py

Both numbers are user plus system time of a fresh process, the median of several starts, so that neither the disk nor
the load of the machine decides. The exit code is 1 if a command needs more than its limit.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
STARTS = 7
LIMITS = {"--help": 0.5, "check recipes/quickstart.yaml": 4.0}  # CPU-seconds


def cpu_seconds(command: list[str]) -> float:
    """Run a command and return the CPU time that it needed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure, print and write the results; return the exit code."""
    measures = {}
    for arguments, limit in LIMITS.items():
        command = [sys.executable, "-m", "lora_kit", *arguments.split()]
        cpu_seconds(command)  # writes the bytecode
        seconds = sorted(round(cpu_seconds(command), 3) for _ in range(STARTS))
        median = statistics.median(seconds)
        measures[arguments] = {"cpu_seconds": median, "all": seconds, "limit": limit, "reached": median <= limit}
        print(f"lora-kit {arguments}: {median:.2f} s of CPU, limit {limit:.1f} s")
    machine = {"processor": platform.machine(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    command = "python benchmarks/startup.py"
    RESULTS.write_text(json.dumps({"machine": machine | {"command": command}, "measures": measures}, indent=1) + "\n")
    return int(not all(measure["reached"] for measure in measures.values()))


if __name__ == "__main__":
    sys.exit(main())
