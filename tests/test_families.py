"""Whatever the family, a step's gradient is that of a plain loop over its examples."""

import json
import shutil

import pytest
import torch
from plain_loop import plain_loop, relative
from transformers import AutoConfig, AutoModelForCausalLM

from lora_kit import trainer
from lora_kit.base import load_base
from lora_kit.evaluation import evaluate
from lora_kit.generation import generate, load
from lora_kit.kernels.attention import SEGMENT, use_attention
from lora_kit.recipe import Base, load_recipe
from lora_kit.source import locate

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
    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family] | (changes or {}))
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
    changes = [f"base.repo={folder}", "train.steps=3", "adapter.dropout=0", "optim.max_grad_norm=null"]
    run = trainer.train(load_recipe(recipe_file, changes), tmp_path / "run")
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
