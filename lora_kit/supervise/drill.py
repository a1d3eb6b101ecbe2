"""`lora-kit drill`: train the first steps of a recipe undisturbed, then again with faults, and compare the two runs.

Both runs are made by the normal training command in real processes. Each fault comes at a random moment, which the seed
decides, and the normal command resumes the run. The certificate says what happened and whether anything differs.
"""

import math
import random
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from platform import platform, python_version
from typing import Any

from lora_kit.errors import CheckpointError, InputError, LoraKitError
from lora_kit.host import host_cores
from lora_kit.recipe.schema import Recipe
from lora_kit.runs import store
from lora_kit.runs.certificate import FILE, TEXT, Certificate, hash_of
from lora_kit.runs.comparison import Comparison, compare
from lora_kit.runs.lease import is_held
from lora_kit.runs.manifest import RunFacts
from lora_kit.supervise.drill_run import DrillRun, typical
from lora_kit.supervise.faults import FAULTS

UNDISTURBED, DISTURBED, LOG = "undisturbed", "disturbed", "log.txt"
LEAST_STEPS = 12
STEPS_BESIDE = 4  # undisturbed steps before the first fault and after the last
SPARE_STEPS = 4  # more steps than the faults need, so that they can come at random moments
SAVE_EVERY = 2  # steps, so that a damaged checkpoint costs few steps and a write is near
TIMEOUT_FACTOR = 10.0  # a silent training process counts as hanging after this many longest steps
LEAST_TIMEOUT_SECONDS = 3.0  # least limit for a silent training process, however short its steps are
NOT_DONE = "the run did not come to it"


