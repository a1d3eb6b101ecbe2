"""Faults in real processes: Python imports this at its start when this folder is on PYTHONPATH.

FAULTS is a JSON list of {rank, step, phase, kind}; each fires once (in all attempts together; `again` times if given),
in the process of that rank, when it reaches that phase of that step or, if that was missed, of a later one.
FAULTS_DONE is a folder that remembers what fired; `reference` in it has a line for each chunk of a reference's
log-probabilities that process 0 began to compute. FAULTS_SLEEP makes every step take so many seconds longer.
FAULTS_FORGET names a part of the state that every resume loses. FAULTS_DEAD is the time in seconds without a heartbeat
after which a holder elsewhere counts as dead, instead of 60. A process that holds waits until `NUMBER.released` is in
that folder, or until something ends it.
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from functools import wraps
from pathlib import Path
from typing import ClassVar

PLAN = json.loads(os.environ.get("FAULTS", "[]"))
SLEEP = float(os.environ.get("FAULTS_SLEEP", "0"))
FORGET = os.environ.get("FAULTS_FORGET", "")
DEAD = float(os.environ.get("FAULTS_DEAD", "0"))
DONE = Path(os.environ.get("FAULTS_DONE", "/nowhere"))
HOLD_SECONDS = 600  # the longest a process holds
here = {"step": -1}


def reach(phase, job=None):
    """Come to a phase: do what the plan has for it."""
    for number, fault in enumerate(PLAN):
        mine = fault.get("rank", 0) == int(os.environ.get("RANK", "0")) and fault["phase"] == phase
        if mine and fault.get("step", here["step"]) <= here["step"]:
            for turn in range(fault.get("again", 1)):
                mark = DONE / f"{number}.{turn}"
                if not mark.exists():
                    mark.touch()
                    act(fault["kind"], job, number)
                    break


def act(kind, job, number):
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "raise":
        raise ValueError(f"injected at step {here['step']}")
    elif kind == "memory":
        import resource

        import torch

        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), limits[1]))
        torch.zeros(1 << 30)
    elif kind == "grow":
        taken = []
        while True:
            taken.append(bytes(b"x" * (1 << 24)))
    elif kind == "nan":
        job.state.gradient[3] = float("nan")
    elif kind == "flip":
        import torch

        job.state.weights.view(torch.int32)[5] ^= 1 << 12
    elif kind == "hold":
        end = time.monotonic() + HOLD_SECONDS
        while not (DONE / f"{number}.released").exists() and time.monotonic() < end:
            time.sleep(0.005)
    elif kind == "full":
        raise OSError(28, os.strerror(28))


def around(owner, name, phase, *, after=False):
    """Make a function reach a phase before it runs, or after."""
    function = getattr(owner, name)

    @wraps(function)
    def wrapped(*arguments, **named):
        job = arguments[0] if arguments and hasattr(arguments[0], "state") else None
        if not after:
            reach(phase, job)
        result = function(*arguments, **named)
        if after:
            reach(phase, job)
        return result

    setattr(owner, name, wrapped)


def into_trainer(trainer):
    from lora_kit.runs import live
    from lora_kit.training import publisher, reference, setup
    from lora_kit.training.objectives.kto import Kto
    from lora_kit.training.objectives.pairs import PairObjective
    from lora_kit.training.objectives.sft import Sft
    from lora_kit.training.processes import Processes

    batches, copy = trainer.own_micro_batches, live.copy_hashed

    def noted(job, step):
        here["step"] = step + 1
        here["job"] = job
        time.sleep(SLEEP)
        return batches(job, step)

    def half(target, sources):
        copy(target, [source[: len(source) // 2] for source in sources])
        reach("copy")
        return copy(target, sources)

    def summed(self, flat, contributors):
        reach("reduce", here.get("job"))
        return tree_sum(self, flat, contributors)

    def computed(self, tokens, examples):
        if os.environ.get("RANK", "0") == "0":
            with (DONE / "reference").open("a") as file:
                file.write(f"{len(tokens)} {examples.start}\n")
        return compute(self, tokens, examples)

    compute, reference.Reference.computed = reference.Reference.computed, computed
    tree_sum, Processes.tree_sum = Processes.tree_sum, summed
    trainer.own_micro_batches, publisher.live.copy_hashed = noted, half
    for objective in (Sft, PairObjective, Kto):
        around(objective, "loss", "forward")
    around(reference, "log_probs_of_segments", "log-probs")
    around(reference, "write", "kept", after=True)
    around(trainer, "add_to_tree", "backward")
    around(trainer, "update", "update")
    around(trainer, "update", "updated", after=True)
    around(trainer.StepLog, "settle", "line")
    around(trainer, "held_out_loss", "evaluate")
    around(setup, "load_base", "load")
    around(live.Region, "publish", "publish")
    forget(FORGET)


def forget(part):
    """Let every resume lose a buffer of the state, or the number of the step, as if nobody had saved it."""
    from lora_kit.model.state import FlatState
    from lora_kit.training.job import Job

    load = FlatState.load

    def loaded(self, saved):
        load(self, saved)
        for name, buffer in zip(self.layout.buffers, self.kept, strict=True):
            if name == part:
                buffer.zero_()

    FlatState.load = loaded
    if part == "step":
        Job.start = property(lambda job: 0)


def into_store(store):
    write = store._write_synced

    def written(path, pieces):
        reach("write")
        if path.name == "manifest.json":
            reach("manifest")
        return write(path, pieces)

    store._write_synced = written


def into_lease(lease):
    if DEAD:
        lease.DEAD_SECONDS, lease.BEAT_SECONDS = DEAD, DEAD / 6


class Patcher(importlib.abc.MetaPathFinder):
    """Lets a module be imported as always, then changes it."""

    targets: ClassVar = {
        "lora_kit.training.loop": into_trainer,
        "lora_kit.runs.store": into_store,
        "lora_kit.runs.lease": into_lease,
    }

    def find_spec(self, name, path, target=None):
        if name not in self.targets:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = After(spec.loader, self.targets[name])
        return spec


class After(importlib.abc.Loader):
    def __init__(self, loader, patch):
        self.loader, self.patch = loader, patch

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.patch(module)


if PLAN or SLEEP or FORGET or DEAD:
    sys.meta_path.insert(0, Patcher())
