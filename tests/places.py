"""Jobs in other places than this process: containers, machines with one disk, other users, other clocks, small memory.

A job is forked from a process that has imported everything, then it unshares namespaces and mounts what belongs to its
place. Its processes have `faults/shim.c` preloaded, which a `Shim` controls while they run.
"""

import json
import os
import struct
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil
from runs import started, with_faults

NOT_ALLOWED = 77  # exit code of a job whose place the kernel does not allow
DEAD_SECONDS, BEAT_SECONDS = 3.0, 0.5  # instead of 60 and 2
LIVING_SECONDS = 600.0  # instead of 3 where the holder is alive: it is seen at its next beat, however slow it is
CONTROL = struct.Struct("<qiiii104s")  # struct control in faults/shim.c

INSIDE = """
import ctypes, json, os, subprocess, sys, tempfile
from pathlib import Path
place, tests, recipe, out = json.loads(sys.argv[1]), *sys.argv[2:5]
libc = ctypes.CDLL(None)
if place["memory"]:
    with open(os.path.join(place["memory"], "cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))
flags = 0x20000 | (0x20000000 if place["container"] else 0) | (0x4000000 if place["host"] else 0)
if libc.unshare(flags):
    sys.exit(77)
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
hidden = ["-o", "hidepid=2"] if place["hidden"] else []
mounts = [["mount", "--make-rprivate", "/"]]
mounts += [["mount", "-t", "proc", *hidden, "proc", "/proc"]] if place["container"] or hidden else []
mounts += [["mount", "--bind", place["shm"], "/dev/shm"]] if place["shm"] else []
mounts += [["mount", "--bind", place["boot"], "/proc/sys/kernel/random/boot_id"]] if place["boot"] else []
mounts += [["mount", "-t", "tmpfs", "tmpfs", place["covered"]]] if place["covered"] else []
mounts += [["hostname", place["host"]]] if place["host"] else []
if place["user"]:  # Python may be in the home of the user who runs the tests, and the caches that it knows are
    kept, home = tempfile.mkdtemp(), Path.home()
    below = Path(sys.base_prefix).is_relative_to(home)
    mounts += [["mount", "--bind", sys.base_prefix, kept]] if below else []
    mounts += [["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", home]]
    mounts += [["mkdir", "-p", sys.base_prefix], ["mount", "--move", kept, sys.base_prefix]] if below else []
if place["sealed"]:
    mounts += [["mount", "--bind", place["sealed"], place["sealed"]]]
    mounts += [["mount", "-t", "tmpfs", "-o", "size=64m,mode=1777", "tmpfs", "/dev/shm"]]
    mounts += [["mount", "-o", "remount,ro,bind", "/"]]
    os.environ["TMPDIR"] = place["sealed"]
    os.environ.pop("HOME", None)
for command in mounts:
    if subprocess.run(command).returncode:
        sys.exit(77)
os.umask(0)
if place["user"]:
    os.setgroups([])
    os.setgid(place["user"])
    os.setuid(place["user"])
    os.environ.pop("LORA_KIT_CACHE", None)
    libc.prctl(4, 1)  # PR_SET_DUMPABLE: the process may look at itself in /proc
sys.path.insert(0, tests)
from fork_server import fork_the_zygote
from lora_kit.cli import app
from lora_kit.runs import lease
lease.DEAD_SECONDS, lease.BEAT_SECONDS = place["dead"], place["beat"]
fork_the_zygote()
app(["train", recipe, "--out", out, *sys.argv[5:]])
"""


@dataclass(frozen=True)
class Place:
    """Where a job runs; the defaults are the place of this process.

    Attributes:
        container: Whether it has a PID namespace of its own.
        host: Another host name.
        boot: A file with another boot id.
        shm: A folder that is mounted as /dev/shm.
        user: Another user's id.
        hidden: Whether /proc hides the processes of other users.
        memory: The folder of a cgroup.
        covered: A folder on another disk, which is not mounted there.
        sealed: The only folder that can be written, with 64 MB of shared memory and without HOME, as in a container
            with `docker run --read-only`.
    """

    container: bool = False
    host: str = ""
    boot: str = ""
    shm: str = ""
    user: int = 0
    hidden: bool = False
    memory: str = ""
    covered: str = ""
    sealed: str = ""


@cache
def library(folder):
    """Compile the shim into a folder; None if there is no C compiler."""
    target, source = Path(folder) / "shim.so", Path(__file__).with_name("faults") / "shim.c"
    command = ["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl"]
    if not target.exists():
        with suppress(FileNotFoundError):
            subprocess.run(command, check=True)
    return target if target.exists() else None


class Shim:
    """What the preloaded library does in the processes of a job; see faults/shim.c.

    Args:
        path: The control file, which is created.
        match: A part of the paths that are recorded and whose calls fail.
    """

    def __init__(self, path, match):
        self.path, self.match = path, match
        self.values = dict.fromkeys(("clock", "read", "sync", "folder_sync", "rename"), 0)
        self.set()

    def set(self, *, match=None, **values):
        """Change errnos by the names of struct control, `clock` in seconds, or the match."""
        self.match = match or self.match
        self.values |= values
        clock, *errnos = self.values.values()
        content = CONTROL.pack(int(clock * 1e9), *errnos, self.match.encode())
        with self.path.open("r+b" if self.path.exists() else "xb") as file:
            file.write(content)
        self.path.chmod(0o666)


def start_at(place, recipe, out, *more, shim, so, name="job", record=None, faults=None, dead=DEAD_SECONDS):
    """Start `lora-kit train` in a place, where a holder without a heartbeat for `dead` seconds counts as dead."""
    environment = {"LD_PRELOAD": str(so), "FAULTS_SHIM": str(shim.path), "FAULTS_JOB": name}
    environment |= faults or {"FAULTS_SLEEP": "0.1", "PYTHONPATH": with_faults()}
    environment |= {"FAULTS_RECORD": str(record)} if record else {}
    told = asdict(place) | {"dead": dead, "beat": BEAT_SECONDS}
    return started([json.dumps(told), Path(__file__).parent, recipe, out, *more], environment, code=INSIDE)


def family(process):
    """Return the processes of a job, from its launcher to its training processes."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def signal_all(processes, number):
    """Send a signal to processes, those that are left."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
