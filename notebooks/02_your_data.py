# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own data
#
# You have examples of what a model should answer. This notebook takes them from Python objects to a trained adapter,
# and shows on the way how lora_kit helps you to see mistakes *before* you train.
#
# It uses the tiny base that comes with lora_kit, and invented orders as data, so that it runs anywhere in a minute.
# With a base from the Hub and a file of yours, nothing else changes.

# %% tags=["parameters"]
changes = []  # changes to the recipe, for example ["train.steps=300"]

# %% [markdown]
# ## 1. Records
#
# A record is a conversation: what the user said, and what the assistant should answer. Here, people order food in their
# own words and the assistant writes a line for the kitchen. Yours will come from a file or a database; what counts is
# what a record looks like in the end.

# %%
import random

random.seed(0)
names = ["Nadu", "Lorbik", "Tamisel", "Jofur", "Pelano", "Rudis", "Kimaro", "Vosel"]
names += ["Hadrin", "Mubel", "Sotar", "Fenik", "Galoro", "Bitha", "Zanul", "Corvi"]
foods = ["pies", "plums", "pears", "rolls", "cakes", "soups", "beans", "eggs"]
wordings = ["{name} wants {count} {food}.", "{count} {food} for {name}, please.", "Please bring {name} {count} {food}."]


def order(name, food):
    count = random.randint(2, 9)
    said = random.choice(wordings).format(name=name, count=count, food=food)
    return {
        "messages": [
            {"role": "user", "content": said},
            {"role": "assistant", "content": f"{count} x {food} -> {name}"},
        ]
    }


records = [order(name, food) for name in names for food in random.sample(foods, 6)]
random.shuffle(records)
records[0]

# %% [markdown]
# ## 2. A file and a recipe
#
# One record a line: that is a JSONL file. JSON, CSV and Parquet work too, and so do other layouts of a record (Alpaca,
# ShareGPT, prompt and completion, plain text); lora_kit finds out which one it is.

# %%
import json
from pathlib import Path

import lora_kit as lk

folder = Path("orders")
folder.mkdir(exist_ok=True)


def save(records):
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "orders.jsonl").write_text("".join(lines))


save(records)
(folder / "recipe.yaml").write_text("""
base:
  repo: builtin:base          # for your own: a name on the Hub, or a folder
  dtype: float32              # bfloat16, the default, is right for a large base
data:
  train: orders.jsonl
  validation: 0.2             # a fifth is held out: not trained on, asked at the end
  sequence_length: 128
adapter: {rank: 8, alpha: 16}
optim: {learning_rate: 3e-3}  # high, because the base is tiny; 2e-4, the default, is right for a large one
train: {steps: 120, batch_size: 16}
evaluate: {generate: 20}
""")

recipe = lk.load_recipe(folder / "recipe.yaml", changes)

# %% [markdown]
# ## 3. Look
#
# A model does not see records but text with marks for whose turn it is. Always look at that text. The model learns to
# write what is green; everything else it only reads. Note that the mark that ends an answer is green as well: without
# it, the model would not learn to stop.

# %%
lk.preview(recipe, n=3)

# %% [markdown]
# ## 4. Check
#
# `check` reads all of the data and tells everything that is wrong at once, each with its file and line. Let us make two
# mistakes to see it: a misspelled role, and an answer that is missing.

# %%
from lora_kit.check import check

wrong = json.loads(json.dumps(records))  # a copy
wrong[2]["messages"][1]["role"] = "asistant"
wrong[6]["messages"].pop()
save(wrong)
check(recipe)

# %% [markdown]
# Nothing starts with data like that. With the good records:

# %%
save(records)
check(recipe)

# %% [markdown]
# ## 5. Train

# %%
run = lk.train(recipe, "runs/orders")

# %% [markdown]
# ## 6. Try it
#
# With names that are not in the data, and one food that is not either.

# %%
asked = [
    "Kolvina wants 7 plums.",
    "3 eggs for Bodar, please.",
    "Please bring Sirano 4 melons.",
]
model, tokenizer = lk.load(run.latest)
for said, written in zip(asked, lk.generate(model, tokenizer, asked, max_new_tokens=60), strict=True):
    print(f"{said:32} {written}")

# %% [markdown]
# Some answers may be wrong: this base has read little, and there are fewer than a hundred records. More records, more
# steps or a better base are the three things to try, in this order. Put `changes = ["train.steps=300"]` into the first
# cell and another folder into the training's, and compare the held-out loss.
