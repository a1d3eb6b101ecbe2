"""Two hosts train a run: one is lost and replaced, the network is cut in two, a signal ends both.

The hosts have network, processes, host name and shared memory of their own (network.py), and the disk in common.
"""

import json
import signal
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import hold
from network import Network, NotPossible, accelerate, torchrun
from runs import events, go_on, nothing_was_lost, state_hash, steps_shown, wait_until
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.errors import LaunchError
from lora_kit.runs import lease
from lora_kit.runs.lease import take
from lora_kit.training import setup

STEPS = 8
NEVER = ["--set", "checkpoint.every_steps=1000", "--set", "checkpoint.every_seconds=1e6"]
SOON = ["--set", "launch.collective_timeout=4", "--set", "launch.rendezvous_timeout=120"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network to which hosts can be connected."""
    try:
        made = Network(tmp_path_factory.mktemp("network"))
    except NotPossible as why:
        pytest.skip(str(why))
    yield made
    made.close()


def told(hosts, folder):
    """Return what was printed on hosts."""
    return "\n".join(f"--- {host.name}\n{(folder / host.name).read_text()}" for host in hosts)


def holder(out, hosts):
    """Return the host that holds a run's lease and the others."""
    name = lease.read(out / lease.FILE).holder.host
    return next(host for host in hosts if host.name == name), [host for host in hosts if host.name != name]


def memory_of(host):
    """Return the names of what is in the shared memory of a host."""
    listed = subprocess.run(host.inside("ls", "/dev/shm"), capture_output=True, text=True, check=True)
    return listed.stdout.split()


def test_the_host_that_holds_the_lease_is_lost_and_its_replacement_gets_the_state_of_the_survivor(
    network, recipe, tmp_path, undisturbed, faults
):
    out, hosts = tmp_path / "run", [network.host(), network.host()]
    command = torchrun(recipe, out, *NEVER, *SOON, hosts=2, identity="lost")
    environment = faults(hold(5)) | {"FAULTS_DEAD": "6"}
    jobs = [host.start(*command, log=tmp_path / host.name, environment=environment) for host in hosts]
    wait_until(lambda: faults.happened() or any(job.poll() is not None for job in jobs))
    assert faults.happened(), told(hosts, tmp_path)
    shown = steps_shown(out)[-1]
    lost, (survivor,) = holder(out, hosts)
    lost.cut_off()
    lost.kill()
    new = network.host()
    jobs = [survivor.jobs[-1], new.start(*command, log=tmp_path / new.name, environment=environment)]
    codes = [job.wait(300) for job in jobs]
    assert codes == [0, 0], told([*hosts, new], tmp_path)
    (resumed,) = events(out, "resumed")
    assert resumed["step"] in (shown, shown + 1) and resumed["from_live"]
    assert [event["step"] for event in events(out, "checkpoint")] == [STEPS], "there was no checkpoint to read"
    assert steps_shown(out) == list(range(1, STEPS + 1))
    assert state_hash(out, STEPS) == undisturbed
    assert not memory_of(survivor) and not memory_of(new)


def test_of_two_sides_of_a_cut_network_one_goes_on_and_the_other_is_refused(
    network, recipe, tmp_path, undisturbed, faults
):
    """The side without the store is that of process 0, so the lease has to change hands."""
    out, hosts = tmp_path / "run", [network.host(), network.host()]
    # on a busy machine the launcher of the second host is late
    command = torchrun(recipe, out, *NEVER, *SOON, hosts="1:2", identity="cut", last_call=30)
    environment = faults(hold(4), hold(7)) | {"FAULTS_DEAD": "6"}
    jobs = [host.start(*command, log=tmp_path / host.name, environment=environment) for host in hosts]
    wait_until(lambda: faults.happened() == 1 or any(job.poll() is not None for job in jobs))
    assert faults.happened() == 1, told(hosts, tmp_path)
    assert [event["processes"] for event in events(out, "started")] == [2]
    lonely, (other,) = holder(out, hosts)
    lonely.cut_off()
    faults.release(0)
    wait_until(lambda: faults.happened() == 2 or other.jobs[-1].poll() is not None)
    assert faults.happened() == 2, told(hosts, tmp_path)
    assert holder(out, hosts)[0] is other, "without the store the side of process 0 cannot go on"
    before = (out / "metrics.jsonl").read_bytes()
    again = ["-m", "lora_kit", "train", recipe, "--out", out, *NEVER, *SOON]
    refused = lonely.start(*again, log=tmp_path / "refused", environment=environment)
    assert refused.wait(300) == 2 and "is training here" in (tmp_path / "refused").read_text()
    assert (out / "metrics.jsonl").read_bytes() == before
    faults.release(1)
    assert other.jobs[-1].wait(300) == 0, told(hosts, tmp_path)
    lonely.kill()  # its launcher waits for the store
    nothing_was_lost(out, STEPS)
    assert [event["processes"] for event in events(out, "started", "resumed")] == [2, 1]
    assert state_hash(out, STEPS) == undisturbed


def test_accelerate_starts_two_hosts_and_status_names_the_exit_code_that_the_launcher_hides(
    network, recipe, tmp_path, undisturbed, faults
):
    out, hosts = tmp_path / "run", [network.host(), network.host()]
    environment = faults(hold(5)) | {"ACCELERATE_USE_CPU": "true"}
    for number, host in enumerate(hosts):
        host.start(
            *accelerate(recipe, out, *NEVER, *SOON, number=number), log=tmp_path / host.name, environment=environment
        )
    jobs = [host.jobs[-1] for host in hosts]
    wait_until(lambda: faults.happened() or any(job.poll() is not None for job in jobs))
    assert faults.happened(), told(hosts, tmp_path)
    for host in hosts:
        host.signal(signal.SIGTERM)
    faults.release()
    assert [job.wait(300) for job in jobs] == [1, 1], told(hosts, tmp_path)
    said = CliRunner().invoke(app, ["status", str(out), "--json"])
    now = json.loads(said.output)
    assert (now["state"], now["exit_code"], now["durable"]["behind"]) == ("stopped, resumable", 75, 0)
    assert not any(map(memory_of, hosts))
    go_on(recipe, out)
    assert state_hash(out, STEPS) == undisturbed


def test_a_folder_that_the_machines_do_not_share_is_refused(monkeypatch, tmp_path):
    mine, theirs = take(tmp_path / "mine", run_id="a"), take(tmp_path / "theirs", run_id="b")
    monkeypatch.setattr(setup, "VISIBLE_SECONDS", 0.0)
    processes = SimpleNamespace(machines=2, index=1, gather=lambda texts: ["", *texts])
    setup.require_shared(mine, processes)
    with pytest.raises(LaunchError, match=r"not the same folder on all machines:\nprocess 1 on .*: .* has taken over"):
        setup.require_shared(replace(mine, path=theirs.path), processes)
    with pytest.raises(LaunchError, match=r"lease.json was deleted\nLet --out name a folder on storage"):
        setup.require_shared(replace(mine, path=tmp_path / "nowhere" / lease.FILE), processes)
