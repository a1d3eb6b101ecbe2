"""A step's gradient is that of a plain loop over its examples, whatever the packing and the accumulation."""

import pytest
import torch
from plain_loop import plain_loop, relative

from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop


@pytest.mark.parametrize("micro_batch_tokens", [256, 400, 4096])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_equal_a_plain_loop_over_the_examples(
    recipe_file, tmp_path, captured, jobs, monkeypatch, micro_batch_tokens, layout
):
    monkeypatch.setattr("lora_kit.model.probe.leaks_when_packed", lambda *_: layout == "padded")
    changes = [f"train.micro_batch_tokens={micro_batch_tokens}", "train.steps=3", "adapter.dropout=0"]
    recipe = load_recipe(recipe_file, [*changes, "optim.max_grad_norm=null"])
    run = loop.train(recipe, tmp_path / "run")
    (job,) = jobs
    assert job.manifest["resolved"]["layout"] == layout
    for step, (weights, gradient) in enumerate(captured):
        groups = job.plan.micro_batches(step)
        members = [index for group in groups for index in group]
        expected, loss = plain_loop(job, weights, members)
        assert relative(gradient, expected) < 1e-5
        assert run.metrics[step]["loss"] == pytest.approx(loss, rel=1e-5)
        assert run.metrics[step]["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)


def test_the_oracle_sees_a_leak_between_packed_examples(recipe_file, tmp_path, captured, jobs, monkeypatch):
    # the same check must fail when positions do not restart, or it proves nothing
    keep = loop.collate

    def leaky(tokens, members, *, padded):
        from dataclasses import replace

        batch = keep(tokens, members, padded=padded)
        return replace(batch, position_ids=torch.arange(batch.ids.shape[1]).numpy()[None])

    monkeypatch.setattr(loop, "collate", leaky)
    recipe = load_recipe(recipe_file, ["train.steps=2", "adapter.dropout=0", "train.micro_batch_tokens=4096"])
    loop.train(recipe, tmp_path / "run")
    weights, gradient = captured[1]
    members = [index for group in jobs[0].plan.micro_batches(1) for index in group]
    assert relative(gradient, plain_loop(jobs[0], weights, members)[0]) > 1e-2


def test_activation_checkpointing_changes_no_bit(recipe_file, tmp_path, captured):
    for number, flag in enumerate(("true", "false")):
        recipe = load_recipe(recipe_file, [f"train.activation_checkpointing={flag}", "train.steps=2"])
        loop.train(recipe, tmp_path / str(number))
    assert torch.equal(captured[1][1], captured[3][1])
