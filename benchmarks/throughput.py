"""Tokens per second, memory and share of the upper bound: lora_kit, transformers' Trainer with peft, TRL's SFTTrainer.

    python benchmarks/throughput.py --size 30m --rounds 2        # about 6 minutes on two cores
    python benchmarks/throughput.py --size 160m --rounds 2       # about 15
    python benchmarks/throughput.py --size 1.2b                  # about 20; one round, one timed step of 8 examples
    python benchmarks/throughput.py --size 160m --only lora_kit  # our own alone
    python benchmarks/throughput.py --size 160m --only lora_kit --paired --steps 8  # and the bound before every step

The same base (bf16, random weights), examples, adapter and optimizer for all, each system in a process of its own, in
turns, by default and with the best settings that are known. Two short steps warm up and are not timed; a first step
that compiles is listed separately. Only real tokens count, no padding. The upper bound is the speed of the GEMMs alone
(benchmarks/speed/floor.py), measured in the same process. Leave the machine alone meanwhile.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "speed"), str(HERE / "resilience")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from ground import machine  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sizes import SIZES, Work, make_base  # noqa: E402
from systems import SYSTEMS  # noqa: E402

Row = dict[str, Any]
SAME_LOSS, SAME_MEAN_LOSS = 1e-3, 5e-3  # of the loss: for the same steps; for steps of other examples
DISTURBED = 0.05  # of the machine's time: a measurement with more beside it is worth less
TRIES, PATIENCE = 2, 60.0  # of a measurement that was disturbed; seconds to wait for a quiet machine


def main() -> int:
    """Measure what is asked for, print the table and return the exit code."""
    asked = _asked()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started and removes the base
    console, rows, failed = Console(width=150), list[Row](), set[tuple[str, str]]()
    size, changes = SIZES[asked.size], [part for change in asked.set for part in ("--set", change)]
    changes += ["--paired"] if asked.paired else []
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as place:
        work = Work(Path(place), asked.size, size.batch, asked.steps or size.steps)
        make_base(work.folder, asked.size)
        work.write_data()
        facts = machine() | {"size": asked.size, "command": f"python benchmarks/throughput.py {_arguments()}"}
        for number in range(asked.rounds):
            for system in asked.only:
                for name in _settings(system, asked.settings):
                    if (system, name) in failed:
                        continue
                    console.print(f"{time.strftime('%H:%M:%S')} round {number + 1}: {system}, {name} ...")
                    measure = run if asked.anyway else undisturbed
                    row = measure(work, system, name, changes if system == "lora_kit" else [], console)
                    if row is None:
                        failed.add((system, name))
                        continue
                    rows.append(row | {"round": number + 1, "machine": facts})
                    say(row, console)
                    if asked.json:
                        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        return 1
    console.print(table(rows))
    console.print(ratios(rows))
    problems = differences(rows)
    for problem in problems:
        console.print(problem, style="red")
    console.print(json.dumps(facts), soft_wrap=True)
    return 1 if problems else 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument("--rounds", type=int, default=1, help="how often all are measured (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="timed steps; by default what the size can take")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument(
        "--settings", nargs="+", default=["default", "best"], help="default, best, others of systems.py, or all"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change lora_kit's recipe")
    parser.add_argument("--anyway", action="store_true", help="measure even while other processes are at work")
    parser.add_argument("--paired", action="store_true", help="measure lora_kit's upper bound before every step too")
    parser.add_argument("--json", type=Path, help="where the rows go")
    return parser.parse_args()


def _arguments() -> str:
    return " ".join(sys.argv[1:])


def _settings(system: str, wanted: list[str]) -> list[str]:
    return [name for name in SYSTEMS[system] if name in wanted or "all" in wanted]


def undisturbed(work: Work, system: str, name: str, more: list[str], console: Console) -> Row | None:
    """Measure when nobody else is at work, and again if somebody came; the least disturbed row of all tries."""
    best: Row | None = None
    for _ in range(TRIES):
        end = time.monotonic() + PATIENCE
        while psutil.cpu_percent(interval=2) / 100 > DISTURBED and time.monotonic() < end:
            pass
        row = run(work, system, name, more, console)
        if row is None:
            return best
        if best is None or row["others_share"] < best["others_share"]:
            best = row
        if row["others_share"] <= DISTURBED:
            break
        console.print(f"  other processes took {row['others_share']:.0%} of the machine meanwhile", style="yellow")
    return best


def run(work: Work, system: str, name: str, more: list[str], console: Console) -> Row | None:
    """Measure in a process of its own; None, and a line that says why, when it fails."""
    row, log = work.folder / "row.json", work.folder / "log.txt"
    row.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "speed" / "worker.py"), str(work.folder), work.size]
    command += [str(work.batch), str(work.steps), system, name, str(row), *more]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(work.folder / "compiled"),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with log.open("w") as output:
        ended = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if row.is_file():
        return json.loads(row.read_text())
    said = log.read_text().strip().splitlines()[-1:] or [""]
    missing = "; pip install 'lora_kit[bench]'" if "No module named 'trl'" in said[0] else ""
    console.print(f"{system}, {name}: left out, exit code {ended.returncode}: {said[0][:300]}{missing}", style="red")
    return None


def say(row: Row, console: Console) -> None:
    """Print a measurement."""
    speed = f"{row['tokens_per_second']:,.0f} of {row['floor_tokens_per_second']:,.0f} tokens/s"
    shares = row["floor_share_of_each_step"]
    if shares:
        speed += f"; {min(shares):.0%} to {max(shares):.0%} of the bound before each step, median"
    rest = f"{row['peak_bytes'] / 1e6:,.0f} MB above the base, loss {row['loss']:.4f}"
    console.print(f"  {speed} ({row['floor_share']:.0%}), {rest}")


def _medians(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """Return the median of the rounds of each system and setting."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["system"], row["settings"]), []).append(row)
    return {
        key: same[0] | {name: median(row[name] for row in same) for name in same[0] if _is_number(same[0][name])}
        for key, same in found.items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def table(rows: list[Row]) -> Table:
    """Return the medians as a table."""
    columns = (
        "system",
        "settings",
        "tokens/s",
        "supervised/s",
        "of upper bound",
        "peak MB - weights",
        "loss",
        "threads",
    )
    floor, shown = max(row["floor_tokens_per_second"] for row in rows), Table(*columns)
    shown.caption = f"the upper bound (GEMMs only) is {floor:,.0f} tokens/s, the fastest that was measured"
    for (system, name), row in _medians(rows).items():
        cells = (
            f"{row['tokens_per_second']:,.0f}",
            f"{row['supervised_tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / floor:.1%}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['mean_loss']:.4f}",
            f"{row['threads']:.0f}",
        )
        shown.add_row(system, name, *cells)
    return shown


def ratios(rows: list[Row]) -> Table:
    """Return how lora_kit compares with its peers' defaults, and with the fastest peer that was measured."""
    medians = _medians(rows)
    shown = Table("lora_kit", "against", "tokens/s", "memory above the base")
    ours = {name: row for (system, name), row in medians.items() if system == "lora_kit"}
    peers = {key: row for key, row in medians.items() if key[0] != "lora_kit"}
    against = {f"{system} {name}": row for (system, name), row in peers.items() if name == "default"}
    if peers:
        best = max(peers, key=lambda key: peers[key]["tokens_per_second"])
        against[f"the best peer, {best[0]} {best[1]}"] = peers[best]
    for name, row in ours.items():
        for other, peer in against.items():
            faster = row["tokens_per_second"] / peer["tokens_per_second"]
            shown.add_row(name, other, f"{faster:.2f} times", f"{row['peak_bytes'] / peer['peak_bytes']:.2f} of it")
    return shown


def differences(rows: list[Row]) -> list[str]:
    """Return what was not the same training: losses apart from the first row's."""
    first, found = rows[0], []
    for row in rows[1:]:
        if row["options"]["own_order"] or first["options"]["own_order"]:
            apart, most = abs(row["mean_loss"] / first["mean_loss"] - 1), SAME_MEAN_LOSS
        else:
            apart, most = np.abs(np.array(row["losses"]) / np.array(first["losses"]) - 1).max(), SAME_LOSS
        if not apart <= most:  # also where it is no number
            name, other = (f"{one['system']} {one['settings']}" for one in (row, first))
            found.append(f"{name} did not train the same as {other}: losses are {apart:.2%} apart (at most {most:.1%})")
    return found


if __name__ == "__main__":
    sys.exit(main())
