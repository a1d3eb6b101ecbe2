"""A run may begin with an earlier adapter, or go back to one of its own checkpoints; neither loses anything."""

import json
import os
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import state_hash, train
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.errors import CheckpointError, ContractError, InputError
from lora_kit.files import sha256_of
from lora_kit.model.state import FlatState
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import store
from lora_kit.runs.journal import Journal
from lora_kit.runs.origin import open_origin
from lora_kit.training import loop


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def test_going_back_repeats_the_same_bytes_and_keeps_what_was_newer(recipe_file, copied):
    run = copied(recipe_file)
    first = state_hash(run, 8)
    printed = train(recipe_file, run, "--from", str(checkpoint(run, 6)), processes=2)
    assert "going back to step 6" in printed and "are lost" not in printed and state_hash(run, 8) == first
    assert store.open_checkpoint(run / "checkpoints" / store.QUARANTINE / "step-00000008.1").step == 8
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9)) and json.loads((run / "result.json").read_text())["step"] == 8


def everything_in(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lease.json"}


REFUSED = ["adapter.rank=8", "data.train=gone.jsonl", "optim.learning_rate=0.5", "train.steps=2"]


@pytest.mark.parametrize("change", REFUSED)
def test_going_back_that_is_refused_moves_nothing(change, recipe_file, copied):
    run = copied(recipe_file)
    before = everything_in(run)
    with pytest.raises(InputError):
        loop.train(load_recipe(recipe_file, [change]), run, start_from=checkpoint(run, 6))
    assert everything_in(run) == before and before[run / "result.json"]


def test_a_refused_command_that_goes_back_moves_nothing_either(recipe_file, copied):
    run = copied(recipe_file)
    before = everything_in(run)
    train(recipe_file, run, "--set", "adapter.rank=8", "--from", str(checkpoint(run, 6)), expect=2)
    assert everything_in(run) == before


def test_a_restart_after_going_back_does_not_go_back_again(recipe_file, copied, faults):
    run = copied(recipe_file)
    first = state_hash(run, 8)
    plan = {"step": 6, "phase": "update", "kind": "kill"}  # which waits until step 5 is published
    train(recipe_file, run, "--from", str(checkpoint(run, 3)), environment=faults(plan))
    assert faults.happened() == 1 and state_hash(run, 8) == first
    events = Journal(run).read_events()
    assert [event["step"] for event in events if event["kind"] == "went back"] == [3]
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [3, 5]


def test_a_checkpoint_that_was_set_aside_can_be_returned_to(recipe_file, copied):
    run = copied(recipe_file)
    first = state_hash(run, 8)
    changes = ["optim.learning_rate=0.5"]
    loop.train(load_recipe(recipe_file, changes), run, accept=["optim.learning_rate"], start_from=checkpoint(run, 6))
    assert state_hash(run, 8) != first
    aside = run / "checkpoints" / store.QUARANTINE
    shutil.move(checkpoint(run, 8), aside)
    shutil.move(aside / "step-00000008.1", checkpoint(run, 8))
    loop.train(load_recipe(recipe_file), run, start_from=checkpoint(run, 8))
    assert state_hash(run, 8) == first and json.loads((run / "result.json").read_text())["step"] == 8


def test_a_new_run_begins_with_an_earlier_adapter_and_fresh_moments(
    recipe_file, tmp_path, trained_run, monkeypatch, capsys
):
    filled = []
    fill = FlatState.load_weights
    monkeypatch.setattr(FlatState, "load_weights", lambda self, a: (fill(self, a), filled.append(self.weights.clone())))
    begun = load_file(checkpoint(trained_run, 4) / "adapter_model.safetensors")
    recipe = load_recipe(recipe_file, ["train.steps=1"])
    run = loop.train(recipe, tmp_path / "run", start_from=trained_run)
    assert f"starts with the adapter of {checkpoint(trained_run, 4)}" in capsys.readouterr().out
    assert sorted(filled[0].tolist()) == sorted(value for array in begun.values() for value in array.ravel().tolist())
    facts = store.open_checkpoint(run.latest).manifest.run
    assert facts.origin.step == 4 and facts.origin.run_id != facts.run_id
    fresh = loop.train(recipe, tmp_path / "fresh")
    assert state_hash(run.folder, 1) != state_hash(fresh.folder, 1)
    again = loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "run", start_from=trained_run)
    assert store.open_checkpoint(again.latest).manifest.run.origin == facts.origin


