"""The files of examples/: valid for their engines, and after a preemption the run goes on without a lost step.

An engine is used where its command is on PATH: Slurm's daemons for a real queue, the Python beside `ray`, `sky` and
`kubernetes-validate` for their own runs and parsers. Elsewhere such a test is skipped.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import typer
import yaml
from conftest import hold
from runs import ENVIRONMENT, STARTED, WAIT_SECONDS, go_on, started, state_hash, wait_for_lines, wait_until
from test_docs import ROOT, blocks_of
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import live
from lora_kit.runs.live import Word

EXAMPLES = ROOT / "examples"
STEPS = 14
STUBS = """
torchrun() { if [ -n "$CODE" ]; then echo "$CODE" > "$LORA_KIT_EXIT_CODE"; fi; return 1; }
srun() { return "$CODE"; }
scontrol() { if [ "$1" = requeue ]; then echo "requeue $2"; else echo localhost; fi; }
source() { :; }
"""


def engine(command):
    """Return the Python of the environment in which a scheduler's command is installed."""
    found = shutil.which(command)
    if found is None:
        pytest.skip(f"{command} is not on PATH")
    return Path(found).with_name("python")


def documents(name):
    """Return the documents of an example in YAML."""
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def scripts():
    """Return the shell scripts of the examples by name."""
    found = {path.name: path.read_text() for path in EXAMPLES.glob("*.sbatch")}
    (_, job), (sky,) = documents("kubeflow-trainjob.yaml"), documents("skypilot.yaml")
    return found | {"kubeflow-trainjob.yaml": job["spec"]["trainer"]["args"][0], "skypilot.yaml": sky["run"]}


SCRIPTS = scripts()


def changed(name, **lines):
    """Return an example whose lines with CHANGE are those given; each is found by a word in it."""
    text = (EXAMPLES / name).read_text()
    for word, line in lines.items():
        text, count = re.subn(rf"(?m)^.*\b{word}\b.*# CHANGE.*$", line.replace("\\", r"\\"), text)
        assert count == 1, (name, word)
    return text


def test_the_recipe_of_the_examples_is_that_of_the_readme():
    (shown,) = (text for language, text in blocks_of(ROOT / "README.md", "sh") if "chats.yaml <<" in text)
    block = shown.split("<<'END'\n")[1].split("END\n")[0]
    written = (EXAMPLES / "chats.yaml").read_text()
    assert yaml.safe_load(block) == yaml.safe_load(written)
    assert load_recipe(EXAMPLES / "chats.yaml").train.steps == 50


def test_every_command_of_an_example_has_the_options_that_it_is_given():
    parameters = typer.main.get_command(app).commands["train"].params
    options = {option for parameter in parameters for option in parameter.opts}
    (job,) = documents("kubernetes-job.yaml")
    commands = [job["spec"]["template"]["spec"]["containers"][0]["args"]]
    commands += [found.split() for text in SCRIPTS.values() for found in re.findall(r"train (?:\S+ )?--out.*", text)]
    assert len(commands) == 4
    for command in commands:
        assert {word for word in command if word.startswith("--")} <= options, command


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_valid_bash(name):
    subprocess.run(["bash", "-n"], input=SCRIPTS[name], text=True, check=True, timeout=WAIT_SECONDS)


def test_the_example_of_ray_compiles():
    ast.parse((EXAMPLES / "ray_train.py").read_text())


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, False)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_ends_with_the_exit_code_of_the_training(name, code, requeued, tmp_path):
    torchrun = "torchrun" in SCRIPTS[name]
    stubs = STUBS.replace("return 1; }", "return 0; }") if code == 0 and torchrun else STUBS
    told = "" if code in (0, 1) and torchrun else str(code)  # an error that is none of lora_kit's writes no file
    environment = {"CODE": told, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    ended = subprocess.run(
        ["bash", "-c", stubs + SCRIPTS[name]],
        env=ENVIRONMENT | environment | {"SKYPILOT_NODE_IPS": "127.0.0.1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
    )
    if (name, code) == ("slurm-machines.sbatch", 137):  # no keeper starts a killed process of another machine again
        code, requeued = 75, True
    assert ended.returncode == code, ended
    assert ("requeue 7" in ended.stdout) == (requeued and not torchrun), ended


def test_kubernetes_starts_a_new_pod_after_75_and_none_after_2():
    (job,), (runtime, _) = documents("kubernetes-job.yaml"), documents("kubeflow-trainjob.yaml")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    for spec in (job["spec"], node["template"]["spec"]):
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        actions = {}
        for rule in spec["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes", {"values": [], "containerName": container["name"]})
            assert codes["containerName"] == container["name"]
            actions |= dict.fromkeys(codes["values"], rule["action"])
        assert actions == {75: "Ignore", 2: "FailJob"}
        assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] > 0
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]} and mounted["memory"] == "/dev/shm"


