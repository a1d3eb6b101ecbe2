"""lora_kit as a user runs it: a recipe, `train`, and what metrics.jsonl says of each step."""

import json
import tempfile
from pathlib import Path

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


def run(work: Work, setting: Setting) -> Measured:
    """Train and read what the run wrote; a step ends when its numbers are ready for its snapshot."""
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training.loop import train

    examples = work.examples()
    with tempfile.TemporaryDirectory(dir=work.folder) as place:
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(RECIPE.format(base=work.base, data=work.data, steps=work.all_steps, batch=work.batch))
        changes = [f"{key}={value}" for key, value in setting.arguments.items()]
        out = train(load_recipe(recipe, changes), Path(place) / "run")
        steps = lines(Path(place) / "run" / "metrics.jsonl")
        manifest = json.loads((out.checkpoints[-1] / "manifest.json").read_text())
    began = steps[0]["time"] - steps[0]["tokens"] / steps[0]["tokens_per_second"]
    measured = Measured(began, threads=manifest["resolved"]["threads"] or torch.get_num_threads())
    for number, step in enumerate(steps):
        measured.losses.append(step["loss"])
        measured.ends.append(step["time"])
        measured.stalls.append(step["stall_seconds"])
        measured.counts.append(Counts.of(examples[number * work.batch : (number + 1) * work.batch]))
        assert step["tokens"] == measured.counts[-1].tokens, "lora_kit trains other examples than its peers"
    return measured
