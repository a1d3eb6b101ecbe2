"""Several hosts on one machine, each with network, processes, host name and shared memory of its own.

A host is a process in new namespaces; every program of the host is its descendant, so a SIGKILL to it is a loss of
power: all of them die at once, and its shared memory is gone. The hosts are connected by a switch, where the store runs
through which torchrun's agents meet. They share the disk. Needs root and iproute2 and util-linux.

A program on a host is forked from a process that has imported everything (fork_server.py), and so are the training
processes that a launcher starts there, unless a fresh interpreter is asked for.
"""

import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from runpy import run_module

import psutil
from fork_server import MESSAGE_BYTES, end_like_python, fork_the_zygote, inject, set_environment
from runs import ENVIRONMENT, WAIT_SECONDS, started, wait_until

SUBNET = "10.77.0"
INIT = "hostname $0 && mount --bind $1 /etc/hosts && mount -t tmpfs tmpfs /dev/shm && ip link set lo up"
INIT += " && echo ready && exec sleep infinity"
# without an address of its own the bridge takes that of a port, and changes it when hosts come and go
SWITCH = "ip link add bridge address 02:00:00:00:00:01 type bridge && ip link set bridge up"
SWITCH += f" && ip addr add {SUBNET}.1/24 dev bridge && ip link set lo up && echo ready && exec sleep infinity"


INSIDE = """
import ctypes, json, os, sys
asked, folder = json.loads(sys.argv[1]), os.getcwd()
log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.dup2(log, 1)
os.dup2(log, 2)
names = [os.open(f"/proc/{asked['init']}/ns/{name}", os.O_RDONLY) for name in ("net", "uts", "ipc", "pid", "mnt")]
libc = ctypes.CDLL(None, use_errno=True)
for name in names:
    if libc.setns(name, 0):
        raise OSError(ctypes.get_errno(), "setns")
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
os.chdir(folder)
os.environ.update(asked["environment"])
sys.path.insert(0, asked["tests"])
from network import run_program
run_program(asked["arguments"])
"""


class NotPossible(Exception):
    """The kernel or the user's rights allow no hosts here."""