@pytest.mark.quick
def test_an_adapter_that_does_not_fit_is_refused_with_every_difference(recipe_file, tmp_path, trained_run):
    recipe = load_recipe(recipe_file, ["adapter.rank=8", "adapter.alpha=3"])
    with pytest.raises(ContractError, match=r"(?s)adapter\.rank: 4 in .* 8 in .*adapter\.alpha: 8 in .* 3 in "):
        loop.train(recipe, tmp_path / "run", start_from=trained_run)
    loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "run")
    with pytest.raises(ContractError, match=r"began with a fresh adapter, not with .*leave --from out"):
        loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "run", start_from=trained_run)


def test_another_base_is_refused(recipe_file, tmp_path, trained_run, base_folder):
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(ContractError, match="base: the checkpoint was trained on a base with other files"):
        loop.train(load_recipe(recipe_file, [f"base.repo={other}"]), tmp_path / "run", start_from=trained_run)


@pytest.fixture
def plain(base_folder, tmp_path):
    """A function that saves an adapter as PEFT and TRL do, in bfloat16, with changes to its settings."""

    def save(**changes):
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | changes
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        get_peft_model(base, config, autocast_adapter_dtype=False).save_pretrained(tmp_path / "plain")
        return tmp_path / "plain"

    return save


def test_a_new_run_begins_with_an_adapter_of_another_program(plain, recipe_file, tmp_path, monkeypatch):
    filled, fill = [], FlatState.load_weights
    monkeypatch.setattr(FlatState, "load_weights", lambda self, a: (fill(self, a), filled.append(self.weights.clone())))
    folder = plain()
    (folder / "optimizer.pt").write_bytes(b"a pickle, as TRL leaves it here")
    printed = train(recipe_file, tmp_path / "run", "--from", folder, "--set", "train.steps=1")
    assert f"starts with the adapter of {folder}" in printed and "nothing verifies that its base was" in printed
    loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "here", start_from=folder)
    saved = torch_load_file(folder / "adapter_model.safetensors").values()
    expected = [value for tensor in saved for value in tensor.float().ravel().tolist()]
    assert sorted(filled[0].tolist()) == sorted(expected)
    assert state_hash(tmp_path / "run", 1) == state_hash(tmp_path / "here", 1)
    origin = store.open_checkpoint(checkpoint(tmp_path / "run", 1)).manifest.run.origin
    assert (origin.run_id, origin.step, origin.adapter) == (None, None, sha256_of(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"r": 2}, r"adapter\.rank: 2 in .* 4 in "),
        ({"use_rslora": True}, r"adapter\.scaling: rslora in .* plain in "),
        ({"use_dora": True}, r"use_dora: True in the adapter"),
        ({"target_modules": ["q_proj"]}, "tensor names differ"),
    ],
)
def test_an_adapter_of_another_program_that_does_not_fit_is_refused(changes, problem, plain, recipe_file, tmp_path):
    printed = train(recipe_file, tmp_path / "run", "--from", plain(**changes), expect=2)
    assert re.search(problem, printed) and "Traceback" not in printed


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_an_adapter_of_other_files_than_regular_ones_is_refused_without_waiting(name, kind, trained_run, tmp_path):
    folder = shutil.copytree(checkpoint(trained_run, 4), tmp_path / "plain")
    (folder / "manifest.json").unlink()
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_origin(folder)


def test_a_pickled_adapter_is_refused(plain, recipe_file, tmp_path):
    folder = plain()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    printed = train(recipe_file, tmp_path / "run", "--from", folder, expect=1)
    assert "pickles are never read" in printed and "Traceback" not in printed


def test_generate_and_merge_say_that_an_adapter_of_another_program_is_for_from(plain, tmp_path):
    folder = plain()
    for arguments in (["generate", folder, "hello"], ["merge", folder, "--out", tmp_path / "merged"]):
        told = CliRunner().invoke(app, list(map(str, arguments)))
        assert told.exit_code == 1 and f"lora-kit train --from {folder}" in told.stderr
