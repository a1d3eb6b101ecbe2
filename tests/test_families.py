"""Whatever the family, a step's gradient is that of a plain loop over its examples."""

import json
import os
import shutil

import pytest
import torch
from plain_loop import plain_loop, relative
from runs import state_hash, train
from transformers import AutoConfig, AutoModelForCausalLM

from lora_kit.artifacts.answering import generate
from lora_kit.artifacts.load import load
from lora_kit.errors import RecipeError
from lora_kit.kernels.attention import SEGMENT, attention_of, own_attention
from lora_kit.model.base import load_base
from lora_kit.model.probe import choose_attention
from lora_kit.model.source import locate
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import Base
from lora_kit.training import loop
from lora_kit.training.evaluation import evaluate

SMALL = {
    "vocab_size": 106,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
WINDOW = {"sliding_window": 8}  # shorter than nearly all examples
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
BY_SEGMENT = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS,
    "mixtral": WINDOW | {"num_local_experts": 4},
    "gemma2": WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": WINDOW | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": WINDOW,
    "gpt2": GPT2_NAMES,
    "gpt_neox": {},
    "olmo2": {},
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
ON_PADDED_ROWS = {
    "falcon": {"num_kv_heads": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4, "layer_norm_epsilon": 1e-5},
    "qwen3_next": EXPERTS
    | {
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
FAMILIES = BY_SEGMENT | ON_PADDED_ROWS


def save_family(folder, family, base_folder, changes=None):
    """Save a tiny random model of a family beside the tests' tokenizer."""
    shutil.copytree(base_folder, folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | (changes or FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_family_equal_a_plain_loop_over_the_examples(
    family, recipe_file, tmp_path, base_folder, captured, jobs
):
    folder = save_family(tmp_path / "base", family, base_folder)
    changes = [f"base.repo={folder}", "train.steps=2", "adapter.dropout=0", "optim.max_grad_norm=null"]
    run = loop.train(load_recipe(recipe_file, changes), tmp_path / "run")
    resolved = json.loads((run.latest / "manifest.json").read_text())["resolved"]
    if family in BY_SEGMENT:
        assert (resolved["attention"], resolved["layout"]) == (SEGMENT, "packed")
    else:
        assert (resolved["attention"], resolved["layout"]) != (SEGMENT, "packed")
        assert resolved["layout"] == "padded"
    for step, (weights, gradient) in enumerate(captured):
        members = [index for group in jobs[0].plan.micro_batches(step) for index in group]
        expected, loss = plain_loop(jobs[0], weights, members)
        assert relative(gradient, expected) < 1e-5
        assert run.metrics[step]["loss"] == pytest.approx(loss, rel=1e-5)


def trained(recipe_file, tmp_path, folder, *changes):
    """Train a base for two steps and return the run and what it resolved."""
    recipe = load_recipe(recipe_file, [f"base.repo={folder}", "train.steps=2", "adapter.dropout=0", *changes])
    run = loop.train(recipe, tmp_path / "run")
    return recipe, run, json.loads((run.latest / "manifest.json").read_text())["resolved"]


@pytest.mark.parametrize("family", ["phimoe", "qwen2_moe"])
@pytest.mark.parametrize("window", [8, None])
def test_a_window_that_attention_is_not_told_of_is_not_lost(family, window, tmp_path, base_folder):
    changes = {"sliding_window": window, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    changes |= {"use_sliding_window": window is not None, "max_window_layers": 2, "moe_intermediate_size": 24}
    folder = save_family(tmp_path / "base", family, base_folder, changes)
    settings = Base(repo="x", dtype="float32")
    model = load_base(locate(settings, folder), settings, torch.device("cpu"))
    attention, layout = choose_attention(model, settings, torch.device("cpu"))
    assert (attention, layout) == ("sdpa" if window else SEGMENT, "packed")
    assert attention_of(model) == attention


@pytest.mark.quick
def test_a_named_attention_is_not_replaced(recipe_file, tmp_path, base_folder):
    _, _, resolved = trained(recipe_file, tmp_path, base_folder, "base.attention=sdpa")
    assert (resolved["attention"], resolved["layout"]) == ("sdpa", "packed")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss", "falcon"])
def test_evaluation_and_generation_with_a_cache_agree_with_a_loaded_checkpoint(
    family, recipe_file, tmp_path, base_folder, jobs
):
    folder = save_family(tmp_path / "base", family, base_folder)
    recipe, run, _ = trained(recipe_file, tmp_path, folder, "data.validation=0.3", "evaluate.generate=2")
    score = evaluate(recipe, run.latest)["adapter"]
    assert score.loss == pytest.approx(run.result["metrics"]["adapter"]["loss"], rel=1e-6)
    assert score.exact_match == run.result["metrics"]["adapter"]["exact_match"]
    model, tokenizer = load(run.latest)
    asked = ["abc", "a longer question here"]
    assert generate(jobs[0].model, tokenizer, asked, max_new_tokens=20) == generate(
        model, tokenizer, asked, max_new_tokens=20
    )


def test_a_resume_keeps_the_attention_and_the_bytes(recipe_file, tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        loop.train(load_recipe(recipe_file, ["train.steps=4"]), tmp_path / name)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    monkeypatch.setattr("lora_kit.training.choices.choose_attention", lambda *_: pytest.fail("chosen again"))
    run = loop.train(load_recipe(recipe_file, ["train.steps=4"]), tmp_path / "cut")
    assert json.loads((run.latest / "manifest.json").read_text())["resolved"]["attention"] == SEGMENT
    assert state_hash(tmp_path / "cut", 4) == state_hash(tmp_path / "whole", 4)
    monkeypatch.undo()
    changed = load_recipe(recipe_file, ["train.steps=5", "base.attention=sdpa"])
    run = loop.train(changed, tmp_path / "cut", accept=["train.steps", "base.attention"])
    assert json.loads((run.latest / "manifest.json").read_text())["resolved"]["attention"] == "sdpa"


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_bytes_by_segment(recipe_file, tmp_path, base_folder):
    folder = save_family(tmp_path / "base", "gpt_oss", base_folder)
    changes = ("--set", f"base.repo={folder}", "--set", "train.steps=2")
    train(recipe_file, tmp_path / "2", *changes, processes=2)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[: max(1, len(cores) // 2)])  # for as many threads as each of the two had
    try:
        train(recipe_file, tmp_path / "1", *changes, fresh=True)
    finally:
        os.sched_setaffinity(0, cores)
    assert state_hash(tmp_path / "1", 2) == state_hash(tmp_path / "2", 2)


EXPERTS_BY_NAME = '["q_proj","experts.gate_up_proj","experts.down_proj"]'


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_trained_when_they_are_named(family, recipe_file, tmp_path, base_folder, captured, jobs):
    folder = save_family(tmp_path / "base", family, base_folder)
    changes = [f"adapter.targets={EXPERTS_BY_NAME}", "optim.max_grad_norm=null"]
    _, run, _ = trained(recipe_file, tmp_path, folder, *changes)
    assert sum(".experts." in name for name in jobs[0].state.names) == 8
    for step, (weights, gradient) in enumerate(captured):
        members = [index for group in jobs[0].plan.micro_batches(step) for index in group]
        assert relative(gradient, plain_loop(jobs[0], weights, members)[0]) < 1e-5
    ids = torch.arange(20)[None]
    loaded, _ = load(run.latest)
    with torch.no_grad(), own_attention(jobs[0].model):
        assert relative(loaded(ids).logits, jobs[0].model.eval()(ids).logits) < 1e-5
        with loaded.disable_adapter():
            base = loaded(ids).logits
        assert not torch.equal(loaded(ids).logits, base)


def test_a_layer_that_no_gradient_reaches_is_an_error_at_the_first_step(recipe_file, tmp_path, monkeypatch):
    def with_a_spare_layer(*arguments):
        base = load_base(*arguments)
        base.model.layers[0].spare = torch.nn.Linear(32, 32).requires_grad_(False)
        return base

    monkeypatch.setattr("lora_kit.training.setup.load_base", with_a_spare_layer)
    with pytest.raises(RecipeError) as refusal:
        loop.train(load_recipe(recipe_file), tmp_path / "run")
    assert str(refusal.value).splitlines() == [
        "adapter.targets: 2 tensors got no gradient in the first step, because the base does not use their layers; "
        "remove these layers from the targets:",
        "  base_model.model.model.layers.0.spare.lora_A.weight",
        "  base_model.model.model.layers.0.spare.lora_B.weight",
    ]
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
