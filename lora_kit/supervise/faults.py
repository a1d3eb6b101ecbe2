"""The faults of a drill: what is done to a run in the middle of its training.

A fault is a function of the run that it disturbs. A new fault is an entry in `FAULTS`.
"""

import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import psutil

from lora_kit.errors import LoraKitError
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import store
from lora_kit.runs.manifest import Machine
from lora_kit.supervise.drill_run import DrillRun

SHARDED = ("--processes", "2", "--set", "base.placement=sharded")
TRIES = 5  # kills that may miss a write, which takes milliseconds


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        about: A description for the help text and the console.
        steps: The number of training steps that a drill reserves for this fault before the next one.
        disturb: Causes the fault in a training run, and returns when the run trains again.
        refusal: Returns why a run of a recipe on a machine with this number of visible GPUs cannot have the fault;
            empty if it can.
    """

    about: str
    steps: int
    disturb: Callable[[DrillRun], None]
    refusal: Callable[[Recipe, Machine, int], str] = lambda recipe, machine, gpus: ""


def signalled(drilled: DrillRun, fault: str, number: signal.Signals) -> None:
    """Send a signal to one training process and wait until the keeper has started the processes again."""
    found = list[psutil.Process]()

    def training() -> bool:
        found[:] = drilled.trainers()
        return bool(found)

    def act() -> str:
        with suppress(psutil.NoSuchProcess):  # it has just died, so the keeper starts the processes again anyway
            drilled.rng.choice(found).send_signal(number)
        return f"{number.name} to 1 of {len(found)} training process{'es' if len(found) > 1 else ''}"

    drilled.interrupt(fault, act, when=training)


def kill(drilled: DrillRun) -> None:
    """Kill one training process."""
    signalled(drilled, "kill", signal.SIGKILL)


def keeper(drilled: DrillRun) -> None:
    """Kill the keeper; its training processes end with it, and the command is repeated."""

    def act() -> str:
        drilled.keeper.kill()
        drilled.keeper.wait()
        drilled.start()
        return "SIGKILL to the keeper"

    drilled.interrupt("keeper", act)


def both(drilled: DrillRun) -> None:
    """Kill the keeper and all processes below it at once, and repeat the command."""

    def act() -> str:
        family = drilled.family()
        drilled.kill(family)
        drilled.keeper.wait()
        drilled.start()
        return f"SIGKILL to all {len(family)} processes at once"

    drilled.interrupt("both", act)


def write(drilled: DrillRun) -> None:
    """Kill the keeper while it writes a checkpoint, and repeat the command."""
    torn = list[bool]()

    def act() -> str:
        drilled.keeper.kill()
        drilled.keeper.wait()
        torn.append(bool(drilled.unfinished_writes()))
        drilled.start()
        return "SIGKILL to the keeper " + ("in the middle of a write" if torn[-1] else "just after a write")

    while True not in torn:
        if len(torn) == TRIES:
            raise LoraKitError(f"write: {TRIES} kills came too late to hit the write of a checkpoint")
        drilled.interrupt("write", act, when=lambda: bool(drilled.unfinished_writes()))


def sigterm(drilled: DrillRun) -> None:
    """Stop the run with SIGTERM, and repeat the command."""
    changed(drilled, "sigterm", ())


def hang(drilled: DrillRun) -> None:
    """Suspend one training process, which the keeper must notice."""
    if drilled.resumptions:  # the keeper learns from two steps how long a step takes
        drilled.reach(drilled.resumptions[-1].resumed + 2)
    signalled(drilled, "hang", signal.SIGSTOP)


def corrupt(drilled: DrillRun) -> None:
    """Stop the run, flip a bit of the newest checkpoint, and repeat the command."""

    def act() -> str:
        drilled.stop()
        newest = store.find(drilled.run).latest
        if newest is None:
            raise LoraKitError(f"{drilled.run}: no valid checkpoint after SIGTERM")
        path = newest.path / drilled.rng.choice((store.ADAPTER, store.OPTIMIZER))
        content = bytearray(path.read_bytes())
        content[drilled.rng.randrange(len(content))] ^= 1 << drilled.rng.randrange(8)
        path.write_bytes(content)
        drilled.start()
        return f"a bit of {path.name} in the newest checkpoint flipped"

    drilled.interrupt("corrupt", act)
    if not any((drilled.run / "checkpoints" / store.QUARANTINE).glob("*.reason.txt")):
        drilled.problems.append("corrupt: the damaged checkpoint was not set aside")


def changed(drilled: DrillRun, fault: str, *commands: tuple[str, ...]) -> None:
    """Stop the run with SIGTERM and go on with other options; once for each set of options."""

    def act(options: tuple[str, ...]) -> str:
        drilled.stop()
        drilled.start(*options)
        return "SIGTERM, then " + (" ".join(options) or "the same command")

    for options in commands:
        drilled.interrupt(fault, partial(act, options))


def _too_few_gpus(recipe: Recipe, machine: Machine, gpus: int) -> str:
    """Return why two processes cannot train on a machine."""
    return "two processes need two GPUs" if not machine.device.startswith("cpu") and gpus < 2 else ""


def _not_sharded(recipe: Recipe, machine: Machine, gpus: int) -> str:
    """Return why a drill does not shard the base of a recipe."""
    if recipe.base.quantization != "none" or recipe.adapter.variant == "dora":
        return "a drill shards only plain weights without DoRA, since not every other base can be sharded"
    return _too_few_gpus(recipe, machine, gpus)


FAULTS = {
    "kill": Fault("SIGKILL to one training process", 2, kill),
    "keeper": Fault("SIGKILL to the keeper", 2, keeper),
    "both": Fault("SIGKILL to the keeper and all training processes at once", 2, both),
    "write": Fault("SIGKILL to the keeper while it writes a checkpoint", 4, write),
    "sigterm": Fault("SIGTERM to the command", 3, sigterm),
    "hang": Fault("SIGSTOP to one training process, which the keeper must notice", 3, hang),
    "corrupt": Fault("a flipped bit in the newest checkpoint", 3, corrupt),
    "processes": Fault(
        "another number of processes, then the first again",
        6,
        lambda drilled: changed(drilled, "processes", drilled.other_processes, ()),
        _too_few_gpus,
    ),
    "placement": Fault(
        "a sharded base on two processes, then whole on the first number of processes",
        6,
        lambda drilled: changed(drilled, "placement", SHARDED, ()),
        _not_sharded,
    ),
}
