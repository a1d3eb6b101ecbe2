"""However a run is interrupted, and on however many processes it goes on, it ends with the undisturbed run's bytes."""

import os
import random
import signal
import time

import pytest
from conftest import hold
from runs import start, state_hash, steps_shown, train, wait_for_lines

STEPS = 8


@pytest.fixture(scope="module")
def dtype(request):
    """The precision of the base: fp32, or what a test's parameter says."""
    return getattr(request, "param", "float32")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder, data_file, dtype):
    """A run with dropout whose checkpoints fall inside an epoch, and whose steps have several micro-batches."""
    from conftest import RECIPE

    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.format(base=base_folder, data=data_file).replace("float32", dtype))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, reference):
    """The bytes of a run on one process that nothing disturbed."""
    return state_hash(reference(recipe), STEPS)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], indirect=True)
def test_two_processes_end_with_the_bytes_of_one(recipe, undisturbed, tmp_path):
    train(recipe, tmp_path / "run", processes=2)
    assert state_hash(tmp_path / "run", STEPS) == undisturbed


@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [("float32", 1, 1), ("float32", 1, 2), ("float32", 2, 1), ("bfloat16", 2, 1)],
    indirect=["dtype"],
)
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(recipe, undisturbed, faults, tmp_path, first, second):
    out = tmp_path / "run"
    rng = random.Random(f"{first}{second}")
    process = start(recipe, out, processes=first, environment=faults(hold(STEPS)))
    wait_for_lines(out / "metrics.jsonl", rng.randint(3, 6), process)
    time.sleep(rng.uniform(0, 0.02))  # so that the kill comes at any moment of a step
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    printed = train(recipe, out, processes=second)
    assert "resuming" in printed
    assert state_hash(out, STEPS) == undisturbed
    assert steps_shown(out) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_the_step_and_exits_75(recipe, undisturbed, faults, tmp_path, processes):
    out, rarely = tmp_path / "run", ["--set", "checkpoint.every_steps=100"]
    process = start(recipe, out, *rarely, processes=processes, environment=faults(hold(STEPS)))
    wait_for_lines(out / "metrics.jsonl", 2, process)
    process.terminate()
    printed, _ = process.communicate()
    assert process.returncode == 75, printed
    assert "the same command resumes it" in printed
    saved = [path.name for path in (out / "checkpoints").glob("step-*")]
    assert saved == [f"step-{steps_shown(out)[-1]:08d}"]
    train(recipe, out)
    assert state_hash(out, STEPS) == undisturbed


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(recipe, undisturbed, copied):
    out = copied(recipe)
    newest = out / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    printed = train(recipe, out)
    assert "falling back to step 6" in printed and "optimizer.safetensors" in printed
    assert list((out / "checkpoints" / ".quarantine").glob("step-*"))
    assert state_hash(out, STEPS) == undisturbed


def test_an_interrupted_first_save_starts_again_from_nothing(recipe, undisturbed, tmp_path):
    out = tmp_path / "run"
    half = out / "checkpoints" / ".tmp-1"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    train(recipe, out)
    assert state_hash(out, STEPS) == undisturbed
    assert not half.exists()
