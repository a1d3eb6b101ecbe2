"""Compare variants of LoRA on the embedded base and data: held-out loss and exact match after the same number of steps.

    python benchmarks/variants.py                # everything, about half an hour on one core
    python benchmarks/variants.py --only dora    # one variant, at most three minutes; its rows are replaced in the file

Every variant has the recipe recipes/quickstart.yaml, the same rank, the same steps and the same grid of learning rates,
and is trained with every seed, which decides the order of the examples, the start of A and dropout. The result of a
variant is the mean over the seeds at the learning rate with the lowest mean loss. The base is tiny and the data is
synthetic, so the figures say whether variants differ, not how good they are on a large base.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "resilience")]

from ground import machine  # noqa: E402

RECIPE = HERE.parent / "recipes" / "quickstart.yaml"
RESULTS = HERE / "results" / "variants.json"
STEPS, ANSWERS = 60, 100
RATES, SEEDS = (1e-3, 3e-3, 6e-3), (0, 1)
VARIANTS = {
    "lora": [],
    "rslora": ["adapter.scaling=rslora"],
    "lora+": ["optim.b_ratio=4"],
    "dora": ["adapter.variant=dora", "adapter.dropout=0"],
    "pissa": ["adapter.init=pissa"],
    "olora": ["adapter.init=olora"],
    "eva": ["adapter.init=eva"],
}
Row = dict[str, Any]


def main() -> None:
    """Train what is asked for, write its rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--answers", type=int, default=ANSWERS, help="held-out prompts that are answered")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the file of rows (default: %(default)s)")
    asked = parser.parse_args()
    for variant in asked.only:
        for rate in asked.rates:
            for seed in asked.seeds:
                found = measure(variant, rate, seed, steps=asked.steps, answers=asked.answers)
                write(asked.json, found, asked.steps)
    print(markdown(json.loads(asked.json.read_text())["rows"]))


def measure(variant: str, rate: float, seed: int, *, steps: int, answers: int) -> Row:
    """Train one variant and return its row."""
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training.loop import train

    # DoRA with dropout is left to peft, so all are trained without
    changes = ["adapter.dropout=0", f"optim.learning_rate={rate}", f"train.seed={seed}", f"train.steps={steps}"]
    changes += [f"evaluate.generate={answers}", *VARIANTS[variant]]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as folder:
        run = train(load_recipe(RECIPE, changes), Path(folder) / "run")
        score, rates = run.result["metrics"]["adapter"], [line["tokens_per_second"] for line in run.metrics]
    return {
        "variant": variant,
        "learning_rate": rate,
        "seed": seed,
        "loss": round(score["loss"], 5),
        "exact_match": score["exact_match"],
        "tokens_per_second": round(sorted(rates)[len(rates) // 2], 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def write(path: Path, row: Row, steps: int) -> None:
    """Add a row to the file, in place of one with the same variant, learning rate and seed."""
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    key = _key(row)
    rows = sorted([*(each for each in known if _key(each) != key), row], key=_key)
    content = {"command": "python benchmarks/variants.py", "steps": steps, "machine": machine(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _key(row: Row) -> tuple[int, float, int]:
    return list(VARIANTS).index(row["variant"]), row["learning_rate"], row["seed"]


def best(rows: list[Row]) -> dict[str, Row]:
    """Return for each variant the means over its seeds, at the learning rate with the lowest mean loss."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["variant"], row["learning_rate"]].append(row)
    found: dict[str, Row] = {}
    for (variant, rate), same in groups.items():
        means = {name: mean(row[name] for row in same) for name in ("loss", "exact_match")}
        spread = max(row["loss"] for row in same) - min(row["loss"] for row in same)
        if variant not in found or means["loss"] < found[variant]["loss"]:
            found[variant] = means | {"learning_rate": rate, "spread": spread, "seeds": len(same)}
    return found


def markdown(rows: list[Row]) -> str:
    """Return the best learning rate of each variant as the table of docs/variants.md."""
    heads = ["variant", "learning rate", "held-out loss", "apart between seeds", "exact match", "seeds"]
    lines = [heads, ["---"] * len(heads)]
    for variant, row in best(rows).items():
        numbers = (f"{row['learning_rate']:g}", f"{row['loss']:.4f}", f"{row['spread']:.4f}")
        numbers += (f"{row['exact_match']:.1%}", str(row["seeds"]))
        lines.append([variant, *numbers])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
