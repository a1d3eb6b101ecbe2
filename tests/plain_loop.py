"""The oracle of a step's gradient: transformers and peft, one example at a time."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def plain_loop(job, weights, members, base=None):
    """The oracle: transformers and peft, one example at a time, the loss of all trained tokens divided once."""
    base = base or AutoModelForCausalLM.from_pretrained(
        job.source.folder,
        dtype=torch.float32,
        attn_implementation="eager",  # the sdpa of transformers 5.17 drops a soft cap
    )
    theirs = job.model.peft_config["default"]
    model = get_peft_model(
        base,
        LoraConfig(
            r=job.recipe.adapter.rank,
            lora_alpha=job.recipe.adapter.alpha,
            target_modules=theirs.target_modules,
            target_parameters=theirs.target_parameters,
            task_type="CAUSAL_LM",
        ),
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.nn.utils.vector_to_parameters(weights.cpu(), parameters)
    weight = sum(int(job.data.train.example(index)[1][1:].sum()) for index in members)
    total = 0.0
    for index in members:
        ids, trained = (torch.tensor(array) for array in job.data.train.example(index))
        logits = model(input_ids=ids[None].long()).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:].long(), reduction="none")
        loss = losses[trained[1:]].sum() / weight
        loss.backward()
        total += loss.item()
    return torch.cat([parameter.grad.reshape(-1) for parameter in parameters]), total


def relative(ours, theirs):
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    return float((ours - theirs).norm() / theirs.norm())
