# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your first adapter
#
# In a minute or two, on any computer, you will teach a small language model something that it cannot do, and see the
# difference.
#
# The large model that you start from is called the **base**. It stays as it is. What you train is an **adapter**: a few
# small matrices that are added to the base's layers. That is what LoRA means, and it is why the result is a small file.
#
# **What is real here, and what is not.** The base of this notebook is tiny and comes with lora_kit. It can only read
# and write made-up little stories, and the data is made up too, so that nothing has to be downloaded. The training is
# the real one: the same few lines train a model of billions of parameters on your own data.

# %% tags=["parameters"]
changes = []  # changes to the recipe, for example ["train.steps=300", "adapter.rank=16"]
hub_name = ""  # where to publish the adapter, for example "your-name/first-adapter"

# %% [markdown]
# ## The recipe
#
# A **recipe** is one short file that says everything about a training: which base, which data, for how long. Open
# `recipes/quickstart.yaml` to read this one; every field is explained in `docs/recipes.md`.
#
# Here are two of its examples. The user tells a story and the assistant answers with the facts. The model learns to
# write what is green; it reads the rest.

# %%
import lora_kit as lk

recipe = lk.load_recipe("../recipes/quickstart.yaml", changes)
lk.preview(recipe, n=2)

# %% [markdown]
# ## Train
#
# The **loss** says how surprised the model is by the right answers. It should fall.
#
# At the end, base and adapter answer stories that neither of them has seen, and the answers are compared with the right
# ones, letter by letter: that is the *exact match*.

# %%
run = lk.train(recipe, "runs/first")

# %% [markdown]
# All of it is in the folder `runs/first`. Stop the cell above in the middle if you like: it finishes its step and
# saves. Run it again and it goes on from there, and ends with the same bytes as if you had not stopped it. Run it once
# more after that and it says that there is nothing left to do.

# %% [markdown]
# ## Before and after
#
# The same stories, answered without and with the adapter. Write some of your own! Keep them simple: the base knows only
# a few hundred words, and even with the adapter it will not be right every time.

# %%
stories = [
    "One winter, Zorimel saw a shy fox at the mill. It was hungry and liked bread.",
    "A calm goose lived by the harbor, and Tabuno fed it. It liked plums, but not rice.",
    "In the library, Wikarith sold honey. A fat bear watched it all every evening.",
]

model, tokenizer = lk.load(run.latest)
after = lk.generate(model, tokenizer, stories, max_new_tokens=100)
with model.disable_adapter():
    before = lk.generate(model, tokenizer, stories, max_new_tokens=100)

for story, one, other in zip(stories, before, after, strict=True):
    print(f"{story}\n   before:  {one}\n   after:   {other}\n")

# %% [markdown]
# ## The numbers
#
# `run.metrics` has a record for every step, ready for any plotting library. A run can be opened again at any time, by
# the name of its folder.

# %%
run.metrics[-1]

# %%
lk.Run("runs/first")

# %% [markdown]
# ## Share it
#
# An adapter is a small folder that other tools read as it is: transformers, PEFT, vLLM. `lk.push` puts it on the
# Hugging Face Hub, as a private repository. To do that, log in once (type `hf auth login` in a terminal) and fill in
# `hub_name` in the first cell. Without both, this cell does nothing.

# %%
from huggingface_hub import get_token

if get_token() is None:
    print("Not pushed: there is no Hub token on this computer. `hf auth login` in a terminal sets one.")
elif not hub_name:
    print("Not pushed: hub_name, in the first cell, is empty.")
else:
    print(lk.push(run.latest, hub_name, private=True))

# %% [markdown]
# ## Next
#
# - [Your own data](02_your_data.ipynb): from records that you write to a trained adapter
# - [Two processes](03_two_processes.ipynb): the same training, shared between processes, with the same result
# - [Kill and resume](05_kill_and_resume.ipynb): a run that is killed twice ends with the bytes of an undisturbed run
# - A base of your choice: write its name from the Hub into the recipe, as in `recipes/sft-bf16-1b.yaml`