def test_kubernetes_accepts_the_job():
    engine("kubernetes-validate")
    command = ["kubernetes-validate", "--strict", str(EXAMPLES / "kubernetes-job.yaml")]
    subprocess.run(command, check=True, timeout=WAIT_SECONDS)


KUBEFLOW = """
import sys, yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob, TrainerV1alpha1TrainingRuntime
kinds = {"TrainJob": TrainerV1alpha1TrainJob, "TrainingRuntime": TrainerV1alpha1TrainingRuntime}
def same(told, read):
    if isinstance(told, dict):
        return all(name in read and same(value, read[name]) for name, value in told.items())
    return len(told) == len(read) and all(map(same, told, read)) if isinstance(told, list) else told == read
for document in yaml.safe_load_all(open(sys.argv[1])):
    read = kinds[document["kind"]].from_dict(document).to_dict()
    assert same(document, read), (document, read)  # a field that the API does not have is dropped
"""


def test_kubeflow_knows_every_field_of_the_train_job():
    python = engine("kubernetes-validate")
    if subprocess.run([python, "-c", "import kubeflow_trainer_api"], capture_output=True).returncode:
        pytest.skip("kubeflow-trainer-api is not installed beside kubernetes-validate")
    subprocess.run([python, "-c", KUBEFLOW, EXAMPLES / "kubeflow-trainjob.yaml"], check=True, timeout=WAIT_SECONDS)


