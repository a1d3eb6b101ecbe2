"""A drill does to a real run what its certificate says, finds it equal, and finds an engine that loses part of it."""

import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import RECIPE
from manifests import SHAPES, run_facts, step_facts, step_record
from runs import started, with_faults
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.errors import CheckpointError, InputError
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import layout, store
from lora_kit.runs.certificate import FILE, TEXT, certificate_of, hash_of, read_certificate
from lora_kit.runs.comparison import compare
from lora_kit.runs.journal import Journal
from lora_kit.runs.manifest import Claim, Machine
from lora_kit.runs.resume import take_over
from lora_kit.supervise import drill_run
from lora_kit.supervise.drill import DISTURBED, LOG, UNDISTURBED, Drill, empty, least_steps, moments
from lora_kit.supervise.faults import FAULTS

STEPS = 8
STATE = ("weights", "exp_avg", "exp_avg_sq")


def forked(**environment):
    """A stand-in for the module subprocess in a drill, which forks the training command instead of starting it."""
    environment = {"FAULTS_SLEEP": "0.08", "PYTHONPATH": with_faults()} | environment
    return SimpleNamespace(
        Popen=lambda command, **options: started(command[3:], environment),
        DEVNULL=subprocess.DEVNULL,
        STDOUT=subprocess.STDOUT,
    )


def drill_of(recipe, out, *faults, steps=None, seed=0):
    return Drill(recipe, (), load_recipe(recipe), out, steps, seed, faults or None, processes=1, gpus=0)


@pytest.fixture(scope="module", params=["default"])
def recipe(request, tmp_path_factory, base_folder, data_file):
    """A recipe with dropout whose steps have several micro-batches, and which a drill must not evaluate or track."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    text = RECIPE.format(base=base_folder, data=data_file).replace("steps: 8", "steps: 60")
    text = text.replace("dropout: 0.1", f"dropout: 0.1, init: {request.param}")
    path.write_text(text + "evaluate: {generate: 3}\ntrack: {names: [tensorboard]}\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """The folder of a drill's undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drill_run, "subprocess", forked())
        return drill_of(recipe, out).undisturbed(STEPS).run


def disturbed(recipe, undisturbed, out, forget, monkeypatch):
    """Return the certificate of a drill whose disturbed run forgets a part of the state at its resume."""
    out.mkdir()
    shutil.copytree(undisturbed, out / UNDISTURBED)
    monkeypatch.setattr(drill_run, "subprocess", forked(FAULTS_FORGET=forget))
    drill = drill_of(recipe, out, "kill")
    first = drill.prepared(UNDISTURBED, STEPS, ())
    return drill.certify(("kill",), {}, first, drill.disturbed(["kill"], first, print))


@pytest.mark.parametrize("forget", ["nothing", *STATE, "step"])
def test_a_drill_finds_an_engine_that_loses_a_part_of_the_state(recipe, undisturbed, tmp_path, forget, monkeypatch):
    certificate = disturbed(recipe, undisturbed, tmp_path / "drill", forget, monkeypatch)
    text = certificate.text()
    assert certificate.equal == (forget == "nothing") == (not certificate.problems), text
    assert [each.fault for each in certificate.faults] == ["kill"], text
    assert text.startswith("EQUAL: " if certificate.equal else "NOT EQUAL\n")
    different = {name for name in STATE if f"\n  {name}: differs by " in text}
    assert different == (set() if forget == "nothing" else set(STATE)), text


@pytest.mark.parametrize("recipe", ["pissa"], indirect=True)
@pytest.mark.parametrize("forget", ["nothing", "constants"])
def test_the_constants_of_a_start_are_part_of_the_state(recipe, undisturbed, tmp_path, forget, monkeypatch):
    certificate = disturbed(recipe, undisturbed, tmp_path / "drill", forget, monkeypatch)
    assert certificate.equal == (forget == "nothing"), certificate.text()
    assert ("constants" in certificate.comparison.differences) == (forget == "constants")


