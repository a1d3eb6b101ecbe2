"""The embedded default shows a large, honest difference, and a control shows that the base matters."""

import shutil
from pathlib import Path

import pytest
import torch
from runs import start
from transformers import AutoModelForCausalLM

from lora_kit.runs.run import Run

ROOT = Path(__file__).parents[1]
BASE = ROOT / "lora_kit" / "assets" / "base"


@pytest.fixture(scope="module")
def random_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control") / "base"
    shutil.copytree(BASE, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(BASE).config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_adapter_learns_the_task_on_the_embedded_base_and_not_on_a_random_one(random_base, tmp_path):
    recipe, steps = ROOT / "recipes" / "quickstart.yaml", 20
    fewer = ["--set", "train.steps=100", "--set", "evaluate.generate=40"]  # 200 steps take two minutes
    short = [f"base.repo={random_base}", f"train.steps={steps}", "evaluate.generate=4"]
    options = [part for change in short for part in ("--set", change)]
    learning = start(recipe, tmp_path / "learned", *fewer, fresh=True)
    control = start(recipe, tmp_path / "control", *options)
    printed, _ = learning.communicate(timeout=1500)
    said, _ = control.communicate()
    assert (learning.returncode, control.returncode) == (0, 0), printed + said
    learned, random = Run(tmp_path / "learned"), Run(tmp_path / "control")
    before, after = learned.result["metrics"]["base"], learned.result["metrics"]["adapter"]
    assert before["exact_match"] < 0.2 and after["exact_match"] > 0.9
    assert random.result["metrics"]["adapter"]["exact_match"] == 0
    assert learned.metrics[steps - 1]["loss"] < 0.1 and random.metrics[-1]["loss"] > 2, "after as many steps"
    table = printed.split("steps done")[1]
    assert all(word in table for word in ("synthetic", "held-out", "tokens/s", "checkpoint", "adapter", "try it"))
