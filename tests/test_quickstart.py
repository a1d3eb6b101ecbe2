"""The embedded default shows a large, honest difference, and a control shows that the base matters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import start
from transformers import AutoModelForCausalLM

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
    recipe = ROOT / "recipes" / "quickstart.yaml"
    few = ["--set", "evaluate.generate=40"]  # whoever learns nothing writes every answer to the longest length
    others = {"learned": [], "control": ["--set", f"base.repo={random_base}", *few]}
    runs = {name: start(recipe, tmp_path / name, *more, fresh=True) for name, more in others.items()}
    printed = {name: process.communicate(timeout=1700)[0] for name, process in runs.items()}
    assert {process.returncode for process in runs.values()} == {0}, printed
    scores = {name: json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in runs}
    learned, control = scores["learned"], scores["control"]
    assert learned["base"]["exact_match"] < 0.2 and learned["adapter"]["exact_match"] > 0.9
    assert control["base"]["exact_match"] == 0 and control["adapter"]["exact_match"] < 0.05
    table = printed["learned"].split("steps done")[1]
    assert all(word in table for word in ("synthetic", "held-out", "tokens/s", "checkpoint", "adapter", "try it"))
