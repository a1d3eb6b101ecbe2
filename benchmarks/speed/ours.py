"""lora_kit as a user runs it: a recipe, `train`, and what metrics.jsonl says of each step."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ground import lines
from measured import ALPHA, LEARNING_RATE, RANK, Measured
from sizes import Counts, Work
from systems import Setting

RECIPE = f"""
base: {{{{repo: {{base}}}}}}
data: {{{{train: {{data}}}}}}
adapter: {{{{rank: {RANK}, alpha: {ALPHA}}}}}
optim: {{{{learning_rate: {LEARNING_RATE}, schedule: constant, warmup: 0}}}}
train: {{{{steps: {{steps}}, batch_size: {{batch}}}}}}
checkpoint: {{{{every_steps: 1000000}}}}
"""


def run(work: Work, setting: Setting, between: Callable[[], Any] | None = None) -> Measured:
    """Train and read what the run wrote; a step ends when its numbers are ready for its snapshot.

    Args:
        work: What is trained.
        setting: What is changed in the recipe.
        between: Called before every step; its time is not part of a step.
    """
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training import loop

    pauses = list[float]()
    if between is not None:
        own = loop.profiled

        def with_pauses(*arguments: Any, **named: Any) -> Iterator[int]:
            for step in own(*arguments, **named):
                began = time.perf_counter()
                between()
                pauses.append(time.perf_counter() - began)
                yield step

        loop.profiled = with_pauses
    examples = work.examples()
    with tempfile.TemporaryDirectory(dir=work.folder) as place:
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(RECIPE.format(base=work.base, data=work.data, steps=work.all_steps, batch=work.batch))
        changes = [f"{key}={value}" for key, value in setting.arguments.items()]
        out = loop.train(load_recipe(recipe, changes), Path(place) / "run")
        steps = lines(Path(place) / "run" / "metrics.jsonl")
        manifest = json.loads((out.checkpoints[-1] / "manifest.json").read_text())
    began = steps[0]["time"] - steps[0]["tokens"] / steps[0]["tokens_per_second"]
    measured = Measured(began, threads=manifest["resolved"]["threads"] or torch.get_num_threads(), pauses=pauses)
    for number, step in enumerate(steps):
        measured.losses.append(step["loss"])
        measured.ends.append(step["time"])
        measured.stalls.append(step["stall_seconds"])
        measured.counts.append(Counts.of(examples[number * work.batch : (number + 1) * work.batch]))
        assert step["tokens"] == measured.counts[-1].tokens, "lora_kit trains other examples than its peers"
    return measured
