"""A DPO run killed in its reference or in any step goes on to the same bytes; KTO's divergence has one value."""

import os
import random
import signal
import time

import pytest
from conftest import RECIPE, hold, write_jsonl
from preferences import preference_records
from runs import events, nothing_was_lost, records, start, state_hash, train, wait_for_lines

from lora_kit.training.reference import CHUNK

STEPS = 6
PAIRS = CHUNK + 60
PHASES = ["forward", "backward", "reduce", "update", "publish"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder):
    """A run with a reference of two chunks for training and one for evaluation, and with several micro-batches."""
    folder = tmp_path_factory.mktemp("recipe")
    data = write_jsonl(folder / "pairs.jsonl", preference_records(PAIRS))
    held_out = write_jsonl(folder / "held_out.jsonl", preference_records(9))
    text = RECIPE.format(base=base_folder, data=data).replace("steps: 8", f"steps: {STEPS}")
    text = text.replace("tokens: 256", "tokens: 512").replace("length: 256", f"length: 256, validation: {held_out}")
    (folder / "recipe.yaml").write_text(text + "objective: {kind: dpo}\nevaluate: {every_steps: 3}\n")
    return folder / "recipe.yaml"


@pytest.fixture
def without_cache(tmp_path):
    """The environment of a run that finds no log-probabilities of an earlier run."""
    return {"LORA_KIT_CACHE": str(tmp_path / "cache")}


def chunks_begun(faults):
    """Return (examples, first example) of each chunk of the reference that process 0 began to compute."""
    lines = (faults.folder / "reference").read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]


def test_kills_in_the_reference_and_in_steps_cost_only_what_was_in_flight(
    recipe, undisturbed, faults, without_cache, tmp_path
):
    out, rng = tmp_path / "run", random.Random(3)
    plan = [{"rank": 1, "phase": "log-probs", "kind": "kill"}, {"phase": "kept", "kind": "kill"}]
    # not step 1 or 2: a third SIGKILL at the same step may be for lack of memory, and ends a run
    phases = zip(rng.sample(range(3, STEPS + 1), 4), rng.sample(PHASES, 4), strict=True)
    plan += [{"rank": 0, "step": step, "phase": phase, "kind": "kill"} for step, phase in phases]
    train(recipe, out, processes=2, environment=faults(*plan) | without_cache)
    assert faults.happened() == len(plan) == len(events(out, "restart"))
    # the first chunk was in flight; when it was kept at last, no later start computed it again
    assert chunks_begun(faults) == [(PAIRS, 0), (PAIRS, 0), (PAIRS, CHUNK), (9, 0)]
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_a_reference_goes_on_after_a_kill_without_a_keeper(recipe, undisturbed, faults, without_cache, tmp_path):
    out = tmp_path / "run"
    environment = faults({"phase": "kept", "kind": "hold"}) | without_cache
    process = start(recipe, out, environment=environment)
    while not faults.happened():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the keeper and the training process
    process.wait()
    (kept,) = (tmp_path / "cache" / "reference").iterdir()
    with kept.open("ab") as file:
        file.write(b"a part of the next chunk")
    train(recipe, out, environment=environment)
    assert chunks_begun(faults) == [(PAIRS, 0), (PAIRS, CHUNK), (9, 0)]
    assert state_hash(out, STEPS) == undisturbed


def test_one_process_then_two_then_one_end_with_the_bytes_of_one(recipe, undisturbed, faults, tmp_path):
    out, holds, rng = tmp_path / "run", [hold(3), hold(5)], random.Random(4)
    for number, processes in enumerate((1, 2)):
        process = start(recipe, out, processes=processes, environment=faults(*holds))
        wait_for_lines(out / "metrics.jsonl", 2 * number + 1, process)
        time.sleep(rng.uniform(0, 0.02))  # so that the kill comes at any moment of a step
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        faults.release(number)
    assert "resuming" in train(recipe, out)
    assert state_hash(out, STEPS) == undisturbed
    nothing_was_lost(out, STEPS)


def test_the_divergence_of_kto_is_the_same_number_on_one_and_two_processes(recipe, faults, reference, tmp_path):
    kto = ["objective.kind=kto", "objective.beta=0.5", "data.max_examples=40"]
    one, two = reference(recipe, *kto), tmp_path / "run"
    plan = {"rank": 1, "step": 4, "phase": "forward", "kind": "kill"}
    options = [part for change in kto for part in ("--set", change)]
    train(recipe, two, *options, processes=2, environment=faults(plan))
    assert state_hash(one, STEPS) == state_hash(two, STEPS)
    found, expected = ([record["kl"] for record in records(run)] for run in (two, one))
    assert found == expected and max(found) > 0
    assert records(one)[-1]["held_out_metrics"] == pytest.approx(records(two)[-1]["held_out_metrics"], rel=1e-5)
