"""A resume says what differs from the run it goes on with, and changes nothing of it in silence."""

import json
import re

import pytest
from conftest import make_base, make_records, write_jsonl
from runs import state_hash

from lora_kit.errors import ContractError, InputError, LeaseError
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import store
from lora_kit.runs.lease import take
from lora_kit.runs.run import Run
from lora_kit.training import loop


@pytest.fixture
def finished(recipe_file, copied):
    """A finished run of 4 steps."""
    return copied(recipe_file, "train.steps=4")


def resume(recipe_file, run, *changes, accept=()):
    return loop.train(load_recipe(recipe_file, ["train.steps=4", *changes]), run, accept=accept)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("adapter.rank=8", "adapter.rank"),
        ("adapter.alpha=99", "adapter.alpha"),
        ("adapter.dropout=0.2", "adapter.dropout"),
        ("adapter.targets=[q_proj]", "adapter.targets"),
        ("train.batch_size=6", "train.batch_size"),
        ("train.seed=5", "train.seed"),
        ("base.dtype=bfloat16", "base.dtype"),
        ("objective.train_on=all", "fingerprints.train"),
        ("objective.reasoning=mask", "objective.reasoning"),
        ("data.max_examples=20", "fingerprints.train"),
    ],
)
def test_what_makes_it_another_run_is_refused_by_name(recipe_file, finished, change, key):
    before = sorted((finished / "checkpoints").iterdir())
    with pytest.raises(ContractError, match=rf"REFUSED +{key}"):
        resume(recipe_file, finished, change)
    assert sorted((finished / "checkpoints").iterdir()) == before


@pytest.mark.quick
def test_another_base_of_the_same_shape_is_refused(recipe_file, finished, tmp_path):
    other = make_base(tmp_path / "other", seed=1)
    with pytest.raises(ContractError, match=r"REFUSED +fingerprints\.base"):
        resume(recipe_file, finished, f"base.repo={other}")


def test_a_changed_row_of_data_is_refused_and_the_same_data_elsewhere_is_not(recipe_file, finished, tmp_path):
    records = make_records(23)
    moved = write_jsonl(tmp_path / "moved.jsonl", records)
    resume(recipe_file, finished, f"data.train={moved}")
    records[7]["messages"][-1]["content"] += "!"
    changed = write_jsonl(tmp_path / "changed.jsonl", records)
    with pytest.raises(ContractError, match=r"REFUSED +fingerprints\.train"):
        resume(recipe_file, finished, f"data.train={changed}")


def test_more_steps_need_an_accept_and_then_leave_a_trace(recipe_file, finished):
    with pytest.raises(ContractError, match=r"to resume with the change: --accept train\.steps"):
        resume(recipe_file, finished, "train.steps=6")
    run = resume(recipe_file, finished, "train.steps=6", accept=["train.steps"])
    manifest = json.loads((run.latest / "manifest.json").read_text())
    assert manifest["step"] == 6
    assert manifest["lineage"] == [{"step": 4, "key": "train.steps", "then": 4, "now": 6}]
    assert manifest["claim"]["level"] == "rounding"


def test_harmless_changes_go_through_and_are_shown(recipe_file, finished, capsys):
    resume(recipe_file, finished, "checkpoint.every_steps=50")
    assert "harmless        checkpoint.every_steps: 3 -> 50" in capsys.readouterr().out


def test_zero_remaining_steps_are_said_with_how_to_go_on(recipe_file, finished, capsys):
    before = state_hash(finished, 4)
    resume(recipe_file, finished)
    printed = capsys.readouterr().out
    assert "has finished its 4 steps" in printed and "--set train.steps=8 --accept train.steps" in printed
    assert state_hash(finished, 4) == before


@pytest.mark.parametrize("length", ["train.steps=4", "train.epochs=0.9"])
def test_the_advice_how_to_go_on_works_as_it_is_typed(length, recipe_file, tmp_path, capsys):
    key, _, _ = length.partition("=")
    text = recipe_file.read_text().replace("steps: 8,", f"{length.removeprefix('train.').replace('=', ': ')},")
    recipe_file.write_text(text)
    for _ in range(2):
        loop.train(load_recipe(recipe_file), tmp_path / "run")
    (change, accepted) = re.search(r"To go on: --set (\S+) --accept (\S+)", capsys.readouterr().out).groups()
    before = len(Run(tmp_path / "run").metrics)
    loop.train(load_recipe(recipe_file, [change]), tmp_path / "run", accept=[accepted])
    assert accepted == key and len(Run(tmp_path / "run").metrics) > before


@pytest.mark.parametrize("length", ["train.steps=3", "train.epochs=0.5"])
def test_fewer_steps_than_are_finished_are_refused_with_the_way_back(length, recipe_file, finished):
    steps = 3 if "steps" in length else -(-23 // 2 // 5)
    changes = [length] if "steps" in length else ["train.steps=null", length]
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != "lease.json"}
    back = finished / "checkpoints" / "step-00000003"
    accept = ["train.steps", "train.epochs"]
    told = f"4 steps are finished, and the recipe has only {steps}; --from {back} goes back"
    with pytest.raises(ContractError, match=told):
        resume(recipe_file, finished, *changes, accept=accept)
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != "lease.json"}
    assert before == after
    loop.train(load_recipe(recipe_file, changes), finished, accept=accept, start_from=back)
    assert Run(finished).result["step"] == steps == Run(finished).metrics[-1]["step"]


def test_fewer_steps_than_every_checkpoint_has_need_another_folder(recipe_file, finished):
    with pytest.raises(ContractError, match=r"no checkpoint up to step 2 is kept.*another --out"):
        resume(recipe_file, finished, "train.steps=2", accept=["train.steps"])


def test_a_folder_of_something_else_is_refused(recipe_file, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"not empty and not a run's folder \(it holds thesis\.tex\)"):
        loop.train(load_recipe(recipe_file), tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_run_that_is_training_is_not_touched(recipe_file, finished):
    lease = take(finished, run_id=store.find(finished).latest.manifest.run.run_id)
    with pytest.raises(LeaseError, match="is training here"):
        resume(recipe_file, finished)
    lease.release()
    resume(recipe_file, finished)
