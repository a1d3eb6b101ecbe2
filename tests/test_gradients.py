"""A run trains what docs/how-it-works.md trains, whatever the packing and the accumulation."""

import json
import shutil

import pytest
import torch
from plain_loop import new_tutorial, plain_loop, relative, tutorial
from safetensors.torch import load_file

from lora_kit.data.plan import prepare_data
from lora_kit.model.source import locate
from lora_kit.model.tokenizer import load_renderer
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop

STEPS = 4
RECIPE = """
base: {{repo: builtin:base, dtype: float32}}
data: {{train: {data}, sequence_length: 160}}
adapter: {{rank: 8, alpha: 16}}
optim: {{learning_rate: 3e-3, warmup: 0.05}}
train: {{steps: {steps}, batch_size: 15, micro_batch_tokens: 480}}
"""


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The page's program with few steps on 200 of its chats: the program, its folder, and what each step had."""
    program, folder = new_tutorial(), tmp_path_factory.mktemp("by_hand")
    chats = program.DATA.read_text().splitlines(keepends=True)[:200]
    program.DATA = folder / "chats.jsonl"
    program.DATA.write_text("".join(chats))
    program.STEPS, program.SAVE_EVERY = STEPS, 2
    seen, update = [], torch.optim.AdamW.step

    def watched(optimizer):
        parameters = optimizer.param_groups[0]["params"]  # A and B alternate; lora_kit has every A, then every B
        seen.append(torch.cat([each.grad.reshape(-1) for each in (*parameters[::2], *parameters[1::2])]))
        update(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        _, losses = program.train(folder / "run")
    return program, folder, seen, losses


@pytest.mark.quick
def test_every_step_of_a_run_is_that_of_the_page(by_hand, tmp_path, captured, jobs):
    program, folder, gradients, losses = by_hand
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(data=program.DATA, steps=STEPS))
    run = loop.train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    (job,) = jobs
    assert len(captured) == len(gradients) == STEPS
    for step, (_, gradient) in enumerate(captured):
        groups = job.plan.micro_batches(step)
        chosen = program.examples_of_step(step, len(job.inputs.data.train))
        assert sorted(index for group in groups for index in group) == sorted(chosen)
        packed = program.pack(job.inputs.data.train.lengths[chosen].tolist(), program.MICRO_BATCH_TOKENS)
        assert len(groups) > 3 and sorted(map(sorted, groups)) == sorted(
            sorted(chosen[place] for place in group) for group in packed
        )
        assert relative(gradient[: job.state.size], gradients[step]) < 1e-5
        assert run.metrics[step]["loss"] == pytest.approx(losses[step], rel=1e-5)
        assert run.metrics[step]["learning_rate"] == pytest.approx(program.learning_rate(step))
    ours = load_file(run.latest / "adapter_model.safetensors")
    theirs = load_file(folder / "run" / f"step-{STEPS:08d}" / "adapter_model.safetensors")
    # AdamW divides each gradient by its size, so where it is almost zero the rounding of 1e-5 grows
    assert ours.keys() == theirs.keys() and all(relative(ours[name], theirs[name]) < 1e-3 for name in ours)


def test_the_page_resumes_to_the_same_adapter(by_hand, tmp_path):
    program, folder, *_ = by_hand
    shutil.copytree(folder / "run", tmp_path / "run")
    newest = tmp_path / "run" / f"step-{STEPS:08d}" / "adapter_model.safetensors"
    expected = newest.read_bytes()
    shutil.rmtree(newest.parent)
    _, losses = program.train(tmp_path / "run")
    assert list(losses) == [STEPS - 2, STEPS - 1] and newest.read_bytes() == expected


def test_the_page_finds_the_trained_tokens_of_a_chat_with_several_turns(recipe_file, data_file):
    recipe = load_recipe(recipe_file)
    renderer = load_renderer(locate(recipe.base, recipe.folder / recipe.base.repo), recipe)
    tokens = prepare_data(recipe, renderer).train
    chats = [json.loads(line)["messages"] for line in data_file.read_text().splitlines()]
    assert max(map(len, chats)) > 2
    for index, messages in enumerate(chats):
        ids, trained = tutorial().tokenize(renderer.tokenizer, messages)
        assert all(
            (ours == theirs.numpy()).all() for ours, theirs in zip(tokens.example(index), (ids, trained), strict=True)
        )


@pytest.mark.parametrize("micro_batch_tokens", [256, 4096])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_equal_a_plain_loop_over_the_examples(
    recipe_file, tmp_path, captured, jobs, monkeypatch, micro_batch_tokens, layout
):
    monkeypatch.setattr("lora_kit.model.probe.leaks_when_packed", lambda *_: layout == "padded")
    changes = [f"train.micro_batch_tokens={micro_batch_tokens}", "train.steps=2", "adapter.dropout=0"]
    recipe = load_recipe(recipe_file, [*changes, "optim.max_grad_norm=null"])
    run = loop.train(recipe, tmp_path / "run")
    (job,) = jobs
    assert job.facts.resolved.layout == layout
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

    def leaky(tokens, members, **named):
        from dataclasses import replace

        batch = keep(tokens, members, **named)
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
