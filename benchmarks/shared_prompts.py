"""Time of a step of preference tuning with shared prompts and with separate sequences.

    python benchmarks/shared_prompts.py --size tiny            # to try it
    python benchmarks/shared_prompts.py --size 30m --rounds 3  # about 2 minutes on two cores

Both ways train the same pairs from the same start: `train.share_prompts` is auto in one run and never in the other, in
turns, in one process. A side has 600 tokens, of which the first 400 are the prompt. The time is that of whole steps:
forward, backward, optimizer and snapshots. The first step of each run is not counted. Leave the machine alone
meanwhile.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "speed"), str(HERE / "resilience")]

import numpy as np  # noqa: E402
from ground import machine  # noqa: E402
from sizes import SIZES, make_base  # noqa: E402

PROMPT, ANSWER = 400, 200  # tokens; the last of an answer ends it
WAYS = {"shared": "auto", "separate": "never"}
SAME_LOSS = 0.02  # bf16 rounds the log-probabilities
RECIPE = """
base: {{repo: {base}, dtype: bfloat16}}
data: {{train: {data}, sequence_length: 1024}}
adapter: {{rank: 16, alpha: 32}}
objective: {{kind: {kind}}}
optim: {{learning_rate: 1e-5, warmup: 0}}
train: {{steps: {steps}, batch_size: {batch}, micro_batch_tokens: {tokens}}}
checkpoint: {{every_steps: 1000, every_seconds: 1000}}
"""


def main() -> int:
    """Measure both ways in turns, print the result and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="30m")
    parser.add_argument("--kind", choices=["dpo", "orpo", "simpo"], default="simpo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a run")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--tokens", type=int, default=2048, help="train.micro_batch_tokens")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "shared_prompts.json")
    asked = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as place:
        folder = Path(place)
        os.environ["LORA_KIT_CACHE"] = str(folder / "cache")
        recipe = write_recipe(folder, asked)
        for number in range(asked.rounds):
            for way in [*WAYS][:: 1 if number % 2 == 0 else -1]:
                metrics = run(recipe, folder / f"{way}-{number}", WAYS[way])
                losses[way] = [line["loss"] for line in metrics]
                seconds[way] += [line["tokens"] / line["tokens_per_second"] for line in metrics[1:]]
    medians = {way: median(each) for way, each in seconds.items()}
    differences = [abs(one / other - 1) for one, other in zip(*losses.values(), strict=True)]
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/shared_prompts.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "size": asked.size,
        "kind": asked.kind,
        "pairs_a_step": asked.batch,
        "tokens_of_a_side": {"prompt": PROMPT, "answer": ANSWER},
        "seconds_of_steps": {way: [round(each, 3) for each in found] for way, found in seconds.items()},
        "median_seconds": {way: round(each, 3) for way, each in medians.items()},
        "times_faster": round(medians["separate"] / medians["shared"], 3),
        "largest_relative_difference_of_losses": max(differences),
    }
    asked.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("median_seconds", "times_faster")}))
    if max(differences) > SAME_LOSS:
        print(f"the losses differ by {max(differences):.1%}: the two ways do not compute the same", file=sys.stderr)
        return 1
    return 0


def write_recipe(folder: Path, asked: argparse.Namespace) -> Path:
    """Write a base, pairs and a recipe into a folder; return the path of the recipe."""
    base, steps = make_base(folder, asked.size), asked.steps + 1
    rng, vocabulary = np.random.default_rng(0), SIZES[asked.size].config["vocab_size"]

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(2, vocabulary, count))

    data = folder / "pairs.jsonl"
    records = [
        {"prompt": words(PROMPT), "chosen": f" {words(ANSWER - 1)}", "rejected": f" {words(ANSWER - 1)}"}
        for _ in range(asked.batch * steps)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = folder / "recipe.yaml"
    settings = {"kind": asked.kind, "steps": steps, "batch": asked.batch, "tokens": asked.tokens}
    recipe.write_text(RECIPE.format(base=base, data=data, **settings))
    return recipe


def run(recipe: Path, out: Path, share: str) -> list[dict[str, Any]]:
    """Train and return the lines of metrics.jsonl."""
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training.loop import train

    found = train(load_recipe(recipe, [f"train.share_prompts={share}"]), out)
    layout = json.loads((found.latest / "manifest.json").read_text())["resolved"]["layout"]
    if layout != ("shared" if share == "auto" else "packed"):
        raise SystemExit(f"the layout is {layout}: this machine cannot compare both ways")
    return [dict(line) for line in found.metrics]


if __name__ == "__main__":
    sys.exit(main())
