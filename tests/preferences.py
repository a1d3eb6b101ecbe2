"""Preference data and a tiny model with an adapter, for the tests of objectives over pairs and labelled answers."""

from contextlib import ExitStack

import numpy as np
import torch
from conftest import make_records
from transformers import AutoModelForCausalLM

from lora_kit.data.tokens import Tokens
from lora_kit.kernels.attention import use_attention
from lora_kit.kernels.fusing import use_kernels
from lora_kit.model.adapter import inject
from lora_kit.model.forward import model_inputs
from lora_kit.model.probe import probe_batch
from lora_kit.model.state import flatten
from lora_kit.recipe.schema import Adapter
from lora_kit.training.objectives.objective import Computing
from lora_kit.training.processes import Processes
from lora_kit.training.reference import Reference, as_reference

ADAPTER = Adapter(rank=4, alpha=8)
LIMIT = 64


def random_tokens(count=7, *, unpaired=False, seed=0):
    """Return pairs, or answers with a label, of random tokens: prompts of 2 to 9 and answers of 1 to 12 tokens."""
    rng = np.random.default_rng(seed)
    examples, chosen = [], []
    for number in range(count):
        prompt, sides = rng.integers(6, 90, rng.integers(2, 10)), []
        for _ in range(1 if unpaired else 2):
            answer = rng.integers(6, 90, rng.integers(1, 13))
            sides.append((np.append(prompt, answer), np.arange(len(prompt) + len(answer)) >= len(prompt)))
        examples.append(tuple(np.concatenate(parts) for parts in zip(*sides, strict=True)))
        chosen.append(len(sides[0][0]) if not unpaired or number % 3 else 0)
    return Tokens.of(examples, chosen)


def preference_records(count):
    """Return pairs whose prompts are lists of messages."""
    records = []
    for number, record in enumerate(make_records(count)):
        *prompt, answer = record["messages"]
        records.append({"prompt": prompt, "chosen": [answer], "rejected": answer["content"] + "h" * (number % 5 + 1)})
    return records


def tuned(base_folder, *, micro_batch_tokens=128, padded=False, kernels=True):
    """Return how a tiny model computes whose adapter is not that of the start, and its state."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).requires_grad_(False)
    base.config.use_cache = False
    use_attention(base, "sdpa" if padded else "segment")
    model = inject(base, ADAPTER, seed=0, name="base", revision=None)
    state = flatten(model.train())
    torch.manual_seed(1)
    state.weights.add_(0.05 * torch.randn_like(state.weights))
    device = torch.device("cpu")
    if kernels:
        use_kernels(model, None, model_inputs(model, probe_batch([np.arange(32)]), device))
    return Computing(model, micro_batch_tokens, padded, Processes(0, 1, device, ExitStack())), state


def with_reference(tokens, computing, columns):
    """Return tokens with the log-probabilities that the base without the adapter gives to them; nothing is cached."""
    with as_reference(computing.model):
        reference = Reference(computing, columns, LIMIT, {})
        return tokens.with_reference(reference.computed(tokens, range(len(tokens))))


def outcome(objective, tokens, computing, state):
    """Return the loss of all examples as one step, its figures, and the gradient of the adapter."""
    from lora_kit.data.packing import collate

    members, sums = range(len(tokens)), []
    weight = objective.weight(tokens, members)
    of_step = objective.for_examples(tokens, members, computing)
    state.reduced.zero_()
    for group in computing.groups(tokens.places(slice(None), padded=computing.padded)):
        loss = of_step.loss(computing.model, collate(tokens, group, padded=computing.padded), computing.device)
        loss.divided(weight).total.backward()
        sums.append([loss.total.item(), *(float(metric) for metric in loss.metrics)])
    total, *metrics = (sum(column) / weight for column in zip(*sums, strict=True))
    return total, dict(objective.figures(dict(zip(objective.metrics, metrics, strict=True)))), state.gradient.clone()