@pytest.mark.slow
def test_every_fault_is_done_to_a_real_run_and_nothing_differs(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(drill_run, "subprocess", forked(FAULTS_SLEEP="0.12"))
    told = CliRunner().invoke(app, ["drill", str(recipe), "--out", str(tmp_path / "drill"), "--seed", "3"])
    assert told.exit_code == 0, (told.output, told.exception)
    folder = tmp_path / "drill"
    certificate = read_certificate(folder / FILE)
    assert told.stdout.endswith((folder / TEXT).read_text()) and "EQUAL: a run of" in told.stdout
    faults = [each.fault for each in certificate.faults]
    assert set(faults) == set(FAULTS) and faults.count("processes") == faults.count("placement") == 2
    assert all(each.lost == 0 for each in certificate.faults if each.fault != "corrupt")
    assert all({"found", "start", "step"} <= each.parts.keys() for each in certificate.faults)
    assert (certificate.comparison.claim.level, certificate.recipe) == ("bitwise", hash_of(load_recipe(recipe)))
    for name, compared in certificate.comparison.files.items():
        for run in (UNDISTURBED, DISTURBED):
            content = (store.checkpoint_folder(folder / run, certificate.steps) / name).read_bytes()
            assert len(content) == compared.size
    events = [each["kind"] for each in Journal(folder / DISTURBED).read_events()]
    assert events.count("started") + events.count("resumed") >= 1 + len(faults), (
        "under load a step may look like a hang"
    )
    assert "finished" not in events and not (folder / DISTURBED / "tensorboard").exists()
    causes = [each["cause"] for each in Journal(folder / DISTURBED).read_events() if each["kind"] == "restart"]
    assert any("SIGKILL" in cause for cause in causes) and any("no sign of life" in cause for cause in causes)
    again = json.loads((folder / FILE).read_text())["command"]
    assert again.startswith("lora-kit drill ") and "--seed 3" in again and ",".join(FAULTS) in again


@pytest.fixture
def certified(recipe, tmp_path):
    """A run's folder with the certificate of a drill of its recipe."""
    drill = drill_of(recipe, tmp_path / "run" / "drill", "kill")
    drill.out.mkdir(parents=True)
    for name in (UNDISTURBED, DISTURBED):
        pair_of(drill.out / name, "bitwise", 0.0)
    first, second = (drill.prepared(name, 2, ()) for name in (UNDISTURBED, DISTURBED))
    second.resumptions.append(drill_run.Resumption("kill", "SIGKILL", 1, 1, 0, 0.5, {"found": 0.5}))
    drill.certify(("kill",), {}, first, second).write(drill.out)
    return tmp_path / "run"


def test_a_certificate_belongs_to_its_recipe_and_to_every_byte_of_it(recipe, certified):
    loaded, path = load_recipe(recipe), certified / "drill" / FILE
    lease, _ = take_over(certified)  # a run may begin in the folder of its drill
    lease.release()
    found = certificate_of(certified, loaded)
    assert found.equal and found.summary() == "a run of 2 steps with kill equals an undisturbed run to the bit"
    assert certificate_of(certified, load_recipe(recipe, ["optim.learning_rate=1"])) is None
    assert certificate_of(certified / "drill", loaded) is None
    replace(found, equal=False).write(path.parent)
    assert certificate_of(certified, loaded) is None
    path.write_text(path.read_text().replace('"equal": false', '"equal": true'))
    with pytest.raises(CheckpointError, match="its own checksum does not match"):
        read_certificate(path)
    assert certificate_of(certified, loaded) is None


def pair_of(run, level, change, *, steps=(1, 2), loss=0.5, skipped=()):
    """Commit a checkpoint of step 2 whose weights and moments are one number after the other, times 1 + `change`."""
    size = sum(int(np.prod(shape)) for shape in SHAPES.values())
    values = (np.linspace(1, 2, size) * (1 + change)).astype(np.float32).tobytes()
    headers = store.headers_of(layout.Layout(SHAPES))
    files = {
        store.ADAPTER: [headers[store.ADAPTER], values],
        store.ADAPTER_CONFIG: [b'{"base_model_name_or_path": "base"}\n'],
        store.OPTIMIZER: [headers[store.OPTIMIZER], values, values],
    }
    run.mkdir(parents=True)
    store.commit(run, files, run_facts(claim=Claim(level, "a test")), step_facts(2, skipped_steps=skipped))
    for step in steps:
        Journal(run).metrics(step_record(step, loss=loss))


@pytest.mark.parametrize(
    ("level", "changes", "problems"),
    [
        ("bitwise", {}, []),
        ("bitwise", {"change": 1e-7}, ["adapter_model.safetensors: the bytes differ", "optimizer.safetensors: the"]),
        ("bitwise", {"loss": 0.25}, ["metrics.jsonl, step 1, loss: 0.5 undisturbed, 0.25 disturbed", "step 2, loss"]),
        ("bitwise", {"steps": (1, 2, 2)}, ["its steps are [1, 2, 2], expected 1 to 2, each once"]),
        ("bitwise", {"skipped": (1,)}, ["skipped steps: [] undisturbed, [1] disturbed"]),
        ("rounding", {"change": 1e-4, "loss": 0.51}, []),
        ("rounding", {"change": 0.1}, ["weights: the difference is 0.1 of its norm; 0.01 is allowed", "exp_avg"]),
        ("rounding", {"steps": (2,)}, ["its steps are [2], expected 1 to 2, each once"]),
    ],
)
def test_bytes_or_tolerance_by_what_the_runs_claim(tmp_path, level, changes, problems):
    pair_of(tmp_path / "one", "bitwise", 0.0)
    pair_of(tmp_path / "two", level, **({"change": 0.0} | changes))
    found = compare(tmp_path / "one", tmp_path / "two", 2)
    assert found.claim.level == level, "the weaker of the two"
    assert bool(found.problems) == bool(problems) and all(
        any(problem in told for told in found.problems) for problem in problems
    ), found.problems


def test_moments_depend_on_the_seed_alone_and_every_fault_has_room():
    steps = least_steps(FAULTS) + 6
    planned = [moments(tuple(FAULTS), steps, random.Random(seed)) for seed in (0, 0, 1)]
    assert planned[0] == planned[1] != planned[2]
    for plan in planned:
        assert {name for name, _ in plan} == set(FAULTS) and plan[0][1] >= 1
        ends = [step + FAULTS[name].steps for name, step in plan]
        assert all(end <= step + 1 for end, (_, step) in zip(ends, [*plan[1:], ("", steps - 3)], strict=True))


def test_two_processes_need_two_gpus_and_any_cpu(recipe):
    refusal, parsed = FAULTS["processes"].refusal, load_recipe(recipe)
    assert not refusal(parsed, Machine(1, "cpu x86_64"), 0) and not refusal(parsed, Machine(1, "NVIDIA H200"), 2)
    assert refusal(parsed, Machine(1, "NVIDIA H200"), 1) == "two processes need two GPUs"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--faults", "kill,fire"], "'fire' is no fault; the faults are\n  kill: SIGKILL to one training process\n"),
        (["--faults", "kill,hang", "--steps", "7"], "8 steps are too few for 2 fault(s), which need 9; choose fewer"),
        (["--set", "train.steps=3"], "3 steps are too few for 9 fault(s)"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(recipe, tmp_path, arguments, problem):
    told = CliRunner().invoke(app, ["drill", str(recipe), "--out", str(tmp_path / "drill"), *arguments])
    assert told.exit_code == 2 and problem in told.stderr and not (tmp_path / "drill").exists()


def test_only_an_earlier_drill_is_replaced(tmp_path):
    (tmp_path / UNDISTURBED).mkdir()
    (tmp_path / LOG).touch()
    empty(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"thesis\.txt, which no drill has written"):
        empty(tmp_path)


def test_an_undisturbed_run_that_fails_is_told_in_its_own_words(recipe, tmp_path, monkeypatch):
    def failing(command, stdout, **options):
        print("error: recipe.yaml: no such base", file=stdout, flush=True)
        return subprocess.Popen(["sh", "-c", "exit 2"])

    monkeypatch.setattr(drill_run, "subprocess", forked())
    drill_run.subprocess.Popen = failing
    with pytest.raises(InputError, match=r"ended with exit code 2; .*log\.txt:\n(.|\n)*no such base"):
        drill_of(recipe, Path(tmp_path / "drill"), "kill").run(print)
