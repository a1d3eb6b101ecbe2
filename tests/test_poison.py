"""A loss or a gradient that is no number never reaches the adapter: its step is skipped, told, and skipped by all."""

import json
import os
import signal

import pytest
import torch
from conftest import RECIPE, make_base, make_records, write_jsonl
from runs import start, state_hash, train, wait_for_lines
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from lora_kit.errors import PoisonError
from lora_kit.recipe.load import load_recipe
from lora_kit.runs.status import status
from lora_kit.training import loop
from lora_kit.training.objectives.sft import Sft

POISON = "~"
STEPS = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A base that answers one token with infinity, and one conversation of 23 that holds it."""
    folder = tmp_path_factory.mktemp("poison")
    model = AutoModelForCausalLM.from_pretrained(make_base(folder / "base"))
    token = json.loads((folder / "base" / "tokenizer.json").read_text())["model"]["vocab"][POISON]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.inf
    model.save_pretrained(folder / "base")
    records = make_records(23)
    records[7]["messages"][0]["content"] += POISON
    text = RECIPE.format(base=folder / "base", data=write_jsonl(folder / "train.jsonl", records))
    (folder / "recipe.yaml").write_text(text.replace("every_steps: 3", "every_steps: 1, keep: 20"))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    printed = train(recipe, out)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return out, printed, [event for event in events if event["kind"] == "skipped"]


@pytest.mark.quick
def test_a_poisoned_step_leaves_every_byte_as_it_was_and_is_told(run):
    out, printed, skipped = run
    bad = [event["step"] for event in skipped]
    assert 1 <= len(bad) <= 2 and all(7 in event["examples"] and len(event["examples"]) == 5 for event in skipped)
    for step in range(2, STEPS + 1):
        assert (state_hash(out, step) == state_hash(out, step - 1)) == (step in bad)
    assert all(f"step {step}: loss" in printed for step in bad) and "the step is skipped" in printed
    manifest = json.loads((out / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    assert manifest["skipped_steps"] == bad
    shown = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = [one["step"] for one in shown if one["loss"] is None or one["grad_norm"] is None]
    assert seen == bad, "the log hides nothing"
    arrays = load_file(out / "checkpoints" / f"step-{STEPS:08d}" / "adapter_model.safetensors")
    assert all(torch.from_numpy(array).isfinite().all() for array in arrays.values())


def test_two_processes_skip_the_same(run, recipe, tmp_path):
    train(recipe, tmp_path / "run", processes=2)
    assert state_hash(tmp_path / "run", STEPS) == state_hash(run[0], STEPS)


def test_a_killed_run_remembers_what_it_skipped(run, recipe, tmp_path):
    out, first = tmp_path / "run", run[2][0]["step"]
    process = start(recipe, out)
    wait_for_lines(out / "metrics.jsonl", min(first + 1, STEPS - 1), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(recipe, out)
    final = json.loads((out / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    assert final["skipped_steps"] == [event["step"] for event in run[2]]
    assert state_hash(out, STEPS) == state_hash(run[0], STEPS)


def test_a_run_in_which_nothing_works_any_more_ends_with_the_adapter_from_before(recipe_file, tmp_path, monkeypatch):
    steps, loss_of, batches = [], Sft.loss, loop.own_micro_batches

    def noted(job, step):
        steps.append(step)
        return batches(job, step)

    monkeypatch.setattr(loop, "own_micro_batches", noted)

    def poisoned(*given):
        loss = loss_of(*given)
        return loss._replace(total=loss.total * torch.nan) if steps[-1] >= 2 else loss

    monkeypatch.setattr(Sft, "loss", poisoned)
    more = ["checkpoint.every_steps=100", "train.steps=10"]
    with pytest.raises(PoisonError, match=r"no step from 3 to 8 had a loss .* the adapter is as after step 2"):
        loop.train(load_recipe(recipe_file, more), tmp_path / "run")
    now = status(tmp_path / "run")
    assert now.state == "failed, resumable" and "no step from 3 to 8 had" in now.interruptions[-1]["cause"]
    monkeypatch.undo()
    loop.train(load_recipe(recipe_file, ["checkpoint.every_steps=2", "train.steps=10"]), tmp_path / "undisturbed")
    good = loop.train(load_recipe(recipe_file, more), tmp_path / "run")
    assert state_hash(good.folder, 10) == state_hash(tmp_path / "undisturbed", 10)
