# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Better and worse answers
#
# Sometimes there is no single right answer to copy, but you can say of two answers which one is better. Training on
# such **pairs** is called preference tuning. The best-known method is DPO (direct preference optimisation): it makes
# the better answer more likely and the worse one less likely, and stays near the model that it starts from.
#
# The base and the data are the small made-up ones that come with lora_kit. It takes two minutes on two cores.

# %% tags=["parameters"]
changes = []  # changes to both recipes, for example ["train.batch_size=8"]

# %% [markdown]
# ## 1. First the task
#
# Preference tuning corrects a model that can already do its task. So the base first learns the task from good answers:
# this is the quickstart, where a story becomes JSON.

# %%
import lora_kit as lk

taught = lk.train(lk.load_recipe("../recipes/quickstart.yaml", ["evaluate.generate=0", *changes]), "runs/taught")

# %% [markdown]
# ## 2. Look at the pairs
#
# A record has a prompt, a **chosen** and a **rejected** answer. Here the rejected answer names a wrong animal, place or
# person. Both answers are shown after the same prompt.

# %%
recipe = lk.load_recipe("../recipes/preferences.yaml", changes)
lk.preview(recipe, n=2)

# %% [markdown]
# ## 3. Train on the pairs
#
# The run begins with the adapter of the first one (`start_from`), which is also its **reference**: what DPO stays near.
# Its log-probabilities are computed once, before the first step.
#
# An answer's **reward** says how much more likely it has become than for the reference. The *preference accuracy* is
# the share of held-out pairs whose chosen answer has the higher reward. It begins at 50%: nothing has changed yet.

# %%
run = lk.train(recipe, "runs/preferred", start_from=taught.folder)

# %% [markdown]
# ## 4. The rewards
#
# The margin is the mean difference between the two rewards. In a healthy run it grows while the reward of the chosen
# answers does not fall far below zero; if it does, try a smaller learning rate, or `objective.sft_weight`.

# %%
names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
print("step  " + "  ".join(f"{name:>18}" for name in names))
for record in run.metrics[:: max(1, len(run.metrics) // 8)]:
    print(f"{record['step']:4}  " + "  ".join(f"{record[name]:18.3f}" for name in names))

# %% [markdown]
# ## 5. Which answer does each model prefer?
#
# The same question without any reference: does a model give the chosen answer a higher log-probability than the
# rejected one? Base, first adapter and second adapter are asked about the same pairs.

# %%
import json
from importlib.resources import files

import torch

pairs = [
    json.loads(line) for line in (files("lora_kit") / "assets/preferences.validation.jsonl").read_text().splitlines()
]


def log_probability(model, tokenizer, pair, side):
    asked = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    ids = tokenizer(asked + pair[side] + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


def share_preferred(model, tokenizer, count=20):
    better = [
        log_probability(model, tokenizer, p, "chosen") > log_probability(model, tokenizer, p, "rejected")
        for p in pairs[:count]
    ]
    return sum(better) / len(better)


for name, source in (("taught", taught), ("preferred", run)):
    model, tokenizer = lk.load(source.latest)
    if name == "taught":
        with model.disable_adapter():
            print(f"base       {share_preferred(model, tokenizer):.0%}")
    print(f"{name:10} {share_preferred(model, tokenizer):.0%}")

# %% [markdown]
# ## Next
#
# - `docs/objectives.md` has the other methods: ORPO and SimPO, which need no reference, and KTO for thumbs up and down
# - `recipes/dpo-nf4-8b.yaml` is the recipe for a base of 8 billion parameters
