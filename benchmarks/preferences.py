"""Pairs per second and memory of DPO: lora_kit and TRL's DPOTrainer, by default and with its best settings.

    python benchmarks/preferences.py --size tiny                  # to try it
    python benchmarks/preferences.py --size 30m --rounds 2        # about 2 minutes on two cores
    python benchmarks/preferences.py --size 160m --only lora_kit trl-best --json benchmarks/results/preferences.json

The same base (bf16, random weights), pairs, adapter and optimizer for all, each system in a process of its own, in
turns. The lengths of the sides are those of chats (benchmarks/speed/sizes.py). A step of short pairs warms up and is
not timed. The time of a pair contains its share of the pass of the reference, which is the base: lora_kit computes it
before the first step, as TRL does in its best settings; by default TRL computes it in every step. Leave the machine
alone meanwhile.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "speed"), str(HERE / "resilience")]

import numpy as np  # noqa: E402
from ground import lines, machine  # noqa: E402
from measured import ALPHA, LEARNING_RATE, RANK, Memory, limit_memory  # noqa: E402
from peers import same_training  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sizes import PROMPT_SHARE, SIZES, lengths, make_base  # noqa: E402

LONGEST = 1024  # tokens of a side
WARM_UP_LONGEST = 64
BATCH = {"tiny": 4, "30m": 8, "160m": 4}  # pairs a step
SAME_LOSS = 0.05  # of the loss, which begins at log 2: log-ratios of long answers in bf16 are rounded
SYSTEMS: dict[str, dict[str, Any]] = {
    "lora_kit": {},
    "trl-default": {},
    # one pair at a time has little padding; padding_free is switched off in TRL 1.16
    "trl-best": {
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 1,
    },
    "trl-two": {
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "bf16": False,
        "precompute_ref_log_probs": True,
    },
    "trl-in-steps": {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "bf16": False},
    "trl-compiled": {
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 1,
        "torch_compile": True,
    },
}
RECIPE = f"""
base: {{{{repo: {{base}}}}}}
data: {{{{train: {{data}}, sequence_length: {LONGEST}}}}}
adapter: {{{{rank: {RANK}, alpha: {ALPHA}}}}}
objective: {{{{kind: dpo, beta: 0.1}}}}
optim: {{{{learning_rate: {LEARNING_RATE}, schedule: constant, warmup: 0}}}}
train: {{{{steps: {{steps}}, batch_size: {{batch}}}}}}
checkpoint: {{{{every_steps: 1000000}}}}
"""


@dataclass(frozen=True)
class Work:
    """What one measurement trains: pairs of words, first those of the warm-up.

    Attributes:
        folder: Where base and data are.
        size: The base, a key of SIZES.
        steps: Timed steps.
    """

    folder: Path
    size: str
    steps: int

    @property
    def batch(self) -> int:
        """Pairs a step."""
        return BATCH[self.size]

    def pairs(self) -> list[dict[str, str]]:
        """Return the pairs in the order of training."""
        vocabulary, rng = SIZES[self.size].config["vocab_size"], np.random.default_rng(0)
        found = []
        for count, longest in ((self.batch, WARM_UP_LONGEST), (self.steps * self.batch, LONGEST)):
            chosen = lengths(count, longest=longest)
            for length, other in zip(chosen, np.roll(chosen, 1), strict=True):
                prompt = max(1, round(min(length, other) * PROMPT_SHARE))
                sizes = (prompt, length - prompt - 1, other - prompt - 1)
                texts = [" ".join(f"w{word}" for word in rng.integers(2, vocabulary, max(1, size))) for size in sizes]
                found.append({"prompt": texts[0], "chosen": f" {texts[1]}", "rejected": f" {texts[2]}"})
        return found

    def tokens(self) -> list[int]:
        """Return the tokens of both sides of each pair."""
        words = [{key: len(text.split()) for key, text in pair.items()} for pair in self.pairs()]
        return [2 * each["prompt"] + each["chosen"] + each["rejected"] + 2 for each in words]


@dataclass(frozen=True)
class Trained:
    """What a system has done: seconds of the reference's own pass and of each step, and the loss of each step."""

    reference: float
    seconds: list[float]
    losses: list[float]