SKYPILOT = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
assert resources.job_recovery["recover_on_exit_codes"] == [75] and resources.use_spot, resources.job_recovery
assert task.run and "/runs" in task.volumes, task.volumes
"""


def test_skypilot_reads_its_example(tmp_path):
    python = engine("sky")
    environment = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [python, "-c", SKYPILOT, EXAMPLES / "skypilot.yaml"]
    subprocess.run(command, env=environment, cwd=EXAMPLES, check=True, timeout=WAIT_SECONDS)


def test_under_another_launcher_the_exit_code_is_written_to_the_file_that_is_named(tmp_path, monkeypatch):
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in (ranks | {"LORA_KIT_EXIT_CODE": str(tmp_path / "code")}).items():
        monkeypatch.setenv(name, value)
    arguments = ["train", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert (tmp_path / "code").read_text() == "2\n"
    monkeypatch.setenv("LORA_KIT_EXIT_CODE", str(tmp_path))  # nothing can be written there
    assert CliRunner().invoke(app, arguments).exit_code == 2


@pytest.mark.slow
def test_the_script_of_a_pod_saves_at_sigterm_and_ends_with_75(recipe, undisturbed, faults, tmp_path):
    out, shell = tmp_path / "run", SCRIPTS["kubeflow-trainjob.yaml"]
    shell = shell.replace("/recipe/chats.yaml", str(recipe)).replace("/runs/chats", str(out))
    shell = shell.replace("torchrun -m", f"{sys.executable} -m torch.distributed.run --nproc-per-node 1 -m")
    code = "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])"
    process = started([shell], faults(hold(5)), code=code)
    wait_for_lines(out / "metrics.jsonl", 2, process)
    process.terminate()
    wait_until(lambda: live.open_region(out).words[Word.STOP], process)
    faults.release()
    assert process.wait() == 75, process.stdout.read()
    go_on(recipe, out)
    assert state_hash(out, STEPS) == undisturbed


CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}
SlurmctldPidFile={folder}/controller.pid
SlurmctldLogFile={folder}/controller.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
{plugins}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=1,sched_min_interval=1
KillWait=10
NodeName={host},{host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=64
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    """Return TCP ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [found.getsockname()[1] for found in sockets]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of two nodes on this machine; a function that runs a command of Slurm and returns what it printed."""
    controller = shutil.which("slurmctld")
    if controller is None or os.geteuid() != 0:
        pytest.skip("slurmctld is not on PATH" if controller is None else "only root can start slurmd")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname()
    found = [
        *Path(controller).parents[1].glob("lib/*/slurm-wlm/auth_none.so"),
        *Path("/usr/lib/slurm").glob("auth_none.so"),
    ]
    plugins = f"PluginDir={found[0].parent}" if found else ""
    conf, environment = folder / "slurm.conf", os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    conf.write_text(CONF.format(host=host, ports=free_ports(3), folder=folder, plugins=plugins))

    def call(*command):
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=WAIT_SECONDS
        )
        return ended.stdout

    step_daemon = ["-d", shutil.which("slurmstepd")]
    daemons = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", name, *step_daemon] for name in (host, f"{host}-2"))]
    log = (folder / "daemons.log").open("w")
    running = [subprocess.Popen(daemon, env=environment, stdout=log, stderr=log) for daemon in daemons]
    try:
        wait_until(
            lambda: "idle" in call("sinfo", "-h", "-o", "%T") and "2" in call("sinfo", "-h", "-t", "idle", "-o", "%D")
        )
        yield call
    finally:
        with suppress(subprocess.CalledProcessError):
            call("scancel", "--user=root")
            wait_until(lambda: not call("squeue", "-h"))
        for daemon in reversed(running):
            daemon.terminate()
            daemon.wait(WAIT_SECONDS)
        log.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm-machines.sbatch"])
def test_slurm_queues_a_job_again_that_was_stopped_and_the_run_goes_on(
    slurm, name, recipe, undisturbed, faults, tmp_path
):
    lines = {"time": "#SBATCH --cpus-per-task=1 --time=00:10:00", "recipe": f"recipe={recipe} run={tmp_path / 'run'}"}
    exported = "; ".join(f"export {key}={shlex.quote(value)}" for key, value in faults(hold(5)).items())
    lines |= {"activate": f"{exported}; PATH={Path(sys.executable).parent}:$PATH"}
    lines |= {"ntasks": "#SBATCH --nodes=2 --ntasks-per-node=1"} if "machines" in name else {}
    (tmp_path / name).write_text(changed(name, **lines))
    job = slurm("sbatch", "--parsable", "--chdir", tmp_path, tmp_path / name).strip()
    log, metrics = tmp_path / f"slurm-{job}.out", tmp_path / "run" / "metrics.jsonl"

    def shown():
        return slurm("scontrol", "show", "job", job)

    wait_until(lambda: (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2) or "JobState=FAILED" in shown())
    slurm("scancel", "--signal=USR1", job)  # as at 120 s before the limit
    wait_until(lambda: (region := live.open_region(tmp_path / "run")) is None or region.words[Word.STOP])
    faults.release()
    wait_until(lambda: "JobState=COMPLETED" in shown() or "JobState=FAILED" in shown())
    assert "Restarts=1 " in shown() and "JobState=COMPLETED" in shown(), shown() + log.read_text()
    assert state_hash(tmp_path / "run", STEPS) == undisturbed


@pytest.mark.slow
def test_ray_starts_its_workers_again_after_a_kill_and_the_run_goes_on(recipe, undisturbed, faults, tmp_path):
    python, out = engine("ray"), tmp_path / "run"
    paths = f"RECIPE, RUN = Path({str(recipe)!r}), Path({str(out)!r})"
    text = changed("ray_train.py", RECIPE=paths, WORKERS="WORKERS = ScalingConfig(num_workers=2)")
    (tmp_path / "ray_train.py").write_text(text)
    environment = ENVIRONMENT | faults(hold(5)) | {"HOME": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [python, "ray_train.py"], cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    STARTED.append(process)
    metrics = out / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2))
    assert process.poll() is None, (tmp_path / "log").read_text()
    os.kill(json.loads((out / "lease.json").read_text())["holder"]["pid"], signal.SIGKILL)  # the worker of process 0
    faults.release()
    assert process.wait(WAIT_SECONDS) == 0, (tmp_path / "log").read_text()
    kinds = [json.loads(line)["kind"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert kinds.count("started") == 1 and kinds.count("resumed") == 1
    assert state_hash(out, STEPS) == undisturbed
