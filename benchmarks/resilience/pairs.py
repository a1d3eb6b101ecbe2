"""Two jobs on one run, each somewhere, while one of them is killed, stopped or paused: is there ever a second writer?

What is the same for both jobs and what differs is drawn at random: PID namespace, host name, boot id, clock, user,
shared memory. The judge is outside: a preloaded library records which job writes to which file, in order, and the logs
are read a hundred times a second. The heartbeat is shortened (tests/places.py), so that a takeover takes seconds.
"""

import collections
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ground import finish, lines, make_base, make_data, make_recipe, ours, state_hash

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from places import DEAD_SECONDS, NOT_ALLOWED, Place, Shim, family, library, signal_all, start_at
from runs import fork_server

STEPS = 14
FACTORS = ("container", "host", "boot", "clock", "user", "shm")
BLOWS = ("none", "kill the trainer", "kill all", "terminate", "pause all", "pause the launcher", "pause the trainer")
CLOCKS = (5.0, -5.0, 3600.0, -86400.0, 1e8)
LIMIT_SECONDS = 600.0  # a guard against hangs
TOGETHER = 4  # pairs at a time: a job mostly waits


@dataclass
class Pair:
    """A pair of jobs and what was seen of it.

    Attributes:
        other: The factors in which the jobs differ.
        blow: What happens to the first job, after the step `at`.
        pause: Seconds until a paused job goes on.
        second_at: Seconds after the first job's start at which the second starts; None for the moment of the blow.
        cuts: For each time that metrics.jsonl lost lines: the last step before and after, the newest checkpoint before.
    """

    number: int
    other: list[str]
    blow: str
    at: int
    pause: float
    second_at: float | None
    codes: dict[str, int] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    cuts: list[tuple[int, int, int]] = field(default_factory=list)
    skipped: str = ""
    two_writers: list[str] = field(default_factory=list)
    lost: int = 0
    beyond: int = 0
    repeated: int = 0
    wrong: list[str] = field(default_factory=list)


