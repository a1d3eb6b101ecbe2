# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Two processes
#
# Training goes faster when several devices share each step. In a notebook, `notebook_launcher` of the accelerate
# library starts one process for each device. Every process calls `lk.train`, and lora_kit divides the work.
#
# Here there are two processes on the computer's processor, so that you need no GPU to try it. The base and the data are
# the small made-up ones that come with lora_kit. With two GPUs, leave out the line that hides them.

# %% tags=["parameters"]
changes = ["train.steps=40", "evaluate.generate=0"]  # changes to the recipe: a short run will do

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hide all GPUs; leave it out to use yours

import lora_kit as lk

recipe = lk.load_recipe("../recipes/quickstart.yaml", changes)

# %% [markdown]
# ## Both at once
#
# What the processes call is a function. (accelerate calls every device a CUDA device in its message; there is none
# here.)

# %%
from accelerate import notebook_launcher


def train(folder):
    lk.train(recipe, folder)


notebook_launcher(train, ("runs/two",), num_processes=2)

# %% [markdown]
# ## One alone
#
# The same recipe, without a launcher.

# %%
run = lk.train(recipe, "runs/one")

# %% [markdown]
# ## The same bytes
#
# Sums of rounded numbers depend on the order in which they are added, so two processes usually give a slightly
# different model than one, and nobody can tell whether a difference means anything. lora_kit always adds in the same
# order. So the two adapters are not similar but equal, byte for byte, and so are the states of the optimizer.

# %%
from hashlib import sha256
from pathlib import Path


def fingerprint(folder, name):
    return sha256(Path(lk.Run(folder).latest, name).read_bytes()).hexdigest()[:16]


for name in ("adapter_model.safetensors", "optimizer.safetensors"):
    one, two = fingerprint("runs/one", name), fingerprint("runs/two", name)
    print(f"{name:28} one process {one}   two processes {two}   {'equal' if one == two else 'DIFFERENT'}")

# %% [markdown]
# For the same reason a run may change its number of processes in the middle: stop it, start it with another number, and
# it goes on as if nothing had happened.
#
# In a terminal, `lora-kit train recipes/quickstart.yaml --out runs/two --processes 2` does the same.
