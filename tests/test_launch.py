"""Every way to launch runs the same loop: same bytes, same exit codes, and no thread count but the run's own."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import hold
from runs import WAIT_SECONDS, gone, start, started, state_hash, train, wait_for_lines
from typer.testing import CliRunner

from lora_kit import cli
from lora_kit.cli import app, train_worker
from lora_kit.errors import LaunchError, LoraKitError
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import resume
from lora_kit.runs.status import status
from lora_kit.supervise import launch as launching
from lora_kit.supervise import stopping, zygote
from lora_kit.supervise.zygote import MESSAGE_BYTES, Zygote
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


LAUNCHER = "import sys; from runpy import run_module; run_module(sys.argv.pop(1), run_name='__main__')"


def launched(launcher, *options, recipe, out, more=(), environment=None):
    """Start `python -m LAUNCHER OPTIONS -m lora_kit train`, whose training processes are fresh interpreters."""
    arguments = [launcher, *options, "-m", "lora_kit", "train", recipe, "--out", out, *more]
    return started(arguments, environment, code=LAUNCHER)


def accelerate(tmp_path, recipe, *, precision="no", processes=2):
    """Train under `accelerate launch` with a file of settings; return the exit code and what was printed."""
    config = tmp_path / "accelerate.yaml"
    distributed = "MULTI_GPU" if processes > 1 else "NO"
    config.write_text(ACCELERATE.format(precision=precision, processes=processes, distributed=distributed))
    process = launched("accelerate.commands.launch", "--config_file", config, recipe=recipe, out=tmp_path / "run")
    printed, _ = process.communicate()
    return process.returncode, printed


def test_the_command_gives_the_bytes_of_the_function_whatever_threads_the_launcher_set(
    recipe_file, tmp_path, undisturbed
):
    loop.train(load_recipe(recipe_file), tmp_path / "function")
    train(recipe_file, tmp_path / "run", environment={"OMP_NUM_THREADS": "2"}, fresh=True)
    assert state_hash(tmp_path / "run", 8) == state_hash(tmp_path / "function", 8) == undisturbed


@pytest.mark.slow
def test_accelerate_launch_with_two_processes_gives_the_same_bytes(recipe_file, tmp_path, undisturbed):
    code, printed = accelerate(tmp_path, recipe_file)
    assert code == 0 and "2 process(es)" in printed, printed
    assert state_hash(tmp_path / "run", 8) == undisturbed


def test_accelerate_settings_that_contradict_the_recipe_are_refused(recipe_file, tmp_path):
    code, printed = accelerate(tmp_path, recipe_file, precision="fp16", processes=1)
    assert code != 0 and "mixed_precision is 'fp16', the recipe needs 'no'" in printed, printed
    assert not (tmp_path / "run").exists()


def test_torchrun_gives_the_same_bytes(recipe_file, tmp_path, undisturbed):
    process = launched("torch.distributed.run", "--nproc-per-node", 1, recipe=recipe_file, out=tmp_path / "run")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert state_hash(tmp_path / "run", 8) == undisturbed


@pytest.mark.quick
def test_bad_input_keeps_its_exit_code_and_is_told_once_by_two_processes(recipe_file, tmp_path):
    printed = train(recipe_file, tmp_path / "run", "--set", "adapter.targets=[query]", processes=2, expect=2)
    assert printed.count("match no layer of the base") == 1
    assert "Traceback" not in printed


def test_without_restarts_a_killed_process_ends_the_others_and_the_run_goes_on(
    recipe_file, tmp_path, undisturbed, faults
):
    once = ["--set", "checkpoint.every_steps=1", "--max-restarts", "0"]
    process = start(recipe_file, tmp_path / "run", *once, processes=2, environment=faults(hold(8)))
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    workers[-1].send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert gone(workers)
    train(recipe_file, tmp_path / "run", "--set", "checkpoint.every_steps=1", processes=2)
    assert state_hash(tmp_path / "run", 8) == undisturbed


@pytest.mark.quick
def test_workers_do_not_outlive_a_killed_launcher_and_the_run_goes_on_at_once(
    recipe_file, tmp_path, undisturbed, faults
):
    every = ["--set", "checkpoint.every_steps=1"]
    process = start(recipe_file, tmp_path / "run", *every, processes=2, environment=faults(hold(8)))
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()  # on a loaded machine a killed process takes longer to disappear than the lease waits
    train(recipe_file, tmp_path / "run", *every)
    assert gone(workers)
    assert state_hash(tmp_path / "run", 8) == undisturbed


def test_sigterm_to_accelerate_launch_of_one_process_still_saves(recipe_file, tmp_path, undisturbed, faults):
    out, rarely, options = tmp_path / "run", ["--set", "checkpoint.every_steps=100"], ["--cpu", "--num_processes", 1]
    launcher, environment = "accelerate.commands.launch", faults(hold(5))
    process = launched(launcher, *options, recipe=recipe_file, out=out, more=rarely, environment=environment)
    wait_for_lines(out / "metrics.jsonl", 2, process)
    worker = psutil.Process(process.pid).children()[0]
    keeper = worker.children()[-1]
    process.terminate()
    process.wait()
    faults.release()
    psutil.wait_procs([worker, keeper], timeout=WAIT_SECONDS)
    assert not keeper.is_running()
    assert "stopped, resumable" in CliRunner().invoke(app, ["status", str(out)]).output
    train(recipe_file, out, *rarely)
    assert state_hash(out, 8) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_ends_the_start_with_75(recipe_file, tmp_path, monkeypatch, number):
    def interrupted(*arguments, **options):  # such as a start that waits for the heartbeat of another machine
        signal.raise_signal(number)

    monkeypatch.setattr(zygote.Zygote, "__init__", lambda self: None)
    monkeypatch.setattr(zygote.Zygote, "end", lambda self: None)
    monkeypatch.setattr(resume, "take_over", interrupted)
    result = CliRunner().invoke(app, ["train", str(recipe_file), "--out", str(tmp_path / "run")])
    assert result.exit_code == 75 and f"stopped by {number.name} before training began" in result.stderr
    assert not (tmp_path / "run").exists()


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


LEFT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LORA_KIT_STORE": "/nowhere/store"}
LEFT |= {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
LEFT |= {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3", "MASTER_ADDR": "nowhere"}
LEFT |= {"PMI_RANK": "1", "PMI_SIZE": "2", "PMIX_RANK": "1"}
LEFT |= {"TORCHELASTIC_RUN_ID": "old", "GROUP_RANK": "1", "ROLE_WORLD_SIZE": "2"}


def test_no_rank_variable_that_was_left_in_the_environment_gets_to_the_training_processes(monkeypatch):
    """Whatever they are together: torch, accelerate and MPI libraries each look at some of them."""
    given = []
    monkeypatch.setattr(zygote.subprocess, "Popen", lambda command, env, **more: given.append(env))
    for name, value in (LEFT | {"KEPT": "x"}).items():
        monkeypatch.setenv(name, value)
    Zygote()
    assert given[0]["KEPT"] == "x" and not LEFT.keys() & given[0].keys()


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "2"}, LEFT], ids=["one", "all"])
def test_a_run_is_not_disturbed_by_rank_variables_that_were_left(recipe_file, tmp_path, undisturbed, left):
    printed = train(recipe_file, tmp_path / "run", environment=left)
    assert "1 process(es)" in printed and state_hash(tmp_path / "run", 8) == undisturbed


def test_an_error_is_printed_although_a_rank_was_left_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "none.yaml: no such file" in result.stderr


@pytest.mark.parametrize(
    ("visible", "cuda", "expected"),
    [
        (None, "12.8", 8),
        ("", "12.8", 1),
        ("-1", "12.8", 1),
        ("0", "12.8", 1),
        ("2,3", "12.8", 2),
        ("2,9,3", "12.8", 1),
        ("GPU-a,GPU-b,GPU-c", "12.8", 3),
        (None, None, 1),
        ("2,3", None, 1),
    ],
)
def test_a_process_is_started_for_each_gpu_that_torch_will_see(tmp_path, monkeypatch, visible, cuda, expected):
    (tmp_path / "version.py").write_text(f"cuda = {cuda!r}\n")
    gpus = tmp_path / "gpus"
    for number in range(8):
        (gpus / str(number)).mkdir(parents=True)
    monkeypatch.setattr(cli, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(cli, "GPUS", gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cli._gpus() == expected


# the command, in which process 1 fails at its start
ONE_FAILS = """
import sys
sys.path.insert(0, sys.argv[1])
from fork_server import fork_the_zygote
from lora_kit.cli import app
from lora_kit.errors import DataError
from lora_kit.training import processes
start = processes.Processes.start.__func__
def fail(cls, *arguments):
    made = start(cls, *arguments)
    if made.index == 1:
        raise DataError("data.jsonl:7: only process 1 sees this")
    return made
