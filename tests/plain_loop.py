"""Oracles: a run and a step's gradient as docs/how-it-works.md computes them with torch, transformers and peft."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from transformers import AutoModelForCausalLM

from lora_kit.model.state import saved_name

PAGE = Path(__file__).parents[1] / "docs" / "how-it-works.md"


def program_of(page):
    """Return the Python blocks of a Markdown page as one program, whose line numbers are those of the page."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        inside = line != "```" if inside else line == "```python"
        lines.append(line if inside and line != "```python" else "")
    return "\n".join(lines)


def new_tutorial():
    """Return a fresh module with the code of the page; its settings can be changed without an effect elsewhere."""
    module = ModuleType("how_it_works")
    exec(compile(program_of(PAGE), PAGE, "exec"), module.__dict__)
    return module


tutorial = cache(new_tutorial)


def plain_loop(job, weights, members, base=None):
    """Return the gradient of a step and its loss, one example at a time.

    Args:
        job: The run's job.
        weights: The adapter's weights before the step, flat.
        members: The indices of the step's examples.
        base: The base to adapt; by default the run's, loaded again.
    """
    base = base or AutoModelForCausalLM.from_pretrained(
        job.inputs.source.folder,
        dtype=torch.float32,
        attn_implementation="eager",  # the sdpa of transformers 5.17 drops a soft cap
    )
    theirs, start = job.model.peft_config["default"], job.recipe.adapter.init
    # peft subtracts the start of pissa and olora from the weights of the base
    changes = {"lora_dropout": 0.0} | ({"init_lora_weights": start} if start in ("pissa", "olora") else {})
    config = replace(theirs, **changes)
    model = tutorial().add_adapter(base, config, seed=0)
    by_name = {saved_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert by_name.keys() == set(job.state.names)
    parameters = [by_name[name] for name in job.state.names]
    torch.nn.utils.vector_to_parameters(weights.cpu(), parameters)
    examples = [[torch.tensor(array) for array in job.inputs.data.train.example(index)] for index in members]
    weight = sum(int(trained[1:].sum()) for _, trained in examples)
    total = 0.0
    for ids, trained in examples:
        ids = ids.long()
        loss = tutorial().summed_loss(model(input_ids=ids[None]).logits[0], ids, trained) / weight
        loss.backward()
        total += loss.item()
    return torch.cat([parameter.grad.reshape(-1) for parameter in parameters]), total


def relative(ours, theirs):
    """Return the distance of two tensors, as a share of the second."""
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    return float((ours - theirs).norm() / theirs.norm())