def measure(folder: Path, *, pairs: int = 200, seed: int = 0) -> dict[str, Any]:
    """Return how many of so many pairs ran, and in how many there were two writers, or lost or repeated steps."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # a step takes milliseconds
    command = [sys.executable, __file__, str(pairs), str(seed), str(folder)]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=one_thread).stdout
    )
    return found


def main() -> None:
    """Run so many pairs from a seed in a folder, and print what was found as JSON."""
    pairs, seed, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    so = library(folder)
    if so is None or os.getuid() != 0:
        print(json.dumps(_summary([], pairs, "needs root, for namespaces and other users, and a C compiler")))
        return
    folder.chmod(0o755)
    for file in make_base(folder, "tiny").iterdir():
        file.chmod(0o644)
    recipe = make_recipe(folder, "pairs", "tiny", make_data(folder, 200), steps=STEPS, every=4, seconds=0.3)
    assert finish(ours(recipe, folder / "pairs-undisturbed")) == 0
    expected = state_hash(folder / "pairs-undisturbed", STEPS)
    print(json.dumps(run_pairs(folder, so, recipe, expected, pairs=pairs, seed=seed, together=TOGETHER), indent=1))


def run_pairs(
    folder: Path, so: Path, recipe: Path, expected: str, *, pairs: int, seed: int, together: int
) -> dict[str, Any]:
    """Run pairs on a recipe of `STEPS` steps whose undisturbed run has the expected bytes."""
    fork_server(str(so))  # before the threads need it
    with ThreadPoolExecutor(together) as pool:
        seen = list(pool.map(lambda number: _run(folder, so, recipe, expected, _draw(seed, number)), range(pairs)))
    return _summary(seen, pairs)


def _draw(seed: int, number: int) -> tuple[Pair, random.Random]:
    rng = random.Random(f"{seed} {number}")
    other = [factor for factor in FACTORS if rng.random() < 0.5]
    if "boot" in other and "shm" not in other:
        other.append("shm")  # two machines have no memory in common
    second_at = rng.choice([0.0, rng.uniform(0, 1.5), None])
    pause = rng.choice([rng.uniform(0.1, 1.0), DEAD_SECONDS + rng.uniform(0.5, 3.0)])
    return Pair(number, other, rng.choice(BLOWS), rng.randint(1, STEPS - 3), pause, second_at), rng


def _places(folder: Path, other: list[str], rng: random.Random) -> list[Place]:
    """Return where two jobs are that differ in some factors."""
    boot = folder / "boot"
    boot.write_text("00000000-0000-0000-0000-000000000000\n")
    changed = {name: {rng.randrange(2)} if name in other else set[int]() for name in FACTORS}
    if "container" in other and rng.random() < 0.5:
        changed["container"] = {0, 1}  # both are process 1
    users = [rng.choice([0, 0, 20001])] * 2
    if "user" in other:
        users[rng.randrange(2)] = 20002
    places = []
    for job in (0, 1):
        shm = ""
        if job in changed["shm"]:
            shm = tempfile.mkdtemp(prefix="pairs-", dir="/dev/shm")
            Path(shm).chmod(0o1777)
        place = Place(
            container=job in changed["container"],
            host=f"host-{job}" if job in changed["host"] else "",
            boot=str(boot) if job in changed["boot"] else "",
            shm=shm,
            user=users[job],
            hidden="user" in other and rng.random() < 0.5,
        )
        places.append(place)
    return places


def _run(folder: Path, so: Path, recipe: Path, expected: str, drawn: tuple[Pair, random.Random]) -> Pair:
    pair, rng = drawn
    place = folder / f"pair-{pair.number}"
    place.mkdir()
    place.chmod(0o777)
    record = place / "record"
    record.touch()
    record.chmod(0o666)
    jobs, out = _places(place, pair.other, rng), place / "run"
    shims = {name: Shim(place / f"shim-{name}", f"/{place.name}/run/") for name in "ABC"}
    if "clock" in pair.other:
        shims["B"].set(clock=rng.choice(CLOCKS))
    processes = dict[str, Any]()

    def start(name: str, job: Place) -> None:
        processes[name] = start_at(job, recipe, out, shim=shims[name], so=so, name=name, record=record)

    begun, struck, paused, until, shown, durable = time.monotonic(), False, list[Any](), 0.0, 0, 0
    start("A", jobs[0])
    while len(pair.codes) < len(processes):
        now = time.monotonic()
        shown, durable = _look(out, pair, shown, durable)
        if not struck and (shown >= pair.at or "A" in pair.codes):
            struck = True
            if "clock" in pair.other and rng.random() < 0.5:
                shims["A"].set(clock=rng.choice(CLOCKS))
            paused = _strike(processes["A"], pair.blow)
            until = now + pair.pause
        if paused and now >= until:
            signal_all(paused, signal.SIGCONT)
            paused = []
        if "B" not in processes and (struck if pair.second_at is None else now - begun >= pair.second_at):
            start("B", jobs[1])
        for name, process in processes.items():
            if name not in pair.codes and (code := process.poll()) is not None:
                pair.codes[name] = code
        if {"A", "B"} == pair.codes.keys() == processes.keys() and not (out / "result.json").exists():
            start("C", rng.choice([job for job in jobs if job.user == _owner(out)] or jobs))
        if now - begun > LIMIT_SECONDS:
            pair.wrong.append("hangs: " + ", ".join(name for name in processes if name not in pair.codes))
            for process in processes.values():
                signal_all(family(process), signal.SIGKILL)
                process.kill()
            break
        time.sleep(0.01)
    _look(out, pair, shown, durable)
    pair.said = {name: process.communicate(60)[0] for name, process in processes.items()}
    _judge(pair, out, record, expected, jobs)
    for job in jobs:
        if job.shm:
            shutil.rmtree(job.shm, ignore_errors=True)
    if not pair.wrong:
        shutil.rmtree(place)
    return pair


def _owner(out: Path) -> int:
    return out.stat().st_uid if out.exists() else 0


def _strike(process: Any, blow: str) -> list[Any]:
    """Do to a job what is planned; return the processes that must be continued later."""
    members = family(process)
    if not members or blow == "none":
        return []
    if blow == "kill all":
        os.killpg(process.pid, signal.SIGKILL)
        signal_all(reversed(members), signal.SIGKILL)
    elif blow == "kill the trainer":
        signal_all(members[-1:], signal.SIGKILL)
    elif blow == "terminate":
        signal_all(members[:1], signal.SIGTERM)
    else:
        paused = {"pause all": members, "pause the launcher": members[:1], "pause the trainer": members[-1:]}[blow]
        signal_all(paused, signal.SIGSTOP)
        return paused
    return []


def _look(out: Path, pair: Pair, shown: int, durable: int) -> tuple[int, int]:
    """Read the metrics from outside; note lines that are repeated or gone. Return the last step and checkpoint."""
    steps = [line["step"] for line in lines(out / "metrics.jsonl")]
    pair.repeated = max(pair.repeated, len(steps) - len(set(steps)))
    last = max(steps, default=0)
    if last < shown:
        pair.cuts.append((shown, last, durable))
    made = [int(path.parent.name[5:]) for path in out.glob("checkpoints/step-*/manifest.json")]
    return last, max(made, default=0)


def writers(record: str) -> list[str]:
    """Return the jobs that wrote to a run, in order, equal neighbours once; claims and heartbeats are not counted."""
    ignored = (".lease-", ".lease.json")
    written = [line.split(" ", 1) for line in record.splitlines()]
    jobs = [job for job, path in written if not Path(path).name.startswith(ignored)]
    return [job for job, _ in itertools.groupby(jobs)]


def _judge(pair: Pair, out: Path, record: Path, expected: str, jobs: list[Place]) -> None:
    if NOT_ALLOWED in pair.codes.values():
        pair.skipped = "the kernel allows no such namespaces here"
        return
    order = writers(record.read_text())
    if len(order) > len(set(order)):
        pair.two_writers = order
        pair.wrong.append(f"two writers: {' '.join(order)}")
    common = jobs[0].shm == jobs[1].shm and jobs[0].user == jobs[1].user
    for before, after, durable in pair.cuts:
        pair.lost += before - after if common else max(0, durable - after)
        pair.beyond += 0 if common else before - after
    if pair.lost:
        pair.wrong.append(f"{pair.lost} finished steps lost: {pair.cuts}")
    if pair.repeated:
        pair.wrong.append(f"{pair.repeated} steps repeated")
    allowed = {"A": {0, 2, 75, -9, 137, 247}, "B": {0, 2}, "C": {0}}
    pair.wrong += [f"{name} exits with {code}" for name, code in pair.codes.items() if code not in allowed[name]]
    pair.wrong += [f"{name}: traceback" for name, said in pair.said.items() if "Traceback" in said]
    steps = [line["step"] for line in lines(out / "metrics.jsonl")]
    if steps != list(range(1, STEPS + 1)):
        pair.wrong.append(f"steps in metrics.jsonl: {steps}")
    elif state_hash(out, STEPS) != expected:
        pair.wrong.append("other bytes than the undisturbed run's")


def _last_words(pair: Pair) -> dict[str, str]:
    return {name: said[-500:] for name, said in pair.said.items()}


def _summary(seen: list[Pair], pairs: int, skipped: str = "") -> dict[str, Any]:
    reasons = collections.Counter(pair.skipped for pair in seen if pair.skipped)
    reasons[skipped] += pairs - len(seen)
    ran = [pair for pair in seen if not pair.skipped]
    ends = collections.Counter(" ".join(f"{job} {code}" for job, code in sorted(pair.codes.items())) for pair in ran)
    return {
        "pairs": pairs,
        "ran": len(ran),
        "skipped": {why: count for why, count in reasons.items() if count},
        "two_writers": sum(bool(pair.two_writers) for pair in ran),
        "finished_steps_lost": sum(pair.lost for pair in ran),
        "finished_steps_repeated": sum(pair.repeated for pair in ran),
        "computed_again_where_the_memory_of_the_first_job_is_out_of_reach": sum(pair.beyond for pair in ran),
        "differ_in": dict(collections.Counter(factor for pair in ran for factor in pair.other)),
        "blows": dict(collections.Counter(pair.blow for pair in ran)),
        "exit_codes": dict(ends.most_common()),
        "wrong": [{"pair": pair.number, "what": pair.wrong, "said": _last_words(pair)} for pair in ran if pair.wrong],
    }


if __name__ == "__main__":
    main()
