"""A transformers Trainer with a LiveCheckpoint ends with the bytes of an undisturbed run, whatever happens to it."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
from collections import OrderedDict, defaultdict, deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from runs import WAIT_SECONDS, events, started, steps_shown, wait_until
from small_trainer import At, Counting, make, outcome, rows
from transformers import DefaultDataCollator, TrainerCallback

from lora_kit.cli import app
from lora_kit.errors import ContractError, InputError, LaunchError
from lora_kit.integrations import capture, plain, script
from lora_kit.integrations.transformers import LiveCheckpoint
from lora_kit.runs import store
from lora_kit.runs.status import status

TESTS = Path(__file__).parent
SCRIPTS = TESTS.parent / "benchmarks" / "resilience" / "scripts"
DYING = (
    "import sys; sys.path.insert(0, sys.argv[1]); from small_trainer import train_and_die; train_and_die(*sys.argv[2:])"
)
STEPS = 12


def trained(base, folder, run=None, **settings):
    """Train, with a LiveCheckpoint if there is a run's folder; return the trainer."""
    trainer = make(base, folder, **settings)
    if run is not None:
        LiveCheckpoint(trainer, run)
    trainer.train()
    return trainer


def stopped(base, folder, run, step, **settings):
    """Train until a SIGTERM in the middle of a step."""
    stop = At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        trained(base, folder, run, **settings | {"callbacks": [*settings.get("callbacks", ()), stop]})
    assert ended.value.code == 75


