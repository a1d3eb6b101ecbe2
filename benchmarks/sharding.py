"""Tokens per second with a sharded base, against the whole base on every process, and what the gathering takes.

    python benchmarks/sharding.py --size 160m --processes 2 --json benchmarks/results/sharding.json   # about 4 minutes
    python benchmarks/sharding.py --size 160m --rounds 1 --steps 2    # half of that; --size tiny tries the code

Both train the same steps with `lora-kit train`, in turns, and their losses must be equal. The first two steps warm up.
Then a sharded run is profiled: the share is the time inside FSDP's all-gathers (with the copies before and after) of
process 0, divided by the time of the profiled steps. Leave the machine alone meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "speed"), str(HERE / "resilience")]

from ground import lines, machine  # noqa: E402
from ours import RECIPE  # noqa: E402
from sizes import SIZES, WARM_UP_STEPS, Work, make_base  # noqa: E402

TARGET = 0.8  # of the tokens per second with the whole base on each process
GATHERING, STEP = "FSDP::all_gather", "part: step"  # prefixes of ranges in the trace


def main() -> int:
    """Measure, print and return the exit code: 1 if sharding is slower than the target or changes a loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="160m")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the result goes")
    asked = parser.parse_args()
    rates: dict[str, list[float]] = {"replicated": [], "sharded": []}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as folder:
        work = Work(Path(folder), asked.size, SIZES[asked.size].batch, asked.steps)
        make_base(work.folder, asked.size)
        work.write_data()
        for number in range(asked.rounds):
            for where, found in rates.items():
                steps = train(work, where, asked.processes, f"{where}-{number}")
                losses[where] = [step["loss"] for step in steps]
                found += [step["tokens_per_second"] for step in steps[WARM_UP_STEPS:]]
                print(where, [round(rate) for rate in found], flush=True)
        train(work, "sharded", asked.processes, "profiled", "--profile")
        share = gathering_share(work.folder / "profiled" / "profile" / "trace.json")
    result = {where: round(median(found), 1) for where, found in rates.items()}
    result |= {"ratio": round(result["sharded"] / result["replicated"], 3), "gathering_share": round(share, 3)}
    result |= {"same_losses": losses["sharded"] == losses["replicated"], "rates": rates}
    result |= {"size": asked.size, "processes": asked.processes, "machine": machine()}
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(result["ratio"] < TARGET or not result["same_losses"])


def train(work: Work, where: str, processes: int, name: str, *more: str) -> list[dict[str, Any]]:
    """Train and return the lines of metrics.jsonl."""
    recipe, out = work.folder / "recipe.yaml", work.folder / name
    recipe.write_text(RECIPE.format(base=work.base, data=work.data, steps=work.all_steps, batch=work.batch))
    command = [sys.executable, "-m", "lora_kit", "train", str(recipe), "--out", str(out), "--processes", str(processes)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    command += ["--set", f"base.placement={where}", *more]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return lines(out / "metrics.jsonl")


def gathering_share(trace: Path) -> float:
    """Return the time inside all-gathers, divided by the time of the steps."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") == "user_annotation"]
    gathering, steps = (
        sum(event["dur"] for event in events if event["name"].startswith(prefix)) for prefix in (GATHERING, STEP)
    )
    return gathering / steps


if __name__ == "__main__":
    sys.exit(main())