def ours(work: Work) -> Trained:
    """Train with lora_kit, whose order the file of the data anticipates; no log-probabilities are in the cache."""
    from lora_kit.data.order import examples_at
    from lora_kit.files import cache_folder
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training.loop import train

    pairs, records = work.pairs(), [dict[str, str]()] * len(work.pairs())
    for place, pair in zip(examples_at(range(len(pairs)), len(pairs), 0), pairs, strict=True):
        records[place] = pair
    shutil.rmtree(cache_folder("reference"), ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=work.folder) as place:
        data, recipe = Path(place) / "pairs.jsonl", Path(place) / "recipe.yaml"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        base, steps = work.folder / f"base-{work.size}", work.steps + 1
        recipe.write_text(RECIPE.format(base=base, data=data, steps=steps, batch=work.batch))
        run = train(load_recipe(recipe), Path(place) / "run")
        steps_done = lines(Path(place) / "run" / "metrics.jsonl")
        reference = run.events[0]["seconds"]["reference: log-probabilities"]
    counted = [sum(work.tokens()[start : start + work.batch]) for start in range(0, len(pairs), work.batch)]
    assert [step["tokens"] for step in steps_done] == counted, "lora_kit trains other pairs than TRL"
    seconds = [step["tokens"] / step["tokens_per_second"] for step in steps_done]
    return Trained(reference, seconds, [step["loss"] for step in steps_done])


