"""Compare the estimate of memory and time with training, at the shapes of benchmarks/throughput.py.

    python benchmarks/estimate.py                      # 30m and 160m, about two minutes on two cores
    python benchmarks/estimate.py --size 1.2b --steps 1

For each size a process estimates as `lora-kit check --time` does, trains the same recipe, and estimates again. Memory
is the peak of resident memory, on a GPU that of its tensors. Seconds are those of the timed steps, without the two
steps of the warm-up. The rates of a machine change with what else it does, so the mean of both estimates is compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "speed"), str(HERE / "resilience")]

from ground import machine  # noqa: E402
from sizes import SIZES, WARM_UP_STEPS, Work  # noqa: E402

RESULTS = HERE / "results" / "estimate.json"
Row = dict[str, Any]


def main() -> None:
    """Measure the sizes, each in a process of its own, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["30m", "160m"], metavar="SIZE")
    parser.add_argument("--steps", type=int, help="timed steps; by default what the size can take")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the file of rows (default: %(default)s)")
    parser.add_argument(
        "--busy", action="store_true", help="count processor time of one thread, for a machine with other work"
    )
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where bases are kept; by default a temporary folder")
    asked = parser.parse_args()
    if asked.row:
        if asked.busy:
            _count_processor_time()
        asked.row.write_text(json.dumps(measured(asked.folder, asked.size[0], asked.steps, asked.set)))
        return
    rows = json.loads(asked.json.read_text())["rows"] if asked.json.is_file() else []
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as place:
        folder = asked.folder or Path(place)
        for size in asked.size:
            row = _in_process(folder, size, asked.steps or SIZES[size].steps, asked.set, busy=asked.busy)
            rows = [one for one in rows if (one["size"], one["changes"]) != (size, asked.set)] + [row]
            content = {"command": "python benchmarks/estimate.py", "machine": machine(), "rows": rows}
            asked.json.write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(rows))


def _count_processor_time() -> None:
    """Let the estimate and the loop read the processor time of this process instead of the clock."""
    import torch

    from lora_kit.training import loop, rates

    torch.set_num_threads(1)
    counted = SimpleNamespace(perf_counter=time.process_time, time=time.time)
    loop.time, rates.time = counted, counted


def _in_process(folder: Path, size: str, steps: int, changes: list[str], *, busy: bool) -> Row:
    """Make the base in one process and measure in another, whose memory then holds nothing else."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    code = f"import sys; sys.path[:0] = {sys.path[:2]!r}; from pathlib import Path; from sizes import *\n"
    code += f"make_base(Path({str(folder)!r}), {size!r}); "
    code += f"Work(Path({str(folder)!r}), {size!r}, {SIZES[size].batch}, {steps}).write_data()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    row = folder / "row.json"
    command = [sys.executable, __file__, "--row", str(row), "--folder", str(folder), "--size", size]
    command += ["--steps", str(steps), *(part for change in changes for part in ("--set", change))]
    command += ["--busy"] if busy else []
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads(row.read_text())


def measured(folder: Path, size: str, steps: int, changes: list[str]) -> Row:
    """Return the estimate and the measurement of a size."""
    import ours
    import torch

    from lora_kit.check import estimate_parts
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training import loop
    from lora_kit.training.comparison import peak_memory

    work = Work(folder, size, SIZES[size].batch, steps)
    path = folder / "recipe.yaml"
    path.write_text(ours.RECIPE.format(base=work.base, data=work.data, steps=work.all_steps, batch=work.batch))
    recipe = load_recipe(path, changes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contents, before = estimate_parts(recipe)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run = loop.train(recipe, Path(place) / "run")
        peak, lines = peak_memory(device), run.metrics
    _, after = estimate_parts(recipe)
    timed = range(WARM_UP_STEPS, work.all_steps)
    estimates = [sum(speed.step(contents.first[step]) for step in timed) for speed in (before, after)]
    sizes = before.sizes
    return {
        "size": size,
        "changes": changes,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "processor_time": loop.time is not time,
        "memory_estimated_bytes": sizes.device_bytes if device.type == "cuda" else sizes.process_bytes("cpu"),
        "memory_measured_bytes": peak,
        "seconds_estimated_before": round(estimates[0], 3),
        "seconds_estimated_after": round(estimates[1], 3),
        "seconds_measured": round(sum(lines[step]["tokens"] / lines[step]["tokens_per_second"] for step in timed), 3),
        "matmul_flops_per_second": round(before.rates.flops_per_second),
    }


def markdown(rows: list[Row]) -> str:
    """Return the rows as the table of docs/estimate.md."""
    heads = ["size", "threads", "memory: estimated", "measured", "", "seconds: estimated", "measured", ""]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        memory = [row[f"memory_{name}_bytes"] for name in ("estimated", "measured")]
        seconds = [(row["seconds_estimated_before"] + row["seconds_estimated_after"]) / 2, row["seconds_measured"]]
        errors = [f"{estimated / found - 1:+.1%}" for estimated, found in (memory, seconds)]
        megabytes, times = [f"{count / 1e6:,.0f} MB" for count in memory], [f"{each:.2f}" for each in seconds]
        name = " ".join([row["size"], *row["changes"]])
        lines.append([name, str(row["threads"]), *megabytes, errors[0], *times, errors[1]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
