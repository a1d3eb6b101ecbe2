"""Evaluation on the way changes no bit, keeps the best checkpoint, and a run's folder reads back."""

import math
import shutil

import pytest
from conftest import make_records, write_jsonl
from runs import start, state_hash, train, wait_for_lines

import lora_kit as lk
from lora_kit.errors import CheckpointError, RecipeError
from lora_kit.runs import store
from lora_kit.training import loop
from lora_kit.training.evaluation import HeldOut, HeldOutLoss

CHANGES = ("train.steps=4", "optim.learning_rate=0.05", "checkpoint.every_steps=2")  # those of `trained_run`


@pytest.fixture
def watched(tmp_path):
    held_out = write_jsonl(tmp_path / "validation.jsonl", make_records(9, seed=5))
    return [f"data.validation={held_out}", "evaluate.every_steps=2", "evaluate.generate=3"]


@pytest.mark.quick
def test_evaluating_on_the_way_changes_no_bit(recipe_file, tmp_path, reference, watched):
    run = lk.train(lk.load_recipe(recipe_file, watched), tmp_path / "watched")
    assert state_hash(reference(recipe_file), 8) == state_hash(tmp_path / "watched", 8)
    measured = {record["step"]: record["held_out_loss"] for record in run.metrics if "held_out_loss" in record}
    assert list(measured) == [2, 4, 6, 8]
    assert measured[8] == pytest.approx(run.result["metrics"]["adapter"]["loss"], rel=1e-6)


def test_the_commands_that_a_run_shows_quote_a_folder_with_blanks(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lk.train(lk.load_recipe(recipe_file, ["train.steps=1"]), "my run")
    assert "lora-kit status 'my run'" in capsys.readouterr().out


def test_a_measured_loss_is_that_of_its_checkpoint(recipe_file, tmp_path, watched):
    recipe = lk.load_recipe(recipe_file, [*watched, "checkpoint.keep=9"])
    run = lk.train(recipe, tmp_path / "run")
    measured = {record["step"]: record["held_out_loss"] for record in run.metrics if "held_out_loss" in record}
    loss = lk.evaluate(recipe, run.folder / "checkpoints" / "step-00000004")["adapter"].loss
    assert loss == pytest.approx(measured[4], rel=1e-6)


def test_the_best_checkpoint_survives_pruning(recipe_file, tmp_path, watched, monkeypatch):
    changes = [*watched, "checkpoint.best=true", "checkpoint.keep=2", "train.steps=12", "checkpoint.every_steps=100"]
    measure = loop.held_out_loss

    def away(job, done, *rest):
        found = measure(job, done, *rest)
        return found._replace(mean=found.mean + 100 * abs(done - 6))

    monkeypatch.setattr(loop, "held_out_loss", away)
    run = lk.train(lk.load_recipe(recipe_file, changes), tmp_path / "run")
    measured = {record["step"]: record["held_out_loss"] for record in run.metrics if "held_out_loss" in record}
    lowest = min(measured, key=measured.get)
    assert lowest == 6
    assert run.best is not None and run.best.name == "step-00000006"
    assert [path.name for path in run.checkpoints] == [f"step-{step:08d}" for step in (6, 10, 12)]
    assert run.result["best"] == "checkpoints/step-00000006"


def test_answers_on_the_way_are_logged_once_also_after_a_kill(recipe_file, tmp_path, watched):
    out = tmp_path / "run"
    options = [part for change in watched for part in ("--set", change)]
    process = start(recipe_file, out, *options)
    wait_for_lines(out / "metrics.jsonl", 5, process)
    process.kill()
    process.wait()
    train(recipe_file, out, *options)
    events = [event for event in lk.Run(out).events if event["kind"] == "sample"]
    assert [event["step"] for event in events] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert all(event["expected"] for event in events)


@pytest.mark.quick
@pytest.mark.parametrize("content", [b"", bytes(300), b"[" * 100_000, b'{"step": 4}'])
def test_a_damaged_result_is_told_and_written_again(recipe_file, tmp_path, trained_run, capsys, content):
    run = lk.Run(shutil.copytree(trained_run, tmp_path / "run"))
    whole = run.result
    (run.folder / "result.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"result\.json: not valid: "):
        _ = run.result
    assert "not valid" in run._repr_html_()
    lk.train(lk.load_recipe(trained_run.parent / "recipe.yaml", CHANGES), run.folder)
    assert "result.json: not valid: " in capsys.readouterr().out
    assert run.result == whole


def test_a_held_out_loss_that_is_not_finite_is_told_and_stored_as_null(
    recipe_file, tmp_path, watched, monkeypatch, capsys
):
    monkeypatch.setattr(HeldOut, "loss", lambda *_: HeldOutLoss(math.nan, {}, {}))
    recipe = lk.load_recipe(recipe_file, [*watched, "train.steps=4", "checkpoint.best=true"])
    for _ in range(2):
        run = lk.train(recipe, tmp_path / "run")
    manifest = store.open_checkpoint(run.latest).manifest
    assert manifest.progress.step == 4 and manifest.progress.held_out_loss is None
    assert [record["held_out_loss"] for record in run.metrics if "held_out_loss" in record] == [None, None]
    assert "step 2: the held-out loss is nan; it is stored as null" in capsys.readouterr().out
    assert [event["step"] for event in run.events if event["kind"] == "fault"][:2] == [2, 4]
    assert run.result["metrics"]["adapter"]["loss"] is None and run.best is None
    for name in ("result.json", "metrics.jsonl", "events.jsonl"):
        assert "NaN" not in (run.folder / name).read_text()


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no valid checkpoint; train first"):
        _ = lk.Run(tmp_path).latest
    assert lk.Run(tmp_path).result == {} and lk.Run(tmp_path).best is None


@pytest.mark.parametrize(
    ("change", "told"),
    [("evaluate.every_steps=2", "set data.validation"), ("checkpoint.best=true", "set evaluate.every_steps")],
)
def test_fields_that_need_others_say_which(recipe_file, change, told):
    with pytest.raises(RecipeError, match=told):
        lk.load_recipe(recipe_file, [change])
