"""A resume says what differs from the run it goes on with, and changes nothing of it in silence."""

import json

import pytest
from conftest import make_base, make_records, write_jsonl
from runs import state_hash

from lora_kit.errors import ContractError, InputError, LeaseError
from lora_kit.recipe.load import load_recipe
from lora_kit.runs.lease import take
from lora_kit.training import loop


@pytest.fixture
def finished(recipe_file, tmp_path):
    """A finished run of 4 steps."""
    loop.train(load_recipe(recipe_file, ["train.steps=4"]), tmp_path / "run")
    return tmp_path / "run"


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


def test_a_folder_of_something_else_is_refused(recipe_file, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"not empty and not a run's folder \(it holds thesis\.tex\)"):
        loop.train(load_recipe(recipe_file), tmp_path / "home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_run_that_is_training_is_not_touched(recipe_file, finished):
    lease = take(finished, run_id="r")
    with pytest.raises(LeaseError, match="is training here"):
        resume(recipe_file, finished)
    lease.release()
    resume(recipe_file, finished)
