"""How long the loop waits when every step is saved, and what that costs the whole step.

Ours is measured in one process that leaves out the snapshots of every other ten steps, so that a machine whose speed
drifts slows both sides alike.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from ground import ENVIRONMENT, finish, lines, make_base, make_data, make_recipe, median, peer

RANK, STEPS, BLOCK = 18, 210, 10  # 30 M base: 17 MB of weights and moments
ALTERNATING = f"""
import json, sys, time
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop, publisher

publish, wait, steps, stalls = publisher.Publisher.publish, publisher.Publisher.wait_copied, [], []

def sometimes(self, facts, *, due):
    steps.append(time.perf_counter())
    if len(steps) % {2 * BLOCK} <= {BLOCK} or due:
        return publish(self, facts, due=due)
    self.wait_published()
    self._pending = None

def waited(self):
    stalls.append(wait(self))
    return stalls[-1]

publisher.Publisher.publish, publisher.Publisher.wait_copied = sometimes, waited
loop.train(load_recipe(sys.argv[1]), sys.argv[2])
print(json.dumps([steps, stalls]))
"""


def measure(folder: Path, *, rounds: int = 3, threads: int = 1) -> dict:
    """Return the loop's waiting and the ratio of whole steps, with and without snapshots, ours and the peer's."""
    make_base(folder, "tiny")
    base, data = make_base(folder, "30M"), make_data(folder, 400)
    recipe = make_recipe(folder, "stall", "30M", data, steps=STEPS, rank=RANK, batch=1)
    steps: dict[str, list[float]] = {"with": [], "without": [], "trainer every step": [], "trainer never": []}
    stalls, ratios = list[float](), list[float]()
    for number in range(rounds):
        own, waited = _ours(recipe, folder / f"stall-{number}", threads)
        steps["with"] += own["with"]
        steps["without"] += own["without"]
        ratios.append(round(median(own["with"]) / median(own["without"]), 4))
        stalls += waited
        for how, every in (("trainer every step", 1), ("trainer never", 100000)):
            out = folder / f"stall-peer-{every}-{number}"
            more = ("--steps", 60, "--save-steps", every, "--rank", RANK, "--batch", 1)
            assert finish(peer(base, data, out, *more), folder / "stall-peer.log") == 0
            ends = [one["time"] for one in lines(out / "steps.0.jsonl") if one["began"]][BLOCK:]
            steps[how] += [later - sooner for sooner, later in pairwise(ends)]
    step, stall, never = median(steps["with"]), median(stalls), median(steps["trainer never"])
    newest = folder / "stall-0" / "checkpoints" / f"step-{STEPS:08d}"
    return {
        "bytes": sum(path.stat().st_size for path in newest.glob("*.safetensors")),
        "ours_step_seconds": round(step, 4),
        "ours_stall_seconds": round(stall, 6),
        "ours_stall_share": round(stall / step, 6),
        "ours_stall_share_worst": round(max(stalls) / step, 4),
        "ours_step_with_over_without": round(step / median(steps["without"]), 4),
        "ours_step_with_over_without_each_round": ratios,
        "trainer_step_seconds": round(never, 4),
        "trainer_stall_seconds": round(median(steps["trainer every step"]) - never, 4),
        "rounds": rounds,
        "threads": threads,
    }


def _ours(recipe: Path, out: Path, threads: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return the seconds of steps with and without snapshots, and how long those with them waited."""
    printed = subprocess.run(
        [sys.executable, "-c", ALTERNATING, str(recipe), str(out)],
        check=True,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    times, stalls = json.loads(printed.splitlines()[-1])
    found: dict[str, list[float]] = {"with": [], "without": []}
    waited = list[float]()
    for number in range(2 * BLOCK, STEPS - 1):  # from this begin to the next: what began here runs meanwhile
        if number % BLOCK == BLOCK - 1:
            continue  # the change from one way to the other
        how = "with" if number % (2 * BLOCK) < BLOCK else "without"
        found[how].append(times[number + 1] - times[number])
        if how == "with":
            waited.append(stalls[number + 1])
    return found, waited


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1])), indent=1))
