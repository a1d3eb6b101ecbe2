"""One GPU: lora_kit, transformers' Trainer with peft, Liger and Unsloth at the shapes of models that people fine-tune.

    benchmarks/gpu.sh                     # within 10 minutes on a card of 80 GB or more, offline; then `pytest -m gpu`
    benchmarks/gpu.sh --cpu --size tiny   # the same code on a CPU, in a minute

The weights are random. The share of the GEMM rate counts 4 FLOPs per weight and token (6 where activations are
recomputed) against the rate of the model's own GEMMs, measured in the same process. The base lies in /dev/shm if
that is large enough. A system that no longer fits into the time is left out, with a message.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from throughput import HERE, Row, differences, ratios, run, say  # isort: skip  (first: it knows where the others are)
from ground import machine, median
from rich.console import Console
from rich.table import Table
from sizes import SIZES, WARM_UP_STEPS, Work
from systems import GPU

ORDER = ("llama-8b", "qwen-moe", "llama-1b")  # the one with a figure to reach comes first


def main() -> int:
    """Measure what is asked for, print the table and return the exit code."""
    asked = _asked()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started and removes the base
    if asked.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not (asked.cpu or torch.cuda.is_available()):
        print("benchmarks/gpu.py: torch sees no CUDA device; --cpu --size tiny tries the code without one")
        return 1
    console, rows, end = Console(width=150), list[Row](), time.monotonic() + 60 * asked.minutes
    facts = machine() | {"device": "cpu" if asked.cpu else torch.cuda.get_device_name()}
    facts["command"] = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    for name in asked.size:
        with tempfile.TemporaryDirectory(prefix="lora_kit-", dir=_place()) as place:
            work = Work(Path(place), name, SIZES[name].batch, asked.steps or SIZES[name].steps)
            _prepare(work, asked.cpu)
            rows += _measure(work, asked.only, end, facts, console)
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        return 1
    problems = []
    for name in asked.size:
        of_size = [row for row in rows if row["size"] == name]
        if of_size:
            console.print(_table(name, of_size))
            console.print(ratios(of_size))
            problems += differences(of_size)
    for problem in problems:
        console.print(problem, style="red")
    console.print(json.dumps(facts), soft_wrap=True)
    return 1 if problems else 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(ORDER), metavar="SIZE")
    parser.add_argument("--only", nargs="+", choices=GPU, default=list(GPU), metavar="SYSTEM")
    parser.add_argument("--steps", type=int, help="timed steps; by default what the size can take")
    parser.add_argument(
        "--minutes", type=float, default=5.5, help="after which nothing is begun (default: %(default)s)"
    )
    parser.add_argument("--cpu", action="store_true", help="try the code without a GPU")
    parser.add_argument("--json", type=Path, help="where the rows go")
    return parser.parse_args()


def _place() -> str | None:
    memory = Path("/dev/shm")
    enough = memory.is_dir() and os.statvfs(memory).f_bavail * os.statvfs(memory).f_frsize > 40e9
    return str(memory) if enough else None


def _prepare(work: Work, cpu: bool) -> None:
    """Make base and data in a process of its own: what it takes of the GPU must be free again."""
    code = f"import sys; sys.path[:0] = {[str(HERE / 'speed'), str(HERE / 'resilience')]!r}\n"
    code += "from pathlib import Path\nfrom sizes import Work, make_base\n"
    code += f"work = Work(Path({str(work.folder)!r}), {work.size!r}, {work.batch}, {work.steps})\n"
    code += f"make_base(work.folder, work.size, {'cpu' if cpu else 'cuda'!r})\nwork.write_data()\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def _measure(work: Work, systems: list[str], end: float, facts: dict, console: Console) -> list[Row]:
    rows = []
    for system in systems:
        for name, setting in GPU[system].items():
            label = f"{work.size}: {system}, {name}"
            if setting.requires and importlib.util.find_spec(setting.requires) is None:
                console.print(f"{label}: left out, {setting.requires} is not installed", style="yellow")
            elif time.monotonic() > end:
                console.print(f"{label}: left out, the time is over", style="yellow")
            else:
                console.print(f"{time.strftime('%H:%M:%S')} {label} ...")
                row = run(work, system, name, ["--gpu"], console)
                if row:
                    rows.append(row | {"size": work.size, "round": 1, "machine": facts})
                    say(row, console)
    return rows


def _table(name: str, rows: list[Row]) -> Table:
    columns = (
        "system",
        "settings",
        "tokens/s",
        "of GEMM rate",
        "of upper bound",
        "peak GB - weights",
        "save stall",
        "loss",
    )
    shown = Table(*columns, title=f"{name} {SIZES[name].note}")
    for row in rows:
        stalls, steps = row["stall_seconds"], row["step_seconds"][WARM_UP_STEPS:]
        shown.add_row(
            row["system"],
            row["settings"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['model_flops_share']:.1%}",
            f"{row['floor_share']:.1%}",
            f"{row['peak_bytes'] / 1e9:,.1f}",
            f"{median(stalls) / median(steps):.2%} of a step" if stalls else "",
            f"{row['mean_loss']:.4f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
