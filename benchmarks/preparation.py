"""Measure the preparation of many conversations by lora_kit and by TRL, and a resume with the prepared data.

    python benchmarks/preparation.py [--examples 1000000] [--processes N]

Both read the same generated file, render and tokenise every conversation, and store the tokens; each runs alone, in
fresh processes with empty caches. TRL is `SFTTrainer` with its default settings, which trains on all tokens and so need
not look for the answers, and lora_kit's default, which does. Imports are not part of the times. Peak memory is the
largest resident set of any single process. A resume is a fresh process that takes the tokens from the cache and reads
the examples of a late step. The exit code is 1 if a limit is exceeded.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "preparation.json"
BASE = ROOT / "lora_kit" / "assets" / "base"
WORDS = (8, 12)  # of a question and an answer: about 120 tokens with the shipped tokenizer
PEAK_MB, RESUME_SECONDS, RESUME_MB = 500, 1.0, 200
MB = 1024  # in the unit of ru_maxrss, kilobytes


def write_conversations(path: Path, count: int) -> None:
    """Write conversations of random words, no two of them the same."""
    words = (ROOT / "lora_kit" / "assets" / "text.toml").read_text().split()[:2000]
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(count):
            question, answer = (" ".join(rng.choices(words, k=number)) for number in WORDS)
            messages = [{"role": "user", "content": f"{index} {question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def peak_mb() -> float:
    """Return the largest resident set of this process and of any child that has ended."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / MB


class Clock:
    """Measures the seconds and the CPU seconds of this process and its ended children since it was made."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), self._cpu_seconds()

    @staticmethod
    def _cpu_seconds() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def read(self) -> dict[str, float]:
        """Return the seconds and the CPU seconds."""
        return {"seconds": time.perf_counter() - self._began, "cpu_seconds": self._cpu_seconds() - self._cpu}


def recipe_of(data: Path) -> Any:
    """Return a recipe with the shipped base and this data."""
    from lora_kit.recipe.load import load_recipe

    path = data.with_suffix(".yaml")
    path.write_text(f"base: {{repo: {BASE}}}\ndata: {{train: {data}}}\ntrain: {{epochs: 1, batch_size: 16}}\n")
    return load_recipe(path)


def renderer_of(recipe: Any) -> Any:
    """Return the shipped tokenizer as `lora-kit train` loads it."""
    from lora_kit.model.source import Source
    from lora_kit.model.tokenizer import load_renderer

    return load_renderer(Source(str(BASE), BASE, None, {}), recipe)


def prepare_with_lora_kit(data: Path, processes: int) -> dict[str, Any]:
    """Prepare the data; return the seconds and the number of tokens."""
    from lora_kit.data import tokenising
    from lora_kit.data.plan import prepare_data

    tokenising.host_cores = lambda: processes
    recipe = recipe_of(data)
    renderer = renderer_of(recipe)
    clock = Clock()
    prepared = prepare_data(recipe, renderer)
    return clock.read() | {"tokens": prepared.counts.train.tokens}


def resume_with_lora_kit(data: Path, processes: int) -> dict[str, Any]:
    """Take the data from the cache and read the examples of a late step; return the seconds and the added memory."""
    from lora_kit.data.packing import collate
    from lora_kit.data.plan import Plan, prepare_data

    recipe = recipe_of(data)
    renderer, before = renderer_of(recipe), peak_mb()
    clock = Clock()
    prepared = prepare_data(recipe, renderer)
    plan = Plan(recipe, prepared.train, micro_batch_tokens=4096, padded=False)
    step = plan.steps * 2 // 3
    for members in plan.micro_batches(step):
        collate(prepared.train, members, padded=False)
    return clock.read() | {"step": step, "added_mb": peak_mb() - before, "fingerprint": prepared.train.fingerprint}


def prepare_with_trl(data: Path, processes: int) -> dict[str, Any]:
    """Prepare the data with SFTTrainer; return the seconds and the number of tokens."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    settings = SFTConfig(
        str(data.parent / "trl"), dataset_num_proc=processes, max_length=2048, report_to=[], use_cpu=True, bf16=False
    )
    clock = Clock()
    dataset = load_dataset("json", data_files=str(data), split="train")
    trainer = SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer)
    measured = clock.read()
    ids = trainer.train_dataset.data.column("input_ids")
    return measured | {"tokens": sum(len(chunk.values) for chunk in ids.chunks)}


WORKERS = {"lora_kit": prepare_with_lora_kit, "resume": resume_with_lora_kit, "trl": prepare_with_trl}


def measure(worker: str, data: Path, processes: int) -> dict[str, Any]:
    """Return what a worker measures in a fresh process."""
    caches = {"LORA_KIT_CACHE": data.parent / "cache", "HF_DATASETS_CACHE": data.parent / worker.replace("resume", "x")}
    environment = os.environ | {name: str(path) for name, path in caches.items()} | {"HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, __file__, "--worker", worker, "--data", str(data), "--processes", str(processes)]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{worker}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(worker, result, flush=True)
    return result


def main() -> int:
    """Measure, print and write the results; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = WORKERS[options.worker](options.data, options.processes)
        print(json.dumps(result | {"peak_mb": peak_mb()}))
        return 0
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        data = Path(name) / "train.jsonl"
        write_conversations(data, options.examples)
        results = {worker: measure(worker, data, options.processes) for worker in ("lora_kit", "resume", "trl")}
    ours, resumed, theirs = (results[name] for name in ("lora_kit", "resume", "trl"))
    ratio, cpu_ratio = (ours[name] / theirs[name] for name in ("seconds", "cpu_seconds"))
    limits = {
        "seconds of lora_kit / seconds of TRL": (ratio, 1.0),
        "peak MB of a process": (ours["peak_mb"], PEAK_MB),
        "seconds to resume": (resumed["seconds"], RESUME_SECONDS),
        "MB added by a resume": (resumed["added_mb"], RESUME_MB),
    }
    for what, (measured, limit) in limits.items():
        print(f"{what}: {measured:.2f} (at most {limit:g}) {'ok' if measured <= limit else 'TOO MUCH'}")
    print(f"CPU seconds of lora_kit / CPU seconds of TRL: {cpu_ratio:.2f}")
    facts = {"examples": options.examples, "processes": options.processes, "ratio": ratio, "cpu_ratio": cpu_ratio}
    versions = {package: version(package) for package in ("trl", "datasets", "transformers", "tokenizers")}
    content = facts | results | {"versions": versions, "machine": platform.processor() or platform.machine()}
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(measured > limit for measured, limit in limits.values()))


if __name__ == "__main__":
    sys.exit(main())