def trl(work: Work, arguments: dict[str, Any]) -> Trained:
    """Train with TRL's DPOTrainer; the best settings keep the adapter in bf16."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends, passes = list[float](), list[float]()

    class Clock(TrainerCallback):
        """Notes when each step begins and ends."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class Timed(DPOTrainer):
        """Notes how long the reference's own pass takes."""

        def _precompute_ref_logps(self, *given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = super()._precompute_ref_logps(*given, **named)
            passes.append(time.perf_counter() - began)
            return found

    model = AutoModelForCausalLM.from_pretrained(work.folder / f"base-{work.size}", dtype="auto")
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = min(arguments.get("per_device_train_batch_size", 8), work.batch)
    settings = {
        "gradient_accumulation_steps": work.batch // rows,
        **same_training(),
        "beta": 0.1,
        "max_length": LONGEST,
    }
    with tempfile.TemporaryDirectory(dir=work.folder) as out:
        trainer = Timed(
            get_peft_model(model, adapter, autocast_adapter_dtype=False) if arguments else model,
            args=DPOConfig(out, **settings | arguments | {"per_device_train_batch_size": rows}),
            train_dataset=Dataset.from_list(work.pairs()),
            processing_class=AutoTokenizer.from_pretrained(work.folder / f"base-{work.size}"),
            peft_config=None if arguments else adapter,
            callbacks=[Clock()],
        )
        trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    return Trained(sum(passes), [end - begin for begin, end in zip(ends[::2], ends[1::2], strict=True)], losses)


def measure(work: Work, system: str) -> dict[str, Any]:
    """Train in this process, and return what a row says."""
    memory = Memory()
    memory.watch_loading()
    trained = ours(work) if system == "lora_kit" else trl(work, SYSTEMS[system])
    peak, others = memory.above_base(), memory.others()
    tokens, timed = work.tokens(), work.steps * work.batch
    reference = trained.reference * sum(tokens[work.batch :]) / sum(tokens)
    steps = sum(trained.seconds[1:])
    return {
        "system": system,
        "settings": SYSTEMS[system],
        "pairs_per_second": round(timed / (steps + reference), 4),
        "tokens_per_second": round(sum(tokens[work.batch :]) / (steps + reference), 1),
        "reference_seconds": round(reference, 3),
        "step_seconds": [round(each, 3) for each in trained.seconds],
        "peak_bytes": peak,
        "losses": [round(loss, 5) for loss in trained.losses],
        "others_share": round(others, 3),
    }


def main() -> int:
    """Measure what is asked for, print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=BATCH, default="30m")
    parser.add_argument("--rounds", type=int, default=1, help="how often all are measured (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=["lora_kit", "trl-default", "trl-best"])
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "ROW"), type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        warnings.filterwarnings("ignore")
        limit_memory()
        row = measure(Work(asked.measure[0], asked.size, asked.steps), asked.only[0])
        asked.measure[1].write_text(json.dumps(row))
        sys.stdout.flush()
        os._exit(0)  # compiled code and data loaders may take their time to leave
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started and removes the base
    console, rows = Console(width=150), list[dict[str, Any]]()
    facts = machine() | {"size": asked.size, "command": f"python benchmarks/preferences.py {' '.join(sys.argv[1:])}"}
    with tempfile.TemporaryDirectory(prefix="lora_kit-") as place:
        make_base(Path(place), asked.size)
        for number in range(asked.rounds):
            for system in asked.only:
                row = run(Path(place), asked, system, console)
                if row is not None:
                    rows.append(row | {"round": number + 1, "machine": facts})
                    if asked.json:
                        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
                    console.print(f"  {row['pairs_per_second']:.3f} pairs/s, {row['peak_bytes'] / 1e6:,.0f} MB")
    console.print(table(rows))
    problems = differences(rows)
    for problem in problems:
        console.print(problem, style="red")
    console.print(json.dumps(facts), soft_wrap=True)
    return 1 if problems or not rows else 0


def run(folder: Path, asked: argparse.Namespace, system: str, console: Console) -> dict[str, Any] | None:
    """Measure in a process of its own; None, and a line that says why, when it fails."""
    row, log = folder / "row.json", folder / "log.txt"
    row.unlink(missing_ok=True)
    console.print(f"{time.strftime('%H:%M:%S')} {system} ...")
    command = [sys.executable, __file__, "--size", asked.size, "--steps", str(asked.steps), "--only", system]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LORA_KIT_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with log.open("w") as output:
        command += ["--measure", str(folder), str(row)]
        ended = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if row.is_file():
        found: dict[str, Any] = json.loads(row.read_text())
        return found
    said = log.read_text().strip().splitlines()[-1:] or [""]
    missing = "; pip install 'lora_kit[bench]'" if "No module named 'trl'" in said[0] else ""
    console.print(f"{system}: left out, exit code {ended.returncode}: {said[0][:300]}{missing}", style="red")
    return None


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the medians of the rounds, and how many times as fast lora_kit is as each other system."""
    shown = Table("system", "pairs/s", "tokens/s", "reference s", "peak MB - weights", "loss", "lora_kit is")
    medians = {
        system: {
            key: median(row[key] for row in rows if row["system"] == system)
            for key in ("pairs_per_second", "tokens_per_second", "reference_seconds", "peak_bytes")
        }
        for system in dict.fromkeys(row["system"] for row in rows)
    }
    own = medians.get("lora_kit")
    for system, row in medians.items():
        loss = next(each for each in rows if each["system"] == system)["losses"][-1]
        ratio = ""
        if own and row is not own:
            memory = own["peak_bytes"] / row["peak_bytes"]
            ratio = f"{own['pairs_per_second'] / row['pairs_per_second']:.2f} times as fast, {memory:.2f} of the memory"
        cells = (f"{row['pairs_per_second']:.3f}", f"{row['tokens_per_second']:,.0f}")
        cells += (f"{row['reference_seconds']:.2f}", f"{row['peak_bytes'] / 1e6:,.0f}", f"{loss:.4f}", ratio)
        shown.add_row(system, *cells)
    return shown


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """Return what was not the same training: losses apart from the first row's."""
    found = []
    for row in rows[1:]:
        apart = float(np.abs(np.array(row["losses"]) - np.array(rows[0]["losses"])).max())
        if not apart <= SAME_LOSS:
            found.append(f"{row['system']} did not train the same as {rows[0]['system']}: losses are {apart:.3f} apart")
    return found


if __name__ == "__main__":
    sys.exit(main())