class Network:
    """A switch, the hosts that are connected to it, and a store at the switch.

    Args:
        folder: A folder for the names of the hosts.
    """

    def __init__(self, folder):
        self.hosts, self._processes, self._names = [], [], Path(folder) / "names"
        self._names.write_text(f"127.0.0.1 localhost\n{SUBNET}.1 meet\n")
        with self._names.open("a") as file:
            file.writelines(f"{SUBNET}.{number} host-{number}\n" for number in range(2, 255))
        if os.getuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter", "setpriv", "hostname"))):
            raise NotPossible("needs root, iproute2 and util-linux, for hosts in namespaces of their own")
        self._switch = self._started(["unshare", "--net", "sh", "-c", SWITCH])
        said = "; print('ready', flush=True); signal.pause()"
        store = documented("python -c")[2].replace("; signal.pause()", said)
        self._started(self.at_switch(sys.executable, "-c", store))

    def _started(self, command):
        """Start a process that ends with this one, and wait until it is ready."""
        command, pipe = ["setpriv", "--pdeathsig", "KILL", *command], subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
        self._processes.append(process)
        said = []
        while not said or said[-1] != "ready":
            if not (line := process.stdout.readline()):
                self.close()
                raise NotPossible(f"the kernel allows no such namespaces here: {' '.join(said)}")
            said.append(line.strip())
        return process

    def at_switch(self, *command):
        """Return a command that runs where the switch is."""
        return ["nsenter", "--net", "--target", str(self._switch.pid), *command]

    def host(self):
        """Plug in a new host and return it."""
        number = len(self.hosts) + 2
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
        process = self._started(["unshare", *namespaces, "sh", "-c", INIT, f"host-{number}", str(self._names)])
        host = Host(self, number, psutil.Process(process.pid).children()[0].pid)
        port = ["type", "veth", "peer", "name", "eth0", "netns", str(host.init)]
        for command in (["add", host.port, *port], ["set", host.port, "master", "bridge", "up"]):
            subprocess.run(self.at_switch("ip", "link", *command), check=True)
        for command in (["addr", "add", f"{host.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            subprocess.run(host.inside("ip", *command), check=True)
        self.hosts.append(host)
        return host

    def close(self):
        """End everything."""
        for host in self.hosts:
            host.kill()
        for process in self._processes:
            process.kill()
            process.wait(WAIT_SECONDS)


class Host:
    """A host.

    Attributes:
        name: Its host name.
        address: Its address.
        init: The process whose descendants are all its programs.
        jobs: What was started on it, oldest first.
    """

    def __init__(self, network, number, init):
        self.network, self.init, self.jobs = network, init, []
        self.name, self.port, self.address = f"host-{number}", f"port{number}", f"{SUBNET}.{number}"

    def inside(self, *command):
        """Return a command that runs on this host."""
        return ["nsenter", "--target", str(self.init), "--net", "--uts", "--ipc", "--mount", "--pid", *command]

    def start(self, *arguments, log, environment=None, fresh=False):
        """Start `python ARGUMENTS` on this host and return the process; its output is appended to a file."""
        arguments = [str(argument) for argument in arguments]
        more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | (environment or {})
        if fresh:
            with Path(log).open("ab") as output:
                command, nothing = self.inside(sys.executable, *arguments), subprocess.DEVNULL
                process = subprocess.Popen(command, stdin=nothing, stdout=output, stderr=output, env=ENVIRONMENT | more)
        else:
            asked = {"init": self.init, "log": str(log), "environment": more, "arguments": arguments}
            process = started([json.dumps(asked | {"tests": str(Path(__file__).parent)})], None, code=INSIDE)
        self.jobs.append(process)
        return process

    def signal(self, number):
        """Send a signal to the launcher that was started last."""
        psutil.Process(self.jobs[-1].pid).children()[0].send_signal(number)

    def cut_off(self):
        """Take the cable out; what is sent from now on is lost in silence."""
        subprocess.run(self.network.at_switch("ip", "link", "set", self.port, "down"), check=True)

    def plug_in(self):
        """Put the cable in again."""
        subprocess.run(self.network.at_switch("ip", "link", "set", self.port, "up"), check=True)

    def kill(self):
        """Take the power away."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        for job in self.jobs:
            job.wait(WAIT_SECONDS)
        wait_until(lambda: not psutil.pid_exists(self.init) or psutil.Process(self.init).status() == "zombie")


def documented(beginning):
    """Return the command of docs/launching.md for several machines that begins so, in its parts."""
    text = (Path(__file__).parents[1] / "docs" / "launching.md").read_text().partition("## Several machines")[2]
    return shlex.split(next(line for line in text.splitlines() if line.startswith(beginning)))


def torchrun(recipe, out, *more, hosts, identity, last_call=5):
    """Return the arguments of `python` for training under torchrun on one of several hosts, as documented."""
    changes = {"2": str(hosts), "8": "1", "first": identity, "recipes/quickstart.yaml": recipe, "runs/first": out}
    conf = f"keep_alive_interval=1,keep_alive_max_attempt=4,last_call_timeout={last_call},join_timeout=300"
    options = [changes.get(part, part) for part in documented("torchrun --")[1:]]
    return ["-m", "torch.distributed.run", "--rdzv-conf", conf, *options, *more]


def accelerate(recipe, out, *more, number):
    """Return the arguments of `python` for training under `accelerate launch` on one of two hosts, as documented."""
    changes = {"16": "2", "0": str(number), "100": "0", "recipes/quickstart.yaml": recipe, "runs/first": out}
    options = [changes.get(part, part) for part in documented("accelerate launch")[2:]]
    return ["-m", "accelerate.commands.launch", *options, *more]


class ForkedWorker:
    """The part of Popen that torchrun's agent uses, for a process that `Workers` has forked."""

    def __init__(self, workers, pid):
        self._workers, self.pid = workers, pid

    def poll(self):
        return self._workers.code(self.pid, 0)

    def wait(self, timeout=None):
        if (code := self._workers.code(self.pid, timeout)) is None:
            raise subprocess.TimeoutExpired("training process", timeout)
        return code


class Workers:
    """A child, forked before this process has a thread, that forks the training processes of an agent."""

    def __init__(self):
        self._mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._codes = {}
        if os.fork() == 0:
            self._mine.close()
            serve(theirs)
        theirs.close()

    def popen(self, args, env):
        """Be `SubprocessHandler._popen` for `python -u -m lora_kit ARGUMENTS`."""
        assert args[1:4] == ("-u", "-m", "lora_kit"), args
        self._mine.send(json.dumps({"arguments": args[4:], "environment": env}).encode())
        while "started" not in (message := json.loads(self._mine.recv(MESSAGE_BYTES))):
            self._codes[message["ended"]] = message["code"]
        return ForkedWorker(self, message["started"])

    def code(self, pid, timeout):
        """Return the exit code of a process; None if it has not ended after so many seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while pid not in self._codes:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._mine], [], [], left)[0]:
                return None
            message = json.loads(self._mine.recv(MESSAGE_BYTES))
            self._codes[message["ended"]] = message["code"]
        return self._codes[pid]


def serve(orders):
    """Fork a training process for every order, and tell when it has ended; end with the agent."""
    running = {}
    while True:
        ready, _, _ = select.select([orders, *running], [], [])
        for ended in running.keys() & set(ready):
            pid = running.pop(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(ended)
            with suppress(OSError):  # the agent has ended
                orders.send(json.dumps({"ended": pid, "code": code}).encode())
        if orders in ready:
            if not (message := orders.recv(MESSAGE_BYTES)):
                for pid in running.values():  # their launcher is gone, which they hear as from a true one
                    os.kill(pid, signal.SIGTERM)
                os._exit(0)
            order, pid = json.loads(message), os.fork()
            if pid == 0:
                os.setsid()
                orders.close()
                set_environment(order["environment"])
                end_like_python(partial(run_lora_kit, order["arguments"]))
            running[os.pidfd_open(pid)] = pid
            orders.send(json.dumps({"started": pid}).encode())


def run_lora_kit(arguments):
    """Do what `python -m lora_kit ARGUMENTS` does, with the faults of the environment."""
    for module in ("lora_kit.training.loop", "lora_kit.runs.lease"):
        inject(module)
    sys.argv = ["lora-kit", *arguments]
    run_module("lora_kit", run_name="__main__")


def run_program(arguments):
    """Do what `python -m PROGRAM ARGUMENTS` does: a launcher, or lora_kit."""
    _, program, *rest = arguments
    if program == "lora_kit":
        fork_the_zygote()
        run_lora_kit(rest)
        return
    workers = Workers()
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda handler, args, env: workers.popen(args, env)
    sys.argv = [program, *rest]
    run_module(program, run_name="__main__")
