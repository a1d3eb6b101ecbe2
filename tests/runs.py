"""Start real runs for the tests: command line, environment, what they left behind."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD", "LOCAL_"))}


def command(recipe, out, *more, processes=1):
    """Return the command line that trains a recipe."""
    many = ["--processes", str(processes)] if processes > 1 else []
    return [sys.executable, "-m", "lora_kit", "train", str(recipe), "--out", str(out), *many, *more]


def start(recipe, out, *more, processes=1, environment=None):
    """Start a training command and return the process."""
    return subprocess.Popen(
        command(recipe, out, *more, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT | (environment or {}),
        start_new_session=True,
    )


def train(recipe, out, *more, processes=1, expect=0, environment=None):
    """Train to the end and return what was printed."""
    process = start(recipe, out, *more, processes=processes, environment=environment)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit code {process.returncode}\n{printed}"
    return printed


def go_on(recipe, out, *changes):
    """Train to the end in this process, which has imported everything; return what that returns."""
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training import loop

    return loop.train(load_recipe(recipe, changes), out)


def state_hash(run, step):
    """Return a hash of the adapter's and the optimizer's bytes after a step."""
    folder = Path(run) / "checkpoints" / f"step-{step:08d}"
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def wait_for_lines(path, count, process):
    """Block until a run's metrics have `count` lines; fail if the run ends before."""
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stdout.read()