processes.Processes.start = classmethod(fail)
fork_the_zygote()
app(["train", *sys.argv[2:]])
"""


def test_an_error_that_only_another_process_raises_is_printed(recipe_file, tmp_path):
    """Process 0 waits for the others in a collective, so it says nothing."""
    arguments = [Path(__file__).parent, recipe_file, "--out", tmp_path / "run", "--processes", 2]
    process = started(arguments, None, code=ONE_FAILS)
    printed, _ = process.communicate()
    assert process.returncode == 2, printed
    assert printed.count("data.jsonl:7: only process 1 sees this") == 1 and "Traceback" not in printed


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


def test_the_error_that_ends_a_run_is_what_status_says(recipe_file, tmp_path):
    train(recipe_file, tmp_path / "run", "--set", "train.max_loss=1e-6", expect=1)
    now = status(tmp_path / "run")
    assert now.state == "failed, resumable" and "no step from 1 to " in now.interruptions[-1]["cause"]
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    train(recipe_file, tmp_path / "run", "--set", "adapter.rank=8", expect=2)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before, "a refused start changes nothing"


def test_limits_of_processes_are_told_and_what_is_optional_is_left_out(monkeypatch, capsys):
    def denied(*_, **__):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", denied)
    assert launching._start_ahead(launching.Program.of_recipe("{}", absent=(), step_timeout=None)) is None
    with pytest.raises(LoraKitError, match=r"cannot be started: Resource temporarily unavailable; raise the limit"):
        Zygote()
    with pytest.raises(SystemExit) as ended, cli.error_messages():
        raise RuntimeError("can't start new thread")
    assert ended.value.code == 1 and "ulimit -u" in capsys.readouterr().err


def test_a_zygote_that_cannot_fork_says_so(monkeypatch):
    code = "import os, errno, sys; from lora_kit.supervise import zygote\n"
    code += "def denied(): raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))\n"
    code += "os.fork = denied; zygote.main(int(sys.argv[1]))"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda c, **more: popen([c[0], "-c", code, c[3]], **more))
    made = Zygote()
    made.prepare([])
    made.start("os:getpid", "", [{}])
    assert made.process.wait(WAIT_SECONDS) == 1
    (told,) = made.messages()
    assert told["refused"] == made.process.pid and "Resource temporarily unavailable" in told["text"]


def test_a_zygote_whose_keeper_has_just_been_killed_prints_no_traceback():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    with theirs:
        zygote._send(theirs, {"ended": 1, "code": 0})


def test_a_request_that_is_too_long_is_refused(monkeypatch):
    zygote = Zygote.__new__(Zygote)
    with pytest.raises(LaunchError, match="bytes, more than the 120,000 that a training process can be given"):
        zygote.start("json:loads", "x" * 120_000, [{}])


def test_a_restart_uses_the_recipe_as_it_was_read_at_the_start(recipe_file, tmp_path, undisturbed, faults):
    every = ["--set", "checkpoint.every_steps=1"]
    process = start(recipe_file, tmp_path / "run", *every, environment=faults(hold(8)))
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    recipe_file.write_text(recipe_file.read_text().replace("steps: 8", "steps: 9") + "nonsense: true\n")
    psutil.Process(process.pid).children(recursive=True)[-1].kill()
    faults.release()
    printed, _ = process.communicate()
    assert process.returncode == 0 and "restarting from there (1/10)" in printed, printed
    assert state_hash(tmp_path / "run", 8) == undisturbed


ENDING = """
import atexit, ctypes, sys, threading
from lora_kit.supervise.zygote import end_process
atexit.register(lambda: print("handler"))
threading.Thread(target=lambda: print("thread")).start()
ctypes.CDLL(None).printf(b"C ")
sys.stdout.write("Python ")
end_process(3)
"""


def test_a_process_that_does_not_take_its_modules_apart_ends_like_any_other():
    process = started([], None, code=ENDING)
    printed, _ = process.communicate()
    assert process.returncode == 3 and set(printed.split()) == {"handler", "thread", "C", "Python"}


def test_a_fresh_interpreter_gets_the_same_argument_and_reports_its_errors():
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = "import sys, socket; from lora_kit.supervise import zygote as z\n"
    code += "z._work(sys.argv[1], sys.argv[2], {}, socket.socket(fileno=int(sys.argv[3])), fresh=True)"
    argument = '{"recipe": "a \'quoted\' one"}'

    def called(function, argument):
        command = [sys.executable, "-c", code, function, argument, str(theirs.fileno())]
        return subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=[theirs.fileno()])

    assert called("builtins:print", argument).stdout == argument + "\n"
    assert called("lora_kit.recipe.load:load_recipe", "/nowhere.yaml").returncode == 2
    assert json.loads(mine.recv(MESSAGE_BYTES))["text"] == "/nowhere.yaml: no such file"
    assert called("builtins:int", "x").returncode == 1
    assert "ValueError" in json.loads(mine.recv(MESSAGE_BYTES))["error"]


def test_under_nohup_a_lost_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.stop_signals() as wanted:
            signal.raise_signal(signal.SIGHUP)
            assert not wanted.is_set() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stopping.stop_signals() as wanted:
            signal.raise_signal(signal.SIGHUP)
            assert wanted.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_stands_in_the_place_of_the_recipe_s_copy_is_told_and_ends_no_run(recipe_file, tmp_path, capsys):
    (tmp_path / "run" / "recipe.yaml").mkdir(parents=True)
    run = loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "run")
    assert "recipe.yaml: not written: Is a directory" in capsys.readouterr().out and run.latest


def test_a_process_may_be_killed_by_a_signal_without_a_name():
    assert launching._died(signal.SIGSEGV) == "killed by SIGSEGV" and launching._died(40) == "killed by signal 40"
