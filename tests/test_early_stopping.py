"""A run ends after evaluations without a gain, at the same step and with the same bytes however it is interrupted."""

import json
import os
import shutil
import signal

import pytest
from conftest import RECIPE, hold, make_records, write_jsonl
from manifests import files_of, run_facts, step_facts, step_record
from runs import nothing_was_lost, records, start, state_hash, train, wait_for_lines

import lora_kit as lk
from lora_kit.runs import store
from lora_kit.runs.figures import Patience, figure_of, higher_is_better
from lora_kit.training import loop

STEPS, END = 12, 6  # planned; the end, since no evaluation gains as much as the recipe asks for


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder):
    """A run whose first evaluation, after step 2, remains the best."""
    folder = tmp_path_factory.mktemp("recipe")
    data = write_jsonl(folder / "train.jsonl", make_records(5))
    held_out = write_jsonl(folder / "held_out.jsonl", make_records(9, seed=5))
    text = RECIPE.format(base=base_folder, data=data).replace("steps: 8", f"steps: {STEPS}")
    text = text.replace("length: 256", f"length: 256, validation: {held_out}")
    (folder / "recipe.yaml").write_text(text + "evaluate: {every_steps: 2, patience: 2, least_gain: 100}\n")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def ended(recipe, reference):
    """A run that nothing disturbed."""
    return lk.Run(reference(recipe))


@pytest.mark.quick
def test_a_run_ends_when_its_patience_is_over(ended):
    losses = [record["held_out_loss"] for record in ended.metrics if "held_out_loss" in record]
    watch = store.open_checkpoint(ended.latest).manifest.progress.watch
    assert (watch.metric, watch.best, watch.step, watch.waited) == ("loss", losses[0], 2, 2) and len(losses) == 3
    assert ended.result["step"] == END and ended.latest.name == f"step-{END:08d}"
    assert ended.events[-1]["kind"] == "finished" and ended.events[-1]["step"] == END


def test_the_same_command_finds_it_finished_and_more_patience_goes_on(ended, recipe, tmp_path):
    folder = shutil.copytree(ended.folder, tmp_path / "run")
    printed = train(recipe, folder)
    assert f"ends after step {END} of {STEPS}: 2 evaluations in a row without a better loss" in printed
    assert "nothing is left to do. To go on: --set evaluate.patience=4" in printed
    train(recipe, folder, "--set", "evaluate.patience=3")
    assert lk.Run(folder).result["step"] == END + 2


@pytest.mark.parametrize(("phase", "processes"), [("line", 1), ("evaluate", 2)])
def test_kills_change_neither_the_end_nor_the_bytes(ended, recipe, faults, tmp_path, phase, processes):
    out = tmp_path / "run"
    plan = [{"rank": processes - 1, "step": at, "phase": phase, "kind": "kill"} for at in (END - 2, END)]
    train(recipe, out, processes=processes, environment=faults(*plan))
    assert faults.happened() == 2
    assert lk.Run(out).result["step"] == END and state_hash(out, END) == state_hash(ended.folder, END)
    nothing_was_lost(out, END)
    found, expected = ([record.get("held_out_loss") for record in records(run)] for run in (out, ended.folder))
    assert found == expected, "the figures are equal to the bit on any number of processes"


def test_a_kill_of_all_between_two_evaluations_keeps_the_count(ended, recipe, faults, tmp_path):
    out = tmp_path / "run"
    process = start(recipe, out, environment=faults(hold(END)))
    wait_for_lines(out / "metrics.jsonl", END - 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(recipe, out)
    assert lk.Run(out).result["step"] == END and state_hash(out, END) == state_hash(ended.folder, END)


def test_the_count_of_a_patience():
    patience, watch, told = Patience("rewards/accuracies", 2, 0.1), None, []
    for number, accuracy in enumerate((0.5, 0.55, 0.7, None, 0.75), 1):
        line = json.dumps(step_record(number, held_out_loss=1.0, held_out_metrics={"rewards/accuracies": accuracy}))
        watch = patience.after(watch, step_facts(number, line=line))
        told.append((watch.best, watch.step, watch.waited, patience.is_over(watch)))
    assert told == [(0.5, 1, 0, False), (0.5, 1, 1, False), (0.7, 3, 0, False), (0.7, 3, 1, False), (0.7, 3, 2, True)]
    assert Patience("loss", 1, 0.0).after(watch, step_facts(6, held_out_loss=9.0)).best == 9.0, "another metric"
    assert not Patience("loss", 1, 0.0).is_over(watch) and Patience("loss", None, 0.0).after(watch, None) is None


@pytest.mark.parametrize(
    ("metric", "best"), [("loss", 3), ("loss/b", 2), ("rewards/margins", 1), ("exact_match", 2), ("forgetting", 1)]
)
def test_the_best_checkpoint_is_that_of_the_metric(tmp_path, metric, best):
    for step, (loss, other, margin, match, forgetting) in enumerate(
        [(2.0, 3.0, 0.9, 0.1, -0.2), (1.5, 1.0, 0.5, 0.7, 0.0), (1.0, 2.0, 0.7, 0.7 - 1e-9, None)], 1
    ):
        metrics = {"rewards/margins": margin, "exact_match": match, "forgetting": forgetting}
        line = step_record(step, held_out_loss=loss, held_out_sets={"b": other}, held_out_metrics=metrics)
        facts = step_facts(step, held_out_loss=loss, line=json.dumps(line))
        store.commit(tmp_path, files_of(), run_facts(recipe={"evaluate": {"metric": metric}}), facts)
    assert store.best_of(tmp_path).step == best
    store.prune(tmp_path, 2, best=True)
    assert {store.step_of(path) for path in store.folders(tmp_path)} == {best, 2, 3}
    assert figure_of(facts, "absent") is None and higher_is_better(metric) != metric.startswith(("loss", "forg"))


def test_a_metric_of_answers_is_measured_on_the_way(recipe, tmp_path):
    changes = ["evaluate.metric=contains", "evaluate.generate=2", "evaluate.metrics=[contains]", "train.steps=4"]
    run = loop.train(lk.load_recipe(recipe, changes), tmp_path / "run")
    assert [record["held_out_metrics"]["contains"] for record in run.metrics if "held_out_loss" in record] == [0.0, 0.0]
    assert store.open_checkpoint(run.latest).manifest.progress.watch.waited == 1
