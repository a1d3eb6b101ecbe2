"""Every way to launch runs the same loop: same bytes, same exit codes, and no thread count but the run's own."""

import signal
import subprocess
import sys
from dataclasses import fields
from inspect import signature

import psutil
import pytest
from runs import ENVIRONMENT, WAIT_SECONDS, gone, start, state_hash, train, wait_for_lines
from typer.testing import CliRunner

from lora_kit.cli import app, train_worker
from lora_kit.errors import LaunchError
from lora_kit.recipe.load import load_recipe
from lora_kit.supervise import stopping
from lora_kit.supervise.launch import Zygote
from lora_kit.training import loop
from lora_kit.training.request import TrainRequest

ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: '{distributed}'
use_cpu: true
num_machines: 1
num_processes: {processes}
machine_rank: 0
main_training_function: main
mixed_precision: '{precision}'
main_process_port: 0
"""


@pytest.fixture
def undisturbed(recipe_file, reference):
    """The bytes of a run that nothing disturbed."""
    return state_hash(reference(recipe_file), 8)


def accelerate(tmp_path, recipe, *more, precision="no", processes=2):
    config = tmp_path / "accelerate.yaml"
    distributed = "MULTI_GPU" if processes > 1 else "NO"
    config.write_text(ACCELERATE.format(precision=precision, processes=processes, distributed=distributed))
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "-m",
        "lora_kit",
    ]
    arguments = ["train", str(recipe), "--out", str(tmp_path / "run"), *more]
    return subprocess.run(launcher + arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=WAIT_SECONDS)


def test_the_command_gives_the_bytes_of_the_function_whatever_threads_the_launcher_set(
    recipe_file, tmp_path, undisturbed
):
    loop.train(load_recipe(recipe_file), tmp_path / "function")
    train(recipe_file, tmp_path / "run", environment={"OMP_NUM_THREADS": "2"}, fresh=True)
    assert state_hash(tmp_path / "run", 8) == state_hash(tmp_path / "function", 8) == undisturbed


def test_accelerate_launch_with_two_processes_gives_the_same_bytes(recipe_file, tmp_path, undisturbed):
    done = accelerate(tmp_path, recipe_file)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert state_hash(tmp_path / "run", 8) == undisturbed


def test_accelerate_settings_that_contradict_the_recipe_are_refused(recipe_file, tmp_path):
    done = accelerate(tmp_path, recipe_file, precision="fp16", processes=1)
    assert done.returncode != 0
    assert "mixed_precision is 'fp16', the recipe needs 'no'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_torchrun_with_two_processes_gives_the_same_bytes(recipe_file, tmp_path, undisturbed):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lora_kit"]
    arguments = ["train", str(recipe_file), "--out", str(tmp_path / "run")]
    subprocess.run(launcher + arguments, env=ENVIRONMENT, check=True, capture_output=True, timeout=WAIT_SECONDS)
    assert state_hash(tmp_path / "run", 8) == undisturbed


@pytest.mark.quick
def test_bad_input_keeps_its_exit_code_and_is_told_once_by_two_processes(recipe_file, tmp_path):
    printed = train(recipe_file, tmp_path / "run", "--set", "adapter.targets=[query]", processes=2, expect=2)
    assert printed.count("match no layer of the base") == 1
    assert "Traceback" not in printed


def test_without_restarts_a_killed_process_ends_the_others_and_the_run_goes_on(recipe_file, tmp_path, undisturbed):
    once = ["--set", "checkpoint.every_steps=1", "--max-restarts", "0"]
    process = start(recipe_file, tmp_path / "run", *once, processes=2)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    workers[-1].send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert gone(workers)
    train(recipe_file, tmp_path / "run", "--set", "checkpoint.every_steps=1", processes=2)
    assert state_hash(tmp_path / "run", 8) == undisturbed


@pytest.mark.quick
def test_workers_do_not_outlive_a_killed_launcher_and_the_run_goes_on_at_once(recipe_file, tmp_path, undisturbed):
    process = start(recipe_file, tmp_path / "run", "--set", "checkpoint.every_steps=1", processes=2)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    train(recipe_file, tmp_path / "run", "--set", "checkpoint.every_steps=1")
    assert gone(workers)
    assert state_hash(tmp_path / "run", 8) == undisturbed


def test_sigterm_to_accelerate_launch_of_one_process_still_saves(recipe_file, tmp_path, undisturbed):
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "lora_kit"]
    arguments = ["train", str(recipe_file), "--out", str(out), "--set", "checkpoint.every_steps=100"]
    process = subprocess.Popen(launcher + arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_lines(out / "metrics.jsonl", 2, process)
    worker = psutil.Process(process.pid).children()[0]
    keeper = worker.children()[-1]
    process.terminate()
    process.wait()
    psutil.wait_procs([worker, keeper], timeout=WAIT_SECONDS)
    assert not keeper.is_running()
    assert "stopped, resumable" in CliRunner().invoke(app, ["status", str(out)]).output
    train(recipe_file, out, "--set", "checkpoint.every_steps=100")
    assert state_hash(out, 8) == undisturbed


def test_a_second_signal_does_not_wait_unless_it_was_only_forwarded(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("by whoever listened before"))
    try:
        with stopping.stop_signals() as wanted:
            signal.raise_signal(signal.SIGUSR1)
            assert wanted.is_set()
            signal.raise_signal(signal.SIGUSR1)
            assert not heard
            monkeypatch.setattr(stopping, "FORWARDED_SECONDS", 0.0)
            signal.raise_signal(signal.SIGUSR1)
            assert len(heard) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_request_carries_every_argument_of_train(recipe_file, tmp_path, monkeypatch):
    given = {}

    def record(recipe, out, *, accept, start_from, profile):
        given.update(recipe=recipe, out=out, accept=accept, start_from=start_from, profile=profile)

    monkeypatch.setattr(loop, "train", record)
    recipe = load_recipe(recipe_file, ["optim.learning_rate=0.1", "adapter.targets=[q_proj]"])
    asked = TrainRequest(recipe, tmp_path, ("optim.*", "train.steps"), tmp_path / "a", profile=True)
    train_worker(asked.to_json())
    assert given == vars(asked) and given["recipe"].folder == recipe_file.parent


def test_a_request_names_no_argument_that_train_does_not_have():
    assert [field.name for field in fields(TrainRequest)] == list(signature(loop.train).parameters)


def test_a_request_that_is_too_long_is_refused(monkeypatch):
    zygote = Zygote.__new__(Zygote)
    with pytest.raises(LaunchError, match="bytes, more than the 120,000 that a training process can be given"):
        zygote.start("x" * 120_000, [{}])


def test_a_restart_uses_the_recipe_as_it_was_read_at_the_start(recipe_file, tmp_path, undisturbed):
    process = start(recipe_file, tmp_path / "run", "--set", "checkpoint.every_steps=1")
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    recipe_file.write_text(recipe_file.read_text().replace("steps: 8", "steps: 9") + "nonsense: true\n")
    psutil.Process(process.pid).children(recursive=True)[-1].kill()
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "restarting from there (1/10)" in printed, printed
    assert state_hash(tmp_path / "run", 8) == undisturbed


def test_a_fresh_interpreter_gets_the_same_argument():
    argument = '{"recipe": "a \'quoted\' one"}'
    code = "import sys; from lora_kit.supervise import zygote as z\n"
    code += "z._work('builtins:print', sys.argv[1], {}, None, fresh=True)"
    printed = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True)
    assert printed.stdout == argument + "\n"
