"""A step's gradient is that of a plain loop over its examples, whatever the packing and the accumulation."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_kit import trainer
from lora_kit.recipe import load_recipe


@pytest.fixture
def captured(monkeypatch):
    """The flat gradient and weights that reach the optimizer in each step, before its update."""
    seen = []
    update = trainer.optim.adamw

    def spy(weights, gradient, *rest, **named):
        seen.append((weights.clone(), gradient.clone()))
        update(weights, gradient, *rest, **named)

    monkeypatch.setattr(trainer.optim, "adamw", spy)
    return seen


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that the trainer prepares."""
    seen = []
    prepare = trainer.prepare_job
    monkeypatch.setattr(trainer, "prepare_job", lambda *a, **k: seen.append(prepare(*a, **k)) or seen[-1])
    return seen


def plain_loop(job, weights, members):
    """The oracle: transformers and peft, one example at a time, the loss of all trained tokens divided once."""
    base = AutoModelForCausalLM.from_pretrained(job.source.folder, dtype=torch.float32)
    settings = job.recipe.adapter
    model = get_peft_model(
        base,
        LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.nn.utils.vector_to_parameters(weights, parameters)
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
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("micro_batch_tokens", [256, 400, 4096])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_equal_a_plain_loop_over_the_examples(
    recipe_file, tmp_path, captured, jobs, monkeypatch, micro_batch_tokens, layout
):
    monkeypatch.setattr("lora_kit.job.leaks_when_packed", lambda *_: layout == "padded")
    changes = [f"train.micro_batch_tokens={micro_batch_tokens}", "train.steps=3", "adapter.dropout=0"]
    recipe = load_recipe(recipe_file, [*changes, "optim.max_grad_norm=null"])
    run = trainer.train(recipe, tmp_path / "run")
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
    keep = trainer.collate

    def leaky(tokens, members, *, padded):
        from dataclasses import replace

        batch = keep(tokens, members, padded=padded)
        return replace(batch, position_ids=torch.arange(batch.ids.shape[1]).numpy()[None])

    monkeypatch.setattr(trainer, "collate", leaky)
    recipe = load_recipe(recipe_file, ["train.steps=2", "adapter.dropout=0", "train.micro_batch_tokens=4096"])
    trainer.train(recipe, tmp_path / "run")
    weights, gradient = captured[1]
    members = [index for group in jobs[0].plan.micro_batches(1) for index in group]
    assert relative(gradient, plain_loop(jobs[0], weights, members)[0]) > 1e-2


def test_activation_checkpointing_changes_no_bit(recipe_file, tmp_path, captured):
    for number, flag in enumerate(("true", "false")):
        recipe = load_recipe(recipe_file, [f"train.activation_checkpointing={flag}", "train.steps=2"])
        trainer.train(recipe, tmp_path / str(number))
    assert torch.equal(captured[1][1], captured[3][1])
