# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Kill a run and watch it go on
#
# Servers fail, jobs are preempted, notebooks are closed. lora_kit keeps every finished step in shared memory and writes
# it to the disk in the background, so a run that is killed loses only the step that it was computing. Here you kill a
# training run yourself, twice. At the end you compare its adapter, byte by byte, with the adapter of a run that nobody
# disturbed.
#
# The base and the data are the small made-up ones that come with lora_kit; a processor is enough.

# %% tags=["parameters"]
changes = ["train.steps=60", "evaluate.generate=0"]  # changes to the recipe: a short run will do

# %% [markdown]
# ## Start a run in the background
#
# The run is started with the command that you would type in a terminal. Two processes matter: the process of the
# command, which lora_kit calls the keeper, and the training process, which it starts and watches.

# %%
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import psutil

import lora_kit as lk

shutil.rmtree("runs/killed", ignore_errors=True)  # of an earlier visit to this notebook
command = [sys.executable, "-m", "lora_kit", "train", "../recipes/quickstart.yaml", "--out", "runs/killed"]
command += [text for change in changes for text in ("--set", change)]
run = lk.Run("runs/killed")


def start():
    """Start the run in the background, or start it again; what it prints goes to a file."""
    with Path("runs/killed.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finished():
    """Return how many steps of the run are finished."""
    return len(run.metrics)


def training_process():
    """Return the training process: the keeper's only grandchild."""
    (helper,) = psutil.Process(keeper.pid).children()
    (worker,) = helper.children()
    return worker


def wait_for(steps):
    """Wait until so many steps are finished."""
    while finished() < steps and keeper.poll() is None:
        time.sleep(0.05)


Path("runs").mkdir(exist_ok=True)
keeper = start()
wait_for(3)
print(f"{finished()} steps are finished")

# %% [markdown]
# ## Kill the training process
#
# `kill()` sends SIGKILL: the process is gone at once and cannot save anything. The keeper sees that and starts training
# again, from the newest finished step in shared memory.

# %%
before = finished()
training_process().kill()
wait_for(before + 2)
resumed = [event for event in run.events if event["kind"] == "resumed"][-1]
print(f"killed after step {before} or a step later; resumed after step {resumed['step']}, and it trains on")

# %% [markdown]
# ## Kill everything
#
# Now the keeper is killed together with all that it started, as when a machine's supervisor kills the whole job. Nobody
# is left to start anything. The last finished step is still in shared memory, and the same command finds it there.

# %%
everything = [*psutil.Process(keeper.pid).children(recursive=True), psutil.Process(keeper.pid)]
for process in everything:
    process.kill()
keeper.wait()
before = finished()
print(f"everything is killed; {before} steps were finished")

keeper = start()
keeper.wait()
resumed = [event for event in run.events if event["kind"] == "resumed"][-1]
print(f"the command went on after step {resumed['step']} and finished all {finished()} steps")

# %% [markdown]
# ## What the run says about it
#
# `lora-kit status runs/killed` shows the same: both interruptions and the number of finished steps that had to be
# computed again, which is zero.

# %%
from lora_kit.runs.status import status

for name, value in status("runs/killed").rows():
    print(f"{name:14} {value}")

# %% [markdown]
# ## Compare the bytes
#
# The same recipe is trained without any disturbance. Both runs must end with the same adapter and the same state of the
# optimizer: not similar, but equal in every byte.

# %%
undisturbed = lk.train(lk.load_recipe("../recipes/quickstart.yaml", changes), "runs/undisturbed")

# %%
for name in ("adapter_model.safetensors", "optimizer.safetensors"):
    first, second = (sha256(Path(each.latest, name).read_bytes()).hexdigest()[:16] for each in (undisturbed, run))
    print(f"{name:28} undisturbed {first}   killed twice {second}   {'equal' if first == second else 'DIFFERENT'}")

# %% [markdown]
# ## Try it with your own recipe
#
# `lora-kit drill my-recipe.yaml`, in a terminal, does this with any recipe: it kills, stops and suspends a run's
# processes at random moments, damages a checkpoint, changes the number of processes, compares the bytes at the end and
# writes a certificate. [docs/reliability.md](../docs/reliability.md) lists what is promised, with limits and proofs.
