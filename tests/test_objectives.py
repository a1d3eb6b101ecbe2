"""An objective gives sums, and what is reported does not depend on how a step was cut into micro-batches."""

import numpy as np
import pytest
import torch

from lora_kit.data.packing import collate, pack
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop
from lora_kit.training.objectives.sft import Sft


class WithMetrics(Sft):
    """Supervised fine-tuning that also counts what the data says exactly: trained tokens and examples."""

    metrics = ("trained", "conversations")

    def loss(self, model, batch, device):
        loss = super().loss(model, batch, device)
        sums = (torch.tensor(float(loss.weight)), torch.tensor(float(len(batch.segments))))
        return loss._replace(metrics=sums)


@pytest.mark.parametrize("micro_batch_tokens", [256, 2048])
def test_metrics_are_summed_over_the_step_and_divided_by_its_weight(
    micro_batch_tokens, recipe_file, tmp_path, monkeypatch, jobs
):
    monkeypatch.setattr(loop, "objective_of", lambda recipe: WithMetrics())
    changes = ["train.steps=3", f"train.micro_batch_tokens={micro_batch_tokens}"]
    run = loop.train(load_recipe(recipe_file, changes), tmp_path / "run")
    plan, tokens = jobs[0].plan, jobs[0].inputs.data.train
    for record in run.metrics:
        members = [example for group in plan.micro_batches(record["step"] - 1) for example in group]
        weight = sum(tokens.weight(example) for example in members)
        assert record["trained"] == pytest.approx(1.0, rel=1e-6)
        assert record["conversations"] == pytest.approx(len(members) / weight, rel=1e-6)


def test_metrics_change_no_bit_of_the_adapter(recipe_file, tmp_path, monkeypatch, jobs):
    loop.train(load_recipe(recipe_file, ["train.steps=3"]), tmp_path / "plain")
    monkeypatch.setattr(loop, "objective_of", lambda recipe: WithMetrics())
    loop.train(load_recipe(recipe_file, ["train.steps=3"]), tmp_path / "metrics")
    assert torch.equal(jobs[0].state.weights, jobs[1].state.weights)
    assert not torch.equal(jobs[0].state.weights, torch.zeros_like(jobs[0].state.weights))


def test_a_metric_with_the_name_of_a_number_of_the_log_is_refused_at_the_start(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(WithMetrics, "metrics", ("trained", "examples"))
    monkeypatch.setattr(loop, "objective_of", lambda recipe: WithMetrics())
    with pytest.raises(ValueError, match=r"WithMetrics: metrics: metrics\.jsonl has another number named examples"):
        loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "run")


def test_the_weight_of_examples_is_that_of_their_micro_batches(recipe_file, tmp_path, jobs):
    loop.train(load_recipe(recipe_file, ["train.steps=1"]), tmp_path / "run")
    tokens, objective = jobs[0].inputs.data.train, Sft()
    groups = pack(tokens.lengths.tolist(), 256)
    weights = [collate(tokens, group, padded=False).weight for group in groups]
    assert [objective.weight(tokens, group) for group in groups] == weights
    assert objective.weight(tokens, range(len(tokens))) == int(np.sum(weights))
