"""`lora-kit launch`: run a script as Python does, with a `LiveCheckpoint` at its `Trainer`.

The script runs in a fresh interpreter, so it may set environment variables before it imports torch. `Trainer.train` is
replaced as soon as the script imports it. A script that never calls it runs as it is, and is told so.
"""

import os
import random
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from lora_kit.errors import InputError

WORKER = "lora_kit.integrations.script:run_script"  # the function that a training process calls with the request
TRAINER_MODULE = "transformers.trainer"
STATE_MODULE = "accelerate.state"  # whose PartialState uses the process group that is there


@dataclass(frozen=True)
class ScriptRequest:
    """What the training processes of `lora-kit launch` run.

    Attributes:
        script: The script.
        arguments: Its arguments.
        run: The run's folder.
        every_seconds: The longest time between two checkpoints on disk.
        keep: How many of the newest checkpoints stay.
    """

    script: Path
    arguments: tuple[str, ...]
    run: Path
    every_seconds: float
    keep: int

    def to_json(self) -> str:
        """Return the request as JSON."""
        return _REQUEST.dump_json(self).decode()


_REQUEST = TypeAdapter(ScriptRequest)


def run_script(text: str) -> None:
    """Run the script of a `ScriptRequest`, given as JSON, in this process.

    Raises:
        InputError: The script cannot be read.
    """
    request = _REQUEST.validate_json(text)
    if not request.script.is_file():
        raise InputError(f"{request.script}: no such file")
    attached = list[str]()
    when_imported(TRAINER_MODULE, lambda module: attach(module.Trainer, request, attached))
    when_imported(STATE_MODULE, lambda module: meet_others())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the keeper has got Ctrl-C too, and ends the run
    sys.argv = [str(request.script), *request.arguments]
    sys.path[0] = str(request.script.resolve().parent)
    runpy.run_path(str(request.script), run_name="__main__")
    if not attached:
        print(
            f"warning: {request.script}: it has not called Trainer.train() of transformers, so nothing was kept",
            file=sys.stderr,
        )


def meet_others() -> None:
    """Form the process group of several processes, once the script has imported accelerate, and so torch."""
    from lora_kit.recipe.schema import Launch
    from lora_kit.training.meeting import meet

    meet(os.environ, Launch().rendezvous_timeout)


def attach(trainer_class: Any, request: ScriptRequest, attached: list[str]) -> None:
    """Let the `train` of a class attach a `LiveCheckpoint` to a trainer that has none.

    Args:
        trainer_class: `transformers.Trainer`.
        request: Has the run's folder.
        attached: Gets the name of the class of every trainer that trains.
    """
    original: Callable[..., Any] = trainer_class.train

    def train(self: Any, *arguments: Any, **named: Any) -> Any:
        before = random.getstate()  # some modules draw random numbers while they are imported
        from lora_kit.integrations.transformers import LiveCheckpoint

        random.setstate(before)
        attached.append(type(self).__name__)
        if any(isinstance(callback, LiveCheckpoint) for callback in self.callback_handler.callbacks):
            return original(self, *arguments, **named)
        if len(attached) > 1:
            raise InputError(
                f"{request.script}: a second trainer ({attached[-1]}) trains in this script, but the run's folder "
                f"{request.run} has the state of the first ({attached[0]}); give each its own line: "
                "LiveCheckpoint(trainer, run=...) of lora_kit.integrations.transformers"
            )
        checkpoint = LiveCheckpoint(
            self, request.run, every_seconds=request.every_seconds, keep=request.keep, train=partial(original, self)
        )
        return checkpoint.train(*arguments, **named)

    trainer_class.train = train


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call a function with a module as soon as it has been imported."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(MetaPathFinder):
    """Finds one module as Python does, and lets `_Loader` load it."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec with another loader; None for other modules."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._then)
        return spec


class _Loader(Loader):
    """Executes a module as its own loader does, then calls a function with it."""

    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the module's own loader returns."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module."""
        self._loader.exec_module(module)
        self._then(module)


def default_run(script: Path) -> Path:
    """Return the folder of a script's run if none is given: `runs/NAME` in the current folder."""
    return Path("runs") / os.fsdecode(script.stem)
