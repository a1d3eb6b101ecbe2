"""Measure everything that docs/reliability.md quotes, ours and transformers' Trainer with peft, in one run.

    python benchmarks/resilience/run.py             # the full counts, about 45 minutes; leave the machine alone
    python benchmarks/resilience/run.py --quick     # a tenth of the trials, about 10 minutes
    python benchmarks/resilience/run.py --only kills damage --json mine.json

Every measure is written to the JSON file as soon as it is there; with --only the others stay. The exit code is 1 if one
of ours misses its target.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage
import elastic
import hosts
import kills
import pairs
import remote
import restart
import resume_time
import stall
import storm
from ground import HERE, machine
from rich.console import Console
from rich.table import Table

Found = dict[str, Any]
RESULTS = HERE.parent / "results" / "resilience.json"
FAULTS = HERE.parents[1] / "tests" / "faults"


@dataclass(frozen=True)
class Measure:
    """One row of the table: how it is measured, what to show of it, what it must reach."""

    full: Callable[[Path], Found]
    quick: Callable[[Path], Found]
    ours: Callable[[Found], str]
    trainer: Callable[[Found], str]
    target: str
    reached: Callable[[Found], bool]


def crash_states(states: int) -> Found:
    """Return how many legal states of a crashed commit read back as the newest checkpoint or the one before."""
    command = [sys.executable, str(FAULTS / "crash_states.py"), "--states", str(states)]
    ended = subprocess.run(command, capture_output=True, text=True)
    return {"said": ended.stdout.strip(), "all_read_back": ended.returncode == 0}


def writer_kills(kills: int) -> Found:
    """Return what killing the writer of live snapshots alone, in the middle of its work, tears and loses."""
    command = [sys.executable, str(FAULTS / "kill_writer.py"), "--kills", str(kills)]
    ended = subprocess.run(command, capture_output=True, text=True)
    return {"said": ended.stdout.strip(), "all_whole": ended.returncode == 0}


def mutated_files(mutations: int) -> Found:
    """Return how many readers of a run's files do anything but accept or refuse a file that was changed at random."""
    command = [sys.executable, str(FAULTS / "mutated_files.py"), "--mutations", str(mutations), "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True)
    return {"said": ended.stdout.strip(), "mutations_of_each_file": mutations, "all_right": ended.returncode == 0}


def _kills(found: Found) -> str:
    own = found["ours"]
    return f"{own['kills'] - own['resumes_that_failed']} of {own['kills']} resume, {own['finished_steps_lost']} lost"


def _kills_reached(found: Found) -> bool:
    own = found["ours"]
    lost = own["resumes_that_failed"] or own["finished_steps_lost"]
    return not lost and own["runs_with_the_bytes_of_the_undisturbed_one"] == own["runs"]


def _sigterm_reached(found: Found) -> bool:
    return all(
        one["exit_code"] == 75
        and one["seconds_to_exit"] < 2
        and one["durable"] == one["steps_shown"]
        and one["final_bytes_equal"]
        for one in found["ours"]
    )


def _flips(found: Found) -> str:
    return ", ".join(
        f"{one['resumed_in_silence_with_another_model']} of {one['flips']} silent in {name.partition('.')[0]}"
        for name, one in found["trainer"].items()
    )


def _pairs(found: Found) -> str:
    lost, repeated = found["finished_steps_lost"], found["finished_steps_repeated"]
    return f"{found['two_writers']} of {found['ran']} pairs with two writers, {lost} steps lost, {repeated} repeated"


def _pairs_reached(found: Found) -> bool:
    problems = (found["two_writers"], found["finished_steps_lost"], found["finished_steps_repeated"], found["wrong"])
    return found["ran"] == found["pairs"] and not any(problems)


def _all_equal(found: Found) -> bool:
    return all(
        one["ours"]["final_bytes_equal"] and one["ours"]["examples_after_each_step_as_planned"]
        for one in found.values()
    )


def _hosts(found: Found) -> str:
    if "skipped" in found:
        return str(found["skipped"])
    return ", ".join(
        f"{one['went_on_by_themselves']} of {one['asked']} {name}, {one['finished_steps_lost']} steps lost"
        for name, one in found.items()
        if name in ("kills", "cuts")
    )


def _hosts_reached(found: Found) -> bool:
    return "skipped" not in found and all(
        one["went_on_by_themselves"] == one["asked"]
        and one["each_step_once"]
        and one["final_bytes_equal"]
        and not one["finished_steps_lost"]
        for one in (found["kills"], found["cuts"])
    )


MEASURES = {
    "crash_states": Measure(
        full=lambda folder: crash_states(5000),
        quick=lambda folder: crash_states(500),
        ours=lambda found: found["said"],
        trainer=lambda found: "-",
        target="all read back",
        reached=lambda found: found["all_read_back"],
    ),
    "writer_kills": Measure(
        full=lambda folder: writer_kills(500),
        quick=lambda folder: writer_kills(50),
        ours=lambda found: found["said"],
        trainer=lambda found: "-",
        target="0 wrong, 0 lost",
        reached=lambda found: found["all_whole"],
    ),
    "mutated_files": Measure(
        full=lambda folder: mutated_files(100_000),
        quick=lambda folder: mutated_files(10_000),
        ours=lambda found: found["said"],
        trainer=lambda found: "-",
        target="0 readers fail",
        reached=lambda found: found["all_right"],
    ),
    "resume_time": Measure(
        full=resume_time.measure,
        quick=lambda folder: resume_time.measure(folder, shapes=("30M",), trials=2),
        ours=lambda found: ", ".join(f"{shape} {one['ours_seconds']} s" for shape, one in found.items()),
        trainer=lambda found: ", ".join(f"{shape} {one['trainer_seconds']} s" for shape, one in found.items()),
        target="4 times shorter",
        reached=lambda found: all(one["times_shorter"] >= one["must_be"] for one in found.values()),
    ),
    "stall": Measure(
        full=stall.measure,
        quick=lambda folder: stall.measure(folder, rounds=1),
        ours=lambda found: f"waits {found['ours_stall_share']:.3%}, step x {found['ours_step_with_over_without']:.3f}",
        trainer=lambda found: f"waits {found['trainer_stall_seconds'] / found['trainer_step_seconds']:.0%}",
        target="under 1%, at most x 1.03",
        reached=lambda found: found["ours_stall_share"] < 0.01 and found["ours_step_with_over_without"] <= 1.03,
    ),
    "remote_resume": Measure(
        full=remote.resume,
        quick=lambda folder: remote.resume(folder, trials=2),
        ours=lambda found: f"{found['resume_seconds_above_local']} s more than from local disk",
        trainer=lambda found: "-",
        target="under 3 s",
        reached=lambda found: found["resume_seconds_above_local"] < 3,
    ),
    "remote_steps": Measure(
        full=remote.steps,
        quick=lambda folder: remote.steps(folder, blocks=2),
        ours=lambda found: (
            f"step x {found['step_with_over_without']:.3f}, {found['uploads']} uploads, "
            f"{found['cpu_share_of_uploads']:.1%} of a core"
        ),
        trainer=lambda found: "-",
        target="x 0.98 to x 1.02",
        reached=lambda found: abs(found["step_with_over_without"] - 1) <= 0.02 and found["uploads"] > 0,
    ),
    "sigterm": Measure(
        full=restart.sigterm,
        quick=lambda folder: restart.sigterm(folder, trials=1, peer_trials=1),
        ours=lambda found: f"durable and exited in {found['ours_median_seconds']} s, all resume",
        trainer=lambda found: (
            f"{sum(one['resume_exit_code'] == 0 for one in found['trainer'])} of {len(found['trainer'])} resume"
        ),
        target="durable in 2 s, exit 75, resumes",
        reached=_sigterm_reached,
    ),
    "elastic": Measure(
        full=elastic.measure,
        quick=elastic.measure,
        ours=lambda found: "same examples, same bytes" if _all_equal(found) else "differs",
        trainer=lambda found: ", ".join(
            f"{change}: {one['trainer']['repeated']} repeated, {one['trainer']['never_seen']} never seen"
            for change, one in found.items()
        ),
        target="0 and 0, same bytes",
        reached=_all_equal,
    ),
    "restart": Measure(
        full=restart.measure,
        quick=lambda folder: restart.measure(folder, trials=3, peer_trials=1),
        ours=lambda found: f"{found['ours']['went_on_by_themselves']} of {found['ours']['trials']} go on",
        trainer=lambda found: f"{found['trainer']['went_on_by_themselves']} of {found['trainer']['trials']} go on",
        target="all go on, same bytes",
        reached=lambda found: found["ours"]["final_bytes_equal"] == found["ours"]["trials"],
    ),
    "damage": Measure(
        full=damage.measure,
        quick=lambda folder: damage.measure(folder, trials=20, peer_trials=2),
        ours=lambda found: f"{found['ours']['final_bytes_equal']} of {found['ours']['trials']} noticed and survived",
        trainer=_flips,
        target="all noticed, same bytes",
        reached=lambda found: (
            found["ours"]["noticed_by_name"] == found["ours"]["final_bytes_equal"] == found["ours"]["trials"]
        ),
    ),
    "kills": Measure(
        full=kills.measure,
        quick=lambda folder: kills.measure(folder, kills=30, peer_kills=4),
        ours=_kills,
        trainer=lambda found: f"{found['trainer']['resumes_that_failed']} of {found['trainer']['kills']} resumes fail",
        target="all resume, 0 steps lost, same bytes",
        reached=_kills_reached,
    ),
    "storm": Measure(
        full=storm.measure,
        quick=lambda folder: storm.measure(folder, seconds=60, undisturbed=10),
        ours=lambda found: f"goodput {found['ours']['goodput']:.0%}, by the model {found['ours']['model']:.0%}",
        trainer=lambda found: f"goodput {found['trainer']['goodput']:.0%}",
        target="goodput 70% or more, within 5 points of the model",
        reached=lambda found: (
            found["ours"]["goodput"] >= 0.7 and abs(found["ours"]["goodput"] - found["ours"]["model"]) <= 0.05
        ),
    ),
    "hosts": Measure(
        full=hosts.measure,
        quick=lambda folder: hosts.measure(folder, kills=3, cuts=1),
        ours=_hosts,
        trainer=lambda found: "-",
        target="all go on, 0 steps lost, same bytes",
        reached=_hosts_reached,
    ),
    "pairs": Measure(
        full=pairs.measure,
        quick=lambda folder: pairs.measure(folder, pairs=20),
        ours=_pairs,
        trainer=lambda found: "-",
        target="0 of all, none skipped",
        reached=_pairs_reached,
    ),
}


def main() -> int:
    """Run what is asked for, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="MEASURE")
    parser.add_argument("--quick", action="store_true", help="fewer trials")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    asked = parser.parse_args()
    console, missed = Console(width=150), []
    table = Table("measure", "lora_kit", "Trainer + peft", "must reach", "reached")
    how = {"command": f"python benchmarks/resilience/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"}
    results = {"machine": machine() | how | {"date": time.strftime("%Y-%m-%d")}, "measures": {}}
    if asked.only != list(MEASURES) and asked.json.is_file():  # what is measured again replaces what is there
        results = json.loads(asked.json.read_text())
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    for name in asked.only:
        measure, began = MEASURES[name], time.monotonic()
        console.print(f"{time.strftime('%H:%M:%S')} {name} ...")
        with tempfile.TemporaryDirectory(prefix="lora_kit-") as place:
            found = (measure.quick if asked.quick else measure.full)(Path(place))
        reached = measure.reached(found)
        missed += [] if reached else [name]
        table.add_row(name, measure.ours(found), measure.trainer(found), measure.target, "yes" if reached else "NO")
        taken = round(time.monotonic() - began)
        results["measures"][name] = found | {"must_reach": measure.target, "reached": reached, "took_seconds": taken}
        asked.json.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table)
    console.print(f"{asked.json}: {json.dumps(results['machine'])}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
