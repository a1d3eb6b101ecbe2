"""How long the loop waits when every step is saved, and what that costs the whole step."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from ground import ENVIRONMENT, finish, lines, make_base, make_data, make_recipe, median, peer

RANK, STEPS, WARM = 18, 60, 10  # 30 M base: 17 MB of weights and moments
WITHOUT = """
import sys
from lora_kit import publisher, trainer
from lora_kit.recipe import load_recipe
if sys.argv[3] == "without":
    publisher.Publisher.begin = lambda self, moving, *, due: None
    publisher.Publisher.written = lambda self: 0.0
    trainer.finish = lambda *arguments: None
trainer.train(load_recipe(sys.argv[1]), sys.argv[2])
"""


def measure(folder: Path, *, rounds: int = 3, threads: int = 1) -> dict:
    """Return the loop's waiting and the ratio of whole steps, with and without snapshots, ours and the peer's."""
    make_base(folder, "tiny")
    base, data = make_base(folder, "30M"), make_data(folder, 400)
    recipe = make_recipe(folder, "stall", "30M", data, steps=STEPS, rank=RANK, batch=1, tokens=256)
    steps: dict[str, list[float]] = {"with": [], "without": [], "trainer every step": [], "trainer never": []}
    stalls, bytes_saved = list[float](), 0
    for number in range(rounds):
        for how in ("with", "without"):
            out = folder / f"stall-{how}-{number}"
            subprocess.run(
                [sys.executable, "-c", WITHOUT, str(recipe), str(out), how],
                check=True,
                env=ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.DEVNULL,
            )
            found = lines(out / "metrics.jsonl")[WARM:]
            steps[how] += [later["time"] - sooner["time"] for sooner, later in pairwise(found)]
            if how == "with":
                stalls += [line["stall_seconds"] for line in found]
                (newest,) = (out / "checkpoints").glob(f"step-{STEPS:08d}")
                bytes_saved = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
        for how, every in (("trainer every step", 1), ("trainer never", 100000)):
            out = folder / f"stall-peer-{every}-{number}"
            more = ("--steps", STEPS, "--save-steps", every, "--rank", RANK, "--batch", 1)
            assert finish(peer(base, data, out, *more), folder / "stall-peer.log") == 0
            ends = [one["time"] for one in lines(out / "steps.0.jsonl") if one["began"]][WARM:]
            steps[how] += [later - sooner for sooner, later in pairwise(ends)]
    step, bare = median(steps["with"]), median(steps["without"])
    return {
        "bytes": bytes_saved,
        "ours_step_seconds": round(step, 4),
        "ours_stall_seconds": round(median(stalls), 5),
        "ours_stall_share": round(median(stalls) / step, 5),
        "ours_step_with_over_without": round(step / bare, 4),
        "trainer_step_seconds": round(median(steps["trainer never"]), 4),
        "trainer_stall_seconds": round(median(steps["trainer every step"]) - median(steps["trainer never"]), 4),
        "rounds": rounds,
        "threads": threads,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1])), indent=1))