@dataclass(frozen=True)
class Drill:
    """The arguments of a drill.

    Attributes:
        file: The recipe's file.
        overrides: The recipe's overrides, as `--set` takes them.
        recipe: The recipe, with the overrides.
        out: The drill's folder.
        steps: The step after which the runs are compared; None for enough steps for all faults.
        seed: Decides the moments of the faults, their order, their victims and the flipped bit.
        faults: The names of the faults; None for all that the recipe and the machine allow.
        processes: The number of training processes of the undisturbed run.
        gpus: The number of visible GPUs.
    """

    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    out: Path
    steps: int | None
    seed: int
    faults: tuple[str, ...] | None
    processes: int
    gpus: int

    def run(self, tell: Callable[[str], None]) -> Certificate:
        """Do the drill; return the certificate, which is also written into the drill's folder.

        Raises:
            InputError: The arguments contradict each other, or the recipe cannot be trained.
            LoraKitError: The undisturbed run has failed.
        """
        names = self.faults or tuple(FAULTS)
        steps, least = self.steps_for(names), least_steps(names)
        if steps < least:
            raise InputError(
                f"{steps} steps are too few for {len(names)} fault(s), which need {least}; choose fewer --faults"
                + ("" if self.steps is None else " or more --steps")
            )
        empty(self.out)
        undisturbed = self.undisturbed(steps)
        tell(f"undisturbed: {undisturbed.last} steps, {typical(undisturbed.step_seconds()):.2f} s each")
        refusals = {name: FAULTS[name].refusal(self.recipe, facts_of(undisturbed).machine, self.gpus) for name in names}
        left_out = {name: reason for name, reason in refusals.items() if reason}
        disturbed = self.disturbed([name for name in names if name not in left_out], undisturbed, tell)
        certificate = self.certify(names, left_out, undisturbed, disturbed)
        certificate.write(self.out)
        return certificate

    def steps_for(self, names: Sequence[str]) -> int:
        """Return the step after which the runs are compared, which has a checkpoint: at most the recipe's last."""
        wanted = self.steps or max(LEAST_STEPS, least_steps(names) + SPARE_STEPS)
        wanted = math.ceil(wanted / self.save_every) * self.save_every
        return min(wanted, self.recipe.train.steps or wanted)

    @property
    def save_every(self) -> int:
        """The number of steps between two checkpoints, which is not more than in the recipe."""
        return min(self.recipe.checkpoint.every_steps, SAVE_EVERY)

    def changes(self, steps: int) -> list[str]:
        """Return the overrides of the recipe in both runs: often saved, without evaluations, trackers and uploads.

        None of them decides what is trained.
        """
        recipe, every = self.recipe, self.save_every
        kept = {"checkpoint.every_steps": every, "checkpoint.keep_every": steps, "checkpoint.best": False}
        silent: dict[str, Any] = {"evaluate.every_steps": None, "evaluate.generate": 0, "hub.repo": None}
        silent["checkpoint.remote"] = None
        if not isinstance(recipe.data.validation, float):  # a part of the training data, which must stay held out
            silent["data.validation"] = None
        if recipe.track.names:
            silent["track.names"] = "[]"
        values = {key: getattr(getattr(recipe, key.split(".")[0]), key.split(".")[1]) for key in kept | silent}
        return [f"{key}={_yaml(value)}" for key, value in (kept | silent).items() if values[key] != value]

    def changes_disturbed(self, names: Sequence[str], undisturbed: DrillRun) -> list[str]:
        """Return the overrides of the recipe in the disturbed run: for a hang also a short `train.step_timeout`."""
        longest = max(undisturbed.step_seconds(), default=0.0)
        limit = max(LEAST_TIMEOUT_SECONDS, TIMEOUT_FACTOR * longest)
        timeout = [f"train.step_timeout={limit:.1f}"] if "hang" in names else []
        return self.changes(undisturbed.last) + timeout

    def prepared(self, name: str, steps: int, changes: Sequence[str], **options: Any) -> DrillRun:
        """Return a run of the drill, not started. Each change is a `--set`; `options` are those of `DrillRun`."""
        settings = [part for change in (*self.overrides, *changes) for part in ("--set", change)]
        command = ["train", str(self.file), *settings]
        rng = random.Random(f"{self.seed} {name}")
        return DrillRun(command, self.out / name, self.out / LOG, steps, rng, processes=self.processes, **options)

    def undisturbed(self, steps: int) -> DrillRun:
        """Train without a fault."""
        run = self.prepared(UNDISTURBED, steps, self.changes(steps))
        try:
            run.start()
            run.finish()
        finally:
            run.end()
        return run

    def disturbed(self, names: Sequence[str], undisturbed: DrillRun, tell: Callable[[str], None]) -> DrillRun:
        """Train with faults. An error is added to the problems of the run that is returned."""
        seconds, changes = typical(undisturbed.step_seconds()), self.changes_disturbed(names, undisturbed)
        run = self.prepared(DISTURBED, undisturbed.last, changes, step_seconds=seconds, tell=tell)
        try:
            run.start()
            for name, step in moments(names, run.last, run.rng):
                run.reach(step)
                FAULTS[name].disturb(run)
            run.finish()
        except LoraKitError as error:
            run.problems.append(str(error))
        finally:
            run.end()
        return run

    def certify(
        self, names: Sequence[str], left_out: dict[str, str], undisturbed: DrillRun, disturbed: DrillRun
    ) -> Certificate:
        """Compare the two runs and return the certificate."""
        comparison: Comparison | None = None
        problems = list(disturbed.problems)
        try:
            comparison = compare(undisturbed.run, disturbed.run, undisturbed.last)
            problems += comparison.problems
        except CheckpointError as error:
            problems.append(str(error))
        done = {each.fault for each in disturbed.resumptions}
        missed = {name: NOT_DONE for name in names if name not in done and name not in left_out}
        problems += [f"{name}: {reason}" for name, reason in missed.items()]
        facts = facts_of(undisturbed)
        return Certificate(
            equal=not problems,
            problems=tuple(problems),
            command=self.command(undisturbed.last, names),
            recipe=hash_of(self.recipe),
            changed=tuple(self.changes_disturbed([name for name in names if name not in left_out], undisturbed)),
            steps=undisturbed.last,
            seed=self.seed,
            faults=tuple(disturbed.resumptions),
            left_out=left_out | missed,
            comparison=comparison,
            versions=facts.versions | {"python": python_version()},
            machine=machine_of(facts),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def command(self, steps: int, names: Sequence[str]) -> str:
        """Return the command that repeats this drill."""
        settings = [part for override in self.overrides for part in ("--set", override)]
        options = ["--steps", str(steps), "--seed", str(self.seed), "--faults", ",".join(names)]
        several = ["--processes", str(self.processes)] if self.processes > 1 else []
        return shlex.join(["lora-kit", "drill", str(self.file), "--out", str(self.out), *options, *several, *settings])


def least_steps(names: Sequence[str]) -> int:
    """Return the fewest steps in which faults can be done."""
    return STEPS_BESIDE + sum(FAULTS[name].steps for name in names)


def moments(names: Sequence[str], steps: int, rng: random.Random) -> list[tuple[str, int]]:
    """Return faults in a random order, each with the random step after which it comes.

    Each fault gets a part of the run in proportion to `Fault.steps`. It comes early enough to be over at the end of its
    part.
    """
    begin, longer = 1.0, (steps - STEPS_BESIDE) / max(1, least_steps(names) - STEPS_BESIDE)
    planned = list[tuple[str, int]]()
    for name in rng.sample(list(names), len(names)):
        needed = FAULTS[name].steps
        planned.append((name, int(begin + rng.random() * needed * (longer - 1))))
        begin += needed * longer
    return planned


def facts_of(run: DrillRun) -> RunFacts:
    """Return what the last checkpoint of a run of the drill records about the run."""
    return store.open_checkpoint(store.checkpoint_folder(run.run, run.last)).manifest.run


def machine_of(facts: RunFacts) -> dict[str, Any]:
    """Return what a certificate says about the machine."""
    return {"device": facts.machine.device, "cores": host_cores(), "system": platform(), **facts.computed_by}


def empty(folder: Path) -> None:
    """Delete an earlier drill, if a folder holds one, and create the folder if it is missing.

    Raises:
        InputError: The folder holds something else, or a drill that is still running.
    """
    own = {UNDISTURBED, DISTURBED, LOG, FILE, TEXT}
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := found - own:
        raise InputError(f"{folder}: it holds {min(others)}, which no drill has written; choose another --out")
    for name in (UNDISTURBED, DISTURBED):
        if is_held(folder / name):
            raise InputError(f"{folder / name}: a drill is running here; wait for its end or choose another --out")
    for name in found:
        store.remove(folder / name)
    folder.mkdir(parents=True, exist_ok=True)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()
