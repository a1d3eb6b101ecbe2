"""Two processes with a thread each against two runs of one process at the same time, and the sum of their gradients.

    python benchmarks/processes.py --size 30m --json benchmarks/results/processes.json   # about 4 minutes

In turns, `lora-kit train` trains one run on two processes, and two runs that know nothing of each other, each bound to
a core of its own with half of the batch. The ratio of the tokens per second is what working together costs. Then the
sum in tree order, which gives equal bytes for any number of processes, is timed against torch's all-reduce of the same
bytes. Leave the machine alone meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "speed"), str(HERE / "resilience")]

from ground import lines, machine  # noqa: E402
from ours import RECIPE  # noqa: E402
from sizes import SIZES, WARM_UP_STEPS, Work, make_base  # noqa: E402

SHARE, RATIO = 0.97, 1.2  # to reach: of the tokens per second of independent runs; times of torch's all-reduce
STATE_MIB = (4, 17, 80)  # float32 gradients of small, usual and large adapters
REPEATS = 20


def main() -> int:
    """Measure, print and return the exit code: 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--sums", action="store_true", help=argparse.SUPPRESS)  # what torchrun starts
    asked = parser.parse_args()
    if asked.sums:
        time_sums()
        return 0
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as folder:
        rates = measure_runs(Path(folder), asked.size, asked.rounds, asked.steps)
    result: dict[str, Any] = {name: round(median(found), 1) for name, found in rates.items()}
    result |= {"ratio": round(result["together"] / result["apart"], 3), "rates": rates, "size": asked.size}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        "--sums",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result |= {"sums": json.loads(ended.stdout.splitlines()[-1]), "machine": machine()}
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(result["ratio"] < SHARE or max(row["ratio"] for row in result["sums"].values()) > RATIO)


def measure_runs(folder: Path, size: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the tokens per second of every round: of two processes together, and of two runs apart, added up."""
    whole, half = (Work(folder, size, SIZES[size].batch // part, steps) for part in (1, 2))
    make_base(folder, size)
    whole.write_data()
    half.write_data()
    rates: dict[str, list[float]] = {"together": [], "apart": []}
    for number in range(rounds):
        (together,) = finished([start(whole, f"together-{number}", "--processes", "2")])
        apart = finished([start(half, f"apart-{number}-{core}", core=core) for core in (0, 1)])
        rates["together"].append(together)
        rates["apart"].append(sum(apart))
        print({name: [round(rate) for rate in found] for name, found in rates.items()}, flush=True)
    return rates


def start(work: Work, name: str, *more: str, core: int | None = None) -> tuple[Path, "subprocess.Popen[bytes]"]:
    """Start a run, bound to a core if one is given."""
    recipe, out = work.folder / f"{name}.yaml", work.folder / name
    recipe.write_text(RECIPE.format(base=work.base, data=work.data, steps=work.all_steps, batch=work.batch))
    command = [sys.executable, "-m", "lora_kit", "train", str(recipe), "--out", str(out), *more]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    bind: Callable[[], None] | None = None if core is None else lambda: os.sched_setaffinity(0, {core})
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, preexec_fn=bind)
    return out, process


def finished(started: list[tuple[Path, "subprocess.Popen[bytes]"]]) -> list[float]:
    """Wait for runs and return the median tokens per second of each."""
    rates = []
    for out, process in started:
        assert process.wait() == 0, f"{out}: the run failed"
        rates.append(median(line["tokens_per_second"] for line in lines(out / "metrics.jsonl")[WARM_UP_STEPS:]))
    return rates


def time_sums() -> None:
    """As one of two processes: time both sums in turns; process 0 prints the medians in milliseconds."""
    import torch
    from torch import distributed as dist

    from lora_kit.training.processes import Processes

    processes = Processes.start("float32")
    found = {}
    for mib in STATE_MIB:
        flat = torch.randn(mib * 2**18)
        sums = {"tree": lambda flat=flat: processes.tree_sum(flat, processes.count), "all_reduce": _all_reduce(flat)}
        seconds: dict[str, list[float]] = {name: [] for name in sums}
        for _ in range(REPEATS):
            for name, add in sums.items():
                flat.normal_()
                dist.barrier()
                began = time.perf_counter()
                add()
                dist.barrier()
                seconds[name].append(1000 * (time.perf_counter() - began))
        row = {name: round(median(each), 2) for name, each in seconds.items()}
        found[f"{mib} MiB"] = row | {"ratio": round(row["tree"] / row["all_reduce"], 2)}
    if processes.is_main:
        print(json.dumps(found))
    processes.leave()


def _all_reduce(flat: Any) -> Callable[[], Any]:
    from torch import distributed as dist

    return lambda: dist.all_reduce(flat)


if __name__ == "__main__":
    sys.exit(main())
