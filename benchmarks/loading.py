"""Host memory of each process while a base is loaded, whole on every process or sharded.

    python benchmarks/loading.py --size 1.2b --processes 2 --json benchmarks/results/loading.json     # about 2 minutes
    python benchmarks/loading.py --size 30m     # a few seconds, though libraries then outweigh the base

Each process loads the base as a run does and watches its own RssAnon, the memory that is not backed by a file; mapped
files do not count, because the kernel drops their pages when it needs memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "speed"), str(HERE / "resilience")]

from ground import machine  # noqa: E402
from sizes import SIZES, make_base  # noqa: E402

INTERVAL = 0.002  # seconds between two looks at the memory


def main() -> int:
    """Measure, print the rows and return the exit code: 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.2b")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return worker(Path(asked.worker[0]), asked.worker[1] == "sharded", Path(asked.worker[2]))
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as folder:
        base = make_base(Path(folder), asked.size)
        found = {where: measure(base, where, asked.processes) for where in ("replicated", "sharded")}
    result = found | {"size": asked.size, "processes": asked.processes, "machine": machine()}
    largest, whole = found["sharded"][0]["largest_tensor"], found["replicated"][0]["peak_bytes"]
    result["ratio"] = max(row["peak_bytes"] - largest for row in found["sharded"]) / whole
    result["of_a_shard"] = max((row["peak_bytes"] - largest) / row["held_bytes"] for row in found["sharded"])
    print(json.dumps(result, indent=1))
    print(f"without the largest tensor, {result['ratio']:.2f} of replicated (limit 0.65)")
    print(f"without the largest tensor, {result['of_a_shard']:.2f} of a shard (limit 1.3)")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(result["ratio"] > 0.65 or result["of_a_shard"] > 1.3)


def measure(base: Path, where: str, processes: int) -> list[dict[str, Any]]:
    """Load in several processes at once; return what each has measured."""
    import os

    from lora_kit.supervise.launch import environments

    rows = [base.parent / f"{where}.{index}" for index in range(processes)]
    command = [sys.executable, __file__, "--worker", str(base), where]
    started = [
        subprocess.Popen([*command, str(row)], env=os.environ | environment)
        for row, environment in zip(rows, environments(processes), strict=True)
    ]
    codes = [process.wait() for process in started]
    assert not any(codes), codes
    return [json.loads(row.read_text()) for row in rows]


def worker(base: Path, sharded: bool, row: Path) -> int:
    """Load a base in this process and write what it took."""
    from lora_kit.model.base import load_base
    from lora_kit.model.source import locate
    from lora_kit.recipe.schema import Base
    from lora_kit.training.processes import Processes

    processes, settings = Processes.start("bfloat16"), Base(repo=str(base))
    source = locate(settings, base)
    mesh = processes.mesh() if sharded else None
    processes.barrier()
    with Peak() as peak:
        began = time.perf_counter()
        model = load_base(source, settings, processes.device, mesh)
        seconds = time.perf_counter() - began
    parameters = list(model.parameters())
    held = sum(getattr(parameter, "_local_tensor", parameter).nbytes for parameter in parameters)
    largest = max(parameter.nbytes for parameter in parameters)
    found = {"peak_bytes": peak.bytes, "held_bytes": held, "largest_tensor": largest, "seconds": round(seconds, 2)}
    row.write_text(json.dumps(found))
    processes.barrier()
    return 0


class Peak:
    """The most memory that this process took in a block, above what it had before."""

    def __enter__(self) -> "Peak":
        self.bytes, self._before, self._end = 0, anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(INTERVAL):
            self.bytes = max(self.bytes, anonymous() - self._before)


def anonymous() -> int:
    """Return RssAnon of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    sys.exit(main())
