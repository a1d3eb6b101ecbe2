"""On a GPU a run is what it is on a CPU: the gradient of a plain loop, the same bytes again and after a kill, and every
snapshot is the state of its step."""

import json
import mmap
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import RECIPE
from plain_loop import plain_loop, relative
from runs import go_on, start, state_hash, wait_for_lines
from test_families import save_family

import lora_kit as lk
from lora_kit.runs.live import Region
from lora_kit.runs.store import open_checkpoint
from lora_kit.training import publisher
from lora_kit.training.profiling import OTHER
from lora_kit.training.progress import StepValues, step_values
from lora_kit.training.publisher import Publisher

pytestmark = pytest.mark.gpu

STEPS = 20
ROOT = Path(__file__).parents[1]
CHANGES = [f"train.steps={STEPS}", "checkpoint.every_steps=7"]
CHANGES += ["data.validation=0.2", "evaluate.every_steps=8", "evaluate.generate=2"]
CLOCKS = {"time", "tokens_per_second", "stall_seconds"}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def recipe(request, tmp_path_factory, base_folder, data_file):
    """Dropout, several micro-batches a step, evaluations and checkpoints on the way."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.format(base=base_folder, data=data_file).replace("float32", request.param))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """A run that nothing disturbed."""
    return go_on(recipe, tmp_path_factory.mktemp("undisturbed") / "run", *CHANGES)


def where(run):
    return json.loads((run.latest / "manifest.json").read_text())["machine"]["device"]


def without_clocks(run):
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in run.metrics]


def test_the_same_run_again_has_the_same_bytes_and_numbers(recipe, undisturbed, tmp_path):
    again = go_on(recipe, tmp_path / "run", *CHANGES)
    assert where(again) == torch.cuda.get_device_name()
    assert without_clocks(again) == without_clocks(undisturbed)
    assert again.result["metrics"] == undisturbed.result["metrics"]
    assert state_hash(again.folder, STEPS) == state_hash(undisturbed.folder, STEPS)


def test_a_killed_run_goes_on_to_the_same_bytes(recipe, undisturbed, tmp_path):
    process = start(recipe, tmp_path / "run", *(part for one in CHANGES for part in ("--set", one)))
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 6, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shown = len((tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines())
    assert shown < STEPS, "the kill came too late to prove anything"
    again = go_on(recipe, tmp_path / "run", *CHANGES)
    resumed = [event for event in again.events if event["kind"] == "resumed"]
    assert len(resumed) == 1 and resumed[0]["step"] >= shown
    assert without_clocks(again) == without_clocks(undisturbed)
    assert state_hash(again.folder, STEPS) == state_hash(undisturbed.folder, STEPS)


def test_an_evaluation_of_its_own_gives_the_numbers_of_the_run(recipe, undisturbed):
    scores = lk.evaluate(lk.load_recipe(recipe, CHANGES), undisturbed.latest)
    for name, found in undisturbed.result["metrics"].items():
        assert scores[name].loss == pytest.approx(found["loss"], rel=1e-5 if "float32" in recipe.read_text() else 1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "gpt2", "falcon"])
def test_a_step_s_gradient_is_that_of_a_plain_loop_on_a_cpu(family, recipe_file, tmp_path, base_folder, captured, jobs):
    folder = save_family(tmp_path / "base", family, base_folder)
    changes = [f"base.repo={folder}", "train.steps=2", "adapter.dropout=0", "optim.max_grad_norm=null"]
    hold_to_the_plain_loop(go_on(recipe_file, tmp_path / "run", *changes), captured, jobs[0])


def test_the_quickstart_trains_the_embedded_base(tmp_path, captured, jobs):
    changes = ["train.steps=3", "adapter.dropout=0", "optim.max_grad_norm=null", "evaluate.generate=4"]
    run = go_on(ROOT / "recipes" / "quickstart.yaml", tmp_path / "run", *changes)
    assert where(run) == torch.cuda.get_device_name() and run.result["step"] == 3
    hold_to_the_plain_loop(run, captured, jobs[0])


def hold_to_the_plain_loop(run, captured, job):
    for step, (weights, gradient) in enumerate(captured):
        members = [index for group in job.plan.micro_batches(step) for index in group]
        expected, loss = plain_loop(job, weights, members)
        assert relative(gradient, expected) < 1e-4
        assert run.metrics[step]["loss"] == pytest.approx(loss, rel=1e-4)
        assert run.metrics[step]["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-3)


def test_every_snapshot_holds_the_state_of_its_step_however_late_it_is_copied(recipe_file, tmp_path, monkeypatch):
    states, held, begin, copy, publish = [], [], Publisher.publish, Publisher._copy_on_cuda, Region.publish

    def begun(self, *arguments, **named):
        states.append(torch.cat(self._state.kept))
        begin(self, *arguments, **named)

    def late(self, slot):
        with torch.cuda.stream(self._side_stream):
            torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second: longer than a step of this base
        return copy(self, slot)

    def published(self, slot, header):
        held.append(torch.frombuffer(bytearray(self.payload(slot)), dtype=torch.float32))
        publish(self, slot, header)

    monkeypatch.setattr(Publisher, "publish", begun)
    monkeypatch.setattr(Publisher, "_copy_on_cuda", late)
    monkeypatch.setattr(Region, "publish", published)
    run = go_on(recipe_file, tmp_path / "run", "train.steps=12", "checkpoint.every_steps=4")
    assert len(states) == len(held) == 12 and not torch.equal(states[0], states[1])
    assert all(torch.equal(state.cpu(), snapshot) for state, snapshot in zip(states, held, strict=True))
    durable = open_checkpoint(run.latest).state()
    values = [one.flatten() for one in (*durable.weights.values(), *durable.moments.values())]
    assert torch.equal(torch.cat([torch.from_numpy(one) for one in values]), held[-1])


def test_the_region_s_memory_is_cuda_s_while_a_run_lasts_and_no_longer(recipe_file, tmp_path, monkeypatch):
    seen, register, unregister = [], publisher._register, publisher._unregister

    def pinned(whole):
        return torch.frombuffer(whole, dtype=torch.uint8).is_pinned()

    def registered(whole):
        known = register(whole)
        seen.append((known, pinned(whole)))
        return known

    def unregistered(whole):
        unregister(whole)
        seen.append(pinned(whole))

    monkeypatch.setattr(publisher, "_register", registered)
    monkeypatch.setattr(publisher, "_unregister", unregistered)
    go_on(recipe_file, tmp_path / "run", "train.steps=2")
    assert seen == [(True, True), False]


def test_memory_that_cuda_does_not_take_leaves_no_error_behind():
    whole = memoryview(mmap.mmap(-1, 1 << 16))
    assert publisher._register(whole) and not publisher._register(whole), "the second time it has it already"
    assert torch.ones(3, device="cuda").sum() == 3
    publisher._unregister(whole)


def test_a_step_s_numbers_do_not_wait_for_what_is_queued_after_them():
    numbers = torch.arange(1.0, 5.0, device="cuda")
    wait = step_values(numbers[:3], numbers[3], numbers[3] > 5, ("accuracy",))
    torch.cuda._sleep(2_000_000_000)  # about a second
    after = torch.cuda.Event()
    after.record()
    assert wait() == StepValues(1, True, 4, False, {"accuracy": 3}) and not after.query()
    after.synchronize()


def test_the_parts_of_a_profile_are_no_more_than_the_step(recipe_file, tmp_path):
    lk.train(lk.load_recipe(recipe_file), tmp_path / "run", profile=True)
    text = (tmp_path / "run" / "profile" / "table.txt").read_text()
    lines = [line.rsplit(maxsplit=2) for line in text.splitlines()[2:]]
    found = {name.strip(): float(milliseconds.replace(",", "")) for name, milliseconds, _ in lines}
    whole = float(text.partition(" ms a step")[0].rpartition(" ")[2].replace(",", ""))
    assert found["MLP"] > 0 and found["attention"] > 0, text
    assert found[OTHER] > whole / 4, f"a base this small leaves a GPU idle most of the time\n{text}"