@pytest.fixture(scope="module")
def expected(base_folder, tmp_path_factory):
    """What the undisturbed run ends with, without lora_kit."""
    return outcome(trained(base_folder, tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture(scope="module")
def run_of_five(base_folder, tmp_path_factory):
    """A run that SIGTERM has stopped after step 5, in the middle of the second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    stopped(base_folder, folder / "out", folder / "run", 5)
    return folder / "run"


@pytest.fixture
def run(run_of_five, tmp_path):
    """A copy of the stopped run."""
    return Path(shutil.copytree(run_of_five, tmp_path / "run"))


def test_attaching_changes_nothing_and_keeps_every_step(base_folder, expected, tmp_path):
    assert outcome(trained(base_folder, tmp_path, tmp_path / "run")) == expected
    assert steps_shown(tmp_path / "run") == list(range(1, STEPS + 1))
    found = status(tmp_path / "run")
    assert (found.state, found.step, found.durable["step"], found.steps_lost) == ("finished", STEPS, STEPS, 0)
    assert not events(tmp_path / "run", "fault"), "the closed-world check has named something"


def test_sigterm_ends_with_75_and_the_next_start_with_the_bytes_of_the_undisturbed_run(
    base_folder, expected, run, tmp_path
):
    assert store.find(run).latest.step == 5
    assert [event["step"] for event in events(run, "stopped")] == [5]
    assert outcome(trained(base_folder, tmp_path, run)) == expected


@pytest.mark.parametrize("step", [4, 8, 11])  # the end of an epoch, before its evaluation; the step before the last
def test_every_place_of_a_stop_is_as_good(step, base_folder, expected, tmp_path):
    stopped(base_folder, tmp_path, tmp_path / "run", step)
    assert outcome(trained(base_folder, tmp_path, tmp_path / "run")) == expected


@pytest.mark.parametrize(("length", "steps"), [({"max_steps": 5}, 5), ({"num_train_epochs": 1}, 4)])
def test_a_finished_run_is_not_trained_again(length, steps, base_folder, tmp_path):
    first = outcome(trained(base_folder, tmp_path, tmp_path / "run", **length))
    assert outcome(trained(base_folder, tmp_path, tmp_path / "run", **length)) == first
    assert [event["step"] for event in events(tmp_path / "run", "started", "resumed")] == [0, steps]


@pytest.mark.slow
def test_a_process_that_is_killed_twice_loses_no_finished_step(base_folder, expected, tmp_path):
    for step in (3, 9):
        process = started([TESTS, base_folder, tmp_path, tmp_path / "run", step], None, code=DYING)
        assert process.wait(WAIT_SECONDS) == -signal.SIGKILL
        wait_until(lambda step=step: (latest := store.find(tmp_path / "run").latest) and latest.step == step - 1)
    assert outcome(trained(base_folder, tmp_path, tmp_path / "run")) == expected
    assert [event["step"] for event in events(tmp_path / "run", "resumed")] == [2, 8]
    assert steps_shown(tmp_path / "run") == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_launch_restarts_an_unmodified_script_of_trl_and_resumes_it_after_sigterm(base_folder, tmp_path):
    pytest.importorskip("trl", reason="`pip install 'lora_kit[dev]'` installs TRL")
    arguments = ["--base", base_folder, "--out", tmp_path / "plain"]
    program = "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    undisturbed = started([SCRIPTS, SCRIPTS / "sft.py", *arguments], None, code=program, fresh=True)
    run, launch = tmp_path / "run", ["launch", "--out", tmp_path / "run", SCRIPTS / "sft.py"]
    launch += ["--base", base_folder, "--out", tmp_path / "launched"]

    def lines():
        return len(steps_shown(run)) if (run / "metrics.jsonl").exists() else 0

    process = started(launch, None, fresh=True)
    wait_until(lambda: lines() >= 3, process)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "supervise.zygote import work" in " ".join(child.cmdline()):
            child.kill()
    killed_at = lines()
    wait_until(lambda: lines() > killed_at + 3, process)
    process.terminate()
    printed, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 75, printed
    again = started(launch, None, fresh=True)
    printed, _ = again.communicate(timeout=WAIT_SECONDS)
    assert again.returncode == 0, printed
    assert undisturbed.wait(WAIT_SECONDS) == 0, undisturbed.stdout.read()
    found, plain_run = (json.loads((tmp_path / name / "outcome.json").read_text()) for name in ("launched", "plain"))
    assert found == plain_run
    resumes = events(run, "resumed")
    assert len(resumes) == 2 and all(one["reached"] <= one["step"] for one in resumes)


def test_nothing_is_pickled(base_folder, expected, run, tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a pickle")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "dump"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(owner, name, refuse)
    assert outcome(trained(base_folder, tmp_path, run)) == expected
    names = {path.name for path in store.find(run).latest.path.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "trainer.json",
    }


def test_peft_loads_the_adapter_of_a_checkpoint(base_folder, run_of_five):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path = store.find(run_of_five).latest.path
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), path)
    saved = load_file(path / store.ADAPTER)
    loaded = capture.trainable(model.requires_grad_(True))
    assert saved and all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())


REMOVED = {  # what a resume loses if the state lacks a component: none may be missing unnoticed
    "exp_avg": lambda saved: [saved.optimizer[name].zero_() for name in saved.optimizer if name.endswith("exp_avg")],
    "exp_avg_sq": lambda saved: [saved.optimizer[n].zero_() for n in saved.optimizer if n.endswith("exp_avg_sq")],
    "optimizer step": lambda saved: [saved.optimizer[name].fill_(1) for name in saved.optimizer if name[-4:] == "step"],
    "weights": lambda saved: [tensor.zero_() for tensor in saved.weights.values()],
    "scheduler": lambda saved: saved.document["scheduler"].update(last_epoch=0, _step_count=1),
    "torch generator": lambda saved: saved.document["processes"][0]["random"].update(
        torch=plain.random_states()["torch"]
    ),
    "running loss": lambda saved: saved.document["processes"][0]["attributes"]["trainer"].pop("_tr_loss"),
    "log": lambda saved: saved.document["state"]["log_history"].clear(),
}


@pytest.mark.parametrize("component", REMOVED)
def test_each_component_of_the_state_is_needed(component, base_folder, expected, run, tmp_path, monkeypatch):
    from lora_kit.integrations import transformers

    load = transformers.load_saved_here

    def without(opened):
        saved = load(opened)
        REMOVED[component](saved)
        return saved

    monkeypatch.setattr(transformers, "load_saved_here", without)
    assert outcome(trained(base_folder, tmp_path, run)) != expected


def test_callbacks_and_a_stop_that_they_decide_are_resumed(base_folder, tmp_path):
    undisturbed = outcome(trained(base_folder, tmp_path, callbacks=[Counting(most=7)]))
    stopped(base_folder, tmp_path, tmp_path / "run", 6, callbacks=[Counting(most=7)])
    counting = Counting(most=7)
    assert outcome(trained(base_folder, tmp_path, tmp_path / "run", callbacks=[counting])) == undisturbed
    assert undisturbed["step"] == 7 and counting.counted == {"steps": 7}


def test_all_weights_of_a_model_without_peft_are_kept(base_folder, tmp_path):
    settings = {"lora": False, "max_steps": 5, "optim": "sgd", "optim_args": "momentum=0.9"}
    undisturbed = outcome(trained(base_folder, tmp_path, **settings))
    stopped(base_folder, tmp_path, tmp_path / "run", 3, **settings)
    assert (store.find(tmp_path / "run").latest.path / "trainable.safetensors").exists()
    assert outcome(trained(base_folder, tmp_path, tmp_path / "run", **settings)) == undisturbed


class Drawing(DefaultDataCollator):
    """A collator that replaces tokens at random, from every generator."""

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        chosen = torch.rand(batch["input_ids"].shape) < 0.3
        batch["input_ids"][chosen] = random.randint(3, 30) + np.random.randint(30)
        return batch


@pytest.mark.parametrize("step", [4, 5, 9])
def test_batches_that_are_drawn_at_random_are_the_same_after_a_resume(step, base_folder, tmp_path):
    undisturbed = outcome(trained(base_folder, tmp_path, collator=Drawing()))
    stopped(base_folder, tmp_path, tmp_path / "run", step, collator=Drawing())
    assert outcome(trained(base_folder, tmp_path, tmp_path / "run", collator=Drawing())) == undisturbed
    assert not events(tmp_path / "run", "fault")


def test_a_log_that_outgrows_the_live_region_gets_a_larger_one(base_folder, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "SMALLEST_DOCUMENT", 1)
    monkeypatch.setattr(capture, "space_for", lambda document: len(document) + capture.LENGTH_BYTES + 200)
    stopped(base_folder, tmp_path, tmp_path / "run", 10)
    assert outcome(trained(base_folder, tmp_path, tmp_path / "run")) == expected


def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(base_folder, expected, tmp_path, run):
    newest = store.find(run).latest.path
    content = bytearray((newest / "trainer.json").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "trainer.json").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        app(["verify", str(run)])
    assert ended.value.code == 1
    assert outcome(trained(base_folder, tmp_path, run)) == expected
    assert events(run, "started", "resumed")[-1]["step"] < 5


# ---- the closed-world check --------------------------------------------------------------------------------------


class Large(TrainerCallback):
    """A callback with a state that is too large or of a kind that is not captured."""

    def __init__(self):
        self.average, self.generator = torch.zeros(100_000), random.Random(0)

    def on_step_end(self, args, state, control, **named):
        self.average += 1
        self.generator.random()


class Seen(list):
    """A dataset that counts what was taken from it."""

    def __init__(self):
        super().__init__(rows())
        self.taken = 0

    def __getitem__(self, index):
        self.taken += 1
        return super().__getitem__(index)


def counting_buffer(model):
    """Let a frozen layer of the model count its calls in a buffer."""
    layer = model.get_submodule("base_model.model.model.norm")
    layer.register_buffer("calls", torch.zeros(()), persistent=False)
    layer.register_forward_hook(lambda module, inputs, result: module.calls.add_(1) and None)


OPEN = {
    "a callback's large tensor": "callbacks[1].average",
    "a callback's own generator": "callbacks[1].generator",
    "a dataset's counter": "trainer.train_dataset.taken",
    "a buffer": "model.norm.calls",
}


@pytest.fixture(scope="module")
def named(base_folder, tmp_path_factory):
    """What the check has said of a trainer with all of `OPEN`, and the manifest of its checkpoint."""
    folder = tmp_path_factory.mktemp("open")
    made = {"callbacks": [Large()], "data": Seen(), "change": counting_buffer}
    trained(base_folder, folder, folder / "run", max_steps=3, **made)
    return events(folder / "run", "fault"), store.find(folder / "run").latest.manifest.run


@pytest.mark.parametrize("name", OPEN)
def test_what_changes_and_is_not_captured_is_named(name, named):
    faults, facts = named
    assert any(OPEN[name] in fault["what"] for fault in faults)
    assert any(OPEN[name] in path for path in facts.uncaptured)


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_a_resume_that_would_compute_something_else_is_refused(base_folder, run, tmp_path):
    before = sorted(path.name for path in run.rglob("*") if not path.name.startswith(".lease"))
    with pytest.raises(ContractError, match=r"learning_rate: 0.01 -> 0.02"):
        trained(base_folder, tmp_path, run, learning_rate=2e-2)
    with pytest.raises(ContractError, match="frozen weights"):
        trained(base_folder, tmp_path, run, change=lambda model: next(model.parameters()).data.add_(1))
    with pytest.raises(ContractError, match="trains other parameters"):
        trained(base_folder, tmp_path, run, lora=False)
    assert sorted(path.name for path in run.rglob("*") if not path.name.startswith(".lease")) == before


def test_a_recipe_does_not_resume_the_run_of_a_script(run_of_five, recipe_file, tmp_path, capsys):
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training import loop

    with pytest.raises(ContractError, match="a run of a script"):
        loop.train(load_recipe(recipe_file), run_of_five)
    with pytest.raises(SystemExit):
        app(["generate", str(run_of_five), "hello"])
    assert "not of a recipe" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("settings", [{"ignore_data_skip": True}, {"auto_find_batch_size": True}])
def test_arguments_that_make_a_resume_inexact_are_refused(settings, base_folder, tmp_path):
    with pytest.raises(LaunchError, match=next(iter(settings))):
        LiveCheckpoint(make(base_folder, tmp_path, **settings), tmp_path / "run")


def test_a_second_call_of_train_needs_a_folder_of_its_own(base_folder, tmp_path):
    trainer = trained(base_folder, tmp_path, tmp_path / "run", max_steps=1)
    with pytest.raises(LaunchError, match="has trained already"):
        trainer.train()


def test_every_process_gets_the_state_that_the_main_process_has_found(run):
    from pydantic import TypeAdapter

    from lora_kit.runs.live import Live
    from lora_kit.runs.resume import OpenRun, open_run

    adapter, opened = TypeAdapter(OpenRun), open_run(run, script=True)
    snapshot = Live(run / "region", 1, {}, replace(opened.latest.manifest, files={}))
    for latest in (opened.latest, snapshot):
        given = replace(opened, latest=latest)
        assert adapter.validate_json(adapter.dump_json(given)) == given
    opened.lease.release()


# ---- lora-kit launch ------------------------------------------------------------------------------------------------


def test_a_script_runs_as_python_runs_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "beside.py").write_text("value = 3")
    file = tmp_path / "script.py"
    file.write_text("import sys, beside\nprint(__name__, sys.argv, beside.value, __file__)\nsys.exit(4)\n")
    request = script.ScriptRequest(file, ("--x", "1"), tmp_path / "run", 30.0, 3)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(SystemExit) as ended:
        script.run_script(request.to_json())
    assert ended.value.code == 4
    assert capsys.readouterr().out == f"__main__ {[str(file), '--x', '1']} 3 {file}\n"


def test_a_second_trainer_of_a_script_and_a_missing_script_are_refused(tmp_path):
    class Trainer:
        callback_handler = type("Handler", (), {"callbacks": []})

        def train(self):
            pass

    request = script.ScriptRequest(tmp_path / "absent.py", (), tmp_path / "run", 30.0, 3)
    script.attach(Trainer, request, ["First"])
    with pytest.raises(InputError, match="a second trainer"):
        Trainer().train()
    with pytest.raises(InputError, match="no such file"):
        script.run_script(request.to_json())
    with pytest.raises(SystemExit) as ended:
        app(["launch", str(tmp_path / "absent.py")])
    assert ended.value.code == 2


def test_a_function_is_called_when_a_module_has_been_imported(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    script.when_imported("imported_later", lambda module: seen.append(module.value))
    assert not seen
    import imported_later

    assert seen == [1] and sys.modules["imported_later"] is imported_later
    script.when_imported("imported_later", lambda module: seen.append(module.value))
    assert seen == [1, 1]


# ---- plain values ---------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    -3,
    2**70,
    0.1,
    float("inf"),
    "text",
    b"\0\xff",
    [1, (2, 3), {4, 5}],
    {"a": {"b": [None]}},
    {1: 2, (3, 4): 5},
    {"!": 1},
    OrderedDict(b=1, a=2),
    deque([1, 2], 3),
    torch.tensor([[1.5, float("nan")]]),
    torch.tensor(True),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16)[::2],
    torch.zeros(0, 3),
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.float32(0.1),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_plain_value_survives_json(value):
    back = plain.unpack(json.loads(json.dumps(plain.pack(value))))
    assert type(back) is type(value)
    if isinstance(value, torch.Tensor):
        assert back.dtype == value.dtype and back.shape == value.shape
        assert torch.equal(plain.flat_bytes(back), plain.flat_bytes(value))
    elif isinstance(value, np.ndarray):
        assert back.dtype == value.dtype and np.array_equal(back, value)
    else:
        assert back == value


def test_a_defaultdict_keeps_its_factory_and_nan_is_nan():
    back = plain.unpack(json.loads(json.dumps(plain.pack(defaultdict(list, a=[float("nan")])))))
    assert back.default_factory is list and np.isnan(back["a"][0])


@pytest.mark.parametrize("value", [object(), print, io.BytesIO(), torch.zeros(100_000), [defaultdict(lambda: 1)]])
def test_what_is_not_plain_is_refused(value):
    with pytest.raises(plain.NotPlainError):
        plain.pack(value)


def test_random_generators_go_on_where_they_were():
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist()]

    draw()
    states = json.loads(json.dumps(plain.random_states()))
    first = [draw() for _ in range(3)]
    plain.set_random_states(states)
    assert [draw() for _ in range(3)] == first
    assert all(one != other for one, other in pairwise(first))
