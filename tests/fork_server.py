"""A process that has imported everything and forks test runs: a run starts in milliseconds, not after the imports.

All workers of a session connect to one server. It reads requests from their sockets: arguments, environment, working
directory, cores, and two pipes. One pipe becomes stdout and stderr of the new process. The other tells the process id
and, later, the exit code. A forked process does what `python -m lora_kit ARGUMENTS` or `python -c CODE ARGUMENTS` would
do in a session of its own. The zygote of a run, which lora_kit/supervise/zygote.py starts with Popen, is forked here
too, before the run has any state or thread.

A forked process ends as the zygote's children do, without taking its modules apart.

The server itself owns no thread and no CUDA context, because a fork copies neither in a usable state. Where an import
has made one all the same, its children begin again as fresh interpreters.
"""

import gc
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from runpy import run_module

IMPORTED = ("lora_kit.training.loop", "lora_kit.cli", "lora_kit.supervise.launch", "datasets")
IMPORTED += ("transformers.models.llama.modeling_llama",)
INJECT = Path(__file__).parent / "faults" / "inject" / "sitecustomize.py"
MESSAGE_BYTES = 200_000
NUMBER = struct.Struct("<q")  # a process id or an exit code
LINGER_SECONDS = 10  # how long the server stays without a connection


def serve(listening):
    """Fork a process for every request; return (request, stdout) in each child. End when nobody is connected."""
    connected, running = set(), {}  # running: pidfd -> (process id, the pipe that tells)
    while True:
        ready, _, _ = select.select([listening, *connected, *running], [], [], None if connected else LINGER_SECONDS)
        if not connected and not ready:
            os._exit(0)
        for ended in running.keys() & set(ready):
            process, tell = running.pop(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with suppress(BrokenPipeError):
                os.write(tell, NUMBER.pack(code))
            os.close(tell)
            os.close(ended)
        if listening in ready:
            connected.add(listening.accept()[0])
        for requests in connected & set(ready):
            message, pipes, *_ = socket.recv_fds(requests, MESSAGE_BYTES, 2)
            if not message:
                connected.remove(requests)
                requests.close()
                continue
            output, tell = pipes
            process = os.fork()
            if process == 0:
                for one in (listening, *connected):
                    one.close()
                for descriptor in (tell, *running, *(other for _, other in running.values())):
                    os.close(descriptor)
                return json.loads(message), output
            os.close(output)
            os.write(tell, NUMBER.pack(process))
            running[os.pidfd_open(process)] = process, tell


def end_like_python(work):
    """Do work, and end this process with the exit code and the output of a Python that did it as its program."""
    from lora_kit.supervise.zygote import end_process

    code = 0
    try:
        work()
    except SystemExit as asked:
        code = asked.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    end_process(code or 0)


def become_requested(request, output):
    """Take the request's session, output, working directory and environment."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(request["folder"])
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    sys.path[0] = request["folder"]
    set_environment(request["environment"])
    random.seed()


def set_environment(environment):
    os.environ.clear()
    os.environ.update(environment)


def inject(module):
    """Apply the faults of the environment to a module, as Python's start does it in a process that was not forked."""
    if "FAULTS" in os.environ or "FAULTS_SLEEP" in os.environ:
        spec = spec_from_file_location("sitecustomize", INJECT)
        faults = module_from_spec(spec)
        spec.loader.exec_module(faults)
        faults.Patcher.targets[module](import_module(module))


class ForkedZygote:
    """The part of Popen that zygote.Zygote uses, for a child that was forked before the keeper began its work."""

    def __init__(self):
        self._mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.used, self._code = False, None
        self.pid = os.fork()
        if self.pid == 0:
            self._mine.close()
            wait_to_be_the_zygote(theirs)
        theirs.close()

    def begin(self, command, *, pass_fds, env):
        """Be what Popen would return for the command of a zygote."""
        self.used = True
        message = json.dumps({"environment": dict(env)}).encode()
        socket.send_fds(self._mine, [message], pass_fds)
        return self

    def poll(self):
        if self._code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code

    def wait(self):
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def wait_to_be_the_zygote(orders):
    """Wait for the keeper's call of Popen, then do what its command says; end if the keeper ends without that call."""
    from lora_kit.host import end_with_parent
    from lora_kit.supervise import zygote

    end_with_parent(signal.SIGKILL)
    message, pipes, *_ = socket.recv_fds(orders, MESSAGE_BYTES, 1)
    if not message:
        os._exit(0)
    orders.close()
    order = json.loads(message)
    set_environment(order["environment"])
    inject("lora_kit.training.loop")
    zygote.main(pipes[0])


def fork_the_zygote():
    """Let the first Popen of lora_kit/supervise/zygote.py be a fork; a second, after a kill, is a true start."""
    from lora_kit.supervise import zygote

    prepared = ForkedZygote()

    class Subprocess:
        @staticmethod
        def Popen(command, **options):  # noqa: N802
            if prepared.used:
                return subprocess.Popen(command, **options)
            return prepared.begin(command, **options)

    zygote.subprocess = Subprocess


def sound_to_fork():
    """Return whether this process has no CUDA context and no thread but the one that jemalloc itself starts again."""
    import torch

    threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return not torch.cuda.is_initialized() and len(threads) - threads.count("jemalloc_bg_thd") == 1


def main(descriptor):
    """Import everything, serve, and do what is requested in every child."""
    gc.disable()
    for module in IMPORTED:
        import_module(module)
    with suppress(ImportError, AttributeError):  # what transformers makes at the first load of a model, in 0.15 s
        import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    sound = sound_to_fork()
    gc.freeze()
    gc.enable()
    request, output = serve(socket.socket(fileno=descriptor))
    end_like_python(lambda: do(request, output, sound=sound))


def do(request, output, *, sound):
    """Do what is requested, in a fresh interpreter if this process could not be forked soundly."""
    become_requested(request, output)
    if not sound:
        program = ["-m", "lora_kit"] if request["code"] is None else ["-c", request["code"]]
        os.execv(sys.executable, [sys.executable, *program, *request["arguments"]])
    if request["code"] is not None:
        sys.argv = ["-c", *request["arguments"]]
        exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
        return
    fork_the_zygote()
    inject("lora_kit.runs.store")
    sys.argv = ["lora-kit", *request["arguments"]]
    run_module("lora_kit", run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]))
